"""Tools as users write them: decorated, described, bound, loaded. No server, no file."""

import asyncio
import dataclasses
import importlib
import inspect
import json
import random
import re
import subprocess
import sys
import typing
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from importlib.machinery import ModuleSpec
from math import inf, isnan
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple, NewType, NotRequired, TypedDict
from uuid import UUID

import pytest
from pydantic import AfterValidator, BaseModel, Field, model_validator

import dspex_persist
from dspex_persist import Tool, Toolbox, ToolContext, tool
from dspex_persist.cognitive.errors import ToolDefinitionError, ToolLoadError
from dspex_persist.errors import DspexError
from dspex_persist.state.commands import Command, InitializeSession, RegisterVariable
from dspex_persist.state.errors import (
    InvalidValueError,
    ToolArgumentError,
    VariableNotFoundError,
    VersionConflictError,
)
from dspex_persist.state.model import ChangeKind, Isolation, ToolParameter, ToolSpec, Value
from dspex_persist.state.tools.ports import ToolCode, ToolKind
from dspex_persist.state.values import BinaryValue
from tests.deadline import within
from tests.memory import MemoryGroups


class FakeSession:
    """A tool's session in memory, which records all other calls."""

    def __init__(self) -> None:
        self.session_id, self.execution_id, self.attempt = "s", "exec_1", 1
        self.metadata: Mapping[str, str] = {"who": "test"}
        self.random = random.Random(7)
        self.cancelled = False
        self.calls: list[tuple[Any, ...]] = []
        self._memory = MemoryGroups()
        self._memory.run(InitializeSession("s"))
        self._memory.run(RegisterVariable("s", "temperature", "float", Value("0.5"), '{"max":1}'))
        self._memory.run(RegisterVariable("s", "n", "integer", Value("1")))

    def run(self, command: Command[Any]) -> Any:
        return self._memory.run(command)

    def publish(self, identifier: str, value: object, metadata: Mapping[str, str] | None = None) -> int:
        if identifier != "n":
            raise VariableNotFoundError("s", identifier)
        self.calls.append(("publish", identifier, value, metadata))
        return 7

    def now(self) -> datetime:
        return datetime(2030, 1, 1, tzinfo=UTC)

    def uuid(self) -> UUID:
        return UUID(int=5)

    def log(self, message: str, **fields: object) -> None:
        self.calls.append(("log", message, fields))

    def call(self, tool: str, arguments: Mapping[str, object]) -> Any:
        self.calls.append(("call", tool, arguments))
        return "called"


@pytest.fixture
def session() -> Any:
    return FakeSession()


@pytest.fixture
def ctx(session: Any) -> ToolContext:
    return ToolContext(session)


def bind(tested: Tool[..., Any], **arguments: object) -> Mapping[str, object]:
    """Bind Python objects as JSON."""
    return tested.bind({name: Value(json.dumps(argument)) for name, argument in arguments.items()})


def refused(tested: Tool[..., Any], **arguments: object) -> ToolArgumentError:
    with pytest.raises(ToolArgumentError) as caught:
        bind(tested, **arguments)
    return caught.value


def parameter_of(annotation: Any, **default: Any) -> ToolParameter:
    return taking(annotation, **default).spec.parameters[0]


def taking(annotation: Any, **default: Any) -> Tool[..., Any]:
    """A tool with one parameter `x` with this annotation; it returns its argument."""

    def probe(x: Any) -> Any:
        return x

    probe.__annotations__["x"] = annotation
    if default:
        probe.__defaults__ = (default["default"],)
    return tool(probe)


def argument(annotation: Any, document: object) -> object:
    """The argument that the document becomes with this annotation."""
    return bind(taking(annotation), x=document)["x"]


# The result of the decorator.


@tool
def scale(ctx: ToolContext, factor: float, name: str = "temperature") -> float:
    """Scale a variable, and
    say what it is then.

    More words.

    Args:
        ctx: The transaction.
        factor: By how much. This sentence
            goes on.
        name (str): Which one.
    """
    ctx[name] = ctx[name] * factor
    return float(ctx[name])


@tool(
    description="Adds.",
    name="math.add",
    isolation="snapshot",
    retries=3,
    timeout_s=5,
    exposed=True,
    required_variables=["n"],
    metadata={"team": "a"},
)
async def add(a: int, b: int = 2) -> int:
    """Not this."""
    return a + b


@tool
def count(to: int) -> Iterator[int]:
    yield from range(to)


@tool
async def acount(ctx: ToolContext, to: int) -> AsyncIterator[int]:
    for number in range(to):
        yield number


class Counter:
    """Tools as methods."""

    def __init__(self, step: int = 1) -> None:
        self.step = step

    @tool
    def increase(self, ctx: ToolContext, by: int = 1) -> int:
        """Increase n."""
        ctx["n"] += by * self.step
        return int(ctx["n"])

    @tool(name="look")
    async def look_at(self, what: str) -> str:
        return f"{what}{self.step}"

    def plain(self) -> None: ...


def test_a_function_is_described_by_its_signature_and_docstring() -> None:
    assert scale.spec == ToolSpec(
        name="scale",
        description="Scale a variable, and say what it is then.",
        parameters=(
            ToolParameter("factor", "float", "By how much. This sentence goes on.", required=True),
            ToolParameter("name", "string", "Which one.", required=False, default=Value('"temperature"')),
        ),
    )
    assert scale.kind is ToolKind.FUNCTION


def test_options_go_into_the_description() -> None:
    assert add.spec == ToolSpec(
        name="math.add",
        description="Adds.",
        parameters=(
            ToolParameter("a", "integer"),
            ToolParameter("b", "integer", required=False, default=Value("2")),
        ),
        exposed=True,
        required_variables=("n",),
        isolation=Isolation.SNAPSHOT,
        retries=3,
        timeout_s=5.0,
        metadata={"team": "a"},
    )


