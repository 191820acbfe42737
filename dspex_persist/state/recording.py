"""Recordings: a session's whole log as a file that people can keep, mail, import elsewhere, and replay.

JSON Lines: a header, then one line a commit, oldest first. Commits are numbered from 1 within the session, and the
numbers in the ids of executions count the same way, so that a session that was imported is exported as it was.
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
"""What this release writes, and the only version that it reads."""

_EXECUTION: Final = re.compile(r"exec_([0-9]{1,18})_([0-9a-f]+)")


@dataclass(frozen=True, slots=True)
class RecordedVersion:
    """A version of a variable. `masked`: it had a value, which is kept out of the recording."""

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
    """An event as it is recorded: its body stays as it is, so that an export has what the log has."""

    kind: EventKind
    body: Mapping[str, Any]
    _read: Event | None = field(default=None, init=False, repr=False, compare=False)

    def read(self) -> Event:
        """What it says; `MalformedEventError` if its body cannot be read."""
        if self._read is None:
            # Kept: a replay checks it, looks for executions in it, and builds the state from it.
            object.__setattr__(self, "_read", event_in(self.kind, self.body))
        return cast(Event, self._read)


@dataclass(frozen=True, slots=True)
class RecordedCommit:
    """A commit of the session: its number within the session, and everything that it changed.

    `sequence`: its number in the database that it was read from, which no recording keeps; 0 if it was read from one.
    """

    number: int
    at: datetime
    actor: str
    cause: str
    versions: tuple[RecordedVersion, ...] = ()
    events: tuple[RecordedEvent, ...] = ()
    sequence: int = field(default=0, compare=False)

    def read_events(self) -> tuple[Event, ...]:
        """What its events say; `MalformedEventError` if one cannot be read."""
        return tuple(event.read() for event in self.events)


@dataclass(frozen=True, slots=True)
class Header:
    """The first line. `masked`: values of sensitive variables were left out. `commits`: how many lines follow."""

    session_id: str
    commits: int
    masked: bool = False


def write_recording(header: Header, commits: Iterable[RecordedCommit], file: TextIO) -> None:
    """Write a recording, line by line."""
    file.write(header_line(header) + "\n")
    for commit in commits:
        file.write(commit_line(commit) + "\n")


def header_line(header: Header) -> str:
    """The first line of a recording, without its line break."""
    head = {"format": FORMAT, "version": VERSION, "session_id": header.session_id}
    return _line(head | {"commits": header.commits, "masked": header.masked})


def commit_line(commit: RecordedCommit) -> str:
    """A commit's line in a recording, without its line break."""
    return _line(_commit_document(commit))


def _line(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        # What a tool logs may have lone surrogates, which no file in UTF-8 can have but as escapes.
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
    """The header, and the commits as they are taken; `RecordingError` names the line that is wrong.

    `lines` is read once. A recording that ends before its last commit is refused when its end is reached.
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
        raise RecordingError(name, number + 1, "it is no text in UTF-8") from error


def _read_header(line: str, name: str) -> Header:
    try:
        document: Any = read_line(line)
        if document["format"] != FORMAT:
            raise ValueError
        version = document["version"]
        if version != VERSION:
            reason = f"it is of version {version!r}, and this release reads version {VERSION}: export the session anew"
            raise RecordingError(name, 1, reason)
        return Header(str(document["session_id"]), int(document["commits"]), bool(document["masked"]))
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError, RefusedError) as error:
        reason = f'it is no recording: the first line has to be {{"format": "{FORMAT}", ...}}'
        raise RecordingError(name, 1, reason) from error


def _read_commits(header: Header, numbered: Iterator[tuple[int, str]], name: str) -> Iterator[RecordedCommit]:
    count = 0
    for number, line in numbered:
        try:
            commit = _commit_of(_document(line))
        except RefusedError as error:
            raise RecordingError(name, number, f"it is no commit: {error.reason}") from error
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise RecordingError(name, number, f"it is no commit: {type(error).__name__} {error}") from error
        count += 1
        if commit.number != count:
            raise RecordingError(name, number, f"it has commit {commit.number} where commit {count} is due")
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
            reason = f"the line is no JSON (column {error.pos + 1}: {error.msg}); export the session again"
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
        raise ValueError(f"its time {text} has no zone")
    if not EARLIEST <= at <= LATEST:
        raise ValueError(f"its time {text} is none of the years 1 to 9999, UTC")
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
    """What a commit says, in an order in which it can have happened; an event that registers comes with its version 0.

    A recording has events and versions apart. Events are taken in order, and a variable's versions after all of them,
    or earlier where they have to be: before another variable gets its name, and before the session ends.
    """
    waiting: dict[str, deque[RecordedVersion]] = {}
    for version in commit.versions:
        waiting.setdefault(version.variable_id, deque()).append(version)

    def taken(ids: Iterable[str]) -> Iterator[tuple[None, RecordedVersion]]:
        for variable_id in tuple(ids):
            for version in waiting.pop(variable_id):
                yield None, version

    for recorded in commit.events:
        event, first = recorded.read(), None
        if isinstance(event, VariableRegistered):
            yield from taken(_holding(event.name, waiting))
            own = waiting.get(event.variable_id)
            first = own.popleft() if own else None
        elif recorded.kind is EventKind.SESSION_ENDED:
            yield from taken(waiting)
        yield event, first
    yield from taken(waiting)


def _holding(name: str, waiting: Mapping[str, Sequence[RecordedVersion]]) -> list[str]:
    """The variables that have had a name before this commit, or got it in what was taken of it."""
    return [
        variable_id
        for variable_id, versions in waiting.items()
        if versions and versions[0].name == name and versions[0].kind is not ChangeKind.REGISTERED
    ]


def renumbered(commit: RecordedCommit, number_of: Callable[[int], int | None]) -> RecordedCommit:
    """The commit with other numbers in the ids of its executions; None leaves an id as it is."""

    def changed(execution_id: str) -> str:
        return renumbered_id(execution_id, number_of)

    def changed_event(event: RecordedEvent) -> RecordedEvent:
        return RecordedEvent(event.kind, renamed_executions(event.body, changed))

    return replace(commit, cause=changed(commit.cause), events=tuple(map(changed_event, commit.events)))


def is_execution_id(text: str) -> bool:
    """Whether it is one as a store makes them."""
    return _EXECUTION.fullmatch(text) is not None


def renumbered_id(execution_id: str, number_of: Callable[[int], int | None]) -> str:
    """The id of an execution with another number; None leaves it as it is."""
    match = _EXECUTION.fullmatch(execution_id)
    number = number_of(int(match[1])) if match is not None else None
    return f"exec_{number}_{match[2]}" if match is not None and number is not None else execution_id
