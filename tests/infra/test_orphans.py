"""No worker outlives the process that started it, however that ends; and nothing else is ended."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dspex_persist.infra import holder
from dspex_persist.infra.workers import orphans
from dspex_persist.infra.workers.orphans import RUN, Run
from tests.infra.ping import ROOT
from tests.infra.test_helpers import await_gone, is_gone

SERVER = """
import asyncio, signal, sys
from dspex_persist.infra.workers.orphans import Run
from dspex_persist.infra.workers.options import PoolOptions
from dspex_persist.infra.workers.pool import WorkerPool
from tests.infra.workers import PingContact, command
# The test run may ignore SIGINT, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
async def main():
    run = Run(sys.argv[1])
    pool = WorkerPool("ping", command("--ignore-term"), PingContact, run=run, options=PoolOptions(size=2))
    await pool.start()
    async with pool.lend() as lease:
        child = await lease.contact.ask("daemon")
    print(*(each.pid for each in pool.statistics().workers), child, run.directory, flush=True)
    await asyncio.get_running_loop().create_future()
asyncio.run(main())
"""


class Server:
    """A process with two workers, one of which has started a process of its own."""

    def __init__(self, popen: "subprocess.Popen[str]") -> None:
        assert popen.stdout is not None
        self.popen = popen
        *pids, directory = popen.stdout.readline().split()
        self.directory = Path(directory)
        *self.workers, self.grandchild = map(int, pids)

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.popen.send_signal(number)
        self.popen.wait()


@contextmanager
def server(subject: str) -> Iterator[Server]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, subject], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as popen:
        running = Server(popen)
        try:
            yield running
        finally:
            popen.kill()
            popen.wait()
            # Whatever a failed test has left.
            with_run(subject)


def with_run(subject: str) -> list[int]:
    """What a new run of a subject ends of the older ones."""
    run = Run(subject)
    try:
        return run.sweep()
    finally:
        run.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_server_and_the_next_one_ends_what_they_left(
    tmp_path: Path, number: signal.Signals
) -> None:
    subject = str(tmp_path / "mine.db")
    with server(subject) as mine, server(str(tmp_path / "other.db")) as other:
        assert with_run(subject) == []
        assert not is_gone(mine.grandchild)
        mine.end(number)
        for pid in mine.workers:
            await_gone(pid)
        assert not is_gone(mine.grandchild)
        assert mine.directory.exists()
        # Processes of another subject are not ended. Nobody needs the directory any more.
        assert with_run(str(tmp_path / "third.db")) == []
        assert not is_gone(mine.grandchild)
        assert not mine.directory.exists()
        assert with_run(subject) == [mine.grandchild]
        await_gone(mine.grandchild)
        assert not any(map(is_gone, [*other.workers, other.grandchild]))
        assert other.directory.exists()


def test_a_worker_whose_server_ends_while_it_starts_does_not_begin() -> None:
    code = "import os; print(os.getpid(), flush=True)"
    argv = orphans.launched([sys.executable, "-c", code])
    # As if its parent were gone, and another process had adopted it.
    argv[argv.index(str(os.getpid()))] = "1"
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_the_environment_of_a_run_names_its_owner() -> None:
    run = Run("a subject")
    try:
        marks = run.environment("w")
        assert run.id in marks[RUN]
        assert holder.pid_of(marks[RUN].split(" ", 2)[2].encode()) == os.getpid()
        assert (run.directory.stat().st_mode & 0o777) == 0o700
    finally:
        run.close()
        run.close()
    assert not run.directory.exists()


def test_only_a_process_that_certainly_ended_here_has_ended() -> None:
    own = holder.own_text()
    assert not holder.has_ended(own)
    with subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read()
        text = own.replace(f"{os.getpid()} ".encode(), f"{child.pid} ".encode(), 1)
    assert holder.has_ended(text)
    # One with the same number that began at another time.
    start = own.split()[1]
    assert holder.has_ended(own.replace(start, b"1"))
    # In another container, whose processes we may see, but not their numbers there.
    namespace = own.split()[2]
    assert not holder.has_ended(text.replace(namespace, b"pid:[1]"))
    assert not holder.has_ended(b"anything")


def test_a_long_temporary_folder_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 60)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    run = Run("a subject")
    run.close()
    assert run.directory.parent == Path("/tmp")
