"""A session as `dspex-persist session show` shows it."""

from datetime import datetime
from typing import TYPE_CHECKING, Any

from dspex_persist.cli.output import plain, say

if TYPE_CHECKING:
    from dspex_persist.state.audit import SessionEntry


def document_of(entry: "SessionEntry") -> dict[str, Any]:
    """Return a session as a JSON object; `rules` is None if it has none."""
    from dspex_persist.state.access import ACCESS, OWNER, Access

    access = Access.of(entry.metadata)
    return {
        "session_id": entry.session_id,
        "created_at": entry.created_at.isoformat(),
        "ended_at": None if entry.ended_at is None else entry.ended_at.isoformat(),
        "ttl_s": entry.ttl_s,
        "variables": entry.variables,
        "commits": entry.commits,
        "executions": entry.executions,
        "owner": entry.metadata.get(OWNER),
        "rules": None if access is None else [rule.document() for rule in access.rules],
        "metadata": {key: text for key, text in entry.metadata.items() if key not in (ACCESS, OWNER)},
    }


def show_session(report: dict[str, Any], *, is_utc: bool) -> None:
    """Print a session, with times in UTC or in the local zone."""
    from dspex_persist.cli.audit.rendering import Column, Renderer, Table
    from dspex_persist.cli.audit.tables import entries_text

    look = Renderer(is_utc)
    began, ended = (
        text and look.full_time(datetime.fromisoformat(text)) for text in (report["created_at"], report["ended_at"])
    )
    facts = {
        "session": report["session_id"],
        "began": began,
        "ended": ended,
        "owner": report["owner"],
        "variables": f"{report['variables']:,}",
        "commits": f"{report['commits']:,}",
        "executions": f"{report['executions']:,}",
        "metadata": entries_text(report["metadata"]),
    }
    for name, text in facts.items():
        if text:
            say(f"{name:<12}{plain(text)}")
    rules = report["rules"]
    if rules is None:
        say("rules       none: everybody may use it, within the scopes of their tokens")
        return
    if not rules:
        say("rules       for its owner alone")
        return
    say("rules")
    columns: list[Column[dict[str, Any]]] = [
        Column("who", lambda row: plain(row["who"]), least=10, is_id=True),
        Column("may", lambda row: ", ".join(row["may"])),
        Column("variables", lambda row: plain(row["variables"]), is_id=True),
        Column("tools", lambda row: plain(row["tools"]), is_id=True),
    ]
    Table(look, columns).print(rules)
