"""The same queries get the same answers from the file, from the engine that has it open, and from its server."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from dspex_persist import open_audit
from dspex_persist.audit import (
    AuditSource,
    CommitQuery,
    ExecutionQuery,
    HistoryQuery,
    LmUsageQuery,
    Query,
    SessionQuery,
    UsageBy,
    parse_predicate,
)
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import StateError
from dspex_persist.state.model import ChangeKind, ExecutionStatus, Source
from dspex_persist.state.values import BinaryValue
from dspex_persist.testing.server import ServedDatabase
from tests.store.audit_history import SECRET, make

PICTURE = bytes(range(256))
Ask: TypeAlias = Callable[[AuditSource], Any]


@dataclass
class Sources:
    """The three sources of one history. A file has one owner at a time, so the engine uses a copy."""

    file: AuditSource
    engine: AuditSource
    server: AuditSource


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audit") / "sessions.db"
    make(path)
    with EmbeddedState(path) as state:
        state.register_variable("main", "picture", "tensor", BinaryValue({"format": "raw", "shape": [256]}, PICTURE))
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["masked", "revealed"])
def sources(request: pytest.FixtureRequest, path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sources]:
    reveal = request.param
    copy = tmp_path_factory.mktemp("copy") / "sessions.db"
    copy.write_bytes(path.read_bytes())
    with ExitStack() as stack:
        served = stack.enter_context(ServedDatabase(path, {"audit_reveal": reveal}))
        engine = stack.enter_context(EmbeddedState(copy))
        yield Sources(
            stack.enter_context(open_audit(path, reveal=reveal)),
            stack.enter_context(engine.audit(reveal=reveal)),
            stack.enter_context(open_audit(f"grpc://{served.target}", reveal=reveal)),
        )


def outcome(ask: Ask, source: AuditSource) -> Any:
    """The answer, or the error with its fields."""
    try:
        return ask(source)
    except StateError as error:
        return type(error), vars(error)


def same_answer(ask: Ask, sources: Sources) -> Any:
    """The answer, after checking that all three give the same."""
    from_file = outcome(ask, sources.file)
    assert outcome(ask, sources.engine) == from_file
    assert outcome(ask, sources.server) == from_file
    return from_file


def every(query: Query[Any]) -> Ask:
    return lambda source: list(source.iterate(query))


HISTORY = [
    HistoryQuery(),
    HistoryQuery(newest_first=False),
    HistoryQuery(session="main"),
    HistoryQuery(session="gone", newest_first=False),
    HistoryQuery(session="*n*", variable="t?mp*"),
    HistoryQuery(session="main", variable="temperature"),
    HistoryQuery(session="main", variable="made", newest_first=False),
    HistoryQuery(variable="[odd] name"),
    HistoryQuery(variable="weights"),
    HistoryQuery(session="main", variable="secret"),
    HistoryQuery(type="embedding"),
    HistoryQuery(kind=ChangeKind.DELETED),
    HistoryQuery(kind=ChangeKind.PUBLISHED),
    HistoryQuery(actor="erl"),
    HistoryQuery(source=Source.ELIXIR),
    HistoryQuery(tool="count"),
    HistoryQuery(metadata={"café": "ja"}),
    HistoryQuery(metadata={"step": "1"}, session="main"),
    HistoryQuery(where=(parse_predicate("< 0.5"),)),
    HistoryQuery(where=(parse_predicate(">= 0"), parse_predicate("!= 3"))),
    HistoryQuery(where=(parse_predicate("contains xx"),)),
    HistoryQuery(where=(parse_predicate(f"= {SECRET}"),)),
    HistoryQuery(since="10", until="20"),
    HistoryQuery(since="10^", until="20^", newest_first=False),
    HistoryQuery(since="1h", until="now"),
    HistoryQuery(until="2020-01-01"),
    HistoryQuery(limit=3),
    HistoryQuery(limit=7, newest_first=False),
    HistoryQuery(session="missing"),
    HistoryQuery(session="main", variable="temprature"),
    HistoryQuery(execution_id="exec_1_none"),
    HistoryQuery(since="sometime"),
    HistoryQuery(until="999999"),
]


@pytest.mark.parametrize("query", HISTORY)
def test_history_is_the_same(query: HistoryQuery, sources: Sources) -> None:
    same_answer(every(query), sources)


OTHERS = [
    ExecutionQuery(),
    ExecutionQuery(newest_first=False, children=False),
    ExecutionQuery(session="main", tool="co*"),
    ExecutionQuery(status=ExecutionStatus.FAILED),
    ExecutionQuery(status=ExecutionStatus.CONFLICT),
    ExecutionQuery(idempotency_key="k1"),
    ExecutionQuery(metadata={"user": "ann"}),
    ExecutionQuery(limit=2),
    ExecutionQuery(session="missing"),
    CommitQuery(),
    CommitQuery(newest_first=False, session="gone"),
    CommitQuery(cause="SetVariable", actor="erl"),
    CommitQuery(since="5", limit=4),
    SessionQuery(),
    SessionQuery(live=True),
    SessionQuery(live=False, newest_first=False),
    SessionQuery(session="gon?", metadata={"kind": "old"}),
    SessionQuery(session="mian"),
    LmUsageQuery(),
    LmUsageQuery(by=tuple(UsageBy), newest_first=False),
    LmUsageQuery(by=(), tool="c*", session="m*"),
    LmUsageQuery(session="main", model="m/2", since="10"),
    LmUsageQuery(session="mian"),
]


@pytest.mark.parametrize("query", OTHERS)
def test_executions_commits_sessions_and_usage_are_the_same(query: Query[Any], sources: Sources) -> None:
    same_answer(every(query), sources)


@pytest.mark.parametrize(
    "query", [HISTORY[0], HISTORY[6], HISTORY[15], *OTHERS[:2], *OTHERS[-4:-3], CommitQuery(), SessionQuery()]
)
@pytest.mark.parametrize("most", [1, 3])
def test_pages_continue_where_they_ended(query: Query[Any], most: int, sources: Sources) -> None:
    def pages(source: AuditSource) -> list[Any]:
        rows, after = [], None
        while True:
            page = source.page(query, after, most)
            assert len(page.rows) <= most
            rows += page.rows
            after = page.after
            if after is None:
                return rows

    assert same_answer(pages, sources) == list(sources.file.iterate(query))


@pytest.mark.parametrize(
    "point",
    ["", "now", "7", "7^", "0", "0^", "2h", "1970-01-01", "2999-01-01T00:00Z", "exec_1_x", "12345", "soon", "-1"],
)
def test_points_are_the_same(point: str, sources: Sources) -> None:
    same_answer(lambda source: source.resolve(point), sources)
    same_answer(lambda source: source.resolve(point, "until"), sources)
    for session in ("main", "gone", "missing"):
        same_answer(lambda source, session=session: source.resolve(point, "since", session), sources)


def test_the_head_is_the_same(sources: Sources) -> None:
    assert same_answer(lambda source: source.head(), sources) > 40


def test_execution_details_are_the_same(sources: Sources) -> None:
    ids = [each.execution_id for each in sources.file.iterate(ExecutionQuery())]
    details = [same_answer(lambda source, each=each: source.execution(each), sources) for each in ids]
    for name in ("history", "children", "log", "reads", "writes", "published", "conflicts", "recorded", "parameters"):
        assert any(getattr(detail, name) for detail in details), name
    calls = json.dumps([detail.recorded.get("lm") for detail in details])
    assert (SECRET in calls) is sources.file.reveal
    assert any(detail.failure for detail in details)
    assert any(detail.result is not None for detail in details)
    assert any(len(detail.attempts) > 1 for detail in details)
    for execution_id in ids:
        same_answer(lambda source, point=execution_id: source.resolve(point), sources)
        same_answer(lambda source, point=execution_id: source.resolve(f"{point}^"), sources)
        same_answer(every(HistoryQuery(execution_id=execution_id)), sources)
    same_answer(lambda source: source.execution(f"{ids[0]}x"), sources)


def test_states_differences_and_lineages_are_the_same(sources: Sources) -> None:
    head = sources.file.head()
    for at in ("", "now", "1", str(head // 2), f"{head}^", "0", "99999"):
        for session in ("main", "gone", "missing"):
            same_answer(lambda source, session=session, at=at: source.state(session, at), sources)
    assert same_answer(lambda source: source.diff("main", "12", "now"), sources)
    same_answer(lambda source: source.diff("gone", "2", "now"), sources)
    for variable in ("", "total", "last", "secret", "none"):
        same_answer(lambda source, name=variable: source.blame("main", name, depth=5), sources)


def test_single_versions_are_the_same(sources: Sources) -> None:
    for entry in sources.file.iterate(HistoryQuery(session="main")):
        same_answer(lambda source, e=entry: source.version("main", e.variable_id, e.version), sources)
    same_answer(lambda source: source.version("main", "temperature", 999), sources)
    same_answer(lambda source: source.version("main", "nothing", 0), sources)


def test_binary_contents_are_transmitted(sources: Sources) -> None:
    (entry,) = sources.server.iterate(HistoryQuery(variable="picture"))
    assert entry.value is not None
    assert entry.value.binary == PICTURE


def test_sensitive_values_are_shown_where_allowed(sources: Sources) -> None:
    text = json.dumps([str(row) for row in sources.server.iterate(HistoryQuery(variable="secret"))])
    assert (SECRET in text) == sources.file.reveal