def test_kinds_and_streaming() -> None:
    kinds = {tested.spec.name: (tested.kind, tested.spec.streaming) for tested in (scale, add, count, acount)}
    assert kinds == {
        "scale": (ToolKind.FUNCTION, False),
        "math.add": (ToolKind.COROUTINE, False),
        "count": (ToolKind.GENERATOR, True),
        "acount": (ToolKind.ASYNC_GENERATOR, True),
    }


def test_a_tool_is_still_its_function(ctx: ToolContext) -> None:
    assert scale(ctx, 0.5) == 0.25
    assert scale({"n": 2}, 3, name="n") == 6  # type: ignore[arg-type]
    assert asyncio.run(add(1)) == 3
    assert list(count(2)) == [0, 1]
    assert (scale.__name__, scale.__module__) == ("scale", __name__)
    assert scale.__doc__ is not None
    assert scale.__doc__.startswith("Scale")
    assert list(inspect.signature(scale).parameters) == ["ctx", "factor", "name"]
    code: ToolCode = scale
    assert code.spec.name in repr(scale)


def test_starting_returns_the_object_for_its_kind(session: Any) -> None:
    assert scale.start(session, {"factor": 2.0}) == 1.0
    assert asyncio.run(add.start(session, {"a": 1, "b": 4})) == 5
    assert list(count.start(session, {"to": 2})) == [0, 1]

    async def collected() -> list[int]:
        return [number async for number in acount.start(session, {"to": 3})]

    assert asyncio.run(collected()) == [0, 1, 2]


def test_methods_are_tools_of_their_instance(session: Any) -> None:
    one, ten = Counter(), Counter(10)
    assert ten.increase.spec == Counter.increase.spec
    assert [parameter.name for parameter in ten.increase.spec.parameters] == ["by"]
    assert ten.increase.start(session, {"by": 2}) == 21
    assert one.increase(ToolContext(session), by=1) == 22
    assert asyncio.run(ten.look_at.start(session, {"what": "a"})) == "a10"
    assert asyncio.run(ten.look_at("b")) == "b10"
    assert ten.increase == ten.increase
    assert hash(ten.increase) == hash(ten.increase)
    assert ten.increase != one.increase
    assert ten.increase != "increase"
    assert Counter.increase.needs_instance
    assert not ten.increase.needs_instance


def test_a_method_of_a_local_class_and_a_local_function_are_told_apart(session: Any) -> None:
    class Local:
        @tool
        def method(self, x: int) -> int:
            return x

        borrowed = count

    @tool
    def function(self: int) -> int:
        return self

    assert Local().method.start(session, {"x": 4}) == 4
    assert Local().borrowed == count
    assert function.start(session, {"self": 5}) == 5


def test_a_subclass_inherits_and_overrides() -> None:
    class Twice(Counter):
        @tool(description="Other.")
        def increase(self, ctx: ToolContext, by: int = 1) -> int:
            return 0

    box = Toolbox()
    box.add(Twice())
    assert box["increase"].spec.description == "Other."
    assert list(box) == ["increase", "look"]


def test_decorators_below_keep_the_signature(session: Any) -> None:
    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        import functools

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    @tool
    @logged
    def plain(ctx: ToolContext, x: int) -> int:
        return x + 1

    assert plain.start(session, {"x": 1}) == 2
    assert [parameter.name for parameter in plain.spec.parameters] == ["x"]

    @tool
    @logged
    async def hidden(x: int) -> int:
        return x

    @tool
    @logged
    def streaming() -> Iterator[int]:
        yield 1

    for tested, arguments in ((hidden, {"x": 1}), (streaming, {})):
        with pytest.raises(ToolDefinitionError, match="called as a plain function it returned a"):
            tested.start(session, arguments)


def test_a_docstring_in_any_style() -> None:
    def google(a: int, b: int) -> None:
        """Do it.

        Args:
            a: First.
            b (int): Second.
        """

    def sphinx(a: int, b: int) -> None:
        """Do it.

        :param a: First.
        :param int b: Second.
        :returns: nothing
        """

    def numpy(a: int, b: int) -> None:
        """Do it.

        Parameters
        ----------
        a : int
            First.
        b : int, optional
            Second.
        """

    for function in (google, sphinx, numpy):
        spec = tool(function).spec
        assert spec.description == "Do it."
        assert [parameter.description for parameter in spec.parameters] == ["First.", "Second."]


def test_a_docstring_that_is_missing_odd_or_of_others() -> None:
    def none(a: int) -> None: ...

    def both(a: int, b: int) -> None:
        """Do it.

        Parameters
        ----------
        a, b : int
            Both.
        gone : int
            Not there.
        """

    def bare(a: int) -> None:
        """:param a: Only this."""

    assert tool(none).spec.description == ""
    assert [parameter.description for parameter in tool(both).spec.parameters] == ["Both.", "Both."]
    assert tool(bare).spec == ToolSpec("bare", parameters=(ToolParameter("a", "integer", "Only this."),))


# Objects that cannot be tools.


