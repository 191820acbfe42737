"""The hook that records and answers LM calls: wraps `__call__` and `acall` of every LM class.

The recorder and the playback of a context are in DSPy's settings, the only thing that DSPy's threads inherit. Python's
threads and pools get them from the caller that starts a thread or submits work. A call from any other thread belongs to
no recording, and reaches no LM during a replay.
"""

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import Token
from typing import Any, Final, Protocol

from dspy import LM, BaseLM, context, settings
from dspy.dsp.utils.settings import thread_local_overrides
from dspy.dsp.utils.utils import dotdict
from dspy.utils.usage_tracker import track_usage

from dspex_persist import clock
from dspex_persist.cognitive import lm_guard
from dspex_persist.cognitive.dspy import accounts, snapshots
from dspex_persist.cognitive.dspy.accounts import ACCOUNT, Account
from dspex_persist.cognitive.dspy.enforcing import enforced, enforced_async
from dspex_persist.cognitive.dspy.playback import (
    Playback,
    RecordedCall,
    StandIn,
    UnseenLmCallError,
    error_of,
    keep_account,
    stand_in,
)
from dspex_persist.cognitive.dspy.requests import (
    LmRequest,
    answer_of,
    failure_of,
    plain,
    request_of,
    response_of,
    secrets_of,
)
from dspex_persist.infra import tracing
from dspex_persist.infra.tracing import Place
from dspex_persist.state import arguments
from dspex_persist.state.budgets import NO_BUDGET, Budget
from dspex_persist.state.errors import BudgetExceededError, InvalidArgumentError
from dspex_persist.state.tools import traced
from dspex_persist.state.tools.failures import conceal
from dspex_persist.state.tools.session import LM_CALLS, ToolSession

_RECORDER, _PLAYBACK = "dspex_persist_lm_recorder", "dspex_persist_lm_playback"
_CARRIED: Final = frozenset((_RECORDER, _PLAYBACK))
_FACTS: Final = {"ordinal", "hash", "model", "request"}
"""What a recorded call has at least."""
_CANCELLED: Final = "asyncio.exceptions.CancelledError"


def record_calls(session: ToolSession, budget: Budget = NO_BUDGET) -> None:
    """Record the LM calls of the code in this context, from now on, in the execution's journal entry.

    Args:
        session: The session of the execution.
        budget: The budget of the tool.
    """
    install()
    _observe(Recorder(_InTool(session, budget)), _observers()[1])


def start_recording(recorder: "Recorder") -> Callable[[], None]:
    """Record the LM calls of this context by a recorder, until the returned function is called."""
    before = {key: each for key, each in thread_local_overrides.get().items() if key in (_RECORDER, _PLAYBACK, ACCOUNT)}
    _observe(recorder, _observers()[1])

    def undo() -> None:
        # Not by a token: an asynchronous block may end in another context than it began in.
        others = thread_local_overrides.get()
        if others.get(_RECORDER) is recorder:
            rest = {key: each for key, each in others.items() if key not in (_RECORDER, _PLAYBACK, ACCOUNT)}
            thread_local_overrides.set(dotdict({**rest, **before}))

    return undo


def current_recorder() -> "Recorder | None":
    """Return what records the LM calls of this context, if something does."""
    return _observers()[0]


@contextmanager
def playing(calls: Iterable[Mapping[str, Any]], *, live: bool = False) -> Iterator[Playback]:
    """Answer LM calls from recorded ones, as described in the package's docstring.

    Args:
        calls: The recorded calls.
        live: Send every call to its LM instead, and compare the answers.

    Raises:
        InvalidArgumentError: These are no recorded calls.
    """
    arguments.flag("live", live)
    playback = Playback(_checked(calls), live=live)
    install()
    with ExitStack() as stack:
        stack.enter_context(lm_guard.going_on(playback))  # for calls from unknown threads
        if not live and settings.lm is None and playback.calls:
            stack.enter_context(context(lm=stand_in(playback.calls)))
        playback.line = _line()
        token = _observe(_observers()[0], playback)
        try:
            yield playback
        finally:
            thread_local_overrides.reset(token)
            playback.finish()


