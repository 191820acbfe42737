"""Executions and registered tools in the file: how they survive a restart, and keep a session alive."""

import json
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from freezegun import freeze_time

from dspex_persist.state import commands as c
from dspex_persist.state import errors
from dspex_persist.state.commands.executions import Begun, Verdict
from dspex_persist.state.groups import Job, Outcome
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import (
    ExecutionStatus,
    Failure,
    Isolation,
    Origin,
    RegisteredTool,
    Source,
    ToolParameter,
    ToolSpec,
    Value,
)
from dspex_persist.state.store import maintenance, session_store
from dspex_persist.state.store.blobs import INLINE_BYTES
from dspex_persist.state.store.engine import Durability, open_writer
from dspex_persist.state.store.session_store import StoreOptions, open_groups
from dspex_persist.state.tools.execution import Execution

ANN = Origin("ann", "ExecuteTool", Source.PYTHON)
COMMITTED = ExecutionStatus.COMMITTED
ENDINGS = [status for status in ExecutionStatus if status not in (ExecutionStatus.RUNNING, COMMITTED)]


class Stored:
    """A store, with short methods to use it."""

    def __init__(self, path: Path, options: StoreOptions | None = None) -> None:
        self.path = path
        self.store = open_groups(path, options)
        self.is_open = True

    def group(self, *wanted: c.Command[Any]) -> list[Outcome]:
        return self.store.write_group([Job(command, ANN) for command in wanted])

    def run(self, command: c.Command[Any]) -> Any:
        (outcome,) = self.group(command)
        if outcome.error is not None:
            raise outcome.error
        return outcome.result

    def begin(self, key: str | None = None, session_id: str = "s", **more: Any) -> Begun:
        begun: Begun = self.run(c.BeginExecution(session_id, "tool", idempotency_key=key, **more))
        return begun

    def execution(self) -> Execution:
        return Execution.begin("s", "tool", Isolation.SERIALIZABLE, self.begin(), ANN, self.run)

    def end(self, begun: Begun, status: ExecutionStatus = COMMITTED, session_id: str = "s", **more: Any) -> Verdict:
        verdict = Verdict(begun.execution_id, status, **more)
        finished: Verdict = self.run(c.FinishExecution(session_id, verdict))
        return finished

    def running(self, session_id: str = "s") -> list[str]:
        return list(self.run(c.ReadState(session_id)).executions)

    def reopen(self) -> "Stored":
        """Close it, and open it again."""
        self.close()
        return Stored(self.path)

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.store.close()

    def killed(self) -> "Stored":
        """Open a store on the files that a kill would have left at this moment."""
        path = self.path.with_name("killed.db")
        for suffix in ("", "-wal", ".anchor"):
            if Path(f"{self.path}{suffix}").exists():
                shutil.copy(f"{self.path}{suffix}", f"{path}{suffix}")
        return Stored(path)

    def close_sound(self) -> None:
        """Close it, and check that its tables match its log."""
        self.close()
        assert maintenance.check(self.path).problems == ()


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Stored]:
    """A store with session `s` and its integers a and b (0)."""
    stored = Stored(tmp_path / "sessions.db")
    begin_session(stored)
    yield stored
    stored.close()


def begin_session(stored: Stored, session_id: str = "s", **metadata: str) -> None:
    stored.run(c.InitializeSession(session_id, metadata))
    for name in "ab":
        stored.run(c.RegisterVariable(session_id, name, "integer", Value("0")))


