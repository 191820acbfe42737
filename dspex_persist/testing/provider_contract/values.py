"""Values are coerced, constrained and kept exactly."""

import math
from dataclasses import replace
from typing import Any

import pytest

from dspex_persist.state import commands, errors, values
from dspex_persist.state.commands import Command
from dspex_persist.state.model import Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.values import BinaryValue
from dspex_persist.testing.checks import LONG_TEXT, exact, names_of, refused, shown, take
from dspex_persist.testing.provider_contract.base import Contract

TENSOR = {"shape": [2, 2], "data": [[1, 2], [3, 4]]}
EXACT_VALUES: list[tuple[str, object]] = [
    ("float", 0.1),
    ("float", -0.0),
    ("float", 5e-324),
    ("float", 1.7976931348623157e308),
    ("float", 1e22),
    ("float", math.nan),
    ("float", math.inf),
    ("float", -math.inf),
    ("integer", 0),
    ("integer", -1),
    ("integer", 2**53 + 1),
    ("integer", 2**63),
    ("integer", -(2**63) - 1),
    ("integer", 2**200),
    ("integer", -(10**4000)),
    ("string", ""),
    ("string", "plain"),
    ("string", "\U0001f600 \u00e9 e\u0301 \u2028 \ufeff"),
    ("string", "\0\x01\x1f\x7f\r\n\t"),
    ("string", '"quoted" \\ back'),
    ("string", "NaN"),
    ("string", "null"),
    ("string", "'; DROP TABLE versions; --"),
    ("string", LONG_TEXT),
    ("string", "\U0001f600" * 25_000),
    ("boolean", True),
    ("boolean", False),
    ("choice", "a"),
    ("choice", ""),
    ("module", "dspy.ChainOfThought"),
    ("module", ""),
    ("embedding", []),
    ("embedding", [0.0, -0.0, 1.5, 1e-300]),
    ("embedding", [math.nan, math.inf, -math.inf]),
    ("embedding", [number / 7 for number in range(1536)]),
    ("tensor", TENSOR),
    ("tensor", {"shape": [2, 2], "data": [1, 2.5, 3, True]}),
    ("tensor", {"shape": [], "data": 5}),
    ("tensor", {"shape": [0, 3], "data": []}),
    ("tensor", {"shape": [2], "data": [math.nan, -0.0]}),
    ("map", {}),
    ("map", {"": None, "\u00e9": [1, {"a": -0.0}], "__proto__": {}, "n": 2**200, "\0": "\U0001f600"}),
    ("map", {"shape": [1], "data": ["no tensor"]}),
    ("map", {"text": LONG_TEXT}),
    ("list", []),
    ("list", [1, 1.0, True, None, "a", [[]], {"a": {}}, -0.0, 2**64]),
    ("list", list(range(5_000))),
]
BINARY_VALUES: list[tuple[str, Value]] = [
    (
        "tensor",
        Value('{"shape":[2],"dtype":"float32","binary_format":"pickle","type":"tensor"}', b"\x80\x04cos\nsystem\n."),
    ),
    ("tensor", Value('{ "type":"tensor",  "binary_format": "erlang_binary", "b": 1, "a": 2 }', b"\x83l\0\0\0\1a\1j")),
    ("tensor", Value('{"shape":[2],"dtype":"float32","binary_format":"raw"}', b"\0\0\x80\x3f\0\0\0\xc0")),
    ("tensor", Value('{"binary_format":"unheard of"}', bytes(range(256)) * 400)),
    ("tensor", Value("{}", b"")),
    ("embedding", Value('{"shape":[2],"dtype":"float64","binary_format":"float64"}', b"\0" * 16)),
    ("embedding", Value('{"binary_format":"pickle","shape":[12800]}', b"\xff" * 102_400)),
]
COERCED: list[tuple[str, str, object]] = [
    ("float", "1", 1.0),
    ("float", '"NaN"', math.nan),
    ("float", '"-Infinity"', -math.inf),
    ("float", "1e3", 1000.0),
    ("integer", "5.0", 5),
    ("integer", "1e3", 1000),
    ("boolean", '"true"', True),
    ("boolean", '"false"', False),
    ("boolean", "1", True),
    ("boolean", "0", False),
    ("embedding", "[1, 2]", [1.0, 2.0]),
    ("map", ' {"b": 1, "a": 2} ', {"a": 2, "b": 1}),
    ("string", '"\\ud83d\\ude00"', "\U0001f600"),
]
NO_VALUES: list[tuple[str, str]] = [
    ("float", "true"),
    ("float", '"1.0"'),
    ("float", "null"),
    ("float", "NaN"),
    ("float", "1e999"),
    ("integer", "1.5"),
    ("integer", "true"),
    ("integer", '"1"'),
    ("integer", "1" * 5_000),
    ("boolean", "2"),
    ("boolean", '"yes"'),
    ("boolean", "null"),
    ("string", "null"),
    ("string", "1"),
    ("string", "plain"),
    ("string", '"\\ud800"'),
    ("choice", "1"),
    ("module", "{}"),
    ("embedding", "{}"),
    ("embedding", '["a"]'),
    ("tensor", "[1, 2]"),
    ("tensor", '{"shape": [3], "data": [1, 2]}'),
    ("tensor", '{"shape": [-1], "data": []}'),
    ("map", "[]"),
    ("map", '{"a": 1, "a": 2}'),
    ("list", "{}"),
    ("list", "[1,"),
    ("list", "[NaN]"),
]
CONSTRAINTS: list[tuple[str, str, object, object, str]] = [
    ("float", '{"min": 0, "max": 1.0}', 1.0, 1.5, "value 1.5 is above maximum 1.0"),
    ("float", '{"min": 0}', 0.0, -0.5, "below minimum"),
    ("float", '{"min": 0}', 0.5, math.nan, "NaN cannot be compared"),
    ("integer", '{"min": -5, "max": 5}', -5, -6, "value -6 is below minimum -5"),
    ("integer", '{"max": 5}', 5, 2**200, "above maximum 5"),
    ("string", '{"min_length": 2}', "ab", "a", "length 1 is below minimum 2"),
    ("string", '{"max_length": 2}', "\U0001f600\U0001f600", "abc", "length 3 is above maximum 2"),
    ("string", '{"pattern": "^[a-z]+$"}', "abc", "ABC", "does not match pattern"),
    ("string", '{"pattern": "^(a+)+$"}', "aaa", "a" * 40 + "b", "does not match pattern"),
    ("string", '{"enum": ["a", "b"]}', "a", "c", "must be one of: a, b"),
    ("choice", '{"choices": ["a", "b"]}', "b", "c", "must be one of: a, b"),
    ("module", '{"allowed_modules": ["Predict"]}', "Predict", "ReAct", "must be one of: Predict"),
    ("module", '{"choices": ["Predict"]}', "Predict", "ReAct", "must be one of: Predict"),
    ("module", '{"namespace": "dspy"}', "dspy.Predict", "dspyx.Predict", "not in namespace"),
    ("module", '{"pattern": "^dspy"}', "dspy.Predict", "os.system", "does not match pattern"),
    ("embedding", '{"dimensions": 2}', [1.0, 2.0], [1.0], "1 dimensions instead of 2"),
    ("tensor", '{"shape": [null, 2]}', TENSOR, {"shape": [4], "data": [1, 2, 3, 4]}, "does not match shape"),
    ("tensor", '{"dtype": "int8"}', TENSOR, {"shape": [1], "data": [300]}, "not a int8"),
]


