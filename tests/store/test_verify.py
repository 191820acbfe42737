"""The check of a whole log: sound files pass, and every change of one is found, with its place."""

import json
import random
import shutil
import sqlite3
import threading
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine

from dspex_persist.state import commands as c
from dspex_persist.state.anchor import Head, parse
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.groups import Job
from dspex_persist.state.model import ChangeKind, EventKind, ExecutionStatus, Origin, Value
from dspex_persist.state.store import log_reader, maintenance, verify
from dspex_persist.state.store.chain import (
    GENESIS,
    commit_text,
    event_text,
    kept_residue,
    link,
    residue,
    residue_entry,
    version_text,
)
from dspex_persist.state.store.engine import open_readers, snapshot
from dspex_persist.state.store.schema import APPEND_ONLY
from dspex_persist.state.store.schema import metadata as tables
from dspex_persist.state.store.session_store import open_groups
from dspex_persist.state.store.variables import KINDS
from dspex_persist.state.store.verify import (
    Problem,
    contents,
    documents,
    live,
    lm_calls,
    metadata,
    outcomes,
    pruned,
    sessions,
)
from dspex_persist.state.store.verify import log as commits
from tests.databases import copy_database

# Columns that do not follow from the log: a key that nothing refers to, an expiry that every touch moves.
_UNTOLD = {("dependencies", "dependency_key"), ("sessions", "expires_at")}
LOG_COLUMNS = [(name, column.name) for name in APPEND_ONLY for column in tables.tables[name].columns]
STATE_COLUMNS = [
    (name, column.name)
    for name in ("sessions", "variables", "dependencies", "executions", "tools", "rules", "variable_constraints")
    for column in tables.tables[name].columns
    if (name, column.name) not in _UNTOLD
]


@pytest.fixture
def path(filled: Path, tmp_path: Path) -> Path:
    """A copy of it, with its anchor, to tamper with."""
    return copy_database(filled, tmp_path / "copy.db")


def problems_of(path: Path, anchor: Head | None = None) -> list[Problem]:
    readers = open_readers(path, size=1)
    try:
        return list(verify.iter_problems(readers, anchor))
    finally:
        readers.dispose()


def anchor_of(path: Path) -> Head:
    head = parse(Path(f"{path}.anchor").read_bytes())
    assert head is not None
    return head


class Tamperer:
    """Changes a file with sqlite3, without what would refuse that: triggers, uniqueness, references."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute("PRAGMA synchronous = OFF")
        for table in APPEND_ONLY:
            for action in ("update", "delete"):
                self.connection.execute(f"DROP TRIGGER {table}_no_{action}")
        self.connection.execute("DROP INDEX sessions_live")
        self.connection.execute("DROP INDEX variables_live")
        self._readers = open_readers(path, size=1)

    def __enter__(self) -> "Tamperer":
        return self

    def __exit__(self, *_: object) -> None:
        # The one that can write is closed last, and checkpoints the WAL.
        self._readers.dispose()
        self.connection.close()

    def run(self, statement: str, *parameters: object) -> None:
        """Change something, which must be exactly one row."""
        changed = self.connection.execute(statement, parameters).rowcount
        assert changed == 1, f"{changed} rows: {statement}"

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Return all rows, without generated columns."""
        names = [column.name for column in tables.tables[table].columns]
        return [dict(zip(names, row, strict=True)) for row in self._select(names, table)]

    def _select(self, names: list[str], table: str) -> list[tuple[Any, ...]]:
        return self.connection.execute(f"SELECT {', '.join(names)} FROM {table}").fetchall()

    def problems(self) -> list[Problem]:
        return list(verify.iter_problems(self._readers))


def keys_of(table: str) -> list[str]:
    return [column.name for column in tables.tables[table].primary_key]


def alterations(table: str, column: str, old: Any) -> list[Any]:
    """Return other values that the column can hold."""
    nullable = [None] if tables.tables[table].columns[column].nullable and old is not None else []
    if old is None:
        by_type: dict[type, Any] = {int: 1_000_003, str: "{}", bytes: b"\x00", float: 1.5}
        return [by_type[tables.tables[table].columns[column].type.python_type]]
    if column == "body":
        # It must be JSON, because an index parses it.
        return [old + " ", old[:-1] + ',"more":1}', old.replace(":", ": ", 1)]
    if isinstance(old, str):
        return [old + " ", old[:-1] + "\N{SNOWMAN}", *nullable]
    if isinstance(old, bytes):
        return [bytes([old[0] ^ 1]) + old[1:], old[:-1] + bytes([old[-1] ^ 0x80]), *nullable]
    return [old + 1_000_003, *nullable]


def sequence_of(tamperer: Tamperer, table: str, row: dict[str, Any]) -> int | None:
    """Return the commit that a row of the log belongs to."""
    if table != "blobs":
        sequence: int = row["sequence"]
        return sequence
    version = tamperer.connection.execute(
        "SELECT min(sequence) FROM versions WHERE value_blob = ?1 OR binary_blob = ?1", (row["blob_key"],)
    ).fetchone()
    return version[0] if version else None


