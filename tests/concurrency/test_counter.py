"""Many clients increment one counter with `expected_version` and retry on conflicts: the total is exact."""

import asyncio
import threading
from pathlib import Path

from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import VersionConflictError
from tests.concurrency.clients import NAME, SESSION, BridgeRegister, increment
from tests.deadline import within
from tests.faults.bridge import Bridge
from tests.faults.crash_test import server_argv

CLIENTS, TIMES = 32, 4


def test_clients_of_a_server(tmp_path: Path) -> None:
    async def run(port: int) -> tuple[int, tuple[int, str]]:
        async with Bridge(port) as bridge:
            register = await BridgeRegister.open(bridge, "integer", "0")
            # A client cannot expect version 0: 0 means any version.
            assert await register.set("0", 0) == 1
            attempts = await asyncio.gather(*(increment(register, TIMES) for _ in range(CLIENTS)))
            return sum(attempts), await register.get()

    with ServerProcess.start(server_argv(tmp_path / "served.db"), ready_timeout_s=within(30)) as process:
        attempts, (version, value) = asyncio.run(run(process.port))
    assert attempts > CLIENTS * TIMES, "there was no conflict"
    assert (version, value) == (CLIENTS * TIMES + 1, str(CLIENTS * TIMES))


def test_threads_in_one_process(tmp_path: Path) -> None:
    conflicts: list[int] = []

    def work(provider: EmbeddedState) -> None:
        lost = 0
        for _ in range(TIMES):
            while True:
                variable = provider.get_variable(SESSION, NAME)
                try:
                    provider.set_variable(
                        SESSION, NAME, int(variable.value.json) + 1, expected_version=variable.version
                    )
                except VersionConflictError:
                    lost += 1
                    continue
                break
        conflicts.append(lost)

    with EmbeddedState(tmp_path / "embedded.db") as provider:
        provider.initialize_session(SESSION)
        provider.register_variable(SESSION, NAME, "integer", 0)
        provider.set_variable(SESSION, NAME, 0)
        threads = [threading.Thread(target=work, args=(provider,)) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(within(60))
        assert len(conflicts) == CLIENTS
        assert sum(conflicts) > 0
        assert provider.get_value(SESSION, NAME) == CLIENTS * TIMES
        assert provider.get_variable(SESSION, NAME).version == CLIENTS * TIMES + 1
        history = provider.get_variable_history(SESSION, NAME, 1000)
        assert [entry.version for entry in history] == list(range(CLIENTS * TIMES + 1, -1, -1))
