"""Building a session's state again from its log alone, and whether the log agrees with itself and with what is kept."""

from collections.abc import Iterable, Iterator

from dspex_persist.replay.numbers import Numbers
from dspex_persist.replay.rebuild import Rebuilt
from dspex_persist.replay.recorded import Source, Written, load
from dspex_persist.replay.report import Aspect, Divergence, ReplayReport, diff_of
from dspex_persist.state import values
from dspex_persist.state.audit import VariableState
from dspex_persist.state.errors import StateError
from dspex_persist.state.events import Event, ExecutionBegan, ExecutionEnded, VariableRegistered
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import ChangeKind, Value, Variable
from dspex_persist.state.recording import RecordedCommit, RecordedVersion


def replay_state(
    recording: Source, stored: Iterable[VariableState] | None = None, *, limits: Limits | None = None
) -> ReplayReport:
    """Build the state of a session from its commits, and tell where they contradict each other.

    Each version has to follow its predecessor and to fit its variable's type and constraints, and the journal has to
    say of the executions' commits what is in them. With `stored`, the live variables of the session as they are kept,
    the state has to end as it is there.
    """
    recorded = load(recording)
    check = _Check(limits or Limits())
    found = [divergence for commit in recorded.commits for divergence in check.take(commit)]
    if stored is not None:
        found.extend(check.compare(stored, len(recorded.commits)))
    told = tuple(map(Numbers(recorded).told_of, found))
    return ReplayReport(recorded.header.session_id, "state", len(recorded.commits), divergences=told)


class _Check:
    def __init__(self, limits: Limits) -> None:
        self._rebuilt = Rebuilt()
        self._limits = limits
        self._registered: dict[str, VariableRegistered] = {}
        self._versions: dict[str, RecordedVersion] = {}
        self._running: set[str] = set()

    def take(self, commit: RecordedCommit) -> Iterator[Divergence]:
        """Take a commit in; what is wrong with it."""
        events = commit.read_events()
        for event in events:
            if isinstance(event, VariableRegistered):
                self._registered[event.variable_id] = event
        for version in commit.versions:
            wrong = self._wrong_with(version)
            if wrong:
                yield Divergence(Aspect.VERSIONS, f"{version.name} version {version.version}: {wrong}", commit.number)
            self._versions[version.variable_id] = version
        yield from self._check_journal(commit, events)
        self._rebuilt.apply(commit)

    def _wrong_with(self, version: RecordedVersion) -> str:
        """In what a version contradicts what came before it; "" if in nothing."""
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
            return "it had been deleted"
        if version.name != registered.name:
            return f"its variable was registered as {registered.name}"
        return self._unfit(version, registered)

    def _unfit(self, version: RecordedVersion, registered: VariableRegistered) -> str:
        """In what the value is not one of its variable."""
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
            return f"its value is none of its variable's: {error}"
        return "" if kept == version.value else f"its value would have been kept as {kept.json}"

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
            told = f"{version.name} version {version.version}: no execution says that it wrote it"
            yield Divergence(Aspect.JOURNAL, told, commit.number)

    def _check_end(self, commit: RecordedCommit, event: ExecutionEnded, written: Written) -> Iterator[Divergence]:
        execution_id = event.execution_id
        if execution_id not in self._running:
            yield Divergence(Aspect.JOURNAL, "it ended, and was not running", commit.number, execution_id)
        self._running.discard(execution_id)
        claimed = list(event.writes)
        there = [(version.name, version.version) for version in written.take(claimed)]
        if claimed != there:
            told = [[f"{name} v{version}" for name, version in each] for each in (claimed, there)]
            what = "its journal entry says of what it wrote (-) what its commit has not (+)"
            yield Divergence(Aspect.JOURNAL, what, commit.number, execution_id, diff_of(*told))

    def compare(self, stored: Iterable[VariableState], number: int) -> Iterator[Divergence]:
        """Where the state is not what is kept."""
        state = self._rebuilt.state
        ours = {variable.id: variable for variable in state.variables.values()} if state is not None else {}
        kept = {variable.variable_id: variable for variable in stored}
        for variable_id in {**ours, **kept}:
            before, after = ours.get(variable_id), kept.get(variable_id)
            hidden = variable_id in self._rebuilt.masked or (after is not None and after.masked)
            lines = [_lines(each, hidden) for each in (before, after)]
            if lines[0] != lines[1]:
                name = before.name if before is not None else after.name if after is not None else variable_id
                what = f"{name}: the log (-) says something else than what is kept (+)"
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
