"""Which tool's execution, or transaction, the running code is part of, so that reads of its session can join it."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

from dspex_persist.cognitive.steps import Asked, Step, Work, run_work, run_work_aio
from dspex_persist.cognitive.variables import Variables
from dspex_persist.state.around import Around
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.tools.session import ToolSession, current_session


class InExecution(Variables):
    """The variables of a session in the execution of a tool. Commands run on the execution's copy in memory."""

    def __init__(self, session: ToolSession) -> None:
        self._session = session
        self.session_id = session.session_id
        self.strict = True

    def _run_step(self, step: Step) -> Any:
        """See `Runs`."""
        if isinstance(step, Work):
            return run_work(step)
        return self._run(step)

    async def _run_step_aio(self, step: Step) -> Any:
        """See `Runs`."""
        if isinstance(step, Work):
            return await run_work_aio(step)
        return self._run(step)

    def _run(self, step: Command[Any] | Asked) -> Any:
        if not isinstance(step, Asked):
            return self._session.run(step)
        if step.terms.actor is not None or step.terms.idempotency_key is not None:
            raise InvalidArgumentError("actor", "what a tool does is done by the caller of the tool, under its key")
        return self._session.run(step.command, reason=step.terms.reason)


class InTransaction(Variables):
    """The variables of a session in a transaction."""

    _asker: ToolSession | None = None
    """The session of the tool whose code has begun it, if a tool's code has."""

    @abstractmethod
    def _is_open_on(self, session_id: str, provider: StateProvider) -> bool:
        """Whether it is open, and of this session of this provider."""

    @property
    @abstractmethod
    def execution_id(self) -> str:
        """Its id in the journal."""

    @property
    @abstractmethod
    def status(self) -> str:
        """How it ended, as far as is known; "" before."""

    @property
    @abstractmethod
    def _is_remote(self) -> bool:
        """Whether it is on a server."""

    @abstractmethod
    def _check_budgets(self) -> None:
        """Check whether an LM call may be made; see `abilities.Transaction.check_budgets`."""

    @abstractmethod
    def _record_input(self, kind: str, entry: Mapping[str, Any]) -> None:
        """Record an input from outside in its journal entry; see `abilities.Transaction.record`."""


open_transactions: Final[ContextVar[tuple[InTransaction, ...]]] = ContextVar(
    "dspex_persist_open_transactions", default=()
)
"""The transactions in whose blocks the code of this context runs, the innermost last."""


def transaction_of(session_id: str, provider: StateProvider) -> InTransaction | None:
    """Return the transaction of a session in whose block the running code is; None in a tool that it has called."""
    session = current_session.get()
    for transaction in reversed(open_transactions.get()):
        if transaction._asker is session and transaction._is_open_on(session_id, provider):
            return transaction
    return None


class Surroundings(NamedTuple):
    """What code is part of.

    Attributes:
        session: The session of the tool's execution, if it is a tool's code.
        transactions: The transactions in whose blocks it runs, the innermost last.
    """

    session: ToolSession | None
    transactions: tuple[InTransaction, ...]


NOTHING: Final = Surroundings(None, ())


def surroundings() -> Surroundings:
    """Return what the running code is part of. Threads that it starts do not know it by themselves."""
    session, transactions = current_session.get(), open_transactions.get()
    return NOTHING if session is None and not transactions else Surroundings(session, transactions)


def joined(ctx: Variables, around: Surroundings) -> Variables:
    """Return where to read variables of a context: the execution or the transaction around, if it is of that session.

    Args:
        ctx: The context. That of a tool, and a transaction, is part of itself only.
        around: What the code is part of.
    """
    provider = None if around is NOTHING else ctx._provider
    if provider is None:
        return ctx
    session = around.session
    for transaction in reversed(around.transactions):
        # Others are around the call of the tool, whose execution is part of them.
        if transaction._asker is session and transaction._is_open_on(ctx.session_id, provider):
            return transaction
    if session is None or session.cancelled or session.session_id != ctx.session_id:
        return ctx
    # In a replay the recording stands for every backend.
    is_same = not isinstance(session.store, StateProvider) or session.store in _layers(provider)
    return InExecution(session) if is_same else ctx


def _layers(provider: StateProvider) -> Iterator[StateProvider]:
    yield provider
    while isinstance(provider, Around):
        provider = provider.provider
        yield provider
