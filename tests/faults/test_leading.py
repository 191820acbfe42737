"""A process is killed in the middle of a group that a caller's own thread writes."""

import secrets
import signal
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest

import dspex_persist
from tests.deadline import within
from tests.faults.checker import verify
from tests.faults.leading_child import PHASES, SESSION, pair


@pytest.mark.parametrize(("phase", "threads"), list(zip(PHASES, cycle((1, 3)), strict=False)))
def test_nothing_acknowledged_is_lost_and_nothing_is_half_there(tmp_path: Path, phase: str, threads: int) -> None:
    database, number = tmp_path / "s.db", 1 + secrets.randbelow(40)
    argv = [sys.executable, "-m", "tests.faults.leading_child", str(database), phase, str(number), str(threads)]
    child = subprocess.run(argv, capture_output=True, text=True, timeout=within(60), check=False)
    assert child.returncode == -signal.SIGKILL, f"group {number}: {child.stderr}"
    acknowledged = dict.fromkeys(range(threads), 0)
    for line in child.stdout.splitlines():
        thread, count = map(int, line.split())
        acknowledged[thread] = count
    with dspex_persist.connect(database) as state:
        for thread, count in acknowledged.items():
            left, right = (state.get_value(SESSION, name) for name in pair(thread))
            assert left == right, f"group {number}: half of a batch"
            # The one that was not answered may be there.
            assert left in (count, count + 1), f"group {number}: {count} was acknowledged"
    assert verify(database) == []
