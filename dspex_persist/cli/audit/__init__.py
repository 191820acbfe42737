"""dspex-persist audit: ask the history."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from dspex_persist.cli.audit import options, pages
from dspex_persist.cli.audit.asking import AuditOptions, Form, answering, asking
from dspex_persist.cli.groups import Json, new_group
from dspex_persist.cli.maintenance import EXIT_PROBLEMS, show_check
from dspex_persist.cli.output import say, say_json
from dspex_persist.cli.places import Db, database_of

if TYPE_CHECKING:
    from dspex_persist.cli.audit.verifying import Verification

T = TypeVar("T")

HELP = (
    "Ask the history: who changed a variable, when, in which tool call, and from which inputs.\n\n"
    "Reads a file, also while a server writes to it, or a backup; or asks a server (--target). A POINT is a commit's "
    "number, an execution's id, a time (2026-03-01T12:00), an age (30s, 15m, 2h, 7d) or now; ^ behind it means right "
    "before it, of an execution right before the commit that ended it. Values of variables whose metadata says "
    "sensitive=true are masked unless --reveal."
)
EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "dspex-persist audit history s1 temperature    how it came to its value\n\n"
    "dspex-persist audit history '*' --where '> 0.9' --since 2h --json\n\n"
    "dspex-persist audit executions s1 --status failed\n\n"
    "dspex-persist audit show exec_1234    everything about one execution; a prefix of the id is enough\n\n"
    "dspex-persist audit diff s1 --from exec_1234^ --to exec_1234    what its commit changed\n\n"
    "dspex-persist audit diff s1 --from 1234 --to exec_1234    all that changed while it ran\n\n"
    "dspex-persist audit blame s1 temperature --depth 3    which values it was derived from\n\n"
    "[bold]Exit codes[/bold]\n\n"
    "0  answered, also if nothing was found\n\n"
    "1  no such session, variable or execution, or the server cannot be reached\n\n"
    "2  wrong usage, or a point, a condition or a setting that cannot be\n\n"
    "3  verify found problems\n\n"
    "5  no such file, no database of ours, or another schema\n\n"
    "With --json an error is one JSON object on stdout as well; the exit codes are the same.\n\n"
)

app = new_group(HELP, EPILOG)

_SESSION = typer.Argument(metavar="SESSION", help="Its id.", show_default=False)
_SESSIONS = typer.Argument(metavar="SESSION", help="An id, or a glob of * and ?.", show_default=False)
Session = Annotated[str, _SESSION]
Sessions = Annotated[str, _SESSIONS]


# Lists


@app.command(
    help=(
        "List versions: what a variable, a session or everything that matches was set to, by whom, and when.\n\n"
        "SESSION and VARIABLE may be globs of * and ?, VARIABLE also an id. A numeric variable gets a line of blocks "
        "below the table.\n\n"
    )
)
def history(
    session: Annotated[str, typer.Argument(metavar="SESSION", help="Its id, or a glob; '*': all.", show_default=False)],
    variable: Annotated[
        str, typer.Argument(metavar="VARIABLE", help="Its name or id, or a glob.", show_default=False)
    ] = "",
    type: options.Type = "",
    kind: options.Kind = None,
    actor: options.Actor = "",
    source: options.From = None,
    tool: options.Tool = "",
    execution: options.Execution = "",
    meta: options.Meta = None,
    where: options.Where = None,
    since: options.Since = "",
    until: options.Until = "",
    limit: options.Limit = None,
    oldest_first: options.OldestFirst = False,
    follow: options.Follow = False,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    utc: options.Utc = False,
    reveal: options.Reveal = False,
    db: Db = None,
    target: options.Target = None,
) -> None:
    """List versions."""
    from dspex_persist.cli.audit import lists
    from dspex_persist.state.audit import HistoryQuery

    asked = AuditOptions(db, target, as_json, as_csv, utc, reveal)
    with asking(asked) as audit:
        query = HistoryQuery(
            session="" if session == "*" else session,
            variable="" if variable == "*" else variable,
            type=options.type_of(type),
            kind=kind,
            actor=actor,
            source=source,
            tool=tool,
            execution_id=execution,
            metadata=options.metadata_of(meta),
            where=where or (),
            since=since,
            until=until,
            newest_first=not oldest_first,
        )
        (lists.follow_list if follow else lists.say_list)(audit, query, lists.history_rows(query), asked, limit)


@app.command(help="List tool executions: which tool, how it ended, how long it took, what went wrong.")
def executions(
    session: Sessions = "",
    tool: options.Tool = "",
    status: options.Status = None,
    actor: options.Actor = "",
    key: options.Key = "",
    meta: options.Meta = None,
    top: options.TopOnly = False,
    since: options.Since = "",
    until: options.Until = "",
    limit: options.Limit = None,
    oldest_first: options.OldestFirst = False,
    follow: options.Follow = False,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    utc: options.Utc = False,
    reveal: options.Reveal = False,
    db: Db = None,
    target: options.Target = None,
) -> None:
    """List executions."""
    from dspex_persist.cli.audit import lists
    from dspex_persist.state.audit import ExecutionQuery

    asked = AuditOptions(db, target, as_json, as_csv, utc, reveal)
    with asking(asked) as audit:
        query = ExecutionQuery(
            session="" if session == "*" else session,
            tool=tool,
            status=status,
            actor=actor,
            idempotency_key=key,
            metadata=options.metadata_of(meta),
            children=not top,
            since=since,
            until=until,
            newest_first=not oldest_first,
        )
        (lists.follow_list if follow else lists.say_list)(audit, query, lists.execution_rows(query), asked, limit)


@app.command(help="List commits: each acknowledged change with its actor, cause, hash and changes.")
def commits(
    session: Sessions = "",
    actor: options.Actor = "",
    cause: options.Cause = "",
    since: options.Since = "",
    until: options.Until = "",
    limit: options.Limit = None,
    oldest_first: options.OldestFirst = False,
    follow: options.Follow = False,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    utc: options.Utc = False,
    reveal: options.Reveal = False,
    db: Db = None,
    target: options.Target = None,
) -> None:
    """List commits."""
    from dspex_persist.cli.audit import lists
    from dspex_persist.state.audit import CommitQuery

    asked = AuditOptions(db, target, as_json, as_csv, utc, reveal)
    with asking(asked) as audit:
        query = CommitQuery(
            session="" if session == "*" else session,
            actor=actor,
            cause=cause,
            since=since,
            until=until,
            newest_first=not oldest_first,
        )
        (lists.follow_list if follow else lists.say_list)(audit, query, lists.commit_rows(query), asked, limit)


@app.command(help="List sessions, live and ended, with their sizes.")
def sessions(
    glob: Annotated[str, typer.Argument(metavar="GLOB", help="Their ids; * and ?.", show_default=False)] = "",
    live: Annotated[
        bool | None, typer.Option("--live/--ended", show_default=False, help="Only those that live, or have ended.")
    ] = None,
    meta: options.Meta = None,
    since: options.Since = "",
    until: options.Until = "",
    limit: options.Limit = None,
    oldest_first: options.OldestFirst = False,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    utc: options.Utc = False,
    reveal: options.Reveal = False,
    db: Db = None,
    target: options.Target = None,
) -> None:
    """List sessions."""
    from dspex_persist.cli.audit import lists
    from dspex_persist.state.audit import SessionQuery

    asked = AuditOptions(db, target, as_json, as_csv, utc, reveal)
    with asking(asked) as audit:
        query = SessionQuery(
            session="" if glob == "*" else glob,
            live=live,
            metadata=options.metadata_of(meta),
            since=since,
            until=until,
            newest_first=not oldest_first,
        )
        lists.say_list(audit, query, lists.SESSION_ROWS, asked, limit)


# One thing


@app.command(
    help=(
        "Show one execution in full: parameters, reads, writes, published values, calls, log and outcome.\n\n"
        "The number of the commit that began it is enough of its id: exec_1234, or 1234.\n\n"
    )
)
def show(
    execution: Annotated[str, typer.Argument(metavar="EXECUTION", help="Its id.", show_default=False)],
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    utc: options.Utc = False,
    reveal: options.Reveal = False,
    db: Db = None,
    target: options.Target = None,
) -> None:
    """Show an execution."""
    from dspex_persist.state.audit import ExecutionDetail

    asked = AuditOptions(db, target, as_json, as_csv, utc, reveal)
    with asking(asked) as audit:
        detail = audit.execution(f"exec_{execution}" if execution.isdecimal() else execution)
        if asked.form is not Form.TABLE:
            _say_all(asked, ExecutionDetail, [detail])
            return
        from dspex_persist.cli.audit.details import show_execution

        show_execution(audit, detail, asked.look())


def _say_all(asked: AuditOptions, kind: type[T], rows: Iterable[T]) -> None:
    """Print rows for programs."""
    asked.printer(kind, lambda _look: ()).print(rows)


@app.command(
    help=(
        "Show the variables of a session as of a point, and who set them.\n\n"
        "SESSION may be a glob of * and ?: of all sessions that fit and lived then.\n\n"
    )
)
def state(
    session: Annotated[str, typer.Argument(metavar="SESSION", help="Its id, or a glob.", show_default=False)],
    at: Annotated[str, typer.Option("--at", metavar="POINT", help="When.", show_default=False)] = "now",
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    utc: options.Utc = False,
    reveal: options.Reveal = False,
    db: Db = None,
    target: options.Target = None,
) -> None:
    """Show a session's state."""
    from dspex_persist.cli.audit import lists
    from dspex_persist.cli.audit.tables import state_columns
    from dspex_persist.state.audit import VariableState

    asked = AuditOptions(db, target, as_json, as_csv, utc, reveal)
    with asking(asked) as audit:
        found, of_many = lists.states(audit, session, at)
        asked.printer(VariableState, lambda look: state_columns(look, of_many)).print(found)
        if asked.form is Form.TABLE and not found:
            say("no variables")


