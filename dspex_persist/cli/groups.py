"""What groups of commands have in common: how they behave, and how a command works and tells."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, TypeVar, cast

import typer

from dspex_persist.cli.hints import text_of
from dspex_persist.cli.output import Progress, progress_bar, say_json
from dspex_persist.errors import DspexError

R = TypeVar("R")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


def new_group(help_text: str, epilog: str | None = None) -> typer.Typer:
    """A group without commands."""
    return typer.Typer(
        help=help_text,
        epilog=epilog,
        no_args_is_help=True,
        rich_markup_mode="rich",
        # Theirs would show the values of local variables, and those are users' values.
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def carry_out(
    as_json: bool,
    work: Callable[[Progress], R],
    show: Callable[[R], None],
    is_fine: Callable[[R], bool] = lambda _report: True,
) -> R:
    """Do the work, a dataclass or a mapping comes of it, and print that. Errors go on to `main`, which says them."""
    try:
        with progress_bar() as progress:
            report = work(progress)
    except (DspexError, ValueError) as error:
        if as_json:
            say_json({"ok": False, "error": text_of(error)})
        raise
    if as_json:
        facts = report if isinstance(report, dict) else asdict(cast(Any, report))
        say_json({"ok": is_fine(report), **facts})
    else:
        show(report)
    return report
