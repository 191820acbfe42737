"""Abilities: what a backend can do beyond the common contract. A backend inherits from the class of each of its own.

`isinstance(state, Recordable)` tells whether a provider has one. `Recordable.of(state)` returns the provider as one
that has it, or raises `UnsupportedError`, which says what to do instead. A wrapper such as `WithTools` has the
abilities of the provider that it wraps. `dspex_persist.testing` has a test suite for each ability.
"""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import Any, ClassVar, Final, Self, TypeVar, Unpack

from dspex_persist.state import arguments, commands, values
from dspex_persist.state.audit import AuditSource
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import InvalidArgumentError, TransactionEndedError, UnsupportedError
from dspex_persist.state.model import (
    RECORDING,
    ExecutionStatus,
    ImportedSession,
    Isolation,
    Origin,
    PrunePolicy,
    PruneReport,
    RestoredSession,
    SessionView,
    ToolOutcome,
    ToolSpec,
)
from dspex_persist.state.provider import (
    TOOL_TIMEOUT_S,
    Capable,
    Progress,
    StateProvider,
    Submits,
    Who,
    or_empty,
    silent,
)
from dspex_persist.state.recording import ContentHash, Header, RecordedCommit

R = TypeVar("R")

_REPORT_EVERY: Final = 100


class Ability(ABC, Capable):
    """The base of all abilities.

    Attributes:
        lacking: What a provider without the ability does not support, for the error message.
        instead: What to do instead, for the error message.
    """

    lacking: ClassVar[str]
    instead: ClassVar[str]

    @classmethod
    def of(cls, state: object) -> Self:
        """Return `state` if it has this ability, or raise `UnsupportedError`."""
        if not isinstance(state, cls):
            raise UnsupportedError(cls.lacking, cls.instead)
        return state


class Durable(Ability):
    """Acknowledged writes survive the end of the process that stores them."""

    lacking = "state that outlives its process"
    instead = "open a database file: connect(path)"
    gives: ClassVar[tuple[str, ...]] = ("durable",)


class KeepsOrder(Ability):
    """Commands take effect in the order in which they were submitted, even before the earlier ones are answered.

    Calls to another process can overtake each other: without this ability, wait for a command's result before you
    submit one that depends on it.
    """

    lacking = "the order of commands that are not answered yet"
    instead = "wait for each command's result before you submit the next one"


class Auditable(Ability):
    """The history can be queried: all of it, but in memory that of sessions that are live or have just ended."""

    lacking = "audits"
    instead = "keep the sessions in a database file or in PostgreSQL, or on a server that does"
    gives: ClassVar[tuple[str, ...]] = ("audit",)

    @abstractmethod
    def audit(self, *, reveal: bool = False) -> AuditSource:
        """Return the history for queries.

        Args:
            reveal: Show the values of sensitive variables, which are masked otherwise. A server allows it only if it
                was started with `audit_reveal`.

        Returns:
            The audit source. Close it when done.
        """


class Recordable(Ability):
    """A session's whole log can be read, to export or replay it."""

    lacking = "recordings"
    instead = "keep the sessions in a database file or in PostgreSQL, or on a server that does"
    gives: ClassVar[tuple[str, ...]] = ("recordings",)

    @abstractmethod
    def record(
        self, session_id: str, *, started: int | None = None, reveal: bool = False, after: int = 0
    ) -> tuple[Header, Iterator[RecordedCommit]]:
        """Read the whole log of a session, live or ended; a backend in memory has only live ones.

        Args:
            session_id: The session's id.
            started: The number of its first commit, to select one of several sessions with this id; the newest if None.
            reveal: Include the values of sensitive variables, which are left out otherwise. A server allows it only if
                it was started with `audit_reveal`.
            after: Leave out the commits up to this number, counted within the session, because the caller has them.

        Returns:
            The header, which counts all commits, and an iterator that reads them on demand, oldest first.

        Raises:
            NotInHistoryError: The history has no such session.
            SessionPrunedError: Parts of the session's history were pruned.
            InvalidArgumentError: No session with this id began with commit `started`.
        """

    def content_hash(self, session_id: str, *, started: int | None = None) -> str:
        """Return the hash of a session's whole history, which does not depend on where it is; see `ContentHash`.

        Args:
            session_id: The session's id.
            started: The number of its first commit, as for `record`.

        Raises:
            NotInHistoryError: The history has no such session.
            SessionPrunedError: Parts of the session's history were pruned.
            InvalidArgumentError: No session with this id began with commit `started`.
        """
        return self._hash_content(session_id, started).hexdigest()

    def _hash_content(self, session_id: str, started: int | None) -> ContentHash:
        """Read the whole history for its hash; a backend may do so without the parts of a recording."""
        content = ContentHash()
        for commit in self.record(session_id, started=started, reveal=True)[1]:
            content.add(commit)
        return content


