"""LocalState: session state in the memory of this process, until it is closed or the process ends."""

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import datetime

from dspex_persist.clock import EARLIEST
from dspex_persist.state import arguments, past
from dspex_persist.state.abilities import Forkable, Recordable, Restorable, unkeyed
from dspex_persist.state.around import (
    DerivesAround,
    ForksAround,
    HoldsAround,
    ImportsAround,
    OrderAround,
    RecordsAround,
    RestoresAround,
)
from dspex_persist.state.audit import suggestion
from dspex_persist.state.commands import ReadState
from dspex_persist.state.errors import NotInHistoryError
from dspex_persist.state.events import ExecutionBegan, ExecutionEnded, SessionEnded
from dspex_persist.state.groups import Groups
from dspex_persist.state.log_state import LogState, default_actor
from dspex_persist.state.log_store import LogStore, affected, number_variables
from dspex_persist.state.model import CommitChanges, JournalEntry, Origin, RestoredSession, SessionView, VariableVersion
from dspex_persist.state.options import SessionOptions, check_count
from dspex_persist.state.past import PastCommit
from dspex_persist.state.recording import Header, RecordedAnswer, RecordedCommit
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.tools.ports import ToolCode, check_tools
from dspex_persist.state.tools.with_tools import TOOL_THREADS, WithTools
from dspex_persist.state.unit_of_work import Backing, RecordedOutcome, UnitOfWork, VersionQuery, up_to
from dspex_persist.state.writer import GAP_S


class LocalState(
    WithTools, OrderAround, RecordsAround, ImportsAround, HoldsAround, ForksAround, RestoresAround, DerivesAround
):
    """Session state in memory, for tests, notebooks, and everything that need not outlive its process.

    The history of a session is available until the session ends; until then it can be recorded and forked.

    Args:
        options: Limits, TTLs and leases.
        sweep_interval_s: How often expired sessions are ended and old outcomes deleted, in seconds.
        tools: The tools for `execute_tool`, by name; see `dspex_persist.Toolbox`.
        tool_threads: How many threads run tools at most.
        actor: Who makes the changes, unless a call says otherwise; by default the user of this process.

    Raises:
        InvalidArgumentError: An option is invalid, or `tools` are not tools.
    """

    def __init__(
        self,
        options: SessionOptions | None = None,
        *,
        sweep_interval_s: float = 30.0,
        tools: Mapping[str, ToolCode] | None = None,
        tool_threads: int = TOOL_THREADS,
        actor: str | None = None,
    ) -> None:
        # Before any thread is started.
        default_actor(actor)
        check_count("tool_threads", tool_threads)
        check_tools(tools)
        # Evicting a session would save nothing, as the log is in memory, too; nor would larger groups save time.
        groups = Groups(MemoryLog(), options, cache_size_bytes=sys.maxsize)
        name = "session state in memory"
        self.engine = MemoryState(groups, name=name, sweep_interval_s=sweep_interval_s, gap_s=0, actor=actor)
        super().__init__(self.engine, tools, threads=tool_threads, limits=self.engine.limits)


class MemoryState(LogState, Recordable, Forkable, Restorable):
    """The engine over a log in memory, with recordings and forks of live sessions."""

    def __init__(
        self,
        groups: Groups["MemoryLog"],
        *,
        name: str = "the session state",
        sweep_interval_s: float = 30.0,
        gap_s: float = GAP_S,
        actor: str | None = None,
    ) -> None:
        super().__init__(
            groups, name=name, sweep_interval_s=sweep_interval_s, gap_s=gap_s, main_leads=True, actor=actor
        )
        self._log = groups.log

    def record(
        self, session_id: str, *, started: int | None = None, reveal: bool = False
    ) -> tuple[Header, Iterator[RecordedCommit]]:
        """See `Recordable.record`; only live sessions can be recorded."""
        self.check_open()
        session_id, reveal = arguments.text("session_id", session_id), arguments.flag("reveal", reveal)
        if started is not None:
            started = arguments.sequence("started", started)
        commits, answers = self._log.commits_of(session_id), self._log.answers_of(session_id)
        return past.record(session_id, commits, answers, started=started, reveal=reveal)

    def fork_session(
        self, session_id: str, new_session_id: str, at: str = "", *, origin: Origin | None = None
    ) -> SessionView:
        """See `Forkable.fork_session`; only live sessions can be forked."""
        self.check_open()
        source, new = arguments.text("session_id", session_id), arguments.text("new_session_id", new_session_id)
        at = arguments.text("at", at)
        head, commits = self._log.sequence, self._log.commits_of(source)
        return self.submit(past.fork(source, commits, new, at, head), origin).result()

    def restore_session(self, session_id: str, at: str, *, origin: Origin | None = None) -> RestoredSession:
        """See `Restorable.restore_session`."""
        self.check_open()
        session_id, at = arguments.text("session_id", session_id), arguments.text("at", at)
        self.run(ReadState(session_id))
        head, commits = self._log.sequence, self._log.commits_of(session_id)
        return self.submit(past.restore(session_id, commits, at, head), unkeyed(origin)).result()


