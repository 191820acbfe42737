"""Guard: asks the rules of a session about each call. It stands in front of both services of a server with tokens.

`kinds.py` says what each rpc asks for, and what of its answer may be read; `state.access` decides. Workers of pools
call at addresses of their own, which have no guard: what they do, their tool does.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final

from google.protobuf.descriptor import ServiceDescriptor

from dspex_persist.infra.access.tokens import ADMIN, CALLER, READ, Identity
from dspex_persist.infra.mailbox import LoopMailbox
from dspex_persist.infra.server import Service
from dspex_persist.infra.workers.errors import without_output
from dspex_persist.state import commands
from dspex_persist.state.abilities import Auditable
from dspex_persist.state.access import ACCESS, Access, May, grants_of
from dspex_persist.state.audit import HistoryQuery
from dspex_persist.state.bridge.access.asks import Ask
from dspex_persist.state.bridge.access.calls import GuardedCall
from dspex_persist.state.bridge.access.denials import Denials
from dspex_persist.state.bridge.access.kinds import (
    KIND_OF,
    InSession,
    OfExecution,
    OfHistory,
    OfServer,
    OfWorkers,
    plain_error,
)
from dspex_persist.state.bridge.access.lives import Lives
from dspex_persist.state.bridge.access.permitted import PERMIT, Permit, absent_id, renamed
from dspex_persist.state.bridge.access.scopes import SCOPE_OF
from dspex_persist.state.bridge.capabilities import Capabilities, bare
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.headers import ASKED_BY, EXECUTION_ID
from dspex_persist.state.bridge.incoming import Context, RequestHeaders
from dspex_persist.state.errors import (
    AccessDeniedError,
    ExecutionNotFoundError,
    InvalidArgumentError,
    NotInHistoryError,
    SessionNotFoundError,
    StateError,
    VariableNotFoundError,
)
from dspex_persist.state.model import Origin
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.tools.session import ToolSession
from dspex_persist.state.tools.with_tools import WithTools

Method = Callable[[Any, Any], Awaitable[Any]]

_PEEKING: Final = Origin("", commands.PeekSession.__name__)


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
                plain = plain_error(ask, error)
                if plain is error:
                    raise
                raise plain from None
            return await self._again(rpc, kind, ask, call, response, reads=reads)

        return method

    async def _again(
        self, rpc: str, kind: InSession, ask: Ask, call: GuardedCall, response: Any, *, reads: bool
    ) -> Any:
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
            if ask.answer_takes_long:
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

    async def _check(self, rpc: str, kind: InSession, ask: Ask, call: GuardedCall) -> None:
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

    def _read(self, rpc: str, context: Context, identity: Identity) -> GuardedCall:
        """Return the call, with what its headers say about an execution."""
        call = GuardedCall(context, identity)
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
        self, rpc: str, call: GuardedCall, shown: str, identity: Identity
    ) -> tuple[str, ToolSession | None, bool]:
        """Return the execution for which a call speaks: its id, what it is, and whether its capability was shown.

        Raises:
            ExecutionNotFoundError: It is not the caller's.
        """
        execution_id = bare(shown)
        if not self._runner.running.is_running(execution_id):
            return execution_id, None, False
        session = self._runner.running.session_of(execution_id)
        if shown != execution_id:
            if self._capabilities.holds(shown):
                return execution_id, session, True
        elif (began := session.request.origin.identity) is not None and began.name == identity.name:
            return execution_id, session, False
        self._denials.note(rpc, call, "execution of another", session.session_id)
        raise ExecutionNotFoundError(execution_id)

    def _check_written(self, rpc: str, call: GuardedCall, session: ToolSession, identity: Identity) -> None:
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
