"""Recordings of files: what an export contains, what an import writes or leaves unchanged, and forks."""

import io
import json
import os
import shutil
import sqlite3
import stat
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from freezegun import freeze_time

from dspex_persist.audit import CommitQuery
from dspex_persist.state import commands as c
from dspex_persist.state import imports
from dspex_persist.state.commands.executions import Verdict
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import (
    DatabaseInUseError,
    InternalError,
    InvalidArgumentError,
    InvalidValueError,
    NotADatabaseError,
    NotInHistoryError,
    RecordingError,
    SessionExistsError,
    SessionPrunedError,
    StorageError,
)
from dspex_persist.state.groups import Job, Outcome
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import ExecutionStatus, PrunePolicy, Value
from dspex_persist.state.recording import RecordedCommit, read_recording, write_recording
from dspex_persist.state.store import maintenance
from dspex_persist.state.store.maintenance import transfer
from dspex_persist.state.store.session_store import StoreOptions, open_groups
from dspex_persist.state.values import encode
from dspex_persist.wiring.recordings import import_session, open_recording
from tests.memory import MemoryGroups

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SENSITIVE = {"sensitive": "true"}


@pytest.fixture(scope="module")
def _empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("empty") / "empty.db"
    open_groups(path).close()
    return path


@pytest.fixture
def path(_empty: Path, tmp_path: Path) -> Path:
    """A database without sessions: migrating one takes longer than most of these tests."""
    return Path(shutil.copy(_empty, tmp_path / "sessions.db"))


@pytest.fixture
def other(_empty: Path, tmp_path: Path) -> Path:
    """Another one, with a session in it."""
    other = Path(shutil.copy(_empty, tmp_path / "other.db"))
    with EmbeddedState(other) as state:
        state.initialize_session("there")
        state.register_variable("there", "x", "integer", 1)
    return other


@pytest.fixture
def state(path: Path) -> Iterator[EmbeddedState]:
    """The engine on it, with session `s` and its integer x (0)."""
    with EmbeddedState(path) as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 0)
        yield state


def write(state: EmbeddedState, values: Iterable[object], name: str = "x") -> None:
    """One commit each, all in a few groups."""
    writes = [state.submit(c.SetVariable("s", name, encode(value))) for value in values]
    for each in writes:
        each.result()


def exported(path: Path, session_id: str = "s", **more: Any) -> str:
    written = io.StringIO()
    transfer.export_session(path, session_id, written, **more)
    return written.getvalue()


def imported(path: Path, text: str, **more: Any) -> transfer.ImportReport:
    return transfer.import_session(path, io.StringIO(text), **more)


