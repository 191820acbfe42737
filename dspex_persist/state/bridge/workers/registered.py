"""RegisteredServicer: what a worker serves whose tools are registered for sessions of a server.

To the server it is a worker like any other. Its code reads and writes through the server's own address, as part of the
execution that each call names.
"""

from collections.abc import Mapping
from typing import Any, Final

import grpc

from dspex_persist import clock
from dspex_persist.infra.logs import get_logger
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.headers import EXECUTION_ID
from dspex_persist.state.bridge.incoming import Context, RequestHeaders
from dspex_persist.state.bridge.lent import FAILURE, raised_in
from dspex_persist.state.bridge.workers.service import WorkerServicer
from dspex_persist.state.bridge.workers.session import LentExecution, LentSession, WorkerHost
from dspex_persist.state.budgets import NO_BUDGET, Budget
from dspex_persist.state.errors import InvalidArgumentError, UnsupportedError
from dspex_persist.state.model import ToolSpec, Value

_logger: Final = get_logger(__name__)


class RegisteredHost(WorkerHost):
    """The host of the sessions in such a worker."""

    def exposed_tools(self) -> tuple[ToolSpec, ...]:
        """See `Host.exposed_tools`."""
        return tuple(spec for spec in self.server.list_tools() if spec.exposed)


class RegisteredSession(LentSession):
    """The session of an execution in such a worker. The journal is the server's, and gets nothing from here."""

    def log(self, message: str, **fields: object) -> None:
        """See `ToolSession.log`: the line goes to the log of this process."""
        super().log(message, **fields)
        _logger.info(
            "a tool logged", execution_id=self.execution_id, tool=self.request.tool, message=message, fields=fields
        )

    def record(self, kind: str, entry: Mapping[str, Any]) -> None:
        """Record nothing."""

    def check_budgets(self, own: Budget = NO_BUDGET) -> None:
        """Check nothing: what is not recorded is not counted."""

    def _publish(self, identifier: str, encoded: Value, metadata: Mapping[str, str] | None, reason: str | None) -> int:
        raise UnsupportedError("publish in a tool of a registered worker", "have the server execute it: serve --tools")

    def _note(self) -> None:
        """Send nothing."""

    async def rest(self) -> str:
        """See `LentSession.rest`: there is nothing."""
        return ""


class RegisteredServicer(WorkerServicer):
    """Runs tools for a server that they are registered with; see `WorkerServicer`."""

    session_kind = RegisteredSession
    host_kind = RegisteredHost

    async def ExecuteTool(self, request: pb.ExecuteToolRequest, context: Context) -> pb.ExecuteToolResponse:
        """Run a tool."""
        began = clock.now()
        result, facts = await self._run(request, context, None)
        response = pb.ExecuteToolResponse(success=result is not None, error_message=_failure(facts))
        response.execution_time_ms = round((clock.now() - began).total_seconds() * 1000)
        if result is not None:
            tool = self._tools[request.tool_name]
            style = codec.style_of(request.parameters.values())
            response.result.CopyFrom(codec.loose_any_of(result, style, tool.result_type))
        return response

    async def ExecuteStreamingTool(self, request: pb.ExecuteToolRequest, context: Context) -> None:
        """Run a tool, and send what it yields."""
        sent = 0

        async def emit(chunk: Value) -> None:
            nonlocal sent
            sent += 1
            await context.write(pb.ToolChunk(chunk_id=f"{request.tool_name}-{sent}", data=chunk.json.encode()))

        _, facts = await self._run(request, context, emit)
        if FAILURE in facts:
            await context.abort(grpc.StatusCode.ABORTED, _failure(facts))
        await context.write(pb.ToolChunk(chunk_id=f"{request.tool_name}-{sent + 1}", is_final=True))

    def _execution(
        self, request: pb.ExecuteToolRequest, headers: RequestHeaders, parent: LentExecution | None
    ) -> LentExecution:
        key = headers.find(EXECUTION_ID)
        if not key:
            raise InvalidArgumentError(EXECUTION_ID, "it is missing: only the server calls this worker")
        # A secret may follow the id, for this worker only: calls have to name both.
        execution_id = key.partition(".")[0]
        return LentExecution(execution_id, request.session_id, request.tool_name, self._host.server, parent, key)


def _failure(facts: Mapping[str, str]) -> str:
    """Return how the code failed, as the server reports it of its own tools; "" if it did not."""
    if FAILURE not in facts:
        return ""
    failure = raised_in(facts[FAILURE]).failure
    return f"{failure.type}: {failure.message}"
