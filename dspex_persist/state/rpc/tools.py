"""The rpcs of tools: execute, stream, register, list."""

import asyncio
import time
from collections.abc import Mapping
from functools import partial
from math import inf
from typing import Any

from dspex_persist.state import commands
from dspex_persist.state.errors import (
    InvalidArgumentError,
    InvalidValueError,
    ToolArgumentError,
    ToolFailedError,
    ToolNotFoundError,
    quote,
)
from dspex_persist.state.model import ToolOutcome, Value
from dspex_persist.state.rpc import codec
from dspex_persist.state.rpc.calls import Calls, Context, check_count, check_together, header, origin_of
from dspex_persist.state.rpc.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.rpc.headers import ALL_TOOLS, ASKED_BY, EXECUTION_ID, TIMEOUT_S, TOOLS
from dspex_persist.state.rpc.status import facts_of
from dspex_persist.state.tools.ports import Emit, ToolCode
from dspex_persist.state.tools.requests import IDEMPOTENCY_KEY, ToolRequest
from dspex_persist.state.tools.with_tools import WithTools

# A tool that runs into its client's deadline is ended so much earlier that its verdict still reaches the client.
_MARGIN, _LONGEST_MARGIN_S = 0.1, 0.25


class ToolRpcs(Calls):
    """Executes tools for clients. `stall_timeout_s`: how long a chunk may wait for a client that does not read."""

    def __init__(self, provider: WithTools, stall_timeout_s: float) -> None:
        super().__init__(provider)
        self._stall_timeout_s = stall_timeout_s

    async def ExecuteTool(self, request: pb.ExecuteToolRequest, context: Context) -> pb.ExecuteToolResponse:
        began = time.monotonic()
        outcome = await self._execute("ExecuteTool", request, request.binary_parameters, context)
        return pb.ExecuteToolResponse(**_answer(outcome, request.parameters, began))

    async def ExecuteStreamingTool(self, request: pb.ExecuteToolRequest, context: Context) -> None:
        tool = self._runner.tools.get(request.tool_name)
        said = {"result_type": tool.result_type} if tool is not None and tool.result_type else {}
        stream = _ChunkStream(context, request.tool_name, self._stall_timeout_s, said)
        call = await self._request("ExecuteStreamingTool", request, request.binary_parameters, context)
        outcome = await self._run(call, context, stream.emit)
        if not outcome.success:
            raise outcome.error or ToolFailedError(outcome.execution_id, outcome.error_code)
        # The last chunk says that it is committed; only of a tool that does not stream it is the result as well.
        text = "null" if outcome.streamed or outcome.result is None else outcome.result.json
        await stream.send(text, is_final=True, **_metadata(outcome))

    async def ExecuteElixirTool(self, request: pb.ExecuteElixirToolRequest, context: Context) -> Any:
        began = time.monotonic()
        tool = self._runner.tools.get(request.tool_name)
        if tool is None or not tool.spec.exposed:
            names = ", ".join(sorted(each.spec.name for each in self._exposed())) or "none"
            error = ToolNotFoundError(request.tool_name, f"exposed are: {names}")
            outcome = ToolOutcome(None, None, error, error.error_code)
        else:
            outcome = await self._execute("ExecuteElixirTool", request, {}, context)
        return pb.ExecuteElixirToolResponse(**_answer(outcome, request.parameters, began))

    async def GetExposedElixirTools(self, request: pb.GetExposedElixirToolsRequest, context: Context) -> Any:
        if header(context, TOOLS) == ALL_TOOLS:
            tools = list((await self._available_tools(request.session_id, context)).values())
        else:
            tools = [codec.tool_message(tool.spec, {"dspex.where": "server"}) for tool in self._exposed()]
        return pb.GetExposedElixirToolsResponse(tools=tools)

    async def RegisterTools(self, request: pb.RegisterToolsRequest, context: Context) -> pb.RegisterToolsResponse:
        limits = self._limits
        check_count("tools", request.tools, limits.tools_per_session, "tools_per_session")
        for each in request.tools:
            check_count("parameters of a tool", each.parameters, limits.batch_entries, "batch_entries")
            check_count("metadata entries", each.metadata, limits.metadata_entries, "metadata_entries")
            what, most = f"description of tool {quote(each.name)}", limits.constraints_size_bytes
            check_together(what, each.ByteSize(), most, "constraints_size_bytes")
        tools = await self._reading(
            request.ByteSize(),
            lambda: tuple(codec.registered_tool(each, request.worker_id, limits) for each in request.tools),
        )
        names = {tool.spec.name: tool for tool in tools}
        if len(names) < len(tools):
            twice = next(tool.spec.name for tool in tools if names[tool.spec.name] is not tool)
            raise InvalidArgumentError("tools", f"{quote(twice)} is there twice")
        command = commands.RegisterTools(request.session_id, request.worker_id, tools)
        tool_ids = await self._write(command, context)
        log = self._log("RegisterTools", request.session_id, context)
        log.info("tools registered", tools=len(tool_ids))
        left_out = sorted(set(names) - set(tool_ids))
        if left_out:
            log.warning("tools left out: the server itself has some of their names", names=left_out)
        return pb.RegisterToolsResponse(success=True, tool_ids=tool_ids)

    # How they go

    async def _execute(self, rpc: str, request: Any, binaries: Mapping[str, bytes], context: Context) -> ToolOutcome:
        try:
            call = await self._request(rpc, request, binaries, context)
        except ToolArgumentError as error:
            return ToolOutcome(None, None, error, error.error_code)
        return await self._run(call, context)

    async def _run(self, call: ToolRequest, context: Context, emit: Emit | None = None) -> ToolOutcome:
        """On its own, or as part of the execution that the call names; that one's chunks come with its result."""
        within = header(context, EXECUTION_ID)
        if within is not None:
            outcome = await self._runner.execute_within(within, call)
        else:
            outcome = await self._runner.execute(call, emit, asked_by=header(context, ASKED_BY))
        self._log_outcome(call, outcome, context)
        return outcome

    async def _request(self, rpc: str, request: Any, binaries: Mapping[str, bytes], context: Context) -> ToolRequest:
        origin = origin_of(rpc, context)
        metadata, limits, wires = self._metadata(request.metadata), self._limits, request.parameters
        for entries in (wires, binaries):
            check_count("parameters", entries, limits.batch_entries, "batch_entries")
        size_bytes = sum(len(wire.value) for wire in wires.values()) + sum(map(len, binaries.values()))
        check_together("parameters", size_bytes, limits.execution_size_bytes, "execution_size_bytes")
        read = partial(self._parameters, request.tool_name, wires, binaries)
        return ToolRequest(
            request.session_id,
            request.tool_name,
            await self._reading(size_bytes, read),
            origin,
            metadata,
            metadata.get(IDEMPOTENCY_KEY) or origin.idempotency_key,
            _time_left(context),
            codec.style_of(wires.values()),
        )

    def _parameters(self, tool: str, wires: Mapping[str, Any], binaries: Mapping[str, bytes]) -> dict[str, Value]:
        for name in binaries:
            if name not in wires:
                reason = "there is binary content, but no entry in parameters that describes it"
                raise ToolArgumentError(tool, name, reason)
        parameters: dict[str, Value] = {}
        for name, wire in wires.items():
            try:
                parameters[name] = codec.value_of(name, wire, binaries.get(name, b""), self._limits)
            except InvalidValueError as error:
                raise ToolArgumentError(tool, name, error.reason) from error
        return parameters

    def _log_outcome(self, call: ToolRequest, outcome: ToolOutcome, context: Context) -> None:
        log = self._log(call.origin.cause, call.session_id, context)
        facts = {"tool": call.tool, "execution_id": outcome.execution_id, "attempts": outcome.attempts}
        if outcome.success:
            log.debug("tool executed", **facts)
        else:
            # The code and the kind of error only: its text may quote a value.
            log.info("tool failed", code=outcome.error_code, error=_kind_of(outcome.error), **facts)

    def _exposed(self) -> list[ToolCode]:
        return [tool for tool in self._runner.tools.values() if tool.spec.exposed]

    async def _available_tools(self, session_id: str, context: Context) -> dict[str, pb.ToolSpec]:
        """Everything that the session can execute, by name; without a session what the server itself has."""
        registered = await self._read(commands.ListTools(session_id), context) if session_id else {}
        tools = {
            name: codec.tool_message(tool.spec, {"dspex.where": "server"}) for name, tool in self._runner.tools.items()
        }
        for name, tool in registered.items():
            where = {"dspex.where": f"worker {tool.worker_id}", "dspex.address": tool.address}
            tools[name] = codec.tool_message(tool.spec, where | {"dspex.circuit": self._runner.circuit_of(tool)})
        return tools


