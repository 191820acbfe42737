"""Workers that were made for another coordinator of the bridge protocol: how they are called.

They know nothing of executions. What they call back belongs to the execution that they are lent to, because it arrives
at an address that only they have been told.
"""

import asyncio
import base64
import json
import secrets
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import grpc

from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.workers.errors import PoolError
from dspex_persist.infra.workers.leases import Lease
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.headers import EXECUTION_ID, Headers
from dspex_persist.state.bridge.lent import RaisedThereError
from dspex_persist.state.bridge.traced import calling_tool
from dspex_persist.state.bridge.workers.lending import SETTLE_S, Leases, Lender, WorkerContact, error_of_pool
from dspex_persist.state.bridge.workers.remote import chunk_in, result_in, says_nothing
from dspex_persist.state.errors import InvalidArgumentError, RemoteToolError, StateError, ToolFailedError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Failure, Origin, ToolSpec, Value
from dspex_persist.state.tools.chunks import Chunks
from dspex_persist.state.tools.failures import RaisedError
from dspex_persist.state.tools.requests import IDEMPOTENCY_KEY
from dspex_persist.state.tools.results import NOTHING, checked
from dspex_persist.state.tools.session import ToolSession

CALLBACK: Final = "x-dspex-callback"
"""Metadata of a request: the address of the worker's callbacks."""
NOBODYS: Final = "dspex_persist.which_tools"
"""The name of a tool that no worker has."""
_BINARY: Final = ".binary"
# How long a worker may take to register what it has, in seconds.
_ASK_S: Final = 10.0

_logger: Final = get_logger(__name__)

ENVIRONMENT: Final[Mapping[str, str]] = {
    "SNAKEPIT_GRPC_ADDRESS": "{address}",
    "SNAKEPIT_ELIXIR_ADDRESS": "{address}",
    # The system ends a worker when its server ends, and the pool pings it.
    "SNAKEPIT_HEARTBEAT_CONFIG": '{"enabled": false}',
    # Otherwise newer ones print a line for each call.
    "SNAKEPIT_OTEL_CONSOLE": "false",
}
"""What such workers are told by their environment, unless the settings say otherwise."""


class ExistingLending(Lender):
    """The tools' way into a pool of such workers.

    Args:
        name: The name of the pool.
        limits: The limits of results.
        leases: See `Lender`.
        takes_binary: Whether parameters may have binary content: old workers unpickle it.
    """

    # Some do one call at a time.
    runs_beside = False

    def __init__(self, name: str, limits: Limits, leases: Leases, *, takes_binary: bool = False) -> None:
        super().__init__(name, limits, leases)
        self.takes_binary = takes_binary

    async def _call(self, lease: Lease[WorkerContact], spec: ToolSpec, session: ToolSession) -> Value:
        request = _request(session, lease.contact.callback)
        lease.contact.began(session)
        with calling_tool(lease.address, self._facts(lease), streams=spec.streaming) as place:
            request.metadata.update(place)
            headers = ((EXECUTION_ID, session.execution_id), *place)
            if spec.streaming:
                return await self._stream(lease, request, session, headers)
            # It goes on if its caller does not wait for it any more: until it has ended, so may its callbacks.
            asking = asyncio.ensure_future(self._answer(lease.contact, request, session, headers))
            asking.add_done_callback(partial(_ended, lease.contact, session.execution_id))
            response = await asyncio.shield(asking)
        if not response.success:
            raise _raised(response.error_message)
        wire = response.result
        if not (wire.type_url or wire.value):
            return NOTHING
        try:
            return checked(spec.name, _result(wire, self._limits), self._limits)
        except StateError as error:
            raise ToolFailedError(session.execution_id, f"its result is not a value: {error}") from error

    async def ask(self, session_id: str, origin: Origin) -> None:
        """See `PoolPort.ask`: calls a tool that no worker has, of no execution, so that it can only register tools."""
        if self.pool is None:
            return
        asking: Any = _Asking(session_id, origin)
        try:
            async with self.pool.lend(session_id) as lease:
                lease.contact.began(asking)
                request = pb.ExecuteToolRequest(session_id=session_id, tool_name=NOBODYS)
                call = asyncio.ensure_future(_asked(lease.contact, request, asking.execution_id))
                call.add_done_callback(partial(_ended, lease.contact, asking.execution_id))
                try:
                    async with asyncio.timeout(_ASK_S):
                        await asyncio.shield(call)
                finally:
                    if lease.contact.executions:
                        lease.release_when(lease.contact.quiet(), SETTLE_S)
        except PoolError as error:
            raise error_of_pool(NOBODYS, error) from None
        except TimeoutError:
            _logger.warning("a worker does not say which tools it has", pool=self.name, session=session_id)

    @staticmethod
    async def _answer(
        contact: WorkerContact, request: pb.ExecuteToolRequest, session: ToolSession, headers: Headers
    ) -> Any:
        try:
            response = await contact.stub.ExecuteTool(request, metadata=headers)
        except grpc.aio.AioRpcError as error:
            raise _error_of(contact, session, error) from None
        if response is None:
            raise RemoteToolError(request.tool_name, contact.callback, "its answer is not a message of the protocol")
        return response

    async def _stream(
        self, lease: Lease[WorkerContact], request: pb.ExecuteToolRequest, session: ToolSession, headers: Headers
    ) -> Value:
        contact, chunks = lease.contact, Chunks(request.tool_name, self._limits)
        request.stream = True
        call = contact.stub.ExecuteStreamingTool(request, metadata=headers)
        has_ended = False
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                if message is None:
                    raise ToolFailedError(session.execution_id, "a chunk is not a message of the protocol")
                session.execution.check_running()
                if says_nothing(message):
                    continue
                try:
                    chunk = chunks.add(chunk_in(message, self._limits))
                except StateError as error:
                    raise ToolFailedError(session.execution_id, f"a chunk is not a value: {error}") from error
                if session.outlet is not None:
                    await session.outlet.hand_out(chunk)
            has_ended = True
        except grpc.aio.AioRpcError as error:
            has_ended = True
            raise _error_of(contact, session, error) from None
        finally:
            call.cancel()
            if not has_ended:
                # The thread behind the stream of an old worker would never end.
                lease.discard("its stream was given up")
            contact.ended(session.execution_id)
        return chunks.result()


