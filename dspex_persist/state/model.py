"""The records of the state layer: immutable, including their mappings, and without behaviour.

Times are aware UTC. A *sequence* is the global number of a commit; a *version* counts the changes of one variable.
Records that every write creates are named tuples, because creating a frozen dataclass takes six times as long.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, ClassVar, Final, NamedTuple

from dspex_persist.infra.access.tokens import Identity
from dspex_persist.state.frozen import freeze


def size_of(text: str) -> int:
    """Return the size of `text` in UTF-8, in bytes."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def execution_of(cause: str) -> str | None:
    """Return the cause of a commit if it is the id of an execution, else None."""
    return cause if cause.startswith("exec_") else None


class _Kept:
    """What is kept with a value besides its fields: see `values.scalars`."""

    __slots__ = ("document",)
    document: object


@dataclass(frozen=True, slots=True)
class Value(_Kept):
    """A value in the protocol's encoding: JSON text and, for binary values, the bytes that the JSON describes."""

    json: str
    binary: bytes | None = None

    __pydantic_config__: ClassVar[Any] = {"ser_json_bytes": "base64", "val_json_bytes": "base64"}

    @property
    def size_bytes(self) -> int:
        """The size of its JSON in UTF-8 plus that of its binary, in bytes."""
        json, binary = self.json, self.binary
        # `size_of`, without the call: each write asks several times.
        return (len(json) if json.isascii() else size_of(json)) + (len(binary) if binary else 0)


class Source(StrEnum):
    """Which side wrote a version."""

    ELIXIR = "elixir"
    PYTHON = "python"


class ChangeKind(StrEnum):
    """What kind of change created a version."""

    REGISTERED = "registered"
    SET = "set"
    ROLLED_BACK = "rolled_back"
    DELETED = "deleted"
    LOCK_BROKEN = "lock_broken"
    PUBLISHED = "published"
    """Written by a running tool before its own commit, so that others see it at once."""

    @property
    def merges_metadata(self) -> bool:
        """Whether the change's metadata is merged into the variable's; otherwise it only describes the change."""
        return self in (ChangeKind.REGISTERED, ChangeKind.SET)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request comes from, and why it is made.

    Attributes:
        actor: Who makes the request, such as `user:alice`.
        cause: The operation or the execution behind it.
        source: The side that writes.
        idempotency_key: With the same key, a request takes effect only once.
        optimizer_id: The optimizer that makes the request, which may write variables that it has locked.
        reason: Why it is made, in the caller's words. It is kept with each version that the request writes, and with
            the execution of a tool; see `REASON`.
        identity: Whose token it has; None where none is demanded.
        access: The rules of the session (`state.access.Access`) by which the request was admitted; None without any.
    """

    actor: str
    cause: str
    source: Source = Source.ELIXIR
    idempotency_key: str | None = None
    optimizer_id: str | None = None
    reason: str | None = None
    identity: Identity | None = None
    access: object = None


REASON = "dspex.reason"
"""The key in the metadata of a version, or of an execution, whose entry is the reason for it. It says something about
that one change, and is never merged into the metadata of the variable."""


RESTORED_METADATA = "dspex.metadata"
"""The key in the metadata of a rolled-back version whose entry is the metadata, as JSON, that its variable has from
that version on. Other such versions leave the metadata of their variable as it is."""


def without_reason(metadata: Mapping[str, str]) -> Mapping[str, str]:
    """Return the metadata that the writer of a version gave: without its reason."""
    if REASON not in metadata:
        return metadata
    return freeze({key: text for key, text in metadata.items() if key != REASON})


@dataclass(frozen=True, slots=True)
class Session:
    """A session without its variables. `ttl_s` is None if it never expires."""

    id: str
    created_at: datetime
    metadata: Mapping[str, str] = field(default_factory=dict)
    ttl_s: float | None = None
    sequence: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", freeze(self.metadata))


@dataclass(frozen=True, slots=True)
class Optimization:
    """The lock of an optimizer on a variable. It expires if its holder does not write for `lease_s` seconds."""

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
        """Return when the lease ends unless the holder writes again."""
        return (self.renewed_at or self.started_at) + timedelta(seconds=self.lease_s)


class Variable(NamedTuple):
    """The current state of a variable.

    Attributes:
        version: The number of its newest version; counts from 0.
        constraints: JSON.
        source: Which side wrote the newest version.
        optimization: Its lock, if an optimizer holds one.
    """

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

    @property
    def is_sensitive(self) -> bool:
        """Whether its value is not to be shown."""
        return self.metadata.get(SENSITIVE, "").lower() == "true"


class VariableVersion(NamedTuple):
    """One entry of a variable's history. `value` is None for a deletion; `metadata` is that of the change, with its
    reason under `REASON`."""

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
    def reason(self) -> str | None:
        """Why it was written; None if the writer gave no reason."""
        return self.metadata.get(REASON)

    @property
    def execution_id(self) -> str | None:
        """The execution of a tool that wrote it; None if it was a single call."""
        return execution_of(self.cause)

    @property
    def size_bytes(self) -> int:
        """Its approximate size in an answer, in bytes."""
        texts = (*self.metadata, *self.metadata.values())
        return 500 + (self.value.size_bytes if self.value is not None else 0) + sum(map(size_of, texts))


SENSITIVE = "sensitive"
"""The key of metadata that marks a variable whose value is not to be shown: its entry is "true"."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of a session: an expression that holds after every commit. See `state.rules`."""

    name: str
    expression: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class Dependency:
    """Variable `from_id` depends on `to_id`, from commit `since` until before commit `until`; None while it lasts."""

    from_id: str
    to_id: str
    type: str
    since: int
    until: int | None = None


