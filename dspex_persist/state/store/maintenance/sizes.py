"""Measure what takes space in a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from dspex_persist.state.store import guard
from dspex_persist.state.store.engine import snapshot
from dspex_persist.state.store.maintenance.opening import reading, refuse_older, side_file, size_of
from dspex_persist.state.store.schema import REVISION

_LARGEST: Final = 10
_SOUND_SQLITE: Final = (3, 51, 3)


@dataclass(frozen=True, slots=True)
class StoredTable:
    """The size of a table or an index. `rows` is None for an index, `unused_bytes` unless pages were measured."""

    name: str
    kind: str
    rows: int | None
    size_bytes: int
    unused_bytes: int | None


@dataclass(frozen=True, slots=True)
class Share:
    """The size of the history of a session, or of one of its variables: the number of versions, and their bytes."""

    session_id: str
    variable: str | None
    versions: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class StatsReport:
    """The sizes in a file. If `exact`, `tables` are sizes in pages, else sums of value lengths, without indexes."""

    path: Path
    revision: str
    file_bytes: int
    wal_bytes: int
    free_bytes: int
    exact: bool
    tables: tuple[StoredTable, ...]
    sessions_live: int
    sessions_ended: int
    variables_live: int
    variables_deleted: int
    versions: int
    commits: int
    large_contents: int
    large_bytes: int
    shared_bytes: int
    largest_sessions: tuple[Share, ...]
    largest_variables: tuple[Share, ...]
    sqlite_version: str
    warning: str | None


_COUNTS: Final = {
    "sessions_live": "SELECT count(*) FROM sessions WHERE ended_sequence IS NULL",
    "sessions_ended": "SELECT count(*) FROM sessions WHERE ended_sequence IS NOT NULL",
    "variables_live": """
        SELECT count(*) FROM variables JOIN sessions USING (session_key)
        WHERE deleted_sequence IS NULL AND ended_sequence IS NULL
    """,
    "variables_deleted": """
        SELECT count(*) FROM variables JOIN sessions USING (session_key)
        WHERE deleted_sequence IS NOT NULL OR ended_sequence IS NOT NULL
    """,
    "versions": "SELECT count(*) FROM versions",
    "commits": "SELECT count(*) FROM commits",
    "large_contents": "SELECT count(*) FROM blobs",
    "large_bytes": "SELECT ifnull(sum(length(content)), 0) FROM blobs",
    # The bytes saved because several versions refer to the same content.
    "shared_bytes": """
        SELECT ifnull(sum(length(content)), 0) - (SELECT ifnull(sum(length(content)), 0) FROM blobs)
        FROM (
            SELECT value_blob AS blob_key FROM versions WHERE value_blob IS NOT NULL
            UNION ALL SELECT binary_blob FROM versions WHERE binary_blob IS NOT NULL
        ) JOIN blobs USING (blob_key)
    """,
}
_SIZES: Final = """
    WITH sizes AS (
        SELECT variable_key, count(*) AS versions, sum(
            ifnull(length(CAST(versions.value AS BLOB)), 0) + ifnull(length(versions.binary), 0)
            + ifnull(length(CAST(versions.metadata AS BLOB)), 0)
            + ifnull((SELECT length(content) FROM blobs WHERE blob_key = value_blob), 0)
            + ifnull((SELECT length(content) FROM blobs WHERE blob_key = binary_blob), 0)
        ) AS size_bytes
        FROM versions GROUP BY variable_key
    )
"""
_LARGEST_VARIABLES: Final = f"""
    {_SIZES}
    SELECT session_id, name, versions, size_bytes
    FROM sizes JOIN variables USING (variable_key) JOIN sessions USING (session_key)
    ORDER BY size_bytes DESC, versions DESC, variable_key LIMIT {_LARGEST}
"""
_LARGEST_SESSIONS: Final = f"""
    {_SIZES}
    SELECT session_id, NULL, sum(versions), sum(size_bytes)
    FROM sizes JOIN variables USING (variable_key) JOIN sessions USING (session_key)
    GROUP BY session_key ORDER BY sum(size_bytes) DESC, sum(versions) DESC, session_key LIMIT {_LARGEST}
