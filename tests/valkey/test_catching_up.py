"""Sessions in memory that other servers have changed are brought up to date."""

import pytest

from dspex_persist.state.shared_log import SharedLog
from dspex_persist.state.valkey import reads
from tests.advancing import check_each_kind, check_many, follow
from tests.valkey.conftest import Open


def log_of(open_server: Open) -> SharedLog:
    log: SharedLog = open_server()._shared.log
    return log


def test_a_session_is_as_if_loaded_after_each_kind_of_commit(open_server: Open) -> None:
    check_each_kind(log_of(open_server), open_server(), registers=False)


@pytest.mark.parametrize("seed", range(2))
def test_a_session_is_as_if_loaded_after_many_commits(open_server: Open, seed: int) -> None:
    check_many(log_of(open_server), open_server(), 25, seed)


def test_a_session_with_too_many_commits_is_to_be_loaded(open_server: Open) -> None:
    log, other = log_of(open_server), open_server()
    other.initialize_session("s")
    other.register_variable("s", "x", "integer", 0)
    with log.group():
        before = log.load("s")
    assert before is not None
    for number in range(reads._MOST_ADVANCED + 1):
        other.set_variable("s", "x", number)
    _, is_applied = follow(log, before)
    assert not is_applied
