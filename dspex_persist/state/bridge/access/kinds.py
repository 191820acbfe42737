"""What each rpc asks of the rules of its session, and what they leave of its answer: a table has a row for each."""

from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Final

from dspex_persist.infra.access.tokens import ADMIN
from dspex_persist.state.access import Grants, May, may_merge
from dspex_persist.state.bridge.access.asks import Ask
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as audit_pb
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.incoming import check_count
from dspex_persist.state.bridge.status import facts_of, text_of
from dspex_persist.state.errors import (
    DependencyCycleError,
    ExecutionConflictError,
    NotInHistoryError,
    RuleNotFoundError,
    RuleViolatedError,
    StateError,
    ToolNotFoundError,
    VariableNotFoundError,
)
from dspex_persist.state.rules import compile_expression
from dspex_persist.state.tools.catalog import unknown_tool
from dspex_persist.state.values.json_text import RefusedError

_HIDDEN: Final = "(hidden)"

Check = Callable[[Ask], None]
Shape = Callable[[Ask, Any], None]


def _seen(_: Ask) -> None:
    """Whoever sees the session may make the call."""


def _keep(_: Ask, __: Any) -> None:
    """The response has nothing to leave out."""


@dataclass(frozen=True, slots=True)
class InSession:
    """An rpc on a live session.

    Attributes:
        check: Raises for what the rules do not allow.
        shape: Takes out of the response what they do not allow.
        session: The field of the request with the session.
        past: Whether all sessions that ever had this id count.
        always: Whether the session need not be seen: `check` decides.
        ends: Whether it ends the session. Its outcome is kept under its idempotency key for whoever repeats it.
    """

    check: Check = _seen
    shape: Shape = _keep
    session: str = "session_id"
    past: bool = False
    always: bool = False
    ends: bool = False


@dataclass(frozen=True, slots=True)
class OfExecution:
    """An rpc on a running execution, for those who may speak for it."""


@dataclass(frozen=True, slots=True)
class OfHistory:
    """An rpc that asks a source of audits, which leaves out what may not be seen."""


@dataclass(frozen=True, slots=True)
class OfServer:
    """An rpc about no session, or for administrators, who may do everything."""


@dataclass(frozen=True, slots=True)
class OfWorkers:
    """An rpc whose response names the sessions of calls that run."""


Kind = InSession | OfExecution | OfHistory | OfServer | OfWorkers


# Checks


def _variable(*needed: May, field: str = "variable_identifier") -> Check:
    def check(ask: Ask) -> None:
        for what in needed:
            ask.need(what, getattr(ask.request, field))

    return check


def _all(*needed: May) -> Check:
    def check(ask: Ask) -> None:
        for what in needed:
            ask.need_all(what)

    return check


def _dependency(ask: Ask) -> None:
    ask.need(May.WRITE, ask.request.from_variable)
    ask.need(May.READ, ask.request.to_variable)


def _check_batch(ask: Ask, what: str, entries: Sized) -> None:
    check_count(what, entries, ask.limits.batch_entries, "batch_entries")


def _definitions(ask: Ask) -> None:
    _check_batch(ask, "definitions", ask.request.definitions)
    for each in ask.request.definitions:
        ask.need(May.WRITE, each.name)


def _tool(ask: Ask) -> None:
    ask.need_tool(ask.request.tool_name)


def _watched(ask: Ask) -> None:
    _check_batch(ask, "variables in the batch", ask.request.variable_identifiers)
    for identifier in ask.request.variable_identifiers:
        ask.need(May.OBSERVE, identifier)


def _begin(ask: Ask) -> None:
    state, metadata = ask.state, ask.request.metadata
    if state is None:
        return
    if not ask.grants.sees:
        # Its id is taken, which nobody who wants to begin a session can overlook.
        raise ask.denied("any use of it")
    kept = state.session.metadata
    if not may_merge(metadata, kept, ask.identity):
        raise ask.denied("other rules")
    if not metadata.items() <= kept.items():
        ask.need_all(May.WRITE)


def _updates(ask: Ask) -> None:
    request = ask.request
    _check_batch(ask, "updates in the batch", request.updates)
    for identifier in sorted(request.updates):
        try:
            ask.need(May.WRITE, identifier)
        except StateError as error:
            if request.atomic:
                raise
            ask.errors[identifier] = error
            del request.updates[identifier]
            request.binary_updates.pop(identifier, None)


