"""Rebuilding the state from a log: with the same result as an import, and with contradictions reported."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dspex_persist import ToolContext, tool
from dspex_persist.replay import Aspect, Recording, replay_state
from dspex_persist.replay.rebuild import Rebuilt
from dspex_persist.state.audit import VariableState
from dspex_persist.state.commands import ImportCommit, RegisterTools
from dspex_persist.state.model import ChangeKind, EventKind, RegisteredTool, ToolSpec, Value
from dspex_persist.state.recording import RecordedCommit, RecordedEvent
from dspex_persist.state.session_state import SessionState
from tests.memory import MemoryGroups
from tests.unit.replays import session


@tool
def work(ctx: ToolContext, name: str) -> None:
    """Write, register and delete in one commit."""
    ctx["n"] += 1
    ctx.define(name, {"a": 1})
    ctx.publish("shown", 1)
    ctx["n"] += 1
    del ctx["old"]
    ctx.define("old", 2, constraints={"min": 0})
    ctx["old"] = 3


@pytest.fixture(scope="module")
def recording() -> Recording:
    with session(work, n=0, shown=0, old=0, used=1.5) as state:
        state.initialize_session("s", {"owner": "me"})
        state.run(RegisterTools("s", "w1", (RegisteredTool(ToolSpec("far"), "w1", "here:1"),)))
        state.add_dependency("s", "n", "used")
        state.add_dependency("s", "used", "old", "kind")
        state.start_optimization("s", "n", "optimizer", {"rounds": "3"})
        state.set_variable("s", "n", 5, metadata={"optimizer_id": "optimizer", "loss": "0.5"})
        state.stop_optimization("s", "n", force=True)
        state.execute_tool("s", "work", {"name": "made"})
        state.start_optimization("s", "used", "other")
        state.rollback_variable("s", "n", 0)
        state.delete_variable("s", "shown")
        return state.recording()


def facts(state: SessionState | None) -> Any:
    """A state without the fields that only a store uses."""
    assert state is not None
    session = replace(state.session, ttl_s=None)
    running = {name: replace(each, fingerprint="") for name, each in state.executions.items()}
    kept = (state.variables, list(state.variables), state.names, state.dependencies, state.tools, running)
    return session, *kept, state.sequence


def test_the_state_at_each_commit_equals_that_of_an_import(recording: Recording) -> None:
    rebuilt, imported = Rebuilt(), MemoryGroups()
    for commit in recording.commits:
        rebuilt.apply(commit)
        imported.run(ImportCommit("s", commit))
        assert facts(rebuilt.state) == facts(imported.states["s"]), commit


def test_divergences_in_a_database_have_its_commit_numbers(recording: Recording) -> None:
    wrong = changed(
        recording,
        lambda commit: any(version.version == 1 for version in commit.versions),
        lambda commit: replace(commit, versions=tuple(replace(each, version=9) for each in commit.versions)),
    )
    (before, *_) = replay_state(wrong).divergences
    shifted = tuple(replace(commit, sequence=commit.number + 100) for commit in wrong.commits)
    (after, *_) = replay_state(replace(wrong, commits=shifted)).divergences
    assert after == replace(before, commit=before.commit + 100)


def test_a_sound_log_has_no_divergence(recording: Recording) -> None:
    report = replay_state(recording)
    assert report.ok
    assert report.mode == "state"
    assert str(report) == f"session s: no divergence in {len(recording.commits)} commits"


def changed(
    recording: Recording, is_meant: Callable[[RecordedCommit], bool], change: Callable[[RecordedCommit], RecordedCommit]
) -> Recording:
    """The recording with the first matching commit altered."""
    commits = list(recording.commits)
    place = next(place for place, commit in enumerate(commits) if is_meant(commit))
    commits[place] = change(commits[place])
    return replace(recording, commits=tuple(commits))


def sets_n(commit: RecordedCommit) -> bool:
    return any(version.name == "n" and version.version == 1 for version in commit.versions)


def with_version(**changes: Any) -> Callable[[RecordedCommit], RecordedCommit]:
    return lambda commit: replace(commit, versions=(replace(commit.versions[0], **changes), *commit.versions[1:]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "n version 2: version 1 is due"),
        ({"value": Value('"x"')}, "its value violates the variable's type or constraints"),
        ({"value": Value(" 5")}, "its value would have been stored as 5"),
        ({"value": None}, "only a deletion has no value"),
        ({"kind": ChangeKind.REGISTERED}, "a variable is registered with its first version"),
        ({"name": "m"}, "its variable was registered as n"),
        ({"variable_id": "nobody"}, "its variable was never registered"),
    ],
)
def test_contradictory_versions_are_reported(recording: Recording, changes: dict[str, Any], message: str) -> None:
    report = replay_state(changed(recording, sets_n, with_version(**changes)))
    first = report.divergences[0]
    assert first.what is Aspect.VERSIONS
    assert message in first.summary


def is_end(commit: RecordedCommit) -> bool:
    return any(event.kind is EventKind.EXECUTION_ENDED for event in commit.events)


def with_end(**changes: Any) -> Callable[[RecordedCommit], RecordedCommit]:
    def change(event: RecordedEvent) -> RecordedEvent:
        return replace(event, body={**event.body, **changes}) if event.kind is EventKind.EXECUTION_ENDED else event

    return lambda commit: replace(commit, events=tuple(map(change, commit.events)))


def test_a_journal_without_the_actual_writes_is_reported(recording: Recording) -> None:
    silent = replay_state(changed(recording, is_end, with_end(writes=[])))
    assert {each.what for each in silent.divergences} == {Aspect.JOURNAL}
    assert "n version 3: it is in no execution's journal entry" in [each.summary for each in silent.divergences]
    boasting = replay_state(changed(recording, is_end, with_end(writes=[["n", 99]])))
    assert boasting.divergences[0].diff == ("-n v99",)
    stranger = replay_state(changed(recording, is_end, with_end(execution_id="exec_1_0")))
    assert [each.summary for each in stranger.divergences] == ["it ended without running"]


def kept(state: SessionState) -> list[VariableState]:
    """A state as an audit reports it."""
    return [
        VariableState(
            "s",
            each.name,
            each.id,
            each.type,
            each.value,
            each.version,
            ChangeKind.SET,
            each.source,
            each.constraints,
            each.metadata,
            1,
            each.updated_at,
            "",
            "",
        )
        for each in state.variables.values()
    ]


def test_a_stored_state_that_differs_is_reported(recording: Recording) -> None:
    rebuilt = Rebuilt()
    for commit in recording.commits:
        rebuilt.apply(commit)
    assert rebuilt.state is not None
    stored = kept(rebuilt.state)
    assert replay_state(recording, stored).ok
    altered = [replace(stored[0], value=Value("77")), *stored[1:]]
    (divergence,) = replay_state(recording, altered).divergences
    assert divergence.what is Aspect.STATE
    assert divergence.summary == "n: the state rebuilt from the log (-) differs from the stored one (+)"
    assert {"-value = 0", "+value = 77"} <= set(divergence.diff)
    assert len(replay_state(recording, stored[1:]).divergences) == 1
    assert replay_state(recording, [replace(altered[0], value=None, masked=True), *stored[1:]]).ok
