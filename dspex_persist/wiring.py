"""The composition root: opens the backend for an address, and assembles the server.

Heavy modules are imported where they are used: a client needs no SQL, a database file no gRPC.
"""

import asyncio
import contextlib
import dataclasses
import inspect
import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dspex_persist.errors import DspexError
from dspex_persist.infra import streams
from dspex_persist.infra.interrupts import interrupts
from dspex_persist.infra.listen import ListenError, UnixAddress, is_loopback, parse_listen, prepare, settled
from dspex_persist.infra.logs import get_logger, quiet_grpc
from dspex_persist.infra.stopping import End, loop_factory, spare_the_collector
from dspex_persist.opening import Opening
from dspex_persist.settings import (
    PoolSettings,
    Settings,
    SettingsError,
    flag_of,
)
from dspex_persist.spelling import closest, did_you_mean, place_meant, quote
from dspex_persist.state.errors import (
    CheckpointError,
    FileChangedError,
    InvalidArgumentError,
    OutcomeUnknownError,
    StateError,
)
from dspex_persist.state.limits import Limits
from dspex_persist.state.options import SessionOptions
from dspex_persist.state.provider import Progress, StateProvider, silent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from dspex_persist.infra.notify import Notifier
    from dspex_persist.infra.pool import PoolStatistics
    from dspex_persist.infra.tls import CallerFiles, Certificates
    from dspex_persist.infra.tokens import Tokens
    from dspex_persist.infra.worker import WorkerCommand
    from dspex_persist.state.abilities import StreamsTools
    from dspex_persist.state.audit import AuditSource
    from dspex_persist.state.bridge.access import Access
    from dspex_persist.state.bridge.denials import Denials
    from dspex_persist.state.bridge.pools import PoolPlan
    from dspex_persist.state.bridged import BridgedState
    from dspex_persist.state.denials import NoteDenial, Refused
    from dspex_persist.state.embedded import EmbeddedState, SqliteState
    from dspex_persist.state.local import LocalState
    from dspex_persist.state.meter import Meter
    from dspex_persist.state.recording import Header, RecordedCommit
    from dspex_persist.state.store.maintenance.transfer import ImportReport
    from dspex_persist.state.tools.ports import ToolCode
    from dspex_persist.working import Options as WorkerOptions

EXIT_STORAGE_FAILED: Final = 70
# How often Python switches threads, in seconds (Python's default is 0.005).
SWITCH_INTERVAL_S: Final = 0.005
# How long the server keeps running after its storage failed, so that waiting calls get their answers.
_ANSWER_FAILED_S: Final = 1.0
# After so long without progress the writer counts as stuck: longer than it waits for a lock of another program.
_STUCK_S: Final = 30.0
# For how long a service manager is asked to wait at most, until the server is ready, and after it was told to end.
_STARTING_S: Final = 3_600.0
_ENDING_S: Final = 600.0
# How long it may take at the end to send the last traces.
_FLUSH_S: Final = 3.0
# Streams of one connection besides its watches.
_OTHER_STREAMS: Final = 1_000

_SCHEME: Final = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):(?P<rest>.*)", re.DOTALL)
_HOST_AND_PORT: Final = re.compile(r"//(\[[^\[\]/]+\]|[^\[\]/:]+):[0-9]{1,5}")
_BARE_HOST_AND_PORT: Final = re.compile(r"(\[[^\[\]/]+\]|[^\[\]/:\s]+):[0-9]{1,5}")
_FORM_OF: Final = {
    "sqlite": "sqlite:///PATH",
    "grpc": "grpc://HOST:PORT",
    "grpcs": "grpcs://HOST:PORT",
    "grpc+unix": "grpc+unix:/PATH",
}
_FORMS: Final = f"a path, {_FORM_OF['sqlite']}, {_FORM_OF['grpc']} or {_FORM_OF['grpc+unix']} (grpcs:// with TLS)"
_IN_MEMORY: Final = ("memory:", ":memory:")

_Options = TypeVar("_Options", bound=SessionOptions)

_log: Final = get_logger(__name__)


