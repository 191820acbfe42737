"""A worker that misbehaves: `python -m tests.workers.odd --port N --starts FILE`.

The first one never gets ready, and the second one answers pings with what is no message of the bridge protocol. The
others answer tools like that, or not at all.
"""

import argparse
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import snakepit_bridge_pb2 as pb
from google.protobuf.any_pb2 import Any as AnyMessage

NONSENSE = b"\xff\xff\xff\xff no message"


def execute(request: Any, context: Any) -> bytes:
    match request.tool_name:
        case "nonsense":
            return NONSENSE
        case "deaf":
            # Whoever gives the call up is not heard.
            threading.Event().wait()
        case "late":
            time.sleep(1.5)
    result = AnyMessage(type_url="type.googleapis.com/google.protobuf.StringValue", value=b'"fine"')
    return bytes(pb.ExecuteToolResponse(success=True, result=result).SerializeToString())


def stream(request: Any, context: Any) -> Iterator[bytes]:
    yield pb.ToolChunk(data=b"1").SerializeToString()
    yield NONSENSE


class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers with bytes, so that they can be anything."""

    def __init__(self, pong: bytes) -> None:
        self._pong = pong

    def service(self, call: Any) -> Any:
        read = pb.ExecuteToolRequest.FromString
        match call.method.rpartition("/")[2]:
            case "Ping":
                return grpc.unary_unary_rpc_method_handler(lambda *_: self._pong)
            case "ExecuteTool":
                return grpc.unary_unary_rpc_method_handler(execute, read)
            case "ExecuteStreamingTool":
                return grpc.unary_stream_rpc_method_handler(stream, read)
        return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--starts", type=Path, required=True)
    arguments = parser.parse_args()
    with arguments.starts.open("a") as starts:
        starts.write("x")
        number = starts.tell()
    if number == 1:
        threading.Event().wait()
    server = grpc.server(ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers((Handler(NONSENSE if number == 2 else b""),))
    port = server.add_insecure_port(f"127.0.0.1:{arguments.port}")
    server.start()
    print(f"GRPC_READY:{port}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
