"""dspex-persist set: writes one variable."""

import re
import shlex
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperCommand

from dspex_persist.cli import completing
from dspex_persist.cli.groups import Json, carry_out
from dspex_persist.cli.hints import ExplainedError
from dspex_persist.cli.live.opening import Place
from dspex_persist.cli.live.options import Actor, Session, Target, Why
from dspex_persist.cli.output import plain, say
from dspex_persist.cli.places import Db
from dspex_persist.spelling import quote

if TYPE_CHECKING:
    from dspex_persist.state.model import Value, Variable
    from dspex_persist.state.provider import StateProvider, Who

_NEGATIVE: Final = re.compile(r"-(\d.*|\.\d.*|Infinity)")
_WRONG_USAGE: Final[type[Exception]] = typer.BadParameter.__mro__[1]
"""What is raised for too few words and too many; typer does not export it."""
_PAIR: Final = re.compile(r"([^=-][^=]*)=(.*)", re.DOTALL)

HELP: Final = (
    "Write a variable, as a new version.\n\n"
    "The variable's type says how VALUE is read: as it is for a string, a choice or a module, as JSON for the other "
    "types. - reads it from standard input. A value that breaks the type or a constraint is refused, and changes "
    "nothing.\n\n"
    "One command writes one variable; NAME and VALUE are two words.\n\n"
    "--create creates what is missing: the variable, the session and the database. The type of a new variable is "
    "--type, or that of the JSON in VALUE (3, 0.7, true, \\[1, 2], {...}), or else a string.\n\n"
    "A running server owns its file: reach it with --target.\n\n"
)
EPILOG: Final = (
    "[bold]Examples[/bold]\n\n"
    "dspex-persist set checkout-42 temperature 0.3 --why 'too creative' --target 127.0.0.1:50051\n\n"
    "dspex-persist set checkout-42 prompt - < prompt.txt\n\n"
    "dspex-persist set checkout-42 weights '\\[0.2, 0.8]' --create --actor ann\n\n"
    "dspex-persist set checkout-42 stock 4 --expected-version 7    only if nobody changed it since\n\n"
    "dspex-persist set checkout-42 signature -- '-- Ann'    -- before a text that begins with a dash\n\n"
    "[bold]Exit codes[/bold]\n\n"
    "0  written\n\n"
    "1  refused: no such session or variable, an invalid value, another version; or the server cannot be reached\n\n"
    "2  wrong usage, or an invalid setting\n\n"
    "4  another process, such as a server, has the file open\n\n"
    "5  no such file, not a dspex-persist database, a newer schema, or acknowledged commits are missing\n\n"
    "With --json, stdout has exactly one JSON object, also after an error; the exit codes are the same.\n\n"
)


def set_(
    session: Session,
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="The variable.", show_default=False, autocompletion=completing.variables),
    ],
    value: Annotated[
        str, typer.Argument(metavar="VALUE", help="Text or JSON, by the type; - is stdin.", show_default=False)
    ],
    type: Annotated[
        str | None,
        typer.Option("--type", metavar="TYPE", show_default=False, help="With --create: the type of a new variable."),
    ] = None,
    create: Annotated[bool, typer.Option("--create", help="Create what is missing: variable, session, file.")] = False,
    expected_version: Annotated[
        int | None,
        typer.Option(
            "--expected-version",
            metavar="N",
            min=0,
            show_default=False,
            help="Write only if this is the current version.",
        ),
    ] = None,
    why: Why = None,
    actor: Actor = None,
    db: Db = None,
    target: Target = None,
    as_json: Json = False,
) -> None:
    """Write a variable."""
    from dspex_persist.cli.live.texts import given_text, guessed_value
    from dspex_persist.state.provider import Who

    place = Place.of(target, db)
    who: Who = {"actor": actor, "reason": why}

    def work(_: object) -> dict[str, Any]:
        if create and place.is_missing():
            _refuse_pair(session, name)
        text = given_text(value)
        with place.opened(create=create) as state, place.explaining(session, "begin it with --create"):
            before = _find(state, session, name)
            if create and before is None:
                _refuse_pair(session, name)
            if before is None and create:
                _create(state, session, name, guessed_value(text, type, name), who)
            else:
                _write(state, session, name, text, before, type, expected_version, who)
            return _report(session, _current(state, session, name), before)

    carry_out(as_json, work, _show)


