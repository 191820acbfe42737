"""Two executions' LM calls, or two versions of a variable, for people."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from dspex_persist.audit import (
    CallComparison,
    ExecutionDetail,
    LmCall,
    PartComparison,
    VersionComparison,
    compare_calls,
    cost_text,
    lm_calls_of,
)
from dspex_persist.cli.audit.rendering import ABSENT, MASK, STYLES, Renderer, duration_text, shortened
from dspex_persist.cli.audit.tables import author_and_client, why
from dspex_persist.cli.output import plain

_COLOURS: Final = {"-": "red", "+": "green", "…": "dim"}
_SHOWN: Final = 500
"""How many characters of a line are shown without --full."""


def compare_executions(before: ExecutionDetail, after: ExecutionDetail) -> tuple[CallComparison, ...]:
    """Compare the LM calls of two executions, with those of the executions that they called."""
    return compare_calls(lm_calls_of(before, children=True), lm_calls_of(after, children=True))


def show_comparison(before: ExecutionDetail, after: ExecutionDetail, look: Renderer, *, full: bool) -> None:
    """Print the LM calls of two executions side by side, and the text that differs."""
    from rich.text import Text

    for sign, execution in (("-", before), ("+", after)):
        summary = execution.summary
        began = f"  {look.time(summary.began_at)}  session {plain(summary.session_id)}"
        look.print(
            Text.assemble(
                (f"{sign} {plain(summary.execution_id)}", _COLOURS[sign]),
                (f"  {plain(summary.tool)}  ", "bold"),
                (summary.status.value, STYLES.get(summary.status, "")),
                began,
            )
        )
    pairs = compare_executions(before, after)
    if not pairs:
        look.print("no LM calls are recorded in either of them")
    for pair in pairs:
        look.print("", Text(_title(pair), "bold"))
        if pair.before is not None and pair.after is not None:
            look.print(_facts(pair.before, pair.after))
        parts = pair.parts if full else pair.differences
        for part in parts:
            _show_part(part, look, full=full)
        if not pair.differences:
            look.print("  the same request and the same answer")


def _title(pair: CallComparison) -> str:
    if pair.before is None or pair.after is None:
        call, only = (pair.after, "after") if pair.before is None else (pair.before, "before")
        return f"call {call.ordinal} of {plain(call.tool)}, only {only}" if call is not None else ""
    one, other = pair.before, pair.after
    places = f"call {one.ordinal}" if one.ordinal == other.ordinal else f"calls {one.ordinal} and {other.ordinal}"
    return f"{places}  {plain(other.tool)}{f'  {plain(other.predictor)}' if other.predictor else ''}"


def _facts(before: LmCall, after: LmCall) -> Any:
    """Return a table with what was measured of both."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2))
    for title in ("", "before", "after"):
        table.add_column(title, justify="right" if title else "left")
    for name, measure in _MEASURES.items():
        texts = measure(before), measure(after)
        if any(texts):
            table.add_row(name, *(text or ABSENT for text in texts))
    return table


_MEASURES: Final[Mapping[str, Callable[[LmCall], str]]] = {
    "tokens in": lambda call: f"{call.input_tokens:,}",
    "tokens out": lambda call: f"{call.output_tokens:,}",
    "cost": lambda call: cost_text(call.cost),
    "took": lambda call: "" if call.latency_us is None else duration_text(call.latency_us),
    "from the cache": lambda call: "yes" if call.cached else "",
}


def _show_part(part: PartComparison, look: Renderer, *, full: bool) -> None:
    from rich.text import Text

    look.print(Text(f"  {plain(part.name)}", "cyan"))
    _show_lines(part.diff(len(part.rows)) if full else part.diff(), look, full=full, indent=4)


def _show_lines(lines: Sequence[str], look: Renderer, *, full: bool, indent: int) -> None:
    from rich.padding import Padding
    from rich.text import Text

    for line in lines:
        text = plain(line if full else shortened(line, _SHOWN, "--full"))
        look.print(Padding(Text(text, _COLOURS.get(line[0], "")), (0, 0, 0, indent), expand=False))


def show_versions(comparison: VersionComparison, look: Renderer, *, full: bool) -> None:
    """Print the lines that differ between two versions of a variable."""
    from rich.text import Text

    before, after = comparison.before, comparison.after
    look.print(Text(f"{plain(after.name)} of session {plain(after.session_id)}", "bold"))
    for sign, entry in (("-", before), ("+", after)):
        when = f"{look.time(entry.created_at)}, by {author_and_client(entry)}{why(entry)}"
        look.print(Text(f"{sign} version {entry.version}  {when}", _COLOURS[sign]))
    if before.masked or after.masked:
        look.print(f"its values are masked: {MASK}")
        return
    part = PartComparison(after.name, comparison.rows)
    _show_lines(part.diff(len(part.rows)) if full else part.diff(), look, full=full, indent=0)
