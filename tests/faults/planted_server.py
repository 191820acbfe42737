"""A server with a planted bug, which the checkers have to find: `python -m tests.faults.planted_server BUG serve ...`.

Everything else is the real product. Each bug breaks one promise, and breaks it often.
"""

import asyncio
import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import grpc.aio

from dspex_persist.cli import main
from dspex_persist.infra.server import guard
from dspex_persist.infra.workers import orphans, worker
from dspex_persist.infra.workers.keeping import Keeper
from dspex_persist.infra.workers.leases import Loan
from dspex_persist.infra.workers.pool import WorkerPool
from dspex_persist.state.anchor import Anchor
from dspex_persist.state.bridge.workers.lending import Lender, Lending
from dspex_persist.state.commands import BeginExecution, FinishExecution, SetVariable, SetVariables
from dspex_persist.state.commands.executions import Verdict
from dspex_persist.state.errors import StorageError, WorkerExitedError
from dspex_persist.state.groups import Groups, Job, Outcome
from dspex_persist.state.model import BatchOutcome
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.store import engine, session_store
from dspex_persist.state.store.guard import FileGuard
from dspex_persist.state.store.maintenance import swap
from dspex_persist.state.store.session_store import FileGroups, SessionStore
from dspex_persist.state.tools.results import NOTHING
from dspex_persist.state.watch import Hub

_write_group = Groups.write_group
_find_loaded = Groups.find_loaded
_publish = Hub.publish
_give_back = WorkerPool.give_back
_run_lent = Lender.run
_transaction, _roll_back = engine.transaction, engine.roll_back

_LATE_GROUPS = 20
_STALE_S = 0.05
_SPARED = 10
"""The number of good writes before the first bad one, so that tests can set up."""


class _LateCommits:
    """Replaces `engine.transaction`. Once it is `late`, it commits only once in `_LATE_GROUPS` transactions."""

    def __init__(self) -> None:
        self.late = False
        self._count = 0

    @contextlib.contextmanager
    def transaction(self, connection: Any, **options: Any) -> Iterator[None]:
        if not self.late:
            with _transaction(connection, **options):
                yield
            return
        if self._count == 0:
            self._transaction = connection.begin()
        yield
        self._count = (self._count + 1) % _LATE_GROUPS
        if self._count == 0:
            self._transaction.commit()

    def roll_back(self, connection: Any) -> None:
        """Groups without changes roll back, which would include the groups not yet committed here."""
        if not self.late:
            _roll_back(connection)


def ack_before_commit() -> None:
    """Acknowledge writes that are not in the file yet. The anchor is not written: the next start would detect it."""

    commits = _LateCommits()

    def write_group(self: FileGroups, jobs: Sequence[Job], **_: Any) -> list[Outcome]:
        commits.late = commits.late or _is_batch(jobs)
        return _write_group(self, jobs)

    _patch(Groups, "write_group", write_group)
    _patch(session_store, "transaction", commits.transaction)
    _patch(session_store, "roll_back", commits.roll_back)
    _patch(Anchor, "write", lambda *_: None)


def _is_batch(jobs: Sequence[Job]) -> bool:
    """Whether these jobs are clients' work: setting up uses no batches and is left alone."""
    return any(isinstance(job.command, SetVariables) for job in jobs)


def half_batch() -> None:
    """Write the entries of a batch in separate transactions."""

    def one_by_one(self: FileGroups, job: Job) -> Outcome:
        command = job.command
        if not isinstance(command, SetVariables) or len(command.updates) < 2:
            return _write_group(self, [job])[0]
        versions: dict[str, int] = {}
        for identifier, value in command.updates.items():
            part = Job(replace(command, updates={identifier: value}), replace(job.origin, idempotency_key=None))
            [outcome] = _write_group(self, [part])
            if outcome.error is not None or not outcome.result.success:
                return outcome
            versions |= outcome.result.versions
        return Outcome(BatchOutcome(success=True, versions=versions, errors={}))

    _patch(Groups, "write_group", lambda self, jobs, **_: [one_by_one(self, job) for job in jobs])


