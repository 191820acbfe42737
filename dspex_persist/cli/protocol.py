"""dspex-persist protocol: the .proto files of a server."""

from pathlib import Path
from typing import Annotated, Final

import typer

from dspex_persist.cli.output import say

HELP: Final = (
    "Print where the .proto files of a server are, from which clients and workers in any language are generated, or "
    "copy them to a folder (--out).\n\n"
    "Python programs need not generate anything: dspex_persist.protocol has the modules."
)
EPILOG: Final = (
    "[bold]Examples[/bold]\n\n"
    "dspex-persist protocol --out proto\n\n"
    'protoc -I "$(dspex-persist protocol)" --go_out=. snakepit_bridge.proto\n\n'
)

Out = typer.Option("--out", metavar="DIR", help="Copy them there; made if missing.", show_default=False)


def protocol(out: Annotated[Path | None, Out] = None) -> None:
    """Print the folder, or copy the files."""
    from dspex_persist.cli.places import expanded
    from dspex_persist.protocol import copy_to, folder

    if out is None:
        say(str(folder()))
        return
    for path in copy_to(expanded(out)):
        say(str(path))