@dataclass(eq=False)
class StorageFailedError(DspexError):
    """The storage failed while the server was running; writes in progress may or may not have been committed."""

    path: str
    failure: BaseException

    def __str__(self) -> str:
        return self.in_words(str)

    def in_words(self, text_of: Callable[[BaseException], str]) -> str:
        """Return the message; `text_of` returns that of the failure."""
        # The advice of OutcomeUnknownError is meant for clients.
        reason = self.failure.sentence if isinstance(self.failure, OutcomeUnknownError) else text_of(self.failure)
        # The error about a file that another program changed has its own advice, and the disk is not to blame.
        is_disk = not isinstance(self.failure, FileChangedError)
        advice = ". Check the disk, then start the server again; acknowledged writes are safe" if is_disk else ""
        return f"the storage of {self.path} failed, so the server ended: {reason}{advice}"


# Providers


def connect(url: str | os.PathLike[str], **options: Any) -> "StreamsTools":
    """Open the session state at `url`.

    Every backend executes and streams tools. `capabilities` says what else it can do; with `isinstance`, a type checker
    knows it, too: a file and a server are `Durable`, `Prunable` and more (`dspex_persist.state.abilities`).

    Args:
        url: One of three kinds of address:

            - A path, `sqlite:///relative.db` or `sqlite:////absolute.db`: a database file. It is created if missing,
              and this process owns it until you close it. A relative path is resolved now; changing the working
              directory later has no effect.
            - `memory:` or `:memory:`: sessions in the memory of this process, lost when it exits. Each call opens an
              empty state.
            - `grpc://HOST:PORT`, `grpcs://HOST:PORT` (with TLS) or `grpc+unix:/PATH`: a server. The first call on it
              connects.
        options: For a file: the fields of `StoreOptions` (durability, limits, session_ttl_s, ...),
            `sweep_interval_s`, `on_fatal`, `tool_threads`, and `tools`, which is anything that `Toolbox.of` accepts: a
            toolbox, a tool, a function, a module or its name, a list or a dict of these. In memory: the fields of
            `SessionOptions` (limits, session_ttl_s, ...), `sweep_interval_s`, `tools`, `tool_threads`. For a server:
            `timeout_s` (seconds), `breaker`, `cache`, `token`, `ca`, `cert` and `key` (files, for TLS), and others of
            `BridgedState`. For all: `actor`, who makes the changes, by default the user of this process.

    Returns:
        The provider. Close it when you are done; it is a context manager.

    Raises:
        InvalidArgumentError: The address, or the value of an option, is invalid.
        TypeError: There is no such option.
        OpenError: The file cannot be opened: it is in use, its folder is missing, it is another program's, ...
        ToolLoadError: `tools` contains no tools.
    """
    if url in _IN_MEMORY:
        return _local(**options)
    place = _place_of(url, forms=f"memory:, {_FORMS}")
    return _embedded(place, **options) if isinstance(place, Path) else _bridged(place, **options)


def is_there(url: str | os.PathLike[str]) -> bool:
    """Whether there may be a session state at `url`: not if it is a file that does not exist."""
    place = "" if url in _IN_MEMORY else _place_of(url, forms=f"memory:, {_FORMS}")
    return not isinstance(place, Path) or place.exists()


def aconnect(url: str | os.PathLike[str], **options: Any) -> "Opening[StreamsTools]":
    """Open the session state at `url` without blocking the event loop; the arguments are those of `connect`.

    Returns:
        What to await, or to use with `async with`, which closes the state at the end.
    """

    async def close(state: "StreamsTools") -> None:
        await asyncio.to_thread(state.close)

    return Opening(asyncio.to_thread(connect, url, **options), close)


def open_audit(url: str | os.PathLike[str], *, reveal: bool = False, **options: Any) -> "AuditSource":
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
    place = _place_of(url)
    if isinstance(place, Path):
        from dspex_persist.state.store import maintenance

        return maintenance.open_audit(place, reveal=reveal)
    state = _bridged(place, **options)
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
    place = _place_of(url)
    if isinstance(place, Path):
        raise InvalidArgumentError("url", f"{quote(url)} is a file, and only servers have workers")
    with _bridged(place, timeout_s=timeout_s) as state:
        return state.list_workers()


