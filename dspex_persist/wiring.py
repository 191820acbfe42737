"""The composition root: which backend an address means, and what a server is made of.

What is heavy is imported where it is used: a client needs no SQL, a database file no gRPC.
"""

import asyncio
import contextlib
import dataclasses
import gc
import inspect
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dspex_persist.errors import DspexError
from dspex_persist.infra import forks, streams
from dspex_persist.infra.listen import ListenError, is_loopback, parse_listen, prepare, settled
from dspex_persist.infra.logs import configure_logs, get_logger, quiet_grpc
from dspex_persist.settings import Settings, SettingsError
from dspex_persist.spelling import closest, did_you_mean, quote
from dspex_persist.state.errors import CheckpointError, FileChangedError, InvalidArgumentError, OutcomeUnknownError
from dspex_persist.state.limits import Limits
from dspex_persist.state.options import SessionOptions
from dspex_persist.state.provider import Progress, StateProvider, silent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from dspex_persist.state.abilities import StreamsTools
    from dspex_persist.state.audit import AuditSource
    from dspex_persist.state.bridged import BridgedState
    from dspex_persist.state.embedded import EmbeddedState, SqliteState
    from dspex_persist.state.local import LocalState
    from dspex_persist.state.recording import Header, RecordedCommit
    from dspex_persist.state.store.maintenance.transfer import ImportReport
    from dspex_persist.state.tools.ports import ToolCode

EXIT_STORAGE_FAILED: Final = 70
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
# How often Python's threads take turns, in seconds (Python's own default is 0.005).
SWITCH_INTERVAL_S: Final = 0.005
# How many new objects make the garbage collector look for cycles.
_COLLECT_AFTER: Final = 20_000
# How long calls that were waiting for the writer may take to hear that it has failed.
_LAST_WORDS_S: Final = 1.0
_OTHER_STREAMS: Final = 1_000

_SCHEME: Final = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):(?P<rest>.*)", re.DOTALL)
_HOST_AND_PORT: Final = re.compile(r"//(\[[^\[\]/]+\]|[^\[\]/:]+):[0-9]{1,5}")
_BARE_HOST_AND_PORT: Final = re.compile(r"(\[[^\[\]/]+\]|[^\[\]/:\s]+):[0-9]{1,5}")
_FORMS: Final = "a path, sqlite:///PATH, grpc://HOST:PORT or grpc+unix:/PATH"
_IN_MEMORY: Final = ("memory:", ":memory:")

_Options = TypeVar("_Options", bound=SessionOptions)

_log: Final = get_logger(__name__)


@dataclass(eq=False)
class StorageFailedError(DspexError):
    """The storage failed while it served: what was on its way may or may not have been written."""

    path: str
    failure: BaseException

    def __str__(self) -> str:
        return self.in_words(str)

    def in_words(self, text_of: Callable[[BaseException], str]) -> str:
        """The sentence; `text_of` makes that of the failure."""
        # What to do about an unknown outcome is for clients.
        reason = self.failure.sentence if isinstance(self.failure, OutcomeUnknownError) else text_of(self.failure)
        # A file that was changed from outside says by itself what to do, and the disk is not to blame.
        is_disk = not isinstance(self.failure, FileChangedError)
        advice = ". Look at the disk, then start again; what was acknowledged is safe" if is_disk else ""
        return f"the storage of {self.path} failed, so the server ended: {reason}{advice}"


# Providers


