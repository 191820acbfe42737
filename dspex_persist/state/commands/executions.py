"""Commands for tool executions: begin them in the journal, and end them together with all their writes."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final, NamedTuple

from dspex_persist.state import arguments, values
from dspex_persist.state.budgets import Spent
from dspex_persist.state.commands.base import FEW, Command, Reads, check_metadata, check_text
from dspex_persist.state.commands.derivations import derive
from dspex_persist.state.errors import (
    ExecutionEndedError,
    IdempotencyConflictError,
    LimitExceededError,
    QuotaExceededError,
    StateError,
    ToolExistsError,
    UnsupportedError,
    quote,
)
from dspex_persist.state.events import ExecutionBegan, ExecutionEnded, ToolsRegistered
from dspex_persist.state.frozen import NO_ENTRIES, freeze
from dspex_persist.state.globs import compile_glob
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import (
    CONCURRENCY,
    OF_RECORDINGS,
    REASON,
    TRACE_ID,
    TRANSACTION,
    Concurrency,
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
from dspex_persist.state.unit_of_work import Savepoint, UnitOfWork

REPEATABLE: Final = (ExecutionStatus.CANCELLED, ExecutionStatus.INTERRUPTED, ExecutionStatus.CONFLICT)
"""Ends of an execution after which a waiting request with the same key begins it again."""
_REFUSED_LATER = "it was possible when the tool asked, and is not any more"


class Begun(NamedTuple):
    """The result of `BeginExecution`: a new execution, or the one that already has the idempotency key.

    Attributes:
        execution_id: Its id.
        sequence: The commit that began it.
        limits: The limits that apply to it.
        optimization_lease_s: The lease of locks that it takes, in seconds.
        seed: The seed of its random numbers.
        snapshot: A copy of the session for this execution alone; None if there is an earlier execution.
        recorded: The earlier execution with the same key if it has committed, or the request has waited for it.
        running: The earlier execution with the same key if it is running.
        concurrency: What the session demands, if it is more than the request says; the execution has not begun then.
        busy: An execution of another server that has the turn; this one has not begun then.
    """

    execution_id: str
    sequence: int
    limits: Limits
    optimization_lease_s: float
    seed: str = ""
    snapshot: SessionState | None = None
    recorded: JournalEntry | None = None
    running: JournalEntry | None = None
    concurrency: Concurrency | None = None
    busy: JournalEntry | None = None


@dataclass(frozen=True, slots=True)
class BeginExecution(Command[Begun]):
    """Begin an execution of a tool, and record it as running in the journal.

    `worker_id`: the worker that runs it; "" for the server itself. `retry_of`: the previous execution for the same
    request, which ended as a conflict. `concurrency`: what the caller has seen to. `trace_id`: the trace that it is a
    part of. `turns`: how each tool of this server runs, if the execution has its turn here and other servers may run
    tools in the session; None if there is nothing to wait for. `awaited`: the execution of another server with the same
    key for whose end the request has waited: its outcome counts.
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
    concurrency: Concurrency = Concurrency.OPTIMISTIC
    trace_id: str = ""
    turns: Mapping[str, Concurrency] | None = None
    awaited: str = ""

    writes: ClassVar[bool] = True

    def apply(self, uow: UnitOfWork) -> Begun:
        state = uow.session(self.session_id)
        check_metadata(self.metadata, uow.limits, OF_RECORDINGS)
        if self.parent_id is not None and self.parent_id not in state.executions:
            raise ExecutionEndedError(self.parent_id, "not running")
        fingerprint = ""
        if self.idempotency_key is not None:
            ahead = self.ahead
            fingerprint = ahead.fingerprint if ahead is not None else self._fingerprint(_speller(uow.limits))
            known = self._known(uow, state, self.idempotency_key, fingerprint)
            if known is not None:
                return known
        stated = state.session.metadata.get(CONCURRENCY)
        if stated is not None and self.parent_id is None:
            demanded = Concurrency.strictest(self.concurrency, Concurrency(stated))
            if demanded is not self.concurrency:
                return Begun("", uow.sequence, uow.limits, uow.optimization_lease_s, concurrency=demanded)
        busy = self._busy(state, Concurrency(stated) if stated is not None else None)
        if busy is not None:
            return Begun("", uow.sequence, uow.limits, uow.optimization_lease_s, busy=busy)
        return self._begin(uow, fingerprint)

    def _busy(self, state: SessionState, stated: Concurrency | None) -> JournalEntry | None:
        """Return a running execution that takes turns, too: here this one is the first, so it is of another server."""
        if self.turns is None:
            return None
        turns = {TRANSACTION: None, **self.turns}
        for tool in state.tools.values():
            turns.setdefault(tool.spec.name, tool.spec.concurrency)
        for entry in state.executions.values():
            # What is no tool is a recording, which takes no turns.
            if entry.parent_id is None and entry.tool in turns:
                strictest = Concurrency.strictest(turns[entry.tool], stated)
                if strictest is not Concurrency.OPTIMISTIC:
                    return entry
        return None

    @property
    def is_small(self) -> bool:
        """See `Command`."""
        return sum(value.size_bytes for value in self.parameters.values()) <= values.LONG_JSON

    @property
    def json_length(self) -> int:
        """See `Command`. The parameters are parsed only with a key, for the fingerprint."""
        return sum(len(value.json) for value in self.parameters.values()) if self.idempotency_key is not None else 0

    def _read_values(self, ahead: values.ReadAhead, find: values.Find) -> None:
        ahead.fingerprint = self._fingerprint(ahead.spell)

    def _fingerprint(self, spell: values.Spell) -> str:
        """Return the fingerprint of the tool and its parameters only."""
        parameters = {name: spell(name, None, value) for name, value in self.parameters.items()}
        return type(self)(self.session_id, self.tool, parameters).fingerprint()

    def _request(self) -> dict[str, Any]:
        request = Command._request(self)
        # They say nothing about what is asked for.
        del request["concurrency"], request["trace_id"], request["turns"], request["awaited"]
        return request

    def _known(self, uow: UnitOfWork, state: SessionState, key: str, fingerprint: str) -> Begun | None:
        check_text("idempotency key", key, uow.limits.name_length, "name_length")
        running = next((each for each in state.executions.values() if each.idempotency_key == key), None)
        recorded = uow.find_execution(self.session_id, key) if running is None else None
        known = running or recorded
        if known is None:
            return None
        # Older releases stored the fingerprint of the request as it was spelled.
        if known.fingerprint != fingerprint and known.fingerprint != self._fingerprint(_unchanged):
            raise IdempotencyConflictError(key, f"ExecuteTool ({known.tool})")
        if recorded is not None and not self._counts(recorded):
            return None
        return Begun(known.id, uow.sequence, uow.limits, uow.optimization_lease_s, recorded=recorded, running=running)

    def _counts(self, recorded: JournalEntry) -> bool:
        """Whether the outcome is that of this request, too: a failure is for those who have waited for it."""
        if recorded.id == self.awaited:
            return recorded.status not in REPEATABLE
        return recorded.status is ExecutionStatus.COMMITTED

    def _begin(self, uow: UnitOfWork, fingerprint: str) -> Begun:
        # The id contains the commit's number, so that an execution can be found without an index.
        execution_id = f"exec_{uow.sequence}_{uow.new_token()}{uow.new_token()}"
        seed = uow.new_token()
        event = ExecutionBegan(
            execution_id,
            self.tool,
            self.parent_id,
            self.idempotency_key,
            fingerprint,
            self.parameters,
            self._noted(uow.origin.reason),
            self.isolation,
            self.attempt,
            seed,
            self.worker_id,
            self.retry_of,
        )
        state = uow.record(self.session_id, event)
        return Begun(execution_id, uow.sequence, uow.limits, uow.optimization_lease_s, seed, state.copy())

    def _noted(self, reason: str | None) -> Mapping[str, str]:
        """Return the metadata with what the journal adds to it."""
        added = {REASON: reason, TRACE_ID: self.trace_id}
        noted = {key: text for key, text in added.items() if text}
        return {**self.metadata, **noted} if noted else self.metadata


