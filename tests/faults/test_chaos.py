"""Some seconds of chaos; `make chaos-test` runs for fifteen minutes. What it has to find: `test_planted.py`."""

import asyncio
import secrets
import sys
from pathlib import Path

import pytest

from tests.faults.chaos_test import Chaos


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="this test needs /proc, which only Linux has")
def test_workers_and_server_in_trouble(tmp_path: Path) -> None:
    seed = secrets.randbelow(1_000_000)
    report = asyncio.run(Chaos(tmp_path, seed, clients=4, size=(1, 1)).chaos(3, lives=2))
    print(report)
    assert report.problems == [], f"seed {seed}"
    # A run without any activity proves nothing. One server is killed, and one is shut down.
    assert report.cycles == 2
    assert report.counts["writes ok"] > 0, report
    assert report.counts["executions committed"] > 0, report
    assert sum(count for what, count in report.counts.items() if what.startswith(("workers ", "servers "))) > 0, report
