"""Histories of many clients on one variable are linearizable, on a server and on an engine in this process."""

import asyncio
from pathlib import Path

import pytest

from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.embedded import EmbeddedState
from tests.concurrency.clients import INITIAL, BridgeRegister, EmbeddedRegister, record
from tests.concurrency.linearizability import Operation, check
from tests.deadline import within
from tests.faults.bridge import Bridge
from tests.faults.crash_test import server_argv


def judge(history: list[Operation]) -> list[str]:
    return [str(violation) for violation in check(history, INITIAL)]


def is_telling(history: list[Operation]) -> bool:
    """Whether there was enough concurrency to show a bug: both kinds of success, and conflicts."""
    kinds = {(op.kind, op.status) for op in history}
    return {("get", "ok"), ("set", "ok"), ("set", "refused")} <= kinds


def test_server(tmp_path: Path) -> None:
    async def run(port: int) -> list[Operation]:
        async with Bridge(port) as bridge:
            return await record(await BridgeRegister.open(bridge), clients=16, operations=60, seed=1)

    with ServerProcess.start(server_argv(tmp_path / "served.db"), ready_timeout_s=within(30)) as process:
        history = asyncio.run(run(process.port))
    assert is_telling(history)
    assert judge(history) == []


@pytest.mark.parametrize("seed", range(3))
def test_engine_in_this_process(tmp_path: Path, seed: int) -> None:
    with EmbeddedState(tmp_path / "embedded.db") as provider:
        history = asyncio.run(record(EmbeddedRegister(provider), clients=16, operations=100, seed=seed))
    assert is_telling(history)
    assert judge(history) == []
