"""What commands print: lines and tables for people, JSON for programs."""

import json
import sys
from typing import Any


def say(*parts: Any) -> None:
    """Print what a person reads."""
    from rich.console import Console

    # Values of others are printed: none of them is markup. Cut off only where a terminal is as narrow as that.
    console = Console(markup=False, highlight=False, soft_wrap=not sys.stdout.isatty())
    for part in parts:
        console.print(part)


def say_json(document: dict[str, Any]) -> None:
    """Print what a program reads: one object."""
    print(json.dumps(document, default=str))


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
