"""An oracle for the contents of a store, implemented independently of units of work, SQL and the code of commands.

Commands are plain data here; the effect of each is implemented from the protocol's rules.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from dspex_persist.state.commands import Command
from dspex_persist.state.groups import Outcome
from dspex_persist.state.model import BatchOutcome, Origin, SessionView, Value, Variable

TTL_S = 100.0
LEASE_S = 100.0


class RefusedError(Exception):
    """The command has to fail with the error with this name."""


@dataclass(slots=True)
class Entry:
    """One version as it should be in the history."""

    variable_id: str
    version: int
    kind: str
    value: str | None
    metadata: Mapping[str, str]
    source: str
    actor: str
    cause: str
    created_at: datetime
    sequence: int
    key: int

    def place(self) -> tuple[int, int, int]:
        """Its position in the log: by commit, then by the age of its variable."""
        return (self.sequence, self.key, self.version)


@dataclass(slots=True)
class Lock:
    """An optimizer's lock on a variable."""

    id: str
    optimizer_id: str
    started_by: str
    until: datetime


@dataclass(slots=True)
class Var:
    """A live variable."""

    id: str
    name: str
    type: str
    constraints: str
    metadata: dict[str, str]
    source: str
    key: int
    """Counts the registrations."""
    history: list[Entry] = field(default_factory=list)
    lock: Lock | None = None

    @property
    def version(self) -> int:
        return self.history[-1].version

    @property
    def value(self) -> str:
        value = self.history[-1].value
        assert value is not None
        return value


@dataclass(slots=True)
class Sess:
    """A session that has not been ended (it may have expired)."""

    metadata: dict[str, str]
    ttl_s: float | None
    expires_at: datetime | None
    first_sequence: int
    variables: dict[str, Var] = field(default_factory=dict)
    dependencies: list[tuple[str, str, str]] = field(default_factory=list)
    commits: list[tuple[int, list[Entry]]] = field(default_factory=list)

    def touch(self, now: datetime) -> None:
        if self.ttl_s is not None:
            self.expires_at = now + timedelta(seconds=self.ttl_s)

    def has_expired(self, now: datetime) -> bool:
        return self.expires_at is not None and self.expires_at <= now

    def find(self, identifier: str) -> Var | None:
        by_id = {variable.id: variable for variable in self.variables.values()}
        return self.variables.get(identifier) or by_id.get(identifier)


def plain(result: Any) -> Any:
    """A command's result in a form that can be compared."""
    if isinstance(result, SessionView):
        return (result.resumed, tuple(plain(variable) for variable in result.variables))
    if isinstance(result, Variable):
        return (result.id, result.name, result.version, result.value.json, dict(result.metadata), result.source.value)
    if isinstance(result, Value):
        return result.json
    if isinstance(result, BatchOutcome):
        return (result.success, dict(result.versions), sorted(result.errors))
    return result


def _plain_var(variable: Var) -> tuple[Any, ...]:
    return (
        variable.id,
        variable.name,
        variable.version,
        variable.value,
        dict(variable.metadata),
        variable.source,
    )


