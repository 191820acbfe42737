"""Where things are on the pictures of an audit: pure layout. Templates draw it."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Final

from dspex_persist.state.audit import ExecutionSummary, HistoryEntry, LineageNode
from dspex_persist.state.model import ChangeKind

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
"""Round times are counted from here: midnights are, and Mondays."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A place on an axis, with what it says."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Break:
    """Where a time in which nothing happened was cut out; `label` says how long it was."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class _Piece:
    begin: datetime
    end: datetime
    left: float
    right: float


class TimeAxis:
    """Maps times to places between `left` and `right`. Long times in which nothing happened are cut out."""

    def __init__(self, moments: Iterable[datetime], left: float, right: float) -> None:
        """An axis on which all the moments are; at least one."""
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
        """The place of a time; one that is not on the axis is at the nearest end."""
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
    """The gaps (by the index of the moment before) that are at least half as long as all that is left beside them."""
    gaps = [(after - before).total_seconds() for before, after in pairwise(ordered)]
    left_s, found = sum(gaps), set[int]()
    for index in sorted(range(len(gaps)), key=lambda each: -gaps[each])[:_MOST_BREAKS]:
        left_s -= gaps[index]
        if len(ordered) < 5 or gaps[index] < left_s / 2 or gaps[index] < 1:
            break
        found.add(index)
    return found


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
    """A duration as people say it: 350 µs, 12 ms, 3.2 s, 4 min, 5.5 h, 3 d."""
    for unit, factor, most in (("µs", 1e-6, 1e-3), ("ms", 1e-3, 1), ("s", 1, 120), ("min", 60, 7_200)):
        if seconds < most:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 3_600:.3g} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} d"


# Executions over time

_LEAST_PX: Final = 5
_BETWEEN_PX: Final = 3
_BAR_PX: Final = 15
_CHILD_PX: Final = 12
_AXIS_PX: Final = 22
_LETTER_PX: Final = 5.6


@dataclass(frozen=True, slots=True)
class Bar:
    """An execution, as long as it took. `label` is "" where the tool's name has no room."""

    execution: ExecutionSummary
    x: float
    y: float
    width: float
    height: float
    label: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """Executions by time, in as many rows as it takes for none to cover another; called ones under their callers."""

    width: float
    height: float
    axis: TimeAxis
    bars: tuple[Bar, ...]


def timeline(executions: Sequence[ExecutionSummary], width: float = 1_080) -> Timeline:
    """The picture of executions: at least one. One that still runs reaches to the right end."""
    latest = max(_end_of(each) or each.began_at for each in executions)
    moments = [moment for each in executions for moment in (each.began_at, _end_of(each) or latest)]
    axis = TimeAxis(moments, 8, width - 12)
    known = {each.execution_id for each in executions}
    children: dict[str, list[ExecutionSummary]] = {}
    for each in executions:
        if each.parent_id in known:
            children.setdefault(str(each.parent_id), []).append(each)
    bars: list[Bar] = []
    ends: list[float] = []
    """For each row, where its last bar ends."""
    for each in sorted(executions, key=lambda each: each.began_sequence):
        if each.parent_id in known:
            continue
        family = list(_family(each, children, 0))
        depth = 1 + max(level for _, level in family)
        x = axis.at(each.began_at)
        right = max(max(axis.at(_end_of(one) or latest) for one, _ in family), x + _LEAST_PX)
        row = _free_rows(ends, x, depth)
        ends[row : row + depth] = [right + _BETWEEN_PX] * depth
        bars += (_bar(one, axis, latest, row + level, level > 0) for one, level in family)
    return Timeline(width, len(ends) * (_BAR_PX + 4) + _AXIS_PX, axis, tuple(bars))


def _end_of(execution: ExecutionSummary) -> datetime | None:
    """When its code had ended: one that others called is committed later, with them. None while it runs."""
    if execution.parent_id is None or execution.duration_us is None or execution.ended_at is None:
        return execution.ended_at
    # The commit that ended it is its caller's.
    return min(execution.began_at + timedelta(microseconds=execution.duration_us), execution.ended_at)


def _family(
    execution: ExecutionSummary, children: dict[str, list[ExecutionSummary]], level: int
) -> Iterable[tuple[ExecutionSummary, int]]:
    yield execution, level
    for child in children.get(execution.execution_id, ()):
        yield from _family(child, children, level + 1)


def _free_rows(ends: list[float], x: float, depth: int) -> int:
    """The first of `depth` rows, one under the other, that are free from x on; made where there are none."""
    row = 0
    while any(end > x for end in ends[row : row + depth]):
        row += 1
    ends += [0.0] * (row + depth - len(ends))
    return row


