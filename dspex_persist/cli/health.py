"""dspex-persist health: whether a server serves, for people and for supervisors.

`__main__` carries out the usual forms of it without importing this module.
"""

from pathlib import Path
from typing import Annotated, Final

import typer

from dspex_persist.cli.groups import Json

HELP: Final = (
    "Ask a server whether it serves, as supervisors do every few seconds.\n\n"
    "Without --target, it asks the server that serve would start here with the same environment and settings file. It "
    "needs no token. The database is not opened."
)
EPILOG: Final = (
    "[bold]Exit codes[/bold]\n\n"
    "0  it serves\n\n"
    "1  it does not: it is starting, shutting down or stuck, or its database is away\n\n"
    "2  wrong usage, or an invalid setting\n\n"
    "69  it cannot be reached; the message on stderr says why\n\n"
    "[bold]Examples[/bold]\n\n"
    "dspex-persist health\n\n"
    "dspex-persist health --target unix:/run/dspex-persist/bridge.sock --wait 30\n\n"
    "dspex-persist health --target grpcs://state.example.org:50051 --json\n\n"
)

Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="ADDRESS",
        show_default=False,
        help="The server: HOST:PORT, unix:PATH or its URL. [dim](as serve: DSPEX_PERSIST_LISTEN, settings file)[/dim]",
    ),
]
Wait = Annotated[
    float, typer.Option("--wait", metavar="SECONDS", min=0, help="Ask again until it serves, for so long at most.")
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="PATH",
        show_default=False,
        readable=False,
        help="The settings file of the server. [dim](as serve: DSPEX_PERSIST_CONFIG, dspex-persist.toml)[/dim]",
    ),
]


def health(target: Target = None, wait_s: Wait = 0, config: Config = None, as_json: Json = False) -> None:
    """Ask a server whether it serves."""
    from dspex_persist import healthcheck

    code = healthcheck.run_options(target, config, wait_s, as_json=as_json)
    if code:
        raise typer.Exit(code)
