"""The rows of a run as text, as JSON and in the documentation."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

BEGIN = "<!-- bench: what follows is written by `python -m benchmarks.run --docs` -->"
END = "<!-- bench: end -->"
WIDTH = 120
"""The largest width of a printed table, in characters."""

_COLUMNS = ("what", "measured", "p50 ms", "p99 ms", "ratio", "target", "")


@dataclass(frozen=True, slots=True)
class Target:
    """The target of a row: its `ratio` or its `value` must be at least or at most `bound`."""

    of: Literal["value", "ratio"]
    sense: Literal["at least", "at most"]
    bound: float

    def is_met(self, row: "Row") -> bool:
        """Return whether the row meets the target."""
        measured = row.value if self.of == "value" else row.ratio
        if measured is None:
            return False
        return measured >= self.bound if self.sense == "at least" else measured <= self.bound

    def __str__(self) -> str:
        return f"{'ratio ' if self.of == 'ratio' else ''}{'≥' if self.sense == 'at least' else '≤'} {self.bound:,g}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `key` names it for machines; `ratio` is to the row `ratio_to`, in the same run.

    `rounds` and `ratio_rounds` are what single rounds measured of `value` and of `ratio`: how far they lie apart tells
    what is noise. They are empty where there are no rounds.
    """

    key: str
    what: str
    value: float
    unit: str
    p50_ms: float | None = None
    p99_ms: float | None = None
    ratio: float | None = None
    ratio_to: str = ""
    target: Target | None = None
    rounds: tuple[float, ...] = ()
    ratio_rounds: tuple[float, ...] = ()

    @classmethod
    def of_rounds(
        cls, key: str, what: str, unit: str, rounds: Sequence[float], ratios: Sequence[float] = (), **others: Any
    ) -> "Row":
        """A row of medians over its rounds, and over the ratios of the rounds if there are any."""
        ratio = statistics.median(ratios) if ratios else None
        every: dict[str, Any] = {"rounds": tuple(rounds), "ratio_rounds": tuple(ratios), **others}
        return cls(key, what, statistics.median(rounds), unit, ratio=ratio, **every)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Row":
        """The row of `as_json`. KeyError, TypeError or ValueError if it is not one."""
        fields = {name: value for name, value in saved.items() if name in cls.__dataclass_fields__}
        fields["target"] = Target(**saved["target"]) if saved["target"] else None
        for name in ("rounds", "ratio_rounds"):
            fields[name] = tuple(map(float, saved.get(name, ())))
        return cls(**fields)

    @property
    def section(self) -> str:
        """The part of the run that it belongs to."""
        return self.key.partition(".")[0]

    @property
    def more_is_better(self) -> bool:
        """Whether a larger value, or ratio, is the better one: that of a rate is, one of time or of bytes is not."""
        return self.unit.endswith("/s")

    @property
    def verdict(self) -> Literal["met", "missed", ""]:
        """Whether the target was met; "" without a target."""
        if self.target is None:
            return ""
        return "met" if self.target.is_met(self) else "missed"


def format_table(rows: Sequence[Row]) -> str:
    """Return the rows in aligned columns."""
    return aligned(_COLUMNS, list(map(_cells, rows)), numbers=range(1, 5))


def format_verdicts(rows: Sequence[Row]) -> str:
    """Return how many targets the rows meet; empty if none has a target."""
    verdicts = [row.verdict for row in rows]
    if not any(verdicts):
        return ""
    return f"Targets: {verdicts.count('met')} met, {verdicts.count('missed')} missed"


def aligned(header: Sequence[str], lines: Sequence[Sequence[str]], *, numbers: Sequence[int]) -> str:
    """Return the lines below their header, at most WIDTH wide: wraps the first column, right-aligns `numbers`."""
    others = [max(map(len, column)) for column in list(zip(header, *lines, strict=True))[1:]]
    longest = max(len(line[0]) for line in (header, *lines))
    first = min(longest, WIDTH - sum(others) - 2 * len(others))
    widths = [first, *others]
    texts: list[str] = []
    for cells in (header, ["-" * width for width in widths], *lines):
        *wrapped, last = textwrap.wrap(cells[0], first, subsequent_indent="  ") or [""]
        padded = [last.ljust(first)]
        for index, (cell, width) in enumerate(zip(cells[1:], others, strict=True), start=1):
            padded.append(cell.rjust(width) if index in numbers else cell.ljust(width))
        texts += [*wrapped, "  ".join(padded).rstrip()]
    return "\n".join(texts)


def format_markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table with missed targets in bold."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---|--:|--:|--:|--:|---|---|"]
    for row in rows:
        cells = _cells(row)
        verdict = f"**{cells[-1]}**" if cells[-1] == "missed" else cells[-1]
        lines.append("| " + " | ".join((*cells[:-1], verdict)) + " |")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.what,
        f"{number(row.value)} {row.unit}",
        number(row.p50_ms),
        number(row.p99_ms),
        "" if row.ratio is None else f"{row.ratio:.2f}",
        "" if row.target is None else str(row.target),
        row.verdict,
    )


def number(value: float | None) -> str:
    """Return a number with three significant digits, or as an integer from 100 up; "" for None."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"


def as_json(rows: Sequence[Row], run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run as JSON; `run` describes the environment."""
    return {"run": dict(run), "rows": [{**asdict(row), "verdict": row.verdict} for row in rows]}


def rewrite_docs(page: Path, text: str) -> None:
    """Replace the text between the marks of `page`; raise ValueError if it has none."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no place for the table, between the lines {BEGIN!r} and {END!r}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
