"""BridgeServicer: the rpcs of the unified bridge over any StateProvider. Messages in, commands out, no rules."""

import asyncio
import secrets
from typing import Any, TypeAlias, TypeVar

import grpc
import structlog

from dspex_persist import clock
from dspex_persist.state import commands
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import (
    InvalidArgumentError,
    StateError,
    UnavailableError,
    UnsupportedError,
    WatchStalledError,
    quote,
)
from dspex_persist.state.model import Origin, Source, Update, UpdateKind, Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.rpc import codec
from dspex_persist.state.rpc.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.rpc.headers import (
    ACTOR,
    AFTER_SEQUENCE,
    BEFORE_VERSION,
    BINARY,
    IDEMPOTENCY_KEY,
    INITIAL_VALUES,
    OPTIMIZER_ID,
    POSITION,
    RESUMED,
    RPC_ID,
    SOURCE,
)
from dspex_persist.state.rpc.mailbox import LoopMailbox
from dspex_persist.state.watch import Watch

R = TypeVar("R")
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_ACTOR_LENGTH = 255
_READER = Origin(actor="", cause="read")
_logger = structlog.get_logger(source=__name__)


class BridgeServicer:
    """The rpcs. `heartbeat_s`: how often an idle watcher hears something. `stall_timeout_s`: how long one update may
    wait for a watcher that does not read before its stream is ended.

    Made and used on one event loop.
    """

    def __init__(self, provider: StateProvider, *, heartbeat_s: float = 15.0, stall_timeout_s: float = 30.0) -> None:
        self._provider = provider
        self._heartbeat_s = heartbeat_s
        self._stall_timeout_s = stall_timeout_s
        self._mailbox = LoopMailbox(asyncio.get_running_loop())
        self._draining = False
        self._watchers: set[asyncio.Event] = set()

    async def drain(self) -> None:
        """End every watch, with a status that says from where to resume."""
        self._draining = True
        for ready in self._watchers:
            ready.set()

    # Sessions

    async def Ping(self, request: pb.PingRequest, _context: _Context) -> pb.PingResponse:
        return pb.PingResponse(message=request.message, server_time=codec.timestamp_of(clock.now()))

    async def InitializeSession(self, request: pb.InitializeSessionRequest, context: _Context) -> Any:
        config: dict[str, Any] = {}
        if request.HasField("config"):
            config = {
                "enable_caching": request.config.enable_caching,
                "cache_ttl_seconds": request.config.cache_ttl_seconds,
                "enable_telemetry": request.config.enable_telemetry,
            }
        command = commands.InitializeSession(request.session_id, dict(request.metadata), config)
        view = await self._write(command, context)
        self._log(command, context).info("session resumed" if view.resumed else "session begun")
        if view.resumed:
            context.set_trailing_metadata(((RESUMED, "true"),))
        variables = {variable.name: codec.variable_message(variable) for variable in view.variables}
        return pb.InitializeSessionResponse(success=True, initial_variables=variables)

    async def GetSession(self, request: pb.GetSessionRequest, _context: _Context) -> pb.GetSessionResponse:
        summary = await self._read(commands.GetSession(request.session_id))
        return pb.GetSessionResponse(
            session_id=summary.id,
            metadata=summary.metadata,
            created_at=codec.timestamp_of(summary.created_at),
            variable_count=summary.variable_count,
            tool_count=summary.tool_count,
        )

    async def Heartbeat(self, request: pb.HeartbeatRequest, _context: _Context) -> pb.HeartbeatResponse:
        valid = await self._read(commands.Heartbeat(request.session_id))
        return pb.HeartbeatResponse(server_time=codec.timestamp_of(clock.now()), session_valid=valid)

    async def CleanupSession(self, request: pb.CleanupSessionRequest, context: _Context) -> pb.CleanupSessionResponse:
        command = commands.CleanupSession(request.session_id)
        cleaned = await self._write(command, context)
        self._log(command, context).info("session ended", variables=cleaned)
        return pb.CleanupSessionResponse(success=True, resources_cleaned=cleaned)

    # Variables

    async def RegisterVariable(self, request: pb.RegisterVariableRequest, context: _Context) -> Any:
        command = commands.RegisterVariable(
            request.session_id,
            request.name,
            request.type,
            codec.value_of(request.name, request.initial_value, request.initial_binary_value),
            request.constraints_json,
            dict(request.metadata),
        )
        return pb.RegisterVariableResponse(success=True, variable_id=await self._write(command, context))

    async def GetVariable(self, request: pb.GetVariableRequest, _context: _Context) -> pb.GetVariableResponse:
        command = commands.GetVariable(request.session_id, request.variable_identifier, request.bypass_cache)
        future = self._provider.submit(command, _READER)
        cached = future.done()
        variable = future.result() if cached else await self._mailbox.result(future)
        return pb.GetVariableResponse(variable=codec.variable_message(variable), from_cache=cached)

    async def GetVariables(self, request: pb.BatchGetVariablesRequest, _context: _Context) -> Any:
        identifiers = tuple(request.variable_identifiers)
        found = await self._read(commands.GetVariables(request.session_id, identifiers, request.bypass_cache))
        variables = {identifier: codec.variable_message(variable) for identifier, variable in found.variables.items()}
        return pb.BatchGetVariablesResponse(variables=variables, missing_variables=found.missing)

    async def SetVariable(self, request: pb.SetVariableRequest, context: _Context) -> pb.SetVariableResponse:
        identifier = request.variable_identifier
        command = commands.SetVariable(
            request.session_id,
            identifier,
            codec.value_of(identifier, request.value, request.binary_value),
            dict(request.metadata),
            request.expected_version,
        )
        return pb.SetVariableResponse(success=True, new_version=await self._write(command, context))

    async def SetVariables(self, request: pb.BatchSetVariablesRequest, context: _Context) -> Any:
        updates, refused = _updates_of(request)
        metadata = dict(request.metadata)
        command = commands.SetVariables(request.session_id, updates, metadata, request.atomic, refused)
        outcome = await self._write(command, context)
        return pb.BatchSetVariablesResponse(
            success=outcome.success, errors=outcome.errors, new_versions=outcome.versions
        )

    async def ListVariables(self, request: pb.ListVariablesRequest, _context: _Context) -> pb.ListVariablesResponse:
        variables = await self._read(commands.ListVariables(request.session_id, request.pattern))
        return pb.ListVariablesResponse(variables=[codec.variable_message(variable) for variable in variables])

    async def DeleteVariable(self, request: pb.DeleteVariableRequest, context: _Context) -> pb.DeleteVariableResponse:
        await self._write(commands.DeleteVariable(request.session_id, request.variable_identifier), context)
        return pb.DeleteVariableResponse(success=True)

    async def GetVariableHistory(self, request: pb.GetVariableHistoryRequest, context: _Context) -> Any:
        before = _whole_number(_headers(context), BEFORE_VERSION)
        command = commands.GetVariableHistory(request.session_id, request.variable_identifier, request.limit, before)
        history = await self._read(command)
        return pb.GetVariableHistoryResponse(entries=[codec.history_entry(version) for version in history])

    async def RollbackVariable(self, request: pb.RollbackVariableRequest, context: _Context) -> Any:
        command = commands.RollbackVariable(request.session_id, request.variable_identifier, request.target_version)
        variable = await self._write(command, context)
        return pb.RollbackVariableResponse(success=True, variable=codec.variable_message(variable))

    # Dependencies and optimization

    async def AddDependency(self, request: pb.AddDependencyRequest, context: _Context) -> pb.AddDependencyResponse:
        command = commands.AddDependency(
            request.session_id, request.from_variable, request.to_variable, request.dependency_type
        )
        await self._write(command, context)
        return pb.AddDependencyResponse(success=True)

    async def StartOptimization(self, request: pb.StartOptimizationRequest, context: _Context) -> Any:
        command = commands.StartOptimization(
            request.session_id, request.variable_identifier, request.optimizer_id, dict(request.optimizer_config)
        )
        return pb.StartOptimizationResponse(success=True, optimization_id=await self._write(command, context))

    async def StopOptimization(self, request: pb.StopOptimizationRequest, context: _Context) -> Any:
        command = commands.StopOptimization(request.session_id, request.variable_identifier, request.force)
        variable = await self._read(commands.GetVariable(request.session_id, request.variable_identifier))
        final = await self._write(command, context)
        return pb.StopOptimizationResponse(success=True, final_value=codec.any_of(variable.type, final))

    # Tools: not served yet, except the list that stock clients ask for when they are constructed

    async def GetExposedElixirTools(self, _request: pb.GetExposedElixirToolsRequest, _context: _Context) -> Any:
        return pb.GetExposedElixirToolsResponse()

    async def ExecuteTool(self, _request: pb.ExecuteToolRequest, _context: _Context) -> pb.ExecuteToolResponse:
        raise UnsupportedError("this server does not serve tools")

    async def ExecuteElixirTool(self, _request: pb.ExecuteElixirToolRequest, _context: _Context) -> Any:
        raise UnsupportedError("this server does not serve tools")

    async def RegisterTools(self, _request: pb.RegisterToolsRequest, _context: _Context) -> pb.RegisterToolsResponse:
        raise UnsupportedError("this server does not serve tools")

    async def ExecuteStreamingTool(self, _request: pb.ExecuteToolRequest, _context: _Context) -> None:
        raise UnsupportedError("this server does not serve tools")

    # Watching

    async def WatchVariables(self, request: pb.WatchVariablesRequest, context: _Context) -> None:
        after = _whole_number(_headers(context), AFTER_SEQUENCE)
        identifiers = tuple(request.variable_identifiers)
        watch = await asyncio.to_thread(self._provider.watch, request.session_id, identifiers, after_sequence=after)
        stream = _WatchStream(self, watch, context, request.session_id)
        with watch:
            await stream.run(initial=request.include_initial_values)

    # How every call goes

    async def _read(self, command: Command[R]) -> R:
        return await self._mailbox.result(self._provider.submit(command, _READER))

    async def _write(self, command: Command[R], context: _Context) -> R:
        try:
            return await self._mailbox.result(self._provider.submit(command, _origin_of(command.cause, context)))
        except StateError as error:
            # The kind of error only: its text may quote a value.
            self._log(command, context).debug("refused", error=type(error).__name__)
            raise

    def _log(self, command: Command[Any], context: _Context) -> Any:
        """A log that names the call: its rpc, its session, and the id that the client gave it, or one of ours."""
        rpc_id = _headers(context).get(RPC_ID) or secrets.token_hex(4)
        return _logger.bind(rpc=command.cause, session_id=command.session_id, rpc_id=rpc_id)


