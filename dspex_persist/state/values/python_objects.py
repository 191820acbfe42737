"""Between protocol values and the Python objects that people work with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, Protocol, TypeGuard

from dspex_persist.state.errors import InvalidValueError, UnknownTypeError
from dspex_persist.state.model import Value
from dspex_persist.state.values.binary import Layout, find_layout, unpack
from dspex_persist.state.values.coercion import (
    BINARY_TYPE_NAMES,
    TYPE_NAMES,
    to_boolean,
    to_float,
    to_integer,
)
from dspex_persist.state.values.json_text import (
    RefusedError,
    canonical,
    read,
    shorten,
    shown,
    utf8_size_bytes,
)
from dspex_persist.state.values.tensors import NON_FINITE, check_elements, elements, read_shape

_ANONYMOUS = "value"
_PATH_LENGTH = 300
_ADVICE: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (
        (bytes, bytearray, memoryview),
        "decode them to a str, or wrap them as BinaryValue for a tensor or embedding",
    ),
    ((set, frozenset), "make it a list, sorted if its order should be stable"),
    (complex, "make it a list of its real and imaginary parts"),
)


@dataclass(frozen=True, slots=True)
class BinaryValue:
    """Bytes that only their owner understands (`pickle`, `erlang_binary`, ...), with their description."""

    description: dict[str, Any]
    content: bytes


class _Array(Protocol):
    """What NumPy's arrays and scalars, torch's tensors and their like have in common."""

    @property
    def shape(self) -> Any: ...

    def tolist(self) -> Any: ...


def _is_array(obj: object) -> TypeGuard[_Array]:
    return hasattr(obj, "tolist") and hasattr(obj, "shape") and not isinstance(obj, memoryview | type)


# From values to objects.


def decode(type_name: str, value: Value) -> object:
    """The Python object that a normalised value stands for.

    Floats include NaN and the infinities. A tensor is a dict of `shape` and `data` (nested or flat, as it
    came); one that came as `npy` or raw numbers is a dict of `shape`, `dtype` and `data`, flat in row-major
    order. An embedding is a list of numbers however it came. Other binary values are a `BinaryValue`.
    """
    try:
        document = read(value.json)
        if value.binary is not None:
            return _decode_binary(type_name, document, value.binary)
        return _DECODERS[type_name](document) if type_name in _DECODERS else document
    except RefusedError as error:
        raise InvalidValueError(_ANONYMOUS, error.reason) from error


def _decode_binary(type_name: str, description: object, content: bytes) -> object:
    if not isinstance(description, dict):
        raise RefusedError(f"the description of a binary value is a JSON object, not {shown(description)}")
    layout: Layout | None = find_layout(description, content)
    if layout is None:
        return BinaryValue(description, content)
    numbers = unpack(layout, content)
    if type_name == "embedding":
        return numbers
    return {"shape": list(layout.shape), "dtype": layout.dtype.name, "data": numbers}


def _numbers(data: object) -> object:
    """`data` with the names of NaN and the infinities replaced by the floats."""
    if isinstance(data, list):
        return [_numbers(entry) for entry in data]
    return NON_FINITE.get(data, data) if isinstance(data, str) else data


def _decode_tensor(document: object) -> object:
    if not isinstance(document, dict) or "data" not in document:
        raise RefusedError(f'a tensor is an object of "shape" and "data", not {shown(document)}')
    return {**document, "data": _numbers(document["data"])}


_DECODERS: dict[str, Callable[[object], object]] = {
    "float": to_float,
    "integer": to_integer,
    "boolean": to_boolean,
    "embedding": _numbers,
    "tensor": _decode_tensor,
}


# From objects to values.


def infer_type(obj: object, *, name: str = _ANONYMOUS) -> str:
    """The value type of a Python object; `InvalidValueError` where there is none."""
    if isinstance(obj, bool):
        return "boolean"
    if isinstance(obj, int):
        return "integer"
    if isinstance(obj, float):
        return "float"
    if isinstance(obj, str):
        return "string"
    if isinstance(obj, dict):
        return "tensor" if _is_tensor(obj) else "map"
    if isinstance(obj, list | tuple):
        return "list"
    if isinstance(obj, BinaryValue):
        stated = obj.description.get("type")
        return stated if stated in BINARY_TYPE_NAMES else "tensor"
    if _is_array(obj):
        return "tensor" if len(obj.shape) else infer_type(obj.tolist(), name=name)
    raise InvalidValueError(name, _no_form(obj))


def _is_tensor(obj: dict[Any, Any]) -> bool:
    """Whether it is a shape and as many numbers; a dict of anybody's may have these two keys, and be no tensor."""
    if obj.keys() != {"shape", "data"}:
        return False
    try:
        check_elements(elements(_listed(obj["data"]), read_shape(_listed(obj["shape"]))))
    except (RefusedError, RecursionError):
        return False
    return True


def _listed(obj: object) -> object:
    """Arrays and tuples as lists."""
    if _is_array(obj):
        return obj.tolist()
    return [_listed(entry) for entry in obj] if isinstance(obj, list | tuple) else obj


