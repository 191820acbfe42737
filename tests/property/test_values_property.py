"""Generated values: every one is either refused with an error, or stored and returned unchanged."""

import json
import math
import struct
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dspex_persist.state.errors import InvalidConstraintsError, InvalidValueError, LimitExceededError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Value
from dspex_persist.state.values import (
    BinaryValue,
    compile_constraints,
    decode,
    encode,
    infer_type,
    normalise,
    parse_json,
    type_names,
)

settings.register_profile("values", max_examples=100)
thorough = settings(settings.get_profile("values"))

LIMITS = Limits()
INTEGERS = st.one_of(st.integers(), st.integers(-(10**4299), 10**4299))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
FINITE = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.one_of(st.none(), st.booleans(), INTEGERS, FINITE, TEXTS)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)
SHAPES = st.lists(st.integers(0, 4), max_size=3)
CONSTRAINT_KEYS = [
    *("min", "max", "min_length", "max_length", "pattern", "enum", "choices", "allowed_modules", "namespace"),
    *("dimensions", "shape", "dtype"),
]
NUMBERS = st.one_of(st.floats(), st.integers(-(2**53), 2**53))


def nest(flat: list[Any], shape: list[int]) -> Any:
    """`flat` as nested lists with that shape; a scalar for the shape `[]`."""
    if not shape:
        return flat[0]
    step = math.prod(shape[1:])
    return [nest(flat[row * step : (row + 1) * step], shape[1:]) for row in range(shape[0])]


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Any]:
    shape = draw(SHAPES)
    count = math.prod(shape)
    flat = draw(st.lists(NUMBERS, min_size=count, max_size=count))
    return {"shape": shape, "data": nest(flat, shape) if draw(st.booleans()) else flat}


OBJECTS: dict[str, st.SearchStrategy[Any]] = {
    "float": st.floats(),
    "integer": INTEGERS,
    "string": TEXTS,
    "boolean": st.booleans(),
    "choice": TEXTS,
    "module": TEXTS,
    "embedding": st.lists(st.floats()),
    "tensor": tensors(),
    "map": st.dictionaries(TEXTS, DOCUMENTS, max_size=4),
    "list": st.lists(DOCUMENTS, max_size=4),
}
TYPED = st.sampled_from(type_names()).flatmap(lambda name: st.tuples(st.just(name), OBJECTS[name]))


def same(left: Any, right: Any) -> bool:
    """Whether two objects are equal in type and value, recursively. NaN equals NaN, and -0.0 does not equal 0.0."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return struct.pack("<d", left) == struct.pack("<d", right) or (math.isnan(left) and math.isnan(right))
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


def kept(type_name: str, value: Value, constraints: str = "") -> Value:
    return normalise("x", type_name, compile_constraints("x", type_name, constraints), value, LIMITS)


def outcome(call: Callable[[], Any]) -> Any:
    """The result of the call, or its error."""
    try:
        return call()
    except (InvalidValueError, InvalidConstraintsError) as error:
        return error


def strict_loads(text: str | bytes) -> Any:
    """The standard library's parser with our rules added in a slow way; raises ValueError for a violation."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("duplicate key")
        return dict(pairs)

    decoded = text.decode() if isinstance(text, bytes) else text
    document = json.loads(decoded, object_pairs_hook=unique)
    json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
    return document


@thorough
@given(TYPED)
def test_values_round_trip(typed: tuple[str, Any]) -> None:
    type_name, obj = typed
    value = kept(type_name, encode(obj, type_name))
    assert same(decode(type_name, value), obj)
    assert kept(type_name, value) == value
    assert encode(decode(type_name, value), type_name) == value


@thorough
@given(st.one_of(OBJECTS["float"], OBJECTS["integer"], TEXTS, st.booleans(), OBJECTS["map"], OBJECTS["list"]))
def test_inferred_types_hold_their_objects(obj: Any) -> None:
    type_name = infer_type(obj)
    assume(type_name != "tensor")
    assert same(decode(type_name, kept(type_name, encode(obj))), obj)


