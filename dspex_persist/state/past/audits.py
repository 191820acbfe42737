"""Audits of sessions in memory. The answers are those that a file with the same commits gives."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from heapq import merge
from itertools import islice, repeat
from typing import Any, Protocol, TypeVar, cast

from dspex_persist.state import journal
from dspex_persist.state.audit import (
    AuditSource,
    CommitEntry,
    CommitQuery,
    Cursor,
    ExecutionDetail,
    ExecutionQuery,
    ExecutionSummary,
    HistoryEntry,
    HistoryQuery,
    Page,
    PointLike,
    Query,
    SessionEntry,
    SessionQuery,
    T,
    VariableState,
    is_glob,
    joined_reasons,
    suggestion,
)
from dspex_persist.state.conditions import holds
from dspex_persist.state.errors import NotInHistoryError, UnsupportedError, VersionNotFoundError
from dspex_persist.state.events import Event, ExecutionBegan, ExecutionEnded
from dspex_persist.state.globs import compile_glob
from dspex_persist.state.journal import attempts_of, check_name, error_text, find_execution
from dspex_persist.state.lm_calls import Ended, LmUsage, LmUsageQuery, usage_of
from dspex_persist.state.masking import Secrets
from dspex_persist.state.model import REASON, Change, ChangeKind, ExecutionStatus, without_reason
from dspex_persist.state.past.sessions import PastCommit, PastExecution, PastSession
from dspex_persist.state.points import living_at, resolve_point
from dspex_persist.state.values.json_text import storable, stored

E = TypeVar("E", bound=Event)
R = TypeVar("R")

_MOST_NAMED = 1_000


class PastLog(Protocol):
    """The sessions that memory has."""

    @property
    def sequence(self) -> int:
        """The number of the last commit."""

    def pasts(self) -> Sequence[PastSession]:
        """Return all sessions whose history is kept, oldest first."""


class PastAudit(AuditSource):
    """The audit source over sessions in memory.

    Args:
        log: Has the sessions.
        check_open: Raises an error if they are not there any more.
        reveal: Whether to show the values of sensitive variables.
    """

    def __init__(self, log: PastLog, check_open: Callable[[], None], *, reveal: bool = False) -> None:
        self.reveal = reveal
        self._log = log
        self._check_open = check_open

    def close(self) -> None:
        """Do nothing: the sessions stay."""

    # Points

    def head(self) -> int:
        """See `AuditSource.head`."""
        self._check_open()
        return self._log.sequence

    def resolve(self, point: PointLike, option: str = "at", session: str = "") -> int:
        """See `AuditSource.resolve`."""
        head = self.head()

        def until(at: datetime) -> int:
            if session:
                return max(past.until(at) for past in self._named(session))
            later = [first for past in self._log.pasts() if (first := past.first_after(at)) is not None]
            return min([first - 1 for first in later], default=head)

        return resolve_point(point, option, head, lambda execution_id: self._executed(execution_id).sequence, until)

    # What there is

    def _named(self, session: str) -> list[PastSession]:
        """Return all sessions that had this id, oldest first."""
        check_name(session)
        pasts = self._log.pasts()
        named = [past for past in pasts if past.session.id == session]
        if not named:
            known = list(dict.fromkeys(past.session.id for past in reversed(pasts)))
            raise NotInHistoryError("session", session, suggestion(session, known[:_MOST_NAMED]))
        return named

    def _matching(self, session: str) -> Sequence[PastSession]:
        """Return the sessions with this id, or those that match the glob; "" matches all."""
        if not session:
            return self._log.pasts()
        if not is_glob(session):
            return self._named(session)
        fits = compile_glob(session)
        return [past for past in self._log.pasts() if fits(past.session.id)]

    def _executed(self, execution_id: str) -> PastExecution:
        pasts = self._log.pasts()
        return find_execution(
            execution_id, lambda began: next(filter(None, (past.execution_begun_by(began) for past in pasts)), None)
        )

    # Pages

    def page(self, query: Query[T], after: Cursor | None = None, most: int = 500) -> Page[T]:
        """See `AuditSource.page`."""
        session = "" if is_glob(query.session) else query.session
        first = self.resolve(query.since, "since", session) if query.since else 0
        last = self.resolve(query.until, "until", session) if query.until else self.head()
        any_query: Any = query
        if isinstance(any_query, LmUsageQuery):
            return cast(Page[T], self._usage_page(any_query, first, last, after, most))
        if after is not None and query.newest_first:
            last = min(last, after[0])
        elif after is not None:
            first = max(first, after[0] - 1)
        match any_query:
            case HistoryQuery():
                page: Page[Any] = self._history_page(any_query, first, last, after, most)
            case ExecutionQuery():
                page = self._execution_page(any_query, first, last, after, most)
            case CommitQuery():
                page = self._commit_page(any_query, first, last, after, most)
            case SessionQuery():
                page = self._session_page(any_query, first, last, after, most)
            case _:
                raise UnsupportedError(f"queries of type {type(query).__name__}")
        return cast(Page[T], page)

    def _usage_page(self, query: LmUsageQuery, first: int, last: int, after: Cursor | None, most: int) -> Page[LmUsage]:
        """Return a page of sums, whose cursor is its place."""
        is_wanted = _matcher(query.tool)
        executions = (
            Ended(past.session.id, each.execution_id, each.began.tool, each.ending.at, each.ended.recorded)
            for past in self._matching(query.session)
            for each in list(past.executions)
            if each.ended is not None and each.ending is not None and first < each.ending.sequence <= last
            if is_wanted(each.began.tool)
        )
        sums = usage_of(query, executions)
        begin = 0 if after is None else after[0]
        end = begin + most
        return Page(sums[begin:end], (end,) if end < len(sums) else None)

    def _commit_page(
        self, query: CommitQuery, first: int, last: int, after: Cursor | None, most: int
    ) -> Page[CommitEntry]:
        rows = (
            ((commit.sequence,), (past, commit))
            for past, commit in self._commits(self._matching(query.session), first, last, query.newest_first)
            if _fits(query.actor, commit.actor) and _fits(query.cause, commit.cause)
        )
        return _page_of(rows, after, most, query.newest_first, lambda row: _commit_entry(*row))

    def _commits(
        self, pasts: Sequence[PastSession], first: int, last: int, newest_first: bool
    ) -> Iterator[tuple[PastSession, PastCommit]]:
        """Iterate over the commits of several sessions in the order of their numbers."""
        commits = (zip(repeat(past), past.between(first, last, newest_first)) for past in pasts)
        return _merged(commits, lambda pair: pair[1].sequence, newest_first)

    def _session_page(
        self, query: SessionQuery, first: int, last: int, after: Cursor | None, most: int
    ) -> Page[SessionEntry]:
        pasts = self._matching(query.session)
        rows = (
            ((past.life.began,), past)
            for past in (reversed(pasts) if query.newest_first else pasts)
            if first < past.life.began <= last
            and query.live in (None, not past.has_ended)
            and query.metadata.items() <= past.session.metadata.items()
        )
        return _page_of(rows, after, most, query.newest_first, _session_entry)

    def _execution_page(
        self, query: ExecutionQuery, first: int, last: int, after: Cursor | None, most: int
    ) -> Page[ExecutionSummary]:
        is_wanted = _matcher(query.tool)
        rows = (
            ((execution.beginning.sequence,), execution)
            for execution in _merged(
                (past.executions_between(first, last, query.newest_first) for past in self._matching(query.session)),
                lambda execution: execution.beginning.sequence,
                query.newest_first,
            )
            if is_wanted(execution.began.tool)
            and query.status in (None, execution.status)
            and _fits(query.actor, execution.beginning.actor)
            and _fits(query.idempotency_key, execution.began.idempotency_key)
            and query.metadata.items() <= execution.began.metadata.items()
            and (query.children or execution.began.parent_id is None)
        )
        return _page_of(rows, after, most, query.newest_first, _summary)

    # The history

    def _history_page(
        self, query: HistoryQuery, first: int, last: int, after: Cursor | None, most: int
    ) -> Page[HistoryEntry]:
        pasts = self._matching(query.session)
        if query.execution_id:
            changes = self._written_by(self._executed(query.execution_id), pasts, first, last, query.newest_first)
        elif query.session and query.variable and not is_glob(query.session + query.variable) and not query.metadata:
            changes = self._of_variables(pasts, query.variable, first, last, query.newest_first)
        else:
            changes = self._changes(pasts, first, last, query.newest_first)
        is_tool, is_name = _matcher(query.tool), _matcher(query.variable)
        rows = (
            ((change.version.sequence, past.place_of(change.variable.id), change.version.version), (past, change))
            for past, change in changes
            if (is_name(change.variable.name) or change.variable.id == query.variable)
            and _fits(query.type, change.variable.type)
            and query.kind in (None, change.version.kind)
            and query.source in (None, change.version.source)
            and _fits(query.actor, change.version.actor)
            and query.metadata.items() <= change.version.metadata.items()
            and (not query.tool or ((maker := _maker(past, change)) is not None and is_tool(maker.began.tool)))
            and self._holds(query, past, change)
        )
        return _page_of(rows, after, most, query.newest_first, lambda row: self._entry(*row))

    def _holds(self, query: HistoryQuery, past: PastSession, change: Change) -> bool:
        """Whether a version fulfils all conditions. Masked values fulfil none, so that a query cannot guess them."""
        if not query.where:
            return True
        value = change.version.value
        if value is None or (not self.reveal and past.is_sensitive(change.variable.id)):
            return False
        return all(holds(cast(Any, each), value.json, change.variable.type) for each in query.where)

    def _changes(
        self, pasts: Sequence[PastSession], first: int, last: int, newest_first: bool
    ) -> Iterator[tuple[PastSession, Change]]:
        for past, commit in self._commits(pasts, first, last, newest_first):
            for change in reversed(commit.changes) if newest_first else commit.changes:
                yield past, change

    def _of_variables(
        self, pasts: Sequence[PastSession], variable: str, first: int, last: int, newest_first: bool
    ) -> Iterator[tuple[PastSession, Change]]:
        """Iterate over the versions of all variables that had this name, or have this id."""
        found = [(past, variable_id) for past in pasts for variable_id in past.ids_of(variable)]
        if not found:
            raise _unknown_variable(pasts, variable)
        changes = (
            zip(repeat(past), past.changes_between(variable_id, first, last, newest_first))
            for past, variable_id in (reversed(found) if newest_first else found)
        )
        return _merged(changes, lambda pair: pair[1].version.sequence, newest_first)

    def _written_by(
        self, execution: PastExecution, pasts: Sequence[PastSession], first: int, last: int, newest_first: bool
    ) -> Iterator[tuple[PastSession, Change]]:
        """Iterate over what it and the executions it called committed at the end, or published before."""
        top, family = execution.top, list(execution.family())
        mine = {written for each in family if each.ended for written in (*each.ended.writes, *each.ended.published)}
        causes = {top.execution_id, *(each.execution_id for each in family)}
        first = max(first, execution.beginning.sequence)
        last = last if top.ending is None else min(last, top.ending.sequence)
        for past, change in self._changes(
            [execution.past] if execution.past in pasts else (), first, last, newest_first
        ):
            is_mine = execution is top or (change.variable.name, change.version.version) in mine
            if change.version.cause in causes and is_mine:
                yield past, change

    def _entry(self, past: PastSession, change: Change) -> HistoryEntry:
        version, variable = change.version, change.variable
        masked = version.value is not None and not self.reveal and past.is_sensitive(variable.id)
        maker = _maker(past, change)
        caller = None if maker is None else maker.parent
        return HistoryEntry(
            past.session.id,
            variable.name,
            variable.id,
            variable.type,
            version.version,
            version.kind,
            None if masked else version.value,
            version.source,
            without_reason(version.metadata),
            version.sequence,
            version.created_at,
            version.actor,
            version.cause,
            None if maker is None else maker.execution_id,
            None if maker is None else maker.began.tool,
            masked,
            None if caller is None else caller.execution_id,
            None if caller is None else caller.began.tool,
            version.reason,
        )

    # Single answers

    def execution(self, execution_id: str) -> ExecutionDetail:
        """See `AuditSource.execution`."""
        execution = self._executed(execution_id)
        history = self.iterate(HistoryQuery(execution_id=execution_id, newest_first=False))
        return _detail(execution, tuple(history), Secrets(()) if self.reveal else execution.past.secrets())

    def state(self, session: str, at: PointLike = "") -> tuple[VariableState, ...]:
        """See `AuditSource.state`."""
        sequence = self.resolve(at, "at", session)
        named = self._named(session)
        past = named[living_at(session, [each.life for each in named], sequence)]
        changes = [past.find_change(variable_id, sequence) for variable_id in list(past.changes)]
        return tuple(
            VariableState.of(self._entry(past, change), change.variable.constraints, change.variable.metadata)
            for change in changes
            if change is not None and change.version.kind is not ChangeKind.DELETED
        )

    def version(self, session: str, variable_id: str, version: int) -> HistoryEntry:
        """See `AuditSource.version`."""
        self._check_open()
        pasts = self._named(session)
        check_name(variable_id)
        found = [(past, each) for past in pasts for each in past.ids_of(variable_id)]
        if not found:
            raise _unknown_variable(pasts, variable_id)
        past, newest = found[-1]
        changes = past.changes[newest]
        if not 0 <= version < len(changes):
            raise VersionNotFoundError(variable_id, version, len(changes) - 1)
        return self._entry(past, changes[version])


def _merged(parts: Iterable[Iterator[R]], key: Callable[[R], int], newest_first: bool) -> Iterator[R]:
    return merge(*parts, key=key, reverse=newest_first)


def _page_of(
    rows: Iterator[tuple[Cursor, R]], after: Cursor | None, most: int, newest_first: bool, convert: Callable[[R], T]
) -> Page[T]:
    """Return the next page of rows, which come with their keys, in the order of these."""
    if after is not None:
        end: Cursor = after
        rows = (row for row in rows if (row[0] < end if newest_first else row[0] > end))
    page = list(islice(rows, most + 1))
    return Page([convert(row) for _, row in page[:most]], page[most - 1][0] if len(page) > most else None)


def _fits(wanted: str, actual: str | None) -> bool:
    return wanted in ("", actual)


def _matcher(wanted: str) -> Callable[[str], bool]:
    """Return whether a name is the wanted one, or matches the glob; "" matches all."""
    if not wanted:
        return lambda _: True
    return compile_glob(wanted) if is_glob(wanted) else wanted.__eq__


def _unknown_variable(pasts: Sequence[PastSession], variable: str) -> NotInHistoryError:
    names = list(dict.fromkeys(name for past in reversed(pasts) for name in past.names()))
    return NotInHistoryError("variable", variable, suggestion(variable, names[:_MOST_NAMED]))


def _maker(past: PastSession, change: Change) -> PastExecution | None:
    """Return the execution that wrote a version. If a transaction ran several, the end of each lists what it wrote."""
    top = past.find_execution(change.version.cause)
    if top is None or not top.children:
        return top
    written = (change.variable.name, change.version.version)
    for event in past.commit(change.version.sequence).events:
        if isinstance(event, ExecutionEnded) and written in event.writes:
            return past.find_execution(event.execution_id)
    return top


def _commit_entry(past: PastSession, commit: PastCommit) -> CommitEntry:
    began = [event.metadata.get(REASON) for event in commit.events if isinstance(event, ExecutionBegan)]
    return CommitEntry(
        commit.sequence,
        past.session.id,
        commit.actor,
        commit.cause,
        commit.at,
        "",
        tuple((change.variable.name, change.version.version) for change in commit.changes),
        tuple(event.kind.value for event in commit.events),
        reason=joined_reasons([*(change.version.reason for change in commit.changes), *began]),
    )


def _session_entry(past: PastSession) -> SessionEntry:
    session, last = past.session, past.commits[-1]
    changes = list(past.changes.values())
    there = [each for each in changes if past.has_ended or each[-1].version.kind is not ChangeKind.DELETED]
    return SessionEntry(
        session.id,
        session.created_at,
        past.life.began,
        past.life.ended,
        last.at if past.has_ended else None,
        last.at,
        session.ttl_s,
        len(there),
        len(past.commits),
        len(past.executions),
        session.metadata,
    )


def _summary(execution: PastExecution) -> ExecutionSummary:
    began, beginning, ended, ending = execution.began, execution.beginning, execution.ended, execution.ending
    return ExecutionSummary(
        execution.past.session.id,
        began.execution_id,
        began.tool,
        execution.status,
        began.attempt,
        beginning.actor,
        beginning.sequence,
        beginning.at,
        None if ending is None else ending.sequence,
        None if ending is None else ending.at,
        None if ended is None else ended.duration_us,
        began.parent_id,
        began.idempotency_key,
        began.worker_id,
        0 if ended is None else len(ended.reads),
        0 if ended is None else len(ended.writes),
        "" if ended is None else error_text(ended.status, ended.failure, ended.reason, ended.conflicts, has_end=True),
    )


def _detail(execution: PastExecution, history: tuple[HistoryEntry, ...], secrets: Secrets) -> ExecutionDetail:
    return journal.detail_of(
        _summary(execution),
        _as_stored(execution.began),
        None if execution.ended is None else _as_stored(execution.ended),
        tuple(each.execution_id for each in attempts_of(execution, _attempt_before, _attempt_after)),
        tuple(_detail(child, (), secrets) for child in execution.children),
        history,
        secrets,
    )


def _attempt_before(execution: PastExecution) -> PastExecution | None:
    retried = execution.began.retry_of
    return None if retried is None else execution.past.find_execution(retried)


def _attempt_after(execution: PastExecution) -> PastExecution | None:
    if execution.status is not ExecutionStatus.CONFLICT:
        return None
    return next((each for each in execution.past.executions if each.began.retry_of == execution.execution_id), None)


def _as_stored(event: E) -> E:
    """Return an event as it is read from a file: what code has recorded in it, such as tuples, is then plain JSON."""
    return event.from_body(stored(storable(event.to_body())))