class SessionImport(ABC):
    """An import in progress, to which the commits come one by one. Close it, for example with a `with` block."""

    @property
    @abstractmethod
    def content_hash(self) -> str:
        """The hash of the commits that were added so far, see `ContentHash`."""

    @abstractmethod
    def add(self, commit: RecordedCommit) -> None:
        """Add the next commit. It is checked, here or by `finish` at the latest."""

    def write_ahead(self) -> None:  # noqa: B027 - optional
        """Write commits as they are added, so that `finish` has less to do. Nobody sees them before that.

        Other writers of the backend wait until the import has ended, so this is for one that nobody else uses.
        """

    def check(self) -> None:  # noqa: B027 - optional
        """Do what can be done before `finish`, which then takes less time, for those who do not have to wait yet."""

    def extend(self, header: Header) -> bool:
        """Expect more commits, because the session went on after it was recorded.

        Args:
            header: The header of a longer recording, which begins with the commits that were added.

        Returns:
            Whether that is possible; if not, begin another import.
        """
        return False

    @abstractmethod
    def finish(self) -> ImportedSession:
        """Import the session, now that every commit was added."""

    @abstractmethod
    def close(self) -> None:
        """End the import. If it was not finished, nothing is imported."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Importable(Ability):
    """A recorded session can be imported with its whole history, while the provider serves other callers."""

    lacking = "imports of sessions"
    instead = "keep the sessions in a database file, in memory or on a server"
    gives: ClassVar[tuple[str, ...]] = ("imports",)

    @abstractmethod
    def begin_import(self, header: Header, session_id: str | None = None) -> SessionImport:
        """Begin to import a recorded session, as `import_session` does, for commits that come one by one."""

    def import_session(
        self,
        header: Header,
        commits: Iterable[RecordedCommit],
        *,
        session_id: str | None = None,
        progress: Progress = silent,
    ) -> ImportedSession:
        """Import a recorded session: all of it or nothing.

        Its commits get new numbers at the end of the log, and keep their times, actors and causes. Answers under
        idempotency keys are imported as well, unless the session gets another id. Executions that were running when it
        was recorded become interrupted. A session that had not ended continues, and its TTL restarts.

        Everything is checked before the writer's turn comes, so other callers' writes only wait while the new commits
        are written. Memory holds some megabytes of the recording at a time.

        Args:
            header: The header of the recording.
            commits: Its commits, which are iterated over once. An exception that the iterator raises is passed on, and
                nothing is imported.
            session_id: The id of the new session; None to keep the recorded one.
            progress: Called with the number of commits checked so far. An exception that it raises ends the import.

        Returns:
            The imported session.

        Raises:
            RecordingError: The recording is incomplete or inconsistent, lacks values that were left out, or exceeds a
                limit. `line` is the line that it has in a file.
            SessionExistsError: A live session has the id.
        """
        with self.begin_import(header, session_id) as begun:
            for commit in reported("importing commits", commits, header.commits, progress):
                begun.add(commit)
            return begun.finish()


def reported(step: str, commits: Iterable[RecordedCommit], in_all: int, progress: Progress) -> Iterator[RecordedCommit]:
    """Report the progress of a step every now and then while the commits are iterated over."""
    for commit in commits:
        if commit.number % _REPORT_EVERY == 1:
            progress(step, commit.number - 1, in_all)
        yield commit
    progress(step, in_all, in_all)


class SessionHold(ABC):
    """A session whose writers wait. Close it, for example with a `with` block; then they go on."""

    @abstractmethod
    def move(self, moved_to: str) -> None:
        """End the session here, as it goes on elsewhere. Its history stays.

        Those who waited get a `SessionMovedError`, which says where.

        Args:
            moved_to: Where it is now, in words.

        Raises:
            OutcomeUnknownError: The connection to a server broke: it may have ended there, or not.
            StateError: It has not ended.
        """

    @abstractmethod
    def close(self) -> None:
        """End the hold. Closing it twice, or after `move`, is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Holdable(Ability):
    """The writers of a session can be made to wait while it is moved."""

    lacking = "holds of sessions"
    instead = (
        "move sessions that are in memory, in a database file, in PostgreSQL, Redis or Valkey, or on a server on one "
        "of these; from elsewhere, export and import them"
    )

    @abstractmethod
    def hold_session(self, session_id: str, *, timeout_s: float = 30.0, origin: Origin | None = None) -> SessionHold:
        """Have all writers of a live session wait, whoever they are, until the hold is closed. Reads go on.

        It first waits for the tools that run in the session, while no new ones begin. A hold is no part
        of the history. If the process ends, or forgets the hold, so does the hold: on a log that servers share, when
        the lease of its server is over. On a server, it also ends after five minutes.

        Args:
            session_id: The session's id.
            timeout_s: How long to wait for running tools, in seconds.
            origin: Who moves it; the provider's default if None.

        Raises:
            SessionNotFoundError: There is no such live session.
            SessionHeldError: Somebody holds it already.
            UnavailableError: A tool was still running after `timeout_s`.
        """


