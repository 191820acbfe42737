"""Looking after a file: check it, upgrade it, back it up, restore it, see where its bytes are, shrink it.

What only reads uses read-only connections and short transactions, and so works while a server writes. What changes
the file takes the ownership lock first. Every error is an `OpenError`, or a `StorageError` for what SQLite refuses.
"""

import json
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from dspex_persist.state.errors import (
    DatabaseInUseError,
    InvalidArgumentError,
    LostCommitsError,
    NotADatabaseError,
    OutcomeUnknownError,
    ReadFailedError,
    StorageError,
)
from dspex_persist.state.events import Pruned
from dspex_persist.state.groups import Job
from dspex_persist.state.model import PrunePolicy, PruneReport
from dspex_persist.state.provider import Progress, silent
from dspex_persist.state.recording import Header, RecordedCommit
from dspex_persist.state.store import anchor as anchors
from dspex_persist.state.store import audit, guard, migrate, recordings, recovery, swap, verify
from dspex_persist.state.store import prune as pruning
from dspex_persist.state.store.anchor import Head
from dspex_persist.state.store.answers import StoredAudit
from dspex_persist.state.store.engine import (
    OwnershipLock,
    checkpoint,
    open_readers,
    open_writer,
    resolved,
    snapshot,
)
from dspex_persist.state.store.schema import REVISION
from dspex_persist.state.store.session_store import open_groups
from dspex_persist.state.store.untouched import is_half_written, read_untouched
from dspex_persist.state.store.verify import Problem

MOST_PROBLEMS: Final = 1000
"""A check stops after so many."""

_LARGEST: Final = 10
_BACKUP_PAGES: Final = 1024
_MOST_BUSY: Final = 40
"""How often in a row a copy tries to lock its target, a quarter of a second apart."""

_SOUND_SQLITE: Final = (3, 51, 3)
_NOT_OURS: Final = frozenset(
    {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}
)

# Opening


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say what the driver and the operating system report of writing in the terms of this package."""
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        original = getattr(error, "orig", error)
        if (getattr(original, "sqlite_errorcode", 0) & 0xFF) in _NOT_OURS:
            raise NotADatabaseError(str(path), str(original)) from error
        raise StorageError(str(original)) from error
    except UnicodeDecodeError as error:
        # What the driver makes of a message of SQLite that quotes a damaged schema.
        raise NotADatabaseError(str(path), "its schema is damaged") from error
    except OSError as error:
        raise NotADatabaseError(str(path), error.strerror or str(error)) from error


def _refuse_missing(path: Path, advice: str = "") -> None:
    # Where the folder may not be looked into, too: whoever opens the file says so.
    if not os.path.lexists(path) and os.access(path.parent, os.X_OK):
        raise NotADatabaseError(
            str(path), f"there is no such file; {advice or f'`dspex-persist serve --db {path}` makes one'}"
        )
    if not path.is_file():
        raise NotADatabaseError(str(path), "it is a folder" if path.is_dir() else "it is no regular file")


def refuse_owned(path: Path) -> Path:
    """The file's one name, where it is; `DatabaseInUseError` if somebody owns it. Makes nothing where it is missing."""
    with _explained(path):
        if path.is_file():
            OwnershipLock(path).release()
    return resolved(path)


@contextmanager
def _reading(path: Path) -> Iterator[Engine]:
    """One read-only connection to the file, which a server may have open."""
    with _explained(path):
        _refuse_missing(path)
        readers = open_readers(path, size=1)
        try:
            yield readers
        finally:
            readers.dispose()


@contextmanager
def _owning(path: Path) -> Iterator[Engine]:
    """The one connection that writes, under the ownership lock; the WAL is brought into the file at the end.

    What a server would refuse, is refused before anything is touched.
    """
    with _explained(path):
        _refuse_missing(path)
        lock = OwnershipLock(path)
        try:
            recovery.inspect(resolved(path), path)
            lock.announce()
            writer = open_writer(path)
            try:
                yield writer
                checkpoint(writer)
            finally:
                writer.dispose()
        finally:
            lock.release()


