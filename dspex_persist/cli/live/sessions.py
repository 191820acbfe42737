"""dspex-persist sessions: list and end the live ones."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from dspex_persist.cli import completing
from dspex_persist.cli.groups import Json, carry_out, new_group
from dspex_persist.cli.live.opening import Place
from dspex_persist.cli.live.options import Actor, Target
from dspex_persist.cli.output import counted, plain, say
from dspex_persist.cli.places import Db

if TYPE_CHECKING:
    from dspex_persist.state.audit import SessionEntry

HELP: Final = "List live sessions, and end some; session (without s) exports, imports and forks one."
EPILOG: Final = (
    "[bold]Examples[/bold]\n\n"
    "dspex-persist sessions list --target 127.0.0.1:50051\n\n"
    "dspex-persist sessions list 'checkout-*' --json\n\n"
    "dspex-persist sessions end checkout-42 checkout-43 --target 127.0.0.1:50051\n\n"
    "[bold]Exit codes[/bold]\n\n"
    "0  success, also without any sessions\n\n"
    "1  no such session, or the server cannot be reached\n\n"
    "2  wrong usage, or an invalid setting\n\n"
    "4  end: another process, such as a server, has the file open\n\n"
    "5  no such file, not a dspex-persist database, another schema, or acknowledged commits are missing\n\n"
    "With --json, stdout has exactly one JSON object, also after an error; the exit codes are the same.\n\n"
)

app = new_group(HELP, EPILOG)


@app.command(
    "list",
    help=(
        "List the live sessions, the one that changed last first.\n\n"
        "audit sessions lists those that have ended, too.\n\n"
    ),
)
def list_(
    glob: Annotated[
        str,
        typer.Argument(
            metavar="GLOB", help="Ids with * and ?.", show_default=False, autocompletion=completing.sessions
        ),
    ] = "",
    db: Db = None,
    target: Target = None,
    as_json: Json = False,
) -> None:
    """List live sessions."""
    place = Place.of(target, db)

    def work(_: object) -> dict[str, Any]:
        from dspex_persist.state.audit import SessionQuery

        with place.history() as source:
            sessions = list(source.iterate(SessionQuery(session="" if glob == "*" else glob, live=True)))
        sessions.sort(key=lambda each: (each.last_at, each.started_sequence), reverse=True)
        return {"sessions": [_document(each) for each in sessions] if as_json else sessions}

    carry_out(as_json, work, lambda report: _show(report["sessions"]))


def _document(session: "SessionEntry") -> dict[str, Any]:
    return {
        "session_id": session.session_id,
        "created_at": session.created_at.isoformat(),
        "last_at": session.last_at.isoformat(),
        "variables": session.variables,
        "commits": session.commits,
        "executions": session.executions,
        "ttl_s": session.ttl_s,
        "metadata": dict(session.metadata),
    }


def _show(sessions: "Sequence[SessionEntry]") -> None:
    from dspex_persist.cli.audit.rendering import Column, Renderer, Table
    from dspex_persist.cli.audit.tables import entries_text

    if not sessions:
        say("no live sessions")
        return
    look = Renderer(is_utc=False)
    columns: list[Column[SessionEntry]] = [
        Column("session", lambda row: plain(row.session_id), least=10, most=255, is_id=True),
        Column("last change", lambda row: look.time(row.last_at), least=look.time_width),
        Column("variables", lambda row: f"{row.variables:,}", right=True, least=9),
        Column("commits", lambda row: f"{row.commits:,}", right=True, least=7),
        Column("executions", lambda row: f"{row.executions:,}", right=True, least=10),
        Column("metadata", lambda row: entries_text(row.metadata)),
    ]
    Table(look, columns).print(sessions)


@app.command(
    "end",
    help=(
        "End sessions. Their history stays, and a new session may have the same id.\n\n"
        "If one of them is not live, none is ended. A running server owns its file: reach it with --target.\n\n"
    ),
)
def end(
    sessions: Annotated[
        list[str],
        typer.Argument(metavar="SESSION", help="Their ids.", show_default=False, autocompletion=completing.sessions),
    ],
    actor: Actor = None,
    db: Db = None,
    target: Target = None,
    as_json: Json = False,
) -> None:
    """End sessions."""
    place = Place.of(target, db)

    def work(_: object) -> dict[str, Any]:
        from dspex_persist.state.commands import CleanupSession, GetSession

        ids = list(dict.fromkeys(sessions))
        with place.opened() as state:
            for session in ids:
                with place.explaining(session):
                    state.run(GetSession(session))
            ended = {session: state.run(CleanupSession(session), actor=actor) for session in ids}
        return {"ended": [{"session_id": session, "variables": count} for session, count in ended.items()]}

    def show(report: dict[str, Any]) -> None:
        for each in report["ended"]:
            say(f"session {plain(each['session_id'])} ended, with {counted(each['variables'], 'variable')}")

    carry_out(as_json, work, show)
