"""Does an update on a database cost more when a variable has many versions, or the database many sessions?

The engine is in this process, with one caller.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from typing import Any

from benchmarks.files import NAMES, begin_session, carry_out, session_id, set_times
from benchmarks.load import Series, joined, ratios_of, run_alone
from benchmarks.plan import Plan
from benchmarks.table import Row, Target
from dspex_persist import connect
from dspex_persist.state.commands import Command
from dspex_persist.state.provider import StateProvider

_TITLES = {"postgresql": "PostgreSQL", "valkey": "Valkey"}
_NAME = NAMES[0]
_UPDATES = 25
"""Updates in a slice: few, so that the variable with the fewest versions still has few afterwards."""
_TOUCHED = 10
"""The number of sessions that are read after each start, spread over the database."""
_values = itertools.count()


def measure(plan: Plan, urls: Mapping[str, Sequence[str]]) -> list[Row]:
    """Fill two databases in each store, and measure them in turn.

    Args:
        plan: The sizes.
        urls: Two empty databases of each store.
    """
    print("distributed: filling the databases", file=sys.stderr, flush=True)
    if plan.together:
        for own in urls.values():
            fill(plan, *own)
    else:
        # Not forked: a fork after gRPC has started is not safe.
        with ProcessPoolExecutor(len(urls), mp_context=get_context("spawn")) as pool:
            for filled in [pool.submit(fill, plan, *own) for own in urls.values()]:
                filled.result()
    return [row for store, own in urls.items() for row in _Measurement(plan, store, *own).rows()]


def fill(plan: Plan, few: str, many: str) -> None:
    """Make a database with few sessions, one of which has a variable with many versions, and one with many sessions."""
    for url, count in zip((few, many), plan.stored_counts, strict=True):
        step = count // _TOUCHED
        with connect(url) as provider:
            sessions = (begin_session(number, NAMES[: number % step == 0]) for number in range(count))
            carry_out(provider, chain.from_iterable(sessions))
            if url == few:
                carry_out(provider, _with_versions(count, plan.stored_counts[1]))


def _with_versions(number: int, count: int) -> Iterator[Command[Any]]:
    yield from begin_session(number, (_NAME,))
    yield from set_times(number, _NAME, count)


class _Measurement:
    """The measurements of one store."""

    def __init__(self, plan: Plan, store: str, few: str, many: str) -> None:
        self._plan, self._store, self._urls = plan, store, (few, many)
        self._versions = {count: Series() for count in plan.stored_counts}
        self._sessions = {count: Series() for count in plan.stored_counts}
        self._touches_ms: dict[int, list[float]] = {count: [] for count in plan.stored_counts}
        # The sessions of the variables with few versions come after that with many.
        self._fresh_numbers = itertools.count(plan.stored_counts[0] + 1)

    def rows(self) -> list[Row]:
        """Measure, and return the rows."""
        print(f"distributed: few and many, {_TITLES[self._store]}", file=sys.stderr, flush=True)
        for _ in range(self._plan.rounds):
            self._run_round()
        few, many = self._plan.stored_counts
        title = _TITLES[self._store]
        words = "SetVariable of a variable with {:,} versions, " + title
        rows = self._update_rows("versions", words, self._versions)
        words = "SetVariable, {:,} sessions in the database, " + title
        rows += self._update_rows("sessions", words, self._sessions)
        for count, beside in ((few, None), (many, few)):
            touches_ms = self._touches_ms[count]
            rows.append(
                Row.of_rounds(
                    self._key("touch", count),
                    f"first touch of one of {count:,} sessions, {title}",
                    "ms",
                    touches_ms,
                    ratios_of(touches_ms, self._touches_ms[beside]) if beside is not None else (),
                    ratio_to=self._key("touch", beside) if beside is not None else "",
                )
            )
        return rows

    def _run_round(self) -> None:
        plan = self._plan
        with connect(self._urls[0]) as few, connect(self._urls[1]) as many:
            providers = dict(zip(plan.stored_counts, (few, many), strict=True))
            for count, provider in providers.items():
                step = count // _TOUCHED
                touches_ms = [1000 * _touch(provider, number * step) for number in range(_TOUCHED)]
                # The first one also pays for one-time work of the process, such as preparing the statements.
                self._touches_ms[count].append(statistics.median(touches_ms[1:]))
            turns = [self._take_turn(providers) for _ in range(plan.version_turns)]
        for index, series in enumerate((*self._versions.values(), *self._sessions.values())):
            series.slices.append(joined([turn[index] for turn in turns]))

    def _take_turn(self, providers: Mapping[int, StateProvider]) -> list[Any]:
        """Measure a variable with few versions, one with many, and one in each database."""
        few, many = self._plan.stored_counts
        fresh = next(self._fresh_numbers)
        carry_out(providers[few], _with_versions(fresh, few))
        return [
            _update(providers[few], fresh),
            _update(providers[few], few),
            _update(providers[few], 0),
            _update(providers[many], 0),
        ]

    def _key(self, what: str, count: int) -> str:
        return f"distributed.{what}.{self._store}.{count}"

    def _update_rows(self, what: str, words: str, series: Mapping[int, Series]) -> list[Row]:
        few, many = self._plan.stored_counts
        return [
            Row.of_rounds(
                self._key(what, count),
                words.format(count),
                "updates/s",
                series[count].rates,
                ratios_of(series[count].rates, series[few].rates) if count == many else (),
                p50_ms=series[count].percentile_ms(50),
                p99_ms=series[count].percentile_ms(99),
                ratio_to=self._key(what, few) if count == many else "",
                target=Target("ratio", "at least", 0.9) if count == many else None,
            )
            for count in (few, many)
        ]


def _touch(provider: StateProvider, number: int) -> float:
    began = time.perf_counter()
    provider.get_variable(session_id(number), _NAME)
    return time.perf_counter() - began


def _update(provider: StateProvider, number: int) -> Any:
    session = session_id(number)
    provider.get_variable(session, _NAME)
    return run_alone(lambda: provider.set_variable(session, _NAME, next(_values) / 4), _UPDATES)
