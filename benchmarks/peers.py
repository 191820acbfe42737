"""dspex-persist compared with similar libraries on the same work, in process: `make peers`; see `--help`.

Each session has 20 small float variables, all in one SQLite file, or one database of a PostgreSQL server that this run
starts. Each caller works on its own session.

- update: one variable is set per operation, durable when the call returns
- batch:  all 20 variables are set in one durable operation
- read:   the current values of all 20 variables, after a few updates of that session
- execute: code that sets one variable is executed durably: its beginning, its result and its end are on record when
  the call returns. For dspex-persist that is a tool in its transaction, for DBOS a workflow of one step, its purpose.
  The others have nothing comparable, and DBOS has no variables.

What is on PostgreSQL is compared with dspex-persist on PostgreSQL.

64 callers do each of them concurrently, and one does each alone: the first shows how a library handles concurrency,
such as by group commit, the second what an operation costs. Then one caller continues a session that has a long history
already: update as before, and load, which opens the file and reads the 20 values.

Each library runs in its own process, because imports of others would slow its garbage collection (and ours in the
checkout's .venv, because its requirements differ), and each measurement uses a new file. What there is after the warm-
up is frozen, as servers do, so that full collections do not look at all that was imported. Afterwards the file is
opened again and every session is read, so that only values that are really there count.

Exit code: 0 when every installed library was measured, 1 when one failed (its row says why).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.disk import IN_MEMORY, filesystem_of, sync_times_s
from benchmarks.interpreter import describe_build
from benchmarks.libraries import (
    MOST_SESSIONS,
    NAMES,
    ON_SQLITE,
    OPERATIONS,
    OURS,
    ZEROES,
    AnyAdapter,
    Operation,
    State,
    TaskAdapter,
    ThreadAdapter,
)
from benchmarks.libraries_on_postgresql import ON_POSTGRESQL, OURS_ON_POSTGRESQL, URL
from benchmarks.load import percentile_ms
from benchmarks.table import WIDTH, Row, Target, aligned, format_table, number

WARM_UPDATES = 5
LOADS = 3
"""How often a file with a long history is opened; the result is the median."""
SESSIONS = tuple(f"caller-{index:02d}" for index in range(MOST_SESSIONS))
ROOT = Path(__file__).resolve().parents[1]
NOT_INSTALLED = "not installed: make peers"
ADAPTERS = {**ON_SQLITE, **ON_POSTGRESQL}


# ---- the work ----


@dataclass(frozen=True, slots=True)
class Work:
    """An operation, done by so many callers at once, each on a session with so many updates behind it."""

    operation: Operation
    callers: int
    updates: int = WARM_UPDATES

    @property
    def key(self) -> str:
        """Its name for machines."""
        history = f".after{self.updates}" if self.updates != WARM_UPDATES else ""
        return f"{self.operation}.{self.callers}{history}"

    @property
    def has_history(self) -> bool:
        """Whether loading counts, too."""
        return self.updates != WARM_UPDATES

    @property
    def sessions(self) -> Sequence[str]:
        """The sessions of its callers."""
        return SESSIONS[: self.callers]


def works_of(adapter: type[AnyAdapter], history: int) -> list[Work]:
    """What is measured of a library. `history`: the updates of the session with a long one; 0: none."""
    works = [Work(operation, callers) for callers in (MOST_SESSIONS, 1) for operation in adapter.operations]
    if history and "update" in adapter.operations:
        works.append(Work("update", 1, history))
    return works


@dataclass(frozen=True, slots=True)
class Tally:
    """What each caller completed after the warm-up, and the time until the last of them was done."""

    operations: tuple[int, ...]
    elapsed_s: float

    @property
    def operations_per_s(self) -> float:
        return sum(self.operations) / self.elapsed_s


def expected_state(operation: Operation, updates: int) -> State:
    """The state of a session after that many operations of `write_operation`, the warm-up included."""
    if operation == "batch" and updates:
        return dict.fromkeys(NAMES, float(updates))
    state = dict(ZEROES)
    for count in range(max(1, updates - len(NAMES) + 1), updates + 1):
        state[NAMES[count % len(NAMES)]] = float(count)
    return state


def write_operation(adapter: Any, operation: Operation, session: str) -> Callable[[int], Any]:
    """The count-th write of a caller; for a TaskAdapter it returns an awaitable."""
    if operation == "batch":
        return lambda count: adapter.update_many(session, dict.fromkeys(NAMES, float(count)))
    if operation == "execute":
        return lambda count: adapter.execute(session, NAMES[count % len(NAMES)], float(count))
    return lambda count: adapter.update(session, NAMES[count % len(NAMES)], float(count))


def timed_operation(adapter: Any, operation: Operation, session: str) -> Callable[[int], Any]:
    """The operation that is counted: a read where reads are measured, else the next write."""
    if operation == "read":
        return lambda _: adapter.read(session)
    return write_operation(adapter, operation, session)


def freeze() -> None:
    """Spare the garbage collector what is there already, as servers do."""
    gc.collect()
    gc.freeze()


def run_threads(adapter: ThreadAdapter, work: Work, seconds: float) -> Tally:
    """Drive a thread for each caller for that long. Raises what the first failing caller raised."""

    def warm(session: str) -> None:
        write = write_operation(adapter, work.operation, session)
        for count in range(1, work.updates + 1):
            write(count)

    def call(session: str) -> int:
        operation, count = timed_operation(adapter, work.operation, session), work.updates
        while time.perf_counter() < deadline:
            count += 1
            operation(count)
        return count - work.updates

    with ThreadPoolExecutor(work.callers) as callers:
        list(callers.map(warm, work.sessions))
        freeze()
        began = time.perf_counter()
        deadline = began + seconds
        operations = tuple(callers.map(call, work.sessions))
        return Tally(operations, time.perf_counter() - began)


async def run_tasks(adapter: TaskAdapter, work: Work, seconds: float) -> Tally:
    """The same with tasks."""

    async def warm(session: str) -> None:
        write = write_operation(adapter, work.operation, session)
        for count in range(1, work.updates + 1):
            await write(count)

    async def call(session: str) -> int:
        operation, count = timed_operation(adapter, work.operation, session), work.updates
        while time.perf_counter() < deadline:
            count += 1
            await operation(count)
        return count - work.updates

    await asyncio.gather(*map(warm, work.sessions))
    freeze()
    began = time.perf_counter()
    deadline = began + seconds
    operations = tuple(await asyncio.gather(*map(call, work.sessions)))
    return Tally(operations, time.perf_counter() - began)


@dataclass(frozen=True, slots=True)
class Reopened:
    """The state of each session in the reopened file, and the median time to open and read the file, in seconds."""

    states: Sequence[State]
    load_s: float


def measure_threads(adapter: ThreadAdapter, path: Path, work: Work, seconds: float) -> tuple[Tally, Reopened]:
    """Measure the callers, close the file, and open it again; return the tally and the reopened file's contents."""
    adapter.open(path, work.sessions)
    try:
        tally = run_threads(adapter, work, seconds)
    finally:
        adapter.close()
    times_s: list[float] = []
    states: list[State] = []
    for _ in range(LOADS if work.has_history else 1):
        began = time.perf_counter()
        adapter.open(path, work.sessions)
        try:
            states = [adapter.read(session) for session in work.sessions]
            times_s.append(time.perf_counter() - began)
        finally:
            adapter.close()
    return tally, Reopened(states, statistics.median(times_s))


