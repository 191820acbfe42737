"""LM calls that tools make through DSPy: kept in the journal, and played back. The only package that imports DSPy.

Every LM is seen (`dspy.LM`, `DummyLM`, any other `dspy.BaseLM`), however a program came by it: `dspy.configure`,
`dspy.context`, `module.set_lm`, `lm=`. So are the threads that a program or DSPy starts, what it has done in pools of
threads, and answers from DSPy's cache. Of an LM that asks another one, the outer call counts. What is seen is a call of
the LM (`lm(...)`, `await lm.acall(...)`), as all modules and adapters make it; `lm.forward(...)` by hand is not one.

A recorded call is JSON, an entry of an execution's `recorded["lm"]`:

- `ordinal`: its number in its execution, from 0, by when it began;
- `hash`: SHA-256 of `model` and `request`, in hexadecimal;
- `request`: `model_type`, `messages`, and the `options` that can change the answer, an LM's own defaults included.
  Keys, headers and addresses are never among them, as only what is listed in `requests.OPTIONS` is. Files in messages
  are represented by their SHA-256;
- `lm`: the LM's `class` and its own `defaults`, with which a recording can be played where no LM is configured;
- `concurrent`: whether it came from another thread or task than the tool's own;
- `response`: `outputs` (or `typed`, for an `lm15.Request`) and `usage` by model; or
- `error`: `type` (module and name) and `message`.

Playing it back:

    with playing(calls, live=False) as playback:   # where the tool's code runs: its thread, or its task
        ...                                        # the innermost `playing` holds
    playback.divergences                           # complete when the block has ended

Each call is answered with the first recorded one of its hash that was not yet used, by ordinal: its outputs, its usage,
its error. No LM is asked; where none is configured, one stands in. A request that was not recorded raises
`UnexpectedLmCallError`, and `lm.forward(...)` by hand `UnseenLmCallError`. While a playback goes on this holds in the
whole process: a call that comes from a thread of which nobody can say who started it is answered by the playback that
has it, or refused. With `live=True` every call goes to its LM (`dspy.LM`: past DSPy's cache) and what it answers
is compared with the recording. `LmDivergence.kind` says what differs, `str()` tells it with a diff:

- "unexpected": asked, not recorded; `recorded` is the nearest recorded call;
- "unused": recorded, not asked (nor the nearest to something unexpected);
- "order": two calls of the tool's own thread came the other way round;
- "answer": with `live`, the LM answers something else today.
"""

try:
    import dspy  # noqa: F401 -- whether it can be had
except ModuleNotFoundError as error:
    if error.name != "dspy":
        raise
    from dspex_persist.cognitive.errors import DspyMissingError

    raise DspyMissingError() from error

from dspex_persist.cognitive.dspy.hook import install, playing, record_calls
from dspex_persist.cognitive.dspy.playback import (
    LmDivergence,
    Playback,
    RecordedLmError,
    UnexpectedLmCallError,
    UnseenLmCallError,
)

__all__ = [
    "LmDivergence",
    "Playback",
    "RecordedLmError",
    "UnexpectedLmCallError",
    "UnseenLmCallError",
    "install",
    "playing",
    "record_calls",
]
