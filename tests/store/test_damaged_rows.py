"""Damage each column of each table in turn: the check reports it, audits fail with a sentence, other sessions work.

The damage is what an earlier release, a user with sqlite3, or a disk could leave: values that the column's type allows,
and values without a meaning. Where such a value is legal, it is listed in `LEGAL`.
"""

import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest
import typer

from dspex_persist import cli
from dspex_persist.state import commands as c
from dspex_persist.state.audit import HistoryQuery
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import (
    DamagedSessionError,
    IdempotencyConflictError,
    InternalError,
    OpenError,
    StateError,
)
from dspex_persist.state.model import Origin
from dspex_persist.state.store import maintenance
from dspex_persist.state.store.schema import metadata as tables
from tests.assets.make_database import fill

QUESTIONS: Final = [
    ["history", ""],
    ["history", "main"],
    ["executions"],
    ["commits"],
    ["sessions"],
    ["show", "exec_84"],
    ["state", "main"],
    ["diff", "main", "--from", "20"],
    ["blame", "main"],
    ["report", "main"],
    ["denials"],
    ["verify"],
]
LARGE: Final = 2**62
COLUMNS = [(table.name, column.name) for table in tables.tables.values() for column in table.columns]
DAMAGE: dict[type, list[Any]] = {
    int: [-1, LARGE],
    float: [-1.0],
    str: ["unknown", '{"a":1}'],
    bytes: [b"\x00"],
}
DOCUMENTS: Final = {"body", "constraints", "metadata", "optimization", "result", "spec", "value"}
"""The columns of JSON."""
# Any text is a valid key, and outcomes and the ends of sessions may be dated right before 1970.
LEGAL: Final = {
    *(("outcomes", "idempotency_key", damage) for damage in DAMAGE[str]),
    ("outcomes", "created_at", -1),
    ("sessions", "expires_at", -1),
    # It only determines the order of the rows.
    ("dependencies", "dependency_key", -1),
    # Some of the first commits came with an import: those of another file may have done so, too.
    ("imports", "first_sequence", 1),
    # A clock may have been wrong, and whoever calls may have any name.
    ("denials", "denial_key", LARGE),
    ("denials", "at", -1),
    ("denials", "count", LARGE),
    *(
        ("denials", column, damage)
        for column in ("identity", "peer", "rpc", "session_id", "missing")
        for damage in DAMAGE[str]
    ),
}
ELSEWHERE: Final = "short"
"""A session of which nothing is damaged."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with every kind of everything. Only to be read."""
    path = tmp_path_factory.mktemp("sound") / "sound.db"
    fill(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("INSERT INTO imports VALUES (3, 4)")
        refused = (1, 60_000_000, 60_000_000, "ann", "127.0.0.1:5000", "SetVariable", "main", "write", 1)
        connection.execute(f"INSERT INTO denials VALUES ({', '.join('?' * len(refused))})", refused)
        connection.execute("PRAGMA journal_mode = DELETE")
    return path


@pytest.fixture
def path(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sound, tmp_path / "s.db"))


@pytest.fixture(scope="module", autouse=True)
def prepared() -> Iterator[None]:
    """Build the command line once: that takes longer than the queries."""
    with pytest.MonkeyPatch.context() as patch:
        command = typer.main.get_command(cli.app)
        patch.setattr(cli, "_command", lambda _: (command, command))
        yield


