"""The rpcs of the audit service: for each one, the translation of its request and its response. Pure functions.

Records and messages have the same fields, so `records.py` derives their codecs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, TypeVar

from google.protobuf.message import Message

from dspex_persist.state.audit import (
    AuditSource,
    CommitEntry,
    CommitQuery,
    Cursor,
    DenialQuery,
    ExecutionDetail,
    ExecutionQuery,
    ExecutionSummary,
    HistoryEntry,
    HistoryQuery,
    Page,
    Query,
    SessionEntry,
    SessionQuery,
    T,
    VariableState,
    check_conditions,
    is_glob,
)
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as pb
from dspex_persist.state.bridge.records import Codec
from dspex_persist.state.denials import Denial
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.lm_calls import LmUsage, LmUsageQuery
from dspex_persist.state.model import PrunePolicy, PruneReport

AUDIT_SERVICE: Final = pb.DESCRIPTOR.services_by_name["AuditService"]

A = TypeVar("A")

VERSION: Final[Codec[HistoryEntry]] = Codec.between(HistoryEntry, pb.HistoryEntry)
VARIABLE: Final[Codec[VariableState]] = Codec.between(VariableState, pb.VariableState)
EXECUTION: Final[Codec[ExecutionDetail]] = Codec.between(ExecutionDetail, pb.ExecutionDetail)


# Single answers


@dataclass(frozen=True, slots=True)
class Single(Generic[A]):
    """A unary rpc.

    Attributes:
        name: The name of the rpc.
        request: The type of the request.
        ask: Answers a request from a source.
        response_of: Returns the response with an answer.
        answer_of: Returns the answer in a response.
    """

    name: str
    request: Callable[..., Any]
    ask: Callable[[AuditSource, Any], A]
    response_of: Callable[[A], Message]
    answer_of: Callable[[Any], A]


GET_HEAD: Final[Single[int]] = Single(
    "GetHead",
    pb.GetHeadRequest,
    lambda source, _: source.head(),
    lambda sequence: pb.GetHeadResponse(sequence=sequence),
    lambda response: response.sequence,
)
RESOLVE_POINT: Final[Single[int]] = Single(
    "ResolvePoint",
    pb.ResolvePointRequest,
    lambda source, request: source.resolve(request.point, request.option or "at", request.session),
    lambda sequence: pb.ResolvePointResponse(sequence=sequence),
    lambda response: response.sequence,
)
GET_EXECUTION: Final[Single[ExecutionDetail]] = Single(
    "GetExecution",
    pb.GetExecutionRequest,
    lambda source, request: source.execution(request.execution_id),
    lambda detail: pb.GetExecutionResponse(execution=EXECUTION.message_of(detail)),
    lambda response: EXECUTION.record_of(response.execution),
)
GET_STATE: Final[Single[tuple[VariableState, ...]]] = Single(
    "GetState",
    pb.GetStateRequest,
    lambda source, request: source.state(request.session, request.at),
    lambda variables: pb.GetStateResponse(variables=map(VARIABLE.message_of, variables)),
    lambda response: tuple(map(VARIABLE.record_of, response.variables)),
)
GET_VERSION: Final[Single[HistoryEntry]] = Single(
    "GetVersion",
    pb.GetVersionRequest,
    lambda source, request: source.version(request.session, request.variable_id, request.version),
    lambda entry: pb.GetVersionResponse(entry=VERSION.message_of(entry)),
    lambda response: VERSION.record_of(response.entry),
)
_DENIAL_TEXTS: Final = ("session", "identity", "peer", "rpc", "since", "until")
_DENIAL: Final[Codec[Denial]] = Codec.between(Denial, pb.Denial)


def _denials_request(query: DenialQuery) -> Any:
    texts = {name: getattr(query, name) for name in _DENIAL_TEXTS}
    return pb.ListDenialsRequest(**texts, oldest_first=not query.newest_first, limit=query.limit)


def _denials_asked(request: Any) -> DenialQuery:
    texts = {name: getattr(request, name) for name in _DENIAL_TEXTS}
    return DenialQuery(**texts, newest_first=not request.oldest_first, limit=request.limit)


LIST_DENIALS: Final[Single[tuple[Denial, ...]]] = Single(
    "ListDenials",
    _denials_request,
    lambda source, request: source.denials(_denials_asked(request)),
    lambda denials: pb.ListDenialsResponse(denials=map(_DENIAL.message_of, denials)),
    lambda response: tuple(map(_DENIAL.record_of, response.denials)),
)
SINGLES: Final[tuple[Single[Any], ...]] = (
    GET_HEAD,
    RESOLVE_POINT,
    GET_EXECUTION,
    GET_STATE,
    GET_VERSION,
    LIST_DENIALS,
)


# Lists


_IN_RANGE: Final = ("since", "until", "newest_first", "limit")
_CONDITIONS: Final = ("metadata", "where", "by")


@dataclass(frozen=True, slots=True)
class ListRpc(Generic[T]):
    """An rpc that streams a list.

    Attributes:
        name: The name of the rpc.
        query: Translates the query.
        response: The type of the response.
        rows: The name of the response's field with the rows.
        row: Translates a row.
        key_length: The number of integers in a cursor.
    """

    name: str
    query: Codec[Query[T]]
    response: Callable[..., Any]
    rows: str
    row: Codec[T]
    key_length: int = 1

    def request(self, query: Query[T], after: Cursor | None, most: int, *, reveal: bool) -> Any:
        """Return the request for at most `most` rows after a cursor."""
        request = self.query.message_of(query)
        bounds = request.range
        bounds.since, bounds.until, bounds.oldest_first = query.since, query.until, not query.newest_first
        bounds.limit = most
        if after is not None:
            bounds.after.key.extend(after)
        if "reveal" in request.DESCRIPTOR.fields_by_name:
            request.reveal = reveal
        return request

    def question(self, request: Any) -> "Question[T]":
        """Return the query in a request; `InvalidArgumentError` for a cursor of another list."""
        after = request.range.after if request.range.HasField("after") else None
        if after is not None and len(after.key) != self.key_length:
            reason = f"it has {len(after.key)} numbers, this list's has {self.key_length}; send it back unchanged"
            raise InvalidArgumentError("after", reason)
        for name in _CONDITIONS:
            # Before they are read, because a message can have millions.
            check_conditions(name, getattr(request, name, ()))
        return Question(self, self.query.record_of(request, **_range(request.range)), after)

    def page_of(self, response: Any) -> Page[T]:
        """Return the rows in a response, and the cursor to continue from."""
        rows = [*map(self.row.record_of, getattr(response, self.rows))]
        return Page(rows, tuple(response.next.key) if response.HasField("next") else None)


def _range(message: pb.Range) -> dict[str, Any]:
    if message.limit < 0:
        raise InvalidArgumentError("limit", f"{message.limit} is below 0")
    return {
        "since": message.since,
        "until": message.until,
        "newest_first": not message.oldest_first,
        "limit": message.limit,
    }


@dataclass(frozen=True, slots=True)
class Question(Generic[T]):
    """A list request on the server: the query, and the cursor to continue from."""

    rpc: ListRpc[T]
    query: Query[T]
    after: pb.Cursor | None

    def bounds(self, source: AuditSource) -> tuple[int, int]:
        """Return the range of commits: after the first number, up to the second.

        A cursor keeps the range of the first stream of the query, so that later pages have the same one.
        """
        since, until, after = self.query.since, self.query.until, self.after
        if after is not None and after.HasField("since") and after.HasField("until"):
            since, until = str(after.since), str(after.until)
        session = "" if is_glob(self.query.session) else self.query.session
        first = source.resolve(since, "since", session) if since else 0
        return first, source.resolve(until, "until", session) if until else source.head()

    def within(self, bounds: tuple[int, int]) -> Query[T]:
        """Return the query with its points as commit numbers, so that an age does not move between pages."""
        return replace(self.query, since=str(bounds[0]), until=str(bounds[1]))

    @property
    def key(self) -> Cursor | None:
        """The key of the row to continue after."""
        return None if self.after is None else tuple(self.after.key)

    def response(self, page: Page[T], bounds: tuple[int, int]) -> Any:
        """Return the response with a page."""
        response = self.rpc.response(**{self.rpc.rows: map(self.rpc.row.message_of, page.rows)})
        if page.after is not None:
            response.next.CopyFrom(pb.Cursor(key=page.after, since=bounds[0], until=bounds[1]))
        return response


def _query(query: Callable[..., Query[T]], request: type[Message]) -> Codec[Query[T]]:
    return Codec(query, request, handed=_IN_RANGE)


LIST_HISTORY: Final = ListRpc(
    "ListHistory",
    _query(HistoryQuery, pb.ListHistoryRequest),
    pb.ListHistoryResponse,
    "entries",
    VERSION,
    key_length=3,
)
LIST_EXECUTIONS: Final = ListRpc(
    "ListExecutions",
    _query(ExecutionQuery, pb.ListExecutionsRequest),
    pb.ListExecutionsResponse,
    "executions",
    Codec[ExecutionSummary].between(ExecutionSummary, pb.ExecutionSummary),
)
LIST_COMMITS: Final = ListRpc(
    "ListCommits",
    _query(CommitQuery, pb.ListCommitsRequest),
    pb.ListCommitsResponse,
    "commits",
    Codec[CommitEntry].between(CommitEntry, pb.CommitEntry),
)
LIST_SESSIONS: Final = ListRpc(
    "ListSessions",
    _query(SessionQuery, pb.ListSessionsRequest),
    pb.ListSessionsResponse,
    "sessions",
    Codec[SessionEntry].between(SessionEntry, pb.SessionEntry),
)
LIST_LM_USAGE: Final = ListRpc(
    "ListLmUsage",
    _query(LmUsageQuery, pb.ListLmUsageRequest),
    pb.ListLmUsageResponse,
    "usage",
    Codec[LmUsage].between(LmUsage, pb.LmUsage),
)
LISTS: Final[Mapping[type[Query[Any]], ListRpc[Any]]] = {
    HistoryQuery: LIST_HISTORY,
    ExecutionQuery: LIST_EXECUTIONS,
    CommitQuery: LIST_COMMITS,
    SessionQuery: LIST_SESSIONS,
    LmUsageQuery: LIST_LM_USAGE,
}


# Pruning


PRUNE: Final = "Prune"
_POLICY: Final[Codec[PrunePolicy]] = Codec.between(PrunePolicy, pb.PruneRequest)
REPORT: Final[Codec[PruneReport]] = Codec.between(PruneReport, pb.PruneReport)


def prune_request(policy: PrunePolicy, *, confirm: bool) -> Any:
    """Return the request to prune or, without `confirm`, to report what a pruning would remove."""
    request = _POLICY.message_of(policy)
    request.confirm = confirm
    return request


def policy_of(request: pb.PruneRequest) -> PrunePolicy:
    """Return the policy in a request; `InvalidArgumentError` for a time that is out of range."""
    try:
        return _POLICY.record_of(request)
    except OverflowError as error:
        raise InvalidArgumentError("policy", "it has a time beyond the years 1 to 9999") from error


def progress_message(what: str, done: int, in_all: int) -> pb.PruneResponse:
    """Return the message for the progress of a pruning."""
    return pb.PruneResponse(progress=pb.PruneProgress(what=what, done=done, in_all=in_all))


def report_message(report: PruneReport) -> pb.PruneResponse:
    """Return the message for the report of a pruning."""
    return pb.PruneResponse(report=REPORT.message_of(report))
