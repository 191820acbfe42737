"""DatabaseState: the engine of one of several servers on a database that has an address."""

import os
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypedDict

from dspex_persist.state.abilities import Durable
from dspex_persist.state.log_state import default_actor
from dspex_persist.state.meter import FileFigures, Meter
from dspex_persist.state.options import SessionOptions, check_seconds
from dspex_persist.state.shared.server_meter import ServerMeter
from dspex_persist.state.shared.shared_groups import SharedGroups
from dspex_persist.state.shared.shared_holds import HoldingState
from dspex_persist.state.shared.shared_state import SWEEP_S
from dspex_persist.state.shared_log import SharedLog

LEASE_S: Final = 15.0
"""After how long without a sign of life a server is taken for dead."""


class ServerOptions(TypedDict, total=False):
    """How a server takes part in a log that it shares, whichever database has it.

    Attributes:
        sweep_interval_s: How often expired sessions are ended, old outcomes deleted, and servers looked for that have
            died, in seconds.
        lease_s: After how many seconds without a sign of life the other servers take this one for dead.
        anchor_dir: A directory on this machine, where this server remembers the last commit that it knows. If the
            database does not have it at the next start, commits were lost. None: it is remembered until the end only.
        on_fatal: Called if the database has lost commits, or because of a bug. No more calls are possible then; a
            server should exit.
        actor: Who makes the changes, unless a call says otherwise; by default the user of this process.
    """

    sweep_interval_s: float
    lease_s: float
    anchor_dir: str | os.PathLike[str] | None
    on_fatal: Callable[[BaseException], None] | None
    actor: str | None


class DatabaseLog(SharedLog):
    """A shared log in a database with an address."""

    name: str
    """The address, without a password."""

    @abstractmethod
    def observe_commits(self, observe: Callable[[float], object]) -> None:
        """Have it told how long each group took to be stored, in seconds, on the thread that writes."""

    @abstractmethod
    def figures(self) -> FileFigures:
        """Return how large the database is, and how many live sessions it has; any thread."""

    @abstractmethod
    def count_with_access(self) -> int:
        """Return how many live sessions have rules of access; any thread."""


class DatabaseState(HoldingState, Durable):
    """The engine of one of several servers on a database. It executes no tools.

    Args:
        open_log: Opens the log, by the arguments `lease_s` and `anchor_dir` of `ServerOptions`. Called once the others
            have been checked.
        options: Limits and TTLs.
        cache_size_bytes: How much memory the cached sessions may take.
        denials_kept: See `ServedEngine`.
        meter: Counts what happens; None not to count.
        sweep_interval_s: See `ServerOptions`, as for the rest.

    Raises:
        InvalidArgumentError: An option is invalid.
        StateError: `open_log` raises it.
    """

    _store: DatabaseLog

    def __init__(
        self,
        open_log: Callable[[float, Path | None], DatabaseLog],
        options: SessionOptions | None,
        *,
        cache_size_bytes: int,
        denials_kept: int,
        meter: Meter | None,
        sweep_interval_s: float = SWEEP_S,
        lease_s: float = LEASE_S,
        anchor_dir: str | os.PathLike[str] | None = None,
        on_fatal: Callable[[BaseException], None] | None = None,
        actor: str | None = None,
    ) -> None:
        check_seconds("sweep_interval_s", sweep_interval_s)
        check_seconds("lease_s", lease_s)
        default_actor(actor)
        self._store = open_log(lease_s, None if anchor_dir is None else Path(anchor_dir))
        counting: dict[str, Any] = {}
        if meter is not None:
            self._store.observe_commits(meter.observe_commit)
            counting = {"meter": meter, "server_meter": ServerMeter()}
        try:
            super().__init__(
                SharedGroups(self._store, options, cache_size_bytes=cache_size_bytes, **counting),
                name=self._store.name,
                sweep_interval_s=sweep_interval_s,
                on_fatal=on_fatal,
                actor=actor,
                denials_kept=denials_kept,
            )
        except BaseException:
            self._store.close()
            raise

    @property
    def url(self) -> str:
        """See `StateProvider.url`: the address of the database, without a password."""
        return self._store.name

    def file_figures(self) -> FileFigures:
        """See `ServedEngine.file_figures`."""
        return self._store.figures()

    def count_with_access(self) -> int:
        """See `ServedEngine.count_with_access`."""
        return self._store.count_with_access()