def positional_only(x: int, /) -> None: ...
def variadic(*values: int) -> None: ...
def keywords(**options: int) -> None: ...
def late_context(x: int, ctx: ToolContext) -> None: ...
def two_contexts(ctx: ToolContext, other: ToolContext) -> None: ...
def optional_context(ctx: ToolContext | None) -> None: ...
def many_contexts(all_of_them: list[ToolContext]) -> None: ...
def keyword_context(*, ctx: ToolContext) -> None: ...
def bare_context(ctx, x: int) -> None: ...  # type: ignore[no-untyped-def]
def opaque(x: FakeSession) -> None: ...
def called(x: Callable[[int], int]) -> None: ...
def a_class(x: type[int]) -> None: ...
def unknown_name(x: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821
def odd_default(x: Any = object()) -> None: ...  # noqa: B008
def wrong_default(x: int = "one") -> None: ...  # type: ignore[assignment]
def field_default(x: int = Field(3)) -> None: ...
def low_default(x: Annotated[int, Field(ge=1)] = 0) -> None: ...
def bad_pattern(x: Annotated[str, Field(pattern="(")]) -> None: ...


class Recursive(TypedDict):
    inner: "Recursive"


def recursive(x: Recursive) -> None: ...


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (positional_only, "parameter x is positional-only"),
        (variadic, r"no place for its \*values"),
        (keywords, r"no place for its \*\*options"),
        (late_context, "parameter ctx is a ToolContext: only the first can be"),
        (two_contexts, "parameter other is a ToolContext"),
        (optional_context, "parameter ctx is a ToolContext"),
        (many_contexts, "parameter all_of_them is a ToolContext"),
        (keyword_context, "parameter ctx is a ToolContext"),
        (bare_context, "annotate its first parameter: ctx: ToolContext"),
        (opaque, "parameter x cannot come as JSON: .*FakeSession"),
        (called, "parameter x cannot come as JSON"),
        (a_class, "parameter x cannot come as JSON"),
        (unknown_name, "annotation of its parameter x cannot be looked up in its module: name 'Nowhere'"),
        (odd_default, "default of its parameter x"),
        (wrong_default, "default of its parameter x"),
        (field_default, "default of its parameter x"),
        (low_default, "default of its parameter x.*greater than or equal to 1"),
        (bad_pattern, "parameter x"),
        (recursive, "Recursive contains itself"),
    ],
)
def test_a_function_that_cannot_be_a_tool(function: Callable[..., Any], reason: str) -> None:
    with pytest.raises(ToolDefinitionError, match=reason) as caught:
        tool(function)
    assert caught.value.function == f"{__name__}.{function.__name__}"
    assert str(caught.value).startswith(f"{__name__}.{function.__name__} cannot be a tool: ")
    assert isinstance(caught.value, DspexError)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"isolation": "dirty"}, "isolation must be one of serializable, snapshot, not 'dirty'"),
        ({"isolation": None}, "isolation must be one of"),
        ({"retries": -1}, "retries must be a whole number from 0 up, not -1"),
        ({"retries": 1.5}, "retries must be"),
        ({"retries": True}, "retries must be"),
        ({"timeout_s": 0}, "timeout_s must be"),
        ({"timeout_s": inf}, "timeout_s must be"),
        ({"timeout_s": "5"}, "timeout_s must be"),
        ({"name": ""}, "name must be 1 to 255 printable"),
        ({"name": "a\nb"}, "name must be 1 to 255 printable"),
        ({"name": "a" * 256}, "name must be 1 to 255 printable"),
        ({"required_variables": "temperature"}, "required_variables must be a tuple of names"),
        ({"required_variables": [1]}, "required_variables must be a tuple of names"),
        ({"metadata": {"a": 1}}, "metadata must be strings by strings"),
    ],
)
def test_an_invalid_option(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ToolDefinitionError, match=reason) as caught:
        tool(**options)(lambda_free)
    assert caught.value.function.endswith("lambda_free")


def lambda_free() -> None: ...


def test_a_lambda_needs_a_name() -> None:
    with pytest.raises(ToolDefinitionError, match="a lambda has no name"):
        tool(lambda: 1)
    assert tool(name="one")(lambda: 1).spec.name == "one"


@pytest.mark.parametrize("wrong", ["a description", Counter, Counter(), print, scale])
def test_the_decorator_is_for_functions_only(wrong: Any) -> None:
    with pytest.raises(ToolDefinitionError):
        tool(wrong)


def test_static_methods_and_class_methods_cannot_be_tools() -> None:
    def outside(x: int) -> int:
        return x

    with pytest.raises(ToolDefinitionError, match="class methods and static methods"):
        tool(staticmethod(outside))
    with pytest.raises(ToolDefinitionError, match="class methods and static methods"):

        class _Below:
            @staticmethod
            @tool
            def one(x: int) -> int:
                return x


# Types: their descriptions, and the arguments that they accept.


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Odd(Enum):
    A = "a"
    B = 2


class Point(TypedDict):
    x: int
    label: NotRequired[str]


class Loose(typing.TypedDict, total=False):
    point: Point
    weights: list[float]


@dataclasses.dataclass
class Box:
    width: int
    height: int = 1


class Order(BaseModel):
    item: str
    amount: int = Field(ge=1)
    boxes: list[Box] = []

    @model_validator(mode="after")
    def _no_bombs(self) -> "Order":
        if self.item == "bomb":
            raise ValueError("no bombs")
        if self.item == "crash":
            raise ZeroDivisionError("crashed")
        return self


class Pair(NamedTuple):
    a: int
    b: int


UserId = NewType("UserId", int)


@pytest.mark.parametrize(
    ("annotation", "type_name"),
    [
        (bool, "boolean"),
        (int, "integer"),
        (UserId, "integer"),
        (float, "float"),
        (int | float, "float"),
        (str, "string"),
        (datetime, "string"),
        (UUID, "string"),
        (Path, "string"),
        (dict, "map"),
        (dict[str, int], "map"),
        (Mapping, "map"),
        (Mapping[str, Any], "map"),
        (Point, "map"),
        (Loose, "map"),
        (Box, "map"),
        (Order, "map"),
        (list, "list"),
        (list[int], "list"),
        (tuple[int, ...], "list"),
        (tuple[int, str], "list"),
        (Sequence[str], "list"),
        (Iterable[int], "list"),
        (Collection, "list"),
        (set[int], "list"),
        (frozenset, "list"),
        (Pair, "list"),
        (typing.List[int], "list"),  # noqa: UP006 - people write it
        (typing.List, "list"),  # noqa: UP006
        (typing.Tuple, "list"),  # noqa: UP006
        (typing.Dict, "map"),  # noqa: UP006
        (typing.Iterable, "list"),
        (Any, "any"),
        (object, "any"),
        (int | str, "any"),
        (None, "any"),
        (Odd, "any"),
        (Decimal, "any"),
        (BinaryValue, "tensor"),
        (int | None, "integer"),
        (typing.Optional[list[int]], "list"),  # noqa: UP045
        (Annotated[int | None, "note"], "integer"),
        (Order | None, "map"),
        (Literal["a", "b"], "choice"),
        (Colour, "choice"),
        (Literal[1, 2], "integer"),
        (Level, "integer"),
    ],
)
def test_types_are_described(annotation: Any, type_name: str) -> None:
    described = parameter_of(annotation)
    assert (described.type, described.required, described.default) == (type_name, True, None)


