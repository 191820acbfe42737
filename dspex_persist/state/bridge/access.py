"""Which scope each rpc takes, and the check of a call's token against it."""

from collections.abc import Mapping
from typing import Any, Final

from dspex_persist.infra.tokens import ADMIN, CALLER, EXECUTE, READ, WRITE, Identity, Tokens
from dspex_persist.state.bridge.denials import Denials
from dspex_persist.state.errors import PermissionDeniedError, UnauthenticatedError

_OPEN: Final = ""
"""For everybody, also without a token."""
_ANY: Final = "any"
"""For every token."""
_BEARER: Final = "bearer "

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


class Access:
    """Admits the calls whose token has the scope of their rpc, and notes whose it is.

    Args:
        tokens: The tokens.
        denials: Notes the calls that are refused.
    """

    def __init__(self, tokens: Tokens, denials: Denials | None = None) -> None:
        self._tokens = tokens
        self._denials = denials or Denials()

    def admit(self, rpc: str, context: Any) -> None:
        """Admit a call, or raise.

        Args:
            rpc: The full name of the rpc.
            context: gRPC's context of the call.

        Raises:
            UnauthenticatedError: It has no token, or one that is not valid.
            PermissionDeniedError: Its token lacks the scope.
        """
        scope = SCOPE_OF.get(rpc, ADMIN)
        if scope == _OPEN:
            return
        try:
            identity = self._identity_of(context)
        except UnauthenticatedError as error:
            self._denials.note(rpc, context, error.reason)
            raise
        CALLER.set(identity)
        if scope != _ANY and not identity.may(scope):
            self._denials.note(rpc, context, f"scope {scope}")
            raise PermissionDeniedError(identity.name, rpc.rpartition(".")[2], scope)

    def _identity_of(self, context: Any) -> Identity:
        identity = self._tokens.find(_token_of(context))
        if identity is None:
            raise UnauthenticatedError("the token is not valid here: it is wrong, or was revoked")
        return identity


def _token_of(context: Any) -> str:
    given = [content for key, content in context.invocation_metadata() or () if key == "authorization"]
    if not given:
        raise UnauthenticatedError("the call has no token, and this server demands one")
    if len(given) > 1:
        raise UnauthenticatedError("the call has several tokens: send one")
    text = given[0]
    if not isinstance(text, str) or text[: len(_BEARER)].lower() != _BEARER:
        raise UnauthenticatedError("the header authorization is not Bearer and a token")
    return text[len(_BEARER) :].strip()
