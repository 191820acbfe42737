"""Each checker has to find the bugs that it is made for, in servers with planted ones."""

import asyncio
import gc
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.store import engine
from tests.concurrency.clients import INITIAL, BridgeRegister, record
from tests.concurrency.linearizability import Operation, check
from tests.concurrency.observations import check as check_observations
from tests.concurrency.serializability import check as check_executions
from tests.concurrency.test_observations import SESSION, observations
from tests.concurrency.test_serializable import histories
from tests.deadline import within
from tests.faults import planted_server, shim
from tests.faults.bridge import Bridge
from tests.faults.chaos_test import Chaos
from tests.faults.crash_test import CrashTest, server_argv
from tests.faults.planted_server import BUGS
from tests.faults.powercut_test import PowerCuts
from tests.faults.recordings import Restored, Served
from tests.faults.soak_test import Soak
from tests.fuzz.fuzz_test import Fuzz
from tests.prepared import commands

ROOT = Path(__file__).parents[2]

FOUND_BY_KILLS = {
    "ack-before-commit": "lost",
    "half-batch": "half batch",
    "forget-keys": "written twice",
    "watch-skip": "watch",
    "watch-twice": "watch",
    "sequence-gap": "gap",
    # A tool with one write loses all of it, a tool with more loses half: either may come first.
    "drop-steps": ("lost", "half batch"),
    "half-tool": "half batch",
    "forget-tool-keys": "written twice",
    "leave-running": "still running",
}
FOUND_BY_POWER_CUTS = {
    "no-sync": Served,
    "early-anchor": Served,
    "restore-unsynced": Restored,
}
"""Found as lost, in these recordings."""
FOUND_BY_FUZZ = {
    "write-then-refuse": "were written",
}
FOUND_BY_SOAK = {
    "leak-memory": "memory",
    "leak-files": "files",
}
FOUND_BY_CHAOS = {
    "no-replacement": "pool",
    "keep-leases": "pool",
    "leave-orphans": "orphan",
    "wait-for-the-dead": "no answer",
    "late-writes": ("refused, but written", "written twice"),
    "no-reasons": "journal",
}
FOUND_BY_FILES = {"file-not-looked-at"}  # in test_files.py
FOUND_BY_REFUSED = {"keep-refused"}  # in tests/end_to_end/test_refused_calls.py
FOUND_BY_EXECUTIONS = {
    "no-read-check": "write skew",
    "no-conflict-check": "lost update",
    "stale-snapshot": "real-time order",
    "drop-steps": "lost update",
}
FOUND_BY_OBSERVATIONS = {
    "no-read-check": "stale read",
    "no-conflict-check": "stale read",
    "stale-snapshot": "stale read",
    "drop-steps": "lost",
}
FOUND_BY_HISTORIES = {
    "lost-update": "wrong version",
    "stale-read": "real-time order",
    "dirty-read": "dirty read",
    "duplicate-version": "duplicate version",
}


def always(bugs: Iterable[str], *chosen: str) -> list[Any]:
    """The bugs as parameters; only the chosen ones are planted in every run of the tests."""
    return [bug if bug in chosen else pytest.param(bug, marks=pytest.mark.thorough) for bug in bugs]


def test_every_bug_has_its_proof() -> None:
    proofs = (
        FOUND_BY_KILLS,
        FOUND_BY_POWER_CUTS,
        FOUND_BY_FUZZ,
        FOUND_BY_SOAK,
        FOUND_BY_CHAOS,
        FOUND_BY_FILES,
        FOUND_BY_REFUSED,
        FOUND_BY_HISTORIES,
        FOUND_BY_EXECUTIONS,
    )
    assert {bug for bugs in proofs for bug in bugs} == set(BUGS)


