"""BridgedState: session state that another process keeps, reached by the unified bridge protocol."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from dspex_persist.infra.channels import channel_options
from dspex_persist.infra.listen import target_of
from dspex_persist.infra.user import user_name
from dspex_persist.state import arguments, commands, values
from dspex_persist.state.commands import Command
from dspex_persist.state.commands.variables import DEFAULT_HISTORY
from dspex_persist.state.errors import (
    EngineClosedError,
    InvalidArgumentError,
    LimitExceededError,
    OutcomeUnknownError,
    ShuttingDownError,
    StateError,
    ToolFailedError,
    UnsupportedError,
)
from dspex_persist.state.model import (
    BatchOutcome,
    ExecutionStatus,
    Origin,
    PrunePolicy,
    PruneReport,
    SessionSummary,
    SessionView,
    Source,
    ToolOutcome,
    ToolSpec,
    Update,
    Value,
    Variable,
    VariablesFound,
    VariableVersion,
)
from dspex_persist.state.provider import (
    Capability,
    Progress,
    StateProvider,
    StreamsTools,
    check_watch,
    fault_of,
    silent,
)
from dspex_persist.state.rpc import audit_client, codec
from dspex_persist.state.rpc.audit_client import BridgedAudit
from dspex_persist.state.rpc.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.rpc.headers import (
    ACTOR,
    AFTER_SEQUENCE,
    ALL_TOOLS,
    ARGUMENTS,
    ASKED_BY,
    BEFORE_VERSION,
    BINARY,
    EXECUTION_ID,
    EXPECTED_VERSION,
    IDEMPOTENCY_KEY,
    INITIAL_VALUES,
    OPTIMIZER_ID,
    POSITION,
    RESUMED,
    SOURCE,
    TIMEOUT_S,
    TOOLS,
)
from dspex_persist.state.rpc.inherited import OneProcess, refuse_lost
from dspex_persist.state.rpc.status import error_in, error_of_call, is_told, never_sent
from dspex_persist.state.tools.session import asking_execution
from dspex_persist.state.unit_of_work import UnitOfWork
from dspex_persist.state.watch import Watch

R = TypeVar("R")
_Headers = tuple[tuple[str, str | bytes], ...]

_BUFFERED_UPDATES = 256
_HEADER_LENGTH = 255
_VERDICT_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
# A channel that lost its server tries again this often at first, so that a restart is noticed at once. The second one
# says how long an attempt may take, whatever its name: on a loaded machine a tenth of a second is too short.
_RECONNECTING = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2000),
)
_CONNECTION_LOST = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
)


def _nothing() -> None:
    pass


class BridgedState(StateProvider, StreamsTools):
    """Session state behind a gRPC target such as "127.0.0.1:50051" or "unix:/run/dspex.sock", or a URL of `connect`.

    A call that is not answered within `timeout_s` fails. If it wrote, and had an idempotency key, it is repeated with
    it for as long after the connection was lost, and so happens once; without a key its outcome is unknown.

    With `execution_id` every call on variables and tools is part of that running execution's transaction: this is how
    the process that runs a registered tool reaches it (it is told the id in `x-dspex-execution-id`).
    """

    capabilities = frozenset({Capability.DURABLE, Capability.REMOTE, Capability.AUDIT})

    def __init__(
        self, target: str, *, timeout_s: float = 30.0, actor: str | None = None, execution_id: str | None = None
    ) -> None:
        target = self._target = target_of(arguments.text("target", target))
        self._timeout_s = arguments.timeout("timeout_s", timeout_s)
        self._execution_id = execution_id
        self._actor = arguments.text("actor", actor) if actor else f"user:{user_name()}"
        refuse_lost(target)
        self._channel = grpc.insecure_channel(target, options=(*channel_options(target), *_RECONNECTING))
        self._here = OneProcess(target, self._channel)
        self._calls = {method.name: self._stub(method) for method in codec.BRIDGE_SERVICE.methods}
        self._closed = False

    def _stub(self, method: Any) -> Any:
        path = f"/{codec.BRIDGE_SERVICE.full_name}/{method.name}"
        request, response = (getattr(pb, kind.name) for kind in (method.input_type, method.output_type))
        make = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
        return make(path, request_serializer=request.SerializeToString, response_deserializer=response.FromString)

    def submit(self, command: Command[R], origin: Origin | None = None) -> Future[R]:
        """Send the command; the future resolves with the answer."""
        fault = self._here.refusal or (EngineClosedError() if self._closed else fault_of(command, origin))
        if fault is not None:
            return _failed(fault)
        wire = _WIRES.get(type(command))
        if wire is None:
            return _failed(UnsupportedError(f"{command.cause} over the bridge"))
        asked_by = origin or self.default_origin(command.cause)
        return _Attempt(
            self._calls[wire.rpc or command.cause],
            wire,
            command,
            partial(self._headers_of, asked_by, command),
            self._patience_s(command),
            self._timeout_s,
            self._target,
            repeatable=asked_by.idempotency_key is not None,
        ).start()

    def watch(
        self, session_id: str, identifiers: Sequence[str] = (), *, after_sequence: int | None = None
    ) -> "BridgedWatch":
        """Watch variables; see `StateProvider.watch`."""
        self._check_open()
        identifiers = check_watch(session_id, identifiers, after_sequence)
        try:
            request = pb.WatchVariablesRequest(
                session_id=session_id, variable_identifiers=identifiers, include_initial_values=after_sequence is None
            )
        except ValueError as error:
            raise InvalidArgumentError("request", str(error)) from error
        headers = () if after_sequence is None else ((AFTER_SEQUENCE, str(after_sequence)),)
        call = self._calls["WatchVariables"](request, metadata=headers)
        return BridgedWatch(call, self._timeout_s, self._target, self._error_of)

    def list_tools(self, session_id: str = "") -> tuple[ToolSpec, ...]:
        """The server's tools, and those that the session's workers have registered there."""
        return self.run(_ListAllTools(session_id))

    def stream_tool(
        self,
        session_id: str,
        tool: str,
        parameters: Mapping[str, object] | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> Iterator[object]:
        """See `StreamsTools`."""
        self._check_open()
        command = commands.ExecuteTool(session_id, tool, values.encode_arguments(parameters or {}), metadata or {})
        command.check()
        origin = self.default_origin("ExecuteStreamingTool")
        call = self._calls["ExecuteStreamingTool"](_execute_tool(command), metadata=self._headers_of(origin, command))
        try:
            for chunk in call:
                if not (chunk.is_final and chunk.data == b"null"):
                    yield values.decode_loosely(Value(chunk.data.decode()), chunk.metadata["result_type"])
        except grpc.RpcError:
            raise self._error_of(call) from None
        finally:
            call.cancel()

    def audit(self, *, reveal: bool = False, let_go: Callable[[], None] = _nothing) -> BridgedAudit:
        """The server's history, to be asked; `let_go` is called when it is closed.

        The server shows values of sensitive variables only if it was started with `audit_reveal`.
        """
        self._check_open()
        reveal = arguments.flag("reveal", reveal)
        return BridgedAudit(self._channel, self._target, timeout_s=self._timeout_s, reveal=reveal, let_go=let_go)

    def prune(self, policy: PrunePolicy, *, confirm: bool, progress: Progress = silent) -> PruneReport:
        """Have the server prune; see `StateProvider.prune`. It takes as long as it takes."""
        self._check_open()
        return audit_client.prune(self._channel, self._target, policy, confirm=confirm, progress=progress)

    def _patience_s(self, command: Command[Any]) -> float:
        asked_s = command.timeout_s if isinstance(command, commands.ExecuteTool) else None
        # The server ends the tool when its time is up, and has a moment more to say so.
        return self._timeout_s if asked_s is None else asked_s + _VERDICT_S

    def _headers_of(self, origin: Origin, command: Command[Any]) -> _Headers:
        return _headers_of(origin, command, self._execution_id)

    def default_origin(self, cause: str, idempotency_key: str | None = None) -> Origin:
        """The user of this process."""
        if idempotency_key is not None:
            idempotency_key = arguments.text("idempotency_key", idempotency_key)
        return Origin(self._actor, cause, Source.PYTHON, idempotency_key)

    def close(self) -> None:
        """Close the channel; the server goes on. In a child of the process that has it, it is left alone."""
        self._closed = True
        if self._here.refusal is None:
            self._channel.close()
            self._here.close()

    def _error_of(self, call: Any) -> StateError:
        """What ended a stream. One that ends because this was closed under it says so, as a file's does."""
        return EngineClosedError() if self._closed else error_of_call(call, self._target)

    def _check_open(self) -> None:
        self._here.check()
        if self._closed:
            raise EngineClosedError()