def _find_revision(path: Path) -> str | None:
    """The file's revision, at most this release's; None in an empty file. Before it is opened: see `read_untouched`."""
    try:
        found = read_untouched(path, migrate.current_revision)
    except ReadFailedError as error:
        if not is_half_written(error):
            raise
        recovery.refuse_half_written(path, path)
        reason = f"a crash has left it half made; `dspex-persist db upgrade --db {path}` makes it whole"
        raise NotADatabaseError(str(path), reason) from error
    if found is not None:
        migrate.refuse_newer(path, found)
    return found


def _refuse_older(path: Path) -> None:
    """Let only files of this release's revision pass."""
    found = _find_revision(path)
    if found is None:
        raise NotADatabaseError(str(path), f"it is empty; `dspex-persist db upgrade --db {path}` makes its tables")
    if found != REVISION:
        reason = f"its schema is {found}, this release reads {REVISION}; `dspex-persist db upgrade --db {path}` helps"
        raise NotADatabaseError(str(path), reason)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _size_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_anchor(path: Path) -> Head | None:
    with _explained(path):
        return anchors.remembered(path)


# check


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check found. `complete` is false where it stopped after `MOST_PROBLEMS`.

    Of the `commits`, `pruned_commits` have lost rows, `pruned_versions` and `pruned_events` in all: markers in the log
    say so.
    """

    path: Path
    revision: str
    commits: int
    pruned_commits: int
    pruned_versions: int
    pruned_events: int
    anchored: bool
    problems: tuple[Problem, ...]
    complete: bool


def check(path: Path, progress: Progress = silent) -> CheckReport:
    """SQLite's own integrity check, foreign keys, triggers, views, indexes, and everything that `verify` looks at.

    A copy without its anchor file is checked without one: then commits that are gone from its end are not noticed.
    """
    # Before anything of the file: a server that writes meanwhile is then ahead of it, never behind.
    anchor = _read_anchor(path)
    with _reading(path) as readers:
        _refuse_older(path)
        return _check(path, readers, anchor, progress)


def _check(path: Path, readers: Engine, anchor: Head | None, progress: Progress) -> CheckReport:
    problems = tuple(islice(_iter_problems(readers, anchor, progress), MOST_PROBLEMS))
    with snapshot(readers) as connection:
        commits = audit.head(connection).sequence
        pruned = _count_pruned(connection)
    return CheckReport(path, REVISION, commits, *pruned, anchor is not None, problems, len(problems) < MOST_PROBLEMS)


_PRUNED_COMMITS: Final = "SELECT count(DISTINCT sequence) FROM pruned"
_MARKERS: Final = """
    SELECT body FROM events WHERE kind = 'pruned' AND sequence IN (SELECT DISTINCT marker_sequence FROM pruned)
"""


def _count_pruned(connection: Connection) -> tuple[int, int, int]:
    """Commits that lost rows, versions and events that they lost. Of a file whose markers make no sense: none."""
    try:
        markers = [Pruned.from_body(json.loads(body)) for (body,) in connection.exec_driver_sql(_MARKERS)]
        versions, events = sum(each.versions for each in markers), sum(each.events for each in markers)
        return _scalar(connection, _PRUNED_COMMITS), versions, events
    except (DBAPIError, sqlite3.Error, LookupError, TypeError, ValueError):
        return 0, 0, 0


def _iter_problems(readers: Engine, anchor: Head | None, progress: Progress) -> Iterator[Problem]:
    progress("checking the pages of the file", 0, 0)
    for look in (_integrity_problems, _reference_problems, verify.schema_problems):
        try:
            with snapshot(readers) as connection:
                yield from look(connection)
        except (NotADatabaseError, ReadFailedError) as error:
            yield Problem("file", error.reason)
        except UnicodeDecodeError as error:
            yield Problem("file", str(error))
    yield from verify.iter_problems(readers, anchor, lambda done, in_all: progress("checking commits", done, in_all))


def _integrity_problems(connection: Connection) -> Iterator[Problem]:
    for (message,) in connection.exec_driver_sql("PRAGMA integrity_check"):
        if message != "ok":
            yield Problem("file", message)


def _reference_problems(connection: Connection) -> Iterator[Problem]:
    for table, row, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        where = f"table {table}" + (f", row {row}" if row is not None else "")
        yield Problem(where, f"it refers to a row of {parent} that is not there")


# current and upgrade


@dataclass(frozen=True, slots=True)
class RevisionReport:
    """The revision of a file's schema (None: it is empty), this release's, and whether they are the same."""

    path: Path
    revision: str | None
    head: str
    is_head: bool


def current(path: Path) -> RevisionReport:
    """The revision of the file's schema. A newer one than this release's is a `NewerSchemaError`."""
    with _explained(path):
        _refuse_missing(path)
        found = _find_revision(path)
    return RevisionReport(path, found, REVISION, found == REVISION)


@dataclass(frozen=True, slots=True)
class UpgradeReport:
    """An upgrade: from which revision (None: the file was empty) to which, and the backup that was made before."""

    path: Path
    found: str | None
    revision: str
    backup: Path | None


def upgrade(path: Path) -> UpgradeReport:
    """Bring the schema of the file to this release's revision, after a backup beside it; whole or not at all."""
    with _owning(path) as writer:
        upgraded = migrate.upgrade(writer, path)
        with writer.begin() as connection:
            recovery.recover(connection, _read_anchor(path), path)
    return UpgradeReport(path, upgraded.found, REVISION, upgraded.backup)