def _speller(limits: Limits) -> values.Spell:
    return lambda _name, type_name, value: values.spell(type_name, value, limits)


def _unchanged(_name: str, _type_name: str | None, value: Value) -> Value:
    return value


class Step(NamedTuple):
    """A writing command of an execution, which is applied to its snapshot first and repeated when it commits.

    `tokens`: the random parts of the ids that the command generated, so that repeating it generates the same ids.
    """

    execution_id: str
    command: Command[Any]
    source: Source
    optimizer_id: str | None = None
    tokens: tuple[str, ...] = ()
    reason: str | None = None


class Verdict(NamedTuple):
    """How an execution ended: the rest of its journal entry.

    Attributes:
        reads: The names that it looked up, and the variables that it found.
        patterns: The patterns with which it listed variables.
        recorded: Its recorded inputs, such as the clock.
        published: Names and versions that it published before its commit.
        duration_us: How long it ran, in microseconds.
        conflicts: Set by the store, whose verdict is final.
        refusal: Set by the store: the error of a rule or a derivation that its changes violate.
        sequence: The commit that ended it; set by the store.
    """

    execution_id: str
    status: ExecutionStatus
    result: Value | None = None
    failure: Failure | None = None
    reads: Mapping[str, Seen | None] = NO_ENTRIES
    patterns: tuple[str, ...] = ()
    log: tuple[LogEntry, ...] = ()
    recorded: Mapping[str, Any] = NO_ENTRIES
    published: tuple[tuple[str, int], ...] = ()
    attempt: int = 1
    duration_us: int = 0
    conflicts: tuple[Conflict, ...] = ()
    refusal: StateError | None = None
    sequence: int | None = None

    def ended(self, writes: Sequence[tuple[str, int]]) -> ExecutionEnded:
        """Return the event for its end. `writes`: the names and versions that it wrote."""
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
    """End an execution and its `children` in one commit with all their writes, or as a conflict without any writes.

    It is a conflict if others have changed what the execution depends on.

    Attributes:
        verdict: How it ended.
        children: How the executions that it called ended.
        steps: Their writing commands in order.
        checked: The variables that must not have changed, by the name or id looked up; None if there was none.
        matched: The variables that were listed, by pattern; the same ones must match, unchanged.
        dependencies: The commit of the last change of the session's dependencies, if they must not have changed.
        gone: For names of deleted variables whose history was read, the id of the last variable with that name.
    """

    verdict: Verdict
    children: tuple[Verdict, ...] = ()
    steps: tuple[Step, ...] = ()
    checked: Mapping[str, Seen | None] = field(default_factory=dict)
    matched: Mapping[str, tuple[Seen, ...]] = field(default_factory=dict)
    dependencies: int | None = None
    gone: Mapping[str, str | None] = field(default_factory=dict)

    writes: ClassVar[bool] = True
    # It checks them itself, because the execution fails and its journal entry says so.
    keeps_rules: ClassVar[bool] = False

    @property
    def is_small(self) -> bool:
        """See `Command`."""
        verdict = self.verdict
        if any(verdict.recorded.values()) or (
            verdict.result is not None and verdict.result.size_bytes > values.LONG_JSON
        ):
            return False
        count = len(self.steps) + len(self.children) + len(self.checked) + len(verdict.log)
        return count <= FEW and not self.matched and all(step.command.is_small for step in self.steps)

    def apply(self, uow: UnitOfWork) -> Verdict:
        state = uow.session(self.session_id)
        verdict = self.verdict
        if verdict.execution_id not in state.executions:
            raise ExecutionEndedError(verdict.execution_id, "its journal entry says how")
        writes: dict[str, list[tuple[str, int]]] = {}
        if verdict.status is ExecutionStatus.COMMITTED:
            start = uow.savepoint()
            broken: StateError | None
            try:
                conflicts = tuple(self._changed(uow, state)) or self._carry_out(uow, writes)
                broken = None if conflicts else _broken(uow, self.session_id, start)
            except QuotaExceededError as error:
                conflicts, broken = (), error
            if conflicts or broken is not None:
                uow.rollback_to(start)
                writes.clear()
                verdict = verdict._replace(status=ExecutionStatus.CONFLICT, result=None, conflicts=conflicts)
            if broken is not None:
                failure = Failure(type(broken).__name__, broken.sentence, "")
                # Its traceback would keep the unit of work alive.
                refusal = broken.with_traceback(None)
                verdict = verdict._replace(
                    status=ExecutionStatus.FAILED, failure=failure, conflicts=(), refusal=refusal
                )
        for child in self.children:
            self._end(uow, self._child(child, verdict), writes.get(child.execution_id, []))
        self._end(uow, verdict, writes.get(verdict.execution_id, []))
        return verdict._replace(sequence=uow.sequence)

    def _child(self, child: Verdict, parent: Verdict) -> Verdict:
        if child.status is ExecutionStatus.COMMITTED and parent.status is not ExecutionStatus.COMMITTED:
            return child._replace(status=ExecutionStatus.ABORTED)
        return child

    def _end(self, uow: UnitOfWork, verdict: Verdict, writes: Sequence[tuple[str, int]]) -> None:
        uow.end_execution(self.session_id, verdict.ended(writes), verdict.attempt)

    def _changed(self, uow: UnitOfWork, state: SessionState) -> Iterator[Conflict]:
        """Find what others changed."""
        reported: set[str] = set()
        for identifier, seen in self.checked.items():
            now = state.find(identifier)
            if see(now) != seen:
                conflict = _conflict(identifier, seen, now)
                # A variable may have been looked up both by its name and by its id.
                if conflict.name not in reported:
                    reported.add(conflict.name)
                    yield conflict
        for name, last in self.gone.items():
            if name not in reported and uow.find_last_id(self.session_id, name) != last:
                reported.add(name)
                yield Conflict(name, reason="another variable has had the name since")
        for pattern, matched in self.matched.items():
            yield from _changed_matches(state, pattern, matched, reported)
        if self.dependencies not in (None, state.dependencies.changed_at):
            yield Conflict("dependencies", reason="others changed the session's dependencies")

    def _carry_out(self, uow: UnitOfWork, writes: dict[str, list[tuple[str, int]]]) -> tuple[Conflict, ...]:
        origin, tokens = uow.origin, uow.tokens
        uow.rules_deferred = True
        try:
            for step in self.steps:
                uow.origin = origin
                said = (step.source, step.optimizer_id, step.reason)
                if said != (origin.source, origin.optimizer_id, origin.reason):
                    source, optimizer_id, reason = said
                    uow.origin = replace(origin, source=source, optimizer_id=optimizer_id, reason=reason)
                uow.tokens = iter(step.tokens)
                before = len(uow.versions)
                step.command.apply(uow)
                written = [(change.variable.name, change.version.version) for change in uow.versions[before:]]
                writes.setdefault(step.execution_id, []).extend(written)
        except QuotaExceededError:
            raise
        except StateError as error:
            # It succeeded on the snapshot, so others have changed what it needs.
            return (Conflict(step.command.cause, reason=f"{_REFUSED_LATER}: {error.sentence}"),)
        finally:
            uow.origin, uow.tokens = origin, tokens
            uow.rules_deferred = False
        return ()


