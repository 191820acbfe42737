"""How each question is put: to which file or server, in which form the answer is wanted, what an error becomes."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import typer

from dspex_persist.cli.hints import text_of
from dspex_persist.cli.output import complain, say_json
from dspex_persist.cli.places import database_of, url_of
from dspex_persist.errors import DspexError

if TYPE_CHECKING:
    from dspex_persist.audit import AuditSource
    from dspex_persist.cli.audit.forms import Printer
    from dspex_persist.cli.audit.rendering import Column, Renderer

T = TypeVar("T")

EXIT_USAGE: Final = 2


class Form(StrEnum):
    """How answers are printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """What all questions are asked with."""

    db: Path | None = None
    target: str | None = None
    as_json: bool = False
    as_csv: bool = False
    is_utc: bool = False
    reveal: bool = False

    @property
    def form(self) -> Form:
        """How the answer is printed."""
        return Form.JSON if self.as_json else Form.CSV if self.as_csv else Form.TABLE

    def check(self) -> None:
        """Refuse what cannot be meant."""
        from dspex_persist.state.errors import InvalidArgumentError

        if self.as_json and self.as_csv:
            raise InvalidArgumentError("csv", "--json and --csv are two forms: choose one")
        if self.db is not None and self.target is not None:
            raise InvalidArgumentError("target", "--db and --target are two places: choose one")

    def look(self) -> "Renderer":
        """The terminal."""
        from dspex_persist.cli.audit.rendering import Renderer

        return Renderer(self.is_utc)

    def printer(self, kind: type[T], columns: "Callable[[Renderer], Sequence[Column[T]]]") -> "Printer[T]":
        """What prints answers of this kind."""
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
def answering(asked: AuditOptions) -> Iterator[None]:
    """What is wrong is a sentence on stderr, with --json an object too; what was asked wrongly ends with 2."""
    from dspex_persist.state.errors import InvalidArgumentError

    try:
        asked.check()
        yield
        # Here, and not at the end of the process, it is still caught that nobody reads any more.
        sys.stdout.flush()
    except (DspexError, ValueError) as error:
        if asked.as_json:
            say_json({"ok": False, "error": text_of(error)})
        if not isinstance(error, InvalidArgumentError):
            raise
        complain(error)
        raise typer.Exit(EXIT_USAGE) from error


@contextmanager
def asking(asked: AuditOptions) -> "Iterator[AuditSource]":
    """The history that is asked."""
    from dspex_persist.wiring import open_audit

    with answering(asked):
        place: Path | str = database_of(asked.db) if asked.target is None else url_of(asked.target)
        with open_audit(place, reveal=asked.reveal) as source:
            yield source
