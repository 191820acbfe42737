"""BridgedAudit: the history of a server, asked over gRPC."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import grpc

from dspex_persist.state.audit import (
    PAGE,
    AuditSource,
    Cursor,
    ExecutionDetail,
    HistoryEntry,
    Page,
    PointLike,
    Query,
    T,
    VariableState,
    point_text,
)
from dspex_persist.state.bridge.generated.dspex_persist_audit_pb2_grpc import AuditServiceStub
from dspex_persist.state.bridge.inherited import OneProcess
from dspex_persist.state.bridge.rpcs import audit as rpcs
from dspex_persist.state.bridge.rpcs.audit import Single
from dspex_persist.state.bridge.status import error_of_call, is_told
from dspex_persist.state.errors import (
    EngineClosedError,
    InvalidArgumentError,
    StateError,
    UnavailableError,
    UnsupportedError,
)
from dspex_persist.state.model import PrunePolicy, PruneReport
from dspex_persist.state.provider import Progress

A = TypeVar("A")


class BridgedAudit(AuditSource):
    """The history that a server keeps. An answer that does not come within `timeout_s` is an `UnavailableError`.

    `reveal` is a wish: the server masks sensitive values all the same if it was not started with `audit_reveal`.
    `on_close` is called when it is closed.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        target: str,
        *,
        timeout_s: float,
        reveal: bool = False,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.reveal = reveal
        self._calls = _Calls(channel, target)
        self._timeout_s = timeout_s
        self._on_close = on_close

    def close(self) -> None:
        """Let the connection go if it was made for this."""
        self._on_close()

    def head(self) -> int:
        """See `AuditSource.head`."""
        return self._ask(rpcs.GET_HEAD)

    def resolve(self, point: PointLike, option: str = "at", session: str = "") -> int:
        """See `AuditSource.resolve`."""
        return self._ask(rpcs.RESOLVE_POINT, point=point_text(point, option), option=option, session=session)

    def page(self, query: Query[T], after: Cursor | None = None, most: int = PAGE) -> Page[T]:
        """See `AuditSource.page`."""
        rpc = rpcs.LISTS.get(type(query))
        if rpc is None:
            raise UnsupportedError(f"questions of type {type(query).__name__}")
        request = _made(lambda: rpc.request(query, after, most, reveal=self.reveal))
        pages = [rpc.page_of(each) for each in self._calls.stream(rpc.name, request, self._timeout_s)]
        rows = [row for page in pages for row in page.rows]
        return cast(Page[T], Page(rows, pages[-1].after))

    def execution(self, execution_id: str) -> ExecutionDetail:
        """See `AuditSource.execution`."""
        return self._ask(rpcs.GET_EXECUTION, execution_id=execution_id, reveal=self.reveal)

    def state(self, session: str, at: PointLike = "") -> tuple[VariableState, ...]:
        """See `AuditSource.state`."""
        return self._ask(rpcs.GET_STATE, session=session, at=point_text(at), reveal=self.reveal)

    def version(self, session: str, variable_id: str, version: int) -> HistoryEntry:
        """See `AuditSource.version`."""
        asked = {"session": session, "variable_id": variable_id, "version": version}
        return self._ask(rpcs.GET_VERSION, **asked, reveal=self.reveal)

    def _ask(self, rpc: Single[A], **asked: Any) -> A:
        request = _made(lambda: rpc.request(**asked))
        return rpc.answer_of(self._calls.unary(rpc.name, request, self._timeout_s))


def prune(
    channel: grpc.Channel,
    target: str,
    policy: PrunePolicy,
    *,
    confirm: bool,
    progress: Progress,
) -> PruneReport:
    """Have a server prune. It takes as long as it takes; what `progress` raises ends it."""
    request = _made(lambda: rpcs.prune_request(policy, confirm=confirm))
    for answer in _Calls(channel, target).stream(rpcs.PRUNE, request, None):
        if answer.HasField("report"):
            return rpcs.REPORT.record_of(answer.report)
        progress(answer.progress.what, answer.progress.done, answer.progress.in_all)
    raise UnavailableError(f"{target} ended the pruning without a report")


def _made(request: Callable[[], Any]) -> Any:
    try:
        return request()
    except (ValueError, TypeError) as error:
        # What no message can carry: a lone surrogate, a number beyond its field.
        raise InvalidArgumentError("request", str(error)) from error


class _Calls:
    """The rpcs of the service on a channel. What goes wrong is raised as the error that the server meant."""

    def __init__(self, channel: grpc.Channel, target: str) -> None:
        self._target = target
        self._here = OneProcess(target, channel)
        self._stub = AuditServiceStub(channel)

    def unary(self, rpc: str, request: Any, timeout_s: float) -> Any:
        """The one answer."""
        self._here.check()
        try:
            return getattr(self._stub, rpc)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._error(error) from None
        except ValueError as error:
            # The channel is closed.
            raise EngineClosedError() from error

    def stream(self, rpc: str, request: Any, timeout_s: float | None) -> Iterator[Any]:
        """The answers, as they come. Whoever stops taking them ends the call."""
        self._here.check()
        try:
            call = getattr(self._stub, rpc)(request, timeout=timeout_s)
        except ValueError as error:
            # The channel is closed.
            raise EngineClosedError() from error
        try:
            yield from call
        except grpc.RpcError:
            raise self._error(call) from None
        finally:
            call.cancel()

    def _error(self, call: Any) -> StateError:
        code = call.code()
        if is_told(call):
            return error_of_call(call)
        if code is grpc.StatusCode.UNIMPLEMENTED:
            service = rpcs.AUDIT_SERVICE.full_name
            return UnsupportedError("audits", f"the server at {self._target} is older than {service}: upgrade it")
        if code is grpc.StatusCode.CANCELLED:
            return EngineClosedError()
        return error_of_call(call, self._target)
