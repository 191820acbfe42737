"""A real server process on a database file, which tests can start, kill and restart."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from dspex_persist.infra.process import ProcessFailedError, ServerProcess

_END_S: Final = 20.0
_PORT_IN_USE: Final = 75
"""The exit code of a server whose port is in use."""
_TRIES: Final = 5


class ServedDatabase:
    """`dspex-persist serve` in a separate process, on a free port of 127.0.0.1 that it keeps across restarts.

    The working directory of the process is the folder of the file.

    Args:
        path: The database.
        settings: Settings by name (`optimization_lease_s`, `tools`, ...) that differ from the defaults. Settings in the
            environment are ignored.
        import_from: A folder that the process can import from, in addition to everything that this process can import;
            None to leave its import path alone.
        ready_timeout_s: How long to wait until the server is ready, in seconds.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, object] | None = None,
        *,
        import_from: Path | None = None,
        ready_timeout_s: float = 120.0,
    ) -> None:
        """Start it and wait until it is ready; raise `ProcessFailedError` if it does not get there."""
        self.path = path
        self._environment = {name: text for name, text in os.environ.items() if not name.startswith("DSPEX_PERSIST_")}
        if import_from is not None:
            self._environment["PYTHONPATH"] = os.pathsep.join([str(import_from), *(each for each in sys.path if each)])
        self._environment.update(
            (f"DSPEX_PERSIST_{name.upper()}", str(setting)) for name, setting in (settings or {}).items()
        )
        self._ready_timeout_s = ready_timeout_s
        self.process = self._start(0)
        self.port = self.process.port

    def _start(self, port: int) -> ServerProcess:
        serve = (sys.executable, "-m", "dspex_persist", "serve")
        return ServerProcess.start(
            (*serve, "--db", str(self.path), "--listen", f"127.0.0.1:{port}"),
            env=self._environment,
            cwd=self.path.parent,
            ready_timeout_s=self._ready_timeout_s,
        )

    @property
    def target(self) -> str:
        """Its address, for a gRPC channel."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Its URL, for `dspex_persist.connect`."""
        return f"grpc://{self.target}"

    def kill(self) -> None:
        """End it immediately with SIGKILL, like a crash."""
        self.process.kill()

    def stop(self) -> int:
        """End it with SIGTERM, which lets calls finish, and return its exit code."""
        return self.process.terminate(_END_S)

    def restart(self) -> None:
        """Kill it if it is running, and start it on the same file and port; clients reconnect by themselves."""
        self.process.close()
        for _ in range(_TRIES - 1):
            try:
                self.process = self._start(self.port)
            except ProcessFailedError as failure:
                # An outgoing connection of another process may use the port for a moment.
                if failure.exit_code != _PORT_IN_USE:
                    raise
            else:
                return
        self.process = self._start(self.port)

    def close(self) -> None:
        """Kill it if it is running."""
        self.process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