@contextlib.contextmanager
def open_recording(
    url: str | os.PathLike[str], session_id: str, *, started: int | None = None, reveal: bool = False, **options: Any
) -> "Iterator[tuple[Header, Iterator[RecordedCommit]]]":
    """Read a session's whole log, as (header, commits). The commits are read lazily, while you iterate over them.

    A file is only read, so a server may have it open, and a backup works, too.

    Args:
        url: An address as for `open_audit`.
        session_id: The session.
        started: The number of the commit that began the session, if several sessions had this id; by default the
            newest of them.
        reveal: Include the values of sensitive variables. A server allows this only if it was started with
            `audit_reveal`.
        options: For a server only: `timeout_s` (seconds), `actor`.

    Raises:
        OpenError: The file is not a database of this package.
        NotInHistoryError: There never was such a session.
        InvalidArgumentError: The address is invalid.
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
    url: str | os.PathLike[str],
    lines: "Iterable[str]",
    *,
    name: str = "the recording",
    session_id: str | None = None,
    limits: Limits | None = None,
    progress: Progress = silent,
    **options: Any,
) -> "ImportReport":
    """Import a recorded session with its whole history into a database file or a server, atomically.

    To import into a provider that is open, call its `import_session`.

    Args:
        url: An address as for `open_audit`. A file is created if missing, and this process owns it during the import.
        lines: The lines of the recording.
        name: The name of the recording in errors.
        session_id: The id of the imported session; by default its recorded id.
        limits: The limits that the session must respect; a server has its own.
        progress: Is called with the progress.
        options: For a server only: `timeout_s` (seconds), `actor`.

    Raises:
        RecordingError: The recording is incomplete or invalid, or exceeds a limit.
        SessionExistsError: A live session has the id.
        OpenError: The file cannot be opened.
    """
    from dspex_persist.state.store.maintenance import transfer

    place = _place_of(url)
    if not isinstance(place, Path):
        with _bridged(place, **options) as state:
            return transfer.import_into(state, str(url), lines, name=name, session_id=session_id, progress=progress)
    from dspex_persist.state.store.session_store import StoreOptions

    store_options = StoreOptions(limits=limits or Limits())
    return transfer.import_session(
        place, lines, name=name, session_id=session_id, options=store_options, progress=progress
    )


def limits_of(settings: Settings) -> Limits:
    """Return the limits in `settings`, lowered where a session or an answer would not fit into one gRPC message."""
    limits = Limits(**{field.name: int(getattr(settings, field.name)) for field in dataclasses.fields(Limits)})
    # A session is sent in one message together with its names, which the limit counts only in part.
    message = settings.max_message_bytes
    session, history = min(limits.session_size_bytes, message * 2 // 3), min(limits.history_size_bytes, message // 3)
    return dataclasses.replace(limits, session_size_bytes=session, history_size_bytes=history)


def _place_of(url: str | os.PathLike[str], forms: str = _FORMS) -> Path | str:
    """Return the file at a URL, or the target of the server."""
    if isinstance(url, bytes) or not isinstance(url, str | os.PathLike):
        raise InvalidArgumentError("url", f"it must be {forms}, not {type(url).__name__}")
    if not isinstance(url, str):
        return Path(url)
    match, meant = _SCHEME.match(url), _meant(url)
    if match is None and not meant and url not in ("", *_IN_MEMORY):
        _refuse_word(url)
        return Path(url)
    scheme, rest = (match["scheme"], match["rest"]) if match is not None else ("", "")
    if scheme == "sqlite" and len(rest) > 3 and rest.startswith("///"):
        return Path(rest[3:])
    if scheme == "grpc" and _HOST_AND_PORT.fullmatch(rest):
        return rest[2:]
    if scheme == "grpcs" and _HOST_AND_PORT.fullmatch(rest):
        return f"{scheme}:{rest}"
    if scheme == "grpc+unix" and rest.strip("/"):
        return f"unix:{re.sub('^//(?=/)', '', rest)}"
    if url in _IN_MEMORY:
        hint = "only the process that has a state in memory can query it: provider.audit()"
    else:
        hint = did_you_mean(meant, spell=str) or did_you_mean(_respelled(scheme, rest))
    raise InvalidArgumentError("url", "; ".join(filter(None, (f"{quote(url)} is not {forms}", hint))))


def _refuse_word(url: str) -> None:
    """Refuse a word that was hardly meant to be the name of a file: the file would appear without a hint."""
    meant = {"": "", "memory": "memory:", "file": "sqlite:///PATH", "server": "grpc://HOST:PORT"}[place_meant(url)]
    if meant:
        hint = f"{did_you_mean(meant, spell=str)} For the file, write {quote(f'./{url}')}"
        raise InvalidArgumentError("url", f"{quote(url)} would be the name of a file; {hint}")


def _respelled(scheme: str, rest: str) -> str | None:
    """Return the URL with its misspelled scheme corrected, or only the form of such URLs if it would be invalid."""
    meant = closest(scheme.lower(), _FORM_OF) if scheme not in _FORM_OF else None
    if meant is None:
        return None
    try:
        _place_of(f"{meant}:{rest}")
    except InvalidArgumentError:
        return _FORM_OF[meant]
    return f"{meant}:{rest}"


def _meant(url: str) -> str:
    """Return the likely URL for a server's address without `grpc`, or with another scheme; "" for other texts."""
    address = re.sub("^(https?|grpcs?|tcp):(//)?", "", url, flags=re.IGNORECASE).removesuffix("/")
    if _BARE_HOST_AND_PORT.fullmatch(address):
        return f"{'grpcs' if url.lower().startswith(('grpcs', 'https')) else 'grpc'}://{address}"
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
    """Return the options that are fields of `kind` as a `kind`, and the provider's own, with tools in a toolbox."""
    names = [field.name for field in dataclasses.fields(kind)]
    _check_options(given, [*names, *_options_of(provider)], what)
    others = {name: option for name, option in given.items() if name not in names}
    if others.get("tools") is not None:
        from dspex_persist.cognitive.toolbox import Toolbox

        others["tools"] = Toolbox.of(others["tools"])
    return kind(**{name: option for name, option in given.items() if name in names}), others


