"""Executions of tools: their journal, and the view that each has of the session, over a backing in memory."""

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from freezegun import freeze_time

from dspex_persist.state import commands as c
from dspex_persist.state import errors
from dspex_persist.state.commands.executions import Begun, Step, Verdict, see
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import (
    ChangeKind,
    Conflict,
    EventKind,
    ExecutionStatus,
    Failure,
    Isolation,
    LogEntry,
    Origin,
    RegisteredTool,
    Seen,
    Source,
    ToolParameter,
    ToolSpec,
    Value,
)
from dspex_persist.state.tools.execution import Execution
from dspex_persist.state.tools.touched import is_transactional, may_block
from dspex_persist.state.unit_of_work import START, Drafts
from tests.deadline import within
from tests.memory import MemoryGroups

ANN, BOB = Origin("ann", "ExecuteTool"), Origin("bob", "SetVariable")
COMMITTED, CONFLICT = ExecutionStatus.COMMITTED, ExecutionStatus.CONFLICT
UNSUCCESSFUL = [
    ExecutionStatus.FAILED,
    ExecutionStatus.TIMED_OUT,
    ExecutionStatus.CANCELLED,
    ExecutionStatus.INTERRUPTED,
]
BOTH = [Isolation.SERIALIZABLE, Isolation.SNAPSHOT]


@pytest.fixture
def memory() -> MemoryGroups:
    """A session `s` with the integers a and b (0), and a second version of b."""
    backing = MemoryGroups()
    backing.run(c.InitializeSession("s"))
    for name in "ab":
        backing.run(c.RegisterVariable("s", name, "integer", Value("0")))
    backing.run(c.SetVariable("s", "b", Value("1")))
    return backing


class Running:
    """A running execution, as the code of a tool and a runner use it."""

    def __init__(self, memory: MemoryGroups, execution: Execution) -> None:
        self.memory = memory
        self.execution = execution
        self.id = execution.id
        self.origin = Origin("ann", execution.id, Source.PYTHON)

    def run(self, command: c.Command[Any], origin: Origin | None = None) -> Any:
        return self.execution.run(command, origin or self.origin)

    def get(self, name: str) -> str:
        json: str = self.run(c.GetVariable("s", name)).value.json
        return json

    def set(self, name: str, number: int) -> int:
        version: int = self.run(c.SetVariable("s", name, Value(str(number))))
        return version

    def names(self, pattern: str = "") -> list[str]:
        return [variable.name for variable in self.run(c.ListVariables("s", pattern))]

    def history(self, name: str, limit: int = 0, before: int | None = None) -> list[tuple[int, str | None]]:
        versions = self.run(c.GetVariableHistory("s", name, limit, before))
        return [(each.version, each.value.json if each.value else None) for each in versions]

    def publish(self, name: str, number: int) -> int:
        self.execution.check_can_publish(name)
        published = self.memory.run(c.PublishVariable("s", self.id, name, Value(str(number))), self.origin)
        self.execution.take_published(published)
        return published[0].version

    def call(self) -> "Running":
        """An execution that this one calls."""
        begun = self.memory.run(c.BeginExecution("s", "callee", parent_id=self.id), ANN)
        return Running(self.memory, self.execution.begin_child(begun, "callee"))

    def give_up(self) -> None:
        """Let the called execution fail: it is undone, and its caller continues."""
        self.execution.undo()
        self.finish(ExecutionStatus.FAILED)

    def return_to(self, caller: "Running") -> None:
        """Let the called execution succeed."""
        self.execution.close(COMMITTED.value)
        caller.execution.children.extend([Verdict(self.id, COMMITTED), *self.execution.children])

    def finish(self, status: ExecutionStatus = COMMITTED, result: Value | None = None) -> Verdict:
        self.execution.close(status.value)
        finished: Verdict = self.memory.run(self.execution.finish(Verdict(self.id, status, result)), self.origin)
        return finished

    def conflicts(self) -> list[str]:
        """The conflicts that keep it from committing, as text."""
        finished = self.finish()
        assert (finished.status is CONFLICT) == bool(finished.conflicts)
        return [str(conflict) for conflict in finished.conflicts]


def begin(memory: MemoryGroups, isolation: Isolation = Isolation.SERIALIZABLE) -> Running:
    begun = memory.run(c.BeginExecution("s", "tool", isolation=isolation), ANN)
    return Running(memory, Execution.begin("s", "tool", isolation, begun, ANN, memory.run))


def write(memory: MemoryGroups, name: str, number: int) -> int:
    return memory.run(c.SetVariable("s", name, Value(str(number))), BOB)


def values_of(memory: MemoryGroups) -> dict[str, str]:
    return {variable.name: variable.value.json for variable in memory.run(c.ListVariables("s"))}


def last_event(memory: MemoryGroups) -> dict[str, Any]:
    return dict(memory.commits[-1].events[-1].to_body())


def running_in(memory: MemoryGroups) -> list[str]:
    return list(memory.states["s"].executions)


# --- Beginning ---


def test_an_execution_begins_with_its_journal_entry(memory: MemoryGroups) -> None:
    parent = memory.run(c.BeginExecution("s", "caller"), ANN)
    command = c.BeginExecution(
        "s",
        "tool",
        {"x": Value("1"), "y": Value("{}", b"\x00")},
        {"user": "ann"},
        Isolation.SNAPSHOT,
        2,
        parent.execution_id,
        "key",
        "w1",
        "exec_1_ab",
    )
    begun = memory.run(command, ANN)
    assert begun.sequence == memory.sequence
    prefix, sequence, token = begun.execution_id.split("_")
    assert (prefix, sequence, len(bytes.fromhex(token))) == ("exec", str(memory.sequence), 12)
    (event,) = memory.commits[-1].events
    assert event.kind is EventKind.EXECUTION_BEGAN
    assert event.to_body() == {
        "execution_id": begun.execution_id,
        "tool": "tool",
        "parent_id": parent.execution_id,
        "idempotency_key": "key",
        "fingerprint": event.to_body()["fingerprint"],
        "parameters": {"x": {"json": "1"}, "y": {"json": "{}", "binary": "AA=="}},
        "metadata": {"user": "ann"},
        "isolation": "snapshot",
        "attempt": 2,
        "seed": begun.seed,
        "worker_id": "w1",
        "retry_of": "exec_1_ab",
    }
    assert len(event.to_body()["fingerprint"]) == 64
    running = memory.states["s"].executions[begun.execution_id]
    assert (running.tool, running.began_sequence, running.parent_id) == ("tool", begun.sequence, parent.execution_id)


def test_ids_and_seeds_are_never_the_same(memory: MemoryGroups) -> None:
    begun = [memory.run(c.BeginExecution("s", "tool"), ANN) for _ in range(20)]
    assert len({each.execution_id for each in begun}) == len({each.seed for each in begun}) == 20
    assert running_in(memory) == [each.execution_id for each in begun], "oldest first"


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (c.BeginExecution("missing", "tool"), errors.SessionNotFoundError),
        (c.BeginExecution("s", "tool", metadata={"commit_sequence": "1"}), errors.InvalidArgumentError),
        (c.BeginExecution("s", "tool", metadata={"x": "y" * 20_000}), errors.LimitExceededError),
        (c.BeginExecution("s", "tool", parent_id="exec_1_00"), errors.ExecutionEndedError),
        (c.BeginExecution("s", "tool", idempotency_key=""), errors.InvalidArgumentError),
        (c.BeginExecution("s", "tool", idempotency_key="a\nb"), errors.InvalidArgumentError),
        (c.BeginExecution("s", "tool", idempotency_key="x" * 256), errors.LimitExceededError),
    ],
)
def test_a_refused_begin_leaves_nothing_behind(
    memory: MemoryGroups, command: c.BeginExecution, error: type[errors.StateError]
) -> None:
    before = memory.sequence
    with pytest.raises(error):
        memory.run(command, ANN)
    assert (memory.sequence, running_in(memory)) == (before, [])


def test_an_ended_execution_cannot_call_another(memory: MemoryGroups) -> None:
    parent = begin(memory)
    parent.finish()
    with pytest.raises(errors.ExecutionEndedError):
        memory.run(c.BeginExecution("s", "callee", parent_id=parent.id), ANN)


