"""Rebuild a session's state from its log, and check that the log is consistent and matches the stored state."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from dspex_persist.replay.numbers import Numbers
from dspex_persist.replay.rebuild import Rebuilt
from dspex_persist.replay.recorded import Source, Written, load
from dspex_persist.replay.report import Aspect, Divergence, ReplayReport, diff_of
from dspex_persist.state import values
from dspex_persist.state.audit import VariableState
from dspex_persist.state.commands.derivations import DERIVED
from dspex_persist.state.errors import StateError
from dspex_persist.state.events import Event, ExecutionBegan, ExecutionEnded, VariableConstrained, VariableRegistered
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import ChangeKind, Value, Variable
from dspex_persist.state.recording import RecordedCommit, RecordedVersion


def replay_state(
    recording: Source, stored: Iterable[VariableState] | None = None, *, limits: Limits | None = None
) -> ReplayReport:
    """Rebuild the state of a session from its commits, and report every inconsistency.

    Each version must follow its predecessor and satisfy its variable's type and constraints, and the journal entries of
    executions must list exactly the versions that they wrote.

    Args:
        recording: The recording, or the path of one.
        stored: The stored live variables of the session, such as `AuditSource.state` returns; if given, the rebuilt
            state must equal them at the end.
        limits: The limits on values; the defaults if omitted.

    Raises:
        RecordingError: The recording is damaged, or part of the session was pruned.
    """
    recorded = load(recording)
    check = _Check(limits or Limits())
    divergences = [divergence for commit in recorded.commits for divergence in check.check(commit)]
    if stored is not None:
        divergences.extend(check.compare(stored, len(recorded.commits)))
    shown = tuple(map(Numbers(recorded).renumber_divergence, divergences))
    return ReplayReport(recorded.header.session_id, "state", len(recorded.commits), divergences=shown)


class _Check:
    def __init__(self, limits: Limits) -> None:
        self._rebuilt = Rebuilt()
        self._limits = limits
        self._registered: dict[str, VariableRegistered] = {}
        self._versions: dict[str, RecordedVersion] = {}
        self._running: set[str] = set()

    def check(self, commit: RecordedCommit) -> Iterator[Divergence]:
        """Apply the next commit, and yield its inconsistencies."""
        events = commit.read_events()
        constrained: dict[tuple[str, int], str] = {}
        for event in events:
            if isinstance(event, VariableRegistered):
                self._registered[event.variable_id] = event
            elif isinstance(event, VariableConstrained):
                constrained[event.variable_id, event.version] = event.constraints
        for version in commit.versions:
            constraints = constrained.pop((version.variable_id, version.version), None)
            if constraints is not None and (before := self._registered.get(version.variable_id)) is not None:
                self._registered[version.variable_id] = replace(before, constraints=constraints)
            problem = self._problem_with(version)
            if problem:
                yield Divergence(Aspect.VERSIONS, f"{version.name} version {version.version}: {problem}", commit.number)
            self._versions[version.variable_id] = version
        for variable_id, number in constrained:
            summary = f"{variable_id} version {number}: it has other constraints, but is not in the commit"
            yield Divergence(Aspect.VERSIONS, summary, commit.number)
        yield from self._check_journal(commit, events)
        self._rebuilt.apply(commit)

    def _problem_with(self, version: RecordedVersion) -> str:
        """How a version contradicts the versions before it; "" if it does not."""
        registered = self._registered.get(version.variable_id)
        if registered is None:
            return "its variable was never registered"
        before = self._versions.get(version.variable_id)
        due = before.version + 1 if before is not None else 0
        if version.version != due:
            return f"version {due} is due"
        if (version.kind is ChangeKind.REGISTERED) != (before is None):
            return "a variable is registered with its first version, and with no other"
        if before is not None and before.kind is ChangeKind.DELETED:
            return "its variable had been deleted"
        if version.name != registered.name:
            return f"its variable was registered as {registered.name}"
        return self._problem_with_value(version, registered)

    def _problem_with_value(self, version: RecordedVersion, registered: VariableRegistered) -> str:
        """How the value violates the type or the constraints of its variable; "" if it does not."""
        if version.masked:
            return ""
        if version.value is None or version.kind is ChangeKind.DELETED:
            return (
                "" if version.value is None and version.kind is ChangeKind.DELETED else "only a deletion has no value"
            )
        try:
            constraints = values.compile_constraints(version.name, registered.type, registered.constraints)
            kept = values.normalise(version.name, registered.type, constraints, version.value, self._limits)
        except StateError as error:
            return f"its value violates the variable's type or constraints: {error}"
        return "" if kept == version.value else f"its value would have been stored as {kept.json}"

    def _check_journal(self, commit: RecordedCommit, events: Iterable[Event]) -> Iterator[Divergence]:
        written = Written(commit.versions)
        ended = False
        for event in events:
            if isinstance(event, ExecutionBegan):
                self._running.add(event.execution_id)
            elif isinstance(event, ExecutionEnded):
                ended = True
                yield from self._check_end(commit, event, written)
        for version in written.left() if ended else ():
            if self._is_derived(version, commit):
                continue
            summary = f"{version.name} version {version.version}: it is in no execution's journal entry"
            yield Divergence(Aspect.JOURNAL, summary, commit.number)

    def _is_derived(self, version: RecordedVersion, commit: RecordedCommit) -> bool:
        """Whether a variable was computed in a commit from others that changed in it."""
        state, changed = self._rebuilt.state, {each.variable_id for each in commit.versions}
        uses = state.dependencies if state is not None and version.kind is ChangeKind.SET else ()
        return any(
            (edge.from_id, edge.type, edge.until) == (version.variable_id, DERIVED, None) and edge.to_id in changed
            for edge in uses
        )

    def _check_end(self, commit: RecordedCommit, event: ExecutionEnded, written: Written) -> Iterator[Divergence]:
        execution_id = event.execution_id
        if execution_id not in self._running:
            yield Divergence(Aspect.JOURNAL, "it ended without running", commit.number, execution_id)
        self._running.discard(execution_id)
        claimed = list(event.writes)
        actual = [(version.name, version.version) for version in written.take(claimed)]
        if claimed != actual:
            lines = [[f"{name} v{version}" for name, version in each] for each in (claimed, actual)]
            what = "its journal entry lists other versions (-) than its commit contains (+)"
            yield Divergence(Aspect.JOURNAL, what, commit.number, execution_id, diff_of(*lines))

    def compare(self, stored: Iterable[VariableState], number: int) -> Iterator[Divergence]:
        """Yield the differences between the rebuilt state and the stored one."""
        state = self._rebuilt.state
        ours = {variable.id: variable for variable in state.variables.values()} if state is not None else {}
        kept = {variable.variable_id: variable for variable in stored}
        for variable_id in {**ours, **kept}:
            before, after = ours.get(variable_id), kept.get(variable_id)
            hidden = variable_id in self._rebuilt.masked or (after is not None and after.masked)
            lines = [_lines(each, hidden) for each in (before, after)]
            if lines[0] != lines[1]:
                name = before.name if before is not None else after.name if after is not None else variable_id
                what = f"{name}: the state rebuilt from the log (-) differs from the stored one (+)"
                yield Divergence(Aspect.STATE, what, number, diff=diff_of(*lines))


def _lines(variable: Variable | VariableState | None, hidden: bool) -> list[str]:
    if variable is None:
        return []
    variable_id = variable.id if isinstance(variable, Variable) else variable.variable_id
    return [
        f"id = {variable_id}",
        f"name = {variable.name}",
        f"type = {variable.type}",
        f"constraints = {variable.constraints}",
        f"version = {variable.version}",
        f"value = {'(masked)' if hidden else _text(variable.value)}",
        f"source = {variable.source.value}",
        f"metadata = {dict(sorted(variable.metadata.items()))}",
    ]


def _text(value: Value | None) -> str:
    if value is None:
        return "none"
    return value.json if value.binary is None else f"{value.json} {value.binary.hex()}"
