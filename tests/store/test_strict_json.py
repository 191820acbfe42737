"""Documents are written as strict JSON, which SQLite parses; others, in old or damaged files, are read and reported."""

import json
import math
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspex_persist import open_audit
from dspex_persist.audit import CommitQuery, ExecutionQuery, HistoryQuery, SessionQuery, document
from dspex_persist.clock import now
from dspex_persist.state.commands import BeginExecution, FinishExecution
from dspex_persist.state.commands.executions import Verdict
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.model import ExecutionStatus, Failure, LogEntry, Origin
from dspex_persist.state.store import log, maintenance
from dspex_persist.state.store.chain import GENESIS
from dspex_persist.state.store.engine import open_readers, snapshot
from dspex_persist.state.store.log_reader import iter_commits
from dspex_persist.state.store.maintenance import transfer
from dspex_persist.state.values.json_text import DAMAGED, storable, stored, stored_object
from dspex_persist.wiring.recordings import import_session

ASSETS = Path(__file__).parents[1] / "assets"
VIEWS = (
    "v_variable_history",
    "v_current_variables",
    "v_executions",
    "v_execution_reads",
    "v_execution_writes",
    "v_commits",
)

TEXTS = st.text(st.characters() | st.sampled_from(["\0", "\ud800", "\udfff", "😀", '"', "\\", "\x1b"]), max_size=8)
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def is_plain(value: object) -> bool:
    """Whether JSON can represent it, and every program can read it."""
    if isinstance(value, str):
        return value.encode(errors="ignore").decode() == value
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(entry) for key, entry in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) < 10**4000


# Writing


@given(DOCUMENTS)
def test_sqlite_can_read_everything_that_is_written(value: object) -> None:
    text = storable({"value": value})
    with closing(sqlite3.connect(":memory:")) as connection:
        valid, extracted, keys = connection.execute(
            "SELECT json_valid(?1), json_extract(?1, '$.value'), (SELECT group_concat(fullkey) FROM json_tree(?1))",
            [text],
        ).fetchone()
    assert valid
    assert keys
    if isinstance(value, str) and "\0" not in value:
        assert extracted == value.encode(errors="backslashreplace").decode()
    assert text.isascii()
    if is_plain(value):
        assert stored(text) == {"value": value}
    else:
        json.dumps(stored(text), ensure_ascii=False, allow_nan=False).encode()


def test_floats_that_are_not_finite_are_written_as_the_protocol_writes_them() -> None:
    assert storable([math.nan, math.inf, -math.inf, 0.5]) == '["NaN","Infinity","-Infinity",0.5]'


def test_integers_too_large_for_some_programs_are_written_as_all_can_read() -> None:
    assert int(stored(storable([-(10**5000)]))[0], 16) == -(10**5000)
    assert stored(storable([10**4000])) == [10**4000]


def test_documents_too_deep_for_sqlite_are_still_written() -> None:
    nested: object = "bottom"
    for _ in range(5000):
        nested = [nested]
    with closing(sqlite3.connect(":memory:")) as connection:
        assert connection.execute("SELECT json_valid(?)", [storable({"log": nested, "kept": 1})]).fetchone() == (1,)


# Files that were written before


