"""Several servers with the same settings: one of them prunes, and the others learn of it."""

from datetime import UTC, datetime
from typing import Any

import pytest

from dspex_persist.state.abilities import Prunable
from dspex_persist.state.distributed import PostgresState
from dspex_persist.state.errors import VersionPrunedError, WatchGapError
from dspex_persist.state.model import PrunePolicy
from dspex_persist.state.provider import silent
from dspex_persist.state.store.databases import check
from dspex_persist.state.store.session_store import StoreOptions
from tests.engines import wait_until
from tests.store.test_prune import HANGING, end_one

POLICY = PrunePolicy(keep_versions=1)
ALL = datetime.max.replace(tzinfo=UTC)


def test_one_of_them_prunes(url: str) -> None:
    with PostgresState(url) as one, PostgresState(url) as other:
        one.initialize_session("s")
        one.register_variable("s", "x", "integer", 0)
        for value in range(1, 4):
            one.set_variable("s", "x", value)
        with one._store.turn_to_prune() as is_mine, other._store.turn_to_prune() as is_others:
            assert (is_mine, is_others) == (True, False)
            assert other._prune_alone(POLICY, silent).markers == 0
            assert Prunable.of(other).prune(POLICY, confirm=False).versions == 3
        assert other._prune_alone(POLICY, silent).versions == 3
        with pytest.raises(VersionPrunedError), one.audit() as past:
            past.state("s", "3")
    assert check(url).problems == ()


def test_a_watch_does_not_hide_what_was_pruned(url: str) -> None:
    with PostgresState(url) as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 0)
        first, *_, last = (state.set_variable("s", "x", value) and state.head_sequence for value in range(1, 12))
        with state.watch("s", after_sequence=first) as watch:
            watch.check_continues(0)
        state.prune(POLICY, confirm=True)
        with state.watch("s", after_sequence=last) as watch:
            watch.check_continues(0)
        with state.watch("s", after_sequence=first) as watch, pytest.raises(WatchGapError):
            watch.check_continues(0)


def test_sessions_that_have_ended_go_as_a_whole(url: str, connection: Any) -> None:
    with PostgresState(url) as state:
        end_one(state, "ended")
        state.initialize_session("ended", {"life": "second"})
        state.register_variable("ended", "x", "integer", 5)
        report = state.prune(PrunePolicy(ended_before=ALL), confirm=True)
        assert report.sessions == 1
        for table in HANGING:
            ended = f"SELECT count(*) FROM {table}"
            if table in ("variables", "dependencies", "executions", "tools"):
                ended += " JOIN sessions USING (session_key) WHERE sessions.ended_sequence IS NOT NULL"
            expected = 1 if table == "versions" else 0
            assert connection.execute(ended).fetchone() == (expected,), table
        assert state.get_value("ended", "x") == 5
        assert state.prune(PrunePolicy(ended_before=ALL), confirm=True).markers == 0
    assert check(url).problems == ()


def test_each_prunes_by_its_settings(url: str) -> None:
    options = StoreOptions(retention_keep_versions=2)
    with PostgresState(url, options) as one, PostgresState(url, options) as other:
        one.initialize_session("s")
        one.register_variable("s", "x", "integer", 0)
        for value in range(1, 9):
            (one if value % 2 else other).set_variable("s", "x", value)
        wait_until(lambda: len(other.get_variable_history("s", "x")) == 2)
        assert one.get_variable("s", "x").version == 8
    report = check(url)
    assert report.problems == ()
    assert report.pruned_versions == 7
