"""Shapes and element types of tensors."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf, nan
from typing import TypeAlias

from dspex_persist.state.values.json_text import RefusedError, shown

_SHAPE_ENTRIES_SHOWN = 8

Shape: TypeAlias = tuple[int, ...]

# The strings that represent floats for which JSON has no number.
NON_FINITE = {"NaN": nan, "Infinity": inf, "-Infinity": -inf}


@dataclass(frozen=True, slots=True)
class Dtype:
    """An element type: its `struct` code, and the smallest and the largest number that it can represent."""

    name: str
    code: str
    low: float
    high: float

    @property
    def size_bytes(self) -> int:
        """The size of one element in bytes."""
        return struct.calcsize(f"<{self.code}")

    @property
    def is_float(self) -> bool:
        """Whether it can represent fractions, NaN and the infinities."""
        return self.code in "efd"


def _integer_dtypes() -> list[Dtype]:
    dtypes = []
    for bits, code in ((8, "b"), (16, "h"), (32, "i"), (64, "q")):
        dtypes.append(Dtype(f"int{bits}", code, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
        dtypes.append(Dtype(f"uint{bits}", code.upper(), 0, 2**bits - 1))
    return dtypes


_FLOAT_DTYPES = [
    Dtype("float16", "e", -65504.0, 65504.0),
    Dtype("float32", "f", -3.4028234663852886e38, 3.4028234663852886e38),
    Dtype("float64", "d", -1.7976931348623157e308, 1.7976931348623157e308),
]
DTYPES = {dtype.name: dtype for dtype in [*_FLOAT_DTYPES, *_integer_dtypes(), Dtype("bool", "?", 0, 1)]}


def _aliases() -> dict[str, str]:
    """Return other spellings: `f32`, `s32`, `u8` count bits; `<f4` (NumPy's, with its byte order) counts bytes."""
    spellings = {}
    for dtype in DTYPES.values():
        bits = dtype.size_bytes * 8
        kind = dtype.name[0]
        spellings[f"{'s' if kind == 'i' else kind}{bits}"] = dtype.name
        for order in "<>=|":
            spellings[f"{order}{kind}{dtype.size_bytes}"] = dtype.name
    return spellings


_SPELLINGS = _aliases()


def find_dtype(spelling: object) -> Dtype | None:
    """Return the element type with this name (`float32`, `f32`, `<f4`, ...), or None."""
    return DTYPES.get(_SPELLINGS.get(spelling, spelling)) if isinstance(spelling, str) else None


def get_dtype(spelling: object) -> Dtype:
    """Return the element type with this name, or raise `RefusedError`, which lists all of them."""
    dtype = find_dtype(spelling)
    if dtype is None:
        raise RefusedError(f"dtype must be one of: {', '.join(DTYPES)}; not {shown(spelling)}")
    return dtype


def read_shape(document: object) -> Shape:
    """Return `document` as a shape, or raise `RefusedError` unless it is a list of non-negative integers."""
    if not isinstance(document, list):
        raise RefusedError(f"shape must be a list of non-negative integers, not {shown(document)}")
    for entry in document:
        if type(entry) is not int or entry < 0:
            raise RefusedError(f"shape must hold non-negative integers only, not {shown(entry)}")
    return tuple(document)


def shown_shape(shape: Sequence[int | None]) -> str:
    """Return `shape` for a message, shortened."""
    entries = [shown(entry) for entry in shape[:_SHAPE_ENTRIES_SHOWN]]
    if len(shape) > _SHAPE_ENTRIES_SHOWN:
        entries.append("...")
    return f"[{', '.join(entries)}]"


def element_count(shape: Shape, at_most: int) -> int | None:
    """Return the product of `shape`, or None above `at_most`, without computing the product of a hostile shape."""
    if 0 in shape:
        return 0
    count = 1
    for entry in shape:
        count *= entry
        if count > at_most:
            return None
    return count


def elements(data: object, shape: Shape) -> list[object]:
    """Return the elements of a tensor's `data` in row-major order.

    `data` is a scalar (for the shape `[]`), a flat list with as many elements as the product of `shape`, or nested
    lists with exactly this shape; anything else raises `RefusedError`.
    """
    if not isinstance(data, list):
        if shape:
            raise RefusedError(f"data must be a list for the shape {shown_shape(shape)}, not {shown(data)}")
        return [data]
    if list in set(map(type, data)):
        return _nested_elements(data, shape)
    if element_count(shape, len(data)) != len(data):
        raise RefusedError(f"data has {len(data)} elements, which is not the product of shape {shown_shape(shape)}")
    return data


def _nested_elements(data: list[object], shape: Shape) -> list[object]:
    level: list[object] = [data]
    for depth, length in enumerate(shape):
        lists = [entry for entry in level if isinstance(entry, list) and len(entry) == length]
        if len(lists) != len(level):
            raise RefusedError(f"data does not have the shape {shown_shape(shape)}: it differs at depth {depth}")
        level = list(chain.from_iterable(lists))
        if not level:
            break
    if list in set(map(type, level)):
        raise RefusedError(f"data is nested deeper than its shape {shown_shape(shape)}")
    return level


def check_elements(elements: list[object]) -> None:
    """Raise `RefusedError` unless each element is a number, a boolean, or the name of NaN or an infinity."""
    if set(map(type, elements)) <= {int, float, bool}:
        return
    for index, element in enumerate(elements):
        if not isinstance(element, int | float) and not (isinstance(element, str) and element in NON_FINITE):
            raise RefusedError(f"element {index} of data is {shown(element)}, not a number")


def check_dtype(elements: list[object], dtype: Dtype) -> None:
    """Raise `RefusedError` unless each of the elements (see `check_elements`) is a value of `dtype`."""
    for index, element in enumerate(elements):
        if not _fits(element, dtype):
            raise RefusedError(f"element {index} of data is {shown(element)}, which is not a {dtype.name}")


def _fits(element: object, dtype: Dtype) -> bool:
    if isinstance(element, str):
        return dtype.is_float
    if isinstance(element, bool):
        return dtype.name == "bool"
    if not isinstance(element, int | float):
        return False
    return dtype.low <= element <= dtype.high and (dtype.is_float or element == int(element))
