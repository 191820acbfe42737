"""Guard: asks the rules of a session about each call. It stands in front of both services of a server with tokens.

`state.access` decides; this module knows what each rpc asks for, and leaves out of responses what the rules do not
allow to read. Workers of pools call at addresses of their own, which have no guard: what they do, their tool does.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from google.protobuf.descriptor import ServiceDescriptor

from dspex_persist import clock
from dspex_persist.infra.access.tokens import ADMIN, CALLER, READ, Identity
from dspex_persist.infra.mailbox import LoopMailbox
from dspex_persist.infra.server import Service
from dspex_persist.infra.workers.errors import without_output
from dspex_persist.state import commands
from dspex_persist.state.abilities import Auditable
from dspex_persist.state.access import ACCESS, EVERYTHING, Access, Grants, May, grants_of, may_merge
from dspex_persist.state.audit import HistoryQuery
from dspex_persist.state.bridge.access.denials import Denials
from dspex_persist.state.bridge.access.lives import Lives
from dspex_persist.state.bridge.access.permitted import PERMIT, Permit, absent_id, renamed
from dspex_persist.state.bridge.access.scopes import SCOPE_OF
from dspex_persist.state.bridge.capabilities import Capabilities, bare
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as audit_pb
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.headers import ASKED_BY, BINARY, EXECUTION_ID, IDEMPOTENCY_KEY
from dspex_persist.state.bridge.incoming import Context, RequestHeaders, check_count
from dspex_persist.state.bridge.status import facts_of, text_of
from dspex_persist.state.errors import (
    AccessDeniedError,
    DependencyCycleError,
    ExecutionConflictError,
    ExecutionNotFoundError,
    InvalidArgumentError,
    NotInHistoryError,
    RuleNotFoundError,
    RuleViolatedError,
    SessionNotFoundError,
    StateError,
    ToolNotFoundError,
    VariableNotFoundError,
    quote,
)
from dspex_persist.state.model import Origin, Session
from dspex_persist.state.rules import compile_expression
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.tools.requests import IDEMPOTENCY_KEY as KEY_IN_METADATA
from dspex_persist.state.tools.runner import ToolRunner, unknown_tool
from dspex_persist.state.tools.session import ToolSession
from dspex_persist.state.tools.with_tools import WithTools
from dspex_persist.state.values.json_text import RefusedError

Method = Callable[[Any, Any], Awaitable[Any]]

_PEEKING: Final = Origin("", commands.PeekSession.__name__)
_OF_EXECUTION: Final = frozenset((EXECUTION_ID, ASKED_BY, EXECUTION_ID + BINARY, ASKED_BY + BINARY))
_TOOL_NAME: Final = "tool_name"
_HIDDEN: Final = "(hidden)"
_BATCHES: Final = ("updates", "definitions", "variable_identifiers")
_MUCH_WORK: Final = 2_000
"""So many questions whether a rule is about a variable hold up the event loop."""
_MORE_IN_ID: Final = 64
"""How much longer than its name the id of a variable may be."""
_SEPARATOR: Final = "|"
"""Between the name of an identity, which cannot have it, and an idempotency key."""


class Ask:
    """A call on a session, and what the caller may do there.

    Attributes:
        rpc: The name of the rpc.
        identity: Who calls.
        request: The request. What the rules do not allow may be taken out of it.
        session_id: The session.
        state: The session; None if it is not live.
        access: Its rules; None if it has none.
        grants: What the caller may do.
        execution: The execution of this session that the call is part of.
        has_shown: Whether the call has shown the capability of that.
        runner: Has the tools.
        limits: What names and batches are within.
        errors: Errors to add to the response, by identifier.
    """

    __slots__ = (
        "access",
        "errors",
        "execution",
        "grants",
        "has_shown",
        "identity",
        "limits",
        "request",
        "rpc",
        "runner",
        "session_id",
        "state",
    )

    def __init__(
        self,
        rpc: str,
        identity: Identity,
        request: Any,
        session_id: str,
        execution: ToolSession | None,
        has_shown: bool,
        runner: ToolRunner,
    ) -> None:
        self.rpc = rpc
        self.identity = identity
        self.request = request
        self.session_id = session_id
        self.state: SessionState | None = None
        self.access: Access | None = None
        self.grants: Grants = EVERYTHING
        self.execution = execution if execution is not None and execution.session_id == session_id else None
        self.has_shown = has_shown
        self.runner = runner
        self.limits = runner.limits
        self.errors: dict[str, StateError] = {}

    def look(self, state: SessionState | None) -> None:
        """Take the rules of the session as they are now."""
        if state is not None and state.lease is not None and state.is_over(clock.steady()):
            state = None
        self.state = state
        self.access = None if state is None else Access.of(state.session.metadata)
        if self.execution is not None and self.has_shown:
            # What a tool does is not limited: whoever may execute it gets what it does.
            self.grants = EVERYTHING
        else:
            self.grants = grants_of(self.access, self.identity)

    @property
    def session(self) -> Session | None:
        """The session, which is another object when its metadata have changed."""
        return None if self.state is None else self.state.session

    @property
    def takes_long(self) -> bool:
        """Whether comparing the names in the request with the rules would block an event loop too long."""
        names = sum(len(getattr(self.request, field, ())) for field in _BATCHES)
        return names * len(self.grants.rules) > _MUCH_WORK

    def name_of(self, identifier: str) -> str:
        """Return the name of a variable that is given by its name or id; the identifier itself if there is none."""
        found = None
        if self.execution is not None:
            found = self.execution.execution.overlay.find(identifier)
        elif self.state is not None:
            found = self.state.find(identifier)
        return identifier if found is None else found.name

    def may(self, what: May, identifier: str) -> bool:
        """Whether the caller may do something with a variable."""
        return self.grants.may(what, self._compared(self.name_of(identifier)))

    def need(self, what: May, identifier: str) -> None:
        """Raise unless the caller may do something with a variable."""
        if not self.may(what, identifier):
            if self.grants.may(what, self._compared(identifier)):
                # It is the id of a variable about which the caller must not know anything.
                raise VariableNotFoundError(self.session_id, identifier)
            raise self.denied(f"{what} of {quote(identifier)}")

    def need_all(self, what: May) -> None:
        """Raise unless the caller may do something with all variables."""
        if not self.grants.may_with_all(what):
            raise self.denied(f"{what} of all variables")

    def need_any(self, what: May) -> None:
        """Raise unless the caller may do something with some variable."""
        if not self.grants.may_with_any(what):
            raise self.denied(f"{what} of any variable")

    def executable(self) -> list[str]:
        """Return the names of the tools that the caller may execute."""
        tools = self.runner.available({} if self.state is None else self.state.tools)
        return [name for name in tools if self.grants.may_execute(name)]

    def need_tool(self, tool: str) -> None:
        """Raise unless the caller may execute a tool."""
        if not self.grants.may_execute(self._compared(tool)):
            raise self.denied(f"{May.EXECUTE} of {quote(tool)}")

    def _compared(self, name: str) -> str:
        """Return as much of a name as rules are compared with. Nothing has a longer one; a request can."""
        return name[: self.limits.name_length + _MORE_IN_ID]

    def denied(self, missing: str) -> AccessDeniedError:
        """Return the error for what the rules do not allow."""
        return AccessDeniedError(self.identity.name, self.rpc, self.session_id, missing)


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


class _Call:
    """A call whose headers are read once, and may be changed.

    Attributes:
        identity: Who makes it.
        access: The rules of its session by which it was admitted.
        execution: The execution that it is part of.
        has_shown: Whether it has shown the capability of that.
    """

    def __init__(self, context: Context, identity: Identity) -> None:
        self.identity = identity
        self.access: Access | None = None
        self._context = context
        self._metadata: tuple[tuple[str, str | bytes], ...] = tuple(context.invocation_metadata() or ())
        self.execution: ToolSession | None = None
        self.has_shown = False

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return the headers."""
        return self._metadata

    @property
    def speaks_for(self) -> tuple[ToolSession | None, bool]:
        """The execution, and whether its capability was shown."""
        return self.execution, self.has_shown

    @property
    def names_execution(self) -> bool:
        """Whether a header names an execution."""
        return any(key in _OF_EXECUTION for key, _ in self._metadata)

    @property
    def has_key(self) -> bool:
        """Whether it has an idempotency key."""
        return any(key.removesuffix(BINARY) == IDEMPOTENCY_KEY for key, _ in self._metadata)

    def put(self, header: str, text: str | None) -> None:
        """Set a header, or remove it."""
        kept = tuple(entry for entry in self._metadata if entry[0].removesuffix(BINARY) != header)
        self._metadata = kept if text is None else (*kept, (header + BINARY, text.encode(errors="replace")))

    def use_own_keys(self, identity: Identity, request: Any, longest: int) -> None:
        """Keep the idempotency keys of an identity apart from those of others: it may not read their outcomes."""

        def own(key: str) -> str:
            kept = f"{identity.name}{_SEPARATOR}{key}"
            if len(kept) > longest >= len(key):
                # It would be too long with the name.
                kept = f"{identity.name}{_SEPARATOR}{hashlib.sha256(key.encode(errors='replace')).hexdigest()}"
            return kept

        self._metadata = tuple(
            (key, own(content) if isinstance(content, str) else own(content.decode(errors="replace")).encode())
            if key.removesuffix(BINARY) == IDEMPOTENCY_KEY
            else (key, content)
            for key, content in self._metadata
        )
        if _TOOL_NAME in request.DESCRIPTOR.fields_by_name and request.metadata.get(KEY_IN_METADATA):
            request.metadata[KEY_IN_METADATA] = own(request.metadata[KEY_IN_METADATA])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class _Methods:
    """The methods of a service, by the names of its rpcs."""


