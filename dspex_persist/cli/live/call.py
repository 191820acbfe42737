"""dspex-persist call: executes a tool."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Final, TextIO

import typer

from dspex_persist.cli import completing
from dspex_persist.cli.groups import Json
from dspex_persist.cli.hints import ToldError, text_of
from dspex_persist.cli.live.opening import Place
from dspex_persist.cli.live.options import Actor, Session, Target, Why
from dspex_persist.cli.output import plain_lines, say_json
from dspex_persist.cli.places import Db

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dspex_persist.state.abilities import StreamsTools
    from dspex_persist.state.model import ToolOutcome, ToolSpec, Value
    from dspex_persist.state.provider import Who

HELP: Final = (
    "Execute a tool on a session, as one transaction.\n\n"
    "Arguments are written KEY=VALUE. The type of the parameter says how VALUE is read: as it is for a string, as JSON "
    "for the other types, and for a parameter of any type as JSON if it can be. A tool that streams has its values "
    "printed as they come.\n\n"
    "A running server (--target) has tools of its own; dspex-persist tools list --target shows them. For a database, "
    "--tools names the module that has them, which is imported and runs here.\n\n"
)
EPILOG: Final = (
    "[bold]Examples[/bold]\n\n"
    "dspex-persist call shop sell amount=2 --target 127.0.0.1:50051\n\n"
    "dspex-persist call shop sell amount=2 --tools shop.tools --db shop.db\n\n"
    'dspex-persist call shop order items=\'\\["apples", "milk"]\' --key order-7 --json\n\n'
    "[bold]Exit codes[/bold]\n\n"
    "0  the tool succeeded, and its writes are committed\n\n"
    "1  the tool failed, and wrote nothing; or there is no such tool or session, or no server\n\n"
    "2  wrong usage, arguments that the tool does not take, or tools that cannot be loaded\n\n"
    "4  another process, such as a server, has the file open\n\n"
    "5  no such file, not a dspex-persist database, a newer schema, or acknowledged commits are missing\n\n"
    "7  a conflict: others changed what the tool had read or written; it wrote nothing, repeat the command\n\n"
    "8  the tool ran out of time, or was cancelled or interrupted, and wrote nothing\n\n"
    "With --json, stdout has exactly one JSON object, also after an error; the exit codes are the same.\n\n"
)


def call(
    session: Session,
    tool: Annotated[
        str,
        typer.Argument(metavar="TOOL", help="The tool's name.", show_default=False, autocompletion=completing.tools),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="The tool's arguments.", show_default=False),
    ] = None,
    tools: Annotated[
        list[str] | None,
        typer.Option(
            "--tools",
            metavar="MODULE[:NAME]",
            show_default=False,
            help="With a database: the tools, as for serve; may be repeated. [dim](DSPEX_PERSIST_TOOLS)[/dim]",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            metavar="KEY",
            show_default=False,
            help="An idempotency key: with the same one, the tool runs only once.",
        ),
    ] = None,
    timeout_s: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            min=0.001,
            show_default=False,
            help="How long the tool may take. [dim](300)[/dim]",
        ),
    ] = None,
    why: Why = None,
    actor: Actor = None,
    db: Db = None,
    target: Target = None,
    as_json: Json = False,
) -> None:
    """Execute a tool."""
    from dspex_persist.state.commands import ExecuteTool
    from dspex_persist.state.provider import TOOL_TIMEOUT_S, Who

    place, pairs = Place.of(target, db), _pairs(arguments or [])
    if place.url is not None and tools:
        raise typer.BadParameter("a server runs its own tools: leave out --tools, or --target")
    # While a tool runs here, `sys.stdout` is stderr: what it prints must not mix with its result.
    out, who = sys.stdout, Who(actor=actor, reason=why)
    with _opened(place, tools or []) as state, place.explaining(session):
        spec = next((each for each in state.list_tools(session) if each.name == tool), None)
        values = _values(pairs, spec)
        # A stream has no outcome, and takes neither a key nor a timeout.
        if spec is not None and spec.streaming and not (as_json or key or timeout_s):
            _stream(state, session, tool, values, who, out)
            return
        command = ExecuteTool(session, tool, values, timeout_s=timeout_s or TOOL_TIMEOUT_S)
        outcome = state.run(command, key, **who)
    _show(session, tool, outcome, as_json)


@contextmanager
def _opened(place: Place, modules: Sequence[str]) -> "Iterator[StreamsTools]":
    if place.url is not None:
        with place.opened() as state:
            yield state
        return
    from dspex_persist.settings import load_settings

    modules = modules or load_settings(runs_tools=True).tools
    with redirect_stdout(sys.stderr), place.opened(tools=modules) as state:
        if not modules:
            raise typer.BadParameter(
                "a database has no tools: name their module with --tools, or a server with --target"
            )
        yield state


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    """Return the texts of the arguments by name."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text} is no argument: write KEY=VALUE, such as amount=2")
        if name in pairs:
            raise typer.BadParameter(f"there are two arguments {name}; write a list as one: {name}='[1, 2]'")
        pairs[name] = value
    return pairs


def _values(pairs: "Mapping[str, str]", spec: "ToolSpec | None") -> "dict[str, Value]":
    from dspex_persist.cli.live.texts import value_for

    types = {each.name: each.type for each in spec.parameters} if spec is not None else {}
    return {name: value_for(text, types.get(name, ""), name) for name, text in pairs.items()}


def _stream(
    state: "StreamsTools", session: str, tool: str, values: "Mapping[str, Value]", who: "Who", out: TextIO
) -> None:
    """Print what the tool yields as it comes; `main` prints the error that ends it."""
    from dspex_persist.state.values import decode_loosely

    parameters = {name: decode_loosely(value) for name, value in values.items()}
    for item in state.stream_tool(session, tool, parameters, **who):
        _print(item if isinstance(item, str) else json.dumps(item, ensure_ascii=False, default=str), out)


def _show(session: str, tool: str, outcome: "ToolOutcome", as_json: bool) -> None:
    from dspex_persist.cli.live.texts import document_of_value, text_of_value

    error = outcome.error
    if as_json:
        status = None if outcome.status is None else outcome.status.value
        document = {
            "ok": outcome.success,
            "session_id": session,
            "tool": tool,
            "status": status,
            "result": document_of_value(outcome.result),
            "execution_id": outcome.execution_id,
            "commit_sequence": outcome.commit_sequence,
            "attempts": outcome.attempts,
            "repeated": outcome.repeated,
        }
        if error is not None:
            document |= {"error": text_of(error), "error_code": outcome.error_code}
        say_json(document)
    if error is not None:
        if as_json:
            raise ToldError(text_of(error)) from error
        raise error
    if not as_json and outcome.result is not None and outcome.result.json != "null":
        _print(text_of_value(outcome.result), sys.stdout)


def _print(text: str, out: TextIO) -> None:
    # A program gets the text as it is.
    print(plain_lines(text) if out.isatty() else text, file=out, flush=True)
