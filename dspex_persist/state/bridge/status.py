"""Translates errors to gRPC statuses and back, by one table with every leaf of `state.errors`."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, replace
from math import ceil
from typing import Any, Final

from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from dspex_persist.infra.listen import TLS_SCHEME
from dspex_persist.infra.server import DrainingError, RpcStatus
from dspex_persist.state import errors
from dspex_persist.state.bridge.headers import AFTER_SEQUENCE, ARGUMENTS, HINT
from dspex_persist.state.bridge.hints import IN_RPCS
from dspex_persist.state.errors import Hint, StateError

DOMAIN = "dspex-persist"
DETAILS_KEY = "grpc-status-details-bin"
_PUSHBACK: Final = "grpc-retry-pushback-ms"
_LONGEST_DELAY_S: Final = 1e6
# Metadata is limited to a few kilobytes (base64 adds a third), and an entry that does not fit is left out as a whole.
_DETAILS_BYTES = 2_900
_FIELD_LENGTHS = (None, 300, 60, 20)
_TOO_LARGE = re.compile(r"message larger than max \((\d+) vs\. (\d+)\)")

CODES: dict[type[StateError], StatusCode] = {
    errors.InvalidArgumentError: StatusCode.INVALID_ARGUMENT,
    errors.SessionNotFoundError: StatusCode.NOT_FOUND,
    errors.SessionMovedError: StatusCode.FAILED_PRECONDITION,
    errors.SessionHeldError: StatusCode.UNAVAILABLE,
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
    errors.VariableReplacedError: StatusCode.ABORTED,
    errors.VariableLockedError: StatusCode.FAILED_PRECONDITION,
    errors.NotOptimizingError: StatusCode.FAILED_PRECONDITION,
    errors.DependencyCycleError: StatusCode.FAILED_PRECONDITION,
    errors.RuleViolatedError: StatusCode.FAILED_PRECONDITION,
    errors.DerivationError: StatusCode.FAILED_PRECONDITION,
    errors.InvalidRuleError: StatusCode.INVALID_ARGUMENT,
    errors.RuleNotFoundError: StatusCode.NOT_FOUND,
    errors.RuleExistsError: StatusCode.ALREADY_EXISTS,
    errors.IdempotencyConflictError: StatusCode.INVALID_ARGUMENT,
    errors.ToolNotFoundError: StatusCode.NOT_FOUND,
    errors.ToolExistsError: StatusCode.ALREADY_EXISTS,
    errors.ToolArgumentError: StatusCode.INVALID_ARGUMENT,
    errors.MissingVariablesError: StatusCode.FAILED_PRECONDITION,
    errors.SessionBusyError: StatusCode.ABORTED,
    errors.BudgetExceededError: StatusCode.RESOURCE_EXHAUSTED,
    errors.ExecutionNotFoundError: StatusCode.FAILED_PRECONDITION,
    errors.ExecutionElsewhereError: StatusCode.FAILED_PRECONDITION,
    errors.ExecutionEndedError: StatusCode.FAILED_PRECONDITION,
    errors.TransactionEndedError: StatusCode.FAILED_PRECONDITION,
    errors.ExecutionConflictError: StatusCode.ABORTED,
    errors.ToolFailedError: StatusCode.ABORTED,
    errors.ToolInterruptedError: StatusCode.ABORTED,
    errors.ToolTimedOutError: StatusCode.DEADLINE_EXCEEDED,
    errors.RemoteToolError: StatusCode.UNAVAILABLE,
    errors.PoolSaturatedError: StatusCode.RESOURCE_EXHAUSTED,
    errors.QueueTimeoutError: StatusCode.RESOURCE_EXHAUSTED,
    errors.WorkerTimeoutError: StatusCode.DEADLINE_EXCEEDED,
    errors.WorkerExitedError: StatusCode.ABORTED,
    errors.NotInHistoryError: StatusCode.NOT_FOUND,
    errors.RecordingError: StatusCode.INVALID_ARGUMENT,
    errors.UnsupportedError: StatusCode.UNIMPLEMENTED,
    errors.QueueFullError: StatusCode.RESOURCE_EXHAUSTED,
    errors.TooManyWatchersError: StatusCode.RESOURCE_EXHAUSTED,
    errors.WatchStalledError: StatusCode.ABORTED,
    errors.WatchGapError: StatusCode.FAILED_PRECONDITION,
    errors.StorageError: StatusCode.UNAVAILABLE,
    errors.ReadFailedError: StatusCode.UNAVAILABLE,
    errors.FileChangedError: StatusCode.DATA_LOSS,
    errors.OutcomeUnknownError: StatusCode.UNKNOWN,
    errors.UnavailableError: StatusCode.UNAVAILABLE,
    errors.CircuitOpenError: StatusCode.UNAVAILABLE,
    errors.UnauthenticatedError: StatusCode.UNAUTHENTICATED,
    errors.PermissionDeniedError: StatusCode.PERMISSION_DENIED,
    errors.QuotaExceededError: StatusCode.RESOURCE_EXHAUSTED,
    errors.RateLimitedError: StatusCode.RESOURCE_EXHAUSTED,
    errors.AccessDeniedError: StatusCode.PERMISSION_DENIED,
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

# The field of the request that an error is about, for google.rpc.BadRequest.
_FIELDS: dict[type[StateError], str] = {
    errors.UnknownTypeError: "type",
    errors.InvalidValueError: "value",
    errors.InvalidConstraintsError: "constraints_json",
    errors.IdempotencyConflictError: "x-dspex-idempotency-key",
    errors.ToolArgumentError: "parameters",
    errors.RecordingError: "recording",
    errors.InvalidRuleError: "rule",
}


# By text, because a newer server may send hints that this release does not know.
_HINTS: Final[Mapping[object, Hint]] = {hint.value: hint for hint in Hint}

# By code and names of fields, because two kinds of error may share a code.
_KINDS = {(kind.error_code, frozenset(field.name for field in fields(kind))): kind for kind in CODES}  # type: ignore[arg-type]


# Words of gRPC's details, what they mean, and the advice.
_TLS_FAULTS: Final[tuple[tuple[str, str, Hint | None], ...]] = (
    ("WRONG_VERSION_NUMBER", "the server does not use TLS", Hint.CONNECT_PLAINLY),
    ("certificate has expired", "the certificate of the server has expired", Hint.RENEW_CERTIFICATE),
    ("certificate is not yet valid", "the certificate of the server is not valid yet", Hint.RENEW_CERTIFICATE),
    ("Hostname Verification", "the certificate of the server is for another host", Hint.NAME_CERTIFIED_HOST),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "the certificate of the server is from no authority that is trusted here",
        Hint.TRUST_CA,
    ),
    (
        "Socket closed",
        "the server closed the connection, as it does without a certificate that it trusts",
        Hint.SHOW_CERTIFICATE,
    ),
    (
        "Connection reset",
        "the server closed the connection, as it does without a certificate that it trusts",
        Hint.SHOW_CERTIFICATE,
    ),
)
_PLAIN_FAULTS: Final[tuple[tuple[str, str, Hint | None], ...]] = (
    ("Socket closed", "the server closed the connection, as one with TLS does", Hint.CONNECT_WITH_TLS),
)


def status_of(error: BaseException) -> RpcStatus | None:
    """Return the status of a `StateError`, or of a call during the drain; None for other errors."""
    if isinstance(error, DrainingError):
        error = errors.ShuttingDownError()
    if not isinstance(error, StateError):
        return None
    kind = next((kind for kind in type(error).__mro__ if kind in CODES), None)
    if kind is None:
        return None
    code = CODES[kind]
    details = text_of(error)
    trailers: list[tuple[str, str | bytes]] = [(DETAILS_KEY, _rich(error, kind, code, details))]
    if isinstance(error, errors.WatchStalledError):
        trailers.append((AFTER_SEQUENCE, str(error.after_sequence)))
    if isinstance(error, errors.RateLimitedError):
        # gRPC's own retries wait for that long.
        trailers.append((_PUSHBACK, str(_delay_ms(error))))
    if error.advice is not None and error.advice is not kind.advice:
        trailers.append((HINT, error.advice.value))
    return RpcStatus(code, details, tuple(trailers))


def text_of(error: BaseException) -> str:
    """Return the text of an error for gRPC clients, which names rpcs and headers instead of methods and arguments."""
    return error.in_words(IN_RPCS) if isinstance(error, StateError) else str(error)


def _rich(error: StateError, kind: type[StateError], code: StatusCode, details: str) -> bytes:
    """The google.rpc.Status with the error's code and fields, which are shortened if they do not fit."""
    field = error.field if isinstance(error, errors.InvalidArgumentError) else _FIELDS.get(kind, "")
    # A lone surrogate is not a character: no message can carry it.
    field, details = (text.encode(errors="backslashreplace").decode() for text in (field, details))
    for length in _FIELD_LENGTHS:
        info, violation = AnyMessage(), AnyMessage()
        info.Pack(ErrorInfo(reason=kind.error_code, domain=DOMAIN, metadata=_fields_of(error, length)))
        status = Status(code=code.value[0], message=_cut(details, length), details=[info])
        if code is StatusCode.INVALID_ARGUMENT:
            described = BadRequest.FieldViolation(field=_cut(field, length), description=_cut(details, length))
            violation.Pack(BadRequest(field_violations=[described]))
            status.details.append(violation)
        if isinstance(error, errors.RateLimitedError):
            delay = RetryInfo()
            delay.retry_delay.FromMilliseconds(_delay_ms(error))
            status.details.add().Pack(delay)
        if status.ByteSize() <= _DETAILS_BYTES:
            break
    serialized: bytes = status.SerializeToString()
    return serialized


