"""Every type, constraint, coercion and refusal, as tables."""

import json
import math
import struct
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from dspex_persist.state.errors import (
    InvalidConstraintsError,
    InvalidValueError,
    LimitExceededError,
    StateError,
    UnknownTypeError,
)
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Value
from dspex_persist.state.values import (
    BinaryValue,
    compile_constraints,
    decode,
    decode_loosely,
    encode,
    encode_for,
    infer_type,
    normalise,
    parse_json,
    type_names,
)
from tests.deadline import cpu_s_below

LIMITS = Limits()
MESSAGE_LENGTH = 500


def table(names: str, rows: list[Any]) -> pytest.MarkDecorator:
    """`parametrize` with short ids: many rows hold megabytes, or integers that cannot be printed."""

    def label(index: int, row: Any) -> str:
        cells = row if isinstance(row, tuple) and "," in names else (row,)
        texts = [repr(cell[:20]) if isinstance(cell, str | bytes) else type(cell).__name__ for cell in cells]
        return f"{index}: {' '.join(texts)}".encode("ascii", "backslashreplace").decode()

    return pytest.mark.parametrize(names, rows, ids=[label(index, row) for index, row in enumerate(rows)])


def normalised(type_name: str, text: str, constraints: str = "", limits: Limits = LIMITS) -> str:
    """The stored JSON for the JSON `text`."""
    compiled = compile_constraints("x", type_name, constraints)
    kept = normalise("x", type_name, compiled, Value(text), limits)
    assert kept.binary is None
    return kept.json


def refusal(type_name: str, text: str, constraints: str = "", limits: Limits = LIMITS) -> str:
    """Why `text` is refused. Checks as well that the reason is short enough to read."""
    with pytest.raises(InvalidValueError) as caught:
        normalised(type_name, text, constraints, limits)
    assert caught.value.name == "x"
    assert len(str(caught.value)) < MESSAGE_LENGTH
    str(caught.value).encode()
    return caught.value.reason


def test_type_names() -> None:
    assert type_names() == (
        "float",
        "integer",
        "string",
        "boolean",
        "choice",
        "module",
        "embedding",
        "tensor",
        "map",
        "list",
    )


# ---- strict JSON ----


@table(
    "text, expected",
    [
        ("1", 1),
        (" \n1\t\r", 1),
        (b"1.5", 1.5),
        ('{"b": [1, null], "a": true}', {"b": [1, None], "a": True}),
        ("1e308", 1e308),
        ("1e-999", 0.0),
        ("9" * 308 + ".0", float("9" * 308)),
        ("9" * 330 + "e-30", float("9" * 330 + "e-30")),
        ("9" * 4300, 10**4300 - 1),
        ("-" + "9" * 4300, 1 - 10**4300),
        (r'"\ud83d\ude00"', "\U0001f600"),
        ('"\U0001f600"'.encode(), "\U0001f600"),
        (r'"\\ud800"', r"\ud800"),
        (r'"\u0000"', "\x00"),
        (r'{"a": "[[[[{{{{\"[["}', {"a": '[[[[{{{{"[['}),
        ('["e-e", 1e5, 1E+5]', ["e-e", 1e5, 1e5]),
    ],
)
def test_json_that_is_accepted(text: str | bytes, expected: object) -> None:
    assert parse_json(text, name="x", limits=LIMITS) == expected


@table(
    "text, reason",
    [
        ("", "not JSON"),
        ("   ", "not JSON"),
        ("1 2", "not JSON: more text after the document (character 1)"),
        ("{}x", "not JSON: more text"),
        ("[1,]", "not JSON"),
        ("{'a': 1}", "not JSON"),
        ("True", "not JSON"),
        ("nan", "not JSON"),
        ("01", "not JSON"),
        ("\ufeff1", "not JSON"),
        ('"a\nb"', "not JSON"),
        ("[" * 50, "not JSON"),
        (b"\xff", "not UTF-8: byte 0 is 0xff"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b'"\xc0\x80"', "not UTF-8"),
        ("NaN", "the bare token NaN is not JSON"),
        ('{"a": [Infinity]}', "the bare token Infinity is not JSON"),
        ("-Infinity", "the bare token -Infinity is not JSON"),
        ("[1e5, NaN]", "the bare token NaN is not JSON"),
        ("1e999", "the number 1e999 is beyond the range of a double"),
        ("[0, -1E999]", "the number -1E999 is beyond the range of a double"),
        ("[1e-5, 1e+309]", "the number 1e+309 is beyond"),
        ('["e-", 1e309]', "the number 1e309 is beyond"),
        ("9" * 309 + ".0", "beyond the range of a double"),
        ("9" * 4301, "an integer has more than 4300 digits"),
        ("-" + "9" * 4301, "an integer has more than 4300 digits"),
        ('{"a": [' + "9" * 5000 + "]}", "an integer has more than 4300 digits"),
        ('{"a": 1, "b": 2, "a": 1}', 'the key "a" appears more than once'),
        (r'[{"a": 1, "\u0061": 2}]', 'the key "a" appears more than once'),
        (r'"\ud800"', "a lone surrogate (U+D800)"),
        (r'["a\uDFFFb"]', "a lone surrogate (U+DFFF)"),
        (r'{"\ude00\ud83d": 1}', "a lone surrogate (U+DE00)"),
        ('"\ud800"', "a lone surrogate (U+D800)"),
        ('{"\ud800": 1}', "a lone surrogate (U+D800)"),
    ],
)
def test_json_that_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        parse_json(text, name="x", limits=LIMITS)
    assert reason in caught.value.reason
    assert len(str(caught.value)) < MESSAGE_LENGTH


def nested(depth: int, inner: str = "") -> str:
    return "[" * depth + inner + "]" * depth


@table(
    "text, depth",
    [
        (nested(4), 4),
        (nested(100_000), 100_000),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, 100_000),
        ('[{"[[[[": "]]]]\\"]]", "b": [{}]}]', 4),
        ("[[[[" + "[]," * 1000 + "[]]]]]", 5),
        ("[" * 100_000, 100_000),
    ],
)
def test_nesting_above_the_limit(text: str, depth: int) -> None:
    with pytest.raises(LimitExceededError) as caught:
        parse_json(text, name="x", limits=Limits(json_depth=3))
    error = caught.value
    assert (error.actual, error.limit, error.setting) == (depth, 3, "json_depth")
    assert "JSON nesting of 'x'" in str(error)


