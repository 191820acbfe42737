"""dspex-persist worker: a process that runs tools for the server that starts it."""

from typing import Annotated

import typer

HELP = (
    "Run tools for a server. With serve --workers, a server starts such processes itself.\n\n"
    "It answers the server at --listen, and calls it at --callback. Prints GRPC_READY:<port> on stdout when it is "
    "ready (0: a Unix socket); logs go to stderr. Limits come from the environment, as for serve."
)
EPILOG = "[bold]Example[/bold]\n\ndspex-persist serve --tools shop.tools --workers 4\n\n"

Tools = typer.Option(
    "--tools",
    metavar="MODULE[:NAME]",
    help="The tools of a module, or only the tool or toolbox of that name; may be repeated.",
    show_default=False,
)
Listen = typer.Option("--listen", metavar="ADDRESS", help="Where to serve: unix:PATH.", show_default=False)
Callback = typer.Option(
    "--callback", metavar="ADDRESS", help="The address at which the server answers this worker.", show_default=False
)
ToolThreads = typer.Option("--tool-threads", metavar="NUMBER", help="Threads for tools that are not asynchronous.")
RecordLm = typer.Option("--record-lm/--no-record-lm", help="Keep the LM calls of all tools in the journal; needs DSPy.")


def worker(
    tools: Annotated[list[str], Tools],
    listen: Annotated[str, Listen],
    callback: Annotated[str, Callback],
    tool_threads: Annotated[int, ToolThreads] = 64,
    record_lm: Annotated[bool, RecordLm] = False,
) -> None:
    """Serve until SIGTERM."""
    from dspex_persist import wiring
    from dspex_persist.settings import load_settings

    flags = {"tools": tuple(tools), "listen": listen, "tool_threads": tool_threads, "record_lm": record_lm}
    wiring.serve_worker(load_settings(flags, runs_tools=True), callback)
