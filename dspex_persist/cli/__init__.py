"""The command line: arguments in, exit codes out. Commands import heavy modules themselves, so that help is fast."""

import gc
import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Final

import typer

from dspex_persist import __version__
from dspex_persist.cli import (
    audit,
    demo,
    health,
    maintenance,
    protocol,
    replay,
    serve,
    session,
    shells,
    token,
    tools,
    worker,
    workers,
)
from dspex_persist.cli.groups import HELP_OPTIONS
from dspex_persist.cli.hints import ExplainedError, ToldError, text_of, use_options_of
from dspex_persist.cli.live import call as call_command
from dspex_persist.cli.live import get as get_command
from dspex_persist.cli.live import programs, sessions
from dspex_persist.cli.live import set as set_command
from dspex_persist.cli.live import watch as watch_command
from dspex_persist.cli.output import complain
from dspex_persist.errors import DspexError
from dspex_persist.infra import streams
from dspex_persist.infra.exits import end_in_time

_LIVE: Final = "Live sessions"
_COLLECT_AFTER: Final = 20_000
"""After how many new objects the garbage collector looks for cycles while a command runs."""
_OF_ADDRESSES: Final = frozenset({"prefix", "url"})
"""Arguments that are the setting `db`, or a part of it."""
_OF_POINTS: Final = frozenset({"after_sequence", "at", "from", "since", "started", "to", "until"})
"""Arguments that are a point in the history."""

app = typer.Typer(
    no_args_is_help=True,
    # Typer's scripts split and evaluate what is typed; see `shells`.
    add_completion=False,
    # Typer's tracebacks would show local variables, which contain users' values.
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": HELP_OPTIONS},
    epilog=(
        "[bold]To begin[/bold]\n\n"
        "dspex-persist demo    see it work in half a minute\n\n"
        "dspex-persist set s1 temperature 0.7 --create    keep a value, in sessions.db\n\n"
        "dspex-persist serve --db sessions.db    serve a database\n\n"
        "dspex-persist watch s1 --target 127.0.0.1:50051    see changes as they come\n\n"
        "dspex-persist db check --db sessions.db    check it\n\n"
        "dspex-persist audit history SESSION    see who changed what and when\n\n"
        "dspex-persist tools list --tools shop.tools    list the tools of a module\n\n"
    ),
)
app.command("serve", help=serve.HELP, epilog=serve.EPILOG)(serve.serve)
app.command("health", help=health.HELP, epilog=health.EPILOG)(health.health)
app.command("worker", help=worker.HELP, epilog=worker.EPILOG)(worker.worker)
app.command("workers", help=workers.HELP, epilog=workers.EPILOG)(workers.workers)
app.command("protocol", help=protocol.HELP, epilog=protocol.EPILOG)(protocol.protocol)
app.command("demo", help=demo.HELP, epilog=demo.EPILOG)(demo.demo)
app.command("replay", help=replay.HELP, epilog=replay.EPILOG)(replay.replay)
app.command("get", help=get_command.HELP, epilog=get_command.EPILOG, rich_help_panel=_LIVE)(get_command.get)
app.command("set", cls=set_command.SetCommand, help=set_command.HELP, epilog=set_command.EPILOG, rich_help_panel=_LIVE)(
    set_command.set_
)
app.command("watch", help=watch_command.HELP, epilog=watch_command.EPILOG, rich_help_panel=_LIVE)(watch_command.watch)
app.command("call", help=call_command.HELP, epilog=call_command.EPILOG, rich_help_panel=_LIVE)(call_command.call)
app.add_typer(sessions.app, name="sessions", rich_help_panel=_LIVE)
app.add_typer(programs.app, name="program", rich_help_panel=_LIVE)
app.add_typer(maintenance.app, name="db")
app.add_typer(session.app, name="session")
app.add_typer(tools.app, name="tools")
app.add_typer(token.app, name="token")
app.add_typer(audit.app, name="audit")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dspex-persist {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    install_completion: Annotated[
        bool,
        shells.option("--install-completion", shells.install_here, "Set up completion for the shell that runs this."),
    ] = False,
    show_completion: Annotated[
        bool,
        shells.option("--show-completion", shells.show, "Print the completion script for the shell that runs this."),
    ] = False,
) -> None:
    """Durable, versioned session state for AI tools in one SQLite file."""


def main() -> None:
    """Run the command line. A known error becomes one sentence on stderr and an exit code, never a traceback."""
    streams.prepare()
    instruction = os.environ.get(shells.VARIABLE)
    if instruction:
        sys.exit(streams.finish(shells.answer(typer.main.get_command(app), instruction)))
    code = streams.finish(_run(sys.argv[1:]))
    end_in_time(code)
    sys.exit(code)