def _options_of(kind: type) -> list[str]:
    """Return the keyword-only parameters of a provider."""
    parameters = inspect.signature(kind).parameters.values()
    return [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]


def _check_options(given: "Iterable[str]", known: list[str], what: str) -> None:
    for name in given:
        if name not in known:
            hint = (
                did_you_mean(closest(name, known, most=len(known)), spell=str)
                or f"the options are {', '.join(sorted(known))}"
            )
            # As Python does for an unexpected keyword argument.
            raise TypeError(f"{what} has no option {name}; {hint}")


def _bridged(target: str, **options: Any) -> "BridgedState":
    quiet_grpc()
    from dspex_persist.state.bridged import BridgedState

    if options.get("tools") is not None:
        reason = (
            "a server has its own tools: start it with --tools MODULE, or register a worker's; or have a context run "
            "some here, Context(session_id, url, tools=...)"
        )
        raise InvalidArgumentError("tools", reason)
    options.pop("tools", None)
    _check_options(options, _options_of(BridgedState), "a server")
    return BridgedState(target, **options)


# The server


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
        _check_listen(settings, has_tls=settings.tls_cert is not None)
        _check_same_user(settings)
        _refuse_passed_sockets()
        certificates, tokens = _certificates_of(settings), _tokens_of(settings)
        _allowed_of(settings)
        _worker_tls_of(settings)
        _check_metrics(settings, has_tls=certificates is not None)
        _quiet(settings)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        with _traced(settings), asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(_serve(settings, certificates, tokens, notifier))
    except (DspexError, SettingsError) as error:
        notifier.status(str(error))
        raise


def _refuse_passed_sockets() -> None:
    from dspex_persist.infra.notify import passed_sockets

    if passed_sockets():
        reason = (
            "the service manager has opened a socket for this server (socket activation), which gRPC cannot use: let "
            "the server open its own, and systemd-socket-proxyd pass connections on to it (docs/production.md)"
        )
        raise SettingsError("listen", reason, "environment variable LISTEN_FDS")


def _traced(settings: Settings) -> contextlib.AbstractContextManager[object]:
    """Return what makes spans of what this process does, if the settings ask for that, and sends them."""
    if not settings.otel:
        return contextlib.nullcontext()
    try:
        from dspex_persist import otel
    except ImportError as error:
        reason = "it needs OpenTelemetry, which is not installed: pip install 'dspex-persist[otel]'"
        raise SettingsError("otel", reason) from error
    from dspex_persist import __version__

    try:
        return otel.Tracing(__version__, _FLUSH_S)
    except otel.TracingError as error:
        raise SettingsError("otel", str(error)) from error


def _quiet(settings: Settings) -> None:
    """Configure the logs, and keep libraries from writing what nobody needs."""
    from dspex_persist.infra.log_output import configure_logs

    quiet_grpc()
    # With it, gRPC would restart its threads in processes that tools fork, on the server's sockets, and crash there.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    style = settings.log_style
    if style == "auto":
        style = "console" if sys.stderr.isatty() else "json"
    configure_logs(settings.log_level, style)
    # Alembic logs each of its plugins at INFO. Only the upgrade of a file is worth reporting.
    logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)
    logging.getLogger("alembic.runtime.migration").addFilter(lambda record: str(record.msg).startswith("Running"))


