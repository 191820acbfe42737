"""The n-th operation on a file fails, for n = 1, 2, 3, …; all promises have to be kept in spite of that.

    make fault-test                     # or: python -m tests.faults.io_faults [--every 10] [--kind sync]

For each kind of operation, each n and each way to fail, the engine works on a fresh database until it ends: it writes
and reads, prunes, makes a backup, imports a session. Then the files are checked, opened again without faults, and
checked again. `make test` runs a sample.
"""

import argparse
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from dspex_persist.state.errors import StateError
from dspex_persist.state.store import maintenance
from dspex_persist.state.store.session_store import open_groups
from tests.faults import io_child, shim
from tests.faults.checker import Checker, copy_files, verify
from tests.faults.ledger import Ledger, Write
from tests.faults.scratch import scratch

MODES = {
    "open": ("emfile", "eio"),
    "read": ("eio", "short"),
    "write": ("eio", "enospc", "short"),
    "sync": ("eio", "enospc"),
    "truncate": ("eio", "enospc"),
    "lock": ("enolck", "eio"),
    "unlink": ("eio",),
    "rename": ("eio", "enospc"),
}
"""How the operations of a kind can fail."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Which operation of a kind fails (from 1; 0: none), how, and whether all later ones fail, too."""

    kind: str
    number: int
    mode: str
    goes_on: bool

    def __str__(self) -> str:
        return f"{self.kind} {self.number} {self.mode} {'on' if self.goes_on else 'once'}"


_BESIDE = ("-wal", "-shm", "-journal", ".anchor", ".lock")

NO_FAULT = Fault("write", 0, "eio", False)


@dataclass(slots=True)
class Result:
    """The result of one case. `errors` counts the errors that callers got, by name."""

    fault: Fault
    exit_code: int
    operations: dict[str, int]
    """The number of operations by kind; empty if the engine did not get to its end."""
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
        """Run one case and check its files."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{fault}\n")
        self._child.stdin.flush()
        answer = [int(number) for number in self._child.stdout.readline().split()]
        if not answer:
            raise RuntimeError(f"the child ended: {_text(self._folder / 'log')}")
        result = Result(fault, answer[0], dict(zip(io_child.KINDS, answer[1:], strict=False)))
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


def cases(operations: Mapping[str, int], every: int, kinds: Sequence[str] = io_child.KINDS) -> Iterator[Fault]:
    """Yield every `every`-th of all faults for these numbers of operations, and at least one of each kind."""
    for kind in kinds:
        faults = [
            Fault(kind, number, mode, goes_on)
            for number in range(1, operations[kind] + 1)
            for mode in MODES[kind]
            for goes_on in (False, True)
        ]
        # Starts in the middle of the first step, because the first operations are not more interesting than others.
        yield from faults[min(every // 2, len(faults) - 1) :: every]


def _judge(place: Path, result: Result) -> None:
    ledger, done = _read_acks(place / io_child.ACKS, result)
    problems = result.problems
    if result.exit_code in (io_child.EXIT_HUNG, io_child.EXIT_CRASHED) or result.exit_code < 0:
        problems.append(f"exit code {result.exit_code}: {_text(place / 'crash')}")
    database = place / io_child.DATABASE
    if (database.exists() and database.stat().st_size) or ledger.writes:
        problems += _check(copy_files(database, place / "copy"), ledger)
    problems += _check_backup(place, "backup" in done)
    # If unlinking fails, partial files remain.
    if result.fault.kind != "unlink" and (left := sorted(path.name for path in place.glob("*.partial*"))):
        problems.append(f"left behind: {left}")
    replaced = _replaced_in(place)
    if "restore" in done and replaced is None:
        problems.append("lost: the backup was restored, but the replaced database is missing")
    for path in (database,) if replaced is None else (database, replaced):
        # The next start, with a disk that works again.
        try:
            open_groups(path).close()
        except StateError as error:
            problems.append(f"{path.name} cannot be opened again: {error}")
            continue
        copy = copy_files(path, place / "copy")
        problems += _check(copy, ledger)
        # The backup is older than the import.
        is_restored = path is database and replaced is not None
        problems += _check_import(copy, 0 if is_restored else io_child.IMPORTED_VERSIONS, "import" in done)


def _replaced_in(place: Path) -> Path | None:
    """The database that a restore has replaced, if it is no longer in place."""
    database = place / io_child.DATABASE
    for path in place.glob(f"{io_child.DATABASE}.replaced-*"):
        if not path.name.endswith(_BESIDE) and not path.samefile(database):
            return path
    return None


def _check_backup(place: Path, done: bool) -> Iterator[str]:
    backup = place / io_child.BACKUP
    if done and not backup.exists():
        yield "lost: the backup was made, but is missing"
    if backup.exists() and (problems := maintenance.check(backup).problems):
        yield f"half: the backup has problems: {problems[:2]}"


def _check_import(copy: Path, wanted: int, done: bool) -> Iterator[str]:
    with closing(sqlite3.connect(copy)) as connection:
        [(count,)] = connection.execute(_IMPORTED, (io_child.IMPORTED,))
    if count != wanted and (done or count != 0):
        yield f"half: {count} of {wanted} imported versions are there"


_IMPORTED = """
    SELECT count(*) FROM versions JOIN variables USING (variable_key) JOIN sessions USING (session_key)
    WHERE session_id = ?
