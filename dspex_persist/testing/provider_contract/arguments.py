"""Arguments of a wrong type are refused before anything is done, with the same message by every backend."""

import uuid
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from dspex_persist.state import commands, errors
from dspex_persist.state.model import Origin, Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import check_invalid, refused, shown
from dspex_persist.testing.provider_contract.base import Contract


class Color(StrEnum):
    """A subclass of str."""

    RED = "red"


class Whole(int):
    """A subclass of int."""


class Secretive(str):
    """A str that cannot be converted to text."""

    __slots__ = ()

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Cells:
    """Behaves like a NumPy array used as a number or a list: it has the methods, but they raise."""

    def __index__(self) -> int:
        raise TypeError("only integer scalar arrays can be converted to a scalar index")

    def __iter__(self) -> Iterator[str]:
        raise TypeError("iteration over a 0-d array")

    def __bool__(self) -> bool:
        raise ValueError("the truth value of an array with more than one element is ambiguous")


WRONG_TEXTS: list[tuple[object, str]] = [
    (uuid.UUID(int=5), "it must be a str, not UUID: use str(...)"),
    (5, "it must be a str, not int: use str(...)"),
    (True, "it must be a str, not bool: use str(...)"),
    (Path("s"), f"it must be a str, not {type(Path()).__name__}: use str(...)"),
    (b"s", "it must be a str, not bytes: decode it"),
    (None, "it must be a str, not None"),
    (["s"], "it must be a str, not list: use str(...)"),
    (Cells(), "it must be a str, not Cells: use str(...)"),
    ("a\0b", r"'a\x00b' contains NUL (U+0000): leave it out"),
    ("\ud800", r"'\ud800' contains a lone surrogate (U+D800), which is not a character"),
]
WRONG_METADATA: list[tuple[object, str]] = [
    ({"sensitive": True}, "the entry 'sensitive' must be a str, not bool: write \"true\""),
    ({"n": 1}, "the entry 'n' must be a str, not int: write \"1\""),
    ({"n": None}, "the entry 'n' must be a str, not None: leave the entry out"),
    ({"n": [1]}, "the entry 'n' must be a str, not list: write a str, such as JSON"),
    ({1: "n"}, "its keys must be str, not int: use str(...)"),
    ({"q\0": "w"}, r"'q\x00' contains NUL (U+0000): leave it out"),
    ({"q": "w\0"}, r"'w\x00' contains NUL (U+0000): leave it out"),
    ({"\udfff": "w"}, r"'\udfff' contains a lone surrogate (U+DFFF), which is not a character"),
    ([("a", "b")], "it must be a mapping, such as a dict, not list"),
    ("ab", "it must be a mapping, such as a dict, not str"),
    (5, "it must be a mapping, such as a dict, not int"),
]
WRONG_NUMBERS: list[tuple[object, str]] = [
    ("1", "it must be an int, not str: use int(...)"),
    (1.0, "it must be an int, not float: use int(...)"),
    (True, "it must be an int, not bool"),
    ([1], "it must be an int, not list"),
    (Cells(), "it must be an int, not Cells"),
    (2**31, "it must be at most 2147483647, not a number of 32 bits"),
    (2**70, "it must be at most 2147483647, not a number of 71 bits"),
]