def _transaction(ask: Ask) -> None:
    ask.need_any(May.WRITE)


# Responses


def _describe(ask: Ask, message: pb.Variable) -> None:
    assert ask.access is not None, "only responses about sessions with rules are shaped"
    message.access_control_json = ask.access.about(message.name, ask.grants)


def _filter(ask: Ask, messages: Any, may: Callable[[Any], bool]) -> None:
    """Remove the messages of a repeated field that may not be seen."""
    if not ask.grants.everything:
        for place in reversed(range(len(messages))):
            if not may(messages[place]):
                del messages[place]


def _one(ask: Ask, response: Any) -> None:
    if response.HasField("variable"):
        _describe(ask, response.variable)


def _listed(ask: Ask, response: pb.ListVariablesResponse) -> None:
    _filter(ask, response.variables, lambda message: ask.grants.may(May.READ, message.name))
    for message in response.variables:
        _describe(ask, message)


def _mapped(ask: Ask, messages: Any) -> list[str]:
    """Remove the variables of a map that may not be read, and return their keys."""
    hidden = [key for key, message in messages.items() if not ask.grants.may(May.READ, message.name)]
    for key in hidden:
        del messages[key]
    for message in messages.values():
        _describe(ask, message)
    return hidden


def _found(ask: Ask, response: pb.BatchGetVariablesResponse) -> None:
    missing = {*response.missing_variables, *_mapped(ask, response.variables)}
    response.missing_variables[:] = [each for each in ask.request.variable_identifiers if each in missing]


def _batch(ask: Ask, response: pb.BatchSetVariablesResponse) -> None:
    if not ask.grants.everything:
        known = () if ask.state is None else ask.state.variables
        for identifier, text in response.errors.items():
            if ask.name_of(identifier) not in known:
                # The text may suggest another name.
                response.errors[identifier] = VariableNotFoundError(ask.session_id, identifier).sentence
            elif text.startswith("rule ") and not ask.grants.may_with_all(May.READ):
                response.errors[identifier] = "a rule of the session refuses the change"
    for identifier, error in ask.errors.items():
        response.errors[identifier] = error.sentence
    if ask.errors and not response.new_versions:
        response.success = False


def _begun(ask: Ask, response: pb.InitializeSessionResponse) -> None:
    _mapped(ask, response.initial_variables)
    for name in list(response.available_tools):
        if not ask.grants.may_execute(name):
            del response.available_tools[name]


def _summary(ask: Ask, response: pb.GetSessionResponse) -> None:
    if ask.access is not None and ask.state is not None and not ask.grants.everything:
        metadata = ask.access.shown(dict(response.metadata), ask.grants)
        response.metadata.clear()
        response.metadata.update(metadata)
        response.variable_count = sum(ask.grants.may(May.READ, name) for name in ask.state.variables)
        response.tool_count = len(ask.executable())


def _executed(ask: Ask, response: Any) -> None:
    if not ask.grants.everything and response.metadata["error_code"] == ToolNotFoundError.error_code:
        error = unknown_tool(ask.request.tool_name, ask.executable())
        response.error_message = text_of(error)
        response.metadata["error_fields"] = facts_of(error)


def _tools(ask: Ask, response: pb.GetExposedElixirToolsResponse) -> None:
    _filter(ask, response.tools, lambda message: ask.grants.may_execute(message.name))


def _stopped(ask: Ask, response: pb.StopOptimizationResponse) -> None:
    if not ask.may(May.READ, ask.request.variable_identifier):
        response.ClearField("final_value")


def _names(ask: Ask, response: audit_pb.GetDependenciesResponse) -> None:
    _filter(ask, response.names, lambda name: ask.grants.may(May.READ, name))


def _rules(ask: Ask, response: audit_pb.ListRulesResponse) -> None:
    _filter(ask, response.rules, lambda rule: _may_read_rule(ask.grants, rule.expression))


def _may_read_rule(grants: Grants, expression: str) -> bool:
    if grants.may_with_all(May.READ):
        return True
    try:
        names: Iterable[str] = compile_expression(expression).names
    except RefusedError:
        return False
    return all(grants.may(May.READ, name) for name in names)


