"""Recordings: repeat a recorded commit, end an import, begin a session as another one was at a point."""

import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias, TypeVar

from dspex_persist.clock import from_micros
from dspex_persist.state import values
from dspex_persist.state.commands.base import Command, check_merged_metadata, check_metadata, check_text
from dspex_persist.state.commands.dependencies import check_dependency
from dspex_persist.state.commands.variables import RegisterVariable
from dspex_persist.state.errors import (
    LimitExceededError,
    RecordingError,
    SessionExistsError,
    StateError,
    quote,
)
from dspex_persist.state.frozen import freeze
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import (
    ChangeKind,
    Conflict,
    Dependency,
    Event,
    EventKind,
    ExecutionStatus,
    Failure,
    Isolation,
    Optimization,
    Origin,
    RegisteredTool,
    RunningExecution,
    Session,
    SessionView,
    Value,
    Variable,
)
from dspex_persist.state.recording import RecordedCommit, RecordedVersion, is_execution_id, renumbered
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.unit_of_work import UnitOfWork, value_in
from dspex_persist.state.values.json_text import RefusedError, read_line

if TYPE_CHECKING:
    from pydantic import TypeAdapter

B = TypeVar("B")

FORKED_FROM: Final = "forked_from"
FORKED_AT: Final = "forked_at"
"""The session's metadata says of which session it is a fork, and as of which commit."""

_NEVER: Final = datetime(9000, 1, 1, tzinfo=UTC)
_UNREADABLE: Final = (LookupError, TypeError, ValueError, AttributeError, OverflowError)


@dataclass(frozen=True, slots=True)
class ImportCommit(Command[None]):
    """Repeat a commit of a recording: the same versions and events, by the same actor, at its own time.

    The commits of a recording come in their order, with nothing of anybody else's in between, and the first one begins
    the session. What is no whole, sound recording is a `RecordingError`, also where a limit is crossed.
    """

    commit: RecordedCommit

    writes: ClassVar[bool] = True

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
            _Repetition(uow, self.session_id, commit).carry_out()
        except StateError as error:
            raise RecordingError("the recording", number + 1, str(error)) from error
        except RefusedError as error:
            raise RecordingError("the recording", number + 1, error.reason) from error
        except _UNREADABLE as error:
            reason = str(error) if type(error) is ValueError else f"it makes no sense: {type(error).__name__} {error}"
            raise RecordingError("the recording", number + 1, reason) from error


@dataclass(frozen=True, slots=True)
class FinishImport(Command[int]):
    """After the last commit of a recording: what ran when it was made is interrupted, and the TTL begins anew.

    Returns how many executions there were.
    """

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = int

    def apply(self, uow: UnitOfWork) -> int:
        state = uow.find_session(self.session_id)
        running = tuple(state.executions) if state is not None else ()
        for execution_id in running:
            facts = {"reason": "it ran when the session was recorded"}
            uow.end_execution(self.session_id, execution_id, ExecutionStatus.INTERRUPTED, facts)
        return len(running)


