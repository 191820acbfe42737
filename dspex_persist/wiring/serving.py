"""The server of a database: assembled from its settings, and run until it is told to end."""

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dspex_persist.errors import DspexError
from dspex_persist.infra import streams
from dspex_persist.infra.interrupts import interrupts
from dspex_persist.infra.listen import is_loopback, parse_listen, prepare, settled
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.stopping import loop_factory, spare_the_collector
from dspex_persist.settings import Settings, SettingsError
from dspex_persist.state.errors import CheckpointError, StateError
from dspex_persist.state.provider import StateProvider
from dspex_persist.wiring.access import Security, access_of, security_of
from dspex_persist.wiring.ending import ServerEnd, StorageFailedError
from dspex_persist.wiring.life import STARTING_S, Life
from dspex_persist.wiring.limits import limits_of
from dspex_persist.wiring.reporting import quiet, traced
from dspex_persist.wiring.tools import check_names, load_tools, plans_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dspex_persist.infra.notify import Notifier
    from dspex_persist.state.bridge.workers.pools import PoolPlan
    from dspex_persist.state.denials import NoteDenial, Refused
    from dspex_persist.state.embedded import SqliteState
    from dspex_persist.state.meter import Meter
    from dspex_persist.state.tools.ports import ToolCode

# How often Python switches threads, in seconds (Python's default is 0.005).
SWITCH_INTERVAL_S: Final = 0.005
# After so long without progress the writer counts as stuck: longer than it waits for a lock of another program.
_STUCK_S: Final = 30.0
# Streams of one connection besides its watches.
_OTHER_STREAMS: Final = 1_000

_log: Final = get_logger(__name__)


def serve(settings: Settings) -> None:
    """Serve the database at `settings.db` until SIGTERM or SIGINT, then drain and return.

    Prints `GRPC_READY:<port>` on stdout when it is ready (port 0: a Unix socket), and tells the service manager if
    there is one (`infra.notify`); logs go to stderr. A second signal ends the process at once.

    Raises:
        SettingsError: The address is invalid, or can be reached from other machines without `insecure`.
        OpenError: The database cannot be opened. The port has not been bound by then.
        ListenError: The address is in use, or cannot be bound.
        StorageFailedError: The storage failed while the server was running.
    """
    from dspex_persist.infra.notify import Notifier

    notifier = Notifier.of_process()
    try:
        security = security_of(settings)
        quiet(settings)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        with traced(settings), asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(_serve(settings, security, notifier))
    except (DspexError, SettingsError) as error:
        notifier.status(str(error))
        raise


async def _serve(settings: Settings, security: Security, notifier: "Notifier") -> None:
    end = ServerEnd(asyncio.get_running_loop(), str(settings.db))
    path, listen = _check_places(settings)
    here = Path.cwd()
    # Started here and not where the time is needed, as starting and ending are not in one block.
    starting, ending = contextlib.ExitStack(), contextlib.ExitStack()
    with starting, ending:
        starting.enter_context(notifier.taking_long(STARTING_S))
        # Before the file is opened: importing them takes time, and may fail.
        if settings.tools:
            notifier.status(f"importing the tools of {', '.join(settings.tools)}")
        tools = load_tools(settings)
        plans = plans_of(settings, here)
        if settings.workers and not settings.tools:
            _log.warning(
                "no workers", workers=settings.workers, reason="there are no tools to run: name some (--tools)"
            )
        check_names(plans, tools)
        # Opening locks the file. A second server on it fails here, before it binds its address.
        notifier.status(f"opening {settings.db}: recovery, and an upgrade if an older release wrote it")
        meter = _meter_of(settings, tools, plans)
        engine = _open(settings, _settled(settings.db, path), end.on_storage_failed, meter)
        life = Life(notifier, settings, engine, starting, ending)
        try:
            await _serve_bridge(settings, listen, security, engine, tools, end, here, plans, life)
        finally:
            life.closing()
            _close(engine, settings.db)
    if end.failure is not None:
        raise end.failure
    _log.info("stopped", db=str(settings.db))


def _check_places(settings: Settings) -> tuple[Path, str]:
    """Return the absolute path and address, which stay valid if tools change the working directory.

    A file or address that is in use fails here, before any file is created.
    """
    from dspex_persist.state.store import maintenance

    path, address = maintenance.refuse_owned(settings.db), parse_listen(settings.listen)
    prepare(address)
    if settings.metrics_listen is not None:
        prepare(parse_listen(settings.metrics_listen))
    return path, str(settled(address))


