"""A tiny worker that serves BridgeService: in a test's own loop, or in a process (`python -m tests.bridge.worker`)."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage

from dspex_persist.infra.listen import grpc_name
from dspex_persist.state.bridge.codec import BRIDGE_SERVICE
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb

_MIB = 1024 * 1024


def _result(document: object) -> pb.ExecuteToolResponse:
    return _any_result("snakepit.map", json.dumps(document).encode())


def _any_result(type_name: str, content: bytes) -> pb.ExecuteToolResponse:
    result = AnyMessage(type_url=f"type.googleapis.com/{type_name}", value=content)
    return pb.ExecuteToolResponse(success=True, result=result)


_ANSWERS = {
    "fail": pb.ExecuteToolResponse(success=False, error_message="ZeroDivisionError: by zero"),
    "fail silently": pb.ExecuteToolResponse(success=False),
    "nothing": pb.ExecuteToolResponse(success=True),
    "null": _result(None),
    "string value": _any_result("google.protobuf.StringValue", b'{"a": 1}'),
    "no json": _any_result("snakepit.map", b"{oops"),
    "foreign type": _any_result("acme.Thing", b"{}"),
    "large": _result("x" * 8 * _MIB),
}


class Worker:
    """A worker whose tools do what their names say. It keeps all `requests` and their `headers`."""

    def __init__(self) -> None:
        self.requests: list[pb.ExecuteToolRequest] = []
        self.headers: list[dict[str, Any]] = []
        self.pings = 0
        self.sent = 0
        self.cancelled = asyncio.Event()
        self.begun = asyncio.Event()

    async def Ping(self, request: pb.PingRequest, _context: Any) -> pb.PingResponse:
        self.pings += 1
        return pb.PingResponse(message=request.message)

    async def ExecuteTool(self, request: pb.ExecuteToolRequest, context: Any) -> Any:
        self._note(request, context)
        match request.tool_name:
            case "no message":
                return b"\xff\xff"
            case "raise":
                raise RuntimeError("a bug")
            case "abort":
                await context.abort(grpc.StatusCode[request.metadata["code"]], "its own words")
            case "hang":
                await self._hang()
        return _ANSWERS.get(request.tool_name) or _result({"tool": request.tool_name})

    async def ExecuteStreamingTool(self, request: pb.ExecuteToolRequest, context: Any) -> AsyncIterator[pb.ToolChunk]:
        self._note(request, context)
        match request.tool_name:
            case "count":
                for number in range(int(request.metadata["to"])):
                    yield pb.ToolChunk(chunk_id=f"count-{number}", data=str(number).encode())
                yield pb.ToolChunk(chunk_id="count-last", is_final=True)
            case "last has data":
                yield pb.ToolChunk(data=b'"first"')
                yield pb.ToolChunk()
                yield pb.ToolChunk(data=b'"last"', is_final=True)
            case "no json":
                yield pb.ToolChunk(data=b"plain text")
                yield pb.ToolChunk(data=b"\xff\x00")
                yield pb.ToolChunk(data=b'{"a": NaN}')
            case "too large":
                yield pb.ToolChunk(data=b'"' + b"x" * 17 * _MIB + b'"')
                await self._hang()
            case "break":
                yield pb.ToolChunk(data=b"1")
                await context.abort(grpc.StatusCode.INTERNAL, "it broke")
            case "flood":
                async with self._watched():
                    for _ in range(1000):
                        yield pb.ToolChunk(data=json.dumps("x" * 100_000).encode())
                        self.sent += 1
            case _:
                yield pb.ToolChunk(data=b"1")
                await self._hang()

    def _note(self, request: pb.ExecuteToolRequest, context: Any) -> None:
        self.requests.append(request)
        self.headers.append(dict(context.invocation_metadata()))

    async def _hang(self) -> None:
        async with self._watched():
            await asyncio.get_running_loop().create_future()

    @asynccontextmanager
    async def _watched(self) -> AsyncIterator[None]:
        self.begun.set()
        try:
            yield
        finally:
            self.cancelled.set()


def _handlers(worker: Worker, leave_out: tuple[str, ...]) -> Any:
    def serialized(message: Any) -> bytes:
        return message if isinstance(message, bytes) else message.SerializeToString()

    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Ping": grpc.unary_unary_rpc_method_handler(worker.Ping, pb.PingRequest.FromString, serialized),
        "ExecuteTool": grpc.unary_unary_rpc_method_handler(
            worker.ExecuteTool, pb.ExecuteToolRequest.FromString, serialized
        ),
        "ExecuteStreamingTool": grpc.unary_stream_rpc_method_handler(
            worker.ExecuteStreamingTool, pb.ExecuteToolRequest.FromString, serialized
        ),
    }
    kept = {name: handler for name, handler in handlers.items() if name not in leave_out}
    return grpc.method_handlers_generic_handler(BRIDGE_SERVICE.full_name, kept)


@asynccontextmanager
async def serving(
    worker: Worker,
    listen: str = "127.0.0.1:0",
    *,
    leave_out: tuple[str, ...] = (),
    credentials: grpc.ServerCredentials | None = None,
) -> AsyncIterator[str]:
    """Serve until the end of the block; yields the address."""
    options = [
        ("grpc.so_reuseport", 0),
        ("grpc.max_send_message_length", 100 * _MIB),
        ("grpc.max_receive_message_length", 100 * _MIB),
    ]
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((_handlers(worker, leave_out),))
    secure = credentials is not None
    port = server.add_secure_port(listen, credentials) if secure else server.add_insecure_port(grpc_name(listen))
    await server.start()
    try:
        yield listen if listen.startswith("unix:") else f"{'grpcs://' if secure else ''}127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def _serve_forever(listen: str) -> None:
    async with serving(Worker(), listen) as address:
        print(f"GRPC_READY:{address.rpartition(':')[2]}", flush=True)
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    asyncio.run(_serve_forever(sys.argv[1]))
