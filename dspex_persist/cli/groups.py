"""Shared by groups of commands: their settings, and how a command works and reports."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, Final, TypeVar, cast

import typer

from dspex_persist.cli.output import Progress, progress_bar, say_json

R = TypeVar("R")

HELP_OPTIONS: Final = ["-h", "--help"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]

Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        metavar="N",
        min=1,
        max=64,
        show_default=False,
        help="Use up to N processes. [dim](default: one for each core, at most 4; one for little work)[/dim]",
    ),
]


def new_group(help_text: str, epilog: str | None = None) -> typer.Typer:
    """Return a group without commands."""
    return typer.Typer(
        help=help_text,
        epilog=epilog,
        no_args_is_help=True,
        rich_markup_mode="rich",
        # Typer's tracebacks would show local variables, which contain users' values.
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": HELP_OPTIONS},
    )


def carry_out(
    as_json: bool,
    work: Callable[[Progress], R],
    show: Callable[[R], None],
    is_fine: Callable[[R], bool] = lambda _report: True,
) -> R:
    """Do the work and print its report. Errors propagate to `main`, which prints them, also as JSON.

    Args:
        as_json: Print one JSON object.
        work: Returns the report: a dataclass or a dict.
        show: Prints the report for people.
        is_fine: Whether the report counts as a success: `ok` in the JSON object.
    """
    with progress_bar() as progress:
        report = work(progress)
    if as_json:
        facts = report if isinstance(report, dict) else asdict(cast(Any, report))
        say_json({"ok": is_fine(report), **facts})
    else:
        show(report)
    return report
