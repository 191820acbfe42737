"""A full disk: every write of the group fails, nothing of it is kept, and there is no other damage."""

import asyncio
import json
import sqlite3
import sys
from pathlib import Path

import grpc
import grpc.aio
import pytest

from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.commands import InitializeSession, RegisterVariable, SetVariable, SetVariables
from dspex_persist.state.errors import StorageError
from dspex_persist.state.groups import Job
from dspex_persist.state.model import Origin, Value
from dspex_persist.state.store.session_store import FileGroups, open_groups
from tests.deadline import within
from tests.faults import shim
from tests.faults.bridge import Bridge, is_refusal, wire
from tests.faults.checker import Checker, copy_files, verify
from tests.faults.crash_test import server_argv
from tests.faults.ledger import Ledger

SESSION = "session"
ENDING_S = within(20)
_ORIGIN = Origin("test", "test")
# Sets a limit and becomes the server; exceeding it fails with EFBIG, because Python ignores the signal.
_LIMITED = (
    "import os, resource, sys; size = int(sys.argv[1]);"
    " resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)); os.execv(sys.argv[2], sys.argv[2:])"
)


def _job(command: SetVariable | SetVariables | RegisterVariable | InitializeSession) -> Job:
    return Job(command, _ORIGIN)


def _text(size: int) -> Value:
    return Value(json.dumps("x" * size))


def test_group_is_refused_whole_and_the_engine_goes_on(tmp_path: Path) -> None:
    store = open_groups(tmp_path / "full.db")
    store.write_group(
        [
            _job(InitializeSession(SESSION)),
            *(_job(RegisterVariable(SESSION, name, "string", Value('""'))) for name in "abc"),
        ]
    )
    before = store.log.head
    pages = _driver(store).execute("PRAGMA page_count").fetchone()[0]
    _driver(store).execute(f"PRAGMA max_page_count = {pages + 2}")
    group = [
        _job(SetVariable(SESSION, "a", Value('"small"'))),
        _job(SetVariables(SESSION, {"b": _text(100_000), "c": _text(100_001)}, atomic=True)),
        _job(SetVariable(SESSION, "a", Value('"small again"'))),
    ]
    outcomes = store.write_group(group)
    assert [type(outcome.error) for outcome in outcomes] == [StorageError] * 3
    assert "full" in str(outcomes[0].error)
    assert store.log.head == before
    state = store.find_loaded(SESSION)
    assert state is not None
    assert [(variable.version, variable.value.json) for variable in state.variables.values()] == [(0, '""')] * 3
    # Smaller writes, and later ones with room again, succeed as if nothing had happened.
    assert store.write_group([group[0]])[0].result == 1
    _driver(store).execute("PRAGMA max_page_count = 1000000")
    assert [outcome.error for outcome in store.write_group(group)] == [None] * 3
    assert store.log.head.sequence == before.sequence + 4
    store.close()
    copy = copy_files(store.log.path, tmp_path / "copy")
    assert [*Checker().check(copy, Ledger()), *verify(copy)] == []


def _driver(store: FileGroups) -> sqlite3.Connection:
    connection = store.log._connection.connection.driver_connection
    assert isinstance(connection, sqlite3.Connection)
    return connection


@pytest.mark.slow
def test_server_goes_on_when_there_is_room_again(tmp_path: Path) -> None:
    if (reason := shim.why_not()) is not None:
        pytest.skip(reason)
    database, full = tmp_path / "full.db", tmp_path / "there is no room"
    env = shim.environment(shim.build(tmp_path), DSPEX_FAULT_FULL_WHILE=str(full))
    with ServerProcess.start(server_argv(database), env=env, ready_timeout_s=within(30)) as process:
        asyncio.run(_fill_up(process.port, full))
        assert process.exit_code is None
        process.kill()
    copy = copy_files(database, tmp_path / "copy")
    checker = Checker()
    assert [*checker.check(copy, Ledger()), *verify(copy)] == []
    assert {version for version, _ in checker.values(SESSION).values()} == {2}


def _take_room(full: Path) -> None:
    full.touch()


def _give_room(full: Path) -> None:
    full.unlink()


async def _fill_up(port: int, full: Path) -> None:
    async with Bridge(port) as bridge:
        await bridge.begin(SESSION)
        names = [f"v{index}" for index in range(20)]
        for name in names:
            await bridge.register(SESSION, name, "string", "", {})

        async def set_all() -> list[int | BaseException]:
            sets = (bridge.set(SESSION, name, wire("string", name), {}) for name in names)
            return await asyncio.gather(*sets, return_exceptions=True)

        assert await set_all() == [1] * len(names)
        _take_room(full)
        for refused in await set_all():
            assert isinstance(refused, grpc.aio.AioRpcError)
            assert refused.code() is grpc.StatusCode.UNAVAILABLE
            assert is_refusal(refused), refused.details()
        for name in names:
            assert await bridge.get(SESSION, name) == (1, json.dumps(name))
        _give_room(full)
        assert await set_all() == [2] * len(names)


@pytest.mark.slow
def test_server_at_its_file_size_limit(tmp_path: Path) -> None:
    """SQLite reports EFBIG, unlike ENOSPC, as an I/O error, so the outcome is unknown and the server ends."""
    database = tmp_path / "limited.db"
    argv = [sys.executable, "-c", _LIMITED, str(1 << 20), *server_argv(database)]
    with ServerProcess.start(argv, ready_timeout_s=within(30)) as process:
        acknowledged = asyncio.run(_write_until_refused(process.port))
        assert process.wait(ENDING_S) == 70
        assert f"the storage of {database} failed, so the server ended" in process.stderr_tail
    copy = copy_files(database, tmp_path / "copy")
    checker = Checker()
    assert [*checker.check(copy, Ledger()), *verify(copy)] == []
    [(version, _)] = checker.values(SESSION).values()
    assert version in (acknowledged, acknowledged + 1)
    with ServerProcess.start(server_argv(database), ready_timeout_s=within(30)) as process:
        assert asyncio.run(_version(process.port)) == version
        assert process.terminate(ENDING_S) == 0


async def _write_until_refused(port: int) -> int:
    """Write until the server refuses; returns the last acknowledged version."""
    async with Bridge(port) as bridge:
        await bridge.begin(SESSION)
        await bridge.register(SESSION, "grows", "string", "", {})
        version = 0
        for count in range(100):
            try:
                version = await bridge.set(SESSION, "grows", wire("string", f"{count}" + "x" * 50_000), {})
            except grpc.aio.AioRpcError as ended:
                if ended.code() not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE):
                    raise
                return version
    raise AssertionError("the limit was never reached")


async def _version(port: int) -> int:
    async with Bridge(port) as bridge:
        version, _ = await bridge.get(SESSION, "grows")
        return version
