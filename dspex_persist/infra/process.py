"""Starts and ends a child process that prints `GRPC_READY:<port>` on stdout when it is ready."""

import atexit
import os
import re
import selectors
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from types import TracebackType
from typing import Final, Self

from dspex_persist.errors import DspexError

_READY: Final = re.compile(rb"GRPC_READY:([0-9]{1,5})\s*")
_TAIL_MAX_BYTES: Final = 16 * 1024
_LINE_MAX_BYTES: Final = 4 * 1024
_READ_BYTES: Final = 64 * 1024
_END_S: Final = 30.0
# How long to read the pipes of an ended child, which a grandchild may hold open.
_LAST_WORDS_S: Final = 5.0
_POLL_S: Final = 0.05


@dataclass(eq=False)
class ProcessFailedError(DspexError):
    """A child process failed to start, or to end; `exit_code` is None if it was still running."""

    argv: tuple[str, ...]
    reason: str
    exit_code: int | None
    stderr_tail: str

    def __str__(self) -> str:
        code = "" if self.exit_code is None else f" (exit code {self.exit_code})"
        stderr = f"stderr ends with:\n{self.stderr_tail}" if self.stderr_tail else "nothing on stderr"
        return f"{' '.join(self.argv)}: {self.reason}{code}; {stderr}"


