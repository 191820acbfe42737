"""The questions of an audit, answered from the file: each page in a short snapshot of its own.

Which rows drive a question decides what it costs. One variable is read by its key, a session by its commits, metadata
by its index; only what names none of these walks through the log, a window of commits at a time.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple, TypeVar, cast

from sqlalchemy import Connection, Engine

from dspex_persist import clock
from dspex_persist.clock import nearest_time, to_micros
from dspex_persist.spelling import did_you_mean
from dspex_persist.state.audit import (
    AuditSource,
    CommitEntry,
    CommitQuery,
    Cursor,
    ExecutionDetail,
    ExecutionQuery,
    ExecutionSummary,
    HistoryEntry,
    HistoryQuery,
    Operator,
    Page,
    PointLike,
    Predicate,
    Query,
    ReadEntry,
    SessionEntry,
    SessionQuery,
    T,
    VariableState,
    is_glob,
    parse_point,
    predicates_of,
    what_there_is,
)
from dspex_persist.state.errors import (
    InvalidArgumentError,
    NotInHistoryError,
    UnsupportedError,
    VersionNotFoundError,
    VersionPrunedError,
    quote,
)
from dspex_persist.state.events import Event, ExecutionBegan, ExecutionEnded, conflicts_in
from dspex_persist.state.model import ChangeKind, ExecutionStatus, Seen, Source, Value
from dspex_persist.state.store import times
from dspex_persist.state.store import variables as stored_variables
from dspex_persist.state.store.engine import snapshot
from dspex_persist.state.store.schema import is_unicode
from dspex_persist.state.store.variables import KIND_CODES, KINDS, SOURCE_CODES, SOURCES
from dspex_persist.state.values.json_text import DAMAGED, storable, stored, stored_object

E = TypeVar("E", bound=Event)

_PAGE_BYTES: Final = 4 * 1024 * 1024
"""How much of a history is read at once, but for one version that is larger."""
_WINDOW: Final = 50_000
"""Commits that one snapshot walks through at most, where nothing narrows a question down."""


def _sound(column: str) -> str:
    """A document that SQLite can read: releases before this one wrote bare NaN, and a file may be damaged."""
    return f"CASE WHEN json_valid({column}) OR {column} IS NULL THEN {column} ELSE mended_json({column}) END"


_BEGINNING: Final = _sound("beginning.body")
_ENDING: Final = _sound("ending.body")
# As the views have it (migrations/): in a transaction's commit each of its executions says at its end what it wrote.
_MAKER: Final = f"""
    CASE WHEN commits.cause GLOB 'exec_[0-9]*' THEN coalesce(
        CASE WHEN EXISTS (SELECT 1 FROM executions AS called WHERE called.parent_id = commits.cause) THEN (
            SELECT CAST(substr({_ENDING} ->> '$.execution_id', 6) AS INTEGER)
            FROM events AS ending CROSS JOIN json_each({_ENDING}, '$.writes') AS written
            WHERE ending.sequence = versions.sequence AND ending.kind = 'execution_ended'
                AND written.value ->> 0 = variables.name AND written.value ->> 1 = versions.version
            LIMIT 1
        ) END,
        CAST(substr(commits.cause, 6) AS INTEGER)
    ) END
"""

_VERSIONS: Final = f"""
    SELECT sessions.session_id, variables.name, variables.variable_id, variables.type, versions.version, versions.kind,
        coalesce(versions.value, CAST(of_value.content AS TEXT)) AS text,
        coalesce(versions.binary, of_binary.content) AS binary,
        versions.source, versions.metadata, versions.sequence, commits.created_at, commits.actor, commits.cause,
        executions.execution_id, executions.tool, callers.execution_id AS caller_id, callers.tool AS caller_tool,
        {stored_variables.is_sensitive("variables.metadata")} AS sensitive,
        versions.variable_key, variables.constraints
    FROM {{driver}}
    CROSS JOIN variables ON variables.variable_key = versions.variable_key
    CROSS JOIN sessions ON sessions.session_key = variables.session_key
    LEFT JOIN executions ON executions.began_sequence = {_MAKER}
        AND (executions.execution_id = commits.cause OR executions.parent_id IS NOT NULL)
    LEFT JOIN executions AS callers ON callers.began_sequence = CAST(substr(executions.parent_id, 6) AS INTEGER)
        AND callers.execution_id = executions.parent_id
    LEFT JOIN blobs AS of_value ON of_value.blob_key = versions.value_blob
    LEFT JOIN blobs AS of_binary ON of_binary.blob_key = versions.binary_blob
"""
_BY_VARIABLE: Final = "versions CROSS JOIN commits ON commits.sequence = versions.sequence"
_BY_SESSION: Final = """
    commits INDEXED BY commits_by_session
    CROSS JOIN versions INDEXED BY versions_by_sequence ON versions.sequence = commits.sequence
"""
_BY_SEQUENCE: Final = """
    versions INDEXED BY versions_by_sequence CROSS JOIN commits ON commits.sequence = versions.sequence
"""
_BY_METADATA: Final = """
    metadata_entries
    CROSS JOIN versions ON versions.variable_key = metadata_entries.variable_key
        AND versions.version = metadata_entries.version
    CROSS JOIN commits ON commits.sequence = versions.sequence
