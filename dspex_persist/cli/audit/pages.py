"""dspex-persist audit report and web: the history as one page to mail, and as a website to browse."""

import os
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from dspex_persist.cli.audit.asking import AuditOptions, answering, asking
from dspex_persist.cli.audit.options import Reveal, Since, Target, Until
from dspex_persist.cli.output import say
from dspex_persist.cli.places import Db, database_of, file_of

_PORT_MAX: Final = 65_535

REPORT_HELP: Final = (
    "Write a report about a session: one self-contained HTML page to read, print or mail.\n\n"
    "It shows a timeline of the executions, charts of the numeric variables, what changed, every variable with its "
    "history, which values it was derived from, and the journal with its errors. For a large session it has the newest "
    "part, and says what it left out. It contains no scripts and loads nothing."
)
WEB_HELP: Final = (
    "Serve a website over a database file until Ctrl-C: sessions, charts, lineage, tables to filter, queries.\n\n"
    "It listens on this machine only, and only reads, so a server may have the file open and keep writing. Needs "
    "dspex-persist\\[web]. Prints the address when it is ready."
)


def report(
    session: Annotated[str, typer.Argument(metavar="SESSION", help="The session's id.")],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FILE", help="The file to write, replaced if it exists; -: stdout."),
    ] = Path("report.html"),
    since: Since = "",
    until: Until = "",
    reveal: Reveal = False,
    db: Db = None,
    target: Target = None,
) -> None:
    """Write a session's report."""
    from dspex_persist.audit.report import gather, render
    from dspex_persist.state.store.maintenance import refuse_files_of

    request = AuditOptions(db, target, reveal=reveal)
    if target is None and str(output) != "-":
        with answering(request):
            place = database_of(db)
            if isinstance(place, Path):
                refuse_files_of(place, output, "output")
    with asking(request) as source:
        page = render(gather(source, session, since, until))
        if str(output) == "-":
            sys.stdout.write(page)
            return
        try:
            _write(output, page)
        except OSError as error:
            raise typer.BadParameter(f"{output}: {error.strerror}", param_hint="-o") from error
        say(f"{output}: {len(page) / 1024:,.0f} KiB")


def _write(path: Path, page: str) -> None:
    """Write the file atomically, readable for its owner only, like the database."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.touch(mode=0o600)
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def web(
    db: Db = None,
    port: Annotated[
        int, typer.Option("--port", min=0, max=_PORT_MAX, help="The port on 127.0.0.1; 0: any free port.")
    ] = 0,
    opens: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    reveal: Annotated[
        bool,
        typer.Option("--reveal", help="Show the values of sensitive variables, all tables, and allow SQL of your own."),
    ] = False,
) -> None:
    """Serve the website."""
    from dspex_persist.audit.web import serve_website

    request = AuditOptions(db=db, reveal=reveal)

    def ready(url: str) -> None:
        print(url, flush=True)
        if opens:
            import webbrowser

            webbrowser.open(url)

    with answering(request):
        path = file_of(db, "audit web")
    with asking(request) as source:
        serve_website(path, source, port, ready)
