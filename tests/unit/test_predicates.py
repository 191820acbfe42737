"""Conditions on values: exact integers, numbers in any spelling, and values that are not numbers."""

import json
import operator
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspex_persist.state.audit import HistoryQuery, Operator, Predicate, number_in, parse_predicate
from dspex_persist.state.conditions import value_holds
from dspex_persist.state.errors import InvalidArgumentError
from tests.deadline import cpu_s_below

NUMBERS = (
    st.integers()
    | st.integers(2**53 - 4, 2**53 + 4)
    | st.integers(0, 400).map(lambda power: 10**power + 1)
    | st.floats(allow_nan=False, allow_infinity=False)
)
COMPARES: dict[str, Callable[[object, object], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "!=": operator.ne,
}


@given(NUMBERS, NUMBERS, st.sampled_from(sorted(COMPARES)))
def test_numbers_are_compared_exactly(value: float, wanted: float, compared: str) -> None:
    assert value_holds(json.dumps(value), "float", compared, repr(wanted)) == COMPARES[compared](value, wanted)


@given(st.none() | st.booleans() | st.text() | st.lists(st.integers()), NUMBERS)
def test_other_values_do_not_equal_numbers_and_have_no_order(value: object, wanted: float) -> None:
    text = json.dumps(value)
    assert value_holds(text, "map", "!=", repr(wanted))
    assert not any(value_holds(text, "map", compared, repr(wanted)) for compared in ("<", "<=", ">", ">=", "="))


@pytest.mark.parametrize(
    ("text", "type_name", "condition", "holds"),
    [
        ("9007199254740993", "integer", "= 9007199254740993", True),
        ("9007199254740992", "integer", "= 9007199254740993", False),
        ("1.0", "float", "= 1", True),
        ("1.0", "float", "= 1.00", True),
        ("0.1", "float", "= 0.10000000000000001", True),
        ("100000.0", "float", "= 1e5", True),
        ("1" + 400 * "0", "integer", "= 1e400", True),
        ("1" + 400 * "0", "integer", "> 1e399", True),
        ('"Infinity"', "float", "> 1e308", True),
        ('"Infinity"', "string", "> 1e308", False),
        ('"Infinity"', "float", "= 1" + 5000 * "0", False),
        ('"Infinity"', "float", "> 1e9999", True),
        ('"-Infinity"', "float", "= -1e9999", False),
        ("9" * 4300, "integer", "< 1e4300", True),
        ("-" + "9" * 4300, "integer", "> -1e4300", True),
        ('"-Infinity"', "float", "= -Infinity", True),
        ('"NaN"', "float", "= NaN", True),
        ('"NaN"', "float", "!= 1", True),
        ('"NaN"', "float", "> 1", False),
        ('"on"', "string", "= on", True),
        ('"on"', "string", '= "on"', True),
        ('"on"', "string", "!= off", True),
        ("true", "boolean", "= true", True),
        ("true", "boolean", "= 1", False),
        ("[1.0,2.5]", "embedding", "= [1, 2.50]", True),
        ("[true]", "list", "= [1]", False),
        ('{"a":1,"b":[2]}', "map", '= {"b": [2], "a": 1}', True),
        ('{"a":1,"b":[2]}', "map", '!= {"b": [2], "a": 1}', False),
        ('"3"', "string", "= 3", False),
    ],
)
def test_operands_in_different_spellings(text: str, type_name: str, condition: str, holds: bool) -> None:
    predicate = parse_predicate(condition)
    assert value_holds(text, type_name, predicate.operator.value, predicate.operand) is holds


def test_a_deleted_variable_fulfils_nothing() -> None:
    assert not any(value_holds(None, "float", compared, "1") for compared in COMPARES)


@pytest.mark.parametrize("text", ["> NaN", "< x", ">= 1_000", "< 0x10", "> "])
def test_an_order_needs_a_number(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_predicate(text)


def test_queries_are_bounded() -> None:
    for field, conditions in (("where", ["= 1"] * 101), ("metadata", {str(number): "v" for number in range(101)})):
        with pytest.raises(InvalidArgumentError, match=f"{field}: 101 conditions are too many"):
            HistoryQuery(**{field: conditions})
    assert len(HistoryQuery(where=["= 1"] * 100).where) == 100
    for condition in (f"contains {'x' * 1_001}", f"= {'x' * 70_000}"):
        with pytest.raises(InvalidArgumentError, match="too long"):
            parse_predicate(condition)
    with pytest.raises(InvalidArgumentError, match=r"variable: .* is too long"):
        HistoryQuery(variable="*a" * 10_000)


def test_white_space_takes_no_time() -> None:
    with cpu_s_below(1), pytest.raises(InvalidArgumentError, match="too long"):
        parse_predicate(f"= x{' ' * 200_000}y")


def test_a_number_is_as_exact_as_what_was_typed() -> None:
    assert Predicate(Operator.EQUAL, str(2**63 + 1)).number == 2**63 + 1
    assert number_in("1e3") == 1000.0
    assert number_in("1e999999999") == 10**4300