# backup


@dataclass(frozen=True, slots=True)
class BackupReport:
    """A backup. Where the copy has problems there is none: `target` was not made."""

    path: Path
    target: Path
    size_bytes: int
    commits: int
    problems: tuple[Problem, ...]


def backup(path: Path, target: Path, progress: Progress = silent) -> BackupReport:
    """Copy the file as of one moment to `target`, which must not exist, and check the copy.

    The copy is one file of its own, readable from read-only media. `target` appears whole or not at all. Raises
    `InvalidArgumentError` where it exists or cannot be written.
    """
    refuse_files_of(path, target, "target")
    anchor = _read_anchor(path)
    with _reading(path) as readers:
        _refuse_older(path)
        if os.path.lexists(target):
            raise _refused(target, "it exists already, and a backup overwrites nothing")
        with _partial(target) as partial:
            with snapshot(readers) as connection:
                _copy(connection, partial, progress)
            with _reading(partial) as copies:
                report = _check(partial, copies, anchor, progress)
            if not report.problems:
                _publish(partial, target)
            return BackupReport(path, target, _size_bytes(partial), report.commits, report.problems)


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A private file beside `target` to write to, gone at the end."""
    try:
        file, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    except OSError as error:
        raise _refused(target, error.strerror or str(error)) from error
    os.close(file)
    partial = Path(name)
    try:
        yield partial
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):
            _beside(partial, suffix).unlink(missing_ok=True)


def _refused(target: Path, reason: str) -> InvalidArgumentError:
    return InvalidArgumentError("target", f"cannot write {target}: {reason}")


def _copy(connection: Connection, partial: Path, progress: Progress) -> None:
    busy = 0

    def on_pages(status: int, remaining: int, in_all: int) -> None:
        nonlocal busy
        busy = 0 if status in (sqlite3.SQLITE_OK, sqlite3.SQLITE_DONE) else busy + 1
        if busy == _MOST_BUSY:
            # The driver would go on for ever, and hold its snapshot meanwhile.
            raise StorageError(f"{partial.parent} takes no locks (on a network file system?): use another folder")
        progress("copying pages", in_all - remaining, in_all)

    # Reading begins the transaction. Without one, each write of a server would begin the copy anew.
    audit.head(connection)
    source: Any = connection.connection.driver_connection
    with _explained(partial), closing(sqlite3.connect(partial, isolation_level=None, timeout=0)) as copy:
        source.backup(copy, pages=_BACKUP_PAGES, progress=on_pages)
        # One file, without a WAL beside it, and so one that can be read where nothing can be written.
        (mode,) = copy.execute("PRAGMA journal_mode = DELETE").fetchone()
        if mode != "delete":
            raise StorageError(f"the end of the copy could not be written to {partial.parent}: look at that disk")


def _publish(partial: Path, target: Path) -> None:
    """Give the copy its name, durably, unless something has that name by now."""
    swap.sync(partial)
    try:
        os.link(partial, target)
    except FileExistsError as error:
        raise _refused(target, "it exists already, and a backup overwrites nothing") from error
    swap.sync(target.parent)


def refuse_files_of(path: Path, output: Path, field: str) -> None:
    """Raise `InvalidArgumentError` where `output` is the database, by whatever name, or belongs to one beside it."""
    database = resolved(path)
    meant = resolved(output)
    for own in (database, *(Path(f"{database}{suffix}") for suffix in swap.BESIDE)):
        with suppress(OSError):
            if meant == own or meant.samefile(own):
                reason = f"{output} is {'the database itself' if own == database else 'a file of the database'}"
                raise InvalidArgumentError(field, f"{reason}, {path}: give another name")


# restore


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """A backup that was put in the place of `path`. Where the backup has problems nothing was changed.

    `revision`: the backup's; an older one was brought to this release's on the way. `aside`: the name that the file
    which was there before has now, with the files beside it; None where there was none.
    """

    path: Path
    backup: Path
    revision: str
    size_bytes: int
    commits: int
    aside: Path | None
    problems: tuple[Problem, ...]


def restore(backup: Path, path: Path, progress: Progress = silent) -> RestoreReport:
    """Put a copy of `backup`, once it was checked, in the place of the database at `path`, which nobody may have open.

    What is at `path` gets another name and is never deleted. Whatever happens, and whenever, either what was there can
    be opened as before or what was restored can be. Raises `InvalidArgumentError` where the two are the same file.
    """
    refuse_files_of(path, backup, "backup")
    _refuse_missing(backup, "name a copy that `dspex-persist db backup` has made")
    anchor = _read_anchor(backup)
    with _reading(backup) as readers, _taking_over(path) as (lock, made):
        revision = _find_revision(backup)
        if revision is None:
            raise NotADatabaseError(str(backup), "it is empty, and so no backup")
        with _partial(resolved(path)) as partial:
            with snapshot(readers) as connection:
                _copy(connection, partial, progress)
            if revision != REVISION:
                _upgrade_copy(partial)
            with _reading(partial) as copies:
                report = _check(partial, copies, anchor, progress)
                with snapshot(copies) as connection:
                    head = audit.head(connection)
            size = _size_bytes(partial)
            aside = None if report.problems else _replace(path, partial, head, lock, made)
    return RestoreReport(path, backup, revision, size, report.commits, aside, report.problems)


@contextmanager
def _taking_over(path: Path) -> Iterator[tuple[OwnershipLock, bool]]:
    """Own the file, whatever state it is in; whether it was made for that, which it is no more where that fails."""
    made = not os.path.lexists(path)
    with _explained(path):
        lock = OwnershipLock(path, create=True, replace=True)
    try:
        yield lock, made
    finally:
        if made and _size_bytes(path) == 0:
            path.unlink(missing_ok=True)
        lock.release()


def _upgrade_copy(copy: Path) -> None:
    with _explained(copy):
        writer = open_writer(copy)
        try:
            migrate.upgrade(writer, copy, is_copy=True)
            checkpoint(writer)
        finally:
            writer.dispose()


def _replace(path: Path, partial: Path, head: Head, lock: OwnershipLock, made: bool) -> Path | None:
    """Have `partial` take the place of the file; the name that the old one has now."""
    name = resolved(path)
    can_open = _can_open(path)
    lock.announce()
    if can_open:
        _empty_wal(name)
    try:
        aside = swap.take_place(partial, name, head, can_open=can_open)
    except OSError as error:
        raise StorageError(f"{error.filename or path}: {error.strerror or error}") from error
    if made:
        aside.unlink()
        return None
    return path.with_name(aside.name)


def _can_open(path: Path) -> bool:
    """Whether a server would start on the file as it is. It is only read for that: what is damaged stays as it is."""
    if not _size_bytes(path):
        return False
    anchor = _read_anchor(path)

    def is_foreign(connection: Connection) -> bool:
        if migrate.is_foreign(connection):
            return True
        recovery.recover(connection, anchor, path)
        return False

    try:
        refused = read_untouched(path, is_foreign)
    except (NotADatabaseError, ReadFailedError, LostCommitsError, ValueError):
        return False
    if refused:
        raise NotADatabaseError(str(path), "it is another program's database and stays as it is; give another --db")
    return True


def _empty_wal(path: Path) -> None:
    with _explained(path):
        writer = open_writer(path)
        try:
            if not checkpoint(writer):
                raise StorageError(f"another program has been reading {path} for long: end it, then repeat this")
        finally:
            writer.dispose()


# stats


@dataclass(frozen=True, slots=True)
class StoredTable:
    """What a table or an index takes. `rows`: of tables; `unused_bytes`: of its pages, where pages were measured."""

    name: str
    kind: str
    rows: int | None
    size_bytes: int
    unused_bytes: int | None


@dataclass(frozen=True, slots=True)
class Share:
    """The history of a session, or of one of its variables: its versions, and their contents in bytes."""

    session_id: str
    variable: str | None
    versions: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class StatsReport:
    """Where the bytes of a file are. `exact`: pages were measured, else lengths of values (without indexes)."""

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
    # What the versions refer to, less what is there.
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
    """Where the bytes are. Reads the whole file; sizes of histories are those of their contents, shared or not."""
    with _reading(path) as readers:
        _refuse_older(path)
        with snapshot(readers) as connection:
            return _stats(connection, path)


def _stats(connection: Connection, path: Path) -> StatsReport:
    tables = measure_pages(connection)
    exact = tables is not None
    version = _scalar(connection, "SELECT sqlite_version()")
    return StatsReport(
        path=path,
        revision=REVISION,
        file_bytes=_size_bytes(path),
        wal_bytes=_size_bytes(_beside(path, "-wal")),
        free_bytes=_scalar(connection, "PRAGMA freelist_count") * _scalar(connection, "PRAGMA page_size"),
        exact=exact,
        tables=tables if tables is not None else measure_lengths(connection),
        **{name: _scalar(connection, query) for name, query in _COUNTS.items()},
        largest_sessions=_shares(connection, _LARGEST_SESSIONS),
        largest_variables=_shares(connection, _LARGEST_VARIABLES),
        sqlite_version=version,
        warning="; ".join(filter(None, (_wal_warning(path), sqlite_warning(version)))) or None,
    )


def _wal_warning(path: Path) -> str | None:
    size_bytes = _size_bytes(_beside(path, "-wal"))
    return f"the WAL has {size_bytes:,} bytes: {guard.WAL_IS_HELD}" if size_bytes > guard.LARGE_WAL_BYTES else None


def sqlite_warning(version: str) -> str | None:
    """What to know about this version of SQLite."""
    if tuple(int(part) for part in version.split(".")) >= _SOUND_SQLITE:
        return None
    return (
        f"SQLite {version} has the WAL-reset bug (mended in 3.51.3): two connections that write or checkpoint can lose "
        "commits. dspex-persist writes and checkpoints through one; let no other program write to the file, or run a "
        "Python that is linked to a newer SQLite"
    )


def _scalar(connection: Connection, statement: str) -> Any:
    return connection.exec_driver_sql(statement).scalar_one()


def _shares(connection: Connection, statement: str) -> tuple[Share, ...]:
    return tuple(Share(*row) for row in connection.exec_driver_sql(statement))


def _objects(connection: Connection) -> list[tuple[str, str, int | None]]:
    """Every table and index: name, kind, rows of a table."""
    query = "SELECT name, type FROM sqlite_schema WHERE type IN ('table', 'index') ORDER BY type DESC, name"
    return [
        (name, kind, _scalar(connection, f'SELECT count(*) FROM "{name}"') if kind == "table" else None)
        for name, kind in connection.exec_driver_sql(query).fetchall()
    ]


def measure_pages(connection: Connection) -> tuple[StoredTable, ...] | None:
    """What tables and indexes take, page by page; None where this SQLite cannot tell (no dbstat)."""
    query = "SELECT name, pgsize, unused FROM dbstat WHERE aggregate = TRUE"
    try:
        sizes = {name: (size, unused) for name, size, unused in connection.exec_driver_sql(query)}
    except DBAPIError as error:
        if "no such table: dbstat" in str(error.orig):
            return None
        raise
    found = [StoredTable(*known, *sizes.get(known[0], (0, 0))) for known in _objects(connection)]
    return tuple(sorted(found, key=lambda table: -table.size_bytes))


def measure_lengths(connection: Connection) -> tuple[StoredTable, ...]:
    """What the values in the tables take, without pages and indexes."""
    found = []
    for name, kind, rows in _objects(connection):
        if kind != "table":
            continue
        columns = [row[1] for row in connection.exec_driver_sql(f'PRAGMA table_info("{name}")')]
        lengths = " + ".join(f'ifnull(length(CAST("{column}" AS BLOB)), 0)' for column in columns)
        size = _scalar(connection, f'SELECT ifnull(sum({lengths}), 0) FROM "{name}"')
        found.append(StoredTable(name, kind, rows, size, None))
    return tuple(sorted(found, key=lambda table: -table.size_bytes))


# audit


def open_audit(path: Path, *, reveal: bool = False) -> StoredAudit:
    """The history in a file, to be asked: read only, beside a server that writes to it. Close it when you are done."""
    with _explained(path), ExitStack() as undo:
        _refuse_missing(path)
        readers = open_readers(path, size=1)
        undo.callback(readers.dispose)
        _refuse_older(path)
        undo.pop_all()
    return StoredAudit(readers, reveal=reveal, let_go=readers.dispose)


@contextmanager
def open_recording(
    path: Path, session_id: str, *, started: int | None = None, reveal: bool = False
) -> Iterator[tuple[Header, Iterator[RecordedCommit]]]:
    """A session's log in a file, read as it is taken: read only, beside a server that writes to it."""
    with _reading(path) as readers:
        _refuse_older(path)
        yield recordings.read_session(readers, session_id, started=started, reveal=reveal)