"""

# `->` gives JSON, which is read here: as a text of SQLite's own, a message with a NUL would be cut there.
_EXECUTIONS: Final = f"""
    SELECT sessions.session_id, executions.execution_id, executions.tool, executions.status, executions.attempt,
        began.actor, executions.began_sequence, began.created_at AS began_at, executions.ended_sequence,
        ended.created_at AS ended_at, {_ENDING} ->> '$.duration_us' AS duration_us,
        executions.parent_id, executions.idempotency_key,
        {_BEGINNING} -> '$.worker_id' AS worker_id,
        (SELECT count(*) FROM json_each({_ENDING}, '$.reads')) AS reads,
        (SELECT count(*) FROM json_each({_ENDING}, '$.writes')) AS writes,
        {_ENDING} -> '$.failure' AS failure, {_ENDING} -> '$.reason' AS reason,
        {_ENDING} -> '$.conflicts' AS conflicts, executions.session_key,
        ending.sequence IS NOT NULL AS has_ending{{bodies}}
    FROM executions
    JOIN sessions ON sessions.session_key = executions.session_key
    JOIN commits AS began ON began.sequence = executions.began_sequence
    LEFT JOIN commits AS ended ON ended.sequence = executions.ended_sequence
    LEFT JOIN events AS beginning ON beginning.sequence = executions.began_sequence
        AND beginning.kind = 'execution_began'
    LEFT JOIN events AS ending ON ending.sequence = executions.ended_sequence AND ending.kind = 'execution_ended'
        AND {_ENDING} ->> '$.execution_id' = executions.execution_id
"""
_SUMMARIES: Final = _EXECUTIONS.format(bodies="")
_IN_FULL: Final = _EXECUTIONS.format(bodies=", beginning.body AS beginning, ending.body AS ending")
_COMMITS: Final = """
    SELECT commits.sequence, sessions.session_id, commits.actor, commits.cause, commits.created_at,
        lower(hex(commits.hash)) AS hash,
        (SELECT json_group_array(json_array(variables.name, versions.version)) FROM versions
            JOIN variables ON variables.variable_key = versions.variable_key
            WHERE versions.sequence = commits.sequence) AS versions,
        (SELECT json_group_array(events.kind) FROM events WHERE events.sequence = commits.sequence) AS events,
        EXISTS (SELECT 1 FROM pruned WHERE pruned.sequence = commits.sequence) AS pruned
    FROM commits JOIN sessions ON sessions.session_key = commits.session_key
"""
_SESSIONS: Final = """
    SELECT sessions.session_id, sessions.created_at, sessions.started_sequence, sessions.ended_sequence,
        ended.created_at AS ended_at,
        (SELECT created_at FROM commits WHERE commits.session_key = sessions.session_key
            ORDER BY commits.sequence DESC LIMIT 1) AS last_at,
        sessions.ttl_s, sessions.metadata, sessions.session_key,
        (SELECT count(*) FROM variables WHERE variables.session_key = sessions.session_key
            AND (sessions.ended_sequence IS NOT NULL OR deleted_sequence IS NULL)) AS variables,
        (SELECT count(*) FROM commits WHERE commits.session_key = sessions.session_key) AS commits,
        (SELECT count(*) FROM executions WHERE executions.session_key = sessions.session_key) AS executions
    FROM sessions LEFT JOIN commits AS ended ON ended.sequence = sessions.ended_sequence
"""
_AT_OR_BELOW: Final = """
    SELECT version, sequence FROM versions WHERE variable_key = ? AND version <= ? ORDER BY version DESC LIMIT 1
"""
# Whether a variable (whose versions after the second parameter have a gap) lost one by the commit of the third.
_REGISTERED: Final = """
    SELECT 1 FROM variables
    CROSS JOIN commits INDEXED BY commits_by_session ON commits.session_key = variables.session_key
    CROSS JOIN events ON events.sequence = commits.sequence AND events.kind = 'variable_registered'
        AND json_extract(events.body, '$.variable_key') = variables.variable_key
    WHERE variables.variable_key = ?1 AND ?2 = -1 AND commits.sequence <= ?3
"""
_LOST: Final = """
    SELECT 1 FROM variables
    CROSS JOIN commits INDEXED BY commits_by_session ON commits.session_key = variables.session_key
    CROSS JOIN pruned ON pruned.sequence = commits.sequence
    WHERE variables.variable_key = ?1 AND commits.sequence <= ?3 AND commits.sequence >= (
        SELECT sequence FROM versions WHERE versions.variable_key = ?1 AND versions.version = ?2
    ) LIMIT 1
