"""Errors to gRPC statuses and back, from one table that knows every leaf of `state.errors`."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from dspex_persist.infra.server import DrainingError, RpcStatus
from dspex_persist.state import errors
from dspex_persist.state.errors import StateError
from dspex_persist.state.rpc.headers import AFTER_SEQUENCE

DOMAIN = "dspex-persist"
_FIELD_LENGTH = 300
DETAILS_KEY = "grpc-status-details-bin"

CODES: dict[type[StateError], StatusCode] = {
    errors.InvalidArgumentError: StatusCode.INVALID_ARGUMENT,
    errors.SessionNotFoundError: StatusCode.NOT_FOUND,
    errors.SessionExistsError: StatusCode.ALREADY_EXISTS,
    errors.SessionPrunedError: StatusCode.FAILED_PRECONDITION,
    errors.DamagedSessionError: StatusCode.DATA_LOSS,
    errors.VariableNotFoundError: StatusCode.NOT_FOUND,
    errors.VersionNotFoundError: StatusCode.NOT_FOUND,
    errors.VersionPrunedError: StatusCode.NOT_FOUND,
    errors.VariableExistsError: StatusCode.ALREADY_EXISTS,
    errors.UnknownTypeError: StatusCode.INVALID_ARGUMENT,
    errors.InvalidValueError: StatusCode.INVALID_ARGUMENT,
    errors.InvalidConstraintsError: StatusCode.INVALID_ARGUMENT,
    errors.LimitExceededError: StatusCode.RESOURCE_EXHAUSTED,
    errors.VersionConflictError: StatusCode.ABORTED,
    errors.VariableLockedError: StatusCode.FAILED_PRECONDITION,
    errors.NotOptimizingError: StatusCode.FAILED_PRECONDITION,
    errors.DependencyCycleError: StatusCode.FAILED_PRECONDITION,
    errors.IdempotencyConflictError: StatusCode.INVALID_ARGUMENT,
    errors.ToolNotFoundError: StatusCode.NOT_FOUND,
    errors.ToolExistsError: StatusCode.ALREADY_EXISTS,
    errors.ToolArgumentError: StatusCode.INVALID_ARGUMENT,
    errors.MissingVariablesError: StatusCode.FAILED_PRECONDITION,
    errors.ExecutionNotFoundError: StatusCode.FAILED_PRECONDITION,
    errors.ExecutionEndedError: StatusCode.FAILED_PRECONDITION,
    errors.ExecutionConflictError: StatusCode.ABORTED,
    errors.ToolFailedError: StatusCode.ABORTED,
    errors.ToolTimedOutError: StatusCode.DEADLINE_EXCEEDED,
    errors.RemoteToolError: StatusCode.UNAVAILABLE,
    errors.NotInHistoryError: StatusCode.NOT_FOUND,
    errors.RecordingError: StatusCode.INVALID_ARGUMENT,
    errors.UnsupportedError: StatusCode.UNIMPLEMENTED,
    errors.QueueFullError: StatusCode.RESOURCE_EXHAUSTED,
    errors.TooManyWatchersError: StatusCode.RESOURCE_EXHAUSTED,
    errors.WatchStalledError: StatusCode.ABORTED,
    errors.StorageError: StatusCode.UNAVAILABLE,
    errors.ReadFailedError: StatusCode.UNAVAILABLE,
    errors.FileChangedError: StatusCode.DATA_LOSS,
    errors.OutcomeUnknownError: StatusCode.UNKNOWN,
    errors.UnavailableError: StatusCode.UNAVAILABLE,
    errors.EngineClosedError: StatusCode.UNAVAILABLE,
    errors.ForkedProcessError: StatusCode.FAILED_PRECONDITION,
    errors.ShuttingDownError: StatusCode.UNAVAILABLE,
    errors.InternalError: StatusCode.INTERNAL,
    errors.CheckpointError: StatusCode.INTERNAL,
    errors.DatabaseInUseError: StatusCode.FAILED_PRECONDITION,
    errors.NotADatabaseError: StatusCode.FAILED_PRECONDITION,
    errors.NewerSchemaError: StatusCode.FAILED_PRECONDITION,
    errors.UpgradeError: StatusCode.FAILED_PRECONDITION,
    errors.LostCommitsError: StatusCode.DATA_LOSS,
}

# The field of a request that an error speaks of, for google.rpc.BadRequest.
_FIELDS: dict[type[StateError], str] = {
    errors.UnknownTypeError: "type",
    errors.InvalidValueError: "value",
    errors.InvalidConstraintsError: "constraints_json",
    errors.IdempotencyConflictError: "x-dspex-idempotency-key",
    errors.ToolArgumentError: "parameters",
    errors.RecordingError: "recording",
}


def reason_of(kind: type[StateError]) -> str:
    """The stable name of an error for programs: VERSION_CONFLICT for VersionConflictError."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__.removesuffix("Error")).upper()


