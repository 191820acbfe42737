"""The public views: their columns stay, they match the audit, and the examples on their page work."""

import json
import re
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import dspex_persist
from dspex_persist.audit import (
    AuditSource,
    CommitQuery,
    ExecutionDetail,
    ExecutionQuery,
    HistoryEntry,
    HistoryQuery,
    SessionQuery,
    VariableState,
)
from dspex_persist.audit.web.questions import VIEWS
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.store import maintenance
from dspex_persist.state.store.history.views import QUESTIONS
from tests.end_to_end import story

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "schema.md").read_text(encoding="utf-8")
ASSET = ROOT / "tests" / "assets" / "0003.db"

_VERSION = "session_id name variable_id type version kind source value number binary_size_bytes sensitive"
_COMMIT = "sequence created_at actor cause execution_id tool caller_id caller_tool"
COLUMNS = {
    "v_variable_history": f"{_VERSION} metadata {_COMMIT} reason",
    "v_current_variables": f"{_VERSION} constraints metadata {_COMMIT} reason",
    "v_executions": "session_id execution_id tool status attempt parent_id idempotency_key isolation worker_id actor "
    "began_sequence began_at ended_sequence ended_at duration_us parameters metadata result error_type error "
    "retried_by ended_as",
    "v_execution_reads": "session_id execution_id tool asked name variable_id version",
    "v_execution_writes": "session_id execution_id tool name version published",
    "v_commits": "sequence session_id actor cause created_at hash versions events pruned",
    "v_lm_calls": "session_id execution_id tool ordinal model predictor began_at latency_us input_tokens output_tokens "
    "total_tokens cost cached concurrent error_type error variables options messages answer hash masked sequence",
    "v_lm_usage": "session_id tool model day calls failed cached input_tokens output_tokens total_tokens cost priced "
    "latency_us",
    "v_denials": "at last_at identity peer rpc session_id missing count",
    "v_rules": "session_id name expression description added_sequence",
}
"""Promised: later releases may add some at the end. None may go, move or mean something else."""


@pytest.mark.parametrize("of_null", [0, None], ids=["before 3.45", "since 3.45"])
def test_an_execution_that_runs_has_no_error(tmp_path: Path, of_null: int | None) -> None:
    """Releases of SQLite differ in whether NULL is JSON."""

    def json_valid(text: str | None) -> int | None:
        return of_null if text is None else int(is_json(text))

    with EmbeddedState(tmp_path / "a.db") as state:
        state.initialize_session("s")
        with state.begin_transaction("s"), closing(sqlite3.connect(tmp_path / "a.db")) as connection:
            connection.create_function("json_valid", 1, json_valid, deterministic=True)
            assert connection.execute("SELECT json_valid(NULL)").fetchone() == (of_null,)
            assert connection.execute("SELECT status, error FROM v_executions").fetchall() == [("running", None)]


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("story") / "sessions.db"
    story.tell(path)
    return path


@pytest.fixture(scope="module", params=["released", "written"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, written: Path) -> Path:
    """The database of the release that brought the views, and one that tools have just written."""
    if request.param == "written":
        return written
    copy = tmp_path_factory.mktemp("released") / "released.db"
    shutil.copy(ASSET, copy)
    maintenance.upgrade(copy)
    return copy


@pytest.fixture(scope="module")
def audit(path: Path) -> Iterator[AuditSource]:
    with dspex_persist.open_audit(path) as source:
        yield source


@pytest.fixture(scope="module")
def details(audit: AuditSource) -> list[ExecutionDetail]:
    summaries = audit.iterate(ExecutionQuery(newest_first=False))
    return [audit.execution(summary.execution_id) for summary in summaries]


def rows(path: Path, view: str, order: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"SELECT * FROM {view} ORDER BY {order}")]


def text_of(moment: datetime | None) -> str | None:
    return None if moment is None else f"{moment:%Y-%m-%dT%H:%M:%S.%f}Z"


def parsed(text: str | None) -> Any:
    return {} if text is None else json.loads(text)


# Columns


