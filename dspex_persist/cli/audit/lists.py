"""Prints lists of answers: a page of them with the notes below its table, or all of them as they arrive."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Final, Generic, TypeVar, cast

from dspex_persist.audit import (
    AuditSource,
    CommitEntry,
    CommitQuery,
    ExecutionQuery,
    ExecutionSummary,
    HistoryEntry,
    HistoryQuery,
    Query,
    SessionEntry,
    SessionQuery,
    VariableState,
)
from dspex_persist.cli.audit.asking import AuditOptions, Form
from dspex_persist.cli.audit.follow import follow_executions, follow_rows, refuse_end
from dspex_persist.cli.audit.rendering import Column, Renderer
from dspex_persist.cli.audit.sparkline import Sparklines
from dspex_persist.cli.audit.tables import commit_columns, execution_columns, history_columns, session_columns
from dspex_persist.cli.output import counted, say
from dspex_persist.state.audit import is_glob, suggestion
from dspex_persist.state.errors import InvalidArgumentError, NotInHistoryError

if TYPE_CHECKING:
    from dspex_persist.cli.audit.forms import Printer

T = TypeVar("T")

TABLE_ROWS: Final = 50
"""How many rows a table has without --limit."""
_FOLLOWED_ROWS: Final = 10
_TOOLS_LOOKED_AT: Final = 10_000


@dataclass(frozen=True, slots=True)
class Rows(Generic[T]):
    """A kind of answer: its type, its columns on a terminal, and the commit that gives a row its position."""

    kind: type[T]
    columns: Callable[[Renderer], Sequence[Column[T]]]
    commit: Callable[[T], int]


def history_rows(query: HistoryQuery) -> Rows[HistoryEntry]:
    """Versions."""
    return Rows(HistoryEntry, lambda look: history_columns(look, query), lambda row: row.sequence)


def execution_rows(query: ExecutionQuery) -> Rows[ExecutionSummary]:
    """Executions."""
    return Rows(ExecutionSummary, lambda look: execution_columns(look, query), lambda row: row.began_sequence)


def commit_rows(query: CommitQuery) -> Rows[CommitEntry]:
    """Commits."""
    return Rows(CommitEntry, lambda look: commit_columns(look, query), lambda row: row.sequence)


SESSION_ROWS: Final = Rows(SessionEntry, session_columns, lambda row: row.started_sequence)


def say_list(audit: AuditSource, query: Query[T], rows: Rows[T], request: AuditOptions, limit: int | None) -> None:
    """Print at most `limit` answers (0: all; None: the default of the output format)."""
    refuse_unknown_tool(audit, getattr(query, "tool", ""))
    printer = request.printer(rows.kind, rows.columns)
    if request.form is not Form.TABLE:
        printer.print(audit.iterate(replace(query, limit=limit or 0)))
        return
    most = TABLE_ROWS if limit is None else limit
    below = _Below(rows, query.newest_first)
    printer.print(below.noted(_whole_commits(audit, query, rows, most)))
    say(*below.lines(is_whole=not most or below.printed < most or not _goes_on(audit, query, below.last)))


def _whole_commits(audit: AuditSource, query: Query[T], rows: Rows[T], most: int) -> Iterator[T]:
    """Yield the first `most` answers (0: all) and the rest of the last one's commit, as points lie between commits."""
    printed = last = of_last = 0
    for row in audit.iterate(replace(query, limit=most)):
        of_last = of_last + 1 if rows.commit(row) == last else 1
        printed, last = printed + 1, rows.commit(row)
        yield row
    if most and printed == most:
        commit = replace(query, since=str(last - 1), until=str(last), limit=0)
        yield from islice(audit.iterate(commit), of_last, None)


def _goes_on(audit: AuditSource, query: Query[T], last: int) -> bool:
    """Return whether there are more rows beyond this commit."""
    beyond = replace(query, until=str(last - 1)) if query.newest_first else replace(query, since=str(last))
    return any(True for _ in audit.iterate(replace(beyond, limit=1)))


def states(audit: AuditSource, sessions: str, at: str) -> tuple[list[VariableState], bool]:
    """Return the variables of a session, or of all live ones that match a glob, and whether it is a glob."""
    ids = {entry.session_id: None for entry in audit.iterate(SessionQuery(session=sessions, newest_first=False))}
    if not is_glob(sessions) or sessions in ids:
        return list(audit.state(sessions, at)), False
    if not ids:
        raise NotInHistoryError("session", sessions, "no session's id matches that pattern")
    variables: list[VariableState] = []
    for session in ids:
        # Raises for an invalid point. After that, an error only means that the session was not live then.
        audit.resolve(at, "at", session)
        with suppress(InvalidArgumentError):
            variables += audit.state(session, at)
    return variables, True


def refuse_unknown_tool(audit: AuditSource, tool: str) -> None:
    """Raise `NotInHistoryError`, with the likely name, if no execution ever ran this tool."""
    if not tool or is_glob(tool) or any(True for _ in audit.iterate(ExecutionQuery(tool=tool, limit=1))):
        return
    names = dict.fromkeys(each.tool for each in audit.iterate(ExecutionQuery(limit=_TOOLS_LOOKED_AT)))
    raise NotInHistoryError("tool", tool, suggestion(tool, list(names)))


def follow_list(audit: AuditSource, query: Query[T], rows: Rows[T], request: AuditOptions, limit: int | None) -> None:
    """Print the newest `limit` answers, oldest first, then new ones as they arrive, until Ctrl-C."""
    refuse_end(query)
    most = (_FOLLOWED_ROWS if request.form is Form.TABLE else 0) if limit is None else limit
    printer = request.printer(rows.kind, rows.columns)
    if isinstance(query, ExecutionQuery):
        follow_executions(audit, query, cast("Printer[ExecutionSummary]", printer), most)
    else:
        follow_rows(audit, query, printer, most)


class _Below(Generic[T]):
    """Collects the notes below a table: sparklines of its numbers, and how to see the remaining rows."""

    def __init__(self, rows: Rows[T], newest_first: bool) -> None:
        self._rows = rows
        self._newest_first = newest_first
        self._sparklines = Sparklines()
        self.printed = 0
        self.last = 0

    def noted(self, rows: Iterable[T]) -> Iterator[T]:
        """Yield the same rows, and collect the notes from them."""
        for row in rows:
            self.printed += 1
            self.last = self._rows.commit(row)
            if isinstance(row, HistoryEntry):
                self._sparklines.add(row)
            yield row

    def lines(self, is_whole: bool) -> Iterator[str]:
        """Yield the lines; `is_whole` says whether the table has all rows."""
        yield from self._sparklines.lines(self._newest_first)
        if not self.printed:
            yield "nothing found"
        elif not is_whole:
            next_page = f"--until {self.last - 1}" if self._newest_first else f"--since {self.last}"
            shown = counted(self.printed, "row")
            yield f"more than these {shown}: --limit 0 shows all, {next_page} continues from here"