class _Repetition:
    """One recorded commit, carried out on a unit of work, which then says what the commit said.

    The recording has events and versions apart. Events are taken in order, and a variable's versions after all of them,
    or earlier where they have to be: a name can be registered again only when its last holder is deleted.
    """

    def __init__(self, uow: UnitOfWork, session_id: str, commit: RecordedCommit) -> None:
        self._uow = uow
        self._session_id = session_id
        self._commit = commit
        self._pending: dict[str, deque[RecordedVersion]] = {}
        for version in commit.versions:
            self._pending.setdefault(version.variable_id, deque()).append(version)

    def carry_out(self) -> None:
        """Stage everything."""
        uow, commit = self._uow, self._commit
        begins = [event.kind is EventKind.SESSION_STARTED for event in commit.events]
        if begins != [commit.number == 1 and place == 0 for place in range(len(begins))] or (
            commit.number == 1 and not begins
        ):
            raise ValueError("its first commit, and no other, begins the session")
        if sum(event.kind is EventKind.EXECUTION_BEGAN for event in commit.events) > 1:
            raise ValueError("a commit begins one execution at most")
        uow.now = commit.at
        uow.origin = Origin(_sound(commit.actor), _sound(commit.cause))
        for event in commit.events:
            _READERS[event.kind](self, event)
        self._write_rest()
        if not uow.has_changes():
            raise ValueError("it changes nothing")
        state = uow.find_session(self._session_id)
        if state is not None and state.lease is not None:
            # What kept the session alive, reads and heartbeats, is not in the recording: it says itself when it ends.
            state.lease.expires_at = _NEVER

    def _state(self) -> SessionState:
        return self._uow.session(self._session_id)

    def _variable(self, variable_id: str) -> Variable:
        state = self._state()
        name = state.names.get(variable_id)
        if name is None:
            raise ValueError(f"there is no variable {quote(variable_id)} at this commit")
        return state.variables[name]

    # Versions

    def _write_rest(self) -> None:
        for variable_id in tuple(self._pending):
            self._write_all(variable_id)

    def _write_all(self, variable_id: str) -> None:
        for version in self._pending.pop(variable_id, ()):
            self._write(version)

    def _write(self, recorded: RecordedVersion) -> None:
        uow, variable = self._uow, self._variable(recorded.variable_id)
        if (recorded.name, recorded.version) != (variable.name, variable.version + 1):
            told = f"version {recorded.version} of {quote(recorded.name)}"
            raise ValueError(f"{told} does not follow version {variable.version} of {quote(variable.name)}")
        if recorded.kind is ChangeKind.DELETED:
            uow.delete_variable(self._session_id, variable)
            return
        if recorded.kind is ChangeKind.REGISTERED:
            raise ValueError(f"variable {quote(variable.name)} is registered already")
        metadata = check_metadata(recorded.metadata, uow.limits)
        if recorded.kind.merges_metadata:
            check_merged_metadata({**variable.metadata, **metadata}, metadata, uow.limits)
        value = _value(recorded, variable.type, variable.constraints, uow.limits)
        uow.write(self._session_id, variable, value, metadata, recorded.source, recorded.kind)

    def _register_variable(self, event: Event) -> None:
        uow = self._uow
        variable_id, name, kind, constraints = _texts(event, "variable_id", "name", "type", "constraints")
        holder = self._state().variables.get(name)
        if holder is not None:
            self._write_all(holder.id)
        state = self._state()
        versions = self._pending.get(variable_id)
        if versions is None or name in state.variables or variable_id in state.names:
            raise ValueError(f"variable {quote(name)} cannot be registered here")
        recorded = versions.popleft()
        if (recorded.kind, recorded.version, recorded.name) != (ChangeKind.REGISTERED, 0, name):
            raise ValueError(f"variable {quote(name)} has no version 0")
        _check_registration(state, name, constraints, recorded, uow.limits)
        value = _value(recorded, kind, constraints, uow.limits)
        variable = Variable(
            variable_id, name, kind, value, 0, constraints, freeze(recorded.metadata), recorded.source, uow.now
        )
        uow.add_variable(self._session_id, variable)

    # Sessions

    def _start_session(self, event: Event) -> None:
        uow, body = self._uow, event.body
        metadata, ttl_s = self._session_facts(body)
        session = Session(self._session_id, uow.now, metadata, ttl_s, uow.sequence)
        uow.start_session(session, body["config"])

    def _update_session(self, event: Event) -> None:
        metadata, ttl_s = self._session_facts(event.body)
        self._uow.update_session(replace(self._state().session, metadata=metadata, ttl_s=ttl_s))

    def _session_facts(self, body: Mapping[str, Any]) -> tuple[Mapping[str, str], float | None]:
        metadata, ttl_s = check_metadata(body["metadata"], self._uow.limits), body["ttl_s"]
        if ttl_s is not None and not 0 < ttl_s <= 100 * 365 * 86_400:
            raise ValueError(f"no session lives {ttl_s} seconds")
        return metadata, ttl_s

    def _end_session(self, event: Event) -> None:
        self._write_rest()
        if self._state().executions:
            raise ValueError("an execution runs on after the end of the session")
        (reason,) = _texts(event, "reason")
        self._uow.end_session(self._session_id, reason)

    # Dependencies and optimizations

    def _add_dependency(self, event: Event) -> None:
        from_id, to_id, kind = _texts(event, "from_id", "to_id", "type")
        edge = Dependency(self._variable(from_id).id, self._variable(to_id).id, kind, self._uow.sequence)
        check_dependency(self._state(), edge, self._uow.limits)
        self._uow.add_dependency(self._session_id, edge)

    def _start_optimization(self, event: Event) -> None:
        uow, body = self._uow, event.body
        variable_id, lock_id, optimizer_id, started_by = _texts(
            event, "variable_id", "optimization_id", "optimizer_id", "started_by"
        )
        started_at = from_micros(body["started_at"])
        lock = Optimization(
            lock_id,
            optimizer_id,
            started_at,
            started_by,
            check_metadata(body["config"], uow.limits),
            float(body["lease_s"]),
            uow.now if uow.now != started_at else None,
        )
        lock.expires_at()  # Raises for a lease that no calendar has.
        uow.start_optimization(self._session_id, self._variable(variable_id), lock)

    def _stop_optimization(self, event: Event) -> None:
        variable_id, lock_id, reason = _texts(event, "variable_id", "optimization_id", "reason")
        variable = self._variable(variable_id)
        lock = variable.optimization
        if lock is None or lock.id != lock_id:
            raise ValueError(f"variable {quote(variable.name)} is not being optimized by {quote(lock_id)}")
        self._uow.stop_optimization(self._session_id, variable, lock, reason)

    # Tools and executions

    def _register_tools(self, event: Event) -> None:
        limits = self._uow.limits
        json.dumps(event.body, ensure_ascii=False).encode()  # Raises for what no file can hold.
        (worker_id,) = _texts(event, "worker_id")
        tools = _tools_codec().validate_python(event.body["tools"])
        for tool in tools:
            check_text("tool name", tool.spec.name, limits.name_length, "name_length")
            check_metadata(tool.spec.metadata, limits)
        count = len(self._state().tools.keys() | {tool.spec.name for tool in tools})
        if count > limits.tools_per_session:
            raise LimitExceededError("number of tools", count, limits.tools_per_session, "tools_per_session")
        self._uow.register_tools(self._session_id, worker_id, tools)

    def _begin_execution(self, event: Event) -> None:
        uow, body = self._uow, dict(event.body)
        execution_id, tool, fingerprint = _texts(event, "execution_id", "tool", "fingerprint")
        parent_id, key = (None if body[name] is None else _texts(event, name)[0] for name in _OPTIONAL)
        if not is_execution_id(execution_id) or execution_id.rpartition("_")[0] != f"exec_{uow.sequence}":
            raise ValueError(f"the id of execution {quote(execution_id)} does not name the commit of its beginning")
        if parent_id is not None and parent_id not in self._state().executions:
            raise ValueError(f"execution {quote(execution_id)} was called by {quote(parent_id)}, which does not run")
        if key is not None:
            check_text("idempotency key", key, uow.limits.name_length, "name_length")
        check_metadata(body["metadata"], uow.limits)
        begun = _read_body(_begin_codec(), body)
        if begun.retry_of is not None and not _began_before(begun.retry_of, uow.sequence):
            repeated = quote(begun.retry_of)
            raise ValueError(f"execution {quote(execution_id)} repeats {repeated}, which did not begin before it")
        for each in begun.parameters.values():
            read_line(each.json)
            value_in({"json": each.json} | ({"binary": each.binary} if each.binary is not None else {}))
        running = RunningExecution(execution_id, tool, uow.sequence, parent_id, key, fingerprint)
        uow.begin_execution(self._session_id, running, body)

    def _end_execution(self, event: Event) -> None:
        facts = dict(event.body)
        execution_id, status, result = (facts.pop(name) for name in ("execution_id", "status", "result"))
        if execution_id not in self._state().executions:
            raise ValueError(f"execution {quote(execution_id)} does not run")
        ended = ExecutionStatus(status)
        if ended is ExecutionStatus.RUNNING:
            raise ValueError(f"execution {quote(execution_id)} ends as running")
        value = None if result is None else value_in(result)
        if value is not None:
            read_line(value.json)
        _read_body(_end_codec(), facts)
        self._uow.end_execution(self._session_id, execution_id, ended, facts, value)

    def _refuse(self, event: Event) -> None:
        raise ValueError("history was pruned here, so the recording is not whole")