def _as_before(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


_LOG = (
    LogEntry(now(), "plain", {"step": 1}),
    LogEntry(now(), "odd", {"loss": math.nan, "bounds": [math.inf, -math.inf]}),
    LogEntry(now(), "a lone \ud800, a NUL \0 and NaN in words", {}),
)


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with documents that earlier releases accepted in the journal of one execution; another one is valid."""
    path = tmp_path / "poisoned.db"
    monkeypatch.setattr(log, "storable", _as_before)
    origin = Origin("ann", "ExecuteTool")
    failure = Failure("ValueError", "a lone \ud800, and a NUL \0, in words", "")
    with EmbeddedState(path) as state:
        state.initialize_session("s", {"who": "ann"})
        state.register_variable("s", "x", "float", 0.5, metadata={"unit": "K"})
        for lines, recorded, failed in (((), {}, None), (_LOG, {"lm": [math.nan]}, failure)):
            begun = state.submit(BeginExecution("s", "measure", {}, {"n": "1"}), origin).result()
            status = ExecutionStatus.FAILED if failed else ExecutionStatus.COMMITTED
            verdict = Verdict(
                begun.execution_id, status, failure=failed, log=lines, recorded=recorded, reads={"q\ud800": None}
            )
            state.submit(FinishExecution("s", verdict), replace(origin, cause=begun.execution_id)).result()
    return path


def test_an_audit_of_such_a_file_answers_every_query(poisoned: Path) -> None:
    with open_audit(poisoned) as audit:
        executions = list(audit.iterate(ExecutionQuery(newest_first=False)))
        assert [each.status.value for each in executions] == ["committed", "failed"]
        assert "in words" in executions[1].error
        detail = audit.execution(executions[1].execution_id)
        assert detail.log[1].fields == {"loss": "NaN", "bounds": ["Infinity", "-Infinity"]}
        assert "NaN in words" in detail.log[2].message
        assert [each.session_id for each in audit.iterate(ExecutionQuery(metadata={"n": "1"}))] == ["s", "s"]
        answers = [*audit.iterate(HistoryQuery()), *audit.iterate(CommitQuery()), *audit.iterate(SessionQuery())]
        json.dumps([document(each) for each in (*answers, detail)], allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize("view", VIEWS)
def test_the_views_answer_too(view: str, poisoned: Path) -> None:
    with closing(sqlite3.connect(f"file:{poisoned}?mode=ro", uri=True)) as connection:
        rows = connection.execute(f"SELECT * FROM {view}").fetchall()
    assert rows or view == "v_execution_writes"


def test_the_view_of_executions_shows_what_it_can(poisoned: Path) -> None:
    with closing(sqlite3.connect(f"file:{poisoned}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT status, error_type, error, duration_us FROM v_executions").fetchall()
    assert [row[:3] for row in rows[:1]] == [("committed", None, None)]
    assert rows[1][0] == "failed"
    assert "audit show reads it" in rows[1][2]
    assert rows[0][3] is not None


def test_the_check_names_the_row(poisoned: Path) -> None:
    problems = maintenance.check(poisoned).problems
    assert [str(problem) for problem in problems] == ["commit 6, session 's': the body of an event is not valid JSON"]


def test_such_a_session_is_strict_after_an_export_and_import(poisoned: Path, tmp_path: Path) -> None:
    stream = StringIO()
    transfer.export_session(poisoned, "s", stream)
    target = tmp_path / "new.db"
    import_session(target, stream.getvalue().splitlines())
    assert maintenance.check(target).problems == ()


# Upgrades

METADATA: Mapping[str, dict[str, Any]] = {
    "the same key for SQLite": {"q": "w", "q\0": "w", "q\0x": "w"},
    "a lone surrogate": {"\ud800": "x", "y": "\udfff"},
    "a NUL in a value": {"k": "a\0b", "k2": "a"},
}


@pytest.mark.parametrize("revision", ["0001", "0002"])
@pytest.mark.parametrize("metadata", METADATA.values(), ids=METADATA)
def test_a_file_with_odd_metadata_is_upgraded_and_read(metadata: dict[str, Any], revision: str, tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    shutil.copy(ASSETS / f"{revision}.db", path)
    with writing(path) as connection:
        key, version = connection.execute(
            "SELECT variable_key, min(version) FROM versions JOIN variables USING (variable_key) "
            "WHERE name = 'temperature' AND kind = 1"
        ).fetchone()
        connection.execute(
            "UPDATE versions SET metadata = ? WHERE variable_key = ? AND version = ?",
            [_as_before(metadata), key, version],
        )
    seal(path)
    maintenance.upgrade(path)
    readable = stored_object(_as_before(metadata))
    with open_audit(path) as audit:
        (entry,) = [
            each
            for each in audit.iterate(HistoryQuery(session="main", variable="temperature"))
            if each.version == version
        ]
        assert entry.metadata == readable
        state = next(each for each in audit.state("main", str(entry.sequence)) if each.name == "temperature")
        assert state.metadata.items() >= readable.items()
        for key, value in metadata.items():
            matches = list(audit.iterate(HistoryQuery(metadata={key: value})))
            if is_plain([key, value]):
                assert [each.version for each in matches] == [version]
        assert not list(audit.iterate(HistoryQuery(metadata={"q\0y": "w"})))
    with EmbeddedState(path) as state_of_file:
        assert state_of_file.get_variable_history("main", "temperature", 100)
        # Writing works: the triggers on the index of metadata do not fail.
        state_of_file.set_variable("main", "temperature", 1.0, metadata={"q": "w"})


# The check

COLUMNS = [
    ("sessions", "metadata"),
    ("variables", "constraints"),
    ("variables", "metadata"),
    ("variables", "optimization"),
    ("versions", "value"),
    ("versions", "metadata"),
    ("events", "body"),
    ("tools", "spec"),
    ("outcomes", "result"),
]


@pytest.mark.parametrize("text", ['{"a":NaN}', "{", ""], ids=["NaN", "cut", "empty"])
@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_invalid_json_is_reported_and_breaks_no_query(table: str, column: str, text: str, tmp_path: Path) -> None:
    if (column, text) == ("constraints", ""):
        pytest.skip("an empty text stands for no constraints")
    path = tmp_path / "damaged.db"
    shutil.copy(ASSETS / "0003.db", path)
    maintenance.upgrade(path)
    damage(path, table, column, text)
    problems = [str(problem) for problem in maintenance.check(path).problems]
    assert any("not valid JSON" in problem and column in problem for problem in problems), problems
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        for view in VIEWS:
            connection.execute(f"SELECT * FROM {view}").fetchall()
    with open_audit(path) as audit:
        for each in audit.iterate(ExecutionQuery()):
            audit.execution(each.execution_id)
        for query in (HistoryQuery(), CommitQuery(), SessionQuery()):
            assert list(audit.iterate(query))
        assert audit.state("main")


@contextmanager
def writing(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a connection that can change the rows that triggers protect."""
    with closing(sqlite3.connect(path)) as connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        yield connection
        for _, sql in triggers:
            connection.execute(sql)
        connection.commit()


def seal(path: Path) -> None:
    """Set the hashes of the commits to those of their rows, like an earlier release."""
    readers = open_readers(path)
    with snapshot(readers) as snapped:
        commits = list(iter_commits(snapped))
    readers.dispose()
    last = GENESIS
    with writing(path) as connection:
        for commit in commits:
            last = commit.link(last)
            connection.execute("UPDATE commits SET hash = ? WHERE sequence = ?", [last, commit.sequence])


def damage(path: Path, table: str, column: str, text: str) -> None:
    """Overwrite the last document of a column, like bit rot."""
    with writing(path) as connection:
        where = f"{column} IS NOT NULL" + (" AND kind = 'execution_ended'" if table == "events" else "")
        keys = [row[1] for row in connection.execute(f"PRAGMA table_info({table})") if row[5]]
        row = connection.execute(
            f"SELECT {', '.join(keys)} FROM {table} WHERE {where} ORDER BY {', '.join(keys)} DESC LIMIT 1"
        ).fetchone()
        assert row is not None
        condition = " AND ".join(f"{key} = ?" for key in keys)
        connection.execute(f"UPDATE {table} SET {column} = ? WHERE {condition}", [text, *row])


def test_damaged_documents_are_shown_as_text() -> None:
    assert stored_object("{cut") == {DAMAGED: "{cut"}
    assert stored_object("[1]") == {DAMAGED: "[1]"}
