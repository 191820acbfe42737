"""Dependencies between variables, and the locks of optimizers."""

from typing import Any, Final

from dspex_persist.state import commands
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.rpcs.base import Rpc, identified

RPCS: Final[tuple[Rpc[Any, Any], ...]] = (
    Rpc(
        command=commands.AddDependency,
        request_of=lambda command: pb.AddDependencyRequest(
            session_id=command.session_id,
            from_variable=command.from_variable,
            to_variable=command.to_variable,
            dependency_type=command.dependency_type,
        ),
        command_of=lambda request, _: commands.AddDependency(
            request.session_id, request.from_variable, request.to_variable, request.dependency_type
        ),
        response_of=lambda _, _call: pb.AddDependencyResponse(success=True),
        result_of=lambda *_: None,
    ),
    Rpc(
        command=commands.StartOptimization,
        request_of=identified(pb.StartOptimizationRequest, optimizer_id="optimizer_id", optimizer_config="config"),
        command_of=lambda request, call: commands.StartOptimization(
            request.session_id,
            request.variable_identifier,
            request.optimizer_id,
            call.metadata(request.optimizer_config),
        ),
        response_of=lambda optimization_id, _: pb.StartOptimizationResponse(
            success=True, optimization_id=optimization_id
        ),
        result_of=lambda _, response, _trailer: response.optimization_id,
    ),
    Rpc(
        command=commands.StopOptimization,
        request_of=identified(pb.StopOptimizationRequest, force="force"),
        command_of=lambda request, _: commands.StopOptimization(
            request.session_id, request.variable_identifier, request.force
        ),
        # The response needs the variable's type, which the value alone lacks.
        first=lambda command: commands.GetVariable(command.session_id, command.identifier),
        response_of=lambda final, call: pb.StopOptimizationResponse(
            success=True, final_value=codec.any_of(call.first.type, final)
        ),
        result_of=lambda _, response, _trailer: codec.value_in(response.final_value),
    ),
)