def _check_listen(settings: Settings, *, has_tls: bool) -> None:
    try:
        allowed = settings.insecure or has_tls or is_loopback(settings.listen)
    except ListenError as error:
        raise SettingsError("listen", f"{settings.listen!r} is invalid: {error.reason}") from error
    if not allowed:
        reason = (
            f"{settings.listen!r} can be reached from other machines, and anyone who can connect could read and change "
            "every session: listen on 127.0.0.1 or on unix:PATH, serve TLS with --tls-cert and --tls-key, or accept "
            "that with --insecure"
        )
        raise SettingsError("listen", reason)


def _check_metrics(settings: Settings, *, has_tls: bool) -> None:
    """Refuse to serve metrics where `_check_listen` would refuse to serve, and without what is needed for them."""
    listen = settings.metrics_listen
    if listen is None:
        return
    try:
        address = parse_listen(listen)
        is_open = not (settings.insecure or has_tls or is_loopback(listen))
    except ListenError as error:
        raise SettingsError("metrics_listen", f"{listen!r} is invalid: {error.reason}") from error
    if isinstance(address, UnixAddress):
        raise SettingsError("metrics_listen", f"{listen!r} is a Unix socket, and Prometheus asks hosts: use HOST:PORT")
    if address == parse_listen(settings.listen) and address.port:
        raise SettingsError("metrics_listen", f"{listen!r} is the address of the server itself: take another port")
    if is_open:
        reason = (
            f"{listen!r} can be reached from other machines, and metrics tell the names of tools and models, and what "
            "these cost: listen on 127.0.0.1, serve TLS with --tls-cert and --tls-key, or accept that with --insecure"
        )
        raise SettingsError("metrics_listen", reason)
    try:
        import dspex_persist.infra.exposition  # noqa: F401
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "prometheus_client":
            raise
        reason = "metrics need prometheus-client, which is not installed: pip install 'dspex-persist[metrics]'"
        raise SettingsError("metrics_listen", reason) from None


def _check_same_user(settings: Settings) -> None:
    from dspex_persist.infra.peers import can_tell_users

    if not settings.same_user:
        return
    if not is_loopback(settings.listen):
        raise SettingsError("same_user", f"other machines can reach {settings.listen!r}: listen on 127.0.0.1")
    if not can_tell_users():
        raise SettingsError("same_user", "this system does not say whose a connection is: listen on unix:PATH")


def _certificates_of(settings: Settings) -> "Certificates | None":
    """Return the certificates for TLS, or None without it. Raise `SettingsError` for a fault in a file."""
    from dspex_persist.infra.tls import Certificates, TlsError, TlsFiles

    cert, key, client_ca = settings.tls_cert, settings.tls_key, settings.client_ca
    if cert is None or key is None:
        for name, path in (("tls_cert", cert), ("tls_key", key), ("client_ca", client_ca)):
            if path is not None:
                missing = " and ".join(flag_of(each) for each in ("tls_cert", "tls_key") if not getattr(settings, each))
                raise SettingsError(name, f"{str(path)!r} is not enough for TLS: give {missing}, too")
        return None
    if isinstance(parse_listen(settings.listen), UnixAddress):
        raise SettingsError("tls_cert", "a Unix socket does not leave this machine and has no TLS: listen on HOST:PORT")
    # Absolute, because tools may change the working directory.
    files = TlsFiles(cert.absolute(), key.absolute(), None if client_ca is None else client_ca.absolute())
    try:
        return Certificates(files)
    except TlsError as error:
        names = {str(files.cert): "tls_cert", str(files.key): "tls_key"}
        raise SettingsError(names.get(error.path, "client_ca"), str(error)) from error


def _allowed_of(settings: Settings) -> Callable[[str], bool]:
    """Return whether a registered tool at an address may be called; raise `SettingsError` for a wrong list."""
    from dspex_persist.infra.allowed import AllowedAddresses

    if settings.insecure and not settings.tool_addresses:
        return lambda _: True
    try:
        return AllowedAddresses(settings.tool_addresses).allows
    except ValueError as error:
        raise SettingsError("tool_addresses", str(error)) from error


