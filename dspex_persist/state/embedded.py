"""EmbeddedState: session state in a SQLite file that this process owns, with execution of tools."""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from dspex_persist.state import arguments
from dspex_persist.state.abilities import Auditable, Durable, Forkable, Prunable, Recordable, Restorable, unkeyed
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
from dspex_persist.state.audit import AuditSource
from dspex_persist.state.commands import ReadState
from dspex_persist.state.groups import Job
from dspex_persist.state.log_state import LogState, default_actor
from dspex_persist.state.meter import FileFigures, Meter
from dspex_persist.state.model import Origin, PrunePolicy, PruneReport, RestoredSession, SessionView
from dspex_persist.state.options import check_count, check_seconds
from dspex_persist.state.provider import Progress, silent
from dspex_persist.state.recording import ContentHash, Header, RecordedCommit
from dspex_persist.state.served import ServedEngine
from dspex_persist.state.store import created
from dspex_persist.state.store.history import prune_plan, recordings
from dspex_persist.state.store.history.answers import StoredAudit
from dspex_persist.state.store.history.retention import Retention
from dspex_persist.state.store.session_store import StoreOptions, open_groups
from dspex_persist.state.tools.ports import ToolCode, check_tools
from dspex_persist.state.tools.with_tools import TOOL_THREADS, WithTools


class SqliteState(ServedEngine, LogState, Durable, Auditable, Recordable, Forkable, Prunable, Restorable):
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

    def audit(self, *, reveal: bool = False) -> AuditSource:
        """See `Auditable.audit`."""
        self.check_open()
        reveal = arguments.flag("reveal", reveal)
        return StoredAudit(self._store.readers, reveal=reveal, count_denials=self._count_denials)

    def record(
        self, session_id: str, *, started: int | None = None, reveal: bool = False, after: int = 0
    ) -> tuple[Header, Iterator[RecordedCommit]]:
        """See `Recordable.record`."""
        self.check_open()
        session_id, reveal = arguments.text("session_id", session_id), arguments.flag("reveal", reveal)
        if started is not None:
            started = arguments.sequence("started", started)
        after, readers = arguments.sequence("after", after), self._store.readers
        return recordings.read_session(readers, session_id, started=started, reveal=reveal, after=after)

    def _hash_content(self, session_id: str, started: int | None) -> ContentHash:
        self.check_open()
        session_id = arguments.text("session_id", session_id)
        if started is not None:
            started = arguments.sequence("started", started)
        return recordings.hash_session(self._store.readers, session_id, started=started)

    def fork_session(
        self, session_id: str, new_session_id: str, at: str = "", *, origin: Origin | None = None
    ) -> SessionView:
        """See `Forkable.fork_session`."""
        self.check_open()
        source, name = arguments.text("session_id", session_id), arguments.text("new_session_id", new_session_id)
        command = recordings.fork_of(self._store.readers, source, name, arguments.text("at", at))
        return self.submit(command, origin).result()

    def restore_session(self, session_id: str, at: str, *, origin: Origin | None = None) -> RestoredSession:
        """See `Restorable.restore_session`."""
        self.check_open()
        session_id, at = arguments.text("session_id", session_id), arguments.text("at", at)
        self.run(ReadState(session_id))
        command = recordings.restore_of(self._store.readers, session_id, at)
        return self.submit(command, unkeyed(origin)).result()

    def prune(self, policy: PrunePolicy, *, confirm: bool, progress: Progress = silent) -> PruneReport:
        """See `Prunable.prune`."""
        self.check_open()
        if not confirm:
            return prune_plan.run(self._store.readers, policy, None, progress)
        with self._pruning:
            report = prune_plan.run(self._store.readers, policy, self._write_all, progress)
        if policy.denials_before is None:
            return report
        forgotten: list[int] = []
        self._on_writer(partial(self._forget_denials, policy.denials_before, forgotten))
        return replace(report, denials=sum(forgotten))

    def discard(self) -> None:
        """See `StateProvider.discard`."""
        self.close()
        created.remove(self._store.path, self._made, self._store.head.sequence)

    def _write_all(self, jobs: list[Job]) -> None:
        futures = [self._writer.submit(job) for job in jobs]
        for future in futures:
            future.result()

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