def test_the_snapshot_is_for_the_execution_alone(memory: MemoryGroups) -> None:
    begun: Begun = memory.run(c.BeginExecution("s", "tool"), ANN)
    assert begun.snapshot is not None
    write(memory, "a", 5)
    assert begun.snapshot.variables["a"].version == 0
    begun.snapshot.variables.clear()
    assert values_of(memory) == {"a": "5", "b": "1"}


# --- Idempotency keys ---


def keyed(
    memory: MemoryGroups,
    key: str = "key",
    parameters: dict[str, Value] | None = None,
    session_id: str = "s",
    **more: Any,
) -> Begun:
    begun: Begun = memory.run(c.BeginExecution(session_id, "tool", parameters or {}, idempotency_key=key, **more), ANN)
    return begun


def end(memory: MemoryGroups, begun: Begun, status: ExecutionStatus = COMMITTED, **more: Any) -> Verdict:
    finished: Verdict = memory.run(c.FinishExecution("s", Verdict(begun.execution_id, status, **more)), ANN)
    return finished


def test_a_key_of_a_running_execution_begins_no_other(memory: MemoryGroups) -> None:
    first, before = keyed(memory), memory.sequence
    second = keyed(memory)
    assert (second.execution_id, second.snapshot, second.recorded) == (first.execution_id, None, None)
    assert second.running == memory.states["s"].executions[first.execution_id]
    assert memory.sequence == before


def test_a_key_of_a_committed_execution_finds_its_result(memory: MemoryGroups) -> None:
    first = keyed(memory, attempt=3)
    finished = end(memory, first, result=Value('"done"'), attempt=3)
    before = memory.sequence
    for _ in range(2):
        again = keyed(memory)
        assert again.recorded is not None
        assert again.snapshot is None
        assert (again.recorded.id, again.recorded.status) == (first.execution_id, COMMITTED)
        assert (again.recorded.result, again.recorded.attempt) == (Value('"done"'), 3)
        assert again.recorded.sequence == finished.sequence
    assert memory.sequence == before


@pytest.mark.parametrize("status", [*UNSUCCESSFUL, CONFLICT])
def test_a_key_of_an_execution_that_did_not_commit_can_be_used_again(
    memory: MemoryGroups, status: ExecutionStatus
) -> None:
    first = keyed(memory)
    end(memory, first, status)
    second = keyed(memory)
    assert second.execution_id != first.execution_id
    assert second.snapshot is not None
    end(memory, second, result=Value("2"))
    third = keyed(memory)
    assert third.recorded is not None
    assert third.recorded.result == Value("2")


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("parameters", [{"x": Value("2")}, {}, {"x": Value("1"), "y": Value("1")}])
def test_a_key_with_other_parameters_is_refused(
    memory: MemoryGroups, ended: bool, parameters: dict[str, Value]
) -> None:
    begun = keyed(memory, parameters={"x": Value("1")})
    if ended:
        end(memory, begun)
    with pytest.raises(errors.IdempotencyConflictError):
        keyed(memory, parameters=parameters)
    with pytest.raises(errors.IdempotencyConflictError):
        memory.run(c.BeginExecution("s", "another", {"x": Value("1")}, idempotency_key="key"), ANN)


def test_a_request_is_the_same_for_any_caller_and_attempt(memory: MemoryGroups) -> None:
    """Metadata, attempt and worker belong to the call, not to the request, and so does the order of the parameters."""
    first = keyed(memory, parameters={"x": Value("1"), "y": Value("2", b"3")}, metadata={"trace": "1"})
    again = keyed(
        memory, parameters={"y": Value("2", b"3"), "x": Value("1")}, metadata={"trace": "2"}, attempt=2, worker_id="w"
    )
    assert again.running is not None
    assert again.execution_id == first.execution_id
    with pytest.raises(errors.IdempotencyConflictError):
        keyed(memory, parameters={"x": Value("1"), "y": Value("2", b"4")})


def test_keys_belong_to_their_session(memory: MemoryGroups) -> None:
    end(memory, keyed(memory))
    memory.run(c.InitializeSession("t"))
    assert keyed(memory, session_id="t").snapshot is not None
    memory.run(c.CleanupSession("s"))
    memory.run(c.InitializeSession("s"))
    assert keyed(memory, parameters={"x": Value("1")}).snapshot is not None


# --- Ending ---


def test_the_end_completes_the_journal_entry(memory: MemoryGroups) -> None:
    begun = keyed(memory)
    verdict = Verdict(
        begun.execution_id,
        COMMITTED,
        Value("1", b"\x01"),
        None,
        {"a": Seen("var_a", "a", 3, "opt"), "ghost": None},
        ("a*",),
        (LogEntry(datetime(2030, 1, 1, tzinfo=UTC), "at work", {"step": [1, None]}),),
        {"now": [5]},
        (("a", 3),),
        2,
        77,
    )
    memory.run(c.FinishExecution("s", verdict), ANN)
    (event,) = memory.commits[-1].events
    assert event.kind is EventKind.EXECUTION_ENDED
    assert event.to_body() == {
        "execution_id": begun.execution_id,
        "status": "committed",
        "result": {"json": "1", "binary": "AQ=="},
        "failure": None,
        "reads": {"a": ["a", "var_a", 3], "ghost": None},
        "patterns": ["a*"],
        "log": [{"at": 1893456000000000, "message": "at work", "fields": {"step": [1, None]}}],
        "recorded": {"now": [5]},
        "published": [["a", 3]],
        "duration_us": 77,
        "writes": [],
        "conflicts": [],
    }
    assert running_in(memory) == []


def test_an_execution_ends_once(memory: MemoryGroups) -> None:
    begun = keyed(memory)
    end(memory, begun)
    before = memory.sequence
    for verdict in (Verdict(begun.execution_id, COMMITTED), Verdict("exec_1_00", ExecutionStatus.FAILED)):
        with pytest.raises(errors.ExecutionEndedError):
            memory.run(c.FinishExecution("s", verdict), ANN)
    assert memory.sequence == before


def test_all_writes_are_in_the_commit_that_ends_it(memory: MemoryGroups) -> None:
    running = begin(memory)
    running.set("a", 1)
    running.run(c.SetVariables("s", {"a": Value("2"), "b": Value("2")}), Origin("w", "x", Source.ELIXIR))
    running.run(c.RegisterVariable("s", "new", "string", Value('"n"')))
    before = memory.sequence
    finished = running.finish(result=Value("7"))
    assert (finished.status, finished.sequence, memory.sequence) == (COMMITTED, before + 1, before + 1)
    commit = memory.commits[-1]
    written = [(each.version.variable_id[:6], each.version.version, each.version.source) for each in commit.changes]
    assert written == [
        ("var_a_", 1, Source.PYTHON),
        ("var_a_", 2, Source.ELIXIR),
        ("var_b_", 2, Source.ELIXIR),
        ("var_ne", 0, Source.PYTHON),
    ]
    assert {(each.version.actor, each.version.cause, each.version.sequence) for each in commit.changes} == {
        ("ann", running.id, memory.sequence)
    }
    body = last_event(memory)
    assert (body["status"], body["result"]) == ("committed", {"json": "7"})
    assert body["writes"] == [["a", 1], ["a", 2], ["b", 2], ["new", 0]]
    assert values_of(memory) == {"a": "2", "b": "2", "new": '"n"'}


@pytest.mark.parametrize("status", UNSUCCESSFUL)
def test_an_execution_that_does_not_commit_writes_nothing(memory: MemoryGroups, status: ExecutionStatus) -> None:
    running = begin(memory)
    running.set("a", 1)
    command = running.execution.finish(Verdict(running.id, status, failure=Failure("ValueError", "no", "at line 1")))
    finished = memory.run(command, ANN)
    assert (finished.status, finished.conflicts) == (status, ())
    assert memory.commits[-1].changes == ()
    assert last_event(memory)["failure"] == {"type": "ValueError", "message": "no", "traceback": "at line 1"}
    assert values_of(memory) == {"a": "0", "b": "1"}
    assert running_in(memory) == []


