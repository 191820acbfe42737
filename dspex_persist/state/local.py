"""LocalState: session state in the memory of this process, until it is closed or the process ends."""

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime

from dspex_persist.clock import EARLIEST
from dspex_persist.state import arguments
from dspex_persist.state.abilities import Auditable, Forkable, Recordable, Restorable, unkeyed
from dspex_persist.state.around import (
    AuditsAround,
    DerivesAround,
    ForksAround,
    HoldsAround,
    ImportsAround,
    OrderAround,
    RecordsAround,
    RestoresAround,
)
from dspex_persist.state.audit import AuditSource, suggestion
from dspex_persist.state.budgets import NOTHING, Spent
from dspex_persist.state.commands import ReadState
from dspex_persist.state.errors import NotInHistoryError
from dspex_persist.state.groups import Groups
from dspex_persist.state.lm_calls import spent_on
from dspex_persist.state.log_state import LogState, default_actor
from dspex_persist.state.log_store import LogStore, affected, number_variables
from dspex_persist.state.model import CommitChanges, JournalEntry, Origin, RestoredSession, SessionView, VariableVersion
from dspex_persist.state.options import SessionOptions, check_count
from dspex_persist.state.past.audits import PastAudit
from dspex_persist.state.past.forks import fork, restore
from dspex_persist.state.past.recordings import record
from dspex_persist.state.past.sessions import PastExecution, PastSession
from dspex_persist.state.recording import Header, RecordedAnswer, RecordedCommit
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.tools.ports import ToolCode, check_tools
from dspex_persist.state.tools.with_tools import TOOL_THREADS, WithTools
from dspex_persist.state.unit_of_work import Backing, RecordedOutcome, UnitOfWork, VersionQuery, up_to
from dspex_persist.state.writer import GAP_S


