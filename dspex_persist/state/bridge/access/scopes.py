"""Which scope each rpc takes, and the check of a call's token or certificate against it."""

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import Context
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias

from dspex_persist import clock
from dspex_persist.clock import LATEST
from dspex_persist.infra.access.admission import Admission, CallCounts, TooManyCallsError
from dspex_persist.infra.access.tokens import ADMIN, CALLER, EXECUTE, READ, WRITE, Identity, Tokens, digest_of
from dspex_persist.state.bridge.access.denials import Denials
from dspex_persist.state.errors import PermissionDeniedError, RateLimitedError, UnauthenticatedError

_OPEN: Final = ""
"""For everybody, also without a token."""
_ANY: Final = "any"
"""For every token."""
_BEARER: Final = "bearer "
_ALL: Final = frozenset({ADMIN})
_NOT_IN_NAMES: Final = re.compile(r"[^A-Za-z0-9._@:/-]")
_LONGEST_NAME: Final = 200
_LOOK_S: Final = 0.5
"""How often it looks whether open streams have to end, in seconds."""
_NOBODY: Final = Context()
"""What looks after the streams belongs to no call."""
_ENDED: Final = "a token that is still valid: its stream was ended"

_BRIDGE: Final[Mapping[str, str]] = {
    "Ping": _ANY,
    "InitializeSession": WRITE,
    "CleanupSession": WRITE,
    "GetSession": READ,
    "Heartbeat": READ,
    "GetVariable": READ,
    "SetVariable": WRITE,
    "GetVariables": READ,
    "SetVariables": WRITE,
    "RegisterVariable": WRITE,
    "ListVariables": READ,
    "DeleteVariable": WRITE,
    "ExecuteTool": EXECUTE,
    "ExecuteStreamingTool": EXECUTE,
    # Whoever registers a tool says which address the server calls, and what its callers get as results.
    "RegisterTools": ADMIN,
    "GetExposedElixirTools": READ,
    "ExecuteElixirTool": EXECUTE,
    "WatchVariables": READ,
    "AddDependency": WRITE,
    "StartOptimization": WRITE,
    "StopOptimization": WRITE,
    "GetVariableHistory": READ,
    "RollbackVariable": WRITE,
}
_AUDIT: Final[Mapping[str, str]] = {
    "GetHead": READ,
    "ResolvePoint": READ,
    "ListHistory": READ,
    "ListExecutions": READ,
    "ListCommits": READ,
    "ListSessions": READ,
    "ListLmUsage": READ,
    "GetExecution": READ,
    "GetState": READ,
    "GetVersion": READ,
    "Prune": ADMIN,
    "RecordSession": READ,
    "ForkSession": WRITE,
    "BeginTransaction": WRITE,
    "CommitTransaction": WRITE,
    "AbortTransaction": WRITE,
    "RestoreSession": WRITE,
    # A recording says itself who made its changes.
    "ImportSession": ADMIN,
    "GetContentHash": READ,
    "RegisterVariables": WRITE,
    "RemoveDependency": WRITE,
    "GetDependencies": READ,
    "ConstrainVariable": WRITE,
    "AddRule": WRITE,
    "RemoveRule": WRITE,
    "ListRules": READ,
    "RecordInputs": WRITE,
    # In an open transaction or recording, which takes "write".
    "CheckBudget": WRITE,
    # It has all other writers of the session wait.
    "HoldSession": ADMIN,
    "ListWorkers": READ,
    # Who tried what: of all sessions, also of those that their owners keep from others.
    "ListDenials": ADMIN,
}
SCOPE_OF: Final[Mapping[str, str]] = {
    **{f"snakepit.bridge.BridgeService.{name}": scope for name, scope in _BRIDGE.items()},
    **{f"dspex.persist.v1.AuditService.{name}": scope for name, scope in _AUDIT.items()},
    # Load balancers and orchestrators have no tokens.
    "grpc.health.v1.Health.Check": _OPEN,
    "grpc.health.v1.Health.Watch": _OPEN,
    "grpc.health.v1.Health.List": _ANY,
    "grpc.reflection.v1alpha.ServerReflection.ServerReflectionInfo": _ANY,
}
"""The scope that an rpc takes, by its full name. An rpc that is missing here takes "admin"."""


Headers: TypeAlias = Sequence[tuple[str, str | bytes]]
"""The headers of a call."""

Find: TypeAlias = Callable[[], Identity]
"""Returns who makes a call, or raises `UnauthenticatedError`."""


