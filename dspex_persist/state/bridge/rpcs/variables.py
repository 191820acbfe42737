"""The rpcs of variables: register, read, write, delete, list the history, roll back."""

from dataclasses import replace
from typing import Any, Final

from google.protobuf.message import Message

from dspex_persist.state import commands
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.headers import AS_STATUS, BEFORE_VERSION, ERRORS, EXPECTED_VERSION
from dspex_persist.state.bridge.incoming import Call, check_count, check_together
from dspex_persist.state.bridge.rpcs.base import Rpc, Trailer, identified
from dspex_persist.state.commands.variables import DEFAULT_HISTORY
from dspex_persist.state.errors import InvalidArgumentError, StateError, quote
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import BatchOutcome, Value, VariablesFound, VariableVersion


def _untyped(value: Value) -> Any:
    """The message for a value whose type only the server knows; "string" only means that it is JSON."""
    return codec.any_of("string", value)


def _identifiers(request: Any, call: Call) -> tuple[str, ...]:
    identifiers = request.variable_identifiers
    check_count("variables in the batch", identifiers, call.limits.batch_entries, "batch_entries")
    return tuple(identifiers)


def _register_request(command: commands.RegisterVariable) -> Message:
    return pb.RegisterVariableRequest(
        session_id=command.session_id,
        name=command.name,
        type=command.type,
        initial_value=codec.any_of(command.type, command.value),
        constraints_json=command.constraints,
        metadata=command.metadata,
        initial_binary_value=command.value.binary or b"",
    )


def _register_command(request: pb.RegisterVariableRequest, call: Call) -> commands.RegisterVariable:
    return commands.RegisterVariable(
        request.session_id,
        request.name,
        request.type,
        codec.value_of(request.name, request.initial_value, request.initial_binary_value, call.limits),
        request.constraints_json,
        call.metadata(request.metadata),
    )


def _set_request(command: commands.SetVariable) -> Message:
    return pb.SetVariableRequest(
        session_id=command.session_id,
        variable_identifier=command.identifier,
        value=_untyped(command.value),
        metadata=command.metadata,
        expected_version=command.expected_version or 0,
        binary_value=command.value.binary or b"",
    )


def publish_request(command: commands.PublishVariable) -> Message:
    """Return the request of SetVariable for what an execution publishes, at a worker's address."""
    return pb.SetVariableRequest(
        session_id=command.session_id,
        variable_identifier=command.identifier,
        value=_untyped(command.value),
        metadata=command.metadata,
        binary_value=command.value.binary or b"",
    )


def _set_headers(command: commands.SetVariable) -> dict[str, str]:
    expected = command.expected_version
    return {} if expected is None or expected < 0 else {EXPECTED_VERSION: str(expected)}


def _set_command(request: pb.SetVariableRequest, call: Call) -> commands.SetVariable:
    identifier = request.variable_identifier
    return commands.SetVariable(
        request.session_id,
        identifier,
        codec.value_of(identifier, request.value, request.binary_value, call.limits),
        call.metadata(request.metadata),
        _expected_version(request, call),
    )


def _expected_version(request: pb.SetVariableRequest, call: Call) -> int | None:
    """The version in the header, or else in the message, where 0 means any version."""
    stated, in_message = call.number(EXPECTED_VERSION), request.expected_version or None
    if stated is not None and in_message not in (None, stated):
        raise InvalidArgumentError(EXPECTED_VERSION, f"{stated} is not the request's expected_version, {in_message}")
    return in_message if stated is None else stated


def _batch_request(command: commands.SetVariables) -> Message:
    return pb.BatchSetVariablesRequest(
        session_id=command.session_id,
        updates={identifier: _untyped(value) for identifier, value in command.updates.items()},
        metadata=command.metadata,
        atomic=command.atomic,
        binary_updates={
            identifier: value.binary for identifier, value in command.updates.items() if value.binary is not None
        },
    )


def _batch_headers(command: commands.SetVariables) -> dict[str, str]:
    return {ERRORS: AS_STATUS} if command.raises else {}


def _batch_size(request: pb.BatchSetVariablesRequest, limits: Limits) -> int:
    binary = request.binary_updates
    for entries in (request.updates, binary):
        check_count("updates in the batch", entries, limits.batch_entries, "batch_entries")
    size_bytes = sum(len(wire.value) for wire in request.updates.values()) + sum(map(len, binary.values()))
    check_together("updates", size_bytes, limits.session_size_bytes, "session_size_bytes")
    return size_bytes


def _batch_command(request: pb.BatchSetVariablesRequest, call: Call) -> commands.SetVariables:
    """The command with the valid values, and the errors of the others."""
    binary = request.binary_updates
    for identifier in binary:
        if identifier not in request.updates:
            reason = f"{quote(identifier)} has binary content but no entry in updates that describes it"
            raise InvalidArgumentError("binary_updates", reason)
    updates: dict[str, Value] = {}
    refused: dict[str, StateError] = {}
    for identifier, wire in request.updates.items():
        try:
            updates[identifier] = codec.value_of(identifier, wire, binary.get(identifier, b""), call.limits)
        except StateError as error:
            refused[identifier] = error
    raises = call.header(ERRORS) == AS_STATUS
    if refused and request.atomic and raises:
        raise refused[min(refused)]
    messages = {identifier: error.sentence for identifier, error in refused.items()}
    metadata = call.metadata(request.metadata)
    return commands.SetVariables(request.session_id, updates, metadata, request.atomic, messages, raises)


