"""Lists of answers: so many of them as are wanted, with what is told below a table; or all that come."""

from collections.abc import Callable, Iterable, Iterator, Sequence
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
)
from dspex_persist.cli.audit.asking import Asked, Form
from dspex_persist.cli.audit.follow import follow_executions, follow_rows, refuse_end
from dspex_persist.cli.audit.look import Column, Look
from dspex_persist.cli.audit.sparkline import Courses
from dspex_persist.cli.audit.tables import commit_columns, execution_columns, history_columns, session_columns
from dspex_persist.cli.output import counted, say

if TYPE_CHECKING:
    from dspex_persist.cli.audit.forms import Printer

T = TypeVar("T")

_TABLE_ROWS: Final = 50
_FOLLOWED_ROWS: Final = 10


@dataclass(frozen=True, slots=True)
class Rows(Generic[T]):
    """Answers of one kind: their columns on a terminal, and the commit that says where each stands."""

    kind: type[T]
    columns: Callable[[Look], Sequence[Column[T]]]
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


def say_list(audit: AuditSource, query: Query[T], rows: Rows[T], asked: Asked, limit: int | None) -> None:
    """Print at most `limit` answers (0: all; None: as many as suit the form)."""
    is_table = asked.form is Form.TABLE
    most = (_TABLE_ROWS if is_table else 0) if limit is None else limit
    # One more than is printed: whether there is one is told below the table.
    answers = audit.iterate(replace(query, limit=most + 1 if most else 0))
    below = _Below(rows, query.newest_first)
    asked.printer(rows.kind, rows.columns).print(below.noted(islice(answers, most) if most else answers))
    if is_table:
        say(*below.lines(is_whole=next(answers, None) is None))


def follow_list(audit: AuditSource, query: Query[T], rows: Rows[T], asked: Asked, limit: int | None) -> None:
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
        self._courses = Courses()
        self._printed = 0
        self._last = 0

    def noted(self, rows: Iterable[T]) -> Iterator[T]:
        """The same rows, looked at on their way."""
        for row in rows:
            self._printed += 1
            self._last = self._rows.commit(row)
            if isinstance(row, HistoryEntry):
                self._courses.add(row)
            yield row

    def lines(self, is_whole: bool) -> Iterator[str]:
        """The lines."""
        yield from self._courses.lines(self._newest_first)
        if not self._printed:
            yield "nothing found"
        elif not is_whole:
            on = f"--until {self._last}" if self._newest_first else f"--since {self._last - 1}"
            shown = counted(self._printed, "row")
            yield f"more than these {shown}: --limit 0 shows all, {on} goes on from here"