class _Wire:
    """How one kind of command travels: as which message, and what its result is in the answer; `rpc`: if it is not
    called as the command is."""

    def __init__(
        self,
        request: Callable[[Any], Message],
        result: Callable[[Any, Any], Any] = lambda *_: None,
        rpc: str = "",
    ) -> None:
        self.request = request
        self.result = result
        self.rpc = rpc


class _Attempt:
    """One command under way: sent, and sent again while its outcome is open and a key makes that safe."""

    def __init__(
        self,
        stub: Any,
        wire: _Wire,
        command: Command[Any],
        headers: Callable[[], _Headers],
        timeout_s: float,
        lost_s: float,
        target: str,
        *,
        repeatable: bool,
    ) -> None:
        self._stub = stub
        self._wire = wire
        self._command = command
        self._repeatable = repeatable
        self._make_headers = headers
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._taken: list[VariableVersion] = []
        # A tool may take its time; a server that is gone is not waited for as long as that.
        self._lost_s = lost_s
        self._give_up_at: float | None = None
        self._unknown: OutcomeUnknownError | None = None
        self._target = target
        self._pause_s = _FIRST_PAUSE_S
        self._future: Future[Any] = Future()

    def start(self) -> Future[Any]:
        """Send it; the future of its result."""
        self._future.set_running_or_notify_cancel()
        try:
            self._headers = self._make_headers()
            self._request = self._wire.request(self._command)
            self._send()
        except (InvalidArgumentError, LimitExceededError) as error:
            self._future.set_exception(error)
        except (ValueError, TypeError) as error:
            # What no message can carry: a lone surrogate, a number beyond its field.
            self._future.set_exception(InvalidArgumentError("request", str(error)))
        return self._future

    def _send_again(self) -> None:
        try:
            self._send()
        except ValueError:
            # The channel was closed meanwhile.
            self._future.set_exception(EngineClosedError())

    def _send(self) -> None:
        left_s = max(0.001, self._deadline - time.monotonic())
        call = self._stub.future(self._request, timeout=left_s, metadata=self._headers)
        call.add_done_callback(self._done)

    def _done(self, call: Any) -> None:
        try:
            response = call.result()
        except grpc.RpcError:
            self._failed(call)
        except grpc.FutureCancelledError:
            self._future.set_exception(EngineClosedError())
        else:
            if isinstance(response, pb.InitializeSessionResponse):
                self._future.set_result(_session_view(response, call))
            elif isinstance(response, pb.GetVariableHistoryResponse):
                self._take_history(response, call)
            else:
                self._future.set_result(self._wire.result(self._command, response))

    def _take_history(self, response: pb.GetVariableHistoryResponse, call: Any) -> None:
        """Go on where the server has left off because versions are large, until there are as many as were asked for."""
        command: Any = self._command
        self._taken += self._wire.result(command, response)
        left = (command.limit or DEFAULT_HISTORY) - len(self._taken)
        below = next((text for key, text in call.trailing_metadata() or () if key == BEFORE_VERSION), None)
        if below is None or left <= 0:
            self._future.set_result(self._taken)
            return
        self._deadline = time.monotonic() + self._timeout_s
        self._request = self._wire.request(replace(command, limit=left))
        self._headers = (*(each for each in self._headers if each[0] != BEFORE_VERSION), (BEFORE_VERSION, below))
        self._send_again()

    def _failed(self, call: Any) -> None:
        error = error_of_call(call, self._target)
        lost = call.code() in _CONNECTION_LOST and not is_told(call)
        if lost:
            error = self._lost(error, call.details() or call.code().name)
        open_still = lost or isinstance(error, OutcomeUnknownError | EngineClosedError | ShuttingDownError)
        if isinstance(error, OutcomeUnknownError):
            self._unknown = error
        if open_still and self._repeatable and time.monotonic() + self._pause_s < self._until():
            self._send_later()
        else:
            # That it cannot be reached any more says nothing of what it did before.
            self._future.set_exception(self._unknown if self._unknown is not None and lost else error)

    def _until(self) -> float:
        """Until when it is repeated, counted from the first failure."""
        if self._give_up_at is None:
            self._give_up_at = min(self._deadline, time.monotonic() + self._lost_s)
        return self._give_up_at

    def _send_later(self) -> None:
        timer = threading.Timer(self._pause_s, self._send_again)
        timer.daemon = True
        timer.start()
        self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)

    def _lost(self, error: StateError, details: str) -> StateError:
        if self._command.writes and not never_sent(details):
            return OutcomeUnknownError(f"the connection to {self._target} broke: {details}")
        return error


