"""dspex-persist db: maintain a database file."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from dspex_persist.addresses import DatabaseUrl
from dspex_persist.cli.groups import Jobs, Json, carry_out, new_group
from dspex_persist.cli.output import Progress, counted, new_table, one_line, say
from dspex_persist.cli.places import Db, Server, database_of, file_of, options_of, refuse_missing, server_of

if TYPE_CHECKING:
    from datetime import datetime

    from _typeshed import DataclassInstance

    from dspex_persist.state.model import PrunePolicy
    from dspex_persist.state.store import maintenance
    from dspex_persist.state.store.verify import Problem
    from dspex_persist.wiring.places import Address

EXIT_PROBLEMS: Final = 3
"""The check found problems."""

_KIB: Final = 1024
_NUMBERS: Final = ("rows", "size", "share", "versions", "contents")

HELP: Final = (
    "Maintain a database: check and prune any; back up, restore, measure and upgrade a file.\n\n"
    "check, current, backup and stats only read, and work while a server has the file open. upgrade, restore, prune "
    "and vacuum change it: stop the server first, or let the server prune it (prune --target). Only restore creates a "
    "missing file. Of a database that servers share (--db URL), check and prune work while they run; the others name "
    "the means of that database."
)
EPILOG: Final = (
    "[bold]Exit codes[/bold]\n\n"
    "0  success\n\n"
    "1  failed; the message on stderr says why\n\n"
    "2  wrong usage, or an invalid setting\n\n"
    "3  check, or the check that backup and restore make, found problems\n\n"
    "4  another process, such as a server, owns the database\n\n"
    "5  no such file, not a dspex-persist database, a newer schema, or acknowledged commits are missing\n\n"
    "With --json, stdout has exactly one JSON object, also after an error; the exit codes are the same.\n\n"
)

app = new_group(HELP, EPILOG)


R = TypeVar("R", bound="DataclassInstance")


@app.command(
    help=(
        "Check everything: schema, pages, references, the hash chain, versions, values, the index of metadata.\n\n"
        "It reads and rehashes the whole history, 50,000 to 100,000 versions per second on each core, even while a "
        "server writes. It detects any altered byte, and missing commits: the .anchor file next to the database "
        "remembers the last one. A backup has no such file, so commits missing from its end go unnoticed. Pruned rows "
        "are counted; other missing rows are problems.\n\n"
        "A database (--db URL) is checked in the same way; in Redis or Valkey, by one process.\n\n"
        "Exit code 3: there are problems, each with its commit, session and variable.\n\n"
    )
)
def check(db: Db = None, jobs: Jobs = None, as_json: Json = False) -> None:
    """Check the file, or the database."""
    from dspex_persist.state.store import maintenance

    def work(progress: Progress) -> maintenance.CheckReport:
        place = database_of(db)
        if isinstance(place, DatabaseUrl):
            from dspex_persist.wiring.databases import database_at

            return database_at(place).check(progress, jobs)
        return maintenance.check(place, progress, jobs)

    _tell(as_json, work, show_check)


@app.command(help="Show the revision of the schema, and whether it is this release's.")
def current(db: Db = None, as_json: Json = False) -> None:
    """Show the revision."""
    from dspex_persist.state.store import maintenance

    _report(db, "current", as_json, lambda path, _: maintenance.current(path), _show_current)


@app.command(
    help=(
        "Upgrade the schema to this release's revision, as a server does when it starts.\n\n"
        "It first makes a backup next to the file, the only way back to the older revision. The upgrade is atomic.\n\n"
    )
)
def upgrade(db: Db = None, as_json: Json = False) -> None:
    """Upgrade the schema."""
    from dspex_persist.state.store import maintenance

    _report(db, "upgrade", as_json, lambda path, _: maintenance.upgrade(path), _show_upgrade)


@app.command(
    help=(
        "Copy a consistent snapshot of the database to TARGET, and check the copy.\n\n"
        "A server may keep writing; the copy lacks what it acknowledges after the start. TARGET appears only if the "
        "copy is complete and its check, which rehashes the whole history, finds no problems. It is one file, readable "
        "for its owner only.\n\n"
        "To restore it, run dspex-persist db restore TARGET. Never copy it over the database: SQLite would apply the "
        "old file's -wal to it.\n\n"
    )
)
def backup(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The file to create. It must not exist.")],
    db: Db = None,
    as_json: Json = False,
) -> None:
    """Back the file up."""
    from dspex_persist.state.store import maintenance

    _report(db, "backup", as_json, lambda path, progress: maintenance.backup(path, target, progress), _show_backup)


@app.command(
    help=(
        "Check a copy of BACKUP and replace the database with it. Stop the server first.\n\n"
        "The current database is not deleted: it and the files next to it are renamed, with .replaced- and the time. "
        "After a kill or a power cut, either the old database or the restored one can be opened. A backup with an "
        "older schema is upgraded. The database is created if missing.\n\n"
        "Exit code 3: the backup has problems, and nothing was changed.\n\n"
    ),
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "dspex-persist db restore sessions.backup.db\n\n"
        "dspex-persist db restore sessions.backup.db --db shop.db\n\n"
    ),
)
def restore(
    backup: Annotated[
        Path, typer.Argument(metavar="BACKUP", help="A copy made by db backup, or in another way. It is not changed.")
    ],
    db: Db = None,
    as_json: Json = False,
) -> None:
    """Put a backup in place."""
    from dspex_persist.state.store import maintenance

    _report(db, "restore", as_json, lambda path, progress: maintenance.restore(backup, path, progress), _show_restore)


@app.command(help="Show what takes up space: tables, indexes, the largest sessions and variables.")
def stats(db: Db = None, as_json: Json = False) -> None:
    """Measure the file."""
    from dspex_persist.state.store import maintenance

    _report(db, "stats", as_json, lambda path, _: maintenance.stats(path), _show_stats)


@app.command(
    help=(
        "Delete old history permanently. Without --confirm, only report how much, even while a server runs.\n\n"
        "Marker commits in the log account for the deleted rows, so check still finds everything else that is missing "
        "or changed. It never deletes the newest version of each variable, the versions that its metadata came from, "
        'those that running tools may need, optimization locks, and versions written with metadata "pinned": "true". '
        "You can interrupt it and run it again.\n\n"
        "With --ended-sessions, --older-than applies to the time when sessions ended, and to versions only if you add "
        "--keep-versions. Without --session, --older-than also deletes the older entries about refused calls.\n\n"
    ),
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "dspex-persist db prune --keep-versions 100    what that would delete\n\n"
        "dspex-persist db prune --keep-versions 100 --older-than 30d --confirm    both conditions must hold\n\n"
        "dspex-persist db prune --ended-sessions --older-than 12h --confirm    sessions that ended 12 hours ago\n\n"
        "dspex-persist db prune --session demo --older-than 2026-03-01T12:00Z --confirm\n\n"
        "dspex-persist db prune --keep-versions 100 --target 127.0.0.1:50051 --confirm    by a server\n\n"
    ),
)
def prune(
    keep_versions: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default=False, help="Keep the newest N versions of each variable."),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            metavar="AGE", show_default=False, help="Delete only older history: 30d, 12h, 15m, or a time in ISO 8601."
        ),
    ] = None,
    ended_sessions: Annotated[
        bool, typer.Option("--ended-sessions", help="Delete the history of sessions that have ended.")
    ] = False,
    session: Annotated[
        str | None, typer.Option(metavar="ID", show_default=False, help="Only sessions with this id.")
    ] = None,
    confirm: Annotated[
        bool, typer.Option("--confirm/--dry-run", help="Delete, or only report what would be deleted.")
    ] = False,
    db: Db = None,
    target: Server = None,
    as_json: Json = False,
) -> None:
    """Delete old history."""
    from dspex_persist.state.store import maintenance

    policy = _policy(keep_versions, older_than, ended_sessions, session)
    url = server_of(target, db)
    place = database_of(db) if url is None else url
    if not isinstance(place, Path):
        name = target or str(place)
        _tell(as_json, lambda progress: _prune_shared(name, place, policy, confirm, progress), _show_prune_of_server)
        return
    _report(
        db,
        "prune",
        as_json,
        lambda path, progress: maintenance.prune(path, policy, confirm=confirm, progress=progress),
        _show_prune,
    )


@dataclass(frozen=True, slots=True)
class ServerPrunedReport:
    """What was pruned by a server, or in a database of several, or would be if it was not `confirmed`."""

    target: str
    confirmed: bool
    sessions: int
    versions: int
    events: int
    markers: int
    denials: int
    duration_s: float


def _prune_shared(
    target: str, place: "Address", policy: "PrunePolicy", confirm: bool, progress: Progress
) -> ServerPrunedReport:
    from dspex_persist.state.abilities import Prunable
    from dspex_persist.wiring.connecting import connect

    started = time.monotonic()
    options = {}
    if isinstance(place, DatabaseUrl):
        refuse_missing(place)
        options = options_of(place)
    with connect(place, **options) as server:
        report = Prunable.of(server).prune(policy, confirm=confirm, progress=progress)
    return ServerPrunedReport(target, **asdict(report), duration_s=time.monotonic() - started)


def _policy(keep_versions: int | None, older_than: str | None, ended: bool, session_id: str | None) -> "PrunePolicy":
    from dspex_persist import clock
    from dspex_persist.state.model import PrunePolicy

    if keep_versions is None and older_than is None and not ended:
        raise typer.BadParameter("say what to delete: --keep-versions, --older-than or --ended-sessions")
    before = _moment(older_than) if older_than is not None else None
    ended_before = (before or clock.now()) if ended else None
    # --ended-sessions with --older-than alone must not delete the versions of live sessions.
    of_versions = before if keep_versions is not None or not ended else None
    return PrunePolicy(keep_versions, of_versions, ended_before, session_id)


def _moment(text: str) -> "datetime":
    from dspex_persist import clock
    from dspex_persist.state.audit import parse_point
    from dspex_persist.state.errors import InvalidArgumentError

    try:
        moment = parse_point(text, clock.now()).at
    except InvalidArgumentError:
        moment = None
    if moment is None:
        raise typer.BadParameter(f"{text!r} is neither an age (30d, 12h, 15m, 30s) nor a time (2026-03-01T12:00Z)")
    return moment


@app.command(
    help=(
        "Rewrite the file without its free pages. Needs free disk space of up to twice its size.\n\n"
        "It pays off if stats shows many free pages, as after prune; a file that only grew hardly shrinks.\n\n"
    )
)
def vacuum(db: Db = None, as_json: Json = False) -> None:
    """Shrink the file."""
    from dspex_persist.state.store import maintenance

    _report(db, "vacuum", as_json, maintenance.vacuum, _show_vacuum)


def _report(
    db: str | None, command: str, as_json: bool, work: Callable[[Path, Progress], R], show: Callable[[R], None]
) -> None:
    """Do the work of a command on a file and print its report."""
    _tell(as_json, lambda progress: work(file_of(db, f"db {command}"), progress), show)


def _tell(as_json: bool, work: Callable[[Progress], R], show: Callable[[R], None]) -> None:
    """Do the work and print its report; exit with EXIT_PROBLEMS if that has problems."""
    if not _is_sound(carry_out(as_json, work, show, _is_sound)):
        raise typer.Exit(EXIT_PROBLEMS)


def _is_sound(report: object) -> bool:
    return not getattr(report, "problems", ())


# Shown to people


def _show_problems(problems: "tuple[Problem, ...]", complete: bool = True) -> None:
    from dspex_persist.state.store.maintenance import MOST_PROBLEMS

    for problem in problems:
        say(str(problem))
    if not complete:
        say(f"stopped after {MOST_PROBLEMS} problems")


def show_check(report: "maintenance.CheckReport", end: str = "") -> None:
    """Print what a check has found.

    Args:
        report: What it has found.
        end: What is known of the end of the log; "" for what its own anchor says.
    """
    _show_problems(report.problems, report.complete)
    if report.anchored:
        end = "its end matches its anchor"
    end = end or "it has no anchor, so commits missing from its end would go unnoticed"
    if report.problems:
        say(f"{report.path}: {counted(len(report.problems), 'problem')} in {counted(report.commits, 'commit')}")
    else:
        say(f"{report.path} is sound: {counted(report.commits, 'commit')}, schema {report.revision}; {end}")
    if report.pruned_commits:
        gone = _versions_and_events(report.pruned_versions, report.pruned_events)
        say(f"pruned, according to its log: {gone} of {counted(report.pruned_commits, 'commit')}")


def _show_current(report: "maintenance.RevisionReport") -> None:
    if report.is_head:
        say(f"{report.revision} (this release's)")
    else:
        say(f"{report.revision or 'empty'}, this release's is {report.head}: dspex-persist db upgrade")


def _show_upgrade(report: "maintenance.UpgradeReport") -> None:
    if report.found == report.revision:
        say(f"{report.path} has schema {report.revision} already")
        return
    say(f"{report.path}: schema {report.found or 'empty'} upgraded to {report.revision}")
    if report.backup is not None:
        say(f"backup of the old file: {report.backup}")


def _show_backup(report: "maintenance.BackupReport") -> None:
    if report.problems:
        _show_problems(report.problems)
        say(f"the copy has {counted(len(report.problems), 'problem')}: {report.target} was not created")
    else:
        size = _size(report.size_bytes)
        say(f"{report.target}: {counted(report.commits, 'commit')}, {size}, checked and sound")


def _show_restore(report: "maintenance.RestoreReport") -> None:
    if report.problems:
        _show_problems(report.problems)
        say(f"{report.backup} has {counted(len(report.problems), 'problem')}: nothing was changed")
        return
    size = _size(report.size_bytes)
    say(f"{report.path}: {counted(report.commits, 'commit')}, {size}, from {report.backup}, checked and sound")
    if report.aside is not None:
        say(f"previous database: {report.aside}")


def _show_prune_of_server(report: ServerPrunedReport) -> None:
    gone = _gone(report)
    if report.confirmed:
        say(f"{report.target}: {gone} deleted, in {report.duration_s:.1f} s")
    else:
        say(f"{report.target}: {gone} would be deleted; add --confirm to delete")


def _gone(report: "ServerPrunedReport | maintenance.PrunedReport") -> str:
    gone = f"{_versions_and_events(report.versions, report.events)} of {counted(report.sessions, 'session')}"
    if not report.denials:
        return gone
    entries = "1 entry" if report.denials == 1 else f"{report.denials:,} entries"
    return f"{gone}, and {entries} about refused calls,"


def _show_prune(report: "maintenance.PrunedReport") -> None:
    gone = _gone(report)
    if report.confirmed:
        say(f"{report.path}: {gone} deleted, in {report.duration_s:.1f} s; {_size(report.free_bytes)} are free in it")
        say("dspex-persist db vacuum returns free pages to the disk")
    else:
        say(f"{report.path}: {gone} would be deleted; add --confirm to delete")


def _versions_and_events(versions: int, events: int) -> str:
    return f"{counted(versions, 'version')} and {counted(events, 'event')}"


def _show_vacuum(report: "maintenance.VacuumReport") -> None:
    before, after = _size(report.before_bytes), _size(report.after_bytes)
    say(f"{report.path}: {before} before, {after} after, in {report.duration_s:.1f} s")


def _show_stats(report: "maintenance.StatsReport") -> None:
    say(_overview(report), _tables(report))
    if report.versions:
        say(
            _shares("Largest sessions", report.largest_sessions), _shares("Largest variables", report.largest_variables)
        )
    if report.warning is not None:
        say(f"warning: {report.warning}")


def _overview(report: "maintenance.StatsReport") -> Any:
    table = new_table(str(report.path), "", "", right=_NUMBERS)
    rows = (
        ("file", _size(report.file_bytes)),
        ("free pages in it", _size(report.free_bytes)),
        ("WAL", _size(report.wal_bytes)),
        ("sessions", f"{report.sessions_live:,} live, {report.sessions_ended:,} ended"),
        ("variables", f"{report.variables_live:,} live, {report.variables_deleted:,} deleted or of ended sessions"),
        ("commits", f"{report.commits:,}"),
        ("versions", f"{report.versions:,}"),
        ("large contents", f"{report.large_contents:,}, {_size(report.large_bytes)}"),
        ("saved by sharing them", _size(report.shared_bytes)),
        ("schema", report.revision),
        ("SQLite", report.sqlite_version),
    )
    for row in rows:
        table.add_row(*row)
    return table


def _tables(report: "maintenance.StatsReport") -> Any:
    title = (
        "Tables and indexes" if report.exact else "Tables (by the length of their values: this SQLite has no dbstat)"
    )
    table = new_table(title, "name", "kind", "rows", "size", "share", right=_NUMBERS)
    total = sum(stored.size_bytes for stored in report.tables) or 1
    for stored in report.tables:
        rows = f"{stored.rows:,}" if stored.rows is not None else ""
        share = f"{100 * stored.size_bytes / total:.1f} %"
        table.add_row(stored.name, stored.kind, rows, _size(stored.size_bytes), share)
    return table


def _shares(title: str, shares: "tuple[maintenance.Share, ...]") -> Any:
    by_variable = any(share.variable is not None for share in shares)
    table = new_table(title, "session", *(["variable"] if by_variable else []), "versions", "contents", right=_NUMBERS)
    for share in shares:
        names = [share.session_id, *([share.variable] if share.variable is not None else [])]
        table.add_row(*(one_line(name) for name in names), f"{share.versions:,}", _size(share.size_bytes))
    return table


def _size(size_bytes: int) -> str:
    if size_bytes < _KIB:
        return f"{size_bytes} B"
    size = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        size /= _KIB
        if size < _KIB:
            return f"{size:.1f} {unit}"
    return f"{size / _KIB:.1f} TiB"
