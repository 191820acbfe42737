"""DistributedState: session state in a PostgreSQL database that several servers share, with execution of tools."""

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from dspex_persist.state.abilities import Durable
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
from dspex_persist.state.log_state import default_actor
from dspex_persist.state.meter import FileFigures, Meter
from dspex_persist.state.model import PrunePolicy, PruneReport
from dspex_persist.state.options import check_count, check_seconds
from dspex_persist.state.provider import Progress
from dspex_persist.state.shared import SWEEP_S, HoldingState, ServerMeter, SharedGroups
from dspex_persist.state.store.history.provided import StoredPast
from dspex_persist.state.store.history.retention import Retention
from dspex_persist.state.store.postgres.postgres_log import LEASE_S, PostgresLog
from dspex_persist.state.store.postgres.refused import check_limits
from dspex_persist.state.store.session_store import StoreOptions
from dspex_persist.state.tools.ports import ToolCode, check_tools
from dspex_persist.state.tools.with_tools import TOOL_THREADS, WithTools


class PostgresState(HoldingState, StoredPast, Durable):
    """The engine of one of several servers on a PostgreSQL database. It executes no tools.

    Args:
        url: The database, postgresql://USER@HOST:PORT/DATABASE?schema=NAME, or what else libpq takes.
        options: Durability, limits, TTLs and retention.
        sweep_interval_s: How often expired sessions are ended, old outcomes deleted, and servers looked for that have
            died, in seconds.
        lease_s: After how many seconds without a sign of life the other servers take this one for dead.
        anchor_dir: A directory on this machine, where this server remembers the last commit that it knows. If the
            database does not have it at the next start, commits were lost. None: it is remembered until the end only.
        on_fatal: Called if the database has lost commits, or because of a bug. No more calls are possible then; a
            server should exit.
        actor: Who makes the changes, unless a call says otherwise; by default the user of this process.
        meter: Counts what happens; None not to count.

    Raises:
        InvalidArgumentError: The URL or an option is invalid.
        UnavailableError: The database cannot be reached.
        OpenError: It cannot be used: its settings, its version, or what is in it.
    """

    def __init__(
        self,
        url: str,
        options: StoreOptions | None = None,
        *,
        sweep_interval_s: float = SWEEP_S,
        lease_s: float = LEASE_S,
        anchor_dir: str | os.PathLike[str] | None = None,
        on_fatal: Callable[[BaseException], None] | None = None,
        actor: str | None = None,
        meter: Meter | None = None,
    ) -> None:
        # Before anything is opened.
        check_seconds("sweep_interval_s", sweep_interval_s)
        check_seconds("lease_s", lease_s)
        default_actor(actor)
        options = options or StoreOptions()
        check_limits(options.limits)
        directory = None if anchor_dir is None else Path(anchor_dir)
        self._store = PostgresLog(url, durability=options.durability, anchor_dir=directory, lease_s=lease_s)
        self._past = self._store.readers
        self._pruning = threading.Lock()
        self._retention = Retention(options, self._prune_alone, self._store.size_bytes)
        try:
            groups = SharedGroups(
                self._store,
                options,
                cache_size_bytes=options.cache_size_bytes,
                meter=meter,
                server_meter=None if meter is None else ServerMeter(),
            )
            super().__init__(
                groups,
                name=self._store.name,
                sweep_interval_s=sweep_interval_s,
                on_fatal=on_fatal,
                actor=actor,
                denials_kept=options.denials_kept,
            )
        except BaseException:
            self._store.close()
            raise

    @property
    def url(self) -> str:
        """See `StateProvider.url`: the URL of the database, without a password."""
        return self._store.name

    def file_figures(self) -> FileFigures:
        """See `ServedEngine.file_figures`."""
        return self._store.figures()

    def count_with_access(self) -> int:
        """See `ServedEngine.count_with_access`."""
        return self._store.count_with_access()

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
        sweep_interval_s: float = SWEEP_S,
        lease_s: float = LEASE_S,
        anchor_dir: str | os.PathLike[str] | None = None,
        on_fatal: Callable[[BaseException], None] | None = None,
        actor: str | None = None,
        tools: Mapping[str, ToolCode] | None = None,
        tool_threads: int = TOOL_THREADS,
    ) -> None:
        # Before anything is opened.
        check_count("tool_threads", tool_threads)
        check_tools(tools)
        self.engine = PostgresState(
            url,
            options,
            sweep_interval_s=sweep_interval_s,
            lease_s=lease_s,
            anchor_dir=anchor_dir,
            on_fatal=on_fatal,
            actor=actor,
        )
        super().__init__(self.engine, tools, threads=tool_threads, limits=self.engine.limits)
