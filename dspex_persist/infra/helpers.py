"""Helper processes: each runs a module of this package, and exchanges JSON with the process that started it.

A helper is a new interpreter, never a fork: a forked child would inherit the threads' locks, the connections and the
event loops of this process half done.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, Final

from dspex_persist.infra import forks

# The modules are those of this process, wherever it found them.
_BEGIN: Final = """
import json, sys
sys.path[:], name = json.loads(sys.stdin.readline())
from importlib import import_module
import_module(name).main()
"""


class HelperEndedError(Exception):
    """A helper ended, or replied with something else than JSON, before it was told to end."""


class Helper:
    """A process that carries out one request after the other. It ends with this process, whatever ends that."""

    def __init__(self, module: str) -> None:
        """Start the process, which calls `main()` of `module`.

        Raises:
            OSError: It cannot be started.
        """
        requests, self._requests = os.pipe()
        # A forked child of this process must not keep the helper from noticing the end of this process.
        forks.own(self._requests)
        try:
            self._popen = subprocess.Popen(
                (sys.executable, "-P", "-c", _BEGIN),
                stdin=requests,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Ctrl-C is for this process, which ends its helpers.
                process_group=0,
            )
        except BaseException:
            forks.close(self._requests)
            raise
        finally:
            os.close(requests)
        self.send((list(map(str, sys.path)), module))

    def send(self, request: object) -> None:
        """Send a request that has no reply.

        Raises:
            HelperEndedError: The helper has ended.
        """
        line = json.dumps(request).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._requests, line) :]
        except OSError as error:
            raise HelperEndedError from error

    def ask(self, request: object) -> Iterator[Any]:
        """Send a request and iterate over the replies. The caller knows which one is the last.

        Raises:
            HelperEndedError: The helper has ended.
        """
        self.send(request)
        assert self._popen.stdout is not None, "it is a pipe"
        for line in self._popen.stdout:
            try:
                reply = json.loads(line)
            except ValueError as error:
                raise HelperEndedError from error
            yield reply
        raise HelperEndedError

    def kill(self) -> None:
        """End the process at once; a thread in `ask` gets a `HelperEndedError`."""
        self._popen.kill()
        self._popen.wait()

    def close(self) -> None:
        """Release what is left of a helper that was killed. No thread may be in `ask`."""
        forks.close(self._requests)
        assert self._popen.stdout is not None, "it is a pipe"
        self._popen.stdout.close()


# In the helper


def requests() -> Iterator[Any]:
    """In a helper: iterate over the requests. The process ends as soon as the one that started it does."""
    waiting: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_read_requests, args=(waiting,), daemon=True).start()
    while True:
        yield waiting.get()


def _read_requests(waiting: "SimpleQueue[Any]") -> None:
    for line in sys.stdin:
        waiting.put(json.loads(line))
    # Nobody is there any more who would read what it is working on.
    os._exit(0)


def reply(document: object) -> None:
    """In a helper: send a reply."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()