"""


def stats(path: Path) -> StatsReport:
    """Measure the file. Reads all of it; a content that several versions share counts for each of them."""
    with reading(path) as readers:
        refuse_older(path)
        with snapshot(readers) as connection:
            return _stats(connection, path)


def _stats(connection: Connection, path: Path) -> StatsReport:
    tables = measure_pages(connection)
    exact = tables is not None
    version = find_scalar(connection, "SELECT sqlite_version()")
    return StatsReport(
        path=path,
        revision=REVISION,
        file_bytes=size_of(path),
        wal_bytes=size_of(side_file(path, "-wal")),
        free_bytes=find_scalar(connection, "PRAGMA freelist_count") * find_scalar(connection, "PRAGMA page_size"),
        exact=exact,
        tables=tables if tables is not None else measure_lengths(connection),
        **{name: find_scalar(connection, query) for name, query in _COUNTS.items()},
        largest_sessions=_shares(connection, _LARGEST_SESSIONS),
        largest_variables=_shares(connection, _LARGEST_VARIABLES),
        sqlite_version=version,
        warning="; ".join(filter(None, (_wal_warning(path), sqlite_warning(version)))) or None,
    )


def _wal_warning(path: Path) -> str | None:
    size_bytes = size_of(side_file(path, "-wal"))
    return f"the WAL has {size_bytes:,} bytes: {guard.WAL_IS_HELD}" if size_bytes > guard.LARGE_WAL_BYTES else None


def sqlite_warning(version: str) -> str | None:
    """Return a warning about known bugs of this version of SQLite; None if there are none."""
    if tuple(int(part) for part in version.split(".")) >= _SOUND_SQLITE:
        return None
    return (
        f"SQLite {version} has the WAL-reset bug (fixed in 3.51.3): two connections that write or checkpoint can lose "
        "commits. dspex-persist writes and checkpoints through one; let no other program write to the file, or run a "
        "Python that is linked to a newer SQLite"
    )


def find_scalar(connection: Connection, statement: str) -> Any:
    return connection.exec_driver_sql(statement).scalar_one()


def _shares(connection: Connection, statement: str) -> tuple[Share, ...]:
    return tuple(Share(*row) for row in connection.exec_driver_sql(statement))


def _objects(connection: Connection) -> list[tuple[str, str, int | None]]:
    """Every table and index: its name, its kind, and the number of rows of a table."""
    query = "SELECT name, type FROM sqlite_schema WHERE type IN ('table', 'index') ORDER BY type DESC, name"
    return [
        (name, kind, find_scalar(connection, f'SELECT count(*) FROM "{name}"') if kind == "table" else None)
        for name, kind in connection.exec_driver_sql(query).fetchall()
    ]


def measure_pages(connection: Connection) -> tuple[StoredTable, ...] | None:
    """Measure tables and indexes in pages; None if this SQLite was built without dbstat."""
    query = "SELECT name, pgsize, unused FROM dbstat WHERE aggregate = TRUE"
    try:
        sizes = {name: (size, unused) for name, size, unused in connection.exec_driver_sql(query)}
    except DBAPIError as error:
        if "no such table: dbstat" in str(error.orig):
            return None
        raise
    tables = [StoredTable(*known, *sizes.get(known[0], (0, 0))) for known in _objects(connection)]
    return tuple(sorted(tables, key=lambda table: -table.size_bytes))


def measure_lengths(connection: Connection) -> tuple[StoredTable, ...]:
    """Measure tables by the lengths of their values, without indexes and the overhead of pages."""
    tables = []
    for name, kind, rows in _objects(connection):
        if kind != "table":
            continue
        columns = [row[1] for row in connection.exec_driver_sql(f'PRAGMA table_info("{name}")')]
        lengths = " + ".join(f'ifnull(length(CAST("{column}" AS BLOB)), 0)' for column in columns)
        size = find_scalar(connection, f'SELECT ifnull(sum({lengths}), 0) FROM "{name}"')
        tables.append(StoredTable(name, kind, rows, size, None))
    return tuple(sorted(tables, key=lambda table: -table.size_bytes))
