"""The rpcs of sessions: begin or resume, read, keep alive, end."""

from itertools import accumulate
from typing import Any, Final

from google.protobuf.message import Message

from dspex_persist import clock
from dspex_persist.state import commands
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.headers import LEFT_OUT, RESUMED
from dspex_persist.state.bridge.incoming import Call
from dspex_persist.state.bridge.rpcs.base import Rpc, Trailer
from dspex_persist.state.model import SessionSummary, SessionView, Variable
from dspex_persist.state.session_state import weight_of


def _begin_request(command: commands.InitializeSession) -> Message:
    request = pb.InitializeSessionRequest(session_id=command.session_id, metadata=command.metadata)
    if command.config:
        request.config.CopyFrom(pb.SessionConfig(**command.config))
    return request


def _begin_command(request: pb.InitializeSessionRequest, call: Call) -> commands.InitializeSession:
    config: dict[str, Any] = {}
    if request.HasField("config"):
        config = {
            "enable_caching": request.config.enable_caching,
            "cache_ttl_seconds": request.config.cache_ttl_seconds,
            "enable_telemetry": request.config.enable_telemetry,
        }
    return commands.InitializeSession(request.session_id, call.metadata(request.metadata), config)


def _begin_response(view: SessionView, call: Call) -> Message:
    # Without the tools, which the command does not know; the servicer adds them.
    initial = _fitting_variables(view.variables, call)
    if view.resumed:
        call.trail(RESUMED, "true")
    if len(initial) < len(view.variables):
        call.trail(LEFT_OUT, str(len(view.variables) - len(initial)))
    variables = {variable.name: codec.variable_message(variable) for variable in initial}
    return pb.InitializeSessionResponse(success=True, initial_variables=variables)


def _fitting_variables(variables: tuple[Variable, ...], call: Call) -> list[Variable]:
    """The variables that fit into a message; a session written under higher limits may have more."""
    most = max(call.limits.session_size_bytes, call.max_message_bytes * 2 // 3)
    weights = accumulate(map(weight_of, variables))
    return [variable for variable, weight in zip(variables, weights, strict=True) if weight <= most]


def _session_view(_: object, response: pb.InitializeSessionResponse, trailer: Trailer) -> SessionView:
    variables = sorted(map(codec.variable_of, response.initial_variables.values()), key=lambda v: v.name)
    return SessionView(resumed=trailer(RESUMED) is not None, variables=tuple(variables))


def _session_response(summary: SessionSummary, _: Call) -> Message:
    return pb.GetSessionResponse(
        session_id=summary.id,
        metadata=summary.metadata,
        created_at=codec.timestamp_of(summary.created_at),
        variable_count=summary.variable_count,
        tool_count=summary.tool_count,
    )


def _session_summary(_: object, response: pb.GetSessionResponse, _trailer: Trailer) -> SessionSummary:
    return SessionSummary(
        response.session_id,
        dict(response.metadata),
        codec.moment_of(response.created_at),
        response.variable_count,
        response.tool_count,
    )


INITIALIZE_SESSION: Final[Rpc[commands.InitializeSession, SessionView]] = Rpc(
    command=commands.InitializeSession,
    request_of=_begin_request,
    command_of=_begin_command,
    response_of=_begin_response,
    result_of=_session_view,
    instead=lambda command: commands.ResumeSession(command.session_id, command.metadata),
    log=lambda log, _, view: log.info("session resumed" if view.resumed else "session begun"),
)
RPCS: Final[tuple[Rpc[Any, Any], ...]] = (
    INITIALIZE_SESSION,
    Rpc(
        command=commands.GetSession,
        request_of=lambda command: pb.GetSessionRequest(session_id=command.session_id),
        command_of=lambda request, _: commands.GetSession(request.session_id),
        response_of=_session_response,
        result_of=_session_summary,
    ),
    Rpc(
        command=commands.Heartbeat,
        request_of=lambda command: pb.HeartbeatRequest(session_id=command.session_id),
        command_of=lambda request, _: commands.Heartbeat(request.session_id),
        response_of=lambda valid, _: pb.HeartbeatResponse(
            server_time=codec.timestamp_of(clock.now()), session_valid=valid
        ),
        result_of=lambda _, response, _trailer: response.session_valid,
    ),
    Rpc(
        command=commands.CleanupSession,
        request_of=lambda command: pb.CleanupSessionRequest(session_id=command.session_id),
        command_of=lambda request, _: commands.CleanupSession(request.session_id),
        response_of=lambda cleaned, _: pb.CleanupSessionResponse(success=True, resources_cleaned=cleaned),
        result_of=lambda _, response, _trailer: response.resources_cleaned,
        log=lambda log, _, cleaned: log.info("session ended", variables=cleaned),
    ),
)
