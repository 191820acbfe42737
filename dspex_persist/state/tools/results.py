"""Results of tools: values within their bounds, and chunks, whose list is a result."""

import io
from typing import Final

from dspex_persist.state import values
from dspex_persist.state.errors import InvalidValueError, LimitExceededError, quote
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Value

NOTHING: Final = Value("null")


def result_value(obj: object, name: str) -> Value:
    value = values.encode_loosely(obj, name=name)
    if value.binary is not None:
        raise InvalidValueError(name, "the protocol has no field for its bytes here: write it to a variable instead")
    return value


def checked(tool: str, result: Value, limits: Limits) -> Value:
    """A tool's result, if it is within the bounds of values."""
    what, most = f"the result of {quote(tool)}", limits.value_size_bytes
    if result.size_bytes > most:
        raise LimitExceededError(f"size of {what}", result.size_bytes, most, "value_size_bytes")
    depth = values.depth_if_above(result.json, limits.json_depth)
    if depth:
        raise LimitExceededError(f"JSON nesting of {what}", depth, limits.json_depth, "json_depth")
    return result


class Chunks:
    """What a tool has yielded, whose list is its result. It is measured while it comes: a tool may never stop."""

    def __init__(self, tool: str, limits: Limits) -> None:
        self._tool = tool
        self._limits = limits
        # One text: of very small chunks the objects would take a hundred times as much.
        self._text = io.StringIO()
        self._size_bytes = len("[]")

    def add(self, chunk: Value) -> Value:
        """Keep a chunk; `LimitExceededError` if it makes the result too large or too deep."""
        checked(self._tool, Value(f"[{chunk.json}]"), self._limits)
        self._size_bytes += chunk.size_bytes + len(",")
        most = self._limits.stream_size_bytes
        if self._size_bytes > most:
            raise LimitExceededError(
                f"size of the result of {quote(self._tool)}", self._size_bytes, most, "stream_size_bytes"
            )
        self._text.write(f",{chunk.json}")
        return chunk

    def result(self) -> Value:
        """The list of them."""
        return Value(f"[{self._text.getvalue()[1:]}]")
