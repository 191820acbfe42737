"""Writing units of work to the log, and updating the tables of the current state."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Protocol, TypeAlias

from sqlalchemy import Connection, Table, func, insert, select, update
from sqlalchemy.dialects import sqlite

from dspex_persist.clock import to_micros
from dspex_persist.state.anchor import Head
from dspex_persist.state.events import (
    DependencyAdded,
    DependencyRemoved,
    Event,
    ExecutionBegan,
    ExecutionEnded,
    OptimizationStarted,
    OptimizationStopped,
    Pruned,
    RuleAdded,
    RuleRemoved,
    SessionEnded,
    SessionStarted,
    SessionUpdated,
    ToolsRegistered,
    VariableConstrained,
    VariableRegistered,
)
from dspex_persist.state.model import (
    Change,
    ChangeKind,
    ExecutionStatus,
    VariableVersion,
)
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.store import blobs, outcomes, pruned
from dspex_persist.state.store import executions as stored_executions
from dspex_persist.state.store.chain import commit_text, event_text, link, version_text
from dspex_persist.state.store.engine import Driver, driver_of
from dspex_persist.state.store.lm_rows import rows_of
from dspex_persist.state.store.schema import (
    commits,
    dependencies,
    events,
    executions,
    imports,
    lm_calls,
    rules,
    sessions,
    tools,
    variables,
    versions,
)
from dspex_persist.state.store.variables import KIND_CODES, SOURCE_CODES, lock_text
from dspex_persist.state.unit_of_work import UnitOfWork
from dspex_persist.state.values.json_text import storable


def metadata_text(metadata: Mapping[str, str]) -> str:
    """Return metadata as the tables store it."""
    return storable(dict(metadata))


def _compiled_insert(table: Table, *columns: str) -> str:
    """Return the INSERT of these columns, or of all."""
    return str(insert(table).compile(dialect=sqlite.dialect(paramstyle="qmark"), column_keys=columns or None))


# Hot statements are compiled once and get tuples, which avoids SQLAlchemy's work on each row.
_INSERT_COMMITS = _compiled_insert(commits)
_INSERT_VERSIONS = _compiled_insert(versions)
# Most versions have only these columns, and binding the others takes a fifth of the time of an INSERT.
_INSERT_SHORT_VERSIONS = _compiled_insert(versions, "variable_key", "version", "sequence", "kind", "source", "value")
_INSERT_EVENTS = _compiled_insert(events)
_INSERT_SESSION = _compiled_insert(sessions)
_INSERT_VARIABLE = _compiled_insert(variables)
_INSERT_EXECUTION = _compiled_insert(executions)
_INSERT_LM_CALLS = _compiled_insert(lm_calls)
_INSERT_DEPENDENCY = _compiled_insert(dependencies, "session_key", "from_id", "to_id", "type", "since_sequence")
_END_EXECUTION = "UPDATE executions SET status = ?, ended_sequence = ? WHERE began_sequence = ?"
_DELETE_TOOLS = "DELETE FROM tools WHERE session_key = ? AND worker_id = ?"
_REPLACE_TOOL = (
    _compiled_insert(tools)
    + """
    ON CONFLICT (session_key, name) DO UPDATE SET worker_id = excluded.worker_id, address = excluded.address,
        spec = excluded.spec, registered_sequence = excluded.registered_sequence
"""
)
_REPLACE_RULE = (
    _compiled_insert(rules)
    + """
    ON CONFLICT (session_key, name) DO UPDATE SET expression = excluded.expression,
        description = excluded.description, added_sequence = excluded.added_sequence
"""
)
_REMOVE_RULE = "DELETE FROM rules WHERE session_key = ? AND name = ?"
_SET_METADATA = "UPDATE variables SET metadata = ? WHERE variable_key = ?"
_SET_LOCK = "UPDATE variables SET optimization = ? WHERE variable_key = ?"
_UPDATE_SESSION = "UPDATE sessions SET ttl_s = ?, metadata = ?, expires_at = ? WHERE session_key = ?"
_KEEP_CONSTRAINTS = """
    INSERT INTO variable_constraints (variable_key, since_sequence, constraints)
    SELECT variable_key, 0, constraints FROM variables WHERE variable_key = ? ON CONFLICT DO NOTHING
