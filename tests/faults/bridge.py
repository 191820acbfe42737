"""An asynchronous client of the bridge for the fault tests, independent of the product except for the messages."""

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message_factory import GetMessageClass

from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from tests.deadline import within

CALL_TIMEOUT_S = within(20)
_SERVICE = pb.DESCRIPTOR.services_by_name["BridgeService"]
_REFUSALS = frozenset(
    {
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)


def wire(type_name: str, value: object) -> AnyMessage:
    """Return a value as clients send it."""
    return AnyMessage(type_url=f"type.googleapis.com/snakepit.{type_name}", value=json.dumps(value).encode())


def is_refusal(error: grpc.aio.AioRpcError) -> bool:
    """Return whether the server reports that it did nothing; after any other error the outcome is unknown."""
    return error.code() in _REFUSALS or (error.details() or "").startswith("nothing was written")


@dataclass(frozen=True, slots=True)
class ToolAnswer:
    """The outcome of an execution; `code` is "" if it committed."""

    code: str
    result: Any
    metadata: Mapping[str, str]
    message: str = ""

    @property
    def commit(self) -> tuple[str, int]:
        """The execution's id, and the commit that ended it."""
        return self.metadata["execution_id"], int(self.metadata["commit_sequence"])


def _request(session_id: str, tool: str, arguments: Mapping[str, object], key: str | None) -> pb.ExecuteToolRequest:
    request = pb.ExecuteToolRequest(session_id=session_id, tool_name=tool)
    for name, argument in arguments.items():
        request.parameters[name].CopyFrom(wire("any", argument))
    if key is not None:
        request.metadata["idempotency_key"] = key
    return request


class Bridge:
    """One channel to one server. Calls of it wait `timeout_s` for their answers, in seconds."""

    def __init__(self, port: int, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self._methods = {
            method.name: self._channel.unary_unary(
                f"/{_SERVICE.full_name}/{method.name}",
                request_serializer=GetMessageClass(method.input_type).SerializeToString,
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )
            for method in _SERVICE.methods
        }
        self._watch = self._channel.unary_stream(
            f"/{_SERVICE.full_name}/WatchVariables",
            request_serializer=pb.WatchVariablesRequest.SerializeToString,
            response_deserializer=pb.VariableUpdate.FromString,
        )
        self._stream = self._channel.unary_stream(
            f"/{_SERVICE.full_name}/ExecuteStreamingTool",
            request_serializer=pb.ExecuteToolRequest.SerializeToString,
            response_deserializer=pb.ToolChunk.FromString,
        )

    async def call(self, name: str, request: Any, key: str | None = None) -> Any:
        """Call a unary rpc, with an idempotency key; raises `grpc.aio.AioRpcError`."""
        metadata = (("x-dspex-idempotency-key", key),) if key is not None else ()
        return await self._methods[name](request, timeout=self._timeout_s, metadata=metadata)

    async def set(
        self,
        session_id: str,
        identifier: str,
        value: AnyMessage,
        metadata: Mapping[str, str],
        *,
        expected: int = 0,
        key: str | None = None,
    ) -> int:
        """Set a variable; returns the new version."""
        request = pb.SetVariableRequest(
            session_id=session_id,
            variable_identifier=identifier,
            value=value,
            metadata=metadata,
            expected_version=expected,
        )
        response = await self.call("SetVariable", request, key)
        return int(response.new_version)

    async def get(self, session_id: str, identifier: str) -> tuple[int, str]:
        """Return version and value, as JSON."""
        request = pb.GetVariableRequest(session_id=session_id, variable_identifier=identifier)
        variable = (await self.call("GetVariable", request)).variable
        return variable.version, variable.value.value.decode()

    async def execute(
        self,
        session_id: str,
        tool: str,
        arguments: Mapping[str, object],
        *,
        key: str | None = None,
        timeout_s: float | None = None,
    ) -> ToolAnswer:
        """Execute a tool and return its outcome."""
        request = _request(session_id, tool, arguments, key)
        response = await self._methods["ExecuteTool"](request, timeout=timeout_s or self._timeout_s)
        metadata = dict(response.metadata)
        result = json.loads(response.result.value) if response.success else None
        return ToolAnswer(metadata.get("error_code", ""), result, metadata, response.error_message)

    async def stream(
        self, session_id: str, tool: str, arguments: Mapping[str, object], *, key: str | None = None
    ) -> ToolAnswer:
        """Execute a streaming tool; the result is the list of its chunks."""
        chunks: list[Any] = []
        async for chunk in self._stream(_request(session_id, tool, arguments, key), timeout=self._timeout_s):
            if chunk.is_final:
                return ToolAnswer("", chunks, dict(chunk.metadata))
            chunks.append(json.loads(chunk.data))
        raise AssertionError("the stream ended without a last chunk")

    async def register(
        self, session_id: str, name: str, type_name: str, value: object, metadata: Mapping[str, str]
    ) -> str:
        """Register a variable and return its id."""
        request = pb.RegisterVariableRequest(
            session_id=session_id, name=name, type=type_name, initial_value=wire(type_name, value), metadata=metadata
        )
        return str((await self.call("RegisterVariable", request)).variable_id)

    async def begin(self, session_id: str) -> None:
        """Begin the session, or resume it."""
        await self.call("InitializeSession", pb.InitializeSessionRequest(session_id=session_id))

    async def list(self, session_id: str) -> list[Any]:
        """Return the variables of a session."""
        request = pb.ListVariablesRequest(session_id=session_id)
        return list((await self.call("ListVariables", request)).variables)

    def watch(self, session_id: str, after_sequence: int) -> AsyncIterator[Any]:
        """Return the updates after a commit."""
        call = self._watch(
            pb.WatchVariablesRequest(session_id=session_id),
            metadata=(("x-dspex-after-sequence", str(after_sequence)),),
        )
        return call.__aiter__()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()
