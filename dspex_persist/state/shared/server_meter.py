"""ServerMeter: what one of several servers on a log counts about the others, and about its lease."""

from typing import Final

from dspex_persist.infra import forks
from dspex_persist.infra.metrics import Counter, Family, Histogram

# A round trip takes 20 us over a Unix socket, and some ms to another zone.
_TRIP_S: Final = (0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0, 5.0)
_ADVANCED, _DROPPED = "advanced", "dropped"
_LEARNT: Final = {True: _ADVANCED, False: _DROPPED}


class ServerMeter:
    """Counts for one server. The methods without a remark are called by its writer, in its turn."""

    def __init__(self) -> None:
        # For what is counted on any thread.
        self._lock = forks.Lock()
        trips = Histogram("dspex_persist_head_seconds", "How long asking the shared log for its head took.", _TRIP_S)
        self._trip_s = trips.of()
        self._passed = Counter("dspex_persist_head_reads_total", "Reads that waited for such an answer.")
        self._failures = Counter("dspex_persist_head_failures_total", "Times that the log did not answer.")
        self._commits = Counter("dspex_persist_foreign_commits_total", "Commits of other servers that were learnt.")
        self._sessions = Counter(
            "dspex_persist_foreign_sessions_total", "Sessions in memory that these commits have changed.", "how"
        )
        for how in _LEARNT.values():
            self._sessions.expect(how)
        self._repeated = Counter(
            "dspex_persist_groups_repeated_total", "Groups that were run again, because others had committed."
        )
        self._fenced = Counter("dspex_persist_fenced_total", "Times that other servers took this one for dead.")
        self._renewals = Counter("dspex_persist_lease_renewals_total", "Renewals of the lease.", "outcome")
        for outcome in ("ok", "failed"):
            self._renewals.expect(outcome)
        self._interrupted = Counter(
            "dspex_persist_orphans_total", "Executions of dead servers that this one found, to interrupt them."
        )
        self._instruments: tuple[Counter | Histogram, ...] = (
            *(trips, self._passed, self._failures, self._commits, self._sessions, self._repeated),
            *(self._fenced, self._renewals, self._interrupted),
        )

    def families(self) -> list[Family]:
        """Return what was counted; from any thread."""
        return [each.family() for each in self._instruments]

    def asked(self, reads: int, took_s: float) -> None:
        """Count an answer of the log, for which some reads waited; from any thread."""
        with self._lock:
            self._trip_s.observe(took_s)
            self._passed.add(amount=reads)

    def not_answered(self) -> None:
        """Count a question that the log did not answer; from any thread."""
        with self._lock:
            self._failures.add()

    def learnt(self, commits: int) -> None:
        """Count commits of others."""
        self._commits.add(amount=commits)

    def caught_up(self, *, in_place: bool) -> None:
        """Count a session in memory that others have changed, and whether it was brought up to date there."""
        self._sessions.add(_LEARNT[in_place])

    def repeated(self) -> None:
        """Count a group that has to run again."""
        self._repeated.add()

    def fenced(self) -> None:
        """Count that others took this server for dead."""
        self._fenced.add()

    def found_orphans(self, count: int) -> None:
        """Count executions of dead servers."""
        self._interrupted.add(amount=count)

    def renewed(self, *, succeeded: bool) -> None:
        """Count a renewal of the lease; on the thread that renews it."""
        self._renewals.add("ok" if succeeded else "failed")
