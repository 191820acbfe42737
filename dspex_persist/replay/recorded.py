"""What a recording says: its commits, and the tool executions in them, each with all that it did."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

from dspex_persist.clock import from_micros
from dspex_persist.state.errors import NotADatabaseError, RecordingError
from dspex_persist.state.model import ChangeKind, Event, EventKind, ExecutionStatus, Failure, Value
from dspex_persist.state.recording import Header, RecordedCommit, RecordedVersion, read_recording
from dspex_persist.state.unit_of_work import value_in


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
        raise RecordingError(str(path), 1, "it is no recording: it is no text in UTF-8") from error


def _checked(recording: Recording, name: str) -> Recording:
    for commit in recording.commits:
        if any(event.kind is EventKind.PRUNED for event in commit.events):
            reason = "old versions of the session had been pruned when it was made, so its state cannot be built again"
            raise RecordingError(name, commit.number + 1, reason)
    return recording


@dataclass(eq=False, slots=True)
class RecordedExecution:
    """An execution in a recording. `number`: the commit of its beginning; `ended`: that of its end, 0 if there is none.

    `body` is what the journal says of its end, `written` the versions that it wrote, in their order, `published` those
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
    body: Mapping[str, Any] = field(default_factory=dict)
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
        told = self.body.get("failure")
        return Failure(**told) if told else None

    @property
    def result(self) -> Value | None:
        """Its result."""
        return value_in(self.body.get("result"))

    @property
    def times(self) -> list[datetime]:
        """What `now` gave it."""
        return [from_micros(each) for each in self.body.get("recorded", {}).get("now", ())]

    @property
    def lm_calls(self) -> list[Any]:
        """The calls of language models that were recorded for it."""
        return list(self.body.get("recorded", {}).get("lm", ()))


def find_executions(commits: Iterable[RecordedCommit]) -> list[RecordedExecution]:
    """The executions that no other one called, in the order of their beginnings; each has its children."""
    found: dict[str, RecordedExecution] = {}
    for commit in commits:
        try:
            _find_in(commit, found)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"its executions are told in another way: {type(error).__name__} {error}"
            raise RecordingError("the recording", commit.number + 1, reason) from error
    for execution in found.values():
        if execution.parent_id in found:
            found[execution.parent_id].children.append(execution)
    return [execution for execution in found.values() if execution.parent_id is None]


def _find_in(commit: RecordedCommit, found: dict[str, RecordedExecution]) -> None:
    for event in commit.events:
        if event.kind is EventKind.EXECUTION_BEGAN:
            begun = _begun(commit, event.body)
            found[begun.id] = begun
    publishing = found.get(commit.cause)
    if publishing is not None:
        shown = (version for version in commit.versions if version.kind is ChangeKind.PUBLISHED)
        publishing.published.extend((version, commit.number) for version in shown)
    _end(commit, found)


def _begun(commit: RecordedCommit, body: Mapping[str, Any]) -> RecordedExecution:
    parameters = {name: value for name, told in body["parameters"].items() if (value := value_in(told)) is not None}
    return RecordedExecution(
        id=body["execution_id"],
        number=commit.number,
        at=commit.at,
        actor=commit.actor,
        cause=commit.cause,
        tool=body["tool"],
        parameters=parameters,
        metadata=body["metadata"],
        attempt=body["attempt"],
        seed=body["seed"],
        worker_id=body.get("worker_id", ""),
        parent_id=body.get("parent_id"),
        idempotency_key=body.get("idempotency_key"),
    )


def _end(commit: RecordedCommit, found: Mapping[str, RecordedExecution]) -> None:
    ends = [event.body for event in commit.events if event.kind is EventKind.EXECUTION_ENDED]
    if not ends:
        return
    others = tuple(event for event in commit.events if event.kind not in _OF_EXECUTIONS)
    written = Written(commit.versions)
    for body in ends:
        execution = found.get(body["execution_id"])
        if execution is None:
            continue
        execution.ended, execution.ended_at = commit.number, commit.at
        execution.status = ExecutionStatus(body["status"])
        execution.body = body
        execution.events = others
        execution.written = tuple(written.take(body.get("writes", ())))


_OF_EXECUTIONS: Final = (EventKind.EXECUTION_BEGAN, EventKind.EXECUTION_ENDED)


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