async def measure_tasks(adapter: TaskAdapter, path: Path, work: Work, seconds: float) -> tuple[Tally, Reopened]:
    """See measure_threads."""
    await adapter.open(path, work.sessions)
    try:
        tally = await run_tasks(adapter, work, seconds)
    finally:
        await adapter.close()
    times_s: list[float] = []
    states: list[State] = []
    for _ in range(LOADS if work.has_history else 1):
        began = time.perf_counter()
        await adapter.open(path, work.sessions)
        try:
            states = [await adapter.read(session) for session in work.sessions]
            times_s.append(time.perf_counter() - began)
        finally:
            await adapter.close()
    return tally, Reopened(states, statistics.median(times_s))


def check_states(work: Work, tally: Tally, states: Sequence[State]) -> None:
    """Raise RuntimeError if the file lacks the last acknowledged value of a caller."""
    for session, operations, state in zip(work.sessions, tally.operations, states, strict=True):
        written = work.updates + (0 if work.operation == "read" else operations)
        wanted = expected_state(work.operation, written)
        if state != wanted:
            raise RuntimeError(f"{session}: read back {state}, acknowledged was {wanted}")


# ---- one library, in its own process ----


def measure_work(adapter: AnyAdapter, path: Path, work: Work, seconds: float) -> dict[str, float]:
    """Measure a work, then open the file again and check that it holds every acknowledged value.

    Returns:
        Operations per second by the key of the work; with a long history, also the seconds of a load.

    Raises:
        RuntimeError: An acknowledged value is missing.
    """
    if isinstance(adapter, TaskAdapter):
        tally, reopened = asyncio.run(measure_tasks(adapter, path, work, seconds))
    else:
        tally, reopened = measure_threads(adapter, path, work, seconds)
    check_states(work, tally, reopened.states)
    load = {load_key(work.updates): reopened.load_s} if work.has_history else {}
    return {work.key: tally.operations_per_s, **load}


