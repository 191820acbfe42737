"""RemoteTool: a tool that a worker has registered for a session, and runs in its process."""

import asyncio
from collections.abc import Mapping
from typing import Final

from dspex_persist.state import values
from dspex_persist.state.errors import InvalidValueError, RemoteToolError, ToolArgumentError, quote
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import RegisteredTool, Value
from dspex_persist.state.tools.chunks import Chunks
from dspex_persist.state.tools.ports import RemoteCall, RemotePort, RunnableTool
from dspex_persist.state.tools.requests import IDEMPOTENCY_KEY
from dspex_persist.state.tools.results import NOTHING, checked
from dspex_persist.state.tools.session import ToolSession

REFUSED: Final = "refused"
"""What the listed tool has instead of the state of a circuit if its address may not be called."""
_LARGE_BYTES: Final = 100_000


class RemoteTool(RunnableTool):
    """A tool called through `port`; without a port it can only be listed."""

    def __init__(self, tool: RegisteredTool, port: RemotePort | None, limits: Limits) -> None:
        super().__init__(tool.spec, worker_id=tool.worker_id)
        self._tool = tool
        self._port = port
        self._limits = limits

    @property
    def where(self) -> Mapping[str, str]:
        """Its worker, its address, and the state of the circuit of that address, or that it may not be called."""
        address = self._tool.address
        circuit = "closed" if self._port is None else self._port.state_of(address)
        if self._port is not None and address and not self._port.allows(address):
            circuit = REFUSED
        return {"dspex.where": f"worker {self.worker_id}", "dspex.address": address, "dspex.circuit": circuit}

    async def bind(self, parameters: Mapping[str, Value]) -> Mapping[str, object]:
        """Check that the parameters are within the limits; the tool itself checks everything else."""
        if sum(value.size_bytes for value in parameters.values()) < _LARGE_BYTES:
            self._check(parameters)
        else:
            await asyncio.to_thread(self._check, parameters)
        return parameters

    def _check(self, parameters: Mapping[str, Value]) -> None:
        for name, value in parameters.items():
            try:
                values.parse_json(value.json, name=name, limits=self._limits)
            except InvalidValueError as error:
                raise ToolArgumentError(self.spec.name, name, error.reason) from error
            values.check_binary_size(name, len(value.binary or b""), self._limits)

    async def run(self, session: ToolSession, arguments: Mapping[str, object]) -> Value:
        """Have the worker run it."""
        name, port = self.spec.name, self._reached()
        call = self._call(session)
        if not self.spec.streaming:
            return checked(name, await port.execute(call) or NOTHING, self._limits)
        chunks = Chunks(name, self._limits)

        async def take(chunk: Value) -> None:
            session.execution.check_running()
            chunks.add(chunk)
            if session.outlet is not None:
                await session.outlet.hand_out(chunk)

        await port.stream(call, take)
        return chunks.result()

    def _reached(self) -> RemotePort:
        if self._tool.address and self._port is not None:
            return self._port
        reason = "tools in other processes are for servers"
        if not self._tool.address:
            worker = quote(self.worker_id)
            reason = f'worker {worker} registered it without metadata["address"], so it cannot be reached'
        raise RemoteToolError(self.spec.name, self._tool.address or "nowhere", reason)

    def _call(self, session: ToolSession) -> RemoteCall:
        request = session.request
        return RemoteCall(
            self._tool,
            session.session_id,
            session.execution_id,
            request.parameters,
            {name: text for name, text in request.metadata.items() if name != IDEMPOTENCY_KEY},
            session.timeout_s,
            request.style,
            session.asker.execution_id if session.asker is not None else "",
        )
