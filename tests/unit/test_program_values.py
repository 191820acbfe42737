"""Values of demos as JSON: what is read back has the same type, and what any client may have written is refused."""

import json
from collections import Counter, OrderedDict
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, StrEnum
from math import isnan
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional
from uuid import UUID

import pytest
from pydantic import BaseModel, ConfigDict, Field, HttpUrl, ImportString, SecretStr

from tests.late import Late

values, types = Late("dspex_persist.cognitive.dspy.program_values"), Late("dspex_persist.cognitive.dspy.program_types")
dspy, made = Late("dspy"), Late("tests.programs")


class Level(StrEnum):
    LOW = "low"
    HIGH = "high"


class Pair(NamedTuple):
    left: int
    right: str


class Node(BaseModel):
    model_config = ConfigDict(extra="allow")

    label: str = Field(alias="Label")
    children: list["Node"] = []
    level: Level = Level.LOW
    site: HttpUrl | None = None


class Guarded(BaseModel):
    password: SecretStr


class Shifting(BaseModel):
    number: int

    def model_post_init(self, _: Any) -> None:
        self.number += 1


def back(value: Any, *annotations: Any) -> Any:
    classes = types.Classes(annotations)
    annotation = annotations[0] if annotations else None
    document = json.loads(json.dumps(values.encode(value, classes, annotation), sort_keys=True, allow_nan=False))
    return values.decode(document, types.Classes(annotations), annotation)


PLAIN = [
    *(None, True, False, 0, 1, -1, 1.0, 10**30, "", "ä\U0001f600", [], {}, [1, [2.5, None]], {"a": {"b": 1}}),
    *({"b": 1, "a": 2}, {1: "x", None: "y"}, {"$": "date"}, {"$x": 1, "a": {"$": "$"}}, ("a", 1), {1, 2}),
    *(frozenset({"x"}), b"\x00\xff", date(2026, 2, 28), time(1, 2, 3), datetime(2026, 2, 28, 1, tzinfo=UTC)),
    *(
        datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=5, minutes=30))),
        datetime.fromisoformat("2026-01-01T00:00:00.000007"),
    ),
    *(timedelta(days=-1, microseconds=3), Decimal("1.10"), UUID(int=5), float("inf"), -float("inf")),
]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    found = back(value)
    assert (found, type(found), repr(found)) == (value, type(value), repr(value))


def test_nan_and_booleans_among_numbers() -> None:
    assert isnan(back(float("nan")))
    assert [type(each) for each in back([True, 1, 1.0])] == [bool, int, float]
    assert list(back(OrderedDict(b=1, a=2))) == ["b", "a"]


def test_values_of_classes_that_the_signature_mentions() -> None:
    tree = Node(Label="root", children=[Node(Label="leaf", level=Level.HIGH)], site="https://example.org", more=(1, 2))
    for value, annotation in (
        (tree, Node),
        ({"x": [tree]}, dict[str, list[Node]]),
        (Level.HIGH, Literal[Level.HIGH, Level.LOW]),
        (Pair(1, "b"), Optional[Pair]),  # noqa: UP045
        (made.Size(1, Decimal("0.5")), list[made.Size]),
        (made.Party(title="x", day=date(2026, 1, 1), guests={"a"}), made.Event),
        (HttpUrl("https://example.org/a"), HttpUrl | None),
        (Path("a/b"), Path),
    ):
        found = back(value, annotation)
        assert (found, type(found)) == (value, type(value))
    assert back(tree, Node).more == (1, 2)


def test_values_of_dspys_own_types() -> None:
    for value in (
        dspy.Image(made.PIXEL),
        dspy.History(messages=[{"b": 1, "a": date(2026, 1, 1)}]),
        dspy.Example(question="a", answer=dspy.Image(made.PIXEL)),
        dspy.Prediction(b=1, a=2),
        dspy.Reasoning(content="so"),
        dspy.ToolCalls(tool_calls=[dspy.ToolCalls.ToolCall(name="search", args={"q": 1})]),
    ):
        found = back(value)
        assert (repr(found), type(found)) == (repr(value), type(value))


def test_what_cannot_be_stored() -> None:
    unknown: list[tuple[Any, Any, str]] = [
        (object(), Any, "object, which is no data"),
        (Node, Any, "the class Node"),
        (Node(Label="x"), str, "mentions in its type"),
        (Counter("a"), Any, "Counter"),
        (len, Any, "no data"),
        ("\ud800", str, "lone surrogate"),
        (Guarded(password="p"), Guarded, "does not bring back"),
        (Shifting(number=1), Shifting, "reads back as another value"),
    ]
    for value, annotation, reason in unknown:
        with pytest.raises(values.UnstorableError, match=reason):
            values.encode(value, types.Classes((annotation,)), None if annotation is str else annotation)
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(values.UnstorableError, match="contains itself"):
        values.encode(circle, types.Classes(()))