def connect(url: str | os.PathLike[str], **options: Any) -> "StreamsTools":
    """The session state at `url`; close it when you are done (it is a context manager).

    A path, or `sqlite:///relative.db` or `sqlite:////absolute.db`: a database file, made where it is missing, that
    this process then owns. Options: the fields of `StoreOptions` (durability, limits, session_ttl_s, ...),
    `sweep_interval_s`, `on_fatal`, `tool_threads`, and `tools`: a `Toolbox`, or whatever one is made of (a tool, a
    function, a module or its name, a list or a dict of these; see `Toolbox.of`). Raises `OpenError`: in use, missing
    folder, no database of ours, ...; `ToolLoadError`: what was given has no tools. A relative path is fixed here:
    changing the working directory later changes nothing.

    `memory:`: nothing but this process has it, and it ends with it; each call begins with an empty one. Options: the
    fields of `SessionOptions` (limits, session_ttl_s, ...), `sweep_interval_s`, `tools`, `tool_threads`.

    `grpc://HOST:PORT` or `grpc+unix:/PATH`: a server. Options: `timeout_s`, `actor`. It is reached with the first
    call, not before.

    Each executes and streams tools. What else one can do, `isinstance` says: a file and a server are `Durable`,
    `Auditable` and more (`dspex_persist.state.abilities`).

    Raises `InvalidArgumentError` for any other address, and for an option that cannot be; `TypeError` for one that
    does not exist.
    """
    if url in _IN_MEMORY:
        return _local(**options)
    place = _place_of(url, forms=f"memory:, {_FORMS}")
    return _embedded(place, **options) if isinstance(place, Path) else _bridged(place, **options)


def open_audit(url: str | os.PathLike[str], *, reveal: bool = False, **options: Any) -> "AuditSource":
    """The history at `url`, to be asked; close it when you are done (it is a context manager).

    `url` is what `connect` takes, but for `memory:`. A file is only read: a server may have it open, and a backup will
    do. `reveal` shows the values of sensitive variables; a server shows them only if it was started with
    `audit_reveal`. Options are for servers: `timeout_s`, `actor`.

    Raises `OpenError` for what is no database, `InvalidArgumentError` for any other address.
    """
    place = _place_of(url)
    if isinstance(place, Path):
        from dspex_persist.state.store import maintenance

        return maintenance.open_audit(place, reveal=reveal)
    state = _bridged(place, **options)
    return state.audit(reveal=reveal, on_close=state.close)


@contextlib.contextmanager
def open_recording(
    url: str | os.PathLike[str], session_id: str, *, started: int | None = None, reveal: bool = False, **options: Any
) -> "Iterator[tuple[Header, Iterator[RecordedCommit]]]":
    """A session's whole log, as (header, commits); the commits are read as they are taken.

    `url` is what `open_audit` takes. A file is only read: a server may have it open, and a backup will do. Of several
    sessions that had this id it is the newest, or the one that began with commit `started`. `reveal`: with the values
    of sensitive variables; a server has them only if it was started with `audit_reveal`. Options are for servers:
    `timeout_s`, `actor`.

    Raises `OpenError` for what is no database, `NotInHistoryError` for a session that was never there,
    `InvalidArgumentError` for any other address.
    """
    place = _place_of(url)
    if isinstance(place, Path):
        from dspex_persist.state.store import maintenance

        with maintenance.open_recording(place, session_id, started=started, reveal=reveal) as recording:
            yield recording
    else:
        with _bridged(place, **options) as state:
            yield state.record(session_id, started=started, reveal=reveal)


def import_session(
    path: str | os.PathLike[str],
    lines: "Iterable[str]",
    *,
    name: str = "the recording",
    session_id: str | None = None,
    limits: Limits | None = None,
    progress: Progress = silent,
) -> "ImportReport":
    """Bring a recorded session with its whole history into a database file, under its own id or `session_id`.

    All of it or nothing. This process owns the file meanwhile; it is made where it is missing. `lines` are those of
    the recording, `name` is what errors call it.

    Raises `RecordingError` for what is no whole, sound recording within the limits, `SessionExistsError` where a live
    session has the id, `OpenError`.
    """
    from dspex_persist.state.store.maintenance import transfer
    from dspex_persist.state.store.session_store import StoreOptions

    options = StoreOptions(limits=limits or Limits())
    return transfer.import_session(
        Path(path), lines, name=name, session_id=session_id, options=options, progress=progress
    )