_OPTIONAL: Final = ("parent_id", "idempotency_key")
_Reader: TypeAlias = Callable[[_Repetition, Event], None]
_READERS: Final[Mapping[EventKind, _Reader]] = {
    EventKind.SESSION_STARTED: _Repetition._start_session,
    EventKind.SESSION_UPDATED: _Repetition._update_session,
    EventKind.SESSION_ENDED: _Repetition._end_session,
    EventKind.VARIABLE_REGISTERED: _Repetition._register_variable,
    EventKind.DEPENDENCY_ADDED: _Repetition._add_dependency,
    EventKind.OPTIMIZATION_STARTED: _Repetition._start_optimization,
    EventKind.OPTIMIZATION_STOPPED: _Repetition._stop_optimization,
    EventKind.TOOLS_REGISTERED: _Repetition._register_tools,
    EventKind.EXECUTION_BEGAN: _Repetition._begin_execution,
    EventKind.EXECUTION_ENDED: _Repetition._end_execution,
    EventKind.PRUNED: _Repetition._refuse,
}


# Built when they are needed: that takes milliseconds, and pydantic's import more.
@lru_cache
def _tools_codec() -> "TypeAdapter[tuple[RegisteredTool, ...]]":
    from pydantic import TypeAdapter

    return TypeAdapter(tuple[RegisteredTool, ...])


