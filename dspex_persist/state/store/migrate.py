"""Bringing a file to this release's revision, after a backup beside it; refusing newer files."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection, Engine, StaticPool, create_engine, inspect, text

from dspex_persist.clock import now
from dspex_persist.state.errors import NewerSchemaError, NotADatabaseError, UpgradeError
from dspex_persist.state.store.schema import REVISION

_OURS = frozenset({"sessions", "variables", "versions", "commits"})
"""What every revision of the schema has."""
_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class Upgrade:
    """The revision that a file had (None: it was empty), and the backup that was made if it had an older one."""

    found: str | None
    backup: Path | None = None


def migrations_path() -> Path:
    """Where the migrations are: in the wheel beside the code, in a checkout at the top."""
    package = Path(__file__).resolve().parents[2]
    installed = package / "_migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def current_revision(connection: Connection) -> str | None:
    """The file's revision; None in an empty one."""
    tables = _tables_of(connection)
    if _are_ours(tables):
        row = connection.execute(text("SELECT version_num FROM alembic_version")).first()
        return row[0] if row else None
    if tables:
        more = ", ..." if len(tables) > _MOST_NAMED else ""
        named = ", ".join(sorted(tables)[:_MOST_NAMED])
        raise NotADatabaseError(_path_of(connection), f"it is another program's database (tables: {named}{more})")
    return None


def is_foreign(connection: Connection) -> bool:
    """Whether it is another program's database."""
    tables = _tables_of(connection)
    return bool(tables) and not _are_ours(tables)


def _tables_of(connection: Connection) -> list[str]:
    """The names of its tables, views included: nobody makes one in a file that is for us."""
    inspector = inspect(connection)
    return [*inspector.get_table_names(), *inspector.get_view_names()]


def _are_ours(tables: Collection[str]) -> bool:
    # Others keep their revision in a table of that name, too.
    return "alembic_version" in tables and _OURS.issubset(tables)


def upgrade(writer: Engine, path: Path, *, is_copy: bool = False) -> Upgrade:
    """Bring the file to `REVISION`. A failing upgrade leaves the file as it was, and the backup beside it.

    `is_copy`: it is one of a backup, so that none is made.
    """
    backup = None
    with writer.connect() as connection:
        with connection.begin():
            found = current_revision(connection)
        if found == REVISION:
            return Upgrade(found)
        if found is not None:
            refuse_newer(path, found)
            backup = None if is_copy else backup_before_upgrade(connection, path, found)
        _run_migrations(connection)
    return Upgrade(found, backup)


def backup_before_upgrade(connection: Connection, path: Path, revision: str) -> Path:
    """A copy of the database beside it, named after its revision and the time."""
    target = path.with_name(f"{path.name}.backup-{revision}-{now():%Y%m%dT%H%M%S.%f}")
    # Made first, for its mode: SQLite fills an empty file as it is.
    target.touch(mode=0o600, exist_ok=False)
    quoted = str(target).replace("'", "''")
    connection.connection.cursor().execute(f"VACUUM INTO '{quoted}'")
    return target


def known_revisions() -> list[str]:
    """Every revision that this release knows, newest first."""
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(migrations_path()))
    return [script.revision for script in scripts.walk_revisions()]


def refuse_newer(path: Path, found: str) -> None:
    """Raise `NewerSchemaError` unless this release knows the revision."""
    if found != REVISION and found not in known_revisions():
        raise NewerSchemaError(str(path), found, REVISION)


class Part(NamedTuple):
    """A trigger, a view or an index of a schema. `table`: the one that it belongs to; a view's own name."""

    kind: str
    name: str
    table: str


def parts_of(connection: Connection) -> Mapping[Part, str]:
    """The file's parts, and the SQL that makes each of them."""
    rows = connection.exec_driver_sql(
        "SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE type != 'table' AND sql IS NOT NULL"
    )
    return {Part(kind, name, table): " ".join(sql.split()) for kind, name, table, sql in rows}


@cache
def made_parts() -> Mapping[Part, str]:
    """Those of a file of `REVISION`: the migrations make one in memory."""
    memory = create_engine("sqlite://", poolclass=StaticPool)
    try:
        with memory.connect() as connection:
            _run_migrations(connection)
            return parts_of(connection)
    finally:
        memory.dispose()


def _run_migrations(connection: Connection) -> None:
    # Imported here: a file that is up to date, the usual case, need not pay for it at start.
    from alembic import command
    from alembic.config import Config

    cursor = connection.connection.cursor()
    # With foreign keys on, alembic's way to rebuild a table deletes the rows of the tables that point to it.
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
        # A migration is a script and can fail in any way; its transaction has been rolled back.
        raise UpgradeError(_path_of(connection), REVISION, str(error)) from error
    finally:
        cursor.execute("PRAGMA foreign_keys = ON")


def _path_of(connection: Connection) -> str:
    return str(connection.exec_driver_sql("PRAGMA database_list").fetchall()[0][2])