HOSTILE: list[tuple[Any, str]] = [
    ({"$": "import", "value": "os"}, "no values of the kind"),
    ({"$": ["a"], "value": 1}, "no value that"),
    ({"$": "date", "value": "x", "more": 1}, "no value that"),
    ({"$": "model", "class": "os:system", "value": []}, "mention no such class"),
    ({"$": "model", "class": "subprocess:Popen", "value": [["args", "ls"]]}, "mention no such class"),
    ({"$": "model", "class": {}, "value": []}, "a text is expected"),
    ({"$": "enum", "class": "tests.programs:Color", "value": "__class__"}, "Color has no"),
    ({"$": "model", "class": "tests.programs:Color", "value": []}, "Color is no 'model'"),
    ({"$": "model", "class": "tests.programs:Event", "value": [["title", "x"]]}, "a field day that is not in it"),
    ({"$": "model", "class": "tests.programs:Event", "value": [["titel", "x"]]}, "Event has no field 'titel'"),
    ({"$": "model", "class": "tests.programs:Event", "value": [["title", 1], ["day", 2]]}, "valid"),
    ({"$": "model", "class": "tests.programs:Event", "value": {}}, "a list is expected"),
    ({"$": "dataclass", "class": "tests.programs:Size", "value": [["a", 1]]}, "Size has no field 'a'"),
    ({"$": "date", "value": 3}, "a text is expected"),
    ({"$": "date", "value": "yesterday"}, "yesterday"),
    ({"$": "timedelta", "value": ["x"]}, "str"),
    ({"$": "decimal", "value": "x"}, "no decimal number"),
    ({"$": "not_finite", "value": "1"}, "no such float"),
    ({"$": "bytes", "value": "!"}, "not base64"),
    ({"$": "mapping", "value": [1]}, "pairs of keys"),
    ({"$": "mapping", "value": [[[], 1]]}, "unhashable"),
    ({"$": "set", "value": [{}]}, "unhashable"),
    ({"$": "annotated", "value": 1}, "whose type no field says"),
    ({"$": "model", "class": "dspy.adapters.types.image:Image", "value": [["url", 5]]}, "."),
    ({"$": "model", "class": "dspy.adapters.types.image:Image", "value": [["download", True]]}, "no field 'download'"),
    ({"$": "example", "value": [[1, 2]]}, "names of fields"),
]


@pytest.mark.parametrize(("document", "reason"), HOSTILE, ids=lambda each: str(each)[:60])
def test_what_no_save_wrote_is_refused(document: Any, reason: str) -> None:
    classes = types.Classes((made.Event, made.Color, made.Size))
    with pytest.raises(values.UnreadableError, match=reason):
        values.decode([document], classes)


class Importing(BaseModel):
    code: ImportString[Any]


class Wrapping(BaseModel):
    child: Importing | None = None


@pytest.mark.parametrize("annotation", [ImportString, ImportString[Any], list[ImportString], Importing, list[Wrapping]])
def test_nothing_is_imported_because_a_type_says_so(annotation: Any) -> None:
    classes, name = types.Classes((annotation,)), "tests.unit.never_imported"
    for document in (
        {"$": "annotated", "value": name},
        {"$": "model", "class": "x:Importing", "value": [["code", name]]},
        {"$": "model", "class": "x:Wrapping", "value": [["child", {"code": name}]]},
    ):
        with pytest.raises(values.UnreadableError, match=r"ImportString|no such class"):
            values.decode(document, classes, annotation)
    with pytest.raises(values.UnstorableError):
        values.encode(len, classes, annotation)


def test_a_class_is_found_where_it_has_moved_to() -> None:
    classes = types.Classes((made.Color,))
    document = {"$": "enum", "class": "__main__:Color", "value": "RED"}
    assert values.decode(document, classes) is made.Color.RED

    class Color(Enum):
        RED = "r"

    # Two of the name: which one is meant nobody knows.
    with pytest.raises(values.UnreadableError, match="mention no such class"):
        values.decode(document, types.Classes((made.Color, Color)))


def test_types_as_text() -> None:
    for annotation, text in (
        (str, "str"),
        (None, "None"),
        (list[int], "list[int]"),
        (Optional[Node], "Node | None"),  # noqa: UP045
        (dict[str, tuple[int, ...]], "dict[str, tuple[int, ...]]"),
        (Literal["a", 1, Level.LOW], "Literal['a', 1, Level.LOW]"),
        (Any, "Any"),
    ):
        assert types.type_text(annotation) == text
    assert types.described_types([Node]) == {
        "Node": {"label": "str", "children": "list[Node]", "level": "Level", "site": "HttpUrl | None"},
        "Level": {"LOW": "'low'", "HIGH": "'high'"},
    }