def _checked(calls: object) -> tuple[RecordedCall, ...]:
    if isinstance(calls, str | Mapping) or not isinstance(calls, Iterable):
        raise _no_calls(calls)
    given = tuple(calls)
    for each in given:
        if not (isinstance(each, Mapping) and each.keys() >= _FACTS):
            raise _no_calls(each)
    return given


def _no_calls(given: object) -> InvalidArgumentError:
    reason = f"it must be recorded LM calls, as recorded_calls(...) returns them, not {type(given).__name__}"
    return InvalidArgumentError("calls", reason)


def _line() -> tuple[object, ...]:
    """Return the running thread, and on an event loop the running task."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), task


class Sink(Protocol):
    """Where recorded calls go: an execution, wherever that is."""

    @property
    def is_tool(self) -> bool:
        """Whether it is that of a tool, whose code makes the calls."""

    @property
    def execution_ids(self) -> tuple[str, ...]:
        """The ids of its executions so far, at least one."""

    @property
    def is_open(self) -> bool:
        """Whether it still takes calls."""

    @property
    def is_quick(self) -> bool:
        """Whether neither `admit` nor `put` waits for anything that takes long."""

    @property
    def place(self) -> Place | None:
        """Its place in a trace of this process."""

    def admit(self) -> None:
        """Raise `BudgetExceededError` if no call may be made."""

    def put(self, kind: str, entry: Mapping[str, Any]) -> None:
        """Keep a call."""


class _InTool:
    """The execution of a tool."""

    is_tool = True

    def __init__(self, session: ToolSession, budget: Budget) -> None:
        self._session = session
        self._budget = budget

    @property
    def execution_ids(self) -> tuple[str, ...]:
        return (self._session.execution_id,)

    @property
    def is_quick(self) -> bool:
        return not self._session.is_far

    @property
    def place(self) -> Place | None:
        return self._session.place

    @property
    def is_open(self) -> bool:
        return not self._session.cancelled

    def admit(self) -> None:
        self._session.check_budgets(self._budget)

    def put(self, kind: str, entry: Mapping[str, Any]) -> None:
        self._session.record(kind, entry)


class Recorder:
    """Records the calls of one execution.

    Attributes:
        sink: Where they go.
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self._line = _line()
        self._count = 0
        self._lock = threading.Lock()

    def begin(self, request: LmRequest) -> dict[str, Any]:
        """Return the entry of a call that begins, without its outcome."""
        with self._lock:
            ordinal, self._count = self._count, self._count + 1
        entry = {
            "ordinal": ordinal,
            "hash": request.hash,
            "model": request.model,
            "request": request.request,
            "lm": {"class": request.lm_class, "defaults": dict(request.defaults)},
            "concurrent": _line() != self._line,
            "at": clock.to_micros(clock.now()),
        }
        variables, predictor = snapshots.used(), snapshots.predictor()
        if predictor is not None:
            entry["predictor"] = predictor
        if variables:
            entry["variables"] = variables
        return entry

    def admit(self) -> None:
        """Raise `BudgetExceededError` if no call may be made."""
        if self.sink.is_open:
            self.sink.admit()

    async def admit_aio(self) -> None:
        """Do the same without blocking the event loop."""
        if self.sink.is_quick:
            self.admit()
        else:
            await asyncio.to_thread(self.admit)

    def keep(self, call: Mapping[str, Any]) -> None:
        """Record a call that has its outcome, unless the execution has ended."""
        if self.sink.is_open:
            self.sink.put(LM_CALLS, call)

    async def keep_aio(self, call: Mapping[str, Any]) -> None:
        """Do the same without blocking the event loop."""
        if self.sink.is_quick:
            self.keep(call)
        else:
            await asyncio.to_thread(self.keep, call)


