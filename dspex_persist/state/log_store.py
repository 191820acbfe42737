"""LogStore: the port to the storage of the sessions' commits. `groups` runs the commands over it.

A store has one owner. One thread at a time calls its writing half (`group`, `append`, the methods of `Backing`,
`reclaim`, `check`, `close`); any thread may call its reading half (`snapshot`, `changes_after`, `expired`), even while
another thread writes.

Requirements, which `dspex_persist.testing.provider_contract` tests through a `LogState`:

- `append` is atomic: it stores the whole group or nothing. If the engine is `abilities.Durable`, the group is durable
  when `append` and `group` have returned.
- Commits are numbered from 1 without gaps, across all sessions. The first unit of a group has number `sequence` + 1; a
  store whose log has changed in between refuses the group.
- Reads return exactly what was appended: each version, outcome and execution as the unit staged it. Reads inside a
  `group` see the log as of its beginning.
- `load` returns a state equal to the one that was in memory, except for its lease, which may end later by up to
  `Lease.slack`.
- `load` does not find an ended session, and its outcomes are gone. `changes_after` still returns its commits to open
  watches.

Errors; all but the second are `StateError`s:

- `StorageError`: the storage accepts no writes at the moment, for example because the disk is full. Nothing of the
  group was stored, and every job in it fails with this error.
- `UnwritableError`: something in one unit cannot be stored. Nothing of the group was stored; the caller halves it and
  appends again, until that unit is alone with the error. Any other exception counts as a bug of the store and is
  handled the same way, so it must leave nothing behind either.
- `OutcomeUnknownError`: the store cannot tell whether the group was stored. `FileChangedError`: the log is not as this
  owner left it. After either the store is unusable: the owner calls `abandon` and opens it again.
- A read that fails with a `StateError` fails the job or the call that needed it; one that fails with one of
  `driver_errors` fails the whole group.

A store does not notify watchers: its caller does so after `group` has ended.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import ClassVar, Final, NamedTuple

from dspex_persist.state.budgets import Spent
from dspex_persist.state.denials import Denial
from dspex_persist.state.errors import StateError
from dspex_persist.state.graph import dependants
from dspex_persist.state.model import Change, CommitChanges, JournalEntry, Variable, VariableVersion
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.unit_of_work import Backing, RecordedOutcome, UnitOfWork, VersionQuery


class UnwritableError(Exception):
    """Something in a unit cannot be stored, so nothing of its group was. `error` is the error for the unit's caller."""

    def __init__(self, error: StateError) -> None:
        super().__init__(str(error))
        self.error = error


class WouldWaitError(Exception):
    """A group that must not wait could not begin at once."""


class News(NamedTuple):
    """What other owners of a shared log have committed after commit `after`, up to and including `sequence`.

    Attributes:
        after: The last commit that this owner knew.
        sequence: The last commit of the log.
        last_at: The time of that commit. No later commit gets an earlier time.
        changed: The ids of the sessions that have commits in this range, by the numbers of their first commits; None if
            it may be any session.
        ended: The numbers of the first commits of those that have ended.
    """

    after: int
    sequence: int
    last_at: datetime
    changed: Mapping[int, str] | None
    ended: frozenset[int] = frozenset()


class MovedError(Exception):
    """Others have appended to a shared log since the group began. Nothing of it was stored: run it again."""


class FencedError(Exception):
    """Another server has taken this one for dead. Nothing was stored; the store has begun another lease."""


OF_GROUPS: Final = (WouldWaitError, MovedError, FencedError)
"""What ends a group of which nothing is stored, through no fault of its jobs."""


