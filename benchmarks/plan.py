"""The sizes of a run: the full one, and a smoke run that only shows that everything works."""

from dataclasses import dataclass, replace
from typing import Literal

SectionName = Literal[
    "rpc",
    "tools",
    "pool",
    "watchers",
    "connections",
    "engine",
    "parts",
    "versions",
    "distributed",
    "cognitive",
    "dspy",
    "commits",
    "growth",
    "startup",
    "memory",
    "audit",
]
"""One part of the run; the order of the full run is that of `SECTIONS`, which says what each measures."""
SECTIONS: dict[SectionName, str] = {
    "rpc": "calls to a server, compared with Ping",
    "tools": "tools that a server executes, and other calls while slow tools run",
    "pool": "tools in worker processes, compared with tools in the server; what TLS and tokens cost",
    "watchers": "SetVariable of a variable with thousands of watchers, compared with one without",
    "connections": "calls to a server with a thousand idle connections, compared with one without",
    "engine": "the engine in this process, with one caller, threads and asyncio tasks",
    "parts": "where the time of an update goes, with one caller and with many",
    "versions": "SetVariable of a variable with few versions, and with many",
    "distributed": "one server and two on PostgreSQL and on Valkey, compared with one on SQLite",
    "cognitive": "contexts on each backend: reads and writes beside those of a dict, callbacks, moves",
    "dspy": "calls of LMs by DSPy programs: what binding them to variables costs, and recording",
    "commits": "the cost of a commit for the system: bytes, calls, waits",
    "growth": "growth of the file per update",
    "startup": "time until a server is ready, with few sessions and with many",
    "memory": "memory after sessions came and went, and per idle session, connection, watcher",
    "audit": "audits of a large file; verify, prune, replay",
}

CALLERS = 64
"""Callers in this process, as the targets assume."""
BATCH = 20
"""Variables of a session, and values of a batch."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The sizes of a run. A round measures everything in a section once, in turn; results are medians over rounds."""

    rounds: int = 5
    # All in one process, whose servers are forks. Else each section has a process of its own: what one leaves behind
    # (threads, caches, a large heap) must not slow the next; and each server is started as users do it.
    together: bool = False
    syncs: int = 50
    slice_s: float = 0.2
    ping_slice_s: float = 0.1
    warm_s: float = 0.1
    in_flight: tuple[int, ...] = (1, 16, 64, 256)
    history_entries: int = 100
    streams: tuple[int, ...] = (1, 16)
    stream_chunks: int = 200
    slow_tools: int = 200
    # More than must be running, as now and then a caller is between two executions.
    slow_callers: int = 216
    slow_s: float = 2.0
    slow_rounds: int = 4
    slow_slice_s: float = 2.0
    probes: int = 16
    probes_per_s: float = 150.0
    idle_sessions: int = 2_000
    idle_connections: int = 1_000
    idle_slice_s: float = 0.5
    watchers: int = 2_000
    watched_writes: int = 25
    version_counts: tuple[int, ...] = (10, 1_000, 100_000)
    version_turns: int = 8
    store_in_flight: tuple[int, ...] = (1, 16, 64)
    store_rounds: int = 3
    store_slice_s: float = 0.12
    stored_counts: tuple[int, int] = (10, 100_000)
    callbacks: int = 1_000
    called_writes: int = 40
    moved_variables: int = 1_000
    moved_versions: int = 100_000
    growth_updates: int = 12_800
    logged_commits: int = 128
    counted_commits: int = 1_280
    session_counts: tuple[int, ...] = (10, 1_000, 100_000)
    start_rounds: int = 3
    started_workers: int = 8
    come_and_go: tuple[int, int] = (10_000, 100_000)
    audit_versions: tuple[int, int] = (100_000, 1_000_000)
    audit_rounds: int = 5
    linear_rounds: int = 3
    audit_executions: int = 1_000

    def with_rounds(self, rounds: int) -> "Plan":
        """Return the same plan with this many rounds of everything."""
        return replace(
            self,
            rounds=rounds,
            store_rounds=rounds,
            slow_rounds=rounds,
            start_rounds=rounds,
            audit_rounds=rounds,
            linear_rounds=rounds,
        )


FULL = Plan()
QUICK = Plan(
    rounds=1,
    together=True,
    syncs=5,
    # Each caller calls once at least.
    slice_s=0.004,
    ping_slice_s=0.002,
    warm_s=0,
    in_flight=(1, 64),
    streams=(1, 4),
    stream_chunks=20,
    slow_tools=20,
    slow_callers=24,
    # Longer than the slice takes on any machine: none ends, however long its caller had to wait for a core.
    slow_s=600,
    slow_rounds=1,
    slow_slice_s=0.05,
    idle_sessions=20,
    idle_connections=20,
    idle_slice_s=0.004,
    watchers=12,
    watched_writes=3,
    version_counts=(10, 1_000),
    version_turns=3,
    store_in_flight=(1, 16),
    store_rounds=1,
    store_slice_s=0.004,
    stored_counts=(10, 100),
    callbacks=20,
    called_writes=3,
    moved_variables=10,
    moved_versions=1_000,
    growth_updates=640,
    logged_commits=64,
    counted_commits=128,
    session_counts=(10, 1_000),
    start_rounds=1,
    started_workers=2,
    come_and_go=(50, 500),
    audit_versions=(1_000, 7_000),
    audit_rounds=1,
    linear_rounds=1,
    audit_executions=20,
)
