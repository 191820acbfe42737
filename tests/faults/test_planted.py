"""A checker that finds nothing proves nothing: each is shown a server with the very bug that it is there for."""

import asyncio
from pathlib import Path

import pytest

from dspex_persist.infra.process import ServerProcess
from tests.concurrency.clients import INITIAL, BridgeRegister, record
from tests.concurrency.linearizability import Operation, check
from tests.faults.bridge import Bridge
from tests.faults.crash_test import CrashTest, server_argv
from tests.faults.planted_server import BUGS

FOUND_BY_KILLS = {
    "ack-before-commit": "lost",
    "half-batch": "half batch",
    "forget-keys": "written twice",
    "watch-skip": "watch",
    "watch-twice": "watch",
    "sequence-gap": "gap",
}
FOUND_BY_HISTORIES = {
    "lost-update": "wrong version",
    "stale-read": "real-time order",
    "dirty-read": "dirty read",
    "duplicate-version": "duplicate version",
}


def test_every_bug_has_its_proof() -> None:
    assert set(FOUND_BY_KILLS) | set(FOUND_BY_HISTORIES) == set(BUGS)


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.timeout(300)
@pytest.mark.parametrize("bug", FOUND_BY_KILLS)
def test_the_crash_test_finds(bug: str, tmp_path: Path) -> None:
    report = asyncio.run(CrashTest(tmp_path, seed=1, planted=bug).run(cycles=10))
    assert {problem.partition(":")[0] for problem in report.problems} >= {FOUND_BY_KILLS[bug]}, report


@pytest.mark.slow
@pytest.mark.parametrize("bug", FOUND_BY_HISTORIES)
def test_the_history_checker_finds(bug: str, tmp_path: Path) -> None:
    async def run(port: int) -> list[Operation]:
        async with Bridge(port) as bridge:
            return await record(await BridgeRegister.open(bridge), clients=16, operations=60, seed=1)

    with ServerProcess.start(server_argv(tmp_path / "served.db", bug), ready_timeout_s=60) as process:
        history = asyncio.run(run(process.port))
    assert FOUND_BY_HISTORIES[bug] in {violation.rule for violation in check(history, INITIAL)}
