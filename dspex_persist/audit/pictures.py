"""The layout of the pictures in reports and on the website. The templates draw them."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import pairwise
from typing import Final

from dspex_persist.state.audit import ExecutionSummary, HistoryEntry, LineageNode
from dspex_persist.state.model import ChangeKind
from dspex_persist.state.values.json_text import RefusedError, read

# Times


_STEPS_S: Final = (
    *(digit * 10.0**power for power in range(-6, 1) for digit in (1, 2, 5)),
    *(10, 15, 30, 60, 120, 300, 600, 900, 1_800, 3_600, 7_200, 21_600, 43_200),
    *(86_400 * days for days in (1, 2, 7, 14, 28, 91, 182, 364, 1_820)),
)
_TICK_PX: Final = 72
_BREAK_PX: Final = 22
_MOST_BREAKS: Final = 6
_ORIGIN: Final = datetime(1, 1, 1, tzinfo=UTC)
"""Ticks are multiples of a step since this midnight, a Monday."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A position on an axis, with its label."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Break:
    """A cut on an axis, where an idle period was left out; `label` is its duration."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class _Piece:
    begin: datetime
    end: datetime
    left: float
    right: float


class TimeAxis:
    """Maps times to positions between `left` and `right`. Long idle periods are cut out."""

    def __init__(self, moments: Iterable[datetime], left: float, right: float) -> None:
        """Create an axis for these times, of which there must be at least one."""
        ordered = sorted(set(moments))
        cuts = _idle(ordered)
        spans = _spans(ordered, cuts)
        total_s = sum((end - begin).total_seconds() for begin, end in spans) or 1.0
        self._scale = (right - left - _BREAK_PX * (len(spans) - 1)) / total_s
        self._pieces: list[_Piece] = []
        for begin, end in spans:
            to = left + (end - begin).total_seconds() * self._scale
            self._pieces.append(_Piece(begin, end, left, to))
            left = to + _BREAK_PX
        self.breaks = tuple(
            Break(before.right + _BREAK_PX / 2, duration_text((after.begin - before.end).total_seconds()))
            for before, after in pairwise(self._pieces)
        )
        self.ticks = tuple(self._ticks(right))

    def at(self, moment: datetime) -> float:
        """Return the position of a time; a time outside the axis is at the nearest end."""
        index = bisect_right(self._pieces, moment, key=lambda piece: piece.begin) - 1
        piece = self._pieces[max(index, 0)]
        offset_s = (min(max(moment, piece.begin), piece.end) - piece.begin).total_seconds()
        return round(piece.left + offset_s * self._scale, 2)

    def _ticks(self, right: float) -> Iterable[Tick]:
        wanted_s = _TICK_PX / self._scale
        step_s = next((step for step in _STEPS_S if step >= wanted_s), _STEPS_S[-1])
        format_text = _tick_format(step_s, self._pieces[0].begin, self._pieces[-1].end)
        last = -math.inf
        for piece in self._pieces:
            moment = _round_up(piece.begin, step_s)
            if moment > piece.end:
                moment = piece.begin
            while moment <= piece.end:
                at = self.at(moment)
                if at - last >= _TICK_PX * 0.8 and at <= right - _TICK_PX * 0.7:
                    yield Tick(at, _clock_text(moment, format_text))
                    last = at
                moment += timedelta(seconds=step_s)


def _idle(ordered: Sequence[datetime]) -> set[int]:
    """Return the gaps (by the index of the time before) that are at least half as long as everything else together."""
    gaps = [(after - before).total_seconds() for before, after in pairwise(ordered)]
    left_s, idle = sum(gaps), set[int]()
    for index in sorted(range(len(gaps)), key=lambda each: -gaps[each])[:_MOST_BREAKS]:
        left_s -= gaps[index]
        if len(ordered) < 5 or gaps[index] < left_s / 2 or gaps[index] < 1:
            break
        idle.add(index)
    return idle


def _spans(ordered: Sequence[datetime], cuts: set[int]) -> list[tuple[datetime, datetime]]:
    ends = [*sorted(cuts), len(ordered) - 1]
    begins = [0, *(index + 1 for index in ends[:-1])]
    return [(ordered[begin], ordered[end]) for begin, end in zip(begins, ends, strict=True)]


def _round_up(moment: datetime, step_s: float) -> datetime:
    step = timedelta(seconds=step_s)
    return _ORIGIN - (_ORIGIN - moment) // step * step


def _tick_format(step_s: float, begin: datetime, end: datetime) -> str:
    if step_s >= 86_400:
        return "%Y-%m-%d"
    time = "%H:%M:%S.%f" if step_s < 1 else "%H:%M:%S" if step_s < 60 else "%H:%M"
    return f"%m-%d {time}" if begin.date() != end.date() else time


def _clock_text(moment: datetime, format_text: str) -> str:
    text = moment.strftime(format_text)
    return text.rstrip("0").removesuffix(".") if format_text.endswith("%f") else text


def duration_text(seconds: float) -> str:
    """Return a duration as text: 350 µs, 12 ms, 3.2 s, 4 min, 5.5 h, 3 d."""
    for unit, factor, most in (("µs", 1e-6, 1e-3), ("ms", 1e-3, 1), ("s", 1, 120), ("min", 60, 7_200)):
        if seconds < most:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 3_600:.3g} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} d"


# Executions over time

_LEAST_PX: Final = 5
_THIN_PX: Final = 0.75
_BETWEEN_PX: Final = 0.5
_BAR_PX: Final = 15
_ROW_OF_BAR_PX: Final = _BAR_PX + 4
_CHILD_PX: Final = 12
_AXIS_PX: Final = 22
_LETTER_PX: Final = 5.6


@dataclass(frozen=True, slots=True)
class Bar:
    """An execution on the timeline.

    Attributes:
        label: The tool's name, or "" if it does not fit.
        stem: Where the line from the execution that called it begins; None if a client called it.
    """

    execution: ExecutionSummary
    x: float
    y: float
    width: float
    height: float
    label: str
    stem: float | None = None


@dataclass(frozen=True, slots=True)
class Timeline:
    """Executions by time. Those that ran at the same time are in different rows, called ones below their callers."""

    width: float
    height: float
    axis: TimeAxis
    bars: tuple[Bar, ...]


@dataclass(slots=True)
class _Placed:
    """An execution, its row, and the row of the execution that called it, if any."""

    execution: ExecutionSummary
    begin: datetime
    end: datetime
    row: int
    above: int | None = None


def timeline(executions: Sequence[ExecutionSummary], width: float = 1_080) -> Timeline:
    """Lay out executions, of which there must be at least one. A running one reaches to the right end."""
    latest = max(_end_of(each) or each.began_at for each in executions)
    moments = [moment for each in executions for moment in (each.began_at, _end_of(each) or latest)]
    axis = TimeAxis(moments, 8, width - 12)
    known = {each.execution_id for each in executions}
    children: dict[str, list[ExecutionSummary]] = {}
    for each in sorted(executions, key=lambda each: each.began_sequence):
        children.setdefault(str(each.parent_id) if each.parent_id in known else "", []).append(each)
    placed = _rows_of("", children, latest)
    rows = 1 + max(each.row for each in placed)
    bars = _bars(placed, axis)
    return Timeline(width, rows * _ROW_OF_BAR_PX + _AXIS_PX, axis, tuple(bars))


def _end_of(execution: ExecutionSummary) -> datetime | None:
    """Return when its code ended, or None while it runs."""
    if execution.parent_id is None or execution.duration_us is None or execution.ended_at is None:
        return execution.ended_at
    # A called execution is committed later, together with its caller.
    return min(execution.began_at + timedelta(microseconds=execution.duration_us), execution.ended_at)


def _rows_of(parent: str, children: dict[str, list[ExecutionSummary]], latest: datetime) -> list[_Placed]:
    """Assign rows, from 0 on, to the executions that `parent` (clients: "") called, and to all that these called.

    Executions that overlap in time get different rows; others share a row.
    """
    placed: list[_Placed] = []
    ends: list[datetime] = []
    """When the last execution of each row ended."""
    for each in children.get(parent, ()):
        below = _rows_of(each.execution_id, children, latest)
        end = max([_end_of(each) or latest, each.began_at, *(one.end for one in below)])
        depth = 2 + max((one.row for one in below), default=-1)
        row = _free_rows(ends, each.began_at, depth)
        ends[row : row + depth] = [end] * depth
        placed.append(_Placed(each, each.began_at, max(_end_of(each) or latest, each.began_at), row))
        for one in below:
            one.above = row if one.above is None else one.above + row + 1
            one.row += row + 1
        placed += below
    return placed


def _free_rows(ends: list[datetime], begin: datetime, depth: int) -> int:
    """Return the first of `depth` adjacent rows that are free from a time on, adding rows if necessary."""
    row = 0
    while any(end > begin for end in ends[row : row + depth]):
        row += 1
    ends += [begin] * (row + depth - len(ends))
    return row


def _bars(placed: Sequence[_Placed], axis: TimeAxis) -> Iterable[Bar]:
    """Draw each execution as long as it took, or longer if it would be invisible and there is room next to it."""
    following: dict[int, float] = {}
    drawn: list[Bar] = []
    for each in sorted(placed, key=lambda each: (each.begin, each.execution.began_sequence), reverse=True):
        x = axis.at(each.begin)
        took = axis.at(each.end) - x
        room = following.get(each.row, math.inf) - x - _BETWEEN_PX
        following[each.row] = x
        width = round(max(took, min(_LEAST_PX, room), _THIN_PX), 2)
        height = _BAR_PX if each.above is None else _CHILD_PX
        label = each.execution.tool if len(each.execution.tool) * _LETTER_PX + 6 <= width else ""
        stem = None if each.above is None else _AXIS_PX + each.above * _ROW_OF_BAR_PX + _CHILD_PX
        drawn.append(Bar(each.execution, x, _AXIS_PX + each.row * _ROW_OF_BAR_PX, width, height, label, stem))
    return reversed(drawn)


# Numbers, version by version

_CHART_LEFT: Final = 62
_CHART_TOP: Final = 10
_CHART_BOTTOM: Final = 24
_VERSION_TICK_PX: Final = 90
MOST_MARKS: Final = 300
"""A chart of up to this many versions marks each; of more, the lowest and the highest of each stretch."""
_STRETCHES: Final = 100
_PLAIN_DIGITS: Final = 9


@dataclass(frozen=True, slots=True)
class Mark:
    """A version on a chart."""

    entry: HistoryEntry
    x: float
    y: float
    number: int | float


@dataclass(frozen=True, slots=True)
class VersionAxis:
    """The positions of versions, in sequence rather than by time, as thousands may have the same time."""

    ticks: tuple[Tick, ...]
    breaks: tuple[Break, ...] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """The numeric values of a variable, as steps, by version.

    Attributes:
        marks: All versions, or the lowest and the highest of each stretch.
        versions: The number of versions.
        first: When the first version was created.
        last: When the last version was created.
    """

    width: float
    height: float
    axis: VersionAxis
    levels: tuple[Tick, ...]
    steps: str
    marks: tuple[Mark, ...]
    versions: int
    first: datetime
    last: datetime


class _Stretch:
    """Adjacent versions, of which a few are kept: the first, the lowest, the highest, the last, and a gap."""

    __slots__ = ("kept",)

    def __init__(self, kept: Iterable[tuple[int, HistoryEntry, int | float | None]]) -> None:
        self.kept = list(kept)

    def joined(self, other: "_Stretch") -> "_Stretch":
        """Return the two stretches joined."""
        both = self.kept + other.kept
        numbers = [each for each in both if each[2] is not None]
        gaps = [each for each in both if each[2] is None][-1:]
        if not numbers:
            return _Stretch(gaps)
        lowest, highest = min(numbers, key=_number_kept), max(numbers, key=_number_kept)
        few = {each[0]: each for each in (both[0], numbers[0], lowest, highest, numbers[-1], both[-1], *gaps)}
        return _Stretch(few[place] for place in sorted(few))

    def mirrored(self, count: int) -> "_Stretch":
        """Return the stretch counted from the other end of `count` versions."""
        return _Stretch((count - 1 - place, entry, number) for place, entry, number in reversed(self.kept))

    def extremes(self) -> set[int]:
        """Return the positions of its lowest and its highest version."""
        numbers = [each for each in self.kept if each[2] is not None]
        return {min(numbers, key=_number_kept)[0], max(numbers, key=_number_kept)[0]} if numbers else set()


def _number_kept(kept: tuple[int, HistoryEntry, int | float | None]) -> int | float:
    assert kept[2] is not None
    return kept[2]


def chart(
    entries: Iterable[HistoryEntry], width: float = 520, height: float = 170, *, newest_first: bool = False
) -> Chart | None:
    """Lay out the chart of a variable's versions.

    Reads the entries once, and keeps a few hundred of them in memory, however many there are.

    Args:
        entries: The versions, in their order, or newest first.
        width: In pixels.
        height: In pixels.
        newest_first: The order of the entries.

    Returns:
        The chart, or None if no version is a number.
    """
    stretches: list[_Stretch] = []
    size, count = 1, 0
    for entry in entries:
        single = _Stretch([(count, entry, number_of(entry))])
        if count % size:
            stretches[-1] = stretches[-1].joined(single)
        else:
            stretches.append(single)
        count += 1
        if len(stretches) > (MOST_MARKS if size == 1 else 2 * _STRETCHES):
            pairs = [*stretches, *([_Stretch(())] if len(stretches) % 2 else [])]
            stretches = [one.joined(other) for one, other in zip(pairs[::2], pairs[1::2], strict=True)]
            size *= 2
    if newest_first:
        stretches = [stretch.mirrored(count) for stretch in reversed(stretches)]
    return _drawn(stretches, count, width, height)


def _drawn(stretches: Sequence[_Stretch], count: int, width: float, height: float) -> Chart | None:
    kept = [each for stretch in stretches for each in stretch.kept]
    marked = {place for stretch in stretches for place in stretch.extremes()}
    numbers = [number for _, _, number in kept if number is not None]
    if not numbers:
        return None
    right, bottom = width - 10, height - _CHART_BOTTOM
    low, high, levels = _levels(Fraction(min(numbers)), Fraction(max(numbers)))

    def across(place: int) -> float:
        return round(_CHART_LEFT + (right - _CHART_LEFT) * place / max(count - 1, 1), 2)

    def down(number: Fraction) -> float:
        return round(bottom - float((number - low) / (high - low)) * (bottom - _CHART_TOP), 2)

    marks, steps, is_down = [], [], False
    for place, entry, number in kept:
        x = across(place)
        if number is None:
            # Deleted, or not a number: the line is interrupted.
            steps += [f"H{x:g}"] if is_down else []
            is_down = False
            continue
        y = down(Fraction(number))
        steps.append(f"H{x:g}V{y:g}" if is_down else f"M{x:g} {y:g}")
        if place in marked:
            marks.append(Mark(entry, x, y, number))
        is_down = True
    if is_down:
        steps.append(f"H{right:g}")
    texts = _level_texts(levels)
    shown = tuple(Tick(down(level), text) for level, text in zip(levels, texts, strict=True))
    axis = VersionAxis(tuple(_version_ticks(kept, across, right)))
    first, last = kept[0][1].created_at, kept[-1][1].created_at
    return Chart(width, height, axis, shown, "".join(steps), tuple(marks), count, first, last)


def _version_ticks(
    kept: Sequence[tuple[int, HistoryEntry, int | float | None]], across: Callable[[int], float], right: float
) -> Iterable[Tick]:
    last = -math.inf
    for place, entry, _ in kept:
        x = across(place)
        if x - last >= _VERSION_TICK_PX and x <= right - _VERSION_TICK_PX / 3:
            yield Tick(x, f"v{entry.version:,}")
            last = x


def number_of(entry: HistoryEntry) -> int | float | None:
    """Return the exact number in a version, or None if it cannot be drawn."""
    if entry.value is None or entry.value.binary is not None or entry.kind is ChangeKind.DELETED:
        return None
    text = entry.value.json
    if text[:1] not in "-0123456789":
        return None
    try:
        number = read(text)
    except RefusedError:
        return None
    return number if isinstance(number, int | float) and not isinstance(number, bool) else None


def number_text(number: int | float | Fraction) -> str:
    """Return a short text for a number, which may exceed the range of doubles."""
    if isinstance(number, float):
        return f"{number:.6g}"
    exact = Fraction(number)
    if exact.denominator == 1 and abs(exact.numerator) < 10**_PLAIN_DIGITS:
        return str(exact.numerator)
    with localcontext() as rounding:
        rounding.prec = 6
        return str((Decimal(exact.numerator) / Decimal(exact.denominator)).normalize()).replace("E", "e")


def _level_texts(levels: Sequence[Fraction]) -> list[str]:
    """Return labels for the levels. Levels with the same label become differences from the lowest."""
    texts = [number_text(level) for level in levels]
    if len(set(texts)) == len(texts):
        return texts
    return [texts[0], *(f"+{number_text(level - levels[0])}" for level in levels[1:])]


def _levels(low: Fraction, high: Fraction) -> tuple[Fraction, Fraction, list[Fraction]]:
    """Return the ends of a scale, and its three to six round numbers."""
    if low == high:
        around = abs(low) / 2 or Fraction(1)
        low, high = low - around, high + around
    rough = (high - low) / 4
    power = _power_of_ten(rough)
    step = next((power * digit for digit in _ROUND if power * digit >= rough * Fraction(999, 1000)), power * 10)
    first, last = low // step, -(-high // step)
    return first * step, last * step, [index * step for index in range(first, last + 1)]


_ROUND: Final = (Fraction(1), Fraction(2), Fraction(5, 2), Fraction(5))


def _power_of_ten(number: Fraction) -> Fraction:
    """Return the largest power of ten that is not above a positive number."""
    exponent = len(str(number.numerator)) - len(str(number.denominator))
    power = Fraction(10) ** exponent
    return power if power <= number else power / 10


# Lineage

_NODE_WIDTH: Final = 132
_NODE_HEIGHT: Final = 34
_COLUMN_PX: Final = 186
_ROW_PX: Final = 46


@dataclass(slots=True, eq=False)
class Node:
    """A version (`entry`), or an execution that wrote versions (`execution_id`, `tool`)."""

    key: str
    order: int
    entry: HistoryEntry | None = None
    execution_id: str = ""
    tool: str = ""
    is_current: bool = False
    before: list["Node"] = field(default_factory=list, repr=False)
    column: int = 0
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True, slots=True)
class Edge:
    """A line from `source` to `target`, which was derived from or written by it. `path` is the path in SVG."""

    source: Node
    target: Node
    path: str


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph of versions and executions: the requested values on the left, and to the right what each depends on."""

    width: float
    height: float
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