_BRIDGE: Final[Mapping[str, Kind]] = {
    "Ping": OfServer(),
    "InitializeSession": InSession(_begin, _begun, always=True),
    "CleanupSession": InSession(_all(May.WRITE), ends=True),
    "GetSession": InSession(shape=_summary),
    "Heartbeat": InSession(),
    "GetVariable": InSession(_variable(May.READ), _one),
    "SetVariable": InSession(_variable(May.WRITE)),
    "GetVariables": InSession(shape=_found),
    "SetVariables": InSession(_updates, _batch),
    "RegisterVariable": InSession(_variable(May.WRITE, field="name")),
    "ListVariables": InSession(shape=_listed),
    "DeleteVariable": InSession(_variable(May.WRITE)),
    "ExecuteTool": InSession(_tool, _executed),
    "ExecuteStreamingTool": InSession(_tool),
    "RegisterTools": OfServer(),
    "GetExposedElixirTools": InSession(shape=_tools),
    "ExecuteElixirTool": InSession(_tool, _executed),
    "WatchVariables": InSession(_watched),
    "AddDependency": InSession(_dependency),
    "StartOptimization": InSession(_variable(May.OPTIMIZE)),
    "StopOptimization": InSession(_variable(May.OPTIMIZE), _stopped),
    "GetVariableHistory": InSession(_variable(May.READ)),
    # Its response has the value that comes back.
    "RollbackVariable": InSession(_variable(May.WRITE, May.READ), _one),
}
_AUDIT: Final[Mapping[str, Kind]] = {
    "GetHead": OfServer(),
    "ResolvePoint": OfHistory(),
    "ListHistory": OfHistory(),
    "ListExecutions": OfHistory(),
    "ListCommits": OfHistory(),
    "ListSessions": OfHistory(),
    "ListLmUsage": OfHistory(),
    "GetExecution": OfHistory(),
    "GetState": OfHistory(),
    "GetVersion": OfHistory(),
    "Prune": OfServer(),
    "RecordSession": InSession(_all(May.READ), session="session", past=True),
    "ForkSession": InSession(_all(May.READ), session="session", past=True),
    "BeginTransaction": InSession(_transaction, session="session"),
    "CommitTransaction": OfExecution(),
    "AbortTransaction": OfExecution(),
    "RestoreSession": InSession(_all(May.READ, May.WRITE), session="session", past=True),
    "ImportSession": OfServer(),
    "GetContentHash": InSession(_all(May.READ), session="session", past=True),
    "RegisterVariables": InSession(_definitions),
    "RemoveDependency": InSession(_dependency),
    "GetDependencies": InSession(_variable(May.READ), _names),
    # Whether the value satisfies other constraints tells something about it.
    "ConstrainVariable": InSession(_variable(May.WRITE, May.READ)),
    # Whether a rule can be added tells something about the values of all its variables.
    "AddRule": InSession(_all(May.READ, May.WRITE)),
    "RemoveRule": InSession(_all(May.READ, May.WRITE)),
    "ListRules": InSession(shape=_rules),
    "RecordInputs": OfExecution(),
    "CheckBudget": OfExecution(),
    "HoldSession": OfServer(),
    "ListWorkers": OfWorkers(),
    "ListDenials": OfServer(),
}
KIND_OF: Final[Mapping[str, Kind]] = {
    **{f"snakepit.bridge.BridgeService.{name}": kind for name, kind in _BRIDGE.items()},
    **{f"dspex.persist.v1.AuditService.{name}": kind for name, kind in _AUDIT.items()},
}
"""What each rpc asks for, by its full name."""


def plain_error(ask: Ask, error: StateError) -> StateError:
    """Return an error without what its receiver may not know."""
    if isinstance(error, NotInHistoryError) and not ask.identity.may(ADMIN):
        # It suggests the names of other sessions.
        return NotInHistoryError(error.what, error.name, "")
    if isinstance(error, ToolNotFoundError) and not ask.grants.everything:
        return unknown_tool(error.name, ask.executable())
    if ask.grants.may_with_all(May.READ):
        return error
    match error:
        case VariableNotFoundError():
            return VariableNotFoundError(error.session_id, error.identifier)
        case RuleNotFoundError():
            return RuleNotFoundError(error.session_id, error.rule)
        case DependencyCycleError():
            return DependencyCycleError(_HIDDEN)
        case ExecutionConflictError():
            return ExecutionConflictError(error.execution_id, "what it depends on")
        case RuleViolatedError() if not _may_read_rule(ask.grants, error.expression):
            return RuleViolatedError(error.rule, _HIDDEN, "it does not hold", "values that you may not read")
    return error
