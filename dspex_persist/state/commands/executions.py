"""Tool executions: their journal entries, and the one command that ends them with all that they wrote."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from dspex_persist.state import arguments, values
from dspex_persist.state.commands.base import Command, check_metadata, check_text
from dspex_persist.state.commands.globs import compile_glob
from dspex_persist.state.errors import (
    ExecutionEndedError,
    IdempotencyConflictError,
    LimitExceededError,
    StateError,
    ToolExistsError,
    UnsupportedError,
    quote,
)
from dspex_persist.state.events import ExecutionBegan, ExecutionEnded, ToolsRegistered
from dspex_persist.state.frozen import freeze
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import (
    Conflict,
    ExecutionStatus,
    Failure,
    Isolation,
    JournalEntry,
    LogEntry,
    RegisteredTool,
    Seen,
    Source,
    ToolOutcome,
    ToolSpec,
    Value,
    Variable,
)
from dspex_persist.state.session_state import SessionState, size_of_tool
from dspex_persist.state.unit_of_work import UnitOfWork

_REFUSED_LATER = "it was possible when the tool asked, and is not any more"


@dataclass(frozen=True, slots=True)
class Begun:
    """What came of the wish to begin an execution.

    `seed` is what its random numbers come from, `snapshot` the session as it sees it, for nobody else. Under an
    idempotency key there may be none, because the execution of this key is `recorded` (it has committed) or `running`.
    """

    execution_id: str
    sequence: int
    limits: Limits
    optimization_lease_s: float
    seed: str = ""
    snapshot: SessionState | None = None
    recorded: JournalEntry | None = None
    running: JournalEntry | None = None


@dataclass(frozen=True, slots=True)
class BeginExecution(Command[Begun]):
    """Begin an execution of a tool: its journal entry says `running` from here on.

    `worker_id` says which worker runs it; "" if the server itself does. `retry_of`: the execution that ran before it
    for the same request, and ended as a conflict.
    """

    tool: str
    parameters: Mapping[str, Value] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    isolation: Isolation = Isolation.SERIALIZABLE
    attempt: int = 1
    parent_id: str | None = None
    idempotency_key: str | None = None
    worker_id: str = ""
    retry_of: str | None = None

    writes: ClassVar[bool] = True

    def apply(self, uow: UnitOfWork) -> Begun:
        state = uow.session(self.session_id)
        check_metadata(self.metadata, uow.limits)
        if self.parent_id is not None and self.parent_id not in state.executions:
            raise ExecutionEndedError(self.parent_id, "not running")
        fingerprint = ""
        if self.idempotency_key is not None:
            ahead = self.ahead
            fingerprint = ahead.fingerprint if ahead is not None else self._asked(_speller(uow.limits))
            known = self._known(uow, state, self.idempotency_key, fingerprint)
            if known is not None:
                return known
        return self._begin(uow, fingerprint)

    @property
    def brings(self) -> int:
        """See `Command`. Its parameters have been read; under a key, how they are spelled has to be known."""
        return sum(len(value.json) for value in self.parameters.values()) if self.idempotency_key is not None else 0

    def _read_values(self, ahead: values.ReadAhead, find: values.Find) -> None:
        ahead.fingerprint = self._asked(ahead.spell)

    def _asked(self, spell: values.Spell) -> str:
        """The same for requests that mean the same, whatever else differs."""
        asked = {name: spell(name, None, value) for name, value in self.parameters.items()}
        return type(self)(self.session_id, self.tool, asked).fingerprint()

    def _known(self, uow: UnitOfWork, state: SessionState, key: str, fingerprint: str) -> Begun | None:
        check_text("idempotency key", key, uow.limits.name_length, "name_length")
        running = next((each for each in state.executions.values() if each.idempotency_key == key), None)
        recorded = uow.find_execution(self.session_id, key) if running is None else None
        known = running or recorded
        if known is None:
            return None
        # Older files have it as the request was spelled.
        if known.fingerprint != fingerprint and known.fingerprint != self._asked(_as_it_is):
            raise IdempotencyConflictError(key, f"ExecuteTool ({known.tool})")
        if recorded is not None and recorded.status is not ExecutionStatus.COMMITTED:
            return None
        return Begun(known.id, uow.sequence, uow.limits, uow.optimization_lease_s, recorded=recorded, running=running)

    def _begin(self, uow: UnitOfWork, fingerprint: str) -> Begun:
        # The commit's number is in the id, so that the journal finds an execution without an index.
        execution_id = f"exec_{uow.sequence}_{uow.new_token()}{uow.new_token()}"
        seed = uow.new_token()
        event = ExecutionBegan(
            execution_id,
            self.tool,
            self.parent_id,
            self.idempotency_key,
            fingerprint,
            self.parameters,
            self.metadata,
            self.isolation,
            self.attempt,
            seed,
            self.worker_id,
            self.retry_of,
        )
        state = uow.record(self.session_id, event)
        return Begun(execution_id, uow.sequence, uow.limits, uow.optimization_lease_s, seed, state.copy())


def _speller(limits: Limits) -> values.Spell:
    return lambda _name, type_name, value: values.spell(type_name, value, limits)


def _as_it_is(_name: str, _type_name: str | None, value: Value) -> Value:
    return value


@dataclass(frozen=True, slots=True)
class Step:
    """A command that an execution carried out in its own memory, to be carried out again when it commits.

    `tokens` are the random parts of the ids that it made: they stay what the tool was told.
    """

    execution_id: str
    command: Command[Any]
    source: Source
    optimizer_id: str | None = None
    tokens: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one execution ended: the rest of its journal entry. `reads`: what it asked for, and as what it found it.

    `conflicts`, and `sequence`, the commit that says so, are added by the store, whose verdict is the one that holds.
    """

    execution_id: str
    status: ExecutionStatus
    result: Value | None = None
    failure: Failure | None = None
    reads: Mapping[str, Seen | None] = field(default_factory=dict)
    patterns: tuple[str, ...] = ()
    log: tuple[LogEntry, ...] = ()
    recorded: Mapping[str, Any] = field(default_factory=dict)
    published: tuple[tuple[str, int], ...] = ()
    attempt: int = 1
    duration_us: int = 0
    conflicts: tuple[Conflict, ...] = ()
    sequence: int | None = None

    def ended(self, writes: Sequence[tuple[str, int]]) -> ExecutionEnded:
        """The event of its end. `writes`: names and versions."""
        return ExecutionEnded(
            self.execution_id,
            self.status,
            self.result,
            failure=self.failure,
            reads=self.reads,
            patterns=self.patterns,
            log=self.log,
            recorded=self.recorded,
            published=self.published,
            duration_us=self.duration_us,
            writes=tuple(writes),
            conflicts=self.conflicts,
        )


