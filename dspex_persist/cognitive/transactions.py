"""Transactions of contexts, which take effect as a whole, and contexts that go back to what they were, or fork."""

import asyncio
import random
import secrets
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Final, NoReturn, Self, TypeVar

from dspex_persist.cognitive import lm_guard
from dspex_persist.cognitive.backends import BRIDGED, Backend, origin_of
from dspex_persist.cognitive.errors import ContextClosedError
from dspex_persist.cognitive.joining import InTransaction, open_transactions
from dspex_persist.cognitive.program_access import WithPrograms
from dspex_persist.cognitive.records import result_of
from dspex_persist.cognitive.steps import Asked, Step, Steps, Terms, Work, ask, run_work, run_work_aio, verb, work
from dspex_persist.infra.mailbox import LoopMailbox
from dspex_persist.state import abilities, arguments, commands, values
from dspex_persist.state.abilities import Forkable, Restorable, Transacts
from dspex_persist.state.audit import PointLike, point_text
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import (
    EngineClosedError,
    ExecutionConflictError,
    InvalidArgumentError,
    StateError,
    TransactionEndedError,
)
from dspex_persist.state.model import ExecutionStatus, Isolation, Origin, RestoredSession
from dspex_persist.state.provider import TOOL_TIMEOUT_S, StateProvider, SubmitHere
from dspex_persist.state.tools.ports import ToolCode, name_of
from dspex_persist.state.tools.session import current_session, enter_block, leave_block

R = TypeVar("R")

