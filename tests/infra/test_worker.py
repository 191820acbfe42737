"""One worker process: how it says that it is ready, what it writes, and how it ends."""

import asyncio
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dspex_persist.infra.workers.orphans import Run
from dspex_persist.infra.workers.worker import READY_FILE, Worker, WorkerCommand, WorkerStartError, ending_of
from tests.deadline import within
from tests.infra.test_forks import in_child
from tests.infra.test_helpers import is_gone
from tests.infra.workers import PingContact, argv, command, on_loop, until
from tests.logs import capture_logs


@pytest.fixture
def run() -> Iterator[Run]:
    run = Run("a test")
    yield run
    run.close()
    assert not run.directory.exists()


@asynccontextmanager
async def started(run: Run, how: WorkerCommand, **placeholders: str) -> AsyncIterator[Worker]:
    worker = Worker(how, run, "w-1", placeholders)
    try:
        yield worker
    finally:
        await worker.stop()
        assert is_gone(worker.pid)


def script(code: str, **options: Any) -> WorkerCommand:
    return WorkerCommand([sys.executable, "-I", "-S", "-c", code], **options)


def next_descriptor() -> int:
    descriptor = os.dup(0)
    os.close(descriptor)
    return descriptor


def oom_score_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


async def ask(worker: Worker, *words: object) -> str:
    contact = PingContact(worker.id)
    await contact.connect(worker.address)
    return await contact.ask(*words)


@pytest.mark.parametrize("way", ["stdout", "stderr", "file"])
@on_loop
async def test_a_worker_says_in_one_of_three_ways_that_it_is_ready(run: Run, way: str) -> None:
    how = WorkerCommand(argv("--ready", way), stop_timeout_s=within(5))
    async with started(run, how) as worker:
        assert (await worker.ready()).startswith("127.0.0.1:")
        assert await ask(worker, "ping") == str(worker.pid)


@pytest.mark.parametrize(
    ("code", "port"),
    [
        ("print('GRPC_READY:12x'); print('x GRPC_READY:13'); print('  GRPC_READY:14 ')", 14),
        ("print('x' * 10_000 + '\\nGRPC_READY:15', end='\\r\\n')", 15),
        # A line that was too long for us may end in anything.
        ("print('x' * 1_999 + 'GRPC_READY:16\\nGRPC_READY:17')", 17),
        ("print('xGRPC_READY:18 GRPC_READY:19ms [GRPC_READY:20]', file=sys.stderr)", 20),
        ("[(print(each, end='', flush=True), time.sleep(0.02)) for each in ('GRPC_', 'READY:2', '1', '\\n')]", 21),
    ],
)
@on_loop
async def test_only_a_line_that_says_so_makes_a_worker_ready(run: Run, code: str, port: int) -> None:
    async with started(run, script(f"import signal, sys, time\n{code}\nsys.stdout.flush()\nsignal.pause()")) as worker:
        assert await worker.ready() == f"127.0.0.1:{port}"


@on_loop
async def test_placeholders_and_the_environment(run: Run) -> None:
    code = """
import os, sys
port, ready, mine, where = sys.argv[1:]
assert 0 < int(port) < 65536
assert ready == os.environ["SNAKEPIT_READY_FILE"]
assert os.environ["ADDED"] == f"{os.environ['DSPEX_WORKER']} {{}} {{'a': 1}}"
assert "HOME" not in os.environ
assert os.getcwd() == "/"
assert os.getpgid(0) == os.getpid()
open(ready, "w").write(f"{len(mine)}1\\n")
os.read(0, 1)
import signal
signal.pause()
"""
    how = WorkerCommand(
        [sys.executable, "-I", "-S", "-c", code, "{port}", "{ready_file}", "{mine}", "{run_id}"],
        address="host:{port}",
        env={"HOME": None, "ADDED": "{worker_id} {} {'a': 1}"},
        cwd=Path("/"),
    )
    async with started(run, how, mine="seven77") as worker:
        assert await worker.ready() == "host:71"
    with pytest.raises(
        WorkerStartError, match=r"unknown placeholder \{prot\} in '--port=\{prot\}'; did you mean \{port\}\?"
    ):
        Worker(WorkerCommand(["x", "--port={prot}"]), run, "w-2", {})


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (
            WorkerCommand(["/no/such/program"]),
            r"exit code 127; its output ends with:\ncannot start /no/such/program: No",
        ),
        (WorkerCommand(argv("--exit", "5")), r"ended with exit code 5; its output ends with:\nno adapter"),
        (script("import os; os.kill(os.getpid(), 9)"), r"was killed by SIGKILL \(by somebody, .*; it wrote nothing"),
        (
            script("print('GRPC_READY:0', flush=True)\nimport signal; signal.pause()"),
            r"says that it is ready at port 0",
        ),
    ],
)
@on_loop
async def test_a_worker_that_does_not_get_ready_says_why(run: Run, how: WorkerCommand, reason: str) -> None:
    async with started(run, how) as worker:
        with pytest.raises(WorkerStartError, match=rf"(?s)worker w-1 did not start: .*{reason}"):
            await worker.ready()


