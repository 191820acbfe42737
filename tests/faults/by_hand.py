"""The command line of the tests that run for as long as somebody likes: crash, soak and chaos."""

import argparse
import asyncio
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.faults.crash_test import Report


def run_by_hand(
    name: str,
    description: str,
    run: Callable[[Path, int, int, str | None, Any], Coroutine[Any, Any, "Report"]],
    *,
    unit: str,
    usual: float,
    clients: int = 8,
    needs_proc: bool = False,
) -> int:
    """Run a test as the arguments of this process say, in a new folder that is kept if there are problems.

    Args:
        name: What the folder's name begins with.
        description: What the test does.
        run: Runs it in a folder, with a seed, a number of clients, a bug to plant, and this many of the unit.
        unit: What says how long it runs: cycles or minutes.
        usual: How many by default; of the type that all have to be of.
        clients: How many by default.
        needs_proc: Whether it reads /proc.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(f"--{unit}", dest="amount", metavar=unit.upper(), type=type(usual), default=usual)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000))
    parser.add_argument("--clients", type=int, default=clients)
    parser.add_argument("--plant", help="a bug to plant in the server (see planted_server.py)")
    given = parser.parse_args()
    if needs_proc and sys.platform != "linux":
        print("this test needs /proc, which only Linux has")
        return 2
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    print(f"seed {given.seed}, {given.amount:g} {unit}, {given.clients} clients, in {folder}", flush=True)
    report = asyncio.run(run(folder, given.seed, given.clients, given.plant, given.amount))
    print(report)
    for problem in report.problems[:20]:
        print(f"  {problem}")
    if report.problems:
        print(f"the files are kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0