def _delay_ms(error: errors.RateLimitedError) -> int:
    """Return after which time a call may be repeated, within what a message can carry."""
    return ceil(min(max(error.retry_in_s, 0.0), _LONGEST_DELAY_S) * 1_000)


def _fields_of(error: StateError, length: int | None = None) -> dict[str, str]:
    entries: dict[str, Any] = asdict(error)  # type: ignore[call-overload]
    return {name: json.dumps(_cut(field, length)) for name, field in entries.items()}


def _cut(field: Any, length: int | None) -> Any:
    return f"{field[:length]}..." if isinstance(field, str) and length is not None and len(field) > length else field


def facts_of(error: BaseException | None) -> str:
    """Return the fields of an error as JSON, for a response; "" for an error that is not in the table."""
    return json.dumps(_fields_of(error)) if isinstance(error, StateError) and type(error) in CODES else ""


def error_in(error_code: str, facts: str) -> StateError | None:
    """Return the error with this code and these fields, or None if this release does not know it."""
    texts = json.loads(facts) if facts else {}
    return _built(error_code, texts) if isinstance(texts, dict) else None


def _built(error_code: str, texts: Mapping[str, str]) -> StateError | None:
    kind = _KINDS.get((error_code, frozenset(texts)))
    return None if kind is None else kind(**{name: json.loads(text) for name, text in texts.items()})