@table("text", [nested(3), "[" + nested(2) * 0 + ",".join(["[[]]"] * 50) + "]", '["[[[["]'])
def test_nesting_within_the_limit(text: str) -> None:
    assert parse_json(text, name="x", limits=Limits(json_depth=3)) == json.loads(text)


def test_nesting_beyond_the_interpreter_is_refused_even_if_the_setting_allows_it() -> None:
    with pytest.raises(InvalidValueError, match="nested deeper than this interpreter"):
        parse_json(nested(100_000), name="x", limits=Limits(json_depth=1_000_000))


@table("text", ['"aaaaaaaaa"', '"ééééé"', '"ééééé"'.encode(), b"\xff" * 12, " " * 12])
def test_size_above_the_limit(text: str | bytes) -> None:
    with pytest.raises(LimitExceededError) as caught:
        parse_json(text, name="x", limits=Limits(value_size_bytes=10))
    size = len(text) if isinstance(text, bytes) else len(text.encode())
    assert (caught.value.actual, caught.value.limit, caught.value.setting) == (size, 10, "value_size_bytes")


def test_size_at_the_limit() -> None:
    assert parse_json('"éééé"', name="x", limits=Limits(value_size_bytes=10)) == "éééé"


def test_a_lower_limit_of_digits_in_the_interpreter_is_a_clear_refusal() -> None:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        assert "too many digits" in refusal("integer", "9" * 1000)
    finally:
        sys.set_int_max_str_digits(before)


def test_reading_hostile_strings_takes_linear_time() -> None:
    unterminated = nested(101, '"' + '\\"' * 500_000)
    with cpu_s_below(5), pytest.raises(StateError):
        parse_json(unterminated, name="x", limits=LIMITS)


# ---- coercion: what each type accepts and converts it to ----


@table(
    "type_name, text, expected",
    [
        ("float", "1.5", "1.5"),
        ("float", "1", "1.0"),
        ("float", "-0.0", "-0.0"),
        ("float", " 1.50 ", "1.5"),
        ("float", "1e3", "1000.0"),
        ("float", "5e-324", "5e-324"),
        ("float", "1.7976931348623157e308", "1.7976931348623157e+308"),
        ("float", '"NaN"', '"NaN"'),
        ("float", '"Infinity"', '"Infinity"'),
        ("float", '"-Infinity"', '"-Infinity"'),
        ("float", "9007199254740992", "9007199254740992.0"),
        ("float", str(2**60), "1.152921504606847e+18"),
        ("float", str(10**22), "1e+22"),
        ("integer", "5", "5"),
        ("integer", "5.0", "5"),
        ("integer", "-0.0", "0"),
        ("integer", "1e20", "100000000000000000000"),
        ("integer", "9" * 4300, "9" * 4300),
        ("integer", "-9223372036854775809", "-9223372036854775809"),
        ("string", '"é\U0001f600"', '"é\U0001f600"'),
        ("string", r'"\u00e9\u0000\n"', r'"é\u0000\n"'),
        ("string", '""', '""'),
        ("string", '"NaN"', '"NaN"'),
        ("boolean", "true", "true"),
        ("boolean", "false", "false"),
        ("boolean", '"true"', "true"),
        ("boolean", '"false"', "false"),
        ("boolean", "1", "true"),
        ("boolean", "0", "false"),
        ("choice", '"a"', '"a"'),
        ("module", '"Elixir.Predict"', '"Elixir.Predict"'),
        ("embedding", "[]", "[]"),
        ("embedding", '[1, 2.5, "NaN", "-Infinity", -0.0]', '[1.0,2.5,"NaN","-Infinity",-0.0]'),
        ("tensor", '{"shape": [], "data": 5}', '{"data":5,"shape":[]}'),
        ("tensor", '{"shape": [], "data": [5]}', '{"data":[5],"shape":[]}'),
        ("tensor", '{"shape": [2, 2], "data": [1, 2, 3, "NaN"]}', '{"data":[1,2,3,"NaN"],"shape":[2,2]}'),
        ("tensor", '{"shape": [2, 2], "data": [[1, 2], [3, 4.5]]}', '{"data":[[1,2],[3,4.5]],"shape":[2,2]}'),
        ("tensor", '{"shape": [0], "data": []}', '{"data":[],"shape":[0]}'),
        ("tensor", '{"shape": [2, 0], "data": [[], []]}', '{"data":[[],[]],"shape":[2,0]}'),
        ("tensor", '{"shape": [2, 0, 3], "data": [[], []]}', '{"data":[[],[]],"shape":[2,0,3]}'),
        ("tensor", '{"shape": [0, 3], "data": []}', '{"data":[],"shape":[0,3]}'),
        ("tensor", '{"shape": [1, 1], "data": [[7]]}', '{"data":[[7]],"shape":[1,1]}'),
        ("tensor", '{"shape": [2], "data": [true, false]}', '{"data":[true,false],"shape":[2]}'),
        (
            "tensor",
            '{"shape": [1], "dtype": "float32", "data": [1]}',
            '{"data":[1],"dtype":"float32","shape":[1]}',
        ),
        ("map", '{"b": 1, "a": {"d": null, "c": "NaN"}}', '{"a":{"c":"NaN","d":null},"b":1}'),
        ("map", "{}", "{}"),
        ("list", '[1, 1.0, "a", null, true, [], {}]', '[1,1.0,"a",null,true,[],{}]'),
    ],
)
def test_accepted(type_name: str, text: str, expected: str) -> None:
    kept = normalised(type_name, text)
    assert kept == expected
    assert normalised(type_name, kept) == kept