@pytest.mark.parametrize("bug", BUGS)
def test_every_bug_is_planted_in_what_is_there(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = list[str]()
    monkeypatch.setattr(planted_server, "_patch", lambda owner, name, _: planted.append(getattr(owner, name)))
    monkeypatch.setattr(engine, "_SYNCHRONOUS", engine._SYNCHRONOUS.copy())
    monkeypatch.setattr(gc, "disable", lambda: None)
    BUGS[bug]()
    assert planted or bug == "no-sync"


PROGRAM = """
import sys

import dspex_persist
from dspex_persist.state.errors import InternalError
from tests.faults.planted_server import BUGS

tools = dspex_persist.Toolbox()


@dspex_persist.tool
def increment(ctx: dspex_persist.ToolContext) -> int:
    ctx["a"] += 1
    ctx["b"] = ctx["a"]
    return ctx["a"]


@dspex_persist.tool
def look(ctx: dspex_persist.ToolContext) -> int:
    return ctx["a"]


@dspex_persist.tool
def fail(ctx: dspex_persist.ToolContext) -> int:
    raise ValueError("it fails")


for each in (increment, look, fail):
    tools.add(each)
BUGS[sys.argv[1]]()
with dspex_persist.connect("a.db", tools=tools) as state:
    state.initialize_session("s")
    for name in ("a", "b"):
        state.register_variable("s", name, "integer", 0)
    state.set_variable("s", "a", 1, idempotency_key="key")
    state.set_variables("s", {"a": 2, "b": 2})
    for tool in ("increment", "look", "fail"):
        for _ in range(2):
            try:
                state.execute_tool("s", tool, {}, idempotency_key=tool)
            except InternalError:
                raise
            except dspex_persist.DspexError as error:
                print(error)
"""


@pytest.mark.parametrize("bug", BUGS)
def test_no_bug_is_an_error_of_its_own(bug: str, tmp_path: Path) -> None:
    """What the checks are to find is a server that works, but for its bug."""
    (tmp_path / "use.py").write_text(PROGRAM)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = commands().run_python(["use.py", bug], cwd=tmp_path, env=env, timeout_s=within(20))
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bug", always(FOUND_BY_KILLS, "half-tool"))
def test_the_crash_test_finds(bug: str, tmp_path: Path) -> None:
    report = asyncio.run(CrashTest(tmp_path, seed=1, planted=bug).run(cycles=20))
    found = {problem.partition(":")[0] for problem in report.problems}
    expected = FOUND_BY_KILLS[bug]
    assert found & ({expected} if isinstance(expected, str) else {*expected}), report


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bug", always(FOUND_BY_POWER_CUTS, "no-sync"))
def test_the_power_cuts_find(bug: str, tmp_path: Path) -> None:
    if (reason := shim.why_not()) is not None:
        pytest.skip(reason)
    report = PowerCuts(tmp_path, seed=1, planted=bug, most_problems=3).run(210, {FOUND_BY_POWER_CUTS[bug]: 100})
    assert "lost" in {problem.split(": ")[1] for problem in report.problems}, report


@pytest.mark.slow
@pytest.mark.parametrize("bug", FOUND_BY_FUZZ)
def test_the_fuzz_finds(bug: str, tmp_path: Path) -> None:
    report = Fuzz(tmp_path, seed=1, planted=bug).run(600)
    assert any(FOUND_BY_FUZZ[bug] in problem for problem in report.problems), report


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="this test needs /proc, which only Linux has")
@pytest.mark.parametrize("bug", always(FOUND_BY_SOAK))
def test_the_soak_finds(bug: str, tmp_path: Path) -> None:
    report = asyncio.run(Soak(tmp_path, seed=1, planted=bug).soak(20))
    assert FOUND_BY_SOAK[bug] in {problem.partition(":")[0] for problem in report.problems}, report


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="this test needs /proc, which only Linux has")
@pytest.mark.parametrize("bug", always(FOUND_BY_CHAOS))
def test_the_chaos_test_finds(bug: str, tmp_path: Path) -> None:
    report = asyncio.run(Chaos(tmp_path, seed=1, planted=bug).chaos(24, lives=4))
    found, expected = {problem.partition(":")[0] for problem in report.problems}, FOUND_BY_CHAOS[bug]
    assert found & ({expected} if isinstance(expected, str) else {*expected}), report


@pytest.mark.slow
@pytest.mark.parametrize("bug", always(FOUND_BY_HISTORIES, "stale-read"))
def test_the_history_checker_finds(bug: str, tmp_path: Path) -> None:
    async def run(port: int) -> list[Operation]:
        async with Bridge(port) as bridge:
            return await record(await BridgeRegister.open(bridge), clients=16, operations=60, seed=1)

    with ServerProcess.start(server_argv(tmp_path / "served.db", bug), ready_timeout_s=within(30)) as process:
        history = asyncio.run(run(process.port))
    assert FOUND_BY_HISTORIES[bug] in {violation.rule for violation in check(history, INITIAL)}


@pytest.mark.slow
@pytest.mark.parametrize("bug", always(FOUND_BY_EXECUTIONS, "no-read-check"))
def test_the_checker_of_executions_finds(bug: str, tmp_path: Path) -> None:
    history = histories(tmp_path, "append", bug)
    assert FOUND_BY_EXECUTIONS[bug] in {violation.rule for violation in check_executions(history)}


@pytest.mark.slow
@pytest.mark.parametrize("bug", always(FOUND_BY_OBSERVATIONS, "no-read-check"))
def test_the_observations_find(bug: str, tmp_path: Path) -> None:
    database = tmp_path / "served.db"
    observed = observations(database, seed=1, bug=bug)
    found = {problem.partition(":")[0] for problem in check_observations(database, SESSION, observed)}
    assert FOUND_BY_OBSERVATIONS[bug] in found
