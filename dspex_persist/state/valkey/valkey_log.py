"""ValkeyLog: the log of sessions in Redis or Valkey, to which any number of servers append."""

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import redis

from dspex_persist.clock import from_micros, to_micros
from dspex_persist.infra.logs import get_logger
from dspex_persist.state.access import Access
from dspex_persist.state.budgets import Spent
from dspex_persist.state.errors import (
    DamagedSessionError,
    LimitExceededError,
    NewerSchemaError,
    NotADatabaseError,
    OutcomeUnknownError,
    StorageError,
)
from dspex_persist.state.log_store import FencedError, MovedError, News, UnwritableError, WouldWaitError
from dspex_persist.state.meter import FileFigures
from dspex_persist.state.model import CommitChanges, JournalEntry, VariableVersion
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.shared.database_state import LEASE_S, DatabaseLog
from dspex_persist.state.shared.server_anchor import ServerAnchor
from dspex_persist.state.shared.settling import SETTLE_S, settled
from dspex_persist.state.shared_log import SharedHold
from dspex_persist.state.unit_of_work import Backing, RecordedOutcome, UnitOfWork, VersionQuery
from dspex_persist.state.valkey import codec, heads, holds
from dspex_persist.state.valkey.batch import Batch, Commands
from dspex_persist.state.valkey.connection import UNCERTAIN, Connection, converted, reason_of, reported
from dspex_persist.state.valkey.heads import NO_HEAD, Head, has_commit, news_between, refuse_headless
from dspex_persist.state.valkey.holds import Holds
from dspex_persist.state.valkey.keys import PREFIX, Keys
from dspex_persist.state.valkey.leases import Leases
from dspex_persist.state.valkey.notices import Notices
from dspex_persist.state.valkey.reads import Reads
from dspex_persist.state.valkey.staging import BUSY, OVER, POLL_S, TURN_S, Import
from dspex_persist.state.valkey.types import naming, refuse_others

_logger: Final = get_logger(__name__)

FORMAT: Final = 1
"""What is stored how; a release refuses formats that it does not know."""
CALL_BYTES: Final = 16 * 1024 * 1024
"""A group of several commits is not larger, so that no call keeps others waiting for long."""
_COMMIT_BYTES: Final = 192 * 1024 * 1024
"""A single commit is not larger, whatever the limits allow."""
_OFTEN: Final = 8
"""After how many groups in a row that others have overtaken a server takes the turn for the next one."""
_TURN_MS: Final = 1_000
_RECLAIMED_AT_ONCE: Final = 1_000
_FIELDS: Final = (*heads.FIELDS, holds.FIELD)
_MOST_OWNERS: Final = 100_000