def _broken(uow: UnitOfWork, session_id: str, start: Savepoint) -> StateError | None:
    """Compute what is derived; return the error of that, or of a rule that the changes violate."""
    try:
        if uow.derivations:
            derive(uow, session_id)
    except StateError as error:
        return error
    return next((error for error, _ in uow.violations(start)), None)


def see(variable: Variable | None) -> Seen | None:
    """Return the facts about a variable that must not change until the execution commits."""
    if variable is None:
        return None
    lock = variable.optimization
    return Seen(variable.id, variable.name, variable.version, lock.id if lock is not None else "")


def _conflict(identifier: str, seen: Seen | None, now: Variable | None) -> Conflict:
    name = seen.name if seen is not None else now.name if now is not None else identifier
    expected, actual = (None if each is None else each.version for each in (seen, now))
    if seen is not None and now is not None and expected == actual:
        reason = "it is another variable of the same name" if now.id != seen.variable_id else "its optimization changed"
        return Conflict(name, expected, actual, reason)
    return Conflict(name, expected, actual)


def matches(state: SessionState, pattern: str) -> list[Variable]:
    """Return the variables that match a pattern of ListVariables."""
    if not pattern:
        return list(state.variables.values())
    fits = compile_glob(pattern)
    return [each for each in state.variables.values() if fits(each.name)]