def journal(path: Path) -> dict[str, Mapping[str, Any]]:
    """The table of executions, by id."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        rows = connection.execute("SELECT * FROM executions ORDER BY began_sequence")
        return {row["execution_id"]: dict(row) for row in rows}


def bodies(path: Path, kind: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        query = "SELECT body FROM events WHERE kind = ? ORDER BY sequence, ordinal"
        return [json.loads(body) for (body,) in connection.execute(query, [kind])]


def status_of(path: Path, begun: Begun) -> str:
    status: str = journal(path)[begun.execution_id]["status"]
    return status


# --- The journal ---


def test_the_table_follows_the_journal(stored: Stored) -> None:
    parent = stored.begin("key", attempt=2, parameters={"x": Value("1")})
    child = stored.begin(parent_id=parent.execution_id)
    row = journal(stored.path)[parent.execution_id]
    assert (row["began_sequence"], row["tool"], row["status"], row["attempt"]) == (
        parent.sequence,
        "tool",
        "running",
        2,
    )
    assert (row["idempotency_key"], row["parent_id"], row["ended_sequence"]) == ("key", None, None)
    verdict = Verdict(parent.execution_id, ExecutionStatus.FAILED, failure=Failure("ValueError", "no"), attempt=2)
    children = (Verdict(child.execution_id, COMMITTED, Value("1")),)
    finished = stored.run(c.FinishExecution("s", verdict, children))
    rows = journal(stored.path)
    assert [row["status"] for row in rows.values()] == ["failed", "aborted"]
    assert {row["ended_sequence"] for row in rows.values()} == {finished.sequence}
    assert rows[child.execution_id]["parent_id"] == parent.execution_id
    stored.reopen().close_sound()
    assert journal(stored.path) == rows


@pytest.mark.parametrize("status", [COMMITTED, *ENDINGS])
def test_every_status_leaves_a_sound_file(stored: Stored, status: ExecutionStatus) -> None:
    begun = stored.begin("key")
    stored.end(begun, status, result=Value("1") if status is COMMITTED else None)
    assert status_of(stored.path, begun) == status.value
    stored = stored.reopen()
    assert stored.running() == []
    assert status_of(stored.path, begun) == status.value
    stored.close_sound()


def test_writes_of_an_execution_survive_a_restart(stored: Stored) -> None:
    execution = stored.execution()
    large = Value(json.dumps("é" * INLINE_BYTES))
    origin = Origin("ann", execution.id, Source.PYTHON)
    variable_id = execution.run(c.RegisterVariable("s", "new", "string", large), origin)
    execution.run(c.SetVariable("s", "a", Value("5"), {"why": "tool"}), origin)
    execution.run(c.AddDependency("s", "new", "a"), origin)
    lock_id = execution.run(c.StartOptimization("s", "b", "mipro"), origin)
    finish = execution.finish(Verdict(execution.id, COMMITTED, Value("[1]")))
    (outcome,) = stored.store.write_group([Job(finish, origin)])
    assert outcome.result.status is COMMITTED
    stored = stored.reopen()
    new = stored.run(c.GetVariable("s", "new"))
    assert (new.id, json.loads(new.value.json)) == (variable_id, json.loads(large.json))
    assert stored.run(c.GetVariable("s", "b")).optimization.id == lock_id
    (version, _) = stored.run(c.GetVariableHistory("s", "a"))
    assert (version.cause, version.actor, version.sequence) == (execution.id, "ann", outcome.result.sequence)
    (edge,) = stored.run(c.ReadState("s")).dependencies
    assert (edge.from_id, edge.since) == (variable_id, outcome.result.sequence)
    stored.close_sound()


def test_an_execution_can_reuse_the_name_of_a_variable_that_it_deletes(stored: Stored) -> None:
    """The table has one live row for each name: within one commit, deletions must come before registrations."""
    execution = stored.execution()
    ids = [stored.run(c.GetVariable("s", "a")).id]
    for number in range(3):
        execution.run(c.DeleteVariable("s", "a"), ANN)
        ids.append(execution.run(c.RegisterVariable("s", "a", "integer", Value(str(number))), ANN))
        execution.run(c.SetVariable("s", "a", Value("7")), ANN)
    execution.run(c.RegisterVariable("s", "moment", "integer", Value("0")), ANN)
    execution.run(c.DeleteVariable("s", "moment"), ANN)
    assert stored.run(execution.finish(Verdict(execution.id, COMMITTED))).status is COMMITTED
    stored = stored.reopen()
    assert stored.run(c.GetVariable("s", "a")).id == ids[-1]
    lengths = [len(stored.run(c.GetVariableHistory("s", each))) for each in ids]
    assert lengths == [2, 3, 3, 2]
    assert [each.name for each in stored.run(c.ListVariables("s"))] == ["b", "a"]
    stored.close_sound()


def test_an_execution_may_begin_and_end_in_one_group(stored: Stored) -> None:
    """This happens if a call is cancelled immediately: one command begins it, the next ends it."""
    sequence = stored.store.log.head.sequence + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspex_persist.state.unit_of_work._TOKENS", iter(["0" * 12] * 9))
        outcomes = stored.group(
            c.BeginExecution("s", "tool", idempotency_key="key"),
            c.FinishExecution("s", Verdict(f"exec_{sequence}_{'0' * 24}", COMMITTED, Value("1"))),
            c.BeginExecution("s", "tool", idempotency_key="key"),
            c.BeginExecution("s", "tool"),
            c.CleanupSession("s"),
        )
    assert [outcome.error for outcome in outcomes] == [None] * 5
    assert outcomes[2].result.recorded.result == Value("1")
    assert [row["status"] for row in journal(stored.path).values()] == ["committed", "interrupted"]
    stored.reopen().close_sound()


def test_a_group_that_fails_leaves_executions_as_they_were(stored: Stored) -> None:
    begun = stored.begin("key")
    driver = stored.store.log._connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    (pages,) = driver.execute("PRAGMA page_count").fetchone()
    driver.execute(f"PRAGMA max_page_count = {pages + 1}")
    large = Value(json.dumps("x" * 200_000))
    verdict = Verdict(begun.execution_id, COMMITTED, large)
    outcomes = stored.group(c.FinishExecution("s", verdict), c.BeginExecution("s", "another"))
    assert [type(outcome.error) for outcome in outcomes] == [errors.StorageError] * 2
    assert stored.running() == [begun.execution_id]
    assert stored.begin("key").running is not None
    driver.execute("PRAGMA max_page_count = 1000000")
    assert stored.end(begun, result=large).status is COMMITTED
    assert stored.begin("key").recorded is not None
    stored.reopen().close_sound()


# --- Restarts ---


@pytest.mark.parametrize("kill", [False, True])
def test_opening_the_file_interrupts_running_executions(stored: Stored, kill: bool) -> None:
    parent = stored.begin()
    child = stored.begin(parent_id=parent.execution_id)
    begin_session(stored, "t")
    elsewhere = stored.begin(session_id="t")
    done = stored.begin()
    stored.end(done)
    last = stored.store.log.head.sequence
    opened = stored.killed() if kill else stored.reopen()
    assert [opened.running(each) for each in "st"] == [[], []]
    assert opened.store.log.head.sequence == last + 2, "one commit for each session"
    for each in (parent, child, elsewhere):
        assert status_of(opened.path, each) == "interrupted"
    assert status_of(opened.path, done) == "committed"
    with pytest.raises(errors.ExecutionEndedError):
        opened.end(parent)
    with pytest.raises(errors.ExecutionNotFoundError):
        opened.run(c.PublishVariable("s", parent.execution_id, "a", Value("1")))
    with closing(sqlite3.connect(f"file:{opened.path}?mode=ro", uri=True)) as connection:
        origins = connection.execute("SELECT actor, cause FROM commits WHERE sequence > ?", [last]).fetchall()
    assert origins == [("dspex-persist", "recovery")] * 2
    ended = bodies(opened.path, "execution_ended")[-3:]
    assert {(body["status"], body["reason"]) for body in ended} == {("interrupted", "the server ended while it ran")}
    again = opened.reopen()
    assert again.store.log.head.sequence == last + 2, "once is enough"
    again.close_sound()


def test_staged_writes_are_lost_and_published_ones_kept(stored: Stored) -> None:
    execution = stored.execution()
    execution.run(c.SetVariable("s", "a", Value("5")), ANN)
    stored.run(c.PublishVariable("s", execution.id, "b", Value("7")))
    opened = stored.killed()
    assert [opened.run(c.GetVariable("s", name)).value.json for name in "ab"] == ["0", "7"]
    assert [each.kind for each in opened.run(c.GetVariableHistory("s", "b"))] == ["published", "registered"]
    opened.close_sound()


def test_a_full_disk_does_not_prevent_opening_and_interruptions_are_recorded_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once there is space again, the next sweep records the ends; executions begun in between continue."""
    stored = Stored(tmp_path / "sessions.db")
    begin_session(stored)
    stale = [stored.begin() for _ in range(200)]
    stored.close()

    def open_full(path: Path, durability: Durability) -> Any:
        engine = open_writer(path, durability)
        with engine.connect() as connection:
            driver = connection.connection.driver_connection
            (pages,) = driver.execute("PRAGMA page_count").fetchone()
            driver.execute(f"PRAGMA max_page_count = {pages}")
        return engine

    monkeypatch.setattr(session_store, "open_writer", open_full)
    opened = Stored(stored.path)
    assert opened.run(c.GetVariable("s", "a")).value == Value("0")
    assert status_of(opened.path, stale[0]) == "running"
    opened.store.sweep()
    assert status_of(opened.path, stale[0]) == "running"
    driver = opened.store.log._connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    driver.execute("PRAGMA max_page_count = 1000000")
    new = opened.begin()
    opened.store.sweep()
    assert opened.running() == [new.execution_id]
    assert {status_of(opened.path, each) for each in (stale[0], stale[-1])} == {"interrupted"}
    head = opened.store.log.head
    opened.store.sweep()
    assert opened.store.log.head == head
    assert opened.end(new).status is COMMITTED
    opened.close_sound()


