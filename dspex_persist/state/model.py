"""What the state layer speaks of: frozen records without behaviour of their own, their mappings included.

Times are aware UTC. A *sequence* is the global number of a commit; a *version* counts the changes of one variable.
The records that every write makes are named tuples: a frozen dataclass of that size takes six times as long to make.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple

from dspex_persist.state.frozen import freeze


def size_of(text: str) -> int:
    """Bytes of `text` as UTF-8. Of most texts Python knows that they are ASCII."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


@dataclass(frozen=True, slots=True)
class Value:
    """A value as the protocol writes it: JSON text and, for binary values, the bytes that `json` describes."""

    json: str
    binary: bytes | None = None

    __pydantic_config__: ClassVar[Any] = {"ser_json_bytes": "base64", "val_json_bytes": "base64"}

    @property
    def size_bytes(self) -> int:
        """Bytes of its JSON, as UTF-8, and of its binary."""
        return size_of(self.json) + (len(self.binary) if self.binary else 0)


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
    PUBLISHED = "published"
    """Written by a running tool ahead of its own commit, to be seen at once."""

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", freeze(self.metadata))


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", freeze(self.config))

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

    @property
    def size_bytes(self) -> int:
        """Roughly what it takes in an answer."""
        texts = (*self.metadata, *self.metadata.values())
        return 500 + (self.value.size_bytes if self.value is not None else 0) + sum(map(size_of, texts))


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
    TOOLS_REGISTERED = "tools_registered"
    EXECUTION_BEGAN = "execution_began"
    EXECUTION_ENDED = "execution_ended"
    PRUNED = "pruned"


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", freeze(self.metadata))


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


class Isolation(StrEnum):
    """What a tool execution is protected from: see docs/transactions.md."""

    SERIALIZABLE = "serializable"
    """Nothing that it read or wrote may have been changed by others when it commits."""
    SNAPSHOT = "snapshot"
    """Nothing that it wrote may have been."""


class ExecutionStatus(StrEnum):
    """How an execution stands in the journal."""

    RUNNING = "running"
    COMMITTED = "committed"
    FAILED = "failed"
    """Its code raised an error."""
    CONFLICT = "conflict"
    """Others changed meanwhile what it stood on."""
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    """The server, or the session, ended before it did."""
    ABORTED = "aborted"
    """It ended well, but was part of another execution that did not."""


@dataclass(frozen=True, slots=True)
class ToolParameter:
    """One parameter of a tool. `type` is a value type, or "any"; `validation` is JSON, such as {"choices": [...]}."""

    name: str
    type: str
    description: str = ""
    required: bool = True
    default: Value | None = None
    validation: str = ""


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """What a tool is called, takes and promises. `retries`: how often it may run again after a conflict."""

    name: str
    description: str = ""
    parameters: tuple[ToolParameter, ...] = ()
    streaming: bool = False
    exposed: bool = False
    required_variables: tuple[str, ...] = ()
    isolation: Isolation = Isolation.SERIALIZABLE
    retries: int = 0
    timeout_s: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", freeze(self.metadata))


@dataclass(frozen=True, slots=True)
class RegisteredTool:
    """A tool that a session's worker runs in a process of its own; `address` is "" where nobody said it."""

    spec: ToolSpec
    worker_id: str
    address: str = ""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """What is known of an execution without its events: while it runs in its session's state, and when it has ended
    where it is found again by its idempotency key. `sequence`: the commit of its end."""

    id: str
    tool: str
    began_sequence: int
    parent_id: str | None = None
    idempotency_key: str | None = None
    fingerprint: str = ""
    status: ExecutionStatus = ExecutionStatus.RUNNING
    sequence: int | None = None
    attempt: int = 1
    result: Value | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """The error with which a tool's code ended. The traceback is for the journal only."""

    type: str
    message: str
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class LogEntry:
    """A line that a tool's code logged; `fields` are JSON values."""

    at: datetime
    message: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Seen:
    """A variable as an execution found it: so it still has to be when the execution commits."""

    variable_id: str
    name: str
    version: int
    lock_id: str = ""


@dataclass(frozen=True, slots=True)
class Conflict:
    """What others changed under an execution: a variable with its versions (None: not there) then and now, or, where
    it is no variable's version, what it is in words."""

    name: str
    expected: int | None = None
    actual: int | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"{self.name}: {self.reason}"
        return f"{self.name} (was {_version_text(self.expected)}, is {_version_text(self.actual)})"


def _version_text(version: int | None) -> str:
    return "not there" if version is None else f"at version {version}"


@dataclass(frozen=True, slots=True)
class ToolOutcome:
    """How a request to execute a tool ended. Nothing was written unless it is a `success`.

    `status` is None where nothing was begun: an unknown tool, a wrong parameter. `error` says what went wrong,
    `error_code` the same for programs. `repeated`: an earlier request under the same idempotency key was answered so.
    `streamed`: the result is the list of what the tool yielded. `result_type`: "float" if the tool says that it
    returns, or yields, floats: NaN and the infinities, for which JSON has their names only, are floats then.
    """

    status: ExecutionStatus | None
    result: Value | None = None
    error: Exception | None = None
    error_code: str = ""
    execution_id: str = ""
    commit_sequence: int | None = None
    attempts: int = 0
    repeated: bool = False
    streamed: bool = False
    result_type: str = ""

    @property
    def success(self) -> bool:
        """Whether it committed."""
        return self.status is ExecutionStatus.COMMITTED


PINNED = "pinned"
"""The metadata entry of a change that keeps its version for ever, if it says "true"."""


@dataclass(frozen=True, slots=True)
class PrunePolicy:
    """Which history may go. A version goes where all that is given of `keep_versions` and `before` allows it.

    `keep_versions`: of each variable, the newest so many stay. `before`: what was committed then or later stays.
    `ended_before`: sessions that ended before it go as a whole, but for the fact that they were there.
    `session_id`: nothing of other sessions goes.
    """

    keep_versions: int | None = None
    before: datetime | None = None
    ended_before: datetime | None = None
    session_id: str | None = None


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What went, or, where it was not `confirmed`, would go. `markers`: the commits that say so."""

    confirmed: bool
    sessions: int
    versions: int
    events: int
    markers: int
