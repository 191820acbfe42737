"""DistributedState: session state in a PostgreSQL database that several servers share, with execution of tools."""

import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Unpack

from dspex_persist.state.around import (
    AuditsAround,
    DurableAround,
    ForksAround,
    HoldsAround,
    ImportsAround,
    OrderAround,
    PrunesAround,
    RecordsAround,
    RestoresAround,
)
from dspex_persist.state.meter import Meter
from dspex_persist.state.model import PrunePolicy, PruneReport
from dspex_persist.state.options import check_count
from dspex_persist.state.provider import Progress
from dspex_persist.state.shared import DatabaseState, ServerOptions
from dspex_persist.state.store.history.provided import StoredPast
from dspex_persist.state.store.history.retention import Retention
from dspex_persist.state.store.postgres.postgres_log import PostgresLog
from dspex_persist.state.store.postgres.refused import check_limits
from dspex_persist.state.store.session_store import StoreOptions
from dspex_persist.state.tools.ports import ToolCode, check_tools
from dspex_persist.state.tools.with_tools import TOOL_THREADS, WithTools


class PostgresState(DatabaseState, StoredPast):
    """The engine of one of several servers on a PostgreSQL database. It executes no tools.

    Args:
        url: The database, postgresql://USER@HOST:PORT/DATABASE?schema=NAME, or what else libpq takes.
        options: Durability, limits, TTLs and retention.
        meter: Counts what happens; None not to count.
        **server: See `ServerOptions`.

    Raises:
        InvalidArgumentError: The URL or an option is invalid.
        UnavailableError: The database cannot be reached.
        OpenError: It cannot be used: its settings, its version, or what is in it.
    """

    _store: PostgresLog

    def __init__(
        self,
        url: str,
        options: StoreOptions | None = None,
        *,
        meter: Meter | None = None,
        **server: Unpack[ServerOptions],
    ) -> None:
        options = options or StoreOptions()
        check_limits(options.limits)
        super().__init__(
            partial(self._opened, url, options),
            options,
            cache_size_bytes=options.cache_size_bytes,
            denials_kept=options.denials_kept,
            meter=meter,
            **server,
        )

    def _opened(self, url: str, options: StoreOptions, lease_s: float, anchor_dir: Path | None) -> PostgresLog:
        log = PostgresLog(url, durability=options.durability, anchor_dir=anchor_dir, lease_s=lease_s)
        self._past = log.readers
        self._pruning = threading.Lock()
        self._retention = Retention(options, self._prune_alone, log.size_bytes)
        return log

    def _prune_alone(self, policy: PrunePolicy, progress: Progress) -> PruneReport:
        """Prune by the settings, unless another server does: it would find the same."""
        with self._store.turn_to_prune() as is_mine:
            if is_mine:
                return self.prune(policy, confirm=True, progress=progress)
        return PruneReport(True, 0, 0, 0, 0)

    def _on_idle(self) -> None:
        super()._on_idle()
        self._retention.on_idle()

    def _on_close(self) -> None:
        self._retention.close()
        super()._on_close()


class DistributedState(
    WithTools,
    DurableAround,
    OrderAround,
    AuditsAround,
    RecordsAround,
    ImportsAround,
    HoldsAround,
    ForksAround,
    PrunesAround,
    RestoresAround,
):
    """Session state in a PostgreSQL database that several servers share, with tools that run in this process.

    The arguments are those of `PostgresState`, and:

    Args:
        tools: The tools for `execute_tool`, by name; see `dspex_persist.Toolbox`.
        tool_threads: How many threads run tools at most.
    """

    def __init__(
        self,
        url: str,
        options: StoreOptions | None = None,
        *,
        tools: Mapping[str, ToolCode] | None = None,
        tool_threads: int = TOOL_THREADS,
        **server: Unpack[ServerOptions],
    ) -> None:
        # Before anything is opened.
        check_count("tool_threads", tool_threads)
        check_tools(tools)
        self.engine = PostgresState(url, options, **server)
        super().__init__(self.engine, tools, threads=tool_threads, limits=self.engine.limits)
