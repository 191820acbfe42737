"""The cache of a client against a model: whatever overtakes whatever, no hit is too old or goes back in time."""

from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dspex_persist.state import commands as c
from dspex_persist.state.bridge.client.cache import ValueCache, _Session
from dspex_persist.state.frozen import FrozenDict
from dspex_persist.state.model import (
    ChangeKind,
    Optimization,
    Source,
    Update,
    UpdateKind,
    Value,
    Variable,
    VariablesFound,
    VariableVersion,
)

AT = datetime(2026, 3, 1, tzinfo=UTC)
MAX_AGE_S = 10.0
LOCK = Optimization("", "mipro", AT)


class Call:
    """A call on its way: sent, then carried out by the server, then answered."""

    def __init__(
        self, done: Callable[[Any], None] | None, carry_out: Callable[[], Any], variable_id: str | None = None
    ) -> None:
        self.done = done
        self.carry_out = carry_out
        self.variable_id = variable_id
        self.is_carried_out = False
        self.result: Any = None
        self.moment = 0

    def answer(self) -> None:
        if self.done is not None:
            self.done(self.result)


class World:
    """One variable on a server, a client with a cache, and everything that is on its way between them.

    A moment is a state of the variable, numbered in their order. No hit may show an earlier one than any that the
    client has seen, or than the one that was current `MAX_AGE_S` ago.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.cache = ValueCache(lambda _: None, max_bytes=100_000, max_age_s=MAX_AGE_S, now=lambda: self.now)
        self.session = _Session("s", 0.0)
        self.session.is_live = True
        self.cache._sessions["s"] = self.session
        self.variable: Variable | None = self._new("1")
        self.moment = 0
        self.current = [(0.0, 0)]
        self.moments = {self._key(self.variable): 0}
        self.tokens = 1
        self.gone_at: dict[str | None, int] = {}
        self.stream = deque[Update]()
        self.watch = deque[tuple[Update, int]]()
        self.calls: list[Call] = []
        self.seen = 0
        self.known_id = self.variable.id
        self.hits = 0

    @staticmethod
    def _new(token: str) -> Variable:
        value = Value("0")
        return Variable(f"var_x_{token}", "x", "integer", value, 0, "", FrozenDict(), Source.PYTHON, AT, None)

    @staticmethod
    def _key(variable: Variable | None) -> tuple[str, int] | None:
        return None if variable is None else (variable.id, variable.version)

    # The server

    def _changed(self, variable: Variable | None, kind: UpdateKind, shown: Variable) -> int:
        self.variable = variable
        self.moment += 1
        self.current.append((self.now, self.moment))
        self.moments[self._key(variable)] = self.moment
        change = ChangeKind.DELETED if kind is UpdateKind.DELETED else ChangeKind.SET
        facts = (shown.version, change, shown.value, {}, Source.PYTHON, AT, "ada", "SetVariable", self.moment)
        update = Update(kind, shown, self.moment, AT, VariableVersion(shown.id, "integer", *facts))
        self.stream.append(update)
        self.watch.append((update, self.moment))
        return self.moment

    def write(self) -> int:
        """A write of anybody; a deleted variable is registered again."""
        if self.variable is None:
            self.tokens += 1
            new = self._new(str(self.tokens))
            return self._changed(new, UpdateKind.VALUE_CHANGE, new)
        version = self.variable.version + 1
        written = self.variable._replace(version=version, value=Value(str(version)))
        return self._changed(written, UpdateKind.VALUE_CHANGE, written)

    def delete(self) -> None:
        if self.variable is not None:
            shown = self.variable._replace(version=self.variable.version + 1)
            self.gone_at[self.variable.id] = self.moment + 1
            self._changed(None, UpdateKind.DELETED, shown)

    def lock(self) -> None:
        """Lock or unlock it, which no watch reports."""
        if self.variable is not None:
            self.variable = self.variable._replace(optimization=None if self.variable.optimization else LOCK)

    # The client

    def read_by_name(self) -> None:
        done = self.cache.sending(c.GetVariable("s", "x"))
        self.calls.append(Call(done, lambda: self.variable))

    def read_by_id(self) -> None:
        """A read by the id of a variable that the client has seen."""
        variable_id = self.known_id

        def find() -> Any:
            return self.variable if self.variable is not None and self.variable.id == variable_id else None

        done = self.cache.sending(c.GetVariable("s", variable_id))
        self.calls.append(Call(done, find, variable_id))

    def read_several(self) -> None:
        def find() -> Any:
            return VariablesFound({"x": self.variable} if self.variable is not None else {}, ("y",))

        self.calls.append(Call(self.cache.sending(c.GetVariables("s", ("x", "y"))), find))

    def list_all(self) -> None:
        def find() -> Any:
            return (self.variable,) if self.variable is not None else ()

        self.calls.append(Call(self.cache.sending(c.ListVariables("s")), find))

    def own_write(self) -> None:
        self.calls.append(Call(self.cache.sending(c.SetVariable("s", "x", Value("1"))), self.write))

    def own_tool(self) -> None:
        self.calls.append(Call(self.cache.sending(c.ExecuteTool("s", "t")), self.write))

    # What arrives

    def carry_out(self, which: int) -> None:
        waiting = [call for call in self.calls if not call.is_carried_out]
        if waiting:
            call = waiting[which % len(waiting)]
            call.result, call.is_carried_out = call.carry_out(), True
            # That a variable is gone tells nothing about another one of its name.
            is_told = call.variable_id is None or call.result is not None
            call.moment = self.moment if is_told else self.gone_at.get(call.variable_id, 0)

    def answer(self, which: int) -> None:
        done = [call for call in self.calls if call.is_carried_out]
        if done:
            call = done[which % len(done)]
            self.calls.remove(call)
            call.answer()
            self.seen = max(self.seen, call.moment)
            self._learn(call.result)

    def deliver(self) -> None:
        if self.stream:
            self.cache._apply(self.session, self.stream.popleft())

    def deliver_to_watch(self) -> None:
        """A watch of the program gets an update, which may be before the cache's own does."""
        if self.watch:
            update, moment = self.watch.popleft()
            self.cache.told("s", update)
            self.seen = max(self.seen, moment)
            self._learn(update.variable)

    def _learn(self, result: object) -> None:
        if isinstance(result, VariablesFound):
            result = tuple(result.variables.values())
        for each in (result,) if isinstance(result, Variable) else result if isinstance(result, tuple) else ():
            self.known_id = each.id

    def wait(self, which: int) -> None:
        self.now += (0.1, 1.0, 4.0)[which % 3]

    def hit(self) -> None:
        for identifier in ("x", f"var_x_{self.tokens}"):
            found = self.cache.find(c.GetVariable("s", identifier))
            if found is None:
                continue
            self.hits += 1
            assert found.optimization is None
            moment = self.moments[self._key(found)]
            assert moment >= self.seen, "it goes back behind what the client has seen"
            bound = max((moment for at, moment in self.current if at < self.now - MAX_AGE_S), default=0)
            assert moment >= bound, "it is too old"
            self.seen = moment


STEPS = {
    name: getattr(World, name)
    for name in (
        *("write", "delete", "lock", "read_by_name", "read_by_id", "read_several", "list_all", "own_write", "own_tool"),
        *("carry_out", "answer", "deliver", "deliver_to_watch", "wait", "hit"),
    )
}
WEIGHTED = [*STEPS, *["read_by_name", "carry_out", "answer", "hit"] * 3, "deliver", "write"]


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(WEIGHTED), st.integers(0, 7)), max_size=80))
def test_no_hit_is_too_old_or_goes_back(steps: list[tuple[str, int]]) -> None:
    world = World()
    for name, which in steps:
        step = STEPS[name]
        if name in ("carry_out", "answer", "wait"):
            step(world, which)
        else:
            step(world)
        world.hit()
