"""Where LM calls are seen: around `__call__` and `acall` of every LM class, where somebody looks.

Who looks is in DSPy's own settings, as DSPy's threads inherit nothing else; threads and pools of Python's are given it
by whoever starts them or hands work in. A call that comes from elsewhere all the same has nobody's recording, and while
a replay runs no LM is asked by it.
"""

import asyncio
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import Token
from typing import Any, Final

from dspy import LM, BaseLM, context, settings
from dspy.dsp.utils.settings import thread_local_overrides
from dspy.dsp.utils.utils import dotdict
from dspy.utils.usage_tracker import track_usage

from dspex_persist.cognitive import lm_guard
from dspex_persist.cognitive.dspy.playback import (
    Playback,
    RecordedCall,
    StandIn,
    UnseenLmCallError,
    error_of,
    keep_account,
    stand_in,
)
from dspex_persist.cognitive.dspy.requests import LmRequest, answer_of, asked_of, failure_of, response_of, secrets_of
from dspex_persist.state.tools.session import ToolSession

LM_CALLS: Final = "lm"
"""Under which name an execution's `recorded` has them."""
_RECORDER, _PLAYBACK = "dspex_persist_lm_recorder", "dspex_persist_lm_playback"
_CANCELLED: Final = "asyncio.exceptions.CancelledError"


def record_calls(session: ToolSession) -> None:
    """Keep every LM call of the code that runs in this context from here on in the execution's journal entry."""
    install()
    _look(_Recorder(session), _own()[1])


@contextmanager
def playing(calls: Iterable[Mapping[str, Any]], *, live: bool = False) -> Iterator[Playback]:
    """Answer LM calls from recorded ones; the package says how."""
    install()
    playback = Playback(calls, live=live)
    with ExitStack() as stack:
        stack.enter_context(lm_guard.going_on(playback))
        if not live and settings.lm is None and playback.calls:
            stack.enter_context(context(lm=stand_in(playback.calls)))
        playback.line = _line()
        token = _look(_own()[0], playback)
        try:
            yield playback
        finally:
            thread_local_overrides.reset(token)
            playback.finish()


def _line() -> tuple[object, ...]:
    """Which thread, and on an event loop which task, runs."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), task


class _Recorder:
    """Where one execution's calls go."""

    def __init__(self, session: ToolSession) -> None:
        self._session = session
        self._line = _line()
        self._count = 0
        self._lock = threading.Lock()

    def begin(self, asked: LmRequest) -> dict[str, Any]:
        """A call that begins, as far as it is known."""
        with self._lock:
            ordinal, self._count = self._count, self._count + 1
        return {
            "ordinal": ordinal,
            "hash": asked.hash,
            "model": asked.model,
            "request": asked.request,
            "lm": {"class": asked.lm_class, "defaults": dict(asked.defaults)},
            "concurrent": _line() != self._line,
        }

    def end(self, call: Mapping[str, Any], outcome: Mapping[str, Any]) -> None:
        """The rest of it. Of an execution that has ended nothing can be kept any more."""
        if not self._session.cancelled:
            self._session.record(LM_CALLS, {**call, **outcome})