class MemoryLog(LogStore):
    """The log in dictionaries: the current state and the history of each session until it ends."""

    def __init__(self) -> None:
        self._sequence = 0
        self._live: dict[str, SessionState] = {}
        # By the number of each session's first commit, because a later session may have the same id.
        self._pasts: dict[int, _Past] = {}
        self._ended: list[int] = []
        # By session and key, with the times and the numbers of their commits.
        self._outcomes: dict[str, dict[str, tuple[datetime, int, RecordedOutcome]]] = {}

    @property
    def sequence(self) -> int:
        """The number of the last commit."""
        return self._sequence

    @property
    def last_at(self) -> datetime:
        """The earliest possible time, as a new log has no commits."""
        return EARLIEST

    # Writing. Other threads may read at any time, so each step below leaves the log consistent.

    def append(self, units: Sequence[UnitOfWork], touched: Sequence[SessionState]) -> None:
        """Store the units. Leases are shared, so there is nothing to save for `touched`."""
        for unit in units:
            state = unit.state
            assert state is not None, "a unit with changes has a session"
            number_variables(unit)
            past = self._pasts.get(state.session.sequence)
            if past is None:
                past = self._pasts[state.session.sequence] = _Past()
            past.add(unit)
            if unit.events and any(isinstance(event, SessionEnded) for event in unit.events):
                self._live.pop(state.session.id, None)
                self._outcomes.pop(state.session.id, None)
                self._ended.append(state.session.sequence)
            else:
                self._live[state.session.id] = state
            if unit.outcome is not None:
                outcomes = self._outcomes.setdefault(unit.outcome.session_id, {})
                outcomes[unit.outcome.key] = unit.now, unit.sequence, unit.outcome
            self._sequence = unit.sequence

    def load(self, session_id: str) -> SessionState | None:
        """Return the live session's state."""
        state = self._live.get(session_id)
        return state.copy() if state is not None else None

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        """Return one version."""
        versions = self._past_of(state).versions.get(variable_id, ())
        return versions[version] if 0 <= version < len(versions) else None

    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        """Return the versions that the query selects, newest first; None if the session never had the variable."""
        past = self._past_of(state)
        live = state.find(query.identifier) if query.as_of is None else None
        variable_id = live.id if live is not None else past.find_id(query.identifier, query.as_of)
        if variable_id is None:
            return None
        return up_to(past.versions[variable_id][: query.before][::-1][: query.limit], query.most_bytes)

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        """Return the outcome recorded under an idempotency key."""
        _, _, outcome = self._outcomes.get(session_id, {}).get(key, (None, None, None))
        return outcome

    def find_execution(self, state: SessionState, key: str) -> JournalEntry | None:
        """Return the last execution with an idempotency key, if it has ended."""
        return self._past_of(state).executions.get(key)

    # Reading

    def snapshot(self) -> AbstractContextManager[Backing]:
        """Return the log itself, as its entries never change."""
        return nullcontext(self)

    def changes_after(self, state: SessionState, after: int, most_commits: int = 64) -> list[CommitChanges]:
        """Return the session's next commits."""
        commits = self._past_of(state).commits
        first = bisect_right(commits, after, key=lambda commit: commit.sequence)
        return [
            CommitChanges(commit.sequence, commit.changes, affected(state, commit.sequence, commit.changes))
            for commit in commits[first : first + most_commits]
        ]

    def commits_of(self, session_id: str) -> Sequence[PastCommit]:
        """Return all commits of the live session with this id, oldest first, or raise `NotInHistoryError`."""
        state = self._live.get(session_id)
        if state is None:
            raise NotInHistoryError("session", session_id, suggestion(session_id, list(self._live)))
        return tuple(self._past_of(state).commits)

    def answers_of(self, session_id: str) -> Mapping[int, RecordedAnswer]:
        """Return the answers kept for the live session with this id, by the numbers of their commits."""
        kept = list(self._outcomes.get(session_id, {}).values())
        return {
            sequence: RecordedAnswer(each.key, each.cause, each.fingerprint, each.result) for _, sequence, each in kept
        }

    def _past_of(self, state: SessionState) -> "_Past":
        # Callers may still hold the state of an ended session, whose history is gone.
        return self._pasts.get(state.session.sequence) or _Past()

    # Housekeeping

    def unfinished(self) -> Mapping[str, Sequence[str]]:
        """Return nothing, as a new log has no executions."""
        return {}

    def expired(self, now: datetime, limit: int) -> list[str]:
        """Return the ids of expired sessions."""
        return [session_id for session_id, state in list(self._live.items()) if state.is_over(now)][:limit]

    def reclaim(self, before: datetime, is_watched: Callable[[int], bool]) -> None:
        """Delete old outcomes, and ended sessions that have no watches."""
        for outcomes in self._outcomes.values():
            for key in [key for key, (recorded_at, *_) in outcomes.items() if recorded_at < before]:
                del outcomes[key]
        gone = [first_sequence for first_sequence in self._ended if not is_watched(first_sequence)]
        for first_sequence in gone:
            self._pasts.pop(first_sequence, None)
        self._ended = [each for each in self._ended if each in self._pasts]

    def close(self) -> None:
        """Free the memory."""
        self._live, self._pasts, self._outcomes = {}, {}, {}