def names_commit(problems: list[Problem], sequence: int | None) -> bool:
    return any(f"commit {sequence}," in f"{problem.where}, " for problem in problems)


# Sound files


def test_sound_database_has_every_kind_of_everything(filled: Path) -> None:
    """The tests below depend on it."""
    with closing(sqlite3.connect(f"file:{filled}?mode=ro", uri=True)) as connection:
        kinds = {KINDS[code] for (code,) in connection.execute("SELECT DISTINCT kind FROM versions")}
        events = {kind for (kind,) in connection.execute("SELECT DISTINCT kind FROM events")}
        filled = {
            column: connection.execute(f"SELECT count({column}) FROM versions").fetchone()[0]
            for column in ("value", "value_blob", "binary", "binary_blob", "metadata")
        }
        ended = connection.execute("SELECT count(until_sequence), count(*) FROM dependencies").fetchone()
        statuses = {status for (status,) in connection.execute("SELECT DISTINCT status FROM executions")}
        journal = connection.execute("SELECT count(parent_id), count(idempotency_key) FROM executions").fetchone()
        tools = connection.execute("SELECT count(*), count(DISTINCT worker_id) FROM tools").fetchone()
    assert kinds == set(ChangeKind)
    assert events == {kind.value for kind in EventKind}
    assert all(filled.values()), filled
    assert 0 < ended[0] < ended[1]
    # No execution runs in a file that was closed: the next start would interrupt it.
    assert statuses == set(ExecutionStatus) - {ExecutionStatus.RUNNING}
    assert all(journal)
    assert tools == (2, 2)


def test_sound_database_has_no_problems(filled: Path) -> None:
    assert problems_of(filled, anchor_of(filled)) == []
    assert schema_problems_of(filled) == []


def test_progress_reaches_the_last_commit(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, "_PAGE_COMMITS", 7)
    reports: list[tuple[int, int]] = []
    readers = open_readers(filled, size=1)
    assert list(verify.iter_problems(readers, None, lambda done, in_all: reports.append((done, in_all)))) == []
    readers.dispose()
    last = anchor_of(filled).sequence
    assert reports[0] == (7, last)
    assert reports[-1] == (last, last)
    assert reports == sorted(reports)


@pytest.mark.parametrize("snapshot_s", [0.0, 1000.0])
def test_every_walk_continues_in_the_next_snapshot(
    filled: Path, path: Path, monkeypatch: pytest.MonkeyPatch, snapshot_s: float
) -> None:
    """Checking with a snapshot for each commit, content and session finds the same as with a single one."""
    change(monkeypatch, "SNAPSHOT_S", snapshot_s)
    change(monkeypatch, "_PAGE_COMMITS", 1 if snapshot_s == 0 else 10_000)
    change(monkeypatch, "_MOST_REMEMBERED", 0 if snapshot_s == 0 else 1000)
    assert problems_of(filled, anchor_of(filled)) == []
    with Tamperer(path) as tamperer:
        tamperer.run("UPDATE commits SET cause = 'x' WHERE sequence = 30")
        tamperer.run("UPDATE blobs SET content = x'00' WHERE blob_key = 2")
        tamperer.run("UPDATE variables SET type = 'map' WHERE variable_key = 20")
        tamperer.run("DELETE FROM sessions WHERE session_key = 5")
        where = [problem.where for problem in tamperer.problems()]
    assert len(where) == 4
    assert where[0].startswith("commit 30, session 'main'")
    assert where[1].startswith("large content 2, first used by commit 37, session 'binaries', variable 'large'")
    assert where[2].startswith("commit 38, session 'binaries', variable ")
    assert where[3] == "commit 57, session 'short'"


def test_verify_while_a_writer_writes(tmp_path: Path) -> None:
    path = tmp_path / "live.db"
    with EmbeddedState(path) as provider:
        provider.initialize_session("s")
        for name in "abcdefgh":
            provider.register_variable("s", name, "integer", 0)

        def write() -> None:
            for number in range(400):
                provider.set_variables("s", dict.fromkeys("abcdefgh", number), metadata={"n": str(number % 7)})
                if number % 100 == 0:
                    provider.delete_variable("s", "h")
                    provider.register_variable("s", "h", "integer", number)

        writer = threading.Thread(target=write)
        writer.start()
        rounds = 0
        while writer.is_alive() or rounds == 0:
            anchor = anchor_of(path) if Path(f"{path}.anchor").stat().st_size else None
            assert problems_of(path, anchor) == []
            rounds += 1
        writer.join()


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    path = tmp_path / "long.db"
    names = [f"v{number}" for number in range(100)]

    def write(provider: EmbeddedState, commits: int) -> None:
        for number in range(commits):
            provider.set_variables("s", dict.fromkeys(names, number), metadata={"n": str(number)})

    with EmbeddedState(path) as provider:
        provider.initialize_session("s")
        for name in names:
            provider.register_variable("s", name, "integer", 0)
        write(provider, 20)
        problems_of(path)
        short = peak_bytes(lambda: problems_of(path))
        write(provider, 120)
        long = peak_bytes(lambda: problems_of(path))
    assert long < short + 300_000, f"{short} bytes for 2,100 versions, {long} for 14,100"