def test_a_session_that_ended_has_nothing_left_to_interrupt(stored: Stored) -> None:
    begun = stored.begin()
    stored.run(c.CleanupSession("s"))
    assert status_of(stored.path, begun) == "interrupted"
    assert bodies(stored.path, "execution_ended")[-1]["reason"] == "session cleaned up"
    stored.run(c.InitializeSession("s"))
    head = stored.store.log.head
    stored = stored.reopen()
    assert stored.store.log.head == head
    assert stored.running() == []
    stored.close_sound()


def test_running_executions_are_there_when_the_session_is_read_from_the_file(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "sessions.db", StoreOptions(cache_size_bytes=1))
    begin_session(stored)
    begun = stored.begin("key")
    begin_session(stored, "t")
    assert stored.store.find_loaded("s") is None
    assert stored.running() == [begun.execution_id]
    begin_session(stored, "u")
    repeated = stored.begin("key")
    assert repeated.running is not None
    assert (repeated.running.id, repeated.running.began_sequence) == (begun.execution_id, begun.sequence)
    begin_session(stored, "v")
    assert stored.end(begun).status is COMMITTED
    stored.close_sound()


# --- Idempotency keys ---


@pytest.mark.parametrize("result", [None, Value('{"é":[1,null]}'), Value("{}", b"\x00\xff")])
def test_a_key_finds_its_result_after_a_restart(stored: Stored, result: Value | None) -> None:
    begun = stored.begin("key", parameters={"x": Value("1")}, attempt=3)
    # Others end in the same commit: the right one must be found among them.
    child = stored.begin(parent_id=begun.execution_id)
    verdict = Verdict(begun.execution_id, COMMITTED, result, attempt=3)
    finished = stored.run(c.FinishExecution("s", verdict, (Verdict(child.execution_id, COMMITTED, Value("0")),)))
    stored = stored.reopen()
    head = stored.store.log.head
    again = stored.begin("key", parameters={"x": Value("1")})
    assert again.recorded is not None
    assert (again.recorded.id, again.recorded.status, again.recorded.result) == (begun.execution_id, COMMITTED, result)
    assert (again.recorded.sequence, again.recorded.attempt) == (finished.sequence, 3)
    with pytest.raises(errors.IdempotencyConflictError, match="key"):
        stored.begin("key", parameters={"x": Value("2")})
    assert stored.store.log.head == head
    stored.close_sound()


