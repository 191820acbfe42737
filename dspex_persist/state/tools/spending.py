"""Spending: what the LM calls of sessions have used, as running sums in memory, and whether budgets allow another.

The sum of a session begins with what its journal has, which is read when a budget asks for it first. From then on the
calls of running executions are added as they are recorded. So a budget is exceeded at most by the calls that are in
progress when it is used up. Of sessions that other servers use, too, the journal is read again when they have gone on.
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from weakref import WeakKeyDictionary

from dspex_persist.state import commands
from dspex_persist.state.around import Around
from dspex_persist.state.budgets import NO_BUDGET, NOTHING, TOKENS, Budget, Spent
from dspex_persist.state.errors import BudgetExceededError, Hint, quote
from dspex_persist.state.lm_calls import counts_of, spent_on
from dspex_persist.state.meter import Meter
from dspex_persist.state.model import Origin
from dspex_persist.state.peers import Peers
from dspex_persist.state.provider import Submits

_MOST_SESSIONS: Final = 10_000
_UNJOURNALED: Final = 2**63
"""The commit of an execution whose end is in no journal: no sum of the journal has it."""
_Sums = dict[str, Spent]


@dataclass(slots=True)
class _Ledger:
    """The sums of one session, by tool.

    Attributes:
        is_shared: Whether other servers may use the session, so that the journal has to be read again.
        base: What has ended, once it was read.
        as_of: The last commit that the journal's sum had when it was read.
        running: What has not ended, by the execution that commits it.
        ended: What has ended while the journal is read, or since, with the commits.
    """

    is_shared: bool = False
    base: _Sums | None = None
    as_of: int = 0
    reading: bool = False
    running: dict[str, _Sums] = field(default_factory=dict)
    ended: list[tuple[int, _Sums]] = field(default_factory=list)

    def end(self, execution_id: str, sequence: int) -> None:
        """Note that the journal has an execution since a commit."""
        sums = self.running.pop(execution_id, None)
        if sums is None:
            return
        if self.base is None:
            # Otherwise the sum of the journal will have it.
            if self.reading or sequence == _UNJOURNALED:
                self.ended.append((sequence, sums))
        elif sequence > self.as_of:
            if self.is_shared:
                self.ended.append((sequence, sums))
            else:
                _add(self.base, sums)

    def begin(self, as_of: int, base: Mapping[str, Spent]) -> None:
        """Take the sum of the journal up to a commit."""
        if self.base is not None and as_of <= self.as_of:
            return
        self.as_of, self.base = as_of, dict(base)
        self.ended = [(sequence, sums) for sequence, sums in self.ended if sequence > as_of]
        if not self.is_shared:
            for _, sums in self.ended:
                _add(self.base, sums)
            self.ended.clear()

    def knows(self, sequence: int) -> bool:
        """Whether the sum has all that ended up to a commit of the session, its last one."""
        return self.base is not None and (not self.is_shared or sequence <= self.as_of)

    def total(self, tool: str | None) -> Spent:
        """Return what a tool has used, or the whole session."""
        spent = NOTHING
        ended = (sums for _, sums in self.ended) if self.base is not None else ()
        for sums in (self.base or {}, *self.running.values(), *ended):
            for name, each in sums.items():
                if tool is None or name == tool:
                    spent = spent.plus(each)
        return spent


def _add(sums: _Sums, others: Mapping[str, Spent]) -> None:
    for tool, spent in others.items():
        sums[tool] = sums.get(tool, NOTHING).plus(spent)


class Spending:
    """The sums of all sessions of a store. Usable from any thread.

    Args:
        is_shared: Whether other servers use the sessions, too.

    Attributes:
        meter: Counts the calls, too; None not to count.
    """

    def __init__(self, *, is_shared: bool = False) -> None:
        self._is_shared = is_shared
        self.meter: Meter | None = None
        self._lock = threading.Lock()
        # By the number of a session's first commit: another session may get its id later.
        self._ledgers: dict[int, _Ledger] = {}

    @classmethod
    def of(cls, store: Submits) -> "Spending":
        """Return that of a store; runners over the same store have it in common."""
        while isinstance(store, Around):
            store = store.provider
        with _making:
            spending = _all.get(store)
            if spending is None:
                spending = _all[store] = cls(is_shared=isinstance(store, Peers))
            return spending

    def add(self, session_key: int, execution_id: str, tool: str, call: Mapping[str, Any]) -> None:
        """Add a recorded call.

        Args:
            session_key: The number of the session's first commit.
            execution_id: The execution with which the call will be in the journal.
            tool: The tool of the execution that has made it.
            call: The call.
        """
        spent = spent_on(call)
        if self.meter is not None:
            self.meter.lm_called(tool, counts_of(call))
        with self._lock:
            sums = self._ledger(session_key).running.setdefault(execution_id, {})
            sums[tool] = sums.get(tool, NOTHING).plus(spent)

    def end(self, session_key: int, execution_id: str, sequence: int | None) -> None:
        """Note that an execution has ended, with a commit, or without an end in the journal."""
        with self._lock:
            ledger = self._ledgers.get(session_key)
            if ledger is not None:
                ledger.end(execution_id, _UNJOURNALED if sequence is None else sequence)
                if ledger.base is None and not (ledger.running or ledger.ended or ledger.reading):
                    del self._ledgers[session_key]

    def _ledger(self, session_key: int) -> _Ledger:
        ledger = self._ledgers.get(session_key)
        if ledger is None:
            if len(self._ledgers) >= _MOST_SESSIONS:
                self._forget()
            ledger = self._ledgers[session_key] = _Ledger(self._is_shared)
        return ledger

    def _forget(self) -> None:
        """Forget sums that can be read again, and those of sessions that have ended."""
        for key, ledger in list(self._ledgers.items()):
            if not (ledger.running or ledger.reading):
                del self._ledgers[key]

    def check(
        self,
        store: Submits,
        session_id: str,
        origin: Origin,
        tool: str,
        own: Budget = NO_BUDGET,
        general: Budget = NO_BUDGET,
    ) -> None:
        """Raise `BudgetExceededError` if a budget is used up. It may read the journal, which blocks.

        Args:
            store: Has the session.
            session_id: The session.
            origin: Who makes the call.
            tool: The tool that makes it.
            own: The budget of the tool.
            general: The budget of every session.
        """
        state = store.submit(commands.ReadState(session_id), origin).result()
        stated = Budget.of_metadata(state.session.metadata)
        limits = [
            *_limits(stated, f"session {quote(session_id)}", None, Hint.RAISE_SESSION_BUDGET),
            *_limits(general, f"session {quote(session_id)}", None, Hint.RAISE_SERVER_BUDGET),
            *_limits(own, f"tool {quote(tool)} in this session", tool, Hint.RAISE_TOOL_BUDGET),
        ]
        if not limits:
            return
        key = state.session.sequence
        self._read(store, session_id, key, state.sequence, origin)
        for owner, name, hint, unit, budget in limits:
            with self._lock:
                used = self._ledger(key).total(name).of(unit)
            if used >= budget:
                setting = "max_tokens" if unit == TOKENS else "max_cost"
                raise BudgetExceededError(owner, unit, budget, used, setting).advising(hint)

    def _read(self, store: Submits, session_id: str, key: int, sequence: int, origin: Origin) -> None:
        """Read what the journal has, unless that is known. `sequence`: the last commit of the session."""
        with self._lock:
            ledger = self._ledger(key)
            if ledger.knows(sequence):
                return
            ledger.reading = True
        try:
            as_of, sums = store.submit(commands.SumLmCalls(session_id), origin).result()
            with self._lock:
                ledger.begin(as_of, sums)
        finally:
            ledger.reading = False


def _limits(
    budget: Budget, owner: str, tool: str | None, hint: Hint
) -> Iterator[tuple[str, str | None, Hint, str, float]]:
    for unit, most in budget.limits():
        yield owner, tool, hint, unit, most


_all: Final["WeakKeyDictionary[Submits, Spending]"] = WeakKeyDictionary()
_making: Final = threading.Lock()