def _session_view(response: pb.InitializeSessionResponse, call: Any) -> SessionView:
    resumed = any(key == RESUMED for key, _ in call.trailing_metadata() or ())
    variables = sorted(map(codec.variable_of, response.initial_variables.values()), key=lambda v: v.name)
    return SessionView(resumed=resumed, variables=tuple(variables))


def _headers_of(origin: Origin, command: Command[Any], execution_id: str | None) -> _Headers:
    before = command.before if isinstance(command, commands.GetVariableHistory) else None
    expected = command.expected_version if isinstance(command, commands.SetVariable) else None
    timeout_s = command.timeout_s if isinstance(command, commands.ExecuteTool) else None
    headers = {
        ACTOR: origin.actor,
        SOURCE: origin.source.value if origin.source is Source.PYTHON else None,
        IDEMPOTENCY_KEY: origin.idempotency_key,
        OPTIMIZER_ID: origin.optimizer_id,
        BEFORE_VERSION: None if before is None else str(before),
        EXPECTED_VERSION: None if expected is None or expected < 0 else str(expected),
        EXECUTION_ID: execution_id,
        TIMEOUT_S: None if timeout_s is None else repr(timeout_s),
        ASKED_BY: asking_execution() if isinstance(command, commands.ExecuteTool) else None,
        TOOLS: ALL_TOOLS if isinstance(command, _ListAllTools) else None,
    }
    return tuple(_header(name, text) for name, text in headers.items() if text is not None)


