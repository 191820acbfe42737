"""Compare a recorded execution with its replay: both are rendered as lines, and the lines are compared."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Final

from dspex_persist.replay.execution import ReplayedCall
from dspex_persist.replay.recorded import RecordedExecution, Written
from dspex_persist.replay.report import Aspect, Divergence, diff_of
from dspex_persist.state.events import (
    DependencyAdded,
    DependencyRemoved,
    Event,
    ExecutionEnded,
    OptimizationStarted,
    OptimizationStopped,
    VariableRegistered,
)
from dspex_persist.state.model import Change, ChangeKind, Value
from dspex_persist.state.recording import RecordedVersion

Lines = list[str]

_WIDE: Final = 100
_PASSING: Final = (
    # The number in an execution's id is that of a commit of its own file.
    (re.compile(r"exec_\d+_(?=[0-9a-f]{24})"), "exec_"),
    (re.compile(r" at 0x[0-9a-f]+"), ""),
)
"""Text that differs between files or processes, with its replacement."""
_SUMMARIES: Final = {
    Aspect.CALLS: "it calls other tools than recorded",
    Aspect.DRAWS: "it asks for the time {new:,} times, recorded are {recorded:,}",
    Aspect.PUBLISHED: "it publishes something else than recorded",
    Aspect.ERROR: "it fails with another error than recorded",
    Aspect.RESULT: "its result is not the recorded one",
    Aspect.WRITES: "it writes something else than recorded",
    Aspect.DEPENDENCIES: "it adds or removes other dependencies than recorded",
    Aspect.LOCKS: "it starts or stops other optimizations than recorded",
}
_OF_SUCCESS: Final = (Aspect.RESULT, Aspect.WRITES, Aspect.DEPENDENCIES, Aspect.LOCKS)
"""Aspects that a failed execution does not have, so they are not compared if only one of the two failed."""


def compare(call: ReplayedCall, names: Mapping[str, str], whole: bool) -> Iterator[Divergence]:
    """Yield the differences between a replayed execution and its recording.

    Args:
        call: The replayed execution.
        names: The names of the variables that existed when it began, by id.
        whole: Whether to compare dependencies and locks, which the recording has only for a whole commit.
    """
    recorded = call.recorded
    assert recorded is not None, "an unexpected call has no recording to compare with"
    lm_differences = [str(difference).splitlines() for difference in call.lm]
    for headline, *diff in lm_differences:
        yield Divergence(Aspect.LM, headline, recorded.number, recorded.id, tuple(diff))
    versions = (*recorded.written, *(version for version, _ in recorded.published))
    hidden = frozenset((version.name, version.version) for version in versions if version.masked)
    before = _account_of(recorded, names, hidden)
    after = _account_of(call, names, hidden)
    after[Aspect.ERROR] = _without_diffs(after[Aspect.ERROR], lm_differences)
    one_failed = bool(before[Aspect.ERROR]) != bool(after[Aspect.ERROR])
    for what, template in _SUMMARIES.items():
        then, now = before[what], after[what]
        if then == now or (one_failed and what in _OF_SUCCESS) or (what in _OF_SUCCESS[2:] and not whole):
            continue
        if what is Aspect.ERROR and one_failed:
            template = "it fails, and did not when it was recorded" if now else "it does not fail as it was recorded"
        summary = template.format(recorded=len(then), new=len(now))
        yield Divergence(what, summary, recorded.number, recorded.id, diff_of(then, now))


def _without_diffs(error: Lines, lm_differences: Iterable[Lines]) -> Lines:
    """An error message without the diffs of the LM calls that it quotes: those were reported already."""
    text = "\n".join(error)
    reported = {line for headline, *diff in lm_differences if headline in text for line in diff}
    return [line for line in error if line not in reported]


def _account_of(
    execution: RecordedExecution | ReplayedCall, names: Mapping[str, str], hidden: frozenset[tuple[str, int]]
) -> dict[Aspect, Lines]:
    """An execution as lines, by aspect. `hidden`: the versions whose values are masked in the recording."""
    end = execution.end
    if isinstance(execution, ReplayedCall):
        events, calls = execution.events, [_call_line(each.tool, each.parameters) for each in execution.calls]
        versions = [_version_of(change) for change in execution.changes]
        written: Iterable[RecordedVersion] = Written(versions).take(end.writes if end else ())
        published = [_version_of(change) for change in execution.published]
    else:
        events, calls = execution.events, [_call_line(each.tool, each.parameters) for each in execution.children]
        written, published = execution.written, [version for version, _ in execution.published]
    registered = {event.variable_id: event for event in events if isinstance(event, VariableRegistered)}
    named = {**names, **{variable_id: event.name for variable_id, event in registered.items()}}
    account = {
        Aspect.CALLS: calls,
        Aspect.DRAWS: [each.isoformat() for each in end.times] if end else [],
        Aspect.PUBLISHED: [line for version in published for line in _kept_lines(version.name, version, hidden)],
        Aspect.ERROR: _error_lines(end) if end else [],
        Aspect.RESULT: _value_lines("result", end.result) if end else [],
        Aspect.WRITES: [line for version in written for line in _write_lines(version, registered, hidden)],
        Aspect.DEPENDENCIES: [line for each in events for line in _dependency_lines(each, named)],
        Aspect.LOCKS: [line for each in events for line in _lock_lines(each, named)],
    }
    return {what: [_lasting(line) for line in lines] for what, lines in account.items()}


def _lasting(line: str) -> str:
    for pattern, instead in _PASSING:
        line = pattern.sub(instead, line)
    return line


def _version_of(change: Change) -> RecordedVersion:
    version = change.version
    return RecordedVersion(
        version.variable_id,
        change.variable.name,
        version.version,
        version.kind,
        version.source,
        version.value,
        version.metadata,
    )


# Lines


def _call_line(tool: str, parameters: Mapping[str, Value]) -> str:
    return f"{tool}({', '.join(f'{name}={value.json}' for name, value in sorted(parameters.items()))})"


def _error_lines(end: ExecutionEnded) -> Lines:
    if end.failure is not None:
        return f"{end.failure.type}: {end.failure.message}".splitlines()
    return [f"conflict: {conflict.name} {conflict.reason}".rstrip() for conflict in end.conflicts]


def _write_lines(
    version: RecordedVersion, registered: Mapping[str, VariableRegistered], hidden: frozenset[tuple[str, int]]
) -> Lines:
    head = f"{version.name} v{version.version}"
    metadata = f" {json.dumps(dict(sorted(version.metadata.items())), ensure_ascii=False)}" if version.metadata else ""
    if version.kind is ChangeKind.DELETED:
        return [f"{head} deleted{metadata}"]
    if version.kind is not ChangeKind.SET:
        head += f" {version.kind.value.replace('_', ' ')}"
    facts = registered.get(version.variable_id) if version.kind is ChangeKind.REGISTERED else None
    if facts is not None:
        head += f" as {facts.type}" + (f" with {facts.constraints}" if facts.constraints else "")
    return _kept_lines(head + metadata, version, hidden)


def _kept_lines(head: str, version: RecordedVersion, hidden: frozenset[tuple[str, int]]) -> Lines:
    if (version.name, version.version) in hidden:
        return [f"{head} = (kept out of the recording)"]
    return _value_lines(head, version.value)


def _value_lines(head: str, value: Value | None) -> Lines:
    """`head = value`; a long value takes several lines, so that a diff shows the part that differs."""
    if value is None:
        return []
    text = value.json
    if value.binary is not None:
        text += f" with {len(value.binary):,} bytes, SHA-256 {sha256(value.binary).hexdigest()}"
    elif len(text) > _WIDE:
        text = json.dumps(json.loads(text), ensure_ascii=False, indent=1)
    return f"{head} = {text}".splitlines()


def _dependency_lines(event: Event, names: Mapping[str, str]) -> Lines:
    if not isinstance(event, DependencyAdded | DependencyRemoved):
        return []
    kind = f" ({event.type})" if event.type else ""
    verb = "depends on" if isinstance(event, DependencyAdded) else "no longer depends on"
    return [f"{_name(event.from_id, names)} {verb} {_name(event.to_id, names)}{kind}"]


def _lock_lines(event: Event, names: Mapping[str, str]) -> Lines:
    match event:
        case OptimizationStarted():
            config = json.dumps(dict(event.config), sort_keys=True)
            return [f"{_name(event.variable_id, names)} started by {event.optimizer_id} with {config}"]
        case OptimizationStopped():
            return [f"{_name(event.variable_id, names)} {event.reason}"]
    return []


def _name(variable_id: str, names: Mapping[str, str]) -> str:
    return names.get(variable_id, variable_id)