def load_key(updates: int) -> str:
    """The name, for machines, of a load of a session with such a history."""
    return f"load.after{updates}"


def measure_library(key: str, seconds: float, history: int, directory: Path) -> dict[str, Any]:
    """Measure the works of one library in this process; the answer fits JSON, errors are part of it."""
    adapter = ADAPTERS[key]()
    try:
        answer: dict[str, Any] = {"version": version(adapter.distribution), "figures": {}}
        for work in works_of(type(adapter), history):
            with tempfile.TemporaryDirectory(prefix="peers-", dir=directory) as folder:
                path = Path(folder, "sessions.db")
                answer["figures"].update(measure_work(adapter, path, work, seconds))
                answer["durability"] = adapter.describe_durability(path)
    except (PackageNotFoundError, ImportError) as error:
        return {"status": NOT_INSTALLED, "reason": str(error)}
    except Exception as error:  # noqa: BLE001  # the edge of this process: the parent prints the reason
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    return {"status": "measured", **answer}


def raise_open_files_limit() -> None:
    """openai-agents holds a connection for each pair of session and worker thread: several hundred."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def python_of(key: str) -> str:
    """The interpreter with a library: this one, and for ours that of the checkout if there is one."""
    own = ROOT / ".venv" / "bin" / "python"
    return str(own) if key in (OURS, OURS_ON_POSTGRESQL) and own.exists() else sys.executable


@contextmanager
def running_postgresql(directory: Path) -> Iterator[str]:
    """Run PostgreSQL, by the interpreter of the checkout, which has it; yield its URL.

    Raises:
        RuntimeError: It did not start.
    """
    command = [python_of(OURS_ON_POSTGRESQL), "-m", "benchmarks.engines", "--directory", str(directory)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as engine:
        assert engine.stdout is not None, "it is a pipe"
        url = engine.stdout.readline().strip()
        if not url:
            raise RuntimeError("PostgreSQL did not start; it is a package of the extra dev: make setup")
        # Leaving this block closes the pipes, and waits: it ends when its standard input does.
        yield url


def run_library(key: str, seconds: float, history: int, directory: Path) -> dict[str, Any]:
    """Measure one library in a fresh process and return its answer."""
    with tempfile.TemporaryDirectory(prefix="peers-", dir=directory) as folder:
        answer = Path(folder, "answer.json")
        command = [python_of(key), "-m", "benchmarks.peers", "--measure", key]
        command += ["--seconds", str(seconds), "--history", str(history), "--directory", folder, "--json", str(answer)]
        # Some libraries take 20 ms for an update where the disk is slow.
        patience_s = 180 + 16 * seconds + 0.1 * history
        try:
            env = {**os.environ, "PYTHONPATH": str(ROOT)}
            ended = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=patience_s, env=env, check=False)
        except subprocess.TimeoutExpired:
            return {"status": "failed", "reason": f"did not end within {patience_s:.0f} s"}
        if not answer.exists():
            return {"status": "failed", "reason": f"its process ended with exit code {ended.returncode}"}
        loaded: dict[str, Any] = json.loads(answer.read_text())
        return loaded


# ---- all of them, and the report ----


@dataclass(slots=True)
class Result:
    """One library over all rounds. `figures` holds operations a second, or seconds of a load, one entry a round."""

    key: str
    status: str = NOT_INSTALLED
    reason: str = ""
    version: str = ""
    durability: str = ""
    figures: dict[str, list[float]] = field(default_factory=dict)

    def add_round(self, answer: Mapping[str, Any]) -> None:
        self.status = answer["status"]
        self.reason = answer.get("reason", "")
        if self.status == "measured":
            self.version, self.durability = answer["version"], answer["durability"]
            for key, figure in answer["figures"].items():
                self.figures.setdefault(key, []).append(figure)

    def median(self, key: str) -> float | None:
        """The figure, or None where a round is missing or the library does no such work."""
        return statistics.median(self.figures[key]) if self.status == "measured" and key in self.figures else None

    def ratio_to(self, ours: Result | None, key: str) -> float | None:
        mine, reference = self.median(key), ours.median(key) if ours else None
        return mine / reference if mine is not None and reference else None


def run_rounds(keys: Sequence[str], rounds: int, seconds: float, history: int, directory: Path) -> list[Result]:
    """Round by round over all libraries, so that a change of the machine's mood meets them alike. Only the first round
    has a long history: some libraries take minutes to write it."""
    results = [Result(key) for key in keys]
    for number_of_round in range(1, rounds + 1):
        for result in results:
            if number_of_round > 1 and result.status != "measured":
                continue
            print(f"round {number_of_round} of {rounds}: {ADAPTERS[result.key].title}", file=sys.stderr, flush=True)
            result.add_round(run_library(result.key, seconds, history if number_of_round == 1 else 0, directory))
    return results


def describe_run(chosen: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """What the numbers depend on."""
    syncs_s = sync_times_s(directory, 50)
    return {
        "sync_ms": {"p50": percentile_ms(syncs_s, 50), "p99": percentile_ms(syncs_s, 99)},
        "python": platform.python_version(),
        "built": describe_build().how,
        "sqlite": sqlite3.sqlite_version,
        "cpus": os.cpu_count(),
        "filesystem": filesystem_of(directory),
        "variables_per_session": len(NAMES),
        "updates_before_reads": WARM_UPDATES,
        "history": chosen.history,
        "seconds": chosen.seconds,
        "rounds": chosen.rounds,
    }


def format_figure(value: float | None) -> str:
    return number(value) or "-"


def format_operations(results: Sequence[Result], callers: int) -> str:
    """The table of all operations by so many callers: operations a second (of batches, values), and ratios."""
    header = [f"{callers} caller{'s' if callers > 1 else ''}"]
    for operation in OPERATIONS:
        header += ["values/s" if operation == "batch" else f"{operation}/s", "of ours"]
    lines = []
    for result in results:
        cells = [f"{ADAPTERS[result.key].title} {result.version}"]
        for operation in OPERATIONS:
            key = Work(operation, callers).key
            rate = result.median(key)
            shown = rate and rate * (len(NAMES) if operation == "batch" else 1)
            cells += [format_figure(shown), format_figure(result.ratio_to(find_ours(results, result), key))]
        lines.append(cells)
    return aligned(header, lines, numbers=range(1, len(header)))


def format_history(results: Sequence[Result], history: int) -> str:
    """The table of the session with a long history."""
    load, update = load_key(history), Work("update", 1, history).key
    header = (f"1 caller, {history:,} updates before", "load ms", "of ours", "update/s", "of ours")
    lines = []
    for result in results:
        load_s = result.median(load)
        if load_s is not None:
            title, ours = f"{ADAPTERS[result.key].title} {result.version}", find_ours(results, result)
            figures = (1000 * load_s, result.ratio_to(ours, load), result.median(update), result.ratio_to(ours, update))
            lines.append([title, *map(format_figure, figures)])
    return aligned(header, lines, numbers=range(1, len(header)))


def target_rows(results: Sequence[Result]) -> list[Row]:
    """The targets of dspex-persist compared with the others."""
    measured = {result.key: result for result in results if result.status == "measured"}
    rows = []
    for reference, operation, callers, keys, least in (
        (OURS, "update", 1, [key for key in measured if key in ON_SQLITE and key not in (OURS, "dbos")], 1.0),
        (OURS, "execute", MOST_SESSIONS, ["dbos"], 10.0),
        (OURS, "execute", 1, ["dbos"], 3.0),
        (OURS_ON_POSTGRESQL, "update", MOST_SESSIONS, ["langgraph-postgresql"], 5.0),
        (OURS_ON_POSTGRESQL, "execute", MOST_SESSIONS, ["dbos-postgresql"], 10.0),
    ):
        work = Work(operation, callers)  # type: ignore[arg-type]  # mypy does not keep the literals
        rates = {key: rate for key in keys if key in measured and (rate := measured[key].median(work.key)) is not None}
        mine = measured[reference].median(work.key) if reference in measured else None
        if mine is None or not rates:
            continue
        fastest = max(rates, key=rates.__getitem__)
        who = f"{callers} caller{'s' if callers > 1 else ''}"
        what = f"{operation}, {who}, compared with {ADAPTERS[fastest].title}"
        target = Target("ratio", "at least", least)
        key = work.key if reference == OURS else f"postgresql.{work.key}"
        rows.append(Row(key, what, mine, f"{operation}s/s", ratio=mine / rates[fastest], target=target))
    return rows


def format_report(results: Sequence[Result], run: Mapping[str, Any]) -> str:
    measured = [result for result in results if result.status == "measured"]
    sync_ms, history = run["sync_ms"], run["history"]
    lines = [
        f"fdatasync {sync_ms['p50']:.2f} ms (p99 {sync_ms['p99']:.2f}) on {run['filesystem']}; "
        f"Python {run['python']}, {run['built']}",
        f"SQLite {run['sqlite']}, {run['cpus']} CPUs; sessions of {len(NAMES)} float variables, in this process; "
        f"{run['seconds']:g} s a measurement, median of {run['rounds']}",
        "",
        "update: one variable; values: all 20 in one durable operation; read: all 20 current values; execute: code",
        "that sets one variable, as a tool in its transaction (ours) or as a workflow of one step (DBOS)",
        'of ours: the figure / that of dspex-persist on that store in this run ("-": not measured, or not supported)',
    ]
    if run["filesystem"] in IN_MEMORY:
        lines.insert(0, "WARNING: these files are in memory, nothing is durable; choose another --directory")
    for callers in (MOST_SESSIONS, 1):
        lines += ["", format_operations(measured, callers)]
    if history:
        lines += ["", f"load: open the file, and read all {len(NAMES)} values", format_history(measured, history)]
    lines += [
        f"{ADAPTERS[result.key].title}  {result.status} ({result.reason})"
        for result in results
        if result.status != "measured"
    ]
    rows = target_rows(results)
    lines += ["", format_table(rows)] if rows else []
    lines += ["", "What one durable operation writes; what the library lacks; how it syncs"]
    for result in results:
        adapter = ADAPTERS[result.key]
        durability = result.durability or "not measured"
        words = f"- {adapter.title}: {adapter.unit}; {adapter.lacks}. {durability}."
        lines += textwrap.wrap(words, WIDTH, subsequent_indent="  ")
    return "\n".join(lines)


def find_ours(results: Sequence[Result], beside: Result) -> Result | None:
    """The result of dspex-persist on the same store."""
    key = OURS_ON_POSTGRESQL if beside.key in ON_POSTGRESQL else OURS
    return next((result for result in results if result.key == key), None)


def as_json(results: Sequence[Result], run: Mapping[str, Any]) -> dict[str, Any]:
    """The report for machines: rates are operations a second, ratios are to dspex-persist in the same run."""
    targets = [{**asdict(row), "verdict": row.verdict} for row in target_rows(results)]
    return {
        "run": dict(run),
        "libraries": [library_as_json(result, find_ours(results, result), run["history"]) for result in results],
        "targets": targets,
    }


def library_as_json(result: Result, ours: Result | None, history: int) -> dict[str, Any]:
    adapter = ADAPTERS[result.key]
    works: dict[str, Any] = {}
    for work in works_of(adapter, history):
        works[work.key] = {
            **asdict(work),
            "operations_per_s": result.median(work.key),
            "values_per_operation": 1 if work.operation in ("update", "execute") else len(NAMES),
            **compared_as_json(result, ours, work.key),
        }
        if work.has_history:
            load = load_key(work.updates)
            works[load] = {"load_s": result.median(load), **compared_as_json(result, ours, load)}
    words = {"title": adapter.title, "unit": adapter.unit, "lacks": adapter.lacks, "durability": result.durability}
    state = {"status": result.status, "reason": result.reason, "version": result.version}
    return {"key": result.key, **words, **state, "works": works}


def compared_as_json(result: Result, ours: Result | None, key: str) -> dict[str, Any]:
    return {"ratio_to_ours": result.ratio_to(ours, key), "rounds": result.figures.get(key, [])}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    _, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description="dspex-persist compared with similar libraries on the same work, in one process each.\n\n" + rest,
        epilog=f"libraries: {', '.join(ADAPTERS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each measurement (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="the tables show medians over them (default: 3)")
    parser.add_argument(
        "--history",
        type=int,
        default=10_000,
        metavar="N",
        help="updates of the session with a long history; 0: none, which saves minutes (default: 10000)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file too")
    parser.add_argument(
        "--only", action="append", choices=ADAPTERS, metavar="LIBRARY", help="measure only this one (may be repeated)"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where the database files are made: on a real disk (default: %(default)s)",
    )
    parser.add_argument("--measure", choices=ADAPTERS, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.seconds <= 0 or chosen.rounds < 1 or chosen.history < 0:
        parser.error("--seconds must be above 0, --rounds at least 1, and --history at least 0")
    return chosen


def main(arguments: Sequence[str]) -> int:
    """Measure, print the tables, write the JSON; returns the exit code."""
    chosen = parse_arguments(arguments)
    directory: Path = chosen.directory.resolve()
    if chosen.measure:
        raise_open_files_limit()
        chosen.json.write_text(json.dumps(measure_library(chosen.measure, chosen.seconds, chosen.history, directory)))
        return 0
    keys = chosen.only or list(ADAPTERS)
    with ExitStack() as stack:
        if not ON_POSTGRESQL.keys().isdisjoint(keys):
            os.environ[URL] = stack.enter_context(running_postgresql(directory))
        results = run_rounds(keys, chosen.rounds, chosen.seconds, chosen.history, directory)
    run = describe_run(chosen, directory)
    print(format_report(results, run))
    if chosen.json:
        chosen.json.write_text(json.dumps(as_json(results, run), indent=2) + "\n")
    return 1 if any(result.status == "failed" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