def _settled(path: Path, absolute: Path) -> Path:
    """Return `path`, or `absolute` if importing the tools changed the working directory that `path` depends on."""
    return path if path.resolve() == absolute else absolute


def _meter_of(settings: Settings, tools: "Iterable[str]", plans: "Iterable[PoolPlan]") -> "Meter | None":
    """Return what counts for the metrics; None if nobody wants to see them."""
    if settings.metrics_listen is None:
        return None
    from dspex_persist.state.meter import Meter

    return Meter([*tools, *(name for plan in plans for name in plan.tools)])


def _open(
    settings: Settings, path: Path, on_fatal: Callable[[BaseException], None], meter: "Meter | None"
) -> "SqliteState":
    """Open the engine on the database of `settings`."""
    from dspex_persist.state.embedded import SqliteState
    from dspex_persist.state.store.session_store import StoreOptions

    options = StoreOptions(
        durability=settings.durability,
        limits=limits_of(settings),
        session_ttl_s=settings.session_ttl_s,
        optimization_lease_s=settings.optimization_lease_s,
        cache_size_bytes=int(settings.cache_size_bytes),
        outcome_retention_s=settings.outcome_retention_s,
        retention_keep_versions=settings.retention_keep_versions,
        retention_age_s=settings.retention_age_s,
        retention_ended_sessions_s=settings.retention_ended_sessions_s,
        warn_size_bytes=settings.warn_size_bytes,
        denials_kept=settings.denials_kept,
    )
    return SqliteState(path, options, sweep_interval_s=settings.sweep_interval_s, on_fatal=on_fatal, meter=meter)


def _close(provider: StateProvider, path: Path) -> None:
    try:
        provider.close()
    except CheckpointError as error:
        raise StorageFailedError(str(path), error) from error