def test_a_parameter_without_annotation_accepts_anything() -> None:
    @tool
    def free(x, y=3):  # type: ignore[no-untyped-def]
        return x

    assert [parameter.type for parameter in free.spec.parameters] == ["any", "any"]
    assert free.spec.parameters[1].default == Value("3")
    assert bind(free, x=[1, {"a": None}]) == {"x": [1, {"a": None}]}


@pytest.mark.parametrize(
    ("annotation", "validation"),
    [
        (int, None),
        (Literal["b", "a"], {"choices": ["b", "a"]}),
        (Literal["a"], {"choices": ["a"]}),
        (Literal["a", None], {"choices": ["a"]}),
        (Literal["a"] | Colour, {"choices": ["a", "red", "blue"]}),
        (Colour | None, {"choices": ["red", "blue"]}),
        (Level, {"choices": [1, 2]}),
        (Odd, {"choices": ["a", 2]}),
        (Annotated[int, Field(ge=0, le=9)], {"min": 0, "max": 9}),
        (Annotated[float, Field(ge=0, le=inf)], {"min": 0}),
        (Annotated[float, Field(ge=0.5)] | None, {"min": 0.5}),
        (
            Annotated[str, Field(min_length=1, max_length=3, pattern="^a")],
            {"min_length": 1, "max_length": 3, "pattern": "^a"},
        ),
    ],
)
def test_rules_are_described(annotation: Any, validation: object) -> None:
    text = parameter_of(annotation).validation
    assert (json.loads(text) if text else None) == validation


def test_a_field_describes_unless_the_docstring_does() -> None:
    assert parameter_of(Annotated[int, Field(description="How\n many.")]).description == "How many."


@pytest.mark.parametrize(
    ("annotation", "default", "text"),
    [
        (int, 3, "3"),
        (float, 1, "1.0"),
        (float, inf, '"Infinity"'),
        (bool, False, "false"),
        (str, "", '""'),
        (Colour, Colour.RED, '"red"'),
        (Level, Level.HIGH, "2"),
        (Box, Box(2), '{"height":1,"width":2}'),
        (Order, Order(item="a", amount=1), '{"amount":1,"boxes":[],"item":"a"}'),
        (tuple[int, ...], (1, 2), "[1,2]"),
        (frozenset[str], frozenset("cab"), '["a","b","c"]'),
        (date, date(2030, 1, 2), '"2030-01-02"'),
        (int | str, "a", '"a"'),
        (Any, {"a": [1]}, '{"a":[1]}'),
    ],
)
def test_defaults_are_described(annotation: Any, default: object, text: str) -> None:
    described = parameter_of(annotation, default=default)
    assert described.default == Value(text)
    assert not described.required
    assert bind(taking(annotation, default=default)) == {}


def test_none_as_a_default_means_that_null_is_allowed() -> None:
    tested = taking(int, default=None)
    assert tested.spec.parameters == (ToolParameter("x", "integer", required=False),)
    assert bind(tested, x=None) == {"x": None}
    assert bind(tested, x=2) == {"x": 2}
    assert refused(taking(int, default=1), x=None).reason == "an integer is a whole number, not null"


@pytest.mark.parametrize(
    ("annotation", "document", "expected"),
    [
        (int, 3, 3),
        (int, 3.0, 3),
        (int, 10**30, 10**30),
        (UserId, 3.0, 3),
        (float, 3, 3.0),
        (float, "Infinity", inf),
        (list[float], [1, "-Infinity"], [1.0, -inf]),
        (dict[str, int], {"a": 1.0}, {"a": 1}),
        (list[float], "[1, 2.5]", [1.0, 2.5]),
        (tuple[int, ...], "[1, 2.0]", (1, 2)),
        (dict[str, int], '{"a": 1}', {"a": 1}),
        (Box, '{"width": 1, "height": 2}', Box(height=2, width=1)),
        (list[int] | None, "[1]", [1]),
        (str, "[1]", "[1]"),
        (Any, "[1]", "[1]"),
        (bool, "true", True),
        (bool, 0, False),
        (str, "ä", "ä"),
        (int | None, None, None),
        (int | str, "3", "3"),
        (int | float, 3.5, 3.5),
        (bool | int, True, True),
        (bool | int, 1, 1),
        (bool | str, "true", "true"),
        (int | float, 3.0, 3.0),
        (float | int, 3, 3),
        (float | int, 2**60 + 1, 2**60 + 1),
        (float | str, 3, 3.0),
        (int | str, 3.0, 3),
        (int, 1e300, int(1e300)),
        (int, -(2.0**70), -(2**70)),
        (Literal["a"], "a", "a"),
        (Colour, "blue", Colour.BLUE),
        (Level, 2.0, Level.HIGH),
        (Odd, 2, Odd.B),
        (tuple[int, ...], [1, 2], (1, 2)),
        (tuple[int, str], [1, "a"], (1, "a")),
        (set[int], [1, 1], {1}),
        (Iterable[int], [1, 2.0], [1, 2]),
        (Collection[int], [1], [1]),
        (Sequence[int], [1], [1]),
        (typing.Tuple, [1, "a"], (1, "a")),  # noqa: UP006
        (typing.Iterable, [1, "a"], [1, "a"]),
        (Pair, [1, 2], Pair(1, 2)),
        (Point, {"x": 1.0}, {"x": 1}),
        (Loose, {"point": {"x": 1, "label": "a"}, "weights": [1]}, {"point": {"x": 1, "label": "a"}, "weights": [1.0]}),
        (Loose, {}, {}),
        (Box, {"width": 2}, Box(2)),
        (list[Box], [{"width": 2}], [Box(2)]),
        (Order, {"item": "a", "amount": 2, "boxes": [{"width": 1}]}, Order(item="a", amount=2, boxes=[Box(1)])),
        (date, "2030-01-02", date(2030, 1, 2)),
        (UUID, str(UUID(int=5)), UUID(int=5)),
        (Annotated[int, Field(ge=1)], 1.0, 1),
        (Any, {"a": [None]}, {"a": [None]}),
        (dict, {"a": 1}, {"a": 1}),
    ],
)
def test_arguments_are_read_by_their_type(annotation: Any, document: object, expected: object) -> None:
    result = argument(annotation, document)
    assert result == expected
    assert type(result) is type(expected)