"""
# A unit may change them several times.
_ADD_CONSTRAINTS = """
    INSERT INTO variable_constraints (variable_key, since_sequence, constraints) VALUES (?, ?, ?)
    ON CONFLICT (variable_key, since_sequence) DO UPDATE SET constraints = excluded.constraints
"""
_SET_CONSTRAINTS = "UPDATE variables SET constraints = ? WHERE variable_key = ?"
_FREE_NAME = "UPDATE variables SET deleted_sequence = ? WHERE variable_key = ?"
_DELETE_VARIABLE = "UPDATE variables SET deleted_sequence = ?, optimization = NULL WHERE variable_key = ?"
_DROP_DEPENDENCY = """
    DELETE FROM dependencies
    WHERE session_key = ? AND from_id = ? AND to_id = ? AND type = ? AND since_sequence = ? AND until_sequence IS NULL
"""
_END_DEPENDENCY = """
    UPDATE dependencies SET until_sequence = ?
    WHERE session_key = ? AND from_id = ? AND to_id = ? AND type = ? AND until_sequence IS NULL
"""
_END_DEPENDENCIES = """
    UPDATE dependencies SET until_sequence = ?
    WHERE session_key = ? AND until_sequence IS NULL AND (from_id = ? OR to_id = ?)
"""
_END_SESSION = "UPDATE sessions SET ended_sequence = ?, expires_at = NULL WHERE session_key = ?"


class Staging(Driver, Protocol):
    """Keeps statements, to run them later in their order."""

    def send(self) -> None:
        """Run what was kept."""


class LogWriter:
    """Writes one group in the connection's transaction. For a single use.

    Args:
        connection: The connection.
        head: The last commit before the group.
        keys: The free keys.
        staging: Where statements go that return nothing; None to run them on the connection.
        kept: The keys and digests of large contents that are stored already.
    """

    def __init__(
        self,
        connection: Connection,
        head: Head,
        keys: "Keys",
        staging: Staging | None = None,
        kept: blobs.Kept | None = None,
    ) -> None:
        self._connection = connection
        self._staging = staging
        self._kept = kept or {}
        self._driver: Driver = staging or driver_of(connection)
        self._keys = keys
        self._hash = head.hash
        self._sequence = head.sequence
        self._now: datetime | None = None
        self._created_at = 0
        self._commits: list[tuple[Any, ...]] = []
        self._versions: list[tuple[Any, ...]] = []
        self._short_versions: list[tuple[Any, ...]] = []
        self._events: list[tuple[Any, ...]] = []
        self._started: list[tuple[Any, ...]] = []
        self._registered: list[tuple[Any, ...]] = []
        self._outcomes: list[tuple[Any, ...]] = []
        self._merged: dict[int, str] = {}
        self._last_metadata: tuple[Mapping[str, str], str] = {}, "{}"
        self._begun: list[tuple[Any, ...]] = []
        self._ended: list[tuple[Any, ...]] = []
        self._gone: frozenset[str] = frozenset()
        self._freed: set[int] = set()
        # A trigger of a SQLite file makes them.
        self._lists_lm_calls = connection.dialect.name != "sqlite"
        self._lm_calls: list[tuple[Any, ...]] = []

    def add(self, unit: UnitOfWork) -> None:
        """Add one unit with changes; its sequence is the next one."""
        state = unit.state
        assert state is not None, "a unit with changes has a session"
        changes = unit.versions
        self._gone = _deleted_in(changes) if len(changes) > 1 else frozenset()
        if self._gone:
            self._free_names(unit, state)
        event_texts = [self._add_event(unit, state, ordinal, event) for ordinal, event in enumerate(unit.events)]
        if len(changes) > 1:
            changes.sort(key=lambda change: (state.keys[change.variable.id], change.version.version))
        version_texts = [self._add_version(state, change) for change in changes]
        if unit.now is not self._now:
            # The units of a group have the same time.
            self._now, self._created_at = unit.now, to_micros(unit.now)
        created_at = self._created_at
        actor, cause = unit.origin.actor, unit.origin.cause
        content = commit_text(unit.sequence, state.key, actor, cause, created_at, version_texts, event_texts)
        self._hash = link(self._hash, content)
        self._sequence = unit.sequence
        self._commits.append((unit.sequence, state.key, actor, cause, created_at, self._hash))
        if unit.outcome is not None:
            self._outcomes.append(outcomes.row_of(unit.outcome, created_at))

    @property
    def head(self) -> Head:
        """The last commit added."""
        return Head(self._sequence, self._hash)

    def flush(self) -> None:
        """Write the rows of the added units."""
        self._write_new()
        for statement, rows in (
            (_INSERT_COMMITS, self._commits),
            (_INSERT_SHORT_VERSIONS, self._short_versions),
            (_INSERT_VERSIONS, self._versions),
            (_INSERT_EVENTS, self._events),
            (_INSERT_EXECUTION, self._begun),
            (_END_EXECUTION, self._ended),
            (_INSERT_LM_CALLS, self._lm_calls),
            (_SET_METADATA, [(text, key) for key, text in self._merged.items()]),
            (outcomes.INSERT, self._outcomes),
        ):
            if rows:
                self._driver.executemany(statement, rows)
        if self._freed:
            # After the new versions, because one of them may have the same content.
            pruned.delete_unused(self._after_all(), self._freed)

    def _after_all(self) -> Connection:
        """Return the connection once it has run all that was written so far."""
        if self._staging is not None:
            self._staging.send()
        return self._connection

    def _add_version(self, state: SessionState, change: Change) -> str:
        version, value = change.version, change.version.value
        key = state.keys[version.variable_id]
        text = text_blob = text_digest = binary = binary_blob = binary_digest = None
        if value is not None:
            if len(value.json) <= blobs.INLINE_BYTES:
                text = value.json
            else:
                text_blob, text_digest = self._keep_blob(value.json)
            if value.binary is not None:
                if len(value.binary) <= blobs.INLINE_BYTES:
                    binary, binary_digest = value.binary, blobs.digest(value.binary).hex()
                else:
                    binary_blob, binary_digest = self._keep_blob(value.binary)
        metadata = self._metadata_text(version.metadata) if version.metadata else None
        kind, source = KIND_CODES[version.kind], SOURCE_CODES[version.source]
        row = (key, version.version, version.sequence, kind, source, text)
        if text_blob is None and binary is None and binary_blob is None and metadata is None:
            self._short_versions.append(row)
        else:
            self._versions.append((*row, text_blob, binary, binary_blob, metadata))
        if version.kind is ChangeKind.DELETED:
            self._delete(state, version)
        elif change.merged:
            self._merged[key] = self._metadata_text(change.variable.metadata)
        return version_text(key, version.version, kind, source, text, metadata, text_digest, binary_digest)

    def _keep_blob(self, content: str | bytes) -> tuple[int, str]:
        kept = self._kept.get(content)
        if kept is None:
            kept = blobs.keep(self._connection, content.encode() if isinstance(content, str) else content)
        key, digest = kept
        return key, digest.hex()

    def _metadata_text(self, metadata: Mapping[str, str]) -> str:
        """Return the same as `metadata_text`. A batch has one metadata for all its versions: its text is kept."""
        if metadata != self._last_metadata[0]:
            self._last_metadata = metadata, metadata_text(metadata)
        return self._last_metadata[1]

    def _free_names(self, unit: UnitOfWork, state: SessionState) -> None:
        """Mark deleted variables first: the unit may register others with their names, and live names are unique."""
        new = {event.variable_id for event in unit.events if isinstance(event, VariableRegistered)}
        keys = [(unit.sequence, state.keys[variable_id]) for variable_id in self._gone - new]
        if keys:
            self._write_new()
            self._driver.executemany(_FREE_NAME, keys)

    def _delete(self, state: SessionState, version: VariableVersion) -> None:
        self._write_new()
        self._driver.execute(_DELETE_VARIABLE, (version.sequence, state.keys[version.variable_id]))
        if state.dependencies:
            ends = (version.sequence, state.key, version.variable_id, version.variable_id)
            self._driver.execute(_END_DEPENDENCIES, ends)

    def _add_event(self, unit: UnitOfWork, state: SessionState, ordinal: int, event: Event) -> str:
        project = _PROJECTIONS.get(type(event))
        logged = None if project is None else project(self, unit, state, event)
        text = storable((logged or event).to_body())
        self._events.append((unit.sequence, ordinal, event.kind.value, text))
        if self._lists_lm_calls and isinstance(event, ExecutionEnded):
            self._lm_calls += rows_of(unit.sequence, ordinal, text, to_micros(unit.now))
        return event_text(ordinal, event.kind.value, text)

    def _write_new(self) -> None:
        """Write the rows of new sessions and variables, before another statement reads or changes them."""
        if self._started:
            self._driver.executemany(_INSERT_SESSION, self._started)
            self._started = []
        if self._registered:
            self._driver.executemany(_INSERT_VARIABLE, self._registered)
            self._registered = []

    # What each kind of event changes in the tables of the current state. An event that is returned is logged instead

    def _start_session(self, unit: UnitOfWork, state: SessionState, event: SessionStarted) -> Event:
        state.key = self._keys.new_session()
        lease = state.lease
        expires_at = to_micros(lease.expires_at) if lease is not None else None
        facts = (event.session_id, to_micros(unit.now), unit.sequence, None, event.ttl_s, expires_at)
        self._started.append((state.key, *facts, metadata_text(event.metadata)))
        return replace(event, session_key=state.key)

    def _update_session(self, unit: UnitOfWork, state: SessionState, event: SessionUpdated) -> None:
        lease = state.lease
        expires_at = to_micros(lease.expires_at) if lease is not None else None
        self._write_new()
        self._driver.execute(_UPDATE_SESSION, (event.ttl_s, metadata_text(event.metadata), expires_at, state.key))

    def _end_session(self, unit: UnitOfWork, state: SessionState, event: SessionEnded) -> None:
        self._write_new()
        if self._outcomes:
            self._driver.executemany(outcomes.INSERT, self._outcomes)
            self._outcomes = []
        self._driver.execute(outcomes.FORGET_SESSION, (event.session_id,))
        self._driver.execute(_END_SESSION, (unit.sequence, state.key))

    def _register_variable(self, unit: UnitOfWork, state: SessionState, event: VariableRegistered) -> Event:
        key = self._keys.new_variable()
        state.keys[event.variable_id] = key
        # A variable that the same unit deletes again is never live, so its name stays free.
        deleted = unit.sequence if event.variable_id in self._gone else None
        facts = (event.variable_id, event.name, event.type, event.constraints)
        self._registered.append((key, state.key, *facts, "{}", None, deleted))
        return VariableRegistered(*facts, key)

    def _constrain_variable(self, unit: UnitOfWork, state: SessionState, event: VariableConstrained) -> Event:
        key = state.keys[event.variable_id]
        self._write_new()
        self._driver.execute(_KEEP_CONSTRAINTS, (key,))
        self._driver.execute(_ADD_CONSTRAINTS, (key, unit.sequence, event.constraints))
        self._driver.execute(_SET_CONSTRAINTS, (event.constraints, key))
        return replace(event, variable_key=key)

    def _add_rule(self, unit: UnitOfWork, state: SessionState, event: RuleAdded) -> None:
        self._write_new()
        row = (state.key, event.name, event.expression, event.description, unit.sequence)
        self._driver.execute(_REPLACE_RULE, row)

    def _remove_rule(self, unit: UnitOfWork, state: SessionState, event: RuleRemoved) -> None:
        self._driver.execute(_REMOVE_RULE, (state.key, event.name))

    def _add_dependency(self, unit: UnitOfWork, state: SessionState, event: DependencyAdded) -> None:
        self._write_new()
        self._driver.execute(_INSERT_DEPENDENCY, (state.key, event.from_id, event.to_id, event.type, unit.sequence))

    def _remove_dependency(self, unit: UnitOfWork, state: SessionState, event: DependencyRemoved) -> None:
        edge = (state.key, event.from_id, event.to_id, event.type, unit.sequence)
        # One that the same unit added never was.
        self._driver.execute(_DROP_DEPENDENCY, edge)
        self._driver.execute(_END_DEPENDENCY, (unit.sequence, *edge[:-1]))

    def _start_optimization(self, unit: UnitOfWork, state: SessionState, event: OptimizationStarted) -> None:
        self._set_lock(state, event.variable_id, lock_text(event.lock(unit.now)))

    def _stop_optimization(self, unit: UnitOfWork, state: SessionState, event: OptimizationStopped) -> None:
        self._set_lock(state, event.variable_id, None)

    def _register_tools(self, unit: UnitOfWork, state: SessionState, event: ToolsRegistered) -> None:
        if not event.tools:
            self._driver.execute(_DELETE_TOOLS, (state.key, event.worker_id))
            return
        rows = [
            (
                state.key,
                tool.spec.name,
                tool.worker_id,
                tool.address,
                stored_executions.spec_text(tool.spec),
                unit.sequence,
            )
            for tool in event.tools
        ]
        self._write_new()
        self._driver.executemany(_REPLACE_TOOL, rows)

    def _begin_execution(self, unit: UnitOfWork, state: SessionState, event: ExecutionBegan) -> None:
        row = (
            unit.sequence,
            state.key,
            event.execution_id,
            event.tool,
            ExecutionStatus.RUNNING.value,
            event.parent_id,
            event.attempt,
            event.idempotency_key,
            event.fingerprint,
            None,
        )
        self._begun.append(row)

    def _end_execution(self, unit: UnitOfWork, state: SessionState, event: ExecutionEnded) -> None:
        self._ended.append((event.status.value, unit.sequence, began_sequence(event.execution_id)))

    def _prune(self, unit: UnitOfWork, state: SessionState, event: Pruned) -> Event:
        """The event names the rows to delete by this file's keys; the logged one has only their numbers."""
        self._write_new()
        self._freed |= pruned.blobs_of(event.going[0])
        return pruned.carry_out(self._after_all(), state.key, unit.sequence, event)

    def _set_lock(self, state: SessionState, variable_id: str, text: str | None) -> None:
        key = state.keys[variable_id]
        self._write_new()
        self._driver.execute(_SET_LOCK, (text, key))