"""
_LAST_VERSION: Final = 2**62
_ENDINGS: Final[Mapping[str, str]] = {
    ExecutionStatus.INTERRUPTED: "the server ended while it ran",
    ExecutionStatus.CANCELLED: "its client gave it up",
}
"""What it means that an execution ended so, and its end gives neither a failure nor a reason."""


class StoredAudit(AuditSource):
    """The history in a file. `let_go` is called when it is closed."""

    def __init__(
        self,
        readers: Engine,
        *,
        reveal: bool = False,
        let_go: Callable[[], None] = lambda: None,
    ) -> None:
        self.reveal = reveal
        self._readers = readers
        self._let_go = let_go

    def close(self) -> None:
        """Let the file go if it was opened for this."""
        self._let_go()

    # Points

    def head(self) -> int:
        """See `AuditSource.head`."""
        with snapshot(self._readers) as connection:
            return _head(connection)

    def resolve(self, point: PointLike, option: str = "at", session: str = "") -> int:
        """See `AuditSource.resolve`."""
        with snapshot(self._readers) as connection:
            return _resolve(connection, point, option, session)

    # Pages

    def page(self, query: Query[T], after: Cursor | None = None, most: int = 500) -> Page[T]:
        """See `AuditSource.page`."""
        asked: Any = query
        with snapshot(self._readers) as connection:
            session = "" if is_glob(query.session) else query.session
            bounds = _Bounds(
                _resolve(connection, query.since, "since", session) if query.since else 0,
                _resolve(connection, query.until, "until", session) if query.until else _head(connection),
            )
            match asked:
                case HistoryQuery():
                    page: Page[Any] = _HistoryPage(connection, asked, bounds, after, most, self.reveal).read()
                case ExecutionQuery():
                    page = _execution_page(connection, asked, bounds, after, most)
                case CommitQuery():
                    page = _commit_page(connection, asked, bounds, after, most)
                case SessionQuery():
                    page = _session_page(connection, asked, bounds, after, most)
                case _:
                    raise UnsupportedError(f"questions of type {type(query).__name__}")
        return cast(Page[T], page)

    # Single answers

    def execution(self, execution_id: str) -> ExecutionDetail:
        """See `AuditSource.execution`."""
        history = tuple(self.iterate(HistoryQuery(execution_id=execution_id, newest_first=False)))
        with snapshot(self._readers) as connection:
            return _detail(connection, execution_id, history)

    def state(self, session: str, at: PointLike = "") -> tuple[VariableState, ...]:
        """See `AuditSource.state`."""
        with snapshot(self._readers) as connection:
            sequence = _resolve(connection, at, "at", session)
            key = _session_at(connection, session, sequence)
            rows = _all(
                connection,
                "SELECT variable_key, name, deleted_sequence FROM variables WHERE session_key = ? "
                "ORDER BY variable_key",
                key,
            )
            if not rows:
                _refuse_pruned(connection, session, key, sequence)
            found = []
            for variable_key, name, deleted in rows:
                if deleted is None or deleted > sequence:
                    version = _version_at(connection, variable_key, sequence)
                    _refuse_gap(connection, variable_key, name, version, sequence)
                    if version is not None:
                        found.append(self._state_of(connection, variable_key, version))
            return tuple(found)

    def _state_of(self, connection: Connection, key: int, version: int) -> VariableState:
        row = _one_version(connection, key, version)
        entry = _entry_of(row, self.reveal)
        return VariableState(
            entry.session_id,
            entry.name,
            entry.variable_id,
            entry.type,
            entry.value,
            entry.version,
            entry.kind,
            entry.source,
            row.constraints,
            stored_variables.metadata_as_of(connection, key, version),
            entry.sequence,
            entry.created_at,
            entry.actor,
            entry.cause,
            entry.execution_id,
            entry.tool,
            entry.masked,
            entry.caller_id,
            entry.caller_tool,
        )

    def version(self, session: str, variable_id: str, version: int) -> HistoryEntry:
        """See `AuditSource.version`."""
        with snapshot(self._readers) as connection:
            key = _variable_keys(connection, _session_keys(connection, session), variable_id)[-1]
            row = _one_version(connection, key, version)
            if row is None:
                latest = _version_at(connection, key, _LAST_VERSION) or 0
                if 0 <= version < latest:
                    raise VersionPrunedError(variable_id, version)
                raise VersionNotFoundError(variable_id, version, latest)
            return _entry_of(row, self.reveal)


# Rows


def _all(connection: Connection, statement: str, *parameters: object) -> Sequence[Any]:
    return connection.exec_driver_sql(statement, parameters).fetchall()


def _some(connection: Connection, statement: str, most: int, *parameters: object) -> tuple[list[Any], Any]:
    """Up to `most` rows, and fewer once they are a page full; with the last of them if there are more.

    `statement` ends in its limit.
    """
    found: list[Any] = []
    size_bytes = 0
    rows = connection.exec_driver_sql(statement, (*parameters, most + 1))
    for row in rows:
        if len(found) == most or size_bytes >= _PAGE_BYTES:
            rows.close()
            return found, found[-1]
        found.append(row)
        size_bytes += len(row.text or "") + len(row.binary or b"") + len(row.metadata or "")
    return found, None


def _first(connection: Connection, statement: str, *parameters: object) -> Any:
    return connection.exec_driver_sql(statement, parameters).first()


class _Conditions:
    """What a WHERE clause asks for, with the parameters in its order."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self.parameters: list[object] = []

    def add(self, text: str, *parameters: object) -> None:
        self._texts.append(text)
        self.parameters += (_asked(each) if isinstance(each, str) else each for each in parameters)

    def add_all(self, others: "_Conditions") -> None:
        self._texts += others._texts
        self.parameters += others.parameters

    def add_equal(self, column: str, wanted: object) -> None:
        """Nothing, where what is wanted is "" or None."""
        if wanted not in ("", None):
            self.add(f"{column} = ?", wanted)

    def add_among(self, column: str, wanted: Sequence[object]) -> None:
        self.add(f"{column} IN ({', '.join('?' * len(wanted))})", *wanted)

    def add_metadata(self, column: str, wanted: Iterable[tuple[str, str]]) -> None:
        for entry in wanted:
            self.add(f"EXISTS (SELECT 1 FROM json_each({column}) WHERE key = ? AND value = ?)", *entry)

    def __str__(self) -> str:
        return f" WHERE {' AND '.join(self._texts)}" if self._texts else ""