def encode(obj: object, type_name: str | None = None, *, name: str = _ANONYMOUS) -> Value:
    """The value of a Python object, as JSON or, for a `BinaryValue`, as its bytes.

    The type is inferred unless it is given; `normalise` then applies the type's rules. For objects without a
    JSON form `InvalidValueError` says what to do instead.
    """
    type_name = type_name or infer_type(obj, name=name)
    if type_name not in TYPE_NAMES:
        raise UnknownTypeError(name, type_name, ", ".join(TYPE_NAMES))
    try:
        if isinstance(obj, BinaryValue):
            return _encode_binary(obj, type_name)
        if _is_array(obj):
            obj = _plain_array(obj, type_name)
        text = canonical(_document(obj, type_name))
        utf8_size_bytes(text)
    except RefusedError as error:
        raise InvalidValueError(name, error.reason) from error
    except RecursionError:
        raise InvalidValueError(name, "nested too deep, or contains itself") from None
    return Value(text)


def encode_for(obj: object, find_type: Callable[[], str | None], *, name: str = _ANONYMOUS) -> Value:
    """The value of an object for a variable whose type `find_type` tells.

    It is asked only where the type makes a difference: for arrays, and for NaN and the infinities.
    """
    if _is_array(obj) and not len(obj.shape):
        obj = obj.tolist()
    if obj is None or isinstance(obj, BinaryValue):
        return encode(obj, name=name)
    try:
        _check_plain(obj)
        text = canonical(obj)
        utf8_size_bytes(text)
    except (RefusedError, RecursionError):
        return encode(obj, find_type(), name=name)
    return Value(text)


def encode_loosely(obj: object, *, name: str = _ANONYMOUS) -> Value:
    """The value of what has no variable's type: a parameter or result of a tool, which may be None."""
    return Value("null") if obj is None else encode(obj, name=name)


def encode_arguments(arguments: Mapping[str, object]) -> dict[str, Value]:
    """The values of a tool's arguments."""
    return {name: encode_loosely(argument, name=name) for name, argument in arguments.items()}


def decode_loosely(value: Value, type_name: str = "") -> object:
    """The Python object of such a value: what its JSON says, or the numbers in its bytes.

    `type_name` "float": the names of NaN and the infinities, by themselves or in lists, are the floats.
    """
    if value.binary is not None:
        return decode("tensor", value)
    document = read(value.json)
    return _numbers(document) if type_name == "float" else document


def _encode_binary(obj: BinaryValue, type_name: str) -> Value:
    if type_name not in BINARY_TYPE_NAMES:
        raise RefusedError(f"{type_name} values are JSON; only tensors and embeddings have companion bytes")
    _check_plain(obj.description)
    text = canonical(obj.description)
    utf8_size_bytes(text)
    return Value(text, bytes(obj.content))


def _plain_array(array: _Array, type_name: str) -> object:
    if type_name == "tensor":
        return {"shape": [int(length) for length in array.shape], "data": array.tolist()}
    return array.tolist()


def _document(obj: object, type_name: str) -> object:
    """What JSON is written of `obj`; non-finite floats become strings only where the protocol has them so."""
    if type_name in ("float", "embedding"):
        return _spelled(obj)
    if type_name == "tensor" and isinstance(obj, dict):
        data = obj.get("data")
        obj = {**obj, "data": _spelled(data.tolist() if _is_array(data) else data)}
    _check_plain(obj)
    return obj


def _spelled(data: object) -> object:
    """`data`, a number or lists of numbers, with NaN and the infinities as strings."""
    if isinstance(data, list | tuple):
        return [_spelled(entry) for entry in data]
    if isinstance(data, float):
        return data if isfinite(data) else _spelling(data)
    _check_plain(data)
    return data


def _spelling(number: float) -> str:
    if number == inf:
        return "Infinity"
    return "-Infinity" if number == -inf else "NaN"


def _check_plain(obj: object) -> None:
    """`RefusedError`, saying where and what to do instead, unless JSON can say all of `obj`."""
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
        raise RefusedError(_no_form(obj))


def _check_entries(obj: dict[Any, Any]) -> None:
    for key, entry in obj.items():
        if not isinstance(key, str):
            kind = shorten(type(key).__name__)
            raise RefusedError(f"the keys of a JSON object are strings, not {kind}: use str(key)")
        _check_entry(key, entry)


def _check_entry(key: str | int, entry: object) -> None:
    try:
        _check_plain(entry)
    except RefusedError as error:
        # The path grows from the innermost entry outwards, as far as a message can be read.
        if len(error.reason) > _PATH_LENGTH:
            raise
        raise RefusedError(f"at {shown(key)}: {error.reason}") from None


def _no_form(obj: object) -> str:
    """Why `obj` is no value, and what to do instead."""
    if obj is None:
        return "None has no type: delete the variable, or use a value of its type"
    kind = shorten(type(obj).__name__)
    for types, advice in _ADVICE:
        if isinstance(obj, types):
            return f"{kind} has no JSON form: {advice}"
    if hasattr(obj, "isoformat"):
        return f"{kind} has no JSON form: use its isoformat()"
    return f"{kind} has no JSON form: convert it to str, int, float, bool, list or dict"
