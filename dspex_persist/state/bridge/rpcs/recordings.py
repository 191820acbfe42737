"""Translates recordings and forks to messages of the audit service, and back. Pure functions."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as pb
from dspex_persist.state.bridge.records import Codec
from dspex_persist.state.model import ImportedSession, RestoredSession, SessionView, Source, Value, Variable
from dspex_persist.state.recording import Header, RecordedCommit, commit_line, header_line, read_recording

RECORD: Final = "RecordSession"
FORK: Final = "ForkSession"
IMPORT: Final = "ImportSession"
CONTENT_HASH: Final = "GetContentHash"
IMPORTED: Final[Codec[ImportedSession]] = Codec.between(ImportedSession, pb.ImportSessionResponse)


def lines_of(header: Header, commits: Iterable[RecordedCommit]) -> Iterator[Any]:
    """Yield the lines of a recording, as messages."""
    yield pb.RecordedLine(json=header_line(header))
    for commit in commits:
        yield pb.RecordedLine(json=commit_line(commit), sequence=commit.sequence)


def batch_of(lines: Iterator[Any], size_bytes: int) -> Any:
    """Return the next lines in a message of about this size, with at least one line unless none is left."""
    response = pb.RecordSessionResponse()
    size = 0
    for line in lines:
        response.lines.append(line)
        size += line.ByteSize()
        if size >= size_bytes:
            break
    return response


def recording_of(messages: Iterable[Any], name: str, after: int = 0) -> tuple[Header, Iterator[RecordedCommit]]:
    """Return the recording in a stream of messages, which are read as its commits are. Errors call it `name`.

    It has no commits up to number `after`.
    """
    sequences: deque[int] = deque()

    def lines() -> Iterator[str]:
        for message in messages:
            for line in message.lines:
                sequences.append(line.sequence)
                yield f"{line.json}\n"

    header, commits = read_recording(lines(), name, after)
    sequences.popleft()
    return header, (replace(commit, sequence=sequences.popleft()) for commit in commits)


@dataclass(frozen=True, slots=True)
class _Forked:
    """A variable of a new fork."""

    variable_id: str
    name: str
    type: str
    value: Value
    source: Source
    constraints: str
    metadata: Mapping[str, str]
    updated_at: datetime


RESTORED: Final[Codec[RestoredSession]] = Codec.between(RestoredSession, pb.RestoreSessionResponse)
_FORKED: Final[Codec[_Forked]] = Codec.between(_Forked, pb.ForkedVariable)


def fork_message(view: SessionView) -> Any:
    """Return the message for a new fork."""
    variables = (
        _Forked(
            each.id, each.name, each.type, each.value, each.source, each.constraints, each.metadata, each.updated_at
        )
        for each in view.variables
    )
    return pb.ForkSessionResponse(variables=map(_FORKED.message_of, variables))


def fork_of(response: Any) -> SessionView:
    """Return the new fork in a message."""
    return SessionView(False, tuple(map(_variable, map(_FORKED.record_of, response.variables))))


def _variable(forked: _Forked) -> Variable:
    facts = (forked.variable_id, forked.name, forked.type, forked.value, 0)
    return Variable(*facts, forked.constraints, forked.metadata, forked.source, forked.updated_at)
