"""Twelve kills under load; `make crash-test` does two hundred."""

import asyncio
import secrets
from pathlib import Path

import pytest

from tests.faults.crash_test import CrashTest


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.timeout(3600)
def test_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    seed = secrets.randbelow(1_000_000)
    report = asyncio.run(CrashTest(tmp_path, seed).run(cycles=12))
    print(report)
    assert report.problems == [], f"seed {seed}"
    # A run without any activity proves nothing.
    assert report.cycles == 12
    assert report.counts["kills during start-up"] == 1
    writes = ("writes ok", "writes refused", "writes unknown", "reads", "commits received by watchers")
    ends = ("committed", "failed", "interrupted", "repeated")
    for what in (*writes, *(f"executions {end}" for end in ends)):
        assert report.counts[what] > 0, f"{report}: no {what}"
