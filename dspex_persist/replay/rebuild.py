"""Rebuild the state of a session from its commits."""

from collections.abc import Iterable
from typing import Final

from dspex_persist.state.events import Event, Moment, VariableRegistered
from dspex_persist.state.fold import fold, fold_version
from dspex_persist.state.model import ChangeKind, Value, VariableVersion
from dspex_persist.state.recording import RecordedCommit, RecordedVersion, in_order
from dspex_persist.state.session_state import SessionState

MASKED: Final = Value("null")
"""Stands for a value that is masked in the recording."""


class Rebuilt:
    """A session rebuilt commit by commit. `state` is None before the session begins and after it has ended."""

    def __init__(self) -> None:
        self.number = 0
        self.state: SessionState | None = None
        self.masked: set[str] = set()
        """The ids of the variables whose value is masked."""
        self._versions: dict[str, list[VariableVersion]] = {}
        self._ids: dict[str, str] = {}
        self._registered: dict[str, VariableRegistered] = {}

    def apply(self, commit: RecordedCommit) -> None:
        """Apply a commit, which must be the next one."""
        self.number = commit.number
        if self.state is not None:
            self.state.sequence = commit.number
        for event, version in in_order(commit):
            if event is not None:
                self._apply_event(commit, event)
            if version is not None:
                self._apply_version(commit, version)

    def _apply_event(self, commit: RecordedCommit, event: Event) -> None:
        if isinstance(event, VariableRegistered):
            self._registered[event.variable_id] = event
        # The list of undo steps is dropped: nothing is undone here.
        self.state = fold(self.state, event, Moment(commit.number, commit.at), [])

    def _apply_version(self, commit: RecordedCommit, recorded: RecordedVersion) -> None:
        registered = self._registered.get(recorded.variable_id)
        if registered is None or self.state is None:
            # The log is inconsistent, which `replay_state` reports.
            return
        version = self._remember(commit, recorded, registered.type)
        if version.value is None and version.kind is not ChangeKind.DELETED:
            version = version._replace(value=MASKED)
        fold_version(self.state, version, [], registered)

    def _remember(self, commit: RecordedCommit, version: RecordedVersion, type_name: str) -> VariableVersion:
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
        return entry

    def history(self, identifier: str, until: int) -> list[VariableVersion] | None:
        """Return the versions up to commit `until`, oldest first; None if there are none.

        `identifier` is the id of a variable, or a name, which means the newest variable that had it.
        """
        variable_id = identifier if identifier in self._versions else self._ids.get(identifier)
        if variable_id is None:
            return None
        return [entry for entry in self._versions[variable_id] if entry.sequence <= until] or None


class Past:
    """Walks through a recording, and keeps copies of the state as of the commits in `wanted`."""

    def __init__(self, commits: Iterable[RecordedCommit], wanted: Iterable[int]) -> None:
        self.rebuilt = Rebuilt()
        self._commits = iter(commits)
        self._wanted = set(wanted)
        self._kept: dict[int, tuple[SessionState, frozenset[str]]] = {}

    def state_after(self, number: int) -> tuple[SessionState, frozenset[str]]:
        """Return a copy of the state after one of the `wanted` commits, and the ids of its masked variables."""
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
        """Drop the states before a commit, which are no longer needed."""
        for outdated in [kept for kept in self._kept if kept < number]:
            del self._kept[outdated]
