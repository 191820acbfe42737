"""What an identity gets to see of histories and of watches, in sessions that have rules.

An answer without what may not be seen is the answer of a history that does not have it: the same errors, the same
pages, and nothing to conclude from where a page ends.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Final, TypeVar, cast

from dspex_persist.infra.access.tokens import Identity
from dspex_persist.state.access import ACCESS, Access, Grants, May, grants_of
from dspex_persist.state.audit import (
    PAGE,
    AuditSource,
    CommitEntry,
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
    point_text,
)
from dspex_persist.state.bridge.access.lives import Lives, life_at
from dspex_persist.state.errors import (
    NotInHistoryError,
    SessionNotFoundError,
    StateError,
    VersionNotFoundError,
    VersionPrunedError,
)
from dspex_persist.state.errors.hints import Hint
from dspex_persist.state.lm_calls import LmUsage, LmUsageQuery, UsageBy, merged
from dspex_persist.state.model import Update, UpdateKind, Variable
from dspex_persist.state.watch import Watch

_CONDITIONS: Final = (
    *("type", "kind", "actor", "source", "tool", "metadata", "where"),
    *("status", "idempotency_key", "cause"),
)
_PATIENCE_S: Final = 2.0
"""How long a page may take: others wait for it."""
_SOME: Final = 50

E = TypeVar("E", bound=StateError)


class Permit:
    """Who asks, for what is answered in pieces.

    Args:
        identity: Who asks.
        lives: Finds the rules.
        note: Notes that it asked about a session that it may not see.
    """

    def __init__(self, identity: Identity, lives: Lives, note: Callable[[str], None]) -> None:
        self._identity = identity
        self._lives = lives
        self._note = note

    def source(self, source: AuditSource) -> AuditSource:
        """Return a history as far as it may be seen."""
        return PermittedSource(source, self._identity, self._lives, self._note)

    def watch(self, watch: Watch, session_id: str) -> Watch:
        """Return a watch as far as it may be seen."""
        return PermittedWatch(watch, session_id, self._identity, self._lives)


PERMIT: Final[ContextVar[Permit | None]] = ContextVar("dspex_persist_permit", default=None)
"""Who asks; None where everything may be seen."""


def absent_id() -> str:
    """Return an id that no session has."""
    return f"absent {secrets.token_hex(16)}"


def renamed(error: E, absent: str, session_id: str) -> E:
    """Give an error about a session that is not there the id that was asked for."""
    for name, text in list(vars(error).items()):
        if isinstance(text, str) and absent in text:
            setattr(error, name, text.replace(absent, session_id))
    error.args = tuple(value for name, value in vars(error).items() if name != "advice")
    return error


class PermittedSource(AuditSource):
    """A history as far as one identity may see it. Used by one thread at a time.

    Args:
        inner: The history.
        identity: Who asks.
        lives: Finds the rules.
        note: Notes that it asked about a session that it may not see.
    """

    def __init__(self, inner: AuditSource, identity: Identity, lives: Lives, note: Callable[[str], None]) -> None:
        self.reveal = inner.reveal
        self._inner = inner
        self._identity = identity
        self._lives = lives
        self._note = note
        self._known: dict[str, Callable[[int], Access | None]] = {}
        self._sums: tuple[LmUsageQuery, list[LmUsage]] | None = None

    def close(self) -> None:
        """See `AuditSource.close`."""
        self._inner.close()

    def head(self) -> int:
        """See `AuditSource.head`."""
        return self._inner.head()

    def resolve(self, point: PointLike, option: str = "at", session: str = "") -> int:
        """See `AuditSource.resolve`."""
        with self._asking(session) as asked:
            self._check_point(point, option)
            return self._inner.resolve(point, option, asked)

    def page(self, query: Query[T], after: Cursor | None = None, most: int = PAGE) -> Page[T]:
        """See `AuditSource.page`."""
        self._known.clear()
        self._check_point(query.since, "since")
        self._check_point(query.until, "until")
        with self._asking("" if is_glob(query.session) else query.session) as asked:
            query = replace(query, session=asked or query.session)
            if isinstance(query, LmUsageQuery):
                return cast(Page[T], self._usage(query, after, most))
            if isinstance(query, HistoryQuery):
                self._check_point(query.execution_id, "execution_id")
            page = self._page(query, after, most)
            if isinstance(query, HistoryQuery) and asked and after is None and not page.rows:
                self._check_variable(asked, query.variable)
            return page

    def _page(self, query: Query[T], after: Cursor | None, most: int) -> Page[T]:
        # Where a page ends must not tell whether something hidden fulfils a condition.
        is_careful = any(getattr(query, name, None) for name in _CONDITIONS)
        patience_until = time.monotonic() + _PATIENCE_S
        kept: list[T] = []
        find_end: Callable[[], Cursor | None] | None = None
        while True:
            page = self._inner.page(query, after, most)
            hides = False
            for place, row in enumerate(page.rows, 1):
                shown = self._shown(row)
                if shown is None or not _fits(query, shown):
                    hides = True
                elif find_end is not None:
                    return Page(kept, find_end())
                else:
                    kept.append(shown)
                    if len(kept) == most:
                        find_end = self._end(query, after, page, place)
            if page.after is None:
                return Page(kept)
            if not (is_careful or hides) or time.monotonic() > patience_until:
                # A page without rows is one of a long search.
                return Page(kept, page.after if find_end is None else find_end())
            after = page.after

    def _end(self, query: Query[T], after: Cursor | None, page: Page[T], place: int) -> Callable[[], Cursor | None]:
        """Return what finds the cursor after a row of a page: only that after the last one is known."""
        if place == len(page.rows):
            return lambda: page.after
        return lambda: self._inner.page(query, after, place).after

    def _shown(self, row: Any) -> Any:
        """Return a row as far as it may be seen; None if it may not."""
        match row:
            case HistoryEntry():
                return row if self._grants(row.session_id, row.sequence).may(May.READ, row.name) else None
            case VariableState():
                return row if self._grants(row.session_id, row.sequence).may(May.READ, row.name) else None
            case ExecutionSummary():
                grants = self._grants(row.session_id, row.began_sequence)
                return row if grants.may_with_all(May.READ) else None
            case CommitEntry():
                return self._commit(row)
            case SessionEntry():
                access = Access.of(row.metadata)
                grants = grants_of(access, self._identity)
                if access is None or grants.everything:
                    return row
                return self._session(row, access, grants) if grants.sees else None
        raise AssertionError(f"rows of type {type(row).__name__} have no rule")

    def _session(self, row: SessionEntry, access: Access, grants: Grants) -> SessionEntry:
        shown = replace(row, metadata=access.shown(row.metadata, grants))
        if grants.may_with_all(May.READ):
            return shown
        at = "" if row.ended_sequence is None else str(row.ended_sequence - 1)
        try:
            names = [each.name for each in self._inner.state(row.session_id, at)]
        except StateError:
            # Its history was pruned.
            names = []
        return replace(shown, variables=sum(grants.may(May.READ, name) for name in names))

    def _commit(self, row: CommitEntry) -> CommitEntry | None:
        # It covers this commit and all before it, of every session: one could try what those that are hidden may say.
        row = replace(row, hash="")
        grants = self._grants(row.session_id, row.sequence)
        if grants.may_with_all(May.READ):
            return row
        versions = tuple(pair for pair in row.versions if grants.may(May.READ, pair[0]))
        if not versions:
            return None
        reason = row.reason if versions == row.versions else None
        return replace(row, versions=versions, events=(), reason=reason)

    def _grants(self, session_id: str, sequence: int) -> Grants:
        state = self._lives.peek(session_id)
        if state is not None and state.session.sequence <= sequence:
            return grants_of(Access.of(state.session.metadata), self._identity)
        access_at = self._known.get(session_id)
        if access_at is None:
            lives = self._lives.all_of(session_id)
            access_at = self._known[session_id] = lambda at: life_at(lives, at)
        return grants_of(access_at(sequence), self._identity)

    def _usage(self, query: LmUsageQuery, after: Cursor | None, most: int) -> Page[LmUsage]:
        """Sum the calls in those sessions of which it may see everything."""
        if after is None or self._sums is None or self._sums[0] != query:
            by = tuple(dict.fromkeys((*query.by, UsageBy.SESSION)))
            sums = list(self._inner.iterate(replace(query, by=by, limit=0)))
            whole: dict[str, bool] = {}
            for each in sums:
                if each.session_id is not None and each.session_id not in whole:
                    lives = self._lives.all_of(each.session_id)
                    grants = [grants_of(life.access, self._identity) for life in lives]
                    whole[each.session_id] = all(one.may_with_all(May.READ) for one in grants)
            self._sums = (query, merged(query, [each for each in sums if whole.get(each.session_id or "")]))
        sums = self._sums[1]
        begin = 0 if after is None else after[0]
        return Page(sums[begin : begin + most], (begin + most,) if begin + most < len(sums) else None)

    def execution(self, execution_id: str) -> ExecutionDetail:
        """See `AuditSource.execution`."""
        with self._plainly():
            detail = self._inner.execution(execution_id)
        summary = detail.summary
        if not self._grants(summary.session_id, summary.began_sequence).may_with_all(May.READ):
            raise _no_execution(execution_id)
        return detail

    def state(self, session: str, at: PointLike = "") -> tuple[VariableState, ...]:
        """See `AuditSource.state`."""
        with self._asking(session) as asked:
            self._check_point(at, "at")
            states = self._inner.state(asked, at)
        self._known.clear()
        return tuple(each for each in states if self._shown(each) is not None)

    def version(self, session: str, variable_id: str, version: int) -> HistoryEntry:
        """See `AuditSource.version`."""
        with self._asking(session) as asked:
            try:
                entry = self._inner.version(asked, variable_id, version)
            except (VersionNotFoundError, VersionPrunedError):
                # The error tells how many versions there are.
                rows = self._inner.page(HistoryQuery(session=asked, variable=variable_id), None, 1).rows
                if any(self._shown(row) is None for row in rows):
                    raise NotInHistoryError("variable", variable_id, "") from None
                raise
            if self._shown(entry) is None:
                raise NotInHistoryError("variable", variable_id, "")
            return entry

    # What is not there

    @contextmanager
    def _asking(self, session: str) -> Iterator[str]:
        """Ask about a session, or about none in its place if it may not be seen."""
        asked = session
        if session and not self._sees_now(session):
            lives = self._lives.all_of(session)
            if lives and not any(grants_of(life.access, self._identity).sees for life in lives):
                asked = absent_id()
                self._note(session)
        with self._plainly():
            try:
                yield asked
            except StateError as error:
                if asked != session:
                    renamed(error, asked, session)
                raise

    def _sees_now(self, session: str) -> bool:
        """Whether it sees the live session in memory, which saves reading the history."""
        state = self._lives.peek(session)
        return state is not None and grants_of(Access.of(state.session.metadata), self._identity).sees

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        """Take the names of other sessions, variables and executions out of errors."""
        try:
            yield
        except NotInHistoryError as error:
            if error.what == "execution":
                raise _no_execution(error.name) from None
            raise NotInHistoryError(error.what, error.name, "") from None

    def _check_variable(self, session: str, variable: str) -> None:
        """Refuse to know a variable of which it may see nothing."""
        if variable and not is_glob(variable):
            rows = self._inner.page(HistoryQuery(session=session, variable=variable), None, _SOME).rows
            if rows and all(self._shown(row) is None for row in rows):
                raise NotInHistoryError("variable", variable, "")

    def _check_point(self, point: PointLike, option: str) -> None:
        """Refuse an execution as a point if its session may not be seen."""
        text = point_text(point, option).strip()
        if not text.startswith("exec_"):
            return
        execution_id = text.removesuffix("^").rstrip()
        number = execution_id.split("_")[1]
        if not (number.isascii() and number.isdecimal() and len(number) < 19):
            return
        began = int(number)
        if not 0 < began <= self._inner.head():
            return
        query = ExecutionQuery(since=str(began - 1), until=str(began))
        for each in self._inner.page(query, None, 1).rows:
            if not self._grants(each.session_id, began).sees:
                raise _no_execution(execution_id)


def _fits(query: Query[Any], shown: Any) -> bool:
    """Whether a session fits a question about its rules by those that are shown: others must not be guessed."""
    if not isinstance(query, SessionQuery) or ACCESS not in query.metadata:
        return True
    return bool(shown.metadata.get(ACCESS) == query.metadata[ACCESS])


def _no_execution(execution_id: str) -> StateError:
    return NotInHistoryError("execution", execution_id, "").advising(Hint.LIST_EXECUTIONS)


class PermittedWatch(Watch):
    """A watch as far as one identity may see it, by the rules that the session has now.

    Args:
        inner: The watch.
        session_id: The session.
        identity: Who watches.
        lives: Finds the rules.
    """

    def __init__(self, inner: Watch, session_id: str, identity: Identity, lives: Lives) -> None:
        self._inner = inner
        self._session_id = session_id
        self._identity = identity
        self._lives = lives
        self._waiting: list[Update] = []
        self._access: Access | None = None
        self.first_sequence = inner.first_sequence
        grants = self._look(self._lives.at(session_id, inner.first_sequence))
        self.initial = tuple(each for each in inner.initial if grants.may(May.OBSERVE, each.name))

    @property
    def position(self) -> int:  # type: ignore[override]
        """See `Watch`."""
        return self._inner.position

    def about(self, variable: Variable) -> str:
        """Return the rules about a variable as JSON; "" if the session has none."""
        access = self._access
        return "" if access is None else access.about(variable.name, access.grants(self._identity))

    def check_continues(self, first_sequence: int) -> None:
        """See `Watch.check_continues`."""
        self._inner.check_continues(first_sequence)

    def pull_ready(self) -> list[Update] | None:
        """See `Watch.pull_ready`."""
        if self._waiting:
            return None
        while True:
            updates = self._inner.pull_ready()
            if updates is None:
                return None
            # After the updates: the rules are at least as new as these.
            state = self._lives.peek(self._session_id)
            if state is None or state.session.sequence != self.first_sequence:
                self._waiting = updates
                return None
            seen = self._permitted(updates, self._look(Access.of(state.session.metadata)))
            if seen or not updates:
                return seen

    def pull(self) -> list[Update]:
        """See `Watch.pull`."""
        while True:
            updates, self._waiting = self._waiting or self._inner.pull(), []
            seen = self._permitted(updates, self._look(self._lives.at(self._session_id, self.first_sequence)))
            if seen or not updates:
                return seen

    def _look(self, access: Access | None) -> Grants:
        self._access = access
        grants = grants_of(access, self._identity)
        if not grants.sees:
            raise SessionNotFoundError(self._session_id)
        return grants

    def _permitted(self, updates: Sequence[Update], grants: Grants) -> list[Update]:
        if grants.everything or not updates:
            return list(updates)
        commits: dict[int, list[Update]] = {}
        for update in updates:
            if (seen := _seen(update, grants)) is not None:
                commits.setdefault(update.sequence, []).append(seen)
        return [
            replace(update, part=(part, len(commit)))
            for commit in commits.values()
            for part, update in enumerate(commit, 1)
        ]

    def notify(self, wake: Callable[[], None]) -> None:
        """See `Watch.notify`."""
        self._inner.notify(wake)

    def close(self) -> None:
        """See `Watch.close`."""
        self._inner.close()


def _seen(update: Update, grants: Grants) -> Update | None:
    if not grants.may(May.OBSERVE, update.variable.name):
        return None
    if update.kind is not UpdateKind.DEPENDENCY_CHANGED:
        return update
    names = [name for name in update.dependency.split(", ") if grants.may(May.OBSERVE, name)]
    return replace(update, dependency=", ".join(names)) if names else None