@dataclass(frozen=True, slots=True)
class FinishExecution(Command[Verdict]):
    """End an execution, and the `children` that ended well before it, in one commit with everything that it wrote.

    `checked` and `matched` (by pattern) must still be as they were seen, and nobody may have changed the session's
    dependencies since commit `dependencies` if it is given; otherwise the execution ends as a conflict, and nothing but
    that is written. `gone`: the variables whose histories were seen under names that nobody had, by those names; they
    must still be the last ones that had them.
    """

    verdict: Verdict
    children: tuple[Verdict, ...] = ()
    steps: tuple[Step, ...] = ()
    checked: Mapping[str, Seen | None] = field(default_factory=dict)
    matched: Mapping[str, tuple[Seen, ...]] = field(default_factory=dict)
    dependencies: int | None = None
    gone: Mapping[str, str | None] = field(default_factory=dict)

    writes: ClassVar[bool] = True

    def apply(self, uow: UnitOfWork) -> Verdict:
        state = uow.session(self.session_id)
        verdict = self.verdict
        if verdict.execution_id not in state.executions:
            raise ExecutionEndedError(verdict.execution_id, "its journal entry says how")
        writes: dict[str, list[tuple[str, int]]] = {}
        if verdict.status is ExecutionStatus.COMMITTED:
            start = uow.savepoint()
            conflicts = tuple(self._changed(uow, state)) or self._carry_out(uow, writes)
            if conflicts:
                uow.rollback_to(start)
                writes.clear()
                verdict = replace(verdict, status=ExecutionStatus.CONFLICT, result=None, conflicts=conflicts)
        for child in self.children:
            self._end(uow, self._child(child, verdict), writes.get(child.execution_id, []))
        self._end(uow, verdict, writes.get(verdict.execution_id, []))
        return replace(verdict, sequence=uow.sequence)

    def _child(self, child: Verdict, parent: Verdict) -> Verdict:
        if child.status is ExecutionStatus.COMMITTED and parent.status is not ExecutionStatus.COMMITTED:
            return replace(child, status=ExecutionStatus.ABORTED)
        return child

    def _end(self, uow: UnitOfWork, verdict: Verdict, writes: Sequence[tuple[str, int]]) -> None:
        uow.end_execution(self.session_id, verdict.ended(writes), verdict.attempt)

    def _changed(self, uow: UnitOfWork, state: SessionState) -> Iterator[Conflict]:
        """What is not as it was seen."""
        told: set[str] = set()
        for asked, seen in self.checked.items():
            now = state.find(asked)
            if see(now) != seen:
                conflict = _conflict(asked, seen, now)
                # It may have been asked for by its name and by its id.
                if conflict.name not in told:
                    told.add(conflict.name)
                    yield conflict
        for asked, last in self.gone.items():
            if asked not in told and uow.find_last_id(self.session_id, asked) != last:
                told.add(asked)
                yield Conflict(asked, reason="another variable has had the name since")
        for pattern, matched in self.matched.items():
            yield from _changed_matches(state, pattern, matched, told)
        if self.dependencies not in (None, state.dependencies.changed_at):
            yield Conflict("dependencies", reason="others changed the session's dependencies")

    def _carry_out(self, uow: UnitOfWork, writes: dict[str, list[tuple[str, int]]]) -> tuple[Conflict, ...]:
        origin, tokens = uow.origin, uow.tokens
        try:
            for step in self.steps:
                uow.origin = origin
                if (step.source, step.optimizer_id) != (origin.source, origin.optimizer_id):
                    uow.origin = replace(origin, source=step.source, optimizer_id=step.optimizer_id)
                uow.tokens = iter(step.tokens)
                before = len(uow.versions)
                step.command.apply(uow)
                written = [(change.variable.name, change.version.version) for change in uow.versions[before:]]
                writes.setdefault(step.execution_id, []).extend(written)
        except StateError as error:
            # It went well in the tool's own memory, so what it needed has gone.
            return (Conflict(step.command.cause, reason=f"{_REFUSED_LATER}: {error.sentence}"),)
        finally:
            uow.origin, uow.tokens = origin, tokens
        return ()