@app.command(help="Show what changed between two points: - before, + after.")
def diff(
    session: Session,
    start: Annotated[
        str, typer.Option("--from", metavar="POINT", help="Compare what was then ...", show_default=False)
    ],
    end: Annotated[
        str, typer.Option("--to", metavar="POINT", help="... with what was then.", show_default=False)
    ] = "now",
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    utc: options.Utc = False,
    reveal: options.Reveal = False,
    db: Db = None,
    target: options.Target = None,
) -> None:
    """Compare two points."""
    from dspex_persist.state.audit import Difference

    asked = AuditOptions(db, target, as_json, as_csv, utc, reveal)
    with asking(asked) as audit:
        first, last = audit.resolve(start, "from", session), audit.resolve(end, "to", session)
        found = audit.diff(session, str(first), str(last))
        if asked.form is not Form.TABLE:
            _say_all(asked, Difference, found)
            return
        from dspex_persist.cli.audit.differences import show_differences

        if first > last:
            say(f"backwards: from commit {first} to the older commit {last}")
        show_differences(found, asked.look())
        if not found:
            say(f"no difference between commit {first} and commit {last}")


@app.command(
    help=(
        "Show which execution or client set each value, and which values it was derived from.\n\n"
        "A tool's writes stand on all that its transaction read. Each version is shown once.\n\n"
    )
)
def blame(
    session: Session,
    variable: Annotated[str, typer.Argument(metavar="VARIABLE", help="Its name or id.", show_default=False)] = "",
    at: Annotated[str, typer.Option("--at", metavar="POINT", help="As it stood then.", show_default=False)] = "now",
    depth: Annotated[int, typer.Option("--depth", metavar="N", min=0, max=100, help="So many steps back.")] = 1,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    utc: options.Utc = False,
    reveal: options.Reveal = False,
    db: Db = None,
    target: options.Target = None,
) -> None:
    """Say where values come from."""
    from dspex_persist.state.audit import LineageNode

    asked = AuditOptions(db, target, as_json, as_csv, utc, reveal)
    with asking(asked) as audit:
        nodes = audit.blame(session, variable, at, depth)
        if asked.form is not Form.TABLE:
            _say_all(asked, LineageNode, nodes)
            return
        from dspex_persist.cli.audit.lineage import show_lineage

        show_lineage(nodes, asked.look(), depth)
        if not nodes:
            say("no variables")