@table(
    "type_name, text, reason",
    [
        *((type_name, "null", "not null") for type_name in type_names()),
        ("float", "true", "a float is a number"),
        ("float", '"1.5"', 'not "1.5"'),
        ("float", '"nan"', 'not "nan"'),
        ("float", "[1.5]", "not a list (1 entries)"),
        ("float", "9007199254740993", "a double cannot hold 9007199254740993 exactly"),
        ("float", str(10**23), "a double cannot hold 100000000000000000000000 exactly"),
        ("float", "1" + "0" * 400, "beyond the range of a double"),
        ("integer", "true", "an integer is a whole number, not true"),
        ("integer", "1.5", "an integer is a whole number, not 1.5"),
        ("integer", '"5"', "an integer is a whole number"),
        ("integer", '"NaN"', 'an integer is a whole number, not "NaN"'),
        ("integer", "{}", "not an object (0 entries)"),
        ("string", "5", "a string is a JSON string, not 5"),
        ("string", "true", "a string is a JSON string, not true"),
        ("boolean", "2", "not 2"),
        ("boolean", "-1", "not -1"),
        ("boolean", "1.0", "not 1.0"),
        ("boolean", '"True"', 'not "True"'),
        ("boolean", '"1"', 'not "1"'),
        ("boolean", '"yes"', 'not "yes"'),
        ("choice", "1", "a choice is a JSON string"),
        ("module", "[]", "a module is a JSON string"),
        ("embedding", "{}", "an embedding is a list of numbers"),
        ("embedding", "[[1.0]]", "element 0: a float is a number"),
        ("embedding", "[1.0, true]", "element 1: a float is a number"),
        ("embedding", '[1, "x"]', "element 1"),
        ("embedding", "[9007199254740993]", "element 0: a double cannot hold"),
        ("tensor", "[1]", 'a tensor is an object of "shape" and "data"'),
        ("tensor", '{"shape": [1]}', '"data" is missing'),
        ("tensor", '{"data": [1]}', '"shape" is missing'),
        ("tensor", '{"shape": [1], "data": [1], "x": 1}', 'unknown key "x"'),
        ("tensor", '{"shape": 1, "data": [1]}', "shape must be a list"),
        ("tensor", '{"shape": [-1], "data": [1]}', "non-negative integers only, not -1"),
        ("tensor", '{"shape": [1.0], "data": [1]}', "not 1.0"),
        ("tensor", '{"shape": [true], "data": [1]}', "not true"),
        ("tensor", '{"shape": [2], "data": [1]}', "data has 1 elements, which is not the product of shape [2]"),
        ("tensor", '{"shape": [2, 2], "data": [1, 2, 3]}', "data has 3 elements"),
        ("tensor", '{"shape": [0], "data": [1]}', "data has 1 elements"),
        ("tensor", '{"shape": [2], "data": 1}', "data must be a list for the shape [2], not 1"),
        ("tensor", '{"shape": [2, 2], "data": [[1, 2], [3]]}', "shape [2, 2]: it differs at depth 1"),
        ("tensor", '{"shape": [2, 2], "data": [[1, 2], 3, 4]}', "it differs at depth 0"),
        ("tensor", '{"shape": [2, 2], "data": [[1, 2], 3]}', "it differs at depth 1"),
        ("tensor", '{"shape": [1, 2], "data": [[1], [2]]}', "it differs at depth 0"),
        ("tensor", '{"shape": [2], "data": [[1], [2]]}', "data is nested deeper than its shape [2]"),
        ("tensor", '{"shape": [], "data": [[1]]}', "data is nested deeper than its shape []"),
        ("tensor", '{"shape": [1], "data": ["a"]}', 'element 0 of data is "a", not a number'),
        ("tensor", '{"shape": [2], "data": [1, null]}', "element 1 of data is null, not a number"),
        ("tensor", '{"shape": [1], "data": [{}]}', "element 0 of data is an object"),
        ("tensor", '{"shape": [1], "data": [1], "dtype": "x"}', "dtype must be one of: float16, float32"),
        ("tensor", '{"shape": [1], "data": [300], "dtype": "uint8"}', "300, which is not a uint8"),
        ("map", "[]", "a map is a JSON object, not a list"),
        ("list", "{}", "a list is a JSON array, not an object"),
    ],
)
def test_refused(type_name: str, text: str, reason: str) -> None:
    assert reason in refusal(type_name, text)


@table(
    "type_name, text",
    [
        ("integer", json.dumps("a" * 1_000_000)),
        ("float", "7" * 4000),
        ("boolean", json.dumps(["a" * 1_000_000])),
        ("tensor", json.dumps({"shape": [3] * 100_000, "data": [1]})),
        ("tensor", json.dumps({"shape": [10**4000] * 50, "data": [1]})),
        ("tensor", json.dumps({"shape": [1], "data": ["\U0001f600" * 10_000]})),
        ("tensor", json.dumps({"shape": [1], "data": [1], "k" * 100_000: 1})),
        ("list", '{"' + "k" * 1_000_000 + '": 1}'),
    ],
)
def test_refusals_do_not_repeat_huge_values(type_name: str, text: str) -> None:
    assert len(refusal(type_name, text)) < 300


def test_products_of_hostile_shapes_are_never_computed() -> None:
    shape, limits = [3] * 1_000_000, Limits(value_size_bytes=16 * 1024 * 1024)
    with cpu_s_below(5):
        refusal("tensor", json.dumps({"shape": shape, "data": [1]}), limits=limits)
        assert normalised("tensor", json.dumps({"shape": [*shape, 0], "data": []}), limits=limits)


def test_a_value_whose_canonical_form_exceeds_the_limit_is_refused() -> None:
    limits = Limits(value_size_bytes=10)
    assert normalised("list", "[1e15]", limits=Limits(value_size_bytes=20)) == "[1000000000000000.0]"
    with pytest.raises(LimitExceededError) as caught:
        normalised("list", "[1e15]", limits=limits)
    assert caught.value.actual == 20


def test_unknown_type() -> None:
    for call in (
        lambda: compile_constraints("x", "blob", ""),
        lambda: normalise("x", "blob", compile_constraints("x", "float", ""), Value("1"), LIMITS),
        lambda: encode(1, "blob"),
    ):
        with pytest.raises(UnknownTypeError) as caught:
            call()
        assert caught.value.type == "blob"
        assert caught.value.known == ", ".join(type_names())


# ---- constraints ----


@table("text", ["", "{}", "null", " { } ", "\n"])
@pytest.mark.parametrize("type_name", type_names())
def test_no_constraints(type_name: str, text: str) -> None:
    if text == "\n":
        with pytest.raises(InvalidConstraintsError):
            compile_constraints("x", type_name, text)
        return
    assert compile_constraints("x", type_name, text).json == ""


