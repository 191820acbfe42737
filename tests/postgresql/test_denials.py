"""The refused calls in a database: counted, bounded, found and pruned as those in a file."""

from datetime import UTC, datetime, timedelta
from typing import Any

from dspex_persist.audit import DenialQuery
from dspex_persist.state.denials import Denial, Refused
from dspex_persist.state.distributed import PostgresState
from dspex_persist.state.model import PrunePolicy
from dspex_persist.state.store.databases import check
from dspex_persist.state.store.session_store import StoreOptions
from dspex_persist.wiring.connecting import open_audit

START = datetime(2026, 3, 1, 12, 0, 30, tzinfo=UTC)
REFUSED = Refused("ada", "ipv4:10.0.0.7", "snakepit.bridge.BridgeService.SetVariable", "s", "scope write")
STRANGER = Refused("", "ipv4:10.0.0.8", "snakepit.bridge.BridgeService.Ping", "", "no token")


def counts_in(url: str, **conditions: Any) -> list[int]:
    with open_audit(url) as audit:
        return [denial.count for denial in audit.denials(DenialQuery(**conditions))]


def fill(state: PostgresState) -> None:
    """Three entries, a minute apart: two of one caller, and one of a stranger in between."""
    for minute, refused in enumerate((REFUSED, STRANGER, REFUSED)):
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
    for conditions, counts in (
        ({}, [3, 2, 1]),
        ({"newest_first": False, "limit": 2}, [1, 2]),
        ({"identity": "a*"}, [3, 1]),
        ({"rpc": "Ping"}, [2]),
        ({"rpc": "*Variable"}, [3, 1]),
        ({"rpc": STRANGER.rpc}, [2]),
        ({"peer": "ipv4:10.0.0.*"}, [3, 2, 1]),
        ({"session": "s", "limit": 1}, [3]),
        ({"since": START + timedelta(minutes=1)}, [3]),
        ({"until": (START + timedelta(minutes=1)).isoformat()}, [2, 1]),
        ({"since": "1h"}, []),
    ):
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
