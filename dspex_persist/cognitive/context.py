"""Context: a session on any backend."""

import asyncio
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from dspex_persist.cognitive import moves
from dspex_persist.cognitive.backends import (
    BRIDGED,
    EMBEDDED,
    LOCAL,
    Backend,
    BackendView,
    Place,
    check_place,
    is_place_there,
)
from dspex_persist.cognitive.deriving import Derived
from dspex_persist.cognitive.describing import Description, in_line, is_numeric, is_sensitive
from dspex_persist.cognitive.errors import ContextClosedError, DspyMissingError
from dspex_persist.cognitive.own_tools import execute_code
from dspex_persist.cognitive.records import VariableInfo, decode, result_of
from dspex_persist.cognitive.rules import Ruled
from dspex_persist.cognitive.steps import (
    DEFAULT,
    Asked,
    Step,
    Steps,
    Terms,
    Work,
    ask,
    run,
    run_aio,
    run_work,
    run_work_aio,
    verb,
    work,
)
from dspex_persist.cognitive.transactions import Transacting
from dspex_persist.cognitive.variables import terms_of
from dspex_persist.cognitive.watching import Watchable, Watchers
from dspex_persist.errors import DspexError
from dspex_persist.infra import forks
from dspex_persist.opening import Opening
from dspex_persist.state import arguments, commands, values
from dspex_persist.state.abilities import Auditable, Derives, ExecutesTools
from dspex_persist.state.audit import AuditSource
from dspex_persist.state.budgets import Budget
from dspex_persist.state.commands.derivations import DERIVED
from dspex_persist.state.commands.sessions import MOST_TTL_S
from dspex_persist.state.errors import (
    DependencyCycleError,
    EngineClosedError,
    InvalidArgumentError,
    SessionNotFoundError,
    VariableNotFoundError,
)
from dspex_persist.state.model import RECORDING, ToolOutcome
from dspex_persist.state.provider import TOOL_TIMEOUT_S, StateProvider
from dspex_persist.state.tools.ports import ToolCode, name_of

if TYPE_CHECKING:
    from dspex_persist.cognitive.dspy.recording import Recording

_TTL = "ttl_seconds"
_RECORD_LM = "DSPEX_PERSIST_RECORD_LM"
_RECENT, _MOST_SPARKLINES = 40, 50


