"""Opening the state, or the history, at an address."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspex_persist.addresses import DatabaseUrl
from dspex_persist.infra.logs import quiet_grpc
from dspex_persist.opening import Opening
from dspex_persist.spelling import quote
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.options import SessionOptions
from dspex_persist.wiring.databases import database_at
from dspex_persist.wiring.options import check_options, options_of, sorted_options
from dspex_persist.wiring.places import FORMS, IN_MEMORY, Address, place_of

if TYPE_CHECKING:
    from dspex_persist.infra.workers.statistics import PoolStatistics
    from dspex_persist.state.abilities import StreamsTools
    from dspex_persist.state.audit import AuditSource
    from dspex_persist.state.bridged import BridgedState
    from dspex_persist.state.embedded import EmbeddedState
    from dspex_persist.state.local import LocalState


def connect(url: Address, **options: Any) -> "StreamsTools":
    """Open the session state at `url`.

    Every backend executes and streams tools. `capabilities` says what else it can do; with `isinstance`, a type checker
    knows it, too: a file and a server are `Durable`, `Prunable` and more (`dspex_persist.state.abilities`).

    Args:
        url: One of five kinds of address:

            - A path, `sqlite:///relative.db` or `sqlite:////absolute.db`: a database file. It is created if missing,
              and this process owns it until you close it. A relative path is resolved now; changing the working
              directory later has no effect.
            - `memory:` or `:memory:`: sessions in the memory of this process, lost when it exits. Each call opens an
              empty state.
            - `postgresql://USER@HOST/DATABASE?schema=NAME`: a PostgreSQL database, which any number of processes may
              have open. Its tables are created if missing.
            - `redis://HOST:PORT/NUMBER?prefix=NAME`: a Redis or Valkey server, likewise. It answers no audits.
            - `grpc://HOST:PORT`, `grpcs://HOST:PORT` (with TLS) or `grpc+unix:/PATH`: a server. The first call on it
              connects.
        options: For a file or a database: the fields of `StoreOptions` (durability, limits, session_ttl_s, ...),
            `sweep_interval_s`, `on_fatal`, `tool_threads`, and `tools`, which is anything that `Toolbox.of` accepts: a
            toolbox, a tool, a function, a module or its name, a list or a dict of these. For a database also
            `lease_s` and `anchor_dir`. For Redis: the fields of `SessionOptions`, `durability`, and what a database
            takes besides. In memory: the fields of `SessionOptions` (limits, session_ttl_s, ...), `sweep_interval_s`,
            `tools`, `tool_threads`. For a server: `timeout_s` (seconds), `breaker`, `cache`, `token`, `ca`, `cert` and
            `key` (files, for TLS), and others of `BridgedState`. For all: `actor`, who makes the changes, by default
            the user of this process.

    Returns:
        The provider. Close it when you are done; it is a context manager.

    Raises:
        InvalidArgumentError: The address, or the value of an option, is invalid.
        TypeError: There is no such option.
        OpenError: The file cannot be opened: it is in use, its folder is missing, it is another program's, ...
        ToolLoadError: `tools` contains no tools.
    """
    if url in IN_MEMORY:
        return _local(**options)
    place = place_of(url, forms=f"memory:, {FORMS}")
    if isinstance(place, DatabaseUrl):
        return database_at(place).connect(**options)
    return _embedded(place, **options) if isinstance(place, Path) else bridged(place, **options)


def is_there(url: Address) -> bool:
    """Whether there may be a session state at `url`: not if it is a file that does not exist."""
    place = "" if url in IN_MEMORY else place_of(url, forms=f"memory:, {FORMS}")
    return not isinstance(place, Path) or place.exists()


def aconnect(url: Address, **options: Any) -> "Opening[StreamsTools]":
    """Open the session state at `url` without blocking the event loop; the arguments are those of `connect`.

    Returns:
        What to await, or to use with `async with`, which closes the state at the end.
    """

    async def close(state: "StreamsTools") -> None:
        await asyncio.to_thread(state.close)

    return Opening(asyncio.to_thread(connect, url, **options), close)


def open_audit(url: Address, *, reveal: bool = False, **options: Any) -> "AuditSource":
    """Open the history at `url` for queries.

    A file is only read, so a server may have it open, and a backup works, too.

    Args:
        url: An address as for `connect`, except `memory:`.
        reveal: Show the values of sensitive variables. A server allows this only if it was started with
            `audit_reveal`.
        options: For a server only: `timeout_s` (seconds), `actor`.

    Returns:
        The source of the answers. Close it when you are done; it is a context manager.

    Raises:
        OpenError: The file is not a database of this package.
        InvalidArgumentError: The address is invalid.
    """
    place = place_of(url)
    if isinstance(place, Path):
        from dspex_persist.state.store import maintenance

        return maintenance.open_audit(place, reveal=reveal)
    if isinstance(place, DatabaseUrl):
        return database_at(place).audit(reveal=reveal)
    state = bridged(place, **options)
    return state.audit(reveal=reveal, on_close=state.close)


def list_workers(url: str, *, timeout_s: float = 30.0) -> "tuple[PoolStatistics, ...]":
    """Return the pools of a server with their workers, as they are now.

    Args:
        url: The address of the server, as for `connect`.
        timeout_s: How long to wait for the answer, in seconds.

    Raises:
        InvalidArgumentError: It is not the address of a server.
        UnavailableError: The server cannot be reached.
    """
    place = place_of(url)
    if not isinstance(place, str):
        what = "file" if isinstance(place, Path) else "database"
        raise InvalidArgumentError("url", f"{quote(place)} is a {what}, and only servers have workers")
    with bridged(place, timeout_s=timeout_s) as state:
        return state.list_workers()


def _embedded(path: Path, **options: Any) -> "EmbeddedState":
    from dspex_persist.state.embedded import EmbeddedState
    from dspex_persist.state.store.session_store import StoreOptions

    store_options, options = sorted_options(options, StoreOptions, EmbeddedState, "a file")
    return EmbeddedState(path, store_options, **options)


def _local(**options: Any) -> "LocalState":
    from dspex_persist.state.local import LocalState

    session_options, options = sorted_options(options, SessionOptions, LocalState, "a state in memory")
    return LocalState(session_options, **options)


def bridged(target: str, **options: Any) -> "BridgedState":
    """Return the state of the server at a target of gRPC."""
    quiet_grpc()
    from dspex_persist.state.bridged import BridgedState

    if options.get("tools") is not None:
        reason = (
            "a server has its own tools: start it with --tools MODULE, or register a worker's; or have a context run "
            "some here, Context(session_id, url, tools=...)"
        )
        raise InvalidArgumentError("tools", reason)
    options.pop("tools", None)
    check_options(options, options_of(BridgedState), "a server")
    return BridgedState(target, **options)