def see(variable: Variable | None) -> Seen | None:
    """What an execution has to find again of a variable that it asked for."""
    if variable is None:
        return None
    lock = variable.optimization
    return Seen(variable.id, variable.name, variable.version, lock.id if lock is not None else "")


def _conflict(asked: str, seen: Seen | None, now: Variable | None) -> Conflict:
    name = seen.name if seen is not None else now.name if now is not None else asked
    expected, actual = (None if each is None else each.version for each in (seen, now))
    if seen is not None and now is not None and expected == actual:
        reason = "it is another variable of the same name" if now.id != seen.variable_id else "its optimization changed"
        return Conflict(name, expected, actual, reason)
    return Conflict(name, expected, actual)


def matches(state: SessionState, pattern: str) -> list[Variable]:
    """The variables that a pattern of ListVariables means."""
    if not pattern:
        return list(state.variables.values())
    fits = compile_glob(pattern)
    return [each for each in state.variables.values() if fits(each.name)]


def _changed_matches(
    state: SessionState, pattern: str, matched: tuple[Seen, ...], told: set[str]
) -> Iterator[Conflict]:
    now = {variable.id: variable for variable in matches(state, pattern)}
    for seen in matched:
        variable = now.pop(seen.variable_id, None)
        if see(variable) != seen and seen.name not in told:
            yield _conflict(seen.name, seen, variable)
    for variable in now.values():
        if variable.name not in told:
            yield _conflict(variable.name, None, variable)


