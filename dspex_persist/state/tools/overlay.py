"""Overlay: the snapshot and the staged writes of an execution and of those that it called.

Commands run here exactly as in a store: over a unit of work, whose backing is the snapshot from when the execution
began.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Any, TypeVar

from dspex_persist import clock
from dspex_persist.infra import forks
from dspex_persist.state import commands
from dspex_persist.state.budgets import Spent
from dspex_persist.state.commands import Command
from dspex_persist.state.commands.executions import Begun, Step, matches, see
from dspex_persist.state.errors import (
    LimitExceededError,
    VariableNotFoundError,
)
from dspex_persist.state.model import (
    JournalEntry,
    Origin,
    Seen,
    Value,
    Variable,
    VariableVersion,
)
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.unit_of_work import Drafts, RecordedOutcome, Savepoint, UnitOfWork, VersionQuery, up_to

R = TypeVar("R")

_MOST_PATTERNS = 16
_STEP_BYTES = 200
_MOST_PAST = 1_000


class Overlay:
    """The snapshot that an execution and those that it called share, and what they have staged over it.

    Args:
        session_id: The session.
        begun: The store's answer to `BeginExecution`, with the snapshot.
        origin: Who asked for the execution.
        read: Runs a reading command on the store, for history; it may block.
    """

    def __init__(self, session_id: str, begun: Begun, origin: Origin, read: Callable[[Command[Any]], Any]) -> None:
        assert begun.snapshot is not None, "a new execution has a snapshot"
        self.lock = threading.RLock()
        self.session_id = session_id
        self.snapshot = begun.snapshot
        self.steps: list[Step] = []
        self.checked: dict[str, Seen | None] = {}
        self.written: set[str] = set()
        self.matched: dict[str, tuple[Seen, ...]] = {}
        self.dependencies: int | None = None
        self.gone: dict[str, str | None] = {}
        # By name: another caller may have deleted a published variable and registered a new one of its name.
        self.published: dict[str, Variable] = {}
        self.names_bytes = 0
        # What was read of histories.
        self._past: deque[Value] = deque(maxlen=_MOST_PAST)
        self._ended_bytes = 0
        self._staged_bytes = [0]
        self._base_sequence = begun.sequence
        self._read = read
        # A weak reference, and no bound method: a reference cycle would keep the request and the session in memory
        # until the next garbage collection.
        backing = weakref.proxy(self)
        self._drafts = Drafts(backing, lambda session_id: backing.load(session_id))
        self.unit = UnitOfWork(
            self._drafts, origin, clock.now(), 0, begun.limits, optimization_lease_s=begun.optimization_lease_s
        )
        self.unit.rules_deferred = True
        self._tokens = _tokens_of(begun.seed)
        self.is_forked = False
        forks.register(self)

    def forked(self, *, quiet: bool) -> None:
        """Refuse further writes in a child process, where they would be lost. See `forks.ForkListener`."""
        self.is_forked = True
        self.lock = threading.RLock()

    def apply(self, command: Command[R], execution_id: str, origin: Origin) -> R:
        """Run a command and return its result. If it fails, nothing of it stays staged."""
        unit = self.unit
        unit.now, unit.steady = clock.now(), clock.steady()
        if not command.writes:
            return command.apply(unit)
        start = unit.savepoint()
        issued: list[str] = []
        unit.origin, unit.tokens = origin, _recorded(self._tokens, issued)
        try:
            result = command.apply(unit)
            size_bytes = self._measure(start)
        except BaseException:
            unit.rollback_to(start)
            raise
        if unit.savepoint() != start:
            step = Step(execution_id, command, origin.source, origin.optimizer_id, tuple(issued), origin.reason)
            self.steps.append(step)
            self._staged_bytes.append(size_bytes)
        return result

    def _measure(self, start: Savepoint) -> int:
        """Return the size in bytes of everything staged, all of which the writer commits at once.

        Raises:
            LimitExceededError: It is too large, or has too many writes.
        """
        _, versions, _ = start
        written, most = max(len(self.unit.versions), len(self.steps) + 1), self.unit.limits.execution_writes
        if written > most:
            raise LimitExceededError("number of writes of the execution", written, most, "execution_writes")
        added = sum(change.version.size_bytes for change in self.unit.versions[versions:])
        size_bytes = self._staged_bytes[-1] + added + _STEP_BYTES
        self._check_size(size_bytes + self._ended_bytes)
        return size_bytes

    def _check_size(self, size_bytes: int) -> None:
        most = self.unit.limits.execution_size_bytes
        if size_bytes > most:
            what = "size of what the execution writes and calls, in bytes,"
            raise LimitExceededError(what, size_bytes, most, "execution_size_bytes")

    def note_ended(self, size_bytes: int) -> None:
        """Count the journal entry of a call that succeeded: it is written when the whole execution ends."""
        self._check_size(self._staged_bytes[-1] + self._ended_bytes + size_bytes)
        self._ended_bytes += size_bytes

    def observe(self, identifier: str) -> Seen | None:
        """Depend on a variable from now on; returns what the execution sees of it."""
        seen = see(self.snapshot.find(identifier))
        self.checked.setdefault(identifier, seen)
        return seen

    def observe_matches(self, pattern: str) -> None:
        """Depend on the variables that match a pattern from now on."""
        if pattern in self.matched:
            return
        # The writer matches every pattern again at the end: beyond this many, one that matches all is cheaper.
        pattern = pattern if len(self.matched) < _MOST_PATTERNS else ""
        if pattern not in self.matched:
            seen_all = map(see, matches(self.snapshot, pattern))
            self.matched[pattern] = tuple(seen for seen in seen_all if seen is not None)

    def observe_dependencies(self) -> None:
        """Depend on the session's dependencies from now on."""
        if self.dependencies is None:
            self.dependencies = self.snapshot.dependencies.changed_at

    def find(self, identifier: str) -> Variable | None:
        """Return the variable as the execution sees it, or None."""
        with self.lock:
            state = self._drafts.find(self.session_id)
            return state.find(identifier) if state is not None else None

    def has_staged(self, identifier: str) -> bool:
        """Whether the execution itself has written the variable."""
        staged = (change.variable for change in self.unit.versions)
        return any(identifier in (variable.name, variable.id) for variable in staged)

    def quotable(self) -> tuple[Value, ...]:
        """Return the values of sensitive variables, and those that have been read, matched or written here."""
        with self.lock:
            matched = {seen.variable_id for found in self.matched.values() for seen in found}
            committed = (
                variable.value
                for variable in self.snapshot.variables.values()
                if variable.is_sensitive
                or variable.id in matched
                or variable.name in self.checked
                or variable.id in self.checked
            )
            staged = (change.version.value for change in self.unit.versions)
            return tuple(value for value in (*committed, *staged, *self._past) if value is not None)

    def rebase(self, variable: Variable) -> None:
        """Base the execution on a version that it has made by publishing: it sees that version, without a conflict."""
        before, now = variable.version - 1, see(variable)
        for name, seen in self.checked.items():
            if seen is not None and (seen.variable_id, seen.version) == (variable.id, before):
                self.checked[name] = now
        for pattern, matched in self.matched.items():
            self.matched[pattern] = tuple(
                now if now is not None and (seen.variable_id, seen.version) == (variable.id, before) else seen
                for seen in matched
            )
        self.published[variable.name] = variable
        self._show_published()

    def rollback_to(self, savepoint: Savepoint, steps: int) -> None:
        """Discard everything staged since a savepoint, and all but the first `steps` steps."""
        self.unit.rollback_to(savepoint)
        del self.steps[steps:], self._staged_bytes[steps + 1 :]
        self._show_published()

    def _show_published(self) -> None:
        for variable in self.published.values():
            _show(self.snapshot, variable)
            draft = self._drafts.states.get(self.session_id)
            if draft is not None and not self._is_own(draft, variable):
                _show(draft, variable)

    def _is_own(self, draft: SessionState, variable: Variable) -> bool:
        """Whether the execution has written the variable, or registered another one under its name."""
        named = draft.variables.get(variable.name)
        return self.has_staged(variable.id) or (named is not None and self.has_staged(named.id))

    # The backing of the unit of work

    def load(self, session_id: str) -> SessionState | None:
        return self.snapshot if session_id == self.session_id else None

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        query = commands.GetVariableHistory(self.session_id, variable_id, 1, version + 1)
        entries: list[VariableVersion] = self._read(query)
        return entries[0] if entries and entries[0].version == version else None

    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        entries = self._history(state, query)
        self._past += (entry.value for entry in entries or () if entry.value is not None)
        return entries

    def _history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        limit, before, most_bytes = query.limit, query.before, query.most_bytes
        variable_id = self._id_of(state, query.identifier)
        staged = [
            change.version
            for change in reversed(self.unit.versions)
            if change.version.variable_id == variable_id and (before is None or change.version.version < before)
        ]
        entries = up_to(staged[:limit], most_bytes)
        if most_bytes is not None:
            most_bytes -= sum(entry.size_bytes for entry in entries)
        enough = len(entries) >= limit or (most_bytes is not None and most_bytes <= 0)
        if enough or (staged and staged[-1].version == 0):
            return entries
        base = self.snapshot.find(variable_id) if variable_id is not None else None
        if base is not None:
            before = base.version + 1 if before is None else min(before, base.version + 1)
        if variable_id is None:
            return self._history_of_gone(query.identifier, limit, before, most_bytes)
        # By id, because another variable may have its name by now.
        rest = commands.GetVariableHistory(self.session_id, variable_id, limit - len(staged), before, most_bytes)
        committed: list[VariableVersion] = self._read(rest)
        return staged + committed

    def _history_of_gone(
        self, identifier: str, limit: int, before: int | None, most_bytes: int | None
    ) -> list[VariableVersion] | None:
        """The history, as of the execution's begin, of a variable deleted before: a later one of its name is hidden."""
        query = commands.GetVariableHistory(self.session_id, identifier, limit, before, most_bytes, self._base_sequence)
        try:
            entries: list[VariableVersion] = self._read(query)
        except VariableNotFoundError:
            self.gone.setdefault(identifier, None)
            return None
        if entries:
            self.gone.setdefault(identifier, entries[0].variable_id)
        return entries

    def _id_of(self, state: SessionState, identifier: str) -> str | None:
        """The id of a variable that exists, or that the execution has deleted; None if it was deleted before."""
        variable = state.find(identifier)
        if variable is not None:
            return variable.id
        staged = (change.variable for change in reversed(self.unit.versions))
        return next((each.id for each in staged if identifier in (each.name, each.id)), None)

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        return None

    def spent(self, state: SessionState) -> tuple[int, Mapping[str, Spent]]:
        """Nothing: no command in an execution asks for it."""
        return 0, {}

    def find_execution(self, state: SessionState, key: str) -> JournalEntry | None:
        return None


def _show(state: SessionState, variable: Variable) -> None:
    """Put the variable into a state, in place of any other one of its name."""
    previous = state.put(variable)
    if previous is not None and previous.id != variable.id:
        state.names.pop(previous.id, None)
    state.names[variable.id] = variable.name


def _tokens_of(seed: str) -> Iterator[str]:
    """Yield the random parts of ids, from the execution's recorded seed, so that a replay draws the same ones."""
    drawn = Random(f"{seed}:ids")
    while True:
        yield f"{drawn.getrandbits(48):012x}"


def _recorded(tokens: Iterator[str], issued: list[str]) -> Iterator[str]:
    for token in tokens:
        issued.append(token)
        yield token
