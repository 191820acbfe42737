"""dspex-persist get: the values of a session's variables."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from dspex_persist.cli import completing
from dspex_persist.cli.groups import Json, carry_out
from dspex_persist.cli.live.opening import Place, state_of
from dspex_persist.cli.live.options import Reveal, Session, Target
from dspex_persist.cli.output import say
from dspex_persist.cli.places import Db

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dspex_persist.cli.audit.rendering import Column, Renderer
    from dspex_persist.state.audit import VariableState
    from dspex_persist.state.model import Value, Variable

T = TypeVar("T")

HELP: Final = (
    "Print the values of a session's variables.\n\n"
    "One NAME prints its value alone, for scripts: a string without quotes, anything else as JSON. Several names, a "
    "glob with * and ?, or no name print a table. Reads a database, even while a server has it open, or asks a "
    "running server (--target). Sensitive variables are masked unless you add --reveal.\n\n"
)
EPILOG: Final = (
    "[bold]Examples[/bold]\n\n"
    "dspex-persist get checkout-42\n\n"
    "dspex-persist get checkout-42 temperature --target 127.0.0.1:50051\n\n"
    "dspex-persist get checkout-42 'prompt*' --json\n\n"
    "[bold]Exit codes[/bold]\n\n"
    "0  success\n\n"
    "1  no such session or variable, or the server cannot be reached\n\n"
    "2  wrong usage, or an invalid setting\n\n"
    "5  no such file, not a dspex-persist database, or another schema\n\n"
    "With --json, stdout has exactly one JSON object, also after an error; the exit codes are the same.\n\n"
)

Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME",
        help="Names, or globs with * and ?.",
        show_default=False,
        autocompletion=completing.variables,
    ),
]


@dataclass(frozen=True, slots=True)
class Row:
    """A variable as both places know it."""

    name: str
    type: str
    value: "Value | None"
    version: int
    updated_at: datetime
    constraints: str
    metadata: "Mapping[str, str]"
    masked: bool


def get(
    session: Session,
    names: Names = None,
    reveal: Reveal = False,
    db: Db = None,
    target: Target = None,
    as_json: Json = False,
) -> None:
    """Print values."""
    from dspex_persist.state.audit import is_glob

    place, asked = Place.of(target, db), names or []
    is_single = len(asked) == 1 and not is_glob(asked[0])

    def work(_: object) -> dict[str, Any]:
        rows = _rows_of(place, session, asked, reveal)
        if is_single and not as_json and rows[0].masked:
            from dspex_persist.state.errors import InvalidArgumentError

            raise InvalidArgumentError("reveal", f"{asked[0]} is sensitive: add --reveal to print its value")
        return {"session_id": session, "variables": rows}

    def show(report: dict[str, Any]) -> None:
        (_show_value if is_single else _show_table)(report["variables"])

    carry_out(as_json, lambda progress: _documents(work(progress)) if as_json else work(progress), show)


def _rows_of(place: Place, session: str, names: Sequence[str], reveal: bool) -> list[Row]:
    """Return the variables with these names or globs: in their order, or else oldest first."""
    if place.has_history:
        with place.explaining(session), place.history(reveal=reveal) as source:
            return select(session, {each.name: _row_of_state(each) for each in state_of(source, session)}, names)
    from dspex_persist.state.audit import is_glob
    from dspex_persist.state.commands import GetVariables, ListVariables

    with place.read() as state, place.explaining(session):
        if names and not any(map(is_glob, names)):
            batch = state.run(GetVariables(session, names))
            if not batch.missing:
                return [_row_of(batch.variables[name], reveal) for name in dict.fromkeys(names)]
        variables = state.run(ListVariables(session, ""))
        return select(session, {each.name: _row_of(each, reveal) for each in variables}, names)


def _row_of(variable: "Variable", reveal: bool) -> Row:
    is_masked = is_sensitive(variable.metadata) and not reveal
    return Row(
        variable.name,
        variable.type,
        None if is_masked else variable.value,
        variable.version,
        variable.updated_at,
        variable.constraints,
        variable.metadata,
        is_masked,
    )


def is_sensitive(metadata: "Mapping[str, str]") -> bool:
    """Return whether a variable's metadata says that its values are to be masked."""
    from dspex_persist.state.audit import SENSITIVE

    return metadata.get(SENSITIVE) == "true"


def _row_of_state(state: "VariableState") -> Row:
    return Row(
        state.name,
        state.type,
        state.value,
        state.version,
        state.updated_at,
        state.constraints,
        state.metadata,
        state.masked,
    )


def select(session: str, known: "Mapping[str, T]", asked: Sequence[str]) -> list[T]:
    """Return the variables with these names or globs, in their order, or all; an unknown name is an error."""
    from dspex_persist.state.audit import is_glob, suggestion
    from dspex_persist.state.errors import VariableNotFoundError
    from dspex_persist.state.globs import compile_glob

    selected: dict[str, T] = {}
    for name in asked or ["*"]:
        if name in known:
            selected[name] = known[name]
        elif is_glob(name):
            matches = compile_glob(name)
            selected |= {each: row for each, row in known.items() if matches(each)}
        else:
            raise VariableNotFoundError(session, name, suggestion(name, list(known)))
    return list(selected.values())


def _documents(report: dict[str, Any]) -> dict[str, Any]:
    import json

    from dspex_persist.cli.live.texts import document_of_value

    variables = [
        {
            "name": row.name,
            "type": row.type,
            "value": document_of_value(row.value),
            "version": row.version,
            "updated_at": row.updated_at.isoformat(),
            "constraints": json.loads(row.constraints or "{}"),
            "metadata": dict(row.metadata),
            "masked": row.masked,
        }
        for row in report["variables"]
    ]
    return {**report, "variables": variables}


def _show_value(rows: Sequence[Row]) -> None:
    from dspex_persist.cli.live.texts import text_of_value

    text = text_of_value(rows[0].value)
    if sys.stdout.isatty():
        say(text)
    else:
        # A program gets the value as it is.
        sys.stdout.write(f"{text}\n")


def _show_table(rows: Sequence[Row]) -> None:
    from dspex_persist.cli.audit.rendering import Renderer, Table

    if not rows:
        say("no variables")
        return
    look = Renderer(is_utc=False)
    Table(look, _columns(look)).print(rows)


def _columns(look: "Renderer") -> "list[Column[Row]]":
    from dspex_persist.cli.audit.rendering import Column, value_text
    from dspex_persist.cli.output import plain

    return [
        Column("variable", lambda row: plain(row.name), least=10),
        Column("value", lambda row: value_text(row.value, row.masked), least=12, most=200),
        Column("type", lambda row: row.type, least=5),
        Column("v", lambda row: str(row.version), least=24, right=True),
        Column("changed", lambda row: look.time(row.updated_at), least=look.time_width),
    ]