def _find(state: "StateProvider", session: str, name: str) -> "Variable | None":
    """Return the variable, or None without one; also without a session, which `_create` begins."""
    from dspex_persist.state.errors import SessionNotFoundError, VariableNotFoundError

    try:
        return _current(state, session, name)
    except (SessionNotFoundError, VariableNotFoundError):
        return None


def _current(state: "StateProvider", session: str, name: str) -> "Variable":
    from dspex_persist.state.commands import GetVariable

    return state.run(GetVariable(session, name))


def _create(state: "StateProvider", session: str, name: str, typed: "tuple[str, Value]", who: "Who") -> None:
    from dspex_persist.state.commands import InitializeSession, RegisterVariable

    state.run(InitializeSession(session), **who)
    state.run(RegisterVariable(session, name, *typed), **who)


def _write(
    state: "StateProvider",
    session: str,
    name: str,
    text: str,
    before: "Variable | None",
    type_name: str | None,
    expected_version: int | None,
    who: "Who",
) -> None:
    from dspex_persist.cli.live.texts import value_for
    from dspex_persist.state.commands import SetVariable
    from dspex_persist.state.errors import InvalidArgumentError, VariableNotFoundError

    if before is not None and type_name not in (None, before.type):
        raise InvalidArgumentError("type", f"{name} is a variable of the type {before.type}, which never changes")
    value = value_for(text, "" if before is None else before.type, name)
    try:
        state.run(SetVariable(session, name, value, expected_version=expected_version), **who)
    except VariableNotFoundError as error:
        _refuse_pair(session, name)
        if error.hint:
            raise
        raise ExplainedError(error.sentence, "--create creates it") from error


def _refuse_pair(session: str, name: str) -> None:
    """Say how to write what was written as NAME=VALUE, and is no variable."""
    pair = _PAIR.fullmatch(name)
    if pair is not None:
        advice = f"write NAME and VALUE as two words: {_command(session, *pair.groups())}"
        raise ExplainedError(f"there is no variable {quote(name)}", advice)


def _command(session: str, name: str, value: str) -> str:
    dashes = ("--",) if value.startswith("-") else ()
    return shlex.join(("dspex-persist", "set", session, name, *dashes, value))


def _report(session: str, now: "Variable", before: "Variable | None") -> dict[str, Any]:
    from dspex_persist.cli.live.get import is_sensitive
    from dspex_persist.cli.live.texts import document_of_value

    is_masked = is_sensitive(now.metadata)
    report = {
        "session_id": session,
        "name": now.name,
        "type": now.type,
        "value": None if is_masked else document_of_value(now.value),
        "version": now.version,
        "created": before is None,
        "masked": is_masked,
    }
    if before is not None:
        report["before"] = None if is_masked else document_of_value(before.value)
    return report


def _show(report: dict[str, Any]) -> None:
    from dspex_persist.cli.audit.rendering import MASK, json_text

    def shown(value: Any) -> str:
        return MASK if report["masked"] else json_text(value)

    past = f"was {shown(report['before'])}" if "before" in report else f"new, {report['type']}"
    say(f"{plain(report['name'])} = {shown(report['value'])}  (v{report['version']}, {past})")


class SetCommand(TyperCommand):
    """A command whose last argument may be a negative number, which looks like an option, and that takes no pairs."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Move a negative number behind `--`, unless it belongs to an option."""
        if "--" not in args:
            flags = {name for each in self.params if getattr(each, "is_flag", False) for name in each.opts}
            for index, (before, word) in enumerate(pairwise(args), 1):
                if _NEGATIVE.fullmatch(word) and (not before.startswith("--") or before in flags or "=" in before):
                    args = [*args[:index], *args[index + 1 :], "--", word]
                    break
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except _WRONG_USAGE as error:
            pair = next(filter(None, map(_PAIR.fullmatch, words[1:])), None)
            if pair is None:
                raise
            command = _command("SESSION" if words[0].startswith("-") else words[0], *pair.groups())
            raise typer.BadParameter(f"write NAME and VALUE as two words, one variable a command: {command}") from error
