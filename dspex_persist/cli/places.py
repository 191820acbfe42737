"""The options that name a database file or a server."""

from pathlib import Path
from typing import Annotated

import typer

Db = Annotated[
    Path | None,
    typer.Option(
        "--db",
        metavar="PATH",
        show_default=False,
        # Opening the file reports why it cannot be read, and what to do.
        readable=False,
        help="The database file. [dim](as serve: DSPEX_PERSIST_DB, the settings file, sessions.db)[/dim]",
    ),
]


def database_of(given: Path | None) -> Path:
    """Return the file that `--db` names, or else the one that `serve` would use."""
    from dspex_persist.settings import load_settings

    if given is not None and given.parts and given.parts[0] in ("grpc:", "grpcs:", "grpc+unix:"):
        raise typer.BadParameter(f"--db names a file, not a server such as {given}; use --target if the command has it")
    return load_settings({"db": given}).db


def expanded(path: Path) -> Path:
    """Expand a leading ~."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        reason = "HOME is not set, and this user has no home directory; write the whole path"
        raise typer.BadParameter(f"{path}: {reason}") from error


Server = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="ADDRESS",
        show_default=False,
        help="Do it on this running server: HOST:PORT, unix:PATH or its URL.",
    ),
]


def server_of(target: str | None, db: Path | None) -> str | None:
    """Return the URL of the server that `--target` names, or None without it; refuses `--db` together with it."""
    if target is None:
        return None
    if db is not None:
        raise typer.BadParameter("--db names a file and --target a server: give one of them")
    return url_of(target)


def url_of(target: str, flag: str = "--target") -> str:
    """Return the URL of the server that `flag` names: HOST:PORT, unix:PATH, or a URL."""
    from dspex_persist.infra.listen import TLS_SCHEME, ListenError, UnixAddress, parse_listen, target_of
    from dspex_persist.settings import SettingsError

    try:
        address = parse_listen(target_of(target))
    except ListenError as error:
        raise SettingsError(flag.strip("-"), f"{target!r} is invalid: {error.reason}", f"flag {flag}") from error
    if isinstance(address, UnixAddress):
        return f"grpc+{address}"
    return f"{TLS_SCHEME if target.startswith(TLS_SCHEME) else 'grpc://'}{address}"