class _WatchStream:
    """One watcher's stream: pulls, sends, waits; holds no more than one page of updates."""

    def __init__(self, servicer: BridgeServicer, watch: Watch, context: _Context, session_id: str) -> None:
        self._servicer = servicer
        self._watch = watch
        self._context = context
        self._ready = asyncio.Event()
        self._told = watch.position
        rpc_id = _headers(context).get(RPC_ID) or secrets.token_hex(4)
        self._log = _logger.bind(rpc="WatchVariables", session_id=session_id, rpc_id=rpc_id)

    async def run(self, *, initial: bool) -> None:
        servicer = self._servicer
        mailbox, ready = servicer._mailbox, self._ready
        self._watch.notify(lambda: mailbox.post(ready.set))
        servicer._watchers.add(ready)
        self._log.debug("watch begun", after_sequence=self._told)
        try:
            count = len(self._watch.initial) if initial else 0
            await self._context.send_initial_metadata(((POSITION, str(self._told)), (INITIAL_VALUES, str(count))))
            if initial:
                await self._send_initial()
            while not servicer._draining:
                ready.clear()
                if not await self._send_new():
                    await self._wait()
        finally:
            servicer._watchers.discard(ready)
        raise UnavailableError(f"the server is shutting down; resume with {AFTER_SEQUENCE}: {self._told}")

    async def _send_initial(self) -> None:
        for variable in self._watch.initial:
            update = Update(UpdateKind.INITIAL_VALUE, variable, self._told, variable.updated_at)
            await self._send(codec.update_message(update))

    async def _send_new(self) -> bool:
        """Send what there is; whether there was anything."""
        updates = self._watch.pull_ready()
        if updates is None:
            updates = await asyncio.to_thread(self._watch.pull)
        for update in updates:
            if update.part[0] == update.part[1]:
                # Told from here on, even if it stalls: what gRPC has taken arrives before the status does.
                self._told = update.sequence
            await self._send(codec.update_message(update))
        return bool(updates)

    async def _wait(self) -> None:
        # Everything up to here has been told, or was not for this watcher.
        self._told = max(self._told, self._watch.position)
        try:
            async with asyncio.timeout(self._servicer._heartbeat_s):
                await self._ready.wait()
        except TimeoutError:
            await self._send(codec.heartbeat_message(self._told, clock.now()))

    async def _send(self, message: pb.VariableUpdate) -> None:
        timeout_s = self._servicer._stall_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._context.write(message)
        except TimeoutError:
            self._log.info("watcher stalled", after_sequence=self._told)
            raise WatchStalledError(self._told, timeout_s) from None


