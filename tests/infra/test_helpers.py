"""Helper processes: what they are asked and reply, and how they end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspex_persist.infra.helpers import Helper, HelperEndedError
from tests.deadline import within

ECHO = "tests.infra.echo"


@pytest.fixture
def helper() -> Iterator[Helper]:
    helper = Helper(ECHO)
    yield helper
    helper.kill()
    helper.close()


def test_a_helper_replies_to_one_request_after_the_other(helper: Helper) -> None:
    for request in ([1, "two", None], {"text": "漢 \ud800"}, "x" * 300_000):
        replies = helper.ask(request)
        assert [next(replies), next(replies)] == ["working", request]


def test_a_helper_has_the_modules_of_this_process(helper: Helper) -> None:
    assert next(helper.ask("path")) == [str(each) for each in sys.path]


def test_a_helper_that_ends_ends_what_waits_for_it(helper: Helper) -> None:
    os.kill(next(helper.ask("pid")), signal.SIGKILL)
    with pytest.raises(HelperEndedError):
        list(helper.ask("working"))


def test_a_helper_that_cannot_begin_ends(helper: Helper) -> None:
    other = Helper("tests.infra.no_such_module")
    try:
        with pytest.raises(HelperEndedError):
            list(other.ask(1))
    finally:
        other.kill()
        other.close()


def test_a_reply_that_is_not_json_ends_the_helper(helper: Helper) -> None:
    with pytest.raises(HelperEndedError):
        list(helper.ask("gibberish"))


def test_a_killed_helper_is_gone(helper: Helper) -> None:
    pid = next(helper.ask("pid"))
    helper.kill()
    assert is_gone(pid)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_busy_helper_ends_with_the_process_that_started_it(end: signal.Signals) -> None:
    code = f"""
import signal, sys
from dspex_persist.infra.helpers import Helper
# The test run may ignore SIGINT, and children inherit that.
signal.signal(signal.SIGINT, signal.SIG_DFL)
helper = Helper({ECHO!r})
print(next(helper.ask("pid")), flush=True)
print(next(helper.ask("busy")), flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert parent.stdout.readline() == "busy\n"
        parent.send_signal(end)
        parent.wait(within(30))
        await_gone(pid)


def test_a_forked_child_keeps_no_helper_alive(helper: Helper, tmp_path: Path) -> None:
    code = f"""
import os, signal, sys, time
from dspex_persist.infra.helpers import Helper
helper = Helper({ECHO!r})
print(next(helper.ask("pid")), flush=True)
child = os.fork()
if not child:
    os.close(1)
    signal.pause()
print(child, flush=True)
os._exit(0)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, child = int(parent.stdout.readline()), int(parent.stdout.readline())
        parent.wait(within(30))
        try:
            await_gone(pid)
            assert not is_gone(child)
        finally:
            os.kill(child, signal.SIGKILL)


def await_gone(pid: int) -> None:
    end = time.monotonic() + within(30)
    while not is_gone(pid):
        assert time.monotonic() < end, f"process {pid} is still there"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Return whether the process has ended, even if its parent has not reaped it yet."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
