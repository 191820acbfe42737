"""Recordings: a session's whole log as a file, to archive, mail, import elsewhere, or replay.

The format is JSON Lines: a header, then one line for each commit, oldest first. Commits are numbered from 1 within the
session, and so are the numbers in execution ids, so that an imported session is exported as it was.
"""

import json
import re
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, TextIO, cast

from dspex_persist.clock import EARLIEST, LATEST
from dspex_persist.state.errors import RecordingError
from dspex_persist.state.events import Event, VariableRegistered, event_in, renamed_executions
from dspex_persist.state.model import ChangeKind, EventKind, Source, Value
from dspex_persist.state.values.json_text import RefusedError, read_line

FORMAT: Final = "dspex-persist session"
VERSION: Final = 1
"""The version that this release writes, and the only one that it reads."""

_EXECUTION: Final = re.compile(r"exec_([0-9]{1,18})_([0-9a-f]+)")


@dataclass(frozen=True, slots=True)
class RecordedVersion:
    """A version of a variable. `masked`: its value was left out of the recording."""

    variable_id: str
    name: str
    version: int
    kind: ChangeKind
    source: Source
    value: Value | None
    metadata: Mapping[str, str] = field(default_factory=dict)
    masked: bool = False


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """An event with its body as in the log, unparsed."""

    kind: EventKind
    body: Mapping[str, Any]
    _read: Event | None = field(default=None, init=False, repr=False, compare=False)

    def read(self) -> Event:
        """Return the event, or raise `MalformedEventError`."""
        if self._read is None:
            # Cached, because a replay reads each event several times.
            object.__setattr__(self, "_read", event_in(self.kind, self.body))
        return cast(Event, self._read)


@dataclass(frozen=True, slots=True)
class RecordedCommit:
    """A commit of the session.

    Attributes:
        number: Its number within the session, from 1.
        sequence: Its number in the database from which it was read; 0 if it was read from a recording.
    """

    number: int
    at: datetime
    actor: str
    cause: str
    versions: tuple[RecordedVersion, ...] = ()
    events: tuple[RecordedEvent, ...] = ()
    sequence: int = field(default=0, compare=False)

    def read_events(self) -> tuple[Event, ...]:
        """Return its events, or raise `MalformedEventError`."""
        return tuple(event.read() for event in self.events)


@dataclass(frozen=True, slots=True)
class Header:
    """The first line. `commits`: how many lines follow; `masked`: values of sensitive variables were left out."""

    session_id: str
    commits: int
    masked: bool = False


def write_recording(header: Header, commits: Iterable[RecordedCommit], file: TextIO) -> None:
    """Write a recording to a file, line by line."""
    file.write(header_line(header) + "\n")
    for commit in commits:
        file.write(commit_line(commit) + "\n")


def header_line(header: Header) -> str:
    """Return the first line of a recording, without its line break."""
    head = {"format": FORMAT, "version": VERSION, "session_id": header.session_id}
    return _line(head | {"commits": header.commits, "masked": header.masked})


def commit_line(commit: RecordedCommit) -> str:
    """Return the line of a commit, without its line break."""
    return _line(_commit_document(commit))


