"""Commands for recordings: import a commit or a session, fork a session."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any, ClassVar, Final

from dspex_persist.state import arguments, values
from dspex_persist.state.access import OWNER, without_owner
from dspex_persist.state.commands.base import Command, check_merged_metadata, check_metadata, check_text
from dspex_persist.state.commands.dependencies import check_dependency
from dspex_persist.state.commands.executions import check_spec, check_tool_count
from dspex_persist.state.commands.sessions import MOST_TTL_S, check_session_metadata
from dspex_persist.state.commands.variables import RegisterVariable, check_facts, check_room
from dspex_persist.state.errors import RecordingError, SessionExistsError, StateError, quote
from dspex_persist.state.events import (
    EVENTS,
    DependencyAdded,
    DependencyRemoved,
    Event,
    ExecutionBegan,
    ExecutionEnded,
    MalformedEventError,
    OptimizationStarted,
    OptimizationStopped,
    RuleAdded,
    RuleRemoved,
    SessionEnded,
    SessionRestored,
    SessionStarted,
    SessionUpdated,
    ToolsRegistered,
    VariableConstrained,
    VariableRegistered,
)
from dspex_persist.state.frozen import freeze
from dspex_persist.state.model import (
    OF_RECORDINGS,
    REASON,
    RESTORED_METADATA,
    ChangeKind,
    Dependency,
    EventKind,
    ExecutionStatus,
    ImportedSession,
    Origin,
    Rule,
    SessionView,
    Value,
    Variable,
    without_reason,
)
from dspex_persist.state.recording import (
    RecordedAnswer,
    RecordedCommit,
    RecordedVersion,
    in_order,
    is_execution_id,
    renumbered,
)
from dspex_persist.state.rules import MOST_RULES, compile_expression
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.unit_of_work import RecordedOutcome, UnitOfWork
from dspex_persist.state.values.json_text import RefusedError, read_line

FORKED_FROM: Final = "forked_from"
FORKED_AT: Final = "forked_at"
"""The metadata keys of a fork for the session and the commit that it was forked from."""

_INTEGERS: Final = range(-(2**63), 2**63)
"""The integers that columns and messages can hold."""
_NEVER: Final = datetime(9000, 1, 1, tzinfo=UTC)
_UNREADABLE: Final = (LookupError, TypeError, ValueError, AttributeError, OverflowError)


@dataclass(frozen=True, slots=True)
class ImportCommit(Command[None]):
    """Import a commit of a recording, with its versions, events, actor and time.

    All commits of a recording are imported in order, without other commits in between. The first one begins the
    session. An invalid or incomplete recording raises `RecordingError`, and so does one that exceeds a limit.

    Attributes:
        commit: The commit.
        checked: Whether it has been imported before, into nothing, under the same limits. Then its contents are not
            checked again.
    """

    commit: RecordedCommit
    checked: bool = False

    writes: ClassVar[bool] = True
    keeps_rules: ClassVar[bool] = False

    def apply(self, uow: UnitOfWork) -> None:
        number = self.commit.number
        if number == 1:
            check_text("session_id", self.session_id, uow.limits.session_id_length, "session_id_length")
            if uow.find_session(self.session_id) is not None:
                raise SessionExistsError(self.session_id)
        try:
            first = uow.sequence if number == 1 else uow.session(self.session_id).session.sequence
            if first + number - 1 != uow.sequence:
                raise ValueError(f"commit {number} does not follow the one before it")
            commit = renumbered(self.commit, lambda recorded: first + recorded - 1)
            (_Repeated if self.checked else _Repetition)(uow, self.session_id, commit).carry_out()
        except StateError as error:
            raise RecordingError("the recording", number + 1, error.sentence) from error
        except RefusedError as error:
            raise RecordingError("the recording", number + 1, error.reason) from error
        except _UNREADABLE as error:
            is_clear = type(error) in (ValueError, MalformedEventError)
            reason = str(error) if is_clear else f"malformed commit: {type(error).__name__} {error}"
            raise RecordingError("the recording", number + 1, reason) from error


@dataclass(frozen=True, slots=True)
class FinishImport(Command[int]):
    """Finish an import: interrupt the executions that were running in the recording, and restart the TTL.

    Returns how many executions were interrupted.
    """

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = int

    def apply(self, uow: UnitOfWork) -> int:
        state = uow.find_session(self.session_id)
        running = tuple(state.executions) if state is not None else ()
        uow.interrupt(self.session_id, running, "it ran when the session was recorded")
        return len(running)


@dataclass(frozen=True, slots=True)
class ImportSession(Command[ImportedSession]):
    """Import a whole session. It makes many commits, so it is written in a group of its own: see `steps`.

    Attributes:
        pages: The commits.
        content_hash: Their hash, for the result.
        checked: See `ImportCommit`.
    """

    pages: Iterable[Sequence[RecordedCommit]]
    content_hash: str
    checked: bool = False

    writes: ClassVar[bool] = True

    def apply(self, uow: UnitOfWork) -> ImportedSession:
        raise NeedsOwnGroupError

    def steps(self) -> Iterator[list[Command[Any]]]:
        """Yield the commands that it consists of, a page at a time. Each makes at most one commit."""
        for page in self.pages:
            yield [ImportCommit(self.session_id, commit, self.checked) for commit in page]
        yield [FinishImport(self.session_id)]


class NeedsOwnGroupError(Exception):
    """A command makes many commits: it needs a group of its own."""


class _Repetition:
    """Repeats one recorded commit on a unit of work."""

    def __init__(self, uow: UnitOfWork, session_id: str, commit: RecordedCommit) -> None:
        self._uow = uow
        self._session_id = session_id
        self._commit = commit

    def carry_out(self) -> None:
        """Stage all changes of the commit."""
        uow, commit = self._uow, self._commit
        self._check_kinds([event.kind for event in commit.events])
        uow.now = commit.at
        uow.origin = Origin(_sound(commit.actor), _sound(commit.cause))
        for event, version in in_order(commit):
            if event is not None:
                self._repeat(event, version)
            elif version is not None:
                self._write(version)
        if not uow.has_changes():
            raise ValueError("it changes nothing")
        if commit.answer is not None:
            self._keep_answer(commit.answer)
        state = uow.find_session(self._session_id)
        if state is not None and state.lease is not None:
            # Reads and heartbeats, which renewed the TTL, are not in the recording; but the session's end is.
            state.lease.expires_at = _NEVER

    def _check_kinds(self, kinds: Sequence[EventKind]) -> None:
        begins = [kind is EventKind.SESSION_STARTED for kind in kinds]
        first = self._commit.number == 1
        if begins != [first and place == 0 for place in range(len(kinds))] or (first and not begins):
            raise ValueError("its first commit, and no other, begins the session")
        if kinds.count(EventKind.EXECUTION_BEGAN) > 1:
            raise ValueError("a commit begins one execution at most")
        if EventKind.PRUNED in kinds:
            raise ValueError("history was pruned here, so the recording is not whole")

    def _repeat(self, event: Event, version: RecordedVersion | None) -> None:
        for name in _FIELDS[type(event)]:
            text = getattr(event, name)
            if isinstance(text, str):
                _sound(text)
        self._carry_over(event, version)

    def _carry_over(self, event: Event, version: RecordedVersion | None) -> None:
        if isinstance(event, VariableRegistered):
            self._register_variable(event, version)
        elif type(event) in _CHECKED:
            _CHECKED[type(event)](self, event)
        else:
            self._uow.record(self._session_id, event)

    def _keep_answer(self, answer: RecordedAnswer) -> None:
        uow, key = self._uow, answer.key
        check_text("idempotency key", key, uow.limits.name_length, "name_length")
        if uow.find_outcome(self._session_id, key) is not None:
            raise ValueError(f"it has a second answer under the idempotency key {quote(key)}")
        facts = (_sound(answer.cause), _sound(answer.fingerprint), _sound(answer.result))
        read_line(answer.result)
        uow.record_outcome(RecordedOutcome(self._session_id, key, *facts))

    def _state(self) -> SessionState:
        return self._uow.session(self._session_id)

    def _variable(self, variable_id: str) -> Variable:
        state = self._state()
        name = state.names.get(variable_id)
        if name is None:
            raise ValueError(f"there is no variable {quote(variable_id)} at this commit")
        return state.variables[name]

    # Variables

    def _write(self, recorded: RecordedVersion) -> None:
        uow, variable = self._uow, self._variable(recorded.variable_id)
        if (recorded.name, recorded.version) != (variable.name, variable.version + 1):
            what = f"version {recorded.version} of {quote(recorded.name)}"
            raise ValueError(f"{what} does not follow version {variable.version} of {quote(variable.name)}")
        self._explain(recorded)
        if recorded.kind is ChangeKind.DELETED:
            uow.delete_variable(self._session_id, variable)
            return
        if recorded.kind is ChangeKind.REGISTERED:
            raise ValueError(f"variable {quote(variable.name)} is registered already")
        metadata = self._metadata_of(recorded)
        if recorded.kind.merges_metadata:
            check_merged_metadata({**variable.metadata, **metadata}, metadata, uow.limits)
        value = self._value_of(recorded, variable.type, variable.constraints)
        uow.write(self._session_id, variable, value, metadata, recorded.source, recorded.kind)

    def _metadata_of(self, recorded: RecordedVersion) -> Mapping[str, str]:
        """Return the metadata of a version without its reason, checked."""
        given, limits = without_reason(recorded.metadata), self._uow.limits
        restored = given.get(RESTORED_METADATA)
        if restored is None or recorded.kind is not ChangeKind.ROLLED_BACK:
            return check_metadata(given, limits)
        document = read_line(restored)
        check_metadata(arguments.metadata(RESTORED_METADATA, document), limits)
        check_metadata({key: text for key, text in given.items() if key != RESTORED_METADATA}, limits)
        return given

    def _explain(self, recorded: RecordedVersion) -> None:
        """Give the version the reason that it was recorded with."""
        reason = recorded.metadata.get(REASON)
        if reason != self._uow.origin.reason:
            checked = None if reason is None else arguments.reason("reason", reason)
            self._uow.origin = replace(self._uow.origin, reason=checked)

    def _value_of(self, recorded: RecordedVersion, type_name: str, constraints: str) -> Value:
        """Return the recorded value if it is in the form in which a store writes it."""
        what = f"version {recorded.version} of {quote(recorded.name)}"
        if recorded.value is None:
            reason = "its value was kept out of the recording" if recorded.masked else "it has no value"
            raise ValueError(f"{what}: {reason}")
        compiled = values.compile_constraints(recorded.name, type_name, constraints)
        if values.normalise(recorded.name, type_name, compiled, recorded.value, self._uow.limits) != recorded.value:
            raise ValueError(f"{what}: its value is not in the form in which a store writes values of type {type_name}")
        return recorded.value

    def _register_variable(self, event: VariableRegistered, recorded: RecordedVersion | None) -> None:
        uow, state, name = self._uow, self._state(), event.name
        if recorded is None or name in state.variables or event.variable_id in state.names:
            raise ValueError(f"variable {quote(name)} cannot be registered here")
        if (recorded.kind, recorded.version, recorded.name) != (ChangeKind.REGISTERED, 0, name):
            raise ValueError(f"variable {quote(name)} has no version 0")
        self._explain(recorded)
        given = without_reason(recorded.metadata)
        check_facts(name, event.constraints, given, uow.limits)
        check_room(state, uow.limits)
        value = self._value_of(recorded, event.type, event.constraints)
        metadata, source = freeze(given), recorded.source
        facts = (event.variable_id, name, event.type, value, 0, event.constraints)
        uow.add_variable(self._session_id, Variable(*facts, metadata, source, uow.now))

    def _constrain_variable(self, event: VariableConstrained) -> None:
        variable = self._variable(event.variable_id)
        what = f"the constraints of variable {quote(variable.name)}"
        if event.version != variable.version + 1:
            raise ValueError(f"{what} change with version {event.version}, but it has version {variable.version}")
        check_facts(variable.name, event.constraints, {}, self._uow.limits)
        if values.compile_constraints(variable.name, variable.type, event.constraints).json != event.constraints:
            raise ValueError(f"{what} are not in the form in which a store writes them")
        self._uow.constrain(self._session_id, variable, event.constraints)

    # Rules

    def _add_rule(self, event: RuleAdded) -> None:
        rules: Mapping[str, Rule] = self._state().rules or {}
        check_text("name", event.name, self._uow.limits.name_length, "name_length")
        compile_expression(event.expression)
        if event.name not in rules and len(rules) >= MOST_RULES:
            raise ValueError(f"the session has more than {MOST_RULES} rules")
        self._uow.record(self._session_id, event)

    def _remove_rule(self, event: RuleRemoved) -> None:
        if event.name not in (self._state().rules or {}):
            raise ValueError(f"there is no rule {quote(event.name)} at this commit")
        self._uow.record(self._session_id, event)

    # Sessions

    def _start_session(self, event: SessionStarted) -> None:
        self._check_session(event)
        self._uow.start_session(replace(event, session_id=self._session_id))

    def _update_session(self, event: SessionUpdated) -> None:
        self._check_session(event)
        self._uow.record(self._session_id, replace(event, session_id=self._session_id))

    def _check_session(self, event: SessionStarted | SessionUpdated) -> None:
        check_session_metadata(without_owner(event.metadata), self._uow.limits)
        if event.ttl_s is not None and not 0 < event.ttl_s <= MOST_TTL_S:
            raise ValueError(f"a session cannot have a TTL of {event.ttl_s} seconds")

    def _restore_session(self, event: SessionRestored) -> None:
        first = self._state().session.sequence
        restored_to = first + event.sequence - 1
        if not first <= restored_to < self._uow.sequence:
            raise ValueError(f"the session was brought back to commit {event.sequence}, which is not before this one")
        self._uow.record(self._session_id, replace(event, sequence=restored_to))

    def _end_session(self, event: SessionEnded) -> None:
        if self._state().executions:
            raise ValueError("an execution runs on after the end of the session")
        self._uow.end_session(self._session_id, event.reason)

    # Dependencies and optimizations

    def _add_dependency(self, event: DependencyAdded) -> None:
        from_id, to_id = self._variable(event.from_id).id, self._variable(event.to_id).id
        check_dependency(self._state(), Dependency(from_id, to_id, event.type, self._uow.sequence), self._uow.limits)
        self._uow.record(self._session_id, event)

    def _remove_dependency(self, event: DependencyRemoved) -> None:
        edge = Dependency(event.from_id, event.to_id, event.type, self._uow.sequence)
        if not self._state().dependencies.has(edge):
            raise ValueError(f"variable {quote(event.from_id)} does not depend on {quote(event.to_id)} at this commit")
        self._uow.record(self._session_id, event)

    def _start_optimization(self, event: OptimizationStarted) -> None:
        uow = self._uow
        check_metadata(event.config, uow.limits)
        event.lock(uow.now).expires_at()  # Raises if the lease ends after the year 9999.
        self._variable(event.variable_id)
        uow.record(self._session_id, event)

    def _stop_optimization(self, event: OptimizationStopped) -> None:
        variable = self._variable(event.variable_id)
        lock = variable.optimization
        if lock is None or lock.id != event.optimization_id:
            raise ValueError(f"variable {quote(variable.name)} is not locked by {quote(event.optimization_id)}")
        self._uow.stop_optimization(self._session_id, variable, lock, event.reason)

    # Tools and executions

    def _register_tools(self, event: ToolsRegistered) -> None:
        limits = self._uow.limits
        json.dumps(event.to_body(), ensure_ascii=False).encode()  # Raises for surrogates, which no file can hold.
        for tool in event.tools:
            check_spec(tool.spec, limits)
        check_tool_count(self._state(), {tool.spec.name for tool in event.tools}, limits)
        self._uow.register_tools(self._session_id, event)

    def _begin_execution(self, event: ExecutionBegan) -> None:
        uow, execution_id, parent_id = self._uow, event.execution_id, event.parent_id
        if not is_execution_id(execution_id) or execution_id.rpartition("_")[0] != f"exec_{uow.sequence}":
            raise ValueError(f"the id of execution {quote(execution_id)} does not name the commit that began it")
        if parent_id is not None and parent_id not in self._state().executions:
            raise ValueError(f"execution {quote(execution_id)} was called by {quote(parent_id)}, which is not running")
        if event.idempotency_key is not None:
            check_text("idempotency key", event.idempotency_key, uow.limits.name_length, "name_length")
        check_metadata(without_reason(event.metadata), uow.limits, OF_RECORDINGS)
        if not 1 <= event.attempt <= self._commit.number:
            # Each attempt began in a separate commit.
            reason = f"cannot be attempt {event.attempt} in commit {self._commit.number}"
            raise ValueError(f"execution {quote(execution_id)} {reason}")
        if event.retry_of is not None and not _began_before(event.retry_of, uow.sequence):
            repeated = quote(event.retry_of)
            raise ValueError(f"execution {quote(execution_id)} retries {repeated}, which did not begin before it")
        for value in event.parameters.values():
            read_line(value.json)
        uow.record(self._session_id, event)

    def _end_execution(self, event: ExecutionEnded) -> None:
        if event.execution_id not in self._state().executions:
            raise ValueError(f"execution {quote(event.execution_id)} is not running")
        if event.status is ExecutionStatus.RUNNING:
            raise ValueError(f"execution {quote(event.execution_id)} ends as running")
        if not all(number in _INTEGERS for number in _numbers(event)):
            raise ValueError(f"execution {quote(event.execution_id)} has a version or a duration of more than 64 bits")
        if event.result is not None:
            read_line(event.result.json)
        self._uow.end_execution(self._session_id, event)


class _Repeated(_Repetition):
    """Repeats a commit that was checked before."""

    def _check_kinds(self, kinds: Sequence[EventKind]) -> None:
        pass

    def _repeat(self, event: Event, version: RecordedVersion | None) -> None:
        self._carry_over(event, version)

    def _write(self, recorded: RecordedVersion) -> None:
        uow, variable = self._uow, self._variable(recorded.variable_id)
        self._explain(recorded)
        if recorded.value is None:
            uow.delete_variable(self._session_id, variable)
        else:
            facts = (recorded.value, without_reason(recorded.metadata), recorded.source, recorded.kind)
            uow.write(self._session_id, variable, *facts)

    def _value_of(self, recorded: RecordedVersion, type_name: str, constraints: str) -> Value:
        assert recorded.value is not None, "it was checked"
        return recorded.value

    def _keep_answer(self, answer: RecordedAnswer) -> None:
        facts = (answer.key, answer.cause, answer.fingerprint, answer.result)
        self._uow.record_outcome(RecordedOutcome(self._session_id, *facts))


_CHECKED: Final[Mapping[type[Event], Callable[[_Repetition, Any], None]]] = {
    SessionStarted: _Repetition._start_session,
    SessionUpdated: _Repetition._update_session,
    SessionEnded: _Repetition._end_session,
    SessionRestored: _Repetition._restore_session,
    VariableConstrained: _Repetition._constrain_variable,
    RuleAdded: _Repetition._add_rule,
    RuleRemoved: _Repetition._remove_rule,
    DependencyAdded: _Repetition._add_dependency,
    DependencyRemoved: _Repetition._remove_dependency,
    OptimizationStarted: _Repetition._start_optimization,
    OptimizationStopped: _Repetition._stop_optimization,
    ToolsRegistered: _Repetition._register_tools,
    ExecutionBegan: _Repetition._begin_execution,
    ExecutionEnded: _Repetition._end_execution,
}
"""The events that have to be checked, or that have further consequences."""


def _began_before(execution_id: str, sequence: int) -> bool:
    """Whether the id names a commit before this one, so that a chain of retries always ends."""
    number = execution_id.removeprefix("exec_").partition("_")[0]
    return number.isascii() and number.isdecimal() and len(number) < 19 and int(number) < sequence


def _numbers(event: ExecutionEnded) -> Iterator[int]:
    """Iterate over the versions in the event, and its duration."""
    numbers = [event.duration_us]
    numbers += [version for _, version in (*event.writes, *event.published)]
    numbers += [version for conflict in event.conflicts for version in (conflict.expected, conflict.actual)]
    numbers += [seen.version for seen in event.reads.values() if seen is not None]
    return (number for number in numbers if number is not None)


_FIELDS: Final = {kind: tuple(each.name for each in fields(kind)) for kind in EVENTS.values()}


def _sound(text: str) -> str:
    """Return a text if a file can hold it: without lone surrogates."""
    if not text.isascii():
        text.encode()
    return text


@dataclass(frozen=True, slots=True)
class ForkSession(Command[SessionView]):
    """Begin a session with the variables, dependencies and rules that another one had at a commit.

    Each variable has version 0. The rules are not checked: the other session may have been imported.

    `variables` are those of that session, and `dependencies` refer to their ids; the new variables get new ids.
    `access` is the part of its metadata about access; the owner is whoever forks it, if somebody shows who they are.
    """

    forked_from: str
    forked_at: int
    variables: tuple[Variable, ...] = ()
    dependencies: tuple[Dependency, ...] = ()
    rules: tuple[Rule, ...] = ()
    access: Mapping[str, str] = field(default_factory=dict)

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = SessionView
    keeps_rules: ClassVar[bool] = False

    def apply(self, uow: UnitOfWork) -> SessionView:
        check_text("session_id", self.session_id, uow.limits.session_id_length, "session_id_length")
        if uow.find_session(self.session_id) is not None:
            raise SessionExistsError(self.session_id)
        metadata = {FORKED_FROM: self.forked_from, FORKED_AT: str(self.forked_at), **self.access}
        if uow.origin.identity is not None:
            metadata[OWNER] = uow.origin.identity.name
        config = {"forked": {"session_id": self.forked_from, "sequence": self.forked_at}}
        state = uow.start_session(SessionStarted(self.session_id, metadata, uow.session_ttl_s, config))
        ids = {variable.id: self._register(uow, variable) for variable in self.variables}
        for edge in self.dependencies:
            uow.record(self.session_id, DependencyAdded(ids[edge.from_id], ids[edge.to_id], edge.type))
        for rule in self.rules:
            uow.record(self.session_id, RuleAdded(rule.name, rule.expression, rule.description))
        return SessionView(resumed=False, variables=tuple(state.variables.values()))

    def _register(self, uow: UnitOfWork, variable: Variable) -> str:
        origin = uow.origin
        # The new variable keeps the source of the value.
        uow.origin = replace(origin, source=variable.source)
        _, name, kind, value, _, constraints, metadata, *_ = variable
        registered = RegisterVariable(self.session_id, name, kind, value, constraints, metadata).apply(uow)
        uow.origin = origin
        return registered
