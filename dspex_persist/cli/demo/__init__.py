"""dspex-persist demo: kills a real server while clients write, and checks that nothing is lost."""

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.markup import escape

HELP = (
    "See it work: serve, write, kill the server, restart it, and find every write.\n\n"
    "Takes less than half a minute. Exits with 0 if everything was as promised, else with 1 and what was not."
)
EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "dspex-persist demo\n\n"
    "dspex-persist demo --keep ~/demo    then: dspex-persist db stats --db ~/demo/sessions.db\n\n"
)

_WIDTH: Final = 80


def demo(
    keep: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the database in this directory."),
    ] = None,
) -> None:
    """Play the demo."""
    # Imported here, so that other commands start quickly.
    from dspex_persist.cli.demo.play import play
    from dspex_persist.cli.demo.stage import DemoContext, fresh_database

    # The scenes say what happens to the server; clients would log it as well.
    logging.getLogger("dspex_persist").setLevel(logging.CRITICAL)
    console = Console(width=min(_WIDTH, Console().width), highlight=False)
    began = time.monotonic()
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(TemporaryDirectory(prefix="dspex-persist-demo-")))
        play(DemoContext(console, fresh_database(folder)))
    console.print()
    console.print(f"[bold green]All as promised[/], in {time.monotonic() - began:.0f} s.", end=" ")
    kept = f"The database is {keep / 'sessions.db'}." if keep else "Run it with --keep DIR to keep the database."
    console.print(escape(kept))
