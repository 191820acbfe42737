"""Readers: what is new about the executions of a study, from audits where there are any, or else from recordings."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, Protocol

from dspex_persist.cognitive.context import Context
from dspex_persist.state.abilities import Auditable, Recordable
from dspex_persist.state.audit import AuditSource, ExecutionDetail, ExecutionQuery, SessionQuery
from dspex_persist.state.errors import NotInHistoryError, UnsupportedError
from dspex_persist.state.events import ExecutionBegan, ExecutionEnded
from dspex_persist.state.model import ExecutionStatus
from dspex_persist.state.recording import RecordedCommit

STUDY: Final = "study"
"""The key of metadata with the name of the study that an execution is part of."""


@dataclass(frozen=True, slots=True)
class Execution:
    """An execution of a study, as the journal has it now. The numbers say in which order executions began and ended."""

    id: str
    tool: str
    metadata: Mapping[str, str]
    actor: str
    began: int
    began_at: datetime
    ended: int | None = None
    ended_at: datetime | None = None
    recorded: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.ended is None


class Reader(Protocol):
    """Reads the executions of a study. For one thread at a time."""

    @abstractmethod
    def read(self) -> Iterator[Execution]:
        """Yield those that have begun or ended since the last time; those that are new in the order of beginning."""


def reader_of(ctx: Context, study: str) -> Reader:
    """Return a reader for the backend that a session is on now.

    Raises:
        UnsupportedError: The backend answers no audits, and has no recordings.
    """
    provider = ctx._backend.provider
    if isinstance(provider, Auditable):
        reader = AuditReader(ctx, study)
        try:
            reader.begin()
        except UnsupportedError:
            # A server whose own backend answers none.
            Recordable.of(provider)
        else:
            return reader
    return RecordingReader(Recordable.of(provider), ctx.session_id, study)


class AuditReader:
    """Asks for the executions of the study alone, however much else the session has, and whatever was pruned."""

    def __init__(self, ctx: Context, study: str) -> None:
        self._ctx = ctx
        self._study = study
        self._read_to = 0
        self._running: set[str] = set()

    def begin(self) -> None:
        """Find the beginning of the session: others before may have had its id."""
        session_id = self._ctx.session_id
        with self._ctx.audit() as source:
            entries = source.iterate(SessionQuery(session=session_id, live=True))
            began = (each.started_sequence for each in entries if each.session_id == session_id)
            self._read_to = next(began, 1) - 1

    def read(self) -> Iterator[Execution]:
        """See `Reader.read`."""
        with self._ctx.audit() as source:
            for execution_id in sorted(self._running):
                yield from self._read_one(source, execution_id)
            query = ExecutionQuery(
                session=self._ctx.session_id, since=self._read_to, newest_first=False, metadata={STUDY: self._study}
            )
            for summary in source.iterate(query):
                # The id of a session may look like a pattern.
                if summary.session_id == self._ctx.session_id:
                    yield from self._read_one(source, summary.execution_id)
                self._read_to = max(self._read_to, summary.began_sequence)

    def _read_one(self, source: AuditSource, execution_id: str) -> Iterator[Execution]:
        try:
            execution = _execution_of(source.execution(execution_id))
        except NotInHistoryError:
            # It was pruned in this moment.
            self._running.discard(execution_id)
            return
        if not execution.is_running:
            self._running.discard(execution_id)
        elif execution_id in self._running:
            return
        else:
            self._running.add(execution_id)
        yield execution


def _execution_of(detail: ExecutionDetail) -> Execution:
    summary = detail.summary
    is_running = summary.status is ExecutionStatus.RUNNING
    return Execution(
        summary.execution_id,
        summary.tool,
        detail.metadata,
        summary.actor,
        summary.began_sequence,
        summary.began_at,
        # What was pruned of its end says nothing, but that it has ended.
        None if is_running else summary.ended_sequence or 0,
        summary.ended_at,
        detail.recorded,
    )


class RecordingReader:
    """Reads the log of the session, from where it was before. That has everything, and must not have been pruned."""

    def __init__(self, source: Recordable, session_id: str, study: str) -> None:
        self._source = source
        self._session_id = session_id
        self._study = study
        self._read_to = 0
        self._running: dict[str, Execution] = {}

    def read(self) -> Iterator[Execution]:
        """See `Reader.read`."""
        _, commits = self._source.record(self._session_id, after=self._read_to)
        for commit in commits:
            yield from self._read_one(commit)
            self._read_to = commit.number

    def _read_one(self, commit: RecordedCommit) -> Iterator[Execution]:
        for event in commit.read_events():
            if isinstance(event, ExecutionBegan) and event.metadata.get(STUDY) == self._study:
                began = Execution(
                    _id_there(event.execution_id, commit),
                    event.tool,
                    event.metadata,
                    commit.actor,
                    commit.number,
                    commit.at,
                )
                self._running[event.execution_id] = began
                yield began
            elif isinstance(event, ExecutionEnded) and event.execution_id in self._running:
                began = self._running.pop(event.execution_id)
                yield replace(began, ended=commit.number, ended_at=commit.at, recorded=event.recorded)


def _id_there(execution_id: str, commit: RecordedCommit) -> str:
    """Return the id that an execution has on the backend: recordings number the commits within the session."""
    if not commit.sequence:
        return execution_id
    prefix, _, token = execution_id.split("_", 2)
    return f"{prefix}_{commit.sequence}_{token}"
