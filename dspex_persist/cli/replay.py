"""dspex-persist replay: runs a recorded session again, and reports differences."""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from dspex_persist.cli.groups import Json
from dspex_persist.cli.output import new_table, one_line, progress_bar, say, say_json
from dspex_persist.cli.places import database_of, expanded

if TYPE_CHECKING:
    from dspex_persist.replay import Divergence, Recording, ReplayedExecution, ReplayReport

EXIT_DIVERGED: Final = 6
"""The replay differs from the recording."""

HELP: Final = (
    "Run the tool calls of a recorded session again, and show every difference.\n\n"
    "SOURCE is a recording made by session export, or with --db a session of that database. Each recorded execution "
    "runs again, in order, on the recorded state, with the recorded parameters, times, random numbers, responses of "
    "language models, and results of tools that are not available. What it writes, publishes, returns, raises, calls "
    "and sends to models is compared with the recording. No database is changed, but other side effects of the tools, "
    "such as sending mail, happen again.\n\n"
    "Executions that cannot be repeated are skipped, and listed with the reason: those that ended by a conflict, a "
    "timeout or a cancellation, those that ran in other processes, and those that read values which the recording "
    "leaves out. If all are skipped, the last line says that nothing was checked.\n\n"
    "Commits and executions have their numbers in the recording, with --db those in the database, as in audit.\n\n"
    "--mode state runs no tools: it rebuilds the state from the log, and reports where the log contradicts itself or, "
    "with --db, the current state in the database.\n\n"
)
EPILOG: Final = (
    "[bold]Examples[/bold]\n\n"
    "dspex-persist replay checkout.jsonl --tools shop.tools\n\n"
    "dspex-persist replay checkout.jsonl --tools shop.tools --only-tool order --from 120 --max-shown 20\n\n"
    "dspex-persist replay --db sessions.db s1 --tools shop.tools --json\n\n"
    "dspex-persist replay --db sessions.db s1 --mode state\n\n"
    "[bold]Exit codes[/bold]\n\n"
    "0  everything that was checked is as recorded\n\n"
    "1  failed; the message on stderr says why\n\n"
    "2  wrong usage, or tools that cannot be loaded\n\n"
    "5  no such file, or not a dspex-persist database\n\n"
    "6  something differs\n\n"
    "With --json, stdout has exactly one JSON object, also after an error; the exit codes are the same.\n\n"
)


_FLAGS: Final = {"since": "from", "only_tools": "only-tool"}
"""The options of arguments that the library calls by another name."""
_MOST_LOOKS: Final = 20
"""How often the state is read again if it was changed in the meantime."""
_MOST_SAME: Final = 50
"""If there are more executions than this, those without differences are not listed."""


class Mode(StrEnum):
    """What is replayed."""

    TOOLS = "tools"
    STATE = "state"


Source = Annotated[str, typer.Argument(metavar="SOURCE", help="The recording; with --db the id of the session.")]
Db = Annotated[
    str | None,
    typer.Option(
        "--db",
        metavar="PATH|URL",
        help="Replay a session of this database, which is only read.",
    ),
]
Reveal = Annotated[
    bool,
    typer.Option("--reveal", help="With --db: use the values of sensitive variables, which may then be printed, too."),
]
Tools = Annotated[
    list[str] | None,
    typer.Option(
        "--tools",
        metavar="MODULE[:NAME]",
        show_default=False,
        help="The tools, as for serve; may be repeated. [dim](DSPEX_PERSIST_TOOLS, the settings file)[/dim]",
    ),
]
ModeOption = Annotated[
    Mode, typer.Option("--mode", metavar="MODE", help="tools: run the tools; state: only build the state.")
]
Since = Annotated[
    str,
    typer.Option(
        "--from",
        metavar="POINT",
        show_default=False,
        help="From this commit or execution on: a number or id in the recording, with --db in the database.",
    ),
]
Until = Annotated[
    str,
    typer.Option("--until", metavar="POINT", show_default=False, help="Up to and including this commit or execution."),
]
OnlyTool = Annotated[
    list[str] | None,
    typer.Option("--only-tool", metavar="NAME", show_default=False, help="Only this tool; may be repeated."),
]
LiveLm = Annotated[
    bool, typer.Option("--live-lm", help="Call the language models again, and report different answers.")
]
MaxShown = Annotated[int, typer.Option("--max-shown", metavar="NUMBER", min=0, help="How many divergences to show.")]


