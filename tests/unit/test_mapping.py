"""The mapping of a session's variables behaves like a dict; so do attributes and handles, as far as they go."""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pydantic import BaseModel

from dspex_persist import Context, ToolContext
from dspex_persist.state.errors import InvalidValueError, VariableNotFoundError

# A name for each type: a variable keeps the type that its first value had.
VALUES: Mapping[str, st.SearchStrategy[Any]] = {
    "i": st.integers(-5, 5),
    "t": st.text(max_size=3).filter(lambda text: "\0" not in text and text.isprintable()),
    "l": st.lists(st.integers(0, 3), max_size=3),
    "m": st.dictionaries(st.sampled_from("xy"), st.booleans(), max_size=1),  # the keys of a map are stored in order
    "b": st.booleans(),
    "not an identifier": st.floats(allow_nan=False, width=32),
}
NAMES = st.sampled_from(sorted(VALUES))
ITEMS = NAMES.flatmap(lambda name: st.tuples(st.just(name), VALUES[name]))
DICTS = st.lists(ITEMS, max_size=4).map(dict)


class LikeADict(RuleBasedStateMachine):
    """The same operations on a dict and on the mapping have the same results, or the same kind of error."""

    @initialize()
    def begin(self) -> None:
        self.context = Context()
        self.dict: dict[str, Any] = {}

    def both(self, operation: Any) -> None:
        outcomes: list[tuple[Any, Any]] = []
        for mapping in (self.dict, self.context.variables):
            try:
                outcomes.append((operation(mapping), None))
            except KeyError:
                outcomes.append((None, KeyError))
        assert outcomes[0] == outcomes[1]

    @rule(item=ITEMS)
    def assign(self, item: tuple[str, Any]) -> None:
        self.both(lambda mapping: mapping.__setitem__(*item))

    @rule(name=NAMES)
    def look_up(self, name: str) -> None:
        self.both(lambda mapping: mapping[name])
        self.both(lambda mapping: (mapping.get(name), mapping.get(name, 5), name in mapping))

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        self.both(lambda mapping: mapping.__delitem__(name))

    @rule(name=NAMES, default=st.sampled_from([(), (7,), (None,)]))
    def pop(self, name: str, default: tuple[Any, ...]) -> None:
        self.both(lambda mapping: mapping.pop(name, *default))

    @rule()
    def popitem(self) -> None:
        self.both(lambda mapping: mapping.popitem())

    @rule(item=ITEMS)
    def setdefault(self, item: tuple[str, Any]) -> None:
        self.both(lambda mapping: mapping.setdefault(*item))

    @rule(other=DICTS, how=st.sampled_from(["mapping", "pairs", "keywords", "|="]))
    def update(self, other: dict[str, Any], how: str) -> None:
        def change(mapping: Any) -> None:
            if how == "mapping":
                mapping.update(other)
            elif how == "pairs":
                mapping.update(list(other.items()))
            elif how == "keywords":
                mapping.update(**other)
            else:
                mapping |= other

        self.both(change)

    @rule(other=DICTS)
    def join(self, other: dict[str, Any]) -> None:
        self.both(lambda mapping: (mapping | other, other | mapping, mapping == other, mapping != other))
        self.both(lambda mapping: (mapping.keys() & other.keys(), mapping.keys() == other.keys()))

    @rule()
    def clear(self) -> None:
        self.both(lambda mapping: mapping.clear())

    @invariant()
    def same(self) -> None:
        mapping = self.context.variables
        assert mapping == self.dict
        assert self.dict == mapping
        assert self.dict == mapping.copy() == dict(mapping) == dict(self.context) == {**mapping}
        assert (list(mapping), len(mapping), bool(mapping)) == (list(self.dict), len(self.dict), bool(self.dict))
        assert (repr(mapping), list(reversed(mapping))) == (repr(self.dict), list(reversed(self.dict)))
        assert list(mapping.items()) == list(self.dict.items())
        assert list(mapping.values()) == list(self.dict.values())
        assert list(mapping.keys()) == list(self.dict)

    def teardown(self) -> None:
        if hasattr(self, "context"):
            self.context.close()


LikeADict.TestCase.settings = settings(max_examples=15, stateful_step_count=20)
TestLikeADict = LikeADict.TestCase


@pytest.fixture
def ctx() -> Iterator[Context]:
    with Context() as context:
        yield context