@lru_cache
def _begin_codec() -> "TypeAdapter[_Beginning]":
    from pydantic import TypeAdapter

    return TypeAdapter(_Beginning)


@lru_cache
def _end_codec() -> "TypeAdapter[_End]":
    from pydantic import TypeAdapter

    return TypeAdapter(_End)


@dataclass(frozen=True, slots=True)
class _Argument:
    json: str
    binary: str | None = None


@dataclass(frozen=True, slots=True)
class _Beginning:
    """The body of an execution's beginning, as audits and replays read it."""

    parameters: dict[str, _Argument]
    metadata: dict[str, str]
    isolation: Isolation
    attempt: int
    seed: str
    worker_id: str
    retry_of: str | None = None


@dataclass(frozen=True, slots=True)
class _Line:
    at: int
    message: Any
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _End:
    """The body of an execution's end, as audits and replays read it. One that was interrupted has a reason only."""

    reason: str = ""
    failure: Failure | None = None
    conflicts: tuple[Conflict, ...] = ()
    reads: dict[str, tuple[str, str, int] | None] = field(default_factory=dict)
    patterns: tuple[str, ...] = ()
    writes: tuple[tuple[str, int], ...] = ()
    published: tuple[tuple[str, int], ...] = ()
    log: tuple[_Line, ...] = ()
    recorded: dict[str, Any] = field(default_factory=dict)
    duration_us: int | None = None