def test_a_float_may_be_nan() -> None:
    result = argument(float, "NaN")
    assert isinstance(result, float)
    assert isnan(result)


@pytest.mark.parametrize(
    ("annotation", "document", "reason"),
    [
        (int, True, "an integer is a whole number, not true"),
        (int, "3", 'an integer is a whole number, not "3"'),
        (int, 3.5, "an integer is a whole number, not 3.5"),
        (int | None, "a", 'an integer is a whole number, not "a"'),
        (float, True, 'a float is a number, "NaN", "Infinity" or "-Infinity", not true'),
        (float, "1.5", 'a float is a number, "NaN", "Infinity" or "-Infinity", not "1.5"'),
        (bool, 2, 'a boolean is true, false, "true", "false", 1 or 0, not 2'),
        (str, 5, "input should be a valid string, not 5"),
        (str, None, "input should be a valid string, not null"),
        (list[int], {"a": 1}, "input should be a valid list, not an object (1 entries)"),
        (list[int], [1, 2, True], "at 2: an integer is a whole number, not true"),
        (list[int], [1, "a", True], 'at 1: an integer is a whole number, not "a" (and 1 more)'),
        (dict[str, list[int]], {"a": [1, "b"]}, 'at a.1: an integer is a whole number, not "b"'),
        (dict, [1], "input should be a valid dictionary, not a list (1 entries)"),
        (dict[int, str], {"a": "b"}, 'at a: as a key, an integer is a whole number, not "a"'),
        (dict[int, str], {"1.5": "b"}, "at 1.5: as a key, an integer is a whole number, not 1.5"),
        (dict[bool, str], {"no": "b"}, 'at no: as a key, a boolean is true, false, "true", "false", 1 or 0, not "no"'),
        (dict[float, str], {"1": "a", "1.0": "b"}, "two of its keys mean the same: write each in one way only"),
        (Literal["a", "b"], "c", "input should be 'a' or 'b', not \"c\""),
        (Literal[1], True, "an integer is a whole number, not true"),
        (Colour, "green", "input should be 'red' or 'blue', not \"green\""),
        (Point, {}, "at x: field required"),
        (Loose, {"point": {"x": "a"}}, 'at point.x: an integer is a whole number, not "a"'),
        (Annotated[int, Field(ge=1)], 0, "input should be greater than or equal to 1, not 0"),
        (Annotated[int, Field(ge=1)], True, "an integer is a whole number, not true"),
        (Order, {"item": "a", "amount": 0}, "at amount: input should be greater than or equal to 1, not 0"),
        (Order, {"item": "bomb", "amount": 1}, "value error, no bombs"),
        (Order, {"item": "crash", "amount": 1}, "ZeroDivisionError: crashed"),
        (
            int | list[int],
            "a",
            'an integer is a whole number, not "a"; or: input should be a valid list, not "a"',
        ),
    ],
)
def test_a_wrong_argument_is_named(annotation: Any, document: object, reason: str) -> None:
    error = refused(taking(annotation), x=document)
    assert (error.tool, error.parameter, error.reason) == ("probe", "x", reason)
    assert str(error) == f"invalid parameter 'x' of tool 'probe': {reason}"


def test_a_long_list_of_mistakes_makes_no_long_message() -> None:
    reason = refused(taking(list[int]), x=["a"] * 50_000).reason
    assert reason == 'at 0: an integer is a whole number, not "a" (and 49999 more)'
    choices: Any = Literal[tuple(f"choice{number}" for number in range(1000))]
    assert len(refused(taking(choices), x="a").reason) < 600


def test_an_argument_that_is_not_json_is_named() -> None:
    for text in ("{", "NaN", '{"a":1,"a":2}', "1e999", "[" * 100_000):
        with pytest.raises(ToolArgumentError) as caught:
            taking(Any).bind({"x": Value(text)})
        assert caught.value.parameter == "x"


def test_names_are_checked() -> None:
    assert refused(scale).reason == "it is required (float)"
    assert refused(scale).parameter == "factor"
    error = refused(scale, factro=1)
    assert (error.parameter, error.reason) == (
        "factro",
        "there is no such parameter; did you mean 'factor'? (also wrong: factor)",
    )
    assert refused(scale, zzz=1, factor=1).reason == "there is no such parameter; the tool takes factor, name"
    assert refused(tool(lambda_free), x=1).reason == "the tool takes no parameters"
    assert refused(scale, ctx=1, factor=1).parameter == "ctx"
    assert refused(scale, factor=True, name=5).reason.endswith("not true (also wrong: name)")


def test_many_unknown_names_make_no_long_message() -> None:
    assert len(str(refused(scale, **{f"{'n' * 200}{number}": 1 for number in range(1000)}))) < 1500


def test_binary_arguments_are_decoded() -> None:
    content = bytes.fromhex("0000803f00000040")  # 1.0, 2.0 as float32
    raw = {"shape": [2], "dtype": "float32", "binary_format": "raw", "type": "tensor"}
    tensor = Value(json.dumps(raw), content)
    embedding = Value(json.dumps(raw | {"type": "embedding"}), content)
    opaque_value = Value('{"binary_format":"pickle","type":"tensor"}', b"\x80")
    decoded = {"shape": [2], "dtype": "float32", "data": [1.0, 2.0]}
    assert taking(Any).bind({"x": tensor}) == {"x": decoded}
    assert taking(dict[str, Any]).bind({"x": tensor}) == {"x": decoded}
    assert taking(Any).bind({"x": embedding}) == {"x": [1.0, 2.0]}
    assert taking(list[float]).bind({"x": tensor}) == {"x": [1.0, 2.0]}
    whole = {"x": BinaryValue({"binary_format": "pickle", "type": "tensor"}, b"\x80")}
    assert taking(Any).bind({"x": opaque_value}) == whole
    assert taking(BinaryValue).bind({"x": opaque_value}) == whole
    for annotation, value in ((int, tensor), (Any, Value(json.dumps(raw), b"1")), (Any, Value("[]", b"1"))):
        with pytest.raises(ToolArgumentError):
            taking(annotation).bind({"x": value})


