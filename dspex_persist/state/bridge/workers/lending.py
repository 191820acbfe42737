"""Lending: runs the code of tools in the workers of a pool, over the bridge protocol.

A worker is lent to one execution at a time. The tools that this one calls run in the same worker: its caller waits for
them there, so a pool that is full never waits for itself.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final
from weakref import WeakKeyDictionary

import grpc

from dspex_persist.infra.channels import channel_options
from dspex_persist.infra.listen import grpc_name
from dspex_persist.infra.tracing import Attributes
from dspex_persist.infra.workers import errors as pool_errors
from dspex_persist.infra.workers.leases import Contact, Lease
from dspex_persist.infra.workers.pool import WorkerPool
from dspex_persist.state import values
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.generated.snakepit_bridge_pb2_grpc import BridgeServiceStub
from dspex_persist.state.bridge.headers import ACTOR, ASKED_BY, BINARY, EXECUTION_ID, REASON
from dspex_persist.state.bridge.lent import ATTEMPT, FAILURE, JOURNAL, PARENT, SEED, raised_in, take_entries
from dspex_persist.state.bridge.status import error_of
from dspex_persist.state.bridge.traced import calling_tool
from dspex_persist.state.bridge.workers.callbacks import Callbacks, Running
from dspex_persist.state.errors import (
    PoolSaturatedError,
    QueueTimeoutError,
    RemoteToolError,
    StateError,
    ToolPoolError,
    WorkerExitedError,
    WorkerTimeoutError,
)
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Origin, ToolSpec, Value
from dspex_persist.state.tools.chunks import Chunks
from dspex_persist.state.tools.results import checked
from dspex_persist.state.tools.session import ToolSession

SETTLE_S: Final = 5.0
"""How long the code of an execution that was given up may go on, in seconds; then its worker is replaced."""
_LOST: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

Headers = tuple[tuple[str, str | bytes], ...]

_ERRORS: Final[Mapping[type[pool_errors.PoolError], Callable[[str, str], ToolPoolError]]] = {
    pool_errors.PoolSaturatedError: PoolSaturatedError,
    pool_errors.WorkerBusyError: PoolSaturatedError,
    pool_errors.NestedTooDeepError: PoolSaturatedError,
    pool_errors.QueueTimeoutError: QueueTimeoutError,
    pool_errors.WorkerTimeoutError: WorkerTimeoutError,
    pool_errors.WorkerExitedError: WorkerExitedError,
    pool_errors.WorkerLostError: WorkerExitedError,
}


def error_of_pool(tool: str, error: pool_errors.PoolError) -> StateError:
    """Return the error with which an execution ends when its pool fails it."""
    kind = _ERRORS.get(type(error))
    return RemoteToolError(tool, f"pool {error.pool}", str(error)) if kind is None else kind(tool, str(error))


class WorkerContact(Contact, Running):
    """How the server talks to one worker, and what that worker runs.

    Args:
        listen: Where its callbacks are answered.
        callbacks: Makes what answers them.
        max_message_bytes: The largest message.

    Attributes:
        callback: The address of its callbacks, once it is open.
    """

    def __init__(self, listen: str, callbacks: Callable[[Running], Callbacks], max_message_bytes: int) -> None:
        self.callback = listen
        self._callbacks = callbacks(self)
        self._max_message_bytes = max_message_bytes
        self._channel: grpc.aio.Channel | None = None
        self._executions: dict[str, ToolSession] = {}
        self._is_quiet = asyncio.Event()
        self._settling: set[asyncio.Task[None]] = set()
        self.stub: BridgeServiceStub

    @property
    def executions(self) -> Mapping[str, ToolSession]:
        """See `Running`. Those that were given up are among them until their code has ended."""
        return self._executions

    async def open(self) -> Mapping[str, str]:
        """See `Contact`: serves the callbacks."""
        port = await self._callbacks.serve(self.callback, self._max_message_bytes)
        if port:
            self.callback = f"{self.callback.rpartition(':')[0]}:{port}"
        return {"callback": self.callback, "address": self.callback}

    async def connect(self, address: str) -> None:
        """See `Contact`."""
        options = [*channel_options(address, proxies=False), ("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.aio.insecure_channel(grpc_name(address), options=options)
        self.stub = BridgeServiceStub(self._channel)

    async def ping(self) -> None:
        """See `Contact`."""
        if await self.stub.Ping(pb.PingRequest(message="alive?")) is None:
            raise ValueError("its answer to a ping is not a message of the protocol")

    def lost(self, error: Exception) -> str:
        """See `Contact`."""
        if isinstance(error, grpc.aio.AioRpcError) and error.code() in _LOST:
            return error.details() or error.code().name
        return super().lost(error)

    async def close(self) -> None:
        """See `Contact`."""
        if self._channel is not None:
            await self._channel.close()
        await self._callbacks.close()

    def began(self, session: ToolSession) -> None:
        """Note that the worker is about to run the code of an execution."""
        self._executions[session.execution_id] = session
        self._is_quiet.clear()

    def ended(self, execution_id: str) -> None:
        """Note that the code has ended."""
        self._executions.pop(execution_id, None)
        if not self._executions:
            self._is_quiet.set()

    def gave_up(self, execution_id: str) -> None:
        """Note that nobody waits for the code any more. Until it has really ended, it is among `executions`."""
        task = asyncio.create_task(self._settle(execution_id))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _settle(self, execution_id: str) -> None:
        try:
            # The worker answers when the code has ended.
            await self.stub.Ping(pb.PingRequest(), metadata=((EXECUTION_ID, execution_id),))
        except (grpc.RpcError, grpc.aio.UsageError):
            # It is gone, or its channel is closed already, and the pool knows.
            pass
        finally:
            self.ended(execution_id)

    async def quiet(self) -> None:
        """Wait until the worker runs no code."""
        if self._executions:
            await self._is_quiet.wait()


Leases = WeakKeyDictionary[ToolSession, Lease[Any]]
"""The leases by the session of the execution that has them, of all pools."""


class Lender(ABC):
    """The tools' way into a pool. Used on one event loop.

    Args:
        name: The name of the pool.
        limits: The limits of results.
        leases: The leases; several pools share them, because tools call those of other pools.
    """

    runs_beside: ClassVar[bool]
    """Whether a worker can run what its code calls, while that waits for it."""

    def __init__(self, name: str, limits: Limits, leases: Leases) -> None:
        self.name = name
        self.pool: WorkerPool[WorkerContact] | None = None
        self._limits = limits
        self._leases = leases

    def use(self, pool: WorkerPool[WorkerContact]) -> None:
        """Use a pool, which is started. Before that, no tool can run."""
        self.pool = pool

    async def run(self, spec: ToolSpec, session: ToolSession) -> Value:
        """See `PoolPort.run`."""
        if self.pool is None:
            raise RemoteToolError(spec.name, f"pool {self.name}", "it has not started")
        try:
            around = self._lease_around(session)
            if around is not None and self.runs_beside and around.pool is self.pool:
                return await self._run_beside(around, spec, session)
            async with self.pool.lend(session.session_id, parent=around) as lease:
                self._leases[session] = lease
                try:
                    return await self._call(lease, spec, session)
                finally:
                    if lease.contact.executions:
                        lease.release_when(lease.contact.quiet(), SETTLE_S)
        except pool_errors.PoolError as error:
            raise error_of_pool(spec.name, error) from None

    async def ask(self, session_id: str, origin: Origin) -> None:
        """See `PoolPort.ask`."""
        # What workers of ours have, the server knows.
        return

    def _lease_around(self, session: ToolSession) -> Lease[Any] | None:
        """Return the lease of the execution that waits for this one, directly or not; None if none does."""
        asker = session.asker
        while asker is not None:
            lease = self._leases.get(asker)
            if lease is not None and lease.interrupt is not None:
                return lease
            asker = asker.asker
        return None

    async def _run_beside(self, lease: Lease[WorkerContact], spec: ToolSpec, session: ToolSession) -> Value:
        """Run a tool in the worker whose code waits for it."""
        self._leases[session] = lease
        try:
            return await self._call(lease, spec, session)
        except grpc.aio.AioRpcError as error:
            reason = lease.contact.lost(error)
            if not reason:
                raise
            raise await lease.lost(reason) from None

    def _facts(self, lease: Lease[WorkerContact]) -> Attributes:
        """What the span of a call says about the worker."""
        return {"dspex.pool": self.name, "dspex.worker": lease.worker}

    @abstractmethod
    async def _call(self, lease: Lease[WorkerContact], spec: ToolSpec, session: ToolSession) -> Value:
        """Run a tool in a worker that is lent to the execution, or to one that waits for it."""


class Lending(Lender):
    """The tools' way into a pool of workers of ours."""

    runs_beside = True
    takes_binary = True

    async def _call(self, lease: Lease[WorkerContact], spec: ToolSpec, session: ToolSession) -> Value:
        contact = lease.contact
        has_ended = False
        contact.began(session)
        try:
            streams = spec.streaming and session.outlet is not None
            run = self._stream if streams else self._execute
            with calling_tool(lease.address, self._facts(lease), streams=streams) as headers:
                result, facts = await run(contact, spec, session, (*_headers(session), *headers))
            has_ended = True
        except grpc.aio.AioRpcError as error:
            if contact.lost(error):
                raise
            raise error_of(error.code(), error.details() or "", tuple(error.trailing_metadata() or ())) from None
        finally:
            if has_ended:
                contact.ended(session.execution_id)
            else:
                contact.gave_up(session.execution_id)
        take_entries(session, facts.get(JOURNAL, ""))
        if FAILURE in facts:
            raise raised_in(facts[FAILURE])
        return result

    async def _execute(
        self, contact: WorkerContact, spec: ToolSpec, session: ToolSession, headers: Headers
    ) -> tuple[Value, Mapping[str, str]]:
        response = await contact.stub.ExecuteTool(_request(session), metadata=headers)
        if not response.success:
            return Value("null"), response.metadata
        result = response.result.value.decode()
        if len(result) > values.LONG_JSON:
            return await asyncio.to_thread(self._read, spec.name, result), response.metadata
        return self._read(spec.name, result), response.metadata

    def _read(self, tool: str, text: str) -> Value:
        values.parse_json(text, name="result", limits=self._limits)
        return checked(tool, Value(text), self._limits)

    async def _stream(
        self, contact: WorkerContact, spec: ToolSpec, session: ToolSession, headers: Headers
    ) -> tuple[Value, Mapping[str, str]]:
        chunks, outlet = Chunks(spec.name, self._limits), session.outlet
        assert outlet is not None, "whoever streams has one"
        call = contact.stub.ExecuteStreamingTool(_request(session), metadata=headers)
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                if message.is_final:
                    return chunks.result(), message.metadata
                session.execution.check_running()
                await outlet.hand_out(chunks.add(Value(message.data.decode())))
        finally:
            call.cancel()
        raise ConnectionError("the worker ended the stream early")


def _request(session: ToolSession) -> pb.ExecuteToolRequest:
    request = session.request
    return pb.ExecuteToolRequest(
        session_id=session.session_id,
        tool_name=request.tool,
        parameters={name: codec.loose_any_of(value) for name, value in request.parameters.items()},
        metadata=request.metadata,
        binary_parameters={
            name: value.binary for name, value in request.parameters.items() if value.binary is not None
        },
    )


def _headers(session: ToolSession) -> Headers:
    asker, origin = session.asker, session.origin
    texts: dict[str, str | None] = {
        EXECUTION_ID: session.execution_id,
        SEED: session.seed,
        ATTEMPT: str(session.attempt),
        ASKED_BY: None if asker is None else asker.execution_id,
        PARENT: None if session.execution.parent is None else "1",
    }
    users = {ACTOR: origin.actor, REASON: origin.reason}
    return (
        *((name, text) for name, text in texts.items() if text is not None),
        *((name + BINARY, text.encode()) for name, text in users.items() if text),
    )