def change(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """Change a constant wherever it is used."""
    for module in (commits, contents, documents, live, lm_calls, metadata, outcomes, pruned, sessions):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)


WALKED = [
    *((log_reader, name) for name in ("_COMMITS", "_VERSIONS", "_EVENTS")),
    (commits, "_PRUNED_COMMITS"),
    (pruned, "_PRUNED"),
    (contents, "_BLOBS"),
    *((metadata, name) for name in ("_STRAYS", "_LAST_OF_PAGE", "_INDEXED")),
    *((lm_calls, name) for name in ("_RECORDED", "_LISTED")),
    *(
        (sessions, name)
        for name in (
            "_SESSIONS",
            "_EVENTS",
            "_VARIABLES",
            "_TELLING_VERSIONS",
            "_DEPENDENCIES",
            "_EXECUTIONS",
            "_TOOLS",
            "_RULES",
            "_CONSTRAINTS",
        )
    ),
]


@pytest.mark.parametrize(("module", "name"), WALKED)
def test_no_walk_sorts_the_log(filled: Path, module: Any, name: str) -> None:
    """SQLite would sort in memory, or in a file as large as the log, before it returns the first row."""
    sql = getattr(module, name)
    with closing(sqlite3.connect(f"file:{filled}?mode=ro", uri=True)) as connection:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", [0] * sql.count("?"))]
    assert plan
    assert not [step for step in plan if "TEMP B-TREE" in step], plan


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(n, marks=pytest.mark.thorough) for n in range(5, 15))])
def test_everything_that_the_engine_writes_is_sound(tmp_path: Path, seed: int) -> None:
    """Random commands in random groups, so that transactions contain all combinations of events and versions."""
    print(f"seed {seed}")
    randomly = random.Random(seed)
    path = tmp_path / "random.db"
    store = open_groups(path)
    for _ in range(3):
        for _ in range(25):
            outcomes = store.write_group([random_job(randomly) for _ in range(randomly.randint(1, 12))])
            broken = [outcome.error for outcome in outcomes if type(outcome.error).__name__ == "InternalError"]
            assert broken == []
        store.close()
        assert problems_of(path, anchor_of(path)) == []
        store = open_groups(path)
    assert store.log.head.sequence > 100
    store.close()


def random_job(randomly: random.Random) -> Job:
    session, name = randomly.choice("st"), randomly.choice("abc")
    holder = randomly.choice(("mipro", "bootstrap"))
    metadata = randomly.choice(({}, {"n": str(randomly.random())}, {"optimizer_id": holder}))
    number = Value(str(randomly.randint(0, 9)))
    command: Any = randomly.choices(
        (
            c.InitializeSession(session, metadata),
            c.CleanupSession(session),
            c.RegisterVariable(session, name, "integer", number, "", metadata),
            c.SetVariable(session, name, number, metadata),
            c.SetVariables(session, dict.fromkeys("abc", number), metadata, atomic=randomly.random() < 0.3),
            c.DeleteVariable(session, name),
            c.RollbackVariable(session, name, randomly.randint(0, 3)),
            c.AddDependency(session, name, randomly.choice("abc")),
            c.StartOptimization(session, name, holder, metadata),
            c.StopOptimization(session, name, force=randomly.random() < 0.5),
            c.ConstrainVariable(session, name, randomly.choice(("", '{"max":9}', '{"min":1}')), number, metadata),
            c.AddRule(session, f"rule {name}", randomly.choice(("a <= b", "b <= c + 3", "a + b > 2")), replace=True),
            c.RemoveRule(session, f"rule {name}"),
        ),
        weights=(4, 1, 8, 8, 4, 3, 3, 4, 3, 4, 3, 2, 2),
    )[0]
    key = str(randomly.randint(0, 50)) if randomly.random() < 0.2 else None
    return Job(command, Origin(holder, command.cause, idempotency_key=key, optimizer_id=holder))


# The log: any cell, any row


WHOLE = pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.thorough)])


@WHOLE
@pytest.mark.parametrize(("table", "column"), LOG_COLUMNS)
def test_any_changed_cell_of_the_log_is_found(path: Path, table: str, column: str, whole: bool) -> None:
    """Change rows, one cell at a time, and change it back."""
    assert_changes_are_found(path, table, column, whole)


@WHOLE
@pytest.mark.parametrize(("table", "column"), STATE_COLUMNS)
def test_any_changed_cell_of_the_current_state_is_found(path: Path, table: str, column: str, whole: bool) -> None:
    assert_changes_are_found(path, table, column, whole)


