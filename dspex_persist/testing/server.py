"""A real server process on a database file, for tests that need one: started, killed, started again."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from dspex_persist.infra.process import ServerProcess


class ServedDatabase:
    """`dspex-persist serve` in a process of its own, on a free port of 127.0.0.1.

    `settings`: settings by name (`optimization_lease_s`, `variables_per_session`, ...), each different from its
    default. The folder of the file is the process's working directory.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, object] | None = None, *, ready_timeout_s: float = 30.0
    ) -> None:
        """Start it and wait until it answers; ProcessFailedError if it does not."""
        self.path = path
        self._environment = dict(os.environ)
        self._environment.update(
            (f"DSPEX_PERSIST_{name.upper()}", str(setting)) for name, setting in (settings or {}).items()
        )
        self._ready_timeout_s = ready_timeout_s
        self.process = self._start()

    def _start(self) -> ServerProcess:
        serve = (sys.executable, "-m", "dspex_persist", "serve")
        return ServerProcess.start(
            (*serve, "--db", str(self.path), "--listen", "127.0.0.1:0"),
            env=self._environment,
            cwd=self.path.parent,
            ready_timeout_s=self._ready_timeout_s,
        )

    @property
    def target(self) -> str:
        """Where it listens, for a gRPC channel. A restart changes it."""
        return f"127.0.0.1:{self.process.port}"

    def restart(self) -> None:
        """Kill it (SIGKILL) and start it again on the same file."""
        self.process.close()
        self.process = self._start()

    def close(self) -> None:
        """Kill it; closing twice does nothing."""
        self.process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
