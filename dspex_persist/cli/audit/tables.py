"""The columns of the answers on a terminal. A column that would be the same in each row is left out."""

from collections.abc import Mapping

from dspex_persist.cli.audit.rendering import (
    STYLES,
    WHOLE,
    Column,
    Renderer,
    duration_text,
    json_text,
    short_id,
    value_text,
)
from dspex_persist.cli.output import plain
from dspex_persist.state.audit import (
    CommitEntry,
    CommitQuery,
    ExecutionQuery,
    ExecutionSummary,
    HistoryEntry,
    HistoryQuery,
    SessionEntry,
    VariableState,
    is_glob,
)


def _is_one(name: str) -> bool:
    return bool(name) and not is_glob(name)


def history_columns(look: Renderer, query: HistoryQuery) -> list[Column[HistoryEntry]]:
    """Versions."""
    columns: list[Column[HistoryEntry]] = [
        Column("commit", lambda row: str(row.sequence), least=WHOLE, right=True),
        Column("time", lambda row: look.time(row.created_at), least=look.time_width),
        Column("session", lambda row: plain(row.session_id), least=8, is_id=True),
        Column("variable", lambda row: plain(row.name), least=8),
        Column("v", lambda row: str(row.version), least=WHOLE, right=True),
        Column("value", lambda row: value_text(row.value, row.masked), most=200),
        Column("kind", lambda row: row.kind.value, least=3, style=lambda row: STYLES.get(row.kind, "")),
        Column("by", author, least=13 if look.is_narrow else 20, most=80),
        Column("for", lambda row: plain(row.actor) if row.tool else "", least=6),
        Column("why", lambda row: plain(row.reason or ""), least=6, most=80, is_rare=True),
        Column("metadata", lambda row: entries_text(row.metadata)),
    ]
    left_out = {"session"} if _is_one(query.session) or query.execution_id else set()
    left_out |= {"variable"} if _is_one(query.variable) else set()
    left_out |= {"metadata"} if look.is_narrow else set()
    return [column for column in columns if column.title not in left_out]


def author(row: HistoryEntry | VariableState) -> str:
    """Return the tool execution that wrote a version, and the one that called it; or the client."""
    if not row.tool or not row.execution_id:
        return plain(row.actor)
    called = f", called by {short_id(row.caller_id)} {plain(row.caller_tool or '')}" if row.caller_id else ""
    return f"{short_id(row.execution_id)} {plain(row.tool)}{called}"


def author_and_client(row: HistoryEntry | VariableState) -> str:
    """Return `author`, and the client that had the tool executed."""
    return f"{author(row)}, for {plain(row.actor)}" if row.tool else author(row)


def why(row: HistoryEntry | VariableState) -> str:
    """Return the reason for a change, to follow other facts; "" if there is none."""
    return f", because: {plain(row.reason)}" if row.reason else ""


def entries_text(entries: Mapping[str, str]) -> str:
    """Metadata."""
    return json_text(dict(entries)) if entries else ""


def execution_columns(look: Renderer, query: ExecutionQuery) -> list[Column[ExecutionSummary]]:
    """Executions."""
    columns: list[Column[ExecutionSummary]] = [
        Column("execution", lambda row: short_id(row.execution_id), least=WHOLE),
        Column("began", lambda row: look.time(row.began_at), least=look.time_width),
        Column("session", lambda row: plain(row.session_id), least=8, is_id=True),
        Column("tool", lambda row: ("└ " if row.parent_id else "") + plain(row.tool), least=8),
        Column("status", lambda row: row.status.value, least=9, style=lambda row: STYLES.get(row.status, "")),
        Column("took", lambda row: duration_text(row.duration_us), least=8, right=True),
        Column("reads", lambda row: str(row.reads), least=5, right=True),
        Column("writes", lambda row: str(row.writes), least=6, right=True),
        Column("try", lambda row: str(row.attempt), least=3, right=True),
        Column("by", lambda row: plain(row.actor), least=8),
        Column("error", lambda row: plain(row.error), most=200),
    ]
    left_out = {"session"} if _is_one(query.session) else set()
    left_out |= {"try", "by", "reads", "writes"} if look.is_narrow else set()
    return [column for column in columns if column.title not in left_out]


def commit_columns(look: Renderer, query: CommitQuery) -> list[Column[CommitEntry]]:
    """Commits."""
    columns: list[Column[CommitEntry]] = [
        Column("commit", lambda row: str(row.sequence), least=WHOLE, right=True),
        Column("time", lambda row: look.time(row.created_at), least=look.time_width),
        Column("session", lambda row: plain(row.session_id), least=8, is_id=True),
        Column("actor", lambda row: plain(row.actor), least=8),
        Column("cause", lambda row: cause_text(row.cause), least=8),
        Column("what", _commit_text, least=12, most=200),
        Column("why", lambda row: plain(row.reason or ""), least=6, most=80, is_rare=True),
        Column("hash", lambda row: row.hash[:12], least=12, is_rare=True),
    ]
    left_out = {"session"} if _is_one(query.session) else set()
    left_out |= {"hash"} if look.is_narrow else set()
    return [column for column in columns if column.title not in left_out]


def cause_text(cause: str) -> str:
    """Return the cause of a commit: an rpc, or the short id of an execution."""
    return short_id(cause) if cause.startswith("exec_") else plain(cause)


def _commit_text(row: CommitEntry) -> str:
    changes = (f"{plain(name)} v{version}" for name, version in row.versions)
    pruned = ("rows of it are pruned",) if row.pruned else ()
    return ", ".join((*changes, *row.events, *pruned))


def session_columns(look: Renderer) -> list[Column[SessionEntry]]:
    """Sessions."""
    columns: list[Column[SessionEntry]] = [
        Column("session", lambda row: plain(row.session_id), least=10, most=255, is_id=True),
        Column("began", lambda row: look.time(row.created_at), least=look.time_width),
        Column("last commit", lambda row: look.time(row.last_at), least=look.time_width),
        Column("ended", lambda row: "live" if row.ended_at is None else look.time(row.ended_at), least=look.time_width),
        Column("variables", lambda row: f"{row.variables:,}", right=True, least=9),
        Column("commits", lambda row: f"{row.commits:,}", right=True, least=7),
        Column("executions", lambda row: f"{row.executions:,}", right=True, least=10),
        Column("metadata", lambda row: entries_text(row.metadata)),
    ]
    left_out = {"last commit", "metadata"} if look.is_narrow else set()
    return [column for column in columns if column.title not in left_out]


def state_columns(look: Renderer, is_many: bool = False) -> list[Column[VariableState]]:
    """Variables as of a point; `is_many`: of several sessions."""
    return [
        *(
            [Column[VariableState]("session", lambda row: plain(row.session_id), least=8, is_id=True)]
            if is_many
            else []
        ),
        Column("variable", lambda row: plain(row.name), least=10),
        Column("type", lambda row: row.type, least=5),
        Column("value", lambda row: value_text(row.value, row.masked), least=12, most=200),
        Column("v", lambda row: str(row.version), least=WHOLE, right=True),
        Column("commit", lambda row: str(row.sequence), least=WHOLE, right=True),
        Column("since", lambda row: look.time(row.updated_at), least=look.time_width),
        Column("by", author, least=10),
        Column("why", lambda row: plain(row.reason or ""), least=6, most=80, is_rare=True),
    ]
