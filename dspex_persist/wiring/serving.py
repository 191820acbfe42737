"""The server of a database: assembled from its settings, and run until it is told to end."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dspex_persist.addresses import DatabaseUrl
from dspex_persist.errors import DspexError
from dspex_persist.infra.listen import parse_listen, prepare, settled
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.stopping import loop_factory
from dspex_persist.settings import Settings, SettingsError
from dspex_persist.state.errors import CheckpointError, InvalidArgumentError
from dspex_persist.state.provider import StateProvider
from dspex_persist.wiring.access import Security, security_of
from dspex_persist.wiring.ending import ServerEnd, StorageFailedError
from dspex_persist.wiring.life import Life
from dspex_persist.wiring.limits import limits_of
from dspex_persist.wiring.reporting import quiet, traced
from dspex_persist.wiring.tools import check_names, load_tools, plans_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dspex_persist.infra.notify import Notifier
    from dspex_persist.state.bridge.workers.pools import PoolPlan
    from dspex_persist.state.meter import Meter
    from dspex_persist.state.served import ServedEngine

# How often Python switches threads, in seconds (Python's default is 0.005).
SWITCH_INTERVAL_S: Final = 0.005

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
    with Life(notifier, settings) as life:
        # Before the file is opened: importing them takes time, and may fail.
        life.importing_tools()
        tools = load_tools(settings)
        plans = plans_of(settings, here)
        if settings.workers and not settings.tools:
            _log.warning(
                "no workers", workers=settings.workers, reason="there are no tools to run: name some (--tools)"
            )
        check_names(plans, tools)
        # Opening locks the file. A second server on it fails here, before it binds its address.
        life.opening()
        meter = _meter_of(settings, tools, plans)
        engine = _open(settings, _settled(settings.db, path), end.on_storage_failed, meter)
        try:
            # Only now: what is wrong with the settings or the file is said before all this is imported.
            from dspex_persist.wiring.bridge import Bridge

            subject = str(settings.db if isinstance(settings.db, DatabaseUrl) else here / settings.db)
            await Bridge(settings, listen, security, engine, tools, plans, end, life).run(subject)
        finally:
            life.closing()
            _close(engine, str(settings.db))
    if end.failure is not None:
        raise end.failure
    _log.info("stopped", db=str(settings.db))


def _check_places(settings: Settings) -> tuple[Path | DatabaseUrl, str]:
    """Return the absolute path, or the database, and address, which stay valid if tools change the working directory.

    A file or address that is in use fails here, before any file is created.
    """
    from dspex_persist.state.store import maintenance

    db, address = settings.db, parse_listen(settings.listen)
    if settings.anchor_dir is not None and not isinstance(db, DatabaseUrl):
        raise SettingsError("anchor_dir", "it is for databases that servers share: a file has its anchor beside it")
    place = db if isinstance(db, DatabaseUrl) else maintenance.refuse_owned(db)
    prepare(address)
    if settings.metrics_listen is not None:
        prepare(parse_listen(settings.metrics_listen))
    return place, str(settled(address))


def _settled(place: Path | DatabaseUrl, absolute: Path | DatabaseUrl) -> Path | DatabaseUrl:
    """Return `place`, or `absolute` if importing the tools changed the working directory that a path depends on."""
    return place if isinstance(place, DatabaseUrl) or place.resolve() == absolute else absolute


def _meter_of(settings: Settings, tools: "Iterable[str]", plans: "Iterable[PoolPlan]") -> "Meter | None":
    """Return what counts for the metrics; None if nobody wants to see them."""
    if settings.metrics_listen is None:
        return None
    from dspex_persist.state.meter import Meter

    return Meter([*tools, *(name for plan in plans for name in plan.tools)])


def _open(
    settings: Settings, place: Path | DatabaseUrl, on_fatal: Callable[[BaseException], None], meter: "Meter | None"
) -> "ServedEngine":
    """Open the engine on the database of `settings`."""
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
    sweep_s = settings.sweep_interval_s
    if isinstance(place, DatabaseUrl):
        from dspex_persist.wiring.databases import database_at

        try:
            return database_at(place).engine(
                options, sweep_interval_s=sweep_s, anchor_dir=settings.anchor_dir, on_fatal=on_fatal, meter=meter
            )
        except InvalidArgumentError as error:
            # What a kind of database does not take. Supervisors do not start a server again whose settings are invalid.
            reason = f"its prefix {error.reason}" if error.field == "prefix" else error.reason
            raise SettingsError("db" if error.field in ("prefix", "url") else error.field, reason) from error
    from dspex_persist.state.embedded import SqliteState

    return SqliteState(place, options, sweep_interval_s=sweep_s, on_fatal=on_fatal, meter=meter)


def _close(provider: StateProvider, name: str) -> None:
    try:
        provider.close()
    except CheckpointError as error:
        raise StorageFailedError(name, error) from error
