"""Old files are upgraded with everything in them, newer and foreign ones refused, failing upgrades leave no trace."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import NewerSchemaError, NotADatabaseError, UpgradeError
from dspex_persist.state.store import maintenance, migrate, schema
from dspex_persist.state.store.maintenance import checks, opening, revisions
from dspex_persist.state.store.session_store import open_groups
from tests.assets.make_database import describe
from tests.deadline import within

ROOT = Path(__file__).parents[2]
ASSETS = sorted((ROOT / "tests" / "assets").glob("*.db"))


def open_store(path: Path) -> object:
    store = open_groups(path)
    store.close()
    return store


OPENINGS: list[Callable[[Path], object]] = [open_store, maintenance.upgrade]


def schema_of(path: Path) -> set[tuple[str, str, str]]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT type, name, ifnull(sql, '') FROM sqlite_schema").fetchall()
    return {(kind, name, " ".join(sql.split())) for kind, name, sql in rows}


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return sorted(connection.iterdump())


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A copy of the newest released database."""
    path = tmp_path / "released.db"
    shutil.copy(ASSETS[-1], path)
    return path


# Every released schema


def test_there_is_a_database_of_every_released_schema() -> None:
    assert {asset.stem for asset in ASSETS} == set(migrate.known_revisions())


@pytest.mark.parametrize("asset", ASSETS, ids=lambda asset: asset.stem)
def test_an_asset_is_of_its_revision_and_has_no_side_files(asset: Path) -> None:
    with closing(sqlite3.connect(f"file:{asset}?mode=ro&immutable=1", uri=True)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(asset.stem,)]
    files = {path.name for path in asset.parent.iterdir() if path.name.startswith(asset.stem)}
    assert files == {asset.name, f"{asset.stem}.json"}


@pytest.mark.parametrize("asset", ASSETS, ids=lambda asset: asset.stem)
@pytest.mark.parametrize("opening", OPENINGS)
def test_an_old_file_opens_verifies_and_serves_its_contents(
    asset: Path, tmp_path: Path, opening: Callable[[Path], object]
) -> None:
    path = tmp_path / "old.db"
    fresh = tmp_path / "fresh.db"
    shutil.copy(asset, path)
    opening(path)
    report = maintenance.check(path)
    assert (report.problems, report.revision) == ((), schema.REVISION)
    assert describe(path) == json.loads(asset.with_suffix(".json").read_text(encoding="utf-8"))
    open_store(fresh)
    assert schema_of(path) == schema_of(fresh)