def limits_of(settings: Settings) -> Limits:
    """The limits that settings say."""
    said = Limits(**{field.name: int(getattr(settings, field.name)) for field in dataclasses.fields(Limits)})
    # A session travels in one message, with its names, which count but a little.
    message = settings.max_message_bytes
    session, history = min(said.session_size_bytes, message * 2 // 3), min(said.history_size_bytes, message // 3)
    return dataclasses.replace(said, session_size_bytes=session, history_size_bytes=history)


def _place_of(url: str | os.PathLike[str], forms: str = _FORMS) -> Path | str:
    """The file that a URL means, or the target of the server."""
    if isinstance(url, bytes) or not isinstance(url, str | os.PathLike):
        raise InvalidArgumentError("url", f"it must be {forms}, not {type(url).__name__}")
    if not isinstance(url, str):
        return Path(url)
    match, meant = _SCHEME.match(url), _meant(url)
    if match is None and not meant and url not in ("", *_IN_MEMORY):
        return Path(url)
    scheme, rest = (match["scheme"], match["rest"]) if match is not None else ("", "")
    if scheme == "sqlite" and len(rest) > 3 and rest.startswith("///"):
        return Path(rest[3:])
    if scheme == "grpc" and _HOST_AND_PORT.fullmatch(rest):
        return rest[2:]
    if scheme == "grpc+unix" and rest.strip("/"):
        return f"unix:{re.sub('^//(?=/)', '', rest)}"
    if meant:
        raise InvalidArgumentError("url", f"{quote(url)} is not {forms}; {did_you_mean(meant, spell=str)}")
    hint = "; of a state in memory no history can be asked" if url in _IN_MEMORY else ""
    raise InvalidArgumentError("url", f"{quote(url)} is not {forms}{hint}")


def _meant(url: str) -> str:
    """The URL of a server that is written as other options take it, or as one of the web; "" if it is not."""
    address = re.sub("^(https?|grpcs?|tcp):(//)?", "", url, flags=re.IGNORECASE).removesuffix("/")
    if _BARE_HOST_AND_PORT.fullmatch(address):
        return f"grpc://{address}"
    if re.fullmatch(":[0-9]{1,5}", address):
        return f"grpc://127.0.0.1{address}"
    return f"grpc+{url}" if re.match("unix:.*[^/]", url) else ""


def _embedded(path: Path, **options: Any) -> "EmbeddedState":
    from dspex_persist.state.embedded import EmbeddedState
    from dspex_persist.state.store.session_store import StoreOptions

    store_options, options = _sorted_options(options, StoreOptions, EmbeddedState, "a file")
    return EmbeddedState(path, store_options, **options)


def _local(**options: Any) -> "LocalState":
    from dspex_persist.state.local import LocalState

    session_options, options = _sorted_options(options, SessionOptions, LocalState, "a state in memory")
    return LocalState(session_options, **options)


def _sorted_options(
    given: "Mapping[str, Any]", kind: type[_Options], provider: type, what: str
) -> tuple[_Options, dict[str, Any]]:
    """Those of a kind, and the others, which are the provider's own, with a toolbox of what has the tools."""
    names = [field.name for field in dataclasses.fields(kind)]
    _check_options(given, [*names, *_options_of(provider)], what)
    others = {name: option for name, option in given.items() if name not in names}
    if others.get("tools") is not None:
        from dspex_persist.cognitive.toolbox import Toolbox

        others["tools"] = Toolbox.of(others["tools"])
    return kind(**{name: option for name, option in given.items() if name in names}), others


def _options_of(kind: type) -> list[str]:
    """The arguments of a provider that are given by name."""
    parameters = inspect.signature(kind).parameters.values()
    return [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]


def _check_options(given: "Iterable[str]", known: list[str], what: str) -> None:
    for name in given:
        if name not in known:
            hint = (
                did_you_mean(closest(name, known, most=len(known)), spell=str)
                or f"there are {', '.join(sorted(known))}"
            )
            # What Python itself raises for an argument that a function does not have.
            raise TypeError(f"{what} has no option {name}; {hint}")


def _bridged(target: str, **options: Any) -> "BridgedState":
    quiet_grpc()
    from dspex_persist.state.bridged import BridgedState

    _check_options(options, _options_of(BridgedState), "a server")
    return BridgedState(target, **options)


# The server


def serve(settings: Settings) -> None:
    """Serve the database at `settings.db` until SIGTERM or SIGINT, then drain, and return.

    Prints `GRPC_READY:<port>` on stdout (port 0: a Unix socket) when it can answer; logs go to stderr. A second
    signal ends the process at once. Raises `SettingsError` for an address that cannot or may not be used,
    `OpenError` for a database that cannot be opened (before the port is bound), `ListenError` for an address that
    cannot be had, `StorageFailedError` when the storage fails while it serves.
    """
    _check_listen(settings)
    quiet_grpc()
    # gRPC would start its threads anew in children of tools, on the sockets of the server, and crash there.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    style = settings.log_style
    if style == "auto":
        style = "console" if sys.stderr.isatty() else "json"
    configure_logs(settings.log_level, style)
    # It tells of each of its parts at INFO. Only that a file is upgraded is news.
    logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)
    logging.getLogger("alembic.runtime.migration").addFilter(lambda record: str(record.msg).startswith("Running"))
    # With a traceback, for each look at headers that some client has sent in another encoding.
    logging.getLogger("grpc._cython.cygrpc").addFilter(
        lambda record: not str(record.msg).startswith("Invalid encoding")
    )
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(settings))