def forget_keys() -> None:
    """Run a repeated request again."""

    def write_group(self: FileGroups, jobs: Sequence[Job], **_: Any) -> list[Outcome]:
        return _write_group(self, [Job(job.command, replace(job.origin, idempotency_key=None)) for job in jobs])

    _patch(Groups, "write_group", write_group)


def lost_update() -> None:
    """Ignore the expected version."""

    def write_group(self: FileGroups, jobs: Sequence[Job], **_: Any) -> list[Outcome]:
        return _write_group(self, [Job(_unconditional(job.command), job.origin) for job in jobs])

    _patch(Groups, "write_group", write_group)


def write_then_refuse() -> None:
    """Write a part of requests that are then refused."""

    def write_group(self: FileGroups, jobs: Sequence[Job], **_: Any) -> list[Outcome]:
        outcomes = _write_group(self, jobs)
        for job, outcome in zip(jobs, outcomes, strict=True):
            state = self.find_loaded(job.command.session_id)
            if outcome.error is None or state is None:
                continue
            for variable in list(state.variables.values())[:1]:
                again = SetVariable(job.command.session_id, variable.id, variable.value)
                _write_group(self, [Job(again, job.origin)])
        return outcomes

    _patch(Groups, "write_group", write_group)


def _unconditional(command: Any) -> Any:
    return replace(command, expected_version=None) if isinstance(command, SetVariable) else command


def stale_read() -> None:
    """Answer reads from a state that is a moment old."""
    kept: dict[str, tuple[float, SessionState]] = {}

    def find_loaded(self: FileGroups, session_id: str) -> SessionState | None:
        state = _find_loaded(self, session_id)
        if state is None:
            return None
        now = time.monotonic()
        at, old = kept.get(session_id, (0.0, state))
        # Only values are old: without the variables that all clients use, the bug would have no effect.
        if now - at > _STALE_S or old.variables.keys() != state.variables.keys():
            kept[session_id] = (now, state)
            return state
        return old

    _patch(Groups, "find_loaded", find_loaded)


def dirty_read() -> None:
    """Let readers see a group that then fails."""
    count = 0

    def write_group(self: FileGroups, jobs: Sequence[Job], **_: Any) -> list[Outcome]:
        nonlocal count
        count += any(isinstance(job.command, SetVariable) for job in jobs)
        if count < _SPARED or count % 3:
            return _write_group(self, jobs)
        before = {job.command.session_id: self._cache.find(job.command.session_id) for job in jobs}
        head, keys = self.log.head, self.log._keys
        connection = self.log._connection
        with _transaction(connection):
            # The group's own transaction is part of this one.
            _patch(session_store, "transaction", lambda *_, **__: contextlib.nullcontext())
            _patch(session_store, "roll_back", lambda _: None)
            try:
                _write_group(self, jobs)
            finally:
                _patch(session_store, "transaction", _transaction)
                _patch(session_store, "roll_back", _roll_back)
            time.sleep(0.02)
            _roll_back(connection)
        self.log.head, self.log._keys = head, keys
        for session_id, state in before.items():
            self._cache.drop(session_id)
            if state is not None:
                self._cache.put(session_id, state)
        return [Outcome(error=StorageError("planted")) for _ in jobs]

    _patch(Groups, "write_group", write_group)
    _patch(Anchor, "write", lambda *_: None)


def duplicate_version() -> None:
    """Answer every third write with the version before its own."""
    count = 0

    def write_group(self: FileGroups, jobs: Sequence[Job], **_: Any) -> list[Outcome]:
        nonlocal count
        outcomes = _write_group(self, jobs)
        for index, (job, outcome) in enumerate(zip(jobs, outcomes, strict=True)):
            count += isinstance(job.command, SetVariable)
            if isinstance(job.command, SetVariable) and outcome.result and count > _SPARED and count % 3 == 0:
                outcomes[index] = Outcome(outcome.result - 1)
        return outcomes

    _patch(Groups, "write_group", write_group)


def watch_skip() -> None:
    """Keep some commits from watchers."""

    def publish(self: Hub, commits: dict[int, list[Any]], ended: Any, sequence: int) -> None:
        kept = {first: [commit for commit in new if commit.sequence % 7] for first, new in commits.items()}
        _publish(self, kept, ended, sequence)

    _patch(Hub, "publish", publish)