@pytest.mark.parametrize("status", ENDINGS)
def test_the_key_of_a_failed_execution_can_be_used_again_after_a_restart(
    stored: Stored, status: ExecutionStatus
) -> None:
    begun = stored.begin("key")
    stored.end(begun, status)
    stored = stored.reopen()
    again = stored.begin("key")
    assert again.snapshot is not None
    stored.end(again, result=Value("2"))
    stored = stored.reopen()
    last = stored.begin("key").recorded
    assert last is not None
    assert (last.id, last.result) == (again.execution_id, Value("2"))
    stored.close_sound()


def test_the_key_of_an_interrupted_execution_can_be_used_again(stored: Stored) -> None:
    begun = stored.begin("key")
    opened = stored.killed()
    again = opened.begin("key")
    assert again.snapshot is not None
    assert again.execution_id != begun.execution_id
    opened.close_sound()


def test_keys_end_with_their_session(stored: Stored) -> None:
    stored.end(stored.begin("key"), result=Value("1"))
    stored.run(c.CleanupSession("s"))
    stored.run(c.InitializeSession("s"))
    assert stored.begin("key", parameters={"x": Value("1")}).snapshot is not None
    stored = stored.reopen()
    assert stored.begin("key", parameters={"x": Value("1")}).snapshot is not None
    stored.close_sound()