def replay(
    source: Source,
    db: Db = None,
    reveal: Reveal = False,
    tools: Tools = None,
    mode: ModeOption = Mode.TOOLS,
    since: Since = "",
    until: Until = "",
    only_tool: OnlyTool = None,
    live_lm: LiveLm = False,
    max_shown: MaxShown = 5,
    as_json: Json = False,
) -> None:
    """Replay a session."""
    choice = {"tools": tools, "from": since, "until": until, "only-tool": only_tool, "live-lm": live_lm}
    _check_usage(mode, choice, reveal and db is None)
    if mode is Mode.STATE:
        report = _replay_state(source, db, reveal)
    else:
        recording = _recording(source, db, reveal)
        report = _replay_tools(recording, tools or (), since, until, only_tool or (), live_lm)
    if as_json:
        say_json(report.document())
    else:
        _show(report, max_shown)
    if not report.ok:
        raise typer.Exit(EXIT_DIVERGED)


def _check_usage(mode: Mode, choice: dict[str, Any], reveals_a_file: bool) -> None:
    from dspex_persist.settings import SettingsError

    if reveals_a_file:
        reason = "it needs --db: whether a recording has sensitive values was decided when it was exported"
        raise SettingsError("reveal", reason, "flag --reveal")
    for name, given in choice.items():
        if mode is Mode.STATE and given:
            raise SettingsError(name, "--mode state runs no tools and reads the whole log", f"flag --{name}")


def _recording(source: str, db: str | None, reveal: bool) -> "Recording":
    from dspex_persist.replay import load

    if db is None:
        return load(expanded(Path(source)))
    from dspex_persist.wiring.recordings import open_recording

    with open_recording(database_of(db), source, reveal=reveal) as read:
        return load(read)


def _replay_state(source: str, db: str | None, reveal: bool) -> "ReplayReport":
    from dspex_persist.replay import replay_state

    if db is None:
        return replay_state(_recording(source, None, reveal), limits=_limits())
    from dspex_persist.state.errors import UnavailableError
    from dspex_persist.wiring.connecting import open_audit
    from dspex_persist.wiring.recordings import open_recording

    with open_audit(database_of(db), reveal=reveal) as audit:
        for _ in range(_MOST_LOOKS):
            recording = _recording(source, db, reveal)
            if recording.has_ended:
                return replay_state(recording, limits=_limits())
            stored = audit.state(source)
            # If a server has written in the meantime, the two differ.
            with open_recording(database_of(db), source) as (header, _):
                grown = header.commits > len(recording.commits)
            if not grown:
                return replay_state(recording, stored, limits=_limits())
    raise UnavailableError(f"session {source} keeps changing: replay a backup, or a recording")


def _replay_tools(
    recording: "Recording",
    references: Sequence[str],
    since: str,
    until: str,
    only_tools: Sequence[str],
    live_lm: bool,
) -> "ReplayReport":
    from dspex_persist.cognitive.toolbox import Toolbox
    from dspex_persist.replay import replay
    from dspex_persist.settings import SettingsError, load_settings
    from dspex_persist.state.errors import InvalidArgumentError

    references = references or load_settings(runs_tools=True).tools
    if not references:
        raise SettingsError("tools", "name the tools: --tools package.module")
    toolbox = Toolbox.of(list(references))
    try:
        with progress_bar() as progress:
            return replay(
                recording,
                toolbox,
                since=since,
                until=until,
                only_tools=only_tools,
                live_lm=live_lm,
                limits=_limits(),
                progress=lambda done, in_all: progress("running again", done, in_all),
            )
    except InvalidArgumentError as error:
        flag = _FLAGS.get(error.field, error.field)
        raise SettingsError(flag, error.reason, f"flag --{flag}") from error


def _limits() -> Any:
    from dspex_persist.settings import load_settings
    from dspex_persist.wiring.limits import limits_of

    return limits_of(load_settings())


# Shown to people


def _show(report: "ReplayReport", most: int) -> None:
    listed = [each for each in report.executions if len(report.executions) <= _MOST_SAME or each.outcome != "same"]
    if listed:
        say(_table(listed))
    for divergence in report.divergences[:most]:
        say(*_lines(divergence), "")
    left = len(report.divergences) - most
    if report.divergences and left > 0:
        say(f"{left:,} more: --max-shown {len(report.divergences)} shows all")
    say(one_line(report.headline()))


def _table(executions: "Sequence[ReplayedExecution]") -> Any:
    table = new_table("", "execution", "tool", "recorded", "replay", "what")
    for each in executions:
        what = each.reason or ", ".join(dict.fromkeys(divergence.what.value for divergence in each.divergences))
        depth = "  " if each.parent_id is not None else ""
        cells = (each.execution_id, depth + each.tool, each.status, each.outcome.value, what)
        table.add_row(*map(one_line, cells), style=_STYLES[each.outcome.value])
    return table


_STYLES: Final = {"same": None, "diverged": "red", "skipped": "dim"}


def _lines(divergence: "Divergence") -> Iterator[Any]:
    """Yield a divergence as a headline and a coloured diff."""
    from rich.text import Text

    headline, *diff = str(divergence).splitlines()
    yield Text(one_line(headline).plain, style="bold")
    for line in diff:
        yield Text(one_line(line).plain, style={"-": "red", "+": "green"}.get(line[:1], "dim"))
