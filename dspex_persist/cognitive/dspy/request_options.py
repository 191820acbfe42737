"""Options of LM calls in an `lm15.Request`, which has them as fields of its own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

_FIELDS: Final = {
    "frequency_penalty": "frequency_penalty",
    "max_completion_tokens": "max_tokens",
    "max_tokens": "max_tokens",
    "presence_penalty": "presence_penalty",
    "seed": "seed",
    "stop": "stop",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
}
"""By the name of an option, the field of the request's `config`."""
_OUTSIDE: Final = frozenset(("cache", "rollout_id"))
"""The options that are arguments of the call, beside the request."""


def can_say(option: str) -> bool:
    """Return whether a call with a request can say an option."""
    return option in _FIELDS or option in _OUTSIDE


def said_in(request: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a call with a request says, by the names of options."""
    config = {option: getattr(request.config, field) or None for option, field in _FIELDS.items()}
    # 0.0 is said, too.
    return {**config, "temperature": request.config.temperature, **kwargs}


def with_options(request: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call with a request that has these options."""
    fields = {_FIELDS[option]: value for option, value in options.items() if option in _FIELDS}
    if isinstance(stop := fields.get("stop"), str):
        fields["stop"] = (stop,)
    elif stop is not None:
        fields["stop"] = tuple(stop)
    others = {option: value for option, value in options.items() if option in _OUTSIDE}
    return {"request": replace(request, config=replace(request.config, **fields)), **others}