def test_a_conflict_is_reported_and_nothing_is_written(memory: MemoryGroups) -> None:
    running = begin(memory)
    running.set("a", int(running.get("b")) + 1)
    write(memory, "b", 9)
    finished = running.finish(result=Value('"done"'))
    assert finished.status is CONFLICT
    assert finished.conflicts == (Conflict("b", 1, 2),)
    assert str(finished.conflicts[0]) == "b (was at version 1, is at version 2)"
    body = last_event(memory)
    assert (body["status"], body["result"], body["writes"]) == ("conflict", None, [])
    assert body["conflicts"] == [{"name": "b", "expected": 1, "actual": 2, "reason": ""}]
    assert values_of(memory) == {"a": "0", "b": "9"}


def test_every_conflicting_variable_is_reported_once(memory: MemoryGroups) -> None:
    running = begin(memory)
    variable = running.run(c.GetVariable("s", "a"))
    running.get(variable.id)
    assert running.names() == ["a", "b"]
    for name in "ab":
        write(memory, name, 5)
    memory.run(c.RegisterVariable("s", "late", "integer", Value("0")))
    assert running.conflicts() == [
        "a (was at version 0, is at version 1)",
        "b (was at version 1, is at version 2)",
        "late (was not there, is at version 0)",
    ]


def test_a_step_that_is_refused_at_the_commit_is_a_conflict(memory: MemoryGroups) -> None:
    """Nothing that it read has changed, and still it is refused: here because of a limit on the session."""
    memory = MemoryGroups(Limits(variables_per_session=2))
    memory.run(c.InitializeSession("s"))
    memory.run(c.RegisterVariable("s", "a", "integer", Value("0")))
    running = begin(memory)
    running.set("a", 1)
    running.run(c.RegisterVariable("s", "mine", "integer", Value("0")))
    memory.run(c.RegisterVariable("s", "theirs", "integer", Value("0")))
    (conflict,) = running.conflicts()
    assert conflict.startswith("RegisterVariable: it was possible when the tool asked, and is not any more: ")
    assert "variables_per_session" in conflict
    assert values_of(memory) == {"a": "0", "theirs": "0"}
    assert last_event(memory)["writes"] == []


def test_a_refused_step_leaves_origin_and_tokens_as_they_were(memory: MemoryGroups) -> None:
    begun = keyed(memory)
    step = Step(begun.execution_id, c.SetVariable("s", "ghost", Value("1")), Source.PYTHON, "mipro", ("abc",))
    finished = memory.run(c.FinishExecution("s", Verdict(begun.execution_id, COMMITTED), (), (step,)), BOB)
    assert finished.status is CONFLICT
    assert memory.commits[-1].origin == BOB


def test_a_locked_variable_is_written_with_the_optimizer_of_the_call(memory: MemoryGroups) -> None:
    holder = replace(BOB, optimizer_id="mipro")
    memory.run(c.StartOptimization("s", "a", "mipro"), holder)
    running = begin(memory)
    with pytest.raises(errors.VariableLockedError):
        running.run(c.RollbackVariable("s", "a", 0))
    running.run(c.RollbackVariable("s", "a", 0), replace(running.origin, optimizer_id="mipro"))
    assert running.finish().status is COMMITTED
    assert memory.commits[-1].changes[0].version.metadata["optimizer_id"] == "mipro"


# --- How other events affect an execution ---


def lines_run(call: Callable[[], object]) -> int:
    """Count the lines of Python that a call executes, including repetitions in loops."""
    count, before = 0, sys.gettrace()

    def trace(_frame: object, event: str, _argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def test_ending_a_session_takes_time_in_proportion_to_its_executions() -> None:
    steps: list[int] = []
    for many in (50, 400):
        memory = MemoryGroups()
        memory.run(c.InitializeSession("s"))
        ids = [memory.run(c.BeginExecution("s", "tool")).execution_id for _ in range(many)]
        steps.append(lines_run(lambda memory=memory: memory.run(c.CleanupSession("s"))))
        ended = [event.to_body()["execution_id"] for event in memory.commits[-1].events[:-1]]
        assert ended == ids
    few, eight_times_as_many = steps
    assert eight_times_as_many < 10 * few


def test_undoing_the_end_of_a_session_restores_its_executions(memory: MemoryGroups) -> None:
    ids = [memory.run(c.BeginExecution("s", "tool", idempotency_key=key)).execution_id for key in "xyz"]
    before = memory.states["s"]
    drafts = Drafts(memory)
    unit = memory.unit(drafts, BOB)
    unit.interrupt("s", ids[1:2], "because")
    start = unit.savepoint()
    unit.end_session("s", "ended")
    unit.rollback_to(start)
    assert drafts.states["s"] is not None
    assert drafts.states["s"].executions.keys() == {ids[0], ids[2]}
    unit.rollback_to(START)
    assert drafts.states["s"] == before
    unit.end_session("s", "ended")
    assert [event.to_body()["execution_id"] for event in unit.events[:-1]] == ids


def test_interruption_ends_only_the_named_executions(memory: MemoryGroups) -> None:
    gone, goes_on = begin(memory), begin(memory)
    assert memory.run(c.InterruptExecutions("s", (gone.id, "exec_1_00")), ANN) == 1
    assert running_in(memory) == [goes_on.id]
    assert last_event(memory) == {
        "execution_id": gone.id,
        "status": "interrupted",
        "result": None,
        "reason": "the server ended while it ran",
    }
    before = memory.sequence
    assert memory.run(c.InterruptExecutions("s", (gone.id,)), ANN) == 0
    assert memory.run(c.InterruptExecutions("missing", (gone.id,)), ANN) == 0
    assert memory.sequence == before
    with pytest.raises(errors.ExecutionEndedError):
        gone.finish()
    assert goes_on.finish().status is COMMITTED


def test_the_end_of_a_session_ends_its_executions(memory: MemoryGroups) -> None:
    parent = begin(memory)
    child = parent.call()
    memory.run(c.CleanupSession("s"), BOB)
    ended = [(event.kind, event.to_body().get("execution_id")) for event in memory.commits[-1].events]
    assert ended == [
        (EventKind.EXECUTION_ENDED, parent.id),
        (EventKind.EXECUTION_ENDED, child.id),
        (EventKind.SESSION_ENDED, None),
    ]
    assert memory.commits[-1].events[0].to_body()["status"] == "interrupted"
    assert memory.commits[-1].events[0].to_body()["reason"] == "session cleaned up"
    with pytest.raises(errors.SessionNotFoundError):
        parent.finish()
    memory.run(c.InitializeSession("s"))
    with pytest.raises(errors.ExecutionEndedError):
        parent.finish()


def test_a_session_in_which_a_tool_runs_does_not_expire() -> None:
    time = datetime(2030, 1, 1, tzinfo=UTC)
    memory = MemoryGroups(now=lambda: time)
    memory.run(c.InitializeSession("s", {"ttl_seconds": "10"}))
    begun = memory.run(c.BeginExecution("s", "tool"), ANN)
    time += timedelta(hours=5)
    assert memory.run(c.ExpireSession("s")) is False
    assert memory.run(c.GetSession("s")).id == "s"
    time += timedelta(hours=5)
    # Its end renews the TTL.
    end(memory, begun)
    time += timedelta(seconds=9)
    assert memory.run(c.Heartbeat("s"))
    time += timedelta(seconds=10)
    memory.run(c.ExpireSession("s"))
    assert memory.states == {}


def test_a_provider_without_tools_executes_none(memory: MemoryGroups) -> None:
    with pytest.raises(errors.UnsupportedError, match="without any"):
        memory.run(c.ExecuteTool("s", "tool"))


# --- Tools of workers ---


def registered(name: str = "far", worker: str = "w1", **spec: Any) -> RegisteredTool:
    return RegisteredTool(ToolSpec(name, **spec), worker, f"unix:/tmp/{worker}")


def test_tools_are_stored_and_listed(memory: MemoryGroups) -> None:
    parameters = (ToolParameter("n", "integer", "how many", False, Value("3"), '{"min":0}'),)
    tools = (registered("far", parameters=parameters, isolation=Isolation.SNAPSHOT, retries=2), registered("near"))
    ids = memory.run(c.RegisterTools("s", "w1", tools), BOB)
    assert ids == {"far": "s:far", "near": "s:near"}
    assert memory.run(c.ListTools("s")) == {"far": tools[0], "near": tools[1]}
    assert memory.run(c.GetSession("s")).tool_count == 2
    (event,) = memory.commits[-1].events
    assert (event.kind, event.to_body()["worker_id"], len(event.to_body()["tools"])) == (
        EventKind.TOOLS_REGISTERED,
        "w1",
        2,
    )


def test_a_tool_registered_again_is_replaced(memory: MemoryGroups) -> None:
    memory.run(c.RegisterTools("s", "w1", (registered("far"), registered("near"))), BOB)
    before = memory.sequence
    memory.run(c.RegisterTools("s", "w1", (registered("far"),)), BOB)
    assert memory.sequence == before, "nothing has changed"
    moved = registered("far", "w2")
    memory.run(c.RegisterTools("s", "w2", (moved,)), BOB)
    assert memory.run(c.ListTools("s")) == {"far": moved, "near": registered("near")}
    assert memory.run(c.RegisterTools("s", "w3", ()), BOB) == {}


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        ([registered("ours")], errors.ToolExistsError),
        ([registered("")], errors.InvalidArgumentError),
        ([registered("a\x00b")], errors.InvalidArgumentError),
        ([registered("x" * 256)], errors.LimitExceededError),
        ([registered(f"t{number}") for number in range(4)], errors.LimitExceededError),
        ([registered(description="x" * 1000)], errors.LimitExceededError),
        ([registered(metadata={"dspex.x": "1"})], errors.InvalidArgumentError),
    ],
)
def test_registrations_are_refused_as_a_whole(tools: list[RegisteredTool], error: type[errors.StateError]) -> None:
    memory = MemoryGroups(Limits(tools_per_session=3, constraints_size_bytes=1000))
    memory.run(c.InitializeSession("s"))
    with pytest.raises(error):
        memory.run(c.RegisterTools("s", "w1", tuple(tools), frozenset({"ours"})), BOB)
    assert memory.run(c.ListTools("s")) == {}
    assert memory.sequence == 1