def lineage(versions: Iterable[LineageNode]) -> Graph:
    """Lay out a lineage."""
    nodes: dict[str, Node] = {}
    # Oldest first: an execution comes right before the first version that it wrote, published or committed.
    lineages = sorted(versions, key=lambda each: each.entry.sequence)
    for each in lineages:
        entry = each.entry
        key = _key(entry.variable_id, entry.version)
        nodes[key] = Node(key, 2 * entry.sequence + 1, entry, is_current=each.depth == 0)
    for each in lineages:
        entry = each.entry
        if entry.execution_id is None:
            continue
        fresh = Node(entry.execution_id, 2 * entry.sequence, execution_id=entry.execution_id, tool=entry.tool or "")
        execution = nodes.setdefault(entry.execution_id, fresh)
        reads = [nodes[key] for read in each.stands_on if (key := _key(read.variable_id, read.version)) in nodes]
        # Without the versions that it published itself, which come after it.
        execution.before += [read for read in reads if read.order < execution.order and read not in execution.before]
        nodes[_key(entry.variable_id, entry.version)].before.append(execution)
    return _laid_out(sorted(nodes.values(), key=lambda node: node.order))


def _key(variable_id: str | None, version: int | None) -> str:
    return f"{variable_id}@{version}"


def _laid_out(nodes: Sequence[Node]) -> Graph:
    columns: list[list[Node]] = []
    after: dict[Node, list[Node]] = {}
    for node in reversed(nodes):
        node.column = max((each.column + 1 for each in after.get(node, ())), default=0)
        for before in node.before:
            after.setdefault(before, []).append(node)
        while len(columns) <= node.column:
            columns.append([])
        columns[node.column].append(node)
    tallest = max(map(len, columns), default=0)
    for column in columns:
        # Each node near the middle of those that depend on it, so that fewer lines cross.
        middles = {node: _mean([each.y for each in after.get(node, ())]) for node in column}
        column.sort(key=lambda node: (middles[node], node.order))
        for index, node in enumerate(column):
            node.x = 8 + node.column * _COLUMN_PX
            node.y = 8 + (tallest - len(column)) * _ROW_PX / 2 + index * _ROW_PX
    edges = tuple(Edge(before, node, _curve(node, before)) for node in nodes for before in node.before)
    width = 16 + _NODE_WIDTH + max(len(columns) - 1, 0) * _COLUMN_PX
    return Graph(width, 16 + max(tallest, 1) * _ROW_PX, tuple(nodes), edges)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def _curve(left: Node, right: Node) -> str:
    x1, y1 = left.x + _NODE_WIDTH, left.y + _NODE_HEIGHT / 2
    x2, y2 = right.x, right.y + _NODE_HEIGHT / 2
    bend = (_COLUMN_PX - _NODE_WIDTH) * 0.6
    return f"M{x1:g} {y1:g}C{x1 + bend:g} {y1:g} {x2 - bend:g} {y2:g} {x2:g} {y2:g}"
