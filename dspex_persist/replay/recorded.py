"""What a recording says: its commits, and the tool executions in them, each with all that it did."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

from dspex_persist.state.errors import NotADatabaseError, RecordingError
from dspex_persist.state.events import Event, ExecutionBegan, ExecutionEnded, MalformedEventError
from dspex_persist.state.model import ChangeKind, EventKind, ExecutionStatus, Failure, Value
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
"""A recording, the path of one, or what `read_recording` gives."""


def load(source: Source) -> Recording:
    """The recording, read to its end; `RecordingError` for one that cannot be replayed."""
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
            reason = "old versions of the session had been pruned when it was made, so its state cannot be built again"
            raise RecordingError(name, commit.number + 1, reason)
        try:
            commit.read_events()
        except MalformedEventError as error:
            raise RecordingError(name, commit.number + 1, str(error)) from error
    return recording


@dataclass(eq=False, slots=True)
class RecordedExecution:
    """An execution in a recording. `number`: the commit of its beginning; `ended`: that of its end, 0 if there is none.

    `end` is what the journal says of its end, `written` the versions that it wrote, in their order, `published` those
    that it published, with their commits; neither has what its children did.
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
    children: "list[RecordedExecution]" = field(default_factory=list)

    def tree(self) -> "Iterator[RecordedExecution]":
        """It, and all that ran on its behalf, in the order of their beginnings."""
        yield self
        for child in self.children:
            yield from child.tree()

    @property
    def has_masked(self) -> bool:
        """Whether values that it wrote or published were kept out of the recording."""
        return any(version.masked for version in (*self.written, *(version for version, _ in self.published)))

    @property
    def failure(self) -> Failure | None:
        """The error with which its code ended."""
        return self.end.failure if self.end is not None else None

    @property
    def result(self) -> Value | None:
        """Its result."""
        return self.end.result if self.end is not None else None

    @property
    def times(self) -> list[datetime]:
        """What `now` gave it."""
        return self.end.times if self.end is not None else []

    @property
    def lm_calls(self) -> list[Any]:
        """The calls of language models that were recorded for it."""
        return self.end.lm_calls if self.end is not None else []


def find_executions(commits: Iterable[RecordedCommit]) -> list[RecordedExecution]:
    """The executions that no other one called, in the order of their beginnings; each has its children."""
    found: dict[str, RecordedExecution] = {}
    for commit in commits:
        _find_in(commit, found)
    for execution in found.values():
        if execution.parent_id in found:
            found[execution.parent_id].children.append(execution)
    return [execution for execution in found.values() if execution.parent_id is None]


def _find_in(commit: RecordedCommit, found: dict[str, RecordedExecution]) -> None:
    events = commit.read_events()
    for event in events:
        if isinstance(event, ExecutionBegan):
            found[event.execution_id] = _begun(commit, event)
    publishing = found.get(commit.cause)
    if publishing is not None:
        shown = (version for version in commit.versions if version.kind is ChangeKind.PUBLISHED)
        publishing.published.extend((version, commit.number) for version in shown)
    _end(commit, events, found)


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


def _end(commit: RecordedCommit, events: Sequence[Event], found: Mapping[str, RecordedExecution]) -> None:
    others = tuple(event for event in events if not isinstance(event, ExecutionBegan | ExecutionEnded))
    written = Written(commit.versions)
    for event in events:
        if not isinstance(event, ExecutionEnded) or event.execution_id not in found:
            continue
        execution = found[event.execution_id]
        execution.ended, execution.ended_at = commit.number, commit.at
        execution.status = event.status
        execution.end = event
        execution.events = others
        execution.written = tuple(written.take(event.writes))


class Written:
    """The versions of a commit, to be handed out by name and number: those of a variable that was deleted come before
    those of another one that has its name now."""

    def __init__(self, versions: Iterable[RecordedVersion]) -> None:
        self._versions: dict[tuple[str, int], list[RecordedVersion]] = {}
        for version in versions:
            self._versions.setdefault((version.name, version.version), []).append(version)

    def take(self, written: Iterable[tuple[str, int]]) -> Iterator[RecordedVersion]:
        """The versions that an execution says it wrote; what the commit does not have is left out."""
        for name, number in written:
            there = self._versions.get((name, number))
            if there:
                yield there.pop(0)

    def left(self) -> list[RecordedVersion]:
        """What nobody has taken."""
        return [version for there in self._versions.values() for version in there]