class EventKind(StrEnum):
    """The kinds of events, which commits contain besides new versions."""

    SESSION_STARTED = "session_started"
    SESSION_UPDATED = "session_updated"
    SESSION_ENDED = "session_ended"
    VARIABLE_REGISTERED = "variable_registered"
    DEPENDENCY_ADDED = "dependency_added"
    DEPENDENCY_REMOVED = "dependency_removed"
    OPTIMIZATION_STARTED = "optimization_started"
    OPTIMIZATION_STOPPED = "optimization_stopped"
    TOOLS_REGISTERED = "tools_registered"
    VARIABLE_CONSTRAINED = "variable_constrained"
    RULE_ADDED = "rule_added"
    RULE_REMOVED = "rule_removed"
    EXECUTION_BEGAN = "execution_began"
    EXECUTION_ENDED = "execution_ended"
    SESSION_RESTORED = "session_restored"
    PRUNED = "pruned"


class Change(NamedTuple):
    """A new version, and the variable after it (for a deletion: with its last value and the new version's number).

    `merged`: whether the version changed the variable's metadata. `previous`: the value before; None for a new
    variable, and if the version before was pruned.
    """

    version: VariableVersion
    variable: Variable
    merged: bool = False
    previous: Value | None = None


@dataclass(frozen=True, slots=True)
class CommitChanges:
    """The changes of one commit. `dependants`: the variables that depend on any of them, dependencies first."""

    sequence: int
    changes: tuple[Change, ...]
    dependants: tuple[Variable, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Its approximate size in memory, in bytes."""
        return sum(1_000 + change.variable.value.size_bytes for change in self.changes)


class UpdateKind(StrEnum):
    """The kinds of updates that watchers get."""

    INITIAL_VALUE = "initial_value"
    VALUE_CHANGE = "value_change"
    DELETED = "deleted"
    DEPENDENCY_CHANGED = "dependency_changed"


@dataclass(frozen=True, slots=True)
class Update:
    """One message to a watcher.

    Attributes:
        sequence: The number of the commit.
        version: The new version; None for an initial value, and for a dependant, which has not changed itself.
        dependency: For a dependant, the names of the variables that changed, separated by ", ".
        part: (number, count) of this update among those of its commit; numbers count from 1.
        previous: The value before the change; None for a new variable, and where it is not known any more.
        actor: Who made the commit; "" for an initial value.
        cause: The operation that made the commit, or the id of the execution; "" for an initial value.
    """

    kind: UpdateKind
    variable: Variable
    sequence: int
    created_at: datetime
    version: VariableVersion | None = None
    dependency: str = ""
    part: tuple[int, int] = (1, 1)
    previous: Value | None = None
    actor: str = ""
    cause: str = ""

    @property
    def execution_id(self) -> str | None:
        """The execution of a tool that made the commit, or None if it was a single call."""
        return execution_of(self.cause)


@dataclass(frozen=True, slots=True)
class ImportedSession:
    """A session that was imported with its history.

    Attributes:
        session_id: Its id.
        commits: How many commits it has, with the one that interrupts executions, if there is one.
        first_sequence: The number of its first commit in this backend.
        last_sequence: The number of its last commit in this backend.
        interrupted: How many executions were running when it was recorded, and are interrupted now.
        answers: How many answers under idempotency keys it brought along.
        content_hash: The hash of the recorded commits (see `recording.ContentHash`).
    """

    session_id: str
    commits: int
    first_sequence: int
    last_sequence: int
    interrupted: int = 0
    answers: int = 0
    content_hash: str = ""


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """The result of GetSession."""

    id: str
    metadata: Mapping[str, str]
    created_at: datetime
    variable_count: int
    tool_count: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", freeze(self.metadata))


@dataclass(frozen=True, slots=True)
class SessionView:
    """The result of beginning or resuming a session."""

    resumed: bool
    variables: tuple[Variable, ...]


@dataclass(frozen=True, slots=True)
class RestoredSession:
    """The result of bringing a session back to an earlier state.

    Attributes:
        sequence: The commit that did it.
        restored_to: The commit whose state the session has again.
        changed: The names of the variables that got their old value or constraints back.
        deleted: The names of those that were registered since, and are deleted.
        returned: The names of those that were deleted since, and are registered again.
    """

    sequence: int
    restored_to: int
    changed: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    returned: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VariablesFound:
    """The result of a batch read: the variables by the requested identifier, in that order."""

    variables: Mapping[str, Variable]
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """The result of a batch write: for each identifier either the new version or an error message."""

    success: bool
    versions: Mapping[str, int]
    errors: Mapping[str, str]


class Isolation(StrEnum):
    """How a tool execution is isolated from other writers: see docs/transactions.md."""

    SERIALIZABLE = "serializable"
    """It commits only if others changed nothing that it read or wrote."""
    SNAPSHOT = "snapshot"
    """It commits only if others changed nothing that it wrote."""


class Concurrency(StrEnum):
    """What an execution does while another one runs in its session, from the laxest to the strictest: see
    docs/transactions.md."""

    OPTIMISTIC = "optimistic"
    """It runs at the same time. If both change the same, one of them ends in a conflict."""
    QUEUE = "queue"
    """It waits for its turn, in the order of the calls."""
    REJECT = "reject"
    """It is refused."""

    @classmethod
    def strictest(cls, *stated: "Concurrency | None") -> "Concurrency":
        """Return the strictest of those that are not None."""
        return max((each for each in stated if each is not None), key=list(cls).index, default=cls.OPTIMISTIC)


CONCURRENCY = "dspex.concurrency"
"""The key of a session's metadata whose entry is the least strict `Concurrency` of its executions."""


class ExecutionStatus(StrEnum):
    """The status of an execution in the journal."""

    RUNNING = "running"
    COMMITTED = "committed"
    FAILED = "failed"
    """Its code raised an error."""
    CONFLICT = "conflict"
    """Others changed what it had read or written."""
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    """The server or the session ended first."""
    ABORTED = "aborted"
    """It succeeded, but the execution that called it did not."""


UNKNOWN: Final = "unknown"
"""What stands for the status of an execution whose commit was not answered; the journal has the real one."""


@dataclass(frozen=True, slots=True)
class ToolParameter:
    """A parameter of a tool. `type` is a value type or "any"; `validation` is JSON, such as {"choices": [...]}."""

    name: str
    type: str
    description: str = ""
    required: bool = True
    default: Value | None = None
    validation: str = ""


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """The specification of a tool.

    Attributes:
        retries: How often it may run again after a conflict.
        concurrency: What it does while another execution runs; None leaves that to the session.
    """

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
    # Left out of the log while it is None: see `bodies.sparse`.
    concurrency: Concurrency | None = field(default=None, metadata={"sparse": True})

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", freeze(self.metadata))


@dataclass(frozen=True, slots=True)
class RegisteredTool:
    """A tool that a worker registered for its session; `address` is "" if the worker gave none."""

    spec: ToolSpec
    worker_id: str
    address: str = ""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """An execution without the details in its events. The session's state has it while it runs; afterwards it is
    found by its idempotency key. `sequence`: the commit that ended it. `failure`: why it has failed."""

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
    failure: "Failure | None" = None


@dataclass(frozen=True, slots=True)
class Failure:
    """The exception that a tool's code raised. Only the journal has the traceback."""

    type: str
    message: str
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class LogEntry:
    """An entry that a tool's code logged; `fields` are JSON values."""

    at: datetime
    message: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Seen:
    """A variable as an execution read it, and as it still has to be when the execution commits."""

    variable_id: str
    name: str
    version: int
    lock_id: str = ""


@dataclass(frozen=True, slots=True)
class Conflict:
    """A change by others that conflicts with an execution: a variable with the expected and the actual version (None:
    it did not exist), or a `reason` in words if it is not about a version."""

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

    Attributes:
        status: None if no execution began, because of an unknown tool or an invalid parameter.
        error: The error; None for a success.
        error_code: The kind of the error, for programs.
        commit_sequence: The commit that contains its writes.
        attempts: How often the tool ran.
        repeated: Whether this is the recorded outcome of an earlier request with the same idempotency key.
        streamed: Whether the result is the list of the values that the tool yielded.
        result_type: "float" if the tool declares that it returns or yields floats. JSON represents NaN and the
            infinities by their names, which are decoded as floats then.
        quotable: Of a failure: the values of variables that its error may quote, for those who mask them.
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
    quotable: tuple[Value, ...] = field(default=(), repr=False, compare=False)

    @property
    def success(self) -> bool:
        """Whether it committed."""
        return self.status is ExecutionStatus.COMMITTED


TRANSACTION = "transaction"
"""What the journal has as the tool of a client's transaction."""
RECORDING = "recording"
"""What the journal has as the tool of a client's recording, unless that has a name."""
RECORDING_ID = "dspex.recording"
"""The key of an execution's metadata that marks it as a recording; the entry is the id that all its parts have."""
PART = "dspex.part"
"""The key of an execution's metadata with the number of the recording's part that it is, from 1."""
OF_RECORDINGS = frozenset((RECORDING_ID, PART))
"""The keys that only recordings have in their metadata."""
TRACE_ID = "dspex.trace_id"
"""The key of an execution's metadata with the trace that it was a part of, if it was traced."""
PINNED = "pinned"
"""The metadata key of a change that exempts its version from pruning; the entry is then "true"."""


@dataclass(frozen=True, slots=True)
class PrunePolicy:
    """Which history to prune. A version is deleted only if `keep_versions` and `before`, where set, both allow it.

    Attributes:
        keep_versions: Keep this many of the newest versions of each variable.
        before: Keep everything committed at this time or later.
        ended_before: Delete the whole history of sessions that ended before this time, except that they existed.
        session_id: Prune only this session.
    """

    keep_versions: int | None = None
    before: datetime | None = None
    ended_before: datetime | None = None
    session_id: str | None = None

    @property
    def denials_before(self) -> datetime | None:
        """Before when to delete the entries about refused calls; None to keep them: they are of no session."""
        return self.before if self.session_id is None else None


@dataclass(frozen=True, slots=True)
class PruneReport:
    """How much was deleted, or would be unless it is `confirmed`.

    Attributes:
        confirmed: Whether it was deleted.
        sessions: Sessions that lost history.
        versions: Versions of variables.
        events: Other events.
        markers: The commits that record the pruning.
        denials: Entries about refused calls.
    """

    confirmed: bool
    sessions: int
    versions: int
    events: int
    markers: int
    denials: int = 0