class _ChunkStream:
    """The chunks of one execution on their way to a client, which holds the tool back if it reads slowly. `said`: the
    metadata of what the tool yields."""

    def __init__(self, context: Context, tool: str, stall_timeout_s: float, said: Mapping[str, str]) -> None:
        self._context = context
        self._tool = tool
        self._stall_timeout_s = stall_timeout_s
        self._said = said
        self._count = 0

    async def emit(self, chunk: Value) -> None:
        """Send what the tool has yielded."""
        await self.send(chunk.json, is_final=False, **self._said)

    async def send(self, text: str, *, is_final: bool = False, **metadata: str) -> None:
        """Send a chunk; an error if the client takes it not in time."""
        self._count += 1
        chunk_id = f"{self._tool}-{self._count}"
        chunk = pb.ToolChunk(chunk_id=chunk_id, data=text.encode(), is_final=is_final, metadata=metadata)
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await self._context.write(chunk)
        except TimeoutError:
            reason = f"the client took no chunk for {self._stall_timeout_s:g} s"
            raise ToolFailedError("", f"{reason}; what the tool did is not kept") from None


def _time_left(context: Context) -> float | None:
    """How long whoever asks is going to wait for the tool: as they say, and no longer than the call lasts."""
    said = header(context, TIMEOUT_S)
    left_s: float | None = context.time_remaining()
    bounds = [] if left_s is None else [max(0.0, left_s - min(_LONGEST_MARGIN_S, left_s * _MARGIN))]
    if said is not None:
        bounds.append(_seconds(said))
    return min(bounds, default=None)


