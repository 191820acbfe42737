"""What an LM, or DSPy on its behalf, refuses of the options that variables have set."""

import re
from collections.abc import Sequence
from typing import Any

from dspy.utils.exceptions import ContextWindowExceededError, LMInvalidRequestError, LMUnsupportedFeatureError

from dspex_persist.cognitive.dspy.options import synonyms
from dspex_persist.cognitive.dspy.snapshots import LmOption
from dspex_persist.cognitive.errors import BoundValueError
from dspex_persist.state.masking import MASK

_REFUSALS = (LMInvalidRequestError, LMUnsupportedFeatureError)


def explain(error: Exception, lm: Any, options: Sequence[LmOption]) -> None:
    """Say which variables have set what, after an error in the call of an LM.

    Args:
        error: The error. It gets a note.
        lm: The LM.
        options: What variables have set in this call.

    Raises:
        BoundValueError: The error is about one of the options, by its text. It is also an error of the class that
            DSPy has for this, if it has one.
    """
    model = str(getattr(lm, "model", lm))
    refused = _refused(error, options)
    if refused is None:
        listed = ", ".join(
            f"{each.option}={MASK if each.is_sensitive else repr(each.value)} (variable {each.variable!r})"
            for each in options
        )
        error.add_note(f"Variables have set for {model}: {listed}")
        return
    reason = str(error)
    if isinstance(error, _REFUSALS):
        raise _both(error, refused, reason, model) from error
    raise BoundValueError(refused.option, refused.variable, refused.value, reason, model) from error


def _refused(error: Exception, options: Sequence[LmOption]) -> LmOption | None:
    """Return the option that an error is about."""
    # DSPy raises the first two for values that no request can have. Agents go on after the last one.
    if not isinstance(error, (ValueError, TypeError, *_REFUSALS)) or isinstance(error, ContextWindowExceededError):
        return None
    text = str(error)
    return next((each for each in options if any(_names(text, name) for name in synonyms(each.option))), None)


def _names(text: str, option: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text) is not None


def _both(error: Exception, refused: LmOption, reason: str, model: str) -> BoundValueError:
    """Return an error for those who expect that of DSPy, and for those who expect ours."""
    kind = type("BoundValueError", (BoundValueError, type(error)), {"__module__": BoundValueError.__module__})
    both: Any = Exception.__new__(kind)
    vars(both).update(vars(error))
    BoundValueError.__init__(both, refused.option, refused.variable, refused.value, reason, model)
    refusal: BoundValueError = both
    return refusal