@thorough
@given(DOCUMENTS, st.booleans(), st.sampled_from([None, 0, 2]))
def test_every_spelling_of_a_document_is_stored_alike(document: Any, ensure_ascii: bool, indent: int | None) -> None:
    text = json.dumps([document], ensure_ascii=ensure_ascii, indent=indent)
    assert same(parse_json(text, name="x", limits=LIMITS), [document])
    assert same(parse_json(text.encode(), name="x", limits=LIMITS), [document])
    canonical = json.dumps([document], ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    assert kept("list", Value(text)) == Value(canonical)


@st.composite
def damaged_texts(draw: st.DrawFn) -> str:
    text = draw(st.builds(json.dumps, DOCUMENTS, ensure_ascii=st.booleans()))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        inserted = draw(
            st.sampled_from(
                ["", '"', "\\", "[", "]", "{", "}", ",", ":", "e9", "E999", "NaN", "\\ud800", "\ud800", "0"]
            )
        )
        text = text[:at] + inserted + text[at + draw(st.integers(0, 2)) :]
    return text


@thorough
@given(st.one_of(damaged_texts(), st.text(), st.binary()))
def test_exactly_the_allowed_json_is_accepted(text: str | bytes) -> None:
    try:
        expected = strict_loads(text)
    except ValueError:
        with pytest.raises(InvalidValueError):
            parse_json(text, name="x", limits=LIMITS)
    else:
        assert same(parse_json(text, name="x", limits=LIMITS), expected)


def depth_of(document: Any) -> int:
    if isinstance(document, dict):
        return 1 + max(map(depth_of, document.values()), default=0)
    if isinstance(document, list):
        return 1 + max(map(depth_of, document), default=0)
    return 0


@thorough
@given(
    st.recursive(
        st.sampled_from([1, '[{"\\[', "]]", '"']),
        lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.sampled_from('[]{}"\\'), inner)),
    ),
    st.integers(0, 4),
)
def test_depth_is_measured_exactly(document: Any, limit: int) -> None:
    text, limits = json.dumps(document), Limits(json_depth=limit)
    if depth_of(document) <= limit:
        assert parse_json(text, name="x", limits=limits) == document
        return
    with pytest.raises(LimitExceededError) as caught:
        parse_json(text, name="x", limits=limits)
    assert caught.value.actual == depth_of(document)


@thorough
@given(
    st.sampled_from(type_names()), st.one_of(DOCUMENTS, tensors().map(lambda tensor: json.loads(json.dumps(tensor))))
)
def test_any_document_is_stored_stably_or_refused(type_name: str, document: Any) -> None:
    text = json.dumps(document).replace("NaN", '"NaN"').replace("Infinity", "1")
    value = outcome(lambda: kept(type_name, Value(text)))
    if isinstance(value, InvalidValueError):
        assert len(str(value).encode()) < 500
        return
    assert kept(type_name, value) == value
    assert kept(type_name, encode(decode(type_name, value), type_name)) == value


@thorough
@given(tensors(), SHAPES)
def test_a_tensor_of_another_shape_is_refused(tensor: dict[str, Any], shape: list[int]) -> None:
    assume(shape != tensor["shape"])
    fits_flat = tensor["data"] == [] or not any(isinstance(entry, list) for entry in _entries(tensor["data"]))
    assume(not (fits_flat and math.prod(shape) == math.prod(tensor["shape"])))
    # Below an empty list, the lengths of the shape cannot be seen.
    assume(0 not in tensor["shape"] and 0 not in shape)
    with pytest.raises(InvalidValueError):
        kept("tensor", encode({**tensor, "shape": shape}, "tensor"))


def _entries(data: Any) -> list[Any]:
    return data if isinstance(data, list) else []


