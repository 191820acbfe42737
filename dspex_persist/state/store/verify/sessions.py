"""Check the current state of each session against its log."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection

from dspex_persist.clock import EARLIEST, LATEST, from_micros, to_micros
from dspex_persist.state.errors import quote
from dspex_persist.state.events import (
    DependencyAdded,
    DependencyRemoved,
    Event,
    ExecutionBegan,
    ExecutionEnded,
    MalformedEventError,
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
    event_in,
)
from dspex_persist.state.fold import described
from dspex_persist.state.store.executions import spec_text
from dspex_persist.state.store.log import began_sequence, metadata_text
from dspex_persist.state.store.variables import KIND_OF, lock_text
from dspex_persist.state.store.verify.pruned import HAS_ROW
from dspex_persist.state.store.verify.walk import (
    AFTER_ALL,
    BEFORE_ALL,
    DELETED,
    DESCRIBING,
    Problem,
    Walk,
    end_of_page,
    find_row,
    is_pruned,
    rows_in,
    shown,
)
from dspex_persist.state.values.json_text import stored

# All start with the session's key and are sorted by it, through an index: no statement sorts rows itself.
_SESSIONS: Final = """
    SELECT session_key, session_id, created_at, started_sequence, ended_sequence, ttl_s, metadata, expires_at
    FROM sessions WHERE session_key > ? ORDER BY session_key
"""
_EVENTS: Final = """
    SELECT commits.session_key, events.sequence, events.ordinal, events.kind, events.body, commits.created_at
    FROM commits INDEXED BY commits_by_session CROSS JOIN events ON events.sequence = commits.sequence
    WHERE commits.session_key > ? ORDER BY commits.session_key, commits.sequence, events.ordinal
"""
_VARIABLES: Final = """
    SELECT session_key, variable_key, variable_id, name, type, constraints, metadata, optimization, deleted_sequence
    FROM variables INDEXED BY variables_by_session WHERE session_key > ? ORDER BY session_key, variable_key
"""
_TELLING_VERSIONS: Final = f"""
    SELECT variables.session_key, variables.variable_key, versions.version, versions.sequence, versions.kind,
        versions.metadata
    FROM variables INDEXED BY variables_by_session
    CROSS JOIN versions ON versions.variable_key = variables.variable_key
    WHERE variables.session_key > ? AND (
        versions.version = 0 OR versions.kind = {DELETED}
        OR versions.metadata IS NOT NULL AND versions.kind IN ({DESCRIBING})
    )
    ORDER BY variables.session_key, variables.variable_key, versions.version
"""
_DEPENDENCIES: Final = """
    SELECT session_key, from_id, to_id, type, since_sequence, until_sequence
    FROM dependencies INDEXED BY dependencies_by_session WHERE session_key > ? ORDER BY session_key, dependency_key
"""
_EXECUTIONS: Final = """
    SELECT session_key, began_sequence, execution_id, tool, status, parent_id, attempt, idempotency_key, fingerprint,
        ended_sequence
    FROM executions INDEXED BY executions_by_session WHERE session_key > ? ORDER BY session_key, began_sequence
"""
_TOOLS: Final = """
    SELECT session_key, name, worker_id, address, spec, registered_sequence
    FROM tools WHERE session_key > ? ORDER BY session_key, name
"""
_RULES: Final = """
    SELECT session_key, name, expression, description, added_sequence
    FROM rules WHERE session_key > ? ORDER BY session_key, name
"""
_CONSTRAINTS: Final = """
    SELECT variables.session_key,
        'of variable ' || variables.variable_key || ' since commit ' || since_sequence,
        variable_constraints.constraints
    FROM variables INDEXED BY variables_by_session
    CROSS JOIN variable_constraints ON variable_constraints.variable_key = variables.variable_key
    WHERE variables.session_key > ? ORDER BY variables.session_key, variables.variable_key, since_sequence
