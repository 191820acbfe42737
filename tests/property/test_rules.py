"""Rules hold after any sequence of commits, in any groups, and refuse nothing that they allow."""

from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspex_persist.state import commands as c
from dspex_persist.state.commands.executions import Step, Verdict
from dspex_persist.state.errors import InvalidRuleError, RuleViolatedError, StateError
from dspex_persist.state.groups import Job, Outcome
from dspex_persist.state.model import BatchOutcome, ExecutionStatus, Origin, Source, Value
from dspex_persist.state.session_state import SessionState
from tests.memory import MemoryGroups

NAMES = "abc"
RULES: Mapping[str, tuple[tuple[str, ...], Callable[..., bool]]] = {
    "a <= b": (("a", "b"), lambda a, b: a <= b),
    "a + b <= c + 6": (("a", "b", "c"), lambda a, b, c: a + b <= c + 6),
    "b != 3 || c > 2": (("b", "c"), lambda b, c: b != 3 or c > 2),
    "10 / c > 1": (("c",), lambda c: c != 0 and int(10 / c) > 1),
}
"""Expressions, each with its variables and what it means."""

numbers = st.integers(0, 9).map(lambda number: Value(str(number)))
names = st.sampled_from(NAMES)
writes = st.one_of(
    st.builds(c.SetVariable, st.just("s"), names, numbers),
    st.builds(c.RegisterVariable, st.just("s"), names, st.just("integer"), numbers),
    st.builds(c.DeleteVariable, st.just("s"), names),
    st.builds(c.RollbackVariable, st.just("s"), names, st.integers(0, 4)),
    st.builds(c.ConstrainVariable, st.just("s"), names, st.sampled_from(["", '{"max":7}']), numbers),
)
batches = st.builds(
    c.SetVariables, st.just("s"), st.dictionaries(names, numbers, min_size=1), st.just({}), st.booleans()
)
rules = st.one_of(
    st.builds(
        c.AddRule,
        st.just("s"),
        st.sampled_from(["r", "t"]),
        st.sampled_from(list(RULES)),
        st.just(""),
        st.booleans(),
    ),
    st.builds(c.RemoveRule, st.just("s"), st.sampled_from(["r", "t"])),
)
tools = st.lists(st.one_of(writes, batches), min_size=1, max_size=3)
groups = st.lists(st.lists(st.one_of(writes, writes, batches, rules, tools), min_size=1, max_size=5), max_size=12)


def holds(state: SessionState, expression: str) -> bool:
    """Whether a rule holds, by what it means."""
    variables, meaning = RULES[expression]
    if not all(name in state.variables for name in variables):
        return True
    return meaning(*(int(state.variables[name].value.json) for name in variables))


def facts(state: SessionState) -> Any:
    variables = {name: (each.value.json, each.version, each.constraints) for name, each in state.variables.items()}
    return variables, dict(state.rules or {}), state.weight_bytes


class Sessions(MemoryGroups):
    """A session, and what each group leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.write_group([Job(c.InitializeSession("s"), Origin("ann", "InitializeSession"))])
        for name in NAMES:
            self.write_group([Job(c.RegisterVariable("s", name, "integer", Value("1")), Origin("ann", "x"))])

    @property
    def state(self) -> SessionState:
        return self.states["s"]

    def run_tool(self, written: list[Any]) -> Outcome:
        """Run a tool that carries out the writing commands, as its end does: all of them, or none."""
        origin = Origin("ann", "ExecuteTool")
        (begun,) = self.write_group([Job(c.BeginExecution("s", "t"), origin)])
        execution_id = begun.result.execution_id
        steps = tuple(
            Step(execution_id, command, Source.PYTHON, tokens=(f"{self.sequence:06}{number}",))
            for number, command in enumerate(written)
        )
        verdict = Verdict(execution_id, ExecutionStatus.COMMITTED)
        (ended,) = self.write_group([Job(c.FinishExecution("s", verdict, (), steps), origin)])
        return ended


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(groups)
def test_rules_hold_after_every_commit(written: list[list[Any]]) -> None:
    sessions = Sessions()
    for group in written:
        for command in [each for each in group if isinstance(each, list)]:
            before = facts(sessions.state)
            outcome = sessions.run_tool(command)
            assert outcome.error is None
            if outcome.result.status is not ExecutionStatus.COMMITTED:
                assert facts(sessions.state) == before
            if outcome.result.failure is not None:
                assert outcome.result.failure.type == "RuleViolatedError"
        jobs = [Job(each, Origin("ann", each.cause)) for each in group if not isinstance(each, list)]
        for outcome in sessions.write_group(jobs) if jobs else ():
            assert outcome.error is None or isinstance(outcome.error, StateError)
            assert type(outcome.error).__name__ != "InternalError"
        for rule in (sessions.state.rules or {}).values():
            assert holds(sessions.state, rule.expression), (rule, facts(sessions.state))


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(writes, batches, rules), max_size=20))
def test_what_a_rule_refuses_would_have_violated_it(written: list[Any]) -> None:
    """The same command without the rules succeeds, and leaves what they do not allow; a refusal leaves nothing."""
    sessions = Sessions()
    for command in written:
        before, rules_then = facts(sessions.state), dict(sessions.state.rules or {})
        (outcome,) = sessions.write_group([Job(command, Origin("ann", command.cause))])
        if isinstance(outcome.error, RuleViolatedError | InvalidRuleError):
            assert facts(sessions.state) == before
        if not isinstance(outcome.error, RuleViolatedError):
            continue
        free = Sessions()
        for name in NAMES:
            free.write_group([Job(c.DeleteVariable("s", name), Origin("ann", "x"))])
        for name, each in sessions.state.variables.items():
            register = c.RegisterVariable("s", name, "integer", each.value, each.constraints)
            free.write_group([Job(register, Origin("ann", "x"))])
        if isinstance(command, c.RollbackVariable):
            continue
        (freely,) = free.write_group([Job(command, Origin("ann", command.cause))])
        assert freely.error is None
        assert not all(holds(free.state, rule.expression) for rule in rules_then.values())


@settings(max_examples=60)
@given(st.lists(st.one_of(writes, rules), max_size=8), st.dictionaries(names, numbers, min_size=1))
def test_batches_write_what_fits_together(prepared: list[Any], updates: dict[str, Value]) -> None:
    sessions = Sessions()
    sessions.write_group([Job(each, Origin("ann", each.cause)) for each in prepared])
    (outcome,) = sessions.write_group([Job(c.SetVariables("s", updates), Origin("ann", "SetVariables"))])
    assert isinstance(outcome.result, BatchOutcome)
    assert set(outcome.result.versions) | set(outcome.result.errors) == set(updates)
    for name in outcome.result.versions:
        assert sessions.state.variables[name].value == updates[name]
    for rule in (sessions.state.rules or {}).values():
        assert holds(sessions.state, rule.expression)