def _line(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        # Log entries of tools may contain lone surrogates, which UTF-8 cannot encode; as JSON escapes they can be.
        text = json.dumps(document)
    return text


def _commit_document(commit: RecordedCommit) -> dict[str, Any]:
    return {
        "commit": commit.number,
        "at": commit.at.isoformat(),
        "actor": commit.actor,
        "cause": commit.cause,
        "versions": [_version_document(version) for version in commit.versions],
        "events": [{"kind": event.kind.value, "body": dict(event.body)} for event in commit.events],
    }


def _version_document(version: RecordedVersion) -> dict[str, Any]:
    value = version.value
    binary = value.binary if value is not None else None
    return {
        "variable_id": version.variable_id,
        "name": version.name,
        "version": version.version,
        "kind": version.kind.value,
        "source": version.source.value,
        "json": value.json if value is not None else None,
        **({"binary": b64encode(binary).decode()} if binary is not None else {}),
        **({"metadata": dict(version.metadata)} if version.metadata else {}),
        **({"masked": True} if version.masked else {}),
    }


def read_recording(lines: Iterable[str], name: str = "the recording") -> tuple[Header, Iterator[RecordedCommit]]:
    """Read a recording.

    Args:
        lines: The lines, which are iterated over once.
        name: The name of the file, for errors.

    Returns:
        The header, and an iterator that reads the commits on demand.

    Raises:
        RecordingError: A line is invalid, or (at the end) commits are missing. The error names the line.
    """
    numbered = _numbered(lines, name)
    _, first = next(numbered, (1, ""))
    header = _read_header(first, name)
    return header, _read_commits(header, numbered, name)


def _numbered(lines: Iterable[str], name: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            yield number, line
    except UnicodeDecodeError as error:
        raise RecordingError(name, number + 1, "it is not UTF-8 text") from error


def _read_header(line: str, name: str) -> Header:
    try:
        document: Any = read_line(line)
        if document["format"] != FORMAT:
            raise ValueError
        version = document["version"]
        if version != VERSION:
            reason = f"it has version {version!r}, but this release reads version {VERSION}: export the session again"
            raise RecordingError(name, 1, reason)
        return Header(str(document["session_id"]), int(document["commits"]), bool(document["masked"]))
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError, RefusedError) as error:
        reason = f'it is not a recording: the first line must be {{"format": "{FORMAT}", ...}}'
        raise RecordingError(name, 1, reason) from error


def _read_commits(header: Header, numbered: Iterator[tuple[int, str]], name: str) -> Iterator[RecordedCommit]:
    count = 0
    for number, line in numbered:
        try:
            commit = _commit_of(_document(line))
        except RefusedError as error:
            raise RecordingError(name, number, f"it is not a commit: {error.reason}") from error
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise RecordingError(name, number, f"it is not a commit: {type(error).__name__} {error}") from error
        count += 1
        if commit.number != count:
            raise RecordingError(name, number, f"it has commit {commit.number} instead of commit {count}")
        yield commit
    if count != header.commits:
        raise RecordingError(name, count + 1, f"it ends after {count} commits of {header.commits}")


def _document(line: str) -> Any:
    try:
        return read_line(line)
    except json.JSONDecodeError as error:
        if not line.endswith("\n"):
            reason = f"the line is cut off (column {error.pos + 1}): the file ends too early; export the session again"
        else:
            reason = f"the line is not JSON (column {error.pos + 1}: {error.msg}); export the session again"
        raise RefusedError(reason) from error


def _commit_of(document: Mapping[str, Any]) -> RecordedCommit:
    at = _time_of(document["at"])
    return RecordedCommit(
        int(document["commit"]),
        at,
        str(document["actor"]),
        str(document["cause"]),
        tuple(_version_of(each) for each in document["versions"]),
        tuple(RecordedEvent(EventKind(each["kind"]), dict(each["body"])) for each in document["events"]),
    )


def _time_of(text: str) -> datetime:
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError(f"its time {text} has no time zone")
    if not EARLIEST <= at <= LATEST:
        raise ValueError(f"its time {text} is not in the years 1 to 9999, UTC")
    return at.astimezone(UTC)


def _version_of(document: Mapping[str, Any]) -> RecordedVersion:
    text, binary = document["json"], document.get("binary")
    return RecordedVersion(
        str(document["variable_id"]),
        str(document["name"]),
        int(document["version"]),
        ChangeKind(document["kind"]),
        Source(document["source"]),
        None if text is None else Value(str(text), None if binary is None else b64decode(binary, validate=True)),
        {str(key): str(entry) for key, entry in document.get("metadata", {}).items()},
        bool(document.get("masked", False)),
    )


def in_order(commit: RecordedCommit) -> Iterator[tuple[Event | None, RecordedVersion | None]]:
    """Iterate over the events and versions of a commit in an order in which they can be applied.

    A recording has events and versions in separate lists. Events come in their order; a registration comes with the
    variable's version 0. Other versions come after all events, or earlier if necessary: before another variable gets
    the name, and before the session ends.
    """
    waiting: dict[str, deque[RecordedVersion]] = {}
    for version in commit.versions:
        waiting.setdefault(version.variable_id, deque()).append(version)

    def take(ids: Iterable[str]) -> Iterator[tuple[None, RecordedVersion]]:
        for variable_id in tuple(ids):
            for version in waiting.pop(variable_id):
                yield None, version

    for recorded in commit.events:
        event, first = recorded.read(), None
        if isinstance(event, VariableRegistered):
            yield from take(_holding(event.name, waiting))
            own = waiting.get(event.variable_id)
            first = own.popleft() if own else None
        elif recorded.kind is EventKind.SESSION_ENDED:
            yield from take(waiting)
        yield event, first
    yield from take(waiting)


def _holding(name: str, waiting: Mapping[str, Sequence[RecordedVersion]]) -> list[str]:
    """Return the waiting variables that have this name already."""
    return [
        variable_id
        for variable_id, versions in waiting.items()
        if versions and versions[0].name == name and versions[0].kind is not ChangeKind.REGISTERED
    ]


def renumbered(commit: RecordedCommit, number_of: Callable[[int], int | None]) -> RecordedCommit:
    """Return the commit with the numbers in its execution ids mapped; ids whose number maps to None stay."""

    def changed(execution_id: str) -> str:
        return renumbered_id(execution_id, number_of)

    def changed_event(event: RecordedEvent) -> RecordedEvent:
        return RecordedEvent(event.kind, renamed_executions(event.body, changed))

    return replace(commit, cause=changed(commit.cause), events=tuple(map(changed_event, commit.events)))


def is_execution_id(text: str) -> bool:
    """Whether a text has the form of an execution id."""
    return _EXECUTION.fullmatch(text) is not None


def renumbered_id(execution_id: str, number_of: Callable[[int], int | None]) -> str:
    """Return an execution id with its number mapped; it stays if the number maps to None."""
    match = _EXECUTION.fullmatch(execution_id)
    number = number_of(int(match[1])) if match is not None else None
    return f"exec_{number}_{match[2]}" if match is not None and number is not None else execution_id