def alter(path: Path, statement: str, *parameters: object) -> bool:
    """Change one row, bypassing triggers and constraints; return False if SQLite itself cannot."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        # One transaction: two dozen would be most of the work.
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        try:
            changed = connection.execute(statement, parameters).rowcount
        except sqlite3.IntegrityError:
            return False
        finally:
            for _, sql in triggers:
                connection.execute(sql)
            connection.execute("COMMIT")
        assert changed == 1, f"{changed} rows: {statement}"
        return True


def damage_one(path: Path, table: str, column: str, damage: object) -> bool:
    keys = [key.name for key in tables.tables[table].primary_key]
    with closing(sqlite3.connect(path)) as connection:
        first = connection.execute(
            f"SELECT {', '.join(keys)} FROM {table} WHERE {column} IS NOT NULL AND {column} IS NOT ?", (damage,)
        ).fetchone()
    assert first is not None, f"nothing in {table}.{column}"
    same = " AND ".join(f"{key} = ?" for key in keys)
    return alter(path, f"UPDATE {table} SET {column} = ? WHERE {same}", damage, *first)


def problems_of(path: Path) -> list[str]:
    return [str(problem) for problem in maintenance.check(path).problems]


def ask(path: Path, capsys: pytest.CaptureFixture[str], questions: Sequence[list[str]] = QUESTIONS) -> None:
    """Each question is answered, or ends with one sentence."""
    for question in questions:
        more = ["--output", str(path.with_name("report.html"))] if question[0] == "report" else []
        code = cli._run(["audit", *question, *more, "--db", str(path)])
        output = capsys.readouterr()
        path.with_name("report.html").unlink(missing_ok=True)
        assert "Traceback" not in output.out + output.err
        assert code in (0, 1, 2, 3, 5), (question, output)
        if code not in (0, 3):
            assert re.fullmatch(r"error: .+\n", output.err), (question, output)


def use_everything(path: Path) -> None:
    """Calls that need the damaged rows fail with an error that says so; other calls and the engine work."""
    try:
        state = EmbeddedState(path)
    except OpenError:
        # It is refused as a whole, as the end of the log is.
        return
    with state:
        calls: list[Callable[[], object]] = [
            lambda: state.initialize_session("main"),
            lambda: state.set_variable("main", "temperature", 1.25, idempotency_key="once"),
            lambda: state.delete_variable("main", "prompt"),
        ]
        for name in ("temperature", "prompt"):
            calls += [
                lambda name=name: state.get_variable("main", name),
                lambda name=name: state.get_variable_history("main", name),
                lambda name=name: state.rollback_variable("main", name, 0),
                lambda name=name: state.run(c.GetVariable("main", name, bypass_cache=True)),
                lambda name=name: state.set_variable("main", name, state.get_value("main", name)),
            ]
        begin = c.BeginExecution("main", "count", idempotency_key="one")
        calls.append(lambda: state.submit(begin, Origin("ann", "ExecuteTool")).result())
        faults = [error for call in calls if isinstance(error := error_of(call), InternalError)]
        assert faults == []
        state.check_open()
        state.initialize_session("another")
        state.register_variable("another", "x", "integer", 1)
        assert state.set_variable("another", "x", 2) == 1


def error_of(call: Callable[[], object]) -> StateError | None:
    try:
        call()
    except StateError as error:
        return error
    return None


def test_a_sound_file_has_no_problems_and_answers_everything(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert problems_of(path) == []
    ask(path, capsys)
    use_everything(path)


@pytest.mark.parametrize(("table", "column"), COLUMNS)
@pytest.mark.parametrize("of_each", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_damage_is_found_and_fails_only_what_needs_it(
    sound: Path, path: Path, capsys: pytest.CaptureFixture[str], table: str, column: str, of_each: bool
) -> None:
    """One damage of each column is used, and a third of the questions asked; or all `of_each`: ten times as long."""
    described = tables.tables[table].columns[column]
    damages = [*DAMAGE[described.type.python_type], *([None] if described.nullable else [])]
    damages += ['{"a":', "[]"] if column in DOCUMENTS else []
    damaged: list[tuple[object, Path]] = []
    for number, damage in enumerate(damages):
        folder = path.parent / str(number)
        folder.mkdir()
        path = Path(shutil.copy(sound, folder))
        if damage_one(path, table, column, damage):
            damaged.append((damage, path))
    turn = COLUMNS.index((table, column))
    asked = QUESTIONS[turn % 3 :: 3]
    for number, (damage, path) in enumerate(damaged):
        problems = problems_of(path)
        assert bool(problems) != ((table, column, damage) in LEGAL), (damage, problems)
        ask(path, capsys, QUESTIONS if of_each else asked[number :: len(damaged)])
        if of_each or number == turn % len(damaged):
            use_everything(path)


class TestAnExecution:
    """Of session `main`, the one whose key is `one`."""

    DAMAGED = "SELECT execution_id FROM executions WHERE idempotency_key = 'one'"

    @pytest.mark.parametrize(
        "change",
        ["status = 'unknown'", "status = ''", "parent_id = execution_id"],
    )
    def test_that_is_malformed_fails_the_queries_about_its_session(
        self, path: Path, capsys: pytest.CaptureFixture[str], change: str
    ) -> None:
        with closing(sqlite3.connect(path)) as connection:
            ((execution_id,),) = connection.execute(self.DAMAGED).fetchall()
        assert alter(path, f"UPDATE executions SET {change} WHERE execution_id = ?", execution_id)
        assert any("executions." in problem for problem in problems_of(path))
        ask(path, capsys)
        assert cli._run(["audit", "show", execution_id, "--db", str(path)]) == 1
        assert capsys.readouterr().err.startswith(
            "error: session 'main' cannot be read: its data in the file is damaged"
        )
        assert cli._run(["audit", "executions", "unfinished", "--db", str(path)]) == 0
        use_everything(path)

    def test_of_unknown_status_is_not_repeated_under_its_key(self, path: Path) -> None:
        assert alter(path, "UPDATE executions SET status = 'unknown' WHERE idempotency_key = 'one'")
        with EmbeddedState(path) as state, pytest.raises(DamagedSessionError) as refused:
            state.run(c.BeginExecution("main", "count", idempotency_key="one"))
        assert refused.value.session_id == "main"


class TestAVersion:
    @pytest.mark.parametrize("column", ["kind", "source"])
    @pytest.mark.parametrize("code", [-1, 99])
    def test_of_an_invalid_kind_or_source(
        self, path: Path, capsys: pytest.CaptureFixture[str], column: str, code: int
    ) -> None:
        newest = "SELECT max(version) FROM versions WHERE variable_key = 1"
        assert alter(path, f"UPDATE versions SET {column} = ? WHERE variable_key = 1 AND version = ({newest})", code)
        assert cli._run(["audit", "history", "main", "temperature", "--db", str(path)]) == 1
        assert "session 'main' cannot be read" in capsys.readouterr().err
        assert cli._run(["audit", "history", "main", "prompt", "--db", str(path)]) == 0
        assert cli._run(["audit", "history", ELSEWHERE, "--db", str(path)]) == 0
        with maintenance.open_audit(path) as source:
            with pytest.raises(DamagedSessionError):
                list(source.iterate(HistoryQuery(session="main")))
            assert list(source.iterate(HistoryQuery(session=ELSEWHERE)))


class TestAnOutcome:
    """An outcome recorded for a SetVariable, which is the number of a version."""

    @pytest.mark.parametrize("result", ['"x"', "[2]", "null", '{"a": 1}', "2.5", "{}"])
    def test_that_its_command_cannot_return(self, path: Path, result: str) -> None:
        assert alter(path, "UPDATE outcomes SET result = ?", result)
        (problem,) = problems_of(path)
        assert problem == (
            "session 'main', outcome under idempotency key 'once': outcomes.result is not a result of SetVariable"
        )
        with EmbeddedState(path) as state:
            with pytest.raises((DamagedSessionError, IdempotencyConflictError)):
                state.set_variable("main", "temperature", 1.0, idempotency_key="once")
            state.set_variable("main", "temperature", 1.0, idempotency_key="twice")

    def test_of_a_session_that_never_was(self, path: Path) -> None:
        assert alter(path, "UPDATE outcomes SET session_id = ?", "missing")
        (problem,) = problems_of(path)
        assert problem == "session 'missing', outcome under idempotency key 'once': no session has this id"

    def test_of_no_command_without_a_hash_at_no_time(self, path: Path) -> None:
        assert alter(path, "UPDATE outcomes SET cause = 'GetVariable', fingerprint = 'x', created_at = ?", LARGE)
        problems = problems_of(path)
        assert len(problems) == 3
        assert any("'GetVariable'" in problem for problem in problems)


@pytest.mark.parametrize("range_", [(0, 3), (5, 4), (2, 1_000_000)])
def test_an_import_of_commits_that_do_not_exist(path: Path, range_: tuple[int, int]) -> None:
    assert alter(path, "UPDATE imports SET first_sequence = ?, last_sequence = ?", *range_)
    assert any("listed in imports, but they do not exist" in problem for problem in problems_of(path))


def test_metadata_that_is_not_text_is_shown_as_json(path: Path) -> None:
    assert alter(path, "UPDATE versions SET metadata = '{\"a\": [1]}' WHERE variable_key = 1 AND version = 1")
    with maintenance.open_audit(path) as source:
        assert source.version("main", "temperature", 1).metadata == {"a": "[1]"}