def _worker_tls_of(settings: Settings) -> "CallerFiles":
    """Return the files for TLS with registered workers; raise `SettingsError` for a fault in one."""
    from dspex_persist.infra.tls import CallerFiles, TlsError

    given = (settings.worker_ca, settings.worker_cert, settings.worker_key)
    ca, cert, key = (each and each.absolute() for each in given)
    for name, own, other in (("worker_cert", cert, key), ("worker_key", key, cert)):
        if own is not None and other is None:
            raise SettingsError(name, "a certificate and its private key go together: give both")
    files = CallerFiles(ca, cert, key)
    try:
        files.read()
    except TlsError as error:
        names = {str(cert): "worker_cert", str(key): "worker_key"}
        raise SettingsError(names.get(error.path, "worker_ca"), str(error)) from error
    return files


def _tokens_of(settings: Settings) -> "Tokens | None":
    from dspex_persist.infra.tokens import TokenFileError, Tokens

    if settings.token_file is None:
        return None
    try:
        return Tokens(settings.token_file.absolute())
    except TokenFileError as error:
        raise SettingsError("token_file", str(error)) from error


def serve_worker(
    settings: Settings,
    url: str,
    sessions: "Sequence[str]",
    *,
    listen: str = "",
    address: str = "",
    worker_id: str = "",
    insecure: bool = False,
) -> None:
    """Run the tools in `settings` for sessions of a running server, until SIGTERM or SIGINT; see `registered.run`.

    Args:
        settings: The tools, their threads, the limits, the logs, and the files for TLS.
        url: The server, as for `connect`.
        sessions: The sessions to register the tools for.
        listen: Where to serve; by default on a free port, or a socket if the server has one.
        address: Where the server reaches it; by default where it listens.
        worker_id: How the worker is called in the session; by default by the name of this machine.
        insecure: Allow an address that other machines can reach without TLS.

    Raises:
        SettingsError: The address is invalid, or can be reached from other machines without TLS or `insecure`; or a
            file cannot be used.
        ToolLoadError: There are no tools.
        ListenError: The address is in use, or cannot be bound.
        StateError: The server cannot be reached, or refuses the tools.
    """
    from dspex_persist import registered

    _quiet(settings)
    options = registered.WorkerOptions(
        url,
        registered.check_sessions(sessions),
        listen,
        address,
        worker_id,
        _certificates_of(settings),
        insecure,
        settings.tool_threads,
        int(settings.max_message_bytes),
        limits_of(settings),
    )
    with _traced(settings):
        registered.run(options, _load_tools(settings))


async def _serve(
    settings: Settings, certificates: "Certificates | None", tokens: "Tokens | None", notifier: "Notifier"
) -> None:
    end = _End(asyncio.get_running_loop(), str(settings.db))
    path, listen = _check_places(settings)
    here = Path.cwd()
    # Started here and not where the time is needed, as starting and ending are not in one block.
    starting, ending = contextlib.ExitStack(), contextlib.ExitStack()
    with starting, ending:
        starting.enter_context(notifier.taking_long(_STARTING_S))
        # Before the file is opened: importing them takes time, and may fail.
        if settings.tools:
            notifier.status(f"importing the tools of {', '.join(settings.tools)}")
        tools = _load_tools(settings)
        plans = _plans(settings, here)
        _check_names(plans, tools)
        # Opening locks the file. A second server on it fails here, before it binds its address.
        notifier.status(f"opening {settings.db}: recovery, and an upgrade if an older release wrote it")
        meter = _meter_of(settings, tools, plans)
        engine = _open(settings, _settled(settings.db, path), end.on_storage_failed, meter)
        life = _Life(notifier, settings, engine, starting, ending)
        try:
            await _serve_bridge(settings, listen, certificates, tokens, engine, tools, end, here, plans, life)
        finally:
            life.closing()
            _close(engine, settings.db)
    if end.failure is not None:
        raise end.failure
    _log.info("stopped", db=str(settings.db))


