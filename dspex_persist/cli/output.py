"""The output of commands: lines and tables for people, JSON for programs."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from dspex_persist.cli.hints import text_of
from dspex_persist.infra import streams
from dspex_persist.spelling import printable

Progress: TypeAlias = Callable[[str, int, int], None]
"""Is called with what is being done, how much of it is done, and the total (0: unknown)."""


def new_console(*, soft_wrap: bool) -> Any:
    """Return a console that prints text as it is: values that clients wrote are not markup."""
    from rich.console import Console

    return Console(markup=False, highlight=False, soft_wrap=soft_wrap)


def plain(text: str) -> str:
    """Return a client's text on one line, without escapes that a terminal would obey."""
    return printable(text)


def plain_lines(text: str) -> str:
    """Return a client's text without escapes that a terminal would obey, on its several lines."""
    return "\n".join(map(plain, text.split("\n")))


def say(*parts: Any) -> None:
    """Print for people. Strings may contain text of clients."""
    # Wrapped only on a terminal.
    console = new_console(soft_wrap=not sys.stdout.isatty())
    for part in parts:
        console.print(plain_lines(part) if isinstance(part, str) else part)


def complain(error: BaseException | str) -> None:
    """Print an error on stderr."""
    streams.print_error(f"error: {plain_lines(text_of(error))}")


def say_json(document: Any) -> None:
    """Print one JSON object on one line, for programs."""
    print(json.dumps(document, default=str))


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show a progress bar on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _step, _done, _in_all: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.SpinnerColumn(),
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("opening", total=None)
        yield lambda step, done, in_all: bar.update(task, description=step, completed=done, total=in_all or None)


def new_table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Any:
    """Return a table without rows; `right` names the columns that are aligned to the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=any(columns))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    return table


def one_line(name: str) -> Any:
    """Return a client's name as one line of plain text."""
    from rich.text import Text

    return Text(name if name.isprintable() else repr(name))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 3 tools, 1 tool."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
