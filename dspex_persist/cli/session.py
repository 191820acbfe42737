"""dspex-persist session: show, export, import and fork sessions with their history."""

import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TextIO, TypeVar, cast

import typer

from dspex_persist.addresses import DatabaseUrl
from dspex_persist.cli import completing
from dspex_persist.cli.audit import options
from dspex_persist.cli.groups import Json, carry_out, new_group
from dspex_persist.cli.output import Progress, counted, say
from dspex_persist.cli.places import Db, Server, database_of, expanded, options_of, refuse_missing, server_of
from dspex_persist.errors import DspexError

if TYPE_CHECKING:
    from dspex_persist.state.provider import StateProvider
    from dspex_persist.state.store.maintenance.transfer import ExportReport

R = TypeVar("R")

_STREAM: Final = "-"
_LEFT_OUT: Final = (
    "warning: values of sensitive variables are left out; executions that read them cannot be replayed, and a test "
    "that can replay none fails (--reveal includes the values)"
)

HELP: Final = (
    "Show a session; export, import or fork it with its whole history, or migrate its typed variables.\n\n"
    "show and export only read, and work while a server has the file open. import, fork and migrate change the file: "
    "while a server has it open, name the server. With --target, they work on it, and it serves others meanwhile.\n\n"
    "sessions (with an s at the end) lists and ends live sessions.\n\n"
)
EPILOG: Final = (
    "[bold]Exit codes[/bold]\n\n"
    "0  success\n\n"
    "1  failed; the message on stderr says why\n\n"
    "2  wrong usage, an invalid point or setting, or tools or models that cannot be loaded\n\n"
    "4  another process, such as a server, owns the database\n\n"
    "5  no such file, not a dspex-persist database, a newer schema, or acknowledged commits are missing\n\n"
    "With --json, stdout has exactly one JSON object, also after an error; the exit codes are the same.\n\n"
)

app = new_group(HELP, EPILOG)

Session = Annotated[
    str,
    typer.Argument(metavar="SESSION", help="The session's id; it may have ended.", autocompletion=completing.sessions),
]