def assert_changes_are_found(path: Path, table: str, column: str, whole: bool) -> None:
    """Each row of the `whole` table gets all other values. That takes five times as long as giving one, in turn, to the
    first row of each kind, and to every third one.
    """
    with Tamperer(path) as tamperer:
        tried = 0
        kinds: set[tuple[Any, ...]] = set()
        for number, row in enumerate(rows := tamperer.rows(table)):
            # What a check goes by: what a row is, and what it has.
            kind = (row.get("kind"), row.get("cause"), row.get("status"), *(value is None for value in row.values()))
            values = alterations(table, column, row[column])
            if not whole:
                values = [values[tried % len(values)]] if number % 3 == 0 or kind not in kinds else []
            kinds.add(kind)
            for value in values:
                changed = {**row, column: value}
                update(tamperer, table, column, row, value)
                problems = tamperer.problems()
                update(tamperer, table, column, changed, row[column])
                assert problems, f"{table}.{column} of {row} changed to {value!r}"
                if table in ("commits", "versions", "events"):
                    assert names_commit(problems, row["sequence"]), (row, value, problems)
                elif table == "blobs" and column != "blob_key":
                    assert names_commit(problems, sequence_of(tamperer, table, row)), (row, value, problems)
                tried += 1
        assert tried >= (len(rows) if whole else max(len(kinds), len(rows) // 3)) > 0
        assert tamperer.problems() == [], "put back"


def update(tamperer: Tamperer, table: str, column: str, row: dict[str, Any], value: Any) -> None:
    keys = keys_of(table)
    where = " AND ".join(f"{key} = ?" for key in keys)
    tamperer.run(f"UPDATE {table} SET {column} = ? WHERE {where}", value, *(row[key] for key in keys))


@pytest.mark.parametrize("table", [*APPEND_ONLY, *dict(STATE_COLUMNS)])
def test_any_missing_row_is_found(path: Path, table: str) -> None:
    keys = keys_of(table)
    where = " AND ".join(f"{key} = ?" for key in keys)
    with Tamperer(path) as tamperer:
        rows = tamperer.rows(table)
        # Without the anchor, the last commit's own row is only missed if other rows belong to it.
        for row in rows:
            tamperer.run(f"DELETE FROM {table} WHERE {where}", *(row[key] for key in keys))
            problems = tamperer.problems()
            names = ", ".join(row)
            marks = ", ".join("?" for _ in row)
            tamperer.run(f"INSERT INTO {table} ({names}) VALUES ({marks})", *row.values())
            assert problems, f"{table} without {row}"
        assert rows
        if table != "dependencies":
            assert tamperer.problems() == [], "put back"


ADDED = {
    "commits": "INSERT INTO commits SELECT sequence + 1, session_key, actor, cause, created_at, hash FROM commits "
    "ORDER BY sequence DESC LIMIT 1",
    "versions": "INSERT INTO versions SELECT variable_key, version + 1, sequence, kind, source, value, value_blob, "
    "binary, binary_blob, metadata FROM versions WHERE variable_key = 2",
    "events": "INSERT INTO events SELECT sequence, ordinal + 1, kind, body FROM events LIMIT 1",
    "events of no commit": "INSERT INTO events SELECT sequence + 1000, ordinal, kind, body FROM events LIMIT 1",
    "versions of no variable": "INSERT INTO versions SELECT 999, 0, sequence, kind, source, value, value_blob, binary, "
    "binary_blob, metadata FROM versions LIMIT 1",
    "commits before the first": "INSERT INTO commits SELECT 0, session_key, actor, cause, created_at, hash "
    "FROM commits LIMIT 1",
    "commits far before the first": "INSERT INTO commits SELECT -9223372036854775808, session_key, actor, cause, "
    "created_at, hash FROM commits LIMIT 1",
    "sessions before the first": "INSERT INTO sessions SELECT -9223372036854775808, 'new', created_at, "
    "started_sequence, NULL, NULL, NULL, metadata FROM sessions LIMIT 1",
    "blobs before the first": "INSERT INTO blobs VALUES (-9223372036854775808, x'00', x'00')",
    "blobs": "INSERT INTO blobs VALUES (99, x'00', x'00')",
    "sessions": "INSERT INTO sessions SELECT 99, 'new', created_at, started_sequence, NULL, NULL, NULL, metadata "
    "FROM sessions LIMIT 1",
    "variables": "INSERT INTO variables SELECT 99, session_key, 'var_new_1', 'new', type, constraints, metadata, NULL, "
    "NULL FROM variables LIMIT 1",
    "variables of no session": "INSERT INTO variables SELECT 99, 99, 'var_new_1', 'new', type, constraints, metadata, "
    "NULL, NULL FROM variables LIMIT 1",
    "executions": "INSERT INTO executions SELECT 1, session_key, execution_id, tool, status, parent_id, attempt, "
    "idempotency_key, fingerprint, ended_sequence FROM executions LIMIT 1",
    "executions of no session": "INSERT INTO executions SELECT 1, 99, execution_id, tool, status, parent_id, attempt, "
    "idempotency_key, fingerprint, ended_sequence FROM executions LIMIT 1",
    "executions before the first": "INSERT INTO executions SELECT -9223372036854775808, -9223372036854775808, "
    "execution_id, tool, status, parent_id, attempt, idempotency_key, fingerprint, NULL FROM executions LIMIT 1",
    "tools": "INSERT INTO tools SELECT session_key, 'new', worker_id, address, spec, registered_sequence FROM tools "
    "LIMIT 1",
    "tools of no session": "INSERT INTO tools SELECT 99, name, worker_id, address, spec, registered_sequence "
    "FROM tools LIMIT 1",
    "dependencies": "INSERT INTO dependencies SELECT 99, session_key, to_id, from_id, type, since_sequence, NULL "
    "FROM dependencies LIMIT 1",
    "pruned": "INSERT INTO pruned SELECT 20, marker_sequence, residue FROM pruned LIMIT 1",
    "pruned without a marker": "INSERT INTO pruned SELECT sequence, 50, residue FROM pruned LIMIT 1",
    "pruned before the first": "INSERT INTO pruned SELECT -9223372036854775808, marker_sequence, residue FROM pruned "
    "LIMIT 1",
    "versions of what was pruned": "INSERT INTO versions SELECT variable_key, version + 1, (SELECT min(sequence) FROM "
    "pruned), kind, source, value, value_blob, binary, binary_blob, metadata FROM versions WHERE variable_key = 27 AND "
    "version = 3",
    "events of what was pruned": "INSERT INTO events SELECT max(sequence), 9, 'session_updated', '{}' FROM pruned",
    "dependencies again": "INSERT INTO dependencies SELECT 99, session_key, from_id, to_id, type, since_sequence, "
    "until_sequence FROM dependencies LIMIT 1",
}


@pytest.mark.parametrize("added", ADDED)
def test_any_added_row_is_found(path: Path, added: str) -> None:
    with Tamperer(path) as tamperer:
        tamperer.run(ADDED[added])
        assert tamperer.problems()


def test_every_text_that_is_not_utf8_is_reported_and_skipped(path: Path) -> None:
    texts = [(table, name) for table, name in LOG_COLUMNS + STATE_COLUMNS if is_text(table, name)]
    assert len(texts) > 10
    with Tamperer(path) as tamperer:
        for table, column in texts:
            row = next(row for row in tamperer.rows(table) if row[column] is not None)
            wrong = "CAST(x'61ff62' AS TEXT)"
            where = " AND ".join(f"{key} = ?" for key in keys_of(table))
            keys = [row[key] for key in keys_of(table)]
            tamperer.run(f"UPDATE {table} SET {column} = {wrong} WHERE {where}", *keys)
            problems = tamperer.problems()
            where = " AND ".join(f"{key} = {wrong if key == column else '?'}" for key in keys_of(table))
            keys = [row[key] for key in keys_of(table) if key != column]
            tamperer.run(f"UPDATE {table} SET {column} = ? WHERE {where}", row[column], *keys)
            assert problems, f"{table}.{column}"
            assert not any("cannot be read any further" in problem.what for problem in problems), problems
            assert all(str(problem).isprintable() for problem in problems)
        assert tamperer.problems() == []


def is_text(table: str, column: str) -> bool:
    return tables.tables[table].columns[column].type.python_type is str


def test_a_whole_session_before_the_first_commit_is_found(path: Path) -> None:
    """Such a session is consistent, but the chain of hashes does not cover it."""
    with Tamperer(path) as tamperer:
        tamperer.run("INSERT INTO sessions VALUES (-1, 'new', 5, -1, NULL, NULL, NULL, '{}')")
        tamperer.run("INSERT INTO commits VALUES (-1, -1, 'mallory', 'x', 5, x'00')")
        body = json.dumps({"session_id": "new", "session_key": -1, "ttl_s": None, "metadata": {}})
        tamperer.run("INSERT INTO events VALUES (-1, 0, 'session_started', ?)", body)
        assert tamperer.problems() == [Problem("commit -1", "commits are numbered from 1")]


# The end of the log


def drop_last_commit(path: Path) -> int:
    """Remove the last commit with all its effects; return its number."""
    with Tamperer(path) as tamperer:
        (last,) = tamperer.connection.execute("SELECT max(sequence) FROM commits").fetchone()
        tamperer.run("DELETE FROM versions WHERE sequence = ?", last)
        tamperer.run("DELETE FROM commits WHERE sequence = ?", last)
    return int(last)


def write_once_more(path: Path) -> None:
    with EmbeddedState(path) as provider:
        provider.set_variable("again", "y", {"n": 1})


def test_commits_missing_at_the_end_are_found_by_the_anchor(path: Path) -> None:
    write_once_more(path)
    last = drop_last_commit(path)
    assert problems_of(path) == [], "not detectable without an anchor"
    (problem,) = problems_of(path, anchor_of(path))
    assert problem.where == f"commit {last}"
    assert str(last - 1) in problem.what


def test_an_older_copy_is_found_by_the_anchor(path: Path) -> None:
    older = path.read_bytes()
    first = anchor_of(path).sequence + 1
    for _ in range(3):
        write_once_more(path)
    path.write_bytes(older)
    (problem,) = problems_of(path, anchor_of(path))
    assert problem.where == f"commits {first} to {first + 2}"


def test_a_log_rewritten_with_matching_hashes_is_found_by_the_anchor(path: Path) -> None:
    """A forger who can compute the chain cannot make the anchor match."""
    with Tamperer(path) as tamperer:
        tamperer.run("UPDATE commits SET actor = 'mallory' WHERE sequence = 20")
        assert names_commit(tamperer.problems(), 20)
        forge(tamperer, path)
    assert problems_of(path) == [], "not detectable without an anchor"
    (problem,) = problems_of(path, anchor_of(path))
    assert problem.where.startswith(f"commit {anchor_of(path).sequence}, ")


def test_history_before_pruned_commits_cannot_be_rewritten(path: Path) -> None:
    """The hash of a pruned commit cannot be computed, but its residue covers the one before it."""
    with Tamperer(path) as tamperer:
        tamperer.run("UPDATE commits SET actor = 'mallory' WHERE sequence = 20")
        forge(tamperer, path, markers=False)
        (first,) = tamperer.connection.execute("SELECT min(sequence) FROM pruned").fetchone()
        problems = tamperer.problems()
    assert names_commit(problems, first), problems
    assert not names_commit(problems, 20)


def forge(tamperer: Tamperer, path: Path, *, markers: bool = True) -> None:
    """Make the hashes of all commits match and, with `markers`, the digests of the markers."""
    readers = open_readers(path, size=1)
    previous, sequence = GENESIS, 0
    pruned = {row["sequence"]: row["marker_sequence"] for row in tamperer.rows("pruned")}
    full: dict[int, bytes] = {}
    while commits := read_commits(readers, sequence, 1):
        [commit] = commits
        sequence = commit.sequence
        if sequence not in pruned:
            if markers and forge_marker(tamperer, sequence, full):
                [commit] = read_commits(readers, sequence - 1, 1)
            previous = commit.link(previous)
            tamperer.run("UPDATE commits SET hash = ? WHERE sequence = ?", previous, sequence)
            continue
        if markers:
            full[sequence] = residue(previous, commit.hash, commit.content)
            kept = kept_residue(full[sequence], commit.content)
            place = (sequence, pruned[sequence])
            tamperer.run("UPDATE pruned SET residue = ? WHERE sequence = ? AND marker_sequence = ?", kept, *place)
        previous = commit.hash
    readers.dispose()


def read_commits(readers: Engine, after: int, most: int) -> list[log_reader.LoggedCommit]:
    with snapshot(readers) as connection:
        return list(log_reader.iter_commits(connection, after, most))


def forge_marker(tamperer: Tamperer, sequence: int, full: dict[int, bytes]) -> bool:
    rows = [row for row in tamperer.rows("pruned") if row["marker_sequence"] == sequence]
    residues = [(row["sequence"], row["residue"]) for row in rows]
    entries = (residue_entry(at, kept if len(kept) == 32 else full[at]) for at, kept in residues)
    digest = sha256(b"".join(entries)).hexdigest()
    statement = "UPDATE events SET body = json_set(body, '$.digest', ?) WHERE kind = 'pruned' AND sequence = ?"
    return tamperer.connection.execute(statement, (digest, sequence)).rowcount == 1


def test_an_anchor_of_an_empty_log_fits_any(filled: Path) -> None:
    assert problems_of(filled, Head(0, GENESIS)) == []


# The reported problems


def test_one_change_is_one_problem(path: Path) -> None:
    """A changed hash or content does not make the commits after it problems."""
    with Tamperer(path) as tamperer:
        tamperer.run("UPDATE commits SET hash = ? WHERE sequence = 40", bytes(32))
        (problem,) = tamperer.problems()
        assert problem.where.startswith("commit 40, session 'binaries', variable ")
        tamperer.run("UPDATE commits SET actor = '' WHERE sequence = 41")
        assert [problem.where.split(",")[0] for problem in tamperer.problems()] == ["commit 40", "commit 41"]


def test_missing_commits_are_one_range(path: Path) -> None:
    with Tamperer(path) as tamperer:
        tamperer.connection.execute("DELETE FROM commits WHERE sequence BETWEEN 66 AND 68")
        problems = tamperer.problems()
    assert Problem("commits 66 to 68", "missing: commit 65 is followed by commit 69") in problems
    assert {problem.where for problem in problems} == {"commits 66 to 68", "commit 66", "commit 67", "commit 68"}


def test_a_difference_names_column_and_both_values(path: Path) -> None:
    with Tamperer(path) as tamperer:
        tamperer.run("UPDATE variables SET deleted_sequence = 70 WHERE variable_key = 3")
        (problem,) = tamperer.problems()
    assert problem.where == "commit 4, session 'main', variable 'minus_zero'"
    assert problem.what == "variables.deleted_sequence is 70, the log says empty"


def test_metadata_of_a_rollback_does_not_become_the_variables(path: Path) -> None:
    with Tamperer(path) as tamperer:
        (text,) = tamperer.connection.execute("SELECT metadata FROM variables WHERE variable_key = 1").fetchone()
        assert "rolled_back_to" not in text
        merged = json.dumps(json.loads(text) | {"rolled_back_to": "0"}, separators=(",", ":"), sort_keys=True)
        tamperer.run("UPDATE variables SET metadata = ? WHERE variable_key = 1", merged)
        (problem,) = tamperer.problems()
    assert problem.where == "commit 2, session 'main', variable 'temperature'"


def test_dependencies_in_another_order_are_found(path: Path) -> None:
    with Tamperer(path) as tamperer:
        tamperer.run("UPDATE dependencies SET dependency_key = 99 WHERE dependency_key = 1")
        assert [problem.where for problem in tamperer.problems()] == ["session 'main'"]


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"variable_id":7}', "1e999"])
@pytest.mark.parametrize("kind", [*EventKind, "unheard_of"])
def test_a_malformed_event_does_not_end_the_check(path: Path, kind: str, body: str) -> None:
    with Tamperer(path) as tamperer:
        # An index parses the body as JSON.
        tamperer.connection.execute("DROP INDEX events_of_locks")
        tamperer.connection.execute("UPDATE events SET kind = ?, body = ? WHERE sequence = 2", (kind, body))
        problems = tamperer.problems()
    assert names_commit(problems, 2)
    assert not any("cannot be read any further" in problem.what for problem in problems), problems


def test_versions_out_of_order_are_found_even_if_the_hashes_match(path: Path) -> None:
    """Only a bug in the writer could write that: here the chain is made to match afterwards."""
    cases = {
        "UPDATE versions SET version = 90 WHERE variable_key = 1 AND version = 2": "version 90 follows version 89",
        "UPDATE versions SET kind = 0 WHERE variable_key = 1 AND version = 2": "of kind 0",
        "UPDATE versions SET kind = 3 WHERE variable_key = 1 AND version = 2": "after the variable was deleted",
        "UPDATE versions SET sequence = 60 WHERE variable_key = 1 AND version = 2": "comes before version 2",
        "UPDATE versions SET variable_key = 24, version = 1 WHERE variable_key = 4 AND sequence > 62": "to another",
    }
    for number, (statement, what) in enumerate(cases.items()):
        copy = path.with_name(f"case{number}.db")
        shutil.copy(path, copy)
        with Tamperer(copy) as tamperer:
            tamperer.run(statement)
            forge(tamperer, copy)
            problems = tamperer.problems()
        assert any(what in problem.what for problem in problems), (statement, problems)


def schema_problems_of(path: Path) -> list[Problem]:
    readers = open_readers(path, size=1)
    with snapshot(readers) as connection:
        problems = list(verify.schema_problems(connection))
    readers.dispose()
    return problems


@pytest.mark.parametrize("table", APPEND_ONLY)
@pytest.mark.parametrize("action", ["update", "delete"])
@pytest.mark.parametrize("instead", ["", "CREATE TRIGGER {name} BEFORE {action} ON {table} BEGIN SELECT 1; END"])
def test_a_missing_or_toothless_trigger_is_found(path: Path, table: str, action: str, instead: str) -> None:
    name = f"{table}_no_{action}"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"DROP TRIGGER {name}")
        if instead:
            connection.execute(instead.format(name=name, action=action, table=table))
    (problem,) = schema_problems_of(path)
    assert problem == Problem(f"table {table}", f"the trigger {name} is {'changed' if instead else 'missing'}")