@dataclass(frozen=True, slots=True)
class InterruptExecutions(Command[int]):
    """End those of these executions that have not ended, because the server did; how many there were."""

    executions: tuple[str, ...]

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = int

    def apply(self, uow: UnitOfWork) -> int:
        state = uow.find_session(self.session_id)
        running = [each for each in self.executions if each in state.executions] if state is not None else []
        uow.interrupt(self.session_id, running, "the server ended while it ran")
        return len(running)


@dataclass(frozen=True, slots=True)
class ExecuteTool(Command[ToolOutcome]):
    """Execute a tool, within `timeout_s`. No store can do that by itself: a provider that can sees to it."""

    tool: str
    parameters: Mapping[str, Value] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float | None = None

    writes: ClassVar[bool] = True

    def apply(self, uow: UnitOfWork) -> ToolOutcome:
        raise UnsupportedError("tools", "this state was opened without any: open it with connect(path, tools=...)")


# Registrations


@dataclass(frozen=True, slots=True)
class RegisterTools(Command[dict[str, str]]):
    """Keep what tools a worker runs; their ids by name. A tool of the same name is replaced, but its address stays if
    no other is given: not every worker says where it is each time.

    `reserved` are the names that the server's own tools have: what comes under one is left out, and has no id. If
    nothing else comes, that is refused.
    """

    worker_id: str
    tools: tuple[RegisteredTool, ...]
    reserved: frozenset[str] = frozenset()

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = dict[str, str]

    def fingerprint(self) -> str:
        """Of what the client asked: a server with other tools of its own is still asked the same."""
        return Command.fingerprint(replace(self, reserved=frozenset()))

    def apply(self, uow: UnitOfWork) -> dict[str, str]:
        state = uow.session(self.session_id)
        limits = uow.limits
        for tool in self.tools:
            check_spec(tool.spec, limits)
            _check_texts(tool)
            size = size_of_tool(tool)
            if size > limits.constraints_size_bytes:
                what = f"size of the description of tool {tool.spec.name!r} in bytes"
                raise LimitExceededError(what, size, limits.constraints_size_bytes, "constraints_size_bytes")
        tools = tuple(_where_it_was(tool, state) for tool in self.tools if tool.spec.name not in self.reserved)
        if self.tools and not tools:
            raise ToolExistsError(self.tools[0].spec.name)
        names = {tool.spec.name for tool in tools}
        check_tool_count(state, names, limits)
        if any(state.tools.get(tool.spec.name) != tool for tool in tools):
            uow.register_tools(self.session_id, ToolsRegistered(self.worker_id, tools))
        return {name: f"{self.session_id}:{name}" for name in names}


def check_spec(spec: ToolSpec, limits: Limits) -> None:
    """Refuse a tool whose name or metadata are not within the limits."""
    check_text("tool name", spec.name, limits.name_length, "name_length")
    check_metadata(spec.metadata, limits)


def check_tool_count(state: SessionState, names: Set[str], limits: Limits) -> None:
    """Refuse tools of these names where the session has too many with them."""
    count = len(state.tools.keys() | names)
    if count > limits.tools_per_session:
        raise LimitExceededError("number of tools", count, limits.tools_per_session, "tools_per_session")


def _check_texts(tool: RegisteredTool) -> None:
    """What the door sees to in the arguments of a command; these are further in."""
    field, spec = f"tool {quote(tool.spec.name)}", tool.spec
    arguments.metadata(f"metadata of {field}", dict(spec.metadata))
    texts = [spec.description, *spec.required_variables]
    for parameter in spec.parameters:
        texts += [parameter.name, parameter.type, parameter.description, parameter.validation]
    for text in texts:
        arguments.text(field, text)


def _where_it_was(tool: RegisteredTool, state: SessionState) -> RegisteredTool:
    known = state.tools.get(tool.spec.name)
    if tool.address or known is None or not known.address:
        return tool
    said = {**tool.spec.metadata, "address": known.address}
    return replace(tool, address=known.address, spec=replace(tool.spec, metadata=said))


@dataclass(frozen=True, slots=True)
class ListTools(Command[Mapping[str, RegisteredTool]]):
    """The tools that workers have registered in the session, by name."""

    def apply(self, uow: UnitOfWork) -> Mapping[str, RegisteredTool]:
        return freeze(uow.session(self.session_id).tools)