class Derives(Ability):
    """Variables can be computed from others by functions of this process, in the same commit."""

    lacking = "derived variables"
    instead = "derive them in the process that has the sessions, or compute them in a watch: ctx.watch(..., on_change=)"
    gives: ClassVar[tuple[str, ...]] = ("derivations",)

    @abstractmethod
    def add_derivation(self, session_id: str, derivation: commands.Derivation) -> Callable[[], None]:
        """Have a variable computed whenever one of those that it is computed from changes, whoever changes it.

        It lasts until it is removed, the session ends, or the provider is closed: a function cannot be stored.

        Args:
            session_id: The session.
            derivation: How; it replaces one with the same target.

        Returns:
            A function that removes it again; the variable keeps its value.

        Raises:
            DerivationError: The variable would depend on itself.
        """


class Forkable(Ability):
    """A new session can begin with the state that another one had at some point."""

    lacking = "forks of sessions"
    instead = "keep the sessions in a database file or in PostgreSQL, or on a server that does"
    gives: ClassVar[tuple[str, ...]] = ("forks",)

    @abstractmethod
    def fork_session(
        self, session_id: str, new_session_id: str, at: str = "", *, origin: Origin | None = None
    ) -> SessionView:
        """Begin a session with the variables that another one had at some point, each at version 0.

        A server copies sensitive variables only if it was started with `audit_reveal`.

        Args:
            session_id: The session to fork.
            new_session_id: The id of the new session.
            at: A point, as in audits: a commit, an execution's id, a time or an age, with `^` for right before it; ""
                for now.
            origin: Who makes the request; the provider's default if None.

        Returns:
            The new session.

        Raises:
            SessionExistsError: A live session has the new id.
            NotInHistoryError: The history has no such session or execution.
            InvalidArgumentError: `at` is not a point.
        """


def unkeyed(origin: Origin | None) -> Origin | None:
    """Return the origin without its idempotency key, for a request that means something else each time."""
    return origin if origin is None or origin.idempotency_key is None else replace(origin, idempotency_key=None)


