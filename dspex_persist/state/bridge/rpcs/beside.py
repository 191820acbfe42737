"""The rpcs of commands that the bridge protocol lacks. The second service has them."""

from typing import Any, Final

from google.protobuf.message import Message

from dspex_persist.state import commands
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as pb
from dspex_persist.state.bridge.incoming import Call, check_count, check_together
from dspex_persist.state.bridge.rpcs import rules
from dspex_persist.state.bridge.rpcs.base import Rpc
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Value


def _definition_message(definition: commands.RegisterVariable) -> pb.Definition:
    return pb.Definition(
        name=definition.name,
        type=definition.type,
        value=pb.Value(json=definition.value.json, binary=definition.value.binary),
        constraints_json=definition.constraints,
        metadata=definition.metadata,
    )


def _register_request(command: commands.RegisterVariables) -> Message:
    definitions = [_definition_message(each) for each in command.definitions]
    return pb.RegisterVariablesRequest(session_id=command.session_id, definitions=definitions)


def _register_size(request: pb.RegisterVariablesRequest, limits: Limits) -> int:
    check_count("definitions", request.definitions, limits.batch_entries, "batch_entries")
    size_bytes = sum(len(each.value.json) + len(each.value.binary) for each in request.definitions)
    check_together("values", size_bytes, limits.session_size_bytes, "session_size_bytes")
    return size_bytes


def _register_command(request: pb.RegisterVariablesRequest, call: Call) -> commands.RegisterVariables:
    return commands.RegisterVariables(
        request.session_id,
        tuple(
            commands.RegisterVariable(
                request.session_id,
                each.name,
                each.type,
                Value(each.value.json, each.value.binary if each.value.HasField("binary") else None),
                each.constraints_json,
                call.metadata(each.metadata),
            )
            for each in request.definitions
        ),
    )


RPCS: Final[tuple[Rpc[Any, Any], ...]] = (
    Rpc(
        command=commands.RegisterVariables,
        request_of=_register_request,
        command_of=_register_command,
        size_of=_register_size,
        response_of=lambda ids, _: pb.RegisterVariablesResponse(variable_ids=ids),
        result_of=lambda _, response, _trailer: tuple(response.variable_ids),
        beside=True,
    ),
    Rpc(
        command=commands.RemoveDependency,
        request_of=lambda command: pb.RemoveDependencyRequest(
            session_id=command.session_id,
            from_variable=command.from_variable,
            to_variable=command.to_variable,
            dependency_type=command.dependency_type,
        ),
        command_of=lambda request, _: commands.RemoveDependency(
            request.session_id, request.from_variable, request.to_variable, request.dependency_type
        ),
        response_of=lambda removed, _: pb.RemoveDependencyResponse(removed=removed),
        result_of=lambda _, response, _trailer: response.removed,
        beside=True,
    ),
    Rpc(
        command=commands.GetDependencies,
        request_of=lambda command: pb.GetDependenciesRequest(
            session_id=command.session_id,
            variable_identifier=command.identifier,
            dependents=command.dependents,
            transitive=command.transitive,
        ),
        command_of=lambda request, _: commands.GetDependencies(
            request.session_id, request.variable_identifier, request.dependents, request.transitive
        ),
        response_of=lambda names, _: pb.GetDependenciesResponse(names=names),
        result_of=lambda _, response, _trailer: tuple(response.names),
        is_list=True,
        beside=True,
    ),
    *rules.RPCS,
)
