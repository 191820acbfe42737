"""Is a session that a server brings up to date in memory as if it had loaded it?"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from dspex_persist.state.commands import (
    AddDependency,
    AddRule,
    BeginExecution,
    Command,
    ConstrainVariable,
    DeleteVariable,
    FinishExecution,
    InitializeSession,
    InterruptExecutions,
    RegisterTools,
    RegisterVariable,
    RegisterVariables,
    RemoveDependency,
    RemoveRule,
    RollbackVariable,
    SetVariable,
    SetVariables,
    StartOptimization,
    StopOptimization,
)
from dspex_persist.state.commands.executions import Step, Verdict
from dspex_persist.state.model import ExecutionStatus, Origin, RegisteredTool, Source, ToolSpec, Value
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.shared import SharedState
from dspex_persist.state.shared_log import SharedLog


def facts_of(state: SessionState) -> dict[str, Any]:
    """What has to be the same."""
    return {
        "session": state.session,
        "sequence": state.sequence,
        "variables": list(state.variables.items()),
        "names": state.names,
        "dependencies": (list(state.dependencies), state.dependencies.changed_at),
        "ttl_s": None if state.lease is None else state.lease.ttl_s,
        "weight_bytes": state.weight_bytes,
        "tools": dict(state.tools),
        "executions": list(state.executions.items()),
        "rules": dict(state.rules or {}),
    }


def check_advanced(state: SessionState, loaded: SessionState) -> None:
    """Compare a session that was brought up to date with itself as it is loaded."""
    of_state, of_loaded = facts_of(state), facts_of(loaded)
    wrong = {name: (fact, of_loaded[name]) for name, fact in of_state.items() if fact != of_loaded[name]}
    assert not wrong, f"not as it is loaded: {wrong}"
    # A server keeps the keys of variables that are gone, too.
    keys = {each: state.keys.get(each) for each in loaded.keys}
    assert keys == loaded.keys, f"not with the keys {loaded.keys}: {keys}"
    # A store that numbers variables has there how many there were when the session was loaded.
    assert state.key == loaded.key or _next_key(state) >= _next_key(loaded)


def _next_key(state: SessionState) -> int:
    return max(state.key, next(reversed(state.keys.values()), -1) + 1)


def check_always(log: SharedLog) -> None:
    """Have a log compare each session that it brings up to date with itself as it is loaded."""
    advance = log.advance

    def checked(states: Sequence[SessionState], until: int) -> list[SessionState | None]:
        after = advance(states, until)
        for state in after:
            loaded = None if state is None else log.load(state.session.id)
            # Others may have gone on, also while it was loaded.
            if state is not None and loaded is not None and log.head() == until:
                check_advanced(state, loaded)
        return after

    log.advance = checked  # type: ignore[method-assign]


class Made(NamedTuple):
    """A commit of another server.

    Attributes:
        kind: What it does.
        is_applied: Whether it is applied in memory; a session with another one is loaded.
    """

    kind: str
    is_applied: bool


class Other:
    """Another server, which makes commits of each kind in the session "s".

    Args:
        state: The server.
        seed: What `anything` chooses by.
        registers: Whether new variables are applied in memory.
    """

    def __init__(self, state: SharedState, seed: int = 0, *, registers: bool = True) -> None:
        self._state = state
        self._random = random.Random(seed)
        self._count = 0
        self._registers = registers
        self._running: list[str] = []
        state.initialize_session("s")
        for name in ("x", "y", "z"):
            state.register_variable("s", name, "integer", 0, metadata={"unit": "m"})

    def _run(self, command: Command[Any], **origin: Any) -> Any:
        return self._state.submit(command, Origin("test", command.cause, **origin)).result()

    def _name(self) -> str:
        self._count += 1
        return f"n{self._count}"

    def _begin(self, **options: Any) -> str:
        parameters = {"p": Value('"' + "x" * 5000 + '"')}
        begun = self._run(BeginExecution("s", "tool", parameters, turns={}, **options))
        self._running.append(begun.execution_id)
        return str(begun.execution_id)

    def _end(self, *steps: Command[Any], children: Sequence[str] = (), status: str = "committed") -> None:
        execution_id = self._running.pop(0)
        verdict = Verdict(execution_id, ExecutionStatus(status), Value('"\\u0000"'), recorded={"now": [1]})
        ended = tuple(Verdict(each, ExecutionStatus.COMMITTED) for each in children)
        self._running = [each for each in self._running if each not in children]
        self._count += 1
        tokens = (f"{self._count:012x}",)
        said = tuple(Step(execution_id, step, Source.PYTHON, tokens=tokens) for step in steps)
        self._run(FinishExecution("s", verdict, ended, said))

    def everything(self) -> Iterator[Made]:
        """Make a commit of each kind, one after the other."""
        run, yes, no, register = self._run, True, False, self._registers

        def set_to(name: str, value: int, **more: Any) -> SetVariable:
            return SetVariable("s", name, Value(str(value)), **more)

        run(set_to("x", 1))
        yield Made("a version", yes)
        run(set_to("x", 2, metadata={"unit": "km", "source": "a"}), reason="because")
        yield Made("metadata", yes)
        run(SetVariables("s", {"x": Value("3"), "y": Value("4")}, atomic=True))
        yield Made("several versions", yes)
        run(RegisterVariable("s", "large", "string", Value('"' + "x" * 9000 + '"')))
        yield Made("a new variable", register)
        run(RegisterVariables("s", tuple(RegisterVariable("s", each, "integer", Value("1")) for each in "bac")))
        yield Made("new variables", register)
        run(ConstrainVariable("s", "x", '{"max":9,"min":0}'))
        yield Made("other constraints", yes)
        run(RollbackVariable("s", "x", 1))
        yield Made("a rollback", yes)
        run(AddDependency("s", "a", "b", "data"))
        yield Made("a dependency", yes)
        run(AddDependency("s", "b", "c", "data"))
        run(RemoveDependency("s", "a", "b", "data"))
        yield Made("the end of a dependency", yes)
        run(DeleteVariable("s", "c"))
        yield Made("the end of a variable", yes)
        run(RegisterVariable("s", "c", "float", Value("1.5")))
        yield Made("its name again", register)
        run(AddRule("s", "small", "x < 100", "for safety"))
        run(AddRule("s", "also", "y < 100"))
        yield Made("rules", yes)
        run(RemoveRule("s", "small"))
        yield Made("the end of a rule", yes)
        run(StartOptimization("s", "y", "o1", {"k": "v"}))
        yield Made("a lock", yes)
        run(set_to("y", 5, metadata={"optimizer_id": "o1"}))
        yield Made("a version by its holder", yes)
        run(StopOptimization("s", "y"))
        yield Made("the end of a lock", yes)
        yield from self._executions()
        tool = RegisteredTool(ToolSpec("theirs", "what it does"), "w1", "")
        run(RegisterTools("s", "w1", (tool,)))
        yield Made("tools", no)
        run(InitializeSession("s", {"of": "it"}))
        yield Made("the session's own facts", no)

    def _executions(self) -> Iterator[Made]:
        first = self._begin(idempotency_key="once")
        yield Made("the beginning of an execution", True)
        child = self._begin(parent_id=first)
        yield Made("that of a child", True)
        self._begin()
        self._end(
            SetVariable("s", "x", Value("7")),
            RegisterVariable("s", self._name(), "integer", Value("1")),
            children=[child],
        )
        yield Made("an end with writes", self._registers)
        name = self._name()
        self._end(RegisterVariable("s", name, "integer", Value("1")), DeleteVariable("s", name))
        yield Made("a variable that never was", False)
        self._begin()
        self._end(status="failed")
        yield Made("a failure", True)
        running = self._begin()
        self._run(InterruptExecutions("s", (running,)))
        self._running.clear()
        yield Made("an interruption", True)

    def anything(self) -> None:
        """Make one commit, or more."""
        choose, run = self._random.choice, self._run
        names = [each.name for each in self._state.list_variables("s") if each.type == "integer"]
        makers: list[Callable[[], Any]] = [
            lambda: run(SetVariable("s", choose(names), Value("1"), metadata={choose("ab"): choose("cd")})),
            lambda: run(SetVariables("s", {name: Value("2") for name in names}, atomic=True)),
            lambda: run(RegisterVariable("s", self._name(), "integer", Value("3"), metadata={"m": "n"})),
            lambda: run(DeleteVariable("s", names[-1])) if len(names) > 3 else None,
            lambda: run(ConstrainVariable("s", choose(names), '{"min":0}')),
            lambda: run(AddRule("s", choose(["r1", "r2"]), choose(["x >= 0", "y >= 0"]), replace=True)),
            lambda: self._begin(),
            lambda: self._end() if self._running else None,
            lambda: self._end(SetVariable("s", choose(names), Value("4"))) if self._running else None,
        ]
        choose(makers)()


def follow(log: SharedLog, before: SessionState) -> tuple[SessionState, bool]:
    """Return a session as of now, and whether it was brought up to date; compared with itself as it is loaded."""
    log.news()
    with log.group():
        (after,) = log.advance([before], log.sequence)
        loaded = log.load("s")
    assert loaded is not None
    if after is not None:
        check_advanced(after, loaded)
    return after or loaded, after is not None


def check_each_kind(log: SharedLog, state: SharedState, *, registers: bool = True) -> None:
    """Follow another server from commit to commit; `registers`: see `Other`."""
    other = Other(state, registers=registers)
    with log.group():
        known = log.load("s")
    assert known is not None
    for made in other.everything():
        before, (known, is_applied) = facts_of(known), follow(log, known)
        assert facts_of(known) != before, made
        assert is_applied == made.is_applied, made


def check_many(log: SharedLog, state: SharedState, commits: int, seed: int) -> None:
    """Follow another server over several commits at once."""
    other, sizes = Other(state, seed), random.Random(seed)
    with log.group():
        known = log.load("s")
    for _ in range(commits):
        for _ in range(sizes.randrange(1, 6)):
            other.anything()
        assert known is not None
        if known.sequence < log.head():
            known, _ = follow(log, known)
