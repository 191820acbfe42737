"""Idempotency keys: a repeated request has one effect and the same answer."""

import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from dspex_persist.state import commands, errors
from dspex_persist.state.commands import Command
from dspex_persist.state.model import Value, VariableVersion
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import refused, shown
from dspex_persist.testing.provider_contract.base import Contract
from dspex_persist.testing.provider_contract.values import TENSOR


def keyed_writes(session: str) -> Mapping[str, Command[Any]]:
    """Return one of each command that writes, for a session that `keyable_session` created."""
    return {
        "initialize": commands.InitializeSession(session, {"new": "metadata"}),
        "register": commands.RegisterVariable(session, "new", "integer", Value("1")),
        "set": commands.SetVariable(session, "x", Value("5"), {"a": "b"}),
        "set binary": commands.SetVariable(session, "t", Value('{"binary_format":"pickle"}', b"\x80\0\xff")),
        "batch": commands.SetVariables(session, {"x": Value("5"), "y": Value("6"), "none": Value("1")}),
        "atomic batch": commands.SetVariables(session, {"x": Value("5"), "y": Value("6")}, atomic=True),
        "delete": commands.DeleteVariable(session, "y"),
        "rollback": commands.RollbackVariable(session, "x", 0),
        "dependency": commands.AddDependency(session, "x", "y"),
        "start": commands.StartOptimization(session, "x", "optimizer"),
        "stop": commands.StopOptimization(session, "held"),
        "cleanup": commands.CleanupSession(session),
    }


KEYED = sorted(keyed_writes(""))
SAME: list[tuple[str, Sequence[str]]] = [
    ("float", ("1", "1.0", " 1e0 ", "10e-1")),
    ("integer", ("5", "5.0", "\n5")),
    ("boolean", ("true", '"true"', "1")),
    ("string", ('"\u00e9"', '"\\u00e9"', ' "\\u00E9"')),
    ("embedding", ("[1, 2]", "[1.0,2e0]")),
    ("map", ('{"a": 1, "b": {"c": 2, "d": 3}}', '{"b":{"d":3,"c":2},"a":1}')),
    ("list", ('[{"a": 1, "b": 2}]', '[ {"b":2,"a":1} ]')),
    ("tensor", ('{"shape": [1], "data": [1]}', '{"data":[1],"shape":[1]}')),
]
DIFFERENT: list[tuple[str, str, str]] = [
    ("list", "[1]", "[1.0]"),
    ("map", '{"a": 1}', '{"a": 1.0}'),
    ("string", '"1"', '"1.0"'),
    ("float", "0.0", "-0.0"),
]
"""JSON texts of values: which of them a type considers equal, and which it distinguishes."""


def keyable_session(provider: StateProvider) -> str:
    """Create a session in which each of `keyed_writes` can be carried out, and return its id."""
    session_id = f"contract-{uuid.uuid4().hex}"
    provider.initialize_session(session_id)
    for name in ("x", "y", "held"):
        provider.register_variable(session_id, name, "integer", 1)
    provider.register_variable(session_id, "t", "tensor", TENSOR)
    provider.set_variable(session_id, "x", 2, metadata={"m": "1"})
    provider.start_optimization(session_id, "held", "optimizer")
    return session_id


def submit_keyed(provider: StateProvider, command: Command[Any], key: str) -> Future[Any]:
    """Submit a command under an idempotency key."""
    return provider.submit(command, provider.default_origin(command.cause, key))


