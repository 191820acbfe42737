"""As a library it prints nothing to stdout, and logs only through `logging`."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from dspex_persist import connect
from dspex_persist.state import commands
from dspex_persist.state.errors import InternalError

PROGRAM = """
import asyncio, logging, sys
import dspex_persist
from dspex_persist.state import commands
def fail(self, uow):
    raise ZeroDivisionError("a fault of ours")
commands.Heartbeat.apply = fail
if sys.argv[2] == "silenced":
    logging.getLogger("dspex_persist").setLevel(logging.CRITICAL)
if sys.argv[2] == "redirected":
    logging.basicConfig(filename=sys.argv[1] + ".log", level=logging.INFO)
@dspex_persist.tool
async def stop_the_loop() -> None:
    asyncio.get_running_loop().stop()
    await asyncio.sleep(0.01)
with dspex_persist.connect(sys.argv[1], tools=stop_the_loop) as state:
    state.initialize_session("s")
    state.execute_tool("s", "stop_the_loop")
    try:
        state.run(commands.Heartbeat("s"))
    except dspex_persist.DspexError:
        print("failed, as it should")
"""


@pytest.mark.parametrize("logs", ["not configured", "silenced", "redirected"])
def test_stdout_belongs_to_the_program(tmp_path: Path, logs: str) -> None:
    argv = [sys.executable, "-c", PROGRAM, str(tmp_path / "s.db"), logs]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "failed, as it should\n"
    log = (tmp_path / "s.db.log").read_text() if logs == "redirected" else ended.stderr
    if logs == "silenced":
        assert log == ""
    else:
        assert "command failed" in log
        assert "ZeroDivisionError: a fault of ours" in log
        assert "tried to stop it; it continues" in log
    if logs == "redirected":
        assert ended.stderr == ""
        assert "dspex_persist.state.groups" in log


def test_logging_captures_it(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(commands.Heartbeat, "apply", fail)
    with connect(tmp_path / "s.db") as state, pytest.raises(InternalError):
        state.run(commands.Heartbeat("s"))
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("dspex_persist.state.groups", logging.ERROR)
