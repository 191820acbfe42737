"""A worker that knows the bridge protocol only, and tells which metadata came with a call.

`python -m tests.end_to_end.telling_worker PORT` is one for pools.
"""

import json
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import snakepit_bridge_pb2 as pb
import snakepit_bridge_pb2_grpc as bridge


class Telling(bridge.BridgeServiceServicer):  # type: ignore[misc]
    def Ping(self, request: Any, _context: Any) -> Any:
        return pb.PingResponse(message=request.message)

    def ExecuteTool(self, request: Any, context: Any) -> Any:
        told = {"request": dict(request.metadata), "call": dict(context.invocation_metadata())}
        response = pb.ExecuteToolResponse(success=True)
        response.result.value = json.dumps(told).encode()
        return response


@contextmanager
def telling(port: int = 0) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(2))
    bridge.add_BridgeServiceServicer_to_server(Telling(), server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield bound
    finally:
        server.stop(None).wait()


if __name__ == "__main__":
    with telling(int(sys.argv[1])) as ready:
        print(f"GRPC_READY:{ready}", flush=True)
        threading.Event().wait()