class LogStore(ABC):
    """The storage of the log. The module's docstring lists the requirements and the errors."""

    driver_errors: ClassVar[tuple[type[Exception], ...]] = ()
    """The driver's exceptions for a failing storage. Reads may raise them; `group` and `snapshot` convert them."""
    takes_pages: ClassVar[bool] = False
    """Whether `append` may be called several times in a group, which is stored when the group ends. Then memory never
    holds the whole of an imported session."""

    @property
    @abstractmethod
    def sequence(self) -> int:
        """The number of the last stored commit; 0 before the first."""

    @property
    @abstractmethod
    def last_at(self) -> datetime:
        """The time of the last commit as of opening the store (aware, UTC). No later commit gets an earlier time."""

    # Writing, on one thread at a time

    def group(self, *, wait: bool = True) -> AbstractContextManager[News | None]:
        """Return a context manager around all reads and the `append` of one group. It yields the news of a shared log.

        Without an `append`, it has no effect.

        Args:
            wait: Whether it may wait for another program, such as one that holds a lock. If not, it raises
                `WouldWaitError` instead.
        """
        return nullcontext()

    @abstractmethod
    def append(self, units: Sequence[UnitOfWork], touched: Sequence[SessionState]) -> None:
        """Store a group atomically.

        It must sort the `versions` of each unit by the order in which their variables were registered, then by number:
        watchers get them in this order, as `changes_after` returns them. `number_variables` does so; a store with
        keys for sessions and variables may use the `key` and `keys` of a unit's state instead.

        Args:
            units: The units of work; each becomes one commit.
            touched: Sessions whose lease has an expiry to be saved.
        """

    def prepare_import(self) -> None:  # noqa: B027 - optional
        """Prepare for the next group, which is an import: it cannot run again, so no other server may append in it.

        It may wait for another import, and raise any `StateError`.
        """

    def note_import(self, first: int, last: int) -> None:  # noqa: B027 - optional
        """Note that the commits of this group from `first` to `last` are imported: they keep their earlier times."""

    @abstractmethod
    def load(self, session_id: str) -> SessionState | None:
        """Return the live session's state, a new object for each call; None if no live session has this id."""

    @abstractmethod
    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        """Return one version of a variable of the session."""

    @abstractmethod
    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        """Return the versions that the query selects, newest first; None if the session never had the variable."""

    @abstractmethod
    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        """Return the outcome recorded under an idempotency key of the live session."""

    @abstractmethod
    def find_execution(self, state: SessionState, key: str) -> JournalEntry | None:
        """Return the last execution with an idempotency key, if it has ended."""

    def spent(self, state: SessionState) -> tuple[int, Mapping[str, Spent]]:
        """Return what the LM calls of ended executions have used, by tool, and the last commit that counts.

        In a store that does not override this, budgets of LM calls count from when the process began.
        """
        return self.sequence, {}

    def actor_of(self, sequence: int) -> str:
        """Return who made a commit; "" in a store that does not override this, for which nothing is limited."""
        return ""

    def stored_by(self, identity: str) -> Mapping[int, int]:
        """Return the live sessions that an identity began, by their first commits, with their stored bytes.

        The actors of the first commits are the identity, or it for somebody: see `quotas`. A store that does not
        override this limits nothing.
        """
        return {}

    # Reading, on any thread

    @abstractmethod
    def snapshot(self) -> AbstractContextManager[Backing]:
        """Return a context manager for a snapshot of the log, to be read on the calling thread."""

    @abstractmethod
    def changes_after(self, state: SessionState, after: int, most_commits: int = 64) -> list[CommitChanges]:
        """Return the session's next commits after number `after`, oldest first.

        Args:
            state: The session. The `dependants` of each commit follow from its dependencies (see `affected`).
            after: The number of a commit.
            most_commits: How many commits to return at most.

        Returns:
            At least one commit, if there is one. A commit that changed no variable has no changes.
        """

    def find_pruning(self, state: SessionState, after: int) -> int | None:
        """Return the last commit that pruned anything of the session's commits after number `after`, or None.

        A store that prunes nothing does not need to override this.
        """
        return None

    # Housekeeping

    @abstractmethod
    def unfinished(self) -> Mapping[str, Sequence[str]]:
        """Return the ids of executions that have not ended, oldest first, by the ids of their live sessions.

        Called after the store has been opened, when nothing runs yet.
        """

    @abstractmethod
    def expired(self, now: datetime, limit: int) -> list[str]:
        """Return the ids of at most `limit` live sessions whose saved expiry is past and in which no tool runs."""

    @abstractmethod
    def reclaim(self, before: datetime, is_watched: Callable[[int], bool]) -> None:
        """Delete the outcomes recorded before a time.

        A store that keeps no history of ended sessions may also delete those.

        Args:
            before: The time (aware, UTC).
            is_watched: Whether a session, identified by the number of its first commit, has watches; it must stay.
        """

    def keep_denials(self, denials: Sequence[Denial], most: int) -> None:  # noqa: B027 - optional
        """Count refused calls, outside of a group, and keep the newest `most` entries.

        It may raise `StorageError`, and then has kept none of them. A store that does not override this keeps none.
        """

    def forget_denials(self, before: datetime) -> int:
        """Delete the entries about refused calls before a time (aware), and return how many those were."""
        return 0

    def check(self) -> None:  # noqa: B027 - optional
        """Raise `FileChangedError` if something else changed the log. Called about every second while idle."""

    @abstractmethod
    def close(self) -> None:
        """Release all resources; everything appended stays."""

    def abandon(self) -> None:
        """Release all resources without writing anything more, after an error that made the store unusable."""
        self.close()


def number_variables(unit: UnitOfWork) -> None:
    """Number the variables that the unit registers, in the `keys` of its state, and sort its versions by them.

    For use in `LogStore.append`.
    """
    state = unit.state
    assert state is not None, "a unit with changes has a session"
    for change in unit.versions:
        state.keys.setdefault(change.variable.id, len(state.keys))
    if len(unit.versions) > 1:
        unit.versions.sort(key=lambda change: (state.keys[change.variable.id], change.version.version))


def affected(state: SessionState, sequence: int, changes: Sequence[Change]) -> tuple[Variable, ...]:
    """Return the variables in `state` that depend on those changed by commit `sequence`, dependencies first."""
    if not state.dependencies or not changes:
        return ()
    ids = dependants(state.dependencies, [change.variable.id for change in changes], sequence)
    return tuple(variable for variable_id in ids if (variable := state.find(variable_id)) is not None)