class Context(Transacting, Watchable, Ruled):
    """A session on any backend: its variables, and the tools that work on them.

    Creating the context begins the session, or resumes the live one with its id. Use it in a `with` block, or close it:
    it closes what it opened, and nothing else. It may be used from any thread, and from asyncio by the `aio` of each
    verb, in an `async with` block.

    Args:
        session_id: The id of the session; None makes one up.
        backend: Where the session is: "local" (memory of this context alone), a path or a URL (see
            `dspex_persist.connect`), or a provider that you opened, which the context leaves open.
        ttl_s: For how long the session lives without being used, in seconds; 0 for ever. None leaves it as it is.
        metadata: Texts to keep with the session.
        create: Whether to begin the session if there is no live one.
        actor: Who makes the changes, such as `user:alice`; by default whoever the backend says.
        tools: Tools to call: anything that `Toolbox.of` accepts.
        strict: Whether assigning to a name that is not defined is an error; otherwise it defines a variable.
        durable_at: The file to which the session moves before a tool runs that requires a durable session.
        remote_at: The server to which it moves before a tool runs that requires a remote session.
        record_lm: Whether each call of a program that is bound to it (`dspex_persist.dspy.bind`) is recorded, as in a
            block of `recording`; None for what the environment variable DSPEX_PERSIST_RECORD_LM says. Needs DSPy.
        max_tokens: How many tokens the recorded LM calls of the session may use, in all executions and processes; then
            the next one raises `BudgetExceededError`. It is kept with the session; None leaves it as it is.
        max_cost: The same in USD, as far as the cost of the calls is known.
        options: Further options of `dspex_persist.connect`, if the context opens the backend.

    Attributes:
        session_id: The id of the session.
        resumed: Whether the session existed already.
        backend: Which backend it is on, and where.

    Raises:
        SessionNotFoundError: There is no live session with this id, and `create` is False.
        OpenError: The file cannot be opened.
        InvalidArgumentError: An argument is wrong.
        DspyMissingError: `record_lm` is set, but DSPy is not installed.
    """

    def __init__(
        self,
        session_id: str | None = None,
        backend: Place = LOCAL,
        *,
        ttl_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        create: bool = True,
        actor: str | None = None,
        tools: object = None,
        strict: bool = False,
        durable_at: str | os.PathLike[str] | None = None,
        remote_at: str | None = None,
        record_lm: bool | None = None,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        **options: Any,
    ) -> None:
        self._prepare(session_id, actor, strict, record_lm)
        self._places = _checked_places(durable_at, remote_at)
        begin = self._begin(metadata, ttl_s, create, Budget.of(max_tokens, max_cost))
        self._use(self._open(backend, create, tools, options))
        try:
            self.resumed = run(self, begin)
        except BaseException:
            self._backend.close()
            raise

    @classmethod
    def aopen(
        cls,
        session_id: str | None = None,
        backend: Place = LOCAL,
        *,
        ttl_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        create: bool = True,
        actor: str | None = None,
        tools: object = None,
        strict: bool = False,
        **options: Any,
    ) -> Opening[Self]:
        """Open a context without blocking the event loop; the arguments are those of `Context`.

        Returns:
            What to await, or to use with `async with`.
        """
        opened = cls._aopen(
            session_id,
            backend,
            ttl_s=ttl_s,
            metadata=metadata,
            create=create,
            actor=actor,
            tools=tools,
            strict=strict,
            **options,
        )
        return Opening(opened, lambda context: context.aclose())

    @classmethod
    async def _aopen(
        cls,
        session_id: str | None,
        backend: Place,
        *,
        ttl_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        create: bool = True,
        actor: str | None = None,
        tools: object = None,
        strict: bool = False,
        durable_at: str | os.PathLike[str] | None = None,
        remote_at: str | None = None,
        record_lm: bool | None = None,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        **options: Any,
    ) -> Self:
        self = cls.__new__(cls)
        self._prepare(session_id, actor, strict, record_lm)
        self._places = _checked_places(durable_at, remote_at)
        begin = self._begin(metadata, ttl_s, create, Budget.of(max_tokens, max_cost))
        self._use(await asyncio.to_thread(self._open, backend, create, tools, options))
        try:
            self.resumed = await run_aio(self, begin)
        except BaseException:
            await asyncio.to_thread(self._backend.close)
            raise
        return self

    def _prepare(self, session_id: str | None, actor: str | None, strict: bool, record_lm: bool | None = None) -> None:
        if isinstance(session_id, StateProvider):
            raise InvalidArgumentError(
                "session_id", "it must be a str, not a provider: the session comes first, Context(session_id, provider)"
            )
        self.session_id = f"ses_{secrets.token_hex(8)}" if session_id is None else session_id
        self.strict = arguments.flag("strict", strict)
        self._record_lm = _records_lm(record_lm)
        self._terms = DEFAULT if actor is None else Terms(arguments.text("actor", actor))
        self._closed = False
        self._closing = forks.Lock()
        self._opened_watchers: Watchers | None = None
        self._derived: dict[str, Derived] = {}
        self.resumed = False

    def _open(self, place: Place, create: bool, tools: object, options: Mapping[str, Any]) -> Backend:
        check_place(place)
        arguments.flag("create", create)
        # Opening a file would create it.
        if not create and not is_place_there(place):
            raise SessionNotFoundError(self.session_id)
        return _open(place, tools, options)

    def _use(self, backend: Backend) -> None:
        self._backend, self.backend = backend, BackendView(backend)

    def _begin(
        self, metadata: Mapping[str, str] | None, ttl_s: float | None, create: bool, budget: Budget
    ) -> Steps[bool]:
        facts = {**({} if metadata is None else arguments.mapping("metadata", metadata)), **budget.metadata()}
        if ttl_s is not None:
            facts[_TTL] = f"{_checked_ttl(ttl_s):.15g}"
        if not create:
            yield from ask(commands.GetSession(self.session_id))
        if facts or create:
            return (yield from ask(commands.InitializeSession(self.session_id, facts))).resumed
        return True

    def _beside(self, session_id: str) -> Self:
        context = type(self).__new__(type(self))
        context._prepare(session_id, self._terms.actor, self.strict, self._record_lm)
        context._use(Backend(self._backend.provider, is_owned=False, url=self._backend.url))
        return context

    @classmethod
    def _on(cls, session_id: str, provider: StateProvider) -> Self:
        """Return a context that neither begins the session nor asks whether it is there; it closes the provider."""
        context = cls.__new__(cls)
        context._prepare(session_id, None, strict=True)
        context._use(Backend(provider, is_owned=True))
        return context

    # Steps

    def _run_step(self, step: Step) -> Any:
        """See `Runs`."""
        if self._closed:
            raise ContextClosedError(self.session_id)
        kind, terms = type(step), self._terms
        if kind is Work:
            return run_work(step)  # type: ignore[arg-type]
        if kind is Asked:
            terms = self._signed(step.terms)  # type: ignore[union-attr]
            step = step.command  # type: ignore[union-attr]
        try:
            return self._backend.run(step, terms)  # type: ignore[arg-type]
        except EngineClosedError:
            if self._closed:
                raise ContextClosedError(self.session_id) from None
            raise

    async def _run_step_aio(self, step: Step) -> Any:
        """See `Runs`."""
        if self._closed:
            raise ContextClosedError(self.session_id)
        if isinstance(step, Work):
            return await run_work_aio(step)
        command, terms = (step.command, self._signed(step.terms)) if isinstance(step, Asked) else (step, self._terms)
        try:
            return await self._backend.run_aio(command, terms)
        except EngineClosedError:
            if self._closed:
                raise ContextClosedError(self.session_id) from None
            raise

    def _signed(self, terms: Terms) -> Terms:
        return terms if terms.actor is not None else terms._replace(actor=self._terms.actor)

    # Tools, and the session

    @verb
    def execute(
        self,
        tool: ToolCode | str,
        parameters: Mapping[str, object],
        *,
        metadata: Mapping[str, str] | None = None,
        timeout_s: float = TOOL_TIMEOUT_S,
        actor: str | None = None,
        reason: str | None = None,
        idempotency_key: str | None = None,
    ) -> Steps[Any]:
        """Execute a tool as one transaction: `call`, with options.

        Args:
            tool: The tool, or its name.
            parameters: The tool's arguments by name.
            metadata: Texts to record with the execution.
            timeout_s: How long to wait, in seconds; then the execution ends as timed out.
            actor: Who asks for it; by default the actor of the context.
            reason: Why.
            idempotency_key: With the same key, the tool runs only once; repeated calls get the same result.

        Returns:
            The result of the tool, or None if it has none.

        Raises:
            StateError: The tool failed or conflicted, and wrote nothing.
            UnsupportedError: The backend executes no tools.
        """
        needed = getattr(self._find_tool(tool), "requires", None)
        if needed is not None and not moves.fulfils(self._backend, needed):
            yield from work(self._fulfil, needed, name_of(tool))
        ExecutesTools.of(self._backend.provider)
        encoded = values.encode_arguments(arguments.mapping("parameters", parameters))
        timeout_s = arguments.timeout("timeout_s", timeout_s)
        facts = {} if metadata is None else metadata
        command = commands.ExecuteTool(self.session_id, name_of(tool), encoded, facts, timeout_s)
        return result_of((yield from ask(command, terms_of(actor, reason, idempotency_key))))

    @verb
    def call(self, tool: ToolCode | str, /, **arguments: object) -> Steps[Any]:
        """Execute a tool as one transaction.

        Args:
            tool: The tool, or its name.
            arguments: The tool's arguments by name.

        Returns:
            The result of the tool, or None if it has none.

        Raises:
            StateError: The tool failed or conflicted, and wrote nothing.
            UnsupportedError: The backend executes no tools.
        """
        return (yield from self.execute._steps(tool, arguments))

    def recording(
        self,
        name: str = RECORDING,
        *,
        metadata: Mapping[str, str] | None = None,
        keep_after_s: float = 30.0,
        reason: str | None = None,
        actor: str | None = None,
    ) -> "Recording":
        """Record the LM calls of a block: `with ctx.recording():`, or `async with`. Needs DSPy.

        The journal has them as an execution that writes nothing and conflicts with nothing: questions, answers, tokens,
        times and costs, as for tools with `record_lm=True`. Nested recordings: the innermost has the calls. In the
        block of a transaction of this session, and in a tool that records LM calls, these have them.

        Args:
            name: What the journal has as its tool.
            metadata: Texts to record with it in the journal.
            keep_after_s: On a file: how long the recorded calls may wait in this process before they are stored, in
                seconds. Each time, the recording goes on in another execution. A server has them at once.
            reason: Why; by default the journal says nothing.
            actor: On whose behalf; by default the actor of the context.

        Returns:
            The recording. Its `execution_id` is that of the execution in the journal.

        Raises:
            DspyMissingError: DSPy is not installed.
            UnsupportedError: The backend cannot.
        """
        from dspex_persist.cognitive.dspy.recording import Recording

        terms = self._terms_of(actor, reason)
        return Recording(self._backend, self.session_id, terms, name, metadata, keep_after_s)

    @verb
    def end(self) -> Steps[None]:
        """End the session. Its history is kept."""
        yield from ask(commands.CleanupSession(self.session_id))

    @property
    def _watchers(self) -> Watchers:
        """All its watches."""
        if self._opened_watchers is None:
            with self._closing:
                if self._closed:
                    raise ContextClosedError(self.session_id)
                if self._opened_watchers is None:
                    self._opened_watchers = Watchers(self.session_id, self._backend)
        return self._opened_watchers

    # Moving

    @verb
    def ensure_persistent(self, path: str | os.PathLike[str], /, **options: Any) -> Steps[None]:
        """Have the session outlive this process: move it to a database file, unless it is on a file or a server.

        The whole session moves, with its history. Other calls wait meanwhile, and none is lost; watches go on. If the
        move fails, the session goes on where it was, and nothing is left at the new place. `backend.switches` tells
        what has moved.

        Args:
            path: The file. It is created if it does not exist.
            options: Further options of `dspex_persist.connect`; those of the context apply as well.

        Raises:
            SessionExistsError: The file has a live session with this id.
            OpenError: The file cannot be opened.
            UnavailableError: A tool was still running in the session.
        """
        yield from work(self._ensure, EMBEDDED, path, options)

    @verb
    def ensure_bridged(self, url: str, /, **options: Any) -> Steps[None]:
        """Have the session on a server: move it there, unless it is on one. Like `ensure_persistent` otherwise.

        The tools of the context go along: `call` runs them here, on the session there, unless the server has tools of
        the same names.

        Args:
            url: The address, such as "grpc://127.0.0.1:50051".
            options: Further options of `dspex_persist.connect`.

        Raises:
            SessionExistsError: The server has a live session with this id.
            UnavailableError: The server cannot be reached, or a tool was still running in the session.
            UnsupportedError: The session is on another server: it moves from there with `move_to`.
        """
        yield from work(self._ensure, BRIDGED, url, options)

    def _execute_code(self, code: ToolCode, command: commands.ExecuteTool, terms: Terms) -> ToolOutcome:
        """Execute code as a tool, which the backend need not have."""
        if self._closed:
            raise ContextClosedError(self.session_id)
        return execute_code(self._backend, code, command, self._signed(terms))

    @verb
    def move_to(self, place: str | os.PathLike[str], /, **options: Any) -> Steps[None]:
        """Move the session to a file or a server, from wherever it is: also from a server, or to another file.

        Like `ensure_persistent` otherwise, which leaves a session where it is if that is durable. Calls of other
        clients of a server that the session leaves wait meanwhile, for as long as their timeouts are.

        Args:
            place: The file, which is created if it does not exist, or the address of the server. Nothing happens if the
                session is there.
            options: Further options of `dspex_persist.connect`; those of the context apply as well.

        Raises:
            SessionExistsError: There is a live session with this id.
            OpenError: The file cannot be opened.
            UnavailableError: The server cannot be reached, or a tool or transaction was still running in the session.
            UnsupportedError: The server that the session is on does not reveal the values of sensitive variables, or is
                of an older release.
            OutcomeUnknownError: The connection to the server broke, and it does not say whether the session has ended
                there: the session goes on at the new place, and may be live on that server, too.
        """
        yield from work(self._move, place, options)

    def _find_tool(self, tool: ToolCode | str) -> object:
        """Return the tool, if this context knows its code."""
        if not isinstance(tool, str):
            return tool
        tools = self._backend.options.get("tools")
        return tools.get(tool) if isinstance(tools, Mapping) else None

    def _fulfil(self, needed: str, name: str) -> None:
        """Move the session to where a tool can have it."""
        for kind in moves.kinds_for(needed):
            place = self._places[kind]
            if place is not None:
                self._ensure(kind, place, {})
                return
        raise moves.nowhere(needed, name)

    def _ensure(self, kind: str, place: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
        self._moving(lambda: moves.ensure(self._backend, self.session_id, kind, place, options))

    def _move(self, place: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
        self._moving(lambda: moves.move(self._backend, self.session_id, place, options))

    def _moving(self, move: Callable[[], None]) -> None:
        if self._closed:
            raise ContextClosedError(self.session_id)
        try:
            move()
        finally:
            if self._closed:
                # It was closed meanwhile.
                self._backend.close()

    # Opening and closing

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def close(self) -> None:
        """Close what the context opened. The session goes on, and can be opened again. Closing twice is harmless."""
        # Before, because the functions that are called with changes may use the context.
        if self._opened_watchers is not None:
            self._opened_watchers.close()
        with self._closing:
            if not self._closed:
                self._closed = True
                for derived in self._derived.values():
                    derived.close()
                self._backend.close()

    async def aclose(self) -> None:
        """Do the same without blocking the event loop."""
        await asyncio.to_thread(self.close)

    def _check_open(self) -> Self:
        if self._closed:
            raise ContextClosedError(self.session_id)
        return self

    def __enter__(self) -> Self:
        return self._check_open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self._check_open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # Derived variables

    @verb
    def derive(
        self,
        name: str,
        from_: Sequence[str],
        fn: Callable[..., object],
        *,
        type_name: str | None = None,
        description: str | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> Steps[Any]:
        """Have a variable computed from others, in the same commit, whenever one of them changes, whoever changes it.

        It lasts until the context is closed, as a function cannot be stored; then derive it again. The variable itself
        cannot be written meanwhile. A function that raises refuses the change that it was called for.

        Args:
            name: The name of the variable. It is defined if there is none.
            from_: The names of those that it is computed from.
            fn: Takes their values in this order and returns the value. It runs while everything that writes waits, so
                it has to be quick, and must not use the context.
            type_name: The type of the variable, if it is defined; by default it is inferred from the first value.
            description: What it is for, if it is defined.
            reason: Why it is defined.
            actor: Who defines it; by default the actor of the context.

        Returns:
            The value.

        Raises:
            VariableNotFoundError: One of the others is not there.
            DerivationError: The function failed.
            DependencyCycleError: The variable would depend on itself.
            UnsupportedError: The session is not in this process.
        """
        self._check_open()
        Derives.of(self._backend.provider)
        inputs = arguments.texts("from_", from_)
        arguments.function("fn", fn)
        if name in inputs:
            raise DependencyCycleError(f"{name} -> {name}")
        found = yield from ask(commands.GetVariables(self.session_id, (*inputs, name)))
        for missing in found.missing:
            if missing != name:
                raise VariableNotFoundError(self.session_id, missing)
        if name in found.missing:
            first = yield from work(fn, *(decode(found.variables[each]) for each in inputs))
            options: dict[str, Any] = {"type_name": type_name, "description": description}
            yield from self.define._steps(name, first, reason=reason, actor=actor, **options)
        yield from self.depends_on._steps(name, *inputs, kind=DERIVED, reason=reason, actor=actor)
        target = yield from ask(commands.GetVariable(self.session_id, name))
        before = self._derived.pop(name, None)
        if before is not None:
            before.close()
        derived = self._derived[name] = Derived(self._backend, self.session_id, target, inputs, fn)
        try:
            yield from ask(commands.ComputeDerived(self.session_id, name), terms_of(actor, reason))
        except BaseException:
            derived.close()
            raise
        return decode((yield from ask(commands.GetVariable(self.session_id, name))))

    # The past

    def audit(self, *, reveal: bool = False) -> AuditSource:
        """Return the history of all sessions on the backend, for queries; see `dspex_persist.audit`.

        Its methods read while the caller waits. After the session has moved, call this again.

        Args:
            reveal: Show the values of sensitive variables, which are masked otherwise.

        Raises:
            UnsupportedError: The backend answers no audits.
        """
        if self._closed:
            raise ContextClosedError(self.session_id)
        return Auditable.of(self._backend.provider).audit(reveal=reveal)

    # For people

    @verb
    def describe(self) -> Steps[Description]:
        """Return the session as a table of its variables: print it, or let a notebook show it.

        The values of sensitive variables are masked.
        """
        records = yield from ask(commands.ListVariables(self.session_id))
        infos = [VariableInfo(record) for record in records]
        recent: dict[str, list[float]] = {}
        for info in [each for each in infos if is_numeric(each) and not is_sensitive(each)][:_MOST_SPARKLINES]:
            entries = yield from ask(commands.GetVariableHistory(self.session_id, info.id, _RECENT))
            recent[info.name] = [decode(entry) for entry in reversed(entries) if entry.value is not None]
        return Description(self.session_id, self._backend.place, infos, lambda info: recent.get(info.name, ()))

    def _repr_html_(self) -> str:
        if self._closed:
            return escape(repr(self))
        try:
            return self.describe()._repr_html_()
        except DspexError as error:
            # A notebook would show a traceback.
            return f"{escape(repr(self))}<br>{escape(str(error))}"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a context cannot be copied, pickled, or sent to another process: open another one, "
            f"Context({self.session_id!r}, backend); ctx.fork() copies the session, dict(ctx) its values"
        )

    def __repr__(self) -> str:
        about = f"<Context of session {self.session_id!r}"
        if self._closed:
            return f"{about}, closed>"
        # A debugger must not wait for a server, nor for a move.
        if not hasattr(self, "_backend") or self._backend.kind == BRIDGED or self._backend.gate.held:
            return f"{about} on {self._backend.place}>" if hasattr(self, "_backend") else f"{about}>"
        try:
            infos = self.list()
        except DspexError as error:
            return f"{about} on {self._backend.place}: {type(error).__name__}>"
        return f"{about} on {self._backend.place}{': ' if infos else ''}{in_line(infos)}>"


def _checked_places(
    durable_at: str | os.PathLike[str] | None, remote_at: str | None
) -> dict[str, str | os.PathLike[str] | None]:
    if durable_at is not None and not isinstance(durable_at, str | os.PathLike):
        raise InvalidArgumentError("durable_at", f"it must be a path, not {type(durable_at).__name__}")
    if remote_at is not None:
        arguments.text("remote_at", remote_at)
    return {EMBEDDED: durable_at, BRIDGED: remote_at}


def _checked_ttl(ttl_s: float) -> float:
    seconds = arguments.seconds("ttl_s", ttl_s)
    if not 0 <= seconds <= MOST_TTL_S:
        raise InvalidArgumentError("ttl_s", f"it must be from 0 (for ever) to {MOST_TTL_S} seconds, not {seconds:g}")
    return seconds


def _records_lm(said: bool | None) -> bool:
    if said is None:
        if not os.environ.get(_RECORD_LM):
            return False
        from dspex_persist.settings import records_lm

        return records_lm()
    # To import it takes seconds, and the program that is to be recorded does so anyway.
    if said and find_spec("dspy") is None:
        raise DspyMissingError()
    return bool(said)


def _open(place: Place, tools: object, options: Mapping[str, Any]) -> Backend:
    """Return the backend at a place, with tools."""
    if isinstance(place, StateProvider) and options:
        raise TypeError(f"{', '.join(options)}: options are for a backend that the context opens, not for a provider")
    if tools is None:
        return Backend.open(place, options)
    from dspex_persist.cognitive.toolbox import Toolbox

    toolbox = Toolbox.of(tools)
    return Backend.open(place, {**options, "tools": toolbox})
