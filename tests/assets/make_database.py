"""Makes a database with a bit of everything, through the engine: every kind of event, version, value and constraint.

    python -m tests.assets.make_database

writes `<revision>.db` and `<revision>.json` (what the engine answers about it) beside this file. Run once for each
released schema, by the release that has it, and kept: later releases have to upgrade that file and answer the same.
"""

import json
import sqlite3
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

from freezegun import freeze_time

from dspex_persist.clock import now
from dspex_persist.state import values
from dspex_persist.state.commands import (
    BeginExecution,
    DeleteVariable,
    FinishExecution,
    PublishVariable,
    RegisterTools,
    RegisterVariable,
    RollbackVariable,
    SetVariable,
    StartOptimization,
    StopOptimization,
)
from dspex_persist.state.commands.executions import Step, Verdict, see
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.model import (
    ExecutionStatus,
    Failure,
    Isolation,
    LogEntry,
    Origin,
    PrunePolicy,
    RegisteredTool,
    Seen,
    Source,
    ToolParameter,
    ToolSpec,
    Value,
    Variable,
)
from dspex_persist.state.store.schema import REVISION
from dspex_persist.state.store.session_store import StoreOptions

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
LONG_S = 90 * 365 * 86_400.0
"""A time to live that no test will see the end of."""
LARGE_TEXT = "a large value, kept once: é漢😀 " * 200
LARGE_BYTES = bytes(range(256)) * 40
SMALL_BYTES = b"\x80\x04K*."
TYPED: Mapping[str, tuple[str, object, Mapping[str, Any]]] = {
    "temperature": ("float", 0.7, {"min": 0, "max": 2}),
    "not_a_number": ("float", float("nan"), {}),
    "minus_zero": ("float", -0.0, {}),
    "retries": ("integer", 3, {"min": 0}),
    "huge": ("integer", 2**70, {}),
    "prompt": ("string", "Grüße, 漢字, 😀\n", {"max_length": 10_000}),
    "empty": ("string", "", {}),
    "verbose": ("boolean", True, {}),
    "model": ("choice", "small", {"choices": ["small", "large"]}),
    "strategy": ("module", "ChainOfThought", {"choices": ["Predict", "ChainOfThought"]}),
    "vector": ("embedding", [0.5, -1.5, 2.0], {"dimensions": 3}),
    "matrix": ("tensor", {"shape": [2, 2], "data": [[1, 2], [3, 4]]}, {"shape": [2, 2]}),
    "options": ("map", {"a": [1, {"b": None}], "": "odd key"}, {}),
    "history": ("list", [1, "two", None, [3.0]], {}),
    "document": ("string", LARGE_TEXT, {}),
}
_SHORT_LEASE_S = 60.0
_REMOTE = Origin("127.0.0.1:4711", "SetVariable", Source.ELIXIR)
_TOOL = Origin("worker-host", "ExecuteTool", Source.PYTHON)
_FAILURE = Failure("ValueError", "no «such» thing", "Traceback (most recent call last):\n...")


def fill(path: Path) -> None:
    """Make a database at `path`, closed properly: no side files with content are left."""
    with freeze_time(START) as clock:
        with EmbeddedState(path, StoreOptions(optimization_lease_s=_SHORT_LEASE_S)) as provider:
            _fill_main(provider)
            clock.tick(timedelta(minutes=1))
            _fill_dependencies(provider)
            _fill_binaries(provider)
            _lock_and_let_go(provider, clock)
            _end_sessions(provider, clock)
        clock.tick(timedelta(hours=1))
        # A restart in between, and locks that last.
        with EmbeddedState(path, StoreOptions(optimization_lease_s=LONG_S)) as provider:
            _write_on(provider)
            _lock_for_good(provider, clock)
            _execute_tools(provider)
        clock.tick(timedelta(hours=1))
        # What was left running is ended by this one.
        with EmbeddedState(path) as provider:
            _prune(provider, clock)
            _fill_rules(provider)


