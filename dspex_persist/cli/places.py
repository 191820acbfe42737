"""The options that name a database or a server."""

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from dspex_persist.addresses import DatabaseUrl

Db = Annotated[
    str | None,
    typer.Option(
        "--db",
        metavar="PATH|URL",
        show_default=False,
        help=(
            "The database: a file, or a URL such as postgresql://USER@HOST/DATABASE or redis://HOST. "
            "[dim](as serve: DSPEX_PERSIST_DB, the settings file, sessions.db)[/dim]"
        ),
    ),
]
_FLAG: Final = "flag --db"
_SERVERS: Final = ("grpc:", "grpcs:", "grpc+unix:")
_INSTEAD: Final = {
    "postgresql": {
        "db backup": "pg_dump copies such a database while its servers run",
        "db restore": "while no server runs, pg_restore or psql brings back what pg_dump has written",
        "db vacuum": "PostgreSQL does so by itself (autovacuum); VACUUM FULL returns space to the disk",
        "db stats": "pg_total_relation_size tells the size of its tables, and \\dt+ of psql lists them",
        "db current": "its table alembic_version has the revision of the schema",
        "db upgrade": "the first server of a new release that starts upgrades it: make a copy with pg_dump before",
    },
    "redis": {
        "db backup": "a copy of the appendonlydir of the store is a backup",
        "db restore": "put a copy of its appendonlydir back, while no server runs",
        "db vacuum": "the command BGREWRITEAOF of the store shortens its log file",
        "db stats": "the commands INFO memory and MEMORY USAGE of the store tell what takes up space",
        "db current": "its format has no revisions yet",
        "db upgrade": "its format has no revisions yet",
    },
}
_OF_FILES: Final = "session export and session import --db FILE bring its sessions into a file"


def database_of(given: str | None) -> Path | DatabaseUrl:
    """Return the database that `--db` names, or else the one that `serve` would use."""
    from dspex_persist.settings import SettingsError, load_settings

    if given is not None and given.lower().startswith(_SERVERS):
        reason = f"it names a database, not a server such as {given}; use --target if the command has it"
        raise SettingsError("db", reason, _FLAG)
    return load_settings({"db": given}).db


def file_of(given: str | None, command: str) -> Path:
    """Return the file that `--db` names, or the one that `serve` would use, for a command that needs a file."""
    place = database_of(given)
    if isinstance(place, DatabaseUrl):
        from dspex_persist.settings import SettingsError

        instead = _INSTEAD.get(place.scheme, {}).get(command, _OF_FILES)
        reason = f"{command} is for files, not for {place}: {instead}"
        raise SettingsError("db", reason, _FLAG if given is not None else "")
    return place


def options_of(place: Path | DatabaseUrl) -> dict[str, Any]:
    """Return the options for `connect` that the settings have for a database that servers share: its durability."""
    from dspex_persist.settings import load_settings

    return {"durability": load_settings().durability} if isinstance(place, DatabaseUrl) else {}


def refuse_missing(place: Path | DatabaseUrl) -> None:
    """Raise `OpenError` for a database that does not exist: opening it would create it."""
    if isinstance(place, DatabaseUrl):
        from dspex_persist.wiring.databases import database_at

        database_at(place).check_there()
    else:
        from dspex_persist.state.store import maintenance

        maintenance.current(place)


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


def server_of(target: str | None, db: str | None) -> str | None:
    """Return the URL of the server that `--target` names, or None without it; refuses `--db` together with it."""
    if target is None:
        return None
    if db is not None:
        raise typer.BadParameter("--db names a database and --target a server: give one of them")
    return url_of(target)


def url_of(target: str, flag: str = "--target") -> str:
    """Return the URL of the server that `flag` names: HOST:PORT, unix:PATH, or a URL."""
    from dspex_persist.infra.listen import TLS_SCHEME, ListenError, UnixAddress, names_tls, parse_listen, target_of
    from dspex_persist.settings import SettingsError

    try:
        address = parse_listen(target_of(target))
    except ListenError as error:
        raise SettingsError(flag.strip("-"), f"{target!r} is invalid: {error.reason}", f"flag {flag}") from error
    if isinstance(address, UnixAddress):
        return f"grpc+{address}"
    return f"{TLS_SCHEME if names_tls(target) else 'grpc://'}{address}"