def _run(words: list[str]) -> int:
    threshold = gc.get_threshold()
    command, subcommand = _command(words)
    asks_for_json = _asks_for_json(words, subcommand)
    # The modules that a command imports are not garbage, and with the default of 700 a tenth of its start is looking.
    gc.set_threshold(_COLLECT_AFTER, *threshold[1:])
    try:
        decoded = streams.decoded(words)
        use_options_of(subcommand)
        command(args=decoded, prog_name="dspex-persist")
    except SystemExit as end:
        if asks_for_json and (sentence := _wrong_usage(end)) is not None:
            _say_failure(sentence)
        ended = end.code if isinstance(end.code, int) else 0
        return streams.READER_GONE if ended == 1 and streams.is_reader_gone(end) else ended
    except (DspexError, ValueError, OSError) as error:
        code = exit_code_of(error)
        if code is None:
            raise
        if code != streams.READER_GONE:
            sentence = streams.sentence_of(error) if isinstance(error, OSError) else text_of(error)
            if asks_for_json and not isinstance(error, ToldError):
                _say_failure(sentence)
            complain(sentence)
        return code
    finally:
        gc.set_threshold(*threshold)
    return 0


def _asks_for_json(words: Sequence[str], command: Any) -> bool:
    """Whether the words ask for JSON, of a command that has it, or of none that there is."""
    options = words[: words.index("--")] if "--" in words else words
    has_json = any("--json" in each.opts for each in command.params)
    return "--json" in options and (has_json or hasattr(command, "commands"))


def _say_failure(sentence: str) -> None:
    """Print an error as a JSON object on stdout."""
    streams.print_line(json.dumps({"ok": False, "error": sentence}))


def _wrong_usage(end: SystemExit) -> str | None:
    """Return what Typer says of words that it does not take; None if it has ended for another reason."""
    # Which class the error has depends on the release: some bring their own copy of Click.
    message = getattr(end.__context__, "format_message", None)
    return None if message is None else str(message())


def _command(words: Sequence[str]) -> tuple[Any, Any]:
    """Return the whole command line, and the command in it that `words` name, both with tidied help."""
    command: Any = typer.main.get_command(app)
    subcommand = command
    _shorten(command)
    for word in words:
        following = getattr(subcommand, "commands", {}).get(word)
        if following is None:
            break
        subcommand = following
        _shorten(subcommand)
    return command, subcommand


def _shorten(command: Any) -> None:
    # The command keeps the option that it makes for this context, with these names.
    context = typer.Context(command, help_option_names=HELP_OPTIONS)
    for option in (*command.params, command.get_help_option(context)):
        if getattr(option, "is_flag", False):
            # Typer would write <bool>.
            option.metavar = ""


def exit_code_of(error: Exception) -> int | None:
    """Return the exit code for `error` (docs/exit-codes.md), or None if it is not an error of this package."""
    from dspex_persist.cognitive.errors import ToolDefinitionError, ToolLoadError
    from dspex_persist.infra.listen import ListenError
    from dspex_persist.settings import SettingsError
    from dspex_persist.state.errors import (
        DatabaseInUseError,
        ExecutionConflictError,
        InvalidArgumentError,
        OpenError,
        ToolArgumentError,
        ToolInterruptedError,
        ToolTimedOutError,
    )
    from dspex_persist.wiring.ending import StorageFailedError

    # The first that fits.
    codes: tuple[tuple[type[Exception], int], ...] = (
        (SettingsError, 2),
        (ToolDefinitionError, 2),
        (ToolLoadError, 2),
        (ToolArgumentError, 2),
        (ExecutionConflictError, 7),
        (ToolTimedOutError, 8),
        (ToolInterruptedError, 8),
        (DatabaseInUseError, 4),
        (OpenError, 5),
        (ListenError, 75),
        (DspexError, 1),
        # Text that cannot be encoded, such as in an argument.
        (UnicodeError, 2),
    )
    if isinstance(error, ExplainedError | ToldError) and isinstance(error.__cause__, Exception):
        return exit_code_of(error.__cause__)
    if isinstance(error, StorageFailedError):
        return error.exit_code
    if isinstance(error, InvalidArgumentError) and error.field in _OF_ADDRESSES | _OF_POINTS:
        return 2
    if isinstance(error, OSError) or streams.is_reader_gone(error):
        return streams.code_of(error)
    return next((code for kind, code in codes if isinstance(error, kind)), None)
