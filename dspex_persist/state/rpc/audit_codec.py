"""Between the messages of the audit service and the questions and answers of audits. Pure: no calls, no state."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Generic, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from dspex_persist.state.audit import (
    AuditSource,
    CommitEntry,
    CommitQuery,
    Cursor,
    ExecutionDetail,
    ExecutionQuery,
    ExecutionSummary,
    HistoryEntry,
    HistoryQuery,
    Operator,
    Page,
    Predicate,
    Query,
    ReadEntry,
    SessionEntry,
    SessionQuery,
    T,
    VariableState,
    check_conditions,
    checked,
    is_glob,
    predicates_of,
)
from dspex_persist.state.errors import InvalidArgumentError, UnsupportedError
from dspex_persist.state.model import (
    ChangeKind,
    Conflict,
    ExecutionStatus,
    Failure,
    LogEntry,
    PrunePolicy,
    PruneReport,
    Source,
    Value,
)
from dspex_persist.state.rpc.codec import moment_of, timestamp_of
from dspex_persist.state.rpc.generated import dspex_persist_audit_pb2 as pb

AUDIT_SERVICE = pb.DESCRIPTOR.services_by_name["AuditService"]

E = TypeVar("E", bound=StrEnum)


# Enumerations


class _Numbers(Generic[E]):
    """The numbers of an enumeration on the wire; 0 is none."""

    def __init__(self, wire: Any, prefix: str, members: Iterable[E]) -> None:
        self._what = wire.DESCRIPTOR.name
        self._numbers = {member: wire.Value(f"{prefix}_{member.name}") for member in members}
        self._members = {number: member for member, number in self._numbers.items()}

    def number(self, member: E | None) -> Any:
        return 0 if member is None else self._numbers[member]

    def member(self, number: int) -> E:
        found = self._members.get(number)
        if found is None:
            raise UnsupportedError(f"{self._what} {number}: whoever sent it is newer than this release")
        return found

    def find(self, number: int) -> E | None:
        return None if number == 0 else self.member(number)


_KINDS: Final = _Numbers(pb.ChangeKind, "CHANGE_KIND", ChangeKind)
_SOURCES: Final = _Numbers(pb.Source, "SOURCE", Source)
_STATUSES: Final = _Numbers(pb.ExecutionStatus, "EXECUTION_STATUS", ExecutionStatus)
_OPERATORS: Final = _Numbers(pb.Predicate.Operator, "OPERATOR", Operator)


# Small parts


def _optional(message: Any, field: str) -> Any:
    """A field that may be absent."""
    return getattr(message, field) if message.HasField(field) else None


def _moment(message: Any, field: str) -> datetime | None:
    return moment_of(getattr(message, field)) if message.HasField(field) else None


def _timestamp(moment: datetime | None) -> Timestamp | None:
    return None if moment is None else timestamp_of(moment)


def _value_message(value: Value | None) -> pb.Value | None:
    return None if value is None else pb.Value(json=value.json, binary=value.binary)


def _value_in(message: pb.Value) -> Value:
    return Value(message.json, _optional(message, "binary"))


def _value(message: Any, field: str) -> Value | None:
    return _value_in(getattr(message, field)) if message.HasField(field) else None


def _pair_messages(pairs: Iterable[tuple[str, int]]) -> list[pb.VersionOf]:
    return [pb.VersionOf(name=name, version=version) for name, version in pairs]


def _pairs(messages: Iterable[pb.VersionOf]) -> tuple[tuple[str, int], ...]:
    return tuple((message.name, message.version) for message in messages)


# Answers


def history_message(entry: HistoryEntry) -> pb.HistoryEntry:
    """A version."""
    return pb.HistoryEntry(
        session_id=entry.session_id,
        name=entry.name,
        variable_id=entry.variable_id,
        type=entry.type,
        version=entry.version,
        kind=_KINDS.number(entry.kind),
        value=_value_message(entry.value),
        source=_SOURCES.number(entry.source),
        metadata=entry.metadata,
        sequence=entry.sequence,
        created_at=timestamp_of(entry.created_at),
        actor=entry.actor,
        cause=entry.cause,
        execution_id=entry.execution_id,
        tool=entry.tool,
        masked=entry.masked,
        caller_id=entry.caller_id,
        caller_tool=entry.caller_tool,
    )


def history_of(message: pb.HistoryEntry) -> HistoryEntry:
    """The version in a message."""
    return HistoryEntry(
        message.session_id,
        message.name,
        message.variable_id,
        message.type,
        message.version,
        _KINDS.member(message.kind),
        _value(message, "value"),
        _SOURCES.member(message.source),
        dict(message.metadata),
        message.sequence,
        moment_of(message.created_at),
        message.actor,
        message.cause,
        _optional(message, "execution_id"),
        _optional(message, "tool"),
        message.masked,
        _optional(message, "caller_id"),
        _optional(message, "caller_tool"),
    )


def state_message(state: VariableState) -> pb.VariableState:
    """A variable at a point."""
    return pb.VariableState(
        session_id=state.session_id,
        name=state.name,
        variable_id=state.variable_id,
        type=state.type,
        value=_value_message(state.value),
        version=state.version,
        kind=_KINDS.number(state.kind),
        source=_SOURCES.number(state.source),
        constraints_json=state.constraints,
        metadata=state.metadata,
        sequence=state.sequence,
        updated_at=timestamp_of(state.updated_at),
        actor=state.actor,
        cause=state.cause,
        execution_id=state.execution_id,
        tool=state.tool,
        masked=state.masked,
        caller_id=state.caller_id,
        caller_tool=state.caller_tool,
    )


def state_of(message: pb.VariableState) -> VariableState:
    """The variable in a message."""
    return VariableState(
        message.session_id,
        message.name,
        message.variable_id,
        message.type,
        _value(message, "value"),
        message.version,
        _KINDS.member(message.kind),
        _SOURCES.member(message.source),
        message.constraints_json,
        dict(message.metadata),
        message.sequence,
        moment_of(message.updated_at),
        message.actor,
        message.cause,
        _optional(message, "execution_id"),
        _optional(message, "tool"),
        message.masked,
        _optional(message, "caller_id"),
        _optional(message, "caller_tool"),
    )


def summary_message(summary: ExecutionSummary) -> pb.ExecutionSummary:
    """An execution in short."""
    return pb.ExecutionSummary(
        session_id=summary.session_id,
        execution_id=summary.execution_id,
        tool=summary.tool,
        status=_STATUSES.number(summary.status),
        attempt=summary.attempt,
        actor=summary.actor,
        began_sequence=summary.began_sequence,
        began_at=timestamp_of(summary.began_at),
        ended_sequence=summary.ended_sequence,
        ended_at=_timestamp(summary.ended_at),
        duration_us=summary.duration_us,
        parent_id=summary.parent_id,
        idempotency_key=summary.idempotency_key,
        worker_id=summary.worker_id,
        reads=summary.reads,
        writes=summary.writes,
        error=summary.error,
    )


def summary_of(message: pb.ExecutionSummary) -> ExecutionSummary:
    """The execution in a message."""
    return ExecutionSummary(
        message.session_id,
        message.execution_id,
        message.tool,
        _STATUSES.member(message.status),
        message.attempt,
        message.actor,
        message.began_sequence,
        moment_of(message.began_at),
        _optional(message, "ended_sequence"),
        _moment(message, "ended_at"),
        _optional(message, "duration_us"),
        _optional(message, "parent_id"),
        _optional(message, "idempotency_key"),
        message.worker_id,
        message.reads,
        message.writes,
        message.error,
    )


def detail_message(detail: ExecutionDetail) -> pb.ExecutionDetail:
    """An execution in full."""
    return pb.ExecutionDetail(
        summary=summary_message(detail.summary),
        isolation=detail.isolation,
        parameters={name: pb.Value(json=value.json, binary=value.binary) for name, value in detail.parameters.items()},
        metadata=detail.metadata,
        seed=detail.seed,
        result=_value_message(detail.result),
        failure=_failure_message(detail.failure),
        reason=detail.reason,
        conflicts=[_conflict_message(conflict) for conflict in detail.conflicts],
        reads=[_read_message(read) for read in detail.reads],
        patterns=detail.patterns,
        writes=_pair_messages(detail.writes),
        published=_pair_messages(detail.published),
        log=[_log_message(line) for line in detail.log],
        recorded_json=json.dumps(detail.recorded),
        attempts=detail.attempts,
        children=[detail_message(child) for child in detail.children],
        history=[history_message(entry) for entry in detail.history],
    )


def detail_of(message: pb.ExecutionDetail) -> ExecutionDetail:
    """The execution in a message."""
    failure = _optional(message, "failure")
    return ExecutionDetail(
        summary_of(message.summary),
        message.isolation,
        {name: _value_in(value) for name, value in message.parameters.items()},
        dict(message.metadata),
        message.seed,
        _value(message, "result"),
        failure and Failure(failure.type, failure.message, failure.traceback),
        message.reason,
        tuple(map(_conflict_of, message.conflicts)),
        tuple(map(_read_of, message.reads)),
        tuple(message.patterns),
        _pairs(message.writes),
        _pairs(message.published),
        tuple(map(_log_of, message.log)),
        json.loads(message.recorded_json),
        tuple(message.attempts),
        tuple(map(detail_of, message.children)),
        tuple(map(history_of, message.history)),
    )


def _failure_message(failure: Failure | None) -> pb.Failure | None:
    if failure is None:
        return None
    return pb.Failure(type=failure.type, message=failure.message, traceback=failure.traceback)


def _conflict_message(conflict: Conflict) -> pb.Conflict:
    return pb.Conflict(name=conflict.name, expected=conflict.expected, actual=conflict.actual, reason=conflict.reason)


def _conflict_of(message: pb.Conflict) -> Conflict:
    return Conflict(message.name, _optional(message, "expected"), _optional(message, "actual"), message.reason)


def _read_message(read: ReadEntry) -> pb.ReadEntry:
    return pb.ReadEntry(asked=read.asked, name=read.name, variable_id=read.variable_id, version=read.version)


def _read_of(message: pb.ReadEntry) -> ReadEntry:
    return ReadEntry(
        message.asked, _optional(message, "name"), _optional(message, "variable_id"), _optional(message, "version")
    )


def _log_message(line: LogEntry) -> pb.LogEntry:
    return pb.LogEntry(at=timestamp_of(line.at), message=line.message, fields_json=json.dumps(line.fields))


def _log_of(message: pb.LogEntry) -> LogEntry:
    return LogEntry(moment_of(message.at), message.message, json.loads(message.fields_json))


def _commit_message(entry: CommitEntry) -> pb.CommitEntry:
    return pb.CommitEntry(
        sequence=entry.sequence,
        session_id=entry.session_id,
        actor=entry.actor,
        cause=entry.cause,
        created_at=timestamp_of(entry.created_at),
        hash=entry.hash,
        versions=_pair_messages(entry.versions),
        events=entry.events,
        pruned=entry.pruned,
    )


def _commit_of(message: pb.CommitEntry) -> CommitEntry:
    return CommitEntry(
        message.sequence,
        message.session_id,
        message.actor,
        message.cause,
        moment_of(message.created_at),
        message.hash,
        _pairs(message.versions),
        tuple(message.events),
        message.pruned,
    )


def _session_message(entry: SessionEntry) -> pb.SessionEntry:
    return pb.SessionEntry(
        session_id=entry.session_id,
        created_at=timestamp_of(entry.created_at),
        started_sequence=entry.started_sequence,
        ended_sequence=entry.ended_sequence,
        ended_at=_timestamp(entry.ended_at),
        last_at=timestamp_of(entry.last_at),
        ttl_s=entry.ttl_s,
        variables=entry.variables,
        commits=entry.commits,
        executions=entry.executions,
        metadata=entry.metadata,
    )


def _session_of(message: pb.SessionEntry) -> SessionEntry:
    return SessionEntry(
        message.session_id,
        moment_of(message.created_at),
        message.started_sequence,
        _optional(message, "ended_sequence"),
        _moment(message, "ended_at"),
        moment_of(message.last_at),
        _optional(message, "ttl_s"),
        message.variables,
        message.commits,
        message.executions,
        dict(message.metadata),
    )


# Questions


def _history_request(query: HistoryQuery) -> pb.ListHistoryRequest:
    return pb.ListHistoryRequest(
        session=query.session,
        variable=query.variable,
        type=query.type,
        kind=_KINDS.number(None if query.kind is None else ChangeKind(query.kind)),
        actor=query.actor,
        source=_SOURCES.number(None if query.source is None else Source(query.source)),
        tool=query.tool,
        execution_id=query.execution_id,
        metadata=query.metadata,
        where=[
            pb.Predicate(operator=_OPERATORS.number(each.operator), operand=each.operand)
            for each in predicates_of(query.where)
        ],
    )


def _history_query(request: pb.ListHistoryRequest) -> HistoryQuery:
    return HistoryQuery(
        session=request.session,
        variable=request.variable,
        type=request.type,
        kind=_KINDS.find(request.kind),
        actor=request.actor,
        source=_SOURCES.find(request.source),
        tool=request.tool,
        execution_id=request.execution_id,
        metadata=_metadata(request.metadata),
        where=_predicates(request.where),
        **_range(request.range),
    )


def _metadata(conditions: Mapping[str, str]) -> dict[str, str]:
    check_conditions("metadata", conditions)
    return dict(conditions)


def _predicates(messages: Sequence[pb.Predicate]) -> tuple[Predicate, ...]:
    check_conditions("where", messages)
    return tuple(map(_predicate, messages))


def _predicate(message: pb.Predicate) -> Predicate:
    return checked(Predicate(_OPERATORS.member(message.operator), message.operand))


def _execution_request(query: ExecutionQuery) -> pb.ListExecutionsRequest:
    return pb.ListExecutionsRequest(
        session=query.session,
        tool=query.tool,
        status=_STATUSES.number(None if query.status is None else ExecutionStatus(query.status)),
        actor=query.actor,
        idempotency_key=query.idempotency_key,
        metadata=query.metadata,
        only_roots=not query.children,
    )


def _execution_query(request: pb.ListExecutionsRequest) -> ExecutionQuery:
    return ExecutionQuery(
        session=request.session,
        tool=request.tool,
        status=_STATUSES.find(request.status),
        actor=request.actor,
        idempotency_key=request.idempotency_key,
        metadata=_metadata(request.metadata),
        children=not request.only_roots,
        **_range(request.range),
    )


def _commit_request(query: CommitQuery) -> pb.ListCommitsRequest:
    return pb.ListCommitsRequest(session=query.session, actor=query.actor, cause=query.cause)


def _commit_query(request: pb.ListCommitsRequest) -> CommitQuery:
    return CommitQuery(session=request.session, actor=request.actor, cause=request.cause, **_range(request.range))


def _session_request(query: SessionQuery) -> pb.ListSessionsRequest:
    return pb.ListSessionsRequest(session=query.session, live=query.live, metadata=query.metadata)


def _session_query(request: pb.ListSessionsRequest) -> SessionQuery:
    return SessionQuery(
        session=request.session,
        live=_optional(request, "live"),
        metadata=_metadata(request.metadata),
        **_range(request.range),
    )


def _range(message: pb.Range) -> dict[str, Any]:
    if message.limit < 0:
        raise InvalidArgumentError("limit", f"{message.limit} is below 0")
    return {
        "since": message.since,
        "until": message.until,
        "newest_first": not message.oldest_first,
        "limit": message.limit,
    }


# Lists


@dataclass(frozen=True, slots=True)
class ListRpc(Generic[T]):
    """How one kind of question travels. `rows`: the answer's field that has them; `key_length`: a cursor's."""

    name: str
    response: Callable[..., Any]
    rows: str
    key_length: int
    request_of: Callable[[Any], Any]
    query_of: Callable[[Any], Query[T]]
    message_of: Callable[[T], Message]
    row_of: Callable[[Any], T]

    def request(self, query: Query[T], after: Cursor | None, most: int, *, reveal: bool) -> Any:
        """The question as a message: for at most `most` answers, from `after` on."""
        request = self.request_of(query)
        asked = request.range
        asked.since, asked.until, asked.oldest_first = query.since, query.until, not query.newest_first
        asked.limit = most
        if after is not None:
            asked.after.key.extend(after)
        if "reveal" in request.DESCRIPTOR.fields_by_name:
            request.reveal = reveal
        return request

    def question(self, request: Any) -> "Question[T]":
        """The question in a message."""
        after = request.range.after if request.range.HasField("after") else None
        if after is not None and len(after.key) != self.key_length:
            reason = f"it has {len(after.key)} numbers where this list has {self.key_length}; hand it back as it came"
            raise InvalidArgumentError("after", reason)
        return Question(self, self.query_of(request), after)

    def page_of(self, response: Any) -> Page[T]:
        """The answers in a message, and where to go on."""
        rows = [self.row_of(row) for row in getattr(response, self.rows)]
        return Page(rows, tuple(response.next.key) if response.HasField("next") else None)


@dataclass(frozen=True, slots=True)
class Question(Generic[T]):
    """A question as it came: what is asked, and from where on."""

    rpc: ListRpc[T]
    query: Query[T]
    after: pb.Cursor | None

    def bounds(self, source: AuditSource) -> tuple[int, int]:
        """After which commit, and up to which: as the first stream of this question found it."""
        since, until, after = self.query.since, self.query.until, self.after
        if after is not None and after.HasField("since") and after.HasField("until"):
            since, until = str(after.since), str(after.until)
        session = "" if is_glob(self.query.session) else self.query.session
        first = source.resolve(since, "since", session) if since else 0
        return first, source.resolve(until, "until", session) if until else source.head()

    def within(self, bounds: tuple[int, int]) -> Query[T]:
        """The question, with its points as commits: an age must not move while pages are read."""
        return replace(self.query, since=str(bounds[0]), until=str(bounds[1]))

    @property
    def key(self) -> Cursor | None:
        """After which row."""
        return None if self.after is None else tuple(self.after.key)

    def response(self, page: Page[T], bounds: tuple[int, int]) -> Any:
        """The answers as a message."""
        response = self.rpc.response(**{self.rpc.rows: [self.rpc.message_of(row) for row in page.rows]})
        if page.after is not None:
            response.next.CopyFrom(pb.Cursor(key=page.after, since=bounds[0], until=bounds[1]))
        return response


HISTORY: Final = ListRpc(
    "ListHistory", pb.ListHistoryResponse, "entries", 3, _history_request, _history_query, history_message, history_of
)
EXECUTIONS: Final = ListRpc(
    "ListExecutions",
    pb.ListExecutionsResponse,
    "executions",
    1,
    _execution_request,
    _execution_query,
    summary_message,
    summary_of,
)
COMMITS: Final = ListRpc(
    "ListCommits", pb.ListCommitsResponse, "commits", 1, _commit_request, _commit_query, _commit_message, _commit_of
)
SESSIONS: Final = ListRpc(
    "ListSessions",
    pb.ListSessionsResponse,
    "sessions",
    1,
    _session_request,
    _session_query,
    _session_message,
    _session_of,
)
LISTS: Final[Mapping[type[Query[Any]], ListRpc[Any]]] = {
    HistoryQuery: HISTORY,
    ExecutionQuery: EXECUTIONS,
    CommitQuery: COMMITS,
    SessionQuery: SESSIONS,
}


# Pruning


def prune_request(policy: PrunePolicy, *, confirm: bool) -> pb.PruneRequest:
    """The request to prune, or to say how much that would be."""
    return pb.PruneRequest(
        keep_versions=policy.keep_versions,
        before=_timestamp(policy.before),
        ended_before=_timestamp(policy.ended_before),
        session_id=policy.session_id,
        confirm=confirm,
    )


def policy_of(request: pb.PruneRequest) -> PrunePolicy:
    """The policy in a request."""
    try:
        return PrunePolicy(
            _optional(request, "keep_versions"),
            _moment(request, "before"),
            _moment(request, "ended_before"),
            _optional(request, "session_id"),
        )
    except OverflowError as error:
        raise InvalidArgumentError("policy", "it has a time beyond the years 1 to 9999") from error


def progress_message(what: str, done: int, in_all: int) -> pb.PruneResponse:
    """How far it has come."""
    return pb.PruneResponse(progress=pb.PruneProgress(what=what, done=done, in_all=in_all))


def report_message(report: PruneReport) -> pb.PruneResponse:
    """What came of it."""
    return pb.PruneResponse(
        report=pb.PruneReport(
            confirmed=report.confirmed,
            sessions=report.sessions,
            versions=report.versions,
            events=report.events,
            markers=report.markers,
        )
    )


def report_of(message: pb.PruneReport) -> PruneReport:
    """The report in a message."""
    return PruneReport(message.confirmed, message.sessions, message.versions, message.events, message.markers)