def _seconds(said: str) -> float:
    try:
        seconds = float(said)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < inf:
        raise InvalidArgumentError(TIMEOUT_S, f"{quote(said)} is no number of seconds above 0")
    return seconds


def _answer(outcome: ToolOutcome, parameters: Mapping[str, Any], began: float) -> dict[str, Any]:
    """The fields that the answers of both rpcs have in common."""
    fields: dict[str, Any] = {
        "success": outcome.success,
        "error_message": "" if outcome.error is None else str(outcome.error),
        "metadata": _metadata(outcome),
        "execution_time_ms": round((time.monotonic() - began) * 1000),
    }
    if outcome.result is not None:
        style, result_type = codec.style_of(parameters.values()), "" if outcome.streamed else outcome.result_type
        fields["result"] = codec.loose_any_of(outcome.result, style, result_type)
    return fields


def _kind_of(error: Exception | None) -> str:
    """The type of an error; of one that a tool's code raised, that one's."""
    return (error.kind if isinstance(error, ToolFailedError) else "") or type(error).__name__


def _metadata(outcome: ToolOutcome) -> dict[str, str]:
    said = {
        "execution_id": outcome.execution_id,
        "commit_sequence": "" if outcome.commit_sequence is None else str(outcome.commit_sequence),
        "attempts": str(outcome.attempts),
    }
    if outcome.error_code:
        said["error_code"] = outcome.error_code
        said["error_fields"] = facts_of(outcome.error)
    if outcome.repeated:
        said["repeated"] = "true"
    if outcome.streamed:
        said["streamed"] = "true"
    if outcome.result_type and outcome.success:
        said["result_type"] = outcome.result_type
    return said