def test_every_missing_part_of_the_schema_is_named(filled: Path, path: Path) -> None:
    """Drop each trigger, view and index of a file in turn."""
    with closing(sqlite3.connect(f"file:{filled}?mode=ro", uri=True)) as connection:
        parts = connection.execute(
            "SELECT type, name FROM sqlite_schema WHERE type != 'table' AND sql IS NOT NULL"
        ).fetchall()
    assert {"versions_metadata_in", "v_commits", "versions_by_sequence"} <= {name for _, name in parts}
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        for number, (kind, name) in enumerate(parts, 1):
            connection.execute(f"DROP {kind} {name}")
            problems = [problem.what for problem in schema_problems_of(path)]
            assert f"the {kind} {name} is missing" in problems
            assert len(problems) == number


@pytest.mark.parametrize(
    ("statements", "expected"),
    [
        (
            ("DROP VIEW v_commits", "CREATE VIEW v_commits AS SELECT 1"),
            ["view v_commits: the view v_commits is changed"],
        ),
        (
            ("DROP INDEX variables_by_id", "CREATE INDEX variables_by_id ON variables (name)"),
            ["table variables: the index variables_by_id is changed"],
        ),
        (
            ("CREATE TRIGGER theirs AFTER INSERT ON events BEGIN DELETE FROM tools; END",),
            ["table events: the trigger theirs is not of this schema"],
        ),
        (("CREATE VIEW mine AS SELECT 1", "CREATE INDEX my_own ON versions (source)"), []),
    ],
)
def test_every_changed_part_of_the_schema_is_named(
    path: Path, statements: tuple[str, ...], expected: list[str]
) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
    assert [str(problem) for problem in schema_problems_of(path)] == expected
    assert [str(problem) for problem in maintenance.check(path).problems] == expected