def _of_session(connection: Connection, conditions: _Conditions, session: str, column: str) -> None:
    """Only what is of the session of this id, or of those that fit the glob; "" is all."""
    if is_glob(session):
        conditions.add("sessions.session_id GLOB ?", _pattern(session))
    elif session:
        conditions.add_among(column, _session_keys(connection, session))


def _of_tool(conditions: _Conditions, tool: str) -> None:
    if is_glob(tool):
        conditions.add("executions.tool GLOB ?", _pattern(tool))
    else:
        conditions.add_equal("executions.tool", tool)


def _pattern(glob: str) -> str:
    """SQLite's GLOB knows sets in brackets; ours does not."""
    return glob.replace("[", "[[]")


# Points


class _Bounds(NamedTuple):
    """The commits asked for: after the first, up to and with the second."""

    after: int
    last: int


def _head(connection: Connection) -> int:
    row = _first(connection, "SELECT max(sequence) FROM commits")
    return row[0] or 0


def _resolve(connection: Connection, point: PointLike, option: str, session: str) -> int:
    parsed, head = parse_point(point, clock.now(), option), _head(connection)
    sequence = head
    if parsed.execution_id:
        row = _execution_row(connection, parsed.execution_id)
        sequence = row.began_sequence if row.ended_sequence is None else row.ended_sequence
    elif parsed.at is not None:
        micros = to_micros(parsed.at)
        if session:
            keys = _session_keys(connection, session)
            sequence = max(times.last_of_session_until(connection, key, micros) for key in keys)
        else:
            sequence = times.last_until(connection, micros)
    elif parsed.sequence is not None:
        sequence = parsed.sequence
        if sequence > head:
            raise InvalidArgumentError(option, f"there is no commit {sequence} yet; the newest is {head}")
    return max(sequence - 1, 0) if parsed.before else sequence


def _refuse_pruned(connection: Connection, session: str, key: int, sequence: int) -> None:
    """Of a session that was pruned as a whole nobody can say any more what it had."""
    statement = """
        SELECT 1 FROM commits INDEXED BY commits_by_session CROSS JOIN pruned ON pruned.sequence = commits.sequence
        WHERE commits.session_key = ? AND commits.sequence <= ? LIMIT 1
    """
    if _first(connection, statement, key, sequence) is not None:
        raise InvalidArgumentError("at", f"what session {quote(session)} had at commit {sequence} was pruned")


def _refuse_gap(connection: Connection, key: int, name: str, version: int | None, sequence: int) -> None:
    """What stands at a commit is not `version` if the one that followed it was pruned."""
    after = -1 if version is None else version
    following = _first(
        connection,
        "SELECT version FROM versions WHERE variable_key = ? AND version > ? ORDER BY version LIMIT 1",
        key,
        after,
    )
    if following is None or following[0] == after + 1:
        return
    lost = _REGISTERED if version is None else _LOST
    if _first(connection, lost, key, after, sequence) is not None:
        raise VersionPrunedError(name, after + 1)


def _version_at(connection: Connection, key: int, sequence: int) -> int | None:
    """The variable's newest version as of a commit, found by halving; None before its first."""
    cursor = connection.connection.cursor()
    newest = cursor.execute(_AT_OR_BELOW, (key, _LAST_VERSION)).fetchone()
    if newest is None:
        return None
    if newest[1] <= sequence:
        return int(newest[0])
    found, low, high = None, 0, newest[0] - 1
    while low <= high:
        middle = (low + high) // 2
        row = cursor.execute(_AT_OR_BELOW, (key, middle)).fetchone()
        if row is None:
            low = middle + 1
        elif row[1] <= sequence:
            found, low = int(row[0]), middle + 1
        else:
            high = row[0] - 1
    return found


# Sessions and variables


def _session_keys(connection: Connection, session: str) -> list[int]:
    """All sessions that had this id, oldest first."""
    rows = _all(connection, "SELECT session_key FROM sessions WHERE session_id = ?", _asked(session))
    if not rows:
        raise NotInHistoryError("session", session, _similar(connection, session))
    return sorted(row[0] for row in rows)


def _similar(connection: Connection, session: str) -> str:
    rows = _all(connection, "SELECT DISTINCT session_id FROM sessions ORDER BY session_key DESC LIMIT 1000")
    return what_there_is(session, [row[0] for row in rows])