class ValkeyLog(DatabaseLog):
    """One server's connections to the store.

    Args:
        connect: Makes a client of the store; called several times.
        name: How errors name the store; without a password.
        address: The same for all addresses of its place; see `addresses.canonical`.
        prefix: What the keys begin with; see `Keys`.
        anchor_dir: Where this server remembers the last commit that it knows; None: only in memory.
        lease_s: See `SharedLog.lease_s`.
        check: Raises `NotADatabaseError` if the settings of the store do not let it keep what it acknowledges. Returns
            whether each append waits until it is on disk, because nobody may ask whether the store does so. Called
            now, and whenever the lease is renewed.

    Raises:
        UnavailableError: The store cannot be reached.
        NotADatabaseError: `check` raises it, or there cannot be an anchor.
        LostCommitsError: It has lost commits.
        NewerSchemaError: A newer release wrote it.
    """

    driver_errors = (redis.RedisError,)
    takes_pages = True

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        *,
        name: str = "the store",
        address: str = "",
        prefix: str = PREFIX,
        anchor_dir: Path | None = None,
        lease_s: float = LEASE_S,
        check: Callable[[Any], bool] = lambda _: False,
    ) -> None:
        self.name = name
        self._address = address or name
        self.keys = Keys(prefix)
        # What reads may be sent again; what writes never is. Notices have a connection of their own.
        self._connect = connect
        self._reading, self._writing = Connection(connect(), retries=1), Connection(connect(), retries=0)
        self._client = self._reading.client
        self.reads = Reads(self._reading, self.keys)
        self._leases = Leases(self._reading, self.keys, lease_s)
        self._notices: Notices | None = None
        self._check = check
        self._refusal: NotADatabaseError | None = None
        self._head = NO_HEAD
        self._anchor: ServerAnchor | None = None
        self._is_current = False
        self._observe: Callable[[float], object] | None = None
        self._overtaken = 0
        self._appended: list[tuple[tuple[UnitOfWork, ...], tuple[SessionState, ...]]] = []
        self._import: Import | None = None
        self._owners: dict[int, str] = {}
        self._began: dict[str, codec.Began] = {}
        self._closed = threading.Event()
        self._holds = Holds(self._reading, self._writing, self.keys, self._leases, self._closed.wait)
        try:
            with converted():
                self._begin_log(anchor_dir)
        except BaseException:
            self.abandon()
            raise

    def _begin_log(self, anchor_dir: Path | None) -> None:
        self._waits_for_disk = self._check(self._client)
        refuse_others(self._client, self.keys, self.name)
        refuse_headless(self._client, self.keys, self.name)
        self._client.hsetnx(self.keys.head, "database_id", uuid.uuid4().hex)
        self._client.hsetnx(self.keys.head, "format", FORMAT)
        found = codec.text_in(self._client.hget(self.keys.head, "format"))
        if not found.isdecimal():
            raise NotADatabaseError(self.name, f"its key {self.keys.head} is not one that dspex-persist has written")
        if int(found) > FORMAT:
            raise NewerSchemaError(self.name, found, str(FORMAT))
        head = self._read_head()
        if anchor_dir is not None:
            self._anchor = ServerAnchor(
                anchor_dir,
                head.database_id.decode("ascii", "replace"),
                self.name,
                address=self._address,
                last=head.sequence,
                has_commit=lambda known: has_commit(self._client, self.keys, known),
            )
        self._leases.begin()
        self._know(head)

    # The head

    def _know(self, head: Head) -> None:
        is_new = head.sequence != self._head.sequence
        self._head = head
        if is_new and self._anchor is not None:
            self._anchor.write(head.anchored)

    def _read_head(self) -> Head:
        *found, count = self._client.hmget(self.keys.head, _FIELDS)
        self._holds.see(count)
        return Head.of(found)

    @property
    def sequence(self) -> int:
        """See `LogStore`."""
        return self._head.sequence

    @property
    def last_at(self) -> datetime:
        """See `LogStore`."""
        return self._head.last_at

    @reported
    def head(self) -> int:
        """See `SharedLog`."""
        with naming(self._client, self.keys, self.name):
            return int(self._client.hget(self.keys.head, "sequence") or 0)

    @reported
    def news(self) -> News | None:
        """See `SharedLog`."""
        with naming(self._client, self.keys, self.name):
            return self._learn(self._read_head())

    def _learn(self, head: Head) -> News | None:
        news = news_between(self._client, self.keys, self.name, self._head, head)
        self._know(head)
        return news

    # Groups

    def group(self, *, wait: bool = True) -> AbstractContextManager[News | None]:
        """See `LogStore`. Nothing is locked: what was appended is stored at the end, if the log has not moved."""
        return self._group(wait=wait, refusal=self._refusal)

    def reading(self) -> AbstractContextManager[News | None]:
        """See `SharedLog`. A store that may lose what is written can be read."""
        return self._group(wait=True, refusal=None)

    @contextlib.contextmanager
    def _group(self, *, wait: bool, refusal: NotADatabaseError | None) -> Iterator[News | None]:
        self._appended = []
        has_turn = wait and self._overtaken >= _OFTEN and self._import is None and self._take_turn()
        # Most often nobody else has written. Storing compares the head, and a group that stores nothing does so at its
        # end: asking before as well would take as long again.
        is_assumed, self._is_current = self._is_current and self._import is None and refusal is None, False
        try:
            with converted():
                yield None if is_assumed else self._begin(wait, refusal)
            if self._import is not None:
                self._finish_import(self._import)
            elif self._appended:
                self._store()
            elif is_assumed:
                self._confirm()
            self._is_current = True
            self._overtaken = 0
        except MovedError:
            self._overtaken += 1
            raise
        finally:
            self._appended = []
            if has_turn:
                self._give_turn_back()
            if self._import is not None:
                self._give_up(self._import)

    def _take_turn(self) -> bool:
        """Have the others wait with their writes: one that writes all the time would overtake this server for ever."""
        keys = (self.keys.servers, self.keys.turn, self.keys.staged)
        with converted():
            answer = self._writing.call("turn", keys, self._leases.server, self._leases.token, _TURN_MS)
        if answer == b"fenced":
            self._take_for_dead()
        return bool(answer == b"begun")

    def _give_turn_back(self) -> None:
        # If it fails, the turn ends by itself.
        with contextlib.suppress(redis.RedisError):
            self._writing.call("release", (self.keys.turn, self.keys.staged), self._leases.server)

    def _begin(self, wait: bool, refusal: NotADatabaseError | None) -> News | None:
        """Compare the lease, let imports of others end, and return the news: in one round trip, as a rule."""
        if refusal is not None:
            raise StorageError(f"{self.name}: {refusal.reason}")
        deadline = time.monotonic() + 2 * TURN_S
        while True:
            pipeline = self._client.pipeline(transaction=False)
            pipeline.hmget(self.keys.head, _FIELDS)
            pipeline.hget(self.keys.servers, self._leases.server)
            pipeline.get(self.keys.turn)
            (*head, count), token, owner = pipeline.execute()
            if not self._leases.is_current(token):
                self._take_for_dead()
            if owner is None or owner.decode() == self._leases.server:
                self._holds.see(count)
                return self._learn(Head.of(head))
            if not wait:
                raise WouldWaitError
            if time.monotonic() > deadline:
                raise StorageError(BUSY)
            self._closed.wait(POLL_S)

    @reported
    def _confirm(self) -> None:
        """Raise `MovedError` if the group did not see the newest commit, or all holds."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.hmget(self.keys.head, _FIELDS)
        pipeline.hget(self.keys.servers, self._leases.server)
        (*head, count), token = pipeline.execute()
        if not self._leases.is_current(token):
            self._take_for_dead()
        if Head.of(head) != self._head or (count or b"") != self._holds.seen:
            raise MovedError

    def _take_for_dead(self) -> None:
        """Begin another lease, and say so."""
        with converted():
            self._leases.begin()
        self._began.clear()
        raise FencedError

    # Storing

    def append(self, units: Sequence[UnitOfWork], touched: Sequence[SessionState]) -> None:
        """See `LogStore`."""
        if self._import is not None:
            self._import.stage(units, touched, self._head, self._new_batch, CALL_BYTES)
        else:
            self._appended.append((tuple(units), tuple(touched)))

    def _new_batch(self, hash_: bytes, imported: int | None = None) -> Batch:
        return Batch(self.keys, self, hash_, (self._leases.server, self._leases.epoch), imported)

    def _store(self) -> None:
        batch, head, count = self._composed()
        size_bytes, most = batch.shared.size_bytes, CALL_BYTES if count > 1 else _COMMIT_BYTES
        if size_bytes > most:
            # Halved, until each call is small enough.
            raise UnwritableError(LimitExceededError("size of the commit in bytes", size_bytes, most, ""))
        self._append(batch.shared, head._replace(hash=batch.hash))
        for execution_id, began in batch.began.items():
            if began is None:
                self._began.pop(execution_id, None)
            else:
                self._began[execution_id] = began

    @reported
    def _composed(self) -> tuple[Batch, Head, int]:
        """Return what was appended, as a batch; the head after it, but for the hash; and the number of commits.

        What a batch has to know of sessions may have to be read first.
        """
        batch, head, count = self._new_batch(self._head.hash), self._head, 0
        for units, touched in self._appended:
            for unit in units:
                batch.add(unit)
                count += 1
                head = head._replace(sequence=unit.sequence, last_at=max(head.last_at, unit.now))
            batch.finish(touched)
        return batch, head, count

    def _append(self, commands: Commands, head: Head, *, alone: bool = False) -> None:
        """Carry out commands that lead to a head, if it is still the one that this server knows."""
        keys, known = self.keys, self._head
        facts = ("sequence", head.sequence, "hash", head.hash, "last_at", to_micros(head.last_at))
        commands.add("HSET", keys.head, *facts)
        seen = (known.sequence, known.hash if known.sequence else b"", self._holds.seen)
        words = (*seen, self._leases.server, self._leases.token, "alone" if alone else "", *commands.words)
        began = time.perf_counter()
        answer = self._sent((keys.head, keys.servers, keys.turn, keys.staged, keys.news), words, head)
        if answer in (b"moved", b"turn"):
            # To run it again takes the news, and waits until nobody imports.
            raise MovedError
        if answer == b"over":
            raise StorageError(OVER)
        if answer == b"fenced":
            self._take_for_dead()
        if self._observe is not None:
            self._observe(time.perf_counter() - began)
        self._know(head)

    def _sent(self, keys: Sequence[str], words: Sequence[Any], head: Head) -> bytes:
        """Return the answer to an append; it is looked up if it was lost."""
        try:
            if not self._waits_for_disk:
                return bytes(self._writing.call("append", keys, *words))
            answer = self._writing.call_durably("append", keys, words, SETTLE_S)
        except UNCERTAIN as error:
            if self._settle(head):
                return b"stored"
            raise StorageError(reason_of(error)) from error
        except redis.RedisError as error:
            raise _refused(error, self._appended) from error
        if answer is None:
            raise _not_on_disk()
        return bytes(answer)

    def _settle(self, head: Head) -> bool:
        """Whether a call was carried out that was not answered. Before that, it is made sure that it never will be."""
        is_alive, is_stored, is_on_disk = settled(
            lambda: self._look_up(head),
            (redis.RedisError,),
            lambda error: f"the store did not say whether it has kept the commit: {reason_of(error)}",
            settle_s=SETTLE_S,
            wait=self._closed.wait,
        )
        if not is_on_disk:
            raise _not_on_disk()
        if not is_alive and not is_stored:
            self._take_for_dead()
        return is_stored

    def _look_up(self, head: Head) -> tuple[bool, bool, bool]:
        """Return whether the lease is current, whether a head is stored, and whether it is on disk if it has to be."""
        self._writing.reconnect()
        is_alive = self._leases.give_up_calls(self._writing)
        is_stored = has_commit(self._writing.client, self.keys, head.anchored)
        # What this connection has written comes after the commit.
        is_on_disk = not (self._waits_for_disk and is_stored) or self._writing.wait_for_disk(SETTLE_S)
        return is_alive, is_stored, is_on_disk

    # Imports

    @reported
    def prepare_import(self) -> None:
        """See `LogStore`."""
        importing = Import(self._writing, self.keys, self._leases, self._take_for_dead)
        importing.begin(self._closed.wait)
        self._import = importing

    def _finish_import(self, importing: Import) -> None:
        head = importing.end()
        if head is not None:
            self._append(importing.commands, head, alone=True)
            self._import = None

    def _give_up(self, importing: Import) -> None:
        self._import = None
        with contextlib.suppress(redis.RedisError):
            importing.give_up()

    # What a batch asks

    def owner_of(self, first: int) -> str:
        """See `Known`."""
        owner = self._owners.get(first)
        if owner is None:
            if len(self._owners) > _MOST_OWNERS:
                self._owners.clear()
            owner = self._owners[first] = self.reads.owner_of(first)
        return owner

    def began(self, first: int, execution_id: str) -> codec.Began | None:
        """See `Known`."""
        return self._began.get(execution_id) or self.reads.began(first, execution_id)

    def spent_by(self, first: int, tool: str) -> Spent:
        """See `Known`."""
        return self.reads.spent_by(first, tool)

    # Reading

    def load(self, session_id: str) -> SessionState | None:
        """See `LogStore`."""
        return self.reads.load(session_id)

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        """See `LogStore`."""
        return self.reads.find_version(state, variable_id, version)

    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        """See `LogStore`."""
        return self.reads.history(state, query)

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        """See `LogStore`."""
        return self.reads.find_outcome(session_id, key)

    def find_execution(self, state: SessionState, key: str) -> JournalEntry | None:
        """See `LogStore`."""
        return self.reads.find_execution(state, key)

    def spent(self, state: SessionState) -> tuple[int, Mapping[str, Spent]]:
        """See `LogStore`."""
        sequence = self.sequence
        return sequence, self.reads.all_spent(state.session.sequence)

    def actor_of(self, sequence: int) -> str:
        """See `LogStore`: of the first commit of a live session, which is what sessions count by."""
        return self.owner_of(sequence)

    def stored_by(self, identity: str) -> Mapping[int, int]:
        """See `LogStore`."""
        return self.reads.stored_by(identity)

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[Backing]:
        with converted():
            yield self

    def snapshot(self) -> AbstractContextManager[Backing]:
        """See `LogStore`. Each read in it is of the newest commit."""
        return self._snapshot()

    def changes_after(self, state: SessionState, after: int, most_commits: int = 64) -> list[CommitChanges]:
        """See `LogStore`."""
        return self.reads.changes_after(state, after, most_commits)

    def advance(self, states: Sequence[SessionState], until: int) -> list[SessionState | None]:
        """See `SharedLog`."""
        return self.reads.advance(states, until)

    @reported
    def expiry_of(self, state: SessionState) -> datetime | None:
        """See `SharedLog`."""
        micros = self._client.zscore(self.keys.expiry, state.session.sequence)
        return None if micros is None else from_micros(int(micros))

    def observe_commits(self, observe: Callable[[float], object]) -> None:
        """See `DatabaseLog`. It is the time of the call that carries the group out."""
        self._observe = observe

    @reported
    def figures(self) -> FileFigures:
        """See `DatabaseLog`: the size is the memory of everything in the store."""
        size_bytes = int(self._client.info("memory")["used_memory"])
        return FileFigures(size_bytes, None, None, int(self._client.hlen(self.keys.live)))

    @reported
    def count_with_access(self) -> int:
        """See `DatabaseLog`."""
        return sum(Access.of(session.metadata) is not None for session in self.reads.live_sessions())

    # Other servers

    def listen(self, on_news: Callable[[], None]) -> None:
        """See `SharedLog`."""

        def hear() -> None:
            # Whoever misses this stores nothing, and runs its group again.
            self._is_current = False
            on_news()

        self._notices = Notices(self._connect(), self.keys.news, self._leases.server, hear)

    def tell(self) -> None:
        """See `SharedLog`. The functions that append, or change holds, have told them."""

    def announce(self, address: str) -> None:
        """See `SharedLog`."""
        self._leases.announce(address)

    def server_of(self, execution_id: str) -> str | None:
        """See `SharedLog`."""
        return self._leases.server_of(execution_id)

    @property
    def lease_s(self) -> float:
        """See `SharedLog`."""
        return self._leases.lease_s

    @reported
    def renew(self) -> None:
        """See `SharedLog`. It also looks at the settings of the store, which somebody may have changed."""
        self._leases.renew()
        before = self._refusal
        try:
            self._waits_for_disk = self._check(self._client)
            self._refusal = None
        except NotADatabaseError as error:
            self._refusal = error
        if self._refusal is not None and before is None:
            _logger.error("the store cannot be used any more", reason=self._refusal.reason)
        elif self._refusal is None and before is not None:
            _logger.warning("the store can be used again")

    def fence(self) -> Sequence[str]:
        """See `SharedLog`."""
        return self._leases.fence()

    def unfinished(self) -> Mapping[str, Sequence[str]]:
        """See `SharedLog`."""
        return self._leases.unfinished()

    @property
    def holds(self) -> Mapping[str, SharedHold]:
        """See `SharedLog`."""
        return self._holds.all

    def hold(self, session_id: str, hold_id: str) -> None:
        """See `SharedLog`."""
        self._is_current = False
        self._holds.begin(session_id, hold_id)

    def fill_hold(self, hold_id: str) -> bool:
        """See `SharedLog`."""
        self._is_current = False
        return self._holds.fill(hold_id)

    def end_hold(self, hold_id: str) -> None:
        """See `SharedLog`."""
        self._is_current = False
        self._holds.end(hold_id)

    def moved_to(self, session_id: str, since: int) -> str | None:
        """See `SharedLog`."""
        return self._holds.moved_to(session_id, since)

    # Housekeeping

    @reported
    def expired(self, now: datetime, limit: int) -> list[str]:
        """See `LogStore`."""
        return self.reads.expired(now, limit)

    @reported
    def reclaim(self, before: datetime, is_watched: Callable[[int], bool]) -> None:
        """See `LogStore`. The history of ended sessions stays."""
        while members := self.reads.old_outcomes(before, _RECLAIMED_AT_ONCE):
            names, words = [self.keys.ages], list[Any]((to_micros(before),))
            for member in members:
                session_id, key = json.loads(member)
                names.append(self.keys.outcomes(session_id))
                words += (codec.utf8(key), member)
            self._reading.call("reclaim", names, *words)
            if len(members) < _RECLAIMED_AT_ONCE:
                break

    def close(self) -> None:
        """See `LogStore`."""
        self._closed.set()
        if self._notices is not None:
            self._notices.end()
        with contextlib.suppress(redis.RedisError):
            self._leases.leave()
            # Wakes the thread that listens, which is to end.
            self._client.publish(self.keys.news, "")
        self.abandon()

    def abandon(self) -> None:
        """See `LogStore`."""
        self._closed.set()
        if self._notices is not None:
            self._notices.close()
        self._reading.close()
        self._writing.close()
        anchor, self._anchor = self._anchor, None
        if anchor is not None:
            anchor.close()


def _refused(error: redis.RedisError, appended: Sequence[tuple[Sequence[UnitOfWork], Any]]) -> Exception:
    """Return the error for a group that the store has not carried out."""
    reason = reason_of(error)
    if reason.startswith("CHANGED "):
        # Somebody else has written to keys of the log. Alone, the session that they are of fails.
        ids = [unit.state.session.id for units, _ in appended for unit in units if unit.state is not None]
        _logger.error("keys of the log were changed", reason=reason)
        return UnwritableError(DamagedSessionError(ids[0] if ids else "", reason.removeprefix("CHANGED "), "database"))
    return StorageError(reason)


def _not_on_disk() -> OutcomeUnknownError:
    return OutcomeUnknownError("the store has kept the commit, but not on disk in time")