class IdempotencyContract(Contract):
    """Idempotency keys: a repeated request has one effect and the same answer."""

    @pytest.fixture
    def keyable(self, provider: StateProvider) -> str:
        return keyable_session(provider)

    @pytest.mark.parametrize("which", KEYED)
    def test_a_repeated_request_gets_the_recorded_answer_and_does_nothing(
        self, provider: StateProvider, keyable: str, which: str
    ) -> None:
        command, key = keyed_writes(keyable)[which], uuid.uuid4().hex
        answer = submit_keyed(provider, command, key).result()
        if which == "cleanup":
            provider.initialize_session(keyable)
        before = provider.list_variables(keyable), self.histories(provider, keyable)
        for _ in range(2):
            assert submit_keyed(provider, command, key).result() == answer
        assert (provider.list_variables(keyable), self.histories(provider, keyable)) == before

    def histories(self, provider: StateProvider, keyable: str) -> list[list[VariableVersion]]:
        return [provider.get_variable_history(keyable, variable.id) for variable in provider.list_variables(keyable)]

    def test_for_another_request_the_key_is_refused(self, provider: StateProvider, keyable: str) -> None:
        key = uuid.uuid4().hex
        assert provider.set_variable(keyable, "x", 5, idempotency_key=key) == 2
        others: list[Command[Any]] = [
            commands.SetVariable(keyable, "x", Value("6")),
            commands.SetVariable(keyable, "y", Value("5")),
            commands.SetVariable(keyable, "x", Value("5"), {"a": "b"}),
            commands.SetVariable(keyable, "x", Value("5"), expected_version=2),
            commands.DeleteVariable(keyable, "x"),
            commands.CleanupSession(keyable),
        ]
        for command in others:
            error = refused(submit_keyed(provider, command, key))
            assert isinstance(error, errors.IdempotencyConflictError), command
            assert key in str(error)
        assert provider.get_variable(keyable, "x").version == 2
        assert provider.set_variable(keyable, "x", 5, idempotency_key=key) == 2

    @pytest.mark.parametrize(("type_name", "spellings"), SAME, ids=shown)
    def test_requests_that_mean_the_same_are_the_same(
        self, provider: StateProvider, keyable: str, type_name: str, spellings: Sequence[str]
    ) -> None:
        """They are compared by value: white space, the order of keys and the notation of numbers do not matter."""
        initial = Value(spellings[0])
        provider.run(commands.RegisterVariable(keyable, "v", type_name, initial))
        key = uuid.uuid4().hex
        for number, text in enumerate(spellings):
            register = commands.RegisterVariable(keyable, "new", type_name, Value(text), "{ }" if number else "")
            registered = submit_keyed(provider, register, f"{key}-register").result()
            assert registered == provider.get_variable(keyable, "new").id
            metadata = {"a": "1", "b": "2"} if number else {"b": "2", "a": "1"}
            write = commands.SetVariable(keyable, "v", Value(text), metadata)
            assert submit_keyed(provider, write, key).result() == 1
            batch = commands.SetVariables(keyable, {"v": Value(text)})
            assert submit_keyed(provider, batch, f"{key}-batch").result().versions == {"v": 2}
        provider.delete_variable(keyable, "v")
        for text in spellings:
            assert submit_keyed(provider, commands.SetVariable(keyable, "v", Value(text), metadata), key).result() == 1

    def test_so_are_those_with_the_same_constraints(self, provider: StateProvider, keyable: str) -> None:
        """Registering the variable again, too, keeps the constraints as they were first written."""
        for text in ('{"min": 0, "max": 2, "step": 1}', ' {"step":1,"max":2.0,"min":-0.0, "other": null}'):
            for keyed in (True, False):
                command = commands.RegisterVariable(keyable, "bound", "float", Value("1"), text)
                answer = submit_keyed(provider, command, "k").result() if keyed else provider.run(command)
                assert answer == provider.get_variable(keyable, "bound").id
        assert provider.get_variable(keyable, "bound").constraints == '{"max":2,"min":0,"step":1}'
        for other in ('{"min": 0, "max": 2, "step": 1.0}', '{"min": 0, "max": 2.5, "step": 1}', "{}"):
            command = commands.RegisterVariable(keyable, "bound", "float", Value("1"), other)
            assert isinstance(refused(submit_keyed(provider, command, "k")), errors.IdempotencyConflictError)
            assert isinstance(refused(provider.submit(command)), errors.VariableExistsError)

    @pytest.mark.parametrize(("type_name", "one", "other"), DIFFERENT, ids=shown)
    def test_what_the_type_tells_apart_is_another_request(
        self, provider: StateProvider, keyable: str, type_name: str, one: str, other: str
    ) -> None:
        provider.run(commands.RegisterVariable(keyable, "v", type_name, Value(one)))
        key = uuid.uuid4().hex
        assert submit_keyed(provider, commands.SetVariable(keyable, "v", Value(one)), key).result() == 1
        error = refused(submit_keyed(provider, commands.SetVariable(keyable, "v", Value(other)), key))
        assert isinstance(error, errors.IdempotencyConflictError)
        for expected in (0, 1):
            error = refused(submit_keyed(provider, commands.SetVariable(keyable, "v", Value(one), {}, expected), key))
            assert isinstance(error, errors.IdempotencyConflictError)

    def test_a_request_that_failed_may_be_repeated(self, provider: StateProvider, keyable: str) -> None:
        key = uuid.uuid4().hex
        for _ in range(2):
            with pytest.raises(errors.VariableNotFoundError):
                provider.set_variable(keyable, "later", 5, idempotency_key=key)
        provider.register_variable(keyable, "later", "integer", 1)
        assert provider.set_variable(keyable, "later", 5, idempotency_key=key) == 1
        assert provider.set_variable(keyable, "later", 5, idempotency_key=key) == 1

    def test_another_session_may_use_the_same_key(self, provider: StateProvider, keyable: str) -> None:
        key, other = uuid.uuid4().hex, uuid.uuid4().hex
        provider.initialize_session(other)
        provider.register_variable(other, "x", "integer", 0)
        assert provider.set_variable(keyable, "x", 5, idempotency_key=key) == 2
        assert provider.set_variable(other, "x", 5, idempotency_key=key) == 1

    def test_of_many_at_once_one_writes_and_all_get_its_answer(self, provider: StateProvider, keyable: str) -> None:
        command, key = commands.SetVariable(keyable, "x", Value("5")), uuid.uuid4().hex
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: submit_keyed(provider, command, key).result(), range(24)))
        assert answers == [2] * 24
        assert provider.get_variable(keyable, "x").version == 2

    def test_without_a_key_every_request_counts(self, provider: StateProvider, keyable: str) -> None:
        assert [provider.set_variable(keyable, "x", 5) for _ in range(3)] == [2, 3, 4]