def _fill_main(provider: EmbeddedState) -> None:
    provider.initialize_session("main", {"user": "ann", "ort": "Köln"})
    for name, (kind, value, constraints) in TYPED.items():
        provider.register_variable("main", name, kind, value, constraints=constraints, metadata=_metadata_of(name))
    provider.set_variable("main", "temperature", 0.9, metadata={"reason": "warmer", "source": "elixir"})
    provider.set_variable("main", "temperature", 1.1, expected_version=1, idempotency_key="once")
    provider.set_variable("main", "temperature", 1.1, expected_version=1, idempotency_key="once")
    provider.rollback_variable("main", "temperature", 0)
    provider.set_variable("main", "temperature", 0.8, metadata={"reason": "colder", "step": "4"})
    # The same large content in two more versions, one of another variable.
    provider.set_variable("main", "document", "short")
    provider.rollback_variable("main", "document", 0)
    provider.set_variable("main", "prompt", LARGE_TEXT)
    provider.set_variables("main", {"retries": 4, "verbose": False, "empty": "no more"}, atomic=True)
    provider.set_variables("main", {"retries": 5, "model": "of another size"}, metadata={"batch": "2"})
    provider.initialize_session("main", {"user": "bob", "more": "yes"})
    provider.submit(SetVariable("main", "options", Value('{"from":"elixir"}')), _REMOTE).result()


def _metadata_of(name: str) -> Mapping[str, str]:
    return {"about": f"the {name}", "owner": "Ärzte"} if name in ("temperature", "vector") else {}


def _fill_dependencies(provider: EmbeddedState) -> None:
    provider.register_variable("main", "scratch", "integer", 1)
    provider.add_dependency("main", "prompt", "temperature", "reads")
    provider.add_dependency("main", "document", "prompt")
    provider.add_dependency("main", "scratch", "temperature", "reads")
    provider.add_dependency("main", "history", "scratch", "follows")
    provider.delete_variable("main", "scratch")
    provider.register_variable("main", "scratch", "string", "the second of its name")


def _fill_rules(provider: EmbeddedState) -> None:
    provider.initialize_session("ruled")
    for name, value in (("max_tokens", 1000), ("context.window", 8000), ("gone", 1)):
        provider.register_variable("ruled", name, "integer", value)
    provider.add_rule("ruled", "fits", "max_tokens <= `context.window` - 500", "the prompt needs 500")
    provider.add_rule("ruled", "positive", "max_tokens > 0")
    provider.add_rule("ruled", "positive", "max_tokens > 1", replace=True)
    provider.add_rule("ruled", "passing", "gone == 1")
    provider.remove_rule("ruled", "passing")
    provider.set_variables("ruled", {"max_tokens": 9000, "context.window": 16000}, atomic=True)
    schemas = [{"type": "object", "required": [key]} for key in ("name", "first", "full")]
    profile = {"schema": schemas[0], "schema_version": 1}
    provider.register_variable("ruled", "profile", "map", {"name": "Ann"}, constraints=profile)
    provider.set_variable("ruled", "profile", {"name": "Änne"})
    for number, value in ((1, {"first": "Änne"}), (2, {"full": "Änne Meyer"})):
        profile = {"schema": schemas[number], "schema_version": number + 1}
        provider.constrain_variable("ruled", "profile", profile, value, metadata={"to": str(number + 1)})
    provider.constrain_variable("ruled", "max_tokens", {"min": 1, "max": 10_000})
    provider.constrain_variable("ruled", "gone", {"max": 5}, 5)
    point = str(provider.head_sequence)
    provider.delete_variable("ruled", "gone")
    provider.remove_rule("ruled", "positive")
    provider.set_variable("ruled", "max_tokens", 2)
    provider.restore_session("ruled", point)
    provider.delete_variable("ruled", "gone")


