"""Everything that can go wrong in the state layer: errors with fields, one leaf for each cause.

Each leaf is a dataclass: its fields are its arguments, `str()` says what is true and, where there is
something to do, what to do next. `bridge/status.py` maps each leaf to a gRPC status code.
"""

import os
from dataclasses import dataclass
from typing import Final

from dspex_persist.errors import DspexError
from dspex_persist.spelling import printable as printable
from dspex_persist.spelling import quote as quote

_KEPT: Final = 1000


class StateError(DspexError):
    """The root of the state layer's errors. Its leaves are dataclasses."""

    def __post_init__(self) -> None:
        """Keep names short: what a caller sent as one may have megabytes, and an error may be kept for long."""
        for name, field in vars(self).items():
            if name != "reason" and isinstance(field, str) and len(field) > _KEPT:
                setattr(self, name, f"{field[:_KEPT]}...")
        # Exceptions keep what they were made with a second time.
        self.args = tuple(vars(self).values())


@dataclass(eq=False)
class InvalidArgumentError(StateError):
    """An argument that no state of the store could accept."""

    field: str
    reason: str

    def __str__(self) -> str:
        return f"invalid {self.field}: {self.reason}"


@dataclass(eq=False)
class SessionNotFoundError(StateError):
    """No live session has this id: it never began, has ended, or has expired."""

    session_id: str

    def __str__(self) -> str:
        return f"session not found: {quote(self.session_id)}; it was never begun, or has ended: begin it first"


@dataclass(eq=False)
class SessionExistsError(StateError):
    """A live session has this id, and another one is to begin under it."""

    session_id: str

    def __str__(self) -> str:
        return (
            f"session {quote(self.session_id)} is live here already: use another id for the new one "
            "(of an import: --as ID), or end that session first"
        )


@dataclass(eq=False)
class SessionPrunedError(StateError):
    """Old history of the session is gone, so it cannot be recorded whole. `marker`: the commit that says so."""

    session_id: str
    marker: int

    def __str__(self) -> str:
        return (
            f"session {quote(self.session_id)} cannot be recorded: old history of it was pruned, as commit "
            f"{self.marker} says; record it from a backup that was made before"
        )


@dataclass(eq=False)
class DamagedSessionError(StateError):
    """What the file says of the session makes no sense: it was changed from outside, or the disk has damaged it."""

    session_id: str
    reason: str

    def __str__(self) -> str:
        return (
            f"session {quote(self.session_id)} cannot be read, what the file says of it is damaged ({self.reason}); "
            "other sessions are not affected. Look at it with dspex-persist db check, or restore a backup with "
            "dspex-persist db restore"
        )


@dataclass(eq=False)
class VariableNotFoundError(StateError):
    """The session has no variable of this name or id."""

    session_id: str
    identifier: str
    hint: str = ""

    def __str__(self) -> str:
        hint = f"; {self.hint}" if self.hint else ""
        return f"variable not found: {quote(self.identifier)} in session {quote(self.session_id)}{hint}"


@dataclass(eq=False)
class VersionNotFoundError(StateError):
    """The variable never had this version."""

    name: str
    version: int
    latest: int

    def __str__(self) -> str:
        return f"version not found: {self.version} of variable {quote(self.name)}; it has versions 0 to {self.latest}"


@dataclass(eq=False)
class VersionPrunedError(StateError):
    """The variable had this version, but it was pruned."""

    name: str
    version: int

    def __str__(self) -> str:
        return (
            f"version {self.version} of variable {quote(self.name)} was pruned: its value is gone; "
            "its history lists the versions that are left"
        )


@dataclass(eq=False)
class VariableExistsError(StateError):
    """The name is registered already, as something else."""

    name: str
    difference: str

    def __str__(self) -> str:
        return f"variable {quote(self.name)} already exists: {self.difference}"


@dataclass(eq=False)
class UnknownTypeError(StateError):
    """There is no such value type."""

    name: str
    type: str
    known: str

    def __str__(self) -> str:
        return f"unknown type {quote(self.type)} for variable {quote(self.name)}; known types: {self.known}"


