"""Where commands find what they are about: a database file, or a server."""

from pathlib import Path
from typing import Annotated

import typer

Db = Annotated[
    Path | None,
    typer.Option(
        "--db",
        metavar="PATH",
        show_default=False,
        # Whoever opens it says why it cannot be read, and what to do.
        readable=False,
        help="The database file. [dim](as serve: DSPEX_PERSIST_DB, the settings file, sessions.db)[/dim]",
    ),
]


def database_of(given: Path | None) -> Path:
    """The file that `--db` names, or else the one that `serve` would take."""
    from dspex_persist.settings import load_settings

    if given is not None and given.parts and given.parts[0] in ("grpc:", "grpc+unix:"):
        raise typer.BadParameter(f"--db names a file, not a server such as {given}; use --target where there is one")
    return load_settings({"db": given}).db


def expanded(path: Path) -> Path:
    """The path that is meant by one with ~."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise typer.BadParameter(f"{path}: HOME is not set, and this user has none; write the path out") from error


Server = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="ADDRESS",
        show_default=False,
        help="Have this server do it while it keeps serving: HOST:PORT or unix:PATH.",
    ),
]


def server_of(target: str | None, db: Path | None) -> str | None:
    """The URL of the server that `--target` names, None without it; refuses `--db` beside it."""
    if target is None:
        return None
    if db is not None:
        raise typer.BadParameter("--db names a file and --target a server: give one of them")
    return url_of(target)


def url_of(target: str) -> str:
    """The URL of the server that `--target` names: HOST:PORT or unix:PATH, or that URL."""
    from dspex_persist.infra.listen import ListenError, UnixAddress, parse_listen, target_of
    from dspex_persist.settings import SettingsError

    try:
        address = parse_listen(target_of(target))
    except ListenError as error:
        raise SettingsError("target", f"{target!r} will not do: {error.reason}", "flag --target") from error
    return f"grpc+{address}" if isinstance(address, UnixAddress) else f"grpc://{address}"