@table(
    "type_name, constraints, kept",
    [
        ("float", '{"min": null, "max": null}', ""),
        ("float", '{"min": null, "max": 1}', '{"max":1}'),
        ("float", '{"step": 0.1, "required": true, "normalize": null}', '{"required":true,"step":0.1}'),
        ("float", '{"minimum": 5}', '{"minimum":5}'),
        ("integer", '{"min_length": -1, "max": null}', '{"min_length":-1}'),
        ("string", '{"pattern": "", "enum": [], "min_length": null}', ""),
        ("string", '{"pattern": null, "description": ""}', '{"description":""}'),
        ("choice", '{"choices": []}', ""),
        ("choice", '{"choices": null, "values": ["a"]}', '{"values":["a"]}'),
        ("module", '{"choices": [], "allowed_modules": [], "namespace": ""}', ""),
        ("module", '{"choices": [], "allowed_modules": ["A"]}', '{"allowed_modules":["A"]}'),
        ("boolean", '{"min": 0, "x": []}', '{"min":0,"x":[]}'),
        ("embedding", '{"dimensions": null, "normalize": true}', '{"normalize":true}'),
        ("tensor", '{"shape": null, "dtype": ""}', ""),
        ("tensor", '{"shape": []}', '{"shape":[]}'),
    ],
)
def test_null_and_empty_mean_no_constraint_and_unknown_keys_are_kept(
    type_name: str, constraints: str, kept: str
) -> None:
    compiled = compile_constraints("x", type_name, constraints)
    assert compiled.json == kept
    assert compile_constraints("x", type_name, kept) == compiled
    values = {"float": "0.5", "integer": "1", "boolean": "true", "embedding": "[1]"}
    text = '{"shape": [], "data": 1}' if type_name == "tensor" else values.get(type_name, '"A"')
    assert normalised(type_name, text, constraints)


def test_constraints_are_canonical_and_compiled_once() -> None:
    compiled = compile_constraints("x", "float", '{"min": 0.0,\n "max": 1}')
    assert compiled.json == '{"max":1,"min":0.0}'
    assert compile_constraints("y", "float", '{"min": 0.0,\n "max": 1}') is compiled
    assert compile_constraints("x", "float", compiled.json) == compiled
    assert compile_constraints("x", "integer", compiled.json) != compiled


def test_constraints_too_long_to_be_cached_work_as_well() -> None:
    choices = [f"choice {number}" for number in range(5000)]
    text = json.dumps({"choices": choices})
    assert normalised("choice", '"choice 4999"', text) == '"choice 4999"'
    reason = refusal("choice", '"choice 5000"', text)
    assert "must be one of: choice 0, choice 1, " in reason
    assert "more)" in reason


@table(
    "type_name, constraints, text",
    [
        ("float", '{"min": 0, "max": 1.0}', "1.0"),
        ("float", '{"min": 0, "max": 1.0}', "0"),
        ("float", '{"min": 0}', '"Infinity"'),
        ("float", '{"max": 0}', '"-Infinity"'),
        ("float", '{"min": 1, "max": 1}', "1"),
        ("integer", '{"min": 0.5}', "1"),
        ("integer", '{"max": 1e300}', "9" * 200),
        ("string", '{"min_length": 2, "max_length": 2}', '"é\U0001f600"'),
        ("string", '{"pattern": "b"}', '"abc"'),
        ("string", '{"pattern": "^é.$"}', '"é\U0001f600"'),
        ("string", r'{"pattern": "^a\u0000b$"}', r'"a\u0000b"'),
        ("string", '{"enum": ["", "a"]}', '""'),
        ("choice", '{"choices": ["a", "b"]}', '"b"'),
        ("module", '{"choices": ["A"], "pattern": "^A"}', '"A"'),
        ("module", '{"allowed_modules": ["A.B"], "namespace": "A"}', '"A.B"'),
        ("module", '{"namespace": "A"}', '"A"'),
        ("module", '{"namespace": "A"}', '"A.B.C"'),
        ("embedding", '{"dimensions": 2}', '[1, "NaN"]'),
        ("tensor", '{"shape": [2, null, -1]}', '{"shape": [2, 1, 3], "data": [1, 2, 3, 4, 5, 6]}'),
        ("tensor", '{"shape": []}', '{"shape": [], "data": 1}'),
        ("tensor", '{"dtype": "uint8"}', '{"shape": [3], "data": [0, 255, 1.0]}'),
        ("tensor", '{"dtype": "float32"}', '{"shape": [3], "data": [0, 0.1, "NaN"]}'),
        ("tensor", '{"dtype": "f32"}', '{"shape": [1], "data": [1], "dtype": "<f4"}'),
        ("tensor", '{"dtype": "bool"}', '{"shape": [3], "data": [true, 0, 1]}'),
    ],
)
def test_constraints_fulfilled(type_name: str, constraints: str, text: str) -> None:
    kept = normalised(type_name, text, constraints)
    assert normalised(type_name, kept, constraints) == kept


@table(
    "type_name, constraints, text, reason",
    [
        ("float", '{"max": 1.0}', "1.5", "value 1.5 is above maximum 1.0"),
        ("float", '{"min": 0}', "-1", "value -1.0 is below minimum 0"),
        ("float", '{"max": 1}', '"Infinity"', "value inf is above maximum 1"),
        ("float", '{"min": 0}', '"NaN"', "NaN cannot be compared with minimum 0"),
        ("float", '{"max": 0}', '"NaN"', "NaN cannot be compared with maximum 0"),
        ("integer", '{"min": 0}', "-1", "value -1 is below minimum 0"),
        ("integer", '{"min": 0, "max": 9007199254740992}', "9007199254740993", "above maximum"),
        ("integer", '{"max": 0}', "9" * 4000, "above maximum 0"),
        ("string", '{"min_length": 3}', '"é\U0001f600"', "length 2 is below minimum 3"),
        ("string", '{"max_length": 1}', '"é\U0001f600"', "length 2 is above maximum 1"),
        ("string", '{"pattern": "^b$"}', '"abc"', 'value "abc" does not match pattern "^b$"'),
        ("string", '{"pattern": "a$"}', r'"a\n"', "does not match pattern"),
        ("string", '{"enum": ["a", "b"]}', '"c"', 'value "c" must be one of: a, b'),
        ("choice", '{"choices": ["a", "b"]}', '"c"', "must be one of: a, b"),
        ("choice", '{"choices": ["a"]}', '"A"', "must be one of: a"),
        ("module", '{"choices": ["A", "B"]}', '"C"', "must be one of: A, B"),
        ("module", '{"allowed_modules": ["A"]}', '"C"', "must be one of: A"),
        ("module", '{"pattern": "^[A-Z]"}', '"a"', "does not match pattern"),
        ("module", '{"namespace": "A"}', '"AB"', 'value "AB" is not in namespace "A"'),
        ("module", '{"namespace": "A.B"}', '"A"', 'is not in namespace "A.B"'),
        ("embedding", '{"dimensions": 3}', "[1, 2]", "2 dimensions instead of 3"),
        (
            "tensor",
            '{"shape": [2, null]}',
            '{"shape": [3, 1], "data": [1, 2, 3]}',
            "shape [3, 1] does not match shape [2, null]",
        ),
        ("tensor", '{"shape": [-1]}', '{"shape": [1, 1], "data": [1]}', "does not match shape [null]"),
        ("tensor", '{"dtype": "uint8"}', '{"shape": [2], "data": [1, -1]}', "element 1 of data is -1, which is"),
        ("tensor", '{"dtype": "int32"}', '{"shape": [1], "data": [0.5]}', "0.5, which is not a int32"),
        ("tensor", '{"dtype": "int8"}', '{"shape": [1, 1], "data": [["NaN"]]}', '"NaN", which is not a int8'),
        ("tensor", '{"dtype": "float32"}', '{"shape": [1], "data": [1e39]}', "which is not a float32"),
        ("tensor", '{"dtype": "float32"}', '{"shape": [1], "data": [true]}', "which is not a float32"),
        ("tensor", '{"dtype": "bool"}', '{"shape": [1], "data": [2]}', "which is not a bool"),
        (
            "tensor",
            '{"dtype": "float32"}',
            '{"shape": [1], "data": [1], "dtype": "float64"}',
            "dtype float64 is not float32",
        ),
    ],
)
def test_constraints_broken(type_name: str, constraints: str, text: str, reason: str) -> None:
    assert reason in refusal(type_name, text, constraints)