def _check_listen(settings: Settings) -> None:
    try:
        allowed = settings.insecure or is_loopback(settings.listen)
    except ListenError as error:
        raise SettingsError("listen", f"{settings.listen!r} will not do: {error.reason}") from error
    if not allowed:
        reason = (
            f"{settings.listen!r} can be reached from other machines, and whoever reaches it could read and change "
            "every session: listen on 127.0.0.1 or on unix:PATH, or accept that with --insecure"
        )
        raise SettingsError("listen", reason)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop, which takes some 15 % more calls a second, where it can be had."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.new_event_loop
    return new_event_loop


async def _serve(settings: Settings) -> None:
    end = _End(asyncio.get_running_loop(), str(settings.db))
    path, listen = _check_places(settings)
    # Before the file is opened: importing them takes its time, and may fail.
    tools = _load_tools(settings)
    # Opened, and so locked, before anything is bound: a second server on the file ends here.
    engine = _open(settings, _settled(settings.db, path), end.on_storage_failed)
    try:
        await _serve_bridge(settings, listen, engine, tools, end)
    finally:
        _close(engine, settings.db)
    if end.failure is not None:
        raise end.failure
    _log.info("stopped", db=str(settings.db))


def _check_places(settings: Settings) -> tuple[Path, str]:
    """Where the database is, and where to listen, wherever tools change the working directory to. A server that cannot
    have one of them ends here, before it makes a file."""
    from dspex_persist.state.store import maintenance

    path, address = maintenance.refuse_owned(settings.db), parse_listen(settings.listen)
    prepare(address)
    return path, str(settled(address))


def _settled(path: Path, meant: Path) -> Path:
    """`path` while it is the one that was meant; tools that are imported may change the working directory."""
    return path if path.resolve() == meant else meant


def _load_tools(settings: Settings) -> "Mapping[str, ToolCode]":
    if not settings.tools:
        return {}
    from dspex_persist.cognitive.errors import DspyMissingError
    from dspex_persist.cognitive.toolbox import Toolbox

    try:
        return Toolbox.of(settings.tools, record_lm=settings.record_lm)
    except DspyMissingError as error:
        raise SettingsError("record_lm", str(error)) from error


def _open(settings: Settings, path: Path, on_fatal: Callable[[BaseException], None]) -> "SqliteState":
    """The engine on the database of `settings`."""
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
    )
    return SqliteState(path, options, sweep_interval_s=settings.sweep_interval_s, on_fatal=on_fatal)


def _close(provider: StateProvider, path: Path) -> None:
    try:
        provider.close()
    except CheckpointError as error:
        raise StorageFailedError(str(path), error) from error


