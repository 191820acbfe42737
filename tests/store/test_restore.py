"""Restored sessions in files and in memory: rules, recordings, the check of a file, conflicts, pruning."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dspex_persist import LocalState
from dspex_persist.replay import replay_state
from dspex_persist.state import commands, errors
from dspex_persist.state.audit import CommitQuery
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.local import MemoryState
from dspex_persist.state.model import RESTORED_METADATA, ChangeKind, EventKind, PrunePolicy, Value
from dspex_persist.state.recording import RecordedCommit
from dspex_persist.state.store import maintenance

State = LocalState | EmbeddedState


@pytest.fixture(params=["memory", "file"])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[State]:
    opened = LocalState() if request.param == "memory" else EmbeddedState(tmp_path / "sessions.db")
    with opened as state:
        state.initialize_session("before")
        state.initialize_session("s")
        yield state


def newest(state: State, name: str) -> int:
    """Return the commit of the newest version of a variable."""
    return state.get_variable_history("s", name)[0].sequence


def live(state: State) -> int:
    """Change all kinds of things; return the commit to go back to."""
    for name in ("a", "b", "c", "d"):
        state.register_variable("s", name, "integer", 0)
    state.add_dependency("s", "b", "a")
    state.run(commands.AddRule("s", "small", "a + b < 100"))
    state.register_variable("s", "mark", "integer", 0)
    at = newest(state, "mark")
    state.register_variable("s", "x", "integer", 0)
    state.add_dependency("s", "a", "x")
    state.add_dependency("s", "x", "c")
    state.run(commands.RemoveDependency("s", "b", "a"))
    state.run(commands.RemoveRule("s", "small"))
    state.run(commands.AddRule("s", "other", "a >= 0"))
    state.set_variable("s", "a", 500)
    state.delete_variable("s", "d")
    state.register_variable("s", "d", "string", "another")
    return at


def test_rules_are_as_they_were(state: State) -> None:
    at = live(state)
    before = state.restore_session("s", str(at)).sequence
    assert [rule.name for rule in state.run(commands.ListRules("s"))] == ["small"]
    with pytest.raises(errors.RuleViolatedError):
        state.set_variable("s", "a", 500)
    state.run(commands.RemoveRule("s", "small"))
    state.run(commands.AddRule("s", "small", "a + b < 1000"))
    state.set_variable("s", "a", 600)
    state.restore_session("s", str(before))
    assert [rule.expression for rule in state.run(commands.ListRules("s"))] == ["a + b < 100"]


def test_a_recording_has_it_and_can_be_imported_and_replayed(state: State, tmp_path: Path) -> None:
    at = live(state)
    restored = state.restore_session("s", str(at))
    state.set_variable("s", "a", 1)
    again = state.restore_session("s", str(restored.sequence))
    header, recorded = state.record("s")
    commits = list(recorded)
    own = [commit.sequence for commit in commits]
    events = {
        commit.sequence: event.body
        for commit in commits
        for event in commit.events
        if event.kind is EventKind.SESSION_RESTORED
    }
    # In a recording, commits have the numbers that they have there.
    assert events == {
        restored.sequence: {"sequence": own.index(at) + 1},
        again.sequence: {"sequence": own.index(restored.sequence) + 1},
    }
    assert replay_state((header, commits)).ok
    with EmbeddedState(tmp_path / "other.db") as other, LocalState() as memory:
        for target in (other, memory):
            target.initialize_session("shifts the numbers")
            target.import_session(header, iter(commits))
            assert _portable(target.record("s")[1]) == _portable(commits)
            assert target.content_hash("s") == state.content_hash("s")
            assert [each[1:4] for each in target.list_variables("s")] == [
                each[1:4] for each in state.list_variables("s")
            ]
            target.restore_session("s", "now^")
    assert not list(maintenance.check(tmp_path / "other.db").problems)


def _portable(commits: Iterator[RecordedCommit] | list[RecordedCommit]) -> list[object]:
    return [(each.number, each.actor, each.cause, each.versions, each.events) for each in commits]


def test_a_file_with_it_is_sound_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "sessions.db"
    with EmbeddedState(path) as state:
        state.initialize_session("s")
        restored = state.restore_session("s", str(live(state)))
        with state.audit() as audit:
            before = {each.name: each.value for each in audit.state("s", f"{restored.sequence}^")}
            after = {each.name: each.value for each in audit.state("s", restored.sequence)}
            (entry,) = audit.page(CommitQuery(cause="RestoreSession")).rows
        assert (before["a"], after["a"]) == (Value("500"), Value("0"))
        assert (entry.sequence, entry.events.count("session_restored")) == (restored.sequence, 1)
    assert not list(maintenance.check(path).problems)
    with EmbeddedState(path) as state:
        assert state.get_value("s", "a") == state.get_value("s", "d") == 0
        assert state.run(commands.GetDependencies("s", "b")) == ("a",)
        assert [rule.name for rule in state.run(commands.ListRules("s"))] == ["small"]


def test_metadata_follows_from_the_log(tmp_path: Path) -> None:
    path = tmp_path / "sessions.db"
    with EmbeddedState(path) as state:
        state.initialize_session("s")
        state.register_variable("s", "a", "integer", 0, metadata={"unit": "m"})
        first = newest(state, "a")
        state.set_variable("s", "a", 1, metadata={"unit": "km", "new": "1"})
        second = newest(state, "a")
        third = state.restore_session("s", str(first)).sequence
        state.set_variable("s", "a", 2, metadata={"later": "2"})
        then = [{"unit": "m"}, {"unit": "km", "new": "1"}, {"unit": "m"}, {"unit": "m", "later": "2"}]
        with state.audit() as audit:
            at = [audit.state("s", each)[0].metadata for each in (first, second, third, "now")]
        assert at == then
        with state.watch("s", after_sequence=first) as watch:
            assert [update.variable.metadata for update in watch.pull()] == then[1:]
        header, recorded = state.record("s")
        commits = list(recorded)
    for keep, left in ((3, 3), (1, 2)):
        with EmbeddedState(path) as state:
            assert state.get_variable("s", "a").metadata == then[-1]
            state.prune(PrunePolicy(keep_versions=keep), confirm=True)
            # What a later version needs of the metadata of earlier ones stays, but nothing before it was replaced.
            assert len(state.get_variable_history("s", "a")) == left
            with state.audit() as audit:
                assert audit.state("s")[0].metadata == then[-1]
        assert not list(maintenance.check(path).problems)
    with EmbeddedState(tmp_path / "other.db") as other:
        other.import_session(header, iter(commits))
        assert other.get_variable("s", "a").metadata == then[-1]
    broken = [_with_metadata(commit, '{"unit": 3}') for commit in commits]
    with EmbeddedState(tmp_path / "third.db") as third_state, pytest.raises(errors.RecordingError):
        third_state.import_session(header, iter(broken))


def _with_metadata(commit: RecordedCommit, text: str) -> RecordedCommit:
    versions = tuple(
        replace(each, metadata={**each.metadata, RESTORED_METADATA: text})
        if RESTORED_METADATA in each.metadata
        else each
        for each in commit.versions
    )
    return replace(commit, versions=versions)


def test_transactions_conflict_with_it(state: State) -> None:
    at = live(state)
    reads, apart = state.begin_transaction("s"), state.begin_transaction("s")
    reads.run(commands.GetVariable("s", "a"))
    reads.run(commands.SetVariable("s", "b", Value("1")))
    apart.run(commands.SetVariable("s", "c", Value("1")))
    restored = state.restore_session("s", str(at))
    assert restored.changed == ("a",)
    with pytest.raises(errors.ExecutionConflictError):
        reads.commit()
    apart.commit()
    assert (state.get_value("s", "b"), state.get_value("s", "c")) == (0, 1)


def test_to_an_execution(state: State) -> None:
    state.register_variable("s", "a", "integer", 0)
    with state.begin_transaction("s") as transaction:
        transaction.run(commands.SetVariable("s", "a", Value("1")))
    state.set_variable("s", "a", 2)
    state.restore_session("s", transaction.execution_id)
    assert state.get_value("s", "a") == 1
    state.restore_session("s", f"{transaction.execution_id}^")
    assert state.get_value("s", "a") == 0


def test_what_was_pruned_cannot_come_back(tmp_path: Path) -> None:
    with EmbeddedState(tmp_path / "sessions.db") as state:
        state.initialize_session("s")
        state.register_variable("s", "a", "integer", 0)
        for number in range(1, 4):
            state.set_variable("s", "a", number)
        state.prune(PrunePolicy(keep_versions=2), confirm=True)
        sequences = [version.sequence for version in state.get_variable_history("s", "a")]
        assert len(sequences) == 2
        with pytest.raises(errors.StateError, match="pruned"):
            state.restore_session("s", str(sequences[-1] - 1))
        state.restore_session("s", str(sequences[-1]))
        assert state.get_value("s", "a") == 2
        state.prune(PrunePolicy(keep_versions=1), confirm=True)
    assert not list(maintenance.check(tmp_path / "sessions.db").problems)


def test_a_fork_is_of_the_restored_state(state: State) -> None:
    at = live(state)
    state.restore_session("s", str(at))
    view = state.fork_session("s", "copy")
    assert {each.name: each.value for each in view.variables} == {
        each.name: each.value for each in state.list_variables("s")
    }
    kinds = [version.kind for version in state.get_variable_history("s", "a")]
    assert kinds == [ChangeKind.ROLLED_BACK, ChangeKind.SET, ChangeKind.REGISTERED]
    assert isinstance(state.engine, MemoryState) or state.engine.head_sequence