def _fill_binaries(provider: EmbeddedState) -> None:
    provider.initialize_session("binaries", {"ttl_seconds": str(LONG_S)})
    for name, content in (("pickled", SMALL_BYTES), ("large", LARGE_BYTES), ("same", LARGE_BYTES)):
        described = json.dumps({"shape": [1], "dtype": "float64", "binary_format": "pickle", "type": "tensor"})
        provider.submit(RegisterVariable("binaries", name, "tensor", Value(described, content))).result()
    described = json.dumps({"shape": [2], "dtype": "float32", "binary_format": "erlang_binary", "type": "tensor"})
    provider.submit(SetVariable("binaries", "pickled", Value(described, b"\x83h\x02" + SMALL_BYTES))).result()
    provider.submit(SetVariable("binaries", "same", Value(described, SMALL_BYTES), {"source": "python"})).result()


def _lock_and_let_go(provider: EmbeddedState, clock: Any) -> None:
    holder = Origin("optimizer-host", "StartOptimization", optimizer_id="mipro")
    other = Origin("someone-else", "StopOptimization")
    # Begun, written to by its holder, renewed, stopped.
    provider.submit(StartOptimization("main", "temperature", "mipro", {"trials": "20"}), holder).result()
    provider.submit(SetVariable("main", "temperature", Value("1.5"), {"optimizer_id": "mipro"}), holder).result()
    provider.submit(RollbackVariable("main", "temperature", 1), holder).result()
    clock.tick(timedelta(seconds=30))
    provider.submit(StartOptimization("main", "temperature", "mipro", {"trials": "40"}), holder).result()
    provider.submit(StopOptimization("main", "temperature"), holder).result()
    # Broken by somebody else.
    provider.submit(StartOptimization("main", "temperature", "mipro"), holder).result()
    provider.submit(StopOptimization("main", "temperature", force=True), other).result()
    # Left alone until its lease ended; the next write logs that.
    provider.submit(StartOptimization("main", "retries", "mipro"), holder).result()
    provider.submit(StartOptimization("main", "scratch", "mipro"), holder).result()
    clock.tick(timedelta(seconds=_SHORT_LEASE_S + 1))
    provider.set_variable("main", "retries", 6)
    provider.submit(DeleteVariable("main", "scratch"), other).result()


def _end_sessions(provider: EmbeddedState, clock: Any) -> None:
    provider.initialize_session("again")
    provider.register_variable("again", "x", "integer", 1)
    provider.cleanup_session("again")
    provider.initialize_session("again", {"life": "second"})
    provider.register_variable("again", "x", "float", 2.5)
    provider.initialize_session("short", {"ttl_seconds": "10"})
    provider.register_variable("short", "x", "integer", 1)
    clock.tick(timedelta(seconds=11))
    provider.initialize_session("short", {"ttl_seconds": "0"})
    provider.initialize_session("üñí 'x'; --")
    provider.register_variable("üñí 'x'; --", "näme", "string", "odd ids are just strings")


def _write_on(provider: EmbeddedState) -> None:
    provider.register_variable("again", "y", "map", {"after": "restart"})
    for number in range(12):
        provider.set_variable("again", "x", number / 4, metadata={"n": str(number)} if number % 5 == 0 else {})
    provider.initialize_session("binaries", {"ttl_seconds": str(LONG_S - 1)})


def _lock_for_good(provider: EmbeddedState, clock: Any) -> None:
    holder = Origin("optimizer-host", "StartOptimization", optimizer_id="bootstrap")
    provider.submit(StartOptimization("again", "x", "bootstrap", {"demos": "8", "größe": "4"}), holder).result()
    provider.submit(StartOptimization("main", "retries", "bootstrap"), holder).result()
    clock.tick(timedelta(minutes=5))
    provider.submit(SetVariable("main", "retries", Value("7"), {"optimizer_id": "bootstrap"}), holder).result()
    provider.submit(StartOptimization("main", "retries", "bootstrap", {"again": "yes"}), holder).result()


