"""What the events and versions of a commit do to the state of their session: the only place that says so.

Whoever keeps a session in memory has it from here: commands that run, a recording that is imported, a replay.
"""

from dataclasses import replace

from dspex_persist.state.events import Event, Moment, SessionStarted, VariableRegistered
from dspex_persist.state.frozen import FrozenDict
from dspex_persist.state.model import ChangeKind, Variable, VariableVersion
from dspex_persist.state.session_state import SessionState, Undo, weight_of


def fold(state: SessionState | None, event: Event, moment: Moment, undo: Undo) -> SessionState | None:
    """A session after an event; None before it begins and after it has ended.

    `state` is changed in place, and `undo` gets what takes that back.
    """
    if isinstance(event, SessionStarted):
        return event.start(moment)
    return event.fold(state, moment, undo) if state is not None else None


def fold_version(
    state: SessionState, version: VariableVersion, undo: Undo, registered: VariableRegistered | None = None
) -> None:
    """Bring a session's state up to date with a new version of one of its variables; see `fold`.

    `registered`: what a variable was registered as, which its first version needs.
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
    """A variable as it is registered."""
    assert version.value is not None, "only a deletion has no value"
    return Variable(
        registered.variable_id,
        registered.name,
        registered.type,
        version.value,
        version.version,
        registered.constraints,
        version.metadata,
        version.source,
        version.created_at,
    )


def advanced(before: Variable, version: VariableVersion) -> Variable:
    """A variable after its next version; a deletion leaves the last value."""
    lock, value, metadata, said = before.optimization, version.value, before.metadata, version.metadata
    if lock is not None:
        if value is None:
            lock = None
        elif lock.optimizer_id == said.get("optimizer_id"):
            # A write of the optimizer that holds the lock renews it.
            lock = replace(lock, renewed_at=version.created_at)
    if said and version.kind.merges_metadata and not said.items() <= metadata.items():
        metadata = FrozenDict({**metadata, **said})
    # By position: keywords take twice as long, and this is the hot path.
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


def _delete(state: SessionState, variable: Variable, sequence: int, undo: Undo) -> None:
    state.remember(undo, "variables", "names", "dependencies", "weight_bytes")
    state.weight_bytes -= weight_of(variable)
    state.variables = {name: kept for name, kept in state.variables.items() if name != variable.name}
    state.names = {key: name for key, name in state.names.items() if key != variable.id}
    state.dependencies = state.dependencies.without(variable.id, sequence)
