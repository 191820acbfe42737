"""Apply the events and versions of a commit to the state of their session.

Commands, imports and replays all use this code, so a session has the same state however it was built.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Final, NamedTuple

from dspex_persist.state.events import (
    DependencyAdded,
    DependencyRemoved,
    Event,
    ExecutionBegan,
    ExecutionEnded,
    Moment,
    OptimizationStarted,
    OptimizationStopped,
    RuleAdded,
    RuleRemoved,
    SessionStarted,
    VariableConstrained,
    VariableRegistered,
)
from dspex_persist.state.frozen import FrozenDict
from dspex_persist.state.model import REASON, RESTORED_METADATA, ChangeKind, Variable, VariableVersion, without_reason
from dspex_persist.state.session_state import SessionState, Undo
from dspex_persist.state.values.json_text import stored_texts

_LOCKING: Final = frozenset({OptimizationStarted, OptimizationStopped})
_APPLIED: Final = _LOCKING | {
    DependencyAdded,
    DependencyRemoved,
    ExecutionBegan,
    ExecutionEnded,
    RuleAdded,
    RuleRemoved,
    VariableConstrained,
    VariableRegistered,
}
"""The events whose commits `after_commits` applies."""


class LaterCommit(NamedTuple):
    """A commit as a log has it.

    Attributes:
        sequence: Its number.
        at: Its time.
        events: Its events in order. Of an execution's beginning and end, what the session does not keep may be missing.
        versions: Its versions, by the age of their variables, then by their numbers.
    """

    sequence: int
    at: datetime
    events: Sequence[Event]
    versions: Sequence[VariableVersion]


def after_commits(state: SessionState, commits: Iterable[LaterCommit]) -> SessionState | None:
    """Return a session as it is after its next commits, as if it were loaded then.

    Args:
        state: The session, which does not change.
        commits: All its commits after the last one that the state has, in order.

    Returns:
        None if it has to be loaded: for rare events, and where the log does not tell in what order a commit made its
        changes.
    """
    after = state.copy()
    return after if all(_applied(after, commit) for commit in commits) else None


def _applied(state: SessionState, commit: LaterCommit) -> bool:
    """Apply a commit to a session; whether that was possible."""
    kinds = {type(event) for event in commit.events}
    if not kinds <= _APPLIED or (commit.versions and not kinds.isdisjoint(_LOCKING)):
        return False
    if VariableRegistered in kinds and any(version.kind is ChangeKind.DELETED for version in commit.versions):
        # Another variable may have had the name before.
        return False
    born = {version.variable_id: version for version in commit.versions if version.kind is ChangeKind.REGISTERED}
    moment = Moment(commit.sequence, commit.at)
    for event in commit.events:
        if isinstance(event, VariableRegistered):
            version = born.pop(event.variable_id, None)
            if version is None or event.variable_key is None:
                # Not every log has the store's key in the event.
                return False
            state.keys[event.variable_id] = event.variable_key
            fold_version(state, version, [], event)
        else:
            fold(state, event, moment, [])
    for version in commit.versions:
        if version.kind is not ChangeKind.REGISTERED:
            variable = state.variables.get(state.names.get(version.variable_id, ""))
            if variable is None or version.version != variable.version + 1:
                # Pruned meanwhile.
                return False
            fold_version(state, version, [])
    state.sequence = commit.sequence
    return not born


def fold(state: SessionState | None, event: Event, moment: Moment, undo: Undo) -> SessionState | None:
    """Apply an event to a session.

    Args:
        state: The session, which is changed in place; None before it begins.
        event: The event.
        moment: When its commit happens.
        undo: Receives the steps that undo the change.

    Returns:
        The session after the event; None if it has not begun, or has ended.
    """
    if isinstance(event, SessionStarted):
        return event.start(moment)
    return event.fold(state, moment, undo) if state is not None else None


def fold_version(
    state: SessionState, version: VariableVersion, undo: Undo, registered: VariableRegistered | None = None
) -> None:
    """Apply a new version of a variable to a session.

    Args:
        state: The session, which is changed in place.
        version: The version.
        undo: Receives the steps that undo the change.
        registered: The variable's registration, required for its first version.
    """
    name = state.names.get(version.variable_id)
    if name is not None:
        before = state.variables[name]
        if version.kind is ChangeKind.DELETED:
            _delete(state, before, version.sequence, undo)
        else:
            state.put(advanced(before, version), undo)
    elif registered is not None and version.kind is not ChangeKind.DELETED:
        variable = first(registered, version)
        state.names[variable.id] = variable.name
        undo.append((state.names.pop, (variable.id, None)))
        state.put(variable, undo)


def first(registered: VariableRegistered, version: VariableVersion) -> Variable:
    """Return a variable at its first version."""
    assert version.value is not None, "only a deletion has no value"
    return Variable(
        registered.variable_id,
        registered.name,
        registered.type,
        version.value,
        version.version,
        registered.constraints,
        without_reason(version.metadata),
        version.source,
        version.created_at,
    )


def advanced(before: Variable, version: VariableVersion) -> Variable:
    """Return a variable after its next version; a deletion leaves the last value."""
    lock, value, metadata, added = before.optimization, version.value, before.metadata, version.metadata
    if lock is not None:
        if value is None:
            lock = None
        elif lock.optimizer_id == added.get("optimizer_id"):
            # A write of the optimizer that holds the lock renews it.
            lock = replace(lock, renewed_at=version.created_at)
    if added and version.kind.merges_metadata:
        if REASON in added:
            added = without_reason(added)
        if not added.items() <= metadata.items():
            metadata = FrozenDict({**metadata, **added})
    elif added and RESTORED_METADATA in added:
        metadata = FrozenDict(described(metadata, version.kind, added))
    # By position: keyword arguments take twice as long, and this is the hot path.
    return Variable(
        before.id,
        before.name,
        before.type,
        before.value if value is None else value,
        version.version,
        before.constraints,
        metadata,
        version.source,
        version.created_at,
        lock,
    )


def described(before: Mapping[str, str], kind: ChangeKind, added: Mapping[str, str]) -> Mapping[str, str]:
    """Return the metadata of a variable after a version.

    Args:
        before: Its metadata before.
        kind: The kind of the version.
        added: The metadata of the version.
    """
    if kind.merges_metadata:
        return {**before, **without_reason(added)}
    if kind is ChangeKind.ROLLED_BACK and RESTORED_METADATA in added:
        return stored_texts(added[RESTORED_METADATA])
    return before


def _delete(state: SessionState, variable: Variable, sequence: int, undo: Undo) -> None:
    state.delete(variable, undo)
    state.remember(undo, "dependencies")
    state.dependencies = state.dependencies.without(variable.id, sequence)
