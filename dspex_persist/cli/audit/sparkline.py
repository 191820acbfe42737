"""Numbers as a line of blocks."""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Final

from dspex_persist.cli.audit.look import plain
from dspex_persist.state.audit import HistoryEntry

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_LONGEST: Final = 40
_MOST: Final = 6
_NUMERIC: Final = frozenset({"float", "integer"})


def sparkline(numbers: Sequence[float]) -> str:
    """One block a number, from the lowest to the highest."""
    low, high = min(numbers), max(numbers)
    if low == high:
        return _BLOCKS[len(_BLOCKS) // 2] * len(numbers)
    # Halved first: the distance of two finite numbers need not be finite.
    step = (high / 2 - low / 2) / (len(_BLOCKS) - 1)
    return "".join(_BLOCKS[round((number / 2 - low / 2) / step)] if step else _BLOCKS[0] for number in numbers)


class Courses:
    """How the numbers in a table went, variable by variable: the last few of the first few."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str], deque[float]] = {}

    def add(self, row: HistoryEntry) -> None:
        """The next row."""
        key = (row.session_id, row.name)
        number = _number(row)
        if number is not None and (key in self._numbers or len(self._numbers) < _MOST):
            self._numbers.setdefault(key, deque(maxlen=_LONGEST)).append(number)

    def lines(self, newest_first: bool) -> Iterator[str]:
        """A line for each that has more than one number, from left to right in time."""
        courses = {key: numbers for key, numbers in self._numbers.items() if len(numbers) > 1}
        is_one = len({session for session, _ in courses}) == 1
        names = [plain(name if is_one else f"{session} {name}") for session, name in courses]
        width = max(map(len, names), default=0)
        for name, numbers in zip(names, courses.values(), strict=True):
            course = list(reversed(numbers)) if newest_first else list(numbers)
            yield f"{name:{width}}  {sparkline(course)}  {min(course):.6g} to {max(course):.6g}"


def _number(row: HistoryEntry) -> float | None:
    if row.type not in _NUMERIC or row.value is None:
        return None
    stated = json.loads(row.value.json)
    # What is no finite number is a string in JSON.
    is_number = isinstance(stated, int | float) and not isinstance(stated, bool) and isfinite(stated)
    return float(stated) if is_number else None
