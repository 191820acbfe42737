"""The cost of a commit for the system: bytes, calls, waits.

Each commit of a lone caller is a transaction; those of many callers share transactions. Linux counts the bytes that
this process writes, its read and write calls, and how often its threads wait. If strace is installed and permitted, it
counts all system calls of a lone caller, and the syncs among them.
"""

import itertools
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dspex_persist
from benchmarks.files import NAMES, begin_session, make_file, session_id
from benchmarks.plan import CALLERS, Plan
from benchmarks.proc import Counts
from benchmarks.table import Row
from dspex_persist.state.provider import StateProvider

_ROOT = Path(__file__).resolve().parents[1]
_values = itertools.count()


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Measure the commits of one caller and of many."""
    path = folder / "commits.db"
    make_file(path, itertools.chain.from_iterable(map(begin_session, range(CALLERS))))
    rows = [row for callers in (1, CALLERS) for row in _counted(plan, path, callers)]
    return rows + (_traced(plan, path) if can_trace(folder) else [])


def _counted(plan: Plan, path: Path, callers: int) -> list[Row]:
    logged: list[float] = []
    counts: list[Counts] = []
    for _ in range(plan.rounds):
        with dspex_persist.connect(path) as provider:
            logged.append(_log(provider, path, callers, plan.logged_commits))
            before = Counts.now()
            _commit(provider, callers, plan.counted_commits)
            counts.append(Counts.now().since(before))

    def row(key: str, what: str, unit: str, rounds: Iterable[float], commits: int) -> Row:
        who = f"{callers} caller{'s' if callers > 1 else ''}"
        each = [count / commits for count in rounds]
        return Row.of_rounds(f"commits.{key}.{callers}", f"{what}, {who}", f"{unit}/commit", each)

    return [
        row("wal", "appended to the WAL", "bytes", logged, plan.logged_commits),
        row(
            "written",
            "written to files, with checkpoints",
            "bytes",
            (each.written_bytes for each in counts),
            plan.counted_commits,
        ),
        row("calls", "read and write calls", "calls", (each.calls for each in counts), plan.counted_commits),
        row("waits", "waits of threads", "waits", (each.waits for each in counts), plan.counted_commits),
    ]


def _log(provider: StateProvider, path: Path, callers: int, commits: int) -> int:
    """Return the growth in bytes of the WAL of a freshly opened file, with too few commits for a checkpoint."""
    wal = path.with_name(path.name + "-wal")
    before = wal.stat().st_size
    _commit(provider, callers, commits)
    return wal.stat().st_size - before


def _commit(provider: StateProvider, callers: int, commits: int) -> None:
    """Have each caller set its own variable, `commits` times in total."""

    def call(caller: int) -> None:
        for _ in range(commits // callers):
            provider.set_variable(session_id(caller), NAMES[0], next(_values) / 4)

    if callers == 1:
        call(0)
        return
    with ThreadPoolExecutor(callers) as threads:
        list(threads.map(call, range(callers)))


# Other system calls


def can_trace(folder: Path) -> bool:
    """Return whether strace is installed and permitted."""
    if shutil.which("strace") is None:
        return False
    command = ["strace", "-f", "-c", "-o", str(folder / "nothing.txt"), "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _traced(plan: Plan, path: Path) -> list[Row]:
    """Measure the difference between a process with few commits and one with more."""
    few, many = plan.logged_commits, 2 * plan.logged_commits
    calls: list[float] = []
    syncs: list[float] = []
    for _ in range(plan.linear_rounds):
        more = _trace(path, many)
        more.subtract(_trace(path, few))
        calls.append(more.total() / (many - few))
        syncs.append((more["fdatasync"] + more["fsync"]) / (many - few))
    return [
        Row.of_rounds("commits.system.1", "system calls of all kinds, 1 caller", "calls/commit", calls),
        Row.of_rounds("commits.syncs.1", "syncs, 1 caller", "syncs/commit", syncs),
    ]


def _trace(path: Path, commits: int) -> Counter[str]:
    """Return the system calls, by name, of a process that opens the file, commits this many times, and closes it."""
    table = path.with_name("strace.txt")
    own = [sys.executable, "-m", "benchmarks.commits", str(path), str(commits)]
    subprocess.run(["strace", "-f", "-c", "-o", str(table), *own], cwd=_ROOT, check=True)
    calls: Counter[str] = Counter()
    for line in table.read_text().splitlines():
        # % time, seconds, usecs/call, calls, errors (if any), name
        words = line.split()
        if len(words) >= 5 and words[3].isdigit() and words[-1] != "total":
            calls[words[-1]] = int(words[3])
    return calls


if __name__ == "__main__":
    with dspex_persist.connect(Path(sys.argv[1])) as opened:
        _commit(opened, 1, int(sys.argv[2]))