RETRIES: Final = 10
"""How often `transactions` repeats by default after a conflict."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.25


class Transaction(WithPrograms, InTransaction):
    """Several reads and writes of a session that take effect together, or not at all.

    It begins and ends with a block: `with ctx.transaction() as tx:`, or `async with`. In the block, `tx` has the verbs
    of the context. Reads come from a snapshot, with the transaction's own writes on top; others see nothing of it. At
    the end of the block everything is committed, in one commit, under the conflict rules of tools. If the block raises,
    nothing is written. Usable from any thread in the block.

    Attributes:
        attempt: 1, or more if `transactions` repeats it after a conflict.
        commit_sequence: The number of its commit, once it has committed.
    """

    def __init__(
        self,
        context: "Transacting",
        terms: Terms,
        isolation: Isolation | str,
        timeout_s: float,
        metadata: Mapping[str, str] | None,
        *,
        attempt: int = 1,
        is_last: bool = True,
    ) -> None:
        self.session_id = context.session_id
        self.strict = context.strict
        self.attempt = attempt
        self.commit_sequence: int | None = None
        self._context = context
        self._backend = context._backend
        self._gate = context._backend.gate
        self._terms = terms
        self._options: dict[str, Any] = {"isolation": isolation, "timeout_s": timeout_s, "metadata": metadata}
        self._is_last = is_last
        self._opened: abilities.Transaction | None = None
        self._loop: tuple[asyncio.AbstractEventLoop, SubmitHere] | None = None
        # What ends the recording of the block's LM calls in it.
        self._undo: Callable[[], None] | None = None

    # Verbs

    @verb
    def call(self, tool: ToolCode | str, /, **arguments: object) -> Steps[Any]:
        """Execute a tool as part of the transaction.

        Args:
            tool: The tool, or its name.
            arguments: The tool's arguments by name.

        Returns:
            The result of the tool, or None if it has none.

        Raises:
            StateError: The tool failed, and wrote nothing. The transaction goes on if you catch the error.
        """
        command = commands.ExecuteTool(self.session_id, name_of(tool), values.encode_arguments(arguments))
        return result_of((yield from ask(command)))

    def _run_step(self, step: Step) -> Any:
        """See `Runs`."""
        if isinstance(step, Work):
            return run_work(step)
        begun = self._usable
        command, origin = self._asked(step)
        try:
            return begun.submit(command, origin).result()
        except (EngineClosedError, TransactionEndedError):
            self._check_context()
            raise

    async def _run_step_aio(self, step: Step) -> Any:
        """See `Runs`."""
        if isinstance(step, Work):
            return await run_work_aio(step)
        begun = self._usable
        loop = asyncio.get_running_loop()
        if self._loop is None or self._loop[0] is not loop:
            self._loop = loop, begun.on_loop(LoopMailbox(loop))
        command, origin = self._asked(step)
        try:
            return await self._loop[1](command, origin)
        except (EngineClosedError, TransactionEndedError):
            self._check_context()
            raise

    def _asked(self, step: Command[Any] | Asked) -> tuple[Command[Any], Origin | None]:
        if not isinstance(step, Asked):
            return step, None
        actor, reason, key, optimizer_id = step.terms
        if actor is not None or key is not None:
            raise InvalidArgumentError(
                "actor" if actor is not None else "idempotency_key", "a transaction has one for all that it does"
            )
        if reason is None and optimizer_id is None:
            return step.command, None
        return step.command, origin_of(self._backend.provider, step.command, step.terms)

    def _check_context(self) -> None:
        if self._context.closed:
            # Whatever else has come of it: this is why.
            raise ContextClosedError(self.session_id) from None

    # Beginning and ending

    @property
    def _usable(self) -> abilities.Transaction:
        begun = self._begun
        if not begun.is_decided:
            self._check_context()
        return begun

    @property
    def _begun(self) -> abilities.Transaction:
        if self._opened is None:
            raise InvalidArgumentError(
                "transaction", "it has not begun: use it in a block, with ctx.transaction() as tx"
            )
        return self._opened

    @property
    def execution_id(self) -> str:
        """Its id in the journal."""
        return self._begun.execution_id

    @property
    def status(self) -> str:
        """How it ended, as far as is known: "committed", "conflict", "failed", "unknown", ...; "" before."""
        return "" if self._opened is None else self._opened.status

    @verb
    def commit(self) -> Steps[int]:
        """Commit before the end of the block, after which the transaction cannot be used; return the commit's number.

        Raises:
            ExecutionConflictError: Others have changed what the transaction depends on; nothing was written.
            RuleViolatedError: A rule of the session does not hold after its changes; nothing was written.
            TransactionEndedError: It has ended before.
            ContextClosedError: The context was closed; nothing was written.
        """
        self.commit_sequence = yield from work(self._usable.commit)
        return self.commit_sequence

    @verb
    def abort(self) -> Steps[None]:
        """End the transaction without writing anything; does nothing if it has ended."""
        try:
            yield from work(self._begun.abort)
        except EngineClosedError:
            # It has ended with the backend.
            return

    def _submit(self) -> "Future[abilities.Transaction]":
        self._check_context()
        if self._opened is not None:
            raise InvalidArgumentError("transaction", "it has begun before: each block needs a new one")
        provider = self._backend.provider
        origin = provider.origin("BeginTransaction", actor=self._terms.actor, reason=self._terms.reason)
        return Transacts.of(provider).submit_transaction(self.session_id, **self._options, origin=origin)

    def _pause_s(self) -> float:
        """How long to wait before it begins: random, so that those that conflicted do not do so again."""
        return random.uniform(0, min(_FIRST_PAUSE_S * 2.0**self.attempt, _LONGEST_PAUSE_S)) if self.attempt > 1 else 0.0

    def _ending(self, error: BaseException | None) -> "Future[Any] | None":
        """Begin to end it as its block does; None if it was committed or aborted in the block."""
        opened = self._begun
        if error is not None:
            return opened.submit_abort(error)
        if opened.is_decided:
            return None
        if self._context.closed:
            # Others may have closed it in the middle of the block, which then has written half of what it should.
            return opened.submit_abort(ContextClosedError(self.session_id))
        return opened.submit_commit()

    def _settle(self, error: BaseException | None, result: Callable[[], Any]) -> None:
        """Take the result of the end of the block, whose own error was `error`."""
        try:
            ended = result()
        except ExecutionConflictError:
            if self._is_last:
                raise
        except StateError:
            if error is not None:
                # The block's own error says what went wrong first, and nothing is written.
                return
            self._check_context()
            raise
        else:
            if error is not None:
                return
            if ended is None:
                self._check_context()
            self.commit_sequence = ended

    def _is_open_on(self, session_id: str, provider: StateProvider) -> bool:
        if self.session_id != session_id or self._backend.provider is not provider:
            return False
        opened = self._opened
        return opened is not None and not opened.is_decided and not opened.status

    def _enter_block(self, opened: abilities.Transaction) -> None:
        self._gate.let_in()
        enter_block(opened.execution_id)
        self._asker = current_session.get()
        open_transactions.set((*open_transactions.get(), self))
        if lm_guard.redirect is not None:
            self._undo = lm_guard.redirect(self)

    def _leave_block(self) -> None:
        if self._undo is not None:
            self._undo()
        open_transactions.set(tuple(each for each in open_transactions.get() if each is not self))
        leave_block(self.execution_id)
        self._gate.let_out()
        self._gate.leave_tool()

    @property
    def _is_remote(self) -> bool:
        return self._backend.kind == BRIDGED

    def _check_budgets(self) -> None:
        self._begun.check_budgets()

    def _record_input(self, kind: str, entry: Mapping[str, Any]) -> None:
        self._begun.record(kind, entry)

    def __enter__(self) -> Self:
        time.sleep(self._pause_s())
        # A move of the session waits for its transactions, as it does for tools.
        self._gate.enter_tool()
        try:
            self._opened = self._submit().result()
        except BaseException:
            self._gate.leave_tool()
            raise
        self._enter_block(self._opened)
        return self

    async def __aenter__(self) -> Self:
        await asyncio.sleep(self._pause_s())
        if not self._gate.enter_tool(wait=False):
            await asyncio.to_thread(self._gate.enter_tool)
        try:
            self._opened = await asyncio.wrap_future(self._submit())
        except BaseException:
            self._gate.leave_tool()
            raise
        self._enter_block(self._opened)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            ending = self._ending(error)
            if ending is not None:
                self._settle(error, ending.result)
        finally:
            self._leave_block()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            ending = self._ending(error)
            if ending is not None:
                # The end is not cancelled with its caller, who would not know how the transaction has ended.
                ended = asyncio.wrap_future(ending)
                # `_settle` takes the error, but asyncio would log that nobody has asked this future for it.
                ended.add_done_callback(lambda each: each.cancelled() or each.exception())
                await asyncio.wait((ended,))
                self._settle(error, ending.result)
        finally:
            self._leave_block()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a transaction cannot be copied, pickled, or sent to another process: it belongs to its block; dict(tx) "
            "copies the values, and ctx.transaction() begins another one"
        )

    def __repr__(self) -> str:
        return f"<Transaction on session {self.session_id!r}{f', {self.status}' if self.status else ''}>"


class Transacting(WithPrograms):
    """The verbs of a context about the session as a whole: transactions, and its state in the past."""

    _backend: Backend

    @property
    def _provider(self) -> StateProvider | None:
        return self._backend.provider

    _terms: Terms

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether it was closed."""

    def transaction(
        self,
        *,
        isolation: Isolation | str = Isolation.SERIALIZABLE,
        timeout_s: float = TOOL_TIMEOUT_S,
        metadata: Mapping[str, str] | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> Transaction:
        """Return a transaction, which begins and ends with a block: `with ctx.transaction() as tx:`, or `async with`.

        At the end of the block, everything that `tx` has written is committed, in one commit. If others have changed
        what it has read or written meanwhile, `ExecutionConflictError` is raised and nothing is written; nor if the
        block raises.

        Args:
            isolation: What others must not change: all that it reads and writes ("serializable"), or only what it
                writes ("snapshot").
            timeout_s: How long it may last, in seconds.
            metadata: Texts to record with it in the journal.
            reason: Why it writes; by default the history says nothing.
            actor: Who writes; by default the actor of the context.
        """
        return Transaction(self, self._terms_of(actor, reason), isolation, timeout_s, metadata)

    def transactions(
        self,
        *,
        retries: int = RETRIES,
        isolation: Isolation | str = Isolation.SERIALIZABLE,
        timeout_s: float = TOOL_TIMEOUT_S,
        metadata: Mapping[str, str] | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> Iterator[Transaction]:
        """Yield transactions until one of them does not conflict, to repeat a block:

            for tx in ctx.transactions():
                with tx:
                    tx["stock"] -= 1

        Args:
            retries: How often to repeat it. The conflict of the last attempt is raised.
            isolation: As for `transaction`, and so are the others.
            timeout_s: How long each attempt may last, in seconds.
            metadata: Texts to record with it in the journal.
            reason: Why it writes.
            actor: Who writes.
        """
        # Below 0, the block would never run, and nobody would notice.
        terms, most = self._terms_of(actor, reason), arguments.repetitions("retries", retries)
        for attempt in range(1, most + 2):
            transaction = Transaction(
                self, terms, isolation, timeout_s, metadata, attempt=attempt, is_last=attempt > most
            )
            yield transaction
            if transaction.status != ExecutionStatus.CONFLICT:
                return

    # The session in the past

    @verb
    def rollback_to(
        self, point: PointLike, *, reason: str | None = None, actor: str | None = None
    ) -> Steps[RestoredSession]:
        """Bring all variables, dependencies and rules back to what they were at a point, in one commit.

        Variables that still exist get a new version with the old value, constraints and metadata. Those that were
        deleted since come back as new ones, and those that were defined since are deleted.

        Args:
            point: A commit's number, the id of an execution (right after it ended), a time, an age (`"2h"`, or a
                timedelta); a text may end with `^` for right before it.
            reason: Why. The history keeps it.
            actor: Who asks for it; by default the actor of the context.

        Returns:
            The number of the commit, the commit that it went back to, and the names of what has changed.

        Raises:
            InvalidArgumentError: It is not a point, or is before the session began.
            VariableLockedError: An optimizer holds a variable that would change.
            UnsupportedError: The backend cannot.
        """
        at, terms = point_text(point, "point"), self._terms_of(actor, reason)
        if not at.strip():
            raise InvalidArgumentError("point", "it must not be empty")
        restored: RestoredSession = yield from work(self._through_gate, self._restore, at, terms)
        return restored

    def _restore(self, at: str, terms: Terms) -> RestoredSession:
        provider = self._backend.provider
        origin = provider.origin("RestoreSession", actor=terms.actor, reason=terms.reason)
        return Restorable.of(provider).restore_session(self.session_id, at, origin=origin)

    @verb
    def fork(
        self,
        session_id: str | None = None,
        *,
        at: PointLike = "",
        reason: str | None = None,
        actor: str | None = None,
    ) -> Steps[Self]:
        """Begin a new session with the variables, dependencies and rules that this one had at a point.

        Args:
            session_id: The id of the new session; None makes one up.
            at: The point, as for `rollback_to`; "" for now.
            reason: Why. The history of the new session keeps it.
            actor: Who asks for it; by default the actor of the context.

        Returns:
            A context of the new session, on the backend that this one is on now, which it does not close.

        Raises:
            SessionExistsError: A live session has the id.
            InvalidArgumentError: `at` is not a point, or is before the session began.
            UnsupportedError: The backend cannot.
        """
        new = f"ses_{secrets.token_hex(8)}" if session_id is None else session_id
        yield from work(self._through_gate, self._fork, new, point_text(at, "at"), self._terms_of(actor, reason))
        return self._beside(new)

    def _fork(self, new: str, at: str, terms: Terms) -> None:
        provider = self._backend.provider
        origin = provider.origin("ForkSession", actor=terms.actor, reason=terms.reason)
        Forkable.of(provider).fork_session(self.session_id, new, at, origin=origin)

    @abstractmethod
    def _beside(self, session_id: str) -> Self:
        """Return a context of another session on the same provider."""

    def _through_gate(self, call: Callable[..., R], *arguments: Any) -> R:
        if self.closed:
            raise ContextClosedError(self.session_id)
        return self._backend.gate.pass_through(lambda: call(*arguments))

    def _terms_of(self, actor: str | None, reason: str | None) -> Terms:
        return Terms(self._terms.actor if actor is None else actor, reason)
