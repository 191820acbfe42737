"""ValueCache: current values that a client has read, so that it need not ask the server again.

Three rules keep it true:

- An entry is used for `max_age_s` at most, counted from when the read that filled it was sent. Nothing else prolongs
  it, so whatever happens to the connection, no read shows a value, a lock or metadata older than that.
- While entries of a session are kept, a watch follows that session. Changes by others replace or drop the entry as they
  arrive, and without the watch there are no entries.
- A write through this client drops what it may have changed before its caller gets the answer. Likewise, no read goes
  back behind what the client has seen by other calls or by watches of its program.

A read that was sent before a change, and answered after it, must not fill the cache. So each has a `_Fill`, which a
change takes away.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import grpc

from dspex_persist.infra.logs import get_logger
from dspex_persist.state import commands
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.headers import POSITION
from dspex_persist.state.commands import Command
from dspex_persist.state.model import Update, UpdateKind, Variable, VariablesFound, VariableVersion, size_of

MAX_BYTES: Final = 32 * 1024 * 1024
"""The default for the size of a cache."""
MAX_AGE_S: Final = 1.0
"""The default for the age of its entries."""
MOST_SESSIONS: Final = 64
"""How many sessions a cache follows at a time; each takes a thread."""
_IDLE_S: Final = 60.0
_PAUSE_S: Final = 1.0
_ENTRY_BYTES: Final = 1_500

_logger: Final = get_logger(__name__)

Follow: TypeAlias = Callable[[str], Any]
"""Begins to watch a session: returns the call of the stream."""
_Key: TypeAlias = tuple[str, str]


class _Entry:
    __slots__ = ("fresh_until", "size_bytes", "variable")

    def __init__(self, variable: Variable, fresh_until: float) -> None:
        self.variable = variable
        self.fresh_until = fresh_until
        self.size_bytes = _size_of(variable)


class _Session:
    """A session that is followed. `ids`: the names of its cached variables by their ids."""

    __slots__ = ("call", "fills", "id", "ids", "is_live", "used_at")

    def __init__(self, session_id: str, now: float) -> None:
        self.id = session_id
        self.is_live = False
        self.used_at = now
        self.call: Any = None
        self.fills: dict[str, _Fill] = {}
        self.ids: dict[str, str] = {}


class _Fill:
    """A read on its way to the server, whose answer may be kept unless something changes meanwhile."""

    __slots__ = ("identifier", "sent_at", "session")

    def __init__(self, session: _Session, identifier: str, sent_at: float) -> None:
        self.session = session
        self.identifier = identifier
        self.sent_at = sent_at


class ValueCache:
    """The current values that a client has read. Usable from any thread.

    Args:
        follow: Begins to watch a session.
        max_bytes: The size at which the entries that were not used for the longest time are dropped.
        max_age_s: How old an entry may become, in seconds.
        now: Returns a time in seconds that never goes back.

    Attributes:
        hits: How many reads the cache has answered.
        misses: How many reads of a single variable the server has answered.
        max_bytes: See above.
        max_age_s: See above.
    """

    def __init__(
        self, follow: Follow, *, max_bytes: int, max_age_s: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_bytes = max_bytes
        self.max_age_s = max_age_s
        self.hits = self.misses = 0
        self._follow = follow
        self._now = now
        self._lock = threading.Lock()
        # By session and name, the least recently used first.
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._size_bytes = 0
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        # When the watch of a session that has ended may be tried again.
        self._resume_at: dict[str, float] = {}
        self._is_closed = False

    @property
    def size_bytes(self) -> int:
        """The approximate memory of its entries."""
        return self._size_bytes

    @property
    def hit_rate(self) -> float:
        """The share of reads that it has answered, from 0 to 1."""
        hits, misses = self.hits, self.misses
        return hits / (hits + misses) if hits + misses else 0.0

    def __len__(self) -> int:
        """Return how many variables it has."""
        return len(self._entries)

    def __repr__(self) -> str:
        return (
            f"<ValueCache of {len(self)} variables, {self._size_bytes:,} of {self.max_bytes:,} bytes, "
            f"{self.hits:,} hits, {self.misses:,} misses>"
        )

    # Reading

    def find(self, command: Command[Any]) -> Any:
        """Return the result of a read if the cache has it, or None."""
        kind = type(command)
        if command.fault is not None:
            return None
        if kind is commands.GetVariable:
            one: commands.GetVariable = command  # type: ignore[assignment]
            return None if one.bypass_cache else self._find(one.session_id, one.identifier)
        if kind is commands.GetVariables:
            several: commands.GetVariables = command  # type: ignore[assignment]
            identifiers = several.identifiers
            # Several at once are read as of one moment, which the server knows.
            if len(identifiers) == 1 and not several.bypass_cache:
                variable = self._find(several.session_id, identifiers[0])
                return None if variable is None else VariablesFound({identifiers[0]: variable}, ())
        return None

    def _find(self, session_id: str, identifier: str) -> Variable | None:
        with self._lock:
            session = self._sessions.get(session_id)
            if session is None:
                return None
            key = (session_id, session.ids.get(identifier, identifier))
            entry = self._entries.get(key)
            if entry is None:
                return None
            now = self._now()
            if now > entry.fresh_until:
                self._drop(key)
                return None
            self._entries.move_to_end(key)
            self._sessions.move_to_end(session_id)
            session.used_at = now
            self.hits += 1
            return entry.variable

    # Filling

    def sending(self, command: Command[Any]) -> Callable[[Any], None] | None:
        """Note that a command is about to be sent; returns what to call with its result before its caller gets it.

        That is called with None if the command failed.
        """
        if command.writes:
            return lambda _: self.forget(command)
        match command:
            case commands.GetVariable(session_id, identifier, bypass_cache=False):
                fill = self._begin(session_id, identifier)
                return lambda variable: self._end(session_id, fill, variable)
            case commands.GetVariables(session_id, identifiers, bypass_cache=False):
                fills = [self._begin(session_id, each, is_alone=len(identifiers) == 1) for each in identifiers]
                return lambda found: self._end_all(session_id, fills, found)
        return lambda result: self._compare(command.session_id, result)

    def _begin(self, session_id: str, identifier: str, *, is_alone: bool = True) -> _Fill | None:
        with self._lock:
            self.misses += is_alone
            session = self._followed(session_id)
            if session is None or not session.is_live:
                return None
            return session.fills.setdefault(identifier, _Fill(session, identifier, self._now()))

    def _end_all(self, session_id: str, fills: Iterable[_Fill | None], found: VariablesFound | None) -> None:
        for fill in fills:
            if fill is not None:
                self._end(session_id, fill, found.variables.get(fill.identifier) if found is not None else None)
        self._compare(session_id, found)

    def _end(self, session_id: str, fill: _Fill | None, variable: Variable | None) -> None:
        with self._lock:
            if fill is not None and fill.session.fills.get(fill.identifier) is fill:
                del fill.session.fills[fill.identifier]
                # A lock may end at any moment, without a change that a watch could report.
                if variable is not None and variable.optimization is None and fill.session.is_live:
                    fill.session.fills.pop(variable.name, None)
                    fill.session.fills.pop(variable.id, None)
                    self._keep(fill.session, _Entry(variable, fill.sent_at + self.max_age_s))
                    return
            if variable is not None:
                self._outdate(session_id, variable.name, variable.id, variable.version)

    def _compare(self, session_id: str, result: object) -> None:
        """Drop what is older than the result of another read: no later one may go back behind that."""
        if isinstance(result, VariablesFound):
            result = tuple(result.variables.values())
        if isinstance(result, Variable):
            result = (result,)
        if not isinstance(result, tuple | list):
            return
        with self._lock:
            session = self._sessions.get(session_id)
            if session is None:
                return
            for each in result:
                if isinstance(each, Variable):
                    self._outdate(session_id, each.name, each.id, each.version)
                elif isinstance(each, VariableVersion) and (name := session.ids.get(each.variable_id)) is not None:
                    self._outdate(session_id, name, each.variable_id, each.version)

    def _outdate(self, session_id: str, name: str, variable_id: str, version: int) -> None:
        """Drop the entry of a variable that has been seen in this version, if it is an older one.

        Reads of it that have not been answered yet may be older, too.
        """
        if (session := self._sessions.get(session_id)) is not None:
            session.fills.pop(name, None)
            session.fills.pop(variable_id, None)
        key = (session_id, name)
        entry = self._entries.get(key)
        if entry is not None and (entry.variable.id != variable_id or entry.variable.version < version):
            self._drop(key)

    def _keep(self, session: _Session, entry: _Entry) -> None:
        variable = entry.variable
        key = (session.id, variable.name)
        kept = self._entries.get(key)
        if kept is not None:
            # Two reads, by name and by id, may be answered in another order than they were carried out in.
            if kept.variable.id == variable.id and kept.variable.version > variable.version:
                return
            self._drop(key)
        if entry.size_bytes > self.max_bytes:
            return
        self._entries[key] = entry
        self._size_bytes += entry.size_bytes
        session.ids[variable.id] = variable.name
        while self._size_bytes > self.max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: _Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._size_bytes -= entry.size_bytes
            if (session := self._sessions.get(key[0])) is not None:
                session.ids.pop(entry.variable.id, None)

    # Own writes

    def forget(self, command: Command[Any]) -> None:
        """Drop everything that a command may change."""
        identifiers = _written_by(command)
        if identifiers is None:
            self.forget_session(command.session_id)
            return
        with self._lock:
            session = self._sessions.get(command.session_id)
            if session is not None:
                session.fills.clear()
                for identifier in identifiers:
                    self._drop((session.id, session.ids.get(identifier, identifier)))

    def forget_session(self, session_id: str) -> None:
        """Drop everything about a session."""
        with self._lock:
            session = self._sessions.get(session_id)
            if session is not None:
                self._clear(session)

    def _clear(self, session: _Session) -> None:
        session.fills.clear()
        for name in tuple(session.ids.values()):
            self._drop((session.id, name))

    # Following

    def _followed(self, session_id: str) -> _Session | None:
        """Return the session, which is followed from now on; None if that is not possible now."""
        session, now = self._sessions.get(session_id), self._now()
        if session is not None:
            self._sessions.move_to_end(session_id)
            session.used_at = now
            return session
        if self._is_closed or now < self._resume_at.get(session_id, 0.0):
            return None
        if len(self._sessions) >= MOST_SESSIONS:
            longest_unused = next(iter(self._sessions.values()))
            if now - longest_unused.used_at <= self.max_age_s:
                # All of them are in use: to replace one with each read would cost more than the cache saves.
                return None
            self._leave(longest_unused)
        session = self._sessions[session_id] = _Session(session_id, now)
        threading.Thread(target=self._run, args=(session,), name="dspex-persist-cache", daemon=True).start()
        return session

    def _leave(self, session: _Session) -> None:
        self._clear(session)
        session.is_live = False
        if self._sessions.get(session.id) is session:
            del self._sessions[session.id]
        if session.call is not None:
            session.call.cancel()

    def _run(self, session: _Session) -> None:
        """Follow a session until it ends, the connection breaks, or nobody reads it any more."""
        try:
            call = self._follow(session.id)
            with self._lock:
                session.call = call
                if self._sessions.get(session.id) is not session:
                    call.cancel()
            if POSITION in dict(call.initial_metadata() or ()):
                with self._lock:
                    session.is_live = self._sessions.get(session.id) is session
            for message in call:
                if message.update_type != "heartbeat":
                    self._apply(session, codec.update_of(message))
                if self._now() - session.used_at > _IDLE_S:
                    break
        except grpc.RpcError:
            pass
        except Exception as error:  # noqa: BLE001 -- the thread would end, and the entries stay
            _logger.debug("a cache cannot follow its session", error=type(error).__name__)
        finally:
            with self._lock:
                self._leave(session)
                self._pause(session.id)

    def _pause(self, session_id: str) -> None:
        now = self._now()
        if len(self._resume_at) > MOST_SESSIONS:
            self._resume_at = {each: at for each, at in self._resume_at.items() if at > now}
        self._resume_at[session_id] = now + _PAUSE_S

    def told(self, session_id: str, update: Update) -> None:
        """Note an update that a watch of the program is about to get: its reads must not go back behind that."""
        session = self._sessions.get(session_id)
        if session is not None:
            self._apply(session, update)

    def _apply(self, session: _Session, update: Update) -> None:
        variable = update.variable
        if update.kind is UpdateKind.DEPENDENCY_CHANGED:
            return
        with self._lock:
            session.fills.pop(variable.name, None)
            session.fills.pop(variable.id, None)
            key = (session.id, variable.name)
            entry = self._entries.get(key)
            if entry is None or not session.is_live:
                return
            is_same = entry.variable.id == variable.id and update.kind is not UpdateKind.DELETED
            if not is_same or variable.optimization is not None:
                self._drop(key)
            elif variable.version > entry.variable.version:
                # As old as before: it says what was true when the update was sent, and that may have been long ago.
                self._keep(session, _Entry(variable, entry.fresh_until))

    def close(self) -> None:
        """Drop everything and follow nothing any more."""
        with self._lock:
            self._is_closed = True
            for session in tuple(self._sessions.values()):
                self._leave(session)


def _written_by(command: Command[Any]) -> Sequence[str] | None:
    """Return the names or ids of the variables that a command writes; None if it may change any of its session."""
    match command:
        case commands.RegisterVariable(name=name):
            return (name,)
        case commands.SetVariable() | commands.DeleteVariable() | commands.RollbackVariable():
            return (command.identifier,)
        case commands.StartOptimization() | commands.StopOptimization():
            return (command.identifier,)
        case commands.SetVariables(updates=updates):
            return tuple(updates)
    return None


def _size_of(variable: Variable) -> int:
    metadata: Mapping[str, str] = variable.metadata
    texts = (variable.name, variable.id, variable.constraints, *metadata, *metadata.values())
    return _ENTRY_BYTES + variable.value.size_bytes + sum(map(size_of, texts))