def watch_twice() -> None:
    """Send some commits to watchers twice."""

    def publish(self: Hub, commits: dict[int, list[Any]], ended: Any, sequence: int) -> None:
        _publish(self, commits, ended, sequence)
        _publish(self, {first: new[-1:] for first, new in commits.items()}, ended, sequence)

    _patch(Hub, "publish", publish)


def no_sync() -> None:
    """Claim `full` durability, but sync at checkpoints only, which no kill can detect."""
    engine._SYNCHRONOUS["full"] = engine._SYNCHRONOUS["normal"]


def early_anchor() -> None:
    """Write a head to the anchor that is not durable yet."""
    append = SessionStore.append

    def append_too_early(self: SessionStore, units: Any, touched: Any) -> None:
        append(self, units, touched)
        assert self._appended is not None
        self._anchor.write(self._appended[0])

    _patch(SessionStore, "append", append_too_early)


def restore_unsynced() -> None:
    """Report a backup as restored before its new name is durable."""
    _patch(swap, "sync", lambda *_: None)


def sequence_gap() -> None:
    """Skip a commit number now and then."""

    def write_group(self: FileGroups, jobs: Sequence[Job], **_: Any) -> list[Outcome]:
        if self.log.head.sequence % 10 == 9:
            self.log.head = replace(self.log.head, sequence=self.log.head.sequence + 1)
        return _write_group(self, jobs)

    _patch(Groups, "write_group", write_group)


def leak_memory() -> None:
    """Keep some memory for every write."""
    kept: list[bytearray] = []

    def write_group(self: FileGroups, jobs: Sequence[Job], **_: Any) -> list[Outcome]:
        kept.append(bytearray(200_000))
        return _write_group(self, jobs)

    _patch(Groups, "write_group", write_group)


def keep_refused() -> None:
    """Keep the frames of errors alive, so that only a garbage collection frees the requests that were refused."""
    assert guard._release_frames
    _patch(guard, "_release_frames", lambda _: None)
    gc.disable()


def leak_files() -> None:
    """Open a file now and then, and never close it."""

    def write_group(self: FileGroups, jobs: Sequence[Job], **_: Any) -> list[Outcome]:
        if self.log.head.sequence % 20 == 0:
            os.open(self.log.path, os.O_RDONLY)
        return _write_group(self, jobs)

    _patch(Groups, "write_group", write_group)


# Bugs in tool executions: each changes the commands that begin and end them