def _changed_matches(
    state: SessionState, pattern: str, matched: tuple[Seen, ...], reported: set[str]
) -> Iterator[Conflict]:
    now = {variable.id: variable for variable in matches(state, pattern)}
    for seen in matched:
        variable = now.pop(seen.variable_id, None)
        if see(variable) != seen and seen.name not in reported:
            yield _conflict(seen.name, seen, variable)
    for variable in now.values():
        if variable.name not in reported:
            yield _conflict(variable.name, None, variable)


@dataclass(frozen=True, slots=True)
class InterruptExecutions(Command[int]):
    """Mark those of these executions that are still running as interrupted; return how many there were."""

    executions: tuple[str, ...]

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = int

    def apply(self, uow: UnitOfWork) -> int:
        state = uow.find_session(self.session_id)
        running = [each for each in self.executions if each in state.executions] if state is not None else []
        uow.interrupt(self.session_id, running, "the server ended while it ran")
        return len(running)


@dataclass(frozen=True, slots=True)
class SumLmCalls(Command[tuple[int, Mapping[str, Spent]]]):
    """Return what the recorded LM calls of ended executions have used, by tool; and up to which commit."""

    @property
    def reads(self) -> Reads:
        """See `Command`."""
        return Reads.HISTORY

    def apply(self, uow: UnitOfWork) -> tuple[int, Mapping[str, Spent]]:
        return uow.spent(self.session_id)


