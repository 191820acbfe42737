"""ValkeyLog: the log of sessions in Redis or Valkey, to which any number of servers append."""

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, Final, NamedTuple

import redis

from dspex_persist.clock import EARLIEST, from_micros, to_micros
from dspex_persist.infra.logs import get_logger
from dspex_persist.state.access import Access
from dspex_persist.state.budgets import Spent
from dspex_persist.state.errors import (
    DamagedSessionError,
    LimitExceededError,
    LostCommitsError,
    NewerSchemaError,
    NotADatabaseError,
    OutcomeUnknownError,
    StorageError,
)
from dspex_persist.state.log_store import (
    FencedError,
    MovedError,
    News,
    UnwritableError,
    WouldWaitError,
)
from dspex_persist.state.model import CommitChanges, EventKind, JournalEntry, VariableVersion
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.shared_log import SharedLog
from dspex_persist.state.unit_of_work import Backing, RecordedOutcome, UnitOfWork, VersionQuery
from dspex_persist.state.valkey import codec
from dspex_persist.state.valkey.batch import Batch, Commands
from dspex_persist.state.valkey.chain import GENESIS
from dspex_persist.state.valkey.connection import UNCERTAIN, Connection, converted, reason_of, reported
from dspex_persist.state.valkey.keys import Keys
from dspex_persist.state.valkey.reads import Reads

_logger: Final = get_logger(__name__)

FORMAT: Final = 1
"""What is stored how; a release refuses formats that it does not know."""
CALL_BYTES: Final = 16 * 1024 * 1024
"""A group of several commits is not larger, so that no call keeps others waiting for long."""
_COMMIT_BYTES: Final = 192 * 1024 * 1024
"""A single commit is not larger, whatever the limits allow."""
_SETTLE_S: Final = 10.0
"""How long to ask what has become of a call whose answer was lost."""
_TURN_S: Final = 30.0
"""How long others wait for an import that does not go on."""
_POLL_S: Final = 0.05
_MOST_NEWS: Final = 5_000
"""After more commits of others, all of memory is forgotten."""
_RECLAIMED_AT_ONCE: Final = 1_000
_LISTENS_S: Final = 1.0
_HEAD: Final = ("sequence", "hash", "last_at", "database_id")


class Head(NamedTuple):
    """The last commit: its number, its hash, and its time. `database_id` names what it is the head of."""

    sequence: int
    hash: bytes
    last_at: datetime
    database_id: bytes