# prune


@dataclass(frozen=True, slots=True)
class PrunedReport:
    """What was pruned, or, where it was not `confirmed`, would be. `free_bytes`: what a vacuum would give back."""

    path: Path
    confirmed: bool
    sessions: int
    versions: int
    events: int
    markers: int
    free_bytes: int
    duration_s: float


@dataclass(eq=False)
class PruneInUseError(DatabaseInUseError):
    """Another process owns the database that is to be pruned."""

    def __str__(self) -> str:
        holder = f"process {self.pid}" if self.pid else "another process"
        return (
            f"{self.path} is in use by {holder}: stop that server to prune it now, or have the server do it: "
            "with --target ADDRESS, or by itself with the settings retention_keep_versions, retention_age_s, "
            "retention_ended_sessions_s"
        )


def prune(path: Path, policy: PrunePolicy, *, confirm: bool, progress: Progress = silent) -> PrunedReport:
    """Delete the history that `policy` lets go, as the owner of the file; without `confirm` it is only read.

    Raises `InvalidArgumentError` for a policy that says nothing, `NotInHistoryError` for the id of a session that never
    was.
    """
    started = time.monotonic()
    with _reading(path) as readers:
        _refuse_older(path)
        report = None if confirm else pruning.run(readers, policy, None, progress)
    if report is None:
        report = _prune(path, policy, progress)
    with _reading(path) as readers, snapshot(readers) as connection:
        free = _scalar(connection, "PRAGMA freelist_count") * _scalar(connection, "PRAGMA page_size")
    counts = (report.sessions, report.versions, report.events, report.markers)
    return PrunedReport(path, confirm, *counts, free, time.monotonic() - started)


