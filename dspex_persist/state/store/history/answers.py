"""Answer audit queries from the file, each page in a short snapshot.

The most selective condition determines the cost of a query: a variable is found by its key, a session by its commits,
metadata by its index. Only a query without any of these scans the log, a window of commits at a time.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

from sqlalchemy import Connection, Engine

from dspex_persist.state.audit import (
    AuditSource,
    CommitQuery,
    Cursor,
    DenialQuery,
    ExecutionDetail,
    ExecutionQuery,
    HistoryEntry,
    HistoryQuery,
    Page,
    PointLike,
    Query,
    SessionQuery,
    T,
    VariableState,
    is_glob,
)
from dspex_persist.state.denials import Denial
from dspex_persist.state.errors import UnsupportedError, VersionNotFoundError, VersionPrunedError
from dspex_persist.state.lm_calls import LmUsage, LmUsageQuery
from dspex_persist.state.masking import Secrets
from dspex_persist.state.store import damage
from dspex_persist.state.store import variables as stored_variables
from dspex_persist.state.store.engine import name_of, snapshot
from dspex_persist.state.store.history.denials import denials_of
from dspex_persist.state.store.history.execution_rows import execution_row
from dspex_persist.state.store.history.executions import detail_of, execution_page
from dspex_persist.state.store.history.lists import commit_page, session_page
from dspex_persist.state.store.history.points import (
    LAST_VERSION,
    head_of,
    refuse_gap,
    refuse_pruned,
    resolve,
    session_at,
    session_keys,
    variable_keys,
    version_at,
)
from dspex_persist.state.store.history.rows import Bounds, all_rows, records_of
from dspex_persist.state.store.history.secrets import secrets_of
from dspex_persist.state.store.history.usage import usage_of
from dspex_persist.state.store.history.versions import HistoryPage, entry_of, one_version


class StoredAudit(AuditSource):
    """The audit source over a file.

    Args:
        readers: Read-only connections to the file.
        reveal: Whether to show the values of sensitive variables.
        on_close: Called by `close`, to dispose of `readers` if they were opened for this source.
        count_denials: Writes the refused calls that the file does not have yet.
    """

    def __init__(
        self,
        readers: Engine,
        *,
        reveal: bool = False,
        on_close: Callable[[], None] = lambda: None,
        count_denials: Callable[[], None] = lambda: None,
    ) -> None:
        self.reveal = reveal
        self._count_denials = count_denials
        self._readers = readers
        self._usage: tuple[tuple[LmUsageQuery, Bounds], list[LmUsage]] | None = None
        self._on_close = on_close

    def close(self) -> None:
        """Close the file if it was opened for this source."""
        self._on_close()

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[Connection]:
        """Open a snapshot for one answer. Damaged rows fail this answer only."""
        with snapshot(self._readers) as connection:
            try:
                yield connection
            except damage.own_errors():
                raise
            except Exception as error:
                raise damage.unreadable(name_of(self._readers), error) from error

    # Points

    def head(self) -> int:
        """See `AuditSource.head`."""
        with self._snapshot() as connection:
            return head_of(connection)

    def resolve(self, point: PointLike, option: str = "at", session: str = "") -> int:
        """See `AuditSource.resolve`."""
        with self._snapshot() as connection:
            return resolve(connection, point, option, session)

    # Pages

    def page(self, query: Query[T], after: Cursor | None = None, most: int = 500) -> Page[T]:
        """See `AuditSource.page`."""
        any_query: Any = query
        with self._snapshot() as connection:
            session = "" if is_glob(query.session) else query.session
            bounds = Bounds(
                resolve(connection, query.since, "since", session) if query.since else 0,
                resolve(connection, query.until, "until", session) if query.until else head_of(connection),
            )
            match any_query:
                case HistoryQuery():
                    page: Page[Any] = HistoryPage(connection, any_query, bounds, after, most, self.reveal).read()
                case ExecutionQuery():
                    page = execution_page(connection, any_query, bounds, after, most)
                case CommitQuery():
                    page = commit_page(connection, any_query, bounds, after, most)
                case SessionQuery():
                    page = session_page(connection, any_query, bounds, after, most)
                case LmUsageQuery():
                    page = self._usage_page(connection, any_query, bounds, after, most)
                case _:
                    raise UnsupportedError(f"queries of type {type(query).__name__}")
        return cast(Page[T], page)

    def _usage_page(
        self, connection: Connection, query: LmUsageQuery, bounds: Bounds, after: Cursor | None, most: int
    ) -> Page[LmUsage]:
        """Return a page of sums, whose cursor is its place: only all of them together can be computed and sorted."""
        asked = (query, bounds)
        known = self._usage
        if after is None or known is None or known[0] != asked:
            known = self._usage = (asked, usage_of(connection, query, bounds))
        begin = 0 if after is None else after[0]
        end = begin + most
        return Page(known[1][begin:end], (end,) if end < len(known[1]) else None)

    # Single answers

    def denials(self, query: DenialQuery | None = None) -> tuple[Denial, ...]:
        """See `AuditSource.denials`."""
        self._count_denials()
        with self._snapshot() as connection:
            return denials_of(connection, query or DenialQuery())

    def execution(self, execution_id: str) -> ExecutionDetail:
        """See `AuditSource.execution`."""
        history = tuple(self.iterate(HistoryQuery(execution_id=execution_id, newest_first=False)))
        with self._snapshot() as connection:
            row = execution_row(connection, execution_id)
            with damage.reading(row.session_id):
                secrets = Secrets(()) if self.reveal else secrets_of(connection, row.session_key)
                return detail_of(connection, execution_id, history, secrets)

    def state(self, session: str, at: PointLike = "") -> tuple[VariableState, ...]:
        """See `AuditSource.state`."""
        with self._snapshot() as connection:
            sequence = resolve(connection, at, "at", session)
            key = session_at(connection, session, sequence)
            rows = all_rows(
                connection,
                "SELECT variable_key, name, deleted_sequence FROM variables WHERE session_key = ? "
                "ORDER BY variable_key",
                key,
            )
            if not rows:
                refuse_pruned(connection, session, key, sequence)
            states = []
            for variable_key, name, deleted in rows:
                if deleted is None or deleted > sequence:
                    version = version_at(connection, variable_key, sequence)
                    refuse_gap(connection, variable_key, name, version, sequence)
                    if version is not None:
                        states.append(self._state_of(connection, variable_key, version))
            return tuple(states)

    def _state_of(self, connection: Connection, key: int, version: int) -> VariableState:
        row = one_version(connection, key, version)
        (entry,) = records_of((row,), partial(entry_of, reveal=self.reveal))
        return VariableState.of(
            entry,
            stored_variables.constraints_as_of(connection, key, row.sequence, row.constraints),
            stored_variables.metadata_as_of(connection, key, version),
        )

    def version(self, session: str, variable_id: str, version: int) -> HistoryEntry:
        """See `AuditSource.version`."""
        with self._snapshot() as connection:
            key = variable_keys(connection, session_keys(connection, session), variable_id)[-1]
            row = one_version(connection, key, version)
            if row is None:
                latest = version_at(connection, key, LAST_VERSION) or 0
                if 0 <= version < latest:
                    raise VersionPrunedError(variable_id, version)
                raise VersionNotFoundError(variable_id, version, latest)
            return records_of((row,), partial(entry_of, reveal=self.reveal))[0]
