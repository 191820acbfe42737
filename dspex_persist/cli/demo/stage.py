"""Shared by the demo's scenes."""

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dspex_persist.errors import DspexError
from dspex_persist.infra.process import ServerProcess

SESSION: Final = "demo"
# How long to wait for anything, in seconds: the machine may be slow.
PATIENCE_S: Final = 15.0
PROGRAM: Final = (sys.executable, "-m", "dspex_persist")
_TOOLS: Final = "dspex_persist.cli.demo.tools"


@dataclass(eq=False)
class DemoFailedError(DspexError):
    """Something was not as promised."""

    what: str

    def __str__(self) -> str:
        return f"the demo failed: {self.what}"


class DemoContext:
    """The demo's console and database."""

    def __init__(self, console: Console, database: Path) -> None:
        self.console = console
        self.database = database
        self._scene = 0

    def say(self, sentence: str) -> None:
        """Begin a scene with a sentence about what happens next."""
        self._scene += 1
        line = Table.grid(padding=(0, 1))
        line.add_row(f"[bold cyan]{self._scene:>2}.[/]", sentence)
        self.console.print()
        self.console.print(line)

    def add(self, sentence: str) -> None:
        """Add a sentence to the scene."""
        self.console.print(f"    {sentence}")

    def show(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print a table; columns that end in "#" hold numbers."""
        table = Table(title=title, title_justify="left", title_style="italic", box=box.ROUNDED, padding=(0, 1))
        for column in columns:
            table.add_column(
                column.removesuffix("#"), justify="right" if column.endswith("#") else "left", overflow="fold"
            )
        for row in rows:
            table.add_row(*(escape(str(cell)) for cell in row))
        self.console.print(table)

    def start_server(self) -> ServerProcess:
        """Start the server as a user would, on a free port."""
        # Without the user's settings, which would change the demo.
        environment = {name: text for name, text in os.environ.items() if not name.startswith("DSPEX_PERSIST_")}
        arguments = ["serve", "--db", str(self.database), "--listen", "127.0.0.1:0", "--tools", _TOOLS]
        return ServerProcess.start([*PROGRAM, *arguments], env=environment, cwd=self.database.parent)


def fresh_database(folder: Path) -> Path:
    folder = folder.absolute()
    database = folder / "sessions.db"
    if database.exists():
        raise DemoFailedError(f"{database} exists already, and the demo needs a new file; choose another --keep")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoFailedError(f"cannot create the directory {folder}: {error.strerror}") from error
    return database
