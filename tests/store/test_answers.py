"""The answers of an audit, compared with a plain reading of the whole log, without indexes and pages."""

import io
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from freezegun import freeze_time

from dspex_persist import Toolbox, ToolContext, clock, open_audit, tool
from dspex_persist.audit import (
    AuditSource,
    CommitQuery,
    DifferenceKind,
    ExecutionQuery,
    HistoryQuery,
    Operator,
    Predicate,
    SessionQuery,
    document,
    parse_predicate,
)
from dspex_persist.state.commands import ExecuteTool
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import (
    EngineClosedError,
    InvalidArgumentError,
    NotADatabaseError,
    NotInHistoryError,
    SessionExistsError,
    VersionNotFoundError,
    VersionPrunedError,
)
from dspex_persist.state.model import ChangeKind, ExecutionStatus, Source
from dspex_persist.state.recording import write_recording
from dspex_persist.state.store.history import rows as stored_rows
from dspex_persist.state.store.history import versions
from dspex_persist.state.store.variables import KINDS, SOURCES
from dspex_persist.testing.contract_tools import CONTRACT_TOOLS
from dspex_persist.wiring.recordings import import_session
from tests.deadline import within
from tests.store.audit_history import SECRET, make


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audit") / "sessions.db"
    make(path)
    return path


@pytest.fixture(scope="module")
def audit(path: Path) -> Iterator[AuditSource]:
    with open_audit(path) as audit:
        yield audit


@pytest.fixture(scope="module")
def rows(path: Path) -> list[dict[str, Any]]:
    """Return all versions with all their facts, in the order of commits."""
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        versions = connection.execute(
            """
            SELECT s.session_id, x.name, x.variable_id, x.type, v.*, c.actor, c.cause, c.created_at, b.content,
                x.metadata AS merged
            FROM versions v, variables x, sessions s, commits c LEFT JOIN blobs b ON b.blob_key = v.value_blob
            WHERE v.variable_key = x.variable_key AND x.session_key = s.session_key AND c.sequence = v.sequence
            """
        ).fetchall()
        executions = {row["execution_id"]: row for row in connection.execute("SELECT * FROM executions")}
        ends = connection.execute("SELECT sequence, body FROM events WHERE kind = 'execution_ended'").fetchall()
        makers = {
            (sequence, *written): body["execution_id"]
            for sequence, body in ((row["sequence"], json.loads(row["body"])) for row in ends)
            for written in body.get("writes", ())
        }
    entries = [dict(row) for row in versions]
    for row in entries:
        row["text"] = row["content"].decode() if row["content"] is not None else row["value"]
        maker = executions.get(makers.get((row["sequence"], row["name"], row["version"]), row["cause"]))
        caller = executions[maker["parent_id"]] if maker is not None and maker["parent_id"] is not None else None
        row["execution_id"], row["tool"] = (maker["execution_id"], maker["tool"]) if maker is not None else (None, None)
        row["caller"] = (caller["execution_id"], caller["tool"]) if caller is not None else (None, None)
        row["metadata"] = json.loads(row["metadata"] or "{}")
        row["sensitive"] = json.loads(row["merged"]).get("sensitive") == "true"
    return sorted(entries, key=lambda row: (row["sequence"], row["variable_key"], row["version"]))


def keys_of(entries: Any) -> list[tuple[int, str, int]]:
    return [(entry.sequence, entry.name, entry.version) for entry in entries]


# History


@dataclass(frozen=True)
class Filter:
    """A part of a query, and the condition on a row that it stands for."""

    query: dict[str, Any]
    holds: Callable[[dict[str, Any]], bool]


def number_of(row: dict[str, Any]) -> float | None:
    value = json.loads(row["text"]) if row["text"] is not None else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def shown(row: dict[str, Any]) -> bool:
    return row["text"] is not None and not row["sensitive"]


def _anything(_row: dict[str, Any]) -> bool:
    return True


