"""What people see of a session: a table of its variables as text and, in notebooks, with sparklines; data frames."""

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any, Final

from dspex_persist.cognitive.records import HistoryEntry, VariableInfo
from dspex_persist.spelling import shorten
from dspex_persist.state.model import SENSITIVE
from dspex_persist.state.values import is_number

MASKED: Final = "•••"
"""What is shown instead of the value of a sensitive variable."""
_WIDTH: Final = 60
_MOST_IN_LINE, _WIDTH_IN_LINE = 5, 20
_POINTS: Final = 40
_SPARK_WIDTH, _SPARK_HEIGHT = 100, 18


def is_sensitive(info: VariableInfo) -> bool:
    """Whether the value of a variable must not be shown."""
    return info.metadata.get(SENSITIVE, "").lower() == "true"


def is_numeric(info: VariableInfo) -> bool:
    """Whether the values of a variable are numbers."""
    return is_number(info.type)


def shown(info: VariableInfo, width: int = _WIDTH) -> str:
    """Return the value of a variable in one line."""
    if is_sensitive(info):
        return MASKED
    # The stored text, not the object: a tensor may have millions of numbers.
    value = info.record.value
    text = value.json
    if value.binary is not None:
        text = f"{text} and {len(value.binary):,} bytes"
    elif text.startswith('"') and len(text) <= 2 * width:
        text = repr(json.loads(text))
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _visible(info: VariableInfo) -> Any:
    return MASKED if is_sensitive(info) else info.value


def _row(cells: Iterable[str], cell: str = "td") -> str:
    """Return a row of a table in HTML, of cells in HTML."""
    return "<tr>" + "".join(f"<{cell} style='text-align:left'>{each}</{cell}>" for each in cells) + "</tr>"


def in_line(infos: Sequence[VariableInfo]) -> str:
    """Return a few variables and their values for a `repr`."""
    some = ", ".join(f"{info.name}={shown(info, _WIDTH_IN_LINE)}" for info in infos[:_MOST_IN_LINE])
    more = len(infos) - _MOST_IN_LINE
    return f"{some}, and {more} more" if more > 0 else some


class Description:
    """A session at one moment, for people: as text, in a notebook, as a data frame.

    Attributes:
        session_id: The session.
        place: The kind of its backend, and where that is.
        variables: Its variables.
        recent: The newest values of each variable of numbers, by name, oldest first.
    """

    def __init__(
        self,
        session_id: str,
        place: str,
        variables: Sequence[VariableInfo],
        recent: Callable[[VariableInfo], Sequence[float]],
    ) -> None:
        self.session_id = session_id
        self.place = place
        self.variables = tuple(variables)
        self.recent = {info.name: recent(info) for info in variables if is_numeric(info) and not is_sensitive(info)}

    @property
    def title(self) -> str:
        """The session, where it is, and how many variables it has."""
        count = len(self.variables)
        return f"Session {self.session_id!r} on {self.place}: {count} variable{'' if count == 1 else 's'}"

    def _rows(self) -> Iterable[tuple[str, ...]]:
        for info in self.variables:
            constraints = ", ".join(f"{key}: {_json(entry)}" for key, entry in info.constraints.items())
            lock = f"locked by {info.lock.optimizer_id}" if info.lock is not None else ""
            about = "; ".join(filter(None, (info.description, lock)))
            yield info.name, info.type, str(info.version), shown(info), constraints[:_WIDTH], about

    def __str__(self) -> str:
        head = ("name", "type", "version", "value", "constraints", "about")
        rows = [head, *self._rows()]
        if len(rows) == 1:
            return self.title
        widths = [max(len(_printable(row[n])) for row in rows) for n in range(len(head))]
        used = [n for n in range(len(head)) if n < 4 or any(row[n] for row in rows[1:])]
        lines = ["  ".join(_printable(row[n]).ljust(widths[n]) for n in used).rstrip() for row in rows]
        return "\n".join([self.title, *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the table for a notebook. Names and values come from anywhere, so all of it is escaped."""
        head = _row(("name", "type", "version", "value", "", "constraints", "about"), "th")
        body = []
        for name, *facts, constraints, about in self._rows():
            cells = [escape(text) for text in (name, *facts)]
            body.append(_row([*cells, sparkline(self.recent.get(name, ())), escape(constraints), escape(about)]))
        table = f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"
        return f"<div><p>{escape(self.title)}</p>{table}</div>"

    def to_pandas(self) -> Any:
        """Return the variables as a `pandas.DataFrame`, one row each; pandas has to be installed."""
        columns = ("name", "type", "version", "value", "updated_at", "description")
        rows = [
            (each.name, each.type, each.version, _visible(each), each.updated_at, each.description)
            for each in self.variables
        ]
        return _frame(rows, columns, "name")


class History(list[HistoryEntry]):
    """Versions of a variable, newest first: a list, and in a notebook a table."""

    def to_pandas(self) -> Any:
        """Return the versions as a `pandas.DataFrame`, oldest first; pandas has to be installed."""
        columns = ("version", "value", "kind", "at", "actor", "reason", "execution_id", "commit")
        rows = [
            (each.version, each.value, str(each.kind), each.at, each.actor, each.reason, each.execution_id, each.commit)
            for each in reversed(self)
        ]
        return _frame(rows, columns, "version")

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        head = _row(("version", "value", "kind", "when", "who", "why"), "th")
        masked = any(each.metadata.get(SENSITIVE, "").lower() == "true" for each in self)
        body = []
        for each in self:
            value = "" if each.record.value is None else MASKED if masked else each.record.value.json
            value = shorten(value, _WIDTH)
            when = f"{each.at:%Y-%m-%d %H:%M:%S}"
            facts = (str(each.version), value, str(each.kind), when, each.actor, each.reason or "")
            body.append(_row(map(escape, facts)))
        return f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"


def sparkline(numbers: Sequence[float]) -> str:
    """Return numbers as a small SVG line; "" unless there are two finite ones."""
    finite = [number for number in numbers if number - number == 0][-_POINTS:]
    if len(finite) < 2:
        return ""
    low, high = min(finite), max(finite)
    # Halved first: the difference of two large floats may not be finite.
    height = (high / 2 - low / 2) or 1.0
    step = _SPARK_WIDTH / (len(finite) - 1)
    points = " ".join(
        f"{n * step:.1f},{_SPARK_HEIGHT - 2 - (number / 2 - low / 2) / height * (_SPARK_HEIGHT - 4):.1f}"
        for n, number in enumerate(finite)
    )
    return (
        f"<svg width='{_SPARK_WIDTH}' height='{_SPARK_HEIGHT}' role='img' aria-label='{len(finite)} values'>"
        f"<polyline points='{points}' fill='none' stroke='currentColor'/></svg>"
    )


def _frame(rows: Sequence[tuple[Any, ...]], columns: Sequence[str], index: str) -> Any:
    try:
        import pandas
    except ImportError:
        raise ImportError("to_pandas needs pandas, which is not installed: pip install pandas") from None
    return pandas.DataFrame(rows, columns=list(columns)).set_index(index)


def _json(entry: object) -> str:
    return json.dumps(entry, ensure_ascii=False)


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else " " for each in text)
