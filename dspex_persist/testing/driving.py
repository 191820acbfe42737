"""Repeat the client requests of a recorded session, one after the other, with any provider."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from dspex_persist.replay import Recording
from dspex_persist.state import commands
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import RecordingError, StateError
from dspex_persist.state.events import (
    DependencyAdded,
    DependencyRemoved,
    Event,
    ExecutionBegan,
    OptimizationStarted,
    OptimizationStopped,
    SessionEnded,
    SessionStarted,
    SessionUpdated,
    VariableRegistered,
)
from dspex_persist.state.model import ChangeKind, Origin, Source, Value
from dspex_persist.state.provider import TOOL_TIMEOUT_S, StateProvider
from dspex_persist.state.recording import RecordedCommit, RecordedVersion

_EXECUTION: Final = "exec_"
_ROLLED_BACK: Final = "rolled_back_to"


def drive_again(provider: StateProvider, recording: Recording) -> None:
    """Repeat the requests of the session's clients.

    A request that is refused now changes nothing, and the ones after it are repeated all the same: a replay reports the
    differences.

    Args:
        provider: The provider to send them to.
        recording: The recorded session.

    Raises:
        RecordingError: The recording masks a value that a client wrote.
    """
    header = recording.header
    names: dict[str, str] = {}
    for commit in recording.commits:
        if any(version.masked for version in commit.versions):
            reason = "a value that a client wrote is masked; export the session with --reveal"
            raise RecordingError(header.session_id, commit.number + 1, reason)
        names |= {version.variable_id: version.name for version in commit.versions}
        if commit.cause.startswith(_EXECUTION):
            # A tool did this: repeating the request for its execution repeats it.
            continue
        origin = Origin(commit.actor, commit.cause, _source_of(commit))
        for command in _requests(header.session_id, commit, names):
            try:
                provider.submit(command, origin).result()
            except StateError:
                continue


def _source_of(commit: RecordedCommit) -> Source:
    return commit.versions[0].source if commit.versions else Source.PYTHON


def _requests(session_id: str, commit: RecordedCommit, names: Mapping[str, str]) -> Iterator[Command[Any]]:
    for event in commit.read_events():
        yield from _request_of(session_id, event, commit, names)
    written = [version for version in commit.versions if version.kind is ChangeKind.SET]
    if written:
        yield _writing(session_id, written)
    for version in commit.versions:
        if version.kind is ChangeKind.ROLLED_BACK:
            yield commands.RollbackVariable(session_id, version.name, int(version.metadata[_ROLLED_BACK]))
        elif version.kind is ChangeKind.DELETED:
            yield commands.DeleteVariable(session_id, version.name)


def _writing(session_id: str, written: list[RecordedVersion]) -> Command[Any]:
    values = {version.name: version.value or Value("null") for version in written}
    if len(written) == 1:
        ((name, value),) = values.items()
        return commands.SetVariable(session_id, name, value, written[0].metadata)
    return commands.SetVariables(session_id, values, written[0].metadata, True)


def _request_of(
    session_id: str, event: Event, commit: RecordedCommit, names: Mapping[str, str]
) -> Iterator[Command[Any]]:
    match event:
        case SessionStarted():
            yield commands.InitializeSession(session_id, event.metadata, event.config)
        case SessionUpdated():
            yield commands.InitializeSession(session_id, event.metadata)
        case SessionEnded():
            yield commands.CleanupSession(session_id)
        case VariableRegistered():
            first = next(each for each in commit.versions if each.variable_id == event.variable_id)
            value = first.value or Value("null")
            facts = (event.name, event.type, value, event.constraints, first.metadata)
            yield commands.RegisterVariable(session_id, *facts)
        case DependencyAdded() | DependencyRemoved():
            user, used = (names.get(end, end) for end in (event.from_id, event.to_id))
            change = commands.AddDependency if isinstance(event, DependencyAdded) else commands.RemoveDependency
            yield change(session_id, user, used, event.type)
        case OptimizationStarted():
            name = names.get(event.variable_id, event.variable_id)
            yield commands.StartOptimization(session_id, name, event.optimizer_id, event.config)
        case OptimizationStopped() if commit.cause == commands.StopOptimization.__name__:
            name = names.get(event.variable_id, event.variable_id)
            yield commands.StopOptimization(session_id, name, event.reason != "stopped")
        case ExecutionBegan() if event.parent_id is None and event.attempt == 1:
            metadata = dict(event.metadata)
            if event.idempotency_key is not None:
                metadata["idempotency_key"] = event.idempotency_key
            yield commands.ExecuteTool(session_id, event.tool, event.parameters, metadata, TOOL_TIMEOUT_S)