@app.command(
    "export",
    help=(
        "Export a session's whole log to a file, to import elsewhere, replay or archive.\n\n"
        "The file has one line of JSON per commit, oldest first, with every version and event, and the actor, cause "
        "and time. It is a consistent snapshot, appears complete or not at all, and is readable for its owner only.\n\n"
        'Values of sensitive variables (those with the metadata "sensitive": "true") are left out unless you add '
        "--reveal. The parameters, results and logs of tools are not masked.\n\n"
        "With --target, a running server exports. It includes the values of sensitive variables only if it was started "
        "with --audit-reveal.\n\n"
        "--as-test also writes a pytest test that replays the recording with the tools of --tools, which it imports to "
        "check that they exist. Executions that read values which are left out cannot be replayed.\n\n"
    ),
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "dspex-persist session export checkout-42 -o checkout-42.jsonl\n\n"
        "dspex-persist session export checkout-42 -o checkout-42.jsonl --target 127.0.0.1:50051\n\n"
        "dspex-persist session export checkout-42 -o - --db backup.db | gzip > checkout-42.jsonl.gz\n\n"
        "dspex-persist session export checkout-42 --as-test tests/test_checkout.py --tools shop.tools\n\n"
    ),
)
def export(
    session: Session,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            show_default=False,
            help="The file to write, replaced if it exists; - is stdout. [dim](with --as-test: next to the test)[/dim]",
        ),
    ] = None,
    as_test: Annotated[
        Path | None,
        typer.Option("--as-test", metavar="TEST", help="The test to write, such as tests/test_checkout.py."),
    ] = None,
    tools: Annotated[
        list[str] | None,
        typer.Option(
            "--tools",
            metavar="MODULE[:NAME]",
            show_default=False,
            help="With --as-test: the tools for the replay; may be repeated.",
        ),
    ] = None,
    reveal: Annotated[bool, typer.Option("--reveal", help="Include the values of sensitive variables.")] = False,
    started: Annotated[
        int | None,
        typer.Option(
            "--started",
            metavar="COMMIT",
            show_default=False,
            help="If several sessions had this id: the one that began with this commit. [dim](the newest)[/dim]",
        ),
    ] = None,
    db: Db = None,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Export a session."""
    from dspex_persist.state.store.maintenance import transfer
    from dspex_persist.wiring.recordings import open_recording

    if output == _STREAM and as_json:
        raise typer.BadParameter("with -o -, the recording goes to stdout: name a file, or leave out --json")
    target, url = _target_of(output, as_test, tools or []), server_of(server, db)

    def write(to: Path | TextIO, progress: Progress) -> transfer.ExportReport:
        place = url or database_of(db)
        if isinstance(place, Path):
            return transfer.export_session(place, session, to, started=started, reveal=reveal, progress=progress)
        with open_recording(place, session, started=started, reveal=reveal) as (header, commits):
            return transfer.export_recording(str(place), header, commits, to, progress=progress)

    def work(progress: Progress) -> transfer.ExportReport:
        if as_test is not None and url is None:
            _refuse_files_of(database_of(db), as_test)
        _refuse_unknown_tools(tools or [])
        with _stdout() if target is None else nullcontext(target) as to:
            report = write(to, progress)
        if as_test is not None:
            _write_test(as_test, report, tools or [])
        return report

    def show(report: transfer.ExportReport) -> None:
        if report.target is not None:
            say(_exported(report, reveal=reveal))
        if as_test is not None:
            say(f"{as_test}: the test that replays it; run it with: pytest {as_test}")

    carry_out(as_json, work, show)


def _refuse_files_of(place: Path | DatabaseUrl, as_test: Path) -> None:
    from dspex_persist.state.store import maintenance

    if isinstance(place, Path):
        maintenance.refuse_files_of(place, as_test, "as_test")


def _write_test(test: Path, report: "ExportReport", tools: Sequence[str]) -> None:
    test.write_text(_test_of(report.session_id, test, cast(Path, report.target), tools), encoding="utf-8")
    if report.masked:
        print(_LEFT_OUT, file=sys.stderr)


def _exported(report: "ExportReport", *, reveal: bool) -> str:
    advice = "start the server with --audit-reveal" if reveal else "--reveal"
    left_out = f"; values of sensitive variables are left out ({advice})" if report.masked else ""
    return f"{report.target}: {counted(report.commits, 'commit')} of session {report.session_id}{left_out}"


def _target_of(output: str | None, as_test: Path | None, tools: Sequence[str]) -> Path | None:
    """Return the file for the recording, or None for stdout."""
    if as_test is not None:
        if not tools:
            raise typer.BadParameter("name the tools for the replay: --tools MODULE")
        if as_test.exists():
            raise typer.BadParameter(f"{as_test} exists already, and may have been edited; use another name")
        if not as_test.stem.isidentifier() or as_test.suffix != ".py":
            raise typer.BadParameter(f"{as_test} is not a name for a test; use one such as tests/test_checkout.py")
        if output == _STREAM:
            raise typer.BadParameter("a test needs its recording in a file: leave out -o -")
    elif tools:
        raise typer.BadParameter("--tools is only for --as-test")
    if output is None and as_test is None:
        raise typer.BadParameter("say where to write the recording: -o FILE, or -o - for stdout")
    if output == _STREAM:
        return None
    return expanded(Path(output)) if output is not None else cast(Path, as_test).with_suffix(".jsonl")


def _refuse_unknown_tools(references: Sequence[str]) -> None:
    """Load the tools, as a test without them could not run."""
    from dspex_persist.cognitive.toolbox import Toolbox

    toolbox = Toolbox()
    for reference in references:
        toolbox.load(reference)


def _test_of(session: str, test: Path, recording: Path, tools: Sequence[str]) -> str:
    """Return a module with one test."""
    name = test.stem if test.stem.startswith("test_") else f"test_{test.stem}"
    place = os.path.relpath(recording, test.parent)
    # Clients choose ids, so the id only appears as an escaped literal.
    return f'''"""Replays a recorded session: its tools must do the same as when it was recorded."""

import pytest

SESSION = {session!a}


@pytest.mark.dspex_replay({place!a}, tools={list(tools)!a})
def {name}(dspex_replay):
    assert dspex_replay.report.ok, SESSION
'''


@contextmanager
def _stdout() -> Iterator[io.TextIOWrapper]:
    """Yield standard output for a recording: in UTF-8, whatever the encoding of the terminal."""
    stream = cast(io.TextIOWrapper, sys.stdout)
    stream.reconfigure(encoding="utf-8", newline="\n")
    try:
        yield stream
    except DspexError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            # At exit Python would flush again, and print an error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise


@app.command(
    "import",
    help=(
        "Import a recorded session with its whole history, atomically.\n\n"
        "Its commits get new numbers at the end of the log, and keep their times, actors and causes. Executions that "
        "were running when it was recorded become interrupted. A session that had not ended continues, and its TTL "
        "restarts. The database is created if missing.\n\n"
        "With --target, a running server imports it, while other calls continue.\n\n"
        "Refused are the id of a live session (choose another one with --as), a recording without the values of "
        "sensitive variables, one that exceeds a limit of the settings, and a file with an invalid line.\n\n"
    ),
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "dspex-persist session import checkout-42.jsonl --db other.db\n\n"
        "dspex-persist session import checkout-42.jsonl --target 127.0.0.1:50051\n\n"
        "zcat checkout-42.jsonl.gz | dspex-persist session import - --as copy-of-42\n\n"
    ),
)
def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The recording; - is stdin.")],
    new_id: Annotated[
        str | None, typer.Option("--as", metavar="NEWID", show_default=False, help="The id of the imported session.")
    ] = None,
    db: Db = None,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Import a session."""
    from dspex_persist.settings import load_settings
    from dspex_persist.state.store.maintenance.transfer import ImportReport
    from dspex_persist.wiring.limits import limits_of
    from dspex_persist.wiring.recordings import import_session

    url = server_of(server, db)

    def work(progress: Progress) -> ImportReport:
        limits = limits_of(load_settings()) if url is None else None
        place = url or database_of(db)
        options = {} if isinstance(place, str) else options_of(place)
        with _lines(file) as lines:
            return import_session(
                place,
                lines,
                name="stdin" if file == _STREAM else file,
                session_id=new_id,
                limits=limits,
                progress=progress,
                **options,
            )

    def show(report: ImportReport) -> None:
        what = f"{counted(report.commits, 'commit')}, {report.first_sequence} to {report.last_sequence}"
        say(f"{report.path}: session {report.session_id} imported ({what})")
        if report.interrupted:
            say(f"{counted(report.interrupted, 'execution')} that had not ended marked as interrupted")

    carry_out(as_json, work, show)