def guarded(
    services: Sequence[Service],
    provider: WithTools,
    lives: Lives,
    capabilities: Capabilities | None,
    denials: Denials,
) -> Sequence[Service]:
    """Have the rules of sessions asked about each call of these services.

    Args:
        services: The services.
        provider: Has the sessions.
        lives: Finds the rules.
        capabilities: What processes show that run an execution; None if the server demands no tokens: it knows nobody,
            and pays for no rules.
        denials: Notes the calls that are refused.
    """
    if capabilities is None:
        return services
    guard = Guard(provider, lives, capabilities, denials)
    return [Service(each.descriptor, guard.over(each.descriptor, each.servicer)) for each in services]


class Guard:
    """Asks the rules of sessions about the calls of a server. Made and used on one event loop.

    Args:
        provider: Has the sessions.
        lives: Finds the rules.
        capabilities: What processes show that run an execution.
        denials: Notes the calls that are refused.
    """

    def __init__(self, provider: WithTools, lives: Lives, capabilities: Capabilities, denials: Denials) -> None:
        self._provider = provider
        self._runner = provider.runner
        self._limits = provider.runner.limits
        self._lives = lives
        self._peek = lives.peek
        self._capabilities = capabilities
        self._denials = denials
        self._submit = provider.on_loop(LoopMailbox(asyncio.get_running_loop()))

    def over(self, service: ServiceDescriptor, servicer: object) -> object:
        """Return a servicer that asks the rules before, and after, each call of another one.

        Raises:
            TypeError: Nothing says what one of the rpcs asks for.
        """
        methods = _Methods()
        for method in service.methods:
            run = getattr(servicer, method.name, None)
            if run is not None:
                setattr(methods, method.name, self._guarded(method.full_name, run))
        return methods

    def _guarded(self, rpc: str, run: Method) -> Method:
        kind = KIND_OF.get(rpc)
        match kind:
            case InSession():
                return self._in_session(rpc, kind, run)
            case OfExecution():
                return self._of_execution(rpc, run)
            case OfHistory():
                return self._of_history(rpc, run)
            case OfWorkers():
                return self._of_workers(run)
            case OfServer():
                return run
        raise TypeError(f"{rpc} has no row in {__name__}")

    # The kinds of rpcs

    def _of_history(self, rpc: str, run: Method) -> Method:
        async def method(request: Any, context: Context) -> Any:
            self._permit(rpc, context)
            return await run(request, context)

        return method

    def _of_workers(self, run: Method) -> Method:
        async def method(request: Any, context: Context) -> Any:
            response, identity = await run(request, context), CALLER.get()
            if identity is not None and not identity.may(ADMIN):
                for pool in response.pools:
                    # What a worker wrote may be about any session.
                    pool.last_failure = without_output(pool.last_failure)
                    for worker in pool.workers:
                        if worker.key and not await self._sees(worker.key, identity):
                            worker.key = ""
            return response

        return method

    async def _sees(self, session_id: str, identity: Identity) -> bool:
        state = self._peek(session_id) or await self._load(session_id)
        return state is not None and grants_of(Access.of(state.session.metadata), identity).sees

    def _of_execution(self, rpc: str, run: Method) -> Method:
        commits = rpc.endswith(".CommitTransaction")

        async def method(request: Any, context: Context) -> Any:
            identity = CALLER.get()
            if identity is None:
                return await run(request, context)
            call = self._read(rpc, context, identity)
            session, has_shown = call.execution, call.has_shown
            if session is None or session.execution_id != request.execution_id:
                request.execution_id, session, has_shown = self._speaking(rpc, call, request.execution_id, identity)
            if commits and session is not None and not has_shown:
                self._check_written(rpc, call, session, identity)
            return await run(request, call)

        return method

    def _in_session(self, rpc: str, kind: InSession, run: Method) -> Method:
        name = rpc.rpartition(".")[2]
        reads, watches = SCOPE_OF[rpc] == READ or kind.always, name == "WatchVariables"

        async def method(request: Any, context: Context) -> Any:
            identity = CALLER.get()
            if identity is None:
                return await run(request, context)
            _check_place_of_rules(request, self._limits.batch_entries)
            call = self._read(rpc, context, identity)
            ask = Ask(name, identity, request, getattr(request, kind.session), *call.speaks_for, self._runner)
            ask.look(self._peek(ask.session_id) or await self._load(ask.session_id))
            past = kind.past or (kind.ends and ask.state is None and call.has_key)
            if ask.access is None and not past and not kind.always and not watches:
                # The usual case: the session has no rules.
                return await self._again(rpc, kind, ask, call, await run(request, call), reads=reads)
            if past and not identity.may(ADMIN):
                await self._look_back(ask)
            if not ask.grants.sees and not kind.always:
                self._denials.note(rpc, context, "rule", ask.session_id)
                return await _without(ask, kind, partial(run, request, call))
            await self._check(rpc, kind, ask, call)
            call.access = ask.access
            if not ask.grants.everything:
                call.use_own_keys(identity, request, self._limits.name_length)
            if watches:
                self._permit(rpc, call, whole=True)
            try:
                response = await run(request, call)
            except StateError as error:
                plain = _plain(ask, error)
                if plain is error:
                    raise
                raise plain from None
            return await self._again(rpc, kind, ask, call, response, reads=reads)

        return method

    async def _again(self, rpc: str, kind: InSession, ask: Ask, call: "_Call", response: Any, *, reads: bool) -> Any:
        """Return a response, without what may not be read. The rules may have changed while the call was answered."""
        now = self._peek(ask.session_id) if reads else None
        if now is None and reads and ask.state is not None:
            # It has left memory, perhaps because another server has changed it.
            now = await self._load(ask.session_id)
        if now is not None and now.session is not ask.session:
            ask.look(now)
            if not ask.grants.sees and not kind.always:
                raise SessionNotFoundError(ask.session_id)
            await self._check(rpc, kind, ask, call)
        if ask.access is not None and response is not None:
            if ask.state is not None and len(ask.state.variables) * len(ask.access.rules) > _MUCH_WORK:
                await asyncio.to_thread(kind.shape, ask, response)
            else:
                kind.shape(ask, response)
        return response

    async def _load(self, session_id: str) -> SessionState | None:
        return await self._submit(commands.PeekSession(session_id), _PEEKING)

    def _permit(self, rpc: str, context: Any, *, whole: bool = False) -> None:
        """Have what is answered in pieces leave out what the caller may not see; `whole`: also for who sees all."""
        identity = CALLER.get()
        if identity is not None and (whole or not identity.may(ADMIN)):

            def note(session_id: str) -> None:
                # On another thread, which does not know the caller.
                self._denials.note(rpc, context, "rule", session_id, caller=identity)

            PERMIT.set(Permit(identity, self._lives, note))

    async def _check(self, rpc: str, kind: InSession, ask: Ask, call: "_Call") -> None:
        if ask.grants.everything and not kind.always:
            return
        try:
            if ask.takes_long:
                await asyncio.to_thread(kind.check, ask)
            else:
                kind.check(ask)
            if ask.rpc == "GetVariableHistory" and not ask.grants.everything:
                await self._check_gone(ask)
        except (AccessDeniedError, VariableNotFoundError) as error:
            missing = error.missing.partition(" of ")[0] if isinstance(error, AccessDeniedError) else May.READ.value
            self._denials.note(rpc, call, f"rule for {missing}", ask.session_id)
            raise

    async def _check_gone(self, ask: Ask) -> None:
        """Look up the name of a variable that is gone, and may be given by its id."""
        identifier = ask.request.variable_identifier
        if ask.state is not None and ask.state.find(identifier) is None:
            names = await asyncio.to_thread(self._names_of, ask.session_id, identifier)
            if not all(ask.grants.may(May.READ, each) for each in names):
                raise VariableNotFoundError(ask.session_id, identifier)

    def _names_of(self, session_id: str, identifier: str) -> list[str]:
        try:
            with Auditable.of(self._provider).audit() as audit:
                rows = audit.page(HistoryQuery(session=session_id, variable=identifier)).rows
        except NotInHistoryError:
            return []
        return [row.name for row in rows]

    async def _look_back(self, ask: Ask) -> None:
        """Look at the rules of all sessions that a call on the history may be about."""
        lives = await asyncio.to_thread(self._lives.all_of, ask.session_id)
        started = ask.request.started if _has(ask.request, "started") else None
        if ask.rpc in _ONE_LIFE:
            # Whoever names a beginning that is none hears which one is, so that all of them count.
            lives = [life for life in lives if life.began == started] or lives if started is not None else lives[-1:]
        least = [grants_of(life.access, ask.identity) for life in lives]
        if least:
            # What it may do with the session of which it may do least.
            ask.grants = min(least, key=lambda grants: (grants.sees, grants.may_with_all(May.READ), grants.everything))

    # Executions

    def _read(self, rpc: str, context: Context, identity: Identity) -> "_Call":
        """Return the call, with what its headers say about an execution."""
        call = _Call(context, identity)
        if call.names_execution:
            headers = RequestHeaders(call)  # type: ignore[arg-type]
            shown, asker = headers.find(EXECUTION_ID), headers.find(ASKED_BY)
            if shown is not None:
                execution_id, call.execution, call.has_shown = self._speaking(rpc, call, shown, identity)
                call.put(EXECUTION_ID, execution_id)
            if asker is not None:
                try:
                    call.put(ASKED_BY, self._speaking(rpc, call, asker, identity)[0])
                except ExecutionNotFoundError:
                    # As one that has ended: nobody waits.
                    call.put(ASKED_BY, None)
        return call

    def _speaking(
        self, rpc: str, call: "_Call", shown: str, identity: Identity
    ) -> tuple[str, ToolSession | None, bool]:
        """Return the execution for which a call speaks: its id, what it is, and whether its capability was shown.

        Raises:
            ExecutionNotFoundError: It is not the caller's.
        """
        execution_id = bare(shown)
        if not self._runner.is_running(execution_id):
            return execution_id, None, False
        session = self._runner.session_of(execution_id)
        if shown != execution_id:
            if self._capabilities.holds(shown):
                return execution_id, session, True
        elif (began := session.request.origin.identity) is not None and began.name == identity.name:
            return execution_id, session, False
        self._denials.note(rpc, call, "execution of another", session.session_id)
        raise ExecutionNotFoundError(execution_id)

    def _check_written(self, rpc: str, call: "_Call", session: ToolSession, identity: Identity) -> None:
        """Refuse to commit what the rules do not allow to write by now."""
        ask = Ask("CommitTransaction", identity, None, session.session_id, session, False, self._runner)
        state = self._peek(session.session_id)
        if state is None:
            return
        ask.look(state)
        try:
            for identifier in tuple(session.execution.overlay.written):
                ask.need(May.WRITE, identifier)
        except StateError:
            self._denials.note(rpc, call, f"rule for {May.WRITE}", session.session_id)
            raise


