"""Where LM calls are seen: around `__call__` and `acall` of every LM class, where somebody looks."""

import asyncio
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import Token
from typing import Any, Final

from dspy import LM, BaseLM, context, settings
from dspy.dsp.utils.settings import thread_local_overrides
from dspy.dsp.utils.utils import dotdict
from dspy.utils.usage_tracker import track_usage

from dspex_persist.cognitive.dspy.playback import Playback, RecordedCall, error_of, keep_account, stand_in
from dspex_persist.cognitive.dspy.requests import Asked, answer_of, asked_of, failure_of, response_of, secrets_of
from dspex_persist.state.runner import ToolSession

LM_CALLS: Final = "lm"
"""Under which name an execution's `recorded` has them."""
_RECORDER, _PLAYBACK = "dspex_persist_lm_recorder", "dspex_persist_lm_playback"
_CANCELLED: Final = "asyncio.exceptions.CancelledError"


def record_calls(session: ToolSession) -> None:
    """Keep every LM call of the code that runs in this context from here on in the execution's journal entry."""
    _install()
    _look(_Recorder(session), _playback())


@contextmanager
def playing(calls: Iterable[Mapping[str, Any]], *, live: bool = False) -> Iterator[Playback]:
    """Answer LM calls from recorded ones; the package says how."""
    _install()
    playback = Playback(calls, live=live)
    with ExitStack() as stack:
        if not live and settings.lm is None and playback.calls:
            stack.enter_context(context(lm=stand_in(playback.calls)))
        playback.line = _line()
        token = _look(_recorder(), playback)
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

    def begin(self, asked: Asked) -> dict[str, Any]:
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
        self._recorder, self._playback = _recorder(), _playback()
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
    """Have LM calls seen in this context. DSPy's own settings carry that, as its threads inherit nothing else."""
    own = {_RECORDER: recorder, _PLAYBACK: playback}
    token: Token[Any] = thread_local_overrides.set(dotdict({**thread_local_overrides.get(), **own}))
    return token


def _recorder() -> _Recorder | None:
    found: _Recorder | None = thread_local_overrides.get().get(_RECORDER)
    return found


def _playback() -> Playback | None:
    found: Playback | None = thread_local_overrides.get().get(_PLAYBACK)
    return found


def _nobody_looks() -> bool:
    return _recorder() is None and _playback() is None


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


_installing = threading.Lock()
_installed = False


def _install() -> None:
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


def _with_subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _with_subclasses(each)


def _hook(kind: Any) -> None:
    for name, seen in (("__call__", _seen), ("acall", _seen_async)):
        if name in vars(kind):
            setattr(kind, name, seen(vars(kind)[name]))
