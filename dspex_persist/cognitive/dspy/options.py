"""The options of a program that variables can set, what values they take, and what an LM calls them."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from math import isfinite
from typing import Any, Final, NamedTuple

from dspy.clients.lm import LM, _is_openai_reasoning_model

from dspex_persist.cognitive.errors import BoundValueError


class Kind(NamedTuple):
    """What values an option takes."""

    description: str
    accepts: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) or _are_texts(value)


def _are_maps(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


_NUMBER: Final = Kind("a number", _is_number)
_WHOLE: Final = Kind("a whole number", _is_whole)
_FLAG: Final = Kind("true or false", lambda value: isinstance(value, bool))
_TEXT: Final = Kind("a text", lambda value: isinstance(value, str))
_STOP: Final = Kind("a text, or a list of texts", _is_stop)
_MAP: Final = Kind("a map", lambda value: isinstance(value, dict))

LM_OPTIONS: Final[Mapping[str, Kind]] = {
    "cache": _FLAG,
    "frequency_penalty": _NUMBER,
    "logit_bias": _MAP,
    "logprobs": _FLAG,
    "max_completion_tokens": _WHOLE,
    "max_tokens": _WHOLE,
    "min_p": _NUMBER,
    "n": _WHOLE,
    "presence_penalty": _NUMBER,
    "reasoning_effort": _TEXT,
    "repetition_penalty": _NUMBER,
    "rollout_id": _WHOLE,
    "seed": _WHOLE,
    "stop": _STOP,
    "temperature": _NUMBER,
    "top_k": _WHOLE,
    "top_logprobs": _WHOLE,
    "top_p": _NUMBER,
    "verbosity": _TEXT,
}
"""The options of a call of an LM, and what they take."""
PROGRAM_OPTIONS: Final[Mapping[str, Kind]] = {
    "adapter": _TEXT,
    "demos": Kind("a list of maps", _are_maps),
    "instructions": _TEXT,
    "max_iters": Kind("a whole number from 1 up", lambda value: _is_whole(value) and value >= 1),
    "model": _TEXT,
    "module_type": _TEXT,
    "tools": Kind("a list of names", _are_texts),
}
"""The options of predictors and other modules."""
OPTIONS: Final[Mapping[str, Kind]] = {**LM_OPTIONS, **PROGRAM_OPTIONS}
"""All options, and what they take."""

_TOKENS: Final = ("max_tokens", "max_completion_tokens")
_FEWEST_TOKENS: Final = 16_000


def check(option: str, variable: str, value: Any) -> None:
    """Raise `BoundValueError` if an option does not take a value."""
    kind = OPTIONS[option]
    if not kind.accepts(value):
        raise BoundValueError(option, variable, value, f"it must be {kind.description}")


def check_for(lm: Any, name: str, variable: str, value: Any) -> None:
    """Raise `BoundValueError` if an LM certainly refuses a value, by the rules of DSPy's own LM class."""
    if not is_reasoning(lm):
        return
    if name == "temperature" and value != 1.0:
        raise BoundValueError(name, variable, value, "OpenAI's reasoning models take only 1.0", str(lm.model))
    if name == "max_completion_tokens" and value < _FEWEST_TOKENS:
        reason = f"OpenAI's reasoning models need at least {_FEWEST_TOKENS}, as they count their reasoning"
        raise BoundValueError("max_tokens", variable, value, reason, str(lm.model))


def is_reasoning(lm: Any) -> bool:
    """Return whether DSPy takes an LM for one of OpenAI's reasoning models."""
    return isinstance(lm, LM) and _is_reasoning(lm.model)


_is_reasoning = lru_cache(maxsize=64)(_is_openai_reasoning_model)


def wire_name(option: str, lm: Any) -> str:
    """Return what this LM calls an option: reasoning models take `max_completion_tokens` instead of `max_tokens`."""
    if option == "max_tokens" and (
        getattr(lm, "kwargs", {}).get("max_completion_tokens") is not None or is_reasoning(lm)
    ):
        return "max_completion_tokens"
    return option


def synonyms(name: str) -> tuple[str, ...]:
    """Return all names of what an LM calls `name`."""
    return _TOKENS if name in _TOKENS else (name,)