def _asked(text: object) -> str | None:
    """What SQLite can be asked for; no row has anything else."""
    if not isinstance(text, str):
        raise InvalidArgumentError("question", f"{quote(text)} is no text, as names and ids are")
    return text if is_unicode(text) else None


def _session_at(connection: Connection, session: str, sequence: int) -> int:
    """The session of this id that lived at a commit."""
    keys = _session_keys(connection, session)
    lives = [
        _first(
            connection, "SELECT started_sequence, ended_sequence, created_at FROM sessions WHERE session_key = ?", key
        )
        for key in keys
    ]
    for key, (started, ended, _) in zip(reversed(keys), reversed(lives), strict=True):
        if started <= sequence and (ended is None or ended > sequence):
            return key
    began, _, created_at = lives[0]
    if sequence < began:
        when = f"{nearest_time(created_at):%Y-%m-%d %H:%M:%S} UTC"
        reason = f"session {quote(session)} had not begun by then; it began at commit {began}, {when}"
        raise InvalidArgumentError("at", reason)
    told = ", ".join(f"from commit {started} to {'now' if ended is None else ended}" for started, ended, _ in lives)
    ends = [ended for _, ended, _ in lives if ended is not None]
    hint = f"; {ends[-1]}^ is right before it ended" if ends else ""
    raise InvalidArgumentError("at", f"session {quote(session)} did not live at commit {sequence}, but {told}{hint}")


def _variable_keys(connection: Connection, sessions: Sequence[int], variable: str) -> list[int]:
    """All variables of the sessions that had this name, or have this id, oldest first."""
    conditions = _Conditions()
    conditions.add_among("session_key", sessions)
    conditions.add("(name = ? OR variable_id = ?)", _asked(variable), _asked(variable))
    rows = _all(connection, f"SELECT variable_key FROM variables{conditions}", *conditions.parameters)
    if not rows:
        names = _all(
            connection,
            f"SELECT DISTINCT name FROM variables WHERE session_key IN ({', '.join('?' * len(sessions))}) "
            "ORDER BY variable_key DESC LIMIT 1000",
            *sessions,
        )
        raise NotInHistoryError("variable", variable, what_there_is(variable, [row[0] for row in names]))
    return sorted(row[0] for row in rows)


def _one_version(connection: Connection, key: int, version: int) -> Any:
    statement = _VERSIONS.format(driver=_BY_VARIABLE) + " WHERE versions.variable_key = ? AND versions.version = ?"
    return _first(connection, statement, key, version)


def _entry_of(row: Any, reveal: bool) -> HistoryEntry:
    kept_back = bool(row.sensitive) and not reveal and row.text is not None
    return HistoryEntry(
        row.session_id,
        row.name,
        row.variable_id,
        row.type,
        row.version,
        KINDS[row.kind],
        None if row.text is None or kept_back else Value(row.text, row.binary),
        SOURCES[row.source],
        stored_object(row.metadata),
        row.sequence,
        nearest_time(row.created_at),
        row.actor,
        row.cause,
        row.execution_id,
        row.tool,
        kept_back,
        row.caller_id,
        row.caller_tool,
    )


# History