"""


def _check(copy: Path, ledger: Ledger) -> list[str]:
    if not _has_tables(copy):
        return [f"lost: {write}" for write in ledger.writes.values() if write.status == "ok"]
    return [*Checker().check(copy, ledger), *verify(copy)]


def _has_tables(copy: Path) -> bool:
    """Whether the file has its tables; everything in them has to be whole."""
    with closing(sqlite3.connect(copy)) as connection:
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    return "commits" in names


def _read_acks(path: Path, result: Result) -> tuple[Ledger, set[str]]:
    """The requests and answers of a case, and the commands that succeeded."""
    ledger, done = Ledger(), set()
    for line in _text(path).splitlines():
        note = json.loads(line)
        token = note.get("token")
        if "error" in note:
            result.errors[note["error"]] += 1
        if note["event"] == "raw":
            result.problems.append(f"raw: {note['text']}")
        elif note["event"] == "done":
            done.add(note["what"])
        if not token:
            continue
        if note["event"] == "ask":
            ledger.writes[token] = Write(token, "session", tuple(note["targets"]), json.dumps(token), settled=True)
        elif note["event"] in ("ok", "refused", "unknown"):
            ledger.writes[token].status = note["event"]
            ledger.writes[token].versions = note.get("versions", {})
            result.acknowledged += note["event"] == "ok"
    return ledger, done


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="let each operation on a file fail, and check the files")
    parser.add_argument("--every", type=int, default=1, help="run only every N-th case")
    parser.add_argument("--kind", choices=io_child.KINDS, action="append")
    arguments = parser.parse_args()
    if (reason := shim.why_not()) is not None:
        print(reason)
        return 2
    began = time.monotonic()
    codes: Counter[int] = Counter()
    kinds: Counter[str] = Counter()
    acknowledged = broken = 0
    with scratch("io-faults") as folder, Faults(folder) as faults:
        operations = faults.run(NO_FAULT).operations
        print(f"{operations} without a fault, in {folder}", flush=True)
        for fault in cases(operations, arguments.every, arguments.kind or io_child.KINDS):
            result = faults.run(fault)
            codes[result.exit_code] += 1
            kinds[fault.kind] += 1
            acknowledged += result.acknowledged
            if result.problems:
                broken += 1
                print(f"{fault}: exit code {result.exit_code}, {dict(result.errors)}", flush=True)
                for problem in result.problems[:5]:
                    print(f"  {problem}", flush=True)
        ends = ", ".join(f"{count} ended with {code}" for code, count in sorted(codes.items()))
        failed = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
        print(f"{codes.total()} faults ({failed}) in {time.monotonic() - began:.0f} s: {ends};")
        print(f"{acknowledged:,} acknowledged writes; {broken} runs with problems")
        if broken:
            sys.exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
