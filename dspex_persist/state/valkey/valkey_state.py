"""RedisState: session state in Redis or Valkey, which several servers share, with execution of tools."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Unpack, get_args

from dspex_persist.addresses import canonical
from dspex_persist.spelling import quote
from dspex_persist.state import arguments
from dspex_persist.state.abilities import Recordable
from dspex_persist.state.around import DurableAround, HoldsAround, ImportsAround, OrderAround, RecordsAround
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.groups import CACHE_SIZE_BYTES
from dspex_persist.state.meter import Meter
from dspex_persist.state.options import SessionOptions, check_count
from dspex_persist.state.recording import Header, RecordedCommit
from dspex_persist.state.served import DENIALS_KEPT
from dspex_persist.state.shared import DatabaseState, ServerOptions
from dspex_persist.state.tools.ports import ToolCode, check_tools
from dspex_persist.state.tools.with_tools import TOOL_THREADS, WithTools
from dspex_persist.state.valkey.address import Address
from dspex_persist.state.valkey.durability import Durability, StoreSettings
from dspex_persist.state.valkey.recordings import Recordings
from dspex_persist.state.valkey.valkey_log import ValkeyLog


class ValkeyState(DatabaseState, Recordable):
    """The engine of one of several servers on Redis or Valkey. It executes no tools.

    Args:
        url: The address, redis://HOST:PORT/NUMBER?prefix=NAME; see docs/valkey.md for the others.
        options: Limits and TTLs.
        durability: "full" if each commit has to be on disk before it is acknowledged, which the store's settings must
            then see to; with "normal", a power cut may lose the last ones.
        cache_size_bytes: How much memory the cached sessions may take.
        denials_kept: See `ServedEngine`; no store keeps any.
        meter: Counts what happens; None not to count.
        **server: See `ServerOptions`.

    Raises:
        InvalidArgumentError: The address or an option is invalid.
        UnavailableError: The store cannot be reached.
        OpenError: It cannot be used: its settings, its version, or what is in it.
    """

    _store: ValkeyLog

    def __init__(
        self,
        url: str,
        options: SessionOptions | None = None,
        *,
        durability: Durability = "full",
        cache_size_bytes: int = CACHE_SIZE_BYTES,
        denials_kept: int = DENIALS_KEPT,
        meter: Meter | None = None,
        **server: Unpack[ServerOptions],
    ) -> None:
        if durability not in get_args(Durability):
            raise InvalidArgumentError("durability", f"{quote(durability)} is neither 'full' nor 'normal'")
        super().__init__(
            partial(self._opened, url, durability),
            options,
            cache_size_bytes=cache_size_bytes,
            denials_kept=denials_kept,
            meter=meter,
            **server,
        )

    def _opened(self, url: str, durability: Durability, lease_s: float, anchor_dir: Path | None) -> ValkeyLog:
        address = Address.of(url)
        settings = StoreSettings(address.name, durability, assumes_durable=address.assumes_durable)
        log = ValkeyLog(
            address.client,
            name=address.name,
            address=canonical(url),
            prefix=address.prefix,
            anchor_dir=anchor_dir,
            lease_s=lease_s,
            check=settings.check,
        )
        self._recordings = Recordings(log.reads, log.keys)
        return log

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
        tools: Mapping[str, ToolCode] | None = None,
        tool_threads: int = TOOL_THREADS,
        **server: Unpack[ServerOptions],
    ) -> None:
        # Before anything is opened.
        check_count("tool_threads", tool_threads)
        check_tools(tools)
        self.engine = ValkeyState(url, options, durability=durability, **server)
        super().__init__(self.engine, tools, threads=tool_threads, limits=self.engine.limits)