class ArgumentContract(Contract):
    """Arguments of a wrong type are refused before anything is done, with the same message by every backend."""

    @pytest.fixture
    def untouched(self, provider: StateProvider, session: str) -> Iterator[str]:
        """A session with `x` (1), which must be unchanged afterwards."""
        provider.register_variable(session, "x", "integer", 1)
        yield session
        assert provider.get_value(session, "x") == 1
        assert provider.get_session(session).metadata == {}
        assert [variable.name for variable in provider.list_variables(session)] == ["x"]
        assert len(provider.get_variable_history(session, "x")) == 1

    @pytest.mark.parametrize(("wrong", "reason"), WRONG_TEXTS, ids=shown)
    def test_ids_names_patterns_and_keys(
        self, provider: StateProvider, untouched: str, wrong: Any, reason: str
    ) -> None:
        asks: list[tuple[str, Callable[[], object]]] = [
            ("session_id", lambda: provider.initialize_session(wrong)),
            ("session_id", lambda: provider.get_session(wrong)),
            ("session_id", lambda: provider.heartbeat(wrong)),
            ("session_id", lambda: provider.cleanup_session(wrong)),
            ("session_id", lambda: provider.set_variable(wrong, "x", 2)),
            ("session_id", lambda: provider.watch(wrong)),
            ("name", lambda: provider.register_variable(untouched, wrong, "integer", 1)),
            ("type_name", lambda: provider.register_variable(untouched, "y", wrong, 1)),
            ("identifier", lambda: provider.get_variable(untouched, wrong)),
            ("identifier", lambda: provider.set_variable(untouched, wrong, 2)),
            ("identifier", lambda: provider.delete_variable(untouched, wrong)),
            ("identifier", lambda: provider.rollback_variable(untouched, wrong, 0)),
            ("identifier", lambda: provider.get_variable_history(untouched, wrong)),
            ("identifiers", lambda: provider.get_variables(untouched, [wrong])),
            ("identifiers", lambda: provider.watch(untouched, [wrong])),
            ("pattern", lambda: provider.list_variables(untouched, wrong)),
            ("from_variable", lambda: provider.add_dependency(untouched, wrong, "x")),
            ("to_variable", lambda: provider.add_dependency(untouched, "x", wrong)),
            ("dependency_type", lambda: provider.add_dependency(untouched, "x", "x", wrong)),
            ("optimizer_id", lambda: provider.start_optimization(untouched, "x", wrong)),
            ("actor", lambda: _submit(provider, untouched, Origin(wrong, "test"))),
        ]
        if wrong is not None:
            asks.append(("idempotency_key", lambda: provider.set_variable(untouched, "x", 2, idempotency_key=wrong)))
            asks.append(
                ("optimizer_id", lambda: _submit(provider, untouched, Origin("ada", "test", optimizer_id=wrong)))
            )
        for field, ask in asks:
            check_invalid(ask, field, reason)
        if not isinstance(wrong, list):
            of_key = reason.replace("it must be a str", "its keys must be str")
            check_invalid(lambda: provider.set_variables(untouched, {wrong: 2}), "updates", of_key)

    @pytest.mark.parametrize(("wrong", "reason"), WRONG_METADATA, ids=shown)
    def test_metadata(self, provider: StateProvider, untouched: str, wrong: Any, reason: str) -> None:
        asks: list[Callable[[], object]] = [
            lambda: provider.initialize_session(untouched, wrong),
            lambda: provider.register_variable(untouched, "y", "integer", 1, metadata=wrong),
            lambda: provider.set_variable(untouched, "x", 2, metadata=wrong),
            lambda: provider.set_variables(untouched, {"x": 2}, metadata=wrong),
        ]
        for ask in asks:
            check_invalid(ask, "metadata", reason)
        check_invalid(lambda: provider.start_optimization(untouched, "x", "me", wrong), "config", reason)

    def test_metadata_of_a_number_that_python_does_not_write(self, provider: StateProvider, untouched: str) -> None:
        wrong: Any = {"n": 10**5000}
        reason = "the entry 'n' must be a str, not int: write a str, such as JSON"
        check_invalid(lambda: provider.set_variable(untouched, "x", 2, metadata=wrong), "metadata", reason)

    @pytest.mark.parametrize(("wrong", "reason"), WRONG_NUMBERS, ids=shown)
    def test_numbers(self, provider: StateProvider, untouched: str, wrong: Any, reason: str) -> None:
        asks: list[tuple[str, Callable[[], object]]] = [
            ("expected_version", lambda: provider.set_variable(untouched, "x", 2, expected_version=wrong)),
            ("limit", lambda: provider.get_variable_history(untouched, "x", wrong)),
            ("target_version", lambda: provider.rollback_variable(untouched, "x", wrong)),
            ("before", lambda: provider.run(commands.GetVariableHistory(untouched, "x", before=wrong))),
        ]
        for field, ask in asks:
            check_invalid(ask, field, reason)
        if not isinstance(wrong, int) or isinstance(wrong, bool):
            check_invalid(lambda: provider.watch(untouched, after_sequence=wrong), "after_sequence", reason)

    @pytest.mark.parametrize("wrong", [-1, 2**63, 10**5000], ids=["below 0", "64 bits", "5,001 digits"])
    def test_a_commit_that_cannot_be(self, provider: StateProvider, untouched: str, wrong: int) -> None:
        reason = f"it must be from 0 to {2**63 - 1}: the number of a commit, or 0"
        check_invalid(lambda: provider.watch(untouched, after_sequence=wrong), "after_sequence", reason)

    def test_a_version_below_0_is_refused(self, provider: StateProvider, untouched: str) -> None:
        reason = "-1 is below 0: versions count from 0"
        check_invalid(lambda: provider.set_variable(untouched, "x", 2, expected_version=-1), "expected_version", reason)
        history = commands.GetVariableHistory(untouched, "x", before=-1)
        check_invalid(lambda: provider.run(history), "before", reason)

    @pytest.mark.parametrize("wrong", ["yes", 1, None], ids=shown)
    def test_flags(self, provider: StateProvider, untouched: str, wrong: Any) -> None:
        reason = f"it must be True or False, not {'None' if wrong is None else type(wrong).__name__}"
        check_invalid(lambda: provider.set_variables(untouched, {"x": 2}, atomic=wrong), "atomic", reason)
        check_invalid(lambda: provider.stop_optimization(untouched, "x", wrong), "force", reason)

    @pytest.mark.parametrize("wrong", ["x", b"x", 5, None, Cells()], ids=shown)
    def test_several_names_are_a_list(self, provider: StateProvider, untouched: str, wrong: Any) -> None:
        advice = ": write [...] around it" if isinstance(wrong, str) else ""
        kind = "None" if wrong is None else type(wrong).__name__
        reason = f"it must be a list of str, not {kind}{advice}"
        check_invalid(lambda: provider.get_variables(untouched, wrong), "identifiers", reason)
        check_invalid(lambda: provider.watch(untouched, wrong), "identifiers", reason)

    @pytest.mark.parametrize("wrong", [[("x", 2)], "x", 5, None], ids=shown)
    def test_several_values_are_a_mapping(self, provider: StateProvider, untouched: str, wrong: Any) -> None:
        kind = "None" if wrong is None else type(wrong).__name__
        reason = f"it must be a mapping, such as a dict, not {kind}"
        check_invalid(lambda: provider.set_variables(untouched, wrong), "updates", reason)

    def test_what_is_no_command_no_origin_and_no_value(self, provider: StateProvider, untouched: str) -> None:
        asks: list[tuple[str, Any, Any]] = [
            ("command", "SetVariable", None),
            ("origin", commands.Heartbeat(untouched), "ada"),
            ("value", commands.SetVariable(untouched, "x", 5), None),  # type: ignore[arg-type]
            ("value", commands.SetVariable(untouched, "x", Value(5)), None),  # type: ignore[arg-type]
            ("value", commands.SetVariable(untouched, "x", Value("\ud800")), None),
            ("updates", commands.SetVariables(untouched, {"x": 5}), None),  # type: ignore[dict-item]
        ]
        for field, command, origin in asks:
            error = refused(provider.submit(command, origin))
            assert isinstance(error, errors.InvalidArgumentError)
            assert error.field == field

    @pytest.mark.parametrize("wrong", [object(), {1}, 1 + 2j, b"bytes", None, {1: 2}, [{"a": object()}]], ids=range(7))
    def test_values_that_have_no_form(self, provider: StateProvider, untouched: str, wrong: object) -> None:
        asks: list[Callable[[], object]] = [
            lambda: provider.set_variable(untouched, "x", wrong),
            lambda: provider.set_variables(untouched, {"x": wrong}),
            lambda: provider.register_variable(untouched, "y", "integer", wrong),
        ]
        for ask in asks:
            with pytest.raises(errors.InvalidValueError):
                ask()

    @pytest.mark.parametrize("wrong", [5, [("min", 0)], {"min": object()}, {1: 2}, {"min"}], ids=range(5))
    def test_constraints(self, provider: StateProvider, untouched: str, wrong: Any) -> None:
        with pytest.raises(errors.InvalidConstraintsError, match="'y'"):
            provider.register_variable(untouched, "y", "integer", 1, constraints=wrong)

    def test_what_counts_as_a_text_or_a_number_is_one(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, Color.RED, "string", "a", metadata={Color.RED: Color.RED})
        assert provider.set_variable(session, "red", Color.RED, expected_version=Whole(0)) == 1
        assert provider.get_value(session, Color.RED) == "red"
        assert type(provider.get_variable(session, "red").name) is str
        assert provider.get_variable(session, "red").metadata == {"red": "red"}
        assert len(provider.get_variable_history(session, "red", Whole(1))) == 1

    def test_a_text_may_say_of_itself_what_it_likes(self, provider: StateProvider, session: str) -> None:
        for key in (Color.RED, Secretive("red")):
            assert provider.register_variable(session, Secretive("x"), Secretive("integer"), 1, idempotency_key=key)
            with pytest.raises(errors.IdempotencyConflictError, match="key 'red' was used for another"):
                provider.set_variable(session, Secretive("x"), 2, idempotency_key=key)
        with pytest.raises(errors.VariableNotFoundError, match="variable not found: 'y'"):
            provider.get_variable(session, Secretive("y"))
        with pytest.raises(errors.UnknownTypeError, match="unknown type 'int'"):
            provider.register_variable(session, "y", Secretive("int"), 1)


def _submit(provider: StateProvider, session: str, origin: Origin) -> None:
    error = refused(provider.submit(commands.SetVariable(session, "x", Value("2")), origin))
    assert error is not None
    raise error
