"""Upgrade a file to this release's schema after backing it up, and refuse files of newer releases."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from sqlalchemy import Connection, Engine, StaticPool, create_engine, inspect, text

from dspex_persist.clock import now
from dspex_persist.state.errors import NewerSchemaError, NotADatabaseError, UpgradeError
from dspex_persist.state.store.engine import driver_of
from dspex_persist.state.store.schema import REVISION

_OURS = frozenset({"sessions", "variables", "versions", "commits"})
"""Tables that every revision of the schema has."""
_MOST_NAMED = 5
_SCRIPT: Final = Path(__file__).with_name("schema.sql")
"""Makes an empty file what the migrations make of it. `python -m tests.assets.make_schema` writes it."""
_BETWEEN: Final = ";\n\n"


@dataclass(frozen=True, slots=True)
class Upgrade:
    """The result of an upgrade: the revision that the file had (None if it was empty), and the backup, if any."""

    revision: str | None
    backup: Path | None = None


def migrations_path() -> Path:
    """Return the folder of the migrations: in the package if installed from a wheel, else at the top of the clone."""
    package = Path(__file__).resolve().parents[2]
    installed = package / "_migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def current_revision(connection: Connection) -> str | None:
    """Return the file's revision; None for an empty file.

    Raises:
        NotADatabaseError: The file is another program's database.
    """
    tables = _tables_of(connection)
    if are_ours(tables):
        row = connection.execute(text("SELECT version_num FROM alembic_version")).first()
        return row[0] if row else None
    if tables:
        more = ", ..." if len(tables) > _MOST_NAMED else ""
        named = ", ".join(sorted(tables)[:_MOST_NAMED])
        raise NotADatabaseError(_path_of(connection), f"it is another program's database (tables: {named}{more})")
    return None


def is_foreign(connection: Connection) -> bool:
    """Whether the file is another program's database."""
    tables = _tables_of(connection)
    return bool(tables) and not are_ours(tables)


def _tables_of(connection: Connection) -> list[str]:
    """Return the names of its tables and views."""
    inspector = inspect(connection)
    return [*inspector.get_table_names(), *inspector.get_view_names()]


def are_ours(tables: Collection[str]) -> bool:
    """Whether these are the tables of a database of this project."""
    # Other programs that use alembic have this table, too.
    return "alembic_version" in tables and _OURS.issubset(tables)


def upgrade(writer: Engine, path: Path, *, is_copy: bool = False) -> Upgrade:
    """Upgrade the file to `REVISION`. If that fails, the file stays as it was, and the backup stays next to it.

    Args:
        writer: The engine with the writing connection.
        path: The file.
        is_copy: The file is a copy of a backup, so no further backup is made.

    Raises:
        NewerSchemaError: A newer release wrote the file.
        UpgradeError: A migration failed.
        NotADatabaseError: The file is another program's database.
    """
    backup = None
    with writer.connect() as connection:
        with connection.begin():
            revision = current_revision(connection)
        if revision == REVISION:
            return Upgrade(revision)
        if revision is None:
            _make_tables(connection)
        else:
            refuse_newer(path, revision)
            backup = None if is_copy else backup_before_upgrade(connection, path, revision)
            _run_migrations(connection)
    return Upgrade(revision, backup)


def backup_before_upgrade(connection: Connection, path: Path, revision: str) -> Path:
    """Copy the database to a file next to it, named after its revision and the time; return its path."""
    target = path.with_name(f"{path.name}.backup-{revision}-{now():%Y%m%dT%H%M%S.%f}")
    # Created first to set its mode, which SQLite keeps.
    target.touch(mode=0o600, exist_ok=False)
    quoted = str(target).replace("'", "''")
    driver_of(connection).execute(f"VACUUM INTO '{quoted}'")
    return target


def known_revisions() -> list[str]:
    """Return all revisions that this release knows, newest first."""
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(migrations_path()))
    return [script.revision for script in scripts.walk_revisions()]


def refuse_newer(path: Path, revision: str) -> None:
    """Raise `NewerSchemaError` unless this release knows the revision."""
    if revision != REVISION and revision not in known_revisions():
        raise NewerSchemaError(str(path), revision, REVISION)


class Part(NamedTuple):
    """A trigger, a view or an index of a schema. `table`: the table that it belongs to; for a view its own name."""

    kind: str
    name: str
    table: str


def parts_of(connection: Connection) -> Mapping[Part, str]:
    """Return the file's triggers, views and indexes with the SQL that creates each."""
    rows = connection.exec_driver_sql(
        "SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE type != 'table' AND sql IS NOT NULL"
    )
    return {Part(kind, name, table): " ".join(sql.split()) for kind, name, table, sql in rows}


def migrated() -> Engine:
    """Return a database in memory that the migrations have made. Dispose it at the end."""
    memory = create_engine("sqlite://", poolclass=StaticPool)
    with memory.connect() as connection:
        _run_migrations(connection)
    return memory


@cache
def made_parts() -> Mapping[Part, str]:
    """Return the parts that a file of `REVISION` has, from one that is made in memory as empty files are."""
    memory = create_engine("sqlite://", poolclass=StaticPool)
    try:
        with memory.connect() as connection:
            _make_tables(connection)
            return parts_of(connection)
    finally:
        memory.dispose()


def script_of(connection: Connection) -> str:
    """Return the statements that create what a file has which the migrations have just made, and its revision."""
    rows = connection.exec_driver_sql("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY rowid")
    statements = [str(sql) for (sql,) in rows]
    revision = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    return _BETWEEN.join([f"-- {revision}", *statements, f"INSERT INTO alembic_version VALUES ('{revision}')", ""])


def _make_tables(connection: Connection) -> None:
    """Make the tables of an empty file, with what the migrations make: that takes a tenth of the time."""
    head, *statements, _ = _SCRIPT.read_text(encoding="utf-8").split(_BETWEEN)
    if head != f"-- {REVISION}":
        # Written for another revision, while somebody develops this one.
        _run_migrations(connection)
        return
    try:
        with connection.begin():
            for statement in statements:
                connection.exec_driver_sql(statement)
    except Exception as error:
        raise UpgradeError(_path_of(connection), REVISION, str(error)) from error


def _run_migrations(connection: Connection) -> None:
    # Imported here, because starting with a current file, the usual case, does not need it.
    from alembic import command
    from alembic.config import Config

    cursor = connection.connection.cursor()
    # With foreign keys on, rebuilding a table with alembic would delete the rows that refer to it.
    cursor.execute("PRAGMA foreign_keys = OFF")
    try:
        config = Config()
        config.set_main_option("script_location", str(migrations_path()).replace("%", "%%"))
        config.attributes["connection"] = connection
        with connection.begin():
            command.upgrade(config, "head")
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
            if broken:
                raise UpgradeError(_path_of(connection), REVISION, f"it would break foreign keys: {broken[:3]}")
    except UpgradeError:
        raise
    except Exception as error:
        # A migration can fail with any exception; its transaction has been rolled back.
        raise UpgradeError(_path_of(connection), REVISION, str(error)) from error
    finally:
        cursor.execute("PRAGMA foreign_keys = ON")


def _path_of(connection: Connection) -> str:
    return str(connection.exec_driver_sql("PRAGMA database_list").fetchall()[0][2])
