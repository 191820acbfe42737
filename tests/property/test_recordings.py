"""Recordings of random sessions: an imported session gives the same recording again, and a session rebuilt in memory
has the original state at each commit."""

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspex_persist.state import commands as c
from dspex_persist.state.commands.executions import Verdict
from dspex_persist.state.errors import StateError
from dspex_persist.state.groups import Job
from dspex_persist.state.model import (
    ExecutionStatus,
    Failure,
    Isolation,
    LogEntry,
    Origin,
    RegisteredTool,
    Source,
    ToolParameter,
    ToolSpec,
    Value,
    Variable,
    VariableVersion,
)
from dspex_persist.state.recording import read_recording
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.store import maintenance
from dspex_persist.state.store.blobs import INLINE_BYTES
from dspex_persist.state.store.maintenance import transfer
from dspex_persist.state.store.session_store import FileGroups, open_groups
from dspex_persist.state.tools.execution import Execution
from dspex_persist.state.unit_of_work import VersionQuery
from tests.memory import MemoryGroups

S = "s"
NAMES = st.sampled_from(["a", "b", "t"])
LARGE = "é" * INLINE_BYTES
PICKLED = json.dumps({"shape": [1], "dtype": "float64", "binary_format": "pickle", "type": "tensor"})
# Short and long, as text and as bytes: some are stored in rows, some as blobs. One is not a string.
TEXTS = [Value('"one"'), Value('"two \\ud83d\\ude00"'), Value(json.dumps(LARGE, ensure_ascii=False)), Value("5")]
TENSORS = [Value(PICKLED, b"\x00\xff"), Value(PICKLED, bytes(range(256)) * 8)]
WRITES = st.sampled_from([*((name, value) for name in "ab" for value in TEXTS), *(("t", each) for each in TENSORS)])
METADATA = st.sampled_from([{}, {"why": "x"}, {"source": "elixir"}, {"optimizer_id": "mipro"}, {"sensitive": "true"}])


def registered(write: tuple[str, Value], metadata: dict[str, str]) -> c.Command[Any]:
    name, value = write
    type_name, constraints = ("tensor", "") if name == "t" else ("string", '{"max_length": 9999}')
    return c.RegisterVariable(S, name, type_name, value, constraints, metadata)


def written(write: tuple[str, Value], metadata: dict[str, str]) -> c.Command[Any]:
    return c.SetVariable(S, *write, metadata)


SETS = st.builds(written, WRITES, METADATA)
REGISTRATIONS = st.builds(registered, WRITES, METADATA)
DELETIONS = st.builds(c.DeleteVariable, st.just(S), NAMES)
VARIABLE_COMMANDS = st.one_of(
    SETS,
    SETS,
    DELETIONS,
    REGISTRATIONS,
    st.builds(c.SetVariables, st.just(S), st.lists(WRITES, min_size=1).map(dict), METADATA),
    st.builds(c.RollbackVariable, st.just(S), NAMES, st.integers(0, 2)),
    st.builds(c.AddDependency, st.just(S), NAMES, NAMES, st.sampled_from(["", "uses"])),
    st.builds(c.RemoveDependency, st.just(S), NAMES, NAMES, st.sampled_from(["", "uses"])),
    st.builds(c.StartOptimization, st.just(S), NAMES, st.sampled_from(["mipro", "other"])),
    st.builds(c.StopOptimization, st.just(S), NAMES, st.booleans()),
)
TOOL = ToolSpec("t", "does", (ToolParameter("x", "integer", default=Value("1")),), timeout_s=1.5, metadata={"k": "v"})
COMMANDS = st.one_of(
    VARIABLE_COMMANDS,
    VARIABLE_COMMANDS,
    VARIABLE_COMMANDS,
    st.builds(c.InitializeSession, st.just(S), st.sampled_from([{"of": "ann"}, {"ttl_seconds": "90"}])),
    st.builds(c.RegisterTools, st.just(S), st.just("w"), st.just((RegisteredTool(TOOL, "w", "unix:/w"),))),
)
ENDINGS = st.sampled_from([ExecutionStatus.COMMITTED, ExecutionStatus.COMMITTED, ExecutionStatus.FAILED])
# What it does, whether others do the same meanwhile, what it publishes, how it ends, whether it calls another.
EXECUTIONS = st.tuples(
    st.lists(VARIABLE_COMMANDS, max_size=5), st.booleans(), st.none() | WRITES, ENDINGS, st.booleans()
)
STEPS = st.lists(COMMANDS | COMMANDS | EXECUTIONS, min_size=6, max_size=20)


@lru_cache
def empty_database() -> Path:
    """A database without sessions, to copy: migrating takes longer than a whole example."""
    folder = Path(tempfile.mkdtemp(prefix="recordings-"))
    open_groups(folder / "empty.db").close()
    return folder / "empty.db"


