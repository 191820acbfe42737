"""The refused calls in a database: counted, bounded, found and pruned as those in a file."""

from datetime import timedelta
from typing import Any

from dspex_persist.audit import DenialQuery
from dspex_persist.state.denials import Denial
from dspex_persist.state.distributed import PostgresState
from dspex_persist.state.model import PrunePolicy
from dspex_persist.state.store.databases import check
from dspex_persist.state.store.session_store import StoreOptions
from dspex_persist.wiring.connecting import open_audit
from tests.refused import IN_TURN, QUERIES, REFUSED, START, STRANGER


def counts_in(url: str, **conditions: Any) -> list[int]:
    with open_audit(url) as audit:
        return [denial.count for denial in audit.denials(DenialQuery(**conditions))]


def fill(state: PostgresState) -> None:
    for minute, refused in enumerate(IN_TURN):
        at = START + timedelta(minutes=minute)
        for _ in range(minute + 1):
            state._store.keep_denials([Denial(at, at, *refused, 1)], 100)


def test_servers_count_them_together(url: str) -> None:
    with PostgresState(url) as one, PostgresState(url) as other, one.audit() as audit:
        one.denials.note(REFUSED)
        assert sum(denial.count for denial in audit.denials()) == 1
        other.denials.note(REFUSED)
        one.denials.note(REFUSED)
        other.denials.note(STRANGER)
    assert (sum(counts_in(url, identity="ada")), counts_in(url, identity="-")) == (3, [1])
    assert check(url).problems == ()


def test_queries(url: str) -> None:
    with PostgresState(url) as state:
        fill(state)
    for conditions, counts in QUERIES:
        assert counts_in(url, **conditions) == counts, conditions


def test_the_oldest_go_beyond_the_setting(url: str) -> None:
    with PostgresState(url, StoreOptions(denials_kept=3)) as state:
        for number in range(10):
            state.denials.note(REFUSED._replace(peer=f"ipv6:{number}"))
    with open_audit(url) as audit:
        assert sorted(denial.peer for denial in audit.denials()) == ["ipv6:7", "ipv6:8", "ipv6:9"]


def test_pruning_by_age_deletes_the_older_ones(url: str) -> None:
    with PostgresState(url) as state:
        fill(state)
        state.prune(PrunePolicy(before=START + timedelta(minutes=1)), confirm=False)
        assert counts_in(url) == [3, 2, 1]
        state.prune(PrunePolicy(before=START + timedelta(minutes=1)), confirm=True)
        assert counts_in(url) == [3, 2]
        state.prune(PrunePolicy(before=START + timedelta(hours=1)), confirm=True)
        # The newest row stays, so that no later one gets its key.
        assert counts_in(url) == [3]
