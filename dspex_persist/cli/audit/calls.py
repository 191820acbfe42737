"""The LM calls of an execution, for people: what a model was asked, what it answered, what that cost."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from dspex_persist.audit import ExecutionDetail, LmCall, LmUsage, LmUsageQuery, UsageBy, cost_text, lm_calls_of
from dspex_persist.cli.audit.rendering import STYLES, WHOLE, Column, Renderer, duration_text, shortened
from dspex_persist.cli.output import counted, plain, plain_lines

_SHOWN: Final = 1_500
"""How many characters of a message are shown without --full."""
_INDENT: Final = 2
_ROLES: Final = {"system": "dim", "user": "cyan", "assistant": "green", "tool": "magenta"}


def show_calls(execution: ExecutionDetail, look: Renderer, *, full: bool) -> None:
    """Print the LM calls of an execution and of those that it called. `full`: with the whole of each text."""
    from rich.text import Text

    summary = execution.summary
    title = Text.assemble(
        (plain(summary.tool), "bold"),
        f"  {plain(summary.execution_id)}  ",
        (summary.status.value, STYLES.get(summary.status, "")),
        f"  session {plain(summary.session_id)}",
    )
    calls = lm_calls_of(execution)
    look.print(title, totals_text(calls) if calls else "no LM calls are recorded")
    for call in calls:
        show_call(call, look, full=full)
    for child in execution.children:
        if lm_calls_of(child, children=True):
            look.print("")
            show_calls(child, look, full=full)


def totals_text(calls: Sequence[LmCall]) -> str:
    """Return a line with the sums of several calls."""
    costs = [call.cost for call in calls if call.cost is not None]
    taken = [call.latency_us for call in calls if call.latency_us is not None]
    failed, cached = sum(call.failed for call in calls), sum(call.cached is True for call in calls)
    facts = [
        counted(len(calls), "LM call"),
        *([f"{failed} failed"] if failed else []),
        *([f"{cached} from the cache"] if cached else []),
        _tokens_text(sum(call.input_tokens for call in calls), sum(call.output_tokens for call in calls)),
        *([cost_text(sum(costs))] if costs else []),
        *([duration_text(sum(taken))] if taken else []),
    ]
    return ", ".join(facts)


def _tokens_text(asked: int, answered: int) -> str:
    return f"{asked:,} tokens in, {answered:,} out"


def show_call(call: LmCall, look: Renderer, *, full: bool) -> None:
    """Print one call: its facts, its messages by role, its answers or its error."""
    from rich.text import Text

    look.print("", Text.assemble((f"call {call.ordinal}", "bold"), f"  {heading_of(call)}"))
    for line in facts_of(call, look):
        _say_below(look, Text(line, "dim"), 1)
    for message in call.messages:
        _say_text(look, message.role or "message", message.text, full)
    for answer in call.answers:
        _say_text(look, "answer", answer, full, "green")
    if call.failed:
        _say_text(look, "error", f"{call.error_type}: {call.error}", full, "red")


def heading_of(call: LmCall) -> str:
    """Return what tells calls apart at a glance."""
    facts = [
        plain(call.model),
        *([plain(call.predictor)] if call.predictor else []),
        *([_tokens_text(call.input_tokens, call.output_tokens)] if call.total_tokens else []),
        *([cost_text(call.cost)] if call.cost is not None else []),
        *([duration_text(call.latency_us)] if call.latency_us is not None else []),
        *(["from the cache"] if call.cached else []),
        *(["concurrent"] if call.concurrent else []),
    ]
    return "  ".join(facts)


def facts_of(call: LmCall, look: Renderer) -> Iterator[str]:
    """Yield the lines about when it was made, and with which options and variables."""
    if call.at is not None:
        yield f"began {look.full_time(call.at)}"
    if call.options:
        yield f"options: {', '.join(_option(name, option) for name, option in call.options.items())}"
    if call.variables:
        yield f"variables: {', '.join(f'{plain(name)} v{version}' for name, version in call.variables.items())}"


def _option(name: str, option: Any) -> str:
    return f"{plain(name)} = {plain(shortened(json.dumps(option, ensure_ascii=False), 200))}"


def _say_text(look: Renderer, role: str, text: str, full: bool, style: str = "") -> None:
    from rich.text import Text

    _say_below(look, Text(plain(role), style or _ROLES.get(role, "bold")), 1)
    _say_below(look, Text(plain_lines(text if full else shortened(text, _SHOWN, "--full"))), 2)


def _say_below(look: Renderer, line: Any, depth: int) -> None:
    from rich.padding import Padding

    look.print(Padding(line, (0, 0, 0, depth * _INDENT), expand=False))


def usage_columns(look: Renderer, query: LmUsageQuery) -> list[Column[LmUsage]]:
    """Sums of LM calls."""
    columns: list[Column[LmUsage]] = [
        Column("day", lambda row: row.day or "", least=10),
        Column("session", lambda row: plain(row.session_id or ""), least=8, is_id=True),
        Column("tool", lambda row: plain(row.tool or ""), least=8),
        Column("model", lambda row: plain(row.model or ""), least=8, most=60, is_id=True),
        _numbers("executions", lambda row: f"{row.executions:,}"),
        _numbers("calls", lambda row: f"{row.calls:,}"),
        _numbers("failed", lambda row: f"{row.failed:,}" if row.failed else "", is_rare=True),
        _numbers("cached", lambda row: f"{row.cached:,}" if row.cached else "", is_rare=True),
        _numbers("tokens in", lambda row: f"{row.input_tokens:,}"),
        _numbers("tokens out", lambda row: f"{row.output_tokens:,}"),
        _numbers("cost", lambda row: cost_text(row.cost)),
        _numbers("unpriced", _unpriced, is_rare=True),
        _numbers("took", lambda row: duration_text(row.latency_us)),
    ]
    left_out = set[str](UsageBy) - set(query.by)
    left_out |= {"executions", "took"} if look.is_narrow else set()
    return [column for column in columns if column.title not in left_out]


def _numbers(title: str, text: Callable[[LmUsage], str], *, is_rare: bool = False) -> Column[LmUsage]:
    return Column(title, text, least=WHOLE, right=True, is_rare=is_rare)


def _unpriced(row: LmUsage) -> str:
    """Return of how many calls the cost is unknown, if it is known of others."""
    return f"{row.calls - row.priced:,}" if 0 < row.priced < row.calls else ""