@dataclass(eq=False)
class InvalidValueError(StateError):
    """The value breaks its variable's type or constraints."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"invalid value for {quote(self.name)}: {self.reason}"


@dataclass(eq=False)
class InvalidConstraintsError(StateError):
    """The constraints are malformed or do not fit the type."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"Invalid constraints for {quote(self.name)}: {self.reason}"


@dataclass(eq=False)
class LimitExceededError(StateError):
    """Something is larger than is allowed, by a setting if `setting` names one."""

    what: str
    actual: int
    limit: int
    setting: str

    def __str__(self) -> str:
        setting = f" (setting {self.setting})" if self.setting else ""
        return f"{self.what} is {self.actual}, above the limit of {self.limit}{setting}"


@dataclass(eq=False)
class VersionConflictError(StateError):
    """Somebody else has written meanwhile."""

    retryable = True
    name: str
    expected: int
    actual: int

    def __str__(self) -> str:
        return (
            f"version conflict on {quote(self.name)}: expected version {self.expected}, "
            f"current version is {self.actual}; read it again and repeat"
        )


@dataclass(eq=False)
class VariableReplacedError(StateError):
    """The variable was registered, or replaced by another one of its name, while a value for it was being read."""

    retryable = True
    name: str

    def __str__(self) -> str:
        return (
            f"variable {quote(self.name)} was registered or replaced while a large value for it was being read; "
            "nothing was written, repeat the call"
        )


@dataclass(eq=False)
class VariableLockedError(StateError):
    """An optimizer holds the variable."""

    name: str
    holder: str

    def __str__(self) -> str:
        return (
            f"variable {quote(self.name)} is being optimized by {quote(self.holder)}; its holder writes with "
            f'metadata["optimizer_id"], others wait or stop it with force'
        )


@dataclass(eq=False)
class NotOptimizingError(StateError):
    """There is no optimization to stop."""

    name: str

    def __str__(self) -> str:
        return f"variable {quote(self.name)} is not being optimized"


@dataclass(eq=False)
class DependencyCycleError(StateError):
    """The dependency would close a circle."""

    cycle: str

    def __str__(self) -> str:
        return f"dependency cycle refused: {self.cycle}"


@dataclass(eq=False)
class IdempotencyConflictError(StateError):
    """The idempotency key was used for another request."""

    key: str
    cause: str

    def __str__(self) -> str:
        return (
            f"idempotency key {quote(self.key)} was used for another {self.cause} request; "
            "a key belongs to one request: use a new one"
        )


@dataclass(eq=False)
class ToolNotFoundError(StateError):
    """There is no such tool."""

    error_code = "UNKNOWN_TOOL"
    name: str
    hint: str

    def __str__(self) -> str:
        return f"unknown tool {quote(self.name)}; {self.hint}"


@dataclass(eq=False)
class ToolExistsError(StateError):
    """The name belongs to a tool of the server, which a registration must not hide."""

    name: str

    def __str__(self) -> str:
        return f"tool {quote(self.name)} already exists: the server itself has one of this name; use another name"


@dataclass(eq=False)
class ToolArgumentError(StateError):
    """An argument of a tool is wrong, missing or too much; nothing was begun."""

    error_code = "INVALID_PARAMETERS"
    tool: str
    parameter: str
    reason: str

    def __str__(self) -> str:
        return f"invalid parameter {quote(self.parameter)} of tool {quote(self.tool)}: {self.reason}"


@dataclass(eq=False)
class MissingVariablesError(StateError):
    """The session lacks variables that the tool requires; nothing was begun."""

    tool: str
    names: str

    def __str__(self) -> str:
        return f"tool {quote(self.tool)} needs variables that the session does not have: {self.names}; register them"


@dataclass(eq=False)
class ExecutionNotFoundError(StateError):
    """No execution of this id is running: it never began, or has ended."""

    execution_id: str

    def __str__(self) -> str:
        return (
            f"no execution {quote(self.execution_id)} is running: it never began, or has ended (x-dspex-execution-id)"
        )


