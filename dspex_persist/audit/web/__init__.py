"""A website over a history: Datasette on the promised views, with pages of our own. Needs dspex-persist[web]."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from dspex_persist.errors import DspexError
from dspex_persist.state.audit import AuditSource


@dataclass(eq=False)
class NoWebsiteError(DspexError):
    """What the website needs is not installed."""

    def __str__(self) -> str:
        return "the website needs Datasette, which is not installed: pip install 'dspex-persist[web]'"


def serve_website(path: Path, source: AuditSource, port: int, ready: Callable[[str], None]) -> None:
    """Serve the file on 127.0.0.1 until SIGTERM or Ctrl-C; `ready` is told the URL when it answers.

    `source` is the same file's history, which answers what the views do not. The file is only read. Raises
    `NoWebsiteError`, and `ListenError` where the port cannot be had (0: any that is free).
    """
    if find_spec("datasette") is None or find_spec("uvicorn") is None:
        raise NoWebsiteError
    from dspex_persist.audit.web import server

    server.serve(path, source, port, ready)