def _header(name: str, text: str) -> tuple[str, str | bytes]:
    """`text` as gRPC metadata: what is not plain ASCII travels as UTF-8 under a binary key."""
    if len(text) > _HEADER_LENGTH:
        raise LimitExceededError(f"the length of {ARGUMENTS.get(name, name)}", len(text), _HEADER_LENGTH, "name_length")
    if text and text.isascii() and text.isprintable() and text == text.strip():
        return name, text
    return name + BINARY, text.encode()


# The rpcs


def _initialize_session(command: commands.InitializeSession) -> Message:
    request = pb.InitializeSessionRequest(session_id=command.session_id, metadata=command.metadata)
    if command.config:
        request.config.CopyFrom(pb.SessionConfig(**command.config))
    return request


def _register_variable(command: commands.RegisterVariable) -> Message:
    return pb.RegisterVariableRequest(
        session_id=command.session_id,
        name=command.name,
        type=command.type,
        initial_value=codec.any_of(command.type, command.value),
        constraints_json=command.constraints,
        metadata=command.metadata,
        initial_binary_value=command.value.binary or b"",
    )


def _set_variable(command: commands.SetVariable) -> Message:
    return pb.SetVariableRequest(
        session_id=command.session_id,
        variable_identifier=command.identifier,
        value=_untyped(command.value),
        metadata=command.metadata,
        expected_version=command.expected_version or 0,
        binary_value=command.value.binary or b"",
    )


def _set_variables(command: commands.SetVariables) -> Message:
    return pb.BatchSetVariablesRequest(
        session_id=command.session_id,
        updates={identifier: _untyped(value) for identifier, value in command.updates.items()},
        metadata=command.metadata,
        atomic=command.atomic,
        binary_updates={
            identifier: value.binary for identifier, value in command.updates.items() if value.binary is not None
        },
    )


def _untyped(value: Value) -> Any:
    """A value whose type only the server knows; "string" here says no more than that it is JSON."""
    return codec.any_of("string", value)


def _variables_found(command: commands.GetVariables, response: pb.BatchGetVariablesResponse) -> VariablesFound:
    # In the order asked for: the map in the message has none.
    messages = response.variables
    found = {
        identifier: codec.variable_of(messages[identifier])
        for identifier in command.identifiers
        if identifier in messages
    }
    return VariablesFound(found, tuple(response.missing_variables))


def _batch_outcome(_: commands.SetVariables, response: pb.BatchSetVariablesResponse) -> BatchOutcome:
    return BatchOutcome(response.success, dict(response.new_versions), dict(response.errors))


def _session_summary(_: commands.GetSession, response: pb.GetSessionResponse) -> SessionSummary:
    return SessionSummary(
        response.session_id,
        dict(response.metadata),
        codec.moment_of(response.created_at),
        response.variable_count,
        response.tool_count,
    )


