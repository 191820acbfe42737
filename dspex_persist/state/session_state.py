"""A session in memory."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeAlias

from dspex_persist.state.graph import Dependencies
from dspex_persist.state.model import JournalEntry, RegisteredTool, Session, Variable, size_of
from dspex_persist.state.rules import Rules

Undo: TypeAlias = list[tuple[Callable[..., object], tuple[Any, ...]]]
"""The steps that undo changes: functions and their arguments. No closures over a unit of work: they would create
reference cycles, and collecting those takes longer than the unit itself."""
VARIABLE_WEIGHT_BYTES = 1_500
"""The approximate memory of a variable without its contents."""


class Lease:
    """The expiry of a session with a TTL. All copies of the session's state share it, so all see a renewal at once."""

    __slots__ = ("expires_at", "saved_expires_at", "ttl_s")

    def __init__(self, ttl_s: float, expires_at: datetime) -> None:
        self.ttl_s = ttl_s
        self.expires_at = expires_at
        self.saved_expires_at = expires_at

    def touch(self, now: datetime) -> None:
        """Restart the TTL."""
        self.expires_at = now + timedelta(seconds=self.ttl_s)

    @property
    def slack(self) -> timedelta:
        """How far the saved expiry may lag behind. A restart adds it, so that no session expires early."""
        return timedelta(seconds=self.ttl_s / 20)

    def is_unsaved(self) -> bool:
        """Whether the saved expiry lags behind so far that it has to be updated."""
        return self.expires_at - self.saved_expires_at > self.slack / 2


@dataclass(slots=True)
class SessionState:
    """A session in memory. A published state never changes: a group edits a copy.

    Attributes:
        variables: The live variables by name, oldest first.
        names: The names of the live variables by id.
        dependencies: Replaced by each change, never modified.
        lease: The expiry; None without a TTL.
        sequence: The session's last commit.
        weight_bytes: Its approximate size in memory.
        key: The store's key for the session.
        keys: The store's keys for variables, by their ids.
        tools: The tools that workers registered, by name. Replaced by each change, never modified.
        executions: The running executions by id.
        rules: The rules; None if there are none. Replaced by each change, never modified.
        has_locks: Whether a variable has a lock, or had one since the session was loaded.
    """

    session: Session
    variables: dict[str, Variable] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    dependencies: Dependencies = field(default_factory=Dependencies)
    lease: Lease | None = None
    sequence: int = 0
    weight_bytes: int = 2_000
    key: int = 0
    keys: dict[str, int] = field(default_factory=dict)
    tools: Mapping[str, RegisteredTool] = field(default_factory=dict)
    executions: dict[str, JournalEntry] = field(default_factory=dict)
    rules: Rules | None = None
    has_locks: bool = field(default=False, compare=False)
    _order: tuple[str, ...] | None = field(default=None, init=False, repr=False, compare=False)
    """The names before the deletions since the last registration, to undo them; None if there were none."""
    _is_ordered: bool = field(default=True, init=False, repr=False, compare=False)

    def copy(self) -> "SessionState":
        """Return an editable copy, which shares the immutable records."""
        # Not `replace`, which takes three times as long: each group copies each session that it changes.
        return SessionState(
            self.session,
            self.variables.copy(),
            self.names.copy(),
            self.dependencies,
            self.lease,
            self.sequence,
            self.weight_bytes,
            self.key,
            self.keys,
            self.tools,
            self.executions.copy(),
            self.rules,
            self.has_locks,
        )

    def is_over(self, now: datetime) -> bool:
        """Whether the session has expired. It does not expire while a tool runs in it."""
        return self.lease is not None and self.lease.expires_at <= now and not self.executions

    def find(self, identifier: str) -> Variable | None:
        """Return the live variable with this name or id."""
        variable = self.variables.get(identifier)
        if variable is None and (name := self.names.get(identifier)) is not None:
            variable = self.variables.get(name)
        return variable

    def put(self, variable: Variable, undo: Undo | None = None) -> Variable | None:
        """Set the variable under its name and update the weight; return the previous one."""
        previous = self.variables.get(variable.name)
        self.place(variable, previous, growth_of(variable, previous), undo)
        return previous

    def place(self, variable: Variable, previous: Variable | None, growth: int, undo: Undo | None) -> None:
        """Set the variable in place of `previous`; the weight grows by `growth`."""
        self.variables[variable.name] = variable
        self.weight_bytes += growth
        if variable.optimization is not None:
            self.has_locks = True
        if previous is None:
            self._order = None
        if undo is not None:
            undo.append((self.remove, (variable.name,)) if previous is None else (self.put, (previous,)))

    def remove(self, name: str) -> None:
        """Remove the newest variable again."""
        self.weight_bytes -= weight_of(self.variables.pop(name))

    def delete(self, variable: Variable, undo: Undo) -> None:
        """Remove a live variable."""
        if self._order is None:
            # For all deletions up to the next registration: one list for each would take memory squared.
            self._order = tuple(self.variables)
        del self.variables[variable.name], self.names[variable.id]
        self.weight_bytes -= weight_of(variable)
        undo.append((self._undelete, (variable, self._order)))

    def _undelete(self, variable: Variable, order: tuple[str, ...]) -> None:
        self.put(variable)
        self.names[variable.id] = variable.name
        self._order, self._is_ordered = order, False

    def put_in_order(self) -> None:
        """Put the variables in order again after deletions were undone: once for all of them."""
        if not self._is_ordered:
            order = self._order or ()
            self.variables = {name: self.variables[name] for name in order if name in self.variables} | self.variables
            self._is_ordered = True

    def remember(self, undo: Undo, *names: str) -> None:
        """Record the current values of these fields in `undo`, before they change."""
        undo.append((restore, (self, {name: getattr(self, name) for name in names})))


def restore(record: object, fields: Mapping[str, Any]) -> None:
    """Set the fields of a record to their previous values."""
    for name, previous in fields.items():
        setattr(record, name, previous)


def weight_of(variable: Variable) -> int:
    """Return the weight of a variable in its session, in bytes."""
    texts = (variable.constraints, *variable.metadata, *variable.metadata.values())
    return VARIABLE_WEIGHT_BYTES + variable.value.size_bytes + sum(map(size_of, texts))


def growth_of(variable: Variable, previous: Variable | None) -> int:
    """Return how much a session's weight grows if `variable` is added, or replaces `previous`."""
    if previous is None:
        return weight_of(variable)
    if previous.metadata is variable.metadata and previous.constraints is variable.constraints:
        return variable.value.size_bytes - previous.value.size_bytes
    return weight_of(variable) - weight_of(previous)


def size_of_tool(tool: RegisteredTool) -> int:
    """Return the size of a tool's specification in the log, in bytes."""
    return len(json.dumps(asdict(tool), default=repr))