# The context.


def test_the_context_reads_and_writes_variables(ctx: ToolContext) -> None:
    assert ctx["temperature"] == 0.5
    ctx["temperature"] = 0.75
    assert ctx["temperature"] == 0.75
    assert "n" in ctx
    assert "nothing" not in ctx
    assert list(ctx) == ["temperature", "n"]
    del ctx["n"]
    assert "n" not in ctx
    for use in (lambda: ctx["n"], lambda: ctx.__setitem__("n", 1), lambda: ctx.__delitem__("n")):
        with pytest.raises(KeyError, match="n"):
            use()
    with pytest.raises(InvalidValueError, match="maximum"):
        ctx["temperature"] = 2


def test_variables_have_all_their_operations(ctx: ToolContext) -> None:
    variables = ctx
    assert variables.get("nothing", 5) == 5
    assert variables.define("words", ["a"], metadata={"m": "1"}).startswith("var_words_")
    variables.define("p", 0.5, type_name="float", constraints={"min": 0})
    assert variables.info("p").constraints == {"min": 0}
    assert variables.set("n", 2, metadata={"m": "2"}) == 1
    assert variables.set("n", 3, expected_version=1) == 2
    with pytest.raises(VersionConflictError):
        variables.set("n", 4, expected_version=1)
    assert [version.kind for version in variables.history("n", 1)] == [ChangeKind.SET]
    assert variables.rollback("n", 0) == 1
    assert [variable.name for variable in variables.list("*o*")] == ["words"]
    assert len(variables) == 4
    variables.delete("words")
    with pytest.raises(KeyError, match="words"):
        variables.delete("words")
    with pytest.raises(VariableNotFoundError):
        variables.info("words")
    assert not hasattr(variables, "watch")


def test_batches_are_atomic(ctx: ToolContext) -> None:
    assert ctx.get_many("n", "temperature") == {"n": 1, "temperature": 0.5}
    assert ctx.get_many() == {"temperature": 0.5, "n": 1}
    assert ctx.get_many("n", "gone", "lost") == {"n": 1}
    assert ctx.update_many({"n": 5, "temperature": 0.1}).versions == {"n": 1, "temperature": 1}
    with pytest.raises(VariableNotFoundError, match=r"not found: 'gone'"):
        ctx.update_many({"n": 6, "gone": 1, "temperature": 5})
    assert ctx["n"] == 5
    partly = ctx.update_many({"n": 6, "gone": 1}, atomic=False)
    assert (dict(partly.versions), list(partly.errors)) == ({"n": 2}, ["gone"])


def test_the_context_passes_the_rest_on(ctx: ToolContext, session: Any) -> None:
    assert (ctx.session_id, ctx.execution_id, ctx.attempt) == ("s", "exec_1", 1)
    assert ctx.metadata == {"who": "test"}
    assert ctx.now() == session.now()
    assert ctx.uuid() == UUID(int=5)
    assert ctx.random is session.random
    assert not ctx.cancelled
    session.cancelled = True
    assert ctx.cancelled
    assert ctx.publish("n", 5) == 7
    assert ctx.publish("n", 6, {"why": "progress"}) == 7
    with pytest.raises(KeyError, match="gone"):
        ctx.publish("gone", 1)
    ctx.log("done", rows=3)
    assert ctx.call(add, a=1, tool="x", self="y") == "called"
    assert ctx.call("other") == "called"
    assert ctx.call(Counter().look_at, what="a") == "called"
    assert session.calls == [
        ("publish", "n", 5, None),
        ("publish", "n", 6, {"why": "progress"}),
        ("log", "done", {"rows": 3}),
        ("call", "math.add", {"a": 1, "tool": "x", "self": "y"}),
        ("call", "other", {}),
        ("call", "look", {"what": "a"}),
    ]


# Toolboxes.


def test_a_toolbox_is_a_mapping() -> None:
    box = Toolbox()
    assert box.add(scale) == (scale,)
    assert box.add(add) == (add,)
    assert list(box) == ["scale", "math.add"]
    assert box["math.add"] is add
    assert "nothing" not in box
    assert box.specs() == (scale.spec, add.spec)
    assert "scale, math.add" in repr(box)
    assert "empty" in repr(Toolbox())
    with pytest.raises(KeyError):
        box["nothing"]


def test_functions_instances_classes_and_toolboxes_can_be_added() -> None:
    box = Toolbox()
    box.add(lambda_free)
    counter = Counter(10)
    assert box.add(counter) == (counter.increase, counter.look_at)
    assert list(box) == ["lambda_free", "increase", "look"]
    other = Toolbox()
    other.add(box)
    other.add(scale)
    assert list(other) == [*box, "scale"]
    third = Toolbox()
    third.add(Counter)
    assert list(third) == ["increase", "look"]


def test_a_tool_can_be_added_twice_but_names_are_unique() -> None:
    counter, box = Counter(), Toolbox()
    box.add(scale)
    box.add(scale)
    box.add(counter)
    box.add(counter)
    with pytest.raises(ToolLoadError, match=r"two tools are called 'increase' \(.*Counter.increase\)"):
        box.add(Counter())

    class Mixed:
        @tool
        def before(self) -> None: ...

        @tool(name="scale")
        def other(self) -> None: ...

    with pytest.raises(ToolLoadError, match=r"test_tools.scale and .*Mixed.other"):
        box.add(Mixed())
    assert "before" not in box


