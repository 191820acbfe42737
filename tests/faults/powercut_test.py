"""Power cuts: records the writes and syncs of the unmodified server and commands, and rebuilds disks from that.

    make powercut-test STATES=10000         # or: python -m tests.faults.powercut_test --states 10000 [--seed N]

Every state is one possible result of a power cut at one instant (see disk.py). Each one is opened as at a start,
checked completely, and compared with everything acknowledged by that instant. Exit code 0: no problems. 1: problems,
which are printed, and the disks are kept.
"""

import argparse
import secrets
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Final, TypeAlias

from tests.faults import shim
from tests.faults.disk import MODES, Disk, Operation, read_log
from tests.faults.recordings import Commands, Recording, Rescued, Restored, Served, Upgraded
from tests.faults.scratch import scratch

_MOST_PROBLEMS = 10
_STATES_OF_ONE = 1_500
"""The number of states from one recording; more states use several, because a recording is always the same."""


Shares: TypeAlias = Mapping[type[Recording], int]
SHARES: Final[Shares] = {Served: 60, Commands: 15, Upgraded: 10, Restored: 10, Rescued: 5}


@dataclass(slots=True)
class Report:
    """The report of a run; `problems` is empty if all is well."""

    seed: int
    problems: list[str] = field(default_factory=list)
    modes: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    took_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def states(self) -> int:
        return self.modes.total()

    def __str__(self) -> str:
        modes = ", ".join(f"{count:,} {mode}" for mode, count in sorted(self.modes.items()))
        verdict = "nothing was lost or broken" if not self.problems else f"{len(self.problems)} PROBLEMS"
        return (
            f"seed {self.seed}: {self.states:,} states ({modes}; {self.repeated:,} more were the same as others)"
            f" of {self.operations.total():,} operations, {self.operations['S']:,} of them syncs,"
            f" in {self.took_s:.0f} s ({self.cpu_s:.0f} s of CPU here): {verdict}"
        )


class PowerCuts:
    """Makes recordings, and disks from them."""

    def __init__(
        self, folder: Path, seed: int, planted: str | None = None, most_problems: int = _MOST_PROBLEMS
    ) -> None:
        self.report = Report(seed)
        self._folder = folder
        self._planted = planted
        self._most_problems = most_problems
        self._library = shim.build(folder, shim.RECORDER)
        self._random = Random(seed)
        self._seen: set[bytes] = set()
        self._count = 0

    def run(self, states: int, shares: Shares = SHARES, *, verbose: bool = False) -> Report:
        """Check that many states, divided among the kinds of recordings by `shares` (in percent)."""
        began, cpu = time.monotonic(), time.process_time()
        rounds = max(1, round(states / _STATES_OF_ONE))
        for part in range(rounds):
            for kind, share in shares.items():
                self._record_and_cut(kind, round(states / rounds * share / 100))
                if self.report.problems:
                    break
            if verbose:
                print(f"  {self.report.states:,} states of {part + 1} recordings", flush=True)
        self.report.took_s, self.report.cpu_s = time.monotonic() - began, time.process_time() - cpu
        return self.report

    def _record_and_cut(self, kind: type[Recording], states: int) -> None:
        self._count += 1
        place = self._folder / f"{self._count}-{kind.__name__.lower()}"
        data, log = place / "data", place / "log"
        data.mkdir(parents=True)
        settings = {"DSPEX_RECORD_FOLDER": str(data), "DSPEX_RECORD_LOG": str(log)}
        env = shim.environment(self._library, **settings)
        recording = kind(place, env, self._random.randrange(1 << 30), self._planted)
        recording.record()
        operations = read_log(log)
        self.report.operations.update(operation.kind for operation in operations)
        self._explore(recording, operations, states, place)
        if not self.report.problems:
            shutil.rmtree(place)

    def _explore(self, recording: Recording, operations: list[Operation], states: int, place: Path) -> None:
        disk = Disk(recording.files)
        done = 0
        for index in _instants(operations, states, self._random):
            while done <= index:
                disk.play(operations[done])
                done += 1
            # The disk stays the same until the next operation, so all answers before that one count.
            instant = operations[done].at_s if done < len(operations) else float("inf")
            for mode in MODES:
                self._cut(recording, disk.cut(mode, self._random), instant, mode, place / f"cut-{index}-{mode}")
                if len(self.report.problems) >= self._most_problems:
                    return

    def _cut(self, recording: Recording, files: dict[str, bytes], instant: float, mode: str, folder: Path) -> None:
        digest = blake2b(repr(instant).encode())
        for name, content in files.items():
            digest.update(blake2b(name.encode()).digest() + blake2b(content).digest())
        if digest.digest() in self._seen:
            self.report.repeated += 1
            return
        self._seen.add(digest.digest())
        self.report.modes[mode] += 1
        _write_files(folder, files)
        problems = recording.judge(folder, instant)
        if problems:
            self.report.problems += [f"{folder.name}: {problem}" for problem in problems]
            _write_files(folder, files)
        else:
            shutil.rmtree(folder)


def _instants(operations: list[Operation], states: int, random: Random) -> list[int]:
    """Choose the operations after which the power fails: half of them near syncs and changes of names or sizes.

    Always includes the last one, by which all answers have been given.
    """
    # Some disks of one instant are the same; without pending changes, all of them are.
    wanted = max(1, states // (len(MODES) - 2))
    near = {
        index + step
        for index, operation in enumerate(operations)
        if operation.kind in "BSTURLC"
        for step in (-1, 0, 1)
        if 0 <= index + step < len(operations)
    }
    chosen = set(random.sample(sorted(near), min(len(near), wanted // 2)))
    chosen |= set(random.sample(range(len(operations)), min(len(operations), wanted - len(chosen))))
    return sorted(chosen | {len(operations) - 1})


def _write_files(folder: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
        # Like the store's files: otherwise each start warns that others can read the database.
        (folder / name).chmod(0o600)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="cut the power again and again, and check the disks")
    parser.add_argument("--states", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000))
    parser.add_argument("--plant", help="a bug to plant in the server (see planted_server.py)")
    arguments = parser.parse_args()
    if (reason := shim.why_not()) is not None:
        print(reason)
        return 2
    with scratch("powercut-test") as folder:
        print(f"seed {arguments.seed}, {arguments.states:,} states, in {folder}", flush=True)
        report = PowerCuts(folder, arguments.seed, arguments.plant).run(arguments.states, verbose=True)
        print(report)
        for problem in report.problems[:_MOST_PROBLEMS]:
            print(f"  {problem}")
        if report.problems:
            print(f"the disks are kept in {folder}")
            sys.exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
