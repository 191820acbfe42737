"""The engine in this process, called by threads and asyncio tasks, compared with bare sqlite3 on the same disk."""

import asyncio
import itertools
import sqlite3
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dspex_persist
from benchmarks.files import NAMES, begin_session, carry_out, session_id, value_of
from benchmarks.load import Series, Slice, ratios_of, run_tasks, run_threads
from benchmarks.plan import BATCH, CALLERS, Plan
from benchmarks.rpc import check_versions
from benchmarks.table import Row, Target
from dspex_persist.state.commands import SetVariable, SetVariables
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.values import decode


@dataclass(slots=True)
class _Work:
    """One kind of load. A call writes or reads `values` values. It is compared with the work that has key `beside`."""

    key: str
    what: str
    unit: str
    run: Callable[[float], Slice]
    values: int = 1
    beside: str = ""
    target_per_s: float | None = None
    series: Series = field(default_factory=Series)

    def values_per_s(self) -> list[float]:
        """Return values per second, round by round."""
        return [rate * self.values for rate in self.series.rates]


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Measure all works in turn, round by round, then check that the file has all acknowledged writes."""
    path = folder / "engine.db"
    newest: dict[int, int] = {}
    with dspex_persist.connect(path) as provider, _Bare(folder / "bare.db") as bare:
        for number in range(CALLERS):
            carry_out(provider, begin_session(number))
        works = [*_references(bare), *_works(provider, newest)]
        for count in range(plan.rounds):
            print(f"engine: round {count + 1} of {plan.rounds}", file=sys.stderr, flush=True)
            for work in works:
                work.series.slices.append(work.run(plan.slice_s))
    check_versions(path, newest)
    return [_row_of(work, works) for work in works]


def _row_of(work: _Work, works: Sequence[_Work]) -> Row:
    beside = next((other for other in works if other.key == work.beside), None)
    rates = work.values_per_s()
    return Row.of_rounds(
        f"engine.{work.key}",
        work.what,
        work.unit,
        rates,
        ratios_of(rates, beside.values_per_s()) if beside is not None else (),
        p50_ms=work.series.percentile_ms(50),
        p99_ms=work.series.percentile_ms(99),
        ratio_to=f"engine.{beside.key}" if beside is not None else "",
        target=Target("value", "at least", work.target_per_s) if work.target_per_s is not None else None,
    )


class _Bare:
    """Durable inserts without anything else: the limit of this disk and this SQLite."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("CREATE TABLE versions (key INTEGER PRIMARY KEY, value TEXT)")

    def __enter__(self) -> "_Bare":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def insert(self, rows: int) -> None:
        """Insert `rows` rows in one transaction."""
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany("INSERT INTO versions (value) VALUES (?)", [("0.25",)] * rows)
        self._connection.execute("COMMIT")


def _references(bare: _Bare) -> list[_Work]:
    def inserting(rows: int) -> Callable[[float], Slice]:
        return lambda seconds: run_threads(lambda _: bare.insert(rows), 1, seconds)

    return [
        _Work("sqlite3.1", "bare sqlite3, 1 row a commit", "rows/s", inserting(1)),
        _Work(f"sqlite3.{CALLERS}", f"bare sqlite3, {CALLERS} rows a commit", "rows/s", inserting(CALLERS), CALLERS),
    ]


def _works(provider: StateProvider, newest: dict[int, int]) -> list[_Work]:
    numbers = itertools.count()

    def set_one(caller: int) -> None:
        newest[caller] = provider.set_variable(session_id(caller), NAMES[0], next(numbers) / 4)

    def set_all(caller: int) -> None:
        values = dict.fromkeys(NAMES, next(numbers) / 4)
        newest[caller] = provider.set_variables(session_id(caller), values, atomic=True).versions[NAMES[0]]

    async def set_one_in_task(caller: int) -> None:
        command = SetVariable(session_id(caller), NAMES[0], value_of(next(numbers)))
        newest[caller] = await asyncio.wrap_future(provider.submit(command))

    async def set_all_in_task(caller: int) -> None:
        values = dict.fromkeys(NAMES, value_of(next(numbers)))
        command = SetVariables(session_id(caller), values, {}, True)
        newest[caller] = (await asyncio.wrap_future(provider.submit(command))).versions[NAMES[0]]

    def get(caller: int) -> None:
        provider.get_variable(session_id(caller), NAMES[0])

    def get_all(caller: int) -> None:
        for variable in provider.list_variables(session_id(caller)):
            decode(variable.type, variable.value)

    def in_threads(call: Callable[[int], object], callers: int) -> Callable[[float], Slice]:
        return lambda seconds: run_threads(call, callers, seconds)

    def in_tasks(call: Callable[[int], Any]) -> Callable[[float], Slice]:
        return lambda seconds: _run_on_uvloop(call, seconds)

    one, many = "sqlite3.1", f"sqlite3.{CALLERS}"
    batches = f"SetVariables of {BATCH}"
    threads, tasks = f"{CALLERS} threads", f"{CALLERS} asyncio tasks"
    return [
        _Work("SetVariable.1", "SetVariable, 1 caller", "updates/s", in_threads(set_one, 1), 1, one),
        _Work(
            "SetVariable.threads", f"SetVariable, {threads}", "updates/s", in_threads(set_one, CALLERS), 1, many, 10_000
        ),
        _Work("SetVariable.tasks", f"SetVariable, {tasks}", "updates/s", in_tasks(set_one_in_task), 1, many, 14_000),
        _Work("SetVariables.1", f"{batches}, 1 caller", "values/s", in_threads(set_all, 1), BATCH, "", 20_000),
        _Work(
            "SetVariables.threads",
            f"{batches}, {threads}",
            "values/s",
            in_threads(set_all, CALLERS),
            BATCH,
            many,
            35_000,
        ),
        _Work("SetVariables.tasks", f"{batches}, {tasks}", "values/s", in_tasks(set_all_in_task), BATCH, many, 35_000),
        _Work("GetVariable.1", "GetVariable, 1 caller", "reads/s", in_threads(get, 1)),
        _Work("GetVariable.threads", f"GetVariable, {threads}", "reads/s", in_threads(get, CALLERS)),
        _Work(
            "values.1", f"values of all {BATCH} variables, 1 caller", "reads/s", in_threads(get_all, 1), 1, "", 46_000
        ),
    ]


def _run_on_uvloop(call: Callable[[int], Any], seconds: float) -> Slice:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run_tasks(call, CALLERS, seconds))
