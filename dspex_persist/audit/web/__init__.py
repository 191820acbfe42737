"""A website over a history: Datasette on the stable views, with additional pages. Needs dspex-persist[web]."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from dspex_persist.errors import DspexError
from dspex_persist.extras import how_to_install
from dspex_persist.state.audit import AuditSource


@dataclass(eq=False)
class NoWebsiteError(DspexError):
    """Datasette, which the website needs, is not installed."""

    def __str__(self) -> str:
        return f"the website needs Datasette, which is not installed: {how_to_install('web')}"


def serve_website(path: Path, source: AuditSource, port: int, ready: Callable[[str], None]) -> None:
    """Serve a website over a database file on 127.0.0.1 until SIGTERM or Ctrl-C. The file is only read.

    Args:
        path: The file.
        source: The history in the same file, for pages that the views cannot provide.
        port: The port; 0 is any free one.
        ready: Is called with the URL as soon as the site answers.

    Raises:
        NoWebsiteError: Datasette is not installed.
        ListenError: The port is in use, or cannot be bound.
    """
    if find_spec("datasette") is None or find_spec("uvicorn") is None:
        raise NoWebsiteError
    from dspex_persist.audit.web import server

    server.serve(path, source, port, ready)