class LocalState(
    WithTools,
    OrderAround,
    AuditsAround,
    RecordsAround,
    ImportsAround,
    HoldsAround,
    ForksAround,
    RestoresAround,
    DerivesAround,
):
    """Session state in memory, for tests, notebooks, and everything that need not outlive its process.

    The history of a session is available until the session ends; until then it can be recorded and forked. Audits can
    query it until the next sweep but one.

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


class MemoryState(LogState, Auditable, Recordable, Forkable, Restorable):
    """The engine over a log in memory, with audits, recordings and forks of live sessions."""

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

    def audit(self, *, reveal: bool = False) -> AuditSource:
        """See `Auditable.audit`."""
        self.check_open()
        return PastAudit(self._log, self.check_open, reveal=arguments.flag("reveal", reveal))

    def record(
        self, session_id: str, *, started: int | None = None, reveal: bool = False, after: int = 0
    ) -> tuple[Header, Iterator[RecordedCommit]]:
        """See `Recordable.record`; only live sessions can be recorded."""
        self.check_open()
        session_id, reveal = arguments.text("session_id", session_id), arguments.flag("reveal", reveal)
        started = arguments.started(started)
        after = arguments.sequence("after", after)
        past = self._log.past_of(session_id)
        # In this order, so that no answer is missing.
        commits = tuple(past.commits)
        answers = self._log.answers_of(session_id)
        return record(past, commits, answers, started=started, reveal=reveal, after=after)

    def fork_session(
        self, session_id: str, new_session_id: str, at: str = "", *, origin: Origin | None = None
    ) -> SessionView:
        """See `Forkable.fork_session`; only live sessions can be forked."""
        self.check_open()
        source, new = arguments.text("session_id", session_id), arguments.text("new_session_id", new_session_id)
        at = arguments.text("at", at)
        past, sequence = self._log.past_of(source), self.audit().resolve(at, session=source)
        return self.submit(fork(past, new, sequence), origin).result()

    def restore_session(self, session_id: str, at: str, *, origin: Origin | None = None) -> RestoredSession:
        """See `Restorable.restore_session`."""
        self.check_open()
        session_id, at = arguments.text("session_id", session_id), arguments.text("at", at)
        self.run(ReadState(session_id))
        past, sequence = self._log.past_of(session_id), self.audit().resolve(at, session=session_id)
        return self.submit(restore(past, at, sequence), unkeyed(origin)).result()


class MemoryLog(LogStore):
    """The log in dictionaries: the current state and the history of each session, until some time after its end."""

    def __init__(self) -> None:
        self._sequence = 0
        self._live: dict[str, SessionState] = {}
        # By the number of each session's first commit, because a later session may have the same id.
        self._pasts: dict[int, PastSession] = {}
        # Those that have ended since the last sweep, and before it.
        self._ended: list[int] = []
        self._ended_before: list[int] = []
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
            past = self._pasts.get(state.session.sequence) or PastSession(state.session)
            past.add(unit, state.session)
            self._pasts[state.session.sequence] = past
            if past.has_ended:
                self._live.pop(state.session.id, None)
                self._outcomes.pop(state.session.id, None)
                self._ended.append(state.session.sequence)
            else:
                self._live[state.session.id] = state
            if unit.outcome is not None:
                outcomes = self._outcomes.setdefault(unit.outcome.session_id, {})
                outcomes[unit.outcome.key] = unit.now, unit.sequence, unit.outcome
            self._sequence = unit.sequence

    def note_import(self, first: int, last: int) -> None:
        """Note which commits have kept their times."""
        self._pasts[first].imported = last - first + 1

    def load(self, session_id: str) -> SessionState | None:
        """Return the live session's state."""
        state = self._live.get(session_id)
        return state.copy() if state is not None else None

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        """Return one version."""
        changes = self._past_of(state).changes.get(variable_id, ())
        return changes[version].version if 0 <= version < len(changes) else None

    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        """Return the versions that the query selects, newest first; None if the session never had the variable."""
        past = self._past_of(state)
        live = state.find(query.identifier) if query.as_of is None else None
        variable_id = live.id if live is not None else past.find_id(query.identifier, query.as_of)
        if variable_id is None:
            return None
        changes = past.changes[variable_id][: query.before][::-1][: query.limit]
        return up_to([change.version for change in changes], query.most_bytes)

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        """Return the outcome recorded under an idempotency key."""
        _, _, outcome = self._outcomes.get(session_id, {}).get(key, (None, None, None))
        return outcome

    def find_execution(self, state: SessionState, key: str) -> JournalEntry | None:
        """Return the last execution with an idempotency key, if it has ended."""
        return self._past_of(state).find_ended(key)

    def spent(self, state: SessionState) -> tuple[int, Mapping[str, Spent]]:
        """Return what the LM calls of ended executions have used, by tool, and up to which commit."""
        sequence = self.sequence
        return sequence, _spent_in(tuple(self._past_of(state).executions), sequence)

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

    def pasts(self) -> Sequence[PastSession]:
        """Return the history of all sessions that are live, or have ended recently, oldest first."""
        return list(self._pasts.values())

    def past_of(self, session_id: str) -> PastSession:
        """Return the history of the live session with this id, or raise `NotInHistoryError`."""
        state = self._live.get(session_id)
        if state is None:
            raise NotInHistoryError("session", session_id, suggestion(session_id, list(self._live)))
        return self._past_of(state)

    def answers_of(self, session_id: str) -> Mapping[int, RecordedAnswer]:
        """Return the answers kept for the live session with this id, by the numbers of their commits."""
        kept = list(self._outcomes.get(session_id, {}).values())
        return {
            sequence: RecordedAnswer(each.key, each.cause, each.fingerprint, each.result) for _, sequence, each in kept
        }

    def _past_of(self, state: SessionState) -> PastSession:
        # Callers may still hold the state of an ended session, whose history is gone.
        return self._pasts.get(state.session.sequence) or PastSession(state.session)

    # Housekeeping

    def unfinished(self) -> Mapping[str, Sequence[str]]:
        """Return nothing, as a new log has no executions."""
        return {}

    def expired(self, now: datetime, limit: int) -> list[str]:
        """Return the ids of expired sessions."""
        return [session_id for session_id, state in list(self._live.items()) if state.is_over(now)][:limit]

    def reclaim(self, before: datetime, is_watched: Callable[[int], bool]) -> None:
        """Delete old outcomes, and sessions that had ended by the last time and have no watches."""
        for outcomes in self._outcomes.values():
            for key in [key for key, (recorded_at, *_) in outcomes.items() if recorded_at < before]:
                del outcomes[key]
        for first_sequence in self._ended_before:
            if not is_watched(first_sequence):
                self._pasts.pop(first_sequence, None)
        # Somebody may want to know how the others ended.
        self._ended_before = [each for each in (*self._ended_before, *self._ended) if each in self._pasts]
        self._ended = []

    def close(self) -> None:
        """Free the memory."""
        self._live, self._pasts, self._outcomes = {}, {}, {}


def _spent_in(executions: Iterable[PastExecution], until: int) -> dict[str, Spent]:
    """Return what the LM calls of executions that ended by commit `until` have used, by tool."""
    spent: dict[str, Spent] = {}
    for execution in executions:
        if execution.ended is None or execution.sequence > until:
            continue
        for call in execution.ended.lm_calls:
            spent[execution.began.tool] = spent.get(execution.began.tool, NOTHING).plus(spent_on(call))
    return spent