class Restorable(Ability):
    """A whole session can be brought back to an earlier state."""

    gives: ClassVar[tuple[str, ...]] = ("restores",)
    lacking = "restoring sessions"
    instead = "keep the sessions in memory, in a database file or in PostgreSQL, or on a server that does"

    @abstractmethod
    def restore_session(self, session_id: str, at: str, *, origin: Origin | None = None) -> RestoredSession:
        """Bring the variables, dependencies and rules of a session back to what they were at a point, in one commit.

        Variables that still exist get a new version with the old value, constraints and metadata. Those that were
        deleted since come back as new variables, and those that were registered since are deleted. Tools and locks
        stay, and so does that a variable is sensitive.
        Executions that have read or written what changes end in a conflict, as after any other write.

        Args:
            session_id: The session, which must be live.
            at: A point, as in audits: a commit, an execution's id, a time or an age, with `^` for right before it.
            origin: Who makes the request; the provider's default if None. Without an idempotency key.

        Raises:
            SessionNotFoundError: The session does not exist, or has ended.
            InvalidArgumentError: `at` is not a point, or is before the session began.
            NotInHistoryError: The history has no such execution.
            VersionPrunedError: A value of then was pruned.
            VariableLockedError: An optimizer holds a variable that would change.
        """


class Prunable(Ability):
    """Old history can be deleted."""

    lacking = "pruning"
    instead = "keep the sessions in a database file or in PostgreSQL, or on a server that does"
    gives: ClassVar[tuple[str, ...]] = ("pruning",)

    @abstractmethod
    def prune(self, policy: PrunePolicy, *, confirm: bool, progress: Progress = silent) -> PruneReport:
        """Permanently delete history. Reads and writes continue meanwhile.

        A server does this for clients only if it was started with `audit_prune`.

        Args:
            policy: Which history to delete.
            confirm: Whether to delete it; False only reports how much that would be.
            progress: Called with a summary so far, the number of variables done, and the number of all. An exception
                that it raises stops the pruning; history deleted until then stays deleted.

        Returns:
            How much was, or would be, deleted.
        """


class ExecutesTools(StateProvider, Ability):
    """It executes tools: each execution is one transaction, and runs once for an idempotency key."""

    lacking = "tools"
    instead = "wrap it: WithTools(provider, tools); or open one that executes them: connect(path, tools=...)"
    gives: ClassVar[tuple[str, ...]] = ("tools",)

    @abstractmethod
    def list_tools(self, session_id: str = "") -> tuple[ToolSpec, ...]:
        """Return the tools that a session can execute.

        A backend adds facts about a tool, such as where it runs, to its metadata, under keys that start with `dspex.`.

        Args:
            session_id: The session; "" for the tools that every session can execute.
        """

    def execute_tool(
        self,
        session_id: str,
        tool: str,
        parameters: Mapping[str, object] | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        timeout_s: float = TOOL_TIMEOUT_S,
        **who: Unpack[Who],
    ) -> ToolOutcome:
        """Execute a tool as one transaction.

        Args:
            session_id: The session.
            tool: The tool's name.
            parameters: Arguments by parameter name.
            metadata: Texts to record with the execution.
            idempotency_key: With the same key, the tool runs only once; repeated calls get the same outcome.
            timeout_s: How long the caller waits, in seconds; then the execution ends as `timed_out`. A shorter timeout
                of the tool applies as well.
            who: `actor` and `reason`, see `Who`. They apply to everything that the tool writes.

        Returns:
            How the execution ended; a failed one has an `error`.
        """
        timeout_s = arguments.timeout("timeout_s", timeout_s)
        encoded = values.encode_arguments(arguments.mapping("parameters", or_empty(parameters)))
        command = commands.ExecuteTool(session_id, tool, encoded, or_empty(metadata), timeout_s)
        return self.run(command, idempotency_key, **who)


class StreamsTools(ExecutesTools):
    """It passes on the values that a tool yields while the tool runs."""

    lacking = "streams of tools"
    instead = "execute the tool, whose result is the list of what it yielded: execute_tool"

    @abstractmethod
    def stream_tool(
        self,
        session_id: str,
        tool: str,
        parameters: Mapping[str, object] | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
        **who: Unpack[Who],
    ) -> Iterator[object]:
        """Execute a tool that streams, and yield its values as they come.

        The execution begins when the first value is requested, and has committed when the iterator ends. A tool that
        does not stream yields its result, unless that is None. If the caller stops consuming values, the tool waits;
        closing the iterator ends the tool, and nothing is written.

        Raises:
            Exception: The error that `execute_tool` reports as the `error` of its outcome.
        """