class Access:
    """Admits the calls of those whose token or certificate has the scope of the rpc, and notes whose they are.

    Streams end when that changes: within a second after the token was revoked, or has expired.

    Args:
        tokens: The tokens; None to know clients by their certificates alone, which then have all scopes.
        denials: Notes the calls that are refused.
        certified: Whether clients have to show certificates.
    """

    def __init__(self, tokens: Tokens | None, denials: Denials | None = None, *, certified: bool = False) -> None:
        self._tokens = tokens
        self._denials = denials or Denials()
        self._certified = certified
        self._counts = CallCounts()
        self._streams: dict[Admission, _Stream] = {}
        # As of the last look at them: how often the tokens had been read, and when the first of them expires.
        self._readings = 0
        self._expiry = LATEST
        self._timer: asyncio.TimerHandle | None = None

    def admit(self, rpc: str, context: Any, task: "asyncio.Task[Any] | None" = None) -> Admission | None:
        """Admit a call, or raise.

        Args:
            rpc: The full name of the rpc.
            context: gRPC's context of the call.
            task: The task of a stream, which ends when its caller may not make it any longer.

        Returns:
            What has to hear of the end of the call; None if nothing has.

        Raises:
            UnauthenticatedError: It has no token, or one that is not valid.
            PermissionDeniedError: Its token lacks the scope.
            RateLimitedError: Its caller makes more calls than it may.
        """
        scope = SCOPE_OF.get(rpc, ADMIN)
        if scope == _OPEN:
            return None
        try:
            find = self._finder(context)
            identity = find()
        except UnauthenticatedError as error:
            self._denials.note(rpc, context, error.reason)
            raise
        CALLER.set(identity)
        try:
            _check_scope(identity, rpc, scope)
            counted = self._counts.begin(identity)
        except PermissionDeniedError:
            self._denials.note(rpc, context, f"scope {scope}")
            raise
        except TooManyCallsError as error:
            self._denials.note(rpc, context, str(error))
            raise RateLimitedError(identity.name, error.limit, error.retry_in_s) from None
        lasts = task is not None and self._tokens is not None
        if not lasts and not counted:
            return None
        admission = Admission(partial(self._ended, identity if counted else None), task)
        if lasts:
            self._streams[admission] = _Stream(rpc, scope, context, identity, find)
            self._expiry = min(self._expiry, identity.expires_at or LATEST)
            self._look_later()
        return admission

    def reads_first(self, rpc: str, headers: Headers) -> bool:
        """Return whether the request of a call may be read before the call is admitted.

        Not if it will be refused, nor if its caller has limits: what is being sent is in progress, and takes memory.

        Args:
            rpc: The full name of the rpc.
            headers: The headers of the call.
        """
        scope, tokens = SCOPE_OF.get(rpc, ADMIN), self._tokens
        if scope == _OPEN or tokens is None:
            return True
        try:
            token = _token_of(headers)
        except UnauthenticatedError:
            return False
        if token is None:
            # Its certificate decides.
            return self._certified
        identity = tokens.look_up(digest_of(token))
        if identity is None or identity.has_expired or identity.allowance.counts_calls:
            return False
        return scope == _ANY or identity.may(scope)

    def _ended(self, counted: Identity | None, admission: Admission) -> None:
        self._streams.pop(admission, None)
        if counted is not None:
            self._counts.end(counted)

    # Whose call it is

    def _finder(self, context: Any) -> Find:
        """Return what finds out who makes a call, now and later."""
        tokens = self._tokens
        if tokens is not None and (token := _token_of(context.invocation_metadata() or ())) is not None:
            return partial(_owner_of_token, tokens, digest_of(token))
        if not self._certified:
            raise UnauthenticatedError("the call has no token, and this server demands one")
        names = names_of(context.auth_context())
        if tokens is None:
            identity = Identity(_NOT_IN_NAMES.sub("_", names[0] if names else "unnamed")[:_LONGEST_NAME], _ALL)
            return lambda: identity
        return partial(_owner_of_certificate, tokens, names)

    # Open streams

    def _look_later(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look, context=_NOBODY)

    def _look(self) -> None:
        """End the streams of those who may not have them any longer."""
        self._timer = None
        readings = 0 if self._tokens is None else self._tokens.readings
        # There may be thousands of them.
        if readings != self._readings or clock.now() >= self._expiry:
            self._readings = readings
            self._end_revoked()
        if self._streams:
            self._look_later()

    def _end_revoked(self) -> None:
        self._expiry = LATEST
        for admission, stream in tuple(self._streams.items()):
            try:
                identity = stream.find()
                _check_scope(identity, stream.rpc, stream.scope)
            except (UnauthenticatedError, PermissionDeniedError) as error:
                del self._streams[admission]
                self._denials.note(stream.rpc, stream.context, _ENDED, caller=stream.identity)
                admission.revoke(error)
            else:
                self._expiry = min(self._expiry, identity.expires_at or LATEST)


class _Stream(NamedTuple):
    """An open stream."""

    rpc: str
    scope: str
    context: Any
    identity: Identity
    find: Find


def _check_scope(identity: Identity, rpc: str, scope: str) -> None:
    if scope != _ANY and not identity.may(scope):
        raise PermissionDeniedError(identity.name, rpc.rpartition(".")[2], scope)


def _owner_of_token(tokens: Tokens, digest: bytes) -> Identity:
    identity = tokens.look_up(digest)
    if identity is None:
        raise UnauthenticatedError("the token is not valid here: it is wrong, or was revoked")
    return _unexpired(identity, "token")


def _owner_of_certificate(tokens: Tokens, names: Sequence[str]) -> Identity:
    identity = tokens.find_certificate(names)
    if identity is None:
        raise UnauthenticatedError("the call has no token, and the token file has no line for its certificate")
    return _unexpired(identity, "line of the certificate in the token file")


def _unexpired(identity: Identity, what: str) -> Identity:
    if identity.has_expired and identity.expires_at is not None:
        raise UnauthenticatedError(f"the {what} expired on {identity.expires_at:%Y-%m-%d at %H:%M} UTC")
    return identity


def names_of(facts: Mapping[str, Iterable[bytes]]) -> list[str]:
    """Return the names in the certificate of a client, from gRPC's facts about its connection: the common name first,
    then those of the subjectAltName.
    """
    contents = [each for key in ("x509_common_name", "x509_subject_alternative_name") for each in facts.get(key, ())]
    return [name for name in (each.decode(errors="replace") for each in contents) if name]


def _token_of(headers: Headers) -> str | None:
    given = [content for key, content in headers if key == "authorization"]
    if not given:
        return None
    if len(given) > 1:
        raise UnauthenticatedError("the call has several tokens: send one")
    text = given[0]
    if not isinstance(text, str) or text[: len(_BEARER)].lower() != _BEARER:
        raise UnauthenticatedError("the header authorization is not Bearer and a token")
    return text[len(_BEARER) :].strip()