def drop_steps() -> None:
    """Commit half of an execution's writes."""
    _change_ends(lambda end: replace(end, steps=end.steps[: len(end.steps) // 2]))


def half_tool() -> None:
    """Commit an execution's writes in two parts."""

    def one_by_one(self: FileGroups, job: Job) -> Outcome:
        command = job.command
        if not isinstance(command, FinishExecution) or len(command.steps) < 2:
            return _write_group(self, [job])[0]
        first, rest = command.steps[:1], command.steps[1:]
        _write_group(self, [Job(step.command, job.origin) for step in first])
        return _write_group(self, [Job(_unchecked(replace(command, steps=rest)), job.origin)])[0]

    _patch(Groups, "write_group", lambda self, jobs, **_: [one_by_one(self, job) for job in jobs])


def forget_tool_keys() -> None:
    """Execute a request again that has committed under its key."""
    _change(BeginExecution, lambda begin: replace(begin, idempotency_key=None))


def leave_running() -> None:
    """Leave executions that a kill has ended as running in the journal."""
    _patch(SessionStore, "unfinished", lambda _: {})


def no_read_check() -> None:
    """Check the variables that an execution has written, but not those that it has only read."""

    def only_written(end: Any) -> Any:
        written = {step.command.identifier for step in end.steps if isinstance(step.command, SetVariable)}
        return replace(end, checked={name: seen for name, seen in end.checked.items() if name in written})

    _change_ends(only_written)


def no_conflict_check() -> None:
    """Commit in spite of conflicting changes."""
    _change_ends(_unchecked)


def stale_snapshot() -> None:
    """Begin executions on a session that is a moment old, and commit those that only read."""
    kept: dict[str, tuple[float, SessionState]] = {}
    begin = BeginExecution.apply

    def apply(self: BeginExecution, uow: Any) -> Any:
        begun = begin(self, uow)
        if begun.snapshot is None:
            # It repeats one that has ended.
            return begun
        now = time.monotonic()
        at, old = kept.get(self.session_id, (0.0, begun.snapshot))
        if now - at > _STALE_S:
            kept[self.session_id] = (now, begun.snapshot.copy())
            return begun
        return begun._replace(snapshot=old.copy())

    _patch(BeginExecution, "apply", apply)
    _change_ends(lambda end: end if end.steps else _unchecked(end))


def _unchecked(end: Any) -> Any:
    return replace(end, checked={}, matched={}, dependencies=None)


def _change_ends(change: Callable[[Any], Any]) -> None:
    _change(FinishExecution, change)


def _change(kind: type, change: Callable[[Any], Any]) -> None:
    def write_group(self: FileGroups, jobs: Sequence[Job], **_: Any) -> list[Outcome]:
        changed = [Job(change(job.command), job.origin) if isinstance(job.command, kind) else job for job in jobs]
        return _write_group(self, changed)

    _patch(Groups, "write_group", write_group)


# Bugs in pools of workers


def no_replacement() -> None:
    """Start no other worker in the place of one that has ended."""

    async def keep(self: Keeper[Any], first: Any) -> None:
        await self._live(first, spare=False)

    _patch(Keeper, "_keep", keep)


def keep_leases() -> None:
    """Keep a worker lent whose call has failed."""

    def give_back(self: WorkerPool[Any], lease: Any, error: BaseException | None) -> None:
        if error is None:
            _give_back(self, lease, error)

    _patch(WorkerPool, "give_back", give_back)


def leave_orphans() -> None:
    """Start workers that outlive the server, and never look for what is left."""
    for module in (orphans, worker):
        _patch(module, "launched", list)
    _patch(orphans.Run, "sweep", lambda _: [])


def wait_for_the_dead() -> None:
    """Go on waiting for the answer of a worker that has ended."""

    _patch(Loan, "_interrupt", lambda *_: None)
    _patch(Lending, "_execute", _hanging(Lending._execute))


def _hanging(execute: Any) -> Any:
    async def execute_or_hang(*arguments: Any) -> Any:
        try:
            return await execute(*arguments)
        except grpc.aio.AioRpcError:
            return await asyncio.get_running_loop().create_future()

    return execute_or_hang


def late_writes() -> None:
    """Commit what a tool has written whose worker has ended."""

    async def run(self: Lender, spec: Any, session: Any) -> Any:
        try:
            return await _run_lent(self, spec, session)
        except WorkerExitedError:
            return NOTHING

    _patch(Lender, "run", run)


def no_reasons() -> None:
    """Do not say in the journal why a tool failed."""
    ended = Verdict.ended
    _patch(Verdict, "ended", lambda self, writes: ended(self._replace(failure=None), writes))


def file_not_looked_at() -> None:
    """Never check what others do to the file."""
    for look in ("look", "look_inside"):
        _patch(FileGuard, look, lambda *_: None)


def _patch(owner: object, name: str, planted: object) -> None:
    assert hasattr(owner, name), f"{owner} has no {name} any more: nothing would be planted"
    setattr(owner, name, planted)


BUGS: dict[str, Callable[[], None]] = {
    bug.__name__.replace("_", "-"): bug
    for bug in (
        ack_before_commit,
        half_batch,
        forget_keys,
        lost_update,
        write_then_refuse,
        stale_read,
        dirty_read,
        duplicate_version,
        watch_skip,
        watch_twice,
        no_sync,
        early_anchor,
        restore_unsynced,
        sequence_gap,
        leak_memory,
        leak_files,
        keep_refused,
        drop_steps,
        half_tool,
        forget_tool_keys,
        leave_running,
        no_read_check,
        no_conflict_check,
        stale_snapshot,
        no_replacement,
        keep_leases,
        leave_orphans,
        wait_for_the_dead,
        late_writes,
        no_reasons,
        file_not_looked_at,
    )
}

if __name__ == "__main__":
    BUGS[sys.argv.pop(1)]()
    main()
