"""BridgeServicer: the rpcs of the unified bridge over any provider with tools. Messages in, commands out, no rules."""

import asyncio
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from dspex_persist import clock
from dspex_persist.state import commands
from dspex_persist.state.errors import InvalidArgumentError, StateError, UnavailableError, WatchStalledError, quote
from dspex_persist.state.model import Update, UpdateKind, Value, Variable
from dspex_persist.state.rpc import codec
from dspex_persist.state.rpc.calls import Context, check_count, check_together, fitting, whole_number
from dspex_persist.state.rpc.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.rpc.headers import (
    AFTER_SEQUENCE,
    ARGUMENTS,
    BEFORE_VERSION,
    EXPECTED_VERSION,
    INITIAL_VALUES,
    LEFT_OUT,
    POSITION,
    RESUMED,
)
from dspex_persist.state.rpc.inherited import OneProcess
from dspex_persist.state.rpc.tools import ToolRpcs
from dspex_persist.state.session_state import weight_of
from dspex_persist.state.tools.with_tools import WithTools
from dspex_persist.state.watch import Watch


class BridgeServicer(ToolRpcs):
    """The rpcs. `heartbeat_s`: how often an idle watcher hears something. `stall_timeout_s`: how long one update may
    wait for a watcher that does not read before its stream is ended. `max_message_bytes`: how large an answer may be.

    Made and used on one event loop.
    """

    def __init__(
        self,
        provider: WithTools,
        *,
        heartbeat_s: float = 15.0,
        stall_timeout_s: float = 30.0,
        max_message_bytes: int = 100 * 1024 * 1024,
    ) -> None:
        super().__init__(provider, stall_timeout_s)
        self._max_message_bytes = max_message_bytes
        self._heartbeat_s = heartbeat_s
        self._draining = False
        self._watchers: set[asyncio.Event] = set()
        # A tool's child cannot reach this server, nor any other: it would use what gRPC has open here.
        self._here = OneProcess("the server's own clients")

    async def drain(self) -> None:
        """End every watch, with a status that says from where to resume; tools in flight may finish."""
        self._draining = True
        self._runner.drain()
        for ready in self._watchers:
            ready.set()

    # Sessions

    async def Ping(self, request: pb.PingRequest, _context: Context) -> pb.PingResponse:
        return pb.PingResponse(message=request.message, server_time=codec.timestamp_of(clock.now()))

    async def InitializeSession(self, request: pb.InitializeSessionRequest, context: Context) -> Any:
        config: dict[str, Any] = {}
        if request.HasField("config"):
            config = {
                "enable_caching": request.config.enable_caching,
                "cache_ttl_seconds": request.config.cache_ttl_seconds,
                "enable_telemetry": request.config.enable_telemetry,
            }
        command = commands.InitializeSession(request.session_id, self._metadata(request.metadata), config)
        view = await self._write(command, context)
        self._log(command.cause, command.session_id, context).info(
            "session resumed" if view.resumed else "session begun"
        )
        told = self._fitting_variables(view.variables)
        trailers = [(RESUMED, "true")] if view.resumed else []
        if len(told) < len(view.variables):
            trailers.append((LEFT_OUT, str(len(view.variables) - len(told))))
        context.set_trailing_metadata(tuple(trailers))
        variables = {variable.name: codec.variable_message(variable) for variable in told}
        tools = await self._available_tools(request.session_id, context)
        response = pb.InitializeSessionResponse(success=True, initial_variables=variables, available_tools=tools)
        return fitting(response, self._max_message_bytes)

    def _fitting_variables(self, variables: Sequence[Variable]) -> list[Variable]:
        """Those that fit into a message: of a session that was written under higher limits perhaps not all."""
        most = max(self._limits.session_size_bytes, self._max_message_bytes * 2 // 3)
        weights = accumulate(map(weight_of, variables))
        return [variable for variable, weight in zip(variables, weights, strict=True) if weight <= most]

    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> pb.GetSessionResponse:
        summary = await self._read(commands.GetSession(request.session_id), context)
        return pb.GetSessionResponse(
            session_id=summary.id,
            metadata=summary.metadata,
            created_at=codec.timestamp_of(summary.created_at),
            variable_count=summary.variable_count,
            tool_count=summary.tool_count,
        )

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatResponse:
        valid = await self._read(commands.Heartbeat(request.session_id), context)
        return pb.HeartbeatResponse(server_time=codec.timestamp_of(clock.now()), session_valid=valid)

    async def CleanupSession(self, request: pb.CleanupSessionRequest, context: Context) -> pb.CleanupSessionResponse:
        command = commands.CleanupSession(request.session_id)
        cleaned = await self._write(command, context)
        self._log(command.cause, command.session_id, context).info("session ended", variables=cleaned)
        return pb.CleanupSessionResponse(success=True, resources_cleaned=cleaned)

    # Variables

    async def RegisterVariable(self, request: pb.RegisterVariableRequest, context: Context) -> Any:
        command = commands.RegisterVariable(
            request.session_id,
            request.name,
            request.type,
            await self._value(request.name, request.initial_value, request.initial_binary_value),
            request.constraints_json,
            self._metadata(request.metadata),
        )
        return pb.RegisterVariableResponse(success=True, variable_id=await self._write(command, context))

    async def GetVariable(self, request: pb.GetVariableRequest, context: Context) -> pb.GetVariableResponse:
        command = commands.GetVariable(request.session_id, request.variable_identifier, request.bypass_cache)
        if self._execution_of(command, context) is not None:
            variable, cached = await self._read(command, context), True
        else:
            future = self._submit_read(command)
            cached = future.done()
            variable = await self._mailbox.result(future)
        return pb.GetVariableResponse(variable=codec.variable_message(variable), from_cache=cached)

    async def GetVariables(self, request: pb.BatchGetVariablesRequest, context: Context) -> Any:
        identifiers = self._identifiers(request)
        found = await self._read(commands.GetVariables(request.session_id, identifiers, request.bypass_cache), context)
        variables = {identifier: codec.variable_message(variable) for identifier, variable in found.variables.items()}
        response = pb.BatchGetVariablesResponse(variables=variables, missing_variables=found.missing)
        return fitting(response, self._max_message_bytes)

    async def SetVariable(self, request: pb.SetVariableRequest, context: Context) -> pb.SetVariableResponse:
        identifier = request.variable_identifier
        command = commands.SetVariable(
            request.session_id,
            identifier,
            await self._value(identifier, request.value, request.binary_value),
            self._metadata(request.metadata),
            _expected_version(request, context),
        )
        return pb.SetVariableResponse(success=True, new_version=await self._write(command, context))

    async def SetVariables(self, request: pb.BatchSetVariablesRequest, context: Context) -> Any:
        binary = request.binary_updates
        for entries in (request.updates, binary):
            check_count("updates in the batch", entries, self._limits.batch_entries, "batch_entries")
        size_bytes = sum(len(wire.value) for wire in request.updates.values()) + sum(map(len, binary.values()))
        check_together("updates", size_bytes, self._limits.session_size_bytes, "session_size_bytes")
        updates, refused = await self._reading(size_bytes, partial(self._updates_of, request))
        metadata = self._metadata(request.metadata)
        command = commands.SetVariables(request.session_id, updates, metadata, request.atomic, refused)
        outcome = await self._write(command, context)
        return pb.BatchSetVariablesResponse(
            success=outcome.success, errors=outcome.errors, new_versions=outcome.versions
        )

    async def ListVariables(self, request: pb.ListVariablesRequest, context: Context) -> pb.ListVariablesResponse:
        variables = await self._read(commands.ListVariables(request.session_id, request.pattern), context)
        response = pb.ListVariablesResponse(variables=[codec.variable_message(variable) for variable in variables])
        return fitting(response, self._max_message_bytes)

    async def DeleteVariable(self, request: pb.DeleteVariableRequest, context: Context) -> pb.DeleteVariableResponse:
        await self._write(commands.DeleteVariable(request.session_id, request.variable_identifier), context)
        return pb.DeleteVariableResponse(success=True)

    async def GetVariableHistory(self, request: pb.GetVariableHistoryRequest, context: Context) -> Any:
        before = whole_number(context, BEFORE_VERSION)
        most_bytes = self._limits.history_size_bytes
        command = commands.GetVariableHistory(
            request.session_id, request.variable_identifier, request.limit, before, most_bytes
        )
        history = await self._read(command, context)
        if history and history[-1].version > 0 and sum(version.size_bytes for version in history) >= most_bytes:
            context.set_trailing_metadata(((BEFORE_VERSION, str(history[-1].version)),))
        return pb.GetVariableHistoryResponse(entries=[codec.history_entry(version) for version in history])

    async def RollbackVariable(self, request: pb.RollbackVariableRequest, context: Context) -> Any:
        command = commands.RollbackVariable(request.session_id, request.variable_identifier, request.target_version)
        variable = await self._write(command, context)
        return pb.RollbackVariableResponse(success=True, variable=codec.variable_message(variable))

    # Dependencies and optimization

    async def AddDependency(self, request: pb.AddDependencyRequest, context: Context) -> pb.AddDependencyResponse:
        command = commands.AddDependency(
            request.session_id, request.from_variable, request.to_variable, request.dependency_type
        )
        await self._write(command, context)
        return pb.AddDependencyResponse(success=True)

    async def StartOptimization(self, request: pb.StartOptimizationRequest, context: Context) -> Any:
        command = commands.StartOptimization(
            request.session_id,
            request.variable_identifier,
            request.optimizer_id,
            self._metadata(request.optimizer_config),
        )
        return pb.StartOptimizationResponse(success=True, optimization_id=await self._write(command, context))

    async def StopOptimization(self, request: pb.StopOptimizationRequest, context: Context) -> Any:
        command = commands.StopOptimization(request.session_id, request.variable_identifier, request.force)
        variable = await self._read(commands.GetVariable(request.session_id, request.variable_identifier), context)
        final = await self._write(command, context)
        return pb.StopOptimizationResponse(success=True, final_value=codec.any_of(variable.type, final))

    # Watching

    async def WatchVariables(self, request: pb.WatchVariablesRequest, context: Context) -> None:
        after = whole_number(context, AFTER_SEQUENCE)
        identifiers = self._identifiers(request)
        try:
            watch = await asyncio.to_thread(self._provider.watch, request.session_id, identifiers, after_sequence=after)
        except InvalidArgumentError as error:
            if error.field == ARGUMENTS[AFTER_SEQUENCE]:
                raise InvalidArgumentError(AFTER_SEQUENCE, error.reason) from error
            raise
        stream = _WatchStream(self, watch, context, request.session_id)
        with watch:
            await stream.run(initial=request.include_initial_values)

    # What requests hold

    async def _value(self, name: str, wire: Any, binary: bytes) -> Value:
        return await self._reading(len(wire.value), partial(codec.value_of, name, wire, binary, self._limits))

    def _identifiers(self, request: Any) -> tuple[str, ...]:
        identifiers = request.variable_identifiers
        check_count("variables in the batch", identifiers, self._limits.batch_entries, "batch_entries")
        return tuple(identifiers)

    def _updates_of(self, request: pb.BatchSetVariablesRequest) -> tuple[dict[str, Value], dict[str, str]]:
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
                updates[identifier] = codec.value_of(identifier, wire, binary.get(identifier, b""), self._limits)
            except StateError as error:
                refused[identifier] = str(error)
        return updates, refused


class _WatchStream:
    """One watcher's stream: pulls, sends, waits; holds no more than one page of updates."""

    def __init__(self, servicer: BridgeServicer, watch: Watch, context: Context, session_id: str) -> None:
        self._servicer = servicer
        self._watch = watch
        self._context = context
        self._ready = asyncio.Event()
        self._told = watch.position
        self._log = servicer._log("WatchVariables", session_id, context)

    async def run(self, *, initial: bool) -> None:
        servicer = self._servicer
        mailbox, ready = servicer._mailbox, self._ready
        self._watch.notify(mailbox.waker(ready.set))
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


def _expected_version(request: pb.SetVariableRequest, context: Context) -> int | None:
    """As the header says it, else as the message does, where 0 stands for any."""
    stated, in_message = whole_number(context, EXPECTED_VERSION), request.expected_version or None
    if stated is not None and in_message not in (None, stated):
        raise InvalidArgumentError(EXPECTED_VERSION, f"{stated} is not the request's expected_version, {in_message}")
    return in_message if stated is None else stated
