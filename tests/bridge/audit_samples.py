"""Answers, queries and policies of every kind, with all fields set and with none."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from dspex_persist.state.audit import (
    CommitEntry,
    CommitQuery,
    ExecutionDetail,
    ExecutionQuery,
    ExecutionSummary,
    HistoryEntry,
    HistoryQuery,
    Operator,
    Predicate,
    ReadEntry,
    SessionEntry,
    SessionQuery,
    VariableState,
)
from dspex_persist.state.lm_calls import LmUsage, LmUsageQuery
from dspex_persist.state.model import (
    ChangeKind,
    Conflict,
    ExecutionStatus,
    Failure,
    LogEntry,
    PrunePolicy,
    PruneReport,
    Source,
    Value,
)

AT: Final = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
OLD: Final = datetime(1931, 1, 1, tzinfo=UTC)

HISTORY = HistoryEntry(
    "session-1",
    "größe",
    "var_1",
    "float",
    7,
    ChangeKind.SET,
    Value("0.5"),
    Source.PYTHON,
    {"why": "because", "empty": ""},
    123,
    AT,
    "user:ann",
    "SetVariable",
    "exec_1",
    "tune",
    False,
    "exec_0",
    "plan",
)
BARE_HISTORY = HistoryEntry("s", "x", "v", "map", 0, ChangeKind.REGISTERED, None, Source.ELIXIR, {}, 1, OLD, "", "")
STATE = VariableState(
    "session-1",
    "x",
    "var_1",
    "tensor",
    Value('{"shape": [2]}', b"\x00\xff"),
    2**40,
    ChangeKind.ROLLED_BACK,
    Source.ELIXIR,
    '{"min": 0}',
    {"sensitive": "true"},
    124,
    AT + timedelta(days=1),
    "peer:1.2.3.4",
    "RollbackVariable",
    "exec_2",
    "tune",
    True,
    "exec_1",
    "plan",
)
BARE_STATE = replace(
    STATE, value=None, constraints="", metadata={}, execution_id=None, tool=None, masked=False, caller_id=None
)
SUMMARY = ExecutionSummary(
    "session-1",
    "exec_1",
    "tune",
    ExecutionStatus.COMMITTED,
    2,
    "user:ann",
    10,
    AT,
    12,
    AT + timedelta(seconds=3),
    3_000_000,
    "exec_0",
    "key-1",
    "worker-1",
    4,
    5,
    "",
)
RUNNING = ExecutionSummary("s", "exec_9", "t", ExecutionStatus.RUNNING, 1, "", 3, OLD, error="")
CHILD = ExecutionDetail(RUNNING, "snapshot", {}, {}, "")
DETAIL = ExecutionDetail(
    SUMMARY,
    "serializable",
    {"p": Value("1"), "b": Value("{}", b"\x01"), "empty": Value("{}", b"")},
    {"m": "1"},
    "seed",
    Value("[1, 2]"),
    Failure("ValueError", "no", "Traceback"),
    "it was told to",
    (Conflict("x", 1, 2), Conflict("y", None, 0), Conflict("z", 3, None, "in words")),
    (ReadEntry("x", "x", "var_1", 0), ReadEntry("nothing", None, None, None)),
    ("a*", "?"),
    (("x", 8), ("y", 0)),
    (("z", 1),),
    (LogEntry(AT, "line", {"n": 1.5, "deep": {"a": [None, True]}}), LogEntry(OLD, "")),
    {"times": ["2026"], "lm": [{"prompt": "ü"}]},
    ("exec_0", "exec_1"),
    (CHILD, replace(CHILD, reason="child", children=(CHILD,))),
    (HISTORY, BARE_HISTORY),
)
VERSIONS = (("x", 1), ("y", 2))
COMMIT = CommitEntry(
    5, "session-1", "user:ann", "SetVariables", AT, "ab" * 32, VERSIONS, ("execution_began", "pruned"), True
)
SESSION = SessionEntry(
    "session-1", AT, 1, 9, AT + timedelta(hours=1), AT + timedelta(hours=1), 60.5, 2, 3, 4, {"u": "a"}
)

SAMPLES: Final[dict[str, Any]] = {
    "history": HISTORY,
    "bare history": BARE_HISTORY,
    "masked": replace(HISTORY, value=None, masked=True),
    "binary": replace(HISTORY, value=Value("{}", b"")),
    "after 2038": replace(HISTORY, created_at=datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)),
    **{f"history, {kind}": replace(HISTORY, kind=kind) for kind in ChangeKind},
    "state": STATE,
    "bare state": BARE_STATE,
    "running": RUNNING,
    **{f"execution, {status}": replace(SUMMARY, status=status, error=f"it {status}") for status in ExecutionStatus},
    "detail": DETAIL,
    "bare detail": CHILD,
    "commit": COMMIT,
    "explained commit": replace(COMMIT, reason="ticket 12; naïve"),
    "bare commit": CommitEntry(1, "s", "", "", OLD, ""),
    "session": SESSION,
    "usage": LmUsage("s", "t", "m/1", "2026-03-01", 1, 2, 3, 4, 5, 6, 7, 0.25, 8, 2**40),
    "bare usage": LmUsage(),
    "live session": replace(SESSION, ended_sequence=None, ended_at=None, ttl_s=None, metadata={}),
}
"""The records in answers."""

QUERIES: Final[dict[str, Any]] = {
    "history": HistoryQuery(
        session="s*",
        since="12",
        until="2h",
        newest_first=False,
        limit=3,
        variable="x",
        type="float",
        kind="set",
        actor="a",
        source=Source.PYTHON,
        tool="t",
        execution_id="exec_1",
        metadata={"a": "1", "b": "2"},
        where=(Predicate(Operator.LESS, "0.5"), Predicate(Operator.CONTAINS, "ü")),
    ),
    "all history": HistoryQuery(),
    **{f"where {operator}": HistoryQuery(where=Predicate(operator, "1")) for operator in Operator},
    "executions": ExecutionQuery(
        session="s", tool="t", status="failed", actor="a", idempotency_key="k", metadata={"a": "1"}, children=False
    ),
    "all executions": ExecutionQuery(),
    "commits": CommitQuery(session="s", actor="a", cause="c"),
    "all commits": CommitQuery(),
    "sessions": SessionQuery(session="s", live=True, metadata={"u": "ann"}),
    "ended sessions": SessionQuery(live=False),
    "all sessions": SessionQuery(),
    "usage": LmUsageQuery(session="s*", tool="t", model="m*", by=("session", "day"), since="1", limit=2),
    "all usage": LmUsageQuery(by=()),
}
"""Queries."""

POLICIES: Final[dict[str, PrunePolicy]] = {
    "everything": PrunePolicy(5, AT, OLD, "s"),
    "nothing": PrunePolicy(),
    "zero": PrunePolicy(0, None, AT),
}
REPORT: Final = PruneReport(True, 1, 2, 3, 4)