def test_keys_of_executions_outlast_those_of_other_requests(tmp_path: Path) -> None:
    """The journal is kept, and so are the answers in it."""
    with freeze_time("2030-01-01") as frozen:
        stored = Stored(tmp_path / "sessions.db", StoreOptions(outcome_retention_s=10))
        begin_session(stored)
        stored.end(stored.begin("key"), result=Value("1"))
        frozen.tick(timedelta(days=400))
        stored.store.sweep()
        assert stored.begin("key").recorded is not None
        stored.close_sound()


# --- Times to live ---


def test_a_session_in_which_a_tool_runs_does_not_expire(tmp_path: Path) -> None:
    with freeze_time("2030-01-01") as frozen:
        stored = Stored(tmp_path / "sessions.db")
        begin_session(stored, ttl_seconds="10")
        begun = stored.begin()
        frozen.tick(timedelta(hours=5))
        assert (stored.store.sweep(), stored.store.expired()) == (0, [])
        assert stored.run(c.GetVariable("s", "a")).version == 0
        frozen.tick(timedelta(hours=5))
        assert stored.end(begun).status is COMMITTED
        frozen.tick(9)
        assert stored.store.sweep() == 0
        assert stored.run(c.Heartbeat("s"))
        frozen.tick(12)
        assert stored.store.sweep() == 1
        with pytest.raises(errors.SessionNotFoundError):
            stored.begin()
        stored.close_sound()


def test_sessions_in_use_do_not_prevent_others_from_being_swept(tmp_path: Path) -> None:
    """No matter how many there are: a sweep handles a hundred at a time."""
    with freeze_time("2030-01-01") as frozen:
        stored = Stored(tmp_path / "sessions.db")
        for number in range(120):
            stored.run(c.InitializeSession(f"used {number}", {"ttl_seconds": "10"}))
            stored.begin(session_id=f"used {number}")
        frozen.tick(1)
        stored.run(c.InitializeSession("s", {"ttl_seconds": "10"}))
        frozen.tick(3600)
        assert stored.store.sweep() == 1
        stored.close_sound()


def test_a_session_with_a_killed_execution_expires_later(tmp_path: Path) -> None:
    """It was in use until then: its TTL begins when the kill is noticed, and it can be resumed meanwhile."""
    with freeze_time("2030-01-01") as frozen:
        stored = Stored(tmp_path / "sessions.db")
        begin_session(stored, ttl_seconds="10")
        begun = stored.begin()
        frozen.tick(3600)
        opened = stored.killed()
        assert status_of(opened.path, begun) == "interrupted"
        assert opened.store.sweep() == 0
        assert opened.run(c.Heartbeat("s"))
        frozen.tick(12)
        assert opened.store.sweep() == 1
        opened.close_sound()
        stored.close()


# --- Tools of workers ---

PARAMETERS = (
    ToolParameter("n", "integer", "how many", False, Value("3"), '{"min":0}'),
    ToolParameter("wörd", "any"),
)
FULL = ToolSpec(
    "far", "lives elsewhere", PARAMETERS, True, True, ("a", "b"), Isolation.SNAPSHOT, 3, 2.5, {"version": "1", "ö": "ß"}
)


