"""The options of a program that variables can set, and what an LM calls them."""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from dspy.clients.lm import LM, _is_openai_reasoning_model


class Kind(NamedTuple):
    """What values an option takes."""

    description: str
    accepts: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))


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

_TOKENS: Final = ("max_tokens", "max_completion_tokens")


def wire_name(option: str, lm: Any) -> str:
    """Return what this LM calls an option: reasoning models take `max_completion_tokens` instead of `max_tokens`."""
    if option == "max_tokens" and (
        getattr(lm, "kwargs", {}).get("max_completion_tokens") is not None
        or (isinstance(lm, LM) and _is_openai_reasoning_model(lm.model))
    ):
        return "max_completion_tokens"
    return option


def synonyms(name: str) -> tuple[str, ...]:
    """Return all names of what an LM calls `name`."""
    return _TOKENS if name in _TOKENS else (name,)
