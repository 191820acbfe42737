"""WorkerServicer: what a worker of ours serves. It runs the code of tools for the server that started it."""

import asyncio
import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from dspex_persist import clock
from dspex_persist.infra import tracing
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.headers import ACTOR, ASKED_BY, EXECUTION_ID, REASON
from dspex_persist.state.bridge.incoming import Context, RequestHeaders
from dspex_persist.state.bridge.lent import ATTEMPT, FAILURE, JOURNAL, PARENT, SEED, failure_text
from dspex_persist.state.bridge.rpcs.tools import parameters_of
from dspex_persist.state.bridge.workers.session import Callback, LentExecution, LentSession, WorkerHost
from dspex_persist.state.errors import ToolNotFoundError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Origin, Source, Value
from dspex_persist.state.tools.chunks import Emit, Outlet
from dspex_persist.state.tools.failures import raised_of
from dspex_persist.state.tools.home import Home
from dspex_persist.state.tools.invoke import Invoker
from dspex_persist.state.tools.local import local_tools
from dspex_persist.state.tools.ports import ToolCode
from dspex_persist.state.tools.requests import ToolRequest

_LARGE_BYTES = 100_000


class WorkerServicer:
    """Runs tools for the server. Made and used on one event loop.

    Args:
        server: The server, at the private address of this worker.
        tools: The tools, by name.
        threads: How many tools without `async` run at a time.
        limits: The limits of parameters, results and journals.
    """

    session_kind: ClassVar[type[LentSession]] = LentSession
    host_kind: ClassVar[type[WorkerHost]] = WorkerHost

    def __init__(self, server: Callback, tools: Mapping[str, ToolCode], *, threads: int, limits: Limits) -> None:
        self._limits = limits
        self._invoker = Invoker(Home(asyncio.get_running_loop()), threads, limits)
        self._tools = local_tools(tools, self._invoker)
        self._host = self.host_kind(server, self._tools, limits)
        self._sessions: dict[str, LentSession] = {}

    def close(self) -> None:
        """End idle threads and the loop of asynchronous tools."""
        self._invoker.close()

    async def Ping(self, request: pb.PingRequest, context: Context) -> pb.PingResponse:
        """Answer; if the call names an execution, only when the code of that has ended."""
        execution_id = RequestHeaders(context).find(EXECUTION_ID)
        session = self._sessions.get(execution_id or "")
        if session is not None:
            await session.has_ended.wait()
        return pb.PingResponse(message=request.message, server_time=codec.timestamp_of(clock.now()))

    async def ExecuteTool(self, request: pb.ExecuteToolRequest, context: Context) -> pb.ExecuteToolResponse:
        """Run a tool; the metadata of the answer is for the server."""
        result, facts = await self._run(request, context, None)
        response = pb.ExecuteToolResponse(success=result is not None, metadata=facts)
        if result is not None:
            response.result.value = result.json.encode()
        return response

    async def ExecuteStreamingTool(self, request: pb.ExecuteToolRequest, context: Context) -> None:
        """Run a tool, and send what it yields; the metadata of the last chunk is for the server."""

        async def emit(chunk: Value) -> None:
            await context.write(pb.ToolChunk(data=chunk.json.encode()))

        _, facts = await self._run(request, context, emit)
        await context.write(pb.ToolChunk(is_final=True, metadata=facts))

    async def _run(
        self, request: pb.ExecuteToolRequest, context: Context, emit: Emit | None
    ) -> tuple[Value | None, dict[str, str]]:
        session = await self._session(request, RequestHeaders(context), emit)
        facts: dict[str, str] = {}
        result: Value | None = None
        with self._listed(session):
            try:
                result = await self._result(session)
            except asyncio.CancelledError:
                session.lent.close("cancelled")
                if not session.started:
                    session.has_ended.set()
                raise
            except Exception as error:  # noqa: BLE001 -- users' code: the server gets whatever it raises
                facts[FAILURE] = failure_text(error)
                asker = session.asker
                if isinstance(asker, LentSession) and session.lent.parent is not None:
                    asker.raised.append(raised_of(error)[0])
            session.lent.close("ended")
            journal = await session.rest()
        if journal:
            facts[JOURNAL] = journal
        return result, facts

    async def _result(self, session: LentSession) -> Value:
        tool = self._tools.get(session.request.tool)
        if tool is None:
            raise ToolNotFoundError(session.request.tool, "this worker does not have it; does it run other code?")
        arguments = await tool.bind(session.request.parameters)
        asker = session.asker
        around = asker.context if isinstance(asker, LentSession) else None
        context = around.copy() if around is not None else contextvars.Context()
        tracer = tracing.tracer()
        if tracer is not None:
            session.place = tracer.here()
            context.run(tracer.enter, session.place)
        run = tool.run(session, arguments)
        return await asyncio.create_task(run, context=context)

    async def _session(self, request: pb.ExecuteToolRequest, headers: RequestHeaders, emit: Emit | None) -> LentSession:
        size_bytes = request.ByteSize()
        read = parameters_of
        parameters = (
            read(request, self._limits)
            if size_bytes < _LARGE_BYTES
            else await asyncio.to_thread(read, request, self._limits)
        )
        asker = self._sessions.get(headers.find(ASKED_BY) or "")
        parent = asker.lent if asker is not None and headers.find(PARENT) else None
        execution = self._execution(request, headers, parent)
        actor = headers.find(ACTOR) or self._host.server.default_origin("ExecuteTool").actor
        origin = Origin(actor, "ExecuteTool", Source.PYTHON, reason=headers.find(REASON))
        tool_request = ToolRequest(
            request.session_id,
            request.tool_name,
            parameters,
            origin,
            dict(request.metadata),
            outlet=None if emit is None else Outlet(emit),
        )
        attempt, seed = int(headers.find(ATTEMPT) or 1), headers.find(SEED) or execution.id
        return self.session_kind(self._host, execution, tool_request, attempt, seed, asker)

    def _execution(
        self, request: pb.ExecuteToolRequest, headers: RequestHeaders, parent: LentExecution | None
    ) -> LentExecution:
        execution_id = headers.find(EXECUTION_ID) or ""
        return LentExecution(execution_id, request.session_id, request.tool_name, self._host.server, parent)

    @contextlib.contextmanager
    def _listed(self, session: LentSession) -> Iterator[Any]:
        """List a session until its code has ended, which may be later than the call."""
        execution_id = session.execution_id
        self._sessions[execution_id] = session
        try:
            yield
        finally:
            if session.has_ended.is_set() or not session.started:
                self._sessions.pop(execution_id, None)
            else:
                task = asyncio.ensure_future(session.has_ended.wait())
                task.add_done_callback(lambda _: self._sessions.pop(execution_id, None))
