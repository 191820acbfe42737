"""The rows of the run, as text, as JSON and in the documentation."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

BEGIN = "<!-- bench: what follows is written by `python -m benchmarks.run --docs` -->"
END = "<!-- bench: end -->"

_COLUMNS = ("what", "measured", "p50 ms", "p99 ms", "ratio", "target", "")


@dataclass(frozen=True, slots=True)
class Target:
    """What a row should reach: its `ratio` or its `value`, at least or at most `bound`."""

    of: Literal["value", "ratio"]
    sense: Literal["at least", "at most"]
    bound: float

    def is_met(self, row: "Row") -> bool:
        """Whether the row reaches it."""
        measured = row.value if self.of == "value" else row.ratio
        if measured is None:
            return False
        return measured >= self.bound if self.sense == "at least" else measured <= self.bound

    def __str__(self) -> str:
        return f"{'ratio ' if self.of == 'ratio' else ''}{'≥' if self.sense == 'at least' else '≤'} {self.bound:,g}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `key` names it for machines; `ratio` is to the row `ratio_to`, in the same run."""

    key: str
    what: str
    value: float
    unit: str
    p50_ms: float | None = None
    p99_ms: float | None = None
    ratio: float | None = None
    ratio_to: str = ""
    target: Target | None = None

    @property
    def section(self) -> str:
        """The part of the run that it belongs to."""
        return self.key.partition(".")[0]

    @property
    def verdict(self) -> Literal["met", "missed", ""]:
        """Whether the target was reached; nothing where there is none."""
        if self.target is None:
            return ""
        return "met" if self.target.is_met(self) else "missed"


def format_table(rows: Sequence[Row]) -> str:
    """The rows in aligned columns."""
    lines = [_COLUMNS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(_aligned(line, widths).rstrip() for line in lines)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
    padded[1:5] = [cell.rjust(width) for cell, width in zip(cells[1:5], widths[1:5], strict=True)]
    return "  ".join(padded)


def format_markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; missed targets stand out."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---|--:|--:|--:|--:|---|---|"]
    for row in rows:
        cells = _cells(row)
        verdict = f"**{cells[-1]}**" if cells[-1] == "missed" else cells[-1]
        lines.append("| " + " | ".join((*cells[:-1], verdict)) + " |")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.what,
        f"{_number(row.value)} {row.unit}",
        _number(row.p50_ms),
        _number(row.p99_ms),
        "" if row.ratio is None else f"{row.ratio:.2f}",
        "" if row.target is None else str(row.target),
        row.verdict,
    )


def _number(value: float | None) -> str:
    """Three digits are all that a benchmark is good for; whole numbers from 100 up."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def as_json(rows: Sequence[Row], run: dict[str, Any]) -> dict[str, Any]:
    """The run for machines: `run` says what the numbers depend on."""
    return {"run": run, "rows": [{**asdict(row), "verdict": row.verdict} for row in rows]}


def rewrite_docs(page: Path, text: str) -> None:
    """Put `text` between the marks of `page`; ValueError if it has none."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no place for the table: it lies between the lines {BEGIN!r} and {END!r}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
