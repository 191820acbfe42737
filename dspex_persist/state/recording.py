"""Recordings: a session's whole log as a file, to archive, mail, import elsewhere, or replay.

The format is JSON Lines: a header, then one line for each commit, oldest first. Commits are numbered from 1 within the
session, and so are the numbers in execution ids, so that an imported session is exported as it was. `ContentHash` gives
equal hashes to equal histories, whichever database they are in.
"""

import json
import re
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from operator import is_
from typing import Any, Final, TextIO, TypeAlias, cast

from dspex_persist.clock import EARLIEST, LATEST
from dspex_persist.state.errors import RecordingError
from dspex_persist.state.events import (
    Event,
    VariableConstrained,
    VariableRegistered,
    anonymous,
    event_in,
    names_executions,
    renamed_executions,
)
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

    @classmethod
    def of(cls, event: Event) -> "RecordedEvent":
        """Return an event of plain texts, which need no encoding, as it would be recorded and read again."""
        recorded = cls(event.kind, event.to_body())
        object.__setattr__(recorded, "_read", event)
        return recorded

    def read(self) -> Event:
        """Return the event, or raise `MalformedEventError`."""
        if self._read is None:
            # Cached, because a replay reads each event several times.
            object.__setattr__(self, "_read", event_in(self.kind, self.body))
        return cast(Event, self._read)


@dataclass(frozen=True, slots=True)
class RecordedAnswer:
    """The answer to a request with an idempotency key: the request's cause and fingerprint, and the result as JSON."""

    key: str
    cause: str
    fingerprint: str
    result: str


@dataclass(frozen=True, slots=True)
class RecordedCommit:
    """A commit of the session.

    Attributes:
        number: Its number within the session, from 1.
        sequence: Its number in the database from which it was read; 0 if it was read from a recording.
        answer: An answer kept under an idempotency key when the commit was made; None if there is none, or no longer.
    """

    number: int
    at: datetime
    actor: str
    cause: str
    versions: tuple[RecordedVersion, ...] = ()
    events: tuple[RecordedEvent, ...] = ()
    sequence: int = field(default=0, compare=False)
    answer: RecordedAnswer | None = None

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
        "events": [{"kind": event.kind.value, "body": _in_order(event.body)} for event in commit.events],
        **({"answer": _answer_document(commit.answer)} if commit.answer is not None else {}),
    }


def _in_order(document: Any) -> Any:
    """Return a document with its keys in order: a recording does not tell what kept the session."""
    if isinstance(document, Mapping):
        return {key: _in_order(document[key]) for key in sorted(document)}
    return [_in_order(each) for each in document] if isinstance(document, list | tuple) else document


def _answer_document(answer: RecordedAnswer) -> dict[str, Any]:
    return {"key": answer.key, "cause": answer.cause, "fingerprint": answer.fingerprint, "result": answer.result}


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
        **({"metadata": _in_order(version.metadata)} if version.metadata else {}),
        **({"masked": True} if version.masked else {}),
    }


class ContentHash:
    """The SHA-256 of a session's commits in their order: of all that they say, but for the session's own id.

    It does not depend on the numbers of a database, so that a session and its import have the same. Answers under
    idempotency keys do not count: they are forgotten after a while.
    """

    def __init__(self) -> None:
        self._hash = sha256()
        self.commits = 0

    def add(self, commit: RecordedCommit) -> None:
        """Add the next commit."""
        self.add_content(content_of(commit))

    def add_content(self, content: "Content") -> None:
        """Add what `content_of` says of the next commit."""
        self._hash.update(_CANONICAL.encode(content).encode() + b"\n")
        self.commits += 1

    def over(self, commits: Iterable[RecordedCommit]) -> Iterator[RecordedCommit]:
        """Add the commits while they are iterated over."""
        for commit in commits:
            self.add(commit)
            yield commit

    def hexdigest(self) -> str:
        """Return the hash of the commits so far, in hexadecimal."""
        return self._hash.hexdigest()


# Encoded in ASCII, the same by any Python.
_CANONICAL: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


Content: TypeAlias = list[Any]


def content_of(commit: RecordedCommit) -> Content:
    """Return all that a commit says, but for its session's id, as `ContentHash` has it."""
    return [
        commit.at.isoformat(),
        commit.actor,
        commit.cause,
        [content_of_version(version) for version in commit.versions],
        [[event.kind.value, anonymous(event.kind, event.body)] for event in commit.events],
    ]


def content_of_version(version: RecordedVersion) -> Content:
    """Return all that a version says."""
    value = version.value
    binary = value.binary.hex() if value is not None and value.binary is not None else None
    text, kind, source = (value.json if value is not None else None), version.kind.value, version.source.value
    facts: list[Any] = [version.variable_id, version.name, version.version, kind, source, text]
    return (
        [*facts, binary, dict(version.metadata), version.masked]
        if binary or version.metadata or version.masked
        else facts
    )


