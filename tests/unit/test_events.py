"""Events: their bodies in the log, and their effect on a session."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dspex_persist.clock import to_micros
from dspex_persist.state import events as e
from dspex_persist.state.events import EVENTS, Event, MalformedEventError, Moment, event_in
from dspex_persist.state.fold import fold, fold_version
from dspex_persist.state.graph import Dependencies
from dspex_persist.state.model import (
    ChangeKind,
    Conflict,
    Dependency,
    EventKind,
    ExecutionStatus,
    Failure,
    Isolation,
    JournalEntry,
    LogEntry,
    Optimization,
    PrunePolicy,
    RegisteredTool,
    Seen,
    Session,
    Source,
    ToolParameter,
    ToolSpec,
    Value,
    VariableVersion,
)
from dspex_persist.state.session_state import SessionState, Undo, growth_of

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)
MICROS = to_micros(AT)
BINARY = b"\x00'\xff"
SPEC = ToolSpec(
    "t",
    "what it does",
    (ToolParameter("n", "integer", "how many", default=Value("1")), ToolParameter("any", "any")),
    exposed=True,
    required_variables=("x",),
    isolation=Isolation.SNAPSHOT,
    retries=2,
    timeout_s=1.5,
    metadata={"of": "ann"},
)
SPEC_BODY = {
    "name": "t",
    "description": "what it does",
    "parameters": [
        {
            "name": "n",
            "type": "integer",
            "description": "how many",
            "required": True,
            "default": {"json": "1", "binary": None},
            "validation": "",
        },
        {"name": "any", "type": "any", "description": "", "required": True, "default": None, "validation": ""},
    ],
    "streaming": False,
    "exposed": True,
    "required_variables": ["x"],
    "isolation": "snapshot",
    "retries": 2,
    "timeout_s": 1.5,
    "metadata": {"of": "ann"},
}
BEGAN = {
    "execution_id": "exec_4_0a",
    "tool": "t",
    "parent_id": None,
    "idempotency_key": "key",
    "fingerprint": "f",
    "parameters": {"n": {"json": "1"}, "b": {"json": "{}", "binary": "ACf/"}},
    "metadata": {"of": "ann"},
    "isolation": "serializable",
    "attempt": 1,
    "seed": "5eed",
    "worker_id": "",
}
INTERRUPTED = {"execution_id": "exec_4_0a", "status": "interrupted", "result": None, "reason": "over"}
ENDED = {
    "execution_id": "exec_4_0a",
    "status": "committed",
    "result": {"json": "1"},
    "failure": {"type": "ValueError", "message": "no", "traceback": ""},
    "reads": {"x": ["x", "v", 3], "gone": None},
    "patterns": ["x*"],
    "log": [{"at": MICROS, "message": "said", "fields": {"k": 1}}],
    "recorded": {"now": [MICROS], "lm": [{"asked": 1}]},
    "published": [["x", 4]],
    "duration_us": 17,
    "writes": [["x", 5]],
    "conflicts": [{"name": "x", "expected": 3, "actual": None, "reason": "gone"}],
}
PRUNED = {
    "versions": 3,
    "events": 1,
    "policy": {"keep_versions": None, "before": MICROS, "ended_before": None},
    "range": [2, 7],
    "digest": "d",
}
LOCKED = {
    "variable_id": "v",
    "optimization_id": "o",
    "optimizer_id": "mipro",
    "started_at": MICROS,
    "started_by": "ann",
    "config": {"rounds": "3"},
    "lease_s": 300.0,
}
SAMPLES: list[tuple[Event, dict[str, Any]]] = [
    (
        e.SessionStarted("s", {"of": "ann"}, 1.5, {"c": [1]}),
        {"session_id": "s", "metadata": {"of": "ann"}, "ttl_s": 1.5, "config": {"c": [1]}},
    ),
    (
        e.SessionStarted("s", {}, None, {}, 7),
        {"session_id": "s", "metadata": {}, "ttl_s": None, "config": {}, "session_key": 7},
    ),
    (e.SessionUpdated("s", {}, 60), {"session_id": "s", "metadata": {}, "ttl_s": 60}),
    (e.SessionEnded("s", "over"), {"session_id": "s", "reason": "over"}),
    (
        e.VariableRegistered("v", "x", "integer", ""),
        {"variable_id": "v", "name": "x", "type": "integer", "constraints": ""},
    ),
    (
        e.VariableRegistered("v", "x", "integer", "", 9),
        {"variable_id": "v", "name": "x", "type": "integer", "constraints": "", "variable_key": 9},
    ),
    (
        e.VariableConstrained("v", 3, '{"max":2}'),
        {"variable_id": "v", "version": 3, "constraints": '{"max":2}'},
    ),
    (
        e.VariableConstrained("v", 3, "", 9),
        {"variable_id": "v", "version": 3, "constraints": "", "variable_key": 9},
    ),
    (
        e.RuleAdded("fits", "a < b", "so"),
        {"name": "fits", "expression": "a < b", "description": "so"},
    ),
    (e.RuleRemoved("fits"), {"name": "fits"}),
    (e.SessionRestored(7), {"sequence": 7}),
    (e.DependencyAdded("v", "w", "uses"), {"from_id": "v", "to_id": "w", "type": "uses"}),
    (e.DependencyRemoved("v", "w", "uses"), {"from_id": "v", "to_id": "w", "type": "uses"}),
    (e.OptimizationStarted("v", "o", "mipro", AT, "ann", {"rounds": "3"}, 300.0), LOCKED),
    (e.OptimizationStopped("v", "o", "stopped"), {"variable_id": "v", "optimization_id": "o", "reason": "stopped"}),
    (
        e.ToolsRegistered("w", (RegisteredTool(SPEC, "w", "here:1"),)),
        {"worker_id": "w", "tools": [{"spec": SPEC_BODY, "worker_id": "w", "address": "here:1"}]},
    ),
    (
        e.ExecutionBegan(
            "exec_4_0a",
            "t",
            None,
            "key",
            "f",
            {"n": Value("1"), "b": Value("{}", BINARY)},
            {"of": "ann"},
            Isolation.SERIALIZABLE,
            1,
            "5eed",
            "",
            "exec_2_0b",
        ),
        BEGAN | {"retry_of": "exec_2_0b"},
    ),
    (
        e.ExecutionEnded(
            "exec_4_0a",
            ExecutionStatus.COMMITTED,
            Value("1"),
            failure=Failure("ValueError", "no"),
            reads={"x": Seen("v", "x", 3), "gone": None},
            patterns=("x*",),
            log=(LogEntry(AT, "said", {"k": 1}),),
            recorded={"now": [MICROS], "lm": [{"asked": 1}]},
            published=(("x", 4),),
            duration_us=17,
            writes=(("x", 5),),
            conflicts=(Conflict("x", 3, None, "gone"),),
        ),
        ENDED,
    ),
    (e.ExecutionEnded("exec_4_0a", ExecutionStatus.INTERRUPTED, reason="over"), INTERRUPTED),
    (e.Pruned(3, 1, PrunePolicy(before=AT), (2, 7), "d"), PRUNED),
]


@pytest.mark.parametrize(("event", "body"), SAMPLES, ids=lambda each: getattr(each, "kind", ""))
def test_bodies_have_not_changed(event: Event, body: dict[str, Any]) -> None:
    assert event.to_body() == body
    assert event_in(event.kind.value, body) == event


def test_each_kind_has_its_class() -> None:
    assert set(EVENTS) == set(EventKind) == {event.kind for event, _ in SAMPLES}


def test_a_body_without_retries_is_written_without_them_again() -> None:
    began = e.ExecutionBegan.from_body(BEGAN)
    assert (began.retry_of, began.says_retry, began.to_body()) == (None, False, BEGAN)


def test_the_bytes_of_a_default_are_logged_as_they_always_were() -> None:
    spec = ToolSpec("t", parameters=(ToolParameter("b", "any", default=Value("{}", BINARY)),))
    body = e.spec_body(spec)
    assert body["parameters"][0]["default"] == {"json": "{}", "binary": repr(BINARY)}
    assert e.spec_in(body) == spec


def test_recorded_inputs_of_an_execution() -> None:
    ended = e.ExecutionEnded.from_body(ENDED)
    assert (ended.times, ended.lm_calls) == ([AT], [{"asked": 1}])
    assert e.ExecutionEnded.from_body(INTERRUPTED).times == []


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        ("nothing", {}, "unknown kind 'nothing'"),
        ("session_ended", None, "it is not an object"),
        ("session_ended", {"session_id": "s"}, "missing key 'reason'"),
        ("session_ended", {"session_id": 5, "reason": ""}, "'session_id' is not a string"),
        ("session_updated", {"session_id": "s", "metadata": {"k": 5}, "ttl_s": None}, "'metadata.k' is not a string"),
        ("session_updated", {"session_id": "s", "metadata": [], "ttl_s": None}, "'metadata' is not an object"),
        ("session_updated", {"session_id": "s", "metadata": {}, "ttl_s": True}, "'ttl_s' is not a number"),
        ("tools_registered", {"worker_id": "w", "tools": [{"spec": {}}]}, "missing key 'tools.0.worker_id'"),
        ("tools_registered", {"worker_id": "w", "tools": {}}, "'tools' is not a list"),
        (
            "optimization_started",
            LOCKED | {"started_at": 1 << 70},
            "'started_at' is outside the years 1 to 9999",
        ),
        ("optimization_started", LOCKED | {"started_at": None}, "'started_at' is not an integer"),
        ("execution_began", BEGAN | {"isolation": "none"}, "'isolation' is not one of serializable, snapshot"),
        ("execution_began", BEGAN | {"parameters": {"n": {}}}, "missing key 'parameters.n.json'"),
        ("execution_began", BEGAN | {"parameters": {"n": {"json": "", "binary": "x"}}}, "n.binary' is not base64"),
        ("execution_ended", INTERRUPTED | {"reads": {"x": ["x", "v"]}}, "'reads.x' is not a list of 3"),
        ("execution_ended", INTERRUPTED | {"writes": [["x", "1"]]}, "'writes.0.1' is not an integer"),
        ("pruned", PRUNED | {"range": [1]}, "'range' is not a list of 2"),
    ],
)
def test_a_body_that_cannot_be_read_names_the_key(kind: str, body: Any, message: str) -> None:
    with pytest.raises(MalformedEventError) as caught:
        event_in(kind, body)
    assert message in str(caught.value)
    assert str(caught.value).startswith("malformed event: ")


# --- Effects on a session ---

X = e.VariableRegistered("v", "x", "integer", "")
MOMENT = Moment(9, AT + timedelta(seconds=9), AT)


def version(number: int, kind: ChangeKind = ChangeKind.SET, sequence: int = 9, **metadata: str) -> VariableVersion:
    value = None if kind is ChangeKind.DELETED else Value(str(number))
    at = AT + timedelta(seconds=sequence)
    return VariableVersion(
        "v", "integer", number, kind, value, metadata, Source.PYTHON, at, "ann", "SetVariable", sequence
    )


def filled() -> SessionState:
    state = SessionState(Session("s", AT, {"of": "ann"}), sequence=8)
    fold_version(state, version(0, ChangeKind.REGISTERED, 8), [], X)
    state.dependencies = Dependencies([Dependency("v", "w", "", 5)])
    state.executions = {"exec_4_0a": JournalEntry("exec_4_0a", "t", 4)}
    return state


def changed(*changes: Event | VariableVersion) -> SessionState:
    """Apply the events to a session. Checks as well that undoing them restores the previous state."""
    state, undo = filled(), Undo()
    for change in changes:
        if isinstance(change, Event):
            assert fold(state, change, MOMENT, undo) is state
        else:
            fold_version(state, change, undo, X)
    after = state.copy()
    for take_back, arguments in reversed(undo):
        take_back(*arguments)
    assert state == filled()
    return after


def test_a_session_begins_and_ends() -> None:
    state = fold(None, e.SessionStarted("s", {"of": "ann"}, 60.0, {}), MOMENT, [])
    assert state is not None
    assert state.lease is not None
    assert (state.session, state.sequence) == (Session("s", MOMENT.at, {"of": "ann"}, 60.0, 9), 9)
    assert state.lease.expires_at == AT + timedelta(seconds=60)
    assert fold(state, e.SessionEnded("s", "over"), MOMENT, []) is None
    assert fold(None, e.SessionEnded("s", "over"), MOMENT, []) is None


def test_a_ttl_restarts_only_if_it_changes() -> None:
    state = fold(None, e.SessionStarted("s", {}, 60.0, {}), MOMENT, [])
    assert state is not None
    lease = state.lease
    fold(state, e.SessionUpdated("s", {"k": "v"}, 60.0), MOMENT, [])
    assert (state.lease, state.session.metadata) == (lease, {"k": "v"})
    fold(state, e.SessionUpdated("s", {}, 30.0), MOMENT, [])
    assert state.lease is not lease
    assert state.session.ttl_s == 30.0
    fold(state, e.SessionUpdated("s", {}, None), MOMENT, [])
    assert (state.lease, state.session.ttl_s) == (None, None)


def test_a_session_of_the_past_has_no_time_to_live() -> None:
    state = fold(None, e.SessionStarted("s", {}, 60.0, {}), Moment(9, AT), [])
    assert state is not None
    assert (state.lease, state.session.ttl_s) == (None, None)


def test_versions_follow_each_other() -> None:
    state = changed(version(1, by="ann"), version(2, ChangeKind.ROLLED_BACK, rolled_back_to="0"))
    x = state.variables["x"]
    assert (x.version, x.value, x.metadata, x.updated_at) == (2, Value("2"), {"by": "ann"}, MOMENT.at)
    assert state.weight_bytes == filled().weight_bytes + growth_of(x, filled().variables["x"])


def test_a_deletion_takes_the_dependencies_along_and_the_name_is_free() -> None:
    state = changed(version(1, ChangeKind.DELETED))
    assert (state.variables, state.names) == ({}, {})
    assert state.dependencies == (Dependency("v", "w", "", 5, 9),)
    again = changed(version(1, ChangeKind.DELETED), version(0, ChangeKind.REGISTERED))
    assert again.find("x") == filled().variables["x"]._replace(updated_at=MOMENT.at)


def test_the_holder_of_a_lock_renews_it_by_writing() -> None:
    lock = Optimization("o", "mipro", AT, "ann", {"rounds": "3"}, 300.0)
    started = e.OptimizationStarted.of("v", lock)
    assert changed(started).variables["x"].optimization == started.lock(MOMENT.at)
    assert started.lock(AT) == lock
    written = changed(started, version(1, sequence=12, optimizer_id="mipro")).variables["x"].optimization
    assert written is not None
    assert written.renewed_at == AT + timedelta(seconds=12)
    assert changed(started, e.OptimizationStopped("v", "o", "stopped")).variables["x"].optimization is None
    assert changed(e.OptimizationStopped("gone", "o", "stopped")) == filled()


def test_dependencies_tools_and_executions() -> None:
    assert changed(e.DependencyAdded("v", "u", "uses")).dependencies[-1] == Dependency("v", "u", "uses", 9)
    one, other = RegisteredTool(SPEC, "w"), RegisteredTool(ToolSpec("t"), "w")
    state = changed(e.ToolsRegistered("w", (one,)), e.ToolsRegistered("w", (other,)))
    assert state.tools == {"t": other}
    assert state.weight_bytes == changed(e.ToolsRegistered("w", (other,))).weight_bytes > filled().weight_bytes
    assert changed(e.ToolsRegistered("w", (one,)), e.ToolsRegistered("v", ())).tools == {"t": one}
    assert changed(e.ToolsRegistered("w", (one,)), e.ToolsRegistered("w", ())) == filled()
    began = e.ExecutionBegan.from_body(BEGAN | {"execution_id": "exec_9_0b"})
    running = changed(began).executions
    assert running["exec_9_0b"] == JournalEntry("exec_9_0b", "t", 9, None, "key", "f")
    assert changed(e.ExecutionEnded.from_body(INTERRUPTED)).executions == {}
