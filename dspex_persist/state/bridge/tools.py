"""The rpcs of tools that do not simply run a command on the provider: execute, stream, list."""

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final, TypeAlias

from google.protobuf.message import Message

from dspex_persist.infra.logs import INFO, get_logger
from dspex_persist.state import commands, values
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.calls import Calls
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.headers import ASKED_BY, EXECUTION_ID
from dspex_persist.state.bridge.incoming import Call, Context
from dspex_persist.state.bridge.lent import RAISED
from dspex_persist.state.bridge.rpcs import tools as rpcs
from dspex_persist.state.bridge.rpcs.base import Rpc
from dspex_persist.state.bridge.status import text_of
from dspex_persist.state.errors import StateError, ToolArgumentError, ToolFailedError, ToolNotFoundError
from dspex_persist.state.masking import Secrets
from dspex_persist.state.model import RegisteredTool, ToolOutcome, Value
from dspex_persist.state.tools.chunks import Emit
from dspex_persist.state.tools.pooled import POOL
from dspex_persist.state.tools.ports import RunnableTool
from dspex_persist.state.tools.requests import ToolRequest, request_of
from dspex_persist.state.tools.traced import kind_of
from dspex_persist.state.tools.with_tools import WithTools

_MUCH_BYTES: Final = 20_000
_REASON_LENGTH: Final = 1_000
_logger: Final = get_logger(__name__)

_ExecuteRpc: TypeAlias = Rpc[commands.ExecuteTool, ToolOutcome]


class ToolRpcs(Calls):
    """Executes tools for clients.

    Args:
        provider: Executes the tools.
        stall_timeout_s: How long a stream waits for a client that does not read, before it ends.
        max_message_bytes: The largest response.
    """

    def __init__(self, provider: WithTools, stall_timeout_s: float, max_message_bytes: int) -> None:
        super().__init__(provider, max_message_bytes)
        self._stall_timeout_s = stall_timeout_s

    async def ExecuteTool(self, request: pb.ExecuteToolRequest, context: Context) -> Message:
        return await self._execute(rpcs.EXECUTE_TOOL, request, context)

    async def ExecuteStreamingTool(self, request: pb.ExecuteToolRequest, context: Context) -> None:
        tool = self._runner.catalog.own.get(request.tool_name)
        metadata = {"result_type": tool.result_type} if tool is not None and tool.result_type else {}
        stream = _ChunkStream(context, request.tool_name, self._stall_timeout_s, metadata)
        call = self._call(context)
        tool_request = await self._request("ExecuteStreamingTool", rpcs.EXECUTE_TOOL, request, call)
        outcome = await self._run(tool_request, call, stream.emit)
        if not outcome.success:
            raise outcome.error or ToolFailedError(outcome.execution_id, outcome.error_code)
        # The last chunk reports the commit. It only has a result if the tool does not stream.
        text = "null" if outcome.streamed or outcome.result is None else outcome.result.json
        await stream.send(text, is_final=True, **rpcs.facts(outcome))

    async def ExecuteElixirTool(self, request: pb.ExecuteElixirToolRequest, context: Context) -> Message:
        tool = self._runner.catalog.own.get(request.tool_name)
        if tool is not None and tool.spec.exposed:
            return await self._execute(rpcs.EXECUTE_ELIXIR_TOOL, request, context)
        names = ", ".join(sorted(each.spec.name for each in self._exposed())) or "none"
        error = ToolNotFoundError(request.tool_name, f"exposed are: {names}")
        return rpcs.EXECUTE_ELIXIR_TOOL.response_of(_refusal(error), self._call(context))

    async def GetExposedElixirTools(self, request: pb.GetExposedElixirToolsRequest, context: Context) -> Message:
        call = self._call(context)
        question = rpcs.LIST_TOOLS.command_of(request, call)
        if question.every:
            await self._learn(question.session_id, call)
            tools = list((await self._available_tools(question.session_id, call)).values())
        else:
            tools = [codec.tool_message(tool.spec, tool.where) for tool in self._exposed()]
        return rpcs.LIST_TOOLS.response_of(tools, call)

    async def register_for_pool(self, pool: str, request: pb.RegisterToolsRequest, context: Context) -> Message:
        """Register what a worker of a pool has for a session, in the name of the pool: any of its workers may run it.

        Workers register again with each call: nothing is written unless something is new.
        """
        call = self._call(context)
        command = rpcs.REGISTER_TOOLS.command_of(request, call)
        worker = f"{POOL}{pool}"
        tools = tuple(
            RegisteredTool(tool.spec, worker, worker)
            for tool in command.tools
            if tool.spec.name not in self._runner.catalog.own
        )
        known = await self._read(commands.ListTools(request.session_id), call)
        if any(known.get(tool.spec.name) != tool for tool in tools):
            await self._submit(replace(command, worker_id=worker, tools=tools), call.origin("RegisterTools"))
        self._runner.catalog.of_pools.note(tools)
        ids = {each.name: f"{request.session_id}:{each.name}" for each in request.tools}
        return pb.RegisterToolsResponse(success=True, tool_ids=ids)

    async def available_tools(self, session_id: str, context: Context) -> dict[str, pb.ToolSpec]:
        """Return all tools that a session can execute, by name."""
        return await self._available_tools(session_id, self._call(context))

    # Execution

    async def _execute(self, rpc: _ExecuteRpc, request: Any, context: Context) -> Message:
        call = self._call(context)
        try:
            tool_request = await self._request(rpc.name, rpc, request, call)
        except ToolArgumentError as error:
            outcome = _refusal(error)
        else:
            outcome = await self._run(tool_request, call)
        if outcome.result is not None and outcome.result.size_bytes > values.LONG_JSON:
            # On a thread, because finding out the type of a large result means parsing it.
            return await asyncio.to_thread(rpc.response_of, outcome, call)
        return rpc.response_of(outcome, call)

    async def _request(self, cause: str, rpc: _ExecuteRpc, request: Any, call: Call) -> ToolRequest:
        origin = call.origin(cause)
        command = await self._command(rpc, request, call)
        return request_of(command, origin)._replace(style=call.style)

    async def _run(self, request: ToolRequest, call: Call, emit: Emit | None = None) -> ToolOutcome:
        """Execute a tool, separately or as part of the execution that the call names. The latter streams no chunks."""
        within = call.header(EXECUTION_ID)
        if within is not None:
            plainly = call.header(RAISED) is not None
            outcome = await self._runner.execute_within(within, request, plainly=plainly)
        else:
            outcome = await self._runner.execute(request, emit, asker_id=call.header(ASKED_BY))
        if self._logs_details or (not outcome.success and _logger.is_on(INFO)):
            await self._log_outcome(request, outcome, call)
        return outcome

    async def _log_outcome(self, request: ToolRequest, outcome: ToolOutcome, call: Call) -> None:
        log = self._log(request.origin.cause, request.session_id, call)
        facts = {
            "tool": request.tool,
            "execution_id": outcome.execution_id,
            "attempts": outcome.attempts,
            "duration_s": round(time.monotonic() - call.began, 6),
        }
        if outcome.error is None:
            log.debug("tool executed", **facts)
            return
        error, quotable = outcome.error, (*request.parameters.values(), *outcome.quotable)
        if outcome.repeated:
            # Of another server, which knows what the error may quote.
            reason = f"that of execution {outcome.execution_id}, which had the same key"
        elif sum(value.size_bytes for value in quotable) < _MUCH_BYTES:
            reason = _reason_of(error, quotable)
        else:
            reason = await asyncio.to_thread(_reason_of, error, quotable)
        log.info("tool failed", code=outcome.error_code, error=kind_of(error), reason=reason, **facts)

    def _exposed(self) -> list[RunnableTool]:
        return [tool for tool in self._runner.catalog.own.values() if tool.spec.exposed]

    async def _learn(self, session_id: str, call: Call) -> None:
        """Have pools that have not told yet tell which tools they have, unless one of their workers wants to know."""
        if session_id and call.header(EXECUTION_ID) is None:
            await self._runner.catalog.of_pools.learn(session_id, call.origin("GetExposedElixirTools"))

    async def _available_tools(self, session_id: str, call: Call) -> dict[str, pb.ToolSpec]:
        """All tools that the session can execute, by name; without a session, the server's own tools."""
        registered = await self._read(commands.ListTools(session_id), call) if session_id else {}
        available = self._runner.catalog.available(registered)
        return {name: codec.tool_message(tool.spec, tool.where) for name, tool in available.items()}