async def _serve_bridge(
    settings: Settings,
    listen: str,
    security: Security,
    engine: "SqliteState",
    tools: "Mapping[str, ToolCode]",
    end: "ServerEnd",
    here: Path,
    plans: "list[PoolPlan]",
    life: "Life",
) -> None:
    from dspex_persist.infra import server
    from dspex_persist.infra.metrics import CallMeter
    from dspex_persist.state.bridge.access.denials import Denials
    from dspex_persist.state.bridge.access.guard import guarded
    from dspex_persist.state.bridge.access.lives import Lives
    from dspex_persist.state.bridge.access.same_user import SameUser
    from dspex_persist.state.bridge.audit_service import AuditServicer
    from dspex_persist.state.bridge.capabilities import Capabilities
    from dspex_persist.state.bridge.codec import BRIDGE_SERVICE
    from dspex_persist.state.bridge.rpcs.audit import AUDIT_SERVICE
    from dspex_persist.state.bridge.servicer import BridgeServicer
    from dspex_persist.state.bridge.status import status_of
    from dspex_persist.state.bridge.traced import OF_CLIENTS
    from dspex_persist.state.bridge.workers.pools import Pools
    from dspex_persist.state.bridge.workers.remote import RemoteTools
    from dspex_persist.state.budgets import Budget
    from dspex_persist.state.tools.with_tools import WithTools

    def on_ready(port: int) -> None:
        if users is not None:
            users.serves(port)
        spare_the_collector(had_tools=bool(tools))
        scheme = "" if certificates is None else "grpcs://"
        address = f"{scheme}{listen.rpartition(':')[0]}:{port}" if port else listen
        engine.announce(address)
        life.serving(address)
        ready.set()
        error = streams.print_line(f"GRPC_READY:{port}")
        if error is not None:
            # The parent process may not wait for that line, and clients can be served without it.
            _log.warning("could not print the ready line", reason=str(error))
        tls = {} if certificates is None else {"tls": "mutual" if certificates.asks_clients else "server"}
        if certificates is not None and security.is_open and not is_loopback(settings.listen):
            _log.warning("anyone who can connect can read and change every session: see client_ca and token_file")
        _log.info(
            "serving", listen=settings.listen, port=port, db=str(settings.db), sequence=engine.head_sequence, **tls
        )

    certificates, tokens = security.certificates, security.tokens
    limits, ready = limits_of(settings), threading.Event()
    capabilities = None if tokens is None else Capabilities()
    remote = RemoteTools(
        call_timeout_s=settings.remote_timeout_s,
        # A client that may register an address must not make this server call other machines.
        allow=security.allows,
        tls=security.worker_tls,
        limits=limits,
        capabilities=capabilities,
    )
    meter = engine.meter
    note_denial = _counting(engine.denials.note, meter)
    denials = Denials(note_denial)
    access = access_of(security, denials)
    if tokens is not None:
        engine.limit_storage(tokens.allowance_of)
    admit = None if access is None else access.admit
    users = SameUser(denials, admit) if settings.same_user and not listen.startswith("unix:") else None
    admit = admit if users is None else users.admit
    home = asyncio.get_running_loop()
    pools = Pools(plans, limits, int(settings.max_message_bytes))
    provider = WithTools(
        engine,
        tools,
        threads=settings.tool_threads,
        limits=limits,
        budget=Budget(settings.max_tokens, settings.max_cost),
        remote=remote,
        pool=pools.own,
        passed=pools.passed,
        pools=pools.ports,
        home=home,
        meter=meter,
    )
    servicer = BridgeServicer(
        provider,
        heartbeat_s=settings.heartbeat_s,
        stall_timeout_s=settings.stall_timeout_s,
        max_message_bytes=int(settings.max_message_bytes),
    )
    auditor = AuditServicer(
        provider,
        reveal=settings.audit_reveal,
        prune=settings.audit_prune,
        stall_timeout_s=settings.stall_timeout_s,
        max_message_bytes=int(settings.max_message_bytes),
        pools=pools.statistics,
    )
    services = [server.Service(BRIDGE_SERVICE, servicer), server.Service(AUDIT_SERVICE, auditor)]
    lives = Lives(engine.loaded, engine.audit)

    async def drain() -> None:
        life.draining()
        auditor.drain()
        await servicer.drain()

    end.on_signals()
    async with contextlib.AsyncExitStack() as stack:
        # Called in the opposite order.
        stack.callback(auditor.close)
        stack.callback(provider.interrupt)
        stack.push_async_callback(remote.close)
        # The process may go on, with handlers of its own.
        stack.callback(interrupts.take_from_loop)
        calls = None
        if meter is not None:
            from dspex_persist import __version__
            from dspex_persist.observed import Observed

            calls = CallMeter()
            observed = Observed(
                engine,
                meter=meter,
                calls=calls,
                cache_limit_bytes=int(settings.cache_size_bytes),
                runner=provider.runner,
                servicer=servicer,
                pools=pools.statistics,
                loop=home,
                version=__version__,
            )
            unfit = partial(_unfit, end, engine, ready)
            await stack.enter_async_context(
                observed.served(settings.metrics_listen or "", unfit, certificates, tokens, note_denial)
            )
        life.starting_workers(plans)
        await stack.enter_async_context(pools.running(str(here / settings.db), servicer, auditor, stop=end.stop))
        if end.stop.is_set():
            return
        await server.serve(
            server.ServerOptions(
                listen,
                certificates=certificates,
                max_message_bytes=int(settings.max_message_bytes),
                grace_s=settings.grace_s,
                reflection=settings.reflection,
                # One connection may carry every watch, and other calls alongside.
                streams_per_connection=int(settings.watchers) + _OTHER_STREAMS,
            ),
            guarded(services, provider, lives, capabilities, denials),
            status_of=status_of,
            on_ready=on_ready,
            stop=end.stop,
            on_drain=drain,
            is_fit=lambda: engine.silent_s <= _STUCK_S,
            belongs=servicer.belongs,
            meter=calls,
            spans=OF_CLIENTS,
            **({} if admit is None else {"admit": admit}),
        )


def _counting(note: "NoteDenial", meter: "Meter | None") -> "NoteDenial":
    """Return what notes a refusal, and counts it if there are metrics."""
    if meter is None:
        return note

    def counting(refused: "Refused") -> None:
        note(refused)
        meter.denied(refused.missing)

    return counting


def _unfit(end: "ServerEnd", engine: "SqliteState", ready: threading.Event) -> str:
    """Return why the server cannot do its work, or ""."""
    if end.stop.is_set():
        return "draining"
    try:
        engine.check_open()
    except StateError as error:
        return str(error)
    silent_s = engine.silent_s
    if silent_s > _STUCK_S:
        return f"stuck: the writer has made no progress for {silent_s:.0f} s"
    return "" if ready.is_set() else "starting"
