"""`embedding`: a list of floats, or the bytes of one."""

from typing import Any, Final

from dspex_persist.state.values.documents import BinaryValue, numbers, spelled
from dspex_persist.state.values.json_text import RefusedError, shown
from dspex_persist.state.values.keywords import Keyword, Rule, read_integer
from dspex_persist.state.values.registry import Companion, ValueType
from dspex_persist.state.values.tensors import Dtype, Shape, shown_shape
from dspex_persist.state.values.types.float import to_float

_NAME: Final = "embedding"


def _to_embedding(document: object) -> list[object]:
    """Convert to a list of floats. NaN and the infinities stay strings."""
    if not isinstance(document, list):
        raise RefusedError(f"an embedding is a list of numbers, not {shown(document)}")
    if set(map(type, document)) <= {float}:
        return document
    return [_element(index, element) for index, element in enumerate(document)]


def _element(index: int, element: object) -> object:
    try:
        number = to_float(element)
    except RefusedError as error:
        raise RefusedError(f"element {index}: {error.reason}") from error
    return element if isinstance(element, str) else number


def _dimensions(stated: object) -> Rule:
    dimensions = read_integer("dimensions", stated, at_least=1)

    def check(length: int) -> str | None:
        return None if length == dimensions else f"{shown(length)} dimensions instead of {shown(dimensions)}"

    return Rule(lambda embedding: check(len(embedding)), check_shape=lambda shape: check(*shape))


def _as_vector(shape: Shape) -> Shape:
    """Return the shape `[n]`; accepts `[1, n]` and the like."""
    lengths = [length for length in shape if length != 1]
    if len(lengths) > 1:
        raise RefusedError(f"an embedding has one dimension, not the shape {shown_shape(shape)}")
    return (lengths[0] if lengths else 1,)


def _unpack(_shape: Shape, _dtype: Dtype, elements: list[Any]) -> object:
    return elements


def _is_declared(obj: BinaryValue) -> bool:
    return bool(obj.description.get("type") == _NAME)


EMBEDDING: Final = ValueType(
    _NAME,
    coerce=_to_embedding,
    constrain={"dimensions": Keyword(_dimensions)},
    decode=numbers,
    encode=spelled,
    infer={BinaryValue: _is_declared},
    companion=Companion(_unpack, _as_vector),
    is_container=True,
)