class ServerProcess:
    """A child process that is a server.

    Use it as a context manager, or call `close`: that kills the child if it still runs. The child stays in this
    process's group, so that Ctrl-C reaches both, and a normal exit of the interpreter kills it (atexit). If a signal
    kills this process, the child lives on.
    """

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        """Start the child without waiting for it.

        Args:
            argv: The program and its arguments.
            env: The whole environment of the child; this process's by default.
            cwd: Its working directory.

        Raises:
            OSError: The program cannot be started.
        """
        self.argv = tuple(argv)
        self._popen = Popen(
            self.argv,
            env=None if env is None else dict(env),
            cwd=cwd,
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            bufsize=0,
        )
        atexit.register(self.kill)
        self._output = _Output(self._popen)

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        ready_timeout_s: float = 120.0,
    ) -> Self:
        """Start a child and wait until it is ready; if that fails, the child is killed.

        Args:
            argv: The program and its arguments.
            env: The whole environment of the child; this process's by default.
            cwd: Its working directory.
            ready_timeout_s: How long to wait, in seconds.

        Raises:
            OSError: The program cannot be started.
            ProcessFailedError: The child ended, or was not ready in time.
        """
        process = cls(argv, env=env, cwd=cwd)
        try:
            process.wait_ready(ready_timeout_s)
        except BaseException:
            process.close()
            raise
        return process

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def port(self) -> int:
        """The port that the child printed (0 for a Unix socket); `ProcessFailedError` before it is ready."""
        if self._output.port is None:
            raise self._failure("it is not ready yet")
        return self._output.port

    @property
    def stderr_tail(self) -> str:
        """The last output of the child on stderr, up to 16 KiB; complete once the child has ended."""
        if self.exit_code is not None:
            self._output.join(_LAST_WORDS_S)
        return self._output.tail()

    @property
    def exit_code(self) -> int | None:
        """The exit code of the child (-9: killed by SIGKILL), or None while it runs."""
        return self._popen.poll()

    def wait_ready(self, timeout_s: float) -> int:
        """Wait for the ready line and return its port; `ProcessFailedError` if the child ends or is too slow."""
        # Counts polls: with a clock that a test has frozen, a deadline would never come.
        for _ in range(max(1, round(timeout_s / _POLL_S))):
            # The end of stdout is not enough: a grandchild may hold it open.
            if self._output.settled.wait(_POLL_S) or self.exit_code is not None:
                break
        else:
            raise self._failure(f"it was not ready within {timeout_s:g} s")
        if self._output.port is None:
            self._await_end()
        if self._output.port is None:
            raise self._failure("it ended, or closed its stdout, before it was ready")
        return self._output.port

    def wait(self, timeout_s: float) -> int:
        """Wait until the child ends by itself and return its exit code; `ProcessFailedError` if it does not."""
        try:
            return self._popen.wait(timeout_s)
        except TimeoutExpired:
            raise self._failure(f"it still runs after {timeout_s:g} s") from None

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; does nothing if the child has ended."""
        self._popen.send_signal(number)

    def terminate(self, timeout_s: float) -> int:
        """End the child with SIGTERM and return its exit code; `ProcessFailedError` if it had to be killed."""
        self.send_signal(signal.SIGTERM)
        try:
            return self.wait(timeout_s)
        except ProcessFailedError:
            failure = self._failure(f"it did not end within {timeout_s:g} s of SIGTERM and was killed")
            self.kill()
            raise failure from None

    def kill(self) -> None:
        """Kill the child with SIGKILL and reap it; does nothing if it has ended."""
        self._popen.kill()
        self.wait(_END_S)

    def close(self) -> None:
        """Kill the child if it still runs, and free the pipes and the thread. May be called again."""
        try:
            self.kill()
        finally:
            atexit.unregister(self.kill)
            self._output.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _await_end(self) -> None:
        # The end of stdout comes a moment before the child can be reaped.
        try:
            self._popen.wait(_LAST_WORDS_S)
        except TimeoutExpired:
            return
        self._output.join(_LAST_WORDS_S)

    def _failure(self, reason: str) -> ProcessFailedError:
        return ProcessFailedError(self.argv, reason, self.exit_code, self.stderr_tail)


class _Output:
    """Reads a child's stdout and stderr on a thread, so that the child never blocks on a full pipe."""

    def __init__(self, popen: Popen[bytes]) -> None:
        assert popen.stdout is not None  # both are pipes
        assert popen.stderr is not None
        self.port: int | None = None
        self.settled = threading.Event()
        """Set once the port is known, or can no longer come."""
        self._stdout, self._stderr = popen.stdout, popen.stderr
        self._line = bytearray()
        self._tail = bytearray()
        self._lock = threading.Lock()
        # Closing the writing end ends the thread, even while a grandchild holds the child's pipes open.
        self._wake, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._run, name=f"output of {popen.pid}", daemon=True)
        self._thread.start()

    def tail(self) -> str:
        with self._lock:
            return self._tail.decode(errors="replace").strip()

    def join(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` seconds until all output of the child has been read."""
        self._thread.join(timeout_s)

    def close(self) -> None:
        if self._stdout.closed:
            return
        os.close(self._waker)
        self._thread.join()
        for pipe in (self._stdout, self._stderr):
            pipe.close()
        os.close(self._wake)

    def _run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._stdout, selectors.EVENT_READ, self._take_stdout)
                selector.register(self._stderr, selectors.EVENT_READ, self._take_stderr)
                selector.register(self._wake, selectors.EVENT_READ, None)
                self._read_all(selector)
        finally:
            self.settled.set()

    def _read_all(self, selector: selectors.BaseSelector) -> None:
        while len(selector.get_map()) > 1:
            for key, _ in selector.select():
                if key.data is None:
                    return
                chunk = os.read(key.fd, _READ_BYTES)
                key.data(chunk)
                if not chunk:
                    selector.unregister(key.fileobj)

    def _take_stdout(self, chunk: bytes) -> None:
        """Look for the ready line; discards everything after it."""
        if self.settled.is_set():
            return
        *lines, rest = (bytes(self._line) + chunk).split(b"\n")
        self._line[:] = rest[-_LINE_MAX_BYTES:]
        for line in lines:
            if match := _READY.fullmatch(line):
                self.port = int(match[1])
                self.settled.set()
                return
        if not chunk:
            self.settled.set()

    def _take_stderr(self, chunk: bytes) -> None:
        with self._lock:
            self._tail += chunk
            del self._tail[:-_TAIL_MAX_BYTES]