async def _asked(contact: WorkerContact, request: pb.ExecuteToolRequest, execution_id: str) -> None:
    try:
        await contact.stub.ExecuteTool(request, metadata=((EXECUTION_ID, execution_id),))
    except grpc.aio.AioRpcError as error:
        if contact.lost(error):
            raise


class _Asking:
    """Stands for the session of an execution where there is none. The runner does not know it, so it writes nothing."""

    def __init__(self, session_id: str, origin: Origin) -> None:
        self.execution_id = f"asking_{secrets.token_hex(8)}"
        self.origin = origin
        self.execution = self
        self._session_id = session_id

    def check_running(self) -> None:
        """Do nothing: it ends with the call."""

    def check_is_of(self, session_id: str) -> None:
        """See `Execution.check_is_of`."""
        if session_id != self._session_id:
            raise InvalidArgumentError("session_id", "the worker was asked for another session")


def _ended(contact: WorkerContact, execution_id: str, call: "asyncio.Future[Any]") -> None:
    """Note that a worker has answered. Whoever asked may have gone: then nobody looks at an error."""
    contact.ended(execution_id)
    if not call.cancelled():
        call.exception()


def _request(session: ToolSession, callback: str) -> pb.ExecuteToolRequest:
    request = session.request
    metadata = {name: text for name, text in session.metadata.items() if name != IDEMPOTENCY_KEY}
    return pb.ExecuteToolRequest(
        session_id=session.session_id,
        tool_name=request.tool,
        parameters={name: codec.loose_any_of(value, request.style) for name, value in request.parameters.items()},
        metadata={**metadata, EXECUTION_ID: session.execution_id, CALLBACK: callback},
        binary_parameters={
            name: value.binary for name, value in request.parameters.items() if value.binary is not None
        },
    )


def _result(wire: Any, limits: Limits) -> Value:
    if wire.type_url.endswith(_BINARY):
        # Pickled, as a rule: whoever trusts the worker may unpickle it, and nobody here does.
        opaque = {"type_url": wire.type_url, "raw_data_base64": base64.b64encode(wire.value).decode()}
        return Value(json.dumps(opaque))
    return result_in(wire, limits)


def _error_of(contact: WorkerContact, session: ToolSession, error: grpc.aio.AioRpcError) -> Exception:
    if contact.lost(error):
        return error
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        reason = "the worker does not serve this rpc"
        return RemoteToolError(session.request.tool, contact.callback, reason)
    return _raised(error.details() or error.code().name)


def _raised(text: str) -> Exception:
    """Return the error that a worker reports: as text or, if it is a newer one, as JSON."""
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    if not isinstance(said, dict) or "message" not in said:
        failure = Failure("ToolError", text or "the tool failed without a message")
        return RaisedError(ToolFailedError("", failure.message, ""), failure)
    kind, message = str(said.get("type") or "ToolError"), str(said["message"])
    traced = said.get("stacktrace") or said.get("traceback") or ""
    trace = "\n".join(map(str, traced)) if isinstance(traced, list) else str(traced)
    return RaisedError(RaisedThereError(message), Failure(kind, message, trace))
