"""Binary values: numbers as bytes with a JSON description.

This module parses `npy` and raw little-endian numbers, with `struct` alone. The bytes of `pickle`, `erlang_binary` and
all other formats are stored as they are, and never interpreted.
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any

from dspex_persist.state.errors import InvalidValueError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Value
from dspex_persist.state.values.constraints import Constraints
from dspex_persist.state.values.json_text import (
    RefusedError,
    check_binary_size,
    parse_json,
    shorten,
    shown,
)
from dspex_persist.state.values.registry import Companion, ValueType
from dspex_persist.state.values.tensors import (
    DTYPES,
    Dtype,
    Shape,
    element_count,
    find_dtype,
    get_dtype,
    read_shape,
    shown_shape,
)

_NPY_MAGIC = b"\x93NUMPY"
# NumPy's limit, too, by default.
_NPY_HEADER_SIZE_BYTES = 10_000
# A header is a Python dict literal with three known entries. These patterns parse it without evaluating it.
_NPY_DICT = re.compile(r"\{(.*)\}\s*", re.DOTALL)
_NPY_ENTRY = re.compile(
    r"""\s*(?:
        ['"]descr['"]\s*:\s*(?:['"](?P<descr>[^'"]*)['"]|(?P<structured>\[.*?\]))
      | ['"]fortran_order['"]\s*:\s*(?P<fortran_order>True|False)
      | ['"]shape['"]\s*:\s*\((?P<shape>[0-9\s,]*)\)
    )\s*(?:,|$)\s*""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of numbers in bytes: from `offset`, in `byte_order` (`<` or `>`), column-major if `fortran`."""

    shape: Shape
    dtype: Dtype
    offset: int = 0
    byte_order: str = "<"
    fortran: bool = False


def check_content(name: str, value: Value, limits: Limits) -> None:
    """Refuse a binary value from a client if its bytes are missing.

    A value with an empty shape has no bytes, and neither has one with an empty description.
    """
    if value.binary:
        return
    description = parse_json(value.json, name=name, limits=limits)
    try:
        shape = _described_shape(description) if isinstance(description, dict) else None
    except RefusedError as error:
        raise InvalidValueError(name, error.reason) from error
    if description != {} and (shape is None or 0 not in shape):
        reason = (
            "it is described as binary, but its bytes are missing: send them in the companion field "
            "(initial_binary_value, binary_value, binary_updates, binary_parameters)"
        )
        raise InvalidValueError(name, reason)


def normalise_binary(name: str, value_type: ValueType, constraints: Constraints, value: Value, limits: Limits) -> Value:
    """Check the description of a value against its bytes and the constraints, and return the value unchanged."""
    content = value.binary or b""
    try:
        companion = companion_of(value_type)
        check_binary_size(name, len(content), limits)
        description = parse_json(value.json, name=name, limits=limits)
        if not isinstance(description, dict):
            raise RefusedError(f"the description of a binary value is a JSON object, not {shown(description)}")
        layout = find_layout(description, content)
        shape = layout.shape if layout else _described_shape(description)
        if shape is not None:
            shape = companion.as_shape(shape)
    except RefusedError as error:
        raise InvalidValueError(name, error.reason) from error
    constraints.check_description(name, shape, layout.dtype if layout else None)
    return value


def companion_of(value_type: ValueType) -> Companion:
    """Return the binary form of a type, or raise `RefusedError` if it has none."""
    if value_type.companion is None:
        raise RefusedError(f"{value_type.name} values are JSON; only tensors and embeddings have companion bytes")
    return value_type.companion


def _described_shape(description: Mapping[str, Any]) -> Shape | None:
    stated = description.get("shape")
    return None if stated is None else read_shape(stated)


def find_layout(description: Mapping[str, Any], content: bytes) -> Layout | None:
    """Return the layout of the numbers in `content`; None for an opaque format.

    Raises:
        RefusedError: The description contradicts the content, or the content has elements other than numbers.
    """
    binary_format = description.get("binary_format")
    if binary_format is not None and not isinstance(binary_format, str):
        raise RefusedError(f"binary_format must be a string, not {shown(binary_format)}")
    if binary_format == "npy":
        layout = _npy_layout(content)
        _check_agreement(description, layout)
    elif binary_format == "raw":
        layout = _raw_layout(description, get_dtype(description.get("dtype")), content)
    elif binary_format in ("float32", "float64"):
        layout = _raw_layout(description, DTYPES[binary_format], content)
        _check_agreement(description, layout)
    else:
        return None
    _check_length(layout, content)
    return layout


def _raw_layout(description: Mapping[str, Any], dtype: Dtype, content: bytes) -> Layout:
    shape = _described_shape(description)
    return Layout((len(content) // dtype.size_bytes,) if shape is None else shape, dtype)


def _check_agreement(description: Mapping[str, Any], layout: Layout) -> None:
    shape, dtype = _described_shape(description), find_dtype(description.get("dtype"))
    if shape is not None and shape != layout.shape:
        raise RefusedError(f"described shape {shown_shape(shape)} is not the content's {shown_shape(layout.shape)}")
    if dtype is not None and dtype != layout.dtype:
        raise RefusedError(f"described dtype {dtype.name} is not the content's {layout.dtype.name}")


def _check_length(layout: Layout, content: bytes) -> None:
    length = len(content) - layout.offset
    count = element_count(layout.shape, at_most=length)
    if count is None or count * layout.dtype.size_bytes != length:
        raise RefusedError(
            f"{length} bytes do not hold shape {shown_shape(layout.shape)} of {layout.dtype.name} "
            f"({layout.dtype.size_bytes} bytes each)"
        )


def _npy_layout(content: bytes) -> Layout:
    """Return the layout in the header of a .npy file (versions 1 to 3), without evaluating Python literals."""
    header, offset = _npy_header(content)
    outer = _NPY_DICT.fullmatch(header)
    if outer is None:
        raise RefusedError("npy: the header is not a dict")
    entries: dict[str, str] = {}
    body, position = outer[1], 0
    while position < len(body.rstrip()):
        entry = _NPY_ENTRY.match(body, position)
        if entry is None or entry.lastgroup is None or entry.lastgroup in entries:
            raise RefusedError(f"npy: the header is not understood at {shown(body[position:])}")
        entries[entry.lastgroup] = entry[entry.lastgroup]
        position = entry.end()
    if "structured" in entries:
        raise RefusedError("npy: only plain numbers are supported, not structured elements")
    if entries.keys() != {"descr", "fortran_order", "shape"}:
        raise RefusedError("npy: the header must state descr, fortran_order and shape")
    dtype = find_dtype(entries["descr"])
    if dtype is None:
        raise RefusedError(f"npy: elements must be one of: {', '.join(DTYPES)}; not {shown(entries['descr'])}")
    byte_order = ">" if entries["descr"].startswith(">") else "<"
    return Layout(_npy_shape(entries["shape"]), dtype, offset, byte_order, entries["fortran_order"] == "True")


def _npy_header(content: bytes) -> tuple[str, int]:
    """Return the text of the header, and the offset of the numbers."""
    if not content.startswith(_NPY_MAGIC) or len(content) < len(_NPY_MAGIC) + 6:
        raise RefusedError("npy: the content does not begin like a .npy file")
    major = content[6]
    if major not in (1, 2, 3):
        raise RefusedError(f"npy: unknown version {major}")
    length_format = "<H" if major == 1 else "<I"
    start = 8 + struct.calcsize(length_format)
    (length,) = struct.unpack_from(length_format, content, 8)
    if length > _NPY_HEADER_SIZE_BYTES or start + length > len(content):
        raise RefusedError(f"npy: a header of {length} bytes is too long")
    try:
        return content[start : start + length].decode("utf-8" if major == 3 else "latin-1"), start + length
    except UnicodeDecodeError:
        raise RefusedError("npy: the header is not UTF-8") from None


def _npy_shape(text: str) -> Shape:
    entries = text.split(",")
    if not entries[-1].strip():
        entries.pop()
    try:
        return tuple(int(entry) for entry in entries)
    except ValueError:
        raise RefusedError(f"npy: ({shorten(text)}) is not a shape") from None


def unpack(layout: Layout, content: bytes) -> list[Any]:
    """Return the numbers in `content` in row-major order."""
    count = prod(layout.shape) if 0 not in layout.shape else 0
    numbers = struct.unpack_from(f"{layout.byte_order}{count}{layout.dtype.code}", content, layout.offset)
    if layout.fortran and count:
        return [numbers[index] for index in _row_major(layout.shape)]
    return list(numbers)


def _row_major(shape: Shape) -> list[int]:
    """Return the column-major index of each element, in row-major order of the elements."""
    indices = [0]
    strides = accumulate(shape, mul, initial=1)
    for length, stride in zip(shape, strides, strict=False):
        indices = [index + step * stride for index in indices for step in range(length)]
    return indices
