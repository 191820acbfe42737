"""Lists of answers: so many of them as are wanted, with what is told below a table; or all that come."""

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
from dspex_persist.state.audit import is_glob, what_there_is
from dspex_persist.state.errors import InvalidArgumentError, NotInHistoryError

if TYPE_CHECKING:
    from dspex_persist.cli.audit.forms import Printer

T = TypeVar("T")

_TABLE_ROWS: Final = 50
_FOLLOWED_ROWS: Final = 10
_TOOLS_LOOKED_AT: Final = 10_000


@dataclass(frozen=True, slots=True)
class Rows(Generic[T]):
    """Answers of one kind: their columns on a terminal, and the commit that says where each stands."""

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


def say_list(audit: AuditSource, query: Query[T], rows: Rows[T], asked: AuditOptions, limit: int | None) -> None:
    """Print at most `limit` answers (0: all; None: as many as suit the form)."""
    refuse_unknown_tool(audit, getattr(query, "tool", ""))
    printer = asked.printer(rows.kind, rows.columns)
    if asked.form is not Form.TABLE:
        printer.print(audit.iterate(replace(query, limit=limit or 0)))
        return
    most = _TABLE_ROWS if limit is None else limit
    below = _Below(rows, query.newest_first)
    printer.print(below.noted(_whole_commits(audit, query, rows, most)))
    say(*below.lines(is_whole=not most or below.printed < most or not _goes_on(audit, query, below.last)))


def _whole_commits(audit: AuditSource, query: Query[T], rows: Rows[T], most: int) -> Iterator[T]:
    """The first `most` answers (0: all), and what else the commit of the last one has: points lie between commits."""
    printed = last = of_last = 0
    for row in audit.iterate(replace(query, limit=most)):
        of_last = of_last + 1 if rows.commit(row) == last else 1
        printed, last = printed + 1, rows.commit(row)
        yield row
    if most and printed == most:
        commit = replace(query, since=str(last - 1), until=str(last), limit=0)
        yield from islice(audit.iterate(commit), of_last, None)


def _goes_on(audit: AuditSource, query: Query[T], last: int) -> bool:
    """Whether there is more beyond the rows of this commit."""
    beyond = replace(query, until=str(last - 1)) if query.newest_first else replace(query, since=str(last))
    return any(True for _ in audit.iterate(replace(beyond, limit=1)))


def states(audit: AuditSource, sessions: str, at: str) -> tuple[list[VariableState], bool]:
    """The variables of a session, or of all that fit a glob and lived then, and whether several were meant."""
    ids = {entry.session_id: None for entry in audit.iterate(SessionQuery(session=sessions, newest_first=False))}
    if not is_glob(sessions) or sessions in ids:
        return list(audit.state(sessions, at)), False
    if not ids:
        raise NotInHistoryError("session", sessions, "no session's id fits that pattern")
    found: list[VariableState] = []
    for session in ids:
        # It may have begun later, or have ended; a point that is none is told of before.
        audit.resolve(at, "at", session)
        with suppress(InvalidArgumentError):
            found += audit.state(session, at)
    return found, True


def refuse_unknown_tool(audit: AuditSource, tool: str) -> None:
    """Raise if no execution ever was one of this tool: it may have been misspelt."""
    if not tool or is_glob(tool) or any(True for _ in audit.iterate(ExecutionQuery(tool=tool, limit=1))):
        return
    names = dict.fromkeys(each.tool for each in audit.iterate(ExecutionQuery(limit=_TOOLS_LOOKED_AT)))
    raise NotInHistoryError("tool", tool, what_there_is(tool, list(names)))


def follow_list(audit: AuditSource, query: Query[T], rows: Rows[T], asked: AuditOptions, limit: int | None) -> None:
    """Print the newest `limit` answers, oldest first, then those that come, until Ctrl-C."""
    refuse_end(query)
    most = (_FOLLOWED_ROWS if asked.form is Form.TABLE else 0) if limit is None else limit
    printer = asked.printer(rows.kind, rows.columns)
    if isinstance(query, ExecutionQuery):
        follow_executions(audit, query, cast("Printer[ExecutionSummary]", printer), most)
    else:
        follow_rows(audit, query, printer, most)


class _Below(Generic[T]):
    """What is told below a table: how numbers went, and how to get what is not in it."""

    def __init__(self, rows: Rows[T], newest_first: bool) -> None:
        self._rows = rows
        self._newest_first = newest_first
        self._courses = Sparklines()
        self.printed = 0
        self.last = 0

    def noted(self, rows: Iterable[T]) -> Iterator[T]:
        """The same rows, looked at on their way."""
        for row in rows:
            self.printed += 1
            self.last = self._rows.commit(row)
            if isinstance(row, HistoryEntry):
                self._courses.add(row)
            yield row

    def lines(self, is_whole: bool) -> Iterator[str]:
        """The lines."""
        yield from self._courses.lines(self._newest_first)
        if not self.printed:
            yield "nothing found"
        elif not is_whole:
            on = f"--until {self.last - 1}" if self._newest_first else f"--since {self.last}"
            shown = counted(self.printed, "row")
            yield f"more than these {shown}: --limit 0 shows all, {on} goes on from here"
