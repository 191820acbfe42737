"""Runs one audit query: opens the file or server, selects the output format, reports errors."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeVar

import typer

from dspex_persist.cli.hints import text_of
from dspex_persist.cli.output import complain, say_json
from dspex_persist.cli.places import database_of, url_of

if TYPE_CHECKING:
    from dspex_persist.audit import AuditSource
    from dspex_persist.cli.audit.forms import Printer
    from dspex_persist.cli.audit.rendering import Column, Renderer
    from dspex_persist.wiring.places import Address

T = TypeVar("T")

EXIT_USAGE: Final = 2


class Form(StrEnum):
    """How answers are printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """The options that all audit commands share."""

    db: str | None = None
    target: str | None = None
    as_json: bool = False
    as_csv: bool = False
    is_utc: bool = False
    reveal: bool = False

    @property
    def form(self) -> Form:
        """The output format."""
        return Form.JSON if self.as_json else Form.CSV if self.as_csv else Form.TABLE

    def check(self) -> None:
        """Raise `InvalidArgumentError` for options that exclude each other."""
        from dspex_persist.state.errors import InvalidArgumentError

        if self.as_json and self.as_csv:
            raise InvalidArgumentError("csv", "--json and --csv are two formats: choose one")
        if self.db is not None and self.target is not None:
            raise InvalidArgumentError("target", "--db and --target are two places: choose one")

    def look(self) -> "Renderer":
        """Return a renderer for the terminal."""
        from dspex_persist.cli.audit.rendering import Renderer

        return Renderer(self.is_utc)

    def printer(self, kind: type[T], columns: "Callable[[Renderer], Sequence[Column[T]]]") -> "Printer[T]":
        """Return a printer for answers of this kind, in the requested format."""
        from dspex_persist.cli.audit.forms import Csv, JsonLines
        from dspex_persist.cli.audit.rendering import Table

        match self.form:
            case Form.JSON:
                return JsonLines()
            case Form.CSV:
                return Csv(kind)
        look = self.look()
        return Table(look, columns(look))


@contextmanager
def answering(request: AuditOptions) -> Iterator[None]:
    """End the command with 2 at an invalid argument, of which all are options here. `main` reports other errors."""
    from dspex_persist.state.errors import InvalidArgumentError

    try:
        request.check()
        yield
        # A closed pipe has to fail here, where the error is handled, not at the exit of the process.
        sys.stdout.flush()
    except InvalidArgumentError as error:
        if request.as_json:
            say_json({"ok": False, "error": text_of(error)})
        complain(error)
        raise typer.Exit(EXIT_USAGE) from error


@contextmanager
def asking(request: AuditOptions) -> "Iterator[AuditSource]":
    """Open the requested history."""
    from dspex_persist.wiring.connecting import open_audit

    with answering(request):
        place: Address = database_of(request.db) if request.target is None else url_of(request.target)
        with open_audit(place, reveal=request.reveal) as source:
            yield source
