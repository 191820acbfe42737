"""LogStore: the port to whatever keeps the log of the sessions' commits. `groups` runs the commands over it.

A store has one owner. Its writing half (`group`, `append`, what a `Backing` reads, `reclaim`, `check`, `close`)
is called by one thread at a time; its reading half (`snapshot`, `changes_after`, `expired`) by any thread, also while
another one writes.

Obligations, held by `dspex_persist.testing.provider_contract` over a `LogState`:

- `append` keeps a group whole or not at all. Where the engine over it is `abilities.Durable`, what it has kept is
  durable when it returns.
- Commits are numbered from 1 without a gap, whatever session they are of. A group is appended only where the log is
  still what it was: its first unit is number `sequence` + 1.
- Reads find exactly what was appended: each version, answer and execution as the unit had staged it. Those inside a
  `group` see the log as of its beginning.
- A state that `load` makes is equal to the one that was in memory, but for its lease, which may end later by
  `Lease.slack`.
- A session that has ended is not found by `load`; its answers are gone. `changes_after` still knows it for those who
  watch it.

Errors, all of which are `StateError`s but the second:

- `StorageError`: the storage takes nothing just now, such as a full disk. Certainly nothing of the group was kept, and
  every job of it fails with this error.
- `UnwritableError`: something in one unit cannot be kept. Certainly nothing of the group was kept; it is halved and
  appended again, until that one unit is left alone with the error. Any other exception counts as a fault of the store
  and is treated alike: it, too, must leave nothing behind.
- `OutcomeUnknownError`: whether the group was kept cannot be known. `FileChangedError`: the log is not what this owner
  left there. Either ends the use of the store: it is told to `abandon`, and is opened anew.
- A read that fails with a `StateError` fails the job, or the call, that needed it; with one of `driver_errors`, the
  whole group.

A store tells nobody of news: whoever appends also tells the watchers, after `append` has returned.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import ClassVar

from dspex_persist.state.errors import StateError
from dspex_persist.state.graph import dependants
from dspex_persist.state.model import Change, CommitChanges, JournalEntry, Variable, VariableVersion
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.unit_of_work import Backing, RecordedOutcome, UnitOfWork, VersionQuery


class UnwritableError(Exception):
    """Something in a unit cannot be kept, and so nothing of its group was. `error` is what the caller is told."""

    def __init__(self, error: StateError) -> None:
        super().__init__(str(error))
        self.error = error


class LogStore(ABC):
    """Where the log is kept. See the module for what an implementation owes, and which errors mean what."""

    driver_errors: ClassVar[tuple[type[Exception], ...]] = ()
    """What reads raise of the driver's own when the storage fails; `group` and `snapshot` make `StateError`s of it."""

    @property
    @abstractmethod
    def sequence(self) -> int:
        """The number of the last commit that was kept; 0 before the first."""

    @property
    @abstractmethod
    def last_at(self) -> datetime:
        """The time of the last commit, when the store was opened: no later commit gets an earlier one. Aware, UTC."""

    # Writing, on one thread at a time

    def group(self) -> AbstractContextManager[object]:
        """Around all that is read and appended for one group. Without an `append` in it, it changes nothing."""
        return nullcontext()

    @abstractmethod
    def append(self, units: Sequence[UnitOfWork], touched: Sequence[SessionState]) -> None:
        """Keep the units, one commit each, and the expiries of the leases of `touched`, as one atomic group.

        It puts the `versions` of each unit in the order in which their variables were registered, then by number: so
        watchers are told of them, and so does `changes_after`. `number_variables` does that; a store that has keys of
        its own may keep them in the `key` and `keys` of a unit's state.
        """

    @abstractmethod
    def load(self, session_id: str) -> SessionState | None:
        """The live session's state, new for each call; None where none of this id lives."""

    @abstractmethod
    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        """One version of a variable of the session."""

    @abstractmethod
    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        """The versions that the query wants, newest first; None if the session never had the variable."""

    @abstractmethod
    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        """What was answered under an idempotency key of the live session."""

    @abstractmethod
    def find_execution(self, state: SessionState, key: str) -> JournalEntry | None:
        """The last execution under an idempotency key, if it has ended."""

    # Reading, on any thread

    @abstractmethod
    def snapshot(self) -> AbstractContextManager[Backing]:
        """What the log says as of one moment, to be read on the thread that asks."""

    @abstractmethod
    def changes_after(self, state: SessionState, after: int, most_commits: int = 64) -> list[CommitChanges]:
        """The session's next commits after number `after`, oldest first; one that changed no variable has no changes.

        At least one, if there is any, and at most `most_commits`. `dependants` are those of `state` (`affected`).
        """

    # Housekeeping

    @abstractmethod
    def unfinished(self) -> Mapping[str, Sequence[str]]:
        """The ids of executions that have not ended, oldest first, by the ids of their live sessions.

        Asked when the store has been opened: nothing runs then.
        """

    @abstractmethod
    def expired(self, now: datetime, limit: int) -> list[str]:
        """The ids of at most `limit` live sessions whose expiry, as saved, is past, and in which no tool runs."""

    @abstractmethod
    def reclaim(self, before: datetime, is_watched: Callable[[int], bool]) -> None:
        """Forget the answers that were given before that time.

        A store that keeps nothing of sessions that have ended may forget them, too, but for those that somebody
        watches, which `is_watched` knows by the number of their first commit.
        """

    def check(self) -> None:  # noqa: B027 - for those who have something to look at
        """Called about every second while nobody writes: raise `FileChangedError` where the log is not what it was."""

    @abstractmethod
    def close(self) -> None:
        """Let everything go; what was appended stays."""

    def abandon(self) -> None:
        """Let everything go without another write, after what has ended the use of the store."""
        self.close()


def number_variables(unit: UnitOfWork) -> None:
    """Number the variables that the unit registers, in the `keys` of its state, and sort its versions by them."""
    state = unit.state
    assert state is not None, "a unit with changes has a session"
    for change in unit.versions:
        state.keys.setdefault(change.variable.id, len(state.keys))
    unit.versions.sort(key=lambda change: (state.keys[change.variable.id], change.version.version))


def affected(state: SessionState, sequence: int, changes: Sequence[Change]) -> tuple[Variable, ...]:
    """Who depends on what commit `sequence` changed, as they stand in `state`, used ones first."""
    if not state.dependencies or not changes:
        return ()
    ids = dependants(state.dependencies, [change.variable.id for change in changes], sequence)
    return tuple(found for variable_id in ids if (found := state.find(variable_id)) is not None)