@dataclass(frozen=True, slots=True)
class _ListAllTools(Command[tuple[ToolSpec, ...]]):
    """The question of `list_tools`, which no store could answer."""

    def apply(self, uow: UnitOfWork) -> tuple[ToolSpec, ...]:
        raise NotImplementedError("it is only sent")


def _execute_tool(command: commands.ExecuteTool) -> Message:
    parameters = command.parameters
    return pb.ExecuteToolRequest(
        session_id=command.session_id,
        tool_name=command.tool,
        parameters={name: codec.loose_any_of(value) for name, value in parameters.items()},
        metadata=command.metadata,
        binary_parameters={name: value.binary for name, value in parameters.items() if value.binary is not None},
    )


def _tool_outcome(_: commands.ExecuteTool, response: pb.ExecuteToolResponse) -> ToolOutcome:
    said = response.metadata
    execution_id, sequence, code = said["execution_id"], said["commit_sequence"], said["error_code"]
    return ToolOutcome(
        ExecutionStatus.COMMITTED if response.success else _STATUSES.get(code),
        codec.value_in(response.result) if response.success else None,
        None if response.success else _tool_error(response),
        code,
        execution_id,
        int(sequence) if sequence else None,
        int(said["attempts"] or 0),
        repeated="repeated" in said,
        streamed="streamed" in said,
        result_type=said["result_type"],
    )


def _tool_error(response: pb.ExecuteToolResponse) -> StateError:
    said = response.metadata
    error = error_in(said["error_code"], said["error_fields"])
    return error or ToolFailedError(said["execution_id"], response.error_message)


_STATUSES = {
    "TOOL_FAILED": ExecutionStatus.FAILED,
    "UNAVAILABLE": ExecutionStatus.FAILED,
    "CONFLICT": ExecutionStatus.CONFLICT,
    "TIMED_OUT": ExecutionStatus.TIMED_OUT,
    "CANCELLED": ExecutionStatus.CANCELLED,
    "INTERRUPTED": ExecutionStatus.INTERRUPTED,
}


def _register_tools(command: commands.RegisterTools) -> Message:
    return pb.RegisterToolsRequest(
        session_id=command.session_id,
        worker_id=command.worker_id,
        tools=[codec.registration_message(tool) for tool in command.tools],
    )


def _identified(request: Callable[..., Message], **more: str) -> Callable[[Any], Message]:
    """A request that names a session and a variable; `more`: its other fields by the command's attribute."""

    def build(command: Any) -> Message:
        fields = {field: getattr(command, attribute) for field, attribute in more.items()}
        return request(session_id=command.session_id, variable_identifier=command.identifier, **fields)

    return build


_WIRES: Mapping[type[Command[Any]], _Wire] = {
    commands.InitializeSession: _Wire(_initialize_session),
    commands.GetSession: _Wire(lambda c: pb.GetSessionRequest(session_id=c.session_id), _session_summary),
    commands.Heartbeat: _Wire(lambda c: pb.HeartbeatRequest(session_id=c.session_id), lambda _, r: r.session_valid),
    commands.CleanupSession: _Wire(
        lambda c: pb.CleanupSessionRequest(session_id=c.session_id), lambda _, r: r.resources_cleaned
    ),
    commands.RegisterVariable: _Wire(_register_variable, lambda _, r: r.variable_id),
    commands.GetVariable: _Wire(
        _identified(pb.GetVariableRequest, bypass_cache="bypass_cache"), lambda _, r: codec.variable_of(r.variable)
    ),
    commands.GetVariables: _Wire(
        lambda c: pb.BatchGetVariablesRequest(
            session_id=c.session_id, variable_identifiers=c.identifiers, bypass_cache=c.bypass_cache
        ),
        _variables_found,
    ),
    commands.SetVariable: _Wire(_set_variable, lambda _, r: r.new_version),
    commands.SetVariables: _Wire(_set_variables, _batch_outcome),
    commands.ListVariables: _Wire(
        lambda c: pb.ListVariablesRequest(session_id=c.session_id, pattern=c.pattern),
        lambda _, r: tuple(codec.variable_of(variable) for variable in r.variables),
    ),
    commands.DeleteVariable: _Wire(_identified(pb.DeleteVariableRequest)),
    commands.GetVariableHistory: _Wire(
        _identified(pb.GetVariableHistoryRequest, limit="limit"),
        lambda _, r: [codec.version_of(entry) for entry in r.entries],
    ),
    commands.RollbackVariable: _Wire(
        _identified(pb.RollbackVariableRequest, target_version="target_version"),
        lambda _, r: codec.variable_of(r.variable),
    ),
    commands.AddDependency: _Wire(
        lambda c: pb.AddDependencyRequest(
            session_id=c.session_id,
            from_variable=c.from_variable,
            to_variable=c.to_variable,
            dependency_type=c.dependency_type,
        )
    ),
    commands.StartOptimization: _Wire(
        _identified(pb.StartOptimizationRequest, optimizer_id="optimizer_id", optimizer_config="config"),
        lambda _, r: r.optimization_id,
    ),
    commands.ExecuteTool: _Wire(_execute_tool, _tool_outcome),
    commands.RegisterTools: _Wire(_register_tools, lambda _, r: dict(r.tool_ids)),
    _ListAllTools: _Wire(
        lambda c: pb.GetExposedElixirToolsRequest(session_id=c.session_id),
        lambda _, r: tuple(map(codec.tool_of, r.tools)),
        rpc="GetExposedElixirTools",
    ),
    commands.StopOptimization: _Wire(
        _identified(pb.StopOptimizationRequest, force="force"), lambda _, r: codec.value_in(r.final_value)
    ),
}


