"""Results of tools: their conversion to values, and their limits."""

from typing import Final

from dspex_persist.state import values
from dspex_persist.state.errors import InvalidValueError, LimitExceededError, quote
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Value

NOTHING: Final = Value("null")


def result_value(obj: object, name: str) -> Value:
    """Encode what a tool's code returned or yielded; `InvalidValueError`, in which it is called `name`."""
    value = values.encode_loosely(obj, name=name)
    if value.binary is not None:
        raise InvalidValueError(name, "the protocol has no field for its bytes here: write it to a variable instead")
    return value


def checked(tool: str, result: Value, limits: Limits) -> Value:
    """Return a tool's result; `LimitExceededError` if it is too large or nests too deeply."""
    what, most = f"the result of {quote(tool)}", limits.value_size_bytes
    if result.size_bytes > most:
        raise LimitExceededError(f"size of {what}", result.size_bytes, most, "value_size_bytes")
    depth = values.depth_if_above(result.json, limits.json_depth)
    if depth:
        raise LimitExceededError(f"JSON nesting of {what}", depth, limits.json_depth, "json_depth")
    return result
