"""Meter: what an engine counts and measures while it works. Knows neither a format nor who shows it.

Parts of the engine have a meter or None, so nothing is counted unless somebody wants to know.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from dspex_persist.infra import forks
from dspex_persist.infra.metrics import SECONDS, Counter, Family, Histogram, Names, total
from dspex_persist.state import errors
from dspex_persist.state.errors import StateError
from dspex_persist.state.model import RECORDING, TRANSACTION, ExecutionStatus

MOST_TOOLS: Final = 100
"""How many tools that workers have registered, or recordings, have a name of their own in labels."""
MOST_MODELS: Final = 50
_JOBS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# A commit takes 0.1 ms on a fast disk, and 10 ms on a slow one.
_COMMIT_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, *SECONDS)
_EXECUTION_S: Final = (0.001, 0.0025, *SECONDS, 30.0, 60.0, 300.0)
_MODEL_S: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_CONFLICTS: Final[dict[type[StateError], str]] = {
    errors.VersionConflictError: "version",
    errors.VariableReplacedError: "version",
    errors.VariableLockedError: "lock",
    errors.IdempotencyConflictError: "idempotency_key",
}
_SCOPE: Final = "scope "
# How what a caller lacked begins, where it was known, and what that is counted as.
_REASONS: Final = (("rule", "rule"), ("execution", "execution"), ("more than", "rate"))
_KINDS: Final = ("execution", "transaction", "version", "lock", "idempotency_key")


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """An engine, as it is now.

    Attributes:
        sequence: The number of the last commit.
        queue_length: Writes that wait, or are being written.
        sessions: Sessions in memory.
        cache_bytes: How much memory these take.
        cache_hits: How often a session was in memory.
        watches: Open watches.
    """

    sequence: int
    queue_length: int
    sessions: int
    cache_bytes: int
    cache_hits: int
    watches: int


@dataclass(frozen=True, slots=True)
class FileFigures:
    """A database, as it is now. Sizes are in bytes.

    Attributes:
        size: The size of the file, or of the tables and indexes.
        wal: The size of its write-ahead log; None if it is no file.
        free: What is free on its disk; None if it is no file.
        live_sessions: Sessions that have not ended.
    """

    size: int
    wal: int | None
    free: int | None
    live_sessions: int


@dataclass(frozen=True, slots=True)
class RunnerFigures:
    """A runner of tools, as it is now.

    Attributes:
        running: Executions of tools that run, with those that they have called.
        waiting: Requests that have not begun, or wait for their turn.
        transactions: Open transactions of clients.
    """

    running: int
    waiting: int
    transactions: int


@dataclass(frozen=True, slots=True)
class LmCounts:
    """What is counted of a recorded call of a language model. See `lm_calls.LmCall`."""

    model: str
    failed: bool
    cached: bool
    input_tokens: int
    output_tokens: int
    cost: float | None
    latency_us: int | None


class Meter:
    """Counts for one engine, and for the tools that run over it.

    Args:
        tools: The names of the tools that are known from the beginning.
    """

    def __init__(self, tools: Iterable[str] = ()) -> None:
        known = (*tools, RECORDING)
        self._tools, self._lm_tools = Names(MOST_TOOLS, known), Names(MOST_TOOLS, known)
        self._models = Names(MOST_MODELS)
        # For what is counted on any thread. The writer counts with its turn.
        self._lock = forks.Lock()
        self.commits = self.misses = 0
        group_jobs = Histogram("dspex_persist_group_writes", "Writes that were written in one transaction.", _JOBS)
        group_s = Histogram(
            "dspex_persist_group_seconds", "How long a group of writes took, from its begin to its commit.", _COMMIT_S
        )
        commit_s = Histogram(
            "dspex_persist_commit_seconds", "How long it took to store a group, once it was complete.", _COMMIT_S
        )
        self._group_jobs, self._group_s, self._commit_s = group_jobs.of(), group_s.of(), commit_s.of()
        self.observe_commit = self._commit_s.observe
        self._errors = Counter("dspex_persist_write_errors_total", "Writes that failed, by their error.", "error")
        for broken in (errors.StorageError, errors.DamagedSessionError):
            self._errors.expect(broken.__name__)
        self._refused = Counter("dspex_persist_queue_full_total", "Writes that were refused because too many waited.")
        self._conflicts = Counter(
            "dspex_persist_conflicts_total", "Writes and executions that failed because of what others did.", "kind"
        )
        self._ended_in_conflict = self._conflicts.twin()
        for kind in _KINDS:
            self._conflicts.expect(kind)
        self._replays = Counter(
            "dspex_persist_idempotent_replays_total", "Requests that got the recorded outcome of their key.", "kind"
        )
        self._repeated = self._replays.twin()
        for kind in ("write", "execution"):
            self._replays.expect(kind)
        self._executions = Counter("dspex_persist_executions_total", "Executions that have ended.", "tool", "status")
        self._execution_s = Histogram(
            "dspex_persist_execution_seconds", "How long executions took.", _EXECUTION_S, "tool"
        )
        self._refusals = Counter(
            "dspex_persist_execution_refusals_total", "Requests that were refused before an execution began.", "reason"
        )
        self._transactions = Counter(
            "dspex_persist_transactions_total", "Transactions of clients that have ended.", "status"
        )
        for status in (ExecutionStatus.COMMITTED, ExecutionStatus.CONFLICT):
            self._transactions.expect(status.value)
        self._lm_calls = Counter(
            "dspex_persist_lm_calls_total", "Recorded calls of language models.", "model", "tool", "outcome"
        )
        self._lm_tokens = Counter("dspex_persist_lm_tokens_total", "Tokens of these calls.", "model", "tool", "kind")
        self._lm_cost = Counter("dspex_persist_lm_cost_usd_total", "What they cost.", "model", "tool")
        self._lm_s = Histogram("dspex_persist_lm_call_seconds", "How long they took.", _MODEL_S, "model")
        self._denials = Counter(
            "dspex_persist_denials_total", "Calls that were refused because of who made them.", "reason"
        )
        self._instruments: list[Counter | Histogram] = [group_jobs, group_s, commit_s, self._errors, self._refused]
        self._instruments += [self._conflicts, self._replays, self._executions, self._execution_s, self._refusals]
        self._instruments += [self._transactions, self._lm_calls, self._lm_tokens, self._lm_cost, self._lm_s]
        self._instruments += [self._denials]

    def families(self) -> list[Family]:
        """Return what was counted."""
        commits = total("dspex_persist_commits_total", "Commits of this engine.", self.commits)
        misses = total(
            "dspex_persist_cache_misses_total", "Sessions that had to be looked for in the file.", self.misses
        )
        return [commits, *(each.family() for each in self._instruments), misses]

    # Writes. The writer calls these, in its turn.

    def wrote(self, jobs: int, took_s: float) -> None:
        """Count a group of writes."""
        self._group_jobs.observe(jobs)
        self._group_s.observe(took_s)

    def failed(self, error: StateError) -> None:
        """Count a write that failed."""
        self._errors.add(type(error).__name__)
        kind = _CONFLICTS.get(type(error))
        if kind is not None:
            self._conflicts.add(kind)

    def replayed(self) -> None:
        """Count a write whose outcome was recorded under its key."""
        self._replays.add("write")

    def refused(self, count: int) -> None:
        """Count writes for which the queue had no place; from any thread."""
        with self._lock:
            self._refused.add(amount=count)

    # Executions; from any thread.

    def ended(self, tool: str, status: ExecutionStatus, duration_us: int, *, is_recording: bool = False) -> None:
        """Count an execution, or a client's transaction, that has ended.

        Args:
            tool: Its tool.
            status: How it ended.
            duration_us: How long it took, in microseconds.
            is_recording: Whether it is a recording of a client, which may have any name.
        """
        is_transaction = tool == TRANSACTION and not is_recording
        with self._lock:
            if is_transaction:
                self._transactions.add(status.value)
            else:
                label = RECORDING if is_recording else self._tools.label(tool)
                self._executions.add(label, status.value)
                self._execution_s.of(label).observe(duration_us / 1e6)
            if status is ExecutionStatus.CONFLICT:
                self._ended_in_conflict.add("transaction" if is_transaction else "execution")

    def repeated(self) -> None:
        """Count a request whose execution was recorded under its key."""
        with self._lock:
            self._repeated.add("execution")

    def not_begun(self, error: StateError) -> None:
        """Count a request that was refused before an execution began."""
        with self._lock:
            self._refusals.add(type(error).__name__)

    def denied(self, missing: str) -> None:
        """Count a refusal because of who made a call; from any thread. `missing`: see `Refused`."""
        known = (reason for begin, reason in _REASONS if missing.startswith(begin))
        with self._lock:
            self._denials.add(missing if missing.startswith(_SCOPE) else next(known, "credentials"))

    # Calls of language models

    def lm_called(self, tool: str, call: LmCounts) -> None:
        """Count a recorded call of a language model; from any thread."""
        outcome = "error" if call.failed else "cached" if call.cached else "ok"
        with self._lock:
            labels = (self._models.label(call.model), self._lm_tools.label(tool))
            self._lm_calls.add(*labels, outcome)
            for kind, tokens in (("input", call.input_tokens), ("output", call.output_tokens)):
                self._lm_tokens.add(*labels, kind, amount=max(tokens, 0))
            if call.cost is not None:
                self._lm_cost.add(*labels, amount=max(call.cost, 0.0))
            if call.latency_us is not None and not call.cached:
                self._lm_s.of(labels[0]).observe(max(call.latency_us, 0) / 1e6)
