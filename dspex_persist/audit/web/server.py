"""Serves the website on a port of the loopback interface, with one Datasette, until a signal."""

import errno
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import uvicorn
from datasette.app import Datasette
from datasette.database import Database
from datasette.plugins import pm
from datasette.utils.asgi import Response

from dspex_persist.audit.web.questions import DATABASE, METADATA
from dspex_persist.audit.web.site import Site
from dspex_persist.infra.access.peers import PeerUsers, can_tell_users
from dspex_persist.infra.listen import ListenError
from dspex_persist.state.audit import AuditSource
from dspex_persist.state.store.history import views

_HOST: Final = "127.0.0.1"
_LAST_ANSWERS_S: Final = 2
_SETTINGS: Final = {
    "allow_download": False,
    "suggest_facets": False,
    "sql_time_limit_ms": 5_000,
    "facet_time_limit_ms": 2_000,
    "default_facet_size": 10,
    "truncate_cells_html": 200,
    "num_sql_threads": 2,
    "force_https_urls": False,
}


class _ReadOnlyFile(Database):  # type: ignore[misc]  # Datasette has no types
    """The file, which a server may be writing to. Datasette's own way to connect fails on a ? in the path."""

    def connect(self, write: bool = False) -> Any:
        connection = views.connect_read_only(Path(self.path))
        self._all_file_connections.append(connection)
        return connection

    async def execute(self, *arguments: Any, **options: Any) -> Any:
        """Return errors in a query to the browser, but do not log them, as they quote users' values."""
        return await super().execute(*arguments, **{**options, "log_sql_errors": False})

    async def foreign_keys_for_table(self, table: str) -> list[dict[str, str]]:
        """Return none: Datasette fails on foreign keys that do not name the column, such as those in our schema."""
        return []

    async def get_all_foreign_keys(self) -> dict[str, dict[str, list[object]]]:
        """Return none, as above."""
        return {table: {"incoming": [], "outgoing": []} for table in await self.table_names()}


class _OwnUser:
    """Answers processes of the user of this one, and of root, where the system says whose they are.

    Args:
        site: The ASGI application that answers them.
        port: The port to which they come.
    """

    def __init__(self, site: Any, port: int) -> None:
        self._site = site
        self._users = PeerUsers(_HOST, port) if can_tell_users() else None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] == "http" and self._users is not None:
            host, port = scope["client"] or ("", 0)
            reason, status = "this site answers its own user only", 403
            try:
                is_ours = self._users.are_we(f"ipv4:{host}:{port}")
            except OSError as error:
                is_ours, reason, status = False, f"the system does not say whose the call is: {error.strerror}", 503
            if not is_ours:
                await Response.text(reason, status=status).asgi_send(send)
                return
        await self._site(scope, receive, send)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, when_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._when_ready = when_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._when_ready()


def serve(path: Path, source: AuditSource, port: int, ready: Callable[[str], None]) -> None:
    """See `serve_website`."""
    with _listen(port) as listening:
        port = listening.getsockname()[1]
        url = f"http://{_HOST}:{port}/"
        config = uvicorn.Config(
            _OwnUser(application(path, source), port),
            log_level="warning",
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=_LAST_ANSWERS_S,
        )
        # uvicorn stops on these signals, and raises them again afterwards, which must not end the process.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        _Server(config, lambda: ready(url)).run([listening])


def _listen(port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((_HOST, port))
    except (OSError, OverflowError) as error:
        listening.close()
        number = error.errno if isinstance(error, OSError) else errno.EINVAL
        raise ListenError(f"{_HOST}:{port}", os.strerror(number or errno.EINVAL).lower()) from error
    return listening


def application(path: Path, source: AuditSource) -> Any:
    """Return the site as an ASGI application; only one per process, because Datasette's plugins are global."""
    # With rich, Datasette would print errors with all local variables, which contain users' values.
    pm.get_plugin("datasette.handle_exception").rich = None
    datasette = Datasette(metadata=METADATA, settings=_SETTINGS)
    datasette.remove_database("_memory")
    datasette.add_database(_ReadOnlyFile(datasette, str(path)), name=DATABASE)
    pm.register(Site(source))
    return datasette.app()
