"""The history of one session in memory: every commit, every version of every variable, every execution."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import NamedTuple, TypeVar

from dspex_persist.state.events import Event, ExecutionBegan, ExecutionEnded, SessionEnded
from dspex_persist.state.masking import Secrets
from dspex_persist.state.model import SENSITIVE, Change, ExecutionStatus, JournalEntry, Session
from dspex_persist.state.points import Life
from dspex_persist.state.unit_of_work import UnitOfWork

T = TypeVar("T")


class PastCommit(NamedTuple):
    """A commit of a session in memory."""

    sequence: int
    at: datetime
    actor: str
    cause: str
    changes: tuple[Change, ...]
    events: tuple[Event, ...]


class PastExecution:
    """An execution: the events and the commits with which it began and ended, and the executions that it called."""

    __slots__ = ("began", "beginning", "children", "ended", "ending", "parent", "past")

    def __init__(
        self, past: "PastSession", began: ExecutionBegan, beginning: PastCommit, parent: "PastExecution | None"
    ) -> None:
        self.past = past
        self.began = began
        self.beginning = beginning
        self.parent = parent
        self.ended: ExecutionEnded | None = None
        self.ending: PastCommit | None = None
        self.children: list[PastExecution] = []

    @property
    def execution_id(self) -> str:
        """Its id."""
        return self.began.execution_id

    @property
    def sequence(self) -> int:
        """The commit that ended it, or that began it while it runs."""
        return (self.ending or self.beginning).sequence

    @property
    def status(self) -> ExecutionStatus:
        """Its status."""
        return ExecutionStatus.RUNNING if self.ended is None else self.ended.status

    @property
    def top(self) -> "PastExecution":
        """The execution whose transaction it is part of."""
        return self if self.parent is None else self.parent.top

    def family(self) -> Iterator["PastExecution"]:
        """Iterate over it and every execution that it called, directly or indirectly."""
        yield self
        for child in self.children:
            yield from child.family()

    def entry(self) -> JournalEntry:
        """Return it as an entry of the journal."""
        began, ended = self.began, self.ended
        return JournalEntry(
            began.execution_id,
            began.tool,
            self.beginning.sequence,
            began.parent_id,
            began.idempotency_key,
            began.fingerprint,
            self.status,
            None if self.ending is None else self.ending.sequence,
            began.attempt,
            None if ended is None else ended.result,
            None if ended is None else ended.failure,
        )


class PastSession:
    """The history of one session. Its writer adds commits; other threads may read at any time.

    Attributes:
        session: The session as of its newest commit.
        commits: All commits, oldest first.
        changes: The versions of each variable with what it was after them, by its id, oldest variable first.
        executions: All executions, oldest first.
        imported: How many of the commits are imported: they have kept their times.
        has_ended: Whether its newest commit has ended it.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.commits: list[PastCommit] = []
        self.changes: dict[str, list[Change]] = {}
        self.executions: list[PastExecution] = []
        self.imported = 0
        self.has_ended = False
        self._ids: dict[str, tuple[str, ...]] = {}
        self._places: dict[str, int] = {}
        self._executions: dict[str, PastExecution] = {}
        self._keyed: dict[str, PastExecution] = {}

    def add(self, unit: UnitOfWork, session: Session) -> None:
        """Add the next commit; `session` is the session after it."""
        self.session = session
        for change in unit.versions:
            variable_id, name = change.variable.id, change.variable.name
            changes = self.changes.get(variable_id)
            if changes is not None:
                changes.append(change)
            else:
                self._places[variable_id] = len(self._places)
                self._ids[name] = (*self._ids.get(name, ()), variable_id)
                self.changes[variable_id] = [change]
        facts = (unit.sequence, unit.now, unit.origin.actor, unit.origin.cause)
        commit = PastCommit(*facts, tuple(unit.versions), tuple(unit.events))
        for event in unit.events:
            if isinstance(event, ExecutionBegan):
                self._begin(event, commit)
            elif isinstance(event, ExecutionEnded) and event.execution_id in self._executions:
                execution = self._executions[event.execution_id]
                execution.ended, execution.ending = event, commit
        self.commits.append(commit)
        if unit.events:
            self.has_ended = any(isinstance(event, SessionEnded) for event in unit.events)

    def _begin(self, began: ExecutionBegan, commit: PastCommit) -> None:
        parent = None if began.parent_id is None else self._executions.get(began.parent_id)
        execution = PastExecution(self, began, commit, parent)
        self._executions[began.execution_id] = execution
        self.executions.append(execution)
        if parent is not None:
            parent.children.append(execution)
        if began.idempotency_key is not None:
            self._keyed[began.idempotency_key] = execution

    @property
    def life(self) -> Life:
        """When it was live."""
        first = self.commits[0]
        return Life(first.sequence, self.commits[-1].sequence if self.has_ended else None, first.at)

    # Variables

    def find_id(self, identifier: str, as_of: int | None) -> str | None:
        """Return the id of the newest variable with this name or id that was registered by commit `as_of`."""
        for each in (*reversed(self._ids.get(identifier, ())), identifier):
            if each in self.changes and (as_of is None or self.changes[each][0].version.sequence <= as_of):
                return each
        return None

    def ids_of(self, identifier: str) -> list[str]:
        """Return the ids of all variables with this name or id, oldest first."""
        ids = {*self._ids.get(identifier, ()), *((identifier,) if identifier in self._places else ())}
        return sorted(ids, key=self.place_of)

    def place_of(self, variable_id: str) -> int:
        """Return the number of a variable: the order in which they were registered."""
        return self._places[variable_id]

    def names(self) -> list[str]:
        """Return the names of all variables that it has had, the newest variable first."""
        return [changes[0].variable.name for changes in reversed(list(self.changes.values()))]

    def find_change(self, variable_id: str, as_of: int) -> Change | None:
        """Return the last change of a variable up to a commit."""
        changes = self.changes[variable_id]
        count = bisect_right(changes, as_of, key=_written_in)
        return changes[count - 1] if count else None

    def changes_between(self, variable_id: str, first: int, last: int, newest_first: bool = False) -> Iterator[Change]:
        """Iterate over the changes of a variable after commit `first` up to `last`."""
        return _between(self.changes[variable_id], _written_in, first, last, newest_first)

    def is_sensitive(self, variable_id: str) -> bool:
        """Whether a variable is sensitive according to its newest metadata."""
        return self.changes[variable_id][-1].variable.metadata.get(SENSITIVE, "").lower() == "true"

    def secrets(self) -> Secrets:
        """Return the values that its variables have had that are sensitive now."""
        hidden = [changes for variable_id, changes in list(self.changes.items()) if self.is_sensitive(variable_id)]
        values = (change.version.value for changes in hidden for change in changes)
        return Secrets(value for value in values if value is not None)

    # Executions

    def find_ended(self, key: str) -> JournalEntry | None:
        """Return the last execution with an idempotency key, if it has ended."""
        execution = self._keyed.get(key)
        return None if execution is None or execution.ended is None else execution.entry()

    def find_execution(self, execution_id: str) -> PastExecution | None:
        """Return the execution with exactly this id, or None."""
        return self._executions.get(execution_id)

    def execution_begun_by(self, sequence: int) -> PastExecution | None:
        """Return the execution that a commit began, or None."""
        return next(self.executions_between(sequence - 1, sequence), None)

    def executions_between(self, first: int, last: int, newest_first: bool = False) -> Iterator[PastExecution]:
        """Iterate over the executions that began after commit `first`, up to `last`."""
        return _between(self.executions, _began_in, first, last, newest_first)

    # Commits

    def commit(self, sequence: int) -> PastCommit:
        """Return one of its commits."""
        return self.commits[bisect_left(self.commits, sequence, key=_number)]

    def between(self, first: int, last: int, newest_first: bool = False) -> Iterator[PastCommit]:
        """Iterate over the commits after `first` up to `last`."""
        return _between(self.commits, _number, first, last, newest_first)

    def until(self, at: datetime) -> int:
        """Return its last commit before its first that is later than a time, by its own times; 0 if there is none."""
        place = first_later(self.commits, at)
        return self.commits[place - 1].sequence if place else 0

    def first_after(self, at: datetime) -> int | None:
        """Return its first commit that is later than a time, not counting imported ones; None if there is none."""
        # Only imported commits are not sorted by their times.
        place = bisect_right(self.commits, at, lo=self.imported, key=lambda commit: commit.at)
        return self.commits[place].sequence if place < len(self.commits) else None


def _between(
    entries: Sequence[T], number_of: Callable[[T], int], first: int, last: int, newest_first: bool
) -> Iterator[T]:
    """Iterate over entries by their commits. More may be added meanwhile."""
    begin = bisect_right(entries, first, key=number_of)
    places = range(begin, max(begin, bisect_right(entries, last, key=number_of)))
    return (entries[place] for place in (reversed(places) if newest_first else places))


def _began_in(execution: PastExecution) -> int:
    return execution.beginning.sequence


def _written_in(change: Change) -> int:
    return change.version.sequence


def _number(commit: PastCommit) -> int:
    return commit.sequence


def first_later(commits: Sequence[PastCommit], at: datetime) -> int:
    """Return the index of the first commit that is later than a time; how many commits there are if none is."""
    return next((place for place, commit in enumerate(commits) if commit.at > at), len(commits))
