"""A check by several processes reports the same as one by a single process, even if helpers end early."""

import random
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from dspex_persist.state.anchor import parse
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.store import maintenance, verify
from dspex_persist.state.store.engine import open_readers
from dspex_persist.state.store.schema import APPEND_ONLY
from dspex_persist.state.store.verify import sharing
from tests.databases import copy_database


@pytest.fixture
def path(filled: Path, tmp_path: Path) -> Path:
    """A copy of it, with its anchor, to be damaged."""
    return copy_database(filled, tmp_path / "copy.db")


def problems_of(path: Path, jobs: int, most: int | None = None) -> list[str]:
    readers = open_readers(path, size=1)
    anchor = parse(Path(f"{path}.anchor").read_bytes())
    try:
        with verify.checking(readers, anchor, jobs=jobs) as problems:
            return list(map(str, islice(problems, most)))
    finally:
        readers.dispose()


def damage(path: Path, randomly: random.Random) -> None:
    """Change some rows of the log, and of the tables of what is current."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for table in APPEND_ONLY:
            for action in ("update", "delete"):
                connection.execute(f"DROP TRIGGER {table}_no_{action}")
        (last,) = connection.execute("SELECT max(sequence) FROM commits").fetchone()
        for statement in (
            "UPDATE commits SET actor = 'x' WHERE sequence = ?",
            "UPDATE commits SET hash = randomblob(32) WHERE sequence = ?",
            "DELETE FROM commits WHERE sequence = ?",
            "UPDATE versions SET value = '{' WHERE sequence = ?",
            "UPDATE versions SET metadata = CAST(x'ff' AS TEXT) WHERE sequence = ?",
            "UPDATE versions SET version = version + 50 WHERE sequence = ?",
            "UPDATE events SET body = body || ' ' WHERE sequence = ?",
            "UPDATE events SET sequence = 1000 WHERE sequence = ?",
        ):
            if randomly.random() < 0.7:
                connection.execute(statement, [randomly.randint(1, last)])
        connection.execute("UPDATE variables SET type = 'map' WHERE variable_key % 7 = 1")
        connection.execute("UPDATE blobs SET content = x'00' WHERE blob_key % 2 = 1")
        connection.execute("DELETE FROM metadata_entries WHERE sequence % 5 = 1")


@pytest.mark.usefixtures("short_ranges")
@pytest.mark.parametrize("seed", range(6))
def test_more_processes_find_the_same_in_the_same_order(path: Path, helpers: list[int], seed: int) -> None:
    print(f"seed {seed}")
    damage(path, random.Random(seed))
    alone = problems_of(path, jobs=1)
    assert len(alone) > 5
    assert helpers == []
    assert problems_of(path, jobs=2 + seed % 2) == alone
    assert len(helpers) == 1 + seed % 2


@pytest.mark.usefixtures("short_ranges")
def test_progress_is_reported_on_the_thread_of_the_caller(path: Path, helpers: list[int]) -> None:
    reports: list[tuple[str, int, int]] = []
    threads = set[int]()

    def progress(step: str, done: int, in_all: int) -> None:
        reports.append((step, done, in_all))
        threads.add(threading.get_ident())

    report = maintenance.check(path, progress, jobs=3)
    assert report.problems == ()
    assert threads == {threading.get_ident()}
    assert reports[0] == ("checking the pages of the file", 0, 0)
    assert reports[-1] == ("checking commits", report.commits, report.commits)
    assert reports[1:] == sorted(reports[1:])
    assert len(helpers) == 2


@pytest.mark.usefixtures("short_ranges")
@pytest.mark.parametrize("module", ["tests.store.quitting", "tests.store.no_such_module"])
def test_a_helper_that_ends_changes_nothing(
    path: Path, helpers: list[int], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    damage(path, random.Random(1))
    alone = problems_of(path, jobs=1)
    monkeypatch.setattr(sharing, "_HELPING", module)
    assert problems_of(path, jobs=4) == alone
    assert len(helpers) == 3


def test_a_helper_that_cannot_be_started_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(path, random.Random(2))
    alone = problems_of(path, jobs=1)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert problems_of(path, jobs=2) == alone
    monkeypatch.setattr(sys, "executable", "")
    assert problems_of(path, jobs=2) == alone


def test_nobody_waits_for_a_helper_that_does_not_get_ready(
    path: Path, helpers: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(path, random.Random(5))
    alone = problems_of(path, jobs=1)
    program = tmp_path / "embedding"
    program.write_text("#!/bin/sh\nsleep 1000\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    assert problems_of(path, jobs=2) == alone
    assert len(helpers) == 1


def test_a_helper_does_not_check_another_file_of_that_name(
    path: Path, helpers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(path, random.Random(3))
    alone = problems_of(path, jobs=1)
    monkeypatch.setattr(sharing, "identity_of", lambda _found: (0, 0))
    assert problems_of(path, jobs=2) == alone
    assert len(helpers) == 1


def test_a_check_that_stops_early_ends_its_helpers(path: Path, helpers: list[int]) -> None:
    damage(path, random.Random(4))
    assert problems_of(path, jobs=2, most=3) == problems_of(path, jobs=1)[:3]
    assert len(helpers) == 1


def test_ctrl_c_ends_the_helpers(path: Path, helpers: list[int]) -> None:
    def progress(step: str, _done: int, _in_all: int) -> None:
        if step == "checking commits":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        maintenance.check(path, progress, jobs=3)
    assert len(helpers) == 2


def test_a_check_by_helpers_leaves_an_open_engine_its_locks(path: Path, helpers: list[int]) -> None:
    with EmbeddedState(path) as provider:
        provider.set_variable("again", "y", {"n": 1})
        assert maintenance.check(path, jobs=2).problems == ()
        provider.set_variable("again", "y", {"n": 2})
        owning = f"from dspex_persist import connect; connect({str(path)!r})"
        refused = subprocess.run([sys.executable, "-c", owning], capture_output=True, text=True, check=False)
        assert "DatabaseInUseError" in refused.stderr
        provider.set_variable("again", "y", {"n": 3})
        assert maintenance.check(path, jobs=2).problems == ()
    assert maintenance.check(path, jobs=2).problems == ()
    assert len(helpers) == 3


@pytest.mark.parametrize("jobs", [0, -1, 65, "2", 1.5, True])
def test_a_number_of_processes_that_cannot_be_is_refused(path: Path, jobs: Any) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        maintenance.check(path, jobs=jobs)
    assert refused.value.field == "jobs"


def test_a_small_file_is_checked_by_one_process(
    path: Path, helpers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    size_bytes = sharing.size_of(path)
    assert sharing.jobs_for(size_bytes) == 1
    assert maintenance.check(path).problems == ()
    assert helpers == []
    monkeypatch.setattr(sharing, "_SMALL_BYTES", 0)
    assert 1 <= sharing.jobs_for(size_bytes) <= 4