@contextmanager
def _lines(file: str) -> Iterator[Iterable[str]]:
    from dspex_persist.state.errors import RecordingError

    if file == _STREAM:
        stream = cast(io.TextIOWrapper, sys.stdin)
        stream.reconfigure(encoding="utf-8", errors="strict", newline="\n")
        yield stream
        return
    try:
        opened = expanded(Path(file)).open(encoding="utf-8", newline="\n")
    except OSError as error:
        raise RecordingError(file, 1, f"it cannot be read: {error.strerror or error}") from error
    with opened:
        yield opened


@app.command(
    "fork",
    help=(
        "Start a new session with the variables that a session had at a point.\n\n"
        "It copies the type, constraints, metadata and value of each variable, at version 0, and the dependencies "
        "among them, but neither locks nor running executions. The metadata of the new session says where it comes "
        "from: forked_from, forked_at.\n\n"
        "A point is a commit's number, an execution's id (right after it ended), a time, an age (2h) or now; a ^ after "
        "it means right before it.\n\n"
        "With --target, a running server forks. It copies sensitive variables only if it was started with "
        "--audit-reveal.\n\n"
    ),
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "dspex-persist session fork checkout-42 what-if --at 1234^\n\n"
        "dspex-persist session fork checkout-42 what-if --at 2026-03-01T12:00Z --target 127.0.0.1:50051\n\n"
    ),
)
def fork(
    session: Session,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The id of the new session.")],
    at: Annotated[str, typer.Option("--at", metavar="POINT", help="The point to fork at.")] = "now",
    db: Db = None,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Fork a session."""
    from dspex_persist.settings import load_settings
    from dspex_persist.state.abilities import Forkable
    from dspex_persist.wiring.connecting import connect
    from dspex_persist.wiring.limits import limits_of

    url = server_of(server, db)

    def opened() -> "StateProvider":
        if url is not None:
            return connect(url)
        path, settings = database_of(db), load_settings()
        refuse_missing(path)
        options = {"limits": limits_of(settings), "session_ttl_s": settings.session_ttl_s}
        return connect(path, **options, **options_of(path))

    def work(_: Progress) -> dict[str, Any]:
        path = url or database_of(db)
        with opened() as state:
            variables = len(Forkable.of(state).fork_session(session, new, at).variables)
            forked_at = int(state.get_session(new).metadata["forked_at"])
        return {
            "path": str(path),
            "session_id": new,
            "forked_from": session,
            "forked_at": forked_at,
            "variables": variables,
        }

    def show(report: dict[str, Any]) -> None:
        what = f"{counted(report['variables'], 'variable')} of {session} as of commit {report['forked_at']}"
        say(f"{report['path']}: session {new} begun with {what}")

    carry_out(as_json, work, show)


@app.command(
    "show",
    help=(
        "Show a session: when it began and ended, its metadata, who owns it, and its rules.\n\n"
        "Rules say who else may use the session, on servers that demand tokens. A server shows those that concern the "
        "token; its owner and administrators see all.\n\n"
        "Of several sessions with this id, it is the newest.\n\n"
    ),
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "dspex-persist session show checkout-42\n\n"
        "dspex-persist session show checkout-42 --target 127.0.0.1:50051 --json\n\n"
    ),
)
def show_(
    session: Session, db: Db = None, server: Server = None, as_json: Json = False, utc: options.Utc = False
) -> None:
    """Show a session."""
    from dspex_persist.cli.shown import document_of, show_session
    from dspex_persist.state.audit import SessionQuery
    from dspex_persist.state.errors import NotInHistoryError
    from dspex_persist.wiring.connecting import open_audit

    url = server_of(server, db)

    def work(_: Progress) -> dict[str, Any]:
        with open_audit(url or database_of(db)) as audit:
            # Compared again, because the id may look like a pattern.
            found = (each for each in audit.iterate(SessionQuery(session=session)) if each.session_id == session)
            entry = next(found, None)
        if entry is None:
            raise NotInHistoryError("session", session, "")
        return document_of(entry)

    carry_out(as_json, work, partial(show_session, is_utc=utc))


@app.command(
    "migrate",
    help=(
        "Migrate the variables of live sessions to the present versions of their models.\n\n"
        "MODULE is imported as in Python, such as shop.models; the working directory comes first on the import path. "
        "It declares models with @model and migrations with @migration. Each variable whose value is older gets the "
        "migrated value and the schema of its model, in one commit whose cause is the migration.\n\n"
        "A program that knows the models migrates a value when it reads it, so this is needed only for programs that "
        "do not, or to find out whether all values can be migrated (--dry-run).\n\n"
        "A value that cannot be migrated stays as it is, and is reported; the others are migrated all the same.\n\n"
    ),
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "dspex-persist session migrate shop.models --dry-run\n\n"
        "dspex-persist session migrate shop.models --session 'checkout-*' --target 127.0.0.1:50051\n\n"
    ),
)
def migrate(
    module: Annotated[str, typer.Argument(metavar="MODULE", help="The module with the models and migrations.")],
    session: Annotated[
        str,
        typer.Option(
            "--session", metavar="GLOB", help="Only sessions whose id matches.", autocompletion=completing.sessions
        ),
    ] = "*",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Run the migrations, but write nothing.")] = False,
    db: Db = None,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Migrate typed variables."""
    from dspex_persist.cli.live.opening import Place
    from dspex_persist.cognitive.migrating import load_models, migrate_sessions

    place = Place(server_of(server, db), db)

    def work(progress: Progress) -> dict[str, Any]:
        load_models(module)
        with place.opened() as state:
            report = migrate_sessions(state, session, write=not dry_run, progress=progress)
        return {"path": str(place), "dry_run": dry_run, **report}

    def show(report: dict[str, Any]) -> None:
        for each in report["migrated"]:
            to = f"{each['from_version']} to {each['to_version']}"
            say(f"session {each['session_id']}: variable {each['name']} {'can be ' * dry_run}migrated from {to}")
        for each in report["failed"]:
            print(f"session {each['session_id']}: {each['error']}", file=sys.stderr)
        what = "can be migrated" if dry_run else "migrated"
        count = counted(len(report["migrated"]), "variable")
        say(f"{report['path']}: {count} of {counted(report['sessions'], 'session')} {what}")

    report = carry_out(as_json, work, show, lambda report: not report["failed"])
    if report["failed"]:
        raise typer.Exit(1)
