"""One execution in full, for people."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from dspex_persist.audit import AuditSource, ExecutionDetail, HistoryEntry, ReadEntry, lm_calls_of
from dspex_persist.cli.audit.calls import totals_text
from dspex_persist.cli.audit.rendering import (
    STYLES,
    Renderer,
    duration_text,
    json_text,
    shortened,
    value_text,
)
from dspex_persist.cli.audit.tables import entries_text, why
from dspex_persist.cli.output import plain, plain_lines
from dspex_persist.state.errors import NotInHistoryError, VersionNotFoundError
from dspex_persist.state.model import REASON, LogEntry, without_reason

_MOST_TOLD: Final = 20


def show_execution(source: AuditSource, detail: ExecutionDetail, look: Renderer) -> None:
    """Print an execution with everything that it called."""
    look.print(_tree(detail, _Changes(source, detail.summary.session_id, detail.history), look))


class _Changes:
    """Formats the reads and writes of an execution, and of those that it called, with their values."""

    def __init__(self, source: AuditSource, session: str, history: Iterable[HistoryEntry]) -> None:
        self._source = source
        self._session = session
        self._entries: dict[tuple[str, int], list[HistoryEntry]] = {}
        for entry in history:
            self._entries.setdefault((entry.name, entry.version), []).append(entry)

    def lines(self, changes: Iterable[tuple[str, int]]) -> Iterator[str]:
        """Yield one line for each change. A name that was used twice may have two changes with the same version."""
        for change in dict.fromkeys(changes):
            if change not in self._entries:
                yield f"{plain(change[0])}: version {change[1]} is pruned"
            for entry in self._entries.get(change, ()):
                what = f"{self._before(entry)} → {value_text(entry.value, entry.masked)}"
                metadata = f", {entries_text(entry.metadata)}" if entry.metadata else ""
                kind = f"{entry.kind.value}{metadata}{why(entry)}"
                yield f"{plain(entry.name)}: {what}  (version {entry.version}, {kind})"

    def read(self, read: ReadEntry) -> str:
        """Return the line for one read: the value found under a name or id."""
        if read.version is None or read.variable_id is None:
            return f"{plain(read.asked)}: not there"
        by_id = f", looked up as {plain(read.asked)}" if read.asked != read.name else ""
        return f"{plain(read.name or '')} = {self._value(read.variable_id, read.version)} (v{read.version}{by_id})"

    def _before(self, entry: HistoryEntry) -> str:
        return "not there" if entry.version == 0 else self._value(entry.variable_id, entry.version - 1)

    def _value(self, variable_id: str, version: int) -> str:
        try:
            entry = self._source.version(self._session, variable_id, version)
        except (VersionNotFoundError, NotInHistoryError):
            return "pruned"
        return value_text(entry.value, entry.masked)


def _tree(detail: ExecutionDetail, changes: _Changes, look: Renderer) -> Any:
    from rich.text import Text
    from rich.tree import Tree

    summary = detail.summary
    title = Text.assemble(
        (plain(summary.tool), "bold"),
        f"  {plain(summary.execution_id)}  ",
        (summary.status.value, STYLES.get(summary.status, "")),
        f"  {duration_text(summary.duration_us)}" if summary.duration_us is not None else "",
    )
    tree = Tree(title, guide_style="dim")
    for heading, lines in _sections(detail, changes, look):
        shown = list(lines)
        if shown:
            branch = tree.add(Text(heading, "bold"))
            for line in shown:
                branch.add(Text(plain_lines(line)))
    if detail.children:
        branch = tree.add(Text("called", "bold"))
        for child in detail.children:
            branch.add(_tree(child, changes, look))
    return tree


def _sections(detail: ExecutionDetail, changes: _Changes, look: Renderer) -> Iterator[tuple[str, Iterable[str]]]:
    yield "when and who", _facts(detail, look)
    yield "parameters", (f"{plain(name)} = {value_text(value)}" for name, value in detail.parameters.items())
    yield "metadata", _entries(without_reason(detail.metadata))
    yield "read", (*map(changes.read, detail.reads), *(f"all of {plain(pattern)}" for pattern in detail.patterns))
    yield "wrote", changes.lines(detail.writes)
    yield "published", changes.lines(detail.published)
    yield "computed", changes.lines(detail.computed)
    yield "logged", (_logged(entry, look) for entry in detail.log)
    recorded = {name: drawn for name, drawn in detail.recorded.items() if drawn and name != "lm"}
    yield "drew", (_drawn(name, drawn) for name, drawn in recorded.items() if not _is_told(drawn))
    yield "recorded", (line for name, drawn in recorded.items() if _is_told(drawn) for line in _told(name, drawn))
    yield "LM calls", (f"{totals_text(calls)}: --lm shows them",) if (calls := lm_calls_of(detail)) else ()
    yield "conflicts", map(str, detail.conflicts)
    yield "result", () if detail.result is None else (value_text(detail.result),)
    yield "error", _error(detail)


def _facts(detail: ExecutionDetail, look: Renderer) -> Iterator[str]:
    summary = detail.summary
    yield f"session {plain(summary.session_id)}, by {plain(summary.actor)}, {detail.isolation or 'isolation unknown'}"
    if detail.metadata.get(REASON):
        yield f"because: {plain(detail.metadata[REASON])}"
    yield f"began {look.full_time(summary.began_at)}, commit {summary.began_sequence}"
    if summary.ended_sequence is not None:
        yield f"ended {look.full_time(summary.ended_at)}, commit {summary.ended_sequence}"
    if len(detail.attempts) > 1:
        attempts = (f"{each} (this one)" if each == summary.execution_id else each for each in detail.attempts)
        yield f"attempt {summary.attempt} of {len(detail.attempts)}: {', '.join(attempts)}"
    if summary.parent_id is not None:
        yield f"called by {summary.parent_id}"
    if summary.idempotency_key is not None:
        yield f"idempotency key {plain(summary.idempotency_key)}"
    if summary.worker_id:
        yield f"run by worker {plain(summary.worker_id)}"


def _entries(entries: Mapping[str, str]) -> Iterator[str]:
    return (f"{plain(key)} = {plain(text)}" for key, text in entries.items())


def _logged(entry: LogEntry, look: Renderer) -> str:
    fields = "".join(f"  {plain(name)}={json_text(content)}" for name, content in entry.fields.items())
    return f"{look.time(entry.at)}  {plain(shortened(entry.message))}{fields}"


def _drawn(name: str, drawn: Any) -> str:
    return f"{plain(name)}: {len(drawn):,}" if isinstance(drawn, list) else f"{plain(name)}: {json.dumps(drawn)}"


def _is_told(drawn: Any) -> bool:
    """Whether it is a list of objects, which a client has recorded; others are counted."""
    return isinstance(drawn, list) and all(isinstance(entry, dict) for entry in drawn)


def _told(name: str, entries: Sequence[Any]) -> Iterator[str]:
    # The last ones say how it ended.
    if len(entries) > _MOST_TOLD:
        yield f"{plain(name)}: {len(entries) - _MOST_TOLD:,} more before these"
    for entry in entries[-_MOST_TOLD:]:
        yield f"{plain(name)}: {json_text(entry)}"


def _error(detail: ExecutionDetail) -> Iterator[str]:
    if detail.failure is not None:
        yield plain(f"{detail.failure.type}: {shortened(detail.failure.message)}")
        yield detail.failure.traceback.rstrip()
    elif reason := detail.reason or ("" if detail.conflicts else detail.summary.error):
        yield plain(reason)