def read_recording(
    lines: Iterable[str], name: str = "the recording", after: int = 0
) -> tuple[Header, Iterator[RecordedCommit]]:
    """Read a recording.

    Args:
        lines: The lines, which are iterated over once.
        name: The name of the file, for errors.
        after: The number of the last commit that was left out of it; 0 for a whole recording.

    Returns:
        The header, and an iterator that reads the commits on demand.

    Raises:
        RecordingError: A line is invalid, or (at the end) commits are missing. The error names the line.
    """
    reader, rest = RecordingReader(name, after), iter(lines)
    with reader.readable():
        header = reader.read_header(next(rest, ""))
    return header, _read_commits(reader, rest)


def _read_commits(reader: "RecordingReader", rest: Iterator[str]) -> Iterator[RecordedCommit]:
    while True:
        with reader.readable():
            line = next(rest, None)
        if line is None:
            break
        yield reader.read_commit(line)
    reader.end()


class RecordingReader:
    """Reads a recording line by line, wherever the lines come from. `name` is what errors call it.

    Its commits up to number `after` were left out.

    Attributes:
        header: The header, once it was read.
    """

    header: Header

    def __init__(self, name: str = "the recording", after: int = 0) -> None:
        self._name = name
        self._after = after
        self._lines = 0

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Raise `RecordingError` if the next line, which the block reads, is not text."""
        try:
            yield
        except UnicodeDecodeError as error:
            raise RecordingError(self._name, self._lines + 1, "it is not UTF-8 text") from error

    def read_header(self, line: str) -> Header:
        """Read the first line."""
        # As in the file of the whole recording.
        self._lines = 1 + self._after
        self.header = _header_of(line, self._name)
        return self.header

    def read_commit(self, line: str) -> RecordedCommit:
        """Read the next line.

        Raises:
            RecordingError: The line is not the next commit.
        """
        self._lines += 1
        number = self._lines
        try:
            commit = _commit_of(_document(line))
        except RefusedError as error:
            raise RecordingError(self._name, number, f"it is not a commit: {error.reason}") from error
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise RecordingError(self._name, number, f"it is not a commit: {type(error).__name__} {error}") from error
        if commit.number != number - 1:
            raise RecordingError(self._name, number, f"it has commit {commit.number} instead of commit {number - 1}")
        return commit

    def end(self) -> None:
        """Raise `RecordingError` if commits are missing, or were too many."""
        count = self._lines - 1
        if count != max(self.header.commits, self._after):
            reason = f"it ends after {count} commits of {self.header.commits}"
            raise RecordingError(self._name, count + 1, reason)


def _header_of(line: str, name: str) -> Header:
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


def commit_in(line: str) -> RecordedCommit:
    """Return the commit in a line that `commit_line` made."""
    return _commit_of(cast(Mapping[str, Any], read_line(line)))


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
        answer=_answer_of(document["answer"]) if "answer" in document else None,
    )


def _answer_of(document: Mapping[str, Any]) -> RecordedAnswer:
    facts = (document[key] for key in ("key", "cause", "fingerprint", "result"))
    return RecordedAnswer(*map(str, facts))


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
    the name, before their variable gets other constraints, and before the session ends.
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
        elif isinstance(event, VariableConstrained):
            own = waiting.get(event.variable_id)
            while own and own[0].version < event.version:
                yield None, own.popleft()
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
    if not (commit.cause.startswith("exec_") or any(names_executions(event.body) for event in commit.events)):
        # Most commits are about no execution: they keep what has been read of them.
        return commit

    def changed(execution_id: str) -> str:
        return renumbered_id(execution_id, number_of)

    def changed_event(event: RecordedEvent) -> RecordedEvent:
        body = renamed_executions(event.body, changed)
        return event if body is event.body else RecordedEvent(event.kind, body)

    cause, events = changed(commit.cause), tuple(map(changed_event, commit.events))
    if cause == commit.cause and all(map(is_, events, commit.events)):
        return commit
    return replace(commit, cause=cause, events=events)


def is_execution_id(text: str) -> bool:
    """Whether a text has the form of an execution id."""
    return _EXECUTION.fullmatch(text) is not None


def renumbered_id(execution_id: str, number_of: Callable[[int], int | None]) -> str:
    """Return an execution id with its number mapped; it stays if the number maps to None."""
    if not execution_id.startswith("exec_"):
        return execution_id
    match = _EXECUTION.fullmatch(execution_id)
    number = number_of(int(match[1])) if match is not None else None
    return f"exec_{number}_{match[2]}" if match is not None and number is not None else execution_id