def _execute_tools(provider: EmbeddedState) -> None:
    _register_tools(provider)
    begun = _begin(provider, {"n": Value("1"), "café": Value('"ß"', SMALL_BYTES)}, {"note": "asset"}, key="one")
    provider.submit(PublishVariable("main", begun, "temperature", Value("1.5"), {"trial": "3"}), _TOOL).result()
    seen = see(provider.get_variable("main", "temperature"))
    line = LogEntry(START, "at work", {"step": 1, "größe": [None, True, 2.5]})
    verdict = Verdict(
        begun,
        ExecutionStatus.COMMITTED,
        Value('{"done":["é",1]}'),
        reads={"temperature": seen, "nothing": None},
        patterns=("t*",),
        log=(line,),
        recorded={"now": [1], "lm": [_lm_call(0), _lm_call(1)]},
        published=(("temperature", seen.version if seen is not None else 0),),
        duration_us=1234,
    )
    register = RegisterVariable("main", "by a tool", "list", Value("[1]"))
    steps = (
        Step(begun, SetVariable("main", "temperature", Value("1.25")), Source.PYTHON),
        Step(begun, register, Source.PYTHON, None, ("0123456789ab",)),
    )
    _finish(provider, verdict, steps=steps, checked={"temperature": seen})
    for status in (ExecutionStatus.FAILED, ExecutionStatus.TIMED_OUT, ExecutionStatus.CANCELLED):
        _finish(provider, Verdict(_begin(provider, key="one more"), status, failure=_FAILURE))
    _finish(provider, Verdict(_begin(provider), ExecutionStatus.COMMITTED), checked={"temperature": None})
    _call_tools(provider)
    _leave_tools(provider)


def _lm_call(ordinal: int) -> dict[str, Any]:
    """A recorded LM call; the second one failed."""
    messages = [{"role": "user", "content": "Größer?"}]
    answered = {"response": {"outputs": ["ja"], "usage": {"m/1": {"prompt_tokens": 5, "completion_tokens": 1}}}}
    failed = {"error": {"type": "builtins.OSError", "message": "no route"}}
    return {
        "ordinal": ordinal,
        "hash": f"{ordinal:064x}",
        "model": "m/1",
        "request": {"model_type": "chat", "messages": messages, "options": {"temperature": 0.5}},
        "lm": {"class": "dspy.clients.lm.LM", "defaults": {}},
        "concurrent": False,
        "at": 1_772_366_400_000_000 + ordinal,
        "latency_us": 1500,
        "cost": 0.25,
        "cached": False,
        **(failed if ordinal else answered),
    }


def _register_tools(provider: EmbeddedState) -> None:
    parameters = (
        ToolParameter("n", "integer", "how many", required=False, default=Value("3"), validation='{"min":0}'),
        ToolParameter("wörd", "any"),
    )
    far = ToolSpec("far", "lives elsewhere", parameters, metadata={"version": "1", "ort": "Köln"})
    near = ToolSpec("near", "", (), True, True, ("temperature",), Isolation.SNAPSHOT, 3, 2.5)
    for worker, spec in (("w1", far), ("w1", near), ("w2", replace(far, description="lives somewhere else"))):
        tool = RegisteredTool(spec, worker, f"unix:/tmp/{worker}")
        provider.submit(RegisterTools("main", worker, (tool,)), _TOOL).result()


def _call_tools(provider: EmbeddedState) -> None:
    """Executions within others: of one that ends well, and of one that does not."""
    for status in (ExecutionStatus.COMMITTED, ExecutionStatus.FAILED):
        parent = _begin(provider, key=f"parent {status}")
        well, badly = (_begin(provider, parent=parent) for _ in range(2))
        children = (
            Verdict(badly, ExecutionStatus.FAILED, failure=_FAILURE),
            Verdict(well, ExecutionStatus.COMMITTED, Value("[1]")),
        )
        step = Step(well, SetVariable("main", "history", Value('["of a child"]')), Source.PYTHON)
        _finish(provider, Verdict(parent, status, Value("2")), children, (step,))


def _leave_tools(provider: EmbeddedState) -> None:
    """Executions that their session, and later their server, do not survive."""
    provider.initialize_session("unfinished")
    provider.submit(BeginExecution("unfinished", "count"), _TOOL).result()
    provider.cleanup_session("unfinished")
    _begin(provider, parent=_begin(provider, key="left alone"))