def test_a_toolbox_is_created_from_anything_with_tools(modules: None) -> None:
    box = Toolbox()
    box.add(scale)
    assert Toolbox.of(box) is box
    weather = importlib.import_module("pack.weather")
    for given, names in [
        (scale, ["scale"]),
        (lambda_free, ["lambda_free"]),
        (Counter(3), ["increase", "look"]),
        ([scale, lambda_free], ["scale", "lambda_free"]),
        ((box, "pack.more"), ["scale", "measure", "extra"]),
        (iter([scale]), ["scale"]),
        ([], []),
        ({"scale": scale, "free": lambda_free}, ["scale", "free"]),
        ("pack.weather", ["look", "measure"]),
        (["pack.weather:look"], ["look"]),
        (weather, ["look", "measure"]),
        ([[scale], {"math.add": add}], ["scale", "math.add"]),
    ]:
        assert list(Toolbox.of(given)) == names
    assert Toolbox.of({"free": lambda_free})["free"].spec.name == "free"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (5, "it is not a tool and has no tools"),
        (None, "it is not a tool and has no tools"),
        (b"pack", "it is not a tool and has no tools"),
        (Path("tools.py"), "it is not a tool and has no tools"),
        ("no.such.module", "the import failed with ModuleNotFoundError"),
        ([scale, 5], "it is not a tool and has no tools"),
        ({"other": scale}, "'other' is the tool 'scale'"),
        ({"scale": "scale"}, "'scale' is neither a tool nor a function, but str"),
        ({3: lambda_free}, "the name 3 is not a string"),
        ([tool(lambda_free, name="scale"), scale], "two tools are called 'scale'"),
    ],
)
def test_a_toolbox_cannot_be_created_from_anything_else(modules: None, wrong: object, reason: str) -> None:
    with pytest.raises(ToolLoadError, match=re.escape(reason)):
        Toolbox.of(wrong)


@pytest.mark.parametrize("wrong", [5, "scale", object(), FakeSession, None])
def test_other_objects_cannot_be_added(wrong: object) -> None:
    with pytest.raises(ToolLoadError, match="it is not a tool and has no tools"):
        Toolbox().add(wrong)


def test_a_method_needs_its_instance() -> None:
    with pytest.raises(ToolLoadError, match=r"Counter.increase is a method"):
        Toolbox().add(Counter.increase)


class _Sources:
    """Modules whose source is in memory."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self._sources = sources

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        loader: Any = self
        return ModuleSpec(name, loader, is_package=name == "pack") if name in self._sources else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._sources[module.__name__], module.__name__, "exec"), vars(module))


SOURCES = {
    "pack": "",
    "pack.weather": """
from __future__ import annotations
from typing import TYPE_CHECKING, TypedDict
from dspex_persist import Toolbox, tool
if TYPE_CHECKING:
    from dspex_persist import ToolContext
    from nowhere import Result

class Place(TypedDict):
    name: str

@tool
def look(ctx: ToolContext, place: Place, days: int = 1) -> Result: ...

alias = look

@tool
def measure(x: float): ...

def plain(): ...

class Station:
    @tool
    def read(self, ctx: ToolContext): ...

class Needy:
    def __init__(self, key): ...
    @tool
    def ask(self): ...

