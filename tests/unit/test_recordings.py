"""Recordings: the file's format, and the commands that build a session from one, over memory."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from freezegun import freeze_time

from dspex_persist.state import commands as c
from dspex_persist.state.errors import LimitExceededError, RecordingError, SessionExistsError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import (
    ChangeKind,
    Dependency,
    EventKind,
    Optimization,
    Origin,
    Source,
    Value,
    Variable,
)
from dspex_persist.state.recording import (
    Header,
    RecordedCommit,
    RecordedEvent,
    RecordedVersion,
    read_recording,
    renumbered,
    write_recording,
)
from tests.memory import MemoryGroups

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
BEGAN = {
    "execution_id": "exec_4_0123ab",
    "tool": "t",
    "parent_id": None,
    "idempotency_key": "key",
    "fingerprint": "f",
    "parameters": {},
    "metadata": {},
    "isolation": "serializable",
    "attempt": 1,
    "seed": "s",
    "worker_id": "",
    "retry_of": None,
}
ENDED = {"execution_id": "exec_4_0123ab", "status": "committed", "result": {"json": "1"}, "reads": {}}


def version(number: int, value: str | None = "1", kind: ChangeKind = ChangeKind.SET, **more: Any) -> RecordedVersion:
    kept = Value(value) if value is not None else None
    return RecordedVersion("var_x_1", "x", number, kind, Source.PYTHON, kept, **more)


def registered(**more: str) -> RecordedEvent:
    body = {"variable_id": "var_x_1", "name": "x", "type": "integer", "constraints": ""}
    return RecordedEvent(EventKind.VARIABLE_REGISTERED, body | more)


def started(**more: Any) -> RecordedEvent:
    body = {"session_id": "s", "metadata": {"of": "ann"}, "ttl_s": None, "config": {}}
    return RecordedEvent(EventKind.SESSION_STARTED, body | more)


def commit(number: int, *parts: RecordedVersion | RecordedEvent, cause: str = "SetVariable") -> RecordedCommit:
    versions = tuple(part for part in parts if isinstance(part, RecordedVersion))
    events = tuple(part for part in parts if isinstance(part, RecordedEvent))
    return RecordedCommit(number, START + timedelta(seconds=number), "ann", cause, versions, events)


FIRST = version(0, "1", ChangeKind.REGISTERED)
COMMITS = (
    commit(1, started(), cause="InitializeSession"),
    commit(2, registered(), FIRST, cause="RegisterVariable"),
    commit(3, version(1, "2", metadata={"why": "so"})),
    commit(4, RecordedEvent(EventKind.EXECUTION_BEGAN, BEGAN), cause="ExecuteTool"),
    commit(5, RecordedEvent(EventKind.EXECUTION_ENDED, ENDED), version(2, "3"), cause="exec_4_0123ab"),
)


def text_of(commits: tuple[RecordedCommit, ...] = COMMITS, **more: Any) -> str:
    written = io.StringIO()
    write_recording(Header("s", len(commits), **more), commits, written)
    return written.getvalue()


def read(text: str) -> tuple[Header, tuple[RecordedCommit, ...]]:
    header, commits = read_recording(io.StringIO(text))
    return header, tuple(commits)


def built(commits: tuple[RecordedCommit, ...] = COMMITS, limits: Limits | None = None, id_: str = "s") -> MemoryGroups:
    memory = MemoryGroups(limits)
    for each in commits:
        memory.run(c.ImportCommit(id_, each))
    return memory


# --- The format ---


def test_the_order_of_keys_does_not_tell_what_kept_the_session() -> None:
    def turned(document: Any) -> Any:
        if isinstance(document, dict):
            return {key: turned(document[key]) for key in reversed(document)}
        return [turned(each) for each in document] if isinstance(document, list) else document

    whole = {**BEGAN, "parameters": {"b": {"json": "1"}, "a": {"json": "2"}}, "reads": [{"name": "x", "version": 1}]}
    one, other = (
        commit(1, version(1, "2", metadata=turn({"why": "so", "by": "ann"})), RecordedEvent(kind, turn(whole)))
        for kind in [EventKind.EXECUTION_BEGAN]
        for turn in (dict, turned)
    )
    assert text_of((one,)) == text_of((other,))


def test_a_written_recording_reads_back_the_same() -> None:
    odd = commit(
        6,
        version(3, None, ChangeKind.DELETED),
        RecordedVersion("v", "é\u2028\n", 0, ChangeKind.SET, Source.ELIXIR, Value("{}", b"\x00\xff"), {"ü": "\r"}),
        version(4, None, masked=True),
        RecordedEvent(EventKind.SESSION_ENDED, {"reason": "漢 \ud800"}),
    )
    text = text_of((*COMMITS, odd), masked=True)
    assert read(text) == (Header("s", 6, masked=True), (*COMMITS, odd))
    assert len(text.encode().splitlines()) == 7


def test_each_line_is_one_commit_as_plain_json() -> None:
    header, *lines = map(json.loads, text_of().splitlines())
    assert header == {
        "format": "dspex-persist session",
        "version": 1,
        "session_id": "s",
        "commits": 5,
        "masked": False,
    }
    assert [line["commit"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[2] == {
        "commit": 3,
        "at": "2026-03-01T12:00:03+00:00",
        "actor": "ann",
        "cause": "SetVariable",
        "versions": [
            {
                "variable_id": "var_x_1",
                "name": "x",
                "version": 1,
                "kind": "set",
                "source": "python",
                "json": "2",
                "metadata": {"why": "so"},
            }
        ],
        "events": [],
    }


@pytest.mark.parametrize(
    ("damage", "line", "message"),
    [
        (lambda _: "", 1, "it is not a recording"),
        (lambda text: "{}\n" + text, 1, "it is not a recording"),
        (lambda text: "[" * 100_000 + text, 1, "it is not a recording"),
        (lambda text: text.replace('"version": 1', '"version": 2', 1), 1, "export the session again"),
        (lambda text: text[: text.rindex('{"commit": 5')], 5, "it ends after 4 commits of 5"),
        (
            lambda text: text[:-20],
            6,
            r"it is not a commit: the line is cut off \(column \d+\): the file ends too early",
        ),
        (lambda text: text.replace('"actor":', '"actor"', 1), 2, r"the line is not JSON \(column \d+: "),
        (lambda text: text + text.splitlines()[-1], 7, "it has commit 5 instead of commit 6"),
        (lambda text: text.replace('"commit": 3', '"commit": 4', 1), 4, "instead of commit 3"),
        (lambda text: text.replace("12:00:03+00:00", "12:00:03", 1), 4, "has no time zone"),
        (lambda text: text.replace("12:00:03", "25:00:03", 1), 4, "it is not a commit"),
        (lambda text: text.replace('"kind": "set"', '"kind": "sat"', 1), 4, "it is not a commit"),
        (lambda text: text.replace('"metadata": {"why": "so"}', '"metadata": 5', 1), 4, "it is not a commit"),
    ],
)
def test_a_damaged_recording_is_refused_with_its_line(damage: Callable[[str], str], line: int, message: str) -> None:
    with pytest.raises(RecordingError, match=message) as caught:
        read(damage(text_of()))
    assert caught.value.line == line


def test_text_that_is_not_utf8_is_refused_with_its_line() -> None:
    content = text_of().encode().replace(b'"why": "so"', b'"why": "\xff"')
    lines: Iterator[str] = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
    with pytest.raises(RecordingError, match="not UTF-8 text"):
        tuple(read_recording(lines)[1])


def test_ids_of_executions_are_renumbered_wherever_they_are() -> None:
    began = RecordedEvent(
        EventKind.EXECUTION_BEGAN, BEGAN | {"parent_id": "exec_2_aa", "retry_of": "exec_3_bb", "tool": "exec_2_aa"}
    )
    changed = renumbered(commit(4, began, cause="exec_4_0123ab"), {4: 104, 2: 102}.get)
    (event,) = changed.events
    assert changed.cause == "exec_104_0123ab"
    assert event.body["execution_id"] == "exec_104_0123ab"
    assert (event.body["parent_id"], event.body["retry_of"], event.body["tool"]) == (
        "exec_102_aa",
        "exec_3_bb",
        "exec_2_aa",
    )
    assert list(event.body) == list(began.body)


# --- Building a session from a recording ---


def test_commits_are_repeated_one_by_one() -> None:
    memory = built()
    state = memory.states["s"]
    assert (state.session.created_at, state.session.metadata) == (COMMITS[0].at, {"of": "ann"})
    x = state.variables["x"]
    assert (x.value, x.version, x.metadata, x.updated_at) == (Value("3"), 2, {"why": "so"}, COMMITS[4].at)
    history = memory.run(c.GetVariableHistory("s", "x"))
    assert [(each.value, each.cause) for each in history][:2] == [
        (Value("3"), "exec_4_0123ab"),
        (Value("2"), "SetVariable"),
    ]
    assert {each.actor for each in history} == {"ann"}


def test_a_recording_may_follow_what_others_did_under_another_id() -> None:
    memory = MemoryGroups()
    memory.run(c.InitializeSession("other"))
    for each in COMMITS[:4]:
        memory.run(c.ImportCommit("copy", each))
    assert list(memory.states["copy"].executions) == ["exec_5_0123ab"]
    assert memory.run(c.FinishImport("copy")) == 1
    assert memory.run(c.FinishImport("copy")) == 0
    assert memory.states["copy"].executions == {}
    (event,) = memory.commits[-1].events
    body = event.to_body()
    assert (body["execution_id"], body["status"]) == ("exec_5_0123ab", "interrupted")


def test_commits_come_in_order_with_nothing_in_between() -> None:
    memory = built(COMMITS[:2])
    with pytest.raises(RecordingError, match="does not follow"):
        memory.run(c.ImportCommit("s", COMMITS[3]))
    memory.run(c.SetVariable("s", "x", Value("9")))
    with pytest.raises(RecordingError, match="does not follow"):
        memory.run(c.ImportCommit("s", COMMITS[2]))


def test_a_live_session_is_not_overwritten() -> None:
    memory = built()
    with pytest.raises(SessionExistsError, match="another session_id"):
        memory.run(c.ImportCommit("s", COMMITS[0]))


def test_a_session_ends_only_where_its_recording_says_so() -> None:
    """The reads and heartbeats that kept it alive are not in the recording."""
    commits = (commit(1, started(ttl_s=1.0)), *COMMITS[1:])
    with freeze_time(START + timedelta(days=365)):
        memory = built(commits)
        assert memory.run(c.GetVariable("s", "x")).version == 2
        memory.run(
            c.ImportCommit(
                "s", commit(6, RecordedEvent(EventKind.SESSION_ENDED, {"session_id": "s", "reason": "expired"}))
            )
        )
        assert "s" not in memory.states


def test_the_ttl_restarts_after_an_import() -> None:
    commits = (commit(1, started(ttl_s=60.0)), *COMMITS[1:])
    with freeze_time(START + timedelta(days=365)) as clock:
        memory = built(commits)
        memory.run(c.FinishImport("s"))
        clock.tick(59)
        assert memory.run(c.Heartbeat("s"))
        clock.tick(61)
        assert not memory.run(c.Heartbeat("s"))


def test_a_name_changes_hands_within_one_commit() -> None:
    second = replace(FIRST, variable_id="var_x_2")
    commits = (*COMMITS[:2], commit(3, version(1, None, ChangeKind.DELETED), registered(variable_id="var_x_2"), second))
    assert built(commits).states["s"].variables["x"].id == "var_x_2"


def wrong(*parts: RecordedVersion | RecordedEvent, number: int = 6, **more: Any) -> RecordedCommit:
    return replace(commit(number, *parts), **more)


def event(kind: EventKind, **body: Any) -> RecordedEvent:
    return RecordedEvent(kind, body)


def began(**more: Any) -> RecordedEvent:
    return RecordedEvent(EventKind.EXECUTION_BEGAN, BEGAN | more)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (wrong(), "changes nothing"),
        (wrong(started()), "begins the session"),
        (wrong(version(4)), "does not follow version 2"),
        (wrong(version(2)), "does not follow version 2"),
        (wrong(version(3, kind=ChangeKind.REGISTERED)), "registered already"),
        (wrong(version(3, '"text"')), "integer"),
        (wrong(version(3, "1.0")), "not in the form in which a store writes"),
        (wrong(version(3, None)), "it has no value"),
        (wrong(version(3, None, masked=True)), "kept out of the recording"),
        (wrong(version(3, metadata={"dspex.x": ""})), "is set by the server"),
        (wrong(replace(version(3), variable_id="ghost")), "no variable 'ghost'"),
        (wrong(replace(version(3), name="y")), "does not follow"),
        (wrong(registered()), "cannot be registered here"),
        (wrong(registered(variable_id="v", name="y"), replace(FIRST, variable_id="v")), "has no version 0"),
        (wrong(registered(variable_id="v", name="y", type="what"), replace(FIRST, variable_id="v", name="y")), "type"),
        (wrong(registered(variable_id="v"), replace(FIRST, variable_id="v")), "cannot be registered here"),
        (wrong(version(3), actor="\ud800"), "surrogates"),
        (wrong(RecordedEvent(EventKind.EXECUTION_BEGAN, BEGAN)), "does not name the commit"),
        (
            wrong(
                RecordedEvent(
                    EventKind.EXECUTION_BEGAN, BEGAN | {"execution_id": "exec_6_aa", "parent_id": "exec_4_0123ab"}
                )
            ),
            "is not running",
        ),
        (
            wrong(RecordedEvent(EventKind.EXECUTION_BEGAN, BEGAN | {"execution_id": "exec_6_aa", "tool": None})),
            "is not a string",
        ),
        (wrong(RecordedEvent(EventKind.EXECUTION_ENDED, ENDED)), "is not running"),
        (
            wrong(began(execution_id="exec_6_aa"), began(execution_id="exec_6_aa")),
            "one execution at most",
        ),
        (wrong(event(EventKind.DEPENDENCY_ADDED, from_id="var_x_1", to_id="var_x_1", type="")), "cycle"),
        (wrong(event(EventKind.DEPENDENCY_ADDED, from_id="var_x_1", to_id="gone", type="")), "no variable 'gone'"),
        (
            wrong(event(EventKind.OPTIMIZATION_STARTED, variable_id="var_x_1")),
            "malformed event: missing key 'opt",
        ),
        (
            wrong(event(EventKind.OPTIMIZATION_STOPPED, variable_id="var_x_1", optimization_id="o", reason="")),
            "is not locked by",
        ),
        (wrong(event(EventKind.TOOLS_REGISTERED, worker_id="w", tools=[{"spec": {}}])), "missing key 'tools.0"),
        (
            wrong(event(EventKind.SESSION_UPDATED, session_id="s", metadata={"k": 5}, ttl_s=None)),
            "'metadata.k' is not a string",
        ),
        (wrong(event(EventKind.SESSION_UPDATED, session_id="s", metadata={}, ttl_s=1e30)), "cannot have a TTL"),
        (wrong(event(EventKind.PRUNED, versions=1)), "pruned"),
        (wrong(event(EventKind.SESSION_ENDED, reason="over"), version(3), number=7), "does not follow"),
    ],
)
def test_an_impossible_commit_is_refused(last: RecordedCommit, message: str) -> None:
    memory = built()
    with pytest.raises(RecordingError, match=message) as caught:
        memory.run(c.ImportCommit("s", last))
    assert caught.value.line == last.number + 1
    assert memory.sequence == 5


def test_a_session_that_does_not_begin_is_refused() -> None:
    for first in (commit(1, registered(), FIRST), commit(1), commit(1, registered(), started(), FIRST)):
        with pytest.raises(RecordingError, match="begins the session"):
            built((first,))


@pytest.mark.parametrize(
    "limits",
    [
        Limits(value_size_bytes=0),
        Limits(variables_per_session=0),
        Limits(name_length=2),
        Limits(metadata_entries=0),
    ],
)
def test_limits_are_those_of_the_store_that_imports(limits: Limits) -> None:
    with pytest.raises(RecordingError, match="above the limit") as caught:
        built(limits=limits)
    assert isinstance(caught.value.__cause__, LimitExceededError)


# --- Forks ---


def test_a_fork_has_the_variables_and_where_they_are_from() -> None:
    at = START - timedelta(days=1)
    lock = Optimization("o", "mipro", at)
    x = Variable("vx", "x", "integer", Value("7"), 5, '{"min":0}', {"why": "so"}, Source.ELIXIR, at, lock)
    y = Variable("vy", "y", "string", Value('"é"'), 0, "", {}, Source.PYTHON, at)
    memory = MemoryGroups()
    memory.run(c.InitializeSession("other"))
    fork = c.ForkSession("new", "old", 17, (x, y), (Dependency("vx", "vy", "uses", 3),))
    view = memory.run(fork, Origin("ann", "ForkSession", Source.PYTHON))
    state = memory.states["new"]
    assert memory.sequence == 2
    assert state.session.metadata == {"forked_from": "old", "forked_at": "17"}
    assert memory.commits[-1].events[0].to_body()["config"] == {"forked": {"session_id": "old", "sequence": 17}}
    assert view.variables == tuple(state.variables.values())
    forked = state.variables["x"]
    assert (forked.type, forked.value, forked.version, forked.constraints) == ("integer", Value("7"), 0, '{"min":0}')
    assert (forked.metadata, forked.source, forked.optimization) == ({"why": "so"}, Source.ELIXIR, None)
    assert forked.id not in ("vx", "vy")
    (edge,) = state.dependencies
    assert (state.names[edge.from_id], state.names[edge.to_id], edge.type, edge.since) == ("x", "y", "uses", 2)
    with pytest.raises(SessionExistsError):
        memory.run(fork)