@dataclass(frozen=True, slots=True)
class ExecuteTool(Command[ToolOutcome]):
    """Execute a tool within `timeout_s` seconds. A provider that executes tools handles this; stores cannot."""

    tool: str
    parameters: Mapping[str, Value] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float | None = None

    writes: ClassVar[bool] = True

    def apply(self, uow: UnitOfWork) -> ToolOutcome:
        raise UnsupportedError(
            "tools",
            "this state was opened without any: open it with Context(..., tools=...) or connect(path, tools=...)",
        )


# Registrations


@dataclass(frozen=True, slots=True)
class RegisterTools(Command[dict[str, str]]):
    """Register the tools of a worker, and return their ids by name.

    They replace tools with the same names. A tool without an address keeps that of the tool that it replaces, because
    not all workers send it each time. Without tools, those that the worker has registered before are taken away.

    Attributes:
        worker_id: The worker.
        tools: Its tools; none to take them away.
        reserved: The names of the server's tools, under which nothing is registered. If that leaves no tool, the
            command fails.
    """

    worker_id: str
    tools: tuple[RegisteredTool, ...]
    reserved: frozenset[str] = frozenset()

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = dict[str, str]

    def fingerprint(self) -> str:
        """See `Command.fingerprint`. It leaves out `reserved`, which depends on the server and not on the request."""
        return Command.fingerprint(replace(self, reserved=frozenset()))

    def apply(self, uow: UnitOfWork) -> dict[str, str]:
        state = uow.session(self.session_id)
        limits = uow.limits
        if not self.tools:
            if any(tool.worker_id == self.worker_id for tool in state.tools.values()):
                uow.register_tools(self.session_id, ToolsRegistered(self.worker_id, ()))
            return {}
        for tool in self.tools:
            check_spec(tool.spec, limits)
            _check_texts(tool)
            size = size_of_tool(tool)
            if size > limits.constraints_size_bytes:
                what = f"size of the description of tool {tool.spec.name!r} in bytes"
                raise LimitExceededError(what, size, limits.constraints_size_bytes, "constraints_size_bytes")
        tools = tuple(_with_address(tool, state) for tool in self.tools if tool.spec.name not in self.reserved)
        if not tools:
            raise ToolExistsError(self.tools[0].spec.name)
        names = {tool.spec.name for tool in tools}
        check_tool_count(state, names, limits)
        if any(state.tools.get(tool.spec.name) != tool for tool in tools):
            uow.register_tools(self.session_id, ToolsRegistered(self.worker_id, tools))
        return {name: f"{self.session_id}:{name}" for name in names}


def check_spec(spec: ToolSpec, limits: Limits) -> None:
    """Refuse a tool whose name or metadata exceeds the limits."""
    check_text("tool name", spec.name, limits.name_length, "name_length")
    check_metadata(spec.metadata, limits)


def check_tool_count(state: SessionState, names: Set[str], limits: Limits) -> None:
    """Refuse tools with these names if the session would then have too many."""
    count = len(state.tools.keys() | names)
    if count > limits.tools_per_session:
        raise LimitExceededError("number of tools", count, limits.tools_per_session, "tools_per_session")


def _check_texts(tool: RegisteredTool) -> None:
    """Check the texts inside a tool, which the checks of a command's arguments do not reach."""
    field, spec = f"tool {quote(tool.spec.name)}", tool.spec
    arguments.metadata(f"metadata of {field}", dict(spec.metadata))
    texts = [spec.description, *spec.required_variables]
    for parameter in spec.parameters:
        texts += [parameter.name, parameter.type, parameter.description, parameter.validation]
    for text in texts:
        arguments.text(field, text)


def _with_address(tool: RegisteredTool, state: SessionState) -> RegisteredTool:
    known = state.tools.get(tool.spec.name)
    if tool.address or known is None or not known.address:
        return tool
    metadata = {**tool.spec.metadata, "address": known.address}
    return replace(tool, address=known.address, spec=replace(tool.spec, metadata=metadata))


@dataclass(frozen=True, slots=True)
class ListTools(Command[Mapping[str, RegisteredTool]]):
    """Return the tools that workers registered in the session, by name."""

    def apply(self, uow: UnitOfWork) -> Mapping[str, RegisteredTool]:
        return freeze(uow.session(self.session_id).tools)
