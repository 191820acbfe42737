"""A real server process on a database file, for tests that need one: started, killed, started again."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from dspex_persist.infra.process import ServerProcess

_END_S: Final = 20.0


class ServedDatabase:
    """`dspex-persist serve` in a process of its own, on a free port of 127.0.0.1.

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
        ready_timeout_s: float = 30.0,
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
        """Kill it if it runs, and start it again on the same file."""
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
