"""Requests to LMs and their answers as JSON, with enough to recognize a request, but without secrets."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from pydantic import BaseModel

from dspex_persist.state.masking import hash_of
from dspex_persist.state.tools.failures import hidden

# fmt: off
OPTIONS: Final = frozenset((
    "audio", "best_of", "echo", "frequency_penalty", "function_call", "functions", "include", "logit_bias",
    "logprobs", "max_completion_tokens", "max_output_tokens", "max_tokens", "min_p", "modalities", "n",
    "num_generations", "parallel_tool_calls", "prediction", "presence_penalty", "previous_response_id",
    "probabilities", "reasoning", "reasoning_effort", "repetition_penalty", "response_format", "rollout_id",
    "seed", "stop", "suffix", "system", "temperature", "text", "thinking", "tool_choice", "tools", "top_k",
    "top_logprobs", "top_p", "truncation", "verbosity", "web_search_options",
))
# fmt: on
"""The options of a call that are kept, and that distinguish requests. All others may be secret."""
_TOOL_FIELDS: Final = frozenset(
    ("type", "function", "name", "description", "parameters", "input_schema", "strict", "config")
)
_DATA_URI: Final = re.compile(r"data:([^,;]*)[^,]*;base64,(.+)", re.DOTALL)
_LONG: Final = 256
_SHORTEST_SECRET: Final = 6
_SHORTEST_PART: Final = 8
_SEPARATORS: Final = re.compile(r"[\s,;]+")


@dataclass(frozen=True, slots=True)
class LmRequest:
    """One request to an LM. `given` has the options of the call, `defaults` those of the LM."""

    model: str
    model_type: str
    messages: Any
    given: Mapping[str, Any]
    defaults: Mapping[str, Any]
    lm_class: str = ""

    @property
    def request(self) -> dict[str, Any]:
        """The part that is recorded."""
        options = {name: option for name, option in {**self.defaults, **self.given}.items() if option is not None}
        return {"model_type": self.model_type, "messages": self.messages, "options": options}

    @property
    def hash(self) -> str:
        """The hash by which a recorded call is found."""
        return hash_of(self.model, self.request)


def request_of(lm: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LmRequest:
    """Return the request of a call `lm(*args, **kwargs)`."""
    options = dict(kwargs)
    prompt = args[0] if args else options.pop("prompt", None)
    messages, typed = options.pop("messages", None), options.pop("request", None)
    kind = type(lm)
    facts: tuple[str, str] = (str(lm.model), str(lm.model_type))
    class_name = f"{kind.__module__}.{kind.__qualname__}"
    if typed is not None or not isinstance(prompt, str | None):
        from dspy._vendor.lm15.serde import request_to_dict

        body = request_to_dict(prompt if typed is None else typed)
        config = body.pop("config", {})
        options = {**options, **config.pop("extensions", {}), **config, **body}
        return LmRequest(*facts, _content(body["messages"]), _options(options), {}, class_name)
    # As in DSPy, a prompt is one message.
    messages = messages or [{"role": "user", "content": prompt}]
    return LmRequest(*facts, _content(messages), _options(options), _options(lm.kwargs), class_name)


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: _content(option) for name, option in options.items() if name in OPTIONS}
    if isinstance(tools := kept.get("tools"), list):
        kept["tools"] = [_allowed(tool, _TOOL_FIELDS) if isinstance(tool, dict) else tool for tool in tools]
    return kept


def _allowed(fields: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: field for name, field in fields.items() if name in names}


def _content(obj: object) -> Any:
    return _without_files(plain(obj))


def _without_files(obj: Any) -> Any:
    """Replace files by their SHA-256, as an image alone could exceed the limit of a journal entry."""
    if isinstance(obj, dict):
        return {name: _digest(item) if _is_file(name, item) else _without_files(item) for name, item in obj.items()}
    if isinstance(obj, list):
        return [_without_files(item) for item in obj]
    if isinstance(obj, str) and len(obj) > _LONG and (match := _DATA_URI.fullmatch(obj)):
        return f"data:{match[1]};{_digest(match[2])}"
    return obj


def _is_file(name: str, item: object) -> bool:
    return name == "data" and isinstance(item, str) and len(item) > _LONG


def _digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def plain(obj: object) -> Any:
    """Return any object as JSON. Objects without a JSON form become the name of their type, as a `repr` may vary."""
    if obj is None or isinstance(obj, bool | int):
        return obj
    if isinstance(obj, str):
        # UTF-8 cannot encode a lone surrogate.
        return obj.encode(errors="backslashreplace").decode()
    if isinstance(obj, float):
        return obj if isfinite(obj) else str(obj)
    if isinstance(obj, Mapping):
        return {str(plain(name)): plain(item) for name, item in obj.items()}
    if isinstance(obj, list | tuple):
        return [plain(item) for item in obj]
    if isinstance(obj, set | frozenset):
        return sorted((plain(item) for item in obj), key=str)
    return _plain_object(obj)


def _plain_object(obj: object) -> Any:
    if isinstance(obj, type) and issubclass(obj, BaseModel):
        return {"name": obj.__name__, "schema": plain(obj.model_json_schema())}
    if isinstance(obj, BaseModel):
        # Not model_dump: the serializers of LM clients' classes may be deferred, and warn.
        return plain(dict(obj))
    kind = obj if isinstance(obj, type) else type(obj)
    return f"<{kind.__module__}.{kind.__qualname__}>"


# Answers


class Attributes(dict[str, Any]):
    """A part of an answer, such as a tool call, whose fields are both items and attributes, as in LM clients."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def response_of(answer: object, usage: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded form of an answer."""
    if isinstance(answer, list):
        return {"outputs": plain(answer), "usage": plain(usage)}
    from dspy._vendor.lm15.serde import response_to_dict
    from dspy.lm15 import Response

    if isinstance(answer, Response):
        return {"typed": plain(response_to_dict(answer)), "usage": plain(usage)}
    return {"outputs": plain(answer), "usage": plain(usage)}