def error_of(
    code: StatusCode, details: str, trailers: Iterable[tuple[str, str | bytes]], target: str = ""
) -> StateError:
    """Return the error of a failed call: the one that the server sent, or the closest one to the status code.

    Args:
        code: The status code.
        details: The details of the status.
        trailers: The trailing metadata.
        target: The server, for errors; "" to leave it out.
    """
    metadata = dict(trailers)
    content = metadata.get(DETAILS_KEY)
    known = _parse(content) if isinstance(content, bytes) else None
    if known is not None:
        hint = _HINTS.get(metadata.get(HINT))
        return _in_python(known if hint is None else known.advising(hint))
    too_large = _TOO_LARGE.search(details)
    if too_large is not None:
        actual, most = map(int, too_large.groups())
        return errors.LimitExceededError("size of the message in bytes", actual, most, "max_message_bytes")
    if code is StatusCode.CANCELLED and "channel closed" in details.lower():
        return errors.EngineClosedError()
    translate = _BY_CODE.get(code)
    if translate is None:
        return errors.InternalError(f"{code.name}: {details}")
    return translate(target, details or code.name)


def _in_python(error: StateError) -> StateError:
    """The error, with the names of Python arguments instead of headers."""
    if isinstance(error, errors.InvalidArgumentError) and error.field in ARGUMENTS:
        return replace(error, field=ARGUMENTS[error.field])
    if isinstance(error, errors.UnavailableError) and AFTER_SEQUENCE in error.reason:
        return replace(error, reason=error.reason.replace(f"{AFTER_SEQUENCE}: ", f"{ARGUMENTS[AFTER_SEQUENCE]}="))
    return error