def _bar(execution: ExecutionSummary, axis: TimeAxis, latest: datetime, row: int, is_child: bool) -> Bar:
    x = axis.at(execution.began_at)
    width = round(max(axis.at(_end_of(execution) or latest) - x, _LEAST_PX), 2)
    height = _CHILD_PX if is_child else _BAR_PX
    label = execution.tool if len(execution.tool) * _LETTER_PX + 6 <= width else ""
    return Bar(execution, x, _AXIS_PX + row * (_BAR_PX + 4), width, height, label)


# Numbers over time

_CHART_LEFT: Final = 46
_CHART_TOP: Final = 10
_CHART_BOTTOM: Final = 24
MOST_MARKS: Final = 300


@dataclass(frozen=True, slots=True)
class Mark:
    """A version on a chart."""

    entry: HistoryEntry
    x: float
    y: float
    number: float


@dataclass(frozen=True, slots=True)
class Chart:
    """The numbers that a variable had, as steps. `hidden`: how many of the oldest versions are not on it."""

    width: float
    height: float
    axis: TimeAxis
    levels: tuple[Tick, ...]
    steps: str
    marks: tuple[Mark, ...]
    hidden: int


def chart(entries: Sequence[HistoryEntry], width: float = 520, height: float = 170) -> Chart | None:
    """The picture of a variable's versions, oldest first; None where none of them is a number."""
    numbered = [(entry, number_of(entry)) for entry in entries]
    shown = numbered[-MOST_MARKS:]
    numbers = [number for _, number in shown if number is not None]
    if not numbers:
        return None
    right, bottom = width - 10, height - _CHART_BOTTOM
    axis = TimeAxis([entry.created_at for entry, _ in shown], _CHART_LEFT, right)
    low, high, levels = _levels(min(numbers), max(numbers))
    up = (bottom - _CHART_TOP) / (high - low)
    marks, steps, is_down = [], [], False
    for entry, number in shown:
        x = axis.at(entry.created_at)
        if number is None:
            # Deleted, or no number for once: the line ends here.
            steps += [f"H{x:g}"] if is_down else []
            is_down = False
            continue
        y = round(bottom - (number - low) * up, 2)
        steps.append(f"H{x:g}V{y:g}" if is_down else f"M{x:g} {y:g}")
        marks.append(Mark(entry, x, y, number))
        is_down = True
    if is_down:
        steps.append(f"H{right:g}")
    ticks = tuple(Tick(round(bottom - (level - low) * up, 2), f"{level:.6g}") for level in levels)
    return Chart(width, height, axis, ticks, "".join(steps), tuple(marks), len(numbered) - len(shown))


def number_of(entry: HistoryEntry) -> float | None:
    """The number that a version is, if it is one that can be drawn."""
    if entry.value is None or entry.value.binary is not None or entry.kind is ChangeKind.DELETED:
        return None
    try:
        number = float(entry.value.json)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and abs(number) < 1e300 else None


def _levels(low: float, high: float) -> tuple[float, float, list[float]]:
    """From and to where a scale goes, and its three to six round numbers."""
    if low == high:
        around = abs(low) / 2 or 1.0
        low, high = low - around, high + around
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((digit * power for digit in (1, 2, 2.5, 5) if digit * power >= rough * 0.999), 10 * power)
    first, last = math.floor(low / step), math.ceil(high / step)
    if not math.isfinite(first * step) or last - first > 10:
        return low, high, [low, high]
    return first * step, last * step, [round(index * step, 12) for index in range(first, last + 1)]


# What stands on what

_NODE_WIDTH: Final = 132
_NODE_HEIGHT: Final = 34
_COLUMN_PX: Final = 186
_ROW_PX: Final = 46


@dataclass(slots=True, eq=False)
class Node:
    """A version (`entry`), or the execution that wrote some (`execution_id`, `tool`)."""

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
    """That `target` stands on, or was written by, `source`; `path` is what SVG draws."""

    source: Node
    target: Node
    path: str


@dataclass(frozen=True, slots=True)
class Graph:
    """Versions and executions: the values asked about to the left, what each stands on to the right of it."""

    width: float
    height: float
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


def lineage(found: Iterable[LineageNode]) -> Graph:
    """The picture of a lineage."""
    nodes: dict[str, Node] = {}
    # Oldest first: an execution's place is before the first that it wrote, published or committed.
    lineages = sorted(found, key=lambda each: each.entry.sequence)
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
        # Not what it published itself: that it stands before.
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
        # Each near the middle of what stands on it, so that fewer lines cross.
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
