"""The rpcs of the second service that run commands: changes of constraints, and rules."""

from typing import Any, Final

from google.protobuf.message import Message

from dspex_persist.state import commands
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as pb
from dspex_persist.state.bridge.incoming import Call
from dspex_persist.state.bridge.rpcs.base import Rpc, Trailer
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Rule, Value


def _constrain_request(command: commands.ConstrainVariable) -> Message:
    value = command.value
    return pb.ConstrainVariableRequest(
        session_id=command.session_id,
        variable_identifier=command.identifier,
        constraints_json=command.constraints,
        value=pb.Value(json=value.json, binary=value.binary) if value is not None else None,
        metadata=command.metadata,
        expected_version=command.expected_version,
    )


def _constrain_command(request: pb.ConstrainVariableRequest, call: Call) -> commands.ConstrainVariable:
    value = request.value
    binary = value.binary if value.HasField("binary") else None
    return commands.ConstrainVariable(
        request.session_id,
        request.variable_identifier,
        request.constraints_json,
        Value(value.json, binary) if request.HasField("value") else None,
        call.metadata(request.metadata),
        request.expected_version if request.HasField("expected_version") else None,
    )


def _size(request: pb.ConstrainVariableRequest, _: Limits) -> int:
    return len(request.constraints_json) + len(request.value.json) + len(request.value.binary)


def _list_response(rules: tuple[Rule, ...], _: Call) -> Message:
    messages = (pb.Rule(name=each.name, expression=each.expression, description=each.description) for each in rules)
    return pb.ListRulesResponse(rules=messages)


def _rules_of(_command: commands.ListRules, response: pb.ListRulesResponse, _: Trailer) -> tuple[Rule, ...]:
    return tuple(Rule(each.name, each.expression, each.description) for each in response.rules)


RPCS: Final[tuple[Rpc[Any, Any], ...]] = (
    Rpc(
        command=commands.ConstrainVariable,
        request_of=_constrain_request,
        command_of=_constrain_command,
        response_of=lambda version, _: pb.ConstrainVariableResponse(version=version),
        result_of=lambda _, response, __: response.version,
        size_of=_size,
        beside=True,
    ),
    Rpc(
        command=commands.AddRule,
        request_of=lambda command: pb.AddRuleRequest(
            session_id=command.session_id,
            name=command.name,
            expression=command.expression,
            description=command.description,
            replace=command.replace,
        ),
        command_of=lambda request, _: commands.AddRule(
            request.session_id, request.name, request.expression, request.description, request.replace
        ),
        response_of=lambda _, __: pb.AddRuleResponse(),
        result_of=lambda _, __, ___: None,
        beside=True,
    ),
    Rpc(
        command=commands.RemoveRule,
        request_of=lambda command: pb.RemoveRuleRequest(session_id=command.session_id, name=command.name),
        command_of=lambda request, _: commands.RemoveRule(request.session_id, request.name),
        response_of=lambda _, __: pb.RemoveRuleResponse(),
        result_of=lambda _, __, ___: None,
        beside=True,
    ),
    Rpc(
        command=commands.ListRules,
        request_of=lambda command: pb.ListRulesRequest(session_id=command.session_id),
        command_of=lambda request, _: commands.ListRules(request.session_id),
        response_of=_list_response,
        result_of=_rules_of,
        beside=True,
    ),
)
