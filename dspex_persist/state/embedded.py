"""EmbeddedState: session state in a SQLite file that this process owns, with execution of tools."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from dspex_persist.state.abilities import Durable
from dspex_persist.state.around import (
    AuditsAround,
    DerivesAround,
    DurableAround,
    ForksAround,
    HoldsAround,
    ImportsAround,
    OrderAround,
    PrunesAround,
    RecordsAround,
    RestoresAround,
)
from dspex_persist.state.log_state import LogState, default_actor
from dspex_persist.state.meter import FileFigures, Meter
from dspex_persist.state.options import check_count, check_seconds
from dspex_persist.state.store import created
from dspex_persist.state.store.history.provided import StoredPast
from dspex_persist.state.store.history.retention import Retention
from dspex_persist.state.store.session_store import StoreOptions, open_groups
from dspex_persist.state.tools.ports import ToolCode, check_tools
from dspex_persist.state.tools.with_tools import TOOL_THREADS, WithTools


class SqliteState(StoredPast, LogState, Durable):
    """The engine on a SQLite file, with audits, recordings, forks and pruning. It executes no tools.

    Args:
        path: The database; it is created if it does not exist.
        options: Durability, limits, TTLs and retention.
        sweep_interval_s: How often expired sessions are ended and old outcomes deleted, in seconds.
        on_fatal: Called if the writer ends because of an I/O error or a bug. No more writes are possible then, and
            every later call raises; a server should exit.
        actor: Who makes the changes, unless a call says otherwise; by default the user of this process.
        meter: Counts what happens; None not to count.

    Raises:
        OpenError: Another process owns the file, or it is not a readable database of this project.
        InvalidArgumentError: An option is invalid.
    """

    def __init__(
        self,
        path: str | Path,
        options: StoreOptions | None = None,
        *,
        sweep_interval_s: float = 30.0,
        on_fatal: Callable[[BaseException], None] | None = None,
        actor: str | None = None,
        meter: Meter | None = None,
    ) -> None:
        # Before the file is created.
        check_seconds("sweep_interval_s", sweep_interval_s)
        default_actor(actor)
        self._made = created.missing(Path(path))
        groups = open_groups(Path(path), options, meter)
        self._store = groups.log
        self._past = self._store.readers
        self._pruning = threading.Lock()
        self._retention = Retention(
            self._store.options,
            lambda policy, progress: self.prune(policy, confirm=True, progress=progress),
            self._store.size_bytes,
        )
        name = str(self._store.path)
        kept = self._store.options.denials_kept
        super().__init__(
            groups,
            name=name,
            sweep_interval_s=sweep_interval_s,
            on_fatal=on_fatal,
            actor=actor,
            denials_kept=kept,
        )

    def announce(self, address: str) -> None:
        """Tell other processes at which address this one serves the file: their errors name it."""
        self._store.announce(address)

    def file_figures(self) -> FileFigures:
        """Return the sizes of the file, and how many live sessions it has; from any thread."""
        return self._store.figures()

    def count_with_access(self) -> int:
        """Return how many live sessions have rules of access; from any thread. It looks at each live session."""
        return self._store.count_with_access()

    @property
    def url(self) -> str:
        """See `StateProvider.url`: the path of the file."""
        return str(self._store.path)

    def discard(self) -> None:
        """See `StateProvider.discard`."""
        self.close()
        created.remove(self._store.path, self._made, self._store.head.sequence)

    def _on_idle(self) -> None:
        super()._on_idle()
        self._retention.on_idle()

    def _on_close(self) -> None:
        self._retention.close()
        super()._on_close()


class EmbeddedState(
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
    DerivesAround,
):
    """Session state in a SQLite file, with tools. One thread writes; current values are read from memory.

    Args:
        path: The database; it is created if it does not exist.
        options: Durability, limits, TTLs and retention.
        sweep_interval_s: How often expired sessions are ended and old outcomes deleted, in seconds.
        on_fatal: Called if the writer ends because of an I/O error or a bug. No more writes are possible then, and
            every later call raises; a server should exit.
        actor: Who makes the changes, unless a call says otherwise; by default the user of this process.
        tools: The tools for `execute_tool`, by name; see `dspex_persist.Toolbox`.
        tool_threads: How many threads run tools at most.

    Raises:
        OpenError: Another process owns the file, or it is not a readable database of this project.
        InvalidArgumentError: An option is invalid, or `tools` are not tools.
    """

    def __init__(
        self,
        path: str | Path,
        options: StoreOptions | None = None,
        *,
        sweep_interval_s: float = 30.0,
        on_fatal: Callable[[BaseException], None] | None = None,
        actor: str | None = None,
        tools: Mapping[str, ToolCode] | None = None,
        tool_threads: int = TOOL_THREADS,
    ) -> None:
        # Before the file is created.
        check_count("tool_threads", tool_threads)
        check_tools(tools)
        self.engine = SqliteState(path, options, sweep_interval_s=sweep_interval_s, on_fatal=on_fatal, actor=actor)
        super().__init__(self.engine, tools, threads=tool_threads, limits=self.engine.limits)

    @property
    def head_sequence(self) -> int:
        """The number of the last durable commit."""
        return self.engine.head_sequence