def _headers(context: _Context) -> dict[str, str]:
    headers: dict[str, str] = {}
    for key, content in context.invocation_metadata() or ():
        if isinstance(content, str):
            headers[key] = content
        elif key.startswith("x-dspex-"):
            headers[key.removesuffix(BINARY)] = _utf8(key, content)
    return headers


def _utf8(key: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InvalidArgumentError(key, "it is no UTF-8") from None


def _whole_number(headers: dict[str, str], name: str) -> int | None:
    text = headers.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise InvalidArgumentError(name, f"{quote(text)} is not a whole number")
    return int(text)


def _origin_of(cause: str, context: _Context) -> Origin:
    """Who asks: as the caller says in `x-dspex-actor`, else the host that it calls from."""
    headers = _headers(context)
    actor = headers.get(ACTOR)
    if actor is None:
        # "ipv4:127.0.0.1:40312": the port says nothing about who it is. A Unix socket has no host.
        actor = f"peer:{context.peer().partition(':')[2].rpartition(':')[0] or 'unix'}"
    elif len(actor) > _ACTOR_LENGTH:
        raise InvalidArgumentError(ACTOR, f"it is longer than {_ACTOR_LENGTH} characters")
    source = Source.PYTHON if headers.get(SOURCE) == Source.PYTHON else Source.ELIXIR
    return Origin(actor, cause, source, headers.get(IDEMPOTENCY_KEY), headers.get(OPTIMIZER_ID))


def _updates_of(request: pb.BatchSetVariablesRequest) -> tuple[dict[str, Value], dict[str, str]]:
    """The values by identifier, and what is wrong with those that are none."""
    binary = request.binary_updates
    for identifier in binary:
        if identifier not in request.updates:
            reason = f"{quote(identifier)} has binary content but no entry in updates that describes it"
            raise InvalidArgumentError("binary_updates", reason)
    updates: dict[str, Value] = {}
    refused: dict[str, str] = {}
    for identifier, wire in request.updates.items():
        try:
            updates[identifier] = codec.value_of(identifier, wire, binary.get(identifier, b""))
        except StateError as error:
            refused[identifier] = str(error)
    return updates, refused