def _check_place_of_rules(request: Any, most: int) -> None:
    """Refuse rules in the metadata of a variable, where they would protect nothing.

    Of more than `most` variables, others refuse all.
    """
    if isinstance(request, pb.InitializeSessionRequest):
        return
    for each in (request, *getattr(request, "definitions", ())[:most]):
        if ACCESS in getattr(each, "metadata", ()):
            reason = f"{ACCESS} is an entry of a session's metadata, for its variables, too: InitializeSession sets it"
            raise InvalidArgumentError("metadata", reason)


_ONE_LIFE: Final = ("RecordSession", "GetContentHash", "CleanupSession")


def _has(request: Any, field: str) -> bool:
    return field in request.DESCRIPTOR.fields_by_name and request.HasField(field)


async def _without(ask: Ask, kind: InSession, run: Callable[[], Awaitable[Any]]) -> Any:
    """Answer a call about a session that its caller may not see, as if it was not there."""
    absent = absent_id()
    setattr(ask.request, kind.session, absent)
    try:
        return await run()
    except NotInHistoryError as error:
        raise NotInHistoryError(error.what, ask.session_id, "") from None
    except StateError as error:
        renamed(error, absent, ask.session_id)
        raise


def _plain(ask: Ask, error: StateError) -> StateError:
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