def test_registered_tools_survive_a_restart(stored: Stored) -> None:
    tools = {
        "far": RegisteredTool(FULL, "w1", "unix:/tmp/w1"),
        "near": RegisteredTool(ToolSpec("near"), "w1", ""),
    }
    stored.run(c.RegisterTools("s", "w1", tuple(tools.values())))
    head = stored.store.log.head
    for opened in (stored.killed(), stored.reopen()):
        assert opened.run(c.ListTools("s")) == tools
        assert opened.run(c.GetSession("s")).tool_count == 2
        opened.run(c.RegisterTools("s", "w1", (tools["far"],)))
        assert opened.store.log.head == head, "it is the same as it was"
        opened.close_sound()


def test_a_tool_registered_again_is_replaced(stored: Stored) -> None:
    first, second = (RegisteredTool(FULL, worker, f"unix:/tmp/{worker}") for worker in ("w1", "w2"))
    stored.group(c.RegisterTools("s", "w1", (first,)), c.RegisterTools("s", "w2", (second,)))
    assert len(bodies(stored.path, "tools_registered")) == 2
    stored = stored.reopen()
    assert stored.run(c.ListTools("s")) == {"far": second}
    twice = RegisteredTool(ToolSpec("far", "the last of its name"), "w3", "unix:/tmp/w3")
    stored.run(c.RegisterTools("s", "w3", (first, twice)))
    stored = stored.reopen()
    assert stored.run(c.ListTools("s")) == {"far": twice}
    stored.close_sound()


def test_tools_that_their_worker_took_away_stay_away(stored: Stored) -> None:
    first, second = (RegisteredTool(replace(FULL, name=name), worker) for name, worker in (("a", "w1"), ("b", "w2")))
    stored.group(c.RegisterTools("s", "w1", (first,)), c.RegisterTools("s", "w2", (second,)))
    stored.run(c.RegisterTools("s", "w1", ()))
    head = stored.store.log.head
    stored.run(c.RegisterTools("s", "w1", ()))
    assert stored.store.log.head == head, "it has none"
    for opened in (stored.killed(), stored.reopen()):
        assert opened.run(c.ListTools("s")) == {"b": second}
        opened.close_sound()
    stored = stored.reopen()
    stored.run(c.RegisterTools("s", "w1", (first,)))
    assert set(stored.run(c.ListTools("s"))) == {"a", "b"}
    stored.close_sound()


def test_tools_belong_to_their_session(stored: Stored) -> None:
    stored.run(c.RegisterTools("s", "w1", (RegisteredTool(FULL, "w1"),)))
    stored.run(c.InitializeSession("t"))
    stored.run(c.CleanupSession("s"))
    stored.run(c.InitializeSession("s"))
    stored = stored.reopen()
    assert [stored.run(c.ListTools(each)) for each in "st"] == [{}, {}]
    stored.close_sound()


def test_a_registration_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "sessions.db", StoreOptions(limits=Limits(tools_per_session=1)))
    begin_session(stored)
    tools = tuple(RegisteredTool(ToolSpec(name), "w1") for name in ("x", "y"))
    with pytest.raises(errors.LimitExceededError):
        stored.run(c.RegisterTools("s", "w1", tools))
    assert stored.run(c.ListTools("s")) == {}
    stored.close_sound()


# --- Detecting tampering ---


@pytest.mark.parametrize(
    ("statement", "problem_text"),
    [
        ("UPDATE executions SET status = 'committed'", "executions.status is 'committed', the log says 'failed'"),
        ("UPDATE executions SET tool = 'another'", "executions.tool is 'another', the log says 'tool'"),
        ("UPDATE executions SET ended_sequence = NULL", "executions.ended_sequence is empty, the log says"),
        ("DELETE FROM executions", "its row in executions is missing"),
        ("UPDATE tools SET address = 'evil:1'", "tools.address is 'evil:1', the log says 'unix:/tmp/w1'"),
        ("DELETE FROM tools", "its row in tools is missing"),
        ("INSERT INTO tools SELECT session_key, 'evil', '', '', spec, 1 FROM tools", "no commit of this session"),
    ],
)
def test_a_check_reports_changes(stored: Stored, statement: str, problem_text: str) -> None:
    """test_verify changes each column and row of both tables."""
    stored.run(c.RegisterTools("s", "w1", (RegisteredTool(FULL, "w1", "unix:/tmp/w1"),)))
    stored.end(stored.begin(), ExecutionStatus.FAILED)
    stored.close()
    with closing(sqlite3.connect(stored.path, isolation_level=None)) as connection:
        assert connection.execute(statement).rowcount == 1
    (problem,) = maintenance.check(stored.path).problems
    assert problem_text in problem.what
    assert problem.where.startswith("session 's', ")
    open_groups(stored.path).close()


