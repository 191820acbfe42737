"""What commands print: lines and tables for people, JSON for programs."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from dspex_persist.cli.hints import text_of
from dspex_persist.infra import streams
from dspex_persist.spelling import printable

Progress: TypeAlias = Callable[[str, int, int], None]
"""Told what is being done, how much of it is, and how much there is (0: not known)."""


def new_console(*, soft_wrap: bool) -> Any:
    """What prints for people. Values of others are printed: none of them is markup."""
    from rich.console import Console

    return Console(markup=False, highlight=False, soft_wrap=soft_wrap)


def plain(text: str) -> str:
    """A text of somebody else's on one line, without escapes that a terminal would obey."""
    return printable(text)


def plain_lines(text: str) -> str:
    """The same of a text that may have several lines."""
    return "\n".join(map(plain, text.split("\n")))


def say(*parts: Any) -> None:
    """Print what a person reads. A sentence may name what somebody else has named."""
    # Cut off only where a terminal is as narrow as that.
    console = new_console(soft_wrap=not sys.stdout.isatty())
    for part in parts:
        console.print(plain_lines(part) if isinstance(part, str) else part)


def complain(error: BaseException | str) -> None:
    """Print what is wrong."""
    streams.print_error(f"error: {plain_lines(text_of(error))}")


def say_json(document: Any) -> None:
    """Print what a program reads: one object, on a line of its own."""
    print(json.dumps(document, default=str))


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr, on a terminal only."""
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
    """A table without rows; `right`: the columns that are aligned to the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=any(columns))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    return table


def one_line(name: str) -> Any:
    """A name of somebody else's as one line of plain text."""
    from rich.text import Text

    return Text(name if name.isprintable() else repr(name))


def counted(number: int, noun: str) -> str:
    """3 tools, 1 tool."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