_WHY_ENDED: Final[Mapping[str, str]] = {
    ExecutionStatus.INTERRUPTED.value: "the session or the server has ended",
    ExecutionStatus.TIMED_OUT.value: "it took longer than its timeout_s",
}


def transaction_ended(execution_id: str, status: str) -> TransactionEndedError:
    """Return the error for a transaction that has ended.

    Args:
        execution_id: Its id.
        status: How it has ended; "" if it is about to.
    """
    return TransactionEndedError(execution_id, status or "it is ending", _WHY_ENDED.get(status, ""))


class Transaction(Submits):
    """An open transaction of a client. Usable from any thread until it ends.

    Commands on variables run on a snapshot of the session and on what the transaction has written; others see nothing
    of it. `ExecuteTool` runs a tool as part of it. All other commands raise `UnsupportedError`.

    As a context manager it commits at the end of the block, unless it was committed or aborted in it, and aborts if the
    block raises. If it is forgotten, it ends and writes nothing.

    Attributes:
        session_id: The session.
        execution_id: Its id in the journal, where it is an execution of the tool "transaction".
    """

    def __init__(self, session_id: str, execution_id: str) -> None:
        self.session_id = session_id
        self.execution_id = execution_id
        self._decided = False

    @property
    def is_decided(self) -> bool:
        """Whether `commit` or `abort` was called."""
        return self._decided

    @property
    @abstractmethod
    def status(self) -> str:
        """How it ended, as far as is known here: an `ExecutionStatus`, or `UNKNOWN`; "" while it runs."""

    @abstractmethod
    def submit(self, command: Command[R], origin: Origin | None = None) -> Future[R]:
        """Run a command as part of the transaction; raises as `Submits.submit` does.

        The future fails with `TransactionEndedError` once the transaction has ended.
        """

    def run(self, command: Command[R]) -> R:
        """Run a command as part of the transaction, and wait for its result."""
        return self.submit(command).result()

    @abstractmethod
    def submit_record(self, kind: str, entry: Mapping[str, Any]) -> Future[None]:
        """Begin to record; the future ends as `record` does."""

    def record(self, kind: str, entry: Mapping[str, Any]) -> None:
        """Record an input from outside, such as a call of a language model, in the journal entry.

        It is kept however the transaction ends; on a server, even if this process disappears.

        Args:
            kind: The list in the journal's `recorded` to append to, such as "lm".
            entry: The input, as JSON objects.

        Raises:
            ExecutionEndedError: It has ended.
            LimitExceededError: The journal entry becomes too large.
        """
        self.submit_record(kind, entry).result()

    @abstractmethod
    def submit_check_budgets(self) -> Future[None]:
        """Begin to check the budgets; the future ends as `check_budgets` does."""

    def check_budgets(self) -> None:
        """Check before each call of a language model whether it may be made.

        Raises:
            BudgetExceededError: A budget of the session is used up by the calls that were recorded in it.
            ExecutionEndedError: It has ended.
        """
        self.submit_check_budgets().result()

    @abstractmethod
    def submit_commit(self) -> Future[int]:
        """Begin to commit; the future has the result of `commit`."""

    @abstractmethod
    def submit_abort(self, error: BaseException | None = None) -> Future[None]:
        """Begin to abort; the future ends as `abort` does."""

    def commit(self) -> int:
        """Commit everything that was written, in one commit.

        Returns:
            The number of the commit.

        Raises:
            ExecutionConflictError: Others have changed what the transaction depends on; nothing was written.
            RuleViolatedError: A rule of the session does not hold after its changes; nothing was written.
            TransactionEndedError: It has ended before.
            OutcomeUnknownError: The connection broke; the journal says whether it has committed.
        """
        self._decided = True
        return self.submit_commit().result()

    def abort(self, error: BaseException | None = None) -> None:
        """End it without writing anything; does nothing if it has ended.

        Args:
            error: The exception because of which it ends, for the journal: it then has failed, otherwise it is aborted.
        """
        self._decided = True
        self.submit_abort(error).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.abort(error)
        elif not self._decided:
            self.commit()


