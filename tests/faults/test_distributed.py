"""Three servers on one database for some seconds; `make distributed-test` runs for minutes."""

import asyncio
import secrets
from pathlib import Path

import pytest

from tests.engines import Postgres, Server, Valkey
from tests.faults.distributed_test import Distributed
from tests.faults.shared_server import BUGS

FOUND = {
    "no-barrier": "real-time order",
    "no-news": "real-time order",
}


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", [Postgres, pytest.param(Valkey, marks=pytest.mark.thorough)])
def test_servers_and_database_in_trouble(tmp_path: Path, kind: type[Server]) -> None:
    seed = secrets.randbelow(1_000_000)
    report = asyncio.run(Distributed(tmp_path, seed, kind=kind).run(4))
    print(report)
    assert report.problems == [], f"seed {seed}"
    # A run without any activity proves nothing.
    for what in ("writes ok", "reads", "commits received by watchers"):
        assert report.counts[what] > 0, report
    assert report.cycles > 0


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.thorough
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("bug", FOUND)
def test_it_finds(bug: str, tmp_path: Path) -> None:
    report = asyncio.run(Distributed(tmp_path, 1, planted=bug).run(8))
    assert any(FOUND[bug] in problem for problem in report.problems), report


def test_every_bug_has_its_proof() -> None:
    assert {"none", *FOUND} == {*BUGS}
