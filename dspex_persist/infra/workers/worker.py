"""One worker: a process that serves on an address, from its start to its end. It knows no services."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dspex_persist.errors import DspexError
from dspex_persist.infra import forks
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.workers.errors import output_or_nothing
from dspex_persist.infra.workers.orphans import Run, launched
from dspex_persist.infra.workers.output import READY_IN_LINE, READY_LINE, Output
from dspex_persist.spelling import closest, did_you_mean, quote

READY_FILE: Final = "SNAKEPIT_READY_FILE"
"""The environment variable that names the file to which a worker may write its port when it is ready."""

_PLACEHOLDER: Final = re.compile(r"\{([a-z_]+)\}")
_POLL_S: Final = 0.02
_POLL_EXIT_S: Final = 0.1
# How long a process that was killed may take to end: it may be writing to a disk that does not answer.
_KILLED_S: Final = 10.0

_logger: Final = get_logger(__name__)


@dataclass(eq=False)
class WorkerStartError(DspexError):
    """A worker did not start. `output`: the end of what it wrote."""

    retryable = True

    worker: str
    reason: str
    output: str = ""

    def __str__(self) -> str:
        return f"worker {self.worker} did not start: {self.reason}{output_or_nothing(self.output)}"


@dataclass(frozen=True, slots=True)
class WorkerCommand:
    """How a worker is started.

    Texts may have placeholders: `{socket}`, the path of a Unix socket in a private directory; `{port}`, in `argv` and
    `env` a free port, in `address` the one that the worker named when it was ready; `{ready_file}`, `{run_id}`,
    `{worker_id}`; and those of the pool's user.

    Attributes:
        argv: The program and its arguments.
        address: The gRPC target on which the worker serves.
        env: Variables to add to this process's environment; None removes one.
        cwd: The working directory; this process's by default.
        ready_timeout_s: How long the worker may take until it answers, in seconds.
        stop_timeout_s: How long it may take to end after SIGTERM; then it is killed.
    """

    argv: Sequence[str]
    address: str = "127.0.0.1:{port}"
    env: Mapping[str, str | None] = field(default_factory=dict)
    cwd: Path | None = None
    ready_timeout_s: float = 30.0
    stop_timeout_s: float = 6.0


class Worker:
    """A worker process, in a group of its own. Used on one event loop, whose thread has to outlive it.

    Attributes:
        id: Identifies it in the log and in errors.
        pid: The process.
        address: Its gRPC target; "" until it is ready.
        exited: Done with the exit code as soon as the process has ended (-9: by SIGKILL).
    """

    def __init__(self, command: WorkerCommand, run: Run, worker_id: str, placeholders: Mapping[str, str]) -> None:
        """Start the process.

        Args:
            command: How.
            run: What the worker belongs to.
            worker_id: Its id, which no other worker of the run has.
            placeholders: More names and what they stand for.

        Raises:
            WorkerStartError: The command is wrong, or the system starts no process.
        """
        self.id = worker_id
        self.address = ""
        self._command = command
        self._run = run
        self._loop = asyncio.get_running_loop()
        self._logger = _logger.bind(worker=worker_id)
        number = run.new_number()
        self._socket, self._ready_file = run.directory / f"{number}.sock", run.directory / f"{number}.ready"
        self._known = {
            **placeholders,
            "socket": str(self._socket),
            "ready_file": str(self._ready_file),
            "run_id": run.id,
            "worker_id": worker_id,
        }
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self._port: asyncio.Future[int] = self._loop.create_future()
        self._ready_text = ""
        self._stopping: asyncio.Task[None] | None = None
        self._outputs: list[Output] = []
        try:
            for stream, ready in (("stdout", READY_LINE), ("stderr", READY_IN_LINE)):
                self._outputs.append(Output(stream, ready, self._ready, self._logger))
            self._popen = self._start()
        except BaseException as error:
            for output in self._outputs:
                output.started()
                output.close()
            if isinstance(error, OSError | ValueError):
                raise WorkerStartError(self.id, f"the system starts no process: {error}") from error
            raise
        for output in self._outputs:
            output.started()
        self.pid = self._popen.pid
        self._is_ours = True
        forks.register(self)
        self._watch()

    def _start(self) -> "subprocess.Popen[bytes]":
        known = {**self._known, "port": str(_free_port())}
        argv = [self._filled(each, known) for each in self._command.argv]
        env = {**os.environ, READY_FILE: str(self._ready_file)}
        for name, text in self._command.env.items():
            if text is None:
                env.pop(name, None)
            else:
                env[name] = self._filled(text, known)
        env.update(self._run.environment(self.id))
        stdout, stderr = (output.writer for output in self._outputs)
        return subprocess.Popen(
            launched(argv),
            env=env,
            cwd=self._command.cwd,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            # Ctrl-C reaches only this process, which ends its workers, and all that they start.
            process_group=0,
        )

    def forked(self, *, quiet: bool) -> None:
        """See `forks.ForkListener`. The process is the parent's."""
        self._is_ours = False

    async def ready(self) -> str:
        """Wait until the worker says that it is ready, by a line or by its file, and return its address.

        Raises:
            WorkerStartError: It ended, or named no port.
        """
        while not self._port.done() and not self.exited.done():
            self._read_ready_file()
            await asyncio.wait({self._port, self.exited}, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED)
        if not self._port.done():
            raise WorkerStartError(self.id, self.ending, self.tail)
        port = self._port.result()
        if "{port}" in self._command.address and not 0 < port < 65536:
            raise WorkerStartError(self.id, f"it says that it is ready at port {port}", self.tail)
        self.address = self._filled(self._command.address, {**self._known, "port": str(port)})
        return self.address

    @property
    def ending(self) -> str:
        """How the process has ended, or that it runs, as the end of a sentence."""
        if self.has_exited:
            return ending_of(self.exited.result())
        return "is stopped (by a signal or a debugger)" if self.is_stopped else "still runs"

    @property
    def tail(self) -> str:
        """The end of what the worker wrote to stderr or, if that is nothing, to stdout; see `forget_output`."""
        stdout, stderr = (output.tail() for output in self._outputs)
        return stderr or stdout

    def forget_output(self) -> None:
        """Leave what the worker has written so far out of `tail`: it concerns others."""
        for output in self._outputs:
            output.forget()

    @property
    def has_exited(self) -> bool:
        """Whether the process has ended, even if the event loop has not learnt of it."""
        if not self.exited.done() and self._is_ours:
            self._look_for_exit()
        return self.exited.done()

    @property
    def is_stopped(self) -> bool:
        """Whether a signal or a debugger has stopped the process; False where the system does not say."""
        return self._of_status(b"State:").startswith(("T", "t"))

    @property
    def rss_bytes(self) -> int:
        """The memory that the process has in use; 0 where the system does not say."""
        return int(self._of_status(b"VmRSS:").partition(" ")[0] or 0) * 1024

    def kill(self) -> None:
        """Kill the process and its group; `stop` then waits until they are gone."""
        self._signal_group(signal.SIGKILL)

    async def stop(self) -> None:
        """End the process, with SIGTERM first, and all that it has started; returns when they are gone."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        if not self.has_exited:
            self._signal(signal.SIGTERM)
            # One that is stopped gets the other signal only then.
            self._signal(signal.SIGCONT)
            await asyncio.wait({self.exited}, timeout=self._command.stop_timeout_s)
        if not self.has_exited:
            self._logger.warning(
                "a worker did not end after SIGTERM and is killed", waited_s=self._command.stop_timeout_s
            )
            self.kill()
            await asyncio.wait({self.exited}, timeout=_KILLED_S)
        if not self.has_exited:
            self._logger.error("a killed worker does not end", pid=self.pid)
        # What it started may have left its group.
        left = await self._loop.run_in_executor(None, self._run.end_worker, self.id)
        if left:
            self._logger.warning("ended processes that a worker had left", pids=left)
        for output in self._outputs:
            output.close()
        for path in (self._socket, self._ready_file):
            path.unlink(missing_ok=True)
        forks.unregister(self)

    def _ready(self, port: int) -> None:
        if not self._port.done():
            self._port.set_result(port)

    def _read_ready_file(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            text = self._ready_file.read_text().strip()
            # A file that is not written at once may have half of the number: the rest comes before the next look.
            if len(text) <= 5 and text == self._ready_text:
                self._ready(int(text))
            self._ready_text = text

    def _filled(self, text: str, known: Mapping[str, str]) -> str:
        def of(match: re.Match[str]) -> str:
            if match[1] not in known:
                meant = did_you_mean(closest(match[1], known), spell=lambda name: f"{{{name}}}")
                names = meant or f"there are {', '.join(f'{{{name}}}' for name in sorted(known))}"
                raise WorkerStartError(self.id, f"unknown placeholder {match[0]} in {quote(text)}; {names}")
            return known[match[1]]

        return _PLACEHOLDER.sub(of, text)

    # --- The process

    def _watch(self) -> None:
        try:
            self._descriptor: int | None = forks.own(os.pidfd_open(self.pid))
        except (AttributeError, OSError):
            self._descriptor = None
            self._poll()
        else:
            self._loop.add_reader(self._descriptor, self._look_for_exit)

    def _poll(self) -> None:
        self._look_for_exit()
        if not self.exited.done():
            self._loop.call_later(_POLL_EXIT_S, self._poll)

    def _look_for_exit(self) -> None:
        if self.exited.done():
            return
        if hasattr(os, "waitid"):
            # Without reaping: until then neither the number of the process nor that of its group can be another one's.
            with contextlib.suppress(ChildProcessError):
                if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    return
            self._signal_group(signal.SIGKILL)
        code = self._popen.poll()
        if code is None:
            return
        if self._descriptor is not None:
            self._loop.remove_reader(self._descriptor)
            forks.close(self._descriptor)
            self._descriptor = None
        self.exited.set_result(code)
        for output in self._outputs:
            output.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._is_ours and not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _signal_group(self, number: signal.Signals) -> None:
        if self._is_ours and not self.exited.done():
            # Where its members have other rights, or it has none yet, at least the worker.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)
            self._signal(number)

    def _of_status(self, name: bytes) -> str:
        try:
            content = Path(f"/proc/{self.pid}/status").read_bytes() if not self.exited.done() else b""
        except OSError:
            return ""
        return content.partition(b"\n" + name)[2].partition(b"\n")[0].decode().strip()


def ending_of(exit_code: int) -> str:
    """Say how a process has ended, as the end of a sentence."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    memory = " (by somebody, or by the system because memory ran out)" if name == "SIGKILL" else ""
    return f"was killed by {name}{memory}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
