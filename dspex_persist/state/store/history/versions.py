"""Answer queries for versions: pages of a history."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from sqlalchemy import Connection

from dspex_persist.clock import nearest_time
from dspex_persist.state.audit import (
    Cursor,
    HistoryEntry,
    HistoryQuery,
    Operator,
    Page,
    Predicate,
    is_glob,
    predicates_of,
)
from dspex_persist.state.conditions import spellings, value_holds
from dspex_persist.state.model import REASON, ChangeKind, Source, Value, without_reason
from dspex_persist.state.store import damage
from dspex_persist.state.store import variables as stored_variables
from dspex_persist.state.store.history.execution_rows import end_of, execution_row, family_of, pairs_in
from dspex_persist.state.store.history.points import LAST_VERSION, session_keys, variable_keys, version_at
from dspex_persist.state.store.history.rows import (
    ENDING,
    PAGE_BYTES,
    WINDOW,
    Bounds,
    Conditions,
    first_row,
    glob_pattern,
    of_tool,
    records_of,
    searchable,
    some_rows,
    sound_document,
)
from dspex_persist.state.store.variables import KIND_CODES, KIND_OF, SOURCE_CODES, SOURCE_OF
from dspex_persist.state.values.json_text import stored_texts

# Like the views (migrations/): if a transaction ran several executions, the end of each lists what that one wrote.
_MAKER: Final = f"""
    CASE WHEN commits.cause GLOB 'exec_[0-9]*' THEN coalesce(
        CASE WHEN EXISTS (SELECT 1 FROM executions AS called WHERE called.parent_id = commits.cause) THEN (
            SELECT CAST(substr({ENDING} ->> '$.execution_id', 6) AS INTEGER)
            FROM events AS ending CROSS JOIN json_each({ENDING}, '$.writes') AS written
            WHERE ending.sequence = versions.sequence AND ending.kind = 'execution_ended'
                AND written.value ->> 0 = variables.name AND CAST(written.value ->> 1 AS INTEGER) = versions.version
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
# Not the column itself: PostgreSQL would begin with the executions of the tool, and look for each in all versions.
_TOOL: Final = "(CASE WHEN executions.tool IS NOT NULL THEN executions.tool END)"
_BY_VARIABLE: Final = "versions CROSS JOIN commits ON commits.sequence = versions.sequence"
_BY_SESSION: Final = """
    commits INDEXED BY commits_by_session
    CROSS JOIN versions INDEXED BY versions_by_sequence ON versions.sequence = commits.sequence
"""
_BY_SEQUENCE: Final = """
    versions INDEXED BY versions_by_sequence CROSS JOIN commits ON commits.sequence = versions.sequence
"""
# The same where hints do not say that the range comes first: PostgreSQL would read all variables of a name, or all
# commits of an actor. It does not look into a query with an OFFSET.
_FENCED: Final = """
    (
        SELECT * FROM versions WHERE sequence > ? AND sequence <= ?
        ORDER BY sequence {direction}, variable_key {direction}, version {direction} OFFSET 0
    ) AS versions CROSS JOIN commits ON commits.sequence = versions.sequence
"""
_BY_METADATA: Final = """
    metadata_entries
    CROSS JOIN versions ON versions.variable_key = metadata_entries.variable_key
        AND versions.version = metadata_entries.version
    CROSS JOIN commits ON commits.sequence = versions.sequence
"""


def one_version(connection: Connection, key: int, version: int) -> Any:
    statement = _VERSIONS.format(driver=_BY_VARIABLE) + " WHERE versions.variable_key = ? AND versions.version = ?"
    return first_row(connection, statement, key, version)


def entry_of(row: Any, reveal: bool) -> HistoryEntry:
    kept_back = bool(row.sensitive) and not reveal and row.text is not None
    metadata = stored_texts(row.metadata)
    return HistoryEntry(
        row.session_id,
        row.name,
        row.variable_id,
        row.type,
        row.version,
        KIND_OF[row.kind],
        None if row.text is None or kept_back else Value(row.text, row.binary),
        SOURCE_OF[row.source],
        without_reason(metadata),
        row.sequence,
        nearest_time(row.created_at),
        row.actor,
        row.cause,
        row.execution_id,
        row.tool,
        kept_back,
        row.caller_id,
        row.caller_tool,
        metadata.get(REASON),
    )


class HistoryPage:
    """One page of versions: picks the rows that drive the statement, and the conditions on them."""

    def __init__(
        self,
        connection: Connection,
        query: HistoryQuery,
        bounds: Bounds,
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
        self._conditions = Conditions()
        self._mine: frozenset[tuple[str, int]] | None = None

    def read(self) -> Page[HistoryEntry]:
        query = self._query
        keys = session_keys(self._connection, query.session) if query.session and not is_glob(query.session) else None
        self._narrow()
        if query.execution_id:
            if keys is not None:
                self._conditions.add_among("commits.session_key", keys)
            return self._of_execution()
        if query.metadata:
            return self._of_metadata(keys)
        if keys is not None:
            if query.variable and not is_glob(query.variable):
                return self._of_variables(variable_keys(self._connection, keys, query.variable))
            self._conditions.add_among("commits.session_key", keys)
            self._name()
            return self._page(_BY_SESSION, "commits.sequence", None)
        self._name()
        return self._page(_BY_SEQUENCE, "versions.sequence", WINDOW)

    def _narrow(self) -> None:
        query, add = self._query, self._conditions
        if is_glob(query.session):
            add.add("sessions.session_id GLOB ?", glob_pattern(query.session))
        add.add_equal("variables.type", query.type)
        add.add_equal("versions.kind", None if query.kind is None else KIND_CODES[ChangeKind(query.kind)])
        add.add_equal("commits.actor", query.actor)
        add.add_equal("versions.source", None if query.source is None else SOURCE_CODES[Source(query.source)])
        of_tool(add, query.tool, _TOOL)
        self._predicates = predicates_of(query.where)
        if self._connection.dialect.name == "sqlite":
            for predicate in self._predicates:
                add.add(*_predicate(predicate, self._reveal))
            self._predicates = ()

    def _name(self) -> None:
        variable = self._query.variable
        if is_glob(variable):
            self._conditions.add("variables.name GLOB ?", glob_pattern(variable))
        elif variable:
            identifier = searchable(variable)
            self._conditions.add("(variables.name = ? OR variables.variable_id = ?)", identifier, identifier)

    def _of_execution(self) -> Page[HistoryEntry]:
        """The versions that it and the executions it called committed at the end, or published before."""
        row = top = execution_row(self._connection, self._query.execution_id)
        with damage.reading(row.session_id):
            family = family_of(self._connection, row)
        while top.parent_id is not None:
            top = execution_row(self._connection, top.parent_id)
        if row is not top:
            self._mine = frozenset(
                written
                for each in family
                for name in ("writes", "published")
                for written in pairs_in(end_of(each)[name])
            )
        last = top.ended_sequence if top.ended_sequence is not None else self._last
        self._first, self._last = max(self._first, row.began_sequence), min(self._last, last)
        self._conditions.add("commits.session_key = ?", row.session_key)
        self._conditions.add_among("commits.cause", [top.execution_id, *(each.execution_id for each in family)])
        self._name()
        return self._page(_BY_SESSION, "commits.sequence", None)

    def _of_metadata(self, keys: list[int] | None) -> Page[HistoryEntry]:
        (key, value), *others = self._query.metadata.items()
        if self._connection.dialect.name == "sqlite":
            # The index has keys and values up to their first NUL, where SQLite cuts them; `_read` compares all of it.
            self._conditions.add("metadata_entries.key IN (?, ?)", key, key.partition("\0")[0])
            self._conditions.add("metadata_entries.value IN (?, ?)", value, value.partition("\0")[0])
        else:
            # No text there has a NUL; and the index has hashes of the values, which may be too long for it.
            key, value = key.replace("\0", "\ufffd"), value.replace("\0", "\ufffd")
            self._conditions.add("metadata_entries.key = ? AND md5(metadata_entries.value) = md5(?)", key, value)
            self._conditions.add("metadata_entries.value = ?", value)
        self._conditions.add_metadata(sound_document("versions.metadata"), others)
        if keys is not None:
            self._conditions.add_among("variables.session_key", keys)
        self._name()
        return self._page(_BY_METADATA, "metadata_entries.sequence", None, "metadata_entries")

    def _of_variables(self, keys: list[int]) -> Page[HistoryEntry]:
        """One variable after the other: each of the same name was deleted before the next was registered."""
        newest_first = self._query.newest_first
        rows: list[HistoryEntry] = []
        for key in sorted(keys, reverse=newest_first):
            full = sum(row.value.size_bytes for row in rows if row.value is not None) >= PAGE_BYTES
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
            return Page((), (0, key, LAST_VERSION if newest_first else -1))
        conditions = Conditions()
        conditions.add("versions.variable_key = ?", key)
        after = version_at(self._connection, key, self._first)
        last = version_at(self._connection, key, self._last)
        conditions.add("versions.version > ?", -1 if after is None else after)
        conditions.add("versions.version <= ?", -1 if last is None else last)
        if self._after is not None and key == self._after[1]:
            conditions.add(f"versions.version {'<' if newest_first else '>'} ?", self._after[2])
        order = f" ORDER BY versions.version {'DESC' if newest_first else ''} LIMIT ?"
        return self._read(_BY_VARIABLE, conditions, order, most)

    def _page(self, driver: str, sequence: str, window: int | None, keys: str = "versions") -> Page[HistoryEntry]:
        """A page in the order of commits. With a `window`, a page that is not full need not be the last."""
        newest_first = self._query.newest_first
        first, last = self._first, self._last
        if self._after is not None:
            if newest_first:
                last = min(last, self._after[0])
            else:
                first = max(first, self._after[0] - 1)
        end = None
        if window is not None:
            first, last = self._with_versions(first, last)
        if window is not None and last - first > window:
            end = last - window if newest_first else first + window
            first, last = (end, last) if newest_first else (first, end)
        conditions = Conditions()
        conditions.add(f"{sequence} > ?", first)
        conditions.add(f"{sequence} <= ?", last)
        key, direction = f"{sequence}, {keys}.variable_key, {keys}.version", "DESC" if newest_first else ""
        if self._after is not None:
            conditions.add(f"({key}) {'<' if newest_first else '>'} (?, ?, ?)", *self._after)
        order = f" ORDER BY {key.replace(',', f' {direction},')} {direction} LIMIT ?"
        bounds: tuple[int, ...] = ()
        if window is not None and self._connection.dialect.name != "sqlite":
            driver, bounds = _FENCED.format(direction=direction), (first, last)
        page = self._read(driver, conditions, order, self._most, bounds)
        if page.after is None and end is not None:
            return Page(page.rows, (end, LAST_VERSION, 0))
        return page

    def _with_versions(self, first: int, last: int) -> tuple[int, int]:
        """Narrow a range of commits to those with versions: in a damaged file, a commit can have any number."""
        statement = "SELECT {}(sequence) FROM versions WHERE sequence > ? AND sequence <= ?"
        lowest, highest = (first_row(self._connection, statement.format(end), first, last)[0] for end in ("min", "max"))
        return (first, first) if lowest is None else (lowest - 1, highest)

    def _read(
        self, driver: str, more: Conditions, order: str, most: int, bounds: tuple[int, ...] = ()
    ) -> Page[HistoryEntry]:
        """Read a page; `bounds` are the parameters of the driver."""
        more.add_all(self._conditions)
        statement = _VERSIONS.format(driver=driver) + str(more) + order
        rows, last = some_rows(self._connection, statement, most, *bounds, *more.parameters)
        if self._predicates:
            rows = [row for row in rows if self._fits(row)]
        entries = records_of(rows, partial(entry_of, reveal=self._reveal))
        entries = [entry for entry in entries if self._query.metadata.items() <= _all_metadata(entry).items()]
        if self._mine is not None:
            entries = [entry for entry in entries if (entry.name, entry.version) in self._mine]
        return Page(entries, (last.sequence, last.variable_key, last.version) if last is not None else None)

    def _fits(self, row: Any) -> bool:
        """Whether the row's value fits the predicates, where the database cannot tell."""
        if row.text is None or (row.sensitive and not self._reveal):
            return False
        return all(_holds(predicate, row.text, row.type) for predicate in self._predicates)


def _holds(predicate: Predicate, text: str, type_name: str) -> bool:
    if predicate.operator is Operator.CONTAINS:
        return any(each in text for each in spellings(predicate.operand))
    return bool(value_holds(text, type_name, predicate.operator.value, predicate.operand))


def _all_metadata(entry: HistoryEntry) -> Mapping[str, str]:
    return entry.metadata if entry.reason is None else {**entry.metadata, REASON: entry.reason}


def _predicate(predicate: Predicate, reveal: bool) -> tuple[Any, ...]:
    """The predicate as SQL. Masked values match nothing, so that a query cannot guess them."""
    shown = "text IS NOT NULL" if reveal else "text IS NOT NULL AND sensitive = 0"
    if predicate.operator is Operator.CONTAINS:
        return f"(instr(text, ?) > 0 OR instr(text, ?) > 0) AND {shown}", *spellings(predicate.operand)
    holds = "value_holds(text, variables.type, ?, ?)"
    return f"{holds} AND {shown}", predicate.operator.value, predicate.operand
