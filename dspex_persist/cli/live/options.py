"""The arguments and options that the commands on live sessions share."""

from typing import Annotated

import typer

from dspex_persist.cli import completing

Session = Annotated[
    str,
    typer.Argument(metavar="SESSION", help="The session's id.", show_default=False, autocompletion=completing.sessions),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="ADDRESS",
        show_default=False,
        help="The running server: HOST:PORT, unix:PATH or its URL. [dim](without it: a database, see --db)[/dim]",
    ),
]
Actor = Annotated[
    str | None,
    typer.Option(
        "--actor",
        metavar="WHO",
        show_default=False,
        help="Who makes the change, for the history. [dim](user:NAME, with your login name)[/dim]",
    ),
]
Reveal = Annotated[bool, typer.Option("--reveal", help="Show the values of sensitive variables.")]
Why = Annotated[
    str | None,
    typer.Option(
        "--why",
        metavar="TEXT",
        show_default=False,
        help="Why, for the history: kept with each version that this writes.",
    ),
]
