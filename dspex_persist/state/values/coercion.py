"""What each value type accepts, and as what it is kept."""

from collections.abc import Callable, Mapping

from dspex_persist.state.values.json_text import RefusedError, shown
from dspex_persist.state.values.tensors import (
    NON_FINITE,
    check_dtype,
    check_elements,
    elements,
    get_dtype,
    read_shape,
)

_EXACT_INTEGERS = 2**53
_BOOLEANS = {"true": True, "false": False}
_TENSOR_KEYS = {"shape", "data", "dtype"}

Coercion = Callable[[object], object]


def to_float(document: object) -> float:
    """A double. An integer only if a double holds it exactly; NaN and the infinities by name."""
    if type(document) is float:
        return document
    if type(document) is int:
        return _exactly(document)
    if isinstance(document, str) and document in NON_FINITE:
        return NON_FINITE[document]
    raise RefusedError(f'a float is a number, "NaN", "Infinity" or "-Infinity", not {shown(document)}')


def _exactly(number: int) -> float:
    if -_EXACT_INTEGERS <= number <= _EXACT_INTEGERS:
        return float(number)
    try:
        nearest = float(number)
    except OverflowError:
        raise RefusedError(f"{shown(number)} is beyond the range of a double") from None
    if int(nearest) != number:
        raise RefusedError(f"a double cannot hold {shown(number)} exactly; use an integer, or round it yourself")
    return nearest


def to_integer(document: object) -> int:
    """An integer of any size; a float if it is whole."""
    if type(document) is int:
        return document
    if type(document) is float and document.is_integer():
        return int(document)
    raise RefusedError(f"an integer is a whole number, not {shown(document)}")


def to_boolean(document: object) -> bool:
    """true or false; also as a string, or as 1 or 0."""
    if type(document) is bool:
        return document
    if type(document) is int and document in (0, 1):
        return document == 1
    if isinstance(document, str) and document in _BOOLEANS:
        return _BOOLEANS[document]
    raise RefusedError(f'a boolean is true, false, "true", "false", 1 or 0, not {shown(document)}')


def _to_text(kind: str) -> Coercion:
    def to_text(document: object) -> str:
        if isinstance(document, str):
            return document
        raise RefusedError(f"a {kind} is a JSON string, not {shown(document)}")

    return to_text


def to_embedding(document: object) -> list[object]:
    """A list of floats. NaN and the infinities stay the strings that JSON has for them."""
    if not isinstance(document, list):
        raise RefusedError(f"an embedding is a list of numbers, not {shown(document)}")
    if set(map(type, document)) <= {float}:
        return document
    return [_embedding_element(index, element) for index, element in enumerate(document)]


def _embedding_element(index: int, element: object) -> object:
    try:
        number = to_float(element)
    except RefusedError as error:
        raise RefusedError(f"element {index}: {error.reason}") from error
    return element if isinstance(element, str) else number


def to_tensor(document: object) -> dict[str, object]:
    """An object of `shape` and `data` (and perhaps `dtype`) that agree with each other; kept as it came."""
    if not isinstance(document, dict):
        raise RefusedError(f'a tensor is an object of "shape" and "data", not {shown(document)}')
    for key in ("shape", "data"):
        if key not in document:
            raise RefusedError(f'a tensor is an object of "shape" and "data"; {shown(key)} is missing')
    for key in document.keys() - _TENSOR_KEYS:
        raise RefusedError(f'a tensor is an object of "shape", "data" and perhaps "dtype"; unknown key {shown(key)}')
    found = elements(document["data"], read_shape(document["shape"]))
    check_elements(found)
    if "dtype" in document:
        check_dtype(found, get_dtype(document["dtype"]))
    return document


def to_map(document: object) -> dict[str, object]:
    """A JSON object, as it is."""
    if isinstance(document, dict):
        return document
    raise RefusedError(f"a map is a JSON object, not {shown(document)}")


def to_list(document: object) -> list[object]:
    """A JSON array, as it is."""
    if isinstance(document, list):
        return document
    raise RefusedError(f"a list is a JSON array, not {shown(document)}")


COERCIONS: Mapping[str, Coercion] = {
    "float": to_float,
    "integer": to_integer,
    "string": _to_text("string"),
    "boolean": to_boolean,
    "choice": _to_text("choice"),
    "module": _to_text("module"),
    "embedding": to_embedding,
    "tensor": to_tensor,
    "map": to_map,
    "list": to_list,
}
TYPE_NAMES = tuple(COERCIONS)
CONTAINER_TYPE_NAMES = ("embedding", "tensor", "map", "list")
"""Types of JSON objects and arrays; a string that is the JSON of one is taken for it."""
BINARY_TYPE_NAMES = ("tensor", "embedding")