@pytest.mark.parametrize("kind", ["tools_registered", "execution_began", "execution_ended"])
def test_a_check_reports_changes_of_the_journal(stored: Stored, kind: str) -> None:
    stored.run(c.RegisterTools("s", "w1", (RegisteredTool(FULL, "w1", "unix:/tmp/w1"),)))
    stored.end(stored.begin(metadata={"user": "w1"}), ExecutionStatus.FAILED, failure=Failure("ValueError", "w1"))
    stored.close()
    with closing(sqlite3.connect(stored.path, isolation_level=None)) as connection:
        connection.execute("DROP TRIGGER events_no_update")
        changed = connection.execute("UPDATE events SET body = replace(body, 'w1', 'w2') WHERE kind = ?", [kind])
        assert changed.rowcount == 1
    problems = maintenance.check(stored.path).problems
    assert any("its rows do not match its hash" in problem.what for problem in problems)
    with pytest.raises(errors.LostCommitsError):
        open_groups(stored.path)


# The history of a name that no variable has any more


def history_of(execution: Execution, name: str) -> list[tuple[int, str | None]] | None:
    try:
        history = execution.run(c.GetVariableHistory("s", name), ANN)
    except errors.VariableNotFoundError:
        return None
    return [(each.version, each.value.json if each.value is not None else None) for each in history]


def make_and_delete(name: str, value: str) -> list[c.Command[Any]]:
    return [c.RegisterVariable("s", name, "integer", Value(value)), c.DeleteVariable("s", name)]


@pytest.mark.parametrize("had_one", [True, False])
@pytest.mark.parametrize("is_live", [True, False])
@pytest.mark.parametrize("isolation", list(Isolation))
def test_the_history_of_a_deleted_name_stays_the_same_or_conflicts(
    stored: Stored, isolation: Isolation, is_live: bool, had_one: bool
) -> None:
    """Meanwhile other callers give the name to another variable, and may delete that as well."""
    begin_session(stored)
    if had_one:
        stored.group(*make_and_delete("x", "1"))
    seen = [(1, None), (0, "1")] if had_one else None
    execution = Execution.begin("s", "tool", isolation, stored.begin(), ANN, stored.run)
    asks_first = history_of(execution, "x")
    stored.group(*make_and_delete("x", "2")[: 1 if is_live else 2])
    assert asks_first == history_of(execution, "x") == seen
    finished: Verdict = stored.run(execution.finish(Verdict(execution.id, COMMITTED)))
    expected = ExecutionStatus.CONFLICT if isolation is Isolation.SERIALIZABLE else COMMITTED
    assert finished.status is expected
    assert [conflict.name for conflict in finished.conflicts] == (["x"] if expected is not COMMITTED else [])


def test_the_history_of_a_name_that_another_variable_had_at_first(stored: Stored) -> None:
    begin_session(stored)
    stored.group(*make_and_delete("x", "1"))
    execution = Execution.begin("s", "tool", Isolation.SNAPSHOT, stored.begin(), ANN, stored.run)
    stored.group(*make_and_delete("x", "2"))
    assert history_of(execution, "x") == [(1, None), (0, "1")]


def test_variables_with_the_name_in_the_same_group_count(stored: Stored) -> None:
    begin_session(stored)
    begin_session(stored, "other")
    stored.group(*make_and_delete("x", "1"))
    first, second = stored.execution(), stored.execution()
    assert history_of(first, "x") == history_of(second, "x") == [(1, None), (0, "1")]
    others = [replace(command, session_id="other") for command in make_and_delete("x", "2")]
    finishes = [each.finish(Verdict(each.id, COMMITTED)) for each in (first, second)]
    outcomes = stored.group(*others, finishes[0], *make_and_delete("x", "2"), finishes[1])
    assert outcomes[2].result.status is COMMITTED
    assert outcomes[-1].result.status is ExecutionStatus.CONFLICT