class _Life:
    """Tells the service manager how far the server is."""

    def __init__(
        self,
        notifier: "Notifier",
        settings: Settings,
        engine: "SqliteState",
        starting: contextlib.ExitStack,
        ending: contextlib.ExitStack,
    ) -> None:
        self._notifier = notifier
        self._settings = settings
        self._engine = engine
        self._starting, self._ending = starting, ending
        self._is_ending = False
        self._watching: asyncio.Task[None] | None = None

    def starting_workers(self, plans: "list[PoolPlan]") -> None:
        """Say which workers the server waits for."""
        if plans:
            self._notifier.status(f"starting the workers of {', '.join(plan.name for plan in plans)}")

    def serving(self, address: str) -> None:
        """Say that the server is ready, and from now on that it is alive."""
        from dspex_persist.infra.traffic import traffic_of

        traffic = traffic_of(asyncio.get_running_loop())

        def status() -> str:
            if self._is_ending:
                return self._draining(traffic.calls)
            what = f"serving {self._settings.db} at {address}"
            return f"{what}: commit {self._engine.head_sequence}, {_calls(traffic.calls)}"

        self._starting.close()
        self._notifier.ready(status())
        self._watching = asyncio.create_task(self._notifier.watch(lambda: self._engine.silent_s, status))

    def draining(self) -> None:
        """Say that calls in progress may finish."""
        from dspex_persist.infra.traffic import traffic_of

        self._is_ending = True
        self._notifier.stopping(self._draining(traffic_of(asyncio.get_running_loop()).calls))
        self._ending.enter_context(self._notifier.taking_long(_ENDING_S))

    def closing(self) -> None:
        """Say that only the file is left to be closed."""
        if self._watching is not None:
            self._watching.cancel()
        if not self._is_ending:
            # It ends before it was ready.
            self.draining()
        self._notifier.status(f"closing {self._settings.db}")

    def _draining(self, calls: int) -> str:
        return f"shutting down: {_calls(calls)}, which may take {self._settings.grace_s:g} s"


def _calls(count: int) -> str:
    return "1 call in progress" if count == 1 else f"{count:,} calls in progress"


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


def _load_tools(settings: Settings) -> "Mapping[str, ToolCode]":
    if not settings.tools:
        return {}
    from dspex_persist.cognitive.errors import DspyMissingError
    from dspex_persist.cognitive.toolbox import Toolbox

    try:
        return Toolbox.of(settings.tools, record_lm=settings.record_lm)
    except DspyMissingError as error:
        raise SettingsError("record_lm", str(error)) from error


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
    certificates: "Certificates | None",
    tokens: "Tokens | None",
    engine: "SqliteState",
    tools: "Mapping[str, ToolCode]",
    end: "_End",
    here: Path,
    plans: "list[PoolPlan]",
    life: "_Life",
) -> None:
    from dspex_persist.infra import server
    from dspex_persist.infra.metrics import CallMeter
    from dspex_persist.state.bridge.audit_service import AuditServicer
    from dspex_persist.state.bridge.capabilities import Capabilities
    from dspex_persist.state.bridge.codec import BRIDGE_SERVICE
    from dspex_persist.state.bridge.denials import Denials
    from dspex_persist.state.bridge.guard import guarded
    from dspex_persist.state.bridge.lives import Lives
    from dspex_persist.state.bridge.pools import Pools
    from dspex_persist.state.bridge.remote import RemoteTools
    from dspex_persist.state.bridge.rpcs.audit import AUDIT_SERVICE
    from dspex_persist.state.bridge.same_user import SameUser
    from dspex_persist.state.bridge.servicer import BridgeServicer
    from dspex_persist.state.bridge.status import status_of
    from dspex_persist.state.bridge.traced import OF_CLIENTS
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
        is_open = tokens is None and (certificates is None or not certificates.asks_clients)
        if certificates is not None and is_open and not is_loopback(settings.listen):
            _log.warning("anyone who can connect can read and change every session: see client_ca and token_file")
        _log.info(
            "serving", listen=settings.listen, port=port, db=str(settings.db), sequence=engine.head_sequence, **tls
        )

    limits, ready = limits_of(settings), threading.Event()
    capabilities = None if tokens is None else Capabilities()
    remote = RemoteTools(
        call_timeout_s=settings.remote_timeout_s,
        # A client that may register an address must not make this server call other machines.
        allow=_allowed_of(settings),
        tls=_worker_tls_of(settings),
        limits=limits,
        capabilities=capabilities,
    )
    meter = engine.meter
    note_denial = _counting(engine.denials.note, meter)
    denials = Denials(note_denial)
    access = _access(certificates, tokens, denials)
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


def _unfit(end: "_End", engine: "SqliteState", ready: threading.Event) -> str:
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


def _access(certificates: "Certificates | None", tokens: "Tokens | None", denials: "Denials") -> "Access | None":
    """Return what knows the clients; None if none has to show anything."""
    from dspex_persist.state.bridge.access import Access

    certified = certificates is not None and certificates.asks_clients
    return Access(tokens, denials, certified=certified) if certified or tokens is not None else None


