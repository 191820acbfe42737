"""--follow: polls the log, alongside the server that writes it, and prints new rows until Ctrl-C."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeVar

from dspex_persist.audit import AuditSource, ExecutionQuery, ExecutionSummary, Query
from dspex_persist.cli.hints import text_of
from dspex_persist.errors import DspexError
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.model import ExecutionStatus

if TYPE_CHECKING:
    from dspex_persist.cli.audit.forms import Printer

T = TypeVar("T")

_POLL_S: Final = 0.2


def follow_rows(source: AuditSource, query: Query[T], printer: "Printer[T]", most: int) -> None:
    """Print the newest `most` rows (0: all), oldest first, then new ones as they arrive."""
    with suppress(KeyboardInterrupt):
        seen = source.head()
        printer.print(_past(source, query, seen, most))
        for new in news(source, seen):
            printer.print(_between(source, query, *new))


def follow_executions(
    source: AuditSource, query: ExecutionQuery, printer: "Printer[ExecutionSummary]", most: int
) -> None:
    """Do the same for executions. A running execution is printed again when it has ended."""
    # A running execution may end with any status.
    any_status = replace(query, status=None)
    with suppress(KeyboardInterrupt):
        seen = source.head()
        running = {each.began_sequence for each in source.iterate(_running(query, seen))}
        printer.print(_without_ended(_past(source, query, seen, most), running))
        for new in news(source, seen):
            ended = [each for began in sorted(running) if (each := _ended(source, began)) is not None]
            running -= {each.began_sequence for each in ended}
            begun = list(_between(source, any_status, *new))
            running |= {each.began_sequence for each in begun if each.status is ExecutionStatus.RUNNING}
            printer.print(each for each in (*ended, *begun) if query.status in (None, each.status))


def refuse_end(query: Query[T]) -> None:
    """Raise `InvalidArgumentError` if a query to follow has an end."""
    if query.until:
        raise InvalidArgumentError("until", "--follow has no end: leave out --until")


def _past(source: AuditSource, query: Query[T], head: int, most: int) -> Iterable[T]:
    past = replace(query, until=str(head), newest_first=bool(most), limit=most)
    return reversed(list(source.iterate(past))) if most else source.iterate(past)


def _between(source: AuditSource, query: Query[T], after: int, head: int) -> Iterator[T]:
    return source.iterate(replace(query, since=str(after), until=str(head), newest_first=False, limit=0))


def _running(query: ExecutionQuery, head: int) -> ExecutionQuery:
    return replace(query, status=ExecutionStatus.RUNNING, until=str(head), limit=0)


def _without_ended(rows: Iterable[ExecutionSummary], running: set[int]) -> Iterator[ExecutionSummary]:
    """Yield the rows, and remove from `running` the executions that have ended by now."""
    for row in rows:
        if row.status is not ExecutionStatus.RUNNING:
            running.discard(row.began_sequence)
        yield row


def _ended(source: AuditSource, began: int) -> ExecutionSummary | None:
    """Return the execution that this commit began, or None while it is running."""
    (execution,) = source.page(ExecutionQuery(since=str(began - 1), until=str(began))).rows
    return None if execution.status is ExecutionStatus.RUNNING else execution


def news(source: AuditSource, seen: int) -> Iterator[tuple[int, int]]:
    """Poll forever; yield each range of new commits, as the commit before the range and its last commit."""
    patient = _patient(source.head)
    while True:
        head = patient()
        if head > seen:
            yield seen, head
            seen = head
        time.sleep(_POLL_S)


def _patient(read: Callable[[], int]) -> Callable[[], int]:
    """Return `read` with retries while the server or the file cannot be read; the first error is reported."""

    def read_patiently() -> int:
        is_reported = False
        while True:
            try:
                return read()
            except DspexError as error:
                if not error.retryable:
                    raise
                if not is_reported:
                    print(f"waiting: {text_of(error)}", file=sys.stderr)
                is_reported = True
                time.sleep(_POLL_S)

    return read_patiently