class _HistoryPage:
    """One page of versions: which rows drive it, and what they have to fulfil."""

    def __init__(
        self,
        connection: Connection,
        query: HistoryQuery,
        bounds: _Bounds,
        after: Cursor | None,
        most: int,
        reveal: bool,
    ) -> None:
        self._connection = connection
        self._query = query
        self._first, self._last = bounds
        self._after = after
        self._most = most
        self._reveal = reveal
        self._conditions = _Conditions()
        self._mine: frozenset[tuple[str, int]] | None = None

    def read(self) -> Page[HistoryEntry]:
        query = self._query
        keys = _session_keys(self._connection, query.session) if query.session and not is_glob(query.session) else None
        self._narrow()
        if query.execution_id:
            return self._of_execution()
        if query.metadata:
            return self._of_metadata(keys)
        if keys is not None:
            if query.variable and not is_glob(query.variable):
                return self._of_variables(_variable_keys(self._connection, keys, query.variable))
            self._conditions.add_among("commits.session_key", keys)
            self._name()
            return self._page(_BY_SESSION, "commits.sequence", None)
        self._name()
        return self._page(_BY_SEQUENCE, "versions.sequence", _WINDOW)

    def _narrow(self) -> None:
        query, add = self._query, self._conditions
        if is_glob(query.session):
            add.add("sessions.session_id GLOB ?", _pattern(query.session))
        add.add_equal("variables.type", query.type)
        add.add_equal("versions.kind", None if query.kind is None else KIND_CODES[ChangeKind(query.kind)])
        add.add_equal("commits.actor", query.actor)
        add.add_equal("versions.source", None if query.source is None else SOURCE_CODES[Source(query.source)])
        _of_tool(add, query.tool)
        for predicate in predicates_of(query.where):
            add.add(*_predicate(predicate, self._reveal))

    def _name(self) -> None:
        variable = self._query.variable
        if is_glob(variable):
            self._conditions.add("variables.name GLOB ?", _pattern(variable))
        elif variable:
            asked = _asked(variable)
            self._conditions.add("(variables.name = ? OR variables.variable_id = ?)", asked, asked)

    def _of_execution(self) -> Page[HistoryEntry]:
        """What it, and those that it called, wrote at the end of the whole, and published before."""
        row = top = _execution_row(self._connection, self._query.execution_id)
        family = _family(self._connection, row)
        while top.parent_id is not None:
            top = _execution_row(self._connection, top.parent_id)
        if row is not top:
            self._mine = frozenset(
                written
                for each in family
                for name in ("writes", "published")
                for written in _pairs(_end_of(each)[name])
            )
        last = top.ended_sequence if top.ended_sequence is not None else self._last
        self._first, self._last = max(self._first, row.began_sequence), min(self._last, last)
        self._conditions.add("commits.session_key = ?", row.session_key)
        self._conditions.add_among("commits.cause", [top.execution_id, *(each.execution_id for each in family)])
        self._name()
        return self._page(_BY_SESSION, "commits.sequence", None)

    def _of_metadata(self, keys: list[int] | None) -> Page[HistoryEntry]:
        (key, value), *others = self._query.metadata.items()
        # SQLite has ended both at their first NUL; `_read` looks at the metadata itself.
        self._conditions.add("metadata_entries.key IN (?, ?)", key, key.partition("\0")[0])
        self._conditions.add("metadata_entries.value IN (?, ?)", value, value.partition("\0")[0])
        self._conditions.add_metadata(_sound("versions.metadata"), others)
        if keys is not None:
            self._conditions.add_among("variables.session_key", keys)
        self._name()
        return self._page(_BY_METADATA, "metadata_entries.sequence", None, "metadata_entries")

    def _of_variables(self, keys: list[int]) -> Page[HistoryEntry]:
        """One after the other: of one name, each was deleted before the next was registered."""
        newest_first = self._query.newest_first
        rows: list[HistoryEntry] = []
        for key in sorted(keys, reverse=newest_first):
            full = sum(row.value.size_bytes for row in rows if row.value is not None) >= _PAGE_BYTES
            page = self._of_variable(key, 0 if full else self._most - len(rows))
            rows += page.rows
            if page.after is not None:
                return Page(rows, page.after)
        return Page(rows)

    def _of_variable(self, key: int, most: int) -> Page[HistoryEntry]:
        newest_first = self._query.newest_first
        if self._after is not None and (key > self._after[1] if newest_first else key < self._after[1]):
            return Page(())
        if most <= 0:
            return Page((), (0, key, _LAST_VERSION if newest_first else -1))
        conditions = _Conditions()
        conditions.add("versions.variable_key = ?", key)
        after = _version_at(self._connection, key, self._first)
        last = _version_at(self._connection, key, self._last)
        conditions.add("versions.version > ?", -1 if after is None else after)
        conditions.add("versions.version <= ?", -1 if last is None else last)
        if self._after is not None and key == self._after[1]:
            conditions.add(f"versions.version {'<' if newest_first else '>'} ?", self._after[2])
        order = f" ORDER BY versions.version {'DESC' if newest_first else ''} LIMIT ?"
        return self._read(_BY_VARIABLE, conditions, order, most)

    def _page(self, driver: str, sequence: str, window: int | None, keys: str = "versions") -> Page[HistoryEntry]:
        """A page in the order of commits. Within a `window` it may be short and yet not the last."""
        newest_first = self._query.newest_first
        first, last = self._first, self._last
        if self._after is not None:
            if newest_first:
                last = min(last, self._after[0])
            else:
                first = max(first, self._after[0] - 1)
        end = None
        if window is not None and last - first > window:
            end = last - window if newest_first else first + window
            first, last = (end, last) if newest_first else (first, end)
        conditions = _Conditions()
        conditions.add(f"{sequence} > ?", first)
        conditions.add(f"{sequence} <= ?", last)
        key, direction = f"{sequence}, {keys}.variable_key, {keys}.version", "DESC" if newest_first else ""
        if self._after is not None:
            conditions.add(f"({key}) {'<' if newest_first else '>'} (?, ?, ?)", *self._after)
        order = f" ORDER BY {key.replace(',', f' {direction},')} {direction} LIMIT ?"
        page = self._read(driver, conditions, order, self._most)
        if page.after is None and end is not None:
            return Page(page.rows, (end, _LAST_VERSION, 0))
        return page

    def _read(self, driver: str, more: _Conditions, order: str, most: int) -> Page[HistoryEntry]:
        more.add_all(self._conditions)
        statement = _VERSIONS.format(driver=driver) + str(more) + order
        rows, last = _some(self._connection, statement, most, *more.parameters)
        entries = [_entry_of(row, self._reveal) for row in rows]
        entries = [entry for entry in entries if self._query.metadata.items() <= entry.metadata.items()]
        if self._mine is not None:
            entries = [entry for entry in entries if (entry.name, entry.version) in self._mine]
        return Page(entries, (last.sequence, last.variable_key, last.version) if last is not None else None)