def _prune(path: Path, policy: PrunePolicy, progress: Progress) -> PruneReport:
    try:
        groups = open_groups(path)
    except DatabaseInUseError as error:
        raise PruneInUseError(error.path, error.pid) from None
    try:

        def write(jobs: list[Job]) -> None:
            for outcome in groups.write_group(jobs):
                if outcome.error is not None:
                    raise outcome.error

        report = pruning.run(groups.log.readers, policy, write, progress)
    except OutcomeUnknownError:
        groups.abandon()
        raise
    except BaseException:
        groups.close()
        raise
    groups.close()
    return report


# vacuum


@dataclass(frozen=True, slots=True)
class VacuumReport:
    """The size of the file with its WAL, before and after, and how long that took."""

    path: Path
    before_bytes: int
    after_bytes: int
    duration_s: float


def vacuum(path: Path, progress: Progress = silent) -> VacuumReport:
    """Write the file anew without its free pages. Needs as much free disk again as the file has, twice over."""
    with _explained(path):
        _refuse_missing(path)
        _refuse_older(path)
        before = _size_bytes(path) + _size_bytes(_beside(path, "-wal"))
    started = time.monotonic()
    with _owning(path) as writer:
        progress("rewriting the file", 0, 0)
        # Through the raw connection: VACUUM cannot run inside a transaction, and SQLAlchemy always begins one.
        raw = writer.raw_connection()
        try:
            raw.cursor().execute("VACUUM")
        finally:
            raw.close()
    after = _size_bytes(path) + _size_bytes(_beside(path, "-wal"))
    return VacuumReport(path, before, after, time.monotonic() - started)