@table(
    "type_name, constraints, reason",
    [
        ("float", "{", "not JSON"),
        ("float", "[]", "must be a JSON object, not a list"),
        ("float", '"min"', 'must be a JSON object, not "min"'),
        ("float", '{"min": 1, "min": 2}', 'the key "min" appears more than once'),
        ("float", '{"min": "0"}', 'min must be a number, not "0"'),
        ("float", '{"max": true}', "max must be a number, not true"),
        ("float", '{"max": NaN}', "the bare token NaN"),
        ("float", '{"max": 1e999}', "beyond the range of a double"),
        ("float", '{"min": 2, "max": 1}', "min 2 is above max 1"),
        ("float", nested(1000), "nested deeper than 20"),
        ("float", nested(100_000), "nested deeper than 20"),
        ("integer", '{"min": []}', "min must be a number"),
        ("string", '{"min_length": -1}', "min_length must be a non-negative integer, not -1"),
        ("string", '{"max_length": 1.5}', "max_length must be a non-negative integer, not 1.5"),
        ("string", '{"max_length": true}', "max_length must be a non-negative integer, not true"),
        ("string", '{"min_length": 2, "max_length": 1}', "min_length 2 is above max_length 1"),
        ("string", '{"pattern": 5}', "pattern must be a string, not 5"),
        ("string", '{"pattern": "("}', 'pattern "(" is not an RE2 pattern: missing )'),
        ("string", r'{"pattern": "(a)\\1"}', "is not an RE2 pattern: invalid escape sequence"),
        ("string", '{"pattern": "(?=a)"}', "is not an RE2 pattern"),
        ("string", r'{"pattern": "(\\pL{1,500}){1,2}"}', "is not an RE2 pattern: pattern too large"),
        ("string", r'{"pattern": "\ud800"}', "a lone surrogate"),
        ("string", '{"enum": "a"}', 'enum must be a list of strings, not "a"'),
        ("choice", '{"choices": ["a", 1]}', "choices must be a list of strings; it contains 1"),
        ("module", '{"allowed_modules": {}}', "allowed_modules must be a list"),
        ("module", '{"pattern": "["}', "is not an RE2 pattern"),
        ("embedding", '{"dimensions": 0}', "dimensions must be a positive integer, not 0"),
        ("embedding", '{"dimensions": 1.0}', "dimensions must be a positive integer, not 1.0"),
        ("embedding", '{"dimensions": "3"}', "dimensions must be a positive integer"),
        ("tensor", '{"shape": 3}', "shape must be a list"),
        ("tensor", '{"shape": [-2]}', "not -2"),
        ("tensor", '{"shape": [1.5]}', "not 1.5"),
        ("tensor", '{"shape": [true]}', "not true"),
        ("tensor", '{"dtype": "float33"}', "dtype must be one of: float16, float32, float64"),
        ("tensor", '{"dtype": 4}', "dtype must be one of"),
    ],
)
def test_malformed_constraints(type_name: str, constraints: str, reason: str) -> None:
    for _ in range(2):  # A failure is not cached as a success.
        with pytest.raises(InvalidConstraintsError) as caught:
            compile_constraints("x", type_name, constraints)
        assert reason in caught.value.reason
        assert str(caught.value).startswith("Invalid constraints")
        assert len(str(caught.value)) < MESSAGE_LENGTH


def test_pattern_bomb_is_fast() -> None:
    with cpu_s_below(5):
        refusal("string", json.dumps("a" * 1_000_000 + "!"), '{"pattern": "^(a+)+$"}')


def test_long_strings_are_not_matched_with_complex_patterns() -> None:
    constraints = '{"pattern": ".{0,1000}!"}'
    assert normalised("string", json.dumps("a" * 1000 + "!"), constraints)
    with cpu_s_below(5):
        reason = refusal("string", json.dumps("a" * 1_000_000), constraints)
    assert "a string of 1000000 bytes is too long to match pattern" in reason


# ---- binary values ----


def description(**fields: Any) -> str:
    return json.dumps(fields)


def npy(header: str, numbers: bytes, version: int = 1) -> bytes:
    encoded = header.encode("utf-8" if version == 3 else "latin-1")
    length = struct.pack("<H" if version == 1 else "<I", len(encoded))
    return b"\x93NUMPY" + bytes([version, 0]) + length + encoded + numbers


def npy_header(descr: str, shape: str, fortran_order: str = "False") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': {fortran_order}, 'shape': {shape}, }}          \n"


def kept_binary(type_name: str, value: Value, constraints: str = "", limits: Limits = LIMITS) -> Value:
    return normalise("x", type_name, compile_constraints("x", type_name, constraints), value, limits)


PICKLE_BOMB = b"cos\nsystem\n(S'false'\ntR."
FLOATS = struct.pack("<4f", 1.0, 2.0, 3.0, math.inf)
DOUBLES = struct.pack("<2d", 1.5, -0.0)