WHAT = [
    Filter({}, _anything),
    Filter({"variable": "temperature"}, lambda row: row["name"] == "temperature"),
    Filter({"variable": "t*"}, lambda row: row["name"].startswith("t")),
    Filter({"variable": "[odd]*"}, lambda row: row["name"] == "[odd] name"),
    Filter({"variable": "m?de"}, lambda row: row["name"] == "made"),
    Filter({"variable": "made"}, lambda row: row["name"] == "made"),
]
WHERE = [
    Filter({}, _anything),
    Filter({"session": "main"}, lambda row: row["session_id"] == "main"),
    Filter({"session": "gone"}, lambda row: row["session_id"] == "gone"),
    Filter({"session": "*n*"}, lambda row: fnmatchcase(row["session_id"], "*n*")),
]
HOW = [
    Filter({}, _anything),
    Filter({"type": "float"}, lambda row: row["type"] == "float"),
    Filter({"kind": ChangeKind.PUBLISHED}, lambda row: KINDS[row["kind"]] is ChangeKind.PUBLISHED),
    Filter({"actor": "erl"}, lambda row: row["actor"] == "erl"),
    Filter({"source": Source.PYTHON}, lambda row: SOURCES[row["source"]] is Source.PYTHON),
    Filter({"tool": "count"}, lambda row: row["tool"] == "count"),
    Filter({"metadata": {"step": "1"}}, lambda row: row["metadata"].get("step") == "1"),
    Filter(
        {"metadata": {"café": "ja", "step": "2"}},
        lambda row: row["metadata"].items() >= {"café": "ja", "step": "2"}.items(),
    ),
    Filter(
        {"where": (parse_predicate("< 0.5"),)},
        lambda row: shown(row) and (number := number_of(row)) is not None and number < 0.5,
    ),
    Filter(
        {"where": (parse_predicate(">= 0.3"), parse_predicate("!= 0.5"))},
        lambda row: shown(row) and (number := number_of(row)) is not None and number >= 0.3 and number != 0.5,
    ),
    Filter({"where": (parse_predicate("= anew"),)}, lambda row: shown(row) and row["text"] == '"anew"'),
    Filter({"where": (parse_predicate("contains xxx"),)}, lambda row: shown(row) and "xxx" in row["text"]),
    Filter({"since": "10", "until": "20"}, lambda row: 10 < row["sequence"] <= 20),
]