class _Call:
    """One call of an LM, from its request to how it ended, for whoever records it or answers it."""

    def __init__(self, lm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.lm, self.args, self.kwargs = lm, args, kwargs
        self._asked = asked_of(lm, args, kwargs)
        self._recorder, self._playback = _own() if _is_owned() else (None, _playback_of(lm, self._asked))
        self._ordinal = 0
        self._recorded: RecordedCall | None = None
        if self._playback is not None:
            concurrent = _line() != self._playback.line
            self._ordinal, self._asked, self._recorded = self._playback.take(lm, self._asked, concurrent=concurrent)
        self.is_played = self._playback is not None and not self._playback.live
        if self._playback is not None and self._playback.live and isinstance(lm, LM):
            # DSPy's cache would answer for it.
            self.kwargs = {"cache": False, **kwargs}
        self._entry = None if self._recorder is None else self._recorder.begin(self._asked)

    @property
    def never_answers(self) -> bool:
        """Whether the recorded call was cancelled, by a timeout for one: it has to wait for that again."""
        recorded = self._recorded if self.is_played else None
        return recorded is not None and recorded.get("error", {}).get("type") == _CANCELLED

    @contextmanager
    def watched(self) -> Iterator[list[Any]]:
        """Around the call; its answer is to be put in the list."""
        answers: list[Any] = []
        # An LM that asks another one is one call.
        token = _look(None, None)
        usage: Mapping[str, Any] = {}
        try:
            with track_usage() as tracker:
                yield answers
            usage = tracker.get_total_tokens()
        except (Exception, asyncio.CancelledError) as error:
            self._end({"error": failure_of(error, secrets_of(self.lm, self.kwargs))}, error)
            raise
        finally:
            thread_local_overrides.reset(token)
        self._end({"response": response_of(answers[0], usage)})

    def _end(self, outcome: Mapping[str, Any], error: BaseException | None = None) -> None:
        if self._playback is not None and self._playback.live and not isinstance(error, asyncio.CancelledError):
            self._playback.compare(self._ordinal, self._asked, self._recorded, outcome)
        if self._recorder is not None and self._entry is not None:
            self._recorder.end(self._entry, outcome)

    def play(self) -> Any:
        """The recorded answer, with its usage and its entry in the histories; or the recorded error."""
        assert self._recorded is not None, "a call without a recorded one has been refused"
        if "error" in self._recorded:
            raise error_of(self._recorded["error"])
        response = self._recorded["response"]
        answer = answer_of(response)
        options = dict(self.kwargs)
        prompt = self.args[0] if self.args else options.pop("prompt", None)
        call = {"prompt": prompt, "messages": options.pop("messages", None), "kwargs": options}
        keep_account(self.lm, call, response, answer)
        return answer


def _look(recorder: _Recorder | None, playback: Playback | None) -> Token[Any]:
    """Have LM calls seen in this context."""
    own = {_RECORDER: recorder, _PLAYBACK: playback}
    token: Token[Any] = thread_local_overrides.set(dotdict({**thread_local_overrides.get(), **own}))
    return token


def _is_owned() -> bool:
    """Whether it is known who looks at the calls of this context, if only that it is nobody."""
    return _PLAYBACK in thread_local_overrides.get()


def _own() -> tuple[_Recorder | None, Playback | None]:
    overrides = thread_local_overrides.get()
    return overrides.get(_RECORDER), overrides.get(_PLAYBACK)


def _playback_of(lm: object, asked: LmRequest) -> Playback | None:
    """What answers a call of which nobody can say whose it is: the playback that has it, or one that refuses it."""
    going_on = lm_guard.running()
    playbacks = [each for each in reversed(going_on) if isinstance(each, Playback)]
    if playbacks:
        return next((each for each in playbacks if each.has(lm, asked)), playbacks[0])
    if not going_on:
        return None
    last = going_on[-1]
    return Playback((), divergences=last.divergences if isinstance(last, lm_guard.Refusal) else None)


def _nobody_looks() -> bool:
    return _own() == (None, None) if _is_owned() else not lm_guard.running()


def _is_played() -> bool:
    """Whether no LM may be asked from here."""
    if _is_owned():
        playback = _own()[1]
        return playback is not None and not playback.live
    return any(not isinstance(each, Playback) or not each.live for each in lm_guard.running())


def _seen(call: Callable[..., Any]) -> Callable[..., Any]:
    """`__call__` of an LM class, seen."""

    @functools.wraps(call)
    def seen(lm: Any, *args: Any, **kwargs: Any) -> Any:
        if _nobody_looks():
            return call(lm, *args, **kwargs)
        asking = _Call(lm, args, kwargs)
        with asking.watched() as answers:
            answer = asking.play() if asking.is_played else call(lm, *args, **asking.kwargs)
            answers.append(answer)
        return answer

    return seen


def _seen_async(call: Callable[..., Any]) -> Callable[..., Any]:
    """`acall` of an LM class, seen."""

    @functools.wraps(call)
    async def seen(lm: Any, *args: Any, **kwargs: Any) -> Any:
        if _nobody_looks():
            return await call(lm, *args, **kwargs)
        asking = _Call(lm, args, kwargs)
        with asking.watched() as answers:
            if asking.never_answers:
                await asyncio.get_running_loop().create_future()
            answer = asking.play() if asking.is_played else await call(lm, *args, **asking.kwargs)
            answers.append(answer)
        return answer

    return seen


def _guarded(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` or `aforward` of an LM class, which is behind every call, but no call: not where no LM may be asked."""

    @functools.wraps(forward)
    def guarded(lm: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_played():
            raise UnseenLmCallError(forward.__name__)
        return forward(lm, *args, **kwargs)

    return guarded


# Threads


def _carried() -> dict[str, Any]:
    """What a thread is given by whoever starts it: who looks, and the LM that stands in where there is none."""
    overrides = thread_local_overrides.get()
    return {
        name: each for name, each in overrides.items() if name in (_RECORDER, _PLAYBACK) or isinstance(each, StandIn)
    }


def _run_carrying(
    carried: Mapping[str, Any], is_recorded: bool, function: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Call a function with what was carried, and with nothing else of what a thread of a pool was first given."""
    before = thread_local_overrides.get()
    others = {name: each for name, each in before.items() if name not in _carried()}
    token = thread_local_overrides.set(dotdict({**others, **carried}))
    flag = lm_guard.caller_is_recorded.set(is_recorded)
    try:
        return function(*args, **kwargs)
    finally:
        lm_guard.caller_is_recorded.reset(flag)
        thread_local_overrides.reset(token)


def _carry_into_threads() -> None:
    """Have every thread and every piece of work in a pool belong to whoever it is done for."""
    threads: Any = threading.Thread
    pools: Any = ThreadPoolExecutor
    start, submit = threads.start, pools.submit

    @functools.wraps(start)
    def started(thread: threading.Thread) -> None:
        if carried := _carried():
            is_recorded = lm_guard.caller_is_recorded.get()
            setattr(thread, "run", functools.partial(_run_carrying, carried, is_recorded, thread.run))  # noqa: B010
        start(thread)

    @functools.wraps(submit)
    def submitted(pool: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        is_recorded = lm_guard.caller_is_recorded.get()
        return submit(pool, _run_carrying, _carried(), is_recorded, function, *args, **kwargs)

    threads.start, pools.submit = started, submitted


_installing = threading.Lock()
_installed = False


def install() -> None:
    """Put the hook on all LM classes there are, and on those to come. It stays: where nobody looks it costs little."""
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
        _carry_into_threads()


def _with_subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _with_subclasses(each)


_WRAPPERS: Final = {"__call__": _seen, "acall": _seen_async, "forward": _guarded, "aforward": _guarded}


def _hook(kind: Any) -> None:
    for name, wrapper in _WRAPPERS.items():
        if name in vars(kind):
            setattr(kind, name, wrapper(vars(kind)[name]))
