"""Records the LM calls that tools make through DSPy, and plays them back. The only package that imports DSPy.

It records every LM (`dspy.LM`, `DummyLM`, any other `dspy.BaseLM`), however the program configures it
(`dspy.configure`, `dspy.context`, `module.set_lm`, `lm=`), including calls in threads and thread pools that the program
or DSPy starts, and answers from DSPy's cache. If an LM calls another one, only the outer call counts. It records calls
of the LM (`lm(...)`, `await lm.acall(...)`), as all modules and adapters make them, but not a direct `lm.forward(...)`.

A recorded call is JSON, an entry of an execution's `recorded["lm"]`:

- `ordinal`: its number in its execution, from 0, by the time of its beginning;
- `hash`: SHA-256 of `model` and `request`, in hexadecimal;
- `request`: `model_type`, `messages`, and the `options` that can change the answer, including the LM's defaults. Only
  options listed in `requests.OPTIONS` are kept, so keys, headers and addresses never are. Files in messages are
  represented by their SHA-256;
- `lm`: the LM's `class` and its `defaults`, with which a recording can be played without a configured LM;
- `concurrent`: whether it came from another thread or task than the tool's;
- `at`: when it began, in microseconds since the epoch, and `latency_us`: how long it took, retries included;
- `cost`: in USD, and `cached`: whether DSPy's cache answered, which costs 0.0. Each is left out where nobody says it;
- `response`: `outputs` (or `typed`, for an `lm15.Request`) and `usage` by model; or
- `error`: `type` (module and name) and `message`;
- `usage`: tokens by model that DSPy's usage tracker attributes to no answer: those of a call that failed after the
  provider had counted them, and those that an LM tells in its history only. Usually left out.

- `predictor`: the path of the predictor in its program, and `variables`: the versions of the variables that applied to
  the call, if the program is bound to some.

Older recordings lack `at`, `latency_us`, `cost`, `cached`, `usage`, `predictor` and `variables`; playing ignores them.

Playing it back:

    with playing(calls, live=False) as playback:   # in the thread, or the task, of the tool's code
        ...                                        # the innermost `playing` applies
    playback.divergences                           # complete when the block has ended

`recorded_calls(execution_id, place)` finds the calls in a file, on a server, or in a context.

Each call gets the outputs, usage or error of the recorded call with the same hash that has the lowest ordinal and was
not yet used. No LM is called; if none is configured, a stand-in takes its place. A request that was not recorded raises
`UnexpectedLmCallError`, a direct `lm.forward(...)` raises `UnseenLmCallError`. During a playback this applies to the
whole process: a call from an unknown thread is answered by the playback that has it, or refused. With `live=True` every
call goes to its LM (`dspy.LM`: bypassing DSPy's cache), and the answer is compared with the recording.
`LmDivergence.kind` says what differs, `str()` shows a diff:

- "unexpected": called, but not recorded; `recorded` is the nearest recorded call;
- "unused": recorded, but not called (nor the nearest to an unexpected call);
- "order": two calls of the tool's own thread were made in the opposite order;
- "answer": with `live`, the LM answers differently now.
"""

try:
    import dspy  # noqa: F401 -- to see whether it is installed
except ModuleNotFoundError as error:
    if error.name != "dspy":
        raise
    from dspex_persist.cognitive.errors import DspyMissingError

    raise DspyMissingError() from error

from dspex_persist.cognitive.dspy.binding import bind, bindings, unbind
from dspex_persist.cognitive.dspy.hook import install, playing, record_calls
from dspex_persist.cognitive.dspy.playback import (
    LmDivergence,
    Playback,
    RecordedLmError,
    UnexpectedLmCallError,
    UnseenLmCallError,
)
from dspex_persist.cognitive.dspy.recorded import recorded_calls
from dspex_persist.cognitive.dspy.recording import Recording

__all__ = [
    "LmDivergence",
    "Playback",
    "RecordedLmError",
    "Recording",
    "UnexpectedLmCallError",
    "UnseenLmCallError",
    "bind",
    "bindings",
    "install",
    "playing",
    "record_calls",
    "recorded_calls",
    "unbind",
]
