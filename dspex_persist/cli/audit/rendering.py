"""Renders answers for people: times in a zone, values on one line, columns that fit the terminal."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final, Generic, TypeVar

from dspex_persist.cli.output import new_console, plain
from dspex_persist.state.model import ChangeKind, ExecutionStatus, Value

T = TypeVar("T")

MASK: Final = "•••"
ABSENT: Final = "—"
_SHOWN: Final = 2_000
"""How many characters of a text are shown; --json has all of it."""
WHOLE: Final = 24
"""The least width of a column of numbers, wide enough for any: a number that is cut would read as another one."""
_GAP: Final = 2
_BLOCK: Final = 150
_NARROW: Final = 120
_MOST_CUT: Final = 20

STYLES: Final = {
    ChangeKind.REGISTERED: "green",
    ChangeKind.DELETED: "red",
    ChangeKind.ROLLED_BACK: "yellow",
    ChangeKind.PUBLISHED: "cyan",
    ExecutionStatus.COMMITTED: "green",
    ExecutionStatus.RUNNING: "cyan",
    ExecutionStatus.CONFLICT: "yellow",
    ExecutionStatus.FAILED: "red",
    ExecutionStatus.TIMED_OUT: "red",
    ExecutionStatus.INTERRUPTED: "red",
}


class Renderer:
    """The terminal, and the format of times on it."""

    def __init__(self, is_utc: bool) -> None:
        self.console = new_console(soft_wrap=False)
        self.is_narrow = self.console.width < _NARROW
        self._zone = UTC if is_utc else None
        self._format, self.time_width = ("%m-%d %H:%M:%S", 14) if self.is_narrow else ("%Y-%m-%d %H:%M:%S", 19)

    def time(self, moment: datetime | None) -> str:
        """Return a time as text, without the year on a narrow terminal."""
        if moment is None:
            return ABSENT
        return moment.astimezone(self._zone).strftime(self._format)

    def full_time(self, moment: datetime | None) -> str:
        """Return a time to the millisecond, with its zone."""
        if moment is None:
            return ABSENT
        local = moment.astimezone(self._zone)
        return f"{local:%Y-%m-%d %H:%M:%S}.{local.microsecond // 1_000:03d} {local:%Z}"

    def print(self, *parts: Any) -> None:
        """Print and flush, as --follow shows rows as they arrive."""
        for part in parts:
            self.console.print(part)
        sys.stdout.flush()

    def print_lines(self, lines: Sequence[Any]) -> None:
        """Print lines that have their final width; one that is still too long is cut, never wrapped."""
        from rich.text import Text

        self.console.print(Text("\n").join(lines), no_wrap=True, overflow="ellipsis")
        sys.stdout.flush()


def shortened(text: str, most: int = _SHOWN, option: str = "--json") -> str:
    """Return the beginning of a long text, how much is missing, and the option that shows it."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} more characters: {option})"


def value_text(value: Value | None, masked: bool = False) -> str:
    """Return a value as JSON on one line: dots if it is masked, a dash if there is no value."""
    if masked:
        return MASK
    if value is None:
        return ABSENT
    text = plain(shortened(value.json))
    return text if value.binary is None else f"{text} + {len(value.binary):,} bytes"


def json_text(content: Any) -> str:
    """Return any JSON document on one line."""
    return plain(shortened(json.dumps(content, ensure_ascii=False)))


def short_id(execution_id: str) -> str:
    """Return the part of an execution's id that identifies it: exec_ and the commit that began it."""
    return plain("_".join(execution_id.split("_")[:2]))


def duration_text(duration_us: int | None) -> str:
    """Return a duration in microseconds as text."""
    if duration_us is None:
        return ABSENT
    if duration_us < 1_000_000:
        return f"{duration_us / 1_000:.1f} ms"
    seconds = duration_us / 1_000_000
    return f"{seconds:.1f} s" if seconds < 100 else f"{int(seconds) // 60} min {int(seconds) % 60} s"


# Tables