@pytest.mark.parametrize("view", COLUMNS)
def test_a_view_has_the_documented_columns(view: str, path: Path) -> None:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({view})")]
    assert columns[: len(COLUMNS[view].split())] == COLUMNS[view].split()
    assert list(VIEWS[view].columns) == columns, "the website describes each of them"


def test_every_view_is_documented(path: Path) -> None:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        views = {
            row[0]
            for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'view' AND name GLOB 'v_*'")
        }
    assert views == set(COLUMNS) == set(VIEWS)


@pytest.mark.parametrize("view", COLUMNS)
def test_the_page_describes_each_column(view: str) -> None:
    section = PAGE.partition(f"## {view}\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \| (.+) \|$", section, re.MULTILINE) == list(VIEWS[view].columns.items())


# Their contents


def common(answer: HistoryEntry | VariableState) -> dict[str, Any]:
    """Return the row that a view must have for a version, from its entry in the audit."""
    value = answer.value
    return {
        "session_id": answer.session_id,
        "name": answer.name,
        "variable_id": answer.variable_id,
        "type": answer.type,
        "version": answer.version,
        "kind": answer.kind.value,
        "source": answer.source.value,
        "value": None if value is None else value.json,
        "sequence": answer.sequence,
        "actor": answer.actor,
        "cause": answer.cause,
        "execution_id": answer.execution_id,
        "tool": answer.tool,
        "caller_id": answer.caller_id,
        "caller_tool": answer.caller_tool,
    }


def assert_says(row: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert {column: row[column] for column in expected} == expected


def test_history(path: Path, audit: AuditSource) -> None:
    view_rows = rows(path, "v_variable_history", "sequence, variable_id, version")
    answers = sorted(audit.iterate(HistoryQuery()), key=lambda each: (each.sequence, each.variable_id, each.version))
    assert len(view_rows) == len(answers) > 40
    for row, answer in zip(view_rows, answers, strict=True):
        assert_says(row, common(answer))
        assert parsed(row["metadata"]) == answer.metadata
        assert row["created_at"] == text_of(answer.created_at)
        if not row["sensitive"]:
            binary = None if answer.value is None else answer.value.binary
            assert row["binary_size_bytes"] == (None if binary is None else len(binary))
        if row["number"] is not None and answer.value is not None:
            assert row["number"] == float(answer.value.json)


def test_current_variables(path: Path, audit: AuditSource) -> None:
    view_rows = rows(path, "v_current_variables", "session_id, variable_id")
    live = [session.session_id for session in audit.iterate(SessionQuery(live=True))]
    answers = sorted(
        (state for session in live for state in audit.state(session)),
        key=lambda each: (each.session_id, each.variable_id),
    )
    assert len(view_rows) == len(answers) > 5
    for row, answer in zip(view_rows, answers, strict=True):
        assert_says(row, common(answer) | {"constraints": answer.constraints})
        assert parsed(row["metadata"]) == answer.metadata
        assert row["created_at"] == text_of(answer.updated_at)


def test_executions(path: Path, details: list[ExecutionDetail]) -> None:
    view_rows = rows(path, "v_executions", "began_sequence")
    assert len(view_rows) == len(details) > 10
    for row, detail in zip(view_rows, details, strict=True):
        summary = detail.summary
        expected = {
            "session_id": summary.session_id,
            "execution_id": summary.execution_id,
            "tool": summary.tool,
            "status": summary.status.value,
            "attempt": summary.attempt,
            "parent_id": summary.parent_id,
            "idempotency_key": summary.idempotency_key,
            "isolation": detail.isolation,
            "actor": summary.actor,
            "began_sequence": summary.began_sequence,
            "began_at": text_of(summary.began_at),
            "ended_sequence": summary.ended_sequence,
            "ended_at": text_of(summary.ended_at),
            "duration_us": summary.duration_us,
            "result": None if detail.result is None else detail.result.json,
            "error_type": None if detail.failure is None else detail.failure.type,
        }
        assert_says(row, expected)
        assert (row["worker_id"] or "") == summary.worker_id
        assert {name: body["json"] for name, body in parsed(row["parameters"]).items()} == {
            name: value.json for name, value in detail.parameters.items()
        }
        assert parsed(row["metadata"]) == detail.metadata
        assert (row["error"] or "") == (detail.failure.message if detail.failure is not None else summary.error)
        last = next(each.summary for each in details if each.summary.execution_id == detail.attempts[-1])
        following = detail.attempts[detail.attempts.index(summary.execution_id) + 1 :]
        assert_says(row, {"retried_by": following[0] if following else None, "ended_as": last.status.value})


def test_reads_and_writes_of_executions(path: Path, details: list[ExecutionDetail]) -> None:
    read = {
        (detail.summary.session_id, detail.summary.execution_id, detail.summary.tool, *each)
        for detail in details
        for each in ((read.asked, read.name, read.variable_id, read.version) for read in detail.reads)
    }
    wrote = {
        (detail.summary.session_id, detail.summary.execution_id, detail.summary.tool, *pair, place)
        for detail in details
        for place, pairs in ((0, detail.writes), (1, detail.published))
        for pair in pairs
    }
    views = rows(path, "v_execution_reads", "execution_id"), rows(path, "v_execution_writes", "execution_id")
    for expected, view in zip((read, wrote), views, strict=True):
        assert {tuple(row.values()) for row in view} == expected
        assert len(view) == len(expected) > 1


def test_commits(path: Path, audit: AuditSource) -> None:
    view_rows = rows(path, "v_commits", "sequence")
    answers = list(audit.iterate(CommitQuery(newest_first=False)))
    assert len(view_rows) == len(answers) == audit.head()
    for row, answer in zip(view_rows, answers, strict=True):
        expected = {
            "sequence": answer.sequence,
            "session_id": answer.session_id,
            "actor": answer.actor,
            "cause": answer.cause,
            "created_at": text_of(answer.created_at),
            "hash": answer.hash,
            "versions": len(answer.versions),
            "pruned": int(answer.pruned),
        }
        assert_says(row, expected)
        assert tuple(parsed(row["events"])) == answer.events


def test_sensitive_values_are_nowhere_in_the_views(written: Path) -> None:
    for view in COLUMNS:
        assert story.SECRET not in json.dumps(rows(written, view, "1"))


# The page's examples, and the website's questions


@pytest.mark.parametrize("statement", re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL))
def test_an_example_in_sql(statement: str, written: Path) -> None:
    with closing(sqlite3.connect(f"file:{written}?mode=ro", uri=True)) as connection:
        assert connection.execute(statement).fetchall()


