"""RedisState: session state in Redis or Valkey, which several servers share, with execution of tools."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, get_args

from dspex_persist.addresses import canonical
from dspex_persist.spelling import quote
from dspex_persist.state import arguments
from dspex_persist.state.abilities import Durable, Recordable
from dspex_persist.state.around import DurableAround, HoldsAround, ImportsAround, OrderAround, RecordsAround
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.groups import CACHE_SIZE_BYTES
from dspex_persist.state.log_state import default_actor
from dspex_persist.state.meter import FileFigures, Meter
from dspex_persist.state.options import SessionOptions, check_count, check_seconds
from dspex_persist.state.recording import Header, RecordedCommit
from dspex_persist.state.served import DENIALS_KEPT
from dspex_persist.state.shared import SWEEP_S, HoldingState, ServerMeter, SharedGroups
from dspex_persist.state.tools.ports import ToolCode, check_tools
from dspex_persist.state.tools.with_tools import TOOL_THREADS, WithTools
from dspex_persist.state.valkey.address import Address
from dspex_persist.state.valkey.durability import Durability, StoreSettings
from dspex_persist.state.valkey.recordings import Recordings
from dspex_persist.state.valkey.valkey_log import ValkeyLog

LEASE_S: Final = 15.0


class ValkeyState(HoldingState, Durable, Recordable):
    """The engine of one of several servers on Redis or Valkey. It executes no tools.

    Args:
        url: The address, redis://HOST:PORT/NUMBER?prefix=NAME; see docs/valkey.md for the others.
        options: Limits and TTLs.
        durability: "full" if each commit has to be on disk before it is acknowledged, which the store's settings must
            then see to; with "normal", a power cut may lose the last ones.
        cache_size_bytes: How much memory the cached sessions may take.
        sweep_interval_s: How often expired sessions are ended, old outcomes deleted, and servers looked for that have
            died, in seconds.
        lease_s: After how many seconds without a sign of life the other servers take this one for dead.
        anchor_dir: A directory on this machine, where this server remembers the last commit that it knows. If the store
            does not have it at the next start, commits were lost. None: it is remembered until the end only.
        on_fatal: Called if the store has lost commits, or because of a bug. No more calls are possible then; a server
            should exit.
        actor: Who makes the changes, unless a call says otherwise; by default the user of this process.
        meter: Counts what happens; None not to count.
        denials_kept: See `ServedEngine`; no store keeps any.

    Raises:
        InvalidArgumentError: The address or an option is invalid.
        UnavailableError: The store cannot be reached.
        OpenError: It cannot be used: its settings, its version, or what is in it.
    """

    def __init__(
        self,
        url: str,
        options: SessionOptions | None = None,
        *,
        durability: Durability = "full",
        cache_size_bytes: int = CACHE_SIZE_BYTES,
        sweep_interval_s: float = SWEEP_S,
        lease_s: float = LEASE_S,
        anchor_dir: str | os.PathLike[str] | None = None,
        on_fatal: Callable[[BaseException], None] | None = None,
        actor: str | None = None,
        meter: Meter | None = None,
        denials_kept: int = DENIALS_KEPT,
    ) -> None:
        # Before anything is opened.
        check_seconds("sweep_interval_s", sweep_interval_s)
        check_seconds("lease_s", lease_s)
        default_actor(actor)
        if durability not in get_args(Durability):
            raise InvalidArgumentError("durability", f"{quote(durability)} is neither 'full' nor 'normal'")
        address = Address.of(url)
        settings = StoreSettings(address.name, durability, assumes_durable=address.assumes_durable)
        self._store = ValkeyLog(
            address.client,
            name=address.name,
            address=canonical(url),
            prefix=address.prefix,
            anchor_dir=None if anchor_dir is None else Path(anchor_dir),
            lease_s=lease_s,
            check=settings.check,
        )
        self._recordings = Recordings(self._store.reads, self._store.keys)
        try:
            groups = SharedGroups(
                self._store,
                options,
                cache_size_bytes=cache_size_bytes,
                meter=meter,
                server_meter=None if meter is None else ServerMeter(),
            )
            super().__init__(
                groups,
                name=address.name,
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
        """See `StateProvider.url`: the address, without a password."""
        return self._store.name

    def file_figures(self) -> FileFigures:
        """See `ServedEngine.file_figures`: the size is that of everything in the store."""
        size_bytes, live = self._store.figures()
        return FileFigures(size_bytes, None, None, live)

    def count_with_access(self) -> int:
        """See `ServedEngine.count_with_access`."""
        return self._store.count_with_access()

    def record(
        self, session_id: str, *, started: int | None = None, reveal: bool = False, after: int = 0
    ) -> tuple[Header, Iterator[RecordedCommit]]:
        """See `Recordable.record`."""
        self.check_open()
        session_id, reveal = arguments.text("session_id", session_id), arguments.flag("reveal", reveal)
        started = arguments.started(started)
        after = arguments.sequence("after", after)
        return self._recordings.record(session_id, started=started, reveal=reveal, after=after)


class RedisState(WithTools, DurableAround, OrderAround, RecordsAround, ImportsAround, HoldsAround):
    """Session state in Redis or Valkey, which several servers share, with tools that run in this process.

    The arguments are those of `ValkeyState`, and:

    Args:
        tools: The tools for `execute_tool`, by name; see `dspex_persist.Toolbox`.
        tool_threads: How many threads run tools at most.
    """

    def __init__(
        self,
        url: str,
        options: SessionOptions | None = None,
        *,
        durability: Durability = "full",
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
        self.engine = ValkeyState(
            url,
            options,
            durability=durability,
            sweep_interval_s=sweep_interval_s,
            lease_s=lease_s,
            anchor_dir=anchor_dir,
            on_fatal=on_fatal,
            actor=actor,
        )
        super().__init__(self.engine, tools, threads=tool_threads, limits=self.engine.limits)
