"""Who may connect to a server, as its settings say: addresses, certificates, tokens.

Faults in them are found before the server starts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dspex_persist.extras import how_to_install
from dspex_persist.infra.listen import ListenError, TcpAddress, UnixAddress, is_loopback, parse_listen
from dspex_persist.settings import Settings, SettingsError, flag_of

if TYPE_CHECKING:
    from dspex_persist.infra.access.tls import CallerFiles, Certificates
    from dspex_persist.infra.access.tokens import Tokens
    from dspex_persist.state.bridge.access.denials import Denials
    from dspex_persist.state.bridge.access.scopes import Access


@dataclass(frozen=True, slots=True)
class Security:
    """Who may connect to a server, and what it may connect to.

    Attributes:
        certificates: For TLS; None to serve without encryption.
        tokens: Those of clients; None to demand none.
        allows: Whether a registered tool at an address may be called.
        worker_tls: For TLS with registered workers.
    """

    certificates: "Certificates | None"
    tokens: "Tokens | None"
    allows: Callable[[str], bool]
    worker_tls: "CallerFiles"

    @property
    def asks_certificates(self) -> bool:
        """Whether clients have to show certificates."""
        return self.certificates is not None and self.certificates.asks_clients

    @property
    def is_open(self) -> bool:
        """Whether nobody has to show anything."""
        return self.tokens is None and not self.asks_certificates


def security_of(settings: Settings) -> Security:
    """Return what the settings say; raise `SettingsError` for a fault in them, or in a file that they name.

    Call it before tools are imported, which may change the working directory.
    """
    _check_listen(settings, has_tls=settings.tls_cert is not None)
    _check_same_user(settings)
    _refuse_passed_sockets()
    security = Security(
        certificates_of(settings), _tokens_of(settings), _allowed_of(settings), _worker_tls_of(settings)
    )
    _check_advertised(settings)
    _check_metrics(settings, has_tls=security.certificates is not None)
    return security


def _refuse_passed_sockets() -> None:
    """Refuse to start by socket activation. Raise `SettingsError`."""
    from dspex_persist.infra.notify import passed_sockets

    if passed_sockets():
        reason = (
            "the service manager has opened a socket for this server (socket activation), which gRPC cannot use: let "
            "the server open its own, and systemd-socket-proxyd pass connections on to it (docs/production.md)"
        )
        raise SettingsError("listen", reason, "environment variable LISTEN_FDS")


def _check_listen(settings: Settings, *, has_tls: bool) -> None:
    """Refuse to serve without TLS where other machines can connect, unless the settings allow it."""
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


def _check_advertised(settings: Settings) -> None:
    """Refuse an address that leads nowhere."""
    if settings.advertise is None:
        return
    try:
        address = parse_listen(settings.advertise)
    except ListenError as error:
        raise SettingsError("advertise", f"{settings.advertise!r} is invalid: {error.reason}") from error
    if isinstance(address, TcpAddress) and not address.port:
        raise SettingsError("advertise", f"{settings.advertise!r} names no port, and others have to know it")


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
        reason = f"metrics need prometheus-client, which is not installed: {how_to_install('metrics')}"
        raise SettingsError("metrics_listen", reason) from None


def _check_same_user(settings: Settings) -> None:
    """Refuse `same_user` where the user at the other end of a connection is not known."""
    from dspex_persist.infra.access.peers import can_tell_users

    if not settings.same_user:
        return
    if not is_loopback(settings.listen):
        raise SettingsError("same_user", f"other machines can reach {settings.listen!r}: listen on 127.0.0.1")
    if not can_tell_users():
        raise SettingsError("same_user", "this system does not say whose a connection is: listen on unix:PATH")


def certificates_of(settings: Settings) -> "Certificates | None":
    """Return the certificates for TLS, or None without it. Raise `SettingsError` for a fault in a file."""
    from dspex_persist.infra.access.tls import Certificates, TlsError, TlsFiles

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
    from dspex_persist.infra.access.allowed import AllowedAddresses

    if settings.insecure and not settings.tool_addresses:
        return lambda _: True
    try:
        return AllowedAddresses(settings.tool_addresses).allows
    except ValueError as error:
        raise SettingsError("tool_addresses", str(error)) from error


def _worker_tls_of(settings: Settings) -> "CallerFiles":
    """Return the files for TLS with registered workers; raise `SettingsError` for a fault in one."""
    from dspex_persist.infra.access.tls import CallerFiles, TlsError

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
    """Return the tokens of clients, or None without a file of them. Raise `SettingsError` for a fault in it."""
    from dspex_persist.infra.access.tokens import TokenFileError, Tokens

    if settings.token_file is None:
        return None
    try:
        return Tokens(settings.token_file.absolute())
    except TokenFileError as error:
        raise SettingsError("token_file", str(error)) from error


def access_of(security: Security, denials: "Denials") -> "Access | None":
    """Return what knows the clients; None if none has to show anything."""
    if security.is_open:
        return None
    from dspex_persist.state.bridge.access.scopes import Access

    return Access(security.tokens, denials, certified=security.asks_certificates)