@dataclass(eq=False)
class ExecutionEndedError(StateError):
    """The execution has ended: what its code still does cannot be kept."""

    execution_id: str
    status: str

    def __str__(self) -> str:
        return f"execution {self.execution_id} has ended ({self.status}): nothing that its code still does is kept"


@dataclass(eq=False)
class ExecutionConflictError(StateError):
    """Others changed what the execution stood on."""

    error_code = "CONFLICT"
    retryable = True
    execution_id: str
    changes: str

    def __str__(self) -> str:
        return f"conflict: while the tool ran, others changed {self.changes}; nothing was written, run it again"


@dataclass(eq=False)
class ToolFailedError(StateError):
    """The tool did not end well; nothing was written.

    `kind`: the type of what its code raised, where that is known.
    """

    execution_id: str
    reason: str
    kind: str = ""

    def __str__(self) -> str:
        return self.reason


@dataclass(eq=False)
class ToolInterruptedError(ToolFailedError):
    """The session, or the server, ended while the tool ran; nothing was written."""

    error_code = "INTERRUPTED"


@dataclass(eq=False)
class ToolTimedOutError(StateError):
    """The tool took longer than it, or its caller, allows; nothing was written."""

    error_code = "TIMED_OUT"
    execution_id: str
    reason: str

    def __str__(self) -> str:
        return f"timed out: {self.reason}; nothing was written"


@dataclass(eq=False)
class RemoteToolError(StateError):
    """The process that runs the tool cannot be reached, or broke off."""

    error_code = "UNAVAILABLE"
    retryable = True
    tool: str
    address: str
    reason: str

    def __str__(self) -> str:
        return f"unavailable: tool {quote(self.tool)} at {self.address}: {self.reason}"


@dataclass(eq=False)
class NotInHistoryError(StateError):
    """An audit asked for something that the history never had: a session, a variable, an execution."""

    what: str
    name: str
    hint: str

    def __str__(self) -> str:
        return f"no {self.what} {quote(self.name)} in the history" + (f"; {self.hint}" if self.hint else "")


@dataclass(eq=False)
class RecordingError(StateError):
    """A file that is no recording, or not a whole one. `line` counts from 1."""

    name: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.name}, line {self.line}: {self.reason}"


@dataclass(eq=False)
class UnsupportedError(StateError):
    """This backend cannot do that. `hint`: what to do instead."""

    what: str
    hint: str = ""

    def __str__(self) -> str:
        return f"not supported here: {self.what}" + (f"; {self.hint}" if self.hint else "")


@dataclass(eq=False)
class QueueFullError(StateError):
    """More writes wait than the queue may hold."""

    retryable = True
    limit: int

    def __str__(self) -> str:
        return f"the write queue is full ({self.limit} waiting; setting queue_length); repeat later"


@dataclass(eq=False)
class TooManyWatchersError(StateError):
    """More watchers than the setting allows."""

    retryable = True
    limit: int

    def __str__(self) -> str:
        return f"too many watchers: the limit is {self.limit} (setting watchers); close some and repeat"


@dataclass(eq=False)
class WatchStalledError(StateError):
    """A watcher did not take its updates in time."""

    retryable = True
    after_sequence: int
    stall_timeout_s: float

    def __str__(self) -> str:
        return (
            f"the watcher took no update for {self.stall_timeout_s:g} s; "
            f"resume with after_sequence={self.after_sequence}"
        )


@dataclass(eq=False)
class StorageError(StateError):
    """SQLite refused the whole group of writes; nothing of it was kept."""

    retryable = True
    reason: str

    def __str__(self) -> str:
        return f"nothing was written: {self.reason}"


@dataclass(eq=False)
class ReadFailedError(StateError):
    """The database could not be read. Nothing has changed by that."""

    retryable = True
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path} could not be read: {self.reason}"


