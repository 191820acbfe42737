"""A session in memory, and what the events and versions of its commits do to it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeAlias

from dspex_persist.state.graph import Dependencies
from dspex_persist.state.model import JournalEntry, RegisteredTool, Session, Variable, size_of

Undo: TypeAlias = list[tuple[Callable[..., object], tuple[Any, ...]]]
"""What takes each step back: a function and its arguments, no closure over a unit of work. That would be a cycle, and
every unit would wait for the garbage collector, which then costs more than the unit did."""
VARIABLE_WEIGHT_BYTES = 1_500
"""Roughly what a variable takes in memory besides its contents."""


class Lease:
    """How long a session with a TTL lives. Shared by every copy of its state: a touch is seen at once everywhere."""

    __slots__ = ("expires_at", "saved_expires_at", "ttl_s")

    def __init__(self, ttl_s: float, expires_at: datetime) -> None:
        self.ttl_s = ttl_s
        self.expires_at = expires_at
        self.saved_expires_at = expires_at

    def touch(self, now: datetime) -> None:
        """Begin the TTL anew."""
        self.expires_at = now + timedelta(seconds=self.ttl_s)

    @property
    def slack(self) -> timedelta:
        """How far the saved expiry may lag: a start adds it, so that no session ends early."""
        return timedelta(seconds=self.ttl_s / 20)

    def is_unsaved(self) -> bool:
        """Whether the expiry in the file lags so far that it has to be written."""
        return self.expires_at - self.saved_expires_at > self.slack / 2


@dataclass(slots=True)
class SessionState:
    """A session in memory. Once published it is never changed: a group edits a copy.

    `variables` holds the live ones by name, oldest first; `names` leads from id to name; `sequence` is the
    session's last commit; `weight_bytes` is roughly what it takes in memory; `key` and `keys` (by variable id)
    belong to the store that keeps it. `tools` are those that workers registered, by name, `executions` those that
    run, by id. `dependencies` and `tools` are replaced, never changed.
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

    def copy(self) -> "SessionState":
        """An editable copy; frozen records are shared."""
        # Spelled out: `replace` takes three times as long, and each session of each group is copied.
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
        )

    def is_over(self, now: datetime) -> bool:
        """Whether its TTL is. A session in which a tool runs is in use."""
        return self.lease is not None and self.lease.expires_at <= now and not self.executions

    def find(self, identifier: str) -> Variable | None:
        """The live variable of this name or id."""
        found = self.variables.get(identifier)
        if found is None and (name := self.names.get(identifier)) is not None:
            found = self.variables.get(name)
        return found

    def put(self, variable: Variable, undo: Undo | None = None) -> Variable | None:
        """Set the variable under its name and keep the weight; what was there before."""
        previous = self.variables.get(variable.name)
        self.variables[variable.name] = variable
        self.weight_bytes += growth_of(variable, previous)
        if undo is not None:
            undo.append((self.remove, (variable.name,)) if previous is None else (self.put, (previous,)))
        return previous

    def remove(self, name: str) -> None:
        """Take the newest variable back out."""
        self.weight_bytes -= weight_of(self.variables.pop(name))

    def remember(self, undo: Undo, *names: str) -> None:
        """Note in `undo` what these fields are, before they get other values."""
        undo.append((restore, (self, {name: getattr(self, name) for name in names})))


def restore(record: object, fields: Mapping[str, Any]) -> None:
    """Give fields of a record the values that they had."""
    for name, previous in fields.items():
        setattr(record, name, previous)


def weight_of(variable: Variable) -> int:
    """What a variable adds to the weight of its session."""
    texts = (variable.constraints, *variable.metadata, *variable.metadata.values())
    return VARIABLE_WEIGHT_BYTES + variable.value.size_bytes + sum(map(size_of, texts))


def growth_of(variable: Variable, previous: Variable | None) -> int:
    """What the weight of a session grows by where `variable` takes the place of another, or of none."""
    if previous is None:
        return weight_of(variable)
    if previous.metadata is variable.metadata and previous.constraints is variable.constraints:
        return variable.value.size_bytes - previous.value.size_bytes
    return weight_of(variable) - weight_of(previous)


def size_of_tool(tool: RegisteredTool) -> int:
    """Bytes of a tool's description, as the log keeps it."""
    return len(json.dumps(asdict(tool), default=repr))
