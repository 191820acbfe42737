"""Random sessions that go back to random commits: each time, everything is as it was."""

import tempfile
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspex_persist import LocalState
from dspex_persist.replay import replay_state
from dspex_persist.state import commands as c
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import StateError
from dspex_persist.state.model import Value
from dspex_persist.state.store import maintenance

State: TypeAlias = LocalState | EmbeddedState
NAMES = ("a", "b", "c", "d")

names = st.sampled_from(NAMES)
metadata = st.dictionaries(st.sampled_from(["unit", "of", "note"]), st.sampled_from(["1", "2", "é"]), max_size=2)
numbers = st.integers(0, 5).map(lambda number: Value(str(number)))
registrations = st.one_of(
    st.builds(c.RegisterVariable, st.just("s"), names, st.just("integer"), numbers, st.just(""), metadata),
    st.builds(c.RegisterVariable, st.just("s"), names, st.just("string"), st.just(Value('"x"'))),
)
writes = st.one_of(
    st.builds(c.SetVariable, st.just("s"), names, numbers, metadata),
    st.builds(c.SetVariable, st.just("s"), names, numbers),
    st.builds(c.RollbackVariable, st.just("s"), names, st.integers(0, 2)),
    st.builds(c.ConstrainVariable, st.just("s"), names, st.sampled_from(["", '{"max": 5}', '{"min": 0}'])),
)
rules = st.one_of(
    st.builds(c.AddRule, st.just("s"), st.sampled_from(["r", "q"]), st.sampled_from(["a < 6", "b < 9"])),
    st.builds(c.RemoveRule, st.just("s"), st.sampled_from(["r", "q"])),
)
edges = st.one_of(
    st.builds(c.AddDependency, st.just("s"), names, names, st.sampled_from(["", "uses"])),
    st.builds(c.RemoveDependency, st.just("s"), names, names, st.sampled_from(["", "uses"])),
)
deletions = st.builds(c.DeleteVariable, st.just("s"), names)
changes = st.one_of(registrations, writes, writes, edges, edges, rules, deletions)
places = st.floats(0, 1)
"""Places in the history so far to go back to: 0 is its beginning, 1 its end."""
rounds = st.lists(st.tuples(st.lists(changes, min_size=6, max_size=12), places), min_size=2, max_size=4)


def facts_of(state: State) -> Any:
    """Return all that a restore brings back."""
    variables = {each.name: each for each in state.list_variables("s")}
    edges = [edge for edge in state.run(c.ReadState("s")).dependencies if edge.until is None]
    names = {variable.id: name for name, variable in variables.items()}
    return (
        {name: (each.type, each.value, each.constraints, dict(each.metadata)) for name, each in variables.items()},
        sorted((names[edge.from_id], names[edge.to_id], edge.type) for edge in edges),
        sorted((rule.name, rule.expression) for rule in state.run(c.ListRules("s"))),
    )


def go(state: State, given_rounds: list[tuple[list[Any], float]]) -> list[Any]:
    """Change the session and go back, in rounds; check each time that it is what it was. Returns all its states."""
    state.initialize_session("s")
    for name in NAMES[:3]:
        state.register_variable("s", name, "integer", 1)
    seen = [(_last(state), facts_of(state))]
    for step in (step for changed, place in given_rounds for step in (*changed, place)):
        if isinstance(step, float):
            sequence, expected = seen[round(step * (len(seen) - 1))]
            restored = state.restore_session("s", str(sequence))
            assert facts_of(state) == expected
            assert restored.restored_to == sequence
        else:
            try:
                state.run(step)
            except StateError:
                continue
        seen.append((_last(state), facts_of(state)))
    return [facts for _, facts in seen]


def _last(state: State) -> int:
    return state.run(c.ReadState("s")).sequence


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_everything_is_as_it_was(kind: str) -> None:
    @settings(max_examples=60 if kind == "memory" else 12)
    @given(given_rounds=rounds)
    def check(given_rounds: list[tuple[list[Any], float]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "sessions.db")
            opened: State = LocalState() if kind == "memory" else EmbeddedState(path)
            with opened as state:
                states = go(state, given_rounds)
                header, recorded = state.record("s", reveal=True)
                commits = list(recorded)
                assert replay_state((header, commits)).ok
            with LocalState() as copy:
                copy.import_session(header, iter(commits))
                assert facts_of(copy) == states[-1]
                assert [each.versions for each in copy.record("s", reveal=True)[1]] == [
                    each.versions for each in commits
                ]
            if kind == "file":
                assert not list(maintenance.check(path).problems)
                with EmbeddedState(path) as again:
                    assert facts_of(again) == states[-1]

    check()
