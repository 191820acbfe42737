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
from dspex_persist.state.globs import compile_glob
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

    __slots__ = ("identifier", "sent_at")

    def __init__(self, identifier: str, sent_at: float) -> None:
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
                return lambda variable: self._end(session_id, identifier, fill, variable)
            case commands.GetVariables(session_id, identifiers, bypass_cache=False):
                fills = [self._begin(session_id, each, is_alone=len(identifiers) == 1) for each in identifiers]
                several: commands.GetVariables = command
                return lambda found: self._end_all(several, fills, found)
        return lambda result: self._compare(command, result)

    def _begin(self, session_id: str, identifier: str, *, is_alone: bool = True) -> _Fill | None:
        with self._lock:
            self.misses += is_alone
            session = self._followed(session_id)
            if session is None or not session.is_live:
                return None
            return session.fills.setdefault(identifier, _Fill(identifier, self._now()))

    def _end_all(self, command: commands.GetVariables, fills: Iterable[_Fill | None], found: Any) -> None:
        variables = found.variables if found is not None else {}
        for fill in fills:
            if fill is not None:
                self._end(command.session_id, fill.identifier, fill, variables.get(fill.identifier))
        self._compare(command, found)

    def _end(self, session_id: str, identifier: str, fill: _Fill | None, variable: Variable | None) -> None:
        with self._lock:
            session = self._sessions.get(session_id)
            if session is None:
                return
            is_open = fill is not None and session.fills.pop(identifier, None) is fill
            if variable is None:
                self._drop_one(session, identifier)
            elif (
                fill is not None
                and is_open
                and session.is_live
                # By an id, it may be an earlier variable of its name.
                and identifier == variable.name
                # A lock may end at any moment, without a change that a watch could report.
                and variable.optimization is None
            ):
                self._end_fills(session, variable.name, variable.id)
                self._keep(session, _Entry(variable, fill.sent_at + self.max_age_s))
            else:
                self._see(session, variable)

    def _compare(self, command: Command[Any], result: object) -> None:
        """Drop what is older than the result of another read: no later one may go back behind that."""
        with self._lock:
            session = self._sessions.get(command.session_id)
            if session is None:
                return
            match result:
                case Variable():
                    self._see(session, result)
                case VariablesFound():
                    for identifier in result.missing:
                        self._drop_one(session, identifier)
                    for variable in result.variables.values():
                        self._see(session, variable)
                case tuple() if isinstance(command, commands.ListVariables):
                    self._see_list(session, command.pattern, result)
                case list():
                    self._see_versions(session, result)

    # What the client has seen by other reads. Those of the same variable that are on their way may be older, too

    def _see(self, session: _Session, variable: Variable) -> None:
        self._end_fills(session, variable.name, variable.id)
        key = (session.id, variable.name)
        entry = self._entries.get(key)
        if entry is not None and (
            entry.variable.id != variable.id
            or entry.variable.version < variable.version
            or variable.optimization is not None
        ):
            self._drop(key)

    def _see_list(self, session: _Session, pattern: str, variables: Sequence[Variable]) -> None:
        # Also those of variables that the list shows to be gone.
        session.fills.clear()
        listed, fits = {variable.name for variable in variables}, compile_glob(pattern or "*")
        for name in [name for name in session.ids.values() if name not in listed and fits(name)]:
            self._drop_one(session, name)
        for variable in variables:
            self._see(session, variable)

    def _see_versions(self, session: _Session, versions: Sequence[object]) -> None:
        session.fills.clear()
        for version in versions:
            if isinstance(version, VariableVersion) and (name := session.ids.get(version.variable_id)) is not None:
                entry = self._entries[session.id, name]
                if entry.variable.version < version.version:
                    self._drop((session.id, name))

    def _drop_one(self, session: _Session, identifier: str) -> None:
        """Drop a variable that was not found, or could not be read."""
        session.fills.clear()
        self._drop((session.id, session.ids.get(identifier, identifier)))

    def _end_fills(self, session: _Session, *identifiers: str) -> None:
        for identifier in identifiers:
            session.fills.pop(identifier, None)

    def _keep(self, session: _Session, entry: _Entry) -> None:
        variable = entry.variable
        key = (session.id, variable.name)
        kept = self._entries.get(key)
        if kept is not None:
            # Two reads, by name and by id, may be answered in another order than they were carried out in.
            if kept.variable.id == variable.id and kept.variable.version > variable.version:
                return
            self._drop(key)
            if kept.variable.id != variable.id:
                # One of them was deleted, and which one is unknown here.
                return
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
        try:
            threading.Thread(target=self._run, args=(session,), name="dspex-persist-cache", daemon=True).start()
        except RuntimeError:
            # The system has no thread for it, and may have one later.
            self._leave(session)
            return None
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
            self._end_fills(session, variable.name, variable.id)
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