def _variables_found(
    command: commands.GetVariables, response: pb.BatchGetVariablesResponse, _: Trailer
) -> VariablesFound:
    # In the order of the request, because the map in the message is unordered.
    messages = response.variables
    variables = {
        identifier: codec.variable_of(messages[identifier])
        for identifier in command.identifiers
        if identifier in messages
    }
    return VariablesFound(variables, tuple(response.missing_variables))


def _found_response(found: VariablesFound, _: Call) -> Message:
    variables = {identifier: codec.variable_message(variable) for identifier, variable in found.variables.items()}
    return pb.BatchGetVariablesResponse(variables=variables, missing_variables=found.missing)


def _history_headers(command: commands.GetVariableHistory) -> dict[str, str]:
    return {} if command.before is None else {BEFORE_VERSION: str(command.before)}


def _history_command(request: pb.GetVariableHistoryRequest, call: Call) -> commands.GetVariableHistory:
    before, most_bytes = call.number(BEFORE_VERSION), call.limits.history_size_bytes
    return commands.GetVariableHistory(
        request.session_id, request.variable_identifier, request.limit, before, most_bytes
    )


def _history_response(history: list[VariableVersion], call: Call) -> Message:
    size_bytes = sum(version.size_bytes for version in history)
    if history and history[-1].version > 0 and size_bytes >= call.limits.history_size_bytes:
        call.trail(BEFORE_VERSION, str(history[-1].version))
    return pb.GetVariableHistoryResponse(entries=map(codec.history_entry, history))


def _rest_of_history(
    command: commands.GetVariableHistory, received: list[VariableVersion], trailer: Trailer
) -> commands.GetVariableHistory | None:
    """The command for the versions that the server left out because of their size; None if there is nothing left."""
    below, left = trailer(BEFORE_VERSION), (command.limit or DEFAULT_HISTORY) - len(received)
    return None if below is None or left <= 0 else replace(command, limit=left, before=int(below))


RPCS: Final[tuple[Rpc[Any, Any], ...]] = (
    Rpc(
        command=commands.RegisterVariable,
        request_of=_register_request,
        command_of=_register_command,
        response_of=lambda variable_id, _: pb.RegisterVariableResponse(success=True, variable_id=variable_id),
        result_of=lambda _, response, _trailer: response.variable_id,
        size_of=lambda request, _: len(request.initial_value.value),
    ),
    Rpc(
        command=commands.GetVariable,
        request_of=identified(pb.GetVariableRequest, bypass_cache="bypass_cache"),
        command_of=lambda request, _: commands.GetVariable(
            request.session_id, request.variable_identifier, request.bypass_cache
        ),
        response_of=lambda variable, call: pb.GetVariableResponse(
            variable=codec.variable_message(variable), from_cache=call.from_memory
        ),
        result_of=lambda _, response, _trailer: codec.variable_of(response.variable),
    ),
    Rpc(
        command=commands.GetVariables,
        request_of=lambda command: pb.BatchGetVariablesRequest(
            session_id=command.session_id,
            variable_identifiers=command.identifiers,
            bypass_cache=command.bypass_cache,
        ),
        command_of=lambda request, call: commands.GetVariables(
            request.session_id, _identifiers(request, call), request.bypass_cache
        ),
        response_of=_found_response,
        result_of=_variables_found,
        is_list=True,
    ),
    Rpc(
        command=commands.SetVariable,
        request_of=_set_request,
        command_of=_set_command,
        response_of=lambda version, _: pb.SetVariableResponse(success=True, new_version=version),
        result_of=lambda _, response, _trailer: response.new_version,
        headers_of=_set_headers,
        size_of=lambda request, _: len(request.value.value),
    ),
    Rpc(
        command=commands.SetVariables,
        request_of=_batch_request,
        command_of=_batch_command,
        response_of=lambda outcome, _: pb.BatchSetVariablesResponse(
            success=outcome.success, errors=outcome.errors, new_versions=outcome.versions
        ),
        result_of=lambda _, response, _trailer: BatchOutcome(
            response.success, dict(response.new_versions), dict(response.errors)
        ),
        headers_of=_batch_headers,
        size_of=_batch_size,
    ),
    Rpc(
        command=commands.ListVariables,
        request_of=lambda command: pb.ListVariablesRequest(session_id=command.session_id, pattern=command.pattern),
        command_of=lambda request, _: commands.ListVariables(request.session_id, request.pattern),
        response_of=lambda variables, _: pb.ListVariablesResponse(variables=map(codec.variable_message, variables)),
        result_of=lambda _, response, _trailer: tuple(map(codec.variable_of, response.variables)),
        is_list=True,
    ),
    Rpc(
        command=commands.DeleteVariable,
        request_of=identified(pb.DeleteVariableRequest),
        command_of=lambda request, _: commands.DeleteVariable(request.session_id, request.variable_identifier),
        response_of=lambda _, _call: pb.DeleteVariableResponse(success=True),
        result_of=lambda *_: None,
    ),
    Rpc(
        command=commands.RollbackVariable,
        request_of=identified(pb.RollbackVariableRequest, target_version="target_version"),
        command_of=lambda request, _: commands.RollbackVariable(
            request.session_id, request.variable_identifier, request.target_version
        ),
        response_of=lambda variable, _: pb.RollbackVariableResponse(
            success=True, variable=codec.variable_message(variable)
        ),
        result_of=lambda _, response, _trailer: codec.variable_of(response.variable),
    ),
    Rpc(
        command=commands.GetVariableHistory,
        request_of=identified(pb.GetVariableHistoryRequest, limit="limit"),
        command_of=_history_command,
        response_of=_history_response,
        result_of=lambda _, response, _trailer: list(map(codec.version_of, response.entries)),
        headers_of=_history_headers,
        rest_of=_rest_of_history,
    ),
)
