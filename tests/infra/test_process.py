"""Child processes, seen from the parent; the children are small scripts."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from dspex_persist.infra.process import ProcessFailedError, ServerProcess
from tests.deadline import within
from tests.infra.ping import ROOT

_READY = "print('GRPC_READY:1234', flush=True)\n"
_FOREVER = "import signal\nwhile True: signal.pause()\n"


def _argv(script: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(script)]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_port_is_read_from_the_ready_line() -> None:
    script = "print('GRPC_READY: no')\nprint('x GRPC_READY:1')\nprint('GRPC_READY:4321\\r')\nprint('GRPC_READY:5')"
    with ServerProcess.start(_argv(script + "\nimport sys; sys.stdout.flush()\n" + _FOREVER)) as process:
        assert process.port == 4321
        assert process.exit_code is None
        assert _exists(process.pid)
    assert not _exists(process.pid)


def test_a_ready_line_may_come_in_pieces() -> None:
    script = """
        import sys, time
        for piece in ("GRPC_", "READY:", "12", "34", "\\n"):
            sys.stdout.write(piece)
            sys.stdout.flush()
            time.sleep(0.02)
    """
    with ServerProcess.start(_argv(script)) as process:
        assert process.port == 1234


def test_a_child_gets_exactly_the_given_environment() -> None:
    script = "import os; print('GRPC_READY:' + os.environ['PORT'])"
    with ServerProcess.start(_argv(script), env={"PORT": "77"}) as process:
        assert process.port == 77


def test_a_child_with_much_output_never_waits_for_its_reader() -> None:
    script = f"""
        import sys
        def talk():
            for stream in (sys.stdout, sys.stderr):
                stream.write("x" * 1_000_000)
                stream.flush()
        talk()
        print()
        {_READY.strip()}
        talk()
        sys.stderr.write("last words")
    """
    with ServerProcess.start(_argv(script)) as process:
        assert process.wait(within(20)) == 0
        assert process.stderr_tail.endswith("xxlast words")
        assert len(process.stderr_tail) == 16 * 1024


def test_a_child_that_ends_before_it_is_ready() -> None:
    argv = _argv("import sys; print('GRPC_READY'); sys.exit('no room\\nleft')")
    with pytest.raises(ProcessFailedError) as caught:
        ServerProcess.start(argv)
    assert caught.value.argv == tuple(argv)
    assert caught.value.exit_code == 1
    assert caught.value.stderr_tail == "no room\nleft"
    assert "before it was ready (exit code 1); stderr ends with:\nno room\nleft" in str(caught.value)


def test_a_child_that_is_ready_too_late_is_not_left_running() -> None:
    script = "import os, sys; sys.stderr.write(str(os.getpid())); sys.stderr.close()\n" + _FOREVER
    process = ServerProcess(_argv(script))
    with process, pytest.raises(ProcessFailedError, match=r"it was not ready within 0\.5 s") as caught:
        process.wait_ready(0.5)
    assert caught.value.exit_code is None
    assert process.exit_code == -signal.SIGKILL
    with pytest.raises(ProcessFailedError, match="not ready within"):
        ServerProcess.start(_argv(script), ready_timeout_s=0.5)
    assert not any(thread.name.startswith("output of") for thread in threading.enumerate())


def test_a_child_can_be_killed_before_it_is_ready() -> None:
    with ServerProcess(_argv(_FOREVER)) as process:
        process.kill()
        assert process.exit_code == -signal.SIGKILL
        with pytest.raises(ProcessFailedError, match=r"before it was ready \(exit code -9\); nothing on stderr"):
            process.wait_ready(10)
        with pytest.raises(ProcessFailedError, match="it is not ready yet"):
            _ = process.port


def test_terminate_returns_the_exit_code() -> None:
    script = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n" + _READY + _FOREVER
    with ServerProcess.start(_argv(script)) as process:
        assert process.terminate(within(10)) == 7
        assert process.terminate(within(10)) == 7


def test_a_child_that_does_not_terminate_is_killed() -> None:
    script = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + _READY + _FOREVER
    with ServerProcess.start(_argv(script)) as process:
        with pytest.raises(ProcessFailedError, match=r"did not end within 0\.2 s of SIGTERM and was killed"):
            process.terminate(0.2)
        assert process.exit_code == -signal.SIGKILL


def test_waiting_for_a_child_that_does_not_end() -> None:
    with ServerProcess.start(_argv(_READY + _FOREVER)) as process:
        with pytest.raises(ProcessFailedError, match=r"it still runs after 0\.1 s"):
            process.wait(0.1)
        assert process.exit_code is None


def test_a_grandchild_that_holds_the_pipes_open_delays_nothing() -> None:
    script = f"""
        import subprocess, sys
        grandchild = subprocess.Popen([sys.executable, "-c", {_FOREVER!r}])
        sys.stderr.write(f"{{grandchild.pid}}\\n")
        sys.stderr.flush()
        {_READY.strip()}
    """
    process = ServerProcess.start(_argv(script))
    assert process.wait(within(10)) == 0
    grandchild = int(process.stderr_tail)
    try:
        process.close()
        assert _exists(grandchild)
        assert not any(thread.name.startswith("output of") for thread in threading.enumerate())
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_closing_frees_all_descriptors() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    process = ServerProcess.start(_argv(_READY + _FOREVER))
    process.close()
    process.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_program_that_cannot_be_started_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ServerProcess([str(tmp_path / "missing")])


def test_a_parent_that_exits_takes_its_child_along() -> None:
    parent = f"""
        from dspex_persist.infra.process import ServerProcess
        print(ServerProcess.start({_argv(_READY + _FOREVER)!r}).pid)
        raise SystemExit(5)
    """
    done = subprocess.run(_argv(parent), cwd=ROOT, capture_output=True, text=True, timeout=within(20), check=False)
    assert (done.returncode, done.stderr) == (5, "")
    assert not _exists(int(done.stdout))
