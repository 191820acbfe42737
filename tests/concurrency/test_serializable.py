"""Executions of tools on one session are serializable: on a real server, with many clients."""

import asyncio
from collections import Counter
from pathlib import Path

from dspex_persist.infra.process import ServerProcess
from tests.concurrency.executions import record, set_up
from tests.concurrency.serializability import Transaction, check
from tests.deadline import within
from tests.faults.bridge import Bridge, ToolAnswer
from tests.faults.crash_test import server_argv

CLIENTS, TIMES = 32, 3


def histories(tmp_path: Path, tool: str, bug: str | None = None, executions: int = 20) -> list[Transaction]:
    """Return the history that the clients of one server saw."""

    async def run(port: int) -> list[Transaction]:
        async with Bridge(port) as bridge:
            await set_up(bridge)
            return await record(bridge, clients=24, executions=executions, seed=1, tool=tool)

    with ServerProcess.start(server_argv(tmp_path / "served.db", bug), ready_timeout_s=within(30)) as process:
        return asyncio.run(run(process.port))


def test_serializable(tmp_path: Path) -> None:
    history = histories(tmp_path, "append", executions=30)
    # Enough concurrency to show a bug: commits, conflicts, and unknown outcomes.
    counts = Counter(transaction.status for transaction in history)
    assert min(counts["ok"], counts["failed"]) > 100, counts
    assert counts["unknown"] > 0, counts
    assert list(map(str, check(history))) == []


def test_snapshot(tmp_path: Path) -> None:
    """Snapshot isolation permits write skew and nothing worse; under this load it does occur."""
    history = histories(tmp_path, "append_on_snapshot")
    assert {violation.rule for violation in check(history)} == {"write skew"}


def test_many_clients_increment_one_number(tmp_path: Path) -> None:
    async def run(port: int) -> tuple[list[ToolAnswer], tuple[int, str]]:
        async with Bridge(port) as bridge:
            await bridge.begin("one")
            await bridge.register("one", "count", "integer", 0, {})

            async def client() -> list[ToolAnswer]:
                return [await bridge.execute("one", "increment", {"target": "count"}) for _ in range(TIMES)]

            answers = await asyncio.gather(*(client() for _ in range(CLIENTS)))
            return [answer for each in answers for answer in each], await bridge.get("one", "count")

    with ServerProcess.start(server_argv(tmp_path / "served.db"), ready_timeout_s=within(30)) as process:
        answers, counted = asyncio.run(run(process.port))
    total = CLIENTS * TIMES
    assert [answer.message for answer in answers if answer.code] == []
    assert counted == (total, str(total))
    assert sorted(answer.result["count"] for answer in answers) == list(range(1, total + 1))
    in_order = sorted(answers, key=lambda answer: answer.commit[1])
    assert [answer.result["count"] for answer in in_order] == list(range(1, total + 1))
    assert sum(int(answer.metadata["attempts"]) for answer in answers) > total, "there was no conflict"


def test_executions_on_different_sessions_never_conflict(tmp_path: Path) -> None:
    async def run(port: int) -> list[ToolAnswer]:
        async with Bridge(port) as bridge:

            async def client(session_id: str) -> list[ToolAnswer]:
                await bridge.begin(session_id)
                await bridge.register(session_id, "count", "integer", 0, {})
                arguments = {"target": "count", "pause_s": 0.005}
                return [await bridge.execute(session_id, "increment", arguments) for _ in range(TIMES)]

            return [each for part in await asyncio.gather(*(client(f"{n}") for n in range(CLIENTS))) for each in part]

    with ServerProcess.start(server_argv(tmp_path / "served.db"), ready_timeout_s=within(30)) as process:
        answers = asyncio.run(run(process.port))
    assert {(answer.code, answer.metadata["attempts"]) for answer in answers} == {("", "1")}
    assert Counter(answer.result["count"] for answer in answers) == dict.fromkeys(range(1, TIMES + 1), CLIENTS)
