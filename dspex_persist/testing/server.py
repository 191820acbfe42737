"""A real server process on a database file, for tests that need one: started, killed, started again."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from dspex_persist.infra.process import ProcessFailedError, ServerProcess

_END_S: Final = 20.0
_TAKEN: Final = 75
"""With what a server ends that cannot have its port."""
_TRIES: Final = 5


class ServedDatabase:
    """`dspex-persist serve` in a process of its own, on a free port of 127.0.0.1, which stays the same for its life.

    `settings`: settings by name (`optimization_lease_s`, `tools`, ...), each different from its default; those of the
    environment do not count. The folder of the file is the process's working directory. Where `import_from` is given,
    the process can import what is there, and whatever this one can.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, object] | None = None,
        *,
        import_from: Path | None = None,
        ready_timeout_s: float = 120.0,
    ) -> None:
        """Start it and wait until it answers; ProcessFailedError if it does not."""
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
        """Where it listens, for a gRPC channel."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """The same for `dspex_persist.connect`."""
        return f"grpc://{self.target}"

    def kill(self) -> None:
        """End it at once (SIGKILL), as a crash does."""
        self.process.kill()

    def stop(self) -> int:
        """End it with SIGTERM, which lets calls finish; its exit code."""
        return self.process.terminate(_END_S)

    def restart(self) -> None:
        """Kill it if it runs, and start it again on the same file and port: clients connect again by themselves."""
        self.process.close()
        for _ in range(_TRIES - 1):
            try:
                self.process = self._start(self.port)
            except ProcessFailedError as failure:
                # Somebody's outgoing connection may have the port for a moment.
                if failure.exit_code != _TAKEN:
                    raise
            else:
                return
        self.process = self._start(self.port)

    def close(self) -> None:
        """Kill it; closing twice does nothing."""
        self.process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