class BridgedWatch(Watch):
    """A watch on another process's store. A thread takes the stream in; when the buffer is full it stops reading, and
    the server holds back."""

    def __init__(self, call: Any, timeout_s: float, target: str, error_of: Callable[[Any], StateError]) -> None:
        self._call = call
        self._error_of = error_of
        self._here = OneProcess(target, call)
        self._lock = threading.Condition()
        self._buffer: deque[Update] = deque()
        self._whole = 0
        self._error: StateError | None = None
        self._closed = False
        self._wake: Callable[[], None] = lambda: None
        headers = self._begin(timeout_s)
        self.position = int(headers[POSITION])
        self.initial = self._take_initial(int(headers[INITIAL_VALUES]))
        self._thread = threading.Thread(target=self._read, name="dspex-persist-watch", daemon=True)
        self._thread.start()

    def _begin(self, timeout_s: float) -> dict[str, str]:
        """Wait for the server's word that the watch stands."""
        give_up = threading.Timer(timeout_s, self._call.cancel)
        give_up.daemon = True
        give_up.start()
        try:
            headers = dict(self._call.initial_metadata() or ())
            if POSITION not in headers:
                next(self._call)
        except grpc.RpcError:
            raise self._error_of(self._call) from None
        finally:
            give_up.cancel()
        return headers

    def _take_initial(self, count: int) -> tuple[Variable, ...]:
        try:
            return tuple(codec.update_of(next(self._call)).variable for _ in range(count))
        except grpc.RpcError:
            raise self._error_of(self._call) from None

    def _read(self) -> None:
        error: StateError = EngineClosedError()
        try:
            for message in self._call:
                self._take(message)
        except grpc.RpcError:
            if not self._closed:
                error = self._error_of(self._call)
        with self._lock:
            self._error = error
        self._wake()

    def _take(self, message: pb.VariableUpdate) -> None:
        sequence = int(message.update_metadata[codec.COMMIT_SEQUENCE])
        with self._lock:
            if message.update_type == "heartbeat":
                if not self._buffer:
                    self.position = max(self.position, sequence)
                return
            update = codec.update_of(message)
            self._buffer.append(update)
            if update.part[0] < update.part[1]:
                return
            # Only whole commits are handed out, and only they count: one commit may be larger than the buffer.
            self._whole = len(self._buffer)
        self._wake()
        with self._lock:
            self._lock.wait_for(lambda: self._whole < _BUFFERED_UPDATES or self._closed)

    def pull(self) -> list[Update]:
        """See `Watch.pull`."""
        self._here.check()
        with self._lock:
            updates = [self._buffer.popleft() for _ in range(self._whole)]
            self._whole = 0
            if updates:
                self.position = updates[-1].sequence
                self._lock.notify_all()
            elif self._error is not None:
                raise self._error
        return updates

    def pull_ready(self) -> list[Update]:
        """See `Watch.pull_ready`."""
        return self.pull()

    def notify(self, wake: Callable[[], None]) -> None:
        """See `Watch.notify`."""
        self._here.check()
        with self._lock:
            self._wake = wake
            ended = self._error is not None
        if ended:
            wake()

    def close(self) -> None:
        """Stop watching."""
        if self._here.refusal is not None:
            return
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._call.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()


def _failed(error: StateError) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future