class ValueContract(Contract):
    """Values come back exactly as they were written, or are refused with a clear error."""

    @pytest.mark.parametrize(("type_name", "value"), EXACT_VALUES, ids=shown)
    def test_comes_out_exactly_as_it_went_in(
        self, provider: StateProvider, session: str, type_name: str, value: object
    ) -> None:
        """When registered, written, listed, read in a batch, in the history, and sent to a watcher."""
        provider.register_variable(session, "registered", type_name, value)
        provider.register_variable(session, "set", type_name, _another(type_name, value))
        encoded = values.encode(value, type_name)
        with provider.watch(session, ["set"]) as watch:
            provider.submit(commands.SetVariable(session, "set", encoded)).result()
            (update,) = take(watch, 1)
        provider.submit(commands.SetVariables(session, {"set": encoded})).result()
        stored = [provider.get_variable(session, name).value for name in ("registered", "set")]
        stored += [variable.value for variable in provider.list_variables(session)]
        stored += [variable.value for variable in provider.get_variables(session, ("set",)).variables.values()]
        stored += [version.value or Value("") for version in provider.get_variable_history(session, "set", 2)]
        stored.append(update.variable.value)
        assert {exact(values.decode(type_name, one)) for one in stored} == {exact(value)}
        assert len(set(stored)) == 1

    @pytest.mark.parametrize(("type_name", "value"), EXACT_VALUES, ids=shown)
    def test_what_was_read_can_be_written_back(
        self, provider: StateProvider, session: str, type_name: str, value: object
    ) -> None:
        provider.register_variable(session, "x", type_name, value)
        stored = provider.get_variable(session, "x").value
        assert provider.set_variable(session, "x", provider.get_value(session, "x")) == 1
        assert provider.set_variables(session, {"x": provider.get_value(session, "x")}).versions == {"x": 2}
        assert provider.get_variable(session, "x").value == stored

    @pytest.mark.parametrize(("type_name", "value"), BINARY_VALUES, ids=shown)
    def test_so_can_what_was_binary(self, provider: StateProvider, session: str, type_name: str, value: Value) -> None:
        provider.submit(commands.RegisterVariable(session, "x", type_name, value)).result()
        read = provider.get_value(session, "x")
        assert provider.set_variable(session, "x", read) == 1
        assert provider.get_value(session, "x") == read

    def test_nan_is_a_number_where_the_type_has_it_and_refused_elsewhere(
        self, provider: StateProvider, session: str
    ) -> None:
        holders = {"float": 1.0, "embedding": [1.0], "tensor": {"shape": [1], "data": [1.0]}}
        others = {"string": "", "list": [], "map": {}, "integer": 1}
        for type_name, initial in (holders | others).items():
            provider.register_variable(session, type_name, type_name, initial)
        for value in (math.nan, [math.nan], {"shape": [1], "data": [math.nan]}):
            for name in others:
                with pytest.raises(errors.InvalidValueError, match="NaN"):
                    provider.set_variable(session, name, value)
                with pytest.raises(errors.InvalidValueError, match="NaN"):
                    provider.set_variables(session, {name: value})
        assert provider.set_variable(session, "float", math.nan) == 1
        assert provider.set_variable(session, "embedding", [math.nan]) == 1
        assert provider.set_variable(session, "tensor", {"shape": [1], "data": [math.nan]}) == 1
        assert [provider.get_value(session, name) for name in others] == list(others.values())

    @pytest.mark.parametrize(("type_name", "value"), BINARY_VALUES, ids=shown)
    def test_binary_values_are_kept_as_they_came(
        self, provider: StateProvider, session: str, type_name: str, value: Value
    ) -> None:
        provider.submit(commands.RegisterVariable(session, "registered", type_name, value)).result()
        plain = Value("[1.0]") if type_name == "embedding" else Value('{"shape":[1],"data":[1]}')
        provider.submit(commands.RegisterVariable(session, "set", type_name, plain)).result()
        with provider.watch(session, ["set"]) as watch:
            provider.submit(commands.SetVariable(session, "set", value)).result()
            (update,) = take(watch, 1)
        assert update.variable.value == value
        outcome = provider.submit(commands.SetVariables(session, {"set": value, "registered": value})).result()
        assert outcome.success
        for name in ("registered", "set"):
            assert provider.get_variable(session, name).value == value
        assert provider.submit(commands.SetVariable(session, "set", plain)).result() == 3
        assert provider.get_variable(session, "set").value.binary is None
        rolled = provider.rollback_variable(session, "set", 2)
        assert rolled.value == value

    def test_python_s_own_binary_values(self, provider: StateProvider, session: str) -> None:
        opaque = BinaryValue({"binary_format": "pickle", "shape": [3]}, b"\x80\x04N.")
        provider.register_variable(session, "x", "tensor", opaque)
        assert provider.get_value(session, "x") == opaque
        readable = BinaryValue({"binary_format": "raw", "shape": [2], "dtype": "int16"}, b"\1\0\xff\xff")
        provider.set_variable(session, "x", readable)
        assert provider.get_value(session, "x") == {"shape": [2], "dtype": "int16", "data": [1, -1]}

    def test_bytes_that_contradict_their_description_are_refused(self, provider: StateProvider, session: str) -> None:
        wrong = Value('{"binary_format":"raw","shape":[2],"dtype":"float64"}', b"short")
        for type_name, value in (("tensor", wrong), ("string", replace(wrong, json="{}"))):
            error = refused(provider.submit(commands.RegisterVariable(session, "x", type_name, value)))
            assert isinstance(error, errors.InvalidValueError)

    @pytest.mark.parametrize(("type_name", "text", "value"), COERCED)
    def test_what_means_the_same_is_brought_into_the_type(
        self, provider: StateProvider, session: str, type_name: str, text: str, value: object
    ) -> None:
        provider.submit(commands.RegisterVariable(session, "x", type_name, Value(text))).result()
        assert exact(provider.get_value(session, "x")) == exact(value)

    @pytest.mark.parametrize(("type_name", "text"), NO_VALUES, ids=shown)
    def test_what_is_no_value_of_the_type_is_refused(
        self, provider: StateProvider, session: str, type_name: str, text: str
    ) -> None:
        error = refused(provider.submit(commands.RegisterVariable(session, "wrong", type_name, Value(text))))
        assert isinstance(error, errors.InvalidValueError)
        assert error.name == "wrong"
        provider.register_variable(session, "x", type_name, next(v for name, v in EXACT_VALUES if name == type_name))
        error = refused(provider.submit(commands.SetVariable(session, "x", Value(text))))
        assert isinstance(error, errors.InvalidValueError)
        assert names_of(provider.list_variables(session)) == ["x"]
        assert provider.get_variable(session, "x").version == 0

    @pytest.mark.parametrize("number", range(len(CONSTRAINTS)), ids=lambda number: "-".join(CONSTRAINTS[number][:2]))
    def test_constraints_hold_when_registering_and_when_writing(
        self, provider: StateProvider, session: str, number: int
    ) -> None:
        type_name, constraints, good, bad, message = CONSTRAINTS[number]
        provider.register_variable(session, "x", type_name, good, constraints=constraints)
        requests: list[Command[Any]] = [
            commands.RegisterVariable(session, "y", type_name, values.encode(bad, type_name), constraints),
            commands.SetVariable(session, "x", values.encode(bad, type_name)),
        ]
        for command in requests:
            error = refused(provider.submit(command))
            assert isinstance(error, errors.InvalidValueError)
            assert message in str(error)
        batch = provider.submit(commands.SetVariables(session, {"x": values.encode(bad, type_name)})).result()
        assert message in batch.errors["x"]
        assert exact(provider.get_value(session, "x")) == exact(good)

    @pytest.mark.parametrize(
        ("type_name", "constraints"),
        [
            ("float", "{"),
            ("float", "[]"),
            ("float", '{"min": "0"}'),
            ("float", '{"min": 2, "max": 1}'),
            ("string", '{"pattern": "("}'),
            ("string", '{"pattern": "(?=a)"}'),
            ("string", '{"max_length": -1}'),
            ("choice", '{"choices": "a"}'),
            ("tensor", '{"dtype": "float99"}'),
        ],
    )
    def test_invalid_constraints_are_refused(
        self, provider: StateProvider, session: str, type_name: str, constraints: str
    ) -> None:
        good = next(value for name, value in EXACT_VALUES if name == type_name)
        with pytest.raises(errors.InvalidConstraintsError, match="Invalid constraints"):
            provider.register_variable(session, "x", type_name, good, constraints=constraints)
        assert provider.list_variables(session) == ()

    @pytest.mark.parametrize(
        ("type_name", "constraints", "kept"),
        [
            ("float", '{"min": null, "max": null}', ""),
            ("float", '{"step": 0.5, "min": null}', '{"step":0.5}'),
            ("choice", '{"choices": []}', ""),
            ("boolean", '{"min": 0}', '{"min":0}'),
        ],
    )
    def test_constraints_that_state_nothing_count_for_nothing_and_unknown_ones_are_kept(
        self, provider: StateProvider, session: str, type_name: str, constraints: str, kept: str
    ) -> None:
        good = next(value for name, value in EXACT_VALUES if name == type_name)
        identifier = provider.register_variable(session, "x", type_name, good, constraints=constraints)
        assert provider.get_variable(session, "x").constraints == kept
        assert provider.register_variable(session, "x", type_name, good, constraints=kept) == identifier

    @pytest.mark.parametrize("type_name", ["number", "", "Float", "float ", "__class__"])
    def test_an_unknown_type_is_refused_and_the_known_ones_are_named(
        self, provider: StateProvider, session: str, type_name: str
    ) -> None:
        error = refused(provider.submit(commands.RegisterVariable(session, "x", type_name, Value("1"))))
        assert isinstance(error, errors.UnknownTypeError)
        assert all(known in str(error) for known in values.type_names())


def _another(type_name: str, value: object) -> object:
    """Return another value of the type."""
    return next(other for name, other in EXACT_VALUES if name == type_name and exact(other) != exact(value))