class _Call:
    """One call of an LM, with the recorder that records it and the playback that answers it, if any."""

    def __init__(self, lm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.lm, self.args, self.kwargs = lm, args, kwargs
        self._request = request_of(lm, args, kwargs)
        self._recorder, self._playback = _observers() if _is_known() else (None, _playback_of(lm, self._request))
        self._ordinal = 0
        self._recorded: RecordedCall | None = None
        if self._playback is not None:
            concurrent = _line() != self._playback.line
            self._ordinal, self._request, self._recorded = self._playback.take(lm, self._request, concurrent=concurrent)
        self.is_played = self._playback is not None and not self._playback.live
        if self._playback is not None and self._playback.live and isinstance(lm, LM):
            # Otherwise DSPy's cache would answer.
            self.kwargs = {"cache": False, **kwargs}
        self._entry = None if self._recorder is None else self._recorder.begin(self._request)
        self._account = Account(lm)
        self._began = time.monotonic()
        self._ended: dict[str, Any] | None = None

    @property
    def never_answers(self) -> bool:
        """Whether the recorded call was cancelled, for example by a timeout, and so must wait for that again."""
        recorded = self._recorded if self.is_played else None
        return recorded is not None and recorded.get("error", {}).get("type") == _CANCELLED

    def watched(self) -> AbstractContextManager[list[Any]]:
        """Observe the call, which the block makes; it puts the answer into the list."""
        tracer = tracing.tracer()
        if tracer is None or self._recorder is None or self.is_played:
            return self._watched()
        return self._traced(tracer, self._recorder.sink.place)

    @contextmanager
    def _traced(self, tracer: tracing.Tracer, place: tracing.Place | None) -> Iterator[list[Any]]:
        name, facts = traced.asking(self._request.model, self._request.model_type)
        # A thread of DSPy is in no trace by itself.
        below = place if tracer.here() is None else None
        with tracer.span(name, facts, kind=tracing.Kind.CLIENT, below=below, judges=False) as span:
            try:
                with self._watched() as answers:
                    yield answers
            finally:
                if self._ended is not None:
                    known, error_type = traced.answered(self._ended)
                    span.set(known)
                    if error_type is not None:
                        span.fail(error_type)

    @contextmanager
    def _watched(self) -> Iterator[list[Any]]:
        answers: list[Any] = []
        # If the LM calls another LM, only the outer call counts.
        token = _observe(None, None, None if self.is_played else self._account)
        tracker: Any = None
        try:
            with track_usage() as tracker:
                yield answers
        except GeneratorExit:
            raise
        except BaseException as error:
            secrets = secrets_of(self.lm, self.kwargs)
            conceal(error, secrets)
            failed: dict[str, Any] = {"error": failure_of(error, secrets)}
            # A provider may have charged for a call that failed here.
            used = {} if tracker is None else tracker.get_total_tokens()
            self._end({**failed, "usage": plain(used)} if used else failed, error)
            raise
        finally:
            thread_local_overrides.reset(token)
        usage = tracker.get_total_tokens()
        outcome: dict[str, Any] = {"response": response_of(answers[0], usage)}
        told = {} if usage else self._account.usage()
        self._end({**outcome, "usage": told} if told else outcome)

    def _end(self, outcome: Mapping[str, Any], error: BaseException | None = None) -> None:
        if self._playback is not None and self._playback.live and not isinstance(error, asyncio.CancelledError):
            self._playback.compare(self._ordinal, self._request, self._recorded, outcome)
        if self._recorder is not None and self._entry is not None:
            latency_us = round((time.monotonic() - self._began) * 1e6)
            # A playback asks no model, as an answer of the cache.
            facts = {"cost": 0.0, "cached": True} if self.is_played else self._account.facts()
            if isinstance(error, BudgetExceededError):
                # It was not made.
                facts = {"cost": 0.0}
            self._ended = {**self._entry, "latency_us": latency_us, **facts, **outcome}

    def admit(self) -> None:
        """Raise `BudgetExceededError` if the call may not be made, because of those that were recorded before."""
        if self._recorder is not None and self._playback is None:
            self._recorder.admit()
            self._began = time.monotonic()

    async def admit_aio(self) -> None:
        """Do the same without blocking the event loop."""
        if self._recorder is not None and self._playback is None:
            await self._recorder.admit_aio()
            self._began = time.monotonic()

    def keep(self) -> None:
        """Record the call, if it is recorded and has ended."""
        if self._recorder is not None and self._ended is not None:
            self._recorder.keep(self._ended)

    async def keep_aio(self) -> None:
        """Do the same without blocking the event loop."""
        if self._recorder is not None and self._ended is not None:
            await self._recorder.keep_aio(self._ended)

    def play(self) -> Any:
        """Return the recorded answer, and account for it in DSPy's usage and histories; or raise the recorded error."""
        assert self._recorded is not None, "a call that was not recorded is refused earlier"
        if "error" in self._recorded:
            raise error_of(self._recorded["error"])
        response = self._recorded["response"]
        answer = answer_of(response)
        options = dict(self.kwargs)
        prompt = self.args[0] if self.args else options.pop("prompt", None)
        call = {"prompt": prompt, "messages": options.pop("messages", None), "kwargs": options}
        keep_account(self.lm, call, response, answer)
        return answer


def _observe(recorder: Recorder | None, playback: Playback | None, account: Account | None = None) -> Token[Any]:
    """Have the LM calls of this context recorded and answered by these, and what is known of them noted."""
    observers = {_RECORDER: recorder, _PLAYBACK: playback, ACCOUNT: account}
    token: Token[Any] = thread_local_overrides.set(dotdict({**thread_local_overrides.get(), **observers}))
    return token


def _is_known() -> bool:
    """Return whether this context has observers, which may both be None, or belongs to an unknown thread."""
    return _PLAYBACK in thread_local_overrides.get()


def _observers() -> tuple[Recorder | None, Playback | None]:
    overrides = thread_local_overrides.get()
    return overrides.get(_RECORDER), overrides.get(_PLAYBACK)


def _playback_of(lm: object, request: LmRequest) -> Playback | None:
    """Return the playback for a call from an unknown thread: the one that has it, or one that refuses it."""
    running = lm_guard.running()
    playbacks = [each for each in reversed(running) if isinstance(each, Playback)]
    if playbacks:
        return next((each for each in playbacks if each.has(lm, request)), playbacks[0])
    if not running:
        return None
    last = running[-1]
    return Playback((), divergences=last.divergences if isinstance(last, lm_guard.Refusal) else None)


def _is_unobserved() -> bool:
    return _observers() == (None, None) if _is_known() else not lm_guard.running()


def _is_played() -> bool:
    """Return whether calls of this context must not reach an LM."""
    if _is_known():
        playback = _observers()[1]
        return playback is not None and not playback.live
    return any(not isinstance(each, Playback) or not each.live for each in lm_guard.running())


def _observed(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `__call__` of an LM class."""

    @functools.wraps(call)
    def observed(lm: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_unobserved():
            return call(lm, *args, **kwargs)
        lm_call = _Call(lm, args, kwargs)
        try:
            with lm_call.watched() as answers:
                lm_call.admit()
                answer = lm_call.play() if lm_call.is_played else call(lm, *args, **lm_call.kwargs)
                answers.append(answer)
        finally:
            lm_call.keep()
        return answer

    return observed


def _observed_async(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `acall` of an LM class."""

    @functools.wraps(call)
    async def observed(lm: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_unobserved():
            return await call(lm, *args, **kwargs)
        lm_call = _Call(lm, args, kwargs)
        try:
            with lm_call.watched() as answers:
                await lm_call.admit_aio()
                if lm_call.never_answers:
                    await asyncio.get_running_loop().create_future()
                answer = lm_call.play() if lm_call.is_played else await call(lm, *args, **lm_call.kwargs)
                answers.append(answer)
        finally:
            await lm_call.keep_aio()
        return answer

    return observed


def _guarded(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `forward` or `aforward` of an LM class, which every call ends in: refuse it if no LM may be called."""

    @functools.wraps(forward)
    def guarded(lm: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_played():
            raise UnseenLmCallError(forward.__name__)
        return forward(lm, *args, **kwargs)

    return guarded


# Threads


def _carried() -> dict[str, Any]:
    """Return the settings that a thread gets from the caller that starts it.

    They are the observers, a stand-in LM, and what variables set in the call of a bound program.
    """
    overrides = thread_local_overrides.get()
    observers = {name: each for name, each in overrides.items() if name in _CARRIED or isinstance(each, StandIn)}
    return {**observers, **snapshots.carried()}


def _run_carrying(
    carried: Mapping[str, Any], is_recorded: bool, function: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Call a function with the carried settings, instead of those with which the thread of a pool was started."""
    before = thread_local_overrides.get()
    others = {name: each for name, each in before.items() if name not in _carried()}
    token = thread_local_overrides.set(dotdict({**others, **carried}))
    flag = lm_guard.caller_is_recorded.set(is_recorded)
    try:
        return function(*args, **kwargs)
    finally:
        lm_guard.caller_is_recorded.reset(flag)
        thread_local_overrides.reset(token)


def _have_carry(thread: threading.Thread, carried: Mapping[str, Any]) -> None:
    """Have a thread that is about to start run with the carried settings."""
    own, run, is_recorded = vars(thread).get("run"), thread.run, lm_guard.caller_is_recorded.get()

    def carrying() -> None:
        # It refers to the thread: both, and what the thread works on, would stay until the next garbage collection.
        if own is None:
            del vars(thread)["run"]
        else:
            vars(thread)["run"] = own
        _run_carrying(carried, is_recorded, run)

    vars(thread)["run"] = carrying


def _carry_into_threads() -> None:
    """Have every thread, and all work in thread pools, use the observers of the caller that started it."""
    threads: Any = threading.Thread
    pools: Any = ThreadPoolExecutor
    start, submit = threads.start, pools.submit

    @functools.wraps(start)
    def started(thread: threading.Thread) -> None:
        if carried := _carried():
            _have_carry(thread, carried)
        start(thread)

    @functools.wraps(submit)
    def submitted(pool: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        is_recorded = lm_guard.caller_is_recorded.get()
        return submit(pool, _run_carrying, _carried(), is_recorded, function, *args, **kwargs)

    threads.start, pools.submit = started, submitted


_installing = threading.Lock()
_installed = False


def install() -> None:
    """Hook all existing and future LM classes, permanently. Calls that are not observed cost little more."""
    global _installed
    with _installing:
        if _installed:
            return
        _installed = True
        for kind in set(_with_subclasses(BaseLM)):
            _hook(kind)

        def on_subclass(kind: Any, /, **kwargs: Any) -> None:
            super(BaseLM, kind).__init_subclass__(**kwargs)
            _hook(kind)

        BaseLM.__init_subclass__ = classmethod(on_subclass)
        accounts.install()
        _carry_into_threads()


def _with_subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _with_subclasses(each)


# A call is recorded, and played, as it reaches the LM: after variables have set its options.
_WRAPPERS: Final[Mapping[str, Callable[..., Any]]] = {
    "__call__": lambda call: enforced(_observed(call)),
    "acall": lambda call: enforced_async(_observed_async(call)),
    "forward": _guarded,
    "aforward": _guarded,
    "update_history": accounts.noting,
}


def _hook(kind: Any) -> None:
    for name, wrapper in _WRAPPERS.items():
        if name in vars(kind):
            setattr(kind, name, wrapper(vars(kind)[name]))
