"""Sessions in memory that other servers have changed are brought up to date, all at once."""

from collections.abc import Iterator

import pytest

from dspex_persist.state.distributed import PostgresState
from dspex_persist.state.model import PrunePolicy
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.store.postgres import later
from dspex_persist.state.store.postgres.postgres_log import PostgresLog
from tests.advancing import check_each_kind, check_many


@pytest.fixture
def log(url: str) -> Iterator[PostgresLog]:
    """What this server knows."""
    log = PostgresLog(url)
    yield log
    log.close()


@pytest.fixture
def other(url: str, log: PostgresLog) -> Iterator[PostgresState]:
    """Another server."""
    with PostgresState(url) as other:
        yield other


def load(log: PostgresLog, *session_ids: str) -> list[SessionState]:
    states = [log.load(session_id) for session_id in session_ids]
    return [state for state in states if state is not None]


def loaded_before(log: PostgresLog, other: PostgresState, writes: int) -> list[SessionState]:
    """Return the session s, with its variable x, as it was before another server has written so often."""
    other.initialize_session("s")
    other.register_variable("s", "x", "integer", 0)
    with log.group():
        before = load(log, "s")
    for number in range(writes):
        other.set_variable("s", "x", number)
    return before


@pytest.mark.parametrize("changed", [["a"], ["a", "b"], []])
def test_sessions_with_new_versions_are_as_if_loaded(
    log: PostgresLog, other: PostgresState, changed: list[str]
) -> None:
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
    assert [(each.variables, each.sequence) for each in after if each] == [
        (each.variables, each.sequence) for each in loaded
    ]
    assert len(after) == len(changed)
    assert all(state.sequence < each.sequence for state, each in zip(before, loaded, strict=True))


def test_a_session_is_as_if_loaded_after_each_kind_of_commit(log: PostgresLog, other: PostgresState) -> None:
    check_each_kind(log, other)


@pytest.mark.parametrize("seed", range(2))
def test_a_session_is_as_if_loaded_after_many_commits(log: PostgresLog, other: PostgresState, seed: int) -> None:
    check_many(log, other, 25, seed)


def test_a_session_with_too_many_commits_is_to_be_loaded(log: PostgresLog, other: PostgresState) -> None:
    before = loaded_before(log, other, later.MOST + 1)
    with log.group() as news:
        assert news is not None
        assert log.advance(before, news.sequence) == [None]
        (advanced,) = log.advance(before, news.sequence - 1)
    assert advanced is not None
    assert advanced.variables["x"].value.json == str(later.MOST - 1)


def test_a_session_whose_versions_were_pruned_is_to_be_loaded(log: PostgresLog, other: PostgresState) -> None:
    before = loaded_before(log, other, 3)
    sequence = log.head()
    other.prune(PrunePolicy(keep_versions=1, session_id="s"), confirm=True)
    with log.group():
        assert log.advance(before, sequence) == [None]
        assert log.advance(before, log.sequence) == [None]
