"""The layout of an audit's pictures."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from dspex_persist.audit.comparing import compare_words
from dspex_persist.audit.pictures import TimeAxis, chart, duration_text, lineage, timeline
from dspex_persist.state.audit import ExecutionSummary, HistoryEntry, LineageNode, ReadEntry
from dspex_persist.state.model import ChangeKind, ExecutionStatus, Source, Value

BEGIN = datetime(2026, 3, 1, 9, tzinfo=UTC)


def after(seconds: float) -> datetime:
    return BEGIN + timedelta(seconds=seconds)


# Times


def test_times_are_placed_in_proportion() -> None:
    axis = TimeAxis([after(second) for second in (0, 1, 2, 4)], 10, 410)
    assert [axis.at(after(second)) for second in (0, 1, 2, 4)] == [10, 110, 210, 410]
    assert axis.breaks == ()
    assert [axis.at(after(second)) for second in (-9, 9)] == [10, 410], "what is beside it is at its ends"


def test_a_long_time_in_which_nothing_happened_is_cut_out() -> None:
    moments = [after(second) for second in (0, 1, 2, 3, 7203, 7204, 7205, 7206)]
    axis = TimeAxis(moments, 0, 622)
    places = [axis.at(moment) for moment in moments]
    assert places == [0, 100, 200, 300, 322, 422, 522, 622]
    assert [(each.at, each.label) for each in axis.breaks] == [(311, "2 h")]


def test_an_axis_of_events_at_a_steady_pace_has_no_breaks() -> None:
    assert TimeAxis([after(3_600 * hour) for hour in range(24)], 0, 600).breaks == ()


@pytest.mark.parametrize("span_s", [0, 1e-6, 0.004, 1.5, 70, 5_000, 200_000, 9e7, 9e8])
def test_ticks_are_apart_and_say_different_things(span_s: float) -> None:
    ticks = TimeAxis([BEGIN, after(span_s / 2), after(span_s)], 0, 1_000).ticks
    assert 1 <= len(ticks) <= 15
    assert all(later.at - earlier.at >= 50 for earlier, later in pairwise(ticks))
    assert len({tick.label for tick in ticks}) == len(ticks)


def test_durations_are_readable() -> None:
    texts = [duration_text(seconds) for seconds in (0.00035, 0.012, 3.2, 100, 240, 19_800, 259_200)]
    assert texts == ["350 µs", "12 ms", "3.2 s", "100 s", "4 min", "5.5 h", "3 d"]


# Executions


def execution(number: int, begin_s: float, took_s: float | None, parent: int | None = None) -> ExecutionSummary:
    is_running = took_s is None
    return ExecutionSummary(
        "s",
        f"e{number}",
        "a-tool",
        ExecutionStatus.RUNNING if is_running else ExecutionStatus.COMMITTED,
        1,
        "somebody",
        number,
        after(begin_s),
        ended_at=None if took_s is None else after(begin_s + took_s),
        parent_id=None if parent is None else f"e{parent}",
    )


def test_no_bar_covers_another_and_calls_are_below_their_callers() -> None:
    executions = [
        execution(1, 0, 10),
        execution(2, 1, 3, parent=1),
        execution(3, 2, 1, parent=2),
        execution(4, 5, 3, parent=1),
        execution(5, 4, 20),
        execution(6, 11, 1),
        execution(7, 11, 1),
        execution(8, 12, None),
        execution(9, 30, 0),
    ]
    picture = timeline(executions)
    bars = {bar.execution.execution_id: bar for bar in picture.bars}
    assert len(bars) == 9
    assert bars["e1"].y < bars["e2"].y == bars["e4"].y < bars["e3"].y
    for one in bars.values():
        assert 0 <= one.x < one.x + one.width <= picture.width
        assert one.y + one.height <= picture.height
        for other in bars.values():
            is_beside = one.x + one.width <= other.x or other.x + other.width <= one.x
            assert one is other or one.y != other.y or is_beside
    assert bars["e8"].x + bars["e8"].width == pytest.approx(picture.axis.at(after(30))), "it runs to the end"


# Numbers


def version(number: int, value: str | None, *, name: str = "x", kind: ChangeKind = ChangeKind.SET) -> HistoryEntry:
    stated = None if value is None else Value(value)
    return HistoryEntry(
        "s", name, f"var_{name}", "float", number, kind, stated, Source.PYTHON, {}, number, after(number), "me", "Set"
    )


def charted(*values: str | None) -> Sequence[float]:
    picture = chart([version(number, value) for number, value in enumerate(values)])
    return [] if picture is None else [mark.number for mark in picture.marks]


def test_only_numbers_are_charted() -> None:
    assert charted("1", "2.5", "-3e2", "true", '"4"', "[5]", "NaN", "Infinity", None, "1e999") == [1, 2.5, -300]
    assert charted('"1"', "null") == []


def test_a_line_ends_where_the_variable_was_deleted() -> None:
    picture = chart([version(0, "1"), version(1, None, kind=ChangeKind.DELETED), version(2, "2"), version(3, "2")])
    assert picture is not None
    assert picture.steps.count("M") == 2


@pytest.mark.parametrize("values", [("0", "0"), ("5", "5"), ("-1e-12", "1e-12"), ("1e299", "-1e299"), ("1", "1.0001")])
def test_marks_are_on_the_chart_whatever_the_numbers(values: tuple[str, str]) -> None:
    picture = chart([version(number, value) for number, value in enumerate(values)])
    assert picture is not None
    assert all(0 < mark.y < picture.height and 0 < mark.x <= picture.width for mark in picture.marks)
    assert 2 <= len(picture.levels) <= 11


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("count", [2, 3, 299, 300, 301, 302, 1_000, 50_001])
def test_a_chart_of_many_versions_has_all_of_them(count: int, newest_first: bool) -> None:
    """All at one time, as one commit writes them, with one spike up and one down."""
    values = [math.sin(number / count * 20) for number in range(count)]
    values[count // 2], values[count // 3] = -7.25, 9.5
    same = [replace(version(number, repr(value)), created_at=BEGIN) for number, value in enumerate(values)]
    picture = chart(reversed(same) if newest_first else same, newest_first=newest_first)
    assert picture is not None
    assert picture.versions == count
    assert len(picture.marks) <= 400
    assert {max(values), min(values)} <= {mark.number for mark in picture.marks}
    assert all(mark.number == values[mark.entry.version] for mark in picture.marks)

    # The geometry: from one end to the other, in order, each point in its place.
    def across(number: int) -> float:
        return 62 + (picture.width - 72) * number / (count - 1)

    line = steps_of(picture.steps)
    assert (line[0][0], line[-1][0]) == (62, picture.width - 10)
    assert [x for x, _ in line] == sorted(x for x, _ in line)
    assert all(mark.x == pytest.approx(across(mark.entry.version), abs=0.01) for mark in picture.marks)
    highest = min(y for _, y in line)
    assert next(x for x, y in line if y == highest) == pytest.approx(across(count // 3), abs=0.01)
    ticks = picture.axis.ticks
    assert [tick.at for tick in ticks] == pytest.approx(
        [across(int(tick.label[1:].replace(",", ""))) for tick in ticks], abs=0.01
    )
    assert all(later.at - earlier.at >= 60 for earlier, later in pairwise(ticks))


def steps_of(path: str) -> list[tuple[float, float]]:
    """The points of an SVG path of steps."""
    points: list[tuple[float, float]] = []
    for command, first, second in re.findall(r"([MHV])(-?[\d.e+]+)(?: (-?[\d.e+]+))?", path):
        x, y = points[-1] if points else (0.0, 0.0)
        move = {"M": (float(first), float(second or 0)), "H": (float(first), y), "V": (x, float(first))}
        points.append(move[command])
    return points


@pytest.mark.parametrize(
    ("numbers", "labels"),
    [
        ((2**53, 2**53 + 1), ("9.0072e+15", "+1")),
        ((10**400, 10**400 + 10), ("1e+400", "+10")),
        ((0, 10**500), ("0", "1e+500")),
    ],
)
def test_integers_beyond_doubles_are_drawn_in_place(numbers: tuple[int, int], labels: tuple[str, str]) -> None:
    picture = chart([version(number, str(value)) for number, value in enumerate(numbers)])
    assert picture is not None
    assert picture.marks[0].y - picture.marks[1].y > 50
    assert tuple(mark.number for mark in picture.marks) == numbers
    texts = [level.label for level in picture.levels]
    assert len(set(texts)) == len(texts)
    assert set(labels) <= set(texts)


def test_calls_one_after_the_other_share_a_row_however_short_they_are() -> None:
    executions = [execution(number, number * 0.001, 0.0009) for number in range(400)]
    executions += [execution(1_000, 0.5, 1), execution(1_001, 0.6, 0.1, 1_000), execution(1_002, 0.8, 0.1, 1_000)]
    executions += [execution(1_003, 0.7, 0.3)]
    bars = {bar.execution.execution_id: bar for bar in timeline(executions).bars}
    rows = {bars[f"e{number}"].y for number in range(400)}
    assert len(rows) == 1
    assert bars["e1000"].y == min(rows)
    assert bars["e1001"].y == bars["e1002"].y > bars["e1000"].y
    assert bars["e1003"].y > bars["e1001"].y, "what ran at the same time is below"
    assert bars["e1001"].stem is not None
    assert bars["e1000"].y < bars["e1001"].stem < bars["e1001"].y + bars["e1001"].height
    assert bars["e1003"].stem is None
    ordered = sorted((bars[f"e{number}"] for number in range(400)), key=lambda bar: bar.x)
    # No point hides the next one, within the width of a line.
    assert all(one.x + one.width <= max(other.x, one.x + 0.75) for one, other in pairwise(ordered))


def test_concurrent_children_have_separate_rows() -> None:
    executions = [execution(1, 0, 10), execution(2, 1, 5, 1), execution(3, 2, 5, 1), execution(4, 3, 1, 2)]
    bars = {bar.execution.execution_id: bar for bar in timeline(executions).bars}
    assert bars["e1"].y < bars["e2"].y < bars["e4"].y < bars["e3"].y


def test_fifty_thousand_executions_make_a_picture() -> None:
    executions = [execution(number, number * 0.01, 0.005) for number in range(50_000)]
    picture = timeline(executions)
    assert len(picture.bars) == 50_000
    assert len({bar.y for bar in picture.bars}) == 1
    assert all(0 <= bar.x <= bar.x + bar.width <= picture.width for bar in picture.bars)


# Lineage


def node(depth: int, entry: HistoryEntry, *reads: HistoryEntry) -> LineageNode:
    stands_on = tuple(ReadEntry(read.name, read.name, read.variable_id, read.version) for read in reads)
    return LineageNode(depth, entry, stands_on)


def written(number: int, name: str, execution_id: str) -> HistoryEntry:
    entry = version(number, "1", name=name)
    return HistoryEntry(*(getattr(entry, each) for each in HistoryEntry.__slots__[:13]), execution_id, "a-tool")


def test_inputs_are_to_the_right_of_what_depends_on_them() -> None:
    base, middle, other = version(1, "1", name="base"), written(3, "m", "e1"), written(3, "o", "e1")
    end = written(5, "end", "e2")
    picture = lineage([node(0, end, middle, other), node(1, middle, base), node(1, other, base), node(2, base)])
    assert [each.tool for each in picture.nodes].count("a-tool") == 2, "one box an execution"
    assert len(picture.edges) == 6
    assert all(edge.source.x > edge.target.x for edge in picture.edges)
    assert [each.entry for each in picture.nodes if each.is_current] == [end]
    assert len({(each.x, each.y) for each in picture.nodes}) == len(picture.nodes)
    assert max(each.x for each in picture.nodes) < picture.width


def test_an_execution_that_reads_what_it_published_is_not_a_cycle() -> None:
    published, committed = written(3, "p", "e1"), written(5, "c", "e1")
    picture = lineage([node(0, committed, published), node(0, published, published)])
    assert {(edge.source.execution_id, edge.target.key) for edge in picture.edges} == {
        ("e1", "var_p@3"),
        ("e1", "var_c@5"),
    }


# Differences


def test_texts_are_compared_by_words_and_numbers_as_a_whole() -> None:
    assert [(each.kind, each.text) for each in compare_words("a long day", "a short day")] == [
        ("same", "a "),
        ("gone", "long"),
        ("new", "short"),
        ("same", " day"),
    ]
    assert [(each.kind, each.text) for each in compare_words("0.125", "0.25")] == [("gone", "0.125"), ("new", "0.25")]
    many = "word " * 10_000
    assert [each.kind for each in compare_words(many, f"{many}more")] == ["gone", "new"]