def _prune(provider: EmbeddedState, clock: Any) -> None:
    """Two sessions of which history is gone: one that lives, and one that has ended. Some of it went in two goes."""
    provider.initialize_session("pruned")
    for name, value in (("x", ""), ("large", f"{LARGE_TEXT}, and gone"), ("first", "")):
        provider.register_variable("pruned", name, "string", value)
    provider.set_variable("pruned", "x", "annotated", metadata={"note": "in force for ever"})
    for number in range(6):
        values_of = {"x": f"x{number}", "large": "not any more", "first": "changed"}
        metadata = {"pinned": "true"} if number == 1 else {"step": str(number)} if number % 2 == 0 else {}
        provider.set_variables("pruned", values_of, metadata=metadata)
    provider.set_variable("pruned", "first", "alone")
    provider.delete_variable("pruned", "first")
    _end_one_to_be_pruned(provider)
    clock.tick(timedelta(minutes=1))
    for keep in (4, 2):
        provider.prune(PrunePolicy(keep_versions=keep, session_id="pruned"), confirm=True)
    provider.prune(PrunePolicy(ended_before=now(), session_id="gone"), confirm=True)
    provider.add_dependency("main", "document", "temperature", "mentions")
    provider.remove_dependency("main", "document", "temperature", "mentions")


def _end_one_to_be_pruned(provider: EmbeddedState) -> None:
    provider.initialize_session("gone")
    provider.initialize_session("gone", {"updated": "once"})
    provider.initialize_session("gone", {"updated": "twice"})
    for name in ("x", "y"):
        provider.register_variable("gone", name, "integer", 1, metadata={"about": name})
        provider.set_variable("gone", name, 2)
    provider.add_dependency("gone", "x", "y")
    provider.add_rule("gone", "ordered", "x <= y")
    provider.constrain_variable("gone", "y", {"max": 9}, 3)
    provider.remove_rule("gone", "ordered")
    provider.add_rule("gone", "positive", "y > 0")
    provider.submit(StartOptimization("gone", "y", "mipro"), _TOOL).result()
    provider.submit(BeginExecution("gone", "count"), _TOOL).result()
    provider.delete_variable("gone", "x")
    provider.cleanup_session("gone")


def _begin(
    provider: EmbeddedState,
    parameters: Mapping[str, Value] | None = None,
    metadata: Mapping[str, str] | None = None,
    key: str | None = None,
    parent: str | None = None,
) -> str:
    command = BeginExecution(
        "main", "count", parameters or {}, metadata or {}, parent_id=parent, idempotency_key=key, worker_id="w1"
    )
    return provider.submit(command, _TOOL).result().execution_id


def _finish(
    provider: EmbeddedState,
    verdict: Verdict,
    children: tuple[Verdict, ...] = (),
    steps: tuple[Step, ...] = (),
    checked: Mapping[str, Seen | None] | None = None,
) -> None:
    command = FinishExecution("main", verdict, children, steps, checked or {})
    provider.submit(command, replace(_TOOL, cause=verdict.execution_id)).result()


# What the engine answers

SESSIONS = ("main", "binaries", "again", "short", "üñí 'x'; --", "pruned", "ruled")
DELETED = {"main": ("scratch",), "pruned": ("first",), "ruled": ("gone",)}
_LIVE = "SELECT session_id FROM sessions WHERE ended_sequence IS NULL"
_JOURNAL = ("id", "tool", "status", "parent", "attempt", "key", "began", "ended", "beginning", "end")
_EXECUTIONS = """
    SELECT execution_id, tool, status, parent_id, attempt, idempotency_key, began_sequence, executions.ended_sequence,
        beginning.body, ending.body
    FROM executions JOIN sessions USING (session_key)
    JOIN events AS beginning ON beginning.sequence = began_sequence
    LEFT JOIN events AS ending ON ending.sequence = executions.ended_sequence
        AND ending.kind = 'execution_ended'
        AND json_extract(ending.body, '$.execution_id') = execution_id
    WHERE session_id = ? AND sessions.ended_sequence IS NULL ORDER BY began_sequence
"""


