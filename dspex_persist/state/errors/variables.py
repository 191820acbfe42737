"""Errors of variables, their values and their versions."""

from dataclasses import dataclass

from dspex_persist.state.errors.base import StateError
from dspex_persist.state.errors.hints import Hint


@dataclass(eq=False)
class VariableNotFoundError(StateError, KeyError):
    """The session has no variable of this name or id. It is a KeyError, too, as a mapping raises it."""

    template = "variable not found: {identifier!q} in session {session_id!q}{hint!o:; %}"
    session_id: str
    identifier: str
    hint: str = ""


@dataclass(eq=False)
class VersionNotFoundError(StateError):
    """The variable never had this version."""

    template = "version not found: {version} of variable {name!q}; it has versions 0 to {latest}"
    name: str
    version: int
    latest: int


@dataclass(eq=False)
class VersionPrunedError(StateError):
    """The variable had this version, but it was pruned."""

    template = "version {version} of variable {name!q} was pruned: its value is gone"
    advice = Hint.LIST_VERSIONS
    name: str
    version: int


@dataclass(eq=False)
class VariableExistsError(StateError):
    """The name is already registered with another type or other constraints."""

    template = "variable {name!q} already exists: {difference}"
    name: str
    difference: str


@dataclass(eq=False)
class UnknownTypeError(StateError):
    """There is no such value type."""

    template = "unknown type {type!q} for variable {name!q}; known types: {known}"
    name: str
    type: str
    known: str


@dataclass(eq=False)
class InvalidValueError(StateError):
    """The value violates its variable's type or constraints."""

    template = "invalid value for {name!q}: {reason}"
    name: str
    reason: str


@dataclass(eq=False)
class InvalidConstraintsError(StateError):
    """The constraints are malformed or do not fit the type."""

    template = "Invalid constraints for {name!q}: {reason}"
    name: str
    reason: str


@dataclass(eq=False)
class VersionConflictError(StateError):
    """Another client has written the variable meanwhile."""

    template = "version conflict on {name!q}: expected version {expected}, current version is {actual}"
    advice = Hint.READ_AGAIN
    retryable = True
    name: str
    expected: int
    actual: int


@dataclass(eq=False)
class VariableReplacedError(StateError):
    """The variable was registered or replaced while a value for it was being parsed."""

    template = (
        "variable {name!q} was registered or replaced while a large value for it was being read; nothing was written"
    )
    advice = Hint.REPEAT_CALL
    retryable = True
    name: str


@dataclass(eq=False)
class VariableLockedError(StateError):
    """An optimizer holds the variable."""

    template = "variable {name!q} is being optimized by {holder!q}"
    advice = Hint.WAIT_FOR_OPTIMIZER
    name: str
    holder: str


@dataclass(eq=False)
class NotOptimizingError(StateError):
    """There is no optimization to stop."""

    template = "variable {name!q} is not being optimized"
    name: str


@dataclass(eq=False)
class DependencyCycleError(StateError):
    """The dependency would close a cycle."""

    template = "dependency cycle refused: {cycle}"
    cycle: str


@dataclass(eq=False)
class TooManyWatchersError(StateError):
    """There are more watchers than the setting allows."""

    template = "too many watchers: the limit is {limit} (setting watchers)"
    advice = Hint.CLOSE_WATCHES
    retryable = True
    limit: int


@dataclass(eq=False)
class WatchStalledError(StateError):
    """A watcher did not take its updates in time."""

    template = "the watcher read no update for {stall_timeout_s:g} s"
    advice = Hint.RESUME_WATCH
    retryable = True
    after_sequence: int
    stall_timeout_s: float


@dataclass(eq=False)
class WatchGapError(StateError):
    """A watch cannot resume, because commits that it has not delivered were pruned. `marker`: the one that did it."""

    template = (
        "the watch of session {session_id!q} cannot go on after commit {after_sequence}: commit {marker} pruned "
        "history that it has missed"
    )
    advice = Hint.WATCH_ANEW
    session_id: str
    after_sequence: int
    marker: int