def _predicate(predicate: Predicate, reveal: bool) -> tuple[Any, ...]:
    """As SQL. What is masked is not found by its value either."""
    shown = "text IS NOT NULL" if reveal else "text IS NOT NULL AND sensitive = 0"
    if predicate.operator is Operator.CONTAINS:
        # As it stands there, or as JSON writes it.
        escaped = json.dumps(predicate.operand, ensure_ascii=False)[1:-1]
        return f"(instr(text, ?) > 0 OR instr(text, ?) > 0) AND {shown}", predicate.operand, escaped
    holds = "value_holds(text, variables.type, ?, ?)"
    return f"{holds} AND {shown}", predicate.operator.value, predicate.operand


# Executions


def _execution_row(connection: Connection, execution_id: str) -> Any:
    """The execution of this id, which names the commit that began it: `exec_12` is as good as all of it."""
    _asked(execution_id)
    _, number, *token = execution_id.split("_") if execution_id.startswith("exec_") else ("", "")
    row = None
    if number.isascii() and number.isdecimal() and len(number) < 19:
        row = _first(connection, f"{_IN_FULL} WHERE executions.began_sequence = ?", int(number))
    if row is None or (token and row.execution_id != execution_id):
        hint = did_you_mean(row.execution_id, spell=str) if row is not None else "audit executions lists them"
        raise NotInHistoryError("execution", execution_id, hint)
    return row


def _family(connection: Connection, row: Any) -> list[Any]:
    """The execution and all that it called, directly or not."""
    statement = "SELECT execution_id FROM executions WHERE parent_id = ? ORDER BY began_sequence"
    called = [_execution_row(connection, each[0]) for each in _all(connection, statement, row.execution_id)]
    return [row, *(member for each in called for member in _family(connection, each))]


def _end_of(row: Any) -> Mapping[str, Any]:
    """The second half of its journal entry, as far as there is one."""
    return {"writes": (), "published": (), **stored_object(row.ending)}


def _summary_of(row: Any) -> ExecutionSummary:
    return ExecutionSummary(
        row.session_id,
        row.execution_id,
        row.tool,
        ExecutionStatus(row.status),
        row.attempt,
        row.actor,
        row.began_sequence,
        nearest_time(row.began_at),
        row.ended_sequence,
        None if row.ended_at is None else nearest_time(row.ended_at),
        row.duration_us,
        row.parent_id,
        row.idempotency_key,
        _json(row.worker_id) or "",
        row.reads,
        row.writes,
        _error_text(row),
    )


def _error_text(row: Any) -> str:
    failure = _json(row.failure)
    if failure:
        return f"{failure['type']}: {failure['message']}"
    conflicts = conflicts_in(_json(row.conflicts) or ())
    # Where the end is pruned, its reason is gone: a session's end interrupts, too.
    ending = _ENDINGS.get(row.status, "") if row.has_ending else ""
    return _json(row.reason) or ", ".join(map(str, conflicts)) or ending


def _json(text: str | None) -> Any:
    return None if text is None else stored(text)


def _execution_page(
    connection: Connection, query: ExecutionQuery, bounds: _Bounds, after: Cursor | None, most: int
) -> Page[ExecutionSummary]:
    conditions = _Conditions()
    _of_session(connection, conditions, query.session, "executions.session_key")
    _of_tool(conditions, query.tool)
    conditions.add_equal("executions.status", query.status)
    conditions.add_equal("began.actor", query.actor)
    conditions.add_equal("executions.idempotency_key", query.idempotency_key)
    conditions.add_metadata(f"{_BEGINNING} -> '$.metadata'", query.metadata.items())
    if not query.children:
        conditions.add("executions.parent_id IS NULL")
    rows = _rows_of_page(connection, _SUMMARIES, "executions.began_sequence", conditions, query, bounds, after, most)
    return _page_of(rows, most, _summary_of, lambda row: (row.began_sequence,))


def _rows_of_page(
    connection: Connection,
    statement: str,
    key: str,
    conditions: _Conditions,
    query: Query[Any],
    bounds: _Bounds,
    after: Cursor | None,
    most: int,
) -> Sequence[Any]:
    """The rows of a page that is in the order of a commit's number, and one more if there is one."""
    first, last = bounds
    conditions.add(f"{key} > ?", first)
    conditions.add(f"{key} <= ?", last)
    if after is not None:
        conditions.add(f"{key} {'<' if query.newest_first else '>'} ?", after[0])
    order = f" ORDER BY {key} {'DESC' if query.newest_first else ''} LIMIT ?"
    return _all(connection, statement + str(conditions) + order, *conditions.parameters, most + 1)


def _page_of(rows: Sequence[Any], most: int, made: Callable[[Any], T], key: Callable[[Any], Cursor]) -> Page[T]:
    return Page([made(row) for row in rows[:most]], key(rows[most - 1]) if len(rows) > most else None)