def test_only_a_tool_with_a_name_of_the_server_is_left_out(memory: MemoryGroups) -> None:
    tools = (registered("fine"), registered("ours"), registered("good"))
    ids = memory.run(c.RegisterTools("s", "w1", tools, frozenset({"ours"})), BOB)
    assert ids == {"fine": "s:fine", "good": "s:good"}
    assert set(memory.run(c.ListTools("s"))) == {"fine", "good"}


def test_an_address_stays_until_another_is_given(memory: MemoryGroups) -> None:
    def known() -> tuple[str, str | None]:
        tool = memory.run(c.ListTools("s"))["far"]
        return tool.address, tool.spec.metadata.get("address")

    def register(worker: str, address: str, **metadata: str) -> None:
        spec = ToolSpec("far", metadata={**({"address": address} if address else {}), **metadata})
        memory.run(c.RegisterTools("s", worker, (RegisteredTool(spec, worker, address),)), BOB)

    register("w1", "")
    assert known() == ("", None)
    register("w1", "unix:/tmp/1")
    before = memory.sequence
    register("w1", "")
    assert memory.sequence == before, "nothing has changed"
    register("w2", "", team="red")
    assert known() == ("unix:/tmp/1", "unix:/tmp/1")
    register("w2", "unix:/tmp/2")
    assert known() == ("unix:/tmp/2", "unix:/tmp/2")


def test_tools_beyond_the_limit_are_refused_and_replacements_are_not() -> None:
    memory = MemoryGroups(Limits(tools_per_session=2))
    memory.run(c.InitializeSession("s"))
    memory.run(c.RegisterTools("s", "w1", (registered("x"), registered("y"))), BOB)
    memory.run(c.RegisterTools("s", "w2", (registered("x", "w2"), registered("y", "w2"))), BOB)
    with pytest.raises(errors.LimitExceededError, match="tools_per_session"):
        memory.run(c.RegisterTools("s", "w1", (registered("z"),)), BOB)


def test_reserved_names_do_not_change_the_fingerprint() -> None:
    request = c.RegisterTools("s", "w1", (registered("x"),))
    assert request.fingerprint() == replace(request, reserved=frozenset({"ours", "theirs"})).fingerprint()
    assert request.fingerprint() != replace(request, worker_id="w2").fingerprint()


# --- The view of an execution ---


def test_it_sees_the_session_as_it_was_when_it_began(memory: MemoryGroups) -> None:
    running = begin(memory)
    write(memory, "a", 5)
    memory.run(c.DeleteVariable("s", "b"))
    memory.run(c.RegisterVariable("s", "c", "integer", Value("0")))
    assert running.get("a") == "0"
    assert running.get("b") == "1"
    assert running.names() == ["a", "b"]
    result = running.run(c.GetVariables("s", ("a", "c", "b")))
    assert (list(result.variables), result.missing) == (["a", "b"], ("c",))
    with pytest.raises(errors.VariableNotFoundError):
        running.get("c")


def test_only_the_execution_sees_what_it_wrote(memory: MemoryGroups) -> None:
    running, other = begin(memory), begin(memory)
    assert [running.set("a", 5), running.set("a", 6)] == [1, 2]
    variable_id = running.run(c.RegisterVariable("s", "new", "integer", Value("3")))
    running.run(c.DeleteVariable("s", "b"))
    assert (running.get("a"), running.get(variable_id), running.names("?")) == ("6", "3", ["a"])
    assert values_of(memory) == {"a": "0", "b": "1"}
    assert (other.get("a"), other.names()) == ("0", ["a", "b"])


def test_a_batch_is_seen_as_a_whole(memory: MemoryGroups) -> None:
    running = begin(memory)
    outcome = running.run(c.SetVariables("s", {"a": Value("7"), "ghost": Value("1")}, atomic=True))
    assert (outcome.success, running.get("a")) == (False, "0")
    outcome = running.run(c.SetVariables("s", {"a": Value("7"), "ghost": Value("1")}))
    assert (outcome.versions, running.get("a")) == ({"a": 1}, "7")
    assert running.finish().status is COMMITTED
    assert values_of(memory) == {"a": "7", "b": "1"}


def test_a_command_that_fails_leaves_nothing_behind(memory: MemoryGroups) -> None:
    running = begin(memory)
    running.set("a", 5)
    refused: Sequence[c.Command[Any]] = (
        c.SetVariable("s", "a", Value('"no number"')),
        c.SetVariable("s", "a", Value("6"), expected_version=7),
        c.DeleteVariable("s", "ghost"),
        c.RegisterVariable("s", "a", "string", Value('""')),
        c.RollbackVariable("s", "a", 9),
        c.StopOptimization("s", "a"),
        c.AddDependency("s", "a", "a"),
    )
    for command in refused:
        with pytest.raises(errors.StateError):
            running.run(command)
    assert running.get("a") == "5"
    assert running.finish().status is COMMITTED
    assert [each.version.version for each in memory.commits[-1].changes] == [1]


def test_commands_that_change_nothing_are_not_repeated(memory: MemoryGroups) -> None:
    running = begin(memory)
    running.run(c.RegisterVariable("s", "a", "integer", Value("9")))
    running.get("b")
    assert running.execution.finish(Verdict(running.id, COMMITTED)).steps == ()


def test_only_commands_on_variables_of_its_session_belong_inside(memory: MemoryGroups) -> None:
    running = begin(memory)
    for command in (c.InitializeSession("s"), c.CleanupSession("s"), c.GetSession("s"), c.BeginExecution("s", "x")):
        assert not is_transactional(command)
        with pytest.raises(errors.UnsupportedError, match=type(command).__name__):
            running.run(command)
    memory.run(c.InitializeSession("t"))
    with pytest.raises(errors.InvalidArgumentError, match="another session"):
        running.run(c.GetVariable("t", "a"))


