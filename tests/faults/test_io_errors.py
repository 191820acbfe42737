"""Writes and syncs that fail: a sample of `python -m tests.faults.io_faults`, and a real server whose disk dies."""

import asyncio
from pathlib import Path

import pytest

from dspex_persist.infra.process import ServerProcess
from tests.deadline import within
from tests.faults import io_child, shim
from tests.faults.bridge import Bridge
from tests.faults.checker import Checker, copy_files, verify
from tests.faults.crash_test import server_argv
from tests.faults.io_faults import NO_FAULT, Fault, Faults, cases
from tests.faults.ledger import Ledger
from tests.faults.scratch import scratch
from tests.faults.workload import Client, Names, set_up

pytestmark = [pytest.mark.slow, pytest.mark.crash, pytest.mark.timeout(3600)]

CLIENTS = 4
ENDING_S = within(20)


@pytest.fixture(autouse=True)
def _can_inject() -> None:
    if (reason := shim.why_not()) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("every", [331, pytest.param(151, marks=pytest.mark.thorough)])
def test_all_promises_are_kept_whatever_fails(every: int) -> None:
    with scratch("io-faults") as folder, Faults(folder) as faults:
        whole = faults.run(NO_FAULT)
        assert (whole.exit_code, whole.problems, whole.errors.total()) == (0, [], 0)
        results = [faults.run(fault) for fault in cases(whole.operations, every)]
    assert [(str(result.fault), result.problems) for result in results if result.problems] == []
    assert len(results) > 4_500 / every
    # The sample has to include a dead disk, a full one, and faults without any effect on callers.
    assert {result.fault.kind for result in results} == set(io_child.KINDS)
    assert {result.exit_code for result in results} >= {0, io_child.EXIT_STORAGE_FAILED, io_child.EXIT_NOT_OPENED}
    assert {name for result in results for name in result.errors} >= {"OutcomeUnknownError", "StorageError"}


def test_an_error_mistaken_for_an_abort_is_detected(tmp_path: Path) -> None:
    with Faults(tmp_path, "error-is-abort") as faults:
        operations = faults.run(NO_FAULT).operations["sync"]
        late = (faults.run(Fault("sync", number, "eio", True)) for number in range(2, operations))
        # Only some cases show it: those in which the failed sync leaves the group in the WAL.
        problems = next(result.problems for result in late if result.problems)
    assert {problem.partition(":")[0] for problem in problems} == {"refused, but written"}


def test_an_import_in_parts_is_detected(tmp_path: Path) -> None:
    with Faults(tmp_path, "import-in-parts") as faults:
        operations = faults.run(NO_FAULT).operations["write"]
        # Its writes are the last ones, except for those of the restore.
        late = (faults.run(Fault("write", number, "enospc", True)) for number in range(operations - 20, 0, -20))
        problems = next(result.problems for result in late if result.problems)
    assert {problem.partition(":")[0] for problem in problems} == {"half"}


def test_a_server_whose_disk_dies(tmp_path: Path) -> None:
    """It ends with exit code 70 and a message, callers fail at once, and the next start has all acknowledged writes."""
    database = tmp_path / "dying.db"
    ledger, checker = Ledger(), Checker()
    library = shim.build(tmp_path)
    with ServerProcess.start(server_argv(database), ready_timeout_s=within(30)) as process:
        names = asyncio.run(_set_up(process.port, ledger))
        assert process.terminate(ENDING_S) == 0
    clients = [Client(number, 1, ledger, names) for number in range(CLIENTS)]
    for number in (40, 80, 160):
        env = shim.environment(library, DSPEX_FAULT_AT=str(number), DSPEX_FAULT_GOES_ON="1")
        with ServerProcess.start(server_argv(database), env=env, ready_timeout_s=within(30)) as process:
            asyncio.run(_work(process.port, clients))
            assert process.wait(ENDING_S) == 70
            assert f"the storage of {database} failed, so the server ended" in process.stderr_tail
        assert checker.check(copy_files(database, tmp_path / "copy"), ledger) == []
        assert ledger.complaints == []
    assert set(ledger.endings) <= {"UNKNOWN", "UNAVAILABLE"}
    assert ledger.endings.total() == 3 * CLIENTS
    with ServerProcess.start(server_argv(database), ready_timeout_s=within(30)) as process:
        asyncio.run(_settle(process.port, clients))
        assert process.terminate(ENDING_S) == 0
    copy = copy_files(database, tmp_path / "copy")
    assert [*checker.check(copy, ledger), *Checker().check(copy, ledger), *verify(copy)] == []


def test_a_server_that_cannot_open_its_file(tmp_path: Path) -> None:
    database = tmp_path / "dead.db"
    env = shim.environment(shim.build(tmp_path), DSPEX_FAULT_AT="5", DSPEX_FAULT_GOES_ON="1")
    with ServerProcess(server_argv(database), env=env) as process:
        assert process.wait(ENDING_S) == 5
        assert process.stderr_tail == f"error: cannot open {database}: disk I/O error"


async def _set_up(port: int, ledger: Ledger) -> Names:
    async with Bridge(port) as bridge:
        return await set_up(bridge, ledger, CLIENTS)


async def _work(port: int, clients: list[Client]) -> None:
    async with Bridge(port) as bridge, asyncio.timeout(ENDING_S):
        await asyncio.gather(*(client.run(bridge) for client in clients))


async def _settle(port: int, clients: list[Client]) -> None:
    async with Bridge(port) as bridge:
        for client in clients:
            await client.settle(bridge)
