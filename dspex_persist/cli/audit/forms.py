"""The three forms of an answer: a table for people, JSON Lines and CSV for programs. Rows are printed as they come."""

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, Final, Generic, Protocol, TypeVar

from dspex_persist.audit import document, value_of
from dspex_persist.cli.audit.rendering import MASK
from dspex_persist.cli.output import say_json
from dspex_persist.state.audit import ExecutionSummary, HistoryEntry, VariableState
from dspex_persist.state.model import Value

T_contra = TypeVar("T_contra", contravariant=True)

_NESTED: Final[Mapping[str, type]] = {
    "summary": ExecutionSummary,
    "entry": HistoryEntry,
    "before": VariableState,
    "after": VariableState,
}
"""Fields whose own fields are columns of a CSV: `before` becomes before_session_id and so on."""


_FORMULAS: Final = ("=", "+", "-", "@", "\t", "\r", "\n")


class Printer(Protocol[T_contra]):
    """Prints rows, each time below those before."""

    def print(self, rows: Iterable[T_contra]) -> None:
        """Print them."""
        ...


class JsonLines(Generic[T_contra]):
    """One object a row, with the names of the dataclass's fields."""

    def print(self, rows: Iterable[T_contra]) -> None:
        """See `Printer`."""
        for row in rows:
            say_json(document(row))
        sys.stdout.flush()


class Csv(Generic[T_contra]):
    """One line a row, below a header with the names of the fields, also where there is no row."""

    def __init__(self, kind: type) -> None:
        self._kind = kind
        self._writer = csv.writer(sys.stdout, lineterminator="\n")
        self._has_header = False

    def print(self, rows: Iterable[T_contra]) -> None:
        """See `Printer`."""
        if not self._has_header:
            self._writer.writerow(_names(self._kind))
            self._has_header = True
        for row in rows:
            self._writer.writerow(_cells(self._kind, row))
        sys.stdout.flush()


def _names(kind: type, prefix: str = "") -> Iterator[str]:
    for each in fields(kind):
        if each.name in _NESTED:
            yield from _names(_NESTED[each.name], f"{each.name}_")
        else:
            yield f"{prefix}{each.name}"


def _cells(kind: type, row: Any) -> Iterator[str]:
    """`row` may be None: then all of its cells are empty."""
    for each in fields(kind):
        found = getattr(row, each.name, None)
        if each.name in _NESTED:
            yield from _cells(_NESTED[each.name], found)
        elif each.name == "value" and getattr(row, "masked", False):
            yield MASK
        else:
            yield _cell(found)


def _cell(found: Any) -> str:
    if isinstance(found, Value):
        return json.dumps(value_of(found))
    stated = document(found)
    if stated is None:
        return ""
    return _harmless(stated) if isinstance(stated, str) else json.dumps(stated)


def _harmless(text: str) -> str:
    """A text that no spreadsheet takes for a formula: clients choose names, and whoever opens the file runs them."""
    return f"'{text}" if text.startswith(_FORMULAS) else text
