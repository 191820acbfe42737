"""The state as of every commit, compared with an oracle that keeps a copy after each."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dspex_persist import open_audit
from dspex_persist.audit import AuditSource, DifferenceKind
from dspex_persist.state.commands import (
    BeginExecution,
    CleanupSession,
    Command,
    DeleteVariable,
    FinishExecution,
    InitializeSession,
    PublishVariable,
    RegisterVariable,
    RollbackVariable,
    SetVariable,
    SetVariables,
)
from dspex_persist.state.commands.executions import Step, Verdict
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import InvalidArgumentError, NotInHistoryError, StateError
from dspex_persist.state.model import ExecutionStatus, Source, Value
from dspex_persist.state.session_state import SessionState
from tests.memory import MemoryGroups

SESSIONS = st.sampled_from(["s", "t"])
NAMES = st.sampled_from(["a", "b", "c"])
VALUES = st.sampled_from([Value("1"), Value("2"), Value('"' + "long" * 400 + '"')])
METADATA = st.sampled_from([{}, {"why": "first"}, {"why": "second", "who": "ann"}])
COMMANDS: st.SearchStrategy[Command[Any]] = st.one_of(
    st.builds(InitializeSession, SESSIONS),
    st.builds(CleanupSession, SESSIONS),
    st.builds(RegisterVariable, SESSIONS, NAMES, st.just("string"), st.just(Value('"x"')), st.just(""), METADATA),
    st.builds(RegisterVariable, SESSIONS, NAMES, st.just("integer"), st.just(Value("0")), st.just(""), METADATA),
    st.builds(SetVariable, SESSIONS, NAMES, VALUES, METADATA),
    st.builds(SetVariables, SESSIONS, st.dictionaries(NAMES, VALUES, min_size=1), METADATA),
    st.builds(DeleteVariable, SESSIONS, NAMES),
    st.builds(RollbackVariable, SESSIONS, NAMES, st.integers(0, 3)),
)
TOOLS = st.tuples(
    SESSIONS, NAMES, VALUES, st.booleans(), st.sampled_from([ExecutionStatus.COMMITTED, ExecutionStatus.FAILED])
)


def comparable(state: SessionState | None) -> dict[str, tuple[Any, ...]]:
    """A session's variables without their ids, which each store generates."""
    if state is None:
        return {}
    return {
        each.name: (each.type, each.version, each.value.json, dict(each.metadata), each.constraints)
        for each in state.variables.values()
    }


def audited(audit: AuditSource, session: str, point: str) -> dict[str, tuple[Any, ...]]:
    try:
        variables = audit.state(session, point)
    except (NotInHistoryError, InvalidArgumentError):
        return {}
    return {
        each.name: (each.type, each.version, each.value.json if each.value else None, each.metadata, each.constraints)
        for each in variables
    }


class Twins:
    """The store and the oracle with the same commands. `states`: the oracle's state after each commit."""

    def __init__(self, path: Path) -> None:
        self.store = EmbeddedState(path)
        self.oracle = MemoryGroups()
        self.states: list[dict[str, dict[str, tuple[Any, ...]]]] = [{"s": {}, "t": {}}]

    def run(self, command: Command[Any], ours: Command[Any] | None = None) -> tuple[Any, Any]:
        """Both results, or both errors. `ours`: the command for the oracle, if ids differ."""
        results: list[Any] = []
        for run, each in ((self.store.run, command), (self.oracle.run, ours or command)):
            try:
                results.append(run(each))
            except StateError as error:
                results.append(type(error))
        assert isinstance(results[0], type) == isinstance(results[1], type), results
        assert self.store.head_sequence == self.oracle.sequence
        while len(self.states) <= self.oracle.sequence:
            self.states.append({name: comparable(self.oracle.states.get(name)) for name in ("s", "t")})
        return results[0], results[1]

    def execute(self, session: str, name: str, value: Value, publish: bool, status: ExecutionStatus) -> None:
        """A tool that writes one variable, with or without publishing it first."""
        begun = self.run(BeginExecution(session, "tool"))
        if isinstance(begun[0], type):
            return
        if publish:
            self.run(*(PublishVariable(session, each.execution_id, name, value) for each in begun))
        ends = []
        for each in begun:
            steps = (Step(each.execution_id, SetVariable(session, name, value), Source.PYTHON),)
            verdict = Verdict(each.execution_id, status)
            ends.append(FinishExecution(session, verdict, (), steps if status is ExecutionStatus.COMMITTED else ()))
        self.run(*ends)


@settings(max_examples=60)
@given(st.lists(COMMANDS | TOOLS, max_size=30))
def test_the_state_as_of_every_commit_agrees_with_the_oracle(steps: list[Any]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "sessions.db"
        twins = Twins(path)
        with twins.store:
            for step in steps:
                if isinstance(step, tuple):
                    twins.execute(*step)
                else:
                    twins.run(step)
        with open_audit(path) as audit:
            for sequence, expected in enumerate(twins.states):
                for session in ("s", "t"):
                    assert audited(audit, session, str(sequence)) == expected[session], (session, sequence)
                    check_difference(audit, session, sequence, twins.states)


def check_difference(audit: AuditSource, session: str, sequence: int, states: list[Any]) -> None:
    """Check the difference from the previous commit to this one if the session was live at both."""
    if sequence == 0:
        return
    try:
        changes = audit.diff(session, str(sequence - 1), str(sequence))
    except (NotInHistoryError, InvalidArgumentError):
        return
    before, after = states[sequence - 1][session], states[sequence][session]
    expected = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert {change.name for change in changes} == expected
    for change in changes:
        assert (change.kind is DifferenceKind.ADDED) == (change.name not in before)
        assert (change.kind is DifferenceKind.REMOVED) == (change.name not in after)