_BY_REASON = {reason_of(kind): kind for kind in CODES}


def status_of(error: BaseException) -> RpcStatus | None:
    """What a client is told of a `StateError`, or of a call that came too late; None for anything else."""
    if isinstance(error, DrainingError):
        error = errors.ShuttingDownError()
    if not isinstance(error, StateError):
        return None
    code = CODES.get(type(error))
    if code is None:
        return None
    details = str(error)
    trailers: list[tuple[str, str | bytes]] = [(DETAILS_KEY, _rich(error, code, details))]
    if isinstance(error, errors.WatchStalledError):
        trailers.append((AFTER_SEQUENCE, str(error.after_sequence)))
    return RpcStatus(code, details, tuple(trailers))


def _rich(error: StateError, code: StatusCode, details: str) -> bytes:
    fields = {name: json.dumps(_shortened(field)) for name, field in asdict(error).items()}  # type: ignore[call-overload]
    info = AnyMessage()
    info.Pack(ErrorInfo(reason=reason_of(type(error)), domain=DOMAIN, metadata=fields))
    status = Status(code=code.value[0], message=details, details=[info])
    if code is StatusCode.INVALID_ARGUMENT:
        field = error.field if isinstance(error, errors.InvalidArgumentError) else _FIELDS[type(error)]
        violation = BadRequest.FieldViolation(field=field, description=details)
        status.details.add().Pack(BadRequest(field_violations=[violation]))
    serialized: bytes = status.SerializeToString()
    return serialized


def _shortened(field: object) -> object:
    """A field as it travels. gRPC has room for some kilobytes of metadata: a megabyte of an id would leave no error."""
    return f"{field[:_FIELD_LENGTH]}..." if isinstance(field, str) and len(field) > _FIELD_LENGTH else field


def error_of(code: StatusCode, details: str, trailers: Iterable[tuple[str, str | bytes]]) -> StateError:
    """The error that a server meant; where it does not say, the one that the status code comes closest to."""
    for key, content in trailers:
        if key == DETAILS_KEY and isinstance(content, bytes):
            known = _parse(content)
            if known is not None:
                return known
    if code in (StatusCode.UNAVAILABLE, StatusCode.RESOURCE_EXHAUSTED):
        return errors.UnavailableError(details)
    if code is StatusCode.UNIMPLEMENTED:
        return errors.UnsupportedError(details)
    return errors.InternalError(f"{code.name}: {details}")


def _parse(content: bytes) -> StateError | None:
    info = ErrorInfo()
    for detail in Status.FromString(content).details:
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in _BY_REASON:
            kind = _BY_REASON[info.reason]
            return kind(**{name: json.loads(text) for name, text in info.metadata.items()})
    return None


def error_of_call(call: Any) -> StateError:
    """The error in a failed call of the synchronous client (grpc.RpcError, which also is a grpc.Call)."""
    return error_of(call.code(), call.details() or "", tuple(call.trailing_metadata() or ()))