async def _serve_bridge(
    settings: Settings, listen: str, engine: "SqliteState", tools: "Mapping[str, ToolCode]", end: "_End"
) -> None:
    from dspex_persist.infra import server
    from dspex_persist.state.bridge.audit_service import AuditServicer
    from dspex_persist.state.bridge.codec import BRIDGE_SERVICE
    from dspex_persist.state.bridge.remote import RemoteTools
    from dspex_persist.state.bridge.rpcs.audit import AUDIT_SERVICE
    from dspex_persist.state.bridge.servicer import BridgeServicer
    from dspex_persist.state.bridge.status import status_of
    from dspex_persist.state.tools.with_tools import WithTools

    def on_ready(port: int) -> None:
        _spare_the_collector()
        unheard = streams.print_line(f"GRPC_READY:{port}")
        if unheard is not None:
            # Whoever started it may not wait for that: clients can be served all the same.
            _log.warning("nobody was told that it is ready", reason=str(unheard))
        _log.info("serving", listen=settings.listen, port=port, db=str(settings.db), sequence=engine.head_sequence)

    limits = limits_of(settings)
    remote = RemoteTools(
        call_timeout_s=settings.remote_timeout_s,
        # A client that may register an address must not make this server call other machines.
        allow=lambda address: settings.insecure or is_loopback(address),
        limits=limits,
    )
    home = asyncio.get_running_loop()
    provider = WithTools(engine, tools, threads=settings.tool_threads, limits=limits, remote=remote, home=home)
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
    )

    async def drain() -> None:
        auditor.drain()
        await servicer.drain()

    end.on_signals()
    try:
        await server.serve(
            server.ServerOptions(
                listen,
                max_message_bytes=int(settings.max_message_bytes),
                grace_s=settings.grace_s,
                reflection=settings.reflection,
                # Every watch may come over one connection, with other calls beside them.
                streams_per_connection=int(settings.watchers) + _OTHER_STREAMS,
            ),
            [server.Service(BRIDGE_SERVICE, servicer), server.Service(AUDIT_SERVICE, auditor)],
            status_of=status_of,
            on_ready=on_ready,
            stop=end.stop,
            on_drain=drain,
            belongs=servicer.belongs,
        )
    finally:
        await remote.close()
        provider.interrupt()
        auditor.close()


def _spare_the_collector() -> None:
    """Have the garbage collector look at new objects only, and less often.

    What is there by now, modules for the most part, stays until the end. A group of writes makes thousands of objects
    that reference counting frees right after it; the default threshold of 700 goes through them several times before.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER)


class _End:
    """What makes a server stop: a signal, or storage that failed."""

    def __init__(self, loop: asyncio.AbstractEventLoop, path: str) -> None:
        self.stop = asyncio.Event()
        self.failure: StorageFailedError | None = None
        self._loop = loop
        self._path = path
        forks.register(self)
        forks.guard_signals(*_SIGNALS)

    def on_signals(self) -> None:
        """Take SIGTERM and SIGINT from here on."""
        for number in _SIGNALS:
            self._loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        for each in _SIGNALS:
            self._loop.remove_signal_handler(each)
            # The next one ends the process whatever it is doing. Nothing that was acknowledged can be lost by that.
            signal.signal(each, signal.SIG_DFL)
        # Said when it is so: whoever reads it may send the next one at once.
        _log.info("draining", signal=number.name)
        self.stop.set()

    def forked(self, *, quiet: bool) -> None:
        """A tool's child never goes on as a second server."""
        forks.end_on(self._loop)

    def on_storage_failed(self, error: BaseException) -> None:
        """On the writer's thread, when its callers have been told: let their answers out, and end in any case."""
        self.failure = StorageFailedError(self._path, error)
        _log.critical("storage failed", db=self._path, reason=str(error))
        deadline = threading.Timer(_LAST_WORDS_S, os._exit, (EXIT_STORAGE_FAILED,))
        deadline.daemon = True
        deadline.start()
        # The loop may have ended by itself just now.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.stop.set)