@pytest.mark.parametrize(("others", "conflicts"), [("b", ["b"]), (None, [])])
def test_listing_with_many_patterns_depends_on_everything(
    memory: MemoryGroups, others: str | None, conflicts: list[str]
) -> None:
    """The writer matches each pattern with each name again, while all others wait."""
    running = begin(memory)
    for number in range(500):
        assert running.names(f"{number}*") == []
    assert len(running.execution.finish(Verdict(running.id, COMMITTED)).matched) < 20
    if others is not None:
        memory.run(c.SetVariable("s", others, Value("7")))
    running.set("a", 1)
    finished = running.finish()
    assert [each.name for each in finished.conflicts] == conflicts


class TestLimits:
    """The staged writes of an execution are one commit at its end, for which all others wait."""

    def running(self, **limits: int) -> Running:
        memory = MemoryGroups(Limits(**limits))
        memory.run(c.InitializeSession("s"))
        for name in "ab":
            memory.run(c.RegisterVariable("s", name, "string", Value('""')))
        return begin(memory)

    def test_the_number_of_writes_is_limited(self) -> None:
        running = self.running(execution_writes=4)
        two = {name: Value('"1"') for name in "ab"}
        running.run(c.SetVariables("s", two))
        running.run(c.SetVariable("s", "a", Value('"2"')))
        with pytest.raises(errors.LimitExceededError, match=r"is 5, above the limit of 4 \(setting execution_writes\)"):
            running.run(c.SetVariables("s", two))
        # The refused write is not there; there is room for one more, but not for two.
        assert running.get("b") == '"1"'
        running.run(c.SetVariable("s", "b", Value('"3"')))
        with pytest.raises(errors.LimitExceededError):
            running.run(c.DeleteVariable("s", "a"))
        assert running.finish().status is COMMITTED
        assert [running.memory.states["s"].variables[name].value.json for name in "ab"] == ['"2"', '"3"']

    def test_calls_that_write_no_version_count_too(self) -> None:
        running = self.running(execution_writes=3)
        for number in range(3):
            running.run(c.AddDependency("s", "a", "b", f"type {number}"))
        with pytest.raises(errors.LimitExceededError, match="execution_writes"):
            running.run(c.AddDependency("s", "a", "b", "more"))

    def test_the_size_of_writes_is_limited_without_undone_ones(self) -> None:
        running = self.running(execution_size_bytes=100_000)
        for _ in range(10):
            called = running.call()
            called.run(c.SetVariable("s", "a", Value(f'"{"x" * 60_000}"')))
            with pytest.raises(errors.LimitExceededError, match="execution_size_bytes"):
                called.run(c.SetVariable("s", "b", Value(f'"{"x" * 60_000}"')))
            called.give_up()
        running.run(c.SetVariable("s", "b", Value(f'"{"x" * 60_000}"')))
        assert running.finish().status is COMMITTED


INSIDE: list[tuple[c.Command[Any], bool]] = [
    (c.GetVariable("s", "a"), False),
    (c.GetVariables("s", ("a",)), False),
    (c.ListVariables("s"), True),
    (c.GetVariableHistory("s", "a"), True),
    (c.SetVariable("s", "a", Value("1")), False),
    (c.SetVariables("s", {"a": Value("1")}), False),
    (c.RegisterVariable("s", "n", "integer", Value("1")), False),
    (c.DeleteVariable("s", "a"), False),
    (c.RollbackVariable("s", "a", 0), True),
    (c.AddDependency("s", "a", "b"), False),
    (c.StartOptimization("s", "a", "mipro"), False),
    (c.StopOptimization("s", "locked", force=True), False),
]


@pytest.mark.parametrize(("command", "blocks"), INSIDE, ids=[type(command).__name__ for command, _ in INSIDE])
def test_every_command_on_variables_belongs_inside(memory: MemoryGroups, command: c.Command[Any], blocks: bool) -> None:
    memory.run(c.RegisterVariable("s", "locked", "integer", Value("0")))
    memory.run(c.StartOptimization("s", "locked", "mipro"))
    assert is_transactional(command)
    assert may_block(command) is blocks
    running = begin(memory)
    running.run(command)
    before = memory.sequence
    assert running.finish().status is COMMITTED
    assert memory.sequence == before + 1
    assert (len(memory.commits[-1].changes) + len(memory.commits[-1].events) > 1) == command.writes


def test_all_is_refused_once_it_has_ended(memory: MemoryGroups) -> None:
    parent = begin(memory)
    child = parent.call()
    grandchild = child.call()
    assert [each.execution.depth for each in (parent, child, grandchild)] == [0, 1, 2]
    child.execution.close("failed")
    child.execution.close("committed")
    assert (child.execution.ended, grandchild.execution.ended, parent.execution.ended) == ("failed", "failed", "")
    for ended in (child, grandchild):
        for act in (ended.names, lambda ended=ended: ended.set("a", 1), lambda ended=ended: ended.publish("a", 1)):
            with pytest.raises(errors.ExecutionEndedError, match="failed"):
                act()
    assert parent.names() == ["a", "b"]


# --- Serializability ---


def test_two_that_touch_different_variables_both_commit(memory: MemoryGroups) -> None:
    first, second = begin(memory), begin(memory)
    first.set("a", int(first.get("a")) + 10)
    second.set("b", int(second.get("b")) + 10)
    assert first.finish().status is second.finish().status is COMMITTED
    assert values_of(memory) == {"a": "10", "b": "11"}


@pytest.mark.parametrize("isolation", BOTH)
def test_the_second_of_two_increments_conflicts(memory: MemoryGroups, isolation: Isolation) -> None:
    first, second = begin(memory, isolation), begin(memory, isolation)
    for running in (first, second):
        running.set("a", int(running.get("a")) + 1)
    assert first.finish().status is COMMITTED
    assert second.conflicts() == ["a (was at version 0, is at version 1)"]
    assert values_of(memory)["a"] == "1"


@pytest.mark.parametrize("isolation", BOTH)
def test_write_skew_is_for_snapshots_only(memory: MemoryGroups, isolation: Isolation) -> None:
    first, second = begin(memory, isolation), begin(memory, isolation)
    first.set("a", int(first.get("b")) + 1)
    second.set("b", int(second.get("a")) + 1)
    assert first.finish().status is COMMITTED
    assert second.finish().status is (CONFLICT if isolation is Isolation.SERIALIZABLE else COMMITTED)


@pytest.mark.parametrize("isolation", BOTH)
def test_a_blind_write_is_a_conflict_as_well(memory: MemoryGroups, isolation: Isolation) -> None:
    running = begin(memory, isolation)
    running.set("a", 5)
    write(memory, "a", 6)
    assert running.conflicts() == ["a (was at version 0, is at version 1)"]


def get(running: Running) -> None:
    running.get("a")


def get_by_id(running: Running) -> None:
    running.get(next(each.id for each in running.execution.overlay.snapshot.variables.values() if each.name == "a"))


def get_some(running: Running) -> None:
    running.run(c.GetVariables("s", ("a", "ghost")))


def look_back(running: Running) -> None:
    running.history("a")


def list_all(running: Running) -> None:
    running.names()


def list_some(running: Running) -> None:
    running.names("a*")


def depend_on(running: Running) -> None:
    running.run(c.AddDependency("s", "b", "a"))


def fail_to_write(running: Running) -> None:
    """Even a failed command depends on what it found."""
    with pytest.raises(errors.VersionConflictError):
        running.run(c.SetVariable("s", "a", Value("1"), expected_version=9))


READINGS = [get, get_by_id, get_some, look_back, list_all, list_some, depend_on, fail_to_write]


@pytest.mark.parametrize("reading", READINGS, ids=lambda reading: reading.__name__)
@pytest.mark.parametrize(
    "change",
    [
        lambda memory: write(memory, "a", 5),
        lambda memory: memory.run(c.RollbackVariable("s", "a", 0)),
        lambda memory: memory.run(c.DeleteVariable("s", "a")),
        lambda memory: memory.run(c.StartOptimization("s", "a", "mipro")),
    ],
    ids=["written", "rolled back", "deleted", "locked"],
)
def test_a_changed_read_is_a_conflict(
    memory: MemoryGroups, reading: Callable[[Running], None], change: Callable[[MemoryGroups], object]
) -> None:
    running, unharmed = begin(memory), begin(memory)
    reading(running)
    unharmed.get("b")
    change(memory)
    assert [conflict.partition(" ")[0].rstrip(":") for conflict in running.conflicts()] == ["a"]
    assert unharmed.finish().status is COMMITTED


