"""Callbacks: the private address at which the server answers one worker. Contains no rules.

What arrives there is part of an execution that the worker is lent to. A worker that runs nothing gets no answer, so
that nothing can be written after the end of an execution.
"""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol

from dspex_persist import clock
from dspex_persist.infra import server
from dspex_persist.infra.access.peers import can_tell_users
from dspex_persist.infra.listen import TcpAddress, parse_listen
from dspex_persist.state.bridge.access.denials import Denials
from dspex_persist.state.bridge.access.same_user import SameUser
from dspex_persist.state.bridge.audit_service import AuditServicer
from dspex_persist.state.bridge.codec import BRIDGE_SERVICE, timestamp_of, value_of
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as audit_pb
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.headers import ACTOR, BINARY, EXECUTION_ID, REASON, SOURCE
from dspex_persist.state.bridge.incoming import Context, RequestHeaders
from dspex_persist.state.bridge.lent import KIND, PUBLISH, take_entries
from dspex_persist.state.bridge.rpcs import beside
from dspex_persist.state.bridge.rpcs.audit import AUDIT_SERVICE
from dspex_persist.state.bridge.servicer import BridgeServicer
from dspex_persist.state.bridge.status import status_of
from dspex_persist.state.bridge.traced import from_workers
from dspex_persist.state.budgets import Budget
from dspex_persist.state.errors import ExecutionNotFoundError, UnsupportedError
from dspex_persist.state.model import Source
from dspex_persist.state.tools.session import ToolSession

_OF_SESSIONS: Final = ("InitializeSession", "CleanupSession", "Heartbeat", "RegisterTools")
"""Rpcs that a worker may not call: sessions are their clients', and the server knows its tools."""

Method = Callable[[Any, Context], Awaitable[Any]]


class Running(Protocol):
    """The worker whose callbacks are answered."""

    @property
    def executions(self) -> Mapping[str, ToolSession]:
        """The sessions of the executions that it runs, by id: the one it is lent to comes first."""