"""
_EXECUTION_COLUMNS: Final = (
    "execution_id",
    "tool",
    "status",
    "parent_id",
    "attempt",
    "idempotency_key",
    "fingerprint",
    "ended_sequence",
)
_RULE_COLUMNS: Final = ("expression", "description", "added_sequence")
_TOOL_COLUMNS: Final = ("worker_id", "address", "spec", "registered_sequence")
_SESSION_COLUMNS: Final = ("session_id", "created_at", "started_sequence", "ended_sequence", "ttl_s", "metadata")
_VARIABLE_COLUMNS: Final = (
    "variable_id",
    "name",
    "type",
    "constraints",
    "metadata",
    "optimization",
    "deleted_sequence",
)


class SessionWalk(Walk):
    """The rows of each session, its variables, dependencies, executions and tools follow from its commits."""

    def __init__(self) -> None:
        self._last: float = BEFORE_ALL

    def __str__(self) -> str:
        return f"the sessions after number {max(self._last, 0)}"

    def page(self, connection: Connection) -> Iterator[Problem]:
        end = end_of_page(connection)
        statements = (
            _SESSIONS,
            _EVENTS,
            _TELLING_VERSIONS,
            _VARIABLES,
            _DEPENDENCIES,
            _EXECUTIONS,
            _TOOLS,
            _RULES,
            _CONSTRAINTS,
        )
        streams = [_Stream(rows_in(connection, statement, self._last)) for statement in statements]
        while (key := min(stream.key for stream in streams)) != AFTER_ALL:
            rows, events, telling, variables, dependencies, *keyed = (stream.take(key) for stream in streams)
            executions, tools, rules, constraints = keyed
            replay = _Replay(key)
            yield from replay.read_events(events)
            yield from replay.read_versions(telling)
            yield from replay.compare_session(next(rows, None))
            yield from replay.compare_markers(connection)
            yield from replay.compare_variables(variables, connection)
            yield from replay.compare_dependencies(dependencies)
            yield from replay.compare_keyed("executions", _EXECUTION_COLUMNS, executions)
            yield from replay.compare_keyed("tools", _TOOL_COLUMNS, tools)
            yield from replay.compare_keyed("rules", _RULE_COLUMNS, rules)
            yield from replay.compare_keyed("variable_constraints", ("constraints",), constraints)
            self._last = key
            if time.monotonic() > end:
                return
        self.more = False


class _Stream:
    """Rows sorted by their first column, taken key by key."""

    def __init__(self, rows: Iterator[Any]) -> None:
        self._rows = rows
        self._next = next(rows, None)

    @property
    def key(self) -> float:
        """The first column of the next row; infinity at the end."""
        return self._next[0] if self._next is not None else AFTER_ALL

    def take(self, key: float) -> Iterator[Any]:
        """The rows with this key. Read them to the end before those of the next key."""
        while self._next is not None and self._next[0] == key:
            row = self._next
            self._next = next(self._rows, None)
            yield row


@dataclass(slots=True)
class _Variable:
    """A variable as it follows from the log."""

    id: str
    name: str
    type: str
    constraints: str
    registered_sequence: int
    metadata: dict[str, str] = field(default_factory=dict)
    optimization: str | None = None
    deleted_sequence: int | None = None
    has_versions: bool = False

    def row(self) -> tuple[Any, ...]:
        """The row that the table must have, without keys."""
        return (
            self.id,
            self.name,
            self.type,
            self.constraints,
            metadata_text(self.metadata),
            self.optimization if self.deleted_sequence is None else None,
            self.deleted_sequence,
        )


@dataclass(frozen=True, slots=True)
class _Commit:
    sequence: int
    created_at: int


class _Replay:
    """One session, rebuilt from its events and versions."""

    def __init__(self, key: float) -> None:
        self._key = key
        self._session: tuple[Any, ...] | None = None
        self._variables: dict[int, _Variable] = {}
        self._ids: dict[str, _Variable] = {}
        # With the commit that removed it; the deletion of a variable may have ended it, too.
        self._dependencies: list[tuple[str, str, str, int, int | None]] = []
        # The rows that the log implies for each table that is compared row by row, by their keys.
        tables = ("executions", "tools", "rules", "variable_constraints")
        self._keyed: dict[str, dict[Any, list[Any]]] = {table: {} for table in tables}
        # The commits of the markers, each with the last commit that it pruned rows of.
        self._markers: list[tuple[int, int]] = []

    @property
    def _name(self) -> str:
        return f"session {quote(self._session[0])}" if self._session else f"session key {self._key}"

    def name_of(self, variable: _Variable) -> str:
        return f"{self._name}, variable {quote(variable.name)}"

    # The log

    def read_events(self, rows: Iterator[Any]) -> Iterator[Problem]:
        """Apply the session's events."""
        for _, sequence, ordinal, kind, text, created_at in rows:
            try:
                event = event_in(kind, stored(text))
                if (read := _READERS.get(type(event))) is not None:
                    read(self, _Commit(sequence, created_at), event)
            except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
                where = f"commit {sequence}, {self._name}"
                what = str(error) if isinstance(error, MalformedEventError) else f"{type(error).__name__} {error}"
                yield Problem(where, f"malformed event {ordinal} ({quote(kind)}): {what}")

    def read_versions(self, rows: Iterator[Any]) -> Iterator[Problem]:
        """Apply the versions that change facts of their variable: first and last ones, and those with metadata."""
        for _, key, number, sequence, kind, metadata in rows:
            variable = self._variables.get(key)
            if variable is None:
                continue
            if number == 0:
                variable.has_versions = variable.registered_sequence == sequence
            if kind == DELETED:
                variable.deleted_sequence = sequence
            elif metadata is not None:
                try:
                    variable.metadata = dict(described(variable.metadata, KIND_OF[kind], stored(metadata)))
                except (TypeError, ValueError) as error:
                    where = f"commit {sequence}, {self.name_of(variable)}"
                    yield Problem(where, f"malformed metadata of version {number}: {error}")

    def _session_started(self, commit: _Commit, event: SessionStarted) -> None:
        if self._session is not None or event.session_key != self._key:
            raise ValueError(f"it begins session {event.session_key}, in a commit of session {self._key}")
        facts = (event.session_id, commit.created_at, commit.sequence, None, event.ttl_s)
        self._session = (*facts, metadata_text(event.metadata))

    def _session_updated(self, _commit: _Commit, event: SessionUpdated) -> None:
        self._session = (*self._begun()[:4], event.ttl_s, metadata_text(event.metadata))

    def _session_ended(self, commit: _Commit, _event: SessionEnded) -> None:
        begun = self._begun()
        self._session = (*begun[:3], commit.sequence, *begun[4:])

    def _begun(self) -> tuple[Any, ...]:
        if self._session is None:
            raise ValueError("the session has not begun")
        return self._session

    def _variable_registered(self, commit: _Commit, event: VariableRegistered) -> None:
        variable = _Variable(event.variable_id, event.name, event.type, event.constraints, commit.sequence)
        if event.variable_key is None:
            raise ValueError("the variable has no key")
        if event.variable_key in self._variables:
            raise ValueError("the variable is registered already")
        self._variables[event.variable_key] = self._ids[variable.id] = variable

    def _variable_constrained(self, commit: _Commit, event: VariableConstrained) -> None:
        variable, key = self._ids[event.variable_id], event.variable_key
        if key is None or self._variables.get(key) is not variable:
            raise ValueError("the variable has another key")
        rows = self._keyed["variable_constraints"]
        rows.setdefault(f"of variable {key} since commit 0", [variable.constraints])
        rows[f"of variable {key} since commit {commit.sequence}"] = [event.constraints]
        variable.constraints = event.constraints

    def _rule_added(self, commit: _Commit, event: RuleAdded) -> None:
        self._keyed["rules"][event.name] = [event.expression, event.description, commit.sequence]

    def _rule_removed(self, _commit: _Commit, event: RuleRemoved) -> None:
        # Pruning may have removed the event that added it.
        self._keyed["rules"].pop(event.name, None)

    def _dependency_added(self, commit: _Commit, event: DependencyAdded) -> None:
        self._dependencies.append((event.from_id, event.to_id, event.type, commit.sequence, None))

    def _dependency_removed(self, commit: _Commit, event: DependencyRemoved) -> None:
        facts, edges = (event.from_id, event.to_id, event.type), self._dependencies
        place = next((n for n in reversed(range(len(edges))) if edges[n][:3] == facts and edges[n][4] is None), None)
        if place is None:
            # Pruning deletes the events of an ended session one commit at a time.
            return
        if edges[place][3] == commit.sequence:
            del edges[place]
        else:
            edges[place] = (*edges[place][:4], commit.sequence)

    def _optimization_started(self, commit: _Commit, event: OptimizationStarted) -> None:
        self._ids[event.variable_id].optimization = lock_text(event.lock(from_micros(commit.created_at)))

    def _optimization_stopped(self, _commit: _Commit, event: OptimizationStopped) -> None:
        self._ids[event.variable_id].optimization = None

    def _tools_registered(self, commit: _Commit, event: ToolsRegistered) -> None:
        if not event.tools:
            rows = self._keyed["tools"]
            self._keyed["tools"] = {name: row for name, row in rows.items() if row[0] != event.worker_id}
        for tool in event.tools:
            row = [tool.worker_id, tool.address, spec_text(tool.spec), commit.sequence]
            self._keyed["tools"][tool.spec.name] = row

    def _execution_began(self, commit: _Commit, event: ExecutionBegan) -> None:
        facts = (event.parent_id, event.attempt, event.idempotency_key, event.fingerprint)
        self._keyed["executions"][commit.sequence] = [event.execution_id, event.tool, "running", *facts, None]

    def _execution_ended(self, commit: _Commit, event: ExecutionEnded) -> None:
        row = self._keyed["executions"][began_sequence(event.execution_id)]
        if row[0] != event.execution_id or row[-1] is not None:
            raise ValueError("no such execution was running")
        row[2], row[-1] = event.status.value, commit.sequence

    def _pruned(self, commit: _Commit, event: Pruned) -> None:
        self._markers.append((commit.sequence, event.range[1]))

    # Against the tables

    def compare_markers(self, connection: Connection) -> Iterator[Problem]:
        """Each marker has rows; `PrunedWalk` checks that they are the right ones."""
        for sequence, last in self._markers:
            if find_row(connection, HAS_ROW, last, sequence) is None:
                yield Problem(f"commit {sequence}, {self._name}", f"its row in pruned about commit {last} is missing")

    def compare_session(self, row: Sequence[Any] | None) -> Iterator[Problem]:
        """Compare the row of the session with the log."""
        if self._session is None:
            yield Problem(self._name, "no commit begins it")
            return
        where = f"commit {self._session[2]}, {self._name}"
        if row is None:
            yield Problem(where, "its row in sessions is missing")
            return
        *actual, expires_at = row[1:]
        yield from _differences(where, "sessions", _SESSION_COLUMNS, self._session, actual)
        _, _, _, ended_sequence, ttl_s, _ = self._session
        if (expires_at is None) != (ttl_s is None or ended_sequence is not None):
            state = "it has ended or has no TTL" if expires_at is not None else "it has a TTL"
            yield Problem(where, f"sessions.expires_at is {shown(expires_at)}, but {state}")
        elif expires_at is not None and not to_micros(EARLIEST) <= expires_at <= to_micros(LATEST):
            yield Problem(where, f"sessions.expires_at is {shown(expires_at)}, which is out of range")

    def compare_variables(self, rows: Iterator[Any], connection: Connection) -> Iterator[Problem]:
        """Compare the rows of the session's variables with the log."""
        missing = dict(self._variables)
        for row in rows:
            variable = missing.pop(row[1], None)
            if variable is None:
                yield Problem(f"{self._name}, variable {quote(row[3])}", "no commit of this session registers it")
                continue
            where = f"commit {variable.registered_sequence}, {self.name_of(variable)}"
            yield from _differences(where, "variables", _VARIABLE_COLUMNS, variable.row(), row[2:])
            if not variable.has_versions and not is_pruned(connection, variable.registered_sequence):
                yield Problem(where, "the commit that registers it does not contain its version 0")
        for variable in missing.values():
            where = f"commit {variable.registered_sequence}, {self.name_of(variable)}"
            yield Problem(where, "its row in variables is missing")

    def compare_dependencies(self, rows: Iterator[Any]) -> Iterator[Problem]:
        """Compare the rows of the session's dependencies with the log: the order matters, the keys do not."""
        expected = [(*edge[:4], edge[4] or self._until(edge[0], edge[1])) for edge in self._dependencies]
        actual = [tuple(row[1:]) for row in rows]
        if actual == expected:
            return
        for from_id, to_id, _, since, until in (Counter(expected) - Counter(actual)).elements():
            where = f"commit {since}, {self._name}, dependency of {quote(from_id)} on {quote(to_id)}"
            yield Problem(where, f"its row in dependencies (until {shown(until)}) is missing or changed")
        for from_id, to_id, *_ in (Counter(actual) - Counter(expected)).elements():
            where = f"{self._name}, dependency of {quote(from_id)} on {quote(to_id)}"
            yield Problem(where, "no commit adds this row in dependencies")
        if Counter(actual) == Counter(expected):
            yield Problem(self._name, "its rows in dependencies are not in the order of their commits")

    def compare_keyed(self, table: str, columns: Sequence[str], rows: Iterator[Any]) -> Iterator[Problem]:
        """Compare the rows of a table whose second column is a key with the log."""
        missing = dict(self._keyed[table])
        for _, key, *actual in rows:
            expected = missing.pop(key, None)
            where = f"{self._name}, {table} {shown(key)}"
            if expected is None:
                yield Problem(where, "no commit of this session creates it")
            else:
                yield from _differences(where, table, columns, expected, actual)
        for key in missing:
            yield Problem(f"{self._name}, {table} {shown(key)}", f"its row in {table} is missing")

    def _until(self, *ends: str) -> int | None:
        """The commit that ended a dependency: the first that deleted a variable at one of its ends."""
        variables = [self._ids[end] for end in ends if end in self._ids]
        deletions = [variable.deleted_sequence for variable in variables if variable.deleted_sequence is not None]
        return min(deletions, default=None)


_READERS: Final[Mapping[type[Event], Callable[[_Replay, _Commit, Any], None]]] = {
    SessionStarted: _Replay._session_started,
    SessionUpdated: _Replay._session_updated,
    SessionEnded: _Replay._session_ended,
    VariableRegistered: _Replay._variable_registered,
    VariableConstrained: _Replay._variable_constrained,
    RuleAdded: _Replay._rule_added,
    RuleRemoved: _Replay._rule_removed,
    DependencyAdded: _Replay._dependency_added,
    DependencyRemoved: _Replay._dependency_removed,
    OptimizationStarted: _Replay._optimization_started,
    OptimizationStopped: _Replay._optimization_stopped,
    ToolsRegistered: _Replay._tools_registered,
    ExecutionBegan: _Replay._execution_began,
    ExecutionEnded: _Replay._execution_ended,
    Pruned: _Replay._pruned,
}


def _differences(
    where: str, table: str, columns: Sequence[str], expected: Sequence[Any], actual: Sequence[Any]
) -> Iterator[Problem]:
    for column, right, stored_value in zip(columns, expected, actual, strict=True):
        if stored_value != right:
            yield Problem(where, f"{table}.{column} is {shown(stored_value)}, the log says {shown(right)}")