@pytest.mark.parametrize(
    "reading", [get, get_by_id, get_some, look_back, list_all, list_some], ids=lambda r: r.__name__
)
def test_a_snapshot_checks_only_its_writes(memory: MemoryGroups, reading: Callable[[Running], None]) -> None:
    running = begin(memory, Isolation.SNAPSHOT)
    reading(running)
    running.set("b", 5)
    write(memory, "a", 5)
    memory.run(c.RegisterVariable("s", "ab", "integer", Value("0")))
    assert running.finish().status is COMMITTED


def test_a_variable_that_was_missing_must_still_be_missing(memory: MemoryGroups) -> None:
    running, unharmed = begin(memory), begin(memory)
    running.run(c.GetVariables("s", ("ghost",)))
    unharmed.run(c.GetVariables("s", ("another ghost",)))
    memory.run(c.RegisterVariable("s", "ghost", "integer", Value("0")))
    assert running.conflicts() == ["ghost (was not there, is at version 0)"]
    assert unharmed.finish().status is COMMITTED


def test_a_variable_deleted_and_registered_again_is_another_one(memory: MemoryGroups) -> None:
    running = begin(memory)
    running.get("a")
    memory.run(c.DeleteVariable("s", "a"))
    memory.run(c.RegisterVariable("s", "a", "integer", Value("0")))
    assert running.conflicts() == ["a: it is another variable of the same name"]


def test_a_change_before_the_begin_is_not_a_conflict(memory: MemoryGroups) -> None:
    write(memory, "a", 5)
    running = begin(memory)
    running.set("a", int(running.get("a")) + 1)
    assert running.finish().status is COMMITTED


def test_uncommitted_changes_of_others_are_not_a_conflict(memory: MemoryGroups) -> None:
    first, second = begin(memory), begin(memory)
    first.set("a", 5)
    second.set("a", 6)
    first.finish(ExecutionStatus.FAILED)
    assert second.finish().status is COMMITTED


@pytest.mark.parametrize(
    ("pattern", "name", "conflict"),
    [("", "x", True), ("x*", "x1", True), ("x*", "y", False), ("?", "xy", False), ("?", "x", True)],
)
def test_a_phantom_is_a_conflict_if_its_name_matches(
    memory: MemoryGroups, pattern: str, name: str, conflict: bool
) -> None:
    running, snapshot = begin(memory), begin(memory, Isolation.SNAPSHOT)
    for each in (running, snapshot):
        each.names(pattern)
    memory.run(c.RegisterVariable("s", name, "integer", Value("0")))
    assert running.conflicts() == ([f"{name} (was not there, is at version 0)"] if conflict else [])
    assert snapshot.finish().status is COMMITTED


def test_own_registrations_are_not_phantoms(memory: MemoryGroups) -> None:
    running = begin(memory)
    running.names("n*")
    running.run(c.RegisterVariable("s", "n1", "integer", Value("0")))
    running.run(c.DeleteVariable("s", "a"))
    assert (running.names("n*"), running.names()) == (["n1"], ["b", "n1"])
    assert running.finish().status is COMMITTED


@pytest.mark.parametrize("isolation", BOTH)
def test_any_change_of_dependencies_is_a_conflict(memory: MemoryGroups, isolation: Isolation) -> None:
    """Neither of them closes a cycle alone."""
    first, second = begin(memory, isolation), begin(memory, isolation)
    first.run(c.AddDependency("s", "a", "b"))
    second.run(c.AddDependency("s", "b", "a"))
    assert first.finish().status is COMMITTED
    assert second.conflicts() == ["dependencies: others changed the session's dependencies"]


def test_a_dependency_between_own_registrations(memory: MemoryGroups) -> None:
    running = begin(memory)
    variable_id = running.run(c.RegisterVariable("s", "n", "integer", Value("0")))
    running.run(c.AddDependency("s", "n", "a"))
    with pytest.raises(errors.DependencyCycleError):
        running.run(c.AddDependency("s", "a", "n"))
    assert running.finish().status is COMMITTED
    (edge,) = memory.states["s"].dependencies
    assert (edge.from_id, edge.since, edge.until) == (variable_id, memory.sequence, None)


# --- Optimization ---


def test_the_second_of_two_locks_conflicts(memory: MemoryGroups) -> None:
    first, second = begin(memory), begin(memory)
    lock_id = first.run(c.StartOptimization("s", "a", "mipro"))
    second.run(c.StartOptimization("s", "a", "bootstrap"))
    assert first.finish().status is COMMITTED
    lock = memory.states["s"].variables["a"].optimization
    assert lock is not None
    assert (lock.id, lock.optimizer_id, lock.started_by) == (lock_id, "mipro", "ann")
    assert second.conflicts() == ["a: its optimization changed"]


def test_a_lock_that_its_holder_renews_is_the_same_lock(memory: MemoryGroups) -> None:
    memory.run(c.StartOptimization("s", "a", "mipro"))
    running = begin(memory)
    running.get("a")
    memory.run(c.StartOptimization("s", "a", "mipro", {"trials": "2"}))
    assert running.finish().status is COMMITTED


def test_a_removed_lock_is_a_conflict(memory: MemoryGroups) -> None:
    memory.run(c.StartOptimization("s", "a", "mipro"))
    running = begin(memory)
    with pytest.raises(errors.VariableLockedError):
        running.set("a", 1)
    memory.run(c.StopOptimization("s", "a"))
    assert running.conflicts() == ["a: its optimization changed"]


def test_locks_inside_follow_the_rules_of_locks(memory: MemoryGroups) -> None:
    running = begin(memory)
    running.run(c.StartOptimization("s", "a", "mipro"))
    with pytest.raises(errors.VariableLockedError):
        running.set("a", 1)
    running.run(c.SetVariable("s", "a", Value("2"), {"optimizer_id": "mipro"}))
    with pytest.raises(errors.VariableLockedError):
        running.run(c.DeleteVariable("s", "a"))
    assert running.run(c.StopOptimization("s", "a"), replace(running.origin, optimizer_id="mipro")) == Value("2")
    running.set("a", 3)
    assert running.finish().status is COMMITTED
    assert values_of(memory)["a"] == "3"
    assert memory.states["s"].variables["a"].optimization is None


def test_a_lease_that_ends_while_it_runs_lets_it_write() -> None:
    with freeze_time("2030-01-01") as frozen:
        memory = MemoryGroups(optimization_lease_s=60)
        memory.run(c.InitializeSession("s"))
        memory.run(c.RegisterVariable("s", "a", "integer", Value("0")))
        memory.run(c.StartOptimization("s", "a", "mipro"))
        running = begin(memory)
        with pytest.raises(errors.VariableLockedError):
            running.set("a", 1)
        frozen.tick(61)
        running.set("a", 2)
        assert running.finish().status is COMMITTED
        assert values_of(memory) == {"a": "2"}
        kinds = [event.kind for event in memory.commits[-1].events]
        assert kinds == [EventKind.OPTIMIZATION_STOPPED, EventKind.EXECUTION_ENDED]


# --- Deletion and registration ---


def test_a_variable_is_replaced_by_another_with_its_name(memory: MemoryGroups) -> None:
    old_id = memory.run(c.GetVariable("s", "a")).id
    running = begin(memory)
    running.set("a", 5)
    running.run(c.DeleteVariable("s", "a"))
    with pytest.raises(errors.VariableNotFoundError):
        running.get("a")
    new_id = running.run(c.RegisterVariable("s", "a", "string", Value('"new"')))
    assert (running.get("a"), new_id != old_id) == ('"new"', True)
    assert running.history("a") == [(0, '"new"')]
    assert running.history(old_id) == [(2, None), (1, "5"), (0, "0")]
    assert running.finish().status is COMMITTED
    assert memory.run(c.GetVariable("s", "a")).id == new_id
    assert memory.run(c.GetVariable("s", new_id)).value == Value('"new"')
    kinds = [each.version.kind for each in memory.commits[-1].changes]
    assert kinds == [ChangeKind.SET, ChangeKind.DELETED, ChangeKind.REGISTERED]