def answer_of(response: Mapping[str, Any]) -> Any:
    """Return the answer in a recorded response."""
    if "typed" in response:
        from dspy._vendor.lm15.serde import response_from_dict

        return response_from_dict(response["typed"])
    return _with_attributes(response["outputs"])


def _with_attributes(obj: Any) -> Any:
    if isinstance(obj, dict):
        return Attributes({name: _with_attributes(item) for name, item in obj.items()})
    return [_with_attributes(item) for item in obj] if isinstance(obj, list) else obj


def failure_of(error: BaseException, secrets: Iterable[str]) -> dict[str, Any]:
    """Return the recorded form of an error, without secrets, as providers often repeat the request in errors."""
    try:
        message = plain(str(error))
    except Exception as fault:  # noqa: BLE001 -- the error's __str__ may raise anything
        message = f"it has no text: its __str__ raised {type(fault).__name__}"
    kind = type(error)
    return {"type": f"{kind.__module__}.{kind.__qualname__}", "message": hidden(message, secrets)}


def secrets_of(lm: Any, kwargs: Mapping[str, Any]) -> set[str]:
    """Return the texts in a call that may be secret: those in all options that are not kept, and their parts."""
    return {part for text in _secrets_of(lm, kwargs) for part in _parts_of(text) if len(part) >= _SHORTEST_SECRET}


def _parts_of(text: str) -> Iterator[str]:
    """Yield a text, and what is quoted of it alone: the token of a header, the host or the key in an address."""
    yield text
    yield from (word for word in _SEPARATORS.split(text) if len(word) >= _SHORTEST_PART)
    if "://" in text:
        with suppress(ValueError):
            address = urlsplit(text)
            values = (value for _, value in parse_qsl(address.query))
            yield from filter(None, (address.netloc, address.hostname, address.username, address.password, *values))


def _secrets_of(lm: Any, kwargs: Mapping[str, Any]) -> Iterator[str]:
    for options in (getattr(lm, "kwargs", {}), kwargs):
        others = {name: option for name, option in options.items() if name not in OPTIONS | {"messages", "prompt"}}
        yield from _texts(plain(others))


def _texts(obj: Any) -> Iterator[str]:
    if isinstance(obj, str):
        yield obj
    elif isinstance(obj, dict | list):
        for item in obj.values() if isinstance(obj, dict) else obj:
            yield from _texts(item)
