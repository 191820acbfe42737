"""Conversions between values of the protocol and Python objects."""

from collections.abc import Callable, Mapping
from typing import Any

from dspex_persist.state.errors import InvalidValueError
from dspex_persist.state.model import Value
from dspex_persist.state.values.binary import companion_of, find_layout, unpack
from dspex_persist.state.values.documents import BinaryValue, check_plain, is_array, no_form, numbers
from dspex_persist.state.values.json_text import RefusedError, canonical, read, shown, utf8_size_bytes
from dspex_persist.state.values.registry import (
    Unpack,
    ValueType,
    find_type,
    get_type,
    is_number,
    type_of_object,
)
from dspex_persist.state.values.scalars import SCALARS, document_of, keep
from dspex_persist.state.values.tensors import Dtype, Shape

_ANONYMOUS = "value"
_NO_TYPE = ""


# From values to objects.


def decode(type_name: str, value: Value) -> object:
    """Return the Python object for a normalised value.

    Floats include NaN and the infinities. A tensor becomes a dict with `shape` and `data` (nested or flat, as it was
    written); one written as `npy` or raw numbers becomes a dict with `shape`, `dtype` and `data`, flat in row-major
    order. An embedding becomes a list of numbers. Other binary values become a `BinaryValue`.

    Args:
        type_name: The name of the value's type.
        value: The value.

    Raises:
        InvalidValueError: The value is not valid for the type.
    """
    value_type = find_type(type_name)
    try:
        try:
            # As in `document_of`, without the call: programs decode many numbers.
            document = value.document
        except AttributeError:
            document = document_of(value)
        if value.binary is not None:
            return _decode_binary(_unpack_for(value_type), document, value.binary)
        return document if value_type is None else value_type.decode(document)
    except RefusedError as error:
        raise InvalidValueError(_ANONYMOUS, error.reason) from error


def decode_argument(type_name: str, value: Value) -> object:
    """Return the Python object for a binary argument of a tool.

    It is a list of numbers for a parameter whose type has lists; for an unknown type ("any") it follows from the
    description; otherwise it is a tensor.
    """
    value_type = find_type(type_name)
    try:
        document = read(value.json)
        if value_type is not None and list in value_type.infer:
            unpack_numbers: Unpack = _numbers_alone
        else:
            unpack_numbers = _unpack_for(None, document if value_type is None else None)
        return _decode_binary(unpack_numbers, document, value.binary or b"")
    except RefusedError as error:
        raise InvalidValueError(_ANONYMOUS, error.reason) from error


def _decode_binary(unpack_numbers: Unpack, description: object, content: bytes) -> object:
    if not isinstance(description, dict):
        raise RefusedError(f"the description of a binary value is a JSON object, not {shown(description)}")
    layout = find_layout(description, content)
    if layout is None:
        return BinaryValue(description, content)
    return unpack_numbers(layout.shape, layout.dtype, unpack(layout, content))


def _unpack_for(value_type: ValueType | None, description: object = None) -> Unpack:
    """Return the type's function to unpack numbers, or else that of the type in the description."""
    if value_type is not None and value_type.companion is not None:
        return value_type.companion.unpack
    described = BinaryValue(description if isinstance(description, dict) else {}, b"")
    return companion_of(get_type(_ANONYMOUS, infer_type(described))).unpack


def _numbers_alone(_shape: Shape, _dtype: Dtype, elements: list[Any]) -> object:
    return elements


# From objects to values.


def infer_type(obj: object, *, name: str = _ANONYMOUS) -> str:
    """Return the name of the value type for a Python object, or raise `InvalidValueError`."""
    value_type = type_of_object(obj)
    if value_type is not None:
        return value_type.name
    if _is_model(obj):
        return infer_type(_dumped(obj), name=name)
    if is_array(obj) and not len(obj.shape):
        return infer_type(obj.tolist(), name=name)
    raise InvalidValueError(name, no_form(obj))


def encode(obj: object, type_name: str | None = None, *, name: str = _ANONYMOUS) -> Value:
    """Return a Python object as a value: as JSON, or for a `BinaryValue` as its bytes.

    `normalise` later applies the rules of the type.

    Args:
        obj: The object.
        type_name: The name of the type; inferred from the object if None.
        name: The variable's name, for errors.

    Raises:
        InvalidValueError: The object has no JSON form; the message says what to do instead.
        UnknownTypeError: There is no such type.
    """
    obj = _dumped(obj)
    value_type = get_type(name, type_name or infer_type(obj, name=name))
    try:
        if isinstance(obj, BinaryValue):
            return _encode_binary(obj, value_type)
        document = value_type.encode(obj)
        text = canonical(document)
        utf8_size_bytes(text)
    except RefusedError as error:
        raise InvalidValueError(name, error.reason) from error
    except RecursionError:
        raise InvalidValueError(name, "nested too deep, or contains itself") from None
    return keep(Value(text), document)


def _is_model(obj: object) -> bool:
    return getattr(type(obj), "model_dump", None) is not None


def _dumped(obj: Any) -> Any:
    """Return an instance of a pydantic model as plain objects, in the form that the model can read again."""
    return obj.model_dump(mode="json", by_alias=True, round_trip=True) if _is_model(obj) else obj


def encode_for(obj: object, find_type: Callable[[], str | None], *, name: str = _ANONYMOUS) -> Value:
    """Return an object as a value for a variable whose type `find_type` returns.

    `find_type` is called only if the encoding depends on the type: for arrays, NaN and the infinities.
    """
    is_scalar = type(obj) in SCALARS
    if not is_scalar:
        obj = _dumped(obj)
        if is_array(obj) and not len(obj.shape):
            obj = obj.tolist()
        if obj is None or isinstance(obj, BinaryValue):
            return encode(obj, name=name)
    try:
        if not is_scalar:
            check_plain(obj)
        # It refuses NaN and the infinities, too.
        text = canonical(obj)
        utf8_size_bytes(text)
    except (RefusedError, RecursionError):
        return encode(obj, find_type(), name=name)
    return keep(Value(text), obj)


def encode_loosely(obj: object, *, name: str = _ANONYMOUS) -> Value:
    """Return an object without a variable's type as a value: an argument or result of a tool, which may be None."""
    return Value("null") if obj is None else encode(obj, name=name)


def encode_arguments(arguments: Mapping[str, object]) -> dict[str, Value]:
    """Return a tool's arguments as values."""
    return {name: encode_loosely(argument, name=name) for name, argument in arguments.items()}


def decode_loosely(value: Value, type_name: str = _NO_TYPE) -> object:
    """Return the Python object for a value without a variable's type.

    `type_name`: with "float", the names of NaN and the infinities, alone or in lists, become floats.
    """
    if value.binary is not None:
        return decode(_NO_TYPE, value)
    document = document_of(value)
    return numbers(document) if is_number(type_name) else document


def _encode_binary(obj: BinaryValue, value_type: ValueType) -> Value:
    companion_of(value_type)
    check_plain(obj.description)
    text = canonical(obj.description)
    utf8_size_bytes(text)
    return Value(text, bytes(obj.content))