# The index of metadata


@pytest.mark.parametrize("page", [1, 10_000])
@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("DELETE FROM metadata_entries {one}", ["version {version} has metadata that is missing in metadata_entries"]),
        (
            "UPDATE metadata_entries SET value = 'another' {one}",
            [
                "metadata_entries has '{key}' for version {version}, whose metadata does not",
                "version {version} has metadata that is missing in metadata_entries",
            ],
        ),
        (
            "INSERT INTO metadata_entries SELECT 'added', value, sequence, variable_key, version "
            "FROM metadata_entries {one}",
            ["metadata_entries has 'added' for version {version}, whose metadata does not"],
        ),
    ],
)
def test_a_changed_index_of_metadata_is_found(
    path: Path, monkeypatch: pytest.MonkeyPatch, page: int, statement: str, expected: list[str]
) -> None:
    if page == 1:
        change(monkeypatch, "SNAPSHOT_S", 0.0)
        for name in ("_STRAYS", "_LAST_OF_PAGE"):
            smaller = getattr(metadata, name).replace("LIMIT 10000", "LIMIT 1").replace("OFFSET 9999", "OFFSET 0")
            monkeypatch.setattr(metadata, name, smaller)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        names = ("key", "value", "sequence", "variable_key", "version")
        entries = f"SELECT {', '.join(names)} FROM metadata_entries ORDER BY sequence"
        row = connection.execute(f"{entries} LIMIT 1 OFFSET 3").fetchone()
        key, _, sequence, variable_key, version = row
        one = "WHERE " + " AND ".join(f"{name} = ?{number}" for number, name in enumerate(names, 1))
        assert connection.execute(statement.format(one=one), row).rowcount == 1
        (name,) = connection.execute("SELECT name FROM variables WHERE variable_key = ?", [variable_key]).fetchone()
    problems = problems_of(path)
    assert [problem.what for problem in problems] == [what.format(key=key, version=version) for what in expected]
    for problem in problems:
        assert problem.where.startswith(f"commit {sequence}, session '")
        assert problem.where.endswith(f"', variable '{name}'")