class _Within:
    """A call as part of an execution: what it does not say itself is said for it."""

    def __init__(self, context: Context, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        self._context = context
        self._metadata = metadata

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._metadata

    def time_remaining(self) -> None:
        """Nothing limits a call within an execution but the limits of that."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class Callbacks:
    """Serves one worker at an address of its own. Used on one event loop.

    Args:
        worker: The worker.
        bridge: Answers the calls of the bridge protocol.
        audit: Answers those of the second service.
        denials: Notes the calls of other users, which are refused.
    """

    def __init__(self, worker: Running, bridge: BridgeServicer, audit: AuditServicer, denials: Denials) -> None:
        self._worker = worker
        self._bridge = bridge
        self._audit = audit
        self._denials = denials
        self._stop = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None

    async def serve(self, listen: str, max_message_bytes: int) -> int:
        """Serve at an address until `close`; returns the port, or 0 for a Unix socket.

        Raises:
            ListenError: The address is not available.
        """
        ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        options = server.ServerOptions(listen, max_message_bytes=max_message_bytes, grace_s=1.0, reflection=False)
        # A port has no mode as a socket has, and existing workers send no token.
        address = parse_listen(listen)
        users = None
        if isinstance(address, TcpAddress) and can_tell_users():
            users = SameUser(address.host, self._denials)

        def on_ready(port: int) -> None:
            if users is not None:
                users.serves(port)
            ready.set_result(port)

        serving = server.serve(
            options,
            self._services(),
            status_of=status_of,
            on_ready=on_ready,
            stop=self._stop,
            admit=server.admit_all if users is None else users.admit,
            spans=from_workers(lambda: self._worker.executions),
        )
        # Of its own: the call for which a worker is started is not around what that one does later.
        self._serving = asyncio.create_task(serving, context=contextvars.Context())
        await asyncio.wait((ready, self._serving), return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            self._serving.result()
        return ready.result()

    async def close(self) -> None:
        """Answer no more."""
        self._stop.set()
        if self._serving is not None:
            await asyncio.wait((self._serving,))

    def _services(self) -> list[server.Service]:
        own = self._own()
        bridge, audit = _Methods(), _Methods()
        for method in BRIDGE_SERVICE.methods:
            run = own.get(method.name) or getattr(self._bridge, method.name, None)
            if run is not None:
                setattr(bridge, method.name, self._within(run))
        for name, always in self._always().items():
            setattr(bridge, name, always)
        for name in (*(rpc.name for rpc in beside.RPCS), "RecordInputs", "CheckBudget"):
            setattr(audit, name, self._within(own.get(name) or getattr(self._audit, name)))
        return [server.Service(BRIDGE_SERVICE, bridge), server.Service(AUDIT_SERVICE, audit)]

    def _own(self) -> dict[str, Method]:
        """What is answered otherwise than at the server's own address."""
        own: dict[str, Method] = {
            "SetVariable": self._set_variable,
            "RecordInputs": self._record_inputs,
            "CheckBudget": self._check_budget,
        }
        return own | {name: self._refusal(name) for name in _OF_SESSIONS}

    def _always(self) -> dict[str, Method]:
        """What is answered even if the worker runs nothing."""
        return {"Ping": self._bridge.Ping}

    def _within(self, run: Method) -> Method:
        async def method(request: Any, context: Context) -> Any:
            return await run(request, self._context(context))

        return method

    def _context(self, context: Context) -> Any:
        metadata = tuple(context.invocation_metadata() or ())
        sent = {key.removesuffix(BINARY): content for key, content in metadata}
        session = self._session(sent.get(EXECUTION_ID))
        origin = session.origin
        added = {EXECUTION_ID: session.execution_id, SOURCE: Source.PYTHON.value}
        texts = {ACTOR: origin.actor, REASON: origin.reason}
        return _Within(
            context,
            (
                *metadata,
                *((name, text) for name, text in added.items() if name not in sent),
                *((name + BINARY, text.encode()) for name, text in texts.items() if text and name not in sent),
            ),
        )

    def _session(self, execution_id: object) -> ToolSession:
        running = self._worker.executions
        session = next(iter(running.values()), None) if execution_id is None else running.get(str(execution_id))
        if session is None:
            raise ExecutionNotFoundError(str(execution_id or "(none: the worker runs no tool)"))
        return session

    def _running_session(self, context: Context) -> ToolSession:
        session = self._session(RequestHeaders(context).find(EXECUTION_ID))
        session.execution.check_running()
        return session

    # What differs from the server's own address

    async def _set_variable(self, request: pb.SetVariableRequest, context: Context) -> Any:
        headers = RequestHeaders(context)
        if headers.find(PUBLISH) is None:
            # Given to the class by a decorator.
            return await self._bridge.SetVariable(request, context)  # type: ignore[attr-defined]
        session = self._running_session(context)
        name = request.variable_identifier

        def publish() -> int:
            value = value_of(name, request.value, request.binary_value, session.limits)
            return session.publish_encoded(name, value, dict(request.metadata), reason=headers.find(REASON))

        return pb.SetVariableResponse(success=True, new_version=await asyncio.to_thread(publish))

    async def _record_inputs(self, request: audit_pb.RecordInputsRequest, context: Context) -> Any:
        session = self._running_session(context)
        if request.kind != KIND:
            return await self._audit.RecordInputs(request, context)
        for text in request.entries_json:
            take_entries(session, text)
        return audit_pb.RecordInputsResponse()

    async def _check_budget(self, request: audit_pb.CheckBudgetRequest, context: Context) -> Any:
        session = self._running_session(context)
        own = Budget(
            request.max_tokens if request.HasField("max_tokens") else None,
            request.max_cost if request.HasField("max_cost") else None,
        )
        # It may have to read the journal.
        await asyncio.to_thread(session.check_budgets, own)
        return audit_pb.CheckBudgetResponse()

    @staticmethod
    def _refusal(rpc: str) -> Method:
        async def refuse(_request: object, _context: Context) -> None:
            raise UnsupportedError(f"{rpc} by a worker, at its own address")

        return refuse


class ExistingCallbacks(Callbacks):
    """The same for a worker that was made for another coordinator, whose sessions begin and end with it.

    Args:
        worker: The worker.
        bridge: Answers the calls of the bridge protocol.
        audit: Answers those of the second service.
        denials: Notes the calls of other users, which are refused.
        pool: The name of the pool.
    """

    def __init__(
        self, worker: Running, bridge: BridgeServicer, audit: AuditServicer, denials: Denials, pool: str
    ) -> None:
        super().__init__(worker, bridge, audit, denials)
        self._pool = pool

    def _own(self) -> dict[str, Method]:
        return super()._own() | {
            "InitializeSession": self._initialize_session,
            "CleanupSession": self._cleanup_session,
            "RegisterTools": self._register_tools,
        }

    def _always(self) -> dict[str, Method]:
        return {**super()._always(), "Heartbeat": self._heartbeat}

    async def _initialize_session(self, request: pb.InitializeSessionRequest, context: Context) -> Any:
        """The session is there, or nothing would run in it: it neither begins here nor begins again."""
        self._check_session(request.session_id, context)
        tools = await self._bridge.available_tools(request.session_id, context)
        return pb.InitializeSessionResponse(success=True, available_tools=tools)

    async def _cleanup_session(self, request: pb.CleanupSessionRequest, context: Context) -> Any:
        """A worker sends this when its code is done with the session, whose client may not be."""
        self._check_session(request.session_id, context)
        return pb.CleanupSessionResponse(success=True)

    async def _register_tools(self, request: pb.RegisterToolsRequest, context: Context) -> Any:
        self._check_session(request.session_id, context)
        return await self._bridge.register_for_pool(self._pool, request, context)

    async def _heartbeat(self, _request: pb.HeartbeatRequest, _context: Context) -> Any:
        """A worker sends them for every session that it has ever seen: they keep none alive."""
        return pb.HeartbeatResponse(server_time=timestamp_of(clock.now()), session_valid=True)

    def _check_session(self, session_id: str, context: Context) -> None:
        self._running_session(context).execution.check_is_of(session_id)


class _Methods:
    """The methods of a service, by the names of its rpcs."""
