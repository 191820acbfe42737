"""What a provider can do because its history is in a database: audits, recordings, forks, restores and pruning."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from sqlalchemy import Engine

from dspex_persist.state import arguments
from dspex_persist.state.abilities import Auditable, Forkable, Prunable, Recordable, Restorable, unkeyed
from dspex_persist.state.audit import AuditSource
from dspex_persist.state.commands import ReadState
from dspex_persist.state.groups import Job
from dspex_persist.state.model import Origin, PrunePolicy, PruneReport, RestoredSession, SessionView
from dspex_persist.state.provider import Progress, silent
from dspex_persist.state.recording import ContentHash, Header, RecordedCommit
from dspex_persist.state.served import ServedEngine
from dspex_persist.state.store.history import prune_plan, recordings
from dspex_persist.state.store.history.answers import StoredAudit


class StoredPast(ServedEngine, Auditable, Recordable, Forkable, Restorable, Prunable):
    """An engine whose history can be read from a database. Its subclass sets the attributes.

    Attributes:
        _past: Connections whose transactions are snapshots; any thread uses them.
        _pruning: Held while history is pruned.
    """

    _past: Engine
    _pruning: threading.Lock

    def audit(self, *, reveal: bool = False) -> AuditSource:
        """See `Auditable.audit`."""
        self.check_open()
        return StoredAudit(self._past, reveal=arguments.flag("reveal", reveal), count_denials=self._count_denials)

    def record(
        self, session_id: str, *, started: int | None = None, reveal: bool = False, after: int = 0
    ) -> tuple[Header, Iterator[RecordedCommit]]:
        """See `Recordable.record`."""
        self.check_open()
        session_id, reveal = arguments.text("session_id", session_id), arguments.flag("reveal", reveal)
        started = arguments.started(started)
        after = arguments.sequence("after", after)
        return recordings.read_session(self._past, session_id, started=started, reveal=reveal, after=after)

    def _hash_content(self, session_id: str, started: int | None) -> ContentHash:
        self.check_open()
        session_id = arguments.text("session_id", session_id)
        started = arguments.started(started)
        return recordings.hash_session(self._past, session_id, started=started)

    def fork_session(
        self, session_id: str, new_session_id: str, at: str = "", *, origin: Origin | None = None
    ) -> SessionView:
        """See `Forkable.fork_session`."""
        self.check_open()
        source, name = arguments.text("session_id", session_id), arguments.text("new_session_id", new_session_id)
        command = recordings.fork_of(self._past, source, name, arguments.text("at", at))
        return self.submit(command, origin).result()

    def restore_session(self, session_id: str, at: str, *, origin: Origin | None = None) -> RestoredSession:
        """See `Restorable.restore_session`."""
        self.check_open()
        session_id, at = arguments.text("session_id", session_id), arguments.text("at", at)
        self.run(ReadState(session_id))
        command = recordings.restore_of(self._past, session_id, at)
        return self.submit(command, unkeyed(origin)).result()

    def prune(self, policy: PrunePolicy, *, confirm: bool, progress: Progress = silent) -> PruneReport:
        """See `Prunable.prune`."""
        self.check_open()
        if not confirm:
            return prune_plan.run(self._past, policy, None, progress)
        with self._pruning:
            report = prune_plan.run(self._past, policy, self._write_all, progress)
        if policy.denials_before is None:
            return report
        forgotten: list[int] = []
        self._on_writer(partial(self._forget_denials, policy.denials_before, forgotten))
        return replace(report, denials=sum(forgotten))

    def _write_all(self, jobs: list[Job]) -> None:
        futures = [self._writer.submit(job) for job in jobs]
        for future in futures:
            future.result()
