"""Audits of sessions in memory answer as those of a file, and of a PostgreSQL database, with the same commits."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Final, TypeAlias
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from dspex_persist import clock
from dspex_persist.audit import (
    AuditSource,
    CommitQuery,
    ExecutionQuery,
    HistoryQuery,
    LmUsageQuery,
    Query,
    SessionQuery,
    UsageBy,
)
from dspex_persist.state import unit_of_work
from dspex_persist.state.commands import (
    AddDependency,
    AddRule,
    BeginExecution,
    CleanupSession,
    Command,
    ConstrainVariable,
    DeleteVariable,
    FinishExecution,
    ImportSession,
    InitializeSession,
    PublishVariable,
    RegisterVariable,
    RollbackVariable,
    SetVariable,
    SetVariables,
    StartOptimization,
    StopOptimization,
)
from dspex_persist.state.commands.executions import Step, Verdict
from dspex_persist.state.errors import StateError
from dspex_persist.state.groups import Groups, Job
from dspex_persist.state.imports import IMPORT, CheckedImport
from dspex_persist.state.local import MemoryLog
from dspex_persist.state.model import ChangeKind, ExecutionStatus, Failure, LogEntry, Origin, Seen, Source, Value
from dspex_persist.state.options import SessionOptions
from dspex_persist.state.past.audits import PastAudit
from dspex_persist.state.past.forks import fork, restore
from dspex_persist.state.past.recordings import record
from dspex_persist.state.shared.shared_groups import SharedGroups
from dspex_persist.state.store.engine import snapshot
from dspex_persist.state.store.history.answers import StoredAudit
from dspex_persist.state.store.postgres.postgres_log import PostgresLog
from dspex_persist.state.store.session_store import SessionStore, StoreOptions, open_groups

BEGINNING: Final = datetime(2026, 3, 1, 12, tzinfo=UTC)
SESSIONS = st.sampled_from(["s", "s", "t"])
NAMES = st.sampled_from(["a", "b", "ab"])
VALUES = st.sampled_from(["1", "2", "3", "2.5", '"on"', '"äö\\n"', '"on\\u0000\\\\u0000"'])
METADATA = st.sampled_from([{}, {}, {"k": "v"}, {"k": "w", "l": "v\0"}, {"sensitive": "True"}, {"sensitive": "no"}])
TYPES = st.sampled_from(["integer", "integer", "float", "string"])
DEFAULTS = {"integer": "1", "float": "2.5", "string": '"on"'}
ACTORS = st.sampled_from(["ada", "bob"])
REASONS = st.sampled_from([None, None, "why not", "because"])


def registered(session: str, name: str, kind: str, metadata: dict[str, str]) -> Command[Any]:
    return RegisterVariable(session, name, kind, Value(DEFAULTS[kind]), "", metadata)


COMMANDS: st.SearchStrategy[Command[Any]] = st.one_of(
    st.builds(InitializeSession, SESSIONS, METADATA),
    st.builds(CleanupSession, SESSIONS),
    st.builds(registered, SESSIONS, NAMES, TYPES, METADATA),
    st.builds(registered, SESSIONS, NAMES, TYPES, METADATA),
    st.builds(SetVariable, SESSIONS, NAMES, st.builds(Value, VALUES), METADATA),
    st.builds(SetVariable, SESSIONS, NAMES, st.builds(Value, VALUES), METADATA),
    st.builds(SetVariables, SESSIONS, st.dictionaries(NAMES, st.builds(Value, VALUES), min_size=1), METADATA),
    st.builds(DeleteVariable, SESSIONS, NAMES),
    st.builds(RollbackVariable, SESSIONS, NAMES, st.integers(0, 3)),
    st.builds(ConstrainVariable, SESSIONS, NAMES, st.sampled_from(["{}", '{"min": 0}', '{"max": 2}'])),
    st.builds(AddDependency, SESSIONS, NAMES, NAMES),
    st.builds(AddRule, SESSIONS, st.just("rule"), st.just("a != 7")),
    st.builds(StartOptimization, SESSIONS, NAMES, st.just("optimizer")),
    st.builds(StopOptimization, SESSIONS, NAMES, st.booleans()),
)
CALLS = st.builds(
    lambda model, question, day, cost, usage, place, outcome: {
        "model": model,
        "request": {"messages": [{"content": question}]},
        "at": day,
        "latency_us": 3,
        "cost": cost,
        "cached": cost == 0,
        place: outcome | {"usage": {"m": usage}} if place == "response" else outcome,
        "usage": {"m": usage},
    },
    st.sampled_from(["m/1", "m/2", None]),
    st.sampled_from(["is it 2.5?", "on", "on\0off"]),
    st.sampled_from([None, 1_772_366_400_000_000, 1_772_452_800_000_000, 2**62]),
    st.sampled_from([None, 0, 0.25, 0.5]),
    st.sampled_from([{}, {"prompt_tokens": 3, "total_tokens": 5}, {"output_tokens": 2}, {"input_tokens": "x"}]),
    st.sampled_from(["response", "error", "other"]),
    st.sampled_from([{}, {"outputs": ["2"]}, {"type": "E", "message": "no"}]),
)
WRITES = st.lists(st.tuples(NAMES, st.integers(0, 9), REASONS), max_size=3)
TOOLS = st.builds(
    SimpleNamespace,
    session=SESSIONS,
    tool=st.sampled_from(["tune", "turn"]),
    writes=WRITES,
    called=st.none() | WRITES,
    publish=st.booleans(),
    end=st.sampled_from(["committed", "committed", "failed", "conflict", "cancelled", None]),
    key=st.sampled_from([None, "key"]),
    metadata=METADATA,
    calls=st.lists(CALLS, max_size=2),
)
MOVES = st.tuples(
    st.sampled_from(["fork", "import", "restore"]), SESSIONS, st.sampled_from(["u", "s"]), st.integers(0, 9)
)
PAUSES = st.sampled_from([-30, 1, 60])
STEPS = st.lists(st.tuples(COMMANDS, ACTORS, REASONS) | st.tuples(TOOLS, ACTORS, REASONS) | MOVES | PAUSES, max_size=40)


class Twins:
    """Groups over memory and over stores, which get the same commands, at the same time, with the same new ids."""

    def __init__(self, *stored: Groups[Any]) -> None:
        self.memory = Groups(MemoryLog(), SessionOptions())
        self.stored = stored
        self.now = BEGINNING
        self._tokens = count()

    def audits(self, *, reveal: bool) -> tuple[AuditSource, AuditSource]:
        """Those of memory and of the last store."""
        memory = PastAudit(self.memory.log, lambda: None, reveal=reveal)
        return memory, StoredAudit(self.stored[-1].log.readers, reveal=reveal)

    def run(self, command: Command[Any], actor: str = "ada", reason: str | None = None, cause: str = "") -> Any:
        """The result of all, or None if all refuse it."""
        origin = Origin(actor, cause or command.cause, Source.PYTHON, reason=reason)
        return self._all(lambda groups: groups.write_group([Job(command, origin)])[0])

    def _all(self, work: Callable[[Groups[Any]], Any]) -> Any:
        begin, outcomes = next(self._tokens), []
        for groups in (self.memory, *self.stored):
            self._tokens = count(begin)
            new_ids: Iterator[str] = (f"{number:012x}" for number in self._tokens)
            with clock.reading(lambda: self.now), patch.object(unit_of_work, "_TOKENS", new_ids):
                outcomes.append(work(groups))
        ours, *others = outcomes
        assert {repr(ours.error)} == {repr(each.error) for each in others}
        return None if ours.error is not None else ours.result

    def live(self, session: str) -> bool:
        return self.memory.log.load(session) is not None

    def execute(self, tool: Any, actor: str, reason: str | None) -> None:
        """An execution, perhaps with another one that it calls."""
        session = tool.session
        begun = self.run(
            BeginExecution(session, tool.tool, {"n": Value("1")}, tool.metadata, idempotency_key=tool.key),
            actor,
            reason,
        )
        if begun is None or begun.snapshot is None:
            return
        child = None
        if tool.called is not None:
            child = self.run(BeginExecution(session, "called", parent_id=begun.execution_id), actor, reason)
        published = []
        if tool.publish:
            done = self.run(
                PublishVariable(session, begun.execution_id, "a", Value("7")), actor, reason, begun.execution_id
            )
            published = [] if done is None else [("a", done[0].version)]
        if tool.end is None:
            return
        status = ExecutionStatus.COMMITTED if tool.end == "conflict" else ExecutionStatus(tool.end)
        steps, children = [], []
        for begins, writes in ((begun, tool.writes), (child, tool.called or ())):
            state = self.memory.log.load(session)
            for name, number, why in writes if begins is not None and state is not None else ():
                variable = state.find(name)
                if variable is not None:
                    write = SetVariable(
                        session, name, Value(f'"{number}"' if variable.type == "string" else str(number))
                    )
                    steps.append(Step(begins.execution_id, write, Source.PYTHON, reason=why))
        if child is not None:
            children.append(Verdict(child.execution_id, ExecutionStatus.COMMITTED, Value("1"), duration_us=5))
        verdict = Verdict(
            begun.execution_id,
            status,
            Value('"done"') if tool.end == "committed" else None,
            Failure("ValueError", "no\nway\0", "trace") if tool.end == "failed" else None,
            {"a": Seen("var", "a", 0), "c": None},
            ("a*",),
            (LogEntry(self.now, "noted", {"n": 1}),),
            {"now": (1, 2), "lm": (*tool.calls, {"request": {"messages": [{"content": "with a of 7"}]}, "hash": "12"})},
            tuple(published),
            duration_us=7,
        )
        stale = {"a": Seen("var_a_other", "a", 99)} if tool.end == "conflict" else {}
        kept = tuple(steps) if status is ExecutionStatus.COMMITTED else ()
        self.run(FinishExecution(session, verdict, tuple(children), kept, stale), actor, reason, begun.execution_id)
        if tool.end == "conflict":
            again = BeginExecution(session, tool.tool, attempt=2, retry_of=begun.execution_id)
            self.run(again, actor, reason)

    def move(self, what: str, session: str, new: str, sequence: int) -> None:
        """Fork, import or restore a session."""
        if not self.live(session):
            return
        past = self.memory.log.past_of(session)
        sequence = min(past.commits[0].sequence + sequence, self.memory.log.sequence)
        if what == "fork":
            self.run(fork(past, new, sequence))
        elif what == "restore":
            self.run(restore(past, str(sequence), sequence))
        else:
            header, commits = record(past, tuple(past.commits), {}, started=None, reveal=True, after=0)
            kept = list(commits)
            self._all(lambda groups: _imported(groups, header, kept, new))


def _imported(groups: Groups[Any], header: Any, commits: Any, new: str) -> Any:
    outcomes: list[Any] = []

    def submit(command: ImportSession) -> Future[Any]:
        outcomes.extend(groups.write_group([Job(command, IMPORT)]))
        done = Future[Any]()
        done.set_result(None)
        return done

    importing = CheckedImport(header, groups.options, new, submit)
    for commit in commits:
        importing.add(commit)
    importing.finish()
    return outcomes[0]


Ask: TypeAlias = Callable[[AuditSource], Any]


def every(query: Query[Any]) -> Ask:
    return lambda source: list(source.iterate(query))


def paged(query: Query[Any], most: int) -> Ask:
    """All rows, in small pages."""

    def ask(source: AuditSource) -> list[Any]:
        rows, after = [], None
        while True:
            page = source.page(query, after, most)
            rows += page.rows
            after = page.after
            if after is None:
                return rows

    return ask


QUERIES: Final[list[Query[Any]]] = [
    HistoryQuery(),
    HistoryQuery(session="s"),
    HistoryQuery(session="s", variable="a"),
    HistoryQuery(session="?", variable="a*"),
    HistoryQuery(session="s", variable="a", metadata={"k": "v"}),
    HistoryQuery(variable="ab"),
    HistoryQuery(session="s", variable="missing"),
    HistoryQuery(type="string"),
    HistoryQuery(kind=ChangeKind.DELETED),
    HistoryQuery(actor="bob"),
    HistoryQuery(source=Source.ELIXIR),
    HistoryQuery(tool="t*", session="s"),
    HistoryQuery(tool="called"),
    HistoryQuery(metadata={"dspex.reason": "because"}),
    HistoryQuery(where=("< 2.1",)),
    HistoryQuery(where=("!= on", "contains n")),
    HistoryQuery(since="3", until="12", limit=4),
    HistoryQuery(session="s", since="2026-03-01T12:01:00Z"),
    ExecutionQuery(),
    ExecutionQuery(session="s", tool="tu*", children=False),
    ExecutionQuery(status=ExecutionStatus.CONFLICT),
    ExecutionQuery(idempotency_key="key", actor="ada"),
    ExecutionQuery(metadata={"k": "v"}),
    CommitQuery(),
    CommitQuery(session="s", cause="SetVariable"),
    CommitQuery(actor="bob", since="2", limit=5),
    SessionQuery(),
    SessionQuery(live=True),
    SessionQuery(session="s", live=False),
    SessionQuery(session="*", metadata={"k": "v"}),
    SessionQuery(session="tt"),
    LmUsageQuery(),
    LmUsageQuery(by=()),
    LmUsageQuery(by=tuple(UsageBy)),
    LmUsageQuery(by="tool", session="s", since="4"),
    LmUsageQuery(by=("day", "session"), tool="tu*", until="9"),
    LmUsageQuery(model="m/?", limit=1),
]
POINTS = ("", "now", "3", "3^", "999", "soon", "exec_2", "exec_2_none", "2026-03-01T12:00:59Z", "2026-03-01T12:01:01Z^")


def questions(memory: AuditSource, head: int) -> Iterator[Ask]:
    yield lambda source: source.head()
    for query in QUERIES:
        yield every(query)
        yield every(replace(query, newest_first=False))
    for query in (
        HistoryQuery(),
        HistoryQuery(session="s", variable="a"),
        ExecutionQuery(),
        CommitQuery(),
        SessionQuery(),
        LmUsageQuery(by=tuple(UsageBy)),
    ):
        yield paged(query, 2)
        yield paged(replace(query, newest_first=False), 3)
    for point in POINTS:
        yield lambda source, point=point: source.resolve(point)
        yield lambda source, point=point: source.resolve(point, "since", "s")
    for sequence in range(head + 1):
        yield lambda source, at=str(sequence): source.state("s", at)
    yield lambda source: source.diff("s", "4", "now")
    yield lambda source: source.blame("s", depth=3)
    yield lambda source: source.blame("t", "a")
    for execution in memory.iterate(ExecutionQuery()):
        yield lambda source, each=execution.execution_id: source.execution(each)
        yield lambda source, each=execution.execution_id: source.resolve(f"{each}^")
        yield every(HistoryQuery(execution_id=execution.execution_id, session="s"))
    for entry in memory.iterate(HistoryQuery(session="?", variable="a", limit=5)):
        yield lambda source, e=entry: source.version(e.session_id, e.variable_id, e.version)
        yield lambda source, e=entry: source.version(e.session_id, e.name, e.version + 100)


def outcome(ask: Ask, source: AuditSource) -> Any:
    """The answer without the hashes, which memory has not; or the error with its fields."""
    try:
        answer = ask(source)
    except StateError as error:
        return type(error), vars(error)
    is_commits = isinstance(answer, list) and answer and hasattr(answer[0], "hash")
    return [replace(each, hash="") for each in answer] if is_commits else answer


def compare(steps: list[Any], *stored: Groups[Any]) -> None:
    twins = Twins(*stored)
    for each in (InitializeSession("s"), InitializeSession("t"), registered("s", "a", "integer", {})):
        twins.run(each)
    for step in steps:
        match step:
            case int():
                twins.now += timedelta(seconds=step)
            case (str(), *_):
                twins.move(*step)
            case (SimpleNamespace(), actor, reason):
                twins.execute(step[0], actor, reason)
            case _:
                twins.run(*step)
    for reveal in (False, True):
        memory, audit = twins.audits(reveal=reveal)
        with clock.reading(lambda: twins.now):
            for ask in questions(memory, memory.head()) if not reveal else list(questions(memory, 0))[::7]:
                assert outcome(ask, memory) == outcome(ask, audit)


@settings(max_examples=30)
@given(STEPS)
def test_a_file_answers_as_memory_does(steps: list[Any]) -> None:
    with TemporaryDirectory() as folder, closing(open_file(folder)) as file:
        compare(steps, file)


class TestPostgreSQL:
    def check(self, url: str, steps: list[Any]) -> None:
        """Also that the views of the database have the same rows as those of a file."""
        with closing(PostgresLog(url)) as log:
            empty(log.readers)
        database = SharedGroups(PostgresLog(url, durability="normal"), SessionOptions())
        with TemporaryDirectory() as folder, closing(open_file(folder)) as file, closing(database):
            compare(steps, file, database)
            of_file, of_database = (rows_of_views(groups.log.readers) for groups in (file, database))
            for view, (columns, rows) in of_file.items():
                assert (columns, rows - of_database[view][1]) == (of_database[view][0], Counter())
                assert rows == of_database[view][1]

    @settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(STEPS)
    def test_answers_as_memory_does(self, postgresql_url: str, steps: list[Any]) -> None:
        self.check(postgresql_url, steps)

    @pytest.mark.thorough
    @settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(STEPS)
    def test_answers_as_memory_does_always(self, postgresql_url: str, steps: list[Any]) -> None:
        self.check(postgresql_url, steps)


def open_file(folder: str) -> Groups[SessionStore]:
    return open_groups(Path(folder) / "sessions.db", StoreOptions(durability="normal"))


def empty(engine: Engine) -> None:
    """Make a database new, which is faster than creating another one."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT", postgresql_readonly=False) as connection:
        connection.execute(text("SET session_replication_role = replica"))
        tables = connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"))
        for table in set(tables) - {"alembic_version", "head"}:
            connection.execute(text(f"DELETE FROM {table}"))
        connection.execute(
            text(
                "UPDATE head SET sequence = 0, hash = :hash, last_at = 0, next_session_key = 1, next_variable_key = 1"
            ),
            {"hash": bytes(32)},
        )