@pytest.mark.parametrize("asset", ASSETS, ids=lambda asset: asset.stem)
def test_an_old_file_can_be_written_on(asset: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    shutil.copy(asset, path)
    with EmbeddedState(path) as provider:
        first = provider.head_sequence
        version = provider.get_variable("again", "y").version
        assert provider.set_variable("again", "y", {"written": "on"}) == version + 1
        provider.register_variable("again", "z", "integer", 1)
        provider.initialize_session("new")
        provider.delete_variable("main", "document")
        assert provider.head_sequence == first + 4
    assert maintenance.check(path).problems == ()


# Alembic's own command line, in a checkout


@pytest.mark.parametrize("named_by", ["argument", "environment"])
def test_alembic_upgrades_from_the_checkout(tmp_path: Path, named_by: str) -> None:
    path, fresh = tmp_path / "made by alembic.db", tmp_path / "fresh.db"
    arguments = ["-x", f"db={path}"] if named_by == "argument" else []
    environment = {**os.environ, "DSPEX_PERSIST_DB": str(path if named_by == "environment" else tmp_path / "wrong.db")}
    command = [sys.executable, "-m", "alembic", *arguments, "upgrade", "head"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=within(60))
    assert not (tmp_path / "wrong.db").exists()
    open_store(fresh)
    assert schema_of(path) == schema_of(fresh)
    with EmbeddedState(path) as provider:
        provider.initialize_session("s")
    assert maintenance.check(path).problems == ()


# Newer and foreign files


@pytest.mark.parametrize("opening", OPENINGS)
def test_a_newer_file_is_refused_by_name_with_nothing_changed(
    released: Path, opening: Callable[[Path], object]
) -> None:
    with closing(sqlite3.connect(released, isolation_level=None)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0999_of_tomorrow'")
    before = released.read_bytes()
    with pytest.raises(NewerSchemaError) as refused:
        opening(released)
    assert str(released) in str(refused.value)
    assert "0999_of_tomorrow" in str(refused.value)
    assert schema.REVISION in str(refused.value)
    assert released.read_bytes() == before
    assert not list(released.parent.glob("*backup*"))


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize(
    "script",
    [
        "CREATE TABLE sessions (theirs TEXT); INSERT INTO sessions VALUES ('precious')",
        "CREATE VIEW precious AS SELECT 1",
    ],
    ids=["a table", "a view"],
)
def test_another_programs_database_is_refused(tmp_path: Path, opening: Callable[[Path], object], script: str) -> None:
    path = tmp_path / "theirs.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    before = dump(path)
    with pytest.raises(NotADatabaseError, match="another program's database"):
        opening(path)
    assert dump(path) == before


# Planted upgrades from one revision to the next: the real ones may do anything

_PLANTED = '''"""Planted."""

from alembic import op

revision = "{revision}"
down_revision = "{before}"


def upgrade() -> None:
    op.execute("CREATE TABLE planted (x INTEGER) STRICT")
    op.execute("INSERT INTO planted VALUES (1)")
    op.execute("DROP INDEX sessions_by_id")
    {end}
'''
ENDS = {
    "a fault of the script": 'raise RuntimeError("planted")',
    "an error of SQLite": 'op.execute("INSERT INTO nowhere VALUES (1)")',
    "a broken reference": "op.execute(\"INSERT INTO dependencies VALUES (99, 999, 'v', 'w', '', 1, NULL)\")",
}


def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> str:
    """Add one more migration to this release, which ends with the statement `end`; return its revision."""
    folder = tmp_path / "migrations"
    shutil.copytree(ROOT / "migrations", folder, ignore=shutil.ignore_patterns("__pycache__"))
    script = _PLANTED.format(revision="9001", before=schema.REVISION, end=end)
    (folder / "versions" / "9001_planted.py").write_text(script, encoding="utf-8")
    monkeypatch.setattr(migrate, "migrations_path", lambda: folder)
    monkeypatch.setattr(migrate, "REVISION", "9001")
    for each in (checks, opening, revisions):
        monkeypatch.setattr(each, "REVISION", "9001")
    return "9001"


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("opening", OPENINGS)
def test_a_failing_upgrade_leaves_the_file_as_it_was(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, opening: Callable[[Path], object]
) -> None:
    before, described = dump(released), describe(released)
    plant(tmp_path, monkeypatch, end)
    with pytest.raises(UpgradeError, match="the file is unchanged"):
        opening(released)
    (backup,) = tmp_path.glob("released.db.backup-*")
    assert dump(released) == before, "neither a table nor a row is left, and no index is missing"
    assert dump(backup) == before
    assert backup.name.startswith(f"released.db.backup-{schema.REVISION}-")
    assert backup.stat().st_mode & 0o777 == 0o600
    monkeypatch.undo()
    for path in (released, backup):
        assert maintenance.check(path).problems == ()
        assert describe(path) == described


def test_an_upgrade_makes_and_reports_a_backup(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dump(released)
    revision = plant(tmp_path, monkeypatch, "pass")
    assert not maintenance.current(released).is_head
    report = maintenance.upgrade(released)
    (backup,) = tmp_path.glob("released.db.backup-*")
    assert (report.found, report.revision, report.backup) == (schema.REVISION, revision, backup)
    assert dump(backup) == before
    assert ("table", "planted") in {row[:2] for row in schema_of(released)}
    assert maintenance.current(released).is_head
    again = maintenance.upgrade(released)
    assert (again.found, again.backup) == (revision, None)
    assert list(tmp_path.glob("released.db.backup-*")) == [backup]
