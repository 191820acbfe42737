"""dspex-persist db: look after a database file."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from dspex_persist.cli.output import counted, new_table, one_line, say, say_json
from dspex_persist.errors import DspexError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from dspex_persist.state.store import maintenance
    from dspex_persist.state.store.verify import Problem

EXIT_PROBLEMS: Final = 3
"""The check found something."""

_KIB: Final = 1024
_NUMBERS: Final = ("rows", "size", "share", "versions", "contents")

HELP: Final = (
    "Look after a database file: check it, back it up, see where its bytes are.\n\n"
    "check, current, backup and stats only read, and work while a server has the file open. upgrade and vacuum change "
    "it: stop the server first. None of them ever makes a file that is not there."
)
EPILOG: Final = (
    "[bold]Exit codes[/bold]\n\n"
    "0  fine\n\n"
    "1  failed; the sentence on stderr says why\n\n"
    "2  wrong usage, or a setting that cannot be\n\n"
    "3  check, or the check of a backup, found problems\n\n"
    "4  another process, such as a server, has the database\n\n"
    "5  no such file, no database of ours, a newer schema, or acknowledged commits are gone\n\n"
    "With --json, stdout has exactly one JSON object, also after an error; the exit codes are the same.\n\n"
)

app = typer.Typer(
    help=HELP,
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Db = Annotated[
    Path | None,
    typer.Option(
        "--db",
        metavar="PATH",
        show_default=False,
        help="The database file. [dim](as serve: DSPEX_PERSIST_DB, the settings file, sessions.db)[/dim]",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]

R = TypeVar("R", bound="DataclassInstance")
_Progress = Callable[[str, int, int], None]


@app.command(
    help=(
        "Check everything: pages, references, the hash chain, versions, current values.\n\n"
        "The whole history is read and hashed again, 50,000 to 100,000 versions a second, while a server may go on "
        "writing. What was altered, even by one byte, shows, and so do commits that are gone: the file beside the "
        "database whose name ends in .anchor remembers the last one. A backup has no such file, so what is gone from "
        "the end of a backup does not show.\n\n"
        "Exit code 3: problems, each with its commit, session and variable.\n\n"
    )
)
def check(db: Db = None, as_json: Json = False) -> None:
    """Check the file."""
    from dspex_persist.state.store import maintenance

    _report(db, as_json, maintenance.check, _show_check)


@app.command(help="Show the revision of the schema, and whether it is this release's.")
def current(db: Db = None, as_json: Json = False) -> None:
    """Show the revision."""
    from dspex_persist.state.store import maintenance

    _report(db, as_json, lambda path, _: maintenance.current(path), _show_current)


@app.command(
    help=(
        "Bring the schema to this release's revision. A server does that by itself when it starts.\n\n"
        "Before anything is changed a backup is made beside the file, and the upgrade itself happens whole or not at "
        "all. The way back to an older revision is that backup.\n\n"
    )
)
def upgrade(db: Db = None, as_json: Json = False) -> None:
    """Upgrade the schema."""
    from dspex_persist.state.store import maintenance

    _report(db, as_json, lambda path, _: maintenance.upgrade(path), _show_upgrade)


@app.command(
    help=(
        "Copy the database to TARGET as of one moment, and check the copy.\n\n"
        "A server may go on writing: what it acknowledges after the beginning is not in the copy. TARGET appears when "
        "the copy is whole and its check has found nothing (the whole history is hashed again), or not at all. It is "
        "one file, readable by its owner only.\n\n"
        "To go back to it: stop the server, remove the database and the files beside it whose names end in -wal, -shm "
        "and .anchor, and put the copy in its place.\n\n"
    )
)
def backup(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The file to make. It must not exist.")],
    db: Db = None,
    as_json: Json = False,
) -> None:
    """Back the file up."""
    from dspex_persist.state.store import maintenance

    _report(db, as_json, lambda path, progress: maintenance.backup(path, target, progress), _show_backup)


@app.command(help="Show where the bytes are: tables, indexes, the largest sessions and variables.")
def stats(db: Db = None, as_json: Json = False) -> None:
    """Measure the file."""
    from dspex_persist.state.store import maintenance

    _report(db, as_json, lambda path, _: maintenance.stats(path), _show_stats)


@app.command(
    help=(
        "Write the file anew without its free pages. Needs up to twice its size of free disk meanwhile.\n\n"
        "Worth it where stats shows much that is free. The history is never removed, so a file that only grew hardly "
        "shrinks.\n\n"
    )
)
def vacuum(db: Db = None, as_json: Json = False) -> None:
    """Shrink the file."""
    from dspex_persist.state.store import maintenance

    _report(db, as_json, maintenance.vacuum, _show_vacuum)


def _report(db: Path | None, as_json: bool, work: Callable[[Path, _Progress], R], show: Callable[[R], None]) -> None:
    """Do the work and print what came of it. An error goes on to `main`, which says it on stderr."""
    try:
        path = _database(db)
        with _progress() as progress:
            report = work(path, progress)
    except (DspexError, ValueError) as error:
        if as_json:
            say_json({"ok": False, "error": str(error)})
        raise
    is_sound = not getattr(report, "problems", ())
    if as_json:
        say_json({"ok": is_sound, **asdict(report)})
    else:
        show(report)
    if not is_sound:
        raise typer.Exit(EXIT_PROBLEMS)


def _database(given: Path | None) -> Path:
    if given is not None:
        return given.expanduser()
    from dspex_persist.settings import load_settings

    return load_settings().db


@contextmanager
def _progress() -> Iterator[_Progress]:
    """A bar on stderr, on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda _step, _done, _in_all: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("opening", total=None)
        yield lambda step, done, in_all: bar.update(task, description=step, completed=done, total=in_all or None)


# Shown to people


def _show_problems(problems: "tuple[Problem, ...]", complete: bool = True) -> None:
    from dspex_persist.state.store.maintenance import MOST_PROBLEMS

    for problem in problems:
        say(str(problem))
    if not complete:
        say(f"stopped after {MOST_PROBLEMS} problems")


def _show_check(report: "maintenance.CheckReport") -> None:
    _show_problems(report.problems, report.complete)
    end = "its end is what its anchor remembers" if report.anchored else "it has no anchor, so its end is not held"
    if report.problems:
        say(f"{report.path}: {counted(len(report.problems), 'problem')} in {counted(report.commits, 'commit')}")
    else:
        say(f"{report.path} is sound: {counted(report.commits, 'commit')}, schema {report.revision}; {end}")


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
        say(f"backup of before: {report.backup}")


def _show_backup(report: "maintenance.BackupReport") -> None:
    if report.problems:
        _show_problems(report.problems)
        say(f"the copy has {counted(len(report.problems), 'problem')}: {report.target} was not made")
    else:
        size = _size(report.size_bytes)
        say(f"{report.target}: {counted(report.commits, 'commit')}, {size}, checked and sound")


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
        ("of it free pages", _size(report.free_bytes)),
        ("WAL beside it", _size(report.wal_bytes)),
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