VIEWS: Final = (
    "v_commits",
    "v_current_variables",
    "v_execution_reads",
    "v_execution_writes",
    "v_executions",
    "v_lm_calls",
    "v_lm_usage",
    "v_rules",
    "v_variable_history",
)


# What a file says of executions that have not ended, with some releases of SQLite, and of a time after the year 9999.
ODD_TEXTS: Final = ("its entry in the journal is no JSON; dspex-persist audit show reads it", ".387904Z")


def rows_of_views(readers: Engine) -> dict[str, tuple[tuple[str, ...], Counter[Any]]]:
    """The columns of each view, and its rows in any order."""
    found = {}
    with snapshot(readers) as connection:
        for view in VIEWS:
            rows = connection.execute(text(f"SELECT * FROM {view}"))
            found[view] = tuple(rows.keys()), Counter(tuple(map(plain, row)) for row in rows)
    return found


def plain(value: Any) -> Any:
    """A flag of PostgreSQL is a number in a file, and an integral sum may be one of another type."""
    if isinstance(value, bool | Decimal):
        return int(value)
    if isinstance(value, str):
        # SQLite cuts such a text there, PostgreSQL shows another character.
        return None if value in ODD_TEXTS else value.replace("\ufffd", "\0").partition("\0")[0]
    return value
