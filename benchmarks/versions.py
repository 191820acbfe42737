"""The cost of SetVariable for variables with few and with many versions."""

import itertools
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import dspex_persist
from benchmarks.files import NAMES, begin_session, carry_out, make_file, session_id, set_times
from benchmarks.load import Series, Slice, joined, ratios_of, run_alone
from benchmarks.plan import Plan
from benchmarks.table import Row, Target
from dspex_persist.state.commands import Command
from dspex_persist.state.provider import StateProvider

_UPDATES = 25
"""Updates in a slice: few, so that the variable with the fewest versions still has few afterwards."""
_NAME = NAMES[0]
_values = itertools.count()


def prepare(plan: Plan, path: Path) -> None:
    """Create the database, with a session for each count, whose variable has that many versions."""
    make_file(path, chain.from_iterable(itertools.starmap(_with_versions, enumerate(plan.version_counts))))


def _with_versions(number: int, count: int) -> Iterator[Command[Any]]:
    yield from begin_session(number, (_NAME,))
    yield from set_times(number, _NAME, count)


def measure(plan: Plan, path: Path) -> list[Row]:
    """Have one caller update the variables in turn. The variable with the fewest versions is a new one each time."""
    counts = plan.version_counts
    series = {count: Series() for count in counts}
    fresh_numbers = itertools.count(len(counts))
    with dspex_persist.connect(path) as provider:
        for _ in range(plan.rounds):
            parts: dict[int, list[Slice]] = {count: [] for count in counts}
            for _ in range(plan.version_turns):
                fresh = next(fresh_numbers)
                carry_out(provider, _with_versions(fresh, counts[0]))
                for number, count in enumerate(counts):
                    parts[count].append(_update(provider, number or fresh))
            for count in counts:
                series[count].slices.append(joined(parts[count]))
    return [_row_of(count, counts[0], series) for count in counts]


def _update(provider: StateProvider, number: int) -> Slice:
    session = session_id(number)
    provider.get_variable(session, _NAME)
    return run_alone(lambda: provider.set_variable(session, _NAME, next(_values) / 4), _UPDATES)


def _row_of(count: int, fewest: int, series: dict[int, Series]) -> Row:
    own, first = series[count], series[fewest]
    compared = count != fewest
    return Row.of_rounds(
        f"versions.{count}",
        f"SetVariable of a variable with {count:,} versions",
        "updates/s",
        own.rates,
        ratios_of(own.rates, first.rates) if compared else (),
        p50_ms=own.percentile_ms(50),
        p99_ms=own.percentile_ms(99),
        ratio_to=f"versions.{fewest}" if compared else "",
        target=Target("ratio", "at least", 0.9) if compared else None,
    )