def _plans(settings: Settings, here: Path) -> "list[PoolPlan]":
    """Return the pools that the settings ask for."""
    from dspex_persist.infra.pool import PoolOptions
    from dspex_persist.infra.worker import WorkerCommand
    from dspex_persist.state.bridge.existing import ENVIRONMENT
    from dspex_persist.state.bridge.pools import OWN, PoolPlan

    given = dict(settings.pools)
    own = given.pop(OWN, PoolSettings.model_validate({}))
    for name in ("command", "size", "tools", "streaming"):
        if getattr(own, name):
            reason = "it is the pool of this server's own tools: see the settings tools and workers"
            raise SettingsError(f"pools.{OWN}.{name}", reason)

    def options(pool: PoolSettings, size: int) -> PoolOptions:
        names = [each.name for each in dataclasses.fields(PoolOptions) if each.name in PoolSettings.model_fields]
        given = {name: getattr(pool, name) for name in names if name in pool.model_fields_set}
        return PoolOptions(**{**given, "size": size})

    def timeouts(pool: PoolSettings) -> dict[str, Any]:
        return {"ready_timeout_s": pool.ready_timeout_s, "stop_timeout_s": pool.stop_timeout_s}

    plans: list[PoolPlan] = []
    if settings.workers and settings.tools:
        command = dataclasses.replace(_worker_command(settings, here), **timeouts(own))
        named = {"size": f"workers ({flag_of('workers')})", "command": f"tools ({flag_of('tools')})"}
        plans.append(PoolPlan(OWN, command, options(own, settings.workers), settings=named))
    for name, pool in given.items():
        if not pool.command:
            raise SettingsError(f"pools.{name}.command", "name the command line that starts a worker")
        env = {**ENVIRONMENT, **pool.env}
        command = WorkerCommand(pool.command, env=env, cwd=pool.cwd or here, **timeouts(pool))
        names = tuple(dict.fromkeys((*pool.tools, *pool.streaming)))
        more: Any = {"streaming": frozenset(pool.streaming), "takes_binary": pool.binary}
        plans.append(PoolPlan(name, command, options(pool, pool.size or 2), names, **more))
    return plans


def _check_names(plans: "Iterable[PoolPlan]", tools: "Iterable[str]") -> None:
    """Refuse two tools of one name."""
    known = dict.fromkeys(tools, "tools")
    for plan in plans:
        for name in plan.tools:
            if name in known:
                raise SettingsError(f"pools.{plan.name}.tools", f"there is a tool {name!r} in {known[name]} already")
            known[name] = f"pools.{plan.name}"


def _worker_command(settings: Settings, here: Path) -> "WorkerCommand":
    """Return how a worker of ours is started: a new interpreter, which imports the tools by itself."""
    from dspex_persist.infra.worker import WorkerCommand

    options = _worker_options(settings).written()
    argv = (sys.executable, "-m", "dspex_persist.working", options, "unix:{socket}", "{callback}")
    return WorkerCommand(argv, "unix:{socket}", cwd=here)


def _worker_options(settings: Settings) -> "WorkerOptions":
    from dspex_persist import __version__
    from dspex_persist.working import Options

    return Options(
        tools=settings.tools,
        record_lm=settings.record_lm,
        tool_threads=settings.tool_threads,
        max_message_bytes=int(settings.max_message_bytes),
        log_level=settings.log_level,
        otel=settings.otel,
        version=__version__,
        limits=limits_of(settings),
    )


class _End(End):
    """Stops the server: on a signal, or when its storage fails."""

    def __init__(self, loop: asyncio.AbstractEventLoop, path: str) -> None:
        super().__init__(loop)
        self.failure: StorageFailedError | None = None
        self._path = path

    def on_storage_failed(self, error: BaseException) -> None:
        """Stop the server, and end the process if that takes too long.

        Called on the thread whose group failed, once all callers have the error, so that there is time to send their
        answers.
        """
        self.failure = StorageFailedError(self._path, error)
        _log.critical("storage failed", db=self._path, reason=str(error))
        deadline = threading.Timer(_ANSWER_FAILED_S, os._exit, (EXIT_STORAGE_FAILED,))
        deadline.daemon = True
        deadline.start()
        # The loop may have ended in the meantime.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.stop.set)
