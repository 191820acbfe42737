"""Observed: what a server's metrics show: what its parts have counted, and what they do at the moment of a scrape."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Final

from dspex_persist import clock
from dspex_persist.infra.access.tls import Certificates
from dspex_persist.infra.access.tokens import READ, Tokens
from dspex_persist.infra.listen import TcpAddress, parse_listen
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.metrics import Asker, CallMeter, Family, Kind, Sample, gauge, total
from dspex_persist.infra.threads import DaemonThreads
from dspex_persist.infra.workers.statistics import PoolStatistics
from dspex_persist.state.bridge.servicer import BridgeServicer
from dspex_persist.state.denials import NoteDenial, Refused
from dspex_persist.state.meter import FileFigures, Meter
from dspex_persist.state.served import ServedEngine
from dspex_persist.state.tools.runner import ToolRunner

Source = Callable[[], Iterator[Family] | Sequence[Family]]

_log: Final = get_logger(__name__)
_LAG_MOST_S: Final = 1.0
"""A scrape does not wait longer for an event loop."""
_DATABASE_MOST_S: Final = 2.0
"""Nor longer for a database: the other metrics are needed most while it does not answer."""
_FAILURES: Final = (
    ("error", "errors"),
    ("saturated", "saturated"),
    ("queue_timeout", "queue_timeouts"),
    ("call_timeout", "call_timeouts"),
    ("worker_exit", "exits"),
)
_REPLACEMENTS: Final = (("crashed", "crashed"), ("recycled", "recycled"), ("replaced", "replaced"))


class _Readers:
    """Those who may read the metrics of a server that demands tokens."""

    def __init__(self, tokens: Tokens, note_denial: NoteDenial) -> None:
        # Its own, for the threads of the metrics, one of which asks at a time.
        self._tokens = Tokens(tokens.path)
        self._note = note_denial

    def admit(self, asker: Asker) -> bool:
        """Return whether somebody may read the metrics: by a token, or by a certificate with a line in the file."""
        if asker.token is not None:
            identity = self._tokens.find(asker.token)
        else:
            identity = self._tokens.find_certificate(asker.names)
        if identity is not None and identity.has_expired:
            identity = None
        if identity is not None and identity.may(READ):
            return True
        name, missing = ("", "a valid token") if identity is None else (identity.name, f"scope {READ}")
        self._note(Refused(name, asker.host, "/metrics", "", missing))
        return False


def loop_lag_s(loop: asyncio.AbstractEventLoop) -> float:
    """Return how long an event loop takes to run a callback, in seconds; call it on another thread."""
    answered, began = threading.Event(), time.perf_counter()
    loop.call_soon_threadsafe(answered.set)
    answered.wait(_LAG_MOST_S)
    return time.perf_counter() - began


class Observed:
    """The families of a server. Each source may be called on any thread.

    Args:
        engine: Has the sessions.
        meter: What it, and the runner, count.
        calls: Counts calls.
        cache_limit_bytes: How much memory sessions may take.
        runner: Runs tools.
        servicer: Has the watches.
        pools: Returns what the pools do.
        loop: The server's event loop.
        version: The version of the package.
    """

    def __init__(
        self,
        engine: ServedEngine,
        *,
        meter: Meter,
        calls: CallMeter,
        cache_limit_bytes: int,
        runner: ToolRunner,
        servicer: BridgeServicer,
        pools: Callable[[], tuple[PoolStatistics, ...]],
        loop: asyncio.AbstractEventLoop,
        version: str,
    ) -> None:
        self._version = version
        self._engine = engine
        self._cache_limit_bytes = cache_limit_bytes
        self._runner = runner
        self._servicer = servicer
        self._pools = pools
        self._loop = loop
        # Asks the database, which may take long to answer.
        self._asking = DaemonThreads(1, "dspex-persist-figures")
        self._asked: Future[FileFigures | None] | None = None
        self.sources: tuple[Source, ...] = (
            self._of_build,
            calls.families,
            meter.families,
            engine.families,
            self._of_engine,
            self._of_watches,
            self._of_runner,
            self._of_pools,
            self._of_loop,
            # Last, because it asks the disk.
            self._of_file,
        )

    @asynccontextmanager
    async def served(
        self,
        listen: str,
        unfit: Callable[[], str],
        certificates: Certificates | None,
        tokens: Tokens | None,
        note_denial: NoteDenial,
    ) -> AsyncIterator[None]:
        """Serve the families over HTTP, with the certificates and the tokens of the server itself.

        Args:
            listen: HOST:PORT.
            unfit: Returns why the server cannot do its work, or ""; called on any thread.
            certificates: Those of the server; None to serve without encryption.
            tokens: Those of the server; None to demand none.
            note_denial: Notes who was refused the metrics; called on any thread.

        Raises:
            ListenError: The address is in use, or cannot be bound.
        """
        from dspex_persist.infra.exposition import MetricsServer

        address = parse_listen(listen)
        assert isinstance(address, TcpAddress), "other addresses were refused"
        metrics = MetricsServer(
            address,
            self.sources,
            health=unfit,
            tls=None if certificates is None else certificates.files,
            admit=None if tokens is None else _Readers(tokens, note_denial).admit,
        )
        _log.info("serving metrics", url=metrics.url)
        try:
            yield
        finally:
            # A scrape that is in progress may wait for this loop.
            await asyncio.to_thread(metrics.close)
            self._asking.close()

    def _of_build(self) -> Iterator[Family]:
        samples = (Sample((self._version,), 1),)
        yield Family("dspex_persist_build_info", "gauge", "The version of the server.", ("version",), samples)

    def _of_engine(self) -> Iterator[Family]:
        now, limits = self._engine.figures(), self._engine.limits
        yield gauge("dspex_persist_last_commit", "The number of the last commit.", now.sequence)
        yield gauge("dspex_persist_writer_queue_length", "Writes that wait or are being written.", now.queue_length)
        yield gauge("dspex_persist_writer_queue_limit", "How many may wait.", limits.queue_length)
        yield total("dspex_persist_cache_hits_total", "Times that a session was in memory.", now.cache_hits)
        yield gauge("dspex_persist_cache_sessions", "Sessions in memory.", now.sessions)
        yield gauge("dspex_persist_cache_bytes", "The memory that they take.", now.cache_bytes)
        yield gauge("dspex_persist_cache_limit_bytes", "How much they may take.", self._cache_limit_bytes)
        yield gauge("dspex_persist_watches", "Open watches.", now.watches)
        yield gauge("dspex_persist_watches_limit", "How many may be open.", limits.watchers)

    def _of_watches(self) -> Iterator[Family]:
        most = 0
        first: datetime | None = None
        for first_sequence, position in self._servicer.watch_positions().items():
            commits, since = self._engine.lag(first_sequence, position)
            most = max(most, commits)
            first = min((each for each in (first, since) if each is not None), default=None)
        lag_s = 0.0 if first is None else max(0.0, (clock.now() - first).total_seconds())
        yield gauge("dspex_persist_watch_lag_commits", "How many commits the slowest watch is behind.", most)
        yield gauge("dspex_persist_watch_lag_seconds", "The age of the oldest of them.", lag_s)

    def _of_runner(self) -> Iterator[Family]:
        now = self._runner.figures()
        yield gauge("dspex_persist_executions_running", "Executions of tools that run.", now.running)
        yield gauge("dspex_persist_executions_waiting", "Requests that wait for their turn.", now.waiting)
        yield gauge("dspex_persist_transactions_open", "Open transactions of clients.", now.transactions)

    def _of_pools(self) -> Iterator[Family]:
        pools = self._pools()

        def each(name: str, kind: Kind, text: str, value: Callable[[PoolStatistics], float]) -> Family:
            return Family(name, kind, text, ("pool",), tuple(Sample((pool.pool,), value(pool)) for pool in pools))

        def by(name: str, kind: Kind, text: str, label: str, fields: Sequence[tuple[str, str]]) -> Family:
            samples = (Sample((pool.pool, what), getattr(pool, field)) for pool in pools for what, field in fields)
            return Family(name, kind, text, ("pool", label), tuple(samples))

        states = [(state, state) for state in ("idle", "busy", "starting")]
        prefix = "dspex_persist_pool"
        yield each(f"{prefix}_size", "gauge", "How many workers a pool is to have.", lambda pool: pool.size)
        yield by(f"{prefix}_workers", "gauge", "Workers.", "state", states)
        yield each(f"{prefix}_spare_workers", "gauge", "Workers beyond the size.", lambda pool: pool.spares)
        yield each(f"{prefix}_queue_length", "gauge", "Calls that wait for a worker.", lambda pool: pool.queued)
        yield each(
            f"{prefix}_failing",
            "gauge",
            "1 while no worker is started, because several have failed.",
            lambda pool: pool.state == "failing",
        )
        yield each(
            f"{prefix}_resident_memory_bytes",
            "gauge",
            "Memory that the workers have in use.",
            lambda pool: sum(worker.rss_bytes for worker in pool.workers),
        )
        yield each(f"{prefix}_calls_total", "counter", "Calls that got a worker.", lambda pool: pool.requests)
        yield by(f"{prefix}_call_failures_total", "counter", "Calls that failed.", "reason", _FAILURES)
        yield each(f"{prefix}_worker_starts_total", "counter", "Workers that got ready.", lambda pool: pool.started)
        yield each(
            f"{prefix}_worker_start_failures_total",
            "counter",
            "Workers that did not get ready.",
            lambda pool: pool.start_failures,
        )
        yield by(f"{prefix}_worker_ends_total", "counter", "Workers that are gone.", "reason", _REPLACEMENTS)

    def _of_loop(self) -> Iterator[Family]:
        text = "How long the event loop took to answer the scrape, at most a second."
        yield gauge("dspex_persist_event_loop_lag_seconds", text, loop_lag_s(self._loop))

    def _of_file(self) -> Iterator[Family]:
        # One scrape at a time asks; the question of an earlier one may still be open.
        if self._asked is None or self._asked.done():
            self._asked = self._asking.submit(self._engine.file_figures)
        if not wait([self._asked], _DATABASE_MOST_S).done:
            raise TimeoutError(f"the database has not said its size in {_DATABASE_MOST_S:g} s")
        now = self._asked.result()
        if now is None:
            return
        yield gauge("dspex_persist_live_sessions", "Sessions that have not ended.", now.live_sessions)
        yield gauge("dspex_persist_database_bytes", "The size of the database.", now.size)
        if now.wal is not None:
            yield gauge("dspex_persist_wal_bytes", "The size of its write-ahead log.", now.wal)
        if now.free is not None:
            yield gauge("dspex_persist_disk_free_bytes", "What is free on its disk.", now.free)