@table(
    "type_name, text, content",
    [
        ("tensor", '{ "type":"tensor", "binary_format":"pickle", "shape":[2], "dtype":"x" }', PICKLE_BOMB),
        ("embedding", description(binary_format="erlang_binary", shape=[3], dtype="f32"), b"\x83m"),
        ("tensor", description(binary_format="erlang_binary", shape=None), b""),
        ("tensor", description(binary_format="of tomorrow"), b"\x00"),
        ("tensor", "{}", b"\x00"),
        ("embedding", "{}", PICKLE_BOMB),
    ],
)
def test_opaque_binaries_pass_through(type_name: str, text: str, content: bytes) -> None:
    value = Value(text, content)
    assert kept_binary(type_name, value) == value
    assert decode(type_name, value) == BinaryValue(json.loads(text), content)


@table(
    "text, content, expected",
    [
        (description(binary_format="float32", shape=[2, 2]), FLOATS, ([2, 2], "float32", [1.0, 2.0, 3.0, math.inf])),
        (description(binary_format="float32"), FLOATS, ([4], "float32", [1.0, 2.0, 3.0, math.inf])),
        (description(binary_format="float64", dtype="f64", shape=[2]), DOUBLES, ([2], "float64", [1.5, -0.0])),
        (description(binary_format="raw", dtype="float64"), DOUBLES, ([2], "float64", [1.5, -0.0])),
        (description(binary_format="raw", dtype="u8", shape=[1, 2]), b"\x01\xff", ([1, 2], "uint8", [1, 255])),
        (description(binary_format="raw", dtype="int8", shape=[0, 10**50]), b"", ([0, 10**50], "int8", [])),
        (description(binary_format="raw", dtype="float64", shape=[]), DOUBLES[:8], ([], "float64", [1.5])),
        (
            description(binary_format="npy"),
            npy(npy_header("<f4", "(4,)"), FLOATS),
            ([4], "float32", [1, 2, 3, math.inf]),
        ),
        (
            description(binary_format="npy", shape=[2, 2], dtype="float32"),
            npy(npy_header("<f4", "(2, 2)"), FLOATS, version=2),
            ([2, 2], "float32", [1.0, 2.0, 3.0, math.inf]),
        ),
        (
            description(binary_format="npy"),
            npy(npy_header(">i2", "(2, 3)", "True"), struct.pack(">6h", 1, 4, 2, 5, 3, 6), version=3),
            ([2, 3], "int16", [1, 2, 3, 4, 5, 6]),
        ),
        (
            description(binary_format="npy"),
            npy("{'shape': (), \"descr\": '|b1', 'fortran_order': False}", b"\x01"),
            ([], "bool", [True]),
        ),
        (
            description(binary_format="npy"),
            npy(npy_header("<f8", "(1000000000, 0)", "True"), b""),
            ([10**9, 0], "float64", []),
        ),
    ],
)
def test_readable_binaries(text: str, content: bytes, expected: tuple[list[int], str, list[Any]]) -> None:
    value = Value(text, content)
    assert kept_binary("tensor", value) is value
    shape, dtype, data = expected
    assert decode("tensor", value) == {"shape": shape, "dtype": dtype, "data": data}
    assert normalised("tensor", encode(decode("tensor", value), "tensor").json)


def test_binary_embedding_is_a_list() -> None:
    value = Value(description(binary_format="float32", shape=[1, 4]), FLOATS)
    assert decode("embedding", kept_binary("embedding", value, '{"dimensions": 4}')) == [1.0, 2.0, 3.0, math.inf]


