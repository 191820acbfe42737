"""`make bench`, or `python -m benchmarks.run [--quick] [--only NAME] [--json FILE] [--docs PAGE] [--directory PATH]`

Prints one table. Every number that is compared with another was measured beside it in the same run.
Exit code: 0 when everything was measured, whether or not a target was missed; the table says which were.
"""

import argparse
import json
import os
import platform
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import audit, beside_slow, engine, executing, growth, memory, rpc, startup, versions
from benchmarks.peers import filesystem_of
from benchmarks.plan import FULL, QUICK, SECTIONS, Plan, SectionName
from benchmarks.table import Row, as_json, format_markdown, format_table, rewrite_docs
from dspex_persist import clock

_IN_MEMORY = frozenset({"tmpfs", "ramfs"})


@dataclass(frozen=True, slots=True)
class _Job:
    """A function of one of the sections with its arguments, run in a process of its own."""

    function: Callable[..., list[Row] | None]
    arguments: tuple[Any, ...]


def untimed_jobs(plan: Plan, folder: Path, names: Sequence[SectionName]) -> list[_Job]:
    """What makes files, or measures bytes: it may run side by side.

    The longest come first, and what measures memory is the very first: it needs a process that has done nothing yet.
    """
    jobs: dict[SectionName, list[_Job]] = {
        "memory": [_Job(memory.measure, (plan, folder))],
        "startup": [_Job(startup.prepare, (folder, count)) for count in sorted(plan.session_counts, reverse=True)],
        "versions": [_Job(versions.prepare, (plan, folder / "versions.db"))],
        "growth": [_Job(growth.measure, (plan, folder))],
        "rpc": [_Job(rpc.prepare, (plan, folder / "rpc.db"))],
        "tools": [_Job(executing.prepare, (plan, folder / "tools.db"))],
        "audit": [_Job(audit.prepare, (folder / f"audit{count}.db", count)) for count in plan.audit_versions[::-1]],
    }
    return [job for name, own in jobs.items() if name in names for job in own]


def timed_jobs(plan: Plan, folder: Path, names: Sequence[SectionName]) -> list[_Job]:
    """What measures times: one after the other, with the machine to itself."""
    jobs: dict[SectionName, list[_Job]] = {
        "rpc": [_Job(rpc.measure, (plan, folder / "rpc.db"))],
        "tools": [_Job(measured, (plan, folder / "tools.db")) for measured in (executing.measure, beside_slow.measure)],
        "engine": [_Job(engine.measure, (plan, folder))],
        "versions": [_Job(versions.measure, (plan, folder / "versions.db"))],
        "startup": [_Job(startup.measure, (plan, folder))],
        "audit": [_Job(audit.measure, (plan, *(folder / f"audit{count}.db" for count in plan.audit_versions)))],
    }
    return [job for name, own in jobs.items() if name in names for job in own]


def run_jobs(jobs: Sequence[_Job], at_once: int, *, a_process: int | None = None) -> list[Row]:
    """Run the jobs in processes of their own, so many at once and `a_process` in each (None: any number); their rows.

    The first ones are given to fresh processes in any case.
    """
    # Not forked: a fork after gRPC has started is not safe.
    with ProcessPoolExecutor(at_once, mp_context=get_context("spawn"), max_tasks_per_child=a_process) as pool:
        futures = [pool.submit(job.function, *job.arguments) for job in jobs]
        return [row for future in futures for row in future.result() or ()]


def measure(plan: Plan, directory: Path, names: Sequence[SectionName]) -> list[Row]:
    """The rows of these sections, in the order of the sections."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=directory) as place:
        folder = Path(place)
        print("making the files, measuring sizes", file=sys.stderr, flush=True)
        rows = run_jobs(untimed_jobs(plan, folder, names), os.cpu_count() or 1)
        # One a process: what a section leaves behind (threads, caches, a large heap) must not slow the next one.
        rows += run_jobs(timed_jobs(plan, folder, names), 1, a_process=1)
    return sorted(rows, key=lambda row: SECTIONS.index(row.section))


def describe_run(directory: Path, elapsed_s: float, *, quick: bool) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "measured_at": f"{clock.now():%Y-%m-%d %H:%M} UTC",
        "elapsed_s": round(elapsed_s, 1),
        "quick": quick,
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "cpus": os.cpu_count(),
        "directory": str(directory),
        "filesystem": filesystem_of(directory),
    }


def format_run(run: dict[str, Any]) -> str:
    """The same in a sentence or two."""
    words = (
        f"Python {run['python']}, SQLite {run['sqlite']} (WAL, synchronous=FULL), {run['cpus']} CPUs shared by client "
        f"and server, files in {run['directory']} on {run['filesystem']}; {run['measured_at']}, {run['elapsed_s']:g} s."
    )
    if run["quick"]:
        words += " A smoke run: its numbers mean nothing."
    if run["filesystem"] in _IN_MEMORY:
        words += " These files are in memory, where nothing is durable: choose another --directory."
    return words


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="How fast dspex-persist is, here.")
    parser.add_argument("--quick", action="store_true", help="a smoke run of some 20 s; its numbers mean nothing")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="only this section (may be repeated)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file too")
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="write the table into this page, between its marks")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where the database files are made: on a real disk (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Measure, print the table, write what was asked for; the exit code."""
    chosen = _parse(arguments)
    directory: Path = chosen.directory.resolve()
    began = time.perf_counter()
    rows = measure(QUICK if chosen.quick else FULL, directory, chosen.only or SECTIONS)
    run = describe_run(directory, time.perf_counter() - began, quick=chosen.quick)
    print(f"{format_run(run)}\n\n{format_table(rows)}")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(as_json(rows, run), indent=2) + "\n")
    if chosen.docs is not None:
        rewrite_docs(chosen.docs, f"{format_run(run)}\n\n{format_markdown(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
