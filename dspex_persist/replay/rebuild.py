"""The state of a session, built again from its commits."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from dspex_persist.clock import to_micros
from dspex_persist.state.model import (
    ChangeKind,
    Dependency,
    Event,
    EventKind,
    Optimization,
    RegisteredTool,
    RunningExecution,
    Session,
    Value,
    Variable,
    VariableVersion,
)
from dspex_persist.state.recording import RecordedCommit, RecordedVersion
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.unit_of_work import spec_in, started_lock

MASKED: Final = Value("null")
"""What stands for a value that was kept out of the recording."""


class Rebuilt:
    """A session that grows commit by commit. `state` is None before it begins and after it has ended."""

    def __init__(self) -> None:
        self.number = 0
        self.state: SessionState | None = None
        self.masked: set[str] = set()
        """The variables whose value is not known, by id."""
        self._versions: dict[str, list[VariableVersion]] = {}
        self._ids: dict[str, str] = {}
        self._facts: dict[str, Mapping[str, Any]] = {}

    def apply(self, commit: RecordedCommit) -> None:
        """Take a commit in; it has to be the next one."""
        self.number = commit.number
        for event in commit.events:
            if event.kind is EventKind.VARIABLE_REGISTERED:
                self._facts[event.body["variable_id"]] = event.body
            elif event.kind is EventKind.SESSION_STARTED:
                self.state = SessionState(_session_of(event, commit), sequence=commit.number)
        if self.state is None:
            return
        self.state.sequence = commit.number
        for version in commit.versions:
            self._write(self.state, commit, version)
        for event in commit.events:
            _change(self.state, commit, event)
        if any(event.kind is EventKind.SESSION_ENDED for event in commit.events):
            self.state = None

    def _write(self, state: SessionState, commit: RecordedCommit, version: RecordedVersion) -> None:
        facts = self._facts.get(version.variable_id)
        if facts is None:
            # The log contradicts itself: a replay of the state tells where.
            return
        self._remember(commit, version, facts["type"])
        before = state.find(version.variable_id)
        if version.kind is ChangeKind.DELETED:
            if before is not None:
                _delete(state, before, commit.number)
            return
        merged = dict(before.metadata) if before is not None else {}
        if version.kind.merges_metadata:
            merged |= version.metadata
        state.put(
            Variable(
                version.variable_id,
                version.name,
                facts["type"],
                version.value if version.value is not None else MASKED,
                version.version,
                facts["constraints"],
                merged,
                version.source,
                commit.at,
                _renewed(before, commit, version),
            )
        )
        state.names[version.variable_id] = version.name

    def _remember(self, commit: RecordedCommit, version: RecordedVersion, type_name: str) -> None:
        self._ids[version.name] = version.variable_id
        (self.masked.add if version.masked else self.masked.discard)(version.variable_id)
        entry = VariableVersion(
            version.variable_id,
            type_name,
            version.version,
            version.kind,
            MASKED if version.masked else version.value,
            version.metadata,
            version.source,
            commit.at,
            commit.actor,
            commit.cause,
            commit.number,
        )
        self._versions.setdefault(version.variable_id, []).append(entry)

    def history(self, identifier: str, until: int) -> list[VariableVersion] | None:
        """The versions up to commit `until` of a variable, or of the newest one that had its name; oldest first."""
        variable_id = identifier if identifier in self._versions else self._ids.get(identifier)
        if variable_id is None:
            return None
        return [entry for entry in self._versions[variable_id] if entry.sequence <= until] or None


def _session_of(event: Event, commit: RecordedCommit) -> Session:
    # Its TTL is left out: it is over since long.
    return Session(event.body["session_id"], commit.at, event.body["metadata"], None, commit.number)


def _delete(state: SessionState, variable: Variable, number: int) -> None:
    state.remove(variable.name)
    state.names.pop(variable.id, None)
    state.dependencies = tuple(
        replace(edge, until=number) if edge.until is None and variable.id in (edge.from_id, edge.to_id) else edge
        for edge in state.dependencies
    )


def _renewed(before: Variable | None, commit: RecordedCommit, version: RecordedVersion) -> Optimization | None:
    """The lock on a variable after a write: its holder's write renews it."""
    lock = before.optimization if before is not None else None
    if lock is not None and lock.optimizer_id == version.metadata.get("optimizer_id"):
        return replace(lock, renewed_at=commit.at)
    return lock


# What events change besides versions


def _change(state: SessionState, commit: RecordedCommit, event: Event) -> None:
    body = event.body
    match event.kind:
        case EventKind.SESSION_UPDATED:
            state.session = replace(state.session, metadata=body["metadata"])
        case EventKind.DEPENDENCY_ADDED:
            _add_dependency(state, Dependency(body["from_id"], body["to_id"], body["type"], commit.number))
        case EventKind.OPTIMIZATION_STARTED:
            _set_lock(state, body["variable_id"], started_lock(body, to_micros(commit.at)))
        case EventKind.OPTIMIZATION_STOPPED:
            _set_lock(state, body["variable_id"], None)
        case EventKind.TOOLS_REGISTERED:
            tools = (
                RegisteredTool(spec_in(each["spec"]), each["worker_id"], each["address"]) for each in body["tools"]
            )
            state.tools = {**state.tools, **{tool.spec.name: tool for tool in tools}}
        case EventKind.EXECUTION_BEGAN:
            running = RunningExecution(body["execution_id"], body["tool"], commit.number, body["parent_id"])
            state.executions = {**state.executions, running.id: running}
        case EventKind.EXECUTION_ENDED:
            gone = body["execution_id"]
            state.executions = {name: kept for name, kept in state.executions.items() if name != gone}


def _add_dependency(state: SessionState, edge: Dependency) -> None:
    # One of the two may have been deleted in the same commit.
    if edge.from_id in state.names and edge.to_id in state.names:
        state.dependencies = (*state.dependencies, edge)


def _set_lock(state: SessionState, variable_id: str, lock: Optimization | None) -> None:
    variable = state.find(variable_id)
    if variable is not None:
        state.put(variable._replace(optimization=lock))


class Past:
    """A recording as it is walked through: copies of the state at the commits that are asked for ahead."""

    def __init__(self, commits: Iterable[RecordedCommit], wanted: Iterable[int]) -> None:
        self.rebuilt = Rebuilt()
        self._commits = iter(commits)
        self._wanted = set(wanted)
        self._kept: dict[int, tuple[SessionState, frozenset[str]]] = {}

    def take(self, number: int) -> tuple[SessionState, frozenset[str]]:
        """The state right after a commit that is wanted, for the caller alone, and the ids of the variables whose
        values are not known in it."""
        while self.rebuilt.number < number:
            self._advance()
        state, masked = self._kept[number]
        return state.copy(), masked

    def _advance(self) -> None:
        self.rebuilt.apply(next(self._commits))
        number, state = self.rebuilt.number, self.rebuilt.state
        if number in self._wanted and state is not None:
            self._kept[number] = (state.copy(), frozenset(self.rebuilt.masked))

    def forget(self, number: int) -> None:
        """Let go of the states before a commit: nobody is going to ask for them."""
        for kept in [kept for kept in self._kept if kept < number]:
            del self._kept[kept]