def never_sent(details: str) -> bool:
    """Return whether gRPC's details mean that there was no connection, so that the call was never sent."""
    return any(words in details.lower() for words in ("failed to connect", "connection refused", "resolution failed"))


def _cause(details: str) -> str:
    return details.rpartition(": ")[2].strip(" .") or "no connection"


def lost_reason(call: Any) -> str:
    """Return in a few words why a call was lost."""
    if call.code() is StatusCode.DEADLINE_EXCEEDED:
        return "no answer in time"
    return _cause(call.details() or "")


def unreachable(target: str, details: str) -> errors.UnavailableError:
    """Return the error for a server that does not answer, with a shorter text than gRPC's."""
    if not target:
        return errors.UnavailableError(details)
    if not never_sent(details):
        return errors.UnavailableError(f"{target}: {details}").advising(Hint.REPEAT_LATER)
    cause = _cause(details)
    refused = _refused(target, details)
    if refused is not None:
        return refused
    reason = f"cannot connect to {target} ({cause}); is the server running? Start it with `dspex-persist serve`"
    return errors.UnavailableError(reason)


def _refused(target: str, details: str) -> errors.UnavailableError | None:
    """Return the error if there is a server, but it and this client did not agree on TLS; None otherwise."""
    for words, reason, hint in _TLS_FAULTS if target.startswith(TLS_SCHEME) else _PLAIN_FAULTS:
        if words in details:
            error = errors.UnavailableError(f"cannot connect to {target}: {reason}")
            return error if hint is None else error.advising(hint)
    return None


def no_answer(target: str, timeout_s: float, *, writes: bool) -> StateError:
    """Return the error for a call that got no answer in time. A write may have been carried out."""
    reason = f"{target} did not answer within {timeout_s:.3g} s"
    if writes:
        return errors.OutcomeUnknownError(reason)
    return errors.UnavailableError(reason).advising(Hint.REPEAT_LATER)


def unreadable(target: str, fault: Exception) -> errors.InternalError:
    """Return the error for an answer that this release does not understand; parsing it raised `fault`."""
    reason = f"{target} answered what this release cannot read ({type(fault).__name__}: {fault}); is it newer?"
    return errors.InternalError(reason)


def _parse(content: bytes) -> StateError | None:
    info = ErrorInfo()
    for detail in Status.FromString(content).details:
        if detail.Unpack(info) and info.domain == DOMAIN:
            return _built(info.reason, info.metadata)
    return None


_BY_CODE: Final[Mapping[StatusCode, Callable[[str, str], StateError]]] = {
    StatusCode.UNAVAILABLE: unreachable,
    StatusCode.DEADLINE_EXCEEDED: unreachable,
    StatusCode.RESOURCE_EXHAUSTED: lambda _, details: errors.UnavailableError(details),
    StatusCode.UNIMPLEMENTED: lambda _, details: errors.UnsupportedError(details),
}
"""The errors for statuses from gRPC itself or from other servers. Any other status is an `InternalError`."""


_CONNECTION_LOST: Final = frozenset({StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.CANCELLED})


def is_from_server(call: Any) -> bool:
    """Return whether the error of a call comes from the server itself, and not from gRPC."""
    return any(key == DETAILS_KEY for key, _ in call.trailing_metadata() or ())


def is_lost(call: Any) -> bool:
    """Return whether a call lost its connection, so that its outcome on the server is unknown."""
    return call.code() in _CONNECTION_LOST and not is_from_server(call)


def is_broken(call: Any) -> bool:
    """Return whether a stream ended because of its transport and not by an answer of the server."""
    return call.code() in (*_CONNECTION_LOST, StatusCode.INTERNAL, StatusCode.UNKNOWN) and not is_from_server(call)


def error_of_call(call: Any, target: str = "") -> StateError:
    """Return the error of a failed call of the synchronous client (a grpc.RpcError, which is also a grpc.Call)."""
    return error_of(call.code(), call.details() or "", tuple(call.trailing_metadata() or ()), target)


def error_of_write(call: Any, target: str) -> StateError:
    """Return the error of a failed write: `OutcomeUnknownError` if the server may have written all the same."""
    details = call.details() or call.code().name
    if is_lost(call) and not never_sent(details):
        return errors.OutcomeUnknownError(f"the connection to {target} broke: {details}")
    return error_of_call(call, target)