@thorough
@given(st.floats(), FINITE, FINITE)
def test_bounds_are_python_comparisons(number: float, minimum: float, maximum: float) -> None:
    assume(minimum <= maximum)
    constraints = json.dumps({"min": minimum, "max": maximum})
    if minimum <= number <= maximum:
        assert same(decode("float", kept("float", encode(number), constraints)), number)
        return
    with pytest.raises(InvalidValueError):
        kept("float", encode(number), constraints)


@thorough
@given(st.integers())
def test_integers_become_floats_exactly_or_not_at_all(number: int) -> None:
    try:
        value = decode("float", kept("float", Value(str(number))))
    except InvalidValueError:
        assert int(float(number)) != number
    else:
        assert value == number


@thorough
@given(
    st.sampled_from(type_names()),
    st.dictionaries(
        st.sampled_from(CONSTRAINT_KEYS),
        st.one_of(DOCUMENTS, st.integers(0, 3), st.lists(TEXTS, min_size=1, max_size=2), TEXTS),
        max_size=3,
    ),
)
def test_any_constraints_are_compiled_stably_or_refused(type_name: str, constraints: dict[str, Any]) -> None:
    compiled = outcome(lambda: compile_constraints("x", type_name, json.dumps(constraints)))
    if isinstance(compiled, InvalidConstraintsError):
        assert str(compiled).startswith("Invalid constraints")
        assert len(str(compiled).encode()) < 500
        return
    assert compiled == compile_constraints("x", type_name, compiled.json)
    stated = json.loads(compiled.json or "{}")
    left_out = [entry for key, entry in constraints.items() if key not in stated]
    assert all(entry is None or entry in ("", []) for entry in left_out)
    assert stated == {key: entry for key, entry in constraints.items() if key in stated}


@thorough
@given(st.binary(), st.dictionaries(TEXTS, DOCUMENTS, max_size=3))
def test_opaque_bytes_pass_through(content: bytes, facts: dict[str, Any]) -> None:
    binary = BinaryValue({**facts, "binary_format": "pickle", "shape": [len(content)]}, content)
    value = kept("tensor", encode(binary))
    assert value.binary == content
    assert decode("tensor", value) == binary


@thorough
@given(st.data(), SHAPES, st.sampled_from("<>"), st.booleans())
def test_npy_numbers_come_out_in_row_major_order(
    data: st.DataObject, shape: list[int], byte_order: str, fortran: bool
) -> None:
    count = math.prod(shape)
    numbers = data.draw(st.lists(st.floats(width=32), min_size=count, max_size=count))
    header = f"{{'descr': '{byte_order}f4', 'fortran_order': {fortran}, 'shape': ({''.join(f'{n},' for n in shape)})}}"
    stored = _column_major(numbers, shape) if fortran else numbers
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    value = Value('{"binary_format":"npy"}', content + struct.pack(f"{byte_order}{count}f", *stored))
    expected = {"shape": shape, "dtype": "float32", "data": numbers}
    assert same(decode("tensor", kept("tensor", value)), expected)


def _column_major(numbers: list[float], shape: list[int]) -> list[float]:
    """`numbers`, in row-major order, in the order in which Fortran would store them."""
    by_index = dict(zip(product(*map(range, shape)), numbers, strict=True))
    return [by_index[index] for index in sorted(by_index, key=lambda index: index[::-1])]


@thorough
@given(st.binary(max_size=200), st.booleans())
def test_any_npy_content_is_read_or_refused(content: bytes, with_magic: bool) -> None:
    magic = b"\x93NUMPY\x01\x00" if with_magic else b""
    value = Value('{"binary_format":"npy"}', magic + content)
    result = outcome(lambda: kept("tensor", value))
    if isinstance(result, InvalidValueError):
        assert "npy" in str(result) or "bytes do not hold" in str(result)
        return
    assert result is value
    assert isinstance(decode("tensor", value), dict)