class _Past:
    """The history of one session: every version of every variable, and every commit."""

    def __init__(self) -> None:
        self.versions: dict[str, list[VariableVersion]] = {}
        self.commits: list[PastCommit] = []
        self.executions: dict[str, JournalEntry] = {}
        self._running: dict[str, tuple[str, JournalEntry]] = {}
        self._ids: dict[str, tuple[str, ...]] = {}

    def add(self, unit: UnitOfWork) -> None:
        """Add the next commit."""
        for change in unit.versions:
            variable_id, name = change.variable.id, change.variable.name
            versions = self.versions.get(variable_id)
            if versions is not None:
                versions.append(change.version)
            else:
                self.versions[variable_id] = [change.version]
                self._ids[name] = (*self._ids.get(name, ()), variable_id)
        for event in unit.events:
            if isinstance(event, ExecutionBegan) and event.idempotency_key is not None:
                self._begin(event, event.idempotency_key, unit.sequence)
            elif isinstance(event, ExecutionEnded) and event.execution_id in self._running:
                key, entry = self._running.pop(event.execution_id)
                ended = replace(entry, status=event.status, sequence=unit.sequence, result=event.result)
                self.executions[key] = ended
        facts = (unit.sequence, unit.now, unit.origin.actor, unit.origin.cause)
        self.commits.append(PastCommit(*facts, tuple(unit.versions), tuple(unit.events)))

    def _begin(self, began: ExecutionBegan, key: str, sequence: int) -> None:
        facts = (began.execution_id, began.tool, sequence, began.parent_id, key, began.fingerprint)
        self._running[began.execution_id] = key, JournalEntry(*facts, attempt=began.attempt)
        # Only the last execution counts, and it has not ended.
        self.executions.pop(key, None)

    def find_id(self, identifier: str, as_of: int | None) -> str | None:
        """Return the id of the newest variable with this name or id that was registered by commit `as_of`."""
        for each in (*reversed(self._ids.get(identifier, ())), identifier):
            if each in self.versions and (as_of is None or self.versions[each][0].sequence <= as_of):
                return each
        return None
