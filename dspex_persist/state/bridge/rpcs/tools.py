"""Tools: execute, register, list."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import Message

from dspex_persist.state import commands
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.headers import ALL_TOOLS, ASKED_BY, TIMEOUT_S, TOOLS
from dspex_persist.state.bridge.incoming import Call, check_count, check_together
from dspex_persist.state.bridge.rpcs.base import Rpc, Trailer
from dspex_persist.state.bridge.status import error_in, facts_of, text_of
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import (
    ExecutionConflictError,
    InvalidArgumentError,
    InvalidValueError,
    PoolSaturatedError,
    QueueTimeoutError,
    RemoteToolError,
    StateError,
    ToolArgumentError,
    ToolFailedError,
    ToolInterruptedError,
    ToolTimedOutError,
    WorkerExitedError,
    WorkerTimeoutError,
    quote,
)
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import ExecutionStatus, ToolOutcome, ToolSpec, Value
from dspex_persist.state.tools.session import current_execution_id
from dspex_persist.state.unit_of_work import UnitOfWork

_STATUSES: Final[Mapping[str, ExecutionStatus]] = {
    ToolFailedError.error_code: ExecutionStatus.FAILED,
    RemoteToolError.error_code: ExecutionStatus.FAILED,
    PoolSaturatedError.error_code: ExecutionStatus.FAILED,
    QueueTimeoutError.error_code: ExecutionStatus.FAILED,
    WorkerExitedError.error_code: ExecutionStatus.FAILED,
    WorkerTimeoutError.error_code: ExecutionStatus.TIMED_OUT,
    ExecutionConflictError.error_code: ExecutionStatus.CONFLICT,
    ToolTimedOutError.error_code: ExecutionStatus.TIMED_OUT,
    ToolInterruptedError.error_code: ExecutionStatus.INTERRUPTED,
    "CANCELLED": ExecutionStatus.CANCELLED,
}
"""The status of an execution, by the error code in the response. With any other code, no execution began."""


# Execute


def _execute_request(command: commands.ExecuteTool) -> Message:
    parameters = command.parameters
    return pb.ExecuteToolRequest(
        session_id=command.session_id,
        tool_name=command.tool,
        parameters={name: codec.loose_any_of(value) for name, value in parameters.items()},
        metadata=command.metadata,
        binary_parameters={name: value.binary for name, value in parameters.items() if value.binary is not None},
    )


def _execute_headers(command: commands.ExecuteTool) -> dict[str, str]:
    timeout_s = None if command.timeout_s is None else repr(command.timeout_s)
    headers = {TIMEOUT_S: timeout_s, ASKED_BY: current_execution_id()}
    return {name: text for name, text in headers.items() if text is not None}


def _size_of(request: Any, limits: Limits) -> int:
    wires, binaries = request.parameters, _binaries(request)
    for entries in (wires, binaries):
        check_count("parameters", entries, limits.batch_entries, "batch_entries")
    size_bytes = sum(len(wire.value) for wire in wires.values()) + sum(map(len, binaries.values()))
    check_together("parameters", size_bytes, limits.execution_size_bytes, "execution_size_bytes")
    return size_bytes


def _binaries(request: Any) -> Mapping[str, bytes]:
    """The binary parameters; the request of ExecuteElixirTool has no field for them."""
    return getattr(request, "binary_parameters", {})


def _execute_command(request: Any, call: Call) -> commands.ExecuteTool:
    call.style = codec.style_of(request.parameters.values())
    return commands.ExecuteTool(
        request.session_id,
        request.tool_name,
        parameters_of(request, call.limits),
        call.metadata(request.metadata),
        call.seconds_left(),
    )


def parameters_of(request: Any, limits: Limits) -> dict[str, Value]:
    """Return the parameters in a request to execute a tool; `ToolArgumentError` if one is not a value."""
    tool, wires, binaries = request.tool_name, request.parameters, _binaries(request)
    for name in binaries:
        if name not in wires:
            reason = "there is binary content, but no entry in parameters that describes it"
            raise ToolArgumentError(tool, name, reason)
    parameters: dict[str, Value] = {}
    for name, wire in wires.items():
        try:
            parameters[name] = codec.value_of(name, wire, binaries.get(name, b""), limits)
        except InvalidValueError as error:
            raise ToolArgumentError(tool, name, error.reason) from error
    return parameters


def _execute_response(response: Any, outcome: ToolOutcome, call: Call) -> Message:
    response.success = outcome.success
    response.error_message = "" if outcome.error is None else text_of(outcome.error)
    response.metadata.update(facts(outcome))
    response.execution_time_ms = round((time.monotonic() - call.began) * 1000)
    if outcome.result is not None:
        result_type = "" if outcome.streamed else outcome.result_type
        response.result.CopyFrom(codec.loose_any_of(outcome.result, call.style, result_type))
    message: Message = response
    return message


def facts(outcome: ToolOutcome) -> dict[str, str]:
    """Return the metadata with which the response reports an execution."""
    metadata = {
        "execution_id": outcome.execution_id,
        "commit_sequence": "" if outcome.commit_sequence is None else str(outcome.commit_sequence),
        "attempts": str(outcome.attempts),
    }
    if outcome.error_code:
        metadata["error_code"] = outcome.error_code
        metadata["error_fields"] = facts_of(outcome.error)
    if outcome.repeated:
        metadata["repeated"] = "true"
    if outcome.streamed:
        metadata["streamed"] = "true"
    if outcome.result_type and outcome.success:
        metadata["result_type"] = outcome.result_type
    return metadata


def _outcome(_: commands.ExecuteTool, response: Any, _trailer: Trailer) -> ToolOutcome:
    metadata = response.metadata
    execution_id, sequence, code = metadata["execution_id"], metadata["commit_sequence"], metadata["error_code"]
    return ToolOutcome(
        ExecutionStatus.COMMITTED if response.success else _STATUSES.get(code),
        codec.value_in(response.result) if response.success else None,
        None if response.success else _error(response),
        code,
        execution_id,
        int(sequence) if sequence else None,
        int(metadata["attempts"] or 0),
        repeated="repeated" in metadata,
        streamed="streamed" in metadata,
        result_type=metadata["result_type"],
    )


def _error(response: Any) -> StateError:
    metadata = response.metadata
    error = error_in(metadata["error_code"], metadata["error_fields"])
    return error or ToolFailedError(metadata["execution_id"], response.error_message)


EXECUTE_TOOL: Final[Rpc[commands.ExecuteTool, ToolOutcome]] = Rpc(
    command=commands.ExecuteTool,
    request_of=_execute_request,
    headers_of=_execute_headers,
    size_of=_size_of,
    command_of=_execute_command,
    response_of=lambda outcome, call: _execute_response(pb.ExecuteToolResponse(), outcome, call),
    result_of=_outcome,
)
EXECUTE_ELIXIR_TOOL: Final[Rpc[commands.ExecuteTool, ToolOutcome]] = Rpc(
    command=commands.ExecuteTool,
    rpc="ExecuteElixirTool",
    request_of=lambda command: pb.ExecuteElixirToolRequest(
        session_id=command.session_id,
        tool_name=command.tool,
        parameters={name: codec.loose_any_of(value) for name, value in command.parameters.items()},
        metadata=command.metadata,
    ),
    headers_of=_execute_headers,
    size_of=_size_of,
    command_of=_execute_command,
    response_of=lambda outcome, call: _execute_response(pb.ExecuteElixirToolResponse(), outcome, call),
    result_of=_outcome,
)


# Register


def _register_size(request: pb.RegisterToolsRequest, limits: Limits) -> int:
    check_count("tools", request.tools, limits.tools_per_session, "tools_per_session")
    for each in request.tools:
        check_count("parameters of a tool", each.parameters, limits.batch_entries, "batch_entries")
        check_count("metadata entries", each.metadata, limits.metadata_entries, "metadata_entries")
        what, most = f"description of tool {quote(each.name)}", limits.constraints_size_bytes
        check_together(what, each.ByteSize(), most, "constraints_size_bytes")
    return request.ByteSize()


def _register_command(request: pb.RegisterToolsRequest, call: Call) -> commands.RegisterTools:
    tools = tuple(codec.registered_tool(each, request.worker_id, call.limits) for each in request.tools)
    names = {tool.spec.name: tool for tool in tools}
    if len(names) < len(tools):
        twice = next(tool.spec.name for tool in tools if names[tool.spec.name] is not tool)
        raise InvalidArgumentError("tools", f"{quote(twice)} occurs twice")
    return commands.RegisterTools(request.session_id, request.worker_id, tools)


def _log_registration(log: Any, command: commands.RegisterTools, tool_ids: Mapping[str, str]) -> None:
    if not command.tools:
        log.info("tools unregistered", worker=command.worker_id)
        return
    log.info("tools registered", tools=len(tool_ids))
    left_out = sorted({tool.spec.name for tool in command.tools} - set(tool_ids))
    if left_out:
        log.warning("tools not registered: the server has tools of these names", names=left_out)


REGISTER_TOOLS: Final[Rpc[commands.RegisterTools, dict[str, str]]] = Rpc(
    command=commands.RegisterTools,
    request_of=lambda command: pb.RegisterToolsRequest(
        session_id=command.session_id,
        worker_id=command.worker_id,
        tools=map(codec.registration_message, command.tools),
    ),
    size_of=_register_size,
    command_of=_register_command,
    response_of=lambda tool_ids, _: pb.RegisterToolsResponse(success=True, tool_ids=tool_ids),
    result_of=lambda _, response, _trailer: dict(response.tool_ids),
    log=_log_registration,
)


# List


@dataclass(frozen=True, slots=True)
class GetExposedElixirTools(Command[tuple[ToolSpec, ...]]):
    """The request of `list_tools`, which only the server can answer; with `every`, it includes unexposed tools."""

    every: bool = True

    def apply(self, uow: UnitOfWork) -> tuple[ToolSpec, ...]:
        raise NotImplementedError("this command is only sent to servers")


LIST_TOOLS: Final[Rpc[GetExposedElixirTools, Any]] = Rpc(
    command=GetExposedElixirTools,
    request_of=lambda command: pb.GetExposedElixirToolsRequest(session_id=command.session_id),
    headers_of=lambda command: {TOOLS: ALL_TOOLS} if command.every else {},
    command_of=lambda request, call: GetExposedElixirTools(request.session_id, call.header(TOOLS) == ALL_TOOLS),
    # The tools are messages already, because only the servicer knows where each one runs.
    response_of=lambda tools, _: pb.GetExposedElixirToolsResponse(tools=tools),
    result_of=lambda _, response, _trailer: tuple(map(codec.tool_of, response.tools)),
)


RPCS: Final[tuple[Rpc[Any, Any], ...]] = (EXECUTE_TOOL, EXECUTE_ELIXIR_TOOL, REGISTER_TOOLS, LIST_TOOLS)