class _Import:
    """An import under way, which no other server's commits may interrupt."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.units: tuple[int, int] = (0, 0)
        self.session_id = ""
        self.has_ended = False
        self.shared = Commands()


class ValkeyLog(SharedLog):
    """One server's connections to the store.

    Args:
        connect: Makes a client of the store; called several times.
        name: How errors name the store; without a password.
        prefix: What the keys begin with; see `Keys`.
        lease_s: See `SharedLog.lease_s`.
        check: Raises `NotADatabaseError` if the settings of the store do not let it keep what it acknowledges. Returns
            whether each append waits until it is on disk, because nobody may ask whether the store does so. Called
            now, and whenever the lease is renewed.

    Raises:
        UnavailableError: The store cannot be reached.
        NotADatabaseError: `check` raises it.
        NewerSchemaError: A newer release wrote it.
    """

    driver_errors = (redis.RedisError,)
    takes_pages = True

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        *,
        name: str = "the store",
        prefix: str = "dspex",
        lease_s: float = 15.0,
        check: Callable[[Any], bool] = lambda _: False,
    ) -> None:
        self.name = name
        self.keys = Keys(prefix)
        # What reads may be sent again; what writes never is. Notices have a connection of their own.
        self._reading, self._writing = Connection(connect(), retries=1), Connection(connect(), retries=0)
        self._client = self._reading.client
        self._notices: Any = connect()
        self.reads = Reads(self._reading, self.keys)
        self._lease_s = lease_s
        self._check = check
        self._refusal: NotADatabaseError | None = None
        self._server = uuid.uuid4().hex
        self._head = Head(0, GENESIS, EARLIEST, b"")
        self._token = ""
        self._is_current = False
        self._appended: list[tuple[tuple[UnitOfWork, ...], tuple[SessionState, ...]]] = []
        self._import: _Import | None = None
        self._staged_head = self._head
        self._owners: dict[int, str] = {}
        self._began: dict[str, codec.Began] = {}
        self._closed = threading.Event()
        self._listener: threading.Thread | None = None
        with converted():
            self._waits_for_disk = check(self._client)
            self._client.hsetnx(self.keys.head, "database_id", uuid.uuid4().hex)
            self._client.hsetnx(self.keys.head, "format", FORMAT)
            found = int(self._client.hget(self.keys.head, "format"))
            if found > FORMAT:
                raise NewerSchemaError(name, str(found), str(FORMAT))
            self._register()
            self._head = self.read_head()

    # The head

    def read_head(self) -> Head:
        """Return the last commit of all servers."""
        return _head_in(self._client.hmget(self.keys.head, _HEAD))

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
        return int(self._client.hget(self.keys.head, "sequence") or 0)

    @reported
    def news(self) -> News | None:
        """See `SharedLog`."""
        return self._learn(self.read_head())

    def _learn(self, head: Head) -> News | None:
        known = self._head
        if head == known:
            return None
        rows = self._check_continues(known, head)
        self._head = head
        if rows is None:
            return News(known.sequence, head.sequence, head.last_at, None)
        changed = {int(row[b"s"]): codec.text_in(row[b"i"]) for _, row in rows}
        ended = frozenset(int(row[b"s"]) for _, row in rows if b"e" in row)
        return News(known.sequence, head.sequence, head.last_at, changed, ended)

    def _check_continues(self, known: Head, head: Head) -> list[Any] | None:
        """Return the commits after the known one; None if they are too many. `LostCommitsError` if it is gone."""
        if head.database_id != known.database_id:
            raise LostCommitsError(self.name, "it is another database than before")
        if head.sequence < known.sequence:
            reason = f"its last commit is {head.sequence}, but it had {known.sequence}"
            raise LostCommitsError(self.name, reason)
        last, count = f"{head.sequence}-0", _MOST_NEWS + 1
        rows: list[Any] = self._client.xrange(self.keys.log, f"{known.sequence}-0", last, count=count)
        if known.sequence:
            # Put back to an older copy, and written on: then another commit has its number.
            if not rows or rows[0][0] != f"{known.sequence}-0".encode() or rows[0][1][b"h"] != known.hash:
                raise LostCommitsError(self.name, f"commit {known.sequence} is gone, or is another one")
            del rows[0]
        return None if len(rows) >= _MOST_NEWS else rows

    # Writing

    @contextlib.contextmanager
    def group(self, *, wait: bool = True) -> Iterator[News | None]:
        """See `LogStore`. Nothing is locked: what was appended is stored at the end, if the log has not moved."""
        self._appended = []
        # Most often nobody else has written. Storing compares the head, and a group that stores nothing does so at its
        # end: asking before as well would take as long again.
        is_assumed, self._is_current = self._is_current and self._import is None and self._refusal is None, False
        try:
            with converted():
                yield None if is_assumed else self._begin(wait)
            if self._import is not None:
                self._finish_import()
            elif self._appended:
                self._store()
            elif is_assumed:
                self._confirm()
            self._is_current = True
        finally:
            self._appended = []
            if self._import is not None:
                self._give_up()

    def _begin(self, wait: bool) -> News | None:
        """Compare the lease, let imports of others end, and return the news: in one round trip, as a rule."""
        if self._refusal is not None:
            raise StorageError(str(self._refusal))
        deadline = time.monotonic() + 2 * _TURN_S
        while True:
            pipeline = self._client.pipeline(transaction=False)
            pipeline.hmget(self.keys.head, _HEAD)
            pipeline.hget(self.keys.servers, self._server)
            pipeline.get(self.keys.turn)
            head, token, owner = pipeline.execute()
            if token is None or token.decode() != self._token:
                self._take_for_dead()
            if owner is None or owner.decode() == self._server:
                return self._learn(_head_in(head))
            if not wait:
                raise WouldWaitError
            if time.monotonic() > deadline:
                raise StorageError("another server is importing a session")
            self._closed.wait(_POLL_S)

    @reported
    def _confirm(self) -> None:
        """Raise `MovedError` if the group did not see the newest commit."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.hmget(self.keys.head, _HEAD)
        pipeline.hget(self.keys.servers, self._server)
        head, token = pipeline.execute()
        if token is None or token.decode() != self._token:
            self._take_for_dead()
        if _head_in(head) != self._head:
            raise MovedError

    def append(self, units: Sequence[UnitOfWork], touched: Sequence[SessionState]) -> None:
        """See `LogStore`."""
        if self._import is not None:
            self._stage(self._import, units, touched)
        else:
            self._appended.append((tuple(units), tuple(touched)))

    def _batch(self, hash_: bytes, imported: int | None = None) -> Batch:
        return Batch(self.keys, self, hash_, (self._server, self._epoch), imported)

    def _store(self) -> None:
        batch, head = self._batch(self._head.hash), self._head
        count = 0
        for units, touched in self._appended:
            for unit in units:
                batch.add(unit)
                count += 1
                head = head._replace(sequence=unit.sequence, last_at=max(head.last_at, unit.now))
            batch.finish(touched)
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

    def _append(self, commands: Commands, head: Head, *, alone: bool = False) -> None:
        keys = self.keys
        facts = ("sequence", head.sequence, "hash", head.hash, "last_at", to_micros(head.last_at))
        commands.add("HSET", keys.head, *facts)
        known = (self._head.sequence, self._head.hash if self._head.sequence else b"", self._server, self._token)
        words = (*known, "alone" if alone else "", *commands.words)
        answer = self._sent((keys.head, keys.servers, keys.turn, keys.staged, keys.news), words, head)
        if answer in (b"moved", b"turn"):
            # To run it again takes the news, and waits until nobody imports.
            raise MovedError
        if answer == b"over":
            raise StorageError("the import took too long, and another server has written since")
        if answer == b"fenced":
            self._take_for_dead()
        self._head = head

    def _sent(self, keys: Sequence[str], words: Sequence[Any], head: Head) -> bytes:
        """Return the answer to an append; it is looked up if it was lost."""
        try:
            if not self._waits_for_disk:
                return bytes(self._writing.call("append", keys, *words))
            answer = self._writing.call_durably("append", keys, words, _SETTLE_S)
        except UNCERTAIN as error:
            if self._settle(head):
                return b"stored"
            raise StorageError(reason_of(error)) from error
        except redis.RedisError as error:
            raise _refused(error, self._appended) from error
        if answer is None:
            raise OutcomeUnknownError("the store has kept the commit, but not on disk in time")
        return bytes(answer)

    def _settle(self, head: Head) -> bool:
        """Whether a call was carried out that was not answered. Before that, it is made sure that it never will be."""
        deadline, pause_s = time.monotonic() + _SETTLE_S, _POLL_S
        while True:
            try:
                self._writing.reconnect()
                token = self._writing.call("settle", (self.keys.servers,), self._server, self._epoch)
                rows = self._writing.client.xrange(self.keys.log, f"{head.sequence}-0", f"{head.sequence}-0")
                break
            except redis.RedisError as error:
                if time.monotonic() > deadline:
                    reason = f"the store did not say whether it has kept the commit: {reason_of(error)}"
                    raise OutcomeUnknownError(reason) from error
                self._closed.wait(pause_s)
                pause_s = min(2 * pause_s, 1.0)
        is_stored = bool(rows) and rows[0][1][b"h"] == head.hash
        if token != b"fenced":
            self._token = token.decode()
        elif not is_stored:
            self._take_for_dead()
        return is_stored

    # Imports

    @reported
    def prepare_import(self) -> None:
        """See `LogStore`."""
        self._await_turn()
        self._import = _Import()

    def _await_turn(self) -> None:
        keys = (self.keys.servers, self.keys.turn, self.keys.staged)
        deadline = time.monotonic() + 2 * _TURN_S
        while True:
            answer = self._writing.call("turn", keys, self._server, self._token, int(_TURN_S * 1000))
            if answer == b"begun":
                return
            if answer == b"fenced":
                self._take_for_dead()
            if time.monotonic() > deadline:
                raise StorageError("another server is importing a session")
            self._closed.wait(_POLL_S)

    def _stage(self, importing: _Import, units: Sequence[UnitOfWork], touched: Sequence[SessionState]) -> None:
        if importing.first is None:
            importing.first = next((unit.state.session.sequence for unit in reversed(units) if unit.state), None)
        head = self._head if not importing.units[1] else self._staged_head
        batch = self._batch(head.hash, importing.first)
        for unit in units:
            batch.add(unit)
            assert unit.state is not None, "a unit with changes has a session"
            head = head._replace(sequence=unit.sequence, hash=batch.hash)
            if unit.state.session.sequence == importing.first:
                importing.units = (importing.units[0] or unit.sequence, unit.sequence)
                importing.session_id = unit.state.session.id
                importing.has_ended = any(event.kind is EventKind.SESSION_ENDED for event in unit.events)
        batch.finish(touched)
        self._staged_head = head
        importing.shared.words += batch.shared.words
        importing.shared.size_bytes += batch.shared.size_bytes
        for part in batch.own.parts(CALL_BYTES):
            self._send_part(part)

    def _send_part(self, words: Sequence[Any]) -> None:
        keys = (self.keys.servers, self.keys.turn, self.keys.staged)
        try:
            answer = self._writing.call("stage", keys, self._server, self._token, int(_TURN_S * 1000), *words)
        except redis.RedisError as error:
            # Carried out or not: it is given up, and nobody has read any of it.
            raise StorageError(reason_of(error)) from error
        if answer == b"fenced":
            self._take_for_dead()
        if answer == b"over":
            raise StorageError("the import took too long, and another server has written since")

    def _finish_import(self) -> None:
        importing = self._import
        assert importing is not None, "only called in an import"
        if importing.first is None or not importing.units[1]:
            self._give_up()
            return
        head, (since, until) = self._staged_head, importing.units
        facts = ("s", importing.first, "i", codec.utf8(importing.session_id), "h", head.hash, "f", since)
        mark = ("e", 1) if importing.has_ended else ()
        importing.shared.add("XADD", self.keys.log, f"{until}-0", *facts, *mark)
        self._append(importing.shared, head, alone=True)
        self._import = None

    def _give_up(self) -> None:
        self._import = None
        with contextlib.suppress(redis.RedisError):
            # Otherwise, whoever writes next after some time does it.
            self._writing.reconnect()
            self._writing.call("release", (self.keys.turn, self.keys.staged), self._server)

    # What a batch asks

    def owner_of(self, first: int) -> str:
        """See `Known`."""
        owner = self._owners.get(first)
        if owner is None:
            if len(self._owners) > 100_000:
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

    def advance(self, state: SessionState, until: int) -> SessionState | None:
        """See `SharedLog`. It applies only commits without events: most have none."""
        return self.reads.advance(state, until)

    @reported
    def expiry_of(self, state: SessionState) -> datetime | None:
        """See `SharedLog`."""
        micros = self._client.zscore(self.keys.expiry, state.session.sequence)
        return None if micros is None else from_micros(int(micros))

    @reported
    def figures(self) -> tuple[int, int]:
        """Return how much memory the store takes, in bytes, and how many live sessions there are; any thread."""
        return int(self._client.info("memory")["used_memory"]), int(self._client.hlen(self.keys.live))

    @reported
    def count_with_access(self) -> int:
        """Return how many live sessions have rules of access; any thread."""
        return sum(Access.of(session.metadata) is not None for session in self.reads.live_sessions())

    # Other servers

    def listen(self, on_news: Callable[[], None]) -> None:
        """See `SharedLog`."""
        self._listener = threading.Thread(
            target=self._listen, args=(on_news,), daemon=True, name="dspex-persist-notices"
        )
        self._listener.start()

    def _listen(self, on_news: Callable[[], None]) -> None:
        while not self._closed.is_set():
            try:
                with self._notices.pubsub() as channel:
                    channel.subscribe(self.keys.news)
                    # Some may have been missed.
                    self._hear(on_news)
                    while not self._closed.is_set():
                        notice = channel.get_message(ignore_subscribe_messages=True, timeout=_LISTENS_S)
                        if notice is not None and notice["data"] != self._server.encode():
                            self._hear(on_news)
            except (redis.RedisError, OSError, ValueError) as error:
                # The last one comes from a connection that is closed meanwhile.
                _logger.debug("not listening", reason=reason_of(error))
                self._closed.wait(_LISTENS_S)

    def _hear(self, on_news: Callable[[], None]) -> None:
        # Whoever misses this stores nothing, and runs its group again.
        self._is_current = False
        on_news()

    def tell(self) -> None:
        """See `SharedLog`. The function that appends has told them."""

    @property
    def lease_s(self) -> float:
        """See `SharedLog`."""
        return self._lease_s

    @reported
    def announce(self, address: str) -> None:
        """See `SharedLog`."""
        self._client.hset(self.keys.addresses, self._server, codec.utf8(address))

    @reported
    def server_of(self, execution_id: str) -> str | None:
        """See `SharedLog`."""
        content = self._client.hget(self.keys.running, codec.utf8(execution_id))
        if content is None:
            return None
        _, server, epoch = json.loads(content)
        token = self._client.hget(self.keys.servers, server)
        if server == self._server or token is None or token.partition(b".")[0].decode() != epoch:
            return None
        address = self._client.hget(self.keys.addresses, server)
        return "" if address is None else codec.text_in(address)

    @property
    def _epoch(self) -> str:
        return self._token.partition(".")[0]

    def _register(self) -> None:
        keys = (self.keys.head, self.keys.servers, self.keys.leases)
        self._token = self._writing.call("register", keys, self._server, self._lease_s).decode()
        self._began.clear()

    def _take_for_dead(self) -> None:
        """Begin another lease, and say so."""
        with converted():
            self._register()
        raise FencedError

    @reported
    def renew(self) -> None:
        """See `SharedLog`."""
        keys = (self.keys.servers, self.keys.leases)
        answer = self._reading.call("renew", keys, self._server, self._epoch, self._lease_s)
        if answer == b"fenced":
            raise FencedError
        self._look_at_settings()

    def _look_at_settings(self) -> None:
        """Refuse to write from now on if somebody has changed a setting that we rely on; or no longer."""
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

    @reported
    def fence(self) -> None:
        """See `SharedLog`."""
        for server in self._reading.call("fence", (self.keys.servers, self.keys.leases)):
            _logger.warning("a server has not renewed its lease", server=server.decode())
            self._client.hdel(self.keys.addresses, server)

    @reported
    def unfinished(self) -> Mapping[str, Sequence[str]]:
        """See `SharedLog`."""
        # In this order, so that the lease of each execution that is found has begun before.
        running = self._client.hgetall(self.keys.running)
        tokens = self._client.hgetall(self.keys.servers) if running else {}
        epochs = {server: token.partition(b".")[0].decode() for server, token in tokens.items()}
        found: dict[str, list[str]] = {}
        for execution_id, content in running.items():
            session_id, server, epoch = json.loads(content)
            if epochs.get(server.encode()) != epoch:
                found.setdefault(session_id, []).append(codec.text_in(execution_id))
        return found

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
        with contextlib.suppress(redis.RedisError):
            self._client.hdel(self.keys.servers, self._server)
            self._client.zrem(self.keys.leases, self._server)
            self._client.hdel(self.keys.addresses, self._server)
            # Wakes the listener, which is to end.
            self._client.publish(self.keys.news, "")
        self.abandon()

    def abandon(self) -> None:
        """See `LogStore`."""
        self._closed.set()
        if self._listener is not None and self._listener is not threading.current_thread():
            self._listener.join(_LISTENS_S)
        self._reading.close()
        self._writing.close()
        self._notices.close()


def _head_in(found: Sequence[bytes | None]) -> Head:
    sequence, hash_, last_at, database_id = found
    at = EARLIEST if last_at is None else from_micros(int(last_at))
    return Head(int(sequence or 0), hash_ or GENESIS, at, database_id or b"")


def _refused(error: redis.RedisError, appended: Sequence[tuple[Sequence[UnitOfWork], Any]]) -> Exception:
    """Return the error for a group that the store has not carried out."""
    reason = reason_of(error)
    if reason.startswith("CHANGED "):
        # Somebody else has written to keys of the log. Alone, the session that they are of fails.
        ids = [unit.state.session.id for units, _ in appended for unit in units if unit.state is not None]
        _logger.error("keys of the log were changed", reason=reason)
        return UnwritableError(DamagedSessionError(ids[0] if ids else "", reason.removeprefix("CHANGED ")))
    return StorageError(reason)