class Oracle:
    """The sessions as they should be, and every version that was ever written."""

    def __init__(self, now: datetime) -> None:
        self.now = now
        self.sequence = 0
        self.sessions: dict[str, Sess] = {}
        self.log: list[Entry] = []
        self.commits: list[tuple[int, str, str]] = []
        """(sequence, actor, cause), from sequence 1."""
        self._outcomes: dict[tuple[str, str], tuple[Command[Any], Any]] = {}
        self._keys = 0
        self._origin = Origin("", "")
        self._actual: Any = None
        self._open: tuple[Sess, list[Entry]] | None = None

    def session(self, session_id: str) -> Sess | None:
        """The session unless it has ended or expired."""
        session = self.sessions.get(session_id)
        return None if session is None or session.has_expired(self.now) else session

    def touch_all(self) -> None:
        """Renew the TTL of every session."""
        for session_id in self.sessions:
            if (session := self.session(session_id)) is not None:
                session.touch(self.now)

    def reclaim(self, session_id: str) -> bool:
        """End the session if it has expired; return whether that made a commit."""
        session = self.sessions.get(session_id)
        if session is None or not session.has_expired(self.now):
            return False
        self._open = None
        self._begin_commit(session, Origin("dspex-persist", "expiry"))
        self._end(session_id)
        return True

    def _end(self, session_id: str) -> None:
        """Forget the keys of the session: the next one with this id may use them again."""
        del self.sessions[session_id]
        self._outcomes = {place: kept for place, kept in self._outcomes.items() if place[0] != session_id}

    def check(self, command: Command[Any], origin: Origin, outcome: Outcome) -> None:
        """Carry out the command here, too, and assert that the store had the same outcome.

        Ids that the store generated are copied from its outcome.
        """
        self._origin, self._actual, self._open = origin, outcome.result, None
        self.reclaim(command.session_id)
        try:
            expected = self._keyed(command, origin)
        except RefusedError as refused:
            expected = str(refused)
        actual = plain(outcome.result) if outcome.error is None else type(outcome.error).__name__
        assert actual == expected, f"{command}: {actual!r} ({outcome.error}), expected {expected!r}"

    def _keyed(self, command: Command[Any], origin: Origin) -> Any:
        key = origin.idempotency_key
        if key is None:
            return self._carry_out(command)
        place = (command.session_id, key)
        if place in self._outcomes:
            first, result = self._outcomes[place]
            if first != command:
                raise RefusedError("IdempotencyConflictError")
            return result
        result = self._carry_out(command)
        if self._open is not None:
            self._outcomes[place] = (command, result)
        return result

    def _carry_out(self, command: Command[Any]) -> Any:
        rule: Callable[[Any], Any] = getattr(self, "_" + type(command).__name__)
        self._open = None
        return rule(command)

    # Sessions

    def _InitializeSession(self, command: Any) -> Any:
        ttl = command.metadata.get("ttl_seconds")
        session = self.session(command.session_id)
        if session is None:
            ttl_s = float(ttl) if ttl is not None else None
            sess = Sess(dict(command.metadata), ttl_s or None, None, self.sequence + 1)
            sess.touch(self.now)
            self.sessions[command.session_id] = sess
            self._begin_commit(sess, self._origin)
            return (False, ())
        session.touch(self.now)
        merged = {**session.metadata, **command.metadata}
        if merged != session.metadata:
            self._begin_commit(session, self._origin)
            session.metadata = merged
            if ttl is not None:
                session.ttl_s = float(ttl) or None
                session.expires_at = None
                session.touch(self.now)
        return (True, tuple(_plain_var(variable) for variable in session.variables.values()))

    def _CleanupSession(self, command: Any) -> int:
        session = self.session(command.session_id)
        if session is None:
            return 0
        self._begin_commit(session, self._origin)
        self._end(command.session_id)
        return len(session.variables)

    def _need(self, session_id: str) -> Sess:
        session = self.session(session_id)
        if session is None:
            raise RefusedError("SessionNotFoundError")
        session.touch(self.now)
        return session

    def _variable(self, session_id: str, identifier: str) -> tuple[Sess, Var]:
        sess = self._need(session_id)
        variable = sess.find(identifier)
        if variable is None:
            raise RefusedError("VariableNotFoundError")
        return sess, variable

    # Variables

    def _RegisterVariable(self, command: Any) -> str:
        sess = self._need(command.session_id)
        existing = sess.variables.get(command.name)
        if existing is not None:
            if (existing.type, existing.constraints) != (command.type, command.constraints):
                raise RefusedError("VariableExistsError")
            return existing.id
        if sess.find(command.name) is not None:
            raise RefusedError("InvalidArgumentError")
        _check_value(command.type, command.constraints, command.value.json)
        new_id = str(self._actual)
        assert new_id.startswith(f"var_{command.name}_")
        assert new_id not in {entry.variable_id for entry in self.log}
        source = _source(command.metadata, self._origin)
        variable = Var(
            new_id, command.name, command.type, command.constraints, dict(command.metadata), source, self._keys
        )
        self._keys += 1
        sess.variables[command.name] = variable
        self._append(sess, variable, "registered", command.value.json, command.metadata, source)
        return new_id

    def _SetVariable(self, command: Any) -> int:
        sess, variable = self._variable(command.session_id, command.identifier)
        if command.expected_version is not None and command.expected_version < 0:
            raise RefusedError("InvalidArgumentError")
        if command.expected_version not in (None, variable.version):
            raise RefusedError("VersionConflictError")
        self._check_writable(variable, command.value.json, command.metadata)
        return self._set(sess, variable, command.value.json, command.metadata)

    def _SetVariables(self, command: Any) -> Any:
        sess = self._need(command.session_id)
        good: dict[str, Var] = {}
        bad: list[str] = []
        for identifier, value in command.updates.items():
            variable = sess.find(identifier)
            try:
                if variable is None:
                    raise RefusedError("VariableNotFoundError")
                self._check_writable(variable, value.json, command.metadata)
                good[identifier] = variable
            except RefusedError:
                bad.append(identifier)
        if command.atomic and bad:
            return (False, {}, sorted(bad))
        versions = {
            identifier: self._set(sess, variable, command.updates[identifier].json, command.metadata)
            for identifier, variable in good.items()
        }
        return (bool(versions) or not bad, versions, sorted(bad))

    def _RollbackVariable(self, command: Any) -> Any:
        sess, variable = self._variable(command.session_id, command.identifier)
        metadata = {"rolled_back_to": str(command.target_version)}
        if self._origin.optimizer_id is not None:
            metadata["optimizer_id"] = self._origin.optimizer_id
        self._check_lock(variable, metadata)
        if not 0 <= command.target_version <= variable.version:
            raise RefusedError("VersionNotFoundError")
        value = variable.history[command.target_version].value
        self._renew(variable, metadata)
        variable.source = self._origin.source.value
        self._append(sess, variable, "rolled_back", value, metadata, variable.source)
        return _plain_var(variable)

    def _DeleteVariable(self, command: Any) -> None:
        sess, variable = self._variable(command.session_id, command.identifier)
        if self._live_lock(variable) is not None:
            raise RefusedError("VariableLockedError")
        # The source stays that of the last write, because a deletion has none.
        self._append(sess, variable, "deleted", None, {}, variable.source)
        del sess.variables[variable.name]
        sess.dependencies = [edge for edge in sess.dependencies if variable.id not in edge[:2]]

    def _set(self, sess: Sess, variable: Var, value: str, metadata: Mapping[str, str]) -> int:
        self._renew(variable, metadata)
        variable.metadata = {**variable.metadata, **metadata}
        variable.source = _source(metadata, self._origin)
        self._append(sess, variable, "set", value, metadata, variable.source)
        return variable.version

    def _check_writable(self, variable: Var, value: str, metadata: Mapping[str, str]) -> None:
        self._check_lock(variable, metadata)
        _check_value(variable.type, variable.constraints, value)

    # Locks and dependencies

    def _live_lock(self, variable: Var) -> Lock | None:
        lock = variable.lock
        return lock if lock is not None and lock.until > self.now else None

    def _check_lock(self, variable: Var, metadata: Mapping[str, str]) -> None:
        lock = self._live_lock(variable)
        if lock is not None and metadata.get("optimizer_id") != lock.optimizer_id:
            raise RefusedError("VariableLockedError")

    def _renew(self, variable: Var, metadata: Mapping[str, str]) -> None:
        """Renew the lease for a write of the holder; after the lease's end, any write removes the lock."""
        lock = self._live_lock(variable)
        if lock is not None:
            lock.until = self.now + timedelta(seconds=LEASE_S)
        variable.lock = lock

    def _StartOptimization(self, command: Any) -> str:
        sess, variable = self._variable(command.session_id, command.identifier)
        lock = self._live_lock(variable)
        if lock is not None and lock.optimizer_id != command.optimizer_id:
            raise RefusedError("VariableLockedError")
        if lock is None:
            lock = Lock(str(self._actual), command.optimizer_id, self._origin.actor, self.now)
            assert lock.id.startswith(f"opt_{variable.name}_")
        lock.until = self.now + timedelta(seconds=LEASE_S)
        variable.lock = lock
        self._begin_commit(sess, self._origin)
        return lock.id

    def _StopOptimization(self, command: Any) -> str:
        sess, variable = self._variable(command.session_id, command.identifier)
        lock = self._live_lock(variable)
        if lock is None:
            raise RefusedError("NotOptimizingError")
        asked_by = self._origin.optimizer_id
        own = asked_by == lock.optimizer_id if asked_by is not None else self._origin.actor == lock.started_by
        if not own and not command.force:
            raise RefusedError("VariableLockedError")
        value = variable.value
        variable.lock = None
        if own:
            self._begin_commit(sess, self._origin)
        else:
            metadata = {"broken_optimizer_id": lock.optimizer_id, "broken_optimization_id": lock.id}
            variable.source = self._origin.source.value
            self._append(sess, variable, "lock_broken", value, metadata, variable.source)
        return value

    def _AddDependency(self, command: Any) -> None:
        sess, user = self._variable(command.session_id, command.from_variable)
        _, used = self._variable(command.session_id, command.to_variable)
        edge = (user.id, used.id, command.dependency_type)
        if edge in sess.dependencies:
            return
        if user.id == used.id or user.id in _reach(sess.dependencies, used.id):
            raise RefusedError("DependencyCycleError")
        sess.dependencies.append(edge)
        self._begin_commit(sess, self._origin)

    def _RemoveDependency(self, command: Any) -> bool:
        sess, user = self._variable(command.session_id, command.from_variable)
        _, used = self._variable(command.session_id, command.to_variable)
        edge = (user.id, used.id, command.dependency_type)
        if edge not in sess.dependencies:
            return False
        sess.dependencies.remove(edge)
        self._begin_commit(sess, self._origin)
        return True

    # The log

    def _begin_commit(self, sess: Sess, origin: Origin) -> list[Entry]:
        if self._open is None or self._open[0] is not sess:
            self.sequence += 1
            self.commits.append((self.sequence, origin.actor, origin.cause))
            entries: list[Entry] = []
            sess.commits.append((self.sequence, entries))
            self._open = (sess, entries)
        return self._open[1]

    def _append(
        self, sess: Sess, variable: Var, kind: str, value: str | None, metadata: Mapping[str, str], source: str
    ) -> None:
        entries = self._begin_commit(sess, self._origin)
        entry = Entry(
            variable.id,
            len(variable.history),
            kind,
            value,
            dict(metadata),
            source,
            self._origin.actor,
            self._origin.cause,
            self.now,
            self.sequence,
            variable.key,
        )
        variable.history.append(entry)
        entries.append(entry)
        self.log.append(entry)


def _source(metadata: Mapping[str, str], origin: Origin) -> str:
    return metadata.get("source", origin.source.value)


def _check_value(type_name: str, constraints: str, value: str) -> None:
    is_integer = not value.startswith('"')
    if (type_name == "integer") != is_integer:
        raise RefusedError("InvalidValueError")
    if constraints == '{"max": 50}' and int(value) > 50:
        raise RefusedError("InvalidValueError")
    if constraints == '{"max_length": 8}' and len(value) - 2 > 8:
        raise RefusedError("InvalidValueError")


def _reach(edges: list[tuple[str, str, str]], start: str) -> set[str]:
    """Everything that `start` depends on, directly or indirectly."""

    def walk(node: str, seen: set[str]) -> Iterator[str]:
        for user, used, _ in edges:
            if user == node and used not in seen:
                seen.add(used)
                yield used
                yield from walk(used, seen)

    return set(walk(start, set()))