def _read_body(codec: "TypeAdapter[B]", body: Mapping[str, Any]) -> B:
    """What a body says, if whoever reads it later can; `ValueError` says what is wrong with it."""
    from pydantic import ValidationError

    try:
        # As JSON: that is strict, and a list is what a tuple is there.
        return codec.validate_json(json.dumps(body), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place} of an execution makes no sense: {first['msg'].lower()}") from error


def _texts(event: Event, *names: str) -> list[str]:
    return [_sound(event.body[name]) for name in names]


def _began_before(execution_id: str, sequence: int) -> bool:
    """Whether the id names a commit before this one: who follows repetitions comes to an end then."""
    number = execution_id.removeprefix("exec_").partition("_")[0]
    return number.isascii() and number.isdecimal() and len(number) < 19 and int(number) < sequence


def _sound(text: object) -> str:
    """A text that a file can hold: without lone surrogates."""
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is no text")
    text.encode()
    return text


def _value(recorded: RecordedVersion, type_name: str, constraints: str, limits: Limits) -> Value:
    """The recorded value, if it is one that a store would have kept."""
    what = f"version {recorded.version} of {quote(recorded.name)}"
    if recorded.value is None:
        reason = "its value was kept out of the recording" if recorded.masked else "it has no value"
        raise ValueError(f"{what}: {reason}")
    compiled = values.compile_constraints(recorded.name, type_name, constraints)
    if values.normalise(recorded.name, type_name, compiled, recorded.value, limits) != recorded.value:
        raise ValueError(f"{what}: its value is not written as a store writes a value of type {type_name}")
    return recorded.value


def _check_registration(
    state: SessionState, name: str, constraints: str, recorded: RecordedVersion, limits: Limits
) -> None:
    """What `RegisterVariable` would not have let pass."""
    check_text("name", name, limits.name_length, "name_length")
    check_metadata(recorded.metadata, limits)
    size = len(constraints.encode())
    if size > limits.constraints_size_bytes:
        what = f"size of the constraints of {quote(name)} in bytes"
        raise LimitExceededError(what, size, limits.constraints_size_bytes, "constraints_size_bytes")
    count = len(state.variables) + 1
    if count > limits.variables_per_session:
        raise LimitExceededError("number of variables", count, limits.variables_per_session, "variables_per_session")


@dataclass(frozen=True, slots=True)
class ForkSession(Command[SessionView]):
    """Begin a session with the variables that another one had at a commit, each at version 0, and its dependencies.

    `variables` are those of that session, `dependencies` are between their ids; the new variables get ids of their own.
    """

    forked_from: str
    forked_at: int
    variables: tuple[Variable, ...] = ()
    dependencies: tuple[Dependency, ...] = ()

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = SessionView

    def apply(self, uow: UnitOfWork) -> SessionView:
        check_text("session_id", self.session_id, uow.limits.session_id_length, "session_id_length")
        if uow.find_session(self.session_id) is not None:
            raise SessionExistsError(self.session_id)
        metadata = {FORKED_FROM: self.forked_from, FORKED_AT: str(self.forked_at)}
        session = Session(self.session_id, uow.now, metadata, uow.session_ttl_s, uow.sequence)
        state = uow.start_session(session, {"forked": {"session_id": self.forked_from, "sequence": self.forked_at}})
        ids = {variable.id: self._register(uow, variable) for variable in self.variables}
        for edge in self.dependencies:
            copied = Dependency(ids[edge.from_id], ids[edge.to_id], edge.type, uow.sequence)
            uow.add_dependency(self.session_id, copied)
        return SessionView(resumed=False, variables=tuple(state.variables.values()))

    def _register(self, uow: UnitOfWork, variable: Variable) -> str:
        origin = uow.origin
        # Which side the value is from stays what it was.
        uow.origin = replace(origin, source=variable.source)
        _, name, kind, value, _, constraints, metadata, *_ = variable
        registered = RegisterVariable(self.session_id, name, kind, value, constraints, metadata).apply(uow)
        uow.origin = origin
        return registered