def _deleted_in(changes: Sequence[Change]) -> frozenset[str]:
    deleted = (change.version for change in changes if change.version.kind is ChangeKind.DELETED)
    return frozenset(version.variable_id for version in deleted)


def began_sequence(execution_id: str) -> int:
    """Return the number of the commit that began an execution, which its id contains."""
    return int(execution_id.split("_")[1])


class Keys:
    """The next free integer keys."""

    def __init__(self, next_session: int, next_variable: int) -> None:
        self.next_session = next_session
        self.next_variable = next_variable

    @classmethod
    def of(cls, connection: Connection) -> "Keys":
        """Return the keys that are free in a file."""
        return cls(_next(connection, sessions.c.session_key), _next(connection, variables.c.variable_key))

    def copy(self) -> "Keys":
        """Return a copy for a group that may still fail."""
        return Keys(self.next_session, self.next_variable)

    def new_session(self) -> int:
        """Return the key of a new session."""
        self.next_session += 1
        return self.next_session - 1

    def new_variable(self) -> int:
        """Return the key of a new variable."""
        self.next_variable += 1
        return self.next_variable - 1


def _next(connection: Connection, column: Any) -> int:
    return (connection.execute(select(func.max(column))).scalar() or 0) + 1


def save_expiry(connection: Connection, state: SessionState) -> None:
    """Update the saved expiry of a session with a TTL."""
    if state.lease is None:
        return
    query = update(sessions).where(sessions.c.session_key == state.key)
    connection.execute(query.values(expires_at=to_micros(state.lease.expires_at)))


def note_import(connection: Connection, first: int, last: int) -> None:
    """Record that these commits were imported, so their times may be out of order."""
    connection.execute(insert(imports), {"first_sequence": first, "last_sequence": last})


_Projection: TypeAlias = Callable[[LogWriter, UnitOfWork, SessionState, Any], Event | None]
_PROJECTIONS: dict[type[Event], _Projection] = {
    SessionStarted: LogWriter._start_session,
    SessionUpdated: LogWriter._update_session,
    SessionEnded: LogWriter._end_session,
    VariableRegistered: LogWriter._register_variable,
    VariableConstrained: LogWriter._constrain_variable,
    RuleAdded: LogWriter._add_rule,
    RuleRemoved: LogWriter._remove_rule,
    DependencyAdded: LogWriter._add_dependency,
    DependencyRemoved: LogWriter._remove_dependency,
    OptimizationStarted: LogWriter._start_optimization,
    OptimizationStopped: LogWriter._stop_optimization,
    ToolsRegistered: LogWriter._register_tools,
    ExecutionBegan: LogWriter._begin_execution,
    ExecutionEnded: LogWriter._end_execution,
    Pruned: LogWriter._prune,
}