@dataclass(frozen=True, slots=True)
class Column(Generic[T]):
    """A column of a table.

    Attributes:
        title: Its header.
        text: Returns the text of a row's cell.
        least: The width, in characters, below which it is not squeezed.
        most: Its largest width, in characters.
        right: Whether it is aligned to the right.
        is_id: Whether people copy its texts: those that were cut are listed in full below the table.
        style: Returns the style of a row's cell.
        is_rare: Whether it is left out as long as all its cells are empty.
    """

    title: str
    text: Callable[[T], str]
    least: int = 6
    most: int = 40
    right: bool = False
    is_id: bool = False
    style: Callable[[T], str] = lambda _row: ""
    is_rare: bool = False


class Table(Generic[T]):
    """Prints rows block by block, so that memory does not limit their number.

    The first block determines the widths of the columns. A block that needs wider ones starts with a new header.
    """

    def __init__(self, look: Renderer, columns: Sequence[Column[T]]) -> None:
        self._look = look
        self._all = columns
        self._columns: list[Column[T]] = []
        self._wanted: list[int] = []
        self._widths: list[int] = []
        self._cut: dict[str, None] = {}

    def print(self, rows: Iterable[T]) -> None:
        """Print rows below those already printed."""
        each = iter(rows)
        while block := list(islice(each, _BLOCK)):
            self._choose(block)
            # Cut here already: measuring the width of long texts would take most of the time.
            texts = [[column.text(row)[: column.most + 1] for column in self._columns] for row in block]
            self._print_block(texts, block)
            self._note_cut(block)
        if self._cut:
            more = [f"and {len(self._cut) - _MOST_CUT} more: --json"] if len(self._cut) > _MOST_CUT else []
            self._look.console.print("\n".join(["in full:", *list(self._cut)[:_MOST_CUT], *more]), soft_wrap=True)
            self._cut.clear()

    def _choose(self, rows: Sequence[T]) -> None:
        """Add the columns that these rows need to those that were printed already."""

        def is_needed(column: Column[T]) -> bool:
            return not column.is_rare or column in self._columns or any(map(column.text, rows))

        columns = [column for column in self._all if is_needed(column)]
        if columns != self._columns:
            known = dict(zip(map(id, self._columns), self._wanted, strict=True))
            self._columns, self._wanted = columns, [known.get(id(column), 0) for column in columns]

    def _note_cut(self, rows: Sequence[T]) -> None:
        from rich.cells import cell_len

        for column, width in zip(self._columns, self._widths, strict=True):
            if column.is_id:
                self._cut |= {text: None for row in rows if cell_len(text := column.text(row)) > width}

    def _print_block(self, texts: list[list[str]], rows: Sequence[T]) -> None:
        from rich.text import Text

        lines = [] if self._fits(texts) else list(self._header())
        for row, cells in zip(rows, texts, strict=True):
            styles = [column.style(row) for column in self._columns]
            lines.append(self._line(Text(cell, style) for cell, style in zip(cells, styles, strict=True)))
        self._look.print_lines(lines)

    def _fits(self, texts: list[list[str]]) -> bool:
        """Return whether the current widths fit these texts; sets new widths if not."""
        from rich.cells import cell_len

        needed = [
            max(cell_len(column.title), min(column.most, max(map(cell_len, cells))))
            for column, cells in zip(self._columns, zip(*texts, strict=True), strict=True)
        ]
        self._wanted = [max(pair) for pair in zip(needed, self._wanted, strict=True)]
        room = self._look.console.width - _GAP * (len(self._columns) - 1)
        before, self._widths = self._widths, squeezed(self._wanted, [each.least for each in self._columns], room)
        return before == self._widths

    def _header(self) -> "Iterator[Any]":
        from rich.text import Text

        yield self._line(Text(column.title, "bold") for column in self._columns)
        yield Text("─" * (sum(self._widths) + _GAP * (len(self._widths) - 1)))

    def _line(self, cells: "Iterable[Any]") -> Any:
        from rich.text import Text

        line = Text()
        for column, cell, width in zip(self._columns, cells, self._widths, strict=True):
            if line:
                line.append(" " * _GAP)
            cell.truncate(width, overflow="ellipsis")
            cell.align("right" if column.right else "left", width)
            line.append_text(cell)
        line.rstrip()
        return line


def squeezed(wanted: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """Return widths that fit into `room` if possible: the widest shrink first, none below its `least`."""
    widths = list(wanted)
    while sum(widths) > room:
        soft = [(width, which) for which, width in enumerate(widths) if width > least[which]]
        if not soft:
            break
        widths[max(soft)[1]] -= 1
    return widths
