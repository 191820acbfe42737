"""The n-th write, sync or truncation fails, for n = 1, 2, 3, …; whatever happens then, nothing promised is broken.

    python -m tests.faults.io_faults [--every 1] [--mode eio|enospc|short]

For each n and each way to fail the engine works on a fresh database until it ends; then the files are checked, opened
again without faults, and checked again. `make test` does a sample of them.
"""

import argparse
import json
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from dspex_persist.state.errors import StateError
from dspex_persist.state.store.session_store import SessionStore
from tests.faults import io_child, shim
from tests.faults.checker import Checker, copy_files, verify
from tests.faults.ledger import Ledger, Write

MODES = ("eio", "enospc", "short")


@dataclass(frozen=True, slots=True)
class Fault:
    """Which operation fails (from 1; 0: none), how, and whether all after it do so too."""

    number: int
    mode: str
    goes_on: bool

    def __str__(self) -> str:
        return f"{self.number} {self.mode} {'on' if self.goes_on else 'once'}"


@dataclass(slots=True)
class Result:
    """What became of one case. `errors` counts the errors that callers were told, by name."""

    fault: Fault
    exit_code: int
    operations: int
    problems: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    acknowledged: int = 0


class Faults:
    """Runs cases, one after the other, in forks of one child process."""

    def __init__(self, folder: Path, *bug: str) -> None:
        self._folder = folder
        self._log = (folder / "log").open("wb")
        argv = [sys.executable, "-m", "tests.faults.io_child", str(folder), *bug]
        self._child = subprocess.Popen(
            argv,
            env=shim.environment(shim.build(folder)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def run(self, fault: Fault) -> Result:
        """Run one case and check what it left."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{fault}\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline().split()
        if len(answer) != 2:
            raise RuntimeError(f"the child ended: {_text(self._folder / 'log')}")
        result = Result(fault, int(answer[0]), int(answer[1]))
        place = self._folder / str(fault).replace(" ", "-")
        _judge(place, result)
        if not result.problems:
            shutil.rmtree(place)
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.communicate()
        self._log.close()


def cases(operations: int, every: int, modes: Sequence[str] = MODES) -> Iterator[Fault]:
    """Every `every`-th fault of all that there are with so many operations: each number, each mode, once and on."""
    faults = [
        Fault(number, mode, goes_on)
        for number in range(1, operations + 1)
        for mode in modes
        for goes_on in (False, True)
    ]
    yield from faults[::every]


def _judge(place: Path, result: Result) -> None:
    ledger = _read_acks(place / "acks", result)
    problems = result.problems
    if result.exit_code in (io_child.EXIT_HUNG, io_child.EXIT_CRASHED) or result.exit_code < 0:
        problems.append(f"exit code {result.exit_code}: {_text(place / 'crash')}")
    database = place / "case.db"
    if (database.exists() and database.stat().st_size) or ledger.writes:
        problems += _check(copy_files(database, place / "copy"), ledger)
    # The start after it, with a disk that works again.
    try:
        SessionStore(database).close()
    except StateError as error:
        problems.append(f"cannot be opened again: {error}")
        return
    problems += _check(copy_files(database, place / "copy"), ledger)


def _check(copy: Path, ledger: Ledger) -> list[str]:
    if not _has_tables(copy):
        return [f"lost: {write}" for write in ledger.writes.values() if write.status == "ok"]
    return [*Checker().check(copy, ledger), *verify(copy)]


def _has_tables(copy: Path) -> bool:
    """Whether the file got so far as to hold the tables; what is found there must be whole."""
    with closing(sqlite3.connect(copy)) as connection:
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    return "commits" in names


def _read_acks(path: Path, result: Result) -> Ledger:
    ledger = Ledger()
    for line in _text(path).splitlines():
        note = json.loads(line)
        token = note.get("token")
        if "error" in note:
            result.errors[note["error"]] += 1
        if not token:
            continue
        if note["event"] == "ask":
            ledger.writes[token] = Write(token, "session", tuple(note["targets"]), json.dumps(token), settled=True)
        elif note["event"] in ("ok", "refused", "unknown"):
            ledger.writes[token].status = note["event"]
            ledger.writes[token].versions = note.get("versions", {})
            result.acknowledged += note["event"] == "ok"
    return ledger


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is kept if something goes wrong."""
    folder = Path(tempfile.mkdtemp(prefix="io-faults-"))
    yield folder
    shutil.rmtree(folder)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="let each write, sync and truncation fail, and check what is left")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th case")
    parser.add_argument("--mode", choices=MODES, action="append")
    arguments = parser.parse_args()
    if (reason := shim.why_not()) is not None:
        print(reason)
        return 2
    began = time.monotonic()
    codes: Counter[int] = Counter()
    broken: list[Result] = []
    with scratch() as folder, Faults(folder) as faults:
        operations = faults.run(Fault(0, "eio", False)).operations
        print(f"{operations} operations without a fault, in {folder}", flush=True)
        for fault in cases(operations, arguments.every, arguments.mode or MODES):
            result = faults.run(fault)
            codes[result.exit_code] += 1
            if result.problems:
                broken.append(result)
                print(f"{fault}: exit code {result.exit_code}, {dict(result.errors)}")
                for problem in result.problems[:5]:
                    print(f"  {problem}")
        told = ", ".join(f"{count} ended with {code}" for code, count in sorted(codes.items()))
        print(f"{codes.total()} faults in {time.monotonic() - began:.0f} s: {told}; {len(broken)} with problems")
        if broken:
            sys.exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