@dataclass(eq=False)
class FileChangedError(StateError):
    """What is on the disk is not any more what this process opened and alone may change."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path} cannot be used any longer: {self.reason}"


@dataclass(eq=False)
class OutcomeUnknownError(StateError):
    """The disk or the connection broke between sending and acknowledging: written or not, nobody can say yet."""

    reason: str

    def __str__(self) -> str:
        return (
            f"outcome unknown: {self.reason}; repeat the call with the same idempotency key "
            "(x-dspex-idempotency-key), or read before you repeat it"
        )


@dataclass(eq=False)
class UnavailableError(StateError):
    """The server cannot be reached."""

    retryable = True
    reason: str

    def __str__(self) -> str:
        return f"unavailable: {self.reason}"


@dataclass(eq=False)
class EngineClosedError(StateError):
    """The engine was closed, or is about to be."""

    def __str__(self) -> str:
        return "the engine is closed"


@dataclass(eq=False)
class ForkedProcessError(StateError):
    """This process was forked from the one that opened the database, that has the connection or runs the execution."""

    what: str

    def __str__(self) -> str:
        return (
            f"{self.what} belongs to the process that this one was forked from, and works only there: "
            "fork before you connect(), or start this process with multiprocessing's 'spawn', and connect() in it; "
            "processes that share a database reach it through a server (grpc://)"
        )


@dataclass(eq=False)
class ShuttingDownError(StateError):
    """The server takes no new calls, because it is about to end."""

    retryable = True

    def __str__(self) -> str:
        return "nothing was written: the server is shutting down; repeat the call when it is back"


@dataclass(eq=False)
class InternalError(StateError):
    """A fault of ours; the reference finds it in the server's log."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(eq=False)
class CheckpointError(StateError):
    """Closing could not bring the write-ahead log into the database file."""

    path: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.path} could not be tidied up: {self.reason}. Everything acknowledged is safe in {self.path}-wal; "
            "keep the two files together"
        )


class OpenError(StateError):
    """The database cannot be opened."""

    def __post_init__(self) -> None:
        """Make of paths what can be printed: files may have names that no terminal and no log can write."""
        for name, field in vars(self).items():
            if isinstance(field, str):
                setattr(self, name, printable(field))
        super().__post_init__()


@dataclass(eq=False)
class DatabaseInUseError(OpenError):
    """This or another process owns the database."""

    path: str
    pid: int | None

    def __str__(self) -> str:
        if self.pid == os.getpid():
            return (
                f"{self.path} is open in this process already (process {self.pid}): use that one, or close() it first"
            )
        holder = f"process {self.pid}" if self.pid else "another process"
        return (
            f"{self.path} is in use by {holder}: one server owns a database; stop it, or use another --db. "
            "Several programs share one through a server: `dspex-persist serve`, and connect('grpc://HOST:PORT')"
        )


@dataclass(eq=False)
class NotADatabaseError(OpenError):
    """The file cannot be opened or is no database of ours."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"cannot open {self.path}: {self.reason}"


@dataclass(eq=False)
class NewerSchemaError(OpenError):
    """The file was written by a newer release."""

    path: str
    revision: str
    known: str

    def __str__(self) -> str:
        return (
            f"{self.path} has schema revision {self.revision}, this release knows up to {self.known}: "
            "it was written by a newer release; upgrade dspex-persist"
        )


@dataclass(eq=False)
class UpgradeError(OpenError):
    """A migration failed; the file is as it was."""

    path: str
    revision: str
    reason: str

    def __str__(self) -> str:
        return f"the upgrade of {self.path} to {self.revision} failed, the file is as it was: {self.reason}"


@dataclass(eq=False)
class LostCommitsError(OpenError):
    """The database is behind its anchor, or not the one that the anchor saw: acknowledged commits are gone."""

    path: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.path} has lost acknowledged commits: {self.reason}. Restore a backup: "
            f"dspex-persist db restore BACKUP --db {self.path}; or, to accept the loss, delete {self.path}.anchor and "
            "start again"
        )
