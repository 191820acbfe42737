"""A real server for a test: a process of its own on a free port."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from dspex_persist.infra.process import ServerProcess

_END_S: Final = 20.0


class RunningServer:
    """A server on a database file, from its start to its end; in between it may be killed and started again."""

    def __init__(self, db: Path, tools: Sequence[str] = (), root: Path | None = None) -> None:
        """Start it, with the tools of these modules; they are looked for in `root` and where this process looks."""
        self.db = db
        self._tools = tuple(tools)
        self._root = root or Path.cwd()
        self._process: ServerProcess | None = None
        self.start()

    @property
    def process(self) -> ServerProcess:
        """The process. RuntimeError while there is none."""
        if self._process is None:
            raise RuntimeError("the server is not running: start() it")
        return self._process

    @property
    def target(self) -> str:
        """Where it answers, for gRPC."""
        return f"127.0.0.1:{self.process.port}"

    @property
    def url(self) -> str:
        """The same for `dspex_persist.connect`."""
        return f"grpc://{self.target}"

    def start(self) -> None:
        """Start it again on the same file; its port is another one."""
        if self._process is not None:
            return
        # The developer's own settings must not decide what a test sees.
        environment = {name: text for name, text in os.environ.items() if not name.startswith("DSPEX_PERSIST_")}
        environment["PYTHONPATH"] = os.pathsep.join([str(self._root), *(path for path in sys.path if path)])
        options = [option for reference in self._tools for option in ("--tools", reference)]
        command = [sys.executable, "-m", "dspex_persist", "serve", "--db", str(self.db), "--listen", "127.0.0.1:0"]
        self._process = ServerProcess.start([*command, *options], env=environment, cwd=self.db.parent)

    def kill(self) -> None:
        """End it at once, as kill -9 does."""
        self._end().close()

    def stop(self) -> int:
        """End it with SIGTERM, which lets calls finish; its exit code."""
        process = self._end()
        try:
            return process.terminate(_END_S)
        finally:
            process.close()

    def restart(self) -> None:
        """Stop it if it runs, and start it."""
        if self._process is not None:
            self.stop()
        self.start()

    def _end(self) -> ServerProcess:
        process, self._process = self.process, None
        return process

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.kill()
