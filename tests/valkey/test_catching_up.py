"""Sessions in memory that other servers have changed are brought up to date."""

from collections.abc import Iterator

import pytest

from dspex_persist.state.shared_log import SharedLog
from dspex_persist.state.valkey import reads
from tests.advancing import check_each_kind, check_many, follow
from tests.valkey.conftest import Open


@pytest.fixture
def log(open_server: Open) -> Iterator[SharedLog]:
    """What a server knows, whose own engine stands still: one thread at a time may use it."""
    server = open_server()
    with server._writer._turn:
        yield server._shared.log


def test_a_session_is_as_if_loaded_after_each_kind_of_commit(log: SharedLog, open_server: Open) -> None:
    check_each_kind(log, open_server(), registers=False)


@pytest.mark.parametrize("seed", range(2))
def test_a_session_is_as_if_loaded_after_many_commits(log: SharedLog, open_server: Open, seed: int) -> None:
    check_many(log, open_server(), 25, seed)


def test_a_session_with_too_many_commits_is_to_be_loaded(log: SharedLog, open_server: Open) -> None:
    other = open_server()
    other.initialize_session("s")
    other.register_variable("s", "x", "integer", 0)
    with log.group():
        before = log.load("s")
    assert before is not None
    for number in range(reads._MOST_ADVANCED + 1):
        other.set_variable("s", "x", number)
    _, is_applied = follow(log, before)
    assert not is_applied
