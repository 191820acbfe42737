"""Runs a server for the tests, and ends it: told to, or when the process that it is for has ended, however it did.

Started by `tests.engines` in a session of its own, with nothing but the standard library: whatever kills the tests must
not reach it. While it lives it starts the server again as soon as that ends, as a service manager would, but for
as long as there is a file `away` in the directory. The directory is its own: it makes it, and removes it at the end.
"""

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# A server that does not end by itself within this time, in seconds, is killed.
_ENDING_S = 10.0
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Supervisor:
    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self._directory = Path(plan["directory"])
        self._over = False
        self._owner = self._opened(plan["owner"])
        self._woken, wake = os.pipe2(os.O_NONBLOCK)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._end)
        for each in (signal.SIGINT, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)

    @staticmethod
    def _opened(pid: int) -> int | None:
        try:
            return os.pidfd_open(pid)
        except ProcessLookupError:
            return None

    def _end(self, *_: object) -> None:
        self._over = True

    def _wait(self, most_s: float | None) -> None:
        """Wait until a child has ended, a signal has come, the owner is gone, or the time is over."""
        if self._owner is None:
            self._over = True
        if self._over:
            return
        ready, _, _ = select.select([self._woken, self._owner], [], [], most_s)
        if self._owner in ready:
            self._over = True
        if self._woken in ready:
            os.read(self._woken, 4096)

    def _start(self, argv: list[str]) -> subprocess.Popen[bytes]:
        user = {"user": self._plan["uid"], "group": self._plan["gid"], "extra_groups": []} if os.geteuid() == 0 else {}
        with (self._directory / "log").open("ab") as log:
            return subprocess.Popen(
                argv,
                cwd=self._directory,
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,
                **user,
            )

    def run(self) -> None:
        self._directory.mkdir(mode=0o700)
        try:
            (self._directory / "supervisor").write_text(str(os.getpid()), encoding="ascii")
            if os.geteuid() == 0:
                os.chown(self._directory, self._plan["uid"], self._plan["gid"])
            for source, target in self._plan["copies"]:
                shutil.copytree(source, target, symlinks=True)
            for each in self._plan["preparations"]:
                if self._start(each).wait():
                    raise SystemExit(
                        f"{each[0]} failed: {(self._directory / 'log').read_text(encoding='utf-8', errors='replace')}"
                    )
            while not self._over:
                self._serve()
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _serve(self) -> None:
        while (self._directory / "away").exists():
            self._wait(0.02)
            if self._over:
                return
        server = self._start(self._plan["server"])
        while not self._over and server.poll() is None:
            self._wait(None)
        if server.poll() is None:
            # In this order: one that is stopped heeds no signal but SIGKILL.
            server.send_signal(self._plan["signal"])
            server.send_signal(signal.SIGCONT)
            try:
                server.wait(_ENDING_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
        elif not self._over:
            # It does not start while something of the one before it is still ending: not too often.
            time.sleep(0.01)


if __name__ == "__main__":
    _Supervisor(json.loads(sys.argv[1])).run()