def test_an_index_of_metadata_that_was_emptied_is_found(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DELETE FROM metadata_entries")
        (count,) = connection.execute("SELECT count(*) FROM versions WHERE metadata IS NOT NULL").fetchone()
    assert len(problems_of(path)) == count > 0
    assert len(maintenance.check(path).problems) == count


# The table of LM calls


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("DELETE FROM lm_calls WHERE number = 1", "LM call 1 is missing in lm_calls"),
        (
            "UPDATE lm_calls SET cost = 0, model = 'x' WHERE number = 0",
            "lm_calls has another model, cost for LM call 0",
        ),
        ("UPDATE lm_calls SET number = 7 WHERE number = 1", "lm_calls has LM call 7, which the commit does not have"),
        (
            "INSERT INTO lm_calls SELECT 1, 0, 0, 1, 0, '', 0, 0, 0, 0, 0, 0, 0, 0",
            "lm_calls has LM call 0, which the commit does not have",
        ),
    ],
)
def test_a_changed_table_of_lm_calls_is_found(path: Path, statement: str, what: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        (sequence,) = connection.execute("SELECT max(sequence) FROM lm_calls").fetchone()
        assert connection.execute(statement).rowcount == 1
    found = [problem for problem in problems_of(path) if "LM call" in problem.what]
    assert what in [problem.what for problem in found]
    assert {problem.where.partition(",")[0] for problem in found} <= {f"commit {sequence}", "commit 1"}


# Bit rot


@pytest.mark.parametrize("seed", range(60))
def test_flipped_bits_are_found_and_do_not_end_the_check(filled: Path, path: Path, seed: int) -> None:
    """If the damage changes what SQLite reads of the log, there is a problem."""
    print(f"seed {seed}")
    randomly = random.Random(seed)
    content = bytearray(path.read_bytes())
    # Not in the first page: a damaged schema is refused before the check begins.
    for _ in range(randomly.choice((1, 1, 3))):
        content[randomly.randrange(4096, len(content))] ^= 1 << randomly.randrange(8)
    path.write_bytes(content)
    problems = problems_of(path)
    if contents_of(path) != contents_of(filled):
        assert problems


def contents_of(path: Path) -> object:
    """Return the log as SQLite reads it, or its error."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        connection.text_factory = bytes
        try:
            return [connection.execute(f"SELECT * FROM {table}").fetchall() for table in APPEND_ONLY]
        except sqlite3.Error as error:
            return str(error)


# The chain


TEXTS = st.text(max_size=20)
MAYBE = st.none() | TEXTS
NUMBERS = st.integers(0, 2**63 - 1)


@given(
    sequence=NUMBERS,
    actor=TEXTS,
    versions=st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS, MAYBE, MAYBE, MAYBE, MAYBE), max_size=3),
    events=st.lists(st.tuples(NUMBERS, TEXTS, TEXTS), max_size=3),
)
def test_the_hashed_text_is_json(sequence: int, actor: str, versions: list[Any], events: list[Any]) -> None:
    """Another program needs only a JSON encoder and SHA-256 to check the chain."""
    written = commit_text(
        sequence, 1, actor, "cause", 2, [version_text(*row) for row in versions], [event_text(*row) for row in events]
    )
    # The order in the log: value, digests, metadata.
    rows = [[*row[:4], row[4], row[6], row[7], row[5]] for row in versions]
    document = [sequence, 1, actor, "cause", 2, rows, [list(row) for row in events]]
    assert written == json.dumps(document, separators=(",", ":"))


def test_a_hash_covers_the_commits_before_it() -> None:
    assert link(GENESIS, "[1]") != link(link(GENESIS, "[0]"), "[1]")
