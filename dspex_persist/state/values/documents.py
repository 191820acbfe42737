"""Conversions between Python objects and JSON documents that several types share."""

from dataclasses import dataclass, is_dataclass
from enum import Enum
from math import inf, isfinite
from numbers import Number
from pathlib import PurePath
from typing import Any, Protocol, TypeGuard

from dspex_persist.state.values.json_text import RefusedError, shorten, shown
from dspex_persist.state.values.tensors import NON_FINITE

_PATH_LENGTH = 300
_ADVICE: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (
        (bytes, bytearray, memoryview),
        "decode them to a str, or wrap them as BinaryValue for a tensor or embedding",
    ),
    ((set, frozenset), "make it a list, sorted if its order should be stable"),
    (complex, "make it a list of its real and imaginary parts"),
    (Enum, "use its value"),
    (PurePath, "convert it with str(...)"),
    (Number, "convert it with float(...), or with str(...) to keep all digits"),
)


@dataclass(frozen=True, slots=True)
class BinaryValue:
    """Bytes in an opaque format (`pickle`, `erlang_binary`, ...) with their description."""

    description: dict[str, Any]
    content: bytes


class Array(Protocol):
    """The common interface of NumPy arrays and scalars, torch tensors, and similar objects."""

    @property
    def shape(self) -> Any: ...

    def tolist(self) -> Any: ...


def is_array(obj: object) -> TypeGuard[Array]:
    """Whether an object is an array, such as NumPy's."""
    return hasattr(obj, "tolist") and hasattr(obj, "shape") and not isinstance(obj, memoryview | type)


def listed(obj: object) -> object:
    """Convert arrays and tuples to lists, recursively."""
    if is_array(obj):
        return obj.tolist()
    return [listed(entry) for entry in obj] if isinstance(obj, list | tuple) else obj


def plain(obj: object) -> object:
    """Return an object that JSON can represent as it is, an array as lists, or raise `RefusedError`."""
    if is_array(obj):
        obj = obj.tolist()
    check_plain(obj)
    return obj


def spelled(obj: object) -> object:
    """Return a number, or lists of numbers, with NaN and the infinities replaced by their names."""
    return _spelled(obj.tolist() if is_array(obj) else obj)


def _spelled(data: object) -> object:
    if isinstance(data, list | tuple):
        return [_spelled(entry) for entry in data]
    if isinstance(data, float):
        return data if isfinite(data) else _spelling(data)
    check_plain(data)
    return data


def numbers(data: object) -> object:
    """Return `data` with the names of NaN and the infinities replaced by the floats: the reverse of `spelled`."""
    if isinstance(data, list):
        return [numbers(entry) for entry in data]
    return NON_FINITE.get(data, data) if isinstance(data, str) else data


def _spelling(number: float) -> str:
    if number == inf:
        return "Infinity"
    return "-Infinity" if number == -inf else "NaN"


def check_plain(obj: object) -> None:
    """Raise `RefusedError`, which says where and what to do, unless JSON can represent all of `obj`."""
    if isinstance(obj, str | int) or obj is None:
        return
    if isinstance(obj, float):
        if not isfinite(obj):
            spelling = _spelling(obj)
            raise RefusedError(
                f"JSON has no {spelling}: use null or the string {shown(spelling)}, "
                "or a variable of type float, embedding or tensor"
            )
    elif isinstance(obj, dict):
        _check_entries(obj)
    elif isinstance(obj, list | tuple):
        for index, entry in enumerate(obj):
            _check_entry(index, entry)
    else:
        raise RefusedError(no_form(obj))


def _check_entries(obj: dict[Any, Any]) -> None:
    for key, entry in obj.items():
        if not isinstance(key, str):
            kind = shorten(type(key).__name__)
            raise RefusedError(f"the keys of a JSON object are strings, not {kind}: use str(key)")
        _check_entry(key, entry)


def _check_entry(key: str | int, entry: object) -> None:
    try:
        check_plain(entry)
    except RefusedError as error:
        # The path grows from the innermost entry outwards, up to a readable length.
        if len(error.reason) > _PATH_LENGTH:
            raise
        raise RefusedError(f"at {shown(key)}: {error.reason}") from None


def no_form(obj: object) -> str:
    """Return why `obj` cannot be a value, and what to do instead."""
    if obj is None:
        return "None has no type: delete the variable, or use a value of its type"
    kind = shorten(type(obj).__name__)
    for types, advice in _ADVICE:
        if isinstance(obj, types):
            return f"{kind} has no JSON form: {advice}"
    if hasattr(obj, "isoformat"):
        return f"{kind} has no JSON form: use its isoformat()"
    if hasattr(obj, "total_seconds"):
        return f"{kind} has no JSON form: use its total_seconds()"
    if is_dataclass(obj) and not isinstance(obj, type):
        return f"{kind} has no JSON form: use dataclasses.asdict(...), or a pydantic model"
    return f"{kind} has no JSON form: convert it to str, int, float, bool, list or dict"
