"""dspex-persist demo: the real server, a real client, and a kill in the middle of writing, shown and checked."""

import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.markup import escape

from dspex_persist.cli.demo import interrupted, scenes
from dspex_persist.cli.demo.stage import SESSION, Stage, fresh_database

HELP = (
    "See it work: serve, write, kill the server, start it again, and find every write.\n\n"
    "Takes less than half a minute. Ends with exit code 0 if everything was as promised, else with 1 and what was not."
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
        typer.Option(metavar="DIR", help="Leave the database in this directory, to look at it afterwards."),
    ] = None,
) -> None:
    """Play it, and say what was not as promised."""
    console = Console(width=min(_WIDTH, Console().width), highlight=False)
    began = time.monotonic()
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(TemporaryDirectory(prefix="dspex-persist-demo-")))
        _play(Stage(console, fresh_database(folder)))
    console.print()
    console.print(f"[bold green]All as promised[/], in {time.monotonic() - began:.0f} s.", end=" ")
    kept = f"The database is {keep / 'sessions.db'}." if keep else "Run it with --keep DIR to keep the database."
    console.print(escape(kept))


def _play(stage: Stage) -> None:
    from dspex_persist import connect

    stage.say("Starting the server: a process of its own, on a fresh database file.")
    with ExitStack() as stack:
        server = stack.enter_context(stage.start_server())
        stage.add(f"It is process {server.pid} and answers on 127.0.0.1:{server.port}.")
        url = f"grpc://127.0.0.1:{server.port}"
        client = stack.enter_context(connect(url, timeout_s=scenes.CALL_TIMEOUT_S))
        scenes.register(stage, client)
        watching = stack.enter_context(connect(url))
        observer = stack.enter_context(scenes.Observer(watching.watch(SESSION)))
        scenes.change(stage, client)
        scenes.show_updates(stage, observer)
        scenes.show_history(stage, client)
        mover = interrupted.begin(stage, stack.enter_context(connect(url)), observer)
        writers = scenes.write_until_killed(stage, client, server, observer)
        mover.join()
    with ExitStack() as stack:
        stage.say("Starting it again on the same file, as if nothing had happened.")
        server = stack.enter_context(stage.start_server())
        stage.add(f"It is process {server.pid} now.")
        client = stack.enter_context(connect(f"grpc://127.0.0.1:{server.port}"))
        scenes.show_writes(stage, client, writers)
        scenes.show_resumed_watch(stage, client, observer)
        interrupted.show(stage, client)
        scenes.show_verification(stage)
        scenes.stop(stage, server)
