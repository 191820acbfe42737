"""What the state layer speaks of: frozen records without behaviour of their own.

Times are aware UTC. A *sequence* is the global number of a commit; a *version* counts the changes of one variable.
The records that every write makes are named tuples: a frozen dataclass of that size takes six times as long to make.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple


@dataclass(frozen=True, slots=True)
class Value:
    """A value as the protocol writes it: JSON text and, for binary values, the bytes that `json` describes."""

    json: str
    binary: bytes | None = None

    __pydantic_config__: ClassVar[Any] = {"ser_json_bytes": "base64", "val_json_bytes": "base64"}

    @property
    def size_bytes(self) -> int:
        """Roughly what the value weighs: characters of its JSON and bytes of its binary."""
        return len(self.json) + (len(self.binary) if self.binary else 0)


class Source(StrEnum):
    """Which side wrote last."""

    ELIXIR = "elixir"
    PYTHON = "python"


class ChangeKind(StrEnum):
    """What made a version."""

    REGISTERED = "registered"
    SET = "set"
    ROLLED_BACK = "rolled_back"
    DELETED = "deleted"
    LOCK_BROKEN = "lock_broken"

    @property
    def merges_metadata(self) -> bool:
        """Whether the metadata of such a change becomes the variable's; that of the others only explains the change."""
        return self in (ChangeKind.REGISTERED, ChangeKind.SET)


@dataclass(frozen=True, slots=True)
class Origin:
    """Who asks, through what, and under which idempotency key."""

    actor: str
    cause: str
    source: Source = Source.ELIXIR
    idempotency_key: str | None = None
    optimizer_id: str | None = None


@dataclass(frozen=True, slots=True)
class Session:
    """A session's own facts; `ttl_s` is None where it lives until it is ended."""

    id: str
    created_at: datetime
    metadata: Mapping[str, str] = field(default_factory=dict)
    ttl_s: float | None = None
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Optimization:
    """The lock of one optimizer on one variable. It ends by itself when its holder has not written for `lease_s`."""

    id: str
    optimizer_id: str
    started_at: datetime
    started_by: str = ""
    config: Mapping[str, str] = field(default_factory=dict)
    lease_s: float = 300.0
    renewed_at: datetime | None = None

    def expires_at(self) -> datetime:
        """When the lease ends unless the holder writes again."""
        return (self.renewed_at or self.started_at) + timedelta(seconds=self.lease_s)


class Variable(NamedTuple):
    """A variable as it stands."""

    id: str
    name: str
    type: str
    value: Value
    version: int
    constraints: str
    metadata: Mapping[str, str]
    source: Source
    updated_at: datetime
    optimization: Optimization | None = None


class VariableVersion(NamedTuple):
    """One entry of a variable's history. `value` is None for a deletion; `metadata` is what came with the change."""

    variable_id: str
    type: str
    version: int
    kind: ChangeKind
    value: Value | None
    metadata: Mapping[str, str]
    source: Source
    created_at: datetime
    actor: str
    cause: str
    sequence: int


@dataclass(frozen=True, slots=True)
class Dependency:
    """`from_id` depends on `to_id`, from commit `since` up to (not with) commit `until`."""

    from_id: str
    to_id: str
    type: str
    since: int
    until: int | None = None


class EventKind(StrEnum):
    """What a commit can say besides new versions."""

    SESSION_STARTED = "session_started"
    SESSION_UPDATED = "session_updated"
    SESSION_ENDED = "session_ended"
    VARIABLE_REGISTERED = "variable_registered"
    DEPENDENCY_ADDED = "dependency_added"
    OPTIMIZATION_STARTED = "optimization_started"
    OPTIMIZATION_STOPPED = "optimization_stopped"


@dataclass(frozen=True, slots=True)
class Event:
    """A fact in the log that is no new version of a value; `body` is JSON."""

    kind: EventKind
    body: Mapping[str, Any]


class Change(NamedTuple):
    """A new version together with the variable as it stands after it (for a deletion: its last value, next version).

    `merged`: whether the variable's metadata changed with it.
    """

    version: VariableVersion
    variable: Variable
    merged: bool = False


@dataclass(frozen=True, slots=True)
class CommitChanges:
    """All that one commit changed. `dependants`: who depends on any of it, used ones first, as they stand."""

    sequence: int
    changes: tuple[Change, ...]
    dependants: tuple[Variable, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Roughly what it takes in memory."""
        return sum(1_000 + change.variable.value.size_bytes for change in self.changes)


class UpdateKind(StrEnum):
    """What a watcher is told."""

    INITIAL_VALUE = "initial_value"
    VALUE_CHANGE = "value_change"
    DELETED = "deleted"
    DEPENDENCY_CHANGED = "dependency_changed"


@dataclass(frozen=True, slots=True)
class Update:
    """One message to a watcher. `part`: (which, of how many) among the updates of its commit.

    `version` is what changed; None for an initial value, and for a dependant, which has not changed itself:
    `dependency` names what did.
    """

    kind: UpdateKind
    variable: Variable
    sequence: int
    created_at: datetime
    version: VariableVersion | None = None
    dependency: str = ""
    part: tuple[int, int] = (1, 1)


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """What GetSession tells."""

    id: str
    metadata: Mapping[str, str]
    created_at: datetime
    variable_count: int
    tool_count: int


@dataclass(frozen=True, slots=True)
class SessionView:
    """What a client that begins or resumes a session is told."""

    resumed: bool
    variables: tuple[Variable, ...]


@dataclass(frozen=True, slots=True)
class VariablesFound:
    """The answer to a batch read: by the identifier asked for; order kept."""

    variables: Mapping[str, Variable]
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """The answer to a batch write: per identifier either a new version or what was wrong."""

    success: bool
    versions: Mapping[str, int]
    errors: Mapping[str, str]
