"""Output for programs: JSON Lines and CSV. Rows are printed as they arrive."""

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
"""Fields that are flattened in CSV: `before` becomes before_session_id and so on."""
_FORMULAS: Final = ("=", "+", "-", "@", "\t", "\r", "\n")


class Printer(Protocol[T_contra]):
    """Prints rows."""

    def print(self, rows: Iterable[T_contra]) -> None:
        """Print rows below those already printed."""
        ...


class JsonLines(Generic[T_contra]):
    """Prints one JSON object per row, with the field names of the dataclass."""

    def print(self, rows: Iterable[T_contra]) -> None:
        """See `Printer`."""
        for row in rows:
            say_json(document(row))
        sys.stdout.flush()


class Csv(Generic[T_contra]):
    """Prints one line per row, below a header with the field names, which is also printed without any rows."""

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
    """Yield the cells of a row; all are empty if it is None."""
    for each in fields(kind):
        content = getattr(row, each.name, None)
        if each.name in _NESTED:
            yield from _cells(_NESTED[each.name], content)
        elif each.name == "value" and getattr(row, "masked", False):
            yield MASK
        else:
            yield _cell(content)


def _cell(content: Any) -> str:
    if isinstance(content, Value):
        return json.dumps(value_of(content))
    plain_content = document(content)
    if plain_content is None:
        return ""
    return _harmless(plain_content) if isinstance(plain_content, str) else json.dumps(plain_content)


def _harmless(text: str) -> str:
    """Return the text with a quote in front if a spreadsheet would run it as a formula: clients choose names."""
    return f"'{text}" if text.startswith(_FORMULAS) else text