@on_loop
async def test_a_working_directory_that_does_not_exist(run: Run) -> None:
    with pytest.raises(WorkerStartError, match=r"starts no process: .*No such file"):
        Worker(command(cwd=Path("/no/such/directory")), run, "w-1", {})


@on_loop
async def test_a_process_without_descriptors_starts_no_worker_and_loses_none(run: Run) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for room in range(6):
        lowest = next_descriptor()
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + room, hard))
        try:
            with pytest.raises(WorkerStartError, match=r"the system starts no process: .*Too many open files"):
                Worker(command(), run, "w-1", {})
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert next_descriptor() == lowest


@on_loop
async def test_a_worker_that_ignores_sigterm_is_killed(run: Run) -> None:
    with capture_logs() as events:
        async with started(run, command("--ignore-term", stop_timeout_s=0.1)) as worker:
            await worker.ready()
    assert worker.ending.startswith("was killed by SIGKILL")
    assert "a worker did not end after SIGTERM and is killed" in [each["event"] for each in events]


@on_loop
async def test_a_stopped_worker_ends_by_sigterm(run: Run) -> None:
    async with started(run, command()) as worker:
        await worker.ready()
        os.kill(worker.pid, signal.SIGSTOP)
        await until(lambda: worker.is_stopped)
        assert worker.ending == "is stopped (by a signal or a debugger)"
    assert worker.ending == "was killed by SIGTERM"


@on_loop
async def test_what_a_worker_has_started_ends_with_it(run: Run) -> None:
    async with started(run, command()) as worker:
        await worker.ready()
        child, daemon = [int(await ask(worker, kind)) for kind in ("child", "daemon")]
        assert not is_gone(child)
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: is_gone(child))
        assert not is_gone(daemon)
        await worker.stop()
        await until(lambda: is_gone(daemon))


@on_loop
async def test_a_worker_and_its_memory(run: Run) -> None:
    async with started(run, command()) as worker:
        await worker.ready()
        before = worker.rss_bytes
        await ask(worker, "leak", 50_000_000)
        assert 40_000_000 < worker.rss_bytes - before < 100_000_000
    assert worker.rss_bytes == 0


@on_loop
async def test_last_words_are_read_to_the_end(run: Run) -> None:
    code = "import sys; print('out'); sys.stderr.write('x' * 3000 + '\\nno newline'); sys.stdout.flush(); sys.exit(1)"
    with capture_logs() as events:
        async with started(run, script(code)) as worker:
            await worker.exited
    written = [(each["worker"], each["stream"], each["text"]) for each in events if each["event"] == "a worker wrote"]
    assert sorted(written) == [("w-1", "stderr", "no newline"), ("w-1", "stderr", "x" * 2000), ("w-1", "stdout", "out")]
    assert worker.tail.endswith("x\nno newline")


@on_loop
async def test_events_of_its_log_keep_their_level_and_fields(run: Run) -> None:
    lines = [
        '{"event": "tool failed", "level": "error", "source": "shop", "timestamp": "2026-01-01", "worker": "another"}',
        '{"event": "no level"}',
        '{"event": 1, "level": "info"}',
        '{"level": "loud", "event": "x"}',
        "[" * 1_500,
        "{" * 1_500,
        "null",
    ]
    with capture_logs() as events:
        async with started(run, script(f"import sys; print(*{lines!r}, sep=chr(10), file=sys.stderr)")) as worker:
            await worker.exited
    (failed,) = [each for each in events if each["event"] == "tool failed"]
    expected = {"log_level": "error", "source": "shop", "worker": "w-1", "stream": "stderr"}
    assert {key: failed.get(key) for key in (*expected, "timestamp")} == {**expected, "timestamp": None}
    assert [each["text"] for each in events if each["event"] == "a worker wrote"] == lines[1:]


@on_loop
async def test_a_forked_child_does_not_touch_workers(run: Run) -> None:
    async with started(run, command()) as worker:
        await worker.ready()

        def end_all() -> None:
            worker.kill()
            run.close()
            run.end_worker(worker.id)
            run.sweep()
            assert not worker.has_exited

        in_child(end_all)
        assert run.directory.exists()
        assert await ask(worker, "ping")


def test_endings_in_words() -> None:
    assert ending_of(0) == "ended with exit code 0"
    assert ending_of(-11) == "was killed by SIGSEGV"
    assert ending_of(-63) == "was killed by signal 63"
    assert READY_FILE == "SNAKEPIT_READY_FILE"


@on_loop
async def test_workers_are_the_first_to_go_when_memory_runs_out(run: Run) -> None:
    async with started(run, command()) as worker:
        await worker.ready()
        assert oom_score_of(worker.pid) == min(oom_score_of(os.getpid()) + 300, 1000)


@on_loop
async def test_stopping_twice_is_stopping_once(run: Run) -> None:
    async with started(run, command()) as worker:
        await asyncio.gather(worker.stop(), worker.stop())
    await worker.stop()
