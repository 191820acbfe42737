"""Some seconds of everything at once; `make soak` runs for fifteen minutes."""

import asyncio
import secrets
import sys
from pathlib import Path

import pytest

from tests.faults.soak_test import Soak


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="this test needs /proc, which only Linux has")
def test_everything_at_once(tmp_path: Path) -> None:
    seed = secrets.randbelow(1_000_000)
    test = Soak(tmp_path, seed)
    report = asyncio.run(test.soak(6))
    print(report, test.usages)
    assert report.problems == [], f"seed {seed}"
    # One server is shut down and one is killed, with all kinds of clients.
    assert report.cycles == 2
    for what in ("ask_history", "prune", "visit", "glance", "back_up"):
        assert report.counts[f"rounds of {what}"] > 0, report
    for what in ("backups", "versions pruned", "writes ok", "executions committed", "commits received by watchers"):
        assert report.counts[what] > 0, report