def test_a_variable_registered_and_deleted_again_has_a_history(memory: MemoryGroups) -> None:
    running = begin(memory)
    for number in range(3):
        running.run(c.RegisterVariable("s", "n", "integer", Value(str(number))))
        running.run(c.DeleteVariable("s", "n"))
    assert running.finish().status is COMMITTED
    assert values_of(memory) == {"a": "0", "b": "1"}
    assert len(memory.commits[-1].changes) == 6


def test_deleting_takes_the_dependencies_along(memory: MemoryGroups) -> None:
    memory.run(c.AddDependency("s", "a", "b"))
    running = begin(memory)
    running.run(c.DeleteVariable("s", "b"))
    running.run(c.RegisterVariable("s", "b", "integer", Value("0")))
    running.run(c.AddDependency("s", "b", "a"))
    assert running.finish().status is COMMITTED
    old, new = memory.states["s"].dependencies
    assert (old.until, new.since, new.until) == (memory.sequence, memory.sequence, None)


@pytest.mark.parametrize("isolation", BOTH)
def test_a_variable_that_others_have_deleted_cannot_be_written(memory: MemoryGroups, isolation: Isolation) -> None:
    running = begin(memory, isolation)
    running.set("a", 5)
    memory.run(c.DeleteVariable("s", "a"))
    assert running.conflicts() == ["a (was at version 0, is not there)"]


@pytest.mark.parametrize("isolation", BOTH)
def test_the_first_to_commit_gets_a_name(memory: MemoryGroups, isolation: Isolation) -> None:
    first, second = begin(memory, isolation), begin(memory, isolation)
    first_id = first.run(c.RegisterVariable("s", "n", "integer", Value("1")))
    second.run(c.RegisterVariable("s", "n", "integer", Value("2")))
    assert first.finish().status is COMMITTED
    assert second.conflicts() == ["n (was not there, is at version 0)"]
    assert memory.run(c.GetVariable("s", "n")).id == first_id


def test_ids_stay_as_the_tool_saw_them(memory: MemoryGroups) -> None:
    running = begin(memory)
    first = running.run(c.RegisterVariable("s", "n1", "integer", Value("1")))
    child = running.call()
    undone = child.run(c.RegisterVariable("s", "n2", "integer", Value("2")))
    child.give_up()
    with pytest.raises(errors.StateError):
        running.run(c.RegisterVariable("s", "n3", "integer", Value('"no number"')))
    lock_id = running.run(c.StartOptimization("s", "n1", "mipro"))
    last = running.run(c.RegisterVariable("s", "n2", "integer", Value("3")))
    assert len({first, undone, last}) == 3
    assert running.finish().status is COMMITTED
    lock = memory.states["s"].variables["n1"].optimization
    assert lock is not None
    assert lock.id == lock_id
    assert [memory.run(c.GetVariable("s", each)).name for each in (first, last)] == ["n1", "n2"]
    with pytest.raises(errors.VariableNotFoundError):
        memory.run(c.GetVariable("s", undone))


# --- History ---


def test_history_begins_with_own_versions(memory: MemoryGroups) -> None:
    running = begin(memory)
    running.set("b", 5)
    running.set("b", 6)
    write(memory, "b", 99)
    assert running.history("b") == [(3, "6"), (2, "5"), (1, "1"), (0, "0")]
    assert running.history("b", 1) == [(3, "6")]
    assert running.history("b", 3) == [(3, "6"), (2, "5"), (1, "1")]
    assert running.history("b", 0, 3) == [(2, "5"), (1, "1"), (0, "0")]
    assert running.history("b", 2, 2) == [(1, "1"), (0, "0")]
    assert running.history("b", 0, 0) == []
    variable_id = running.run(c.GetVariable("s", "b")).id
    assert running.history(variable_id, 2) == [(3, "6"), (2, "5")]


def test_history_leaves_out_what_others_wrote_since(memory: MemoryGroups) -> None:
    running = begin(memory)
    write(memory, "b", 99)
    assert running.history("b") == [(1, "1"), (0, "0")]
    assert running.history("b", 1) == [(1, "1")]
    memory.run(c.DeleteVariable("s", "b"))
    memory.run(c.RegisterVariable("s", "b", "string", Value('"another"')))
    assert running.history("b") == [(1, "1"), (0, "0")]


def test_history_of_an_own_registration(memory: MemoryGroups) -> None:
    running = begin(memory)
    variable_id = running.run(c.RegisterVariable("s", "n", "integer", Value("1")))
    running.set("n", 2)
    for identifier in ("n", variable_id):
        assert running.history(identifier) == [(1, "2"), (0, "1")]
        assert running.history(identifier, 0, 1) == [(0, "1")]
    running.run(c.DeleteVariable("s", "n"))
    assert running.history("n") == [(2, None), (1, "2"), (0, "1")]


def test_history_of_a_deleted_variable(memory: MemoryGroups) -> None:
    memory.run(c.DeleteVariable("s", "a"))
    running = begin(memory)
    assert running.history("a") == [(1, None), (0, "0")]
    running.run(c.DeleteVariable("s", "b"))
    assert running.history("b") == [(2, None), (1, "1"), (0, "0")]
    with pytest.raises(errors.VariableNotFoundError):
        running.history("ghost")


def test_rollback_to_versions_of_others_and_own_ones(memory: MemoryGroups) -> None:
    running = begin(memory)
    running.set("b", 5)
    assert running.run(c.RollbackVariable("s", "b", 0)).value == Value("0")
    assert running.run(c.RollbackVariable("s", "b", 2)).value == Value("5")
    with pytest.raises(errors.VersionNotFoundError):
        running.run(c.RollbackVariable("s", "b", 5))
    assert running.history("b") == [(4, "5"), (3, "0"), (2, "5"), (1, "1"), (0, "0")]
    assert running.finish().status is COMMITTED
    history = memory.run(c.GetVariableHistory("s", "b"))
    assert [each.value.json for each in history if each.value] == ["5", "0", "5", "1", "0"]
    assert [each.kind for each in history[:2]] == [ChangeKind.ROLLED_BACK] * 2


# --- Calls from tool to tool ---


def test_a_called_execution_shares_its_callers_transaction(memory: MemoryGroups) -> None:
    parent = begin(memory)
    parent.set("a", 5)
    child = parent.call()
    assert child.get("a") == "5"
    child.set("b", 6)
    child.return_to(parent)
    assert (parent.get("b"), values_of(memory)) == ("6", {"a": "0", "b": "1"})
    before = memory.sequence
    assert parent.finish().status is COMMITTED
    assert memory.sequence == before + 1
    ended = {event.to_body()["execution_id"]: event.to_body() for event in memory.commits[-1].events}
    assert ended[child.id]["writes"] == [["b", 2]]
    assert ended[parent.id]["writes"] == [["a", 1]]
    assert (ended[child.id]["status"], ended[parent.id]["status"]) == ("committed", "committed")
    assert running_in(memory) == []


@pytest.mark.parametrize("status", UNSUCCESSFUL)
def test_a_successful_call_is_aborted_with_its_caller(memory: MemoryGroups, status: ExecutionStatus) -> None:
    parent = begin(memory)
    child = parent.call()
    child.set("a", 5)
    grandchild = child.call()
    grandchild.return_to(child)
    child.return_to(parent)
    parent.finish(status)
    ended = {event.to_body()["execution_id"]: event.to_body()["status"] for event in memory.commits[-1].events}
    assert ended == {parent.id: status.value, child.id: "aborted", grandchild.id: "aborted"}
    assert values_of(memory) == {"a": "0", "b": "1"}


def test_a_successful_call_is_aborted_by_a_conflict_too(memory: MemoryGroups) -> None:
    parent = begin(memory)
    child = parent.call()
    child.get("a")
    child.return_to(parent)
    write(memory, "a", 5)
    assert parent.conflicts() == ["a (was at version 0, is at version 1)"]
    assert [event.to_body()["status"] for event in memory.commits[-1].events] == ["aborted", "conflict"]


