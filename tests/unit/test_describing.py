"""What people see of a context: text, a table for notebooks, data frames. Nothing in it is taken for HTML."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from dspex_persist import Context, ToolContext, connect
from dspex_persist.cognitive.describing import MASKED, sparkline
from dspex_persist.state.errors import InvalidArgumentError

HOSTILE = "<script>alert('x')</script>&\"'"


@pytest.fixture
def ctx() -> Iterator[Context]:
    with Context("s") as context:
        yield context


class Tags(HTMLParser):
    """Collects the tags of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_repr_shows_a_few_variables(ctx: Context) -> None:
    assert repr(ctx) == "<Context of session 's' on local>"
    ctx["temperature"] = 0.7
    ctx["prompt"] = "word " * 100
    ctx.define("key", "sk-1234", metadata={"sensitive": "true"})
    shown = repr(ctx)
    assert shown == f"<Context of session 's' on local: temperature=0.7, prompt=\"word word word w..., key={MASKED}>"
    ctx.define_many({f"x{n}": n for n in range(10)})
    assert repr(ctx).endswith("x0=0, x1=1, and 8 more>")
    with ctx._backend.gate.hold():
        assert repr(ctx) == "<Context of session 's' on local>"
    ctx.end()
    assert repr(ctx) == "<Context of session 's' on local: SessionNotFoundError>"
    assert "session not found: &#x27;s&#x27;" in ctx._repr_html_()
    ctx.close()
    assert repr(ctx) == "<Context of session 's', closed>"
    assert ctx._repr_html_() == "&lt;Context of session &#x27;s&#x27;, closed&gt;"


def test_a_repr_in_a_tool_reads_nothing() -> None:
    def look(ctx: ToolContext) -> str:
        return repr(ctx)

    with Context("s", tools=[look]) as context:
        context["x"] = 1
        assert re.fullmatch(r"<ToolContext of execution exec_\w+ in session 's'>", context.call("look"))


def test_a_description_is_a_table(ctx: Context) -> None:
    ctx.define("temperature", 0.7, constraints={"min": 0, "max": 2}, description="how hot")
    ctx.define("name", "ann\x1b[31m\n")
    ctx["temperature"] = 0.8
    with ctx.optimize("temperature", optimizer_id="mipro"):
        lines = str(ctx.describe()).splitlines()
    assert lines[0] == "Session 's' on local: 2 variables"
    assert lines[1].split() == ["name", "type", "version", "value", "constraints", "about"]
    assert re.split(r"\s{2,}", lines[2]) == [
        "temperature",
        "float",
        "1",
        "0.8",
        '"max": 2, "min": 0'.replace('"', ""),
        "how hot; locked by mipro",
    ]
    assert "\x1b" not in "".join(lines)
    assert str(Context("t").describe()) == "Session 't' on local: 0 variables"


def test_a_notebook_shows_a_table_with_sparklines_and_all_is_escaped(ctx: Context) -> None:
    ctx.define(HOSTILE, HOSTILE, constraints={"max_length": 100}, description=HOSTILE)
    ctx.define("n", 1)
    for number in (3, 2, 5):
        ctx.set("n", number, reason=HOSTILE)
    ctx.define("key", 1.0, metadata={"sensitive": "true"})
    ctx["key"] = 2.0
    page = Tags(ctx._repr_html_())
    assert set(page.tags) == {"div", "p", "table", "thead", "tbody", "tr", "th", "td", "svg", "polyline"}
    assert page.tags.count("svg") == 1, "the sensitive number has no line"
    assert page.text.count(HOSTILE) == 2
    assert MASKED in page.text
    history = Tags(ctx.history("n")._repr_html_())
    assert set(history.tags) == {"table", "thead", "tbody", "tr", "th", "td"}
    assert history.text.count(HOSTILE) == 3
    assert "2.0" not in Tags(ctx.history("key")._repr_html_()).text


@pytest.mark.parametrize(
    ("numbers", "points"),
    [
        ([], 0),
        ([1], 0),
        ([1, 2], 2),
        ([1, float("nan"), 2, float("inf")], 2),
        ([5, 5, 5], 3),
        ([-1.7e308, 1.7e308], 2),
        (list(range(1000)), 40),
    ],
)
def test_a_sparkline_has_a_point_for_each_finite_number(numbers: list[float], points: int) -> None:
    line = sparkline(numbers)
    drawn = re.findall(r"(\d+\.\d),(\d+\.\d)", line)
    assert len(drawn) == points
    assert all(float(x) <= 100 and 0 <= float(y) <= 18 for x, y in drawn)


def test_data_frames(ctx: Context) -> None:
    pytest.importorskip("pandas")
    ctx.define("n", 1, description="a number")
    ctx.set("n", 2, reason="more")
    frame = ctx.history("n").to_pandas()
    assert list(frame.index) == [0, 1]
    assert list(frame["value"]) == [1, 2]
    assert list(frame["reason"])[1] == "more"
    assert ctx.describe().to_pandas().loc["n", "value"] == 2


def test_without_pandas_it_says_so(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    ctx["n"] = 1
    with pytest.raises(ImportError, match="pip install pandas"):
        ctx.describe().to_pandas()


def test_tools_can_be_added_to_a_provider_of_somebody_else(ctx: Context) -> None:
    def double(ctx: ToolContext) -> int:
        ctx["n"] *= 2
        return int(ctx["n"])

    ctx["n"] = 3
    provider = ctx.backend.provider
    with Context("s", provider, tools=[double]) as other:
        assert other.call("double") == 6
        assert "tools" in other.backend.capabilities
    provider.check_open()
    assert ctx["n"] == 6
    with pytest.raises(TypeError, match="timeout_s: options are for a backend that the context opens"):
        Context("s", provider, timeout_s=3)
    with pytest.raises(InvalidArgumentError, match="a server has its own tools"):
        connect("grpc://127.0.0.1:1", tools=[double])