def test_it_is_not_hashable_and_no_dict(ctx: Context) -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(ctx.variables)
    assert ctx.variables != 5
    assert ctx.variables == Context("s").variables


def test_it_can_be_updated_in_place_but_not_replaced(ctx: Context) -> None:
    ctx.variables |= {"a": 1}
    assert ctx.variables == {"a": 1}
    for wrong in ({"a": 2}, Context().variables):
        with pytest.raises(AttributeError, match=r"use \|="):
            ctx.variables = wrong  # type: ignore[assignment]


def test_iteration_while_others_write(ctx: Context) -> None:
    ctx.define_many({f"x{n}": n for n in range(50)})
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            ctx["extra"] = 1
            ctx.variables.pop("extra", None)

    with ThreadPoolExecutor(1) as thread:
        disturbing = thread.submit(disturb)
        try:
            for _ in range(20):
                names = list(ctx.variables)
                assert {name for name in names if name != "extra"} == {f"x{n}" for n in range(50)}
                assert sum(value for name, value in ctx.variables.items() if name != "extra") == sum(range(50))
        finally:
            stop.set()
        disturbing.result()


class TestAttributes:
    def test_they_are_the_variables(self, ctx: Context) -> None:
        ctx.v.temperature = 0.5
        assert ctx.v.temperature == ctx["temperature"] == 0.5
        ctx["not an identifier"] = 1
        assert dir(ctx.v) == ["temperature"]
        assert repr(ctx.v) == "<variables temperature, not an identifier>"
        assert not hasattr(ctx.v, "temprature")
        with pytest.raises(AttributeError, match="did you mean 'temperature'"):
            _ = ctx.v.temprature
        with pytest.raises(AttributeError, match="temprature"):
            del ctx.v.temprature
        del ctx.v.temperature
        assert "temperature" not in ctx

    def test_names_with_an_underscore_are_no_variables(self, ctx: Context) -> None:
        with pytest.raises(AttributeError, match=r"ctx\['_x'\]"):
            ctx.v._x = 1
        assert not hasattr(ctx.v, "_x")


class Profile(BaseModel):
    name: str
    ages: list[int] = []


class TestHandles:
    def test_of_a_plain_type(self, ctx: Context) -> None:
        temperature = ctx.handle("temperature", float)
        with pytest.raises(VariableNotFoundError):
            _ = temperature.value
        assert temperature.set(0.5, create=True, reason="first") == 0
        temperature.value = 0.75
        assert temperature.update(lambda t: t / 3) == 0.25 == temperature.value
        assert temperature.rollback(0) == 0.5
        assert [entry.value for entry in temperature.history(2)] == [0.5, 0.25]
        assert temperature.info().type == "float"
        assert repr(temperature) == "<Variable 'temperature' of float>"
        temperature.delete()
        ctx["temperature"] = "hot"
        with pytest.raises(InvalidValueError, match="it is 'hot', and the handle expects float"):
            temperature.get()

    def test_a_whole_number_is_a_float(self, ctx: Context) -> None:
        ctx["n"] = 3
        value = ctx.handle("n", float).value
        assert (value, type(value)) == (3.0, float)
        ctx["flag"] = True
        with pytest.raises(InvalidValueError):
            ctx.handle("flag", int).get()

    def test_of_a_model(self, ctx: Context) -> None:
        profile = ctx.handle("profile", Profile)
        profile.set(Profile(name="ann", ages=[3]), create=True)
        assert ctx["profile"] == {"name": "ann", "ages": [3]}
        assert profile.value == Profile(name="ann", ages=[3])
        profile.update(lambda p: p.model_copy(update={"ages": [*p.ages, 4]}))
        assert profile.value.ages == [3, 4]
        ctx["profile"] = {"ages": []}
        with pytest.raises(InvalidValueError, match="it is not a Profile: name: Field required"):
            profile.get()

    def test_from_asyncio_and_in_tools(self) -> None:
        def double(ctx: ToolContext) -> list[float]:
            numbers = ctx.handle("numbers", list[float])
            return numbers.update(lambda each: [2 * n for n in each])

        async def use() -> list[float]:
            async with Context.aopen("s", tools=[double]) as context:
                numbers = context.handle("numbers", list[float])
                await numbers.set.aio([1.5], create=True)
                await context.call.aio("double")
                return await numbers.get.aio()

        assert asyncio.run(use()) == [3.0]
