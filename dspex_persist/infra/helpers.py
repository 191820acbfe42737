"""Helper processes, which run a module of this package and exchange JSON with the process that started them.

A helper is a new interpreter, not a fork: a forked child would inherit locks that other threads hold, and connections
and event loops in the middle of something.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, Final

from dspex_persist.infra import forks

# Modules are imported from where this process imports them.
_BEGIN: Final = """
import json, sys
sys.path[:], name = json.loads(sys.stdin.readline())
from importlib import import_module
import_module(name).main()
"""


class HelperEndedError(Exception):
    """A helper ended unexpectedly, or its reply was not JSON."""


class Helper:
    """A process that carries out requests, one at a time. It ends when this process does, however that ends."""

    def __init__(self, module: str) -> None:
        """Start the process, which calls `main()` of `module`.

        Raises:
            OSError: It cannot be started.
            HelperEndedError: It ended at once.
        """
        requests, self._requests = os.pipe()
        # If a forked child kept this end of the pipe open, the helper would not notice the end of this process.
        forks.own(self._requests)
        try:
            self._popen = subprocess.Popen(
                (sys.executable, "-P", "-c", _BEGIN),
                stdin=requests,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Ctrl-C reaches only this process, which ends its helpers.
                process_group=0,
            )
        except BaseException:
            forks.close(self._requests)
            raise
        finally:
            os.close(requests)
        try:
            self._send((list(map(str, sys.path)), module))
        except HelperEndedError:
            self.kill()
            self.close()
            raise

    def ask(self, request: object) -> Iterator[Any]:
        """Send a request and iterate over the replies. The caller knows the last one.

        Raises:
            HelperEndedError: The helper has ended.
        """
        self._send(request)
        assert self._popen.stdout is not None, "it is a pipe"
        for line in self._popen.stdout:
            try:
                reply = json.loads(line)
            except ValueError as error:
                raise HelperEndedError from error
            yield reply
        raise HelperEndedError

    def kill(self) -> None:
        """Kill the process; a thread in `ask` gets a `HelperEndedError`."""
        if self._popen.poll() is None:
            # The group, because the interpreter may be a script that started another one.
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()

    def close(self) -> None:
        """Close the pipes of a helper that was killed. No thread may be in `ask`."""
        forks.close(self._requests)
        assert self._popen.stdout is not None, "it is a pipe"
        self._popen.stdout.close()

    def _send(self, request: object) -> None:
        line = json.dumps(request).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._requests, line) :]
        except OSError as error:
            raise HelperEndedError from error


# In the helper


def requests() -> Iterator[Any]:
    """In a helper: iterate over the requests. Ends this process when the one that started it has ended."""
    waiting: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_read_requests, args=(waiting,), daemon=True).start()
    while True:
        yield waiting.get()


def _read_requests(waiting: "SimpleQueue[Any]") -> None:
    for line in sys.stdin:
        waiting.put(json.loads(line))
    # The process that would read the replies has ended.
    os._exit(0)


def reply(document: object) -> None:
    """In a helper: send a reply."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()
