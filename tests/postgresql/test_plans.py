"""What an answer reads does not grow with the history: the plans of all statements, on a short and on a long one."""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Final, TypeAlias

import pytest

from dspex_persist import clock
from dspex_persist.audit import (
    AuditSource,
    CommitQuery,
    ExecutionQuery,
    HistoryQuery,
    LmUsageQuery,
    Query,
    SessionQuery,
)
from dspex_persist.state.model import ExecutionStatus
from dspex_persist.state.store.history import recordings
from dspex_persist.state.store.history.answers import StoredAudit
from dspex_persist.state.store.history.rows import WINDOW
from dspex_persist.state.store.postgres import cursors
from dspex_persist.state.store.postgres.connections import Database
from dspex_persist.state.store.postgres.postgres_log import PostgresLog
from tests.engines import Databases
from tests.postgresql.large import blocks_in, fill, tables_read

pytestmark = pytest.mark.thorough

SHORT, LONG = 100_000, 1_000_000
S: Final = "s77"
Ask: TypeAlias = Callable[[PostgresLog, AuditSource], Any]


def page(query: Query[Any]) -> Ask:
    return lambda _, audit: audit.page(query, None, 100)


ASKS: Final[dict[str, Ask]] = {
    "head": lambda _, audit: audit.head(),
    "history": page(HistoryQuery()),
    "history, oldest first": page(HistoryQuery(newest_first=False)),
    "history of a session": page(HistoryQuery(session=S)),
    "history of a variable": page(HistoryQuery(session=S, variable="v3")),
    "history of variables": page(HistoryQuery(session=S, variable="v*")),
    "history of sessions": page(HistoryQuery(session="s7*", variable="v*")),
    "history of a name": page(HistoryQuery(variable="v3")),
    "history by metadata": page(HistoryQuery(metadata={"unit": "m"})),
    "history of a session by metadata": page(HistoryQuery(session=S, metadata={"unit": "m"})),
    "history of a type that is not there": page(HistoryQuery(type="string")),
    "history of an actor who is not there": page(HistoryQuery(actor="bob")),
    "history of a tool": page(HistoryQuery(tool="tool3")),
    "history of a session and tool": page(HistoryQuery(session=S, tool="tool3")),
    "history by value": page(HistoryQuery(session=S, where=("< 3",))),
    "history in a range": page(HistoryQuery(session=S, since="50000", until="60000")),
    "executions": page(ExecutionQuery()),
    "executions of a session": page(ExecutionQuery(session=S)),
    "executions of a tool": page(ExecutionQuery(tool="tool3")),
    "executions with a status": page(ExecutionQuery(session=S, status=ExecutionStatus.CONFLICT)),
    "executions with a key": page(ExecutionQuery(session=S, idempotency_key="key77")),
    "commits": page(CommitQuery()),
    "commits of a session": page(CommitQuery(session=S, cause="SetVariable")),
    "sessions": page(SessionQuery()),
    "a session": page(SessionQuery(session=S)),
    "sessions by metadata": page(SessionQuery(metadata={"kind": "1"})),
    "usage of a session": page(LmUsageQuery(session=S)),
    "a time": lambda _, audit: audit.resolve("2023-11-14T22:14:00Z"),
    "a time in a session": lambda _, audit: audit.resolve("2023-11-14T22:14:00Z", "since", S),
    "an execution as a point": lambda _, audit: audit.resolve("exec_76_x"),
    "state": lambda _, audit: audit.state(S, "50000"),
    "differences": lambda _, audit: audit.diff(S, "50000", "60000"),
    "blame": lambda _, audit: audit.blame(S, depth=3),
    "an execution": lambda _, audit: audit.execution("exec_76_x"),
    "a version": lambda _, audit: audit.version(S, "v3", 4),
    "refused calls": lambda _, audit: audit.denials(),
    "a recording": lambda log, _: list(recordings.read_session(log.readers, S)[1]),
    "a hash of a session": lambda log, _: recordings.hash_session(log.readers, S),
    "a fork": lambda log, _: recordings.fork_of(log.readers, S, "new", "50000"),
    "a restore": lambda log, _: recordings.restore_of(log.readers, S, "50000"),
    "loading a session": lambda log, _: log.load(S),
    "expired sessions": lambda log, _: log.expired(clock.now(), 100),
    "executions of dead servers": lambda log, _: log.unfinished(),
    "an outcome": lambda log, _: log.find_outcome(S, "key"),
}


class Reading:
    """A database with a history of some length."""

    def __init__(self, url: str) -> None:
        self.log = PostgresLog(url)
        self.audit = StoredAudit(self.log.readers, reveal=True)
        self._connection = Database(url).connect()

    def blocks_of(self, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> tuple[int, set[str]]:
        """How many blocks the statements of an answer read, and which tables as a whole."""
        asked: list[tuple[str, Any]] = []
        execute = cursors.Cursor.execute

        def note(cursor: cursors.Cursor, query: Any, params: Any = None, **options: Any) -> Any:
            if isinstance(query, str) and query.lstrip().startswith(("SELECT", "WITH")):
                asked.append((query, params))
            return execute(cursor, query, params, **options)

        with monkeypatch.context() as patched:
            patched.setattr(cursors.Cursor, "execute", note)
            ask(self.log, self.audit)
        assert asked
        plans = [self._plan_of(query, params) for query, params in asked]
        return sum(map(blocks_in, plans)), set().union(*map(tables_read, plans))

    def _plan_of(self, query: str, params: Any) -> dict[str, Any]:
        row = self._connection.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}", params).fetchone()
        plan: dict[str, Any] = row[0][0]["Plan"]
        return plan

    def close(self) -> None:
        self._connection.close()
        self.log.close()


@pytest.fixture(scope="module")
def histories(postgres: Databases) -> Iterator[tuple[Reading, Reading]]:
    urls = [postgres.create() for _ in range(2)]
    for url, commits in zip(urls, (SHORT, LONG), strict=True):
        fill(url, commits)
    with closing(Reading(urls[0])) as short, closing(Reading(urls[1])) as long:
        yield short, long
    for url in urls:
        postgres.drop(url)


SMALL = {"denials", "head", "imports", "pruned", "servers", "holds", "execution_servers", "outcomes"}
"""Tables that are empty here, or always small."""
IN_WINDOWS = {
    "history of sessions",
    "history of a name",
    "history of a type that is not there",
    "history of an actor who is not there",
    "history of a tool",
}
"""What no index answers: a page looks through `WINDOW` commits, each with a few blocks, and the next page goes on."""


@pytest.mark.parametrize("what", ASKS)
def test_costs_the_same_in_a_long_history(
    histories: tuple[Reading, Reading], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    short, long = (reading.blocks_of(ASKS[what], monkeypatch) for reading in histories)
    assert long[1] <= SMALL
    most = 5 * WINDOW if what in IN_WINDOWS else 1.5 * short[0] + 200
    assert long[0] <= most, f"{short[0]} blocks of a tenth of the history"