def _detail(connection: Connection, execution_id: str, history: tuple[HistoryEntry, ...]) -> ExecutionDetail:
    row = _execution_row(connection, execution_id)
    began, ended = _event_in(ExecutionBegan, row.beginning), _event_in(ExecutionEnded, row.ending)
    children = _all(
        connection, "SELECT execution_id FROM executions WHERE parent_id = ? ORDER BY began_sequence", row.execution_id
    )
    return ExecutionDetail(
        _summary_of(row),
        **(_told_of_beginning(began) if began is not None else _NO_BEGINNING),
        **(_told_of_end(ended) if ended is not None else {}),
        attempts=_attempts(connection, row, began),
        children=tuple(_detail(connection, each[0], ()) for each in children),
        history=history,
    )


_NO_BEGINNING: Final[Mapping[str, Any]] = {"isolation": "", "parameters": {}, "metadata": {}, "seed": ""}


def _event_in(kind: type[E], text: str | None) -> E | None:
    """The event with this body; None where there is none, or what there is is no JSON."""
    body = stored_object(text)
    return None if not body or DAMAGED in body else kind.from_body(body)


def _told_of_beginning(event: ExecutionBegan) -> dict[str, Any]:
    return {
        "isolation": event.isolation.value,
        "parameters": event.parameters,
        "metadata": event.metadata,
        "seed": event.seed,
    }


def _told_of_end(event: ExecutionEnded) -> dict[str, Any]:
    return {
        "result": event.result,
        "failure": event.failure,
        "reason": event.reason or "",
        "conflicts": event.conflicts,
        "reads": tuple(_read_entry(asked, seen) for asked, seen in event.reads.items()),
        "patterns": event.patterns,
        "writes": event.writes,
        "published": event.published,
        "log": tuple(replace(line, message=_text_of(line.message)) for line in event.log),
        "recorded": event.recorded,
    }


def _read_entry(asked: str, seen: Seen | None) -> ReadEntry:
    return ReadEntry(asked, seen.name, seen.variable_id, seen.version) if seen else ReadEntry(asked, None, None, None)


def _text_of(message: object) -> str:
    """What was logged: once it could be anything."""
    return message if isinstance(message, str) else storable(message)


def _pairs(entries: Iterable[Sequence[Any]]) -> tuple[tuple[str, int], ...]:
    return tuple((name, version) for name, version in entries)


def _attempts(connection: Connection, row: Any, began: ExecutionBegan | None) -> tuple[str, ...]:
    """The executions for the same request: those that it repeats, and those that repeat it."""
    found, first = [row.execution_id], row
    while began is not None and began.retry_of is not None:
        try:
            before = _execution_row(connection, began.retry_of)
        except NotInHistoryError:
            break
        if before.began_sequence >= first.began_sequence:
            # Imports took such once. Following it would never end.
            break
        found.insert(0, before.execution_id)
        first, began = before, _event_in(ExecutionBegan, before.beginning)
    last = row
    while last is not None and last.status == ExecutionStatus.CONFLICT.value:
        last = _first(
            connection,
            f"{_IN_FULL} WHERE executions.session_key = ? AND executions.began_sequence > ? "
            f"AND executions.tool = ? AND executions.attempt = ? AND {_BEGINNING} ->> '$.retry_of' = ? "
            "ORDER BY executions.began_sequence LIMIT 1",
            last.session_key,
            last.began_sequence,
            last.tool,
            last.attempt + 1,
            last.execution_id,
        )
        found += [last.execution_id] if last is not None else []
    return tuple(found)


# Commits and sessions


def _commit_page(
    connection: Connection, query: CommitQuery, bounds: _Bounds, after: Cursor | None, most: int
) -> Page[CommitEntry]:
    conditions = _Conditions()
    _of_session(connection, conditions, query.session, "commits.session_key")
    conditions.add_equal("commits.actor", query.actor)
    conditions.add_equal("commits.cause", query.cause)
    rows = _rows_of_page(connection, _COMMITS, "commits.sequence", conditions, query, bounds, after, most)
    return _page_of(rows, most, _commit_of, lambda row: (row.sequence,))


def _commit_of(row: Any) -> CommitEntry:
    return CommitEntry(
        row.sequence,
        row.session_id,
        row.actor,
        row.cause,
        nearest_time(row.created_at),
        row.hash,
        _pairs(json.loads(row.versions)),
        tuple(json.loads(row.events)),
        bool(row.pruned),
    )


def _session_page(
    connection: Connection, query: SessionQuery, bounds: _Bounds, after: Cursor | None, most: int
) -> Page[SessionEntry]:
    conditions = _Conditions()
    _of_session(connection, conditions, query.session, "sessions.session_key")
    if query.live is not None:
        conditions.add(f"sessions.ended_sequence IS {'' if query.live else 'NOT '}NULL")
    conditions.add_metadata(_sound("sessions.metadata"), query.metadata.items())
    rows = _rows_of_page(connection, _SESSIONS, "sessions.started_sequence", conditions, query, bounds, after, most)
    return _page_of(rows, most, _session_of, lambda row: (row.started_sequence,))


def _session_of(row: Any) -> SessionEntry:
    return SessionEntry(
        row.session_id,
        nearest_time(row.created_at),
        row.started_sequence,
        row.ended_sequence,
        None if row.ended_at is None else nearest_time(row.ended_at),
        nearest_time(row.last_at),
        row.ttl_s,
        row.variables,
        row.commits,
        row.executions,
        stored_object(row.metadata),
    )