def content(path: Path) -> dict[str, list[Any]]:
    """All that the file has, table by table."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return {name: connection.execute(f"SELECT * FROM {name}").fetchall() for name in names}


def sessions(path: Path) -> list[tuple[str, int]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT session_id, started_sequence FROM sessions ORDER BY session_key").fetchall()


def without_answers(text: str) -> str:
    header, commits = read_recording(io.StringIO(text))
    written = io.StringIO()
    write_recording(header, (replace(commit, answer=None) for commit in commits), written)
    return written.getvalue()


# --- Export ---


def test_an_import_restores_everything(filled: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.db"
    with EmbeddedState(target) as state:
        state.initialize_session("there")
    count = 0
    for session_id, started in sessions(filled):
        try:
            text = exported(filled, session_id, started=started, reveal=True)
        except SessionPrunedError:
            continue
        # Several had the same id, and some of them live still.
        report = imported(target, text, session_id=f"copy {started}")
        again = exported(target, f"copy {started}", reveal=True)
        # Its answers were given to requests that name the other id.
        assert again.replace(f'"copy {started}"', json.dumps(session_id, ensure_ascii=False)) == without_answers(text)
        assert report.commits == len(text.splitlines()) - 1
        count += 1
    assert count > 5
    assert maintenance.check(target).problems == ()


def test_a_recording_is_as_of_its_beginning(state: EmbeddedState, path: Path) -> None:
    write(state, range(1, 1200))
    with open_recording(path, "s") as (header, commits):
        first = next(commits)
        state.set_variable("s", "x", 5000)
        state.cleanup_session("s")
        state.initialize_session("s")
        rest = list(commits)
    assert (first.number, rest[-1].number, header.commits) == (1, 1201, 1201)
    (last,) = rest[-1].versions
    assert last.value == Value("1199")
    assert [each.number for each in rest] == list(range(2, 1202))


def test_no_snapshot_is_held_while_a_recording_is_read(state: EmbeddedState, path: Path) -> None:
    """A snapshot would keep the WAL from being emptied for as long as it takes to write the file."""
    write(state, range(600))
    _, commits = state.record("s")
    next(commits)
    with closing(sqlite3.connect(path)) as connection:
        busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert busy == 0
    assert len(list(commits)) == 601


def test_of_several_sessions_with_an_id_the_newest_or_the_one_named(state: EmbeddedState, path: Path) -> None:
    state.cleanup_session("s")
    state.initialize_session("s")
    assert [len(exported(path, **more).splitlines()) - 1 for more in ({}, {"started": 1}, {"started": 4})] == [1, 3, 1]
    with pytest.raises(InvalidArgumentError, match="began with commit 1 and 4, not 2"):
        exported(path, started=2)
    with pytest.raises(NotInHistoryError):
        exported(path, "ghost\ud800")


def test_values_of_sensitive_variables_are_left_out(state: EmbeddedState, path: Path) -> None:
    state.register_variable("s", "key", "string", "secret 1")
    state.set_variable("s", "key", "secret 2", metadata=SENSITIVE)
    state.rollback_variable("s", "key", 0)
    state.delete_variable("s", "key")
    masked = exported(path)
    assert "secret" not in masked
    header, commits = read_recording(io.StringIO(masked))
    assert header.masked
    versions = [each for commit in commits for each in commit.versions if each.name == "key"]
    assert [(each.masked, each.value) for each in versions] == [(True, None)] * 3 + [(False, None)]
    assert "secret 1" in exported(path, reveal=True)
    assert '"masked": false' in exported(path, reveal=True)
    assert [head.masked for head, _ in (state.record("s"), state.record("s", reveal=True))] == [True, False]


@pytest.mark.parametrize("spelling", ["True", "TRUE", "true"])
def test_sensitive_is_case_insensitive(state: EmbeddedState, path: Path, spelling: str) -> None:
    state.register_variable("s", "key", "string", "secret", metadata={"sensitive": spelling})
    assert "secret" not in exported(path)
    with state.audit() as audit:
        variable = audit.state("s")[-1]
    assert (variable.name, variable.masked, variable.value) == ("key", True, None)
    with closing(sqlite3.connect(path)) as connection:
        for view in ("v_variable_history", "v_current_variables"):
            rows = connection.execute(f"SELECT value, sensitive FROM {view} WHERE name = 'key'").fetchall()
            assert rows == [(None, 1)]


def test_a_pruned_session_is_not_recorded_in_part(state: EmbeddedState, path: Path) -> None:
    write(state, range(5))
    _, commits = state.record("s")
    state.prune(PrunePolicy(keep_versions=1), confirm=True)
    with pytest.raises(SessionPrunedError, match="commit 8 pruned"):
        state.record("s")
    with pytest.raises(SessionPrunedError, match="commit 8 pruned"):
        list(commits)
    assert exported_files(path) == []


def exported_files(path: Path) -> list[str]:
    return [each.name for each in path.parent.iterdir() if each.suffix in (".jsonl", ".partial")]


def test_the_file_appears_whole_or_not_at_all(
    state: EmbeddedState, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = path.with_name("s.jsonl")
    target.write_text("what was there")
    report = transfer.export_session(path, "s", target)
    assert (report.commits, report.target, report.masked) == (2, target, False)
    text = target.read_text()
    assert text == exported(path)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    state.set_variable("s", "x", 1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InvalidArgumentError, match="No space left"):
        transfer.export_session(path, "s", target)
    monkeypatch.undo()
    assert target.read_text() == text
    assert exported_files(path) == ["s.jsonl"]


def test_a_target_that_cannot_be_written_is_reported(state: EmbeddedState, path: Path) -> None:
    for target in (path.with_name("missing") / "s.jsonl", path.parent, Path("/dev/full")):
        with pytest.raises(InvalidArgumentError, match="cannot write"):
            transfer.export_session(path, "s", target)
    full = Path("/dev/full").open("w")  # noqa: SIM115 - closing it fails, too
    with pytest.raises(InvalidArgumentError, match="No space left"):
        transfer.export_session(path, "s", full)
    with pytest.raises(OSError, match="No space left"):
        full.close()


def test_progress_is_reported(state: EmbeddedState, path: Path, other: Path) -> None:
    write(state, range(250))
    reports: list[tuple[str, int, int]] = []
    text = exported(path, progress=lambda *now: reports.append(now))
    imported(other, text, progress=lambda *now: reports.append(now))
    for step in ("writing commits", "importing commits"):
        assert [now[1:] for now in reports if now[0] == step] == [(0, 252), (100, 252), (200, 252), (252, 252)]


def test_memory_does_not_hold_the_session(state: EmbeddedState, path: Path, other: Path) -> None:
    state.register_variable("s", "text", "string", "")
    write(state, (f"{number:05}" * 30_000 for number in range(200)), "text")
    target = path.with_name("s.jsonl")
    tracemalloc.start()
    transfer.export_session(path, "s", target)
    with target.open(encoding="utf-8") as lines:
        transfer.import_session(other, lines)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert target.stat().st_size > 30_000_000
    assert peak < 20_000_000


# --- Import ---


def test_an_imported_session_lives_on(state: EmbeddedState, path: Path, other: Path) -> None:
    state.set_variable("s", "x", 1)
    report = imported(other, exported(path))
    assert (report.first_sequence, report.last_sequence, report.interrupted) == (3, 5, 0)
    with EmbeddedState(other) as copy:
        recorded = state.get_variable_history("s", "x")
        assert [each._replace(sequence=0) for each in copy.get_variable_history("s", "x")] == [
            each._replace(sequence=0) for each in recorded
        ]
        assert copy.get_session("s").created_at == state.get_session("s").created_at
        assert copy.set_variable("s", "x", 2) == 2
        assert copy.get_value("there", "x") == 1
    assert maintenance.check(other).problems == ()


def test_the_example_on_the_page_is_a_recording(other: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "recordings.md"
    _, example = page.read_text(encoding="utf-8").split("```json\n", 1)
    text = example[: example.index("```")]
    imported(other, text)
    assert exported(other) == text


def test_a_missing_file_is_created(state: EmbeddedState, path: Path) -> None:
    target = path.with_name("new.db")
    assert import_session(target, io.StringIO(exported(path))).commits == 2
    assert maintenance.check(target).problems == ()


def test_the_id_of_a_live_session_is_refused_and_another_accepted(
    state: EmbeddedState, path: Path, other: Path
) -> None:
    text = exported(path)
    imported(other, text)
    before = content(other)
    with pytest.raises(SessionExistsError, match="session 's' is live here already; use another session_id"):
        imported(other, text)
    assert content(other) == before
    imported(other, text, session_id="s2")
    with EmbeddedState(other) as copy:
        copy.cleanup_session("s")
        assert copy.get_value("s2", "x") == 0
    imported(other, text)
    assert [session_id for session_id, _ in sessions(other)] == ["there", "s", "s2", "s"]
    assert maintenance.check(other).problems == ()


def test_an_expired_session_does_not_prevent_an_import(path: Path, other: Path) -> None:
    with freeze_time(START) as clock:
        with EmbeddedState(other) as there:
            there.initialize_session("s", {"ttl_seconds": "60"})
        with EmbeddedState(path) as state:
            state.initialize_session("s", {"ttl_seconds": "60"})
        text = exported(path)
        with pytest.raises(SessionExistsError):
            imported(other, text)
        clock.tick(timedelta(hours=1))
        imported(other, text)
        with EmbeddedState(other) as copy:
            assert copy.get_session("s").created_at == START
            clock.tick(59)
            assert copy.heartbeat("s"), "its lifetime starts again with the import"
            clock.tick(61)
            assert not copy.heartbeat("s")
    assert maintenance.check(other).problems == ()


def damaged(text: str) -> Iterator[tuple[str, int]]:
    """The recording with something wrong near its end, and the line that is to be named."""
    lines = text.splitlines(keepends=True)
    yield "".join(lines[:-1]), len(lines) - 1
    yield "".join([*lines[:-1], lines[-1][:-10]]), len(lines)
    yield "".join([*lines[:-1], lines[-1].replace('"json": "299"', '"json": "null"')]), len(lines)


def test_a_bad_line_leaves_nothing(state: EmbeddedState, path: Path, other: Path) -> None:
    state.register_variable("s", "text", "string", "x" * 5000)
    write(state, range(300))
    text, before = exported(path), content(other)
    for damage, line in damaged(text):
        with pytest.raises(RecordingError) as caught:
            imported(other, damage, name="s.jsonl")
        assert (caught.value.name, caught.value.line) == ("s.jsonl", line)
        assert content(other) == before
    imported(other, text)
    assert maintenance.check(other).problems == ()


def test_a_refused_recording_makes_no_file(state: EmbeddedState, path: Path, tmp_path: Path) -> None:
    write(state, range(300))
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for damage, _ in damaged(exported(path)):
        with pytest.raises(RecordingError):
            imported(tmp_path / "there" / "new.db", damage)
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(NotADatabaseError, match="mkdir -p"):
        imported(tmp_path / "not" / "there" / "new.db", exported(path))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_store_continues_after_a_failed_import(state: EmbeddedState, path: Path, other: Path) -> None:
    """Its keys and numbers match the file again."""
    store = open_groups(other)
    good = [(commit,) for commit in state.record("s")[1]]

    def written(pages: Iterable[tuple[RecordedCommit]]) -> Outcome:
        (outcome,) = store.write_group([Job(c.ImportSession("s", pages, ""), imports.IMPORT)])
        return outcome

    assert isinstance(written([*good, good[0]]).error, SessionExistsError)
    assert isinstance(written(page for page in good if 1 / (1 - page[0].number % 2)).error, InternalError)
    assert written(good).error is None
    assert store.log.head.sequence == 4
    assert store.load("s") is not None
    store.close()
    assert maintenance.check(other).problems == ()


def test_a_disk_without_room_leaves_nothing(state: EmbeddedState, path: Path, other: Path) -> None:
    state.register_variable("s", "text", "string", "x" * 500_000)
    text, before = exported(path), content(other)
    store = open_groups(other)
    driver = store.log._connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    (pages,) = driver.execute("PRAGMA page_count").fetchone()
    driver.execute(f"PRAGMA max_page_count = {pages + 4}")
    _, commits = read_recording(io.StringIO(text))
    (outcome,) = store.write_group([Job(c.ImportSession("s", [tuple(commits)], ""), imports.IMPORT)])
    assert isinstance(outcome.error, StorageError)
    assert "nothing was written" in str(outcome.error)
    store.close()
    assert content(other) == before
    imported(other, text)
    assert maintenance.check(other).problems == ()


def test_a_masked_recording_is_refused(state: EmbeddedState, path: Path, other: Path) -> None:
    state.register_variable("s", "key", "string", "secret", metadata=SENSITIVE)
    with pytest.raises(RecordingError, match="export the session with reveal=True"):
        imported(other, exported(path))
    # Even if its header claims otherwise.
    with pytest.raises(RecordingError, match="kept out of the recording") as caught:
        imported(other, exported(path).replace('"masked": true}\n', '"masked": false}\n', 1))
    assert caught.value.line == 4
    assert sessions(other) == [("there", 1)]
    imported(other, exported(path, reveal=True))
    with EmbeddedState(other) as copy:
        assert copy.get_value("s", "key") == "secret"


def test_limits_are_those_of_the_importing_store(state: EmbeddedState, path: Path, other: Path) -> None:
    state.register_variable("s", "y", "string", "x" * 100)
    options = StoreOptions(limits=Limits(value_size_bytes=50))
    with pytest.raises(RecordingError, match=r"line 4: .*setting value_size_bytes"):
        imported(other, exported(path), options=options)
    assert sessions(other) == [("there", 1)]


def test_running_executions_are_interrupted(state: EmbeddedState, path: Path, other: Path) -> None:
    begun = state.run(c.BeginExecution("s", "tool", idempotency_key="key"))
    report = imported(other, exported(path))
    assert (report.commits, report.interrupted) == (4, 1)
    with EmbeddedState(other) as copy:
        execution = copy.audit().execution(begun.execution_id.replace("exec_3_", "exec_5_"))
        assert (execution.summary.status, execution.reason) == ("interrupted", "it ran when the session was recorded")
    text = exported(other)
    imported(other, text, session_id="again")
    assert exported(other, "again").replace('"again"', '"s"') == text
    assert maintenance.check(other).problems == ()


def test_a_used_key_returns_the_same_answer(state: EmbeddedState, path: Path, other: Path) -> None:
    begun = state.run(c.BeginExecution("s", "tool", idempotency_key="key"))
    verdict = Verdict(begun.execution_id, ExecutionStatus.COMMITTED, Value("7"))
    state.run(c.FinishExecution("s", verdict))
    imported(other, exported(path))
    with EmbeddedState(other) as copy:
        recorded = copy.run(c.BeginExecution("s", "tool", idempotency_key="key")).recorded
        assert recorded is not None
        assert recorded.result == Value("7")


def test_a_file_that_is_open_is_refused(state: EmbeddedState, path: Path) -> None:
    with pytest.raises(DatabaseInUseError, match="in this process already"):
        imported(path, exported(path), session_id="copy")


def test_a_recording_in_memory_is_the_session_as_of_any_commit(state: EmbeddedState) -> None:
    state.set_variable("s", "x", 1)
    state.delete_variable("s", "x")
    header, commits = state.record("s")
    memory, seen = MemoryGroups(), []
    for commit in commits:
        memory.run(c.ImportCommit(header.session_id, commit))
        seen.append([each.value.json for each in memory.states["s"].variables.values()])
    assert seen == [[], ["0"], ["1"], []]


# --- Forks ---


def test_a_fork_is_the_session_as_of_a_point(state: EmbeddedState, path: Path) -> None:
    state.register_variable("s", "y", "float", 0.5, constraints={"min": 0}, metadata={"why": "so"})
    state.add_dependency("s", "y", "x", "uses")
    state.set_variable("s", "y", 1.5, metadata=SENSITIVE)
    state.start_optimization("s", "y", "mipro")
    head = state.head_sequence
    state.delete_variable("s", "x")
    state.register_variable("s", "z", "string", "later")
    for new, at, names in (("then", str(head), "x y"), ("now", "", "y z"), ("early", "2", "x"), ("before", "2^", "")):
        view = state.fork_session("s", new, at)
        assert [each.name for each in view.variables] == names.split()
        assert view.variables == state.list_variables(new)
    (x, y) = state.list_variables("then")
    assert (x.value, x.version, y.value, y.version) == (Value("0"), 0, Value("1.5"), 0)
    assert (y.constraints, y.metadata, y.optimization) == ('{"min":0}', {"why": "so", **SENSITIVE}, None)
    (edge,) = state.run(c.ReadState("then")).dependencies
    assert (edge.from_id, edge.to_id, edge.type) == (y.id, x.id, "uses")
    assert state.run(c.ReadState("now")).dependencies == ()
    summary = state.get_session("then")
    assert summary.metadata == {"forked_from": "s", "forked_at": str(head)}
    with pytest.raises(InvalidValueError):
        state.set_variable("then", "y", -1)
    state.set_variable("then", "y", 2)
    assert state.get_value("s", "y") == 1.5
    commit = next(state.audit().iterate(CommitQuery(session="then", newest_first=False)))
    assert (commit.cause, commit.events) == (
        "ForkSession",
        ("session_started", *["variable_registered"] * 2, "dependency_added"),
    )
    state.close()
    assert maintenance.check(path).problems == ()


def test_forks_are_refused_without_a_source_or_beyond_the_limits(state: EmbeddedState) -> None:
    state.initialize_session("t")
    with pytest.raises(SessionExistsError):
        state.fork_session("s", "t")
    with pytest.raises(NotInHistoryError):
        state.fork_session("ghost", "new")
    with pytest.raises(InvalidArgumentError, match="not a point"):
        state.fork_session("s", "new", "soon")
    state.cleanup_session("s")
    with pytest.raises(InvalidArgumentError, match="was not live"):
        state.fork_session("s", "new")
    assert [each.name for each in state.fork_session("s", "new", f"{state.head_sequence}^").variables] == ["x"]


def test_a_fork_of_a_copy_in_the_same_file_forks_the_copy(state: EmbeddedState, path: Path) -> None:
    """Both have variables of the same ids."""
    state.register_variable("s", "y", "integer", 0)
    state.add_dependency("s", "x", "y")
    text = exported(path)
    state.close()
    imported(path, text, session_id="copy")
    with EmbeddedState(path) as opened:
        opened.set_variable("copy", "x", 7)
        opened.fork_session("copy", "fork")
        assert opened.get_value("fork", "x") == 7
        assert len(opened.run(c.ReadState("fork")).dependencies) == 1


def test_a_missing_file_has_no_recording(tmp_path: Path) -> None:
    with pytest.raises(NotADatabaseError), open_recording(tmp_path / "missing.db", "s"):
        pass
