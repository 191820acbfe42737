"""DSPy programs on sessions. Importing this imports DSPy, which takes seconds."""

from dspex_persist.cognitive.dspy import (
    LmDivergence,
    Playback,
    RecordedLmError,
    UnexpectedLmCallError,
    UnseenLmCallError,
    bind,
    playing,
    unbind,
)

__all__ = [
    "LmDivergence",
    "Playback",
    "RecordedLmError",
    "UnexpectedLmCallError",
    "UnseenLmCallError",
    "bind",
    "playing",
    "unbind",
]