def test_a_failed_call_is_undone_and_its_caller_continues(memory: MemoryGroups) -> None:
    memory.run(c.AddDependency("s", "a", "b"))
    parent = begin(memory)
    parent.set("a", 5)
    before = parent.run(c.ListVariables("s"))
    child = parent.call()
    child.set("a", 6)
    child.run(c.RegisterVariable("s", "n", "integer", Value("1")))
    child.run(c.AddDependency("s", "b", "n"))
    child.run(c.StartOptimization("s", "a", "mipro"))
    child.run(c.DeleteVariable("s", "b"))
    grandchild = child.call()
    grandchild.run(c.RegisterVariable("s", "b", "string", Value('"of a grandchild"')))
    grandchild.return_to(child)
    child.give_up()
    assert parent.run(c.ListVariables("s")) == before
    parent.set("b", 7)
    assert parent.finish().status is COMMITTED
    assert values_of(memory) == {"a": "5", "b": "7"}
    assert len(memory.states["s"].dependencies) == 1
    assert memory.states["s"].dependencies[0].until is None
    assert memory.states["s"].variables["a"].optimization is None


def test_undoing_an_inner_call_keeps_the_outer_one(memory: MemoryGroups) -> None:
    parent = begin(memory)
    child = parent.call()
    child.set("a", 5)
    grandchild = child.call()
    grandchild.set("a", 6)
    grandchild.give_up()
    assert child.get("a") == "5"
    child.set("b", 7)
    child.return_to(parent)
    assert parent.finish().status is COMMITTED
    assert values_of(memory) == {"a": "5", "b": "7"}
    assert [each.version.version for each in memory.commits[-1].changes] == [1, 2]


def test_undoing_when_nothing_was_written(memory: MemoryGroups) -> None:
    parent = begin(memory)
    parent.call().give_up()
    parent.set("a", 5)
    parent.call().give_up()
    assert parent.get("a") == "5"
    assert parent.finish().status is COMMITTED


def test_reads_of_an_undone_call_count(memory: MemoryGroups) -> None:
    """The caller knows that it failed, which may depend on what it read."""
    parent = begin(memory)
    child = parent.call()
    child.get("a")
    child.give_up()
    write(memory, "a", 5)
    assert parent.conflicts() == ["a (was at version 0, is at version 1)"]


def test_each_has_its_own_reads_in_the_journal(memory: MemoryGroups) -> None:
    parent = begin(memory)
    parent.get("a")
    child = parent.call()
    child.run(c.GetVariables("s", ("b", "ghost")))
    child.names("x*")
    child.names("x*")
    assert list(parent.execution.reads) == ["a"]
    assert child.execution.reads == {"b": see(memory.states["s"].variables["b"]), "ghost": None}
    assert (parent.execution.patterns, child.execution.patterns) == ([], ["x*"])


# --- Published values ---


def test_others_see_a_published_value_at_once(memory: MemoryGroups) -> None:
    running = begin(memory)
    assert [running.publish("a", 1), running.publish("a", 2)] == [1, 2]
    assert (running.get("a"), values_of(memory)["a"]) == ("2", "2")
    version = memory.commits[-1].changes[0].version
    assert (version.kind, version.cause, version.actor) == (ChangeKind.PUBLISHED, running.id, "ann")
    assert running.execution.published == [("a", 1), ("a", 2)]
    assert running.finish(ExecutionStatus.FAILED).status is ExecutionStatus.FAILED
    assert values_of(memory)["a"] == "2", "that it has failed takes nothing back"


@pytest.mark.parametrize("isolation", BOTH)
@pytest.mark.parametrize("reading", [get, get_by_id, look_back, list_all, list_some], ids=lambda each: each.__name__)
def test_an_own_published_value_is_not_a_conflict(
    memory: MemoryGroups, isolation: Isolation, reading: Callable[[Running], None]
) -> None:
    running = begin(memory, isolation)
    reading(running)
    running.publish("a", 1)
    reading(running)
    running.publish("a", 2)
    assert running.history("a") == [(2, "2"), (1, "1"), (0, "0")]
    assert running.set("a", 3) == 3
    assert running.finish().status is COMMITTED
    assert memory.run(c.GetVariable("s", "a")).version == 3


def test_a_write_of_others_before_publishing_is_a_conflict(memory: MemoryGroups) -> None:
    running = begin(memory)
    running.get("a")
    write(memory, "a", 5)
    running.publish("a", 6)
    assert running.conflicts() == ["a (was at version 0, is at version 2)"]


def test_a_write_of_others_after_publishing_is_a_conflict(memory: MemoryGroups) -> None:
    running = begin(memory)
    running.names("a*")
    running.publish("a", 6)
    write(memory, "a", 5)
    assert running.conflicts() == ["a (was at version 1, is at version 2)"]


def test_a_written_variable_cannot_be_published(memory: MemoryGroups) -> None:
    running = begin(memory)
    variable_id = running.run(c.GetVariable("s", "a")).id
    running.set("a", 5)
    for identifier in ("a", variable_id):
        with pytest.raises(errors.InvalidArgumentError, match="one or the other"):
            running.publish(identifier, 6)
    assert running.publish("b", 7) == 2
    assert running.finish().status is COMMITTED
    assert values_of(memory) == {"a": "5", "b": "7"}


def test_a_variable_whose_write_was_undone_can_be_published(memory: MemoryGroups) -> None:
    parent = begin(memory)
    child = parent.call()
    child.set("a", 5)
    child.give_up()
    assert parent.publish("a", 6) == 1
    assert parent.get("a") == "6"
    assert parent.finish().status is COMMITTED


def test_undoing_keeps_published_values(memory: MemoryGroups) -> None:
    parent = begin(memory)
    child = parent.call()
    child.run(c.DeleteVariable("s", "b"))
    child.publish("a", 6)
    child.give_up()
    assert (parent.get("a"), parent.names()) == ("6", ["a", "b"])
    assert parent.set("a", 7) == 2
    assert parent.finish().status is COMMITTED


def test_publishing_needs_a_running_execution_and_a_valid_value(memory: MemoryGroups) -> None:
    running = begin(memory)
    memory.run(c.StartOptimization("s", "b", "mipro"))
    refused: list[tuple[c.Command[Any], type[errors.StateError]]] = [
        (c.PublishVariable("s", "exec_1_00", "a", Value("1")), errors.ExecutionNotFoundError),
        (c.PublishVariable("s", running.id, "ghost", Value("1")), errors.VariableNotFoundError),
        (c.PublishVariable("s", running.id, "a", Value('"no number"')), errors.InvalidValueError),
        (c.PublishVariable("s", running.id, "b", Value("1")), errors.VariableLockedError),
        (c.PublishVariable("s", running.id, "a", Value("1"), {"dspex.x": "1"}), errors.InvalidArgumentError),
    ]
    before = memory.sequence
    for command, error in refused:
        with pytest.raises(error):
            memory.run(command, running.origin)
    assert memory.sequence == before
    memory.run(c.PublishVariable("s", running.id, "a", Value("1"), {"trial": "3"}), running.origin)
    assert memory.run(c.GetVariable("s", "a")).metadata == {}, "it explains the change only"
    assert memory.run(c.GetVariableHistory("s", "a", 1))[0].metadata == {"trial": "3"}


# --- From several threads ---


def test_threads_of_one_execution_do_not_mix(memory: MemoryGroups) -> None:
    running = begin(memory)
    versions: list[int] = []

    def work(number: int) -> None:
        for count in range(50):
            versions.append(running.set("ab"[number % 2], count))
            running.run(c.GetVariables("s", ("a", "b")))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(within(60))
    assert sorted(versions) == sorted([*range(1, 151), *range(2, 152)])
    seen = {variable.name: variable for variable in running.run(c.ListVariables("s"))}
    assert running.finish().status is COMMITTED
    kept = {variable.name: variable for variable in memory.run(c.ListVariables("s"))}
    assert {name: (each.version, each.value) for name, each in kept.items()} == {
        name: (each.version, each.value) for name, each in seen.items()
    }