def test_the_state_as_of_a_time_is_what_the_audit_says(written: Path) -> None:
    (statement,) = [text for text in re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL) if "2100" in text]
    with dspex_persist.open_audit(written) as audit, closing(sqlite3.connect(written)) as connection:
        commits = list(audit.iterate(CommitQuery(session=story.SESSION, newest_first=False)))
        for commit in commits[::5]:
            query = statement.replace("2100-01-01T00:00:00Z", str(text_of(commit.created_at)))
            state = audit.state(story.SESSION, str(commit.sequence))
            expected = sorted((each.name, each.version) for each in state)
            assert [(row[0], row[2]) for row in connection.execute(query)] == expected


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_query_of_the_website(question: str, written: Path) -> None:
    with closing(sqlite3.connect(f"file:{written}?mode=ro", uri=True)) as connection:
        (execution,) = connection.execute("SELECT max(execution_id) FROM v_executions").fetchone()
        parameters = {"session": story.SESSION, "variable": "score", "execution": execution, "time": "2100"}
        assert connection.execute(QUESTIONS[question], parameters).fetchall()


def program_with(library: str) -> str:
    pytest.importorskip(library, reason=f"{library} is not installed here")
    (program,) = [text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if f"import {library}" in text]
    return str(program)


def test_the_program_with_pandas(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = program_with("pandas")
    monkeypatch.chdir(written.parent)
    exec(program, {})
    assert "temperature" in capsys.readouterr().out


def test_the_program_with_duckdb(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = program_with("duckdb")
    import duckdb

    try:
        duckdb.connect().execute("LOAD sqlite")
    except duckdb.Error as error:
        pytest.skip(f"DuckDB's extension for SQLite is not here: {error}")
    monkeypatch.chdir(written.parent)
    exec(program, {})
    assert "improve" in capsys.readouterr().out