def part_of(transaction: Origin, origin: Origin | None) -> Origin:
    """Return the origin of a command in a transaction, which only one actor makes; its default reason is theirs.

    Args:
        transaction: The origin of the transaction.
        origin: That of the command, if it has one.
    """
    if origin is None:
        return transaction
    return replace(
        transaction,
        source=origin.source,
        optimizer_id=origin.optimizer_id,
        reason=origin.reason or transaction.reason,
    )


def new_recording_id() -> str:
    """Return an id for a recording: its executions get other ids when their session moves."""
    return f"rec_{secrets.token_hex(8)}"


def checked_kind(kind: object) -> str:
    """Return a kind of recorded inputs; `InvalidArgumentError` if it cannot be one."""
    name = arguments.text("kind", kind)
    if not name or name == "now":
        raise InvalidArgumentError("kind", f"{name!r} is not a kind of inputs that clients record, such as 'lm'")
    return name


class Transacts(StateProvider, Ability):
    """Clients can read and write a session in transactions, under the conflict rules of tools."""

    lacking = "transactions"
    instead = "wrap it: WithTools(provider); or open one that has them: connect(path), or a server"
    gives: ClassVar[tuple[str, ...]] = ("transactions",)

    @abstractmethod
    def submit_transaction(
        self,
        session_id: str,
        *,
        isolation: Isolation | str = Isolation.SERIALIZABLE,
        timeout_s: float = TOOL_TIMEOUT_S,
        metadata: Mapping[str, str] | None = None,
        origin: Origin | None = None,
    ) -> Future[Transaction]:
        """Begin to open a transaction; the future has the result of `begin_transaction`."""

    def begin_transaction(
        self,
        session_id: str,
        *,
        isolation: Isolation | str = Isolation.SERIALIZABLE,
        timeout_s: float = TOOL_TIMEOUT_S,
        metadata: Mapping[str, str] | None = None,
        origin: Origin | None = None,
    ) -> Transaction:
        """Open a transaction: an execution whose code is the caller's own.

        Several can be open on a session at once. Which of them can commit follows the rules of tool executions.

        Args:
            session_id: The session.
            isolation: What others must not change until it commits: all that it reads and writes ("serializable"), or
                only what it writes ("snapshot").
            timeout_s: How long it may last, in seconds; then it ends as `timed_out`, and nothing is written.
            metadata: Texts to record with it in the journal.
            origin: Who makes the request; the provider's default if None.

        Raises:
            SessionNotFoundError: The session does not exist, or has ended.
            InvalidArgumentError: An argument is wrong.
        """
        return self.submit_transaction(
            session_id, isolation=isolation, timeout_s=timeout_s, metadata=metadata, origin=origin
        ).result()

    @abstractmethod
    def submit_recording(
        self,
        session_id: str,
        name: str = RECORDING,
        *,
        metadata: Mapping[str, str] | None = None,
        origin: Origin | None = None,
    ) -> Future[Transaction]:
        """Begin to open a recording; the future has the result of `begin_recording`."""

    def begin_recording(
        self,
        session_id: str,
        name: str = RECORDING,
        *,
        metadata: Mapping[str, str] | None = None,
        origin: Origin | None = None,
    ) -> Transaction:
        """Open a recording: a transaction whose purpose is `Transaction.record`.

        Unlike others it waits for no execution, whatever concurrency the session demands, no execution waits for it,
        and it has no time limit. As long as it reads and writes nothing, it never conflicts.

        Args:
            session_id: The session.
            name: What the journal has as its tool.
            metadata: Texts to record with it in the journal.
            origin: Who makes the request; the provider's default if None.

        Raises:
            SessionNotFoundError: The session does not exist, or has ended.
            InvalidArgumentError: An argument is wrong.
        """
        return self.submit_recording(session_id, name, metadata=metadata, origin=origin).result()