station = Station()
box = Toolbox()
box.add(measure)
""",
    "pack.more": "from pack.weather import measure\nfrom dspex_persist import tool\n@tool\ndef extra(): ...\n",
    "pack.clash": "from dspex_persist import tool\n@tool\ndef measure(): ...\n",
    "pack.twice": (
        "from pack.weather import measure\nfrom dspex_persist import tool\n@tool(name='measure')\ndef other(): ...\n"
    ),
    "pack.named": "from pack.weather import Station, station, box\nimport pack\n",
    "pack.empty": "x = 1\n",
    "pack.broken": "1 / 0\n",
    "pack.quits": "raise SystemExit(3)\n",
    "pack.syntax": "def (:\n",
    "pack.missing": "import a_module_that_is_not_there\n",
    "pack.wrong": "from dspex_persist import tool\n@tool\ndef f(*x): ...\n",
}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    finder = _Sources(SOURCES)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in SOURCES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("reference", "names"),
    [
        ("pack.weather", ["look", "measure"]),
        ("pack.weather:look", ["look"]),
        ("pack.weather:alias", ["look"]),
        ("pack.weather:Station", ["read"]),
        ("pack.weather:station", ["read"]),
        ("pack.weather:station.read", ["read"]),
        ("pack.weather:box", ["measure"]),
        ("pack.more", ["measure", "extra"]),
    ],
)
def test_tools_are_loaded_by_reference(modules: None, reference: str, names: list[str]) -> None:
    box = Toolbox()
    assert [loaded.spec.name for loaded in box.load(reference)] == names
    assert list(box) == names


def test_quoted_annotations_are_looked_up_in_their_module(modules: None) -> None:
    box = Toolbox()
    (look,) = box.load("pack.weather:look")
    assert [(parameter.name, parameter.type) for parameter in look.spec.parameters] == [
        ("place", "map"),
        ("days", "integer"),
    ]
    assert bind(look, place={"name": "x"}) == {"place": {"name": "x"}}


def test_a_tool_imported_twice_is_the_same(modules: None) -> None:
    box = Toolbox()
    for reference in ("pack.weather", "pack.more", "pack.weather:look"):
        box.load(reference)
    assert list(box) == ["look", "measure", "extra"]


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("pack.nothing", "import failed with ModuleNotFoundError: No module named 'pack.nothing'"),
        ("pack.missing", "import failed with ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("pack.broken", "import failed with ZeroDivisionError: division by zero"),
        ("pack.quits", "import failed with SystemExit: 3"),
        ("pack.syntax", "import failed with SyntaxError: invalid syntax"),
        ("pack.wrong", r"import failed with ToolDefinitionError: pack.wrong.f cannot be a tool: .*\*x"),
        ("pack.empty", "there are no tools in the module itself$"),
        (
            "pack.named",
            "no tools in the module itself; did you mean pack.named:Station, pack.named:station, pack.named:box",
        ),
        ("pack.twice", "two tools are called 'measure' .*pack.weather.measure and pack.twice.other"),
        ("pack.weather:loook", "there is nothing named 'loook'; did you mean 'look'"),
        ("pack.weather:zzz", "there is nothing named 'zzz'$"),
        ("pack.weather:", "there is nothing named ''"),
        ("pack.weather:plain", "it is not a tool and has no tools"),
        ("pack.weather:Place", "it is not a tool and has no tools"),
        ("pack.weather:Station.read", "is a method: add an instance of its class, or load the class"),
        ("pack.weather:Needy", r"Needy\(\) failed with TypeError: .*key.*; name an instance instead"),
        ("", "as in an import"),
        (":box", "as in an import"),
        ("tools/weather.py", "as in an import"),
        ("weather.py", "as in an import"),
        (".weather", "import failed with TypeError"),
    ],
)
def test_a_failed_import_says_why(modules: None, reference: str, reason: str) -> None:
    with pytest.raises(ToolLoadError, match=reason) as caught:
        Toolbox().load(reference)
    assert caught.value.reference == reference
    assert repr(reference) in str(caught.value)


def test_two_modules_cannot_have_tools_with_the_same_name(modules: None) -> None:
    box = Toolbox()
    box.load("pack.weather")
    with pytest.raises(ToolLoadError, match=r"pack.weather.measure and pack.clash.measure"):
        box.load("pack.clash")


def test_modules_are_found_in_the_working_directory(modules: None, monkeypatch: pytest.MonkeyPatch) -> None:
    here = str(Path.cwd())
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", here)])
    Toolbox().load("pack.weather")
    assert sys.path[0] == here
    Toolbox().load("pack.more")
    assert sys.path.count(here) == 1


# Exports.


def test_all_is_exported() -> None:
    from dspex_persist import cognitive

    for name in ("tool", "Tool", "ToolContext", "Toolbox"):
        assert getattr(dspex_persist, name) is getattr(cognitive, name)
        assert name in dspex_persist.__all__
        assert name in cognitive.__all__
    with pytest.raises(AttributeError, match="nothing"):
        importlib.import_module("dspex_persist.cognitive").__getattr__("nothing")


def test_importing_the_package_or_variables_reads_no_signatures() -> None:
    program = (
        "import sys, dspex_persist, dspex_persist.cognitive.variables;"
        "sys.exit(' '.join({'pydantic', 'docstring_parser', 'sqlalchemy', 'grpc'} & sys.modules.keys()) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=within(60), check=False
    )
    assert result.returncode == 0, result.stderr


def test_a_tool_can_be_tested_with_anything_as_its_context() -> None:
    fake: Any = SimpleNamespace(cancelled=True)

    @tool
    def check(ctx: ToolContext) -> bool:
        return ctx.cancelled

    assert check(fake)


@pytest.mark.parametrize(
    ("annotation", "document", "expected"),
    [
        (dict[int, float], {"1": 2.5, "-3": 1}, {1: 2.5, -3: 1.0}),
        (dict[float, int], {"1": 1, "2.5": 2, "-Infinity": 3}, {1.0: 1, 2.5: 2, -inf: 3}),
        (dict[bool, int], {"true": 1, "false": 2}, {True: 1, False: 2}),
        (Mapping[int, dict[int, str]], {"1": {"2": "a"}}, {1: {2: "a"}}),
        (list[dict[int, str]] | None, [{"7": "a"}], [{7: "a"}]),
        (dict[int | str, int], {"1": 1, "a": 2}, {"1": 1, "a": 2}),
        (dict[Colour, int], {"red": 1}, {Colour.RED: 1}),
        (dict[date, int], {"2030-01-02": 1}, {date(2030, 1, 2): 1}),
    ],
)
def test_keys_are_read_by_their_type(annotation: Any, document: object, expected: object) -> None:
    assert argument(annotation, document) == expected


def test_a_default_that_can_change_is_copied_for_each_call(session: Any) -> None:
    @tool
    def gather(name: str, seen: list[str] = [], by: dict[str, list[int]] = {"a": [1]}) -> Any:  # noqa: B006
        seen.append(name)
        by["a"].append(2)
        return seen, by

    for name in "xy":
        assert gather.start(session, bind(gather, name=name)) == ([name], {"a": [1, 2]})


class _NoCopy(str):
    def __deepcopy__(self, memo: object) -> "_NoCopy":
        raise RuntimeError("one of a kind")


@pytest.mark.parametrize(
    ("default", "reason"),
    [
        (b"\xff", "the default of its parameter data is not one of its values"),
        (float, "the default of its parameter data is not one of its values"),
        ({1: object()}, "the default of its parameter data is not one of its values"),
        (_NoCopy("a"), "the default of its parameter data cannot be copied"),
    ],
)
def test_an_invalid_default(default: object, reason: str) -> None:
    def function(data=default): ...  # type: ignore[no-untyped-def]

    with pytest.raises(ToolDefinitionError, match=reason):
        tool(function)


@pytest.mark.parametrize(
    ("annotation", "is_plain"),
    [
        *((each, True) for each in (int, Any, list[dict[str, float]], Literal["a"], int | None, date, bytes)),
        (Annotated[int, Field(ge=1)], True),
        *((each, False) for each in (Box, Order, Colour, list[Box], dict[str, Point], Pair)),
        (Annotated[int, AfterValidator(abs)], False),
    ],
)
def test_arguments_that_run_user_code_are_known(annotation: Any, is_plain: bool) -> None:
    assert taking(annotation).reads_plainly is is_plain


@pytest.mark.parametrize(
    ("annotation", "result_type"),
    [
        *((each, "float") for each in (float, float | None, int | float, Iterator[float], AsyncIterator[float])),
        *((each, "") for each in (int, str, Any, list[str], float | str, Iterator[int], Iterator, None)),
    ],
)
def test_a_tool_that_returns_floats_is_known(annotation: Any, result_type: str) -> None:
    def function() -> Any: ...

    function.__annotations__["return"] = annotation
    assert tool(function).result_type == result_type
