"""`tensor`: numbers and their shape, or the numbers as bytes."""

from typing import Any, Final

from dspex_persist.state.values.documents import BinaryValue, check_plain, is_array, listed, numbers, spelled
from dspex_persist.state.values.json_text import RefusedError, shown
from dspex_persist.state.values.keywords import Keyword, Rule
from dspex_persist.state.values.registry import Companion, ValueType
from dspex_persist.state.values.tensors import (
    Dtype,
    Shape,
    check_dtype,
    check_elements,
    elements,
    get_dtype,
    read_shape,
    shown_shape,
)

_KEYS: Final = {"shape", "data", "dtype"}


def _to_tensor(document: object) -> dict[str, object]:
    """Check that `shape`, `data` and an optional `dtype` agree with each other, and return the object unchanged."""
    if not isinstance(document, dict):
        raise RefusedError(f'a tensor is an object of "shape" and "data", not {shown(document)}')
    for key in ("shape", "data"):
        if key not in document:
            raise RefusedError(f'a tensor is an object of "shape" and "data"; {shown(key)} is missing')
    for key in document.keys() - _KEYS:
        raise RefusedError(f'a tensor is an object of "shape", "data" and perhaps "dtype"; unknown key {shown(key)}')
    entries = elements(document["data"], read_shape(document["shape"]))
    check_elements(entries)
    if "dtype" in document:
        check_dtype(entries, get_dtype(document["dtype"]))
    return document


def _shape(stated: object) -> Rule:
    expected = _expected_shape(stated)

    def check_shape(shape: Shape) -> str | None:
        if len(shape) == len(expected) and all(
            want is None or want == length for want, length in zip(expected, shape, strict=True)
        ):
            return None
        return f"shape {shown_shape(shape)} does not match shape {shown_shape(expected)} (null: any length)"

    return Rule(lambda tensor: check_shape(tuple(tensor["shape"])), check_shape)


def _expected_shape(stated: object) -> tuple[int | None, ...]:
    if not isinstance(stated, list):
        raise RefusedError(f"shape must be a list of non-negative integers or null, not {shown(stated)}")
    for entry in stated:
        if entry is not None and (type(entry) is not int or entry < -1):
            raise RefusedError(f"shape must hold non-negative integers, or null or -1 for any; not {shown(entry)}")
    return tuple(None if entry == -1 else entry for entry in stated)


def _dtype(stated: object) -> Rule:
    dtype = get_dtype(stated)

    def check(tensor: dict[str, Any]) -> str | None:
        declared = get_dtype(tensor["dtype"]) if "dtype" in tensor else dtype
        if declared != dtype:
            return f"dtype {declared.name} is not {dtype.name}"
        try:
            check_dtype(elements(tensor["data"], tuple(tensor["shape"])), dtype)
        except RefusedError as error:
            return error.reason
        return None

    return Rule(check, dtype=dtype)


def _decode(document: object) -> object:
    if not isinstance(document, dict) or "data" not in document:
        raise RefusedError(f'a tensor is an object of "shape" and "data", not {shown(document)}')
    return {**document, "data": numbers(document["data"])}


def _encode(obj: object) -> object:
    if is_array(obj):
        obj = {"shape": [int(length) for length in obj.shape], "data": obj.tolist()}
    if isinstance(obj, dict):
        obj = {**obj, "data": spelled(obj.get("data"))}
    check_plain(obj)
    return obj


def _is_tensor(obj: dict[Any, Any]) -> bool:
    """Whether a dict has just a shape and numbers that fit it. Other dicts may have these two keys by chance."""
    if obj.keys() != {"shape", "data"}:
        return False
    try:
        check_elements(elements(listed(obj["data"]), read_shape(listed(obj["shape"]))))
    except (RefusedError, RecursionError):
        return False
    return True


def _has_dimensions(obj: object) -> bool:
    return is_array(obj) and len(obj.shape) > 0


def _unpack(shape: Shape, dtype: Dtype, entries: list[Any]) -> object:
    return {"shape": list(shape), "dtype": dtype.name, "data": entries}


TENSOR: Final = ValueType(
    "tensor",
    coerce=_to_tensor,
    # The empty shape is that of a scalar.
    constrain={"shape": Keyword(_shape), "dtype": Keyword(_dtype, empty="")},
    decode=_decode,
    encode=_encode,
    infer={dict: _is_tensor, BinaryValue: None, object: _has_dimensions},
    companion=Companion(_unpack),
    is_container=True,
)