class Original:
    """A session in progress, with its state after each commit."""

    def __init__(self, path: Path) -> None:
        self.store = open_groups(path)
        self.states: dict[int, SessionState | None] = {}
        self._key = self._requests = 0
        self.run(c.InitializeSession(S, {"of": "bob"}, {"seed": [1, None]}))
        for write in (("a", TEXTS[0]), ("b", TEXTS[0]), ("t", TENSORS[0])):
            self.run(registered(write, {}))

    def run(self, command: c.Command[Any], cause: str = "", optimizer: str | None = None) -> Any:
        self._requests += 1
        reason = f"why\n{self._requests}" if self._requests % 3 == 0 else None
        origin = Origin("ann", cause or command.cause, Source.PYTHON, optimizer_id=optimizer, reason=reason)
        (outcome,) = self.store.write_group([Job(command, origin)])
        state = self.store.find_loaded(S)
        self.states[self.store.log.head.sequence] = state.copy() if state is not None else None
        if outcome.error is not None:
            raise outcome.error
        return outcome.result

    def attempt(self, command: c.Command[Any], cause: str = "") -> None:
        with contextlib.suppress(StateError):
            self.run(command, cause, "mipro")

    def execute(
        self,
        own: Sequence[c.Command[Any]],
        disturbed: bool,
        published: tuple[str, Value] | None,
        status: ExecutionStatus,
        has_child: bool,
        retry_of: str | None = None,
    ) -> None:
        self._key += 1
        key = f"key {self._key}" if status is ExecutionStatus.COMMITTED else None
        begin = c.BeginExecution(S, "t", {"x": Value("1", b"\xff")}, {"m": "n"}, idempotency_key=key, retry_of=retry_of)
        begun = self.run(begin)
        origin = Origin("ann", begun.execution_id, Source.PYTHON, optimizer_id="mipro", reason="the execution's")
        execution = Execution.begin(S, "t", Isolation.SERIALIZABLE, begun, origin, self.run)
        if published is not None:
            self.attempt(c.PublishVariable(S, begun.execution_id, *published), begun.execution_id)
        children: tuple[Verdict, ...] = ()
        if has_child:
            child = self.run(c.BeginExecution(S, "child", parent_id=begun.execution_id), begun.execution_id)
            children = (Verdict(child.execution_id, ExecutionStatus.COMMITTED, Value('"\\ud83d"')),)
        for command in own:
            with contextlib.suppress(StateError):
                execution.run(command, origin)
        for command in own if disturbed else ():
            self.attempt(command)
        failure = Failure("ValueError", "lone \ud800 surrogate") if status is ExecutionStatus.FAILED else None
        log = (LogEntry(begun.snapshot.session.created_at, "said", {"n": 1}),)
        verdict = Verdict(
            begun.execution_id, status, Value("1"), failure, log=log, recorded={"now": [1]}, duration_us=7
        )
        finish = replace(execution.finish(verdict), children=children)
        if self.run(finish, begun.execution_id).status is ExecutionStatus.CONFLICT:
            self.execute(own, False, None, ExecutionStatus.FAILED, False, begun.execution_id)


def recorded(path: Path) -> str:
    written = io.StringIO()
    transfer.export_session(path, S, written, reveal=True)
    return written.getvalue()


def histories(store: FileGroups, state: SessionState) -> dict[str, list[VariableVersion]]:
    with_file = Origin("ann", "GetVariableHistory")
    return {
        each: store.read_stored(c.GetVariableHistory(S, each, 1000), with_file, state) for each in sorted(state.names)
    }


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS, st.sampled_from(["lives", "ends", "runs"]), st.integers(0, 2))
def test_a_recorded_session_is_the_same_everywhere(steps: list[Any], end: str, before: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, other = Path(folder, "original.db"), Path(folder, "other.db")
        for each in (path, other):
            shutil.copy(empty_database(), each)
        original = Original(path)
        try:
            for step in steps:
                original.execute(*step) if isinstance(step, tuple) else original.attempt(step)
            if end == "ends":
                original.run(c.CleanupSession(S))
            elif end == "runs":
                original.run(c.BeginExecution(S, "t"))
            text = recorded(path)
            assert_built_again(text, original)
        finally:
            original.store.close()
        assert_imported(text, other, before, runs=end == "runs")


def assert_built_again(text: str, original: Original) -> None:
    _, commits = read_recording(io.StringIO(text))
    memory = MemoryGroups()
    for commit in commits:
        memory.run(c.ImportCommit(S, commit))
        assert facts(memory.load(S)) == facts(original.states[commit.number])
    state = memory.load(S)
    if state is not None:
        stored = original.store.find_loaded(S)
        assert stored is not None
        for identifier, versions in histories(original.store, stored).items():
            assert memory.history(state, VersionQuery(identifier, 1000)) == versions


def facts(state: SessionState | None) -> Any:
    """A state without the fields that only a store uses."""
    if state is None:
        return None
    ttl_s = state.lease.ttl_s if state.lease is not None else None
    parts = (state.session, list(map(shown, state.variables.values())), state.names, state.dependencies, state.sequence)
    return (*parts, state.tools, state.executions, state.weight_bytes, ttl_s)


def shown(variable: Variable) -> Variable:
    """The variable. A lock that was taken and renewed in the same commit counts as not renewed."""
    lock = variable.optimization
    if lock is None or lock.renewed_at != lock.started_at:
        return variable
    return variable._replace(optimization=replace(lock, renewed_at=None))


def assert_imported(text: str, path: Path, before: int, *, runs: bool) -> None:
    store = open_groups(path)
    for number in range(before):
        store.write_group([Job(c.InitializeSession(f"before {number}"), Origin("ann", "InitializeSession"))])
    store.close()
    report = transfer.import_session(path, io.StringIO(text))
    assert report.interrupted == runs
    assert report.first_sequence == before + 1
    assert maintenance.check(path).problems == ()
    again = recorded(path)
    if runs:
        # One more commit, which interrupts the executions.
        assert again.splitlines()[1:-1] == text.splitlines()[1:]
        assert '"status": "interrupted"' in again.splitlines()[-1]
    else:
        assert again == text
