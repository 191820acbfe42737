"""dspex-persist health: whether a server serves. Imports little, as it is run every few seconds."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dspex_persist.errors import DspexError
from dspex_persist.infra import streams
from dspex_persist.infra.health import NoAnswerError, Tls, serves
from dspex_persist.infra.listen import TLS_SCHEME, Address, ListenError, TcpAddress, names_tls, parse_listen, target_of
from dspex_persist.opening import ENV_PREFIX
from dspex_persist.sources import DATABASE, LISTEN, SettingsError, texts

SERVING: Final = 0
NOT_SERVING: Final = 1
UNREACHABLE: Final = 69
"""The exit codes (docs/exit-codes.md)."""
ANSWER_S: Final = 5.0
"""How long one question may take, in seconds."""
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 0.5
_INTERRUPTED: Final = 130
_USAGE: Final = 2
_EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_ADVICE: Final = {
    "refused": "start it with `dspex-persist serve`, or name its address with --target",
    "missing": "start it with `dspex-persist serve`, or name its address with --target",
    "plain": "name it without TLS: --target HOST:PORT",
    "tls": "if it has, name it as --target grpcs://HOST:PORT",
    "trust": "DSPEX_PERSIST_CA names the certificates to trust",
    "certificate": "name one in DSPEX_PERSIST_CERT and its key in DSPEX_PERSIST_KEY",
    "strange": "another server may use the address: name the right one with --target",
    "slow": "it may be stopped, or overloaded",
}


@dataclass(frozen=True, slots=True)
class Place:
    """A server to ask.

    Attributes:
        target: How it is called in messages.
        address: Where it listens; None if it takes any free port, and none is known yet.
        has_tls: Whether it has TLS.
        database: Its database, if it is the server of the settings.
    """

    target: str
    address: Address | None
    has_tls: bool
    database: Path | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """What a server said, or why it said nothing: "serving", "not_serving", "starting" or "unreachable"."""

    target: str
    status: str
    error: str = ""

    @property
    def code(self) -> int:
        """The exit code."""
        if self.status == "unreachable":
            return UNREACHABLE
        return SERVING if self.status == "serving" else NOT_SERVING


def check(target: str | None, config: Path | None, wait_s: float) -> Health:
    """Ask a server whether it serves.

    Args:
        target: Its address or URL; without it, the server that `serve` would start with the same settings.
        config: The settings file; by default the one that `serve` reads.
        wait_s: How long to ask again until it serves, in seconds.

    Raises:
        SettingsError: The address or the settings file is invalid.
        TlsError: A file that the environment names for TLS cannot be used.
    """
    deadline = time.monotonic() + wait_s
    pause_s = _FIRST_PAUSE_S
    while True:
        place = _own(config) if target is None else _named(target)
        left_s = deadline - time.monotonic()
        health = _ask(place, ANSWER_S if left_s <= 0 else min(ANSWER_S, left_s))
        left_s = deadline - time.monotonic()
        if health.code == SERVING or left_s <= 0:
            return health
        time.sleep(min(pause_s, left_s))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def report(health: Health, *, as_json: bool) -> int:
    """Print what a server said; returns the exit code."""
    is_fine = health.code == SERVING
    if as_json:
        import json

        error = {"error": health.error} if health.error else {}
        streams.print_line(json.dumps({"ok": is_fine, "status": health.status, "target": health.target, **error}))
    elif is_fine:
        streams.print_line(f"{health.target} is serving")
    if not is_fine:
        streams.print_error(f"error: {health.error}")
    return health.code


def run(words: list[str]) -> int | None:
    """Carry the command out if its words are of the usual form; returns the exit code, or None if they are not."""
    options = _parse(words)
    if options is None:
        return None
    streams.prepare()
    config = Path(options["--config"]) if "--config" in options else None
    wait_s = float(options.get("--wait", "0"))
    try:
        return streams.finish(run_options(options.get("--target"), config, wait_s, as_json="--json" in options))
    except KeyboardInterrupt:
        return _INTERRUPTED


def run_options(target: str | None, config: Path | None, wait_s: float, *, as_json: bool) -> int:
    """Ask a server (see `check`), and print what it said; returns the exit code."""
    try:
        return report(check(target, config, wait_s), as_json=as_json)
    except (SettingsError, DspexError) as error:
        refuse(error, as_json=as_json)
        return _USAGE


def refuse(error: Exception, *, as_json: bool) -> None:
    """Print why a server was not asked."""
    if as_json:
        import json

        streams.print_line(json.dumps({"ok": False, "error": str(error)}))
    streams.print_error(f"error: {error}")


def _parse(words: list[str]) -> dict[str, str] | None:
    options: dict[str, str] = {}
    waiting = list(words)
    while waiting:
        name, equals, text = waiting.pop(0).partition("=")
        if name == "--json" and not equals:
            options[name] = ""
            continue
        if name not in ("--target", "--wait", "--config"):
            return None
        if not equals:
            if not waiting:
                return None
            text = waiting.pop(0)
        options[name] = text
    # What is not a number is refused where all usage is.
    return options if options.get("--wait", "0").replace(".", "", 1).isdecimal() and _is_text(options) else None


def _is_text(options: dict[str, str]) -> bool:
    try:
        "".join(options.values()).encode()
    except UnicodeError:
        return False
    return True


def _named(target: str) -> Place:
    address = _parsed(target_of(target), "target", target, "flag --target")
    has_tls = names_tls(target)
    return Place(f"{TLS_SCHEME if has_tls else ''}{address}", address, has_tls)


def _own(config: Path | None) -> Place:
    """Return the server that `serve` would start with the same settings."""
    found = texts(config, "listen", "tls_cert", "db")
    database = _database(found.get("db", DATABASE))
    listen, has_tls = found.get("listen", LISTEN), found.get("tls_cert", "none").lower() != "none"
    address: Address | None = _parsed(listen, "listen", listen, "")
    if isinstance(address, TcpAddress):
        if address.port == 0:
            announced = _owner(database)[1]
            address = _parsed(target_of(announced), "listen", announced, "") if announced else None
        elif address.host in _EVERYWHERE:
            address = TcpAddress(_EVERYWHERE[address.host], address.port)
    return Place(f"{TLS_SCHEME if has_tls else ''}{address or listen}", address, has_tls, database)


def _database(name: str) -> Path:
    try:
        return Path(name).expanduser().resolve()
    except (RuntimeError, OSError):
        return Path(name)


def _parsed(listen: str, setting: str, shown: str, source: str) -> Address:
    try:
        return parse_listen(listen)
    except ListenError as error:
        raise SettingsError(setting, f"{shown!r} is invalid: {error.reason}", source) from error


def _owner(database: Path) -> tuple[int | None, str]:
    """Return the process that has a database open, if one has, and the address at which it serves it, if it does."""
    from dspex_persist.infra import holder

    try:
        with database.with_name(f"{database.name}.lock").open("rb") as file:
            text = file.read(holder.TEXT_MAX_BYTES)
    except OSError:
        return None, ""
    return holder.pid_of(text), holder.address_of(text)


def _ask(place: Place, timeout_s: float) -> Health:
    if place.address is None:
        return _absent(place, "it has no port yet", "refused")
    try:
        is_serving = serves(place.address, _tls(place), timeout_s)
    except NoAnswerError as error:
        return _absent(place, error.reason, error.kind)
    if is_serving:
        return Health(place.target, "serving")
    why = "it is shutting down, its writer is stuck, or its database is away"
    return Health(place.target, "not_serving", f"{place.target} is not serving: {why}")


def _absent(place: Place, reason: str, kind: str) -> Health:
    pid, address = (
        _owner(place.database) if place.database is not None and kind in ("refused", "missing") else (None, "")
    )
    if pid is not None and not address:
        what = f"process {pid} has {place.database} open, and does not serve it yet: it is starting, or another command"
        return Health(place.target, "starting", f"{place.target} is not serving: {what}")
    advice = f"its server is at {address}: name that with --target" if address else _ADVICE.get(kind, "")
    return Health(
        place.target, "unreachable", f"cannot reach {place.target}: {'; '.join(filter(None, (reason, advice)))}"
    )


def _tls(place: Place) -> Tls | None:
    if not place.has_tls or not isinstance(place.address, TcpAddress):
        return None
    ca, cert, key = (_file(name) for name in ("CA", "CERT", "KEY"))
    # Nobody is between this process and the server of its own machine, whose certificate names another host.
    return Tls(place.address.host, ca, cert, key, verify=place.database is None)


def _file(name: str) -> Path | None:
    text = os.environ.get(ENV_PREFIX + name)
    return Path(text) if text else None
