"""Sessions in memory that other servers have changed are brought up to date, all at once."""

import pytest

from dspex_persist.state.distributed import PostgresState
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.store.postgres.postgres_log import PostgresLog


def load(log: PostgresLog, *session_ids: str) -> list[SessionState]:
    states = [log.load(session_id) for session_id in session_ids]
    return [state for state in states if state is not None]


@pytest.mark.parametrize("changed", [["a"], ["a", "b"], []])
def test_sessions_with_new_versions_are_as_if_loaded(url: str, changed: list[str]) -> None:
    log = PostgresLog(url)
    with PostgresState(url) as other:
        for session_id in ("a", "b", "c"):
            other.initialize_session(session_id)
            other.register_variable(session_id, "x", "integer", 0, metadata={"unit": "m"})
        with log.group():
            before = load(log, *changed)
        for session_id in changed:
            other.set_variable(session_id, "x", 1)
            other.set_variable(session_id, "x", 2, metadata={"source": session_id})
        with log.group() as news:
            after = log.advance(before, news.sequence if news is not None else log.sequence)
            loaded = load(log, *changed)
    log.close()
    assert [(each.variables, each.sequence) for each in after if each] == [
        (each.variables, each.sequence) for each in loaded
    ]
    assert len(after) == len(changed)
    assert all(state.sequence < each.sequence for state, each in zip(before, loaded, strict=True))


def test_those_with_events_are_to_be_loaded(url: str) -> None:
    log = PostgresLog(url)
    with PostgresState(url) as other:
        for session_id in ("a", "b", "c"):
            other.initialize_session(session_id)
            other.register_variable(session_id, "x", "integer", 0)
        with log.group():
            before = load(log, "a", "b", "c")
        other.set_variable("a", "x", 1)
        other.register_variable("b", "y", "integer", 0)
        other.set_variable("c", "x", 3)
        with log.group() as news:
            assert news is not None
            first, second, third = log.advance(before, news.sequence)
    log.close()
    assert second is None
    values = [x.value.json for state in (first, third) if state is not None for x in state.variables.values()]
    assert values == ["1", "3"]