@table(
    "type_name, text, content, reason",
    [
        ("map", "{}", b"", "map values are JSON; only tensors and embeddings"),
        ("float", "1.0", b"", "float values are JSON"),
        ("tensor", "[]", b"", "the description of a binary value is a JSON object, not a list"),
        ("tensor", "{", b"", "not JSON"),
        ("tensor", '{"a": NaN}', b"", "bare token NaN"),
        ("tensor", r'{"a": "\ud800"}', b"", "a lone surrogate"),
        ("tensor", '{"a": "\ud800"}', b"", "a lone surrogate"),
        ("tensor", '{"binary_format": 1}', b"", "binary_format must be a string, not 1"),
        ("tensor", description(binary_format="pickle", shape="3"), b"", "shape must be a list"),
        ("tensor", description(binary_format="pickle", shape=[-1]), b"", "not -1"),
        ("tensor", description(binary_format="raw"), b"", "dtype must be one of: float16"),
        ("tensor", description(binary_format="raw", dtype="object"), b"", 'not "object"'),
        (
            "tensor",
            description(binary_format="float32", shape=[3]),
            FLOATS,
            "16 bytes do not hold shape [3] of float32",
        ),
        ("tensor", description(binary_format="float32", shape=[10**4000] * 9), FLOATS, "16 bytes do not hold shape"),
        ("tensor", description(binary_format="float32"), FLOATS[:-1], "15 bytes do not hold shape [3] of float32"),
        ("tensor", description(binary_format="float32", dtype="float64"), FLOATS, "described dtype float64 is not"),
        ("embedding", description(binary_format="float32", shape=[2, 2]), FLOATS, "an embedding has one dimension"),
        ("tensor", description(binary_format="npy"), b"", "does not begin like a .npy file"),
        ("tensor", description(binary_format="npy"), PICKLE_BOMB, "does not begin like a .npy file"),
        ("tensor", description(binary_format="npy"), b"\x93NUMPY\x01\x00", "does not begin like a .npy file"),
        ("tensor", description(binary_format="npy"), b"\x93NUMPY\x09\x00" + bytes(20), "unknown version 9"),
        (
            "tensor",
            description(binary_format="npy"),
            b"\x93NUMPY\x01\x00\xff\xff{}    ",
            "a header of 65535 bytes is too",
        ),
        (
            "tensor",
            description(binary_format="npy"),
            b"\x93NUMPY\x01\x00\x00\x10{}    ",
            "a header of 4096 bytes is too",
        ),
        ("tensor", description(binary_format="npy"), npy("()", b"1234"), "the header is not a dict"),
        ("tensor", description(binary_format="npy"), npy("{}    ", b""), "must state descr"),
        ("tensor", description(binary_format="npy"), npy(npy_header("|O", "(1,)"), PICKLE_BOMB), 'not "|O"'),
        ("tensor", description(binary_format="npy"), npy(npy_header("<c8", "(1,)"), bytes(8)), 'not "<c8"'),
        (
            "tensor",
            description(binary_format="npy"),
            npy("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,)}", PICKLE_BOMB),
            "not structured elements",
        ),
        (
            "tensor",
            description(binary_format="npy"),
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'x': 1}", FLOATS),
            "not understood at",
        ),
        (
            "tensor",
            description(binary_format="npy"),
            npy("{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", FLOATS),
            "not understood at",
        ),
        (
            "tensor",
            description(binary_format="npy"),
            npy(npy_header("<f4", "(__import__('os'),)"), FLOATS),
            "not understood",
        ),
        ("tensor", description(binary_format="npy"), npy(npy_header("<f4", "(1 4)"), FLOATS), "(1 4) is not a shape"),
        (
            "tensor",
            description(binary_format="npy"),
            npy(npy_header("<f4", f"({'9' * 5000},)"), FLOATS),
            "is not a shape",
        ),
        ("tensor", description(binary_format="npy"), npy("{" + "(" * 9000 + "}", FLOATS), "not understood"),
        (
            "tensor",
            description(binary_format="npy"),
            npy("{'\u00e9'}", b"", version=3).replace("\u00e9".encode(), b"\xff\xff"),
            "not UTF-8",
        ),
        ("tensor", description(binary_format="npy"), npy(npy_header("<f4", "(5,)"), FLOATS), "16 bytes do not hold"),
        (
            "tensor",
            description(binary_format="npy", shape=[2, 2]),
            npy(npy_header("<f4", "(4,)"), FLOATS),
            "[2, 2] is not",
        ),
        (
            "tensor",
            description(binary_format="npy", dtype="int8"),
            npy(npy_header("<f4", "(4,)"), FLOATS),
            "int8 is not",
        ),
    ],
)
def test_refused_binaries(type_name: str, text: str, content: bytes, reason: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        kept_binary(type_name, Value(text, content))
    assert reason in caught.value.reason
    assert len(str(caught.value)) < MESSAGE_LENGTH


@table(
    "type_name, constraints, text, content, reason",
    [
        (
            "embedding",
            '{"dimensions": 3}',
            description(binary_format="pickle", shape=[4]),
            b"",
            "4 dimensions instead of 3",
        ),
        ("embedding", '{"dimensions": 3}', description(binary_format="pickle", shape=[3]), b"", None),
        ("embedding", '{"dimensions": 3}', description(binary_format="pickle"), b"", None),
        ("embedding", '{"dimensions": 3}', description(binary_format="float32"), FLOATS, "4 dimensions instead of 3"),
        ("tensor", '{"shape": [2, null]}', description(binary_format="erlang_binary", shape=[2, 7]), b"", None),
        (
            "tensor",
            '{"shape": [2, null]}',
            description(binary_format="erlang_binary", shape=[2]),
            b"",
            "does not match",
        ),
        ("tensor", '{"dtype": "float32"}', description(binary_format="pickle", dtype="float64"), b"", None),
        (
            "tensor",
            '{"dtype": "float32"}',
            description(binary_format="float64"),
            DOUBLES,
            "dtype float64 is not float32",
        ),
        ("tensor", '{"dtype": "float32", "shape": [4]}', description(binary_format="float32"), FLOATS, None),
    ],
)
def test_constraints_on_binaries(
    type_name: str, constraints: str, text: str, content: bytes, reason: str | None
) -> None:
    value = Value(text, content)
    if reason is None:
        assert kept_binary(type_name, value, constraints) is value
        return
    with pytest.raises(InvalidValueError) as caught:
        kept_binary(type_name, value, constraints)
    assert reason in caught.value.reason


@pytest.mark.parametrize(("setting", "size"), [("value_size_bytes", 7), ("binary_size_bytes", 10)])
def test_description_and_bytes_of_a_binary_have_separate_limits(setting: str, size: int) -> None:
    value = Value('{"a":1}', bytes(10))
    assert kept_binary("tensor", value, limits=Limits(**{setting: size})) is value
    with pytest.raises(LimitExceededError) as caught:
        kept_binary("tensor", value, limits=Limits(**{setting: size - 1}))
    assert (caught.value.actual, caught.value.setting) == (size, setting)


# ---- Python objects ----


@dataclass
class Array:
    """Has the parts of the interface of NumPy's arrays that we use."""

    shape: tuple[int, ...]
    content: Any

    def tolist(self) -> Any:
        return self.content


@table(
    "obj, type_name",
    [
        (True, "boolean"),
        (1, "integer"),
        (10**100, "integer"),
        (1.0, "float"),
        (math.nan, "float"),
        ("a", "string"),
        ({}, "map"),
        ({"shape": [1], "data": [1]}, "tensor"),
        ({"shape": [1], "data": [1], "x": 1}, "map"),
        ({"shape": [1]}, "map"),
        ([], "list"),
        ((1, 2), "list"),
        (Array((2,), [1.0, 2.0]), "tensor"),
        (Array((), 1.5), "float"),
        (Array((), 2), "integer"),
        (Array((), True), "boolean"),
        (BinaryValue({"type": "embedding"}, b""), "embedding"),
        (BinaryValue({"type": ["x"]}, b""), "tensor"),
        (BinaryValue({}, b""), "tensor"),
    ],
)
def test_inferred_types(obj: object, type_name: str) -> None:
    assert infer_type(obj) == type_name
    if type_name != "tensor" or not isinstance(obj, BinaryValue):
        assert encode(obj) == encode(obj, type_name)


@table(
    "obj, type_name, expected",
    [
        (True, None, "true"),
        (1, None, "1"),
        (1.0, None, "1.0"),
        (-0.0, None, "-0.0"),
        (math.nan, None, '"NaN"'),
        (math.inf, "float", '"Infinity"'),
        (-math.inf, None, '"-Infinity"'),
        (1, "float", "1"),
        ("é", None, '"é"'),
        ((1, [2]), None, "[1,[2]]"),
        ({"b": None, "a": ()}, None, '{"a":[],"b":null}'),
        ([1.0, math.nan, -math.inf], "embedding", '[1.0,"NaN","-Infinity"]'),
        ((1.0,), "embedding", "[1.0]"),
        (Array((2,), [1.0, math.nan]), "embedding", '[1.0,"NaN"]'),
        (Array((1, 2), [[1.0, math.inf]]), None, '{"data":[[1.0,"Infinity"]],"shape":[1,2]}'),
        (Array((), 1.5), "tensor", '{"data":1.5,"shape":[]}'),
        (Array((), math.nan), None, '"NaN"'),
        (Array((2,), [1, 2]), "list", "[1,2]"),
        ({"shape": (1,), "data": (math.nan,)}, None, '{"data":["NaN"],"shape":[1]}'),
        ({"shape": [1], "data": Array((1,), [math.inf])}, None, '{"data":["Infinity"],"shape":[1]}'),
        (10**4299, None, "1" + "0" * 4299),
    ],
)
def test_encoded(obj: object, type_name: str | None, expected: str) -> None:
    assert encode(obj, type_name) == Value(expected)


def test_encoded_binary() -> None:
    value = encode(BinaryValue({"binary_format": "pickle", "shape": [1]}, PICKLE_BOMB))
    assert value == Value('{"binary_format":"pickle","shape":[1]}', PICKLE_BOMB)
    assert kept_binary("tensor", value) is value


def circle() -> list[Any]:
    ring: list[Any] = []
    ring.append(ring)
    return ring


@table(
    "obj, type_name, reason",
    [
        (None, None, "None has no type"),
        (b"a", None, "bytes has no JSON form: decode them to a str"),
        (bytearray(b"a"), "string", "decode them to a str"),
        (memoryview(b"a"), None, "decode them to a str"),
        ([b"a"], None, "at 0: bytes has no JSON form"),
        ({"a": [1, {1, 2}]}, None, 'at "a": at 1: set has no JSON form: make it a list'),
        (1j, None, "complex has no JSON form"),
        (datetime(2020, 1, 1, tzinfo=UTC), None, "datetime has no JSON form: use its isoformat()"),
        (Decimal("1.5"), "float", "Decimal has no JSON form: convert it"),
        (object(), None, "object has no JSON form: convert it"),
        (float, None, "type has no JSON form"),
        ({1: 2}, None, "the keys of a JSON object are strings, not int: use str(key)"),
        ({"a": {None: 1}}, None, 'at "a": the keys of a JSON object are strings, not NoneType'),
        ({"a": math.nan}, None, 'at "a": JSON has no NaN: use null or the string "NaN"'),
        ([1, -math.inf], None, "at 1: JSON has no -Infinity"),
        ([1, math.nan], "list", "at 1: JSON has no NaN"),
        (math.nan, "string", "JSON has no NaN"),
        (math.inf, "integer", "JSON has no Infinity"),
        ("\ud800", None, "a lone surrogate (U+D800)"),
        ({"\ud800": 1}, None, "a lone surrogate (U+D800)"),
        ({"\ud800": math.nan}, None, "JSON has no NaN"),
        (10**4300, None, "has no JSON form"),
        ([10**5000], "embedding", "has no JSON form"),
        (circle(), None, "contains itself"),
        (circle(), "embedding", "contains itself"),
        ({"shape": [1], "data": circle()}, None, "contains itself"),
        ({"shape": [1], "data": [b"a"]}, None, "bytes has no JSON form"),
        (BinaryValue({}, b""), "map", "map values are JSON"),
        (BinaryValue({"a": b""}, b""), None, 'at "a": bytes has no JSON form'),
        (BinaryValue({"a": "\ud800"}, b""), None, "a lone surrogate"),
    ],
)
def test_objects_that_are_refused(obj: object, type_name: str | None, reason: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        encode(obj, type_name, name="x")
    assert caught.value.name == "x"
    assert reason in caught.value.reason
    str(caught.value).encode()
    assert len(str(caught.value)) < MESSAGE_LENGTH


def test_the_path_to_a_refused_entry_stays_readable() -> None:
    obj: Any = math.nan
    for _ in range(100):
        obj = {"a long key": [obj]}
    with pytest.raises(InvalidValueError) as caught:
        encode(obj)
    assert "JSON has no NaN" in caught.value.reason
    assert len(caught.value.reason) < MESSAGE_LENGTH


@table(
    "type_name, text, expected",
    [
        ("float", "1.0", 1.0),
        ("float", '"Infinity"', math.inf),
        ("float", '"-Infinity"', -math.inf),
        ("integer", "9" * 4300, 10**4300 - 1),
        ("string", '"NaN"', "NaN"),
        ("boolean", "true", True),
        ("choice", '"Infinity"', "Infinity"),
        ("module", '"A"', "A"),
        ("embedding", '[1.0,"Infinity"]', [1.0, math.inf]),
        ("tensor", '{"data":[[1,"-Infinity"]],"shape":[1,2]}', {"data": [[1, -math.inf]], "shape": [1, 2]}),
        ("tensor", '{"data":"Infinity","shape":[]}', {"data": math.inf, "shape": []}),
        ("map", '{"a":"NaN"}', {"a": "NaN"}),
        ("list", '["NaN",null]', ["NaN", None]),
    ],
)
def test_decoded(type_name: str, text: str, expected: object) -> None:
    obj = decode(type_name, Value(text))
    assert obj == expected
    assert type(obj) is type(expected)


_SPELLINGS = (
    "1",
    "1.0",
    "1.50",
    "1e3",
    "-0.0",
    "true",
    " false",
    '"true"',
    '"NaN"',
    "12345678901234567890",
    '"text"',
    '"\\u0041"',
    '"\\u00e9"',
    '"a\\"b"',
    '"[1, 2]"',
    '"{}"',
    "[1]",
    '{"a": 1}',
    f'"{"long" * 100}"',
)


@pytest.mark.parametrize("type_name", ["float", "integer", "boolean", "string", "list", "map", "embedding"])
@pytest.mark.parametrize("text", _SPELLINGS)
def test_a_value_that_was_read_or_encoded_before_is_stored_as_one_that_was_not(type_name: str, text: str) -> None:
    def stored(value: Value) -> tuple[str, str] | str:
        try:
            kept = normalise("x", type_name, compile_constraints("x", type_name, ""), value, LIMITS)
        except StateError as error:
            return str(error)
        return kept.json, repr(decode(type_name, kept))

    new, read = Value(text), Value(text)
    document = decode_loosely(read)
    encoded = encode_for(document, lambda: type_name)
    assert stored(read) == stored(new)
    assert stored(encoded) == stored(Value(encoded.json))


def test_decoded_nan_and_negative_zero() -> None:
    nan, zero = decode("float", Value('"NaN"')), decode("float", Value("-0.0"))
    assert isinstance(nan, float)
    assert math.isnan(nan)
    assert isinstance(zero, float)
    assert math.copysign(1, zero) == -1


@table(
    "type_name, value",
    [
        ("float", Value('"abc"')),
        ("tensor", Value("[]")),
        ("map", Value("{")),
        ("tensor", Value("[]", b"")),
        ("tensor", Value('{"binary_format": "npy"}', b"")),
    ],
)
def test_decoding_a_value_that_was_not_normalised_is_a_clear_error(type_name: str, value: Value) -> None:
    with pytest.raises(InvalidValueError):
        decode(type_name, value)
