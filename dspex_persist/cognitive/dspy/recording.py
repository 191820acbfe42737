"""`ctx.recording()`: the LM calls of code that is no tool, in the journal of a session.

A recording is an execution of the journal that reads and writes nothing. A server has each call as soon as that is
over, and keeps it whatever becomes of this process. A file gets them when the execution ends, so a recording there
consists of parts: one ends when its oldest call has waited for `keep_after_s`, and the next call begins another. A part
also ends when its journal entry is full, and before its session moves to another backend.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, Self
from weakref import WeakKeyDictionary

from dspex_persist.cognitive import lm_guard
from dspex_persist.cognitive.backends import BRIDGED, EMBEDDED, Backend
from dspex_persist.cognitive.dspy import enforcing, hook
from dspex_persist.cognitive.dspy.hook import Recorder
from dspex_persist.cognitive.dspy.snapshots import binding_of
from dspex_persist.cognitive.joining import InTransaction, transaction_of
from dspex_persist.cognitive.steps import Terms
from dspex_persist.infra.logs import get_logger
from dspex_persist.state import abilities, arguments
from dspex_persist.state.abilities import Transacts, new_recording_id
from dspex_persist.state.errors import (
    ExecutionEndedError,
    InvalidArgumentError,
    LimitExceededError,
    ShuttingDownError,
    StateError,
    ToolInterruptedError,
    UnavailableError,
)
from dspex_persist.state.model import PART, RECORDING, RECORDING_ID, ExecutionStatus
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.tools.session import current_session

_PATIENCE_S, _PAUSE_S = 30.0, 0.1
"""How long a recording waits for a server that is away, and how often it asks, in seconds."""
KEEP_AFTER_S: Final = 30.0
"""How long calls may wait in this process, on a file, in seconds."""
_logger: Final = get_logger(__name__)


class Recording:
    """Records the LM calls of a block, in a `with` or `async with` statement: see `Context.recording`.

    Usable for one block. Calls that other threads and tasks make belong to it if they were started in the block; those
    that are still running at its end are not recorded.

    Attributes:
        session_id: The session whose journal has the calls.
        name: What the journal has as the tool.
    """

    def __init__(
        self,
        backend: Backend,
        session_id: str,
        terms: Terms,
        name: str = RECORDING,
        metadata: Mapping[str, str] | None = None,
        keep_after_s: float = KEEP_AFTER_S,
    ) -> None:
        self.session_id = session_id
        self.name = arguments.text("name", name)
        metadata = {} if metadata is None else arguments.metadata("metadata", metadata)
        keep_after_s = arguments.timeout("keep_after_s", keep_after_s)
        self._parts = _Parts(backend, session_id, terms, self.name, metadata, keep_after_s)
        self._recorder: Recorder | None = None
        self._undo: Callable[[], None] | None = None
        self._before = False

    @property
    def id(self) -> str:
        """Its id, which all its parts have in their metadata (`dspex.recording`)."""
        return self._parts.id

    @property
    def execution_id(self) -> str:
        """The id of the execution that has the calls; that of the first part, if there are several."""
        if self._recorder is None:
            raise InvalidArgumentError("recording", "it has not begun: use it in a block, with ctx.recording()")
        return self._recorder.sink.execution_ids[0]

    @property
    def execution_ids(self) -> tuple[str, ...]:
        """The ids of all its parts so far, in order."""
        return () if self._recorder is None else self._recorder.sink.execution_ids

    @property
    def _is_own(self) -> bool:
        """Whether it has an execution of its own."""
        return self._recorder is not None and self._recorder.sink is self._parts

    def _choose(self) -> None:
        if self._recorder is not None:
            raise InvalidArgumentError("recording", "it has begun before: each block needs a new one")
        self._recorder = self._given() or Recorder(self._parts)

    def _given(self) -> Recorder | None:
        """Return the recorder of the tool or the transaction whose code this is, which has the calls anyway."""
        recorder = hook.current_recorder()
        if recorder is not None and recorder.sink.is_tool and recorder.sink.is_open:
            return recorder
        transaction = transaction_of(self.session_id, self._parts.provider)
        return None if transaction is None else recorder_of(transaction)

    def _start(self) -> None:
        assert self._recorder is not None, "it was chosen"
        hook.install()
        self._undo = hook.start_recording(self._recorder)
        # Tools of this process that the block calls record their own.
        self._before = lm_guard.caller_is_recorded.get()
        lm_guard.caller_is_recorded.set(True)

    def _stop(self) -> None:
        if self._undo is not None:
            self._undo()
            lm_guard.caller_is_recorded.set(self._before)

    def __enter__(self) -> Self:
        self._choose()
        if self._is_own:
            self._parts.begin()
        self._start()
        return self

    async def __aenter__(self) -> Self:
        self._choose()
        if self._is_own:
            await asyncio.to_thread(self._parts.begin)
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if self._is_own:
            self._parts.end(error)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if self._is_own:
            await asyncio.to_thread(self._parts.end, error)

    def __repr__(self) -> str:
        about = f", {', '.join(self.execution_ids)}" if self.execution_ids else ""
        return f"<Recording {self.name!r} in session {self.session_id!r}{about}>"


class _Parts:
    """The executions of a recording, one after the other. Usable from any thread."""

    is_tool = False
    place = None

    def __init__(
        self,
        backend: Backend,
        session_id: str,
        terms: Terms,
        name: str,
        metadata: Mapping[str, str],
        keep_after_s: float,
    ) -> None:
        self.id = new_recording_id()
        self.execution_ids: tuple[str, ...] = ()
        self._backend = backend
        self._session_id = session_id
        self._terms = terms
        self._name = name
        self._metadata = metadata
        self._keep_after_s = keep_after_s
        self._lock = threading.Lock()
        self._part: abilities.Transaction | None = None
        self._count = 0
        self._timer: threading.Timer | None = None
        self._is_over = False

    @property
    def provider(self) -> StateProvider:
        """What its session is on."""
        return self._backend.provider

    @property
    def is_open(self) -> bool:
        """Whether its block has not ended."""
        return not self._is_over

    @property
    def is_quick(self) -> bool:
        """Whether a call can be kept without waiting."""
        return self._part is not None and self._backend.kind != BRIDGED and not self._backend.gate.held

    def begin(self) -> None:
        """Begin the first part."""
        self._backend.parked.add(self)
        self._through_gate(self._open)

    def admit(self) -> None:
        """Raise `BudgetExceededError` if no call may be made."""
        self._through_gate(self._admit)

    def put(self, kind: str, entry: Mapping[str, Any]) -> None:
        """Keep a call."""
        self._through_gate(lambda: self._put(kind, entry))

    def _through_gate(self, call: Callable[[], object]) -> None:
        def locked() -> None:
            with self._lock:
                call()

        self._backend.gate.pass_through(locked)

    def _open(self) -> abilities.Transaction:
        provider = self._backend.provider
        metadata = {**self._metadata, RECORDING_ID: self.id, PART: str(len(self.execution_ids) + 1)}
        origin = provider.origin("BeginTransaction", actor=self._terms.actor, reason=self._terms.reason)
        transacts = Transacts.of(provider)
        self._part = transacts.begin_recording(self._session_id, self._name, metadata=metadata, origin=origin)
        self.execution_ids += (self._part.execution_id,)
        self._count = 0
        return self._part

    def _admit(self) -> None:
        if self._is_over:
            return
        part = self._part or self._open()
        try:
            part.check_budgets()
        except ExecutionEndedError:
            self._reopen(part).check_budgets()

    def _put(self, kind: str, entry: Mapping[str, Any]) -> None:
        if self._is_over:
            return
        part = self._part or self._open()
        try:
            part.record(kind, entry)
        except LimitExceededError:
            if not self._count:
                # It would not fit into any.
                raise
            self._end_part()
            self._open().record(kind, entry)
        except ExecutionEndedError:
            self._reopen(part).record(kind, entry)
        self._count += 1
        if self._timer is None and self._backend.kind == EMBEDDED:
            timer = threading.Timer(self._keep_after_s, self._on_time)
            timer.daemon = True
            timer.start()
            # Only now: the system may have refused to start its thread.
            self._timer = timer

    def _reopen(self, ended: abilities.Transaction) -> abilities.Transaction:
        """Begin another part, because this one has ended: its server was shut down, or killed, with its calls."""
        if ended.status != ExecutionStatus.COMMITTED:
            _logger.warning("recording interrupted", session_id=self._session_id, execution_id=ended.execution_id)
        self._part = None
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return self._open()
            except (UnavailableError, ShuttingDownError):
                # The program should not fail because its journal is away for a moment.
                if time.monotonic() > deadline:
                    raise
                time.sleep(_PAUSE_S)

    def _on_time(self) -> None:
        try:
            self._through_gate(self._end_part)
        except StateError as error:
            # The next call, or the end of the block, meets the same, and raises it.
            _logger.warning("recording not kept", session_id=self._session_id, reason=str(error))

    def _end_part(self, error: BaseException | None = None) -> None:
        part, self._part = self._part, None
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        if part is None:
            return
        if error is not None:
            part.abort(error)
            return
        try:
            part.commit()
        except ExecutionEndedError:
            if part.status == ExecutionStatus.COMMITTED:
                return
            reason = "the session, or its server, ended during the recording; its journal may lack the last calls"
            raise ToolInterruptedError(part.execution_id, reason) from None

    def park(self) -> None:
        """End the current part: the session is about to move. The next call begins another one."""
        with self._lock:
            self._end_part()

    def end(self, error: BaseException | None) -> None:
        """End the recording, because its block has ended, perhaps with an error."""

        def end() -> None:
            self._is_over = True
            self._end_part(error)

        try:
            self._through_gate(end)
        finally:
            self._backend.parked.discard(self)


class _InTransaction:
    """A transaction of a context."""

    is_tool = False
    place = None

    def __init__(self, transaction: InTransaction) -> None:
        self._transaction = transaction
        self.execution_ids = (transaction.execution_id,)

    @property
    def is_open(self) -> bool:
        """Whether it has not ended."""
        return not self._transaction.status

    @property
    def is_quick(self) -> bool:
        """Whether it is in this process."""
        return not self._transaction._is_remote

    def admit(self) -> None:
        """Raise `BudgetExceededError` if no call may be made."""
        self._transaction._check_budgets()

    def put(self, kind: str, entry: Mapping[str, Any]) -> None:
        """Keep a call."""
        self._transaction._record_input(kind, entry)


_recorders: Final["WeakKeyDictionary[object, Recorder]"] = WeakKeyDictionary()
"""The recorders of transactions and tools, which number the calls of all their blocks."""


def recorder_of(transaction: InTransaction) -> Recorder:
    """Return what records LM calls in a transaction."""
    recorder = _recorders.get(transaction)
    if recorder is None:
        recorder = _recorders[transaction] = Recorder(_InTransaction(transaction))
    return recorder


def _redirect(transaction: InTransaction) -> Callable[[], None] | None:
    """Have the LM calls of a transaction's block recorded in the transaction, if they are recorded at all."""
    recorder = hook.current_recorder()
    if recorder is None or recorder.sink.is_tool or not recorder.sink.is_open:
        return None
    return hook.start_recording(recorder_of(transaction))


def _of_program(program: Any) -> Recording | None:
    """Return what records an outermost call of a bound program, if its context says so and nothing else records it."""
    binding = binding_of(program)
    ctx: Any = None if binding is None else binding.ctx
    # Only contexts can: in tools and transactions it is said elsewhere.
    if not getattr(ctx, "_record_lm", False) or current_session.get() is not None:
        return None
    recorder = hook.current_recorder()
    if recorder is not None and recorder.sink.is_open:
        return None
    about = {"program": f"{type(program).__module__}.{type(program).__qualname__}"}
    return Recording(ctx._backend, ctx.session_id, ctx._terms, metadata=about)


lm_guard.redirect = _redirect
enforcing.recording_of = _of_program
