"""What a shell offers for a name that is being typed: the sessions, variables and tools of the place that is named.

A shell waits for it at each press of the key, so it imports only what it needs, and any error means no offer.
"""

import io
import os
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer

from dspex_persist.addresses import DatabaseUrl, database_url

if TYPE_CHECKING:
    from dspex_persist.state.abilities import StreamsTools

_TIMEOUT_S: Final = 1.0
_MOST: Final = 200
_BY_DEFAULT: Final = "sessions.db"
# As in `cognitive.programs.documents`, whose import takes too long.
_PROGRAMS: Final = "programs/"
_CONFIG: Final = Path("dspex-persist.toml")


def sessions(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return live sessions."""
    from dspex_persist.state.store import names

    return _offered(
        ctx,
        incomplete,
        lambda path: names.live_sessions(path, incomplete),
        _sessions_of_server,
    )


def variables(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the variables of the session that was typed."""
    from dspex_persist.state.store import names

    session = ctx.params.get("session") or ""
    return _offered(
        ctx,
        incomplete,
        lambda path: names.variables(path, session, incomplete),
        lambda url: _of_server(url, lambda state: [each.name for each in state.list_variables(session)]),
    )


def programs(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the DSPy programs of the session that was typed."""
    from dspex_persist.state.store import names

    session = ctx.params.get("session") or ""
    return _offered(
        ctx,
        incomplete,
        lambda path: _without_prefix(names.variables(path, session, _PROGRAMS + incomplete)),
        lambda url: _of_server(
            url, lambda state: _without_prefix([each.name for each in state.list_variables(session, f"{_PROGRAMS}*")])
        ),
    )


def _without_prefix(variables: list[str]) -> list[str]:
    return [name.removeprefix(_PROGRAMS) for name in variables]


def tools(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return a server's tools; for a file those that were ever executed, as listing modules would run their code."""
    from dspex_persist.state.store import names

    session = ctx.params.get("session") or ""
    return _offered(
        ctx,
        incomplete,
        lambda path: names.tools(path, incomplete),
        lambda url: _of_server(url, lambda state: [each.name for each in state.list_tools(session)]),
    )


def _offered(
    ctx: typer.Context,
    incomplete: str,
    of_file: Callable[[Path], list[str]],
    of_server: Callable[[str], list[str]],
) -> list[str]:
    found: list[str] = []
    # Text on stderr would appear in the middle of what is being typed.
    with suppress(Exception), redirect_stderr(io.StringIO()):
        # In some commands the server is an option of another name.
        target = ctx.params.get("target") or ctx.params.get("server")
        if target:
            found = of_server(_url_of(target))
        elif isinstance(place := _database_of(ctx.params.get("db")), Path):
            found = of_file(place)
    # Clients choose the names: a terminal would obey control characters.
    return [name for name in found if name.startswith(incomplete) and name.isprintable()][:_MOST]


def _url_of(target: str) -> str:
    from dspex_persist.cli.places import url_of

    return url_of(target)


def _database_of(given: str | None) -> Path | DatabaseUrl:
    """Return what `places.database_of` returns; importing the settings takes as long as all the rest."""
    if given is not None and (url := database_url(given)) is not None:
        return url
    if given is not None:
        # The shell has not expanded what is being typed.
        return Path(os.path.expandvars(given)).expanduser()
    if _CONFIG.exists() or "DSPEX_PERSIST_CONFIG" in os.environ:
        from dspex_persist.cli.places import database_of

        return database_of(None)
    named = os.environ.get("DSPEX_PERSIST_DB") or _BY_DEFAULT
    return database_url(named) or Path(named)


def _sessions_of_server(url: str) -> list[str]:
    from dspex_persist.state.audit import SessionQuery
    from dspex_persist.wiring.connecting import open_audit

    with open_audit(url, timeout_s=_TIMEOUT_S) as source:
        return [each.session_id for each in source.iterate(SessionQuery(live=True, limit=_MOST))]


def _of_server(url: str, names: "Callable[[StreamsTools], list[str]]") -> list[str]:
    from dspex_persist.wiring.connecting import connect

    with connect(url, timeout_s=_TIMEOUT_S) as state:
        return names(state)