def _facts_of(tool: ToolSpec) -> dict[str, Any]:
    """The fields of a tool, as the first releases described it: without those that it leaves unset since."""
    return {name: fact for name, fact in asdict(tool).items() if name != "concurrency" or fact is not None}


def describe(path: Path) -> dict[str, Any]:
    """Everything that the engine answers about the live sessions of a database that `fill` made, as JSON has it."""
    with EmbeddedState(path) as provider, closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        # A revision that had less of everything is described as it was.
        live = {session_id for (session_id,) in connection.execute(_LIVE)}
        sessions = [session_id for session_id in SESSIONS if session_id in live]
        described = {session_id: _describe_session(provider, session_id) for session_id in sessions}
        for session_id in sessions:
            rows = connection.execute(_EXECUTIONS, [session_id])
            executions = [dict(zip(_JOURNAL, row, strict=True)) for row in rows]
            described[session_id] |= {"executions": executions} if executions else {}
    plain: dict[str, Any] = json.loads(json.dumps(described))
    return plain


def _describe_session(provider: EmbeddedState, session_id: str) -> dict[str, Any]:
    session = provider.get_session(session_id)
    variables = provider.list_variables(session_id)
    names = [variable.name for variable in variables] + list(DELETED.get(session_id, ()))
    tools = [_facts_of(tool) for tool in provider.list_tools(session_id)]
    rules = [asdict(rule) for rule in provider.list_rules(session_id)]
    return (
        ({"tools": tools} if tools else {})
        | ({"rules": rules} if rules else {})
        | {
            "metadata": dict(session.metadata),
            "created_at": str(session.created_at),
            "variables": [_describe_variable(variable) for variable in variables],
            "history": {name: _describe_history(provider, session_id, name) for name in names},
        }
    )


def _describe_variable(variable: Variable) -> dict[str, Any]:
    lock = variable.optimization
    return {
        "id": variable.id,
        "name": variable.name,
        "type": variable.type,
        "value": _describe_value(variable.value),
        "decoded": shorten(repr(values.decode(variable.type, variable.value))),
        "version": variable.version,
        "constraints": variable.constraints,
        "metadata": dict(variable.metadata),
        "source": variable.source.value,
        "updated_at": str(variable.updated_at),
        "optimization": lock
        and [lock.id, lock.optimizer_id, lock.started_by, dict(lock.config), str(lock.expires_at())],
    }


def _describe_history(provider: EmbeddedState, session_id: str, name: str) -> list[dict[str, Any]]:
    return [
        {
            "variable_id": version.variable_id,
            "version": version.version,
            "kind": version.kind.value,
            "value": _describe_value(version.value),
            "metadata": dict(version.metadata),
            "source": version.source.value,
            "created_at": str(version.created_at),
            "actor": version.actor,
            "cause": version.cause,
            "sequence": version.sequence,
        }
        for version in provider.get_variable_history(session_id, name, 1000)
    ]


def _describe_value(value: Value | None) -> dict[str, Any] | None:
    if value is None:
        return None
    binary = sha256(value.binary).hexdigest() if value.binary is not None else None
    return {"json": shorten(value.json), "sha256": sha256(value.json.encode()).hexdigest(), "binary_sha256": binary}


def shorten(text: str) -> str:
    """`text`, or the beginning of a long one."""
    return text if len(text) <= 100 else f"{text[:100]}..."


def main() -> None:
    """Write the files of this release's revision."""
    folder = Path(__file__).parent
    path = folder / f"{REVISION}.db"
    if path.exists():
        sys.exit(f"error: {path} is there already; a released database is never rewritten")
    fill(path)
    described = describe(path)
    path.with_suffix(".json").write_text(json.dumps(described, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for suffix in (".lock", ".anchor", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    path.chmod(0o644)
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