@app.command(
    help=(
        "Verify the whole history, as db check does: re-hash each commit and check everything else.\n\n"
        "The file beside the database whose name ends in .anchor lies where whoever changes the one can change the "
        "other. --anchor FILE compares with heads that are kept elsewhere, such as on another machine or on paper, and "
        "so shows a history that was rewritten as a whole; --write adds the head of today to them, if all is well.\n\n"
    ),
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "dspex-persist audit verify --anchor /mnt/other/heads.jsonl --write    every night\n\n"
        "dspex-persist audit verify --anchor /mnt/other/heads.jsonl    is it still the history of then?\n\n"
    ),
)
def verify(
    anchor: Annotated[
        Path | None, typer.Option("--anchor", metavar="FILE", help="Heads kept elsewhere.", show_default=False)
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Add the head to FILE, if nothing is wrong.")] = False,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the problems as CSV.")] = False,
    db: Db = None,
) -> None:
    """Check the history."""
    from dspex_persist.cli.audit import verifying

    asked = AuditOptions(db, None, as_json, as_csv)
    with answering(asked):
        found = verifying.verify(database_of(db), anchor, write)
        _say_verification(found, asked, anchor)
        if found.report.problems:
            raise typer.Exit(EXIT_PROBLEMS)


def _say_verification(found: "Verification", asked: AuditOptions, anchor: Path | None) -> None:
    from dspex_persist.cli.audit.verifying import told
    from dspex_persist.state.store.verify import Problem

    match asked.form:
        case Form.JSON:
            written = None if found.written is None else asdict(found.written)
            more = {"compared": found.compared, "written": written}
            say_json({"ok": not found.report.problems, **asdict(found.report), **more})
        case Form.CSV:
            _say_all(asked, Problem, found.report.problems)
        case Form.TABLE:
            show_check(found.report)
            say(*told(found, anchor))


# Pages

app.command("report", help=pages.REPORT_HELP)(pages.report)
app.command("web", help=pages.WEB_HELP)(pages.web)
