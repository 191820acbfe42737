"""dspex-persist audit: query the history."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from dspex_persist.cli import completing
from dspex_persist.cli.audit import options, pages
from dspex_persist.cli.audit.asking import AuditOptions, Form, answering, asking
from dspex_persist.cli.groups import Jobs, Json, new_group
from dspex_persist.cli.maintenance import EXIT_PROBLEMS, show_check
from dspex_persist.cli.output import counted, progress_bar, say, say_json
from dspex_persist.cli.places import Db, database_of

if TYPE_CHECKING:
    from dspex_persist.audit import ExecutionDetail, Verification

T = TypeVar("T")

HELP = (
    "Query the history: who changed a variable, when, in which tool call, and from which inputs.\n\n"
    "Reads a database, even while a server writes to it, or a backup; or queries a server (--target). A POINT is "
    "a commit's number, an execution's id, a time (2026-03-01T12:00), an age (30s, 15m, 2h, 7d) or now; a ^ after it "
    "means right before it: for an execution, right before the commit that ended it. Values of variables whose "
    "metadata says sensitive=true are masked unless you add --reveal."
)
EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "dspex-persist audit history s1 temperature    how it got its value\n\n"
    "dspex-persist audit history '*' --where '> 0.9' --since 2h --json\n\n"
    "dspex-persist audit executions s1 --status failed\n\n"
    "dspex-persist audit show exec_1234    everything about one execution; a prefix of the id is enough\n\n"
    "dspex-persist audit show exec_1234 --lm    what models were asked in it, what they answered, what that cost\n\n"
    "dspex-persist audit compare exec_12 exec_34    their LM calls side by side, prompts as a text diff\n\n"
    "dspex-persist audit usage --by day --by model --since 7d    what models cost\n\n"
    "dspex-persist audit denials --since 1d    which calls the server refused, and why\n\n"
    "dspex-persist audit diff s1 --from exec_1234^ --to exec_1234    what its commit changed\n\n"
    "dspex-persist audit diff s1 --from 1234 --to exec_1234    all that changed while it ran\n\n"
    "dspex-persist audit blame s1 temperature --depth 3    which values it was derived from\n\n"
    "[bold]Exit codes[/bold]\n\n"
    "0  answered, also if nothing matched\n\n"
    "1  no such session, variable or execution, or the server cannot be reached\n\n"
    "2  wrong usage, or an invalid point, condition or setting\n\n"
    "3  verify found problems\n\n"
    "5  no such file, not a dspex-persist database, or another schema\n\n"
    "With --json an error is printed as one JSON object on stdout, too; the exit codes are the same.\n\n"
)

app = new_group(HELP, EPILOG)

_SESSION = typer.Argument(metavar="SESSION", help="Its id.", show_default=False, autocompletion=completing.sessions)
_SESSIONS = typer.Argument(
    metavar="SESSION", help="An id, or a glob with * and ?.", show_default=False, autocompletion=completing.sessions
)
Session = Annotated[str, _SESSION]
Sessions = Annotated[str, _SESSIONS]


# Lists


@app.command(
    help=(
        "List versions: the values of a variable, a session or everything that matches, with who set them and when.\n\n"
        "SESSION and VARIABLE may be globs with * and ?, VARIABLE also an id. Numeric variables get a sparkline below "
        "the table.\n\n"
    )
)
def history(
    session: Annotated[
        str,
        typer.Argument(
            metavar="SESSION",
            help="Its id, or a glob; '*': all.",
            show_default=False,
            autocompletion=completing.sessions,
        ),
    ],
    variable: Annotated[
        str,
        typer.Argument(
            metavar="VARIABLE",
            help="Its name or id, or a glob.",
            show_default=False,
            autocompletion=completing.variables,
        ),
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

    request = AuditOptions(db, target, as_json, as_csv, utc, reveal)
    with asking(request) as audit:
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
        (lists.follow_list if follow else lists.say_list)(audit, query, lists.history_rows(query), request, limit)


@app.command(help="List tool executions: the tool, how it ended, how long it took, what went wrong.")
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

    request = AuditOptions(db, target, as_json, as_csv, utc, reveal)
    with asking(request) as audit:
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
        (lists.follow_list if follow else lists.say_list)(audit, query, lists.execution_rows(query), request, limit)


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

    request = AuditOptions(db, target, as_json, as_csv, utc, reveal)
    with asking(request) as audit:
        query = CommitQuery(
            session="" if session == "*" else session,
            actor=actor,
            cause=cause,
            since=since,
            until=until,
            newest_first=not oldest_first,
        )
        (lists.follow_list if follow else lists.say_list)(audit, query, lists.commit_rows(query), request, limit)


@app.command(help="List sessions, live and ended, with their sizes.")
def sessions(
    glob: Annotated[str, typer.Argument(metavar="GLOB", help="Ids with * and ?.", show_default=False)] = "",
    live: Annotated[
        bool | None, typer.Option("--live/--ended", show_default=False, help="Only live sessions, or only ended ones.")
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

    request = AuditOptions(db, target, as_json, as_csv, utc, reveal)
    with asking(request) as audit:
        query = SessionQuery(
            session="" if glob == "*" else glob,
            live=live,
            metadata=options.metadata_of(meta),
            since=since,
            until=until,
            newest_first=not oldest_first,
        )
        lists.say_list(audit, query, lists.SESSION_ROWS, request, limit)


@app.command(
    help=(
        "Sum the recorded LM calls: calls, tokens, cost in USD and latency, by model, tool, session or day (UTC).\n\n"
        "The largest cost comes first; with --by day, the newest day. --since and --until are about the commits with "
        "which the executions of the calls ended.\n\n"
    )
)
def usage(
    session: Sessions = "",
    by: options.By = None,
    tool: options.Tool = "",
    model: options.Model = "",
    since: options.Since = "",
    until: options.Until = "",
    limit: options.Limit = None,
    oldest_first: options.OldestFirst = False,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    db: Db = None,
    target: options.Target = None,
) -> None:
    """Sum LM calls."""
    from dspex_persist.cli.audit import calls, lists
    from dspex_persist.state.lm_calls import LmUsage, LmUsageQuery

    request = AuditOptions(db, target, as_json, as_csv)
    with asking(request) as audit:
        query = LmUsageQuery(
            session="" if session == "*" else session,
            by=[name for each in by or ("model",) for name in each.split(",") if name],
            tool=tool,
            model=model,
            since=since,
            until=until,
            newest_first=not oldest_first,
            limit=limit or 0,
        )
        lists.refuse_unknown_tool(audit, tool)
        sums = list(audit.iterate(query))
        request.printer(LmUsage, lambda look: calls.usage_columns(look, query)).print(sums)
        if request.form is Form.TABLE and not sums:
            say("no LM calls are recorded")


@app.command(
    help=(
        "List the calls that a server refused: who made them, from where, and what they lacked.\n\n"
        "Refusals within a minute that differ in nothing but their time are one row. With --target, the token takes "
        "the scope admin; the file has a refusal some seconds later.\n\n"
    )
)
def denials(
    session: Sessions = "",
    identity: options.Identity = "",
    peer: options.Peer = "",
    rpc: options.Rpc = "",
    since: options.Since = "",
    until: options.Until = "",
    limit: options.Limit = None,
    oldest_first: options.OldestFirst = False,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    utc: options.Utc = False,
    db: Db = None,
    target: options.Target = None,
) -> None:
    """List refused calls."""
    from dspex_persist.audit import Denial, DenialQuery
    from dspex_persist.cli.audit.denials import denial_columns
    from dspex_persist.cli.audit.lists import TABLE_ROWS

    request = AuditOptions(db, target, as_json, as_csv, utc)
    with asking(request) as audit:
        query = DenialQuery(
            session="" if session == "*" else session,
            identity=identity,
            peer=peer,
            rpc=rpc,
            since=since,
            until=until,
            newest_first=not oldest_first,
        )
        is_table = request.form is Form.TABLE
        most = TABLE_ROWS if is_table and limit is None else limit or 0
        # One more, to know whether there are more.
        found = audit.denials(replace(query, limit=most + 1 if is_table and most else most))
        shown = found[:most] if most else found
        request.printer(Denial, denial_columns).print(shown)
        if len(shown) < len(found):
            say(f"more than these {counted(most, 'row')}: --limit 0 shows all")
        if is_table and not found:
            say("no calls were refused")


# One thing


@app.command(
    help=(
        "Show one execution in full: parameters, reads, writes, published values, calls, log and outcome.\n\n"
        "The number in its id is enough: exec_1234, or 1234. --lm shows its LM calls instead, and those of the tools "
        "that it called: messages, answers, options, tokens, cost, and the variables that each used.\n\n"
    )
)
def show(
    execution: Annotated[str, typer.Argument(metavar="EXECUTION", help="Its id.", show_default=False)],
    lm: Annotated[bool, typer.Option("--lm", help="Show the recorded calls of language models.")] = False,
    full: options.Full = False,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    utc: options.Utc = False,
    reveal: options.Reveal = False,
    db: Db = None,
    target: options.Target = None,
) -> None:
    """Show an execution."""
    from dspex_persist.state.audit import ExecutionDetail

    request = AuditOptions(db, target, as_json, as_csv, utc, reveal)
    with asking(request) as audit:
        detail = audit.execution(options.execution_id(execution))
        if lm:
            _show_calls(detail, request, full)
            return
        if request.form is not Form.TABLE:
            _say_all(request, ExecutionDetail, [detail])
            return
        from dspex_persist.cli.audit.details import show_execution

        show_execution(audit, detail, request.look())


@app.command(
    help=(
        "Compare the LM calls of two executions: facts side by side, prompts and answers as a text diff (- A, + B).\n\n"
        "Calls are paired by tool and predictor, in their order. With --prompt, A and B are versions of a variable: "
        "the lines of a text, or of the JSON of another value, such as a compiled program.\n\n"
    ),
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "dspex-persist audit compare exec_12 exec_34\n\n"
        "dspex-persist audit compare 3 5 --prompt checkout-42 instructions    versions 3 and 5 of a variable\n\n"
    ),
)
def compare(
    before: Annotated[str, typer.Argument(metavar="A", help="An execution, or a version.", show_default=False)],
    after: Annotated[str, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    prompt: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--prompt", metavar="SESSION VARIABLE", help="Compare versions of this variable.", show_default=False
        ),
    ] = None,
    full: options.Full = False,
    as_json: options.Json = False,
    utc: options.Utc = False,
    reveal: options.Reveal = False,
    db: Db = None,
    target: options.Target = None,
) -> None:
    """Compare LM calls, or versions of a prompt."""
    from dspex_persist.audit import CallComparison, VersionComparison, compare_versions
    from dspex_persist.cli.audit import comparison

    request = AuditOptions(db, target, as_json, False, utc, reveal)
    with asking(request) as audit:
        if prompt is not None:
            versions = compare_versions(audit, *prompt, *map(options.version_number, (before, after)))
            if as_json:
                _say_all(request, VersionComparison, [versions])
            else:
                comparison.show_versions(versions, request.look(), full=full)
            return
        one, other = (audit.execution(options.execution_id(each)) for each in (before, after))
        if as_json:
            _say_all(request, CallComparison, comparison.compare_executions(one, other))
        else:
            comparison.show_comparison(one, other, request.look(), full=full)


def _show_calls(detail: "ExecutionDetail", request: AuditOptions, full: bool) -> None:
    from dspex_persist.audit import LmCall, lm_calls_of
    from dspex_persist.cli.audit import calls

    if request.form is Form.TABLE:
        calls.show_calls(detail, request.look(), full=full)
    else:
        _say_all(request, LmCall, lm_calls_of(detail, children=True))


def _say_all(request: AuditOptions, kind: type[T], rows: Iterable[T]) -> None:
    """Print rows for programs."""
    request.printer(kind, lambda _look: ()).print(rows)


@app.command(
    help=(
        "Show the variables of a session as of a point, and who set them.\n\n"
        "SESSION may be a glob with * and ?, for all matching sessions that were live then.\n\n"
    )
)
def state(
    session: Annotated[
        str,
        typer.Argument(
            metavar="SESSION", help="Its id, or a glob.", show_default=False, autocompletion=completing.sessions
        ),
    ],
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

    request = AuditOptions(db, target, as_json, as_csv, utc, reveal)
    with asking(request) as audit:
        variables, is_many = lists.states(audit, session, at)
        request.printer(VariableState, lambda look: state_columns(look, is_many)).print(variables)
        if request.form is Form.TABLE and not variables:
            say("no variables")


@app.command(help="Show what changed between two points: - before, + after.")
def diff(
    session: Session,
    start: Annotated[
        str, typer.Option("--from", metavar="POINT", help="Compare the state as of this point ...", show_default=False)
    ],
    end: Annotated[
        str, typer.Option("--to", metavar="POINT", help="... with the state as of this one.", show_default=False)
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

    request = AuditOptions(db, target, as_json, as_csv, utc, reveal)
    with asking(request) as audit:
        first, last = audit.resolve(start, "from", session), audit.resolve(end, "to", session)
        differences = audit.diff(session, str(first), str(last))
        if request.form is not Form.TABLE:
            _say_all(request, Difference, differences)
            return
        from dspex_persist.cli.audit.differences import show_differences

        if first > last:
            say(f"backwards: from commit {first} to the older commit {last}")
        show_differences(differences, request.look())
        if not differences:
            say(f"no difference between commit {first} and commit {last}")


@app.command(
    help=(
        "Show which execution or client set each value, and which values it was derived from.\n\n"
        "A tool's writes are derived from everything that its transaction read. Each version is shown once.\n\n"
    )
)
def blame(
    session: Session,
    variable: Annotated[
        str,
        typer.Argument(
            metavar="VARIABLE", help="Its name or id.", show_default=False, autocompletion=completing.variables
        ),
    ] = "",
    at: Annotated[str, typer.Option("--at", metavar="POINT", help="As of this point.", show_default=False)] = "now",
    depth: Annotated[int, typer.Option("--depth", metavar="N", min=0, max=100, help="How many steps back.")] = 1,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    utc: options.Utc = False,
    reveal: options.Reveal = False,
    db: Db = None,
    target: options.Target = None,
) -> None:
    """Show which values each value was derived from."""
    from dspex_persist.state.audit import LineageNode

    request = AuditOptions(db, target, as_json, as_csv, utc, reveal)
    with asking(request) as audit:
        nodes = audit.blame(session, variable, at, depth)
        if request.form is not Form.TABLE:
            _say_all(request, LineageNode, nodes)
            return
        from dspex_persist.cli.audit.lineage import show_lineage

        show_lineage(nodes, request.look(), depth)
        if not nodes:
            say("no variables")


@app.command(
    help=(
        "Verify the whole history, as db check does: re-hash each commit and check everything else.\n\n"
        "Anyone who can change the database can change the .anchor file next to it, too. --anchor FILE compares the "
        "history with heads kept elsewhere, such as on another machine, and so detects a history that was rewritten as "
        "a whole; --write adds the current head to that file if everything verifies.\n\n"
    ),
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "dspex-persist audit verify --anchor /mnt/other/heads.jsonl --write    every night\n\n"
        "dspex-persist audit verify --anchor /mnt/other/heads.jsonl    is the history still the same?\n\n"
    ),
)
def verify(
    anchor: Annotated[
        Path | None, typer.Option("--anchor", metavar="FILE", help="Heads kept elsewhere.", show_default=False)
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Add the current head to FILE if everything verifies.")
    ] = False,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the problems as CSV.")] = False,
    jobs: Jobs = None,
    db: Db = None,
) -> None:
    """Check the history."""
    from dspex_persist import audit

    request = AuditOptions(db, None, as_json, as_csv)
    with answering(request):
        with progress_bar() as progress:
            verification = audit.verify(database_of(db), anchor=anchor, write=write, progress=progress, jobs=jobs)
        _say_verification(verification, request, anchor)
        if not verification.ok:
            raise typer.Exit(EXIT_PROBLEMS)


def _say_verification(verification: "Verification", request: AuditOptions, anchor: Path | None) -> None:
    from dspex_persist.state.store.verify import Problem

    report, written = verification.report, verification.written
    match request.form:
        case Form.JSON:
            heads = {"compared": verification.compared, "written": None if written is None else asdict(written)}
            say_json({"ok": verification.ok, **asdict(report), **heads})
        case Form.CSV:
            _say_all(request, Problem, report.problems)
        case Form.TABLE:
            show_check(report, _end_of(verification, anchor))
            if verification.compared:
                say(f"compared with {counted(verification.compared, 'kept head')} of {anchor}")
            if written is not None:
                say(f"{anchor}: head {written.sequence} written, {written.hash}")


def _end_of(verification: "Verification", anchor: Path | None) -> str:
    """Return what kept heads say about the end of the log; "" if none were to be looked at."""
    if anchor is None:
        return ""
    if verification.last_compared is None:
        return f"{anchor} had no head yet, so commits missing from its end would go unnoticed"
    last = verification.last_compared
    return f"it has all commits up to {last}, the newest kept head; missing ones after that would go unnoticed"


# Pages

app.command("report", help=pages.REPORT_HELP)(pages.report)
app.command("web", help=pages.WEB_HELP)(pages.web)