class _ChunkStream:
    """Sends the chunks of one execution to a client; a slow reader slows the tool down.

    Args:
        context: The call.
        tool: The name of the tool.
        stall_timeout_s: How long to wait for a client that does not read.
        metadata: The metadata of each chunk that the tool yields.
    """

    def __init__(self, context: Context, tool: str, stall_timeout_s: float, metadata: Mapping[str, str]) -> None:
        self._context = context
        self._tool = tool
        self._stall_timeout_s = stall_timeout_s
        self._metadata = metadata
        self._count = 0

    async def emit(self, chunk: Value) -> None:
        """Send a chunk that the tool has yielded."""
        await self.send(chunk.json, is_final=False, **self._metadata)

    async def send(self, text: str, *, is_final: bool = False, **metadata: str) -> None:
        """Send a chunk; `ToolFailedError` if the client does not read it in time."""
        self._count += 1
        chunk_id = f"{self._tool}-{self._count}"
        chunk = pb.ToolChunk(chunk_id=chunk_id, data=text.encode(), is_final=is_final, metadata=metadata)
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await self._context.write(chunk)
        except TimeoutError:
            reason = f"the client read no chunk for {self._stall_timeout_s:g} s"
            raise ToolFailedError("", f"{reason}; nothing that the tool did is kept") from None


def _refusal(error: StateError) -> ToolOutcome:
    """The outcome of a request that was refused before an execution began."""
    return ToolOutcome(None, None, error, error.error_code)


def _reason_of(error: Exception, quotable: Iterable[Value]) -> str:
    """The text of an error without its type, in which none of the values is quoted."""
    text = text_of(error)
    if isinstance(error, ToolFailedError) and error.kind:
        text = text.removeprefix(f"{error.kind}: ")
    # Masked first: half a value could not be found.
    masked = str(Secrets(quotable).masked(text))
    return masked if len(masked) <= _REASON_LENGTH else f"{masked[:_REASON_LENGTH]}..."
