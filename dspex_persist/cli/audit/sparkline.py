"""Sparklines: numbers as a line of blocks."""

from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Final

from dspex_persist.audit.pictures import number_of, number_text
from dspex_persist.cli.output import plain
from dspex_persist.state.audit import HistoryEntry
from dspex_persist.state.values import is_number

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_LONGEST: Final = 40
_MOST: Final = 6


def sparkline(numbers: Sequence[int | float]) -> str:
    """Return one block for each number, scaled from the lowest to the highest."""
    low, high = Fraction(min(numbers)), Fraction(max(numbers))
    if low == high:
        return _BLOCKS[len(_BLOCKS) // 2] * len(numbers)
    # Fractions, as integers may exceed every double, and different large integers may be the same double.
    step = (high - low) / (len(_BLOCKS) - 1)
    return "".join(_BLOCKS[round((Fraction(number) - low) / step)] for number in numbers)


class Sparklines:
    """Collects a sparkline for each of the first few numeric variables of a table, with its last few values."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str], deque[int | float]] = {}

    def add(self, row: HistoryEntry) -> None:
        """Add the next row."""
        key = (row.session_id, row.name)
        number = number_of(row) if is_number(row.type) else None
        if number is not None and (key in self._numbers or len(self._numbers) < _MOST):
            self._numbers.setdefault(key, deque(maxlen=_LONGEST)).append(number)

    def lines(self, newest_first: bool) -> Iterator[str]:
        """Yield a line for each variable with more than one number, in the order of time."""
        series = {key: numbers for key, numbers in self._numbers.items() if len(numbers) > 1}
        is_one = len({session for session, _ in series}) == 1
        names = [plain(name if is_one else f"{session} {name}") for session, name in series]
        width = max(map(len, names), default=0)
        for name, numbers in zip(names, series.values(), strict=True):
            in_order = list(reversed(numbers)) if newest_first else list(numbers)
            yield f"{name:{width}}  {sparkline(in_order)}  {number_text(min(in_order))} to {number_text(max(in_order))}"
