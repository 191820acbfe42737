"""Read a recording: its commits, and the tool executions in them with everything they did."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from dspex_persist.state.commands import Derivation
from dspex_persist.state.errors import NotADatabaseError, RecordingError
from dspex_persist.state.events import Event, ExecutionBegan, ExecutionEnded, MalformedEventError
from dspex_persist.state.model import ChangeKind, EventKind, ExecutionStatus, Failure, Value, Variable
from dspex_persist.state.recording import Header, RecordedCommit, RecordedVersion, read_recording


@dataclass(frozen=True, slots=True)
class Recording:
    """A whole recording, in memory."""

    header: Header
    commits: tuple[RecordedCommit, ...]

    @property
    def has_ended(self) -> bool:
        """Whether the session had ended when it was recorded."""
        return bool(self.commits) and any(event.kind is EventKind.SESSION_ENDED for event in self.commits[-1].events)


Source: TypeAlias = Recording | str | os.PathLike[str] | tuple[Header, Iterable[RecordedCommit]]
"""A recording, the path of one, or a header with its commits, as `read_recording` and `record` return them."""


def load(source: Source) -> Recording:
    """Read a recording to its end.

    Raises:
        NotADatabaseError: The file cannot be read.
        RecordingError: It is not a recording, or it is damaged, or part of the session was pruned.
    """
    if isinstance(source, Recording):
        return source
    if isinstance(source, tuple):
        header, commits = source
        return _checked(Recording(header, tuple(commits)), "the recording")
    path = Path(source)
    try:
        with path.open(encoding="utf-8") as file:
            header, commits = read_recording(file, str(path))
            return _checked(Recording(header, tuple(commits)), str(path))
    except OSError as error:
        raise NotADatabaseError(str(path), f"{error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecordingError(str(path), 1, "it is not a recording: it is not UTF-8 text") from error


def _checked(recording: Recording, name: str) -> Recording:
    for commit in recording.commits:
        if any(event.kind is EventKind.PRUNED for event in commit.events):
            reason = "the session had been pruned when the recording was made, so its state cannot be rebuilt"
            raise RecordingError(name, commit.number + 1, reason)
        try:
            commit.read_events()
        except MalformedEventError as error:
            raise RecordingError(name, commit.number + 1, str(error)) from error
    return recording


@dataclass(eq=False, slots=True)
class RecordedExecution:
    """An execution in a recording.

    `number` is the commit that began it, `ended` the one that ended it, 0 if none did. `end` is the second half of its
    journal entry. `written` are the versions that it wrote, in their order, and `published` those that it published,
    with their commits; both exclude those of its children. `derivations` are what functions computed from them, by the
    numbers of the commits; a replay has the values instead of the functions.
    """

    id: str
    number: int
    at: datetime
    actor: str
    cause: str
    tool: str
    parameters: Mapping[str, Value]
    metadata: Mapping[str, str]
    attempt: int
    seed: str
    worker_id: str
    parent_id: str | None
    idempotency_key: str | None
    ended: int = 0
    ended_at: datetime | None = None
    status: ExecutionStatus = ExecutionStatus.RUNNING
    end: ExecutionEnded | None = None
    events: tuple[Event, ...] = ()
    written: tuple[RecordedVersion, ...] = ()
    published: list[tuple[RecordedVersion, int]] = field(default_factory=list)
    derivations: dict[int, tuple[Derivation, ...]] = field(default_factory=dict)
    children: "list[RecordedExecution]" = field(default_factory=list)

    def tree(self) -> "Iterator[RecordedExecution]":
        """Yield it and all executions that it called, directly or indirectly, in the order in which they began."""
        yield self
        for child in self.children:
            yield from child.tree()

    @property
    def has_masked(self) -> bool:
        """Whether any value that it wrote or published is masked in the recording."""
        return any(version.masked for version in (*self.written, *(version for version, _ in self.published)))

    @property
    def has_masked_calls(self) -> bool:
        """Whether LM calls that it made quote values that are masked in the recording."""
        calls = self.end.lm_calls if self.end is not None else ()
        return any(isinstance(call, Mapping) and call.get("masked") is True for call in calls)

    @property
    def failure(self) -> Failure | None:
        """The exception that its code raised; None if it raised none."""
        return self.end.failure if self.end is not None else None

    @property
    def result(self) -> Value | None:
        """Its result; None unless it succeeded."""
        return self.end.result if self.end is not None else None

    @property
    def times(self) -> list[datetime]:
        """The times that `ctx.now()` returned to it."""
        return self.end.times if self.end is not None else []

    @property
    def lm_calls(self) -> list[Any]:
        """Its recorded language model calls."""
        return self.end.lm_calls if self.end is not None else []


def find_executions(commits: Iterable[RecordedCommit]) -> list[RecordedExecution]:
    """Return the executions that no other one called, in the order in which they began, with their children."""
    executions: dict[str, RecordedExecution] = {}
    for commit in commits:
        _add_executions(commit, executions)
    for execution in executions.values():
        if execution.parent_id in executions:
            executions[execution.parent_id].children.append(execution)
    return [execution for execution in executions.values() if execution.parent_id is None]


def _add_executions(commit: RecordedCommit, executions: dict[str, RecordedExecution]) -> None:
    events = commit.read_events()
    for event in events:
        if isinstance(event, ExecutionBegan):
            executions[event.execution_id] = _begun(commit, event)
    publishing = executions.get(commit.cause)
    if publishing is not None:
        published = [version for version in commit.versions if version.kind is ChangeKind.PUBLISHED]
        publishing.published.extend((version, commit.number) for version in published)
        if published:
            computed = (version for version in commit.versions if version.kind is not ChangeKind.PUBLISHED)
            publishing.derivations[commit.number] = _derivations(commit, computed)
    _end(commit, events, executions)


def _begun(commit: RecordedCommit, event: ExecutionBegan) -> RecordedExecution:
    return RecordedExecution(
        id=event.execution_id,
        number=commit.number,
        at=commit.at,
        actor=commit.actor,
        cause=commit.cause,
        tool=event.tool,
        parameters=event.parameters,
        metadata=event.metadata,
        attempt=event.attempt,
        seed=event.seed,
        worker_id=event.worker_id,
        parent_id=event.parent_id,
        idempotency_key=event.idempotency_key,
    )


def _end(commit: RecordedCommit, events: Sequence[Event], executions: Mapping[str, RecordedExecution]) -> None:
    others = tuple(event for event in events if not isinstance(event, ExecutionBegan | ExecutionEnded))
    written = Written(commit.versions)
    for event in events:
        if not isinstance(event, ExecutionEnded) or event.execution_id not in executions:
            continue
        execution = executions[event.execution_id]
        execution.ended, execution.ended_at = commit.number, commit.at
        execution.status = event.status
        execution.end = event
        execution.events = others
        execution.written = tuple(written.take(event.writes))
    top = executions.get(commit.cause)
    if top is not None and top.ended == commit.number:
        top.derivations[commit.number] = _derivations(commit, written.left())


def _derivations(commit: RecordedCommit, computed: Iterable[RecordedVersion]) -> tuple[Derivation, ...]:
    """Return derivations that compute what was computed in a commit, from whatever else changed in it."""
    names = {version.name for version in commit.versions if version.kind is not ChangeKind.DELETED}
    return tuple(
        Derivation(version.name, tuple(names - {version.name}), partial(_constant, version.value))
        for version in computed
        if version.kind is ChangeKind.SET and version.value is not None
    )


def _constant(value: Value, _: Mapping[str, Variable]) -> Value:
    return value


class Written:
    """The versions of a commit, taken one by one by name and number.

    If two have the same name and number, because a variable was deleted and its name reused, they come in that order.
    """

    def __init__(self, versions: Iterable[RecordedVersion]) -> None:
        self._versions: dict[tuple[str, int], list[RecordedVersion]] = {}
        for version in versions:
            self._versions.setdefault((version.name, version.version), []).append(version)

    def take(self, written: Iterable[tuple[str, int]]) -> Iterator[RecordedVersion]:
        """Remove and yield the versions that an execution claims to have written, except those not in the commit."""
        for name, number in written:
            versions = self._versions.get((name, number))
            if versions:
                yield versions.pop(0)

    def left(self) -> list[RecordedVersion]:
        """Return the versions that were not taken."""
        return [version for versions in self._versions.values() for version in versions]