@pytest.mark.parametrize("page", [1, 3, 500])
def test_history_equals_a_plain_reading_of_the_log(
    audit: AuditSource, rows: list[dict[str, Any]], page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every combination of conditions, in both orders, in pages of any size."""
    monkeypatch.setattr("dspex_persist.state.audit.PAGE", page)
    # As for a long log: no page scans more commits than this.
    monkeypatch.setattr(versions, "WINDOW", 7)
    answered = 0
    for what, where, how in product(WHAT, WHERE, HOW):
        query = HistoryQuery(**what.query, **where.query, **how.query)
        expected = [
            (row["sequence"], row["name"], row["version"])
            for row in rows
            if what.holds(row) and where.holds(row) and how.holds(row)
        ]
        if not expected and _is_never_had(audit, query):
            continue
        actual = keys_of(audit.iterate(query))
        assert actual == expected[::-1], query
        assert keys_of(audit.iterate(replace(query, newest_first=False))) == expected, query
        assert keys_of(audit.iterate(replace(query, limit=2))) == expected[::-1][:2], query
        answered += bool(expected)
    assert answered > 100


def _is_never_had(audit: AuditSource, query: HistoryQuery) -> bool:
    """Whether it names a variable that the named session never had, which is an error instead of an empty answer."""
    try:
        next(audit.iterate(query), None)
    except NotInHistoryError:
        return True
    return False


def test_an_entry_has_every_fact_of_the_log(audit: AuditSource, rows: list[dict[str, Any]]) -> None:
    entries = list(audit.iterate(HistoryQuery(newest_first=False)))
    for entry, row in zip(entries, rows, strict=True):
        text = None if entry.value is None else entry.value.json
        assert text == (None if row["sensitive"] else row["text"])
        assert entry.masked == (row["sensitive"] and row["text"] is not None)
        for name in ("session_id", "variable_id", "type", "version", "actor", "cause", "sequence", "metadata"):
            assert getattr(entry, name) == row[name], name
        assert (entry.kind, entry.source) == (KINDS[row["kind"]], SOURCES[row["source"]])
        assert entry.created_at == datetime.fromtimestamp(0, UTC) + timedelta(microseconds=row["created_at"])
        assert (entry.tool, entry.execution_id) == (row["tool"], row["execution_id"])
        assert (entry.caller_id, entry.caller_tool) == row["caller"]


def test_large_and_binary_values_are_there(audit: AuditSource) -> None:
    (odd,) = audit.iterate(HistoryQuery(session="main", variable="[odd] name"))
    assert odd.value is not None
    assert json.loads(odd.value.json) == "x" * 3_000


# Sensitive variables


def test_sensitive_values_are_masked_unless_revealed(path: Path, audit: AuditSource) -> None:
    def everything(source: AuditSource) -> str:
        documents = [document(entry) for entry in source.iterate(HistoryQuery())]
        documents += [document(state) for state in source.state("main")]
        documents += [document(node) for node in source.blame("main", depth=9)]
        documents += [document(change) for change in source.diff("main", "12")]
        documents += [document(source.execution(each.execution_id)) for each in source.iterate(ExecutionQuery())]
        documents += [document(entry) for entry in source.iterate(CommitQuery())]
        return json.dumps(documents)

    assert SECRET not in everything(audit)
    assert not list(audit.iterate(HistoryQuery(where=(parse_predicate(f"contains {SECRET[:4]}"),))))
    with open_audit(path, reveal=True) as open_book:
        assert SECRET in everything(open_book)
        keys = keys_of(open_book.iterate(HistoryQuery(where=(parse_predicate(f"contains {SECRET[:4]}"),))))
        assert [name for _, name, _ in keys] == ["secret", "secret"]


# Executions


def test_executions_are_those_of_the_journal(audit: AuditSource) -> None:
    executions = [
        (each.tool, each.status.value, each.attempt, each.writes, each.parent_id is not None)
        for each in audit.iterate(ExecutionQuery(session="main", newest_first=False))
    ]
    assert executions == [
        ("count", "committed", 1, 2, False),
        ("fail", "failed", 1, 0, False),
        ("parent", "committed", 1, 1, False),
        ("count", "committed", 1, 2, True),
        ("fail", "failed", 1, 0, True),
        ("chunks", "committed", 1, 1, False),
        ("collide", "conflict", 1, 0, False),
        ("collide", "committed", 2, 1, False),
    ]


@pytest.mark.parametrize(
    ("query", "tools"),
    [
        (ExecutionQuery(tool="co*"), ["collide", "collide", "count", "count"]),
        (ExecutionQuery(tool="fail", children=False), ["fail"]),
        (ExecutionQuery(status=ExecutionStatus.CONFLICT), ["collide"]),
        (ExecutionQuery(metadata={"user": "ann"}), ["count"]),
        (ExecutionQuery(metadata={"user": "ann", "trace": "t2"}), []),
        (ExecutionQuery(idempotency_key="k1"), ["count"]),
        (ExecutionQuery(actor="unknown"), []),
        (ExecutionQuery(session="m*", limit=2), ["collide", "collide"]),
    ],
)
def test_executions_are_found_by_their_facts(audit: AuditSource, query: ExecutionQuery, tools: list[str]) -> None:
    assert [each.tool for each in audit.iterate(query)] == tools


def find_one(audit: AuditSource, **conditions: Any) -> str:
    return next(audit.iterate(ExecutionQuery(newest_first=False, **conditions))).execution_id


def test_one_execution_in_full(audit: AuditSource) -> None:
    detail = audit.execution(find_one(audit, tool="count"))
    assert {name: value.json for name, value in detail.parameters.items()} == {"by": "2"}
    assert detail.metadata == {"user": "ann", "trace": "t1"}
    assert detail.result is not None
    assert detail.result.json == "2"
    assert [(read.name, read.version) for read in detail.reads] == [("total", 0)]
    assert detail.writes == (("total", 1), ("last", 1))
    assert [(line.message, line.fields) for line in detail.log] == [("counting", {"by": 2})]
    assert [(entry.name, entry.version) for entry in detail.history] == [("total", 1), ("last", 1)]
    assert detail.summary.duration_us is not None
    assert detail.summary.idempotency_key == "k1"


def test_a_failed_execution_in_full(audit: AuditSource) -> None:
    detail = audit.execution(find_one(audit, tool="fail"))
    assert detail.failure is not None
    assert (detail.failure.type, detail.failure.message) == ("ValueError", "no such luck")
    assert "raise ValueError" in detail.failure.traceback
    assert (detail.writes, detail.published) == ((), (("progress", 1),))
    assert [(entry.name, entry.kind) for entry in detail.history] == [("progress", ChangeKind.PUBLISHED)]


def test_an_execution_with_children_in_full(audit: AuditSource) -> None:
    detail = audit.execution(find_one(audit, tool="parent"))
    assert [(child.summary.tool, child.summary.status.value) for child in detail.children] == [
        ("count", "committed"),
        ("fail", "failed"),
    ]
    written = {(entry.name, entry.version) for entry in detail.history}
    assert written == {("last", 2), ("total", 2), ("last", 3), ("progress", 2)}
    child = audit.execution(detail.children[0].summary.execution_id)
    assert {(entry.name, entry.version) for entry in child.history} == {("total", 2), ("last", 3)}


def test_attempts_lead_to_each_other(audit: AuditSource) -> None:
    first, second = [each.execution_id for each in audit.iterate(ExecutionQuery(tool="collide", newest_first=False))]
    for execution_id in (first, second):
        assert audit.execution(execution_id).attempts == (first, second)
    (conflict,) = audit.execution(first).conflicts
    assert (conflict.name, conflict.expected, conflict.actual) == ("shared", 0, 1)


# Commits and sessions


def test_commits_are_those_of_the_log(audit: AuditSource, path: Path, rows: list[dict[str, Any]]) -> None:
    with closing(sqlite3.connect(path)) as connection:
        expected = connection.execute("SELECT sequence, actor, cause, lower(hex(hash)) FROM commits").fetchall()
    commits = list(audit.iterate(CommitQuery(newest_first=False)))
    assert [(each.sequence, each.actor, each.cause, each.hash) for each in commits] == expected
    for commit in commits:
        written = {(row["name"], row["version"]) for row in rows if row["sequence"] == commit.sequence}
        assert set(commit.versions) == written
    by_cause = audit.iterate(CommitQuery(session="main", cause="RollbackVariable"))
    assert [commit.versions for commit in by_cause] == [(("temperature", 9),)]


def test_sessions_live_and_ended(audit: AuditSource) -> None:
    sessions = [
        (each.session_id, each.variables, each.executions, each.ended_sequence is None)
        for each in audit.iterate(SessionQuery(newest_first=False))
    ]
    assert sessions == [("gone", 1, 0, False), ("main", 9, 8, True), ("gone", 1, 0, True)]
    assert [each.session_id for each in audit.iterate(SessionQuery(live=False))] == ["gone"]
    assert [each.session_id for each in audit.iterate(SessionQuery(metadata={"kind": "new"}))] == ["main"]
    assert len(list(audit.iterate(SessionQuery(session="gone")))) == 2


# Points


def test_the_state_as_of_each_commit_follows_from_the_log(audit: AuditSource, rows: list[dict[str, Any]]) -> None:
    first = next(each for each in audit.iterate(SessionQuery(session="main"))).started_sequence
    for sequence in range(first, audit.head() + 1):
        expected: dict[str, tuple[int, str | None]] = {}
        for row in rows:
            if row["session_id"] != "main" or row["sequence"] > sequence:
                continue
            if KINDS[row["kind"]] is ChangeKind.DELETED:
                del expected[row["name"]]
            else:
                expected[row["name"]] = (row["version"], None if row["sensitive"] else row["text"])
        actual = {
            each.name: (each.version, None if each.value is None else each.value.json)
            for each in audit.state("main", str(sequence))
        }
        assert actual == expected, sequence


def test_points_are_commits_executions_times_and_ages(audit: AuditSource) -> None:
    execution = audit.execution(find_one(audit, tool="count")).summary
    assert execution.ended_sequence is not None
    assert execution.ended_at is not None
    assert audit.resolve(execution.execution_id) == execution.ended_sequence
    assert audit.resolve(f"{execution.execution_id}^") == execution.ended_sequence - 1
    assert audit.resolve(str(execution.ended_sequence)) == execution.ended_sequence
    assert audit.resolve(execution.ended_at.isoformat()) >= execution.ended_sequence
    just_before = execution.ended_at - timedelta(microseconds=1)
    assert audit.resolve(just_before.isoformat()) < execution.ended_sequence
    assert audit.resolve("1d") == 0
    assert audit.resolve("now") == audit.resolve("") == audit.head()
    assert audit.resolve("now^") == audit.head() - 1
    assert audit.resolve("0") == audit.resolve("0^") == 0


def test_times_find_imported_sessions_by_their_recorded_times(tmp_path: Path) -> None:
    """The commits of an import have earlier times than those before them."""
    recording, path = io.StringIO(), tmp_path / "both.db"
    with freeze_time("2025-01-01") as frozen, EmbeddedState(tmp_path / "old.db") as state:
        state.initialize_session("old")
        state.register_variable("old", "x", "integer", 1)
        frozen.move_to("2025-01-03")
        state.set_variable("old", "x", 2)
        write_recording(*state.record("old"), recording)
    with freeze_time("2026-01-01") as frozen, EmbeddedState(path) as state:
        state.initialize_session("new")
        frozen.move_to("2026-01-02")
        state.register_variable("new", "y", "integer", 1)
    recording.seek(0)
    import_session(path, recording)
    with freeze_time("2026-01-04") as frozen, EmbeddedState(path) as state:
        for day in range(4, 30):
            frozen.move_to(f"2026-01-{day:02}")
            state.set_variable("new", "y", day)
    with open_audit(path) as audit:
        assert [each.value.json for each in audit.state("old", "2025-01-02T00:00Z") if each.value] == ["1"]
        assert [each.value.json for each in audit.state("old", "2025-06-01T00:00Z") if each.value] == ["2"]
        for day in range(4, 30):
            assert [each.value.json for each in audit.state("new", f"2026-01-{day:02}T12:00Z") if each.value] == [
                str(day)
            ]
            newest = next(audit.iterate(HistoryQuery(until=f"2026-01-{day:02}T12:00Z")))
            assert (newest.name, newest.value.json if newest.value else "") == ("y", str(day))
        # Without a session, the import counts as of when it was made.
        assert audit.resolve("2026-01-01T12:00Z") == 1
        assert audit.resolve("2026-01-03T00:00Z") == 5
        assert audit.resolve("2025-06-01T00:00Z") == 0


@pytest.mark.parametrize("point", ["yesterday-ish", "-3", "1.5", "²", "exec", "2026-13-01", "^^", "9" * 30])
def test_an_invalid_point_is_refused_with_the_valid_forms(audit: AuditSource, point: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"a commit's number .* an age"):
        audit.resolve(point)


def test_a_future_commit_is_not_a_point(audit: AuditSource) -> None:
    with pytest.raises(InvalidArgumentError, match=f"there is no commit 10000 yet; the newest is {audit.head()}"):
        audit.resolve("10000")


# Differences and lineage


def test_differences_between_two_points(audit: AuditSource) -> None:
    deleted = next(audit.iterate(HistoryQuery(session="main", kind=ChangeKind.DELETED))).sequence
    before = audit.execution(find_one(audit, tool="chunks")).summary.began_sequence
    kinds = {each.name: each.kind for each in audit.diff("main", str(before), str(deleted - 1))}
    assert kinds == {
        "made": DifferenceKind.ADDED,
        "shared": DifferenceKind.CHANGED,
        "secret": DifferenceKind.CHANGED,
    }
    kinds = {each.name: each.kind for each in audit.diff("main", str(deleted - 1), "now")}
    assert kinds == {"made": DifferenceKind.REPLACED, "temperature": DifferenceKind.CHANGED}
    assert [each.kind for each in audit.diff("main", str(deleted - 1), str(deleted))] == [DifferenceKind.REMOVED]
    assert audit.diff("main", "now") == ()


def test_blame_leads_back_to_the_inputs_of_a_value(audit: AuditSource) -> None:
    nodes = audit.blame("main", "total", depth=5)
    lineage = [(node.depth, node.entry.name, node.entry.version, node.entry.tool) for node in nodes]
    # Its child counted. It is based on what the child and the parent read: values of a client, and the count before. It
    # is not based on `last`, which both only wrote.
    assert lineage == [
        (0, "total", 2, "count"),
        (1, "temperature", 9, None),
        (1, "total", 1, "count"),
        (2, "total", 0, None),
    ]
    assert [node.depth for node in audit.blame("main", "total", depth=0)] == [0]
    everything = audit.blame("main", at="now", depth=0)
    assert {node.entry.name for node in everything} == {each.name for each in audit.state("main")}


# Python's own values


def test_queries_accept_python_values(audit: AuditSource) -> None:
    failed = ExecutionStatus.FAILED
    assert list(audit.iterate(ExecutionQuery(status="failed"))) == list(audit.iterate(ExecutionQuery(status=failed)))
    where = (parse_predicate("> 0.4"),)
    expected = keys_of(audit.iterate(HistoryQuery(variable="temperature", where=where)))
    assert expected
    for condition in (("> 0.4",), "> 0.4", ["> 0.4"], where[0]):
        assert keys_of(audit.iterate(HistoryQuery(variable="temperature", where=condition))) == expected
    rolled_back = keys_of(audit.iterate(HistoryQuery(kind="rolled_back", source="python")))
    assert rolled_back == keys_of(audit.iterate(HistoryQuery(kind=ChangeKind.ROLLED_BACK, source=Source.PYTHON)))
    commit = next(audit.iterate(CommitQuery(session="main", until="20")))
    for point in (commit.created_at, commit.created_at.astimezone(), clock.now() - commit.created_at):
        assert audit.resolve(point, session="main") >= commit.sequence
    assert audit.state("main", 20) == audit.state("main", "20")
    assert audit.state("main", timedelta(0)) == audit.state("main")
    assert audit.diff("main", 20, clock.now()) == audit.diff("main", "20")
    assert list(audit.iterate(HistoryQuery(until=0))) == []
    assert keys_of(audit.iterate(HistoryQuery(since=20))) == keys_of(audit.iterate(HistoryQuery(since="20")))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda _: ExecutionQuery(status="failled"), "there is no status 'failled'; did you mean 'failed'?"),
        (lambda _: ExecutionQuery(tool=3), "invalid tool: '3' is not a str"),
        (lambda _: HistoryQuery(kind="sett"), "did you mean 'set'?"),
        (lambda _: HistoryQuery(where=(0.9,)), "'0.9' is not a condition; write '< 0.5'"),
        (lambda _: HistoryQuery(where=5), "is not a condition"),
        (lambda _: HistoryQuery(where=(Predicate(Operator.LESS, "x"),)), "which is not a number"),
        (lambda _: HistoryQuery(metadata={"n": 1}), "a mapping of str to str"),
        (lambda _: HistoryQuery(since=-1), "invalid since: '-1' is not a point"),
        (lambda _: HistoryQuery(since=1.5), "use a text, a commit's number (int)"),
        (lambda _: SessionQuery(limit=-1), "invalid limit"),
        (lambda _: CommitQuery(session=None), "invalid session: 'None' is not a str"),
        (lambda audit: audit.state("main", 1.5), "is not a point in the history"),
        (lambda audit: audit.state("main", timedelta(days=-1)), "is not a point in the history"),
        (lambda audit: audit.state(5), "'5' is not a str"),
        (lambda audit: audit.execution(5), "'5' is not a str"),
    ],
)
def test_invalid_values_are_named(audit: AuditSource, ask: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ask(audit)
    assert message in str(caught.value)


# Names and points that do not exist


def test_an_unknown_name_is_refused_with_similar_ones(audit: AuditSource) -> None:
    for ask, message in [
        (lambda: audit.state("mian"), "no session 'mian' in the history; did you mean 'main'?"),
        (lambda: list(audit.iterate(HistoryQuery(session="nope"))), "there are: "),
        (lambda: list(audit.iterate(HistoryQuery(session="main", variable="totall"))), "did you mean 'total'?"),
        (lambda: list(audit.iterate(HistoryQuery(session="main", variable="qqq"))), "; there are: 'made', "),
        (lambda: list(audit.iterate(HistoryQuery(session="gone", variable="qqq"))), "; there are: 'temperature'"),
        (lambda: audit.blame("main", "totall"), "did not have it then; did you mean 'total'?"),
        (lambda: audit.blame("main", "qqq"), "did not have it then; there are: 'temperature', 'total', 'last', "),
        (lambda: audit.execution("exec_1_ab"), "no execution 'exec_1_ab' in the history"),
        (lambda: audit.execution("nonsense\ud800"), "no execution"),
        (lambda: audit.state("\ud800"), "no session"),
    ]:
        with pytest.raises(NotInHistoryError) as caught:
            ask()
        assert message in str(caught.value)
    total = next(each for each in audit.state("main") if each.name == "total")
    with pytest.raises(VersionNotFoundError, match="versions 0 to 2"):
        audit.version("main", total.variable_id, 99)


def test_a_session_that_was_not_live_then_is_refused_with_its_times(audit: AuditSource) -> None:
    ended = next(audit.iterate(SessionQuery(live=False))).ended_sequence
    with pytest.raises(InvalidArgumentError, match=rf"invalid at: .* was not live at commit {ended}.*; {ended}\^ is"):
        audit.state("gone", str(ended))
    assert [each.name for each in audit.state("gone", f"{ended}^")] == ["temperature"]


@pytest.mark.parametrize("point", ["1", "7d"])
def test_a_session_that_had_not_begun_is_refused_with_its_beginning(audit: AuditSource, point: str) -> None:
    (main,) = audit.iterate(SessionQuery(session="main"))
    when = rf"{main.created_at:%Y-%m-%d %H:%M:%S} UTC"
    reason = f"session 'main' had not begun by then; it began at commit {main.started_sequence}, {when}"
    for option, ask in [
        ("at", lambda: audit.state("main", point)),
        ("to", lambda: audit.diff("main", "now", point)),
    ]:
        with pytest.raises(InvalidArgumentError) as caught:
            ask()
        assert str(caught.value) == f"invalid {option}: {reason}"
    # So everything is new since then.
    new = audit.diff("main", point)
    assert {each.kind for each in new} == {DifferenceKind.ADDED}
    assert [each.after for each in new] == sorted(audit.state("main"), key=lambda each: each.name)


def test_an_execution_whose_caller_is_gone_has_a_reason_for_its_end(tmp_path: Path) -> None:
    begun = threading.Semaphore(0)

    @tool
    def hold(ctx: ToolContext) -> None:
        """Continue until the execution has ended."""
        begun.release()
        while not ctx.cancelled:
            time.sleep(0.001)

    tools, path = Toolbox(), tmp_path / "sessions.db"
    tools.add(hold)
    with EmbeddedState(path, tools=tools) as state:
        state.initialize_session("s")
        state.initialize_session("ends")
        calls = [state.submit(ExecuteTool(session, "hold"), None) for session in ("s", "s", "ends")]
        for _ in calls:
            assert begun.acquire(timeout=within(10))
        assert calls[0].cancel()
        state.cleanup_session("ends")
        with state.audit() as audit:
            cancelled = ExecutionQuery(status=ExecutionStatus.CANCELLED)
            deadline = time.monotonic() + within(10)
            while not list(audit.iterate(cancelled)):
                assert time.monotonic() < deadline, "the execution is not cancelled"
    with pytest.raises(EngineClosedError):
        calls[1].result(timeout=within(10))
    with open_audit(path) as audit:
        endings = {(each.session_id, each.status.value, each.error) for each in audit.iterate(ExecutionQuery())}
    assert endings == {
        ("s", "cancelled", "its client cancelled it"),
        ("s", "interrupted", "the server ended while it ran"),
        ("ends", "interrupted", "session cleaned up"),
    }


@pytest.mark.parametrize("text", ["", "0.5", "< ", "< warm", "like x", "contains"])
def test_an_invalid_condition_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="where"):
        parse_predicate(text)


def test_errors_advise_users_of_every_interface() -> None:
    assert str(VersionPrunedError("x", 1)).endswith("its value is gone; its history lists the remaining versions")
    exists = str(SessionExistsError("s"))
    assert exists.endswith("use another session_id for the new one, or end that session first (cleanup_session)")


# While others use the file


def test_a_provider_answers_the_same_as_its_file_while_it_writes(path: Path, tmp_path: Path) -> None:
    with EmbeddedState(tmp_path / "own.db") as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 0)
        with state.audit() as own, open_audit(tmp_path / "own.db") as from_file:
            for number in range(1, 4):
                state.set_variable("s", "x", number)
                for source in (own, from_file):
                    newest = next(source.iterate(HistoryQuery(session="s", variable="x")))
                    assert newest.value is not None
                    assert newest.value.json == str(number)
        # Closing the provider's own audit leaves the provider open.
        assert state.get_value("s", "x") == 3


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADatabaseError, match="there is no such file"):
        open_audit(tmp_path / "none.db")
    (tmp_path / "text.db").write_text("not a database, but long enough to be one" * 50, encoding="utf-8")
    with pytest.raises(NotADatabaseError):
        open_audit(tmp_path / "text.db")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["text.db"]


@pytest.mark.parametrize("newest_first", [True, False])
@pytest.mark.parametrize("query", [{"session": "s", "variable": "x"}, {"session": "s"}, {}, {"metadata": {"k": "v"}}])
def test_a_page_ends_when_it_is_large(tmp_path: Path, query: dict[str, Any], newest_first: bool) -> None:
    """No matter how many rows were requested: a page is held in memory."""
    size = 700_000
    with EmbeddedState(tmp_path / "s.db") as state:
        state.initialize_session("s")
        for number in range(12):
            # After each deletion, the name belongs to a new variable.
            state.register_variable("s", "x", "string", f"{number}{'y' * size}", metadata={"k": "v"})
            state.set_variable("s", "x", f"again {number}{'z' * size}", metadata={"k": "v"})
            state.delete_variable("s", "x")
        audit, question = state.audit(), HistoryQuery(newest_first=newest_first, **query)
        collected, after, pages = [], None, 0
        while pages == 0 or after is not None:
            page = audit.page(question, after, 500)
            assert sum(row.value.size_bytes for row in page.rows if row.value) < 2 * stored_rows.PAGE_BYTES
            collected += page.rows
            after, pages = page.after, pages + 1
        values = [row.value.json[1:9] for row in collected if row.value]
        expected = [text for number in range(12) for text in (f"{number}{'y' * 9}"[:8], f"again {number}zzz"[:8])]
        assert values == (expected[::-1] if newest_first else expected)
        assert pages > 3


def test_an_execution_of_another_session_wrote_nothing_here(tmp_path: Path) -> None:
    with EmbeddedState(tmp_path / "two.db", tools=CONTRACT_TOOLS) as state, state.audit() as audit:
        for session in ("one", "two"):
            state.initialize_session(session)
            state.register_variable(session, "a", "integer", 1)
        done = state.execute_tool("one", "add", {"amount": 1}).execution_id
        counts = [
            len(list(audit.iterate(HistoryQuery(session=name, execution_id=done)))) for name in ("one", "two", "?*")
        ]
        assert counts == [1, 0, 1]
