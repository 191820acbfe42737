"""What every StateProvider promises, as tests. A backend subclasses `ProviderContract` and gives a `provider`:

    class TestMine(ProviderContract):
        @pytest.fixture
        def provider(self) -> Iterator[StateProvider]:
            with MyState(limits=self.limits) as provider:
                yield provider

        @pytest.fixture
        def reopened(self, provider: StateProvider) -> Reopen: ...

A durable backend also gives `reopened`. The provider may be used by other tests at the same time and before: each
test begins a session of its own. `LeaseContract` is for a provider whose optimization leases are short.

Nothing here asks which backend it has; what not every backend can do is asked of `provider.capabilities`.
"""

import copy
import json
import math
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC
from enum import StrEnum
from itertools import groupby, pairwise
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import pytest

from dspex_persist.state import commands, errors, values
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import StateError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import ChangeKind, Origin, Source, Update, UpdateKind, Value, Variable, VariableVersion
from dspex_persist.state.provider import Capability, StateProvider
from dspex_persist.state.values import BinaryValue
from dspex_persist.state.watch import Watch

Reopen: TypeAlias = Callable[[], StateProvider]
"""Ends whatever keeps the provider's state (the harder the better), starts it again, gives a provider to go on with."""

DEADLINE_S = 30.0
"""How long anything may take that has to happen."""

SMALL_LIMITS = Limits(
    value_size_bytes=1024 * 1024,
    binary_size_bytes=1024 * 1024,
    session_size_bytes=4 * 1024 * 1024,
    variables_per_session=100,
    metadata_entries=16,
    metadata_size_bytes=2 * 1024,
    constraints_size_bytes=4 * 1024,
    batch_entries=120,
    history_entries=200,
    history_size_bytes=1024 * 1024,
    watchers=30,
)
"""Limits that a test can reach quickly."""

LONG_TEXT = "x" * 100_000
REFUSALS = (errors.InvalidArgumentError, errors.LimitExceededError)
NOT_THERE = (*REFUSALS, errors.SessionNotFoundError, errors.VariableNotFoundError)


# How tests wait, compare and ask


def exact(value: object) -> str:
    """A text that is the same only for the same value: 1 is not 1.0 nor True, 0.0 is not -0.0, NaN is NaN."""
    return json.dumps(value, sort_keys=True)


def shown(value: object) -> str:
    """A parameter in the id of a test."""
    return ascii(value)[:40]


def let_pass(seconds: float) -> None:
    """Wait for time itself to pass: for what a look would keep alive."""
    threading.Event().wait(seconds)


def take(watch: Watch, count: int) -> list[Update]:
    """Exactly the next `count` updates."""
    updates: list[Update] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(updates) < count:
        left_s = deadline - time.monotonic()
        assert left_s > 0, f"only {len(updates)} of {count} updates came within {DEADLINE_S} s"
        updates.extend(watch.next(left_s))
    assert len(updates) == count, f"more than {count} updates: {updates}"
    return updates


def take_until(watch: Watch, name: str) -> list[Update]:
    """The next updates up to the first one of the variable `name`, which is left out."""
    updates: list[Update] = []
    deadline = time.monotonic() + DEADLINE_S
    while not any(update.variable.name == name for update in updates):
        left_s = deadline - time.monotonic()
        assert left_s > 0, f"no update of {name!r} came within {DEADLINE_S} s, only: {updates}"
        updates.extend(watch.next(left_s))
    assert updates[-1].variable.name == name
    return updates[:-1]


def names_of(told: Iterable[Update | Variable]) -> list[str]:
    return [one.variable.name if isinstance(one, Update) else one.name for one in told]


def check_whole_commits(updates: Sequence[Update]) -> None:
    """Commits in order, none twice, each with all of its parts."""
    sequences = [sequence for sequence, _ in groupby(updates, key=lambda update: update.sequence)]
    assert sequences == sorted(set(sequences))
    for _, group in groupby(updates, key=lambda update: update.sequence):
        parts = [update.part for update in group]
        assert parts == [(number, len(parts)) for number in range(1, len(parts) + 1)]


def refused(future: Future[Any]) -> StateError | None:
    """The error with which a command failed; None if it did not. Anything but a StateError is a fault."""
    error = future.exception(DEADLINE_S)
    if error is not None and not isinstance(error, StateError):
        raise error
    return error


class _Contract:
    """What all parts of the contract have."""

    limits: ClassVar[Limits] = SMALL_LIMITS
    """The limits of the provider under test. Give it these, or say which it has."""

    @pytest.fixture
    def provider(self) -> Iterator[StateProvider]:
        """The provider under test."""
        raise NotImplementedError(f"{type(self).__name__} gives no fixture `provider`")

    @pytest.fixture
    def reopened(self, provider: StateProvider) -> Reopen:
        """See `Reopen`. Only durable providers need it."""
        if Capability.DURABLE in provider.capabilities:
            raise NotImplementedError(f"{type(self).__name__} is durable and gives no fixture `reopened`")
        pytest.skip("this provider's state ends with it")

    @pytest.fixture
    def session(self, provider: StateProvider) -> str:
        """The id of a new session."""
        session_id = f"contract-{uuid.uuid4().hex}"
        provider.initialize_session(session_id)
        return session_id


class SessionContract(_Contract):
    """Sessions: begun, resumed, kept alive, ended."""

    def test_begins_and_resumes(self, provider: StateProvider) -> None:
        session = uuid.uuid4().hex
        begun = provider.initialize_session(session)
        assert not begun.resumed
        assert begun.variables == ()
        provider.register_variable(session, "b", "integer", 1)
        provider.register_variable(session, "a", "integer", 2)
        resumed = provider.initialize_session(session)
        assert resumed.resumed
        told = {variable.name: variable for variable in resumed.variables}
        assert told == {name: provider.get_variable(session, name) for name in ("a", "b")}

    def test_tells_its_own_facts(self, provider: StateProvider, session: str) -> None:
        provider.initialize_session(session, {"user": "ada", "\U0001f600": ""})
        provider.register_variable(session, "x", "integer", 1)
        summary = provider.get_session(session)
        assert (summary.id, summary.variable_count, summary.tool_count) == (session, 1, 0)
        assert summary.metadata == {"user": "ada", "\U0001f600": ""}
        assert summary.created_at.tzinfo is UTC

    def test_resuming_merges_metadata_and_keeps_the_beginning(self, provider: StateProvider, session: str) -> None:
        begun = provider.get_session(session).created_at
        provider.initialize_session(session, {"a": "1", "b": "1"})
        provider.initialize_session(session, {"b": "2", "c": "2"})
        summary = provider.get_session(session)
        assert summary.metadata == {"a": "1", "b": "2", "c": "2"}
        assert summary.created_at == begun

    def test_an_unknown_session_is_not_found_whatever_is_asked(self, provider: StateProvider) -> None:
        nobody = uuid.uuid4().hex
        asked: list[Command[Any]] = [
            commands.GetSession(nobody),
            commands.RegisterVariable(nobody, "x", "integer", Value("1")),
            commands.GetVariable(nobody, "x"),
            commands.GetVariables(nobody, ("x",)),
            commands.SetVariable(nobody, "x", Value("1")),
            commands.SetVariables(nobody, {"x": Value("1")}),
            commands.SetVariables(nobody, {"x": Value("1")}, atomic=True),
            commands.ListVariables(nobody),
            commands.DeleteVariable(nobody, "x"),
            commands.GetVariableHistory(nobody, "x"),
            commands.RollbackVariable(nobody, "x", 0),
            commands.AddDependency(nobody, "x", "y"),
            commands.StartOptimization(nobody, "x", "optimizer"),
            commands.StopOptimization(nobody, "x"),
        ]
        for command in asked:
            error = refused(provider.submit(command))
            assert isinstance(error, errors.SessionNotFoundError), command
            assert "not found" in str(error)
            assert error.session_id == nobody
        with pytest.raises(errors.SessionNotFoundError):
            provider.watch(nobody)

    def test_a_heartbeat_tells_whether_it_lives(self, provider: StateProvider, session: str) -> None:
        assert provider.heartbeat(session) is True
        assert provider.heartbeat(uuid.uuid4().hex) is False

    def test_cleaning_up_counts_what_went_and_may_be_repeated(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 1)
        provider.register_variable(session, "y", "integer", 1)
        assert provider.cleanup_session(session) == 2
        assert provider.cleanup_session(session) == 0
        assert provider.heartbeat(session) is False
        with pytest.raises(errors.SessionNotFoundError):
            provider.get_session(session)

    def test_the_same_id_begins_a_session_with_a_history_of_its_own(
        self, provider: StateProvider, session: str
    ) -> None:
        provider.initialize_session(session, {"old": "yes"})
        old = provider.register_variable(session, "x", "integer", 1)
        provider.register_variable(session, "only before", "integer", 1)
        provider.set_variable(session, "x", 2)
        provider.cleanup_session(session)
        assert not provider.initialize_session(session, {"new": "yes"}).resumed
        assert provider.get_session(session).metadata == {"new": "yes"}
        assert provider.list_variables(session) == ()
        new = provider.register_variable(session, "x", "string", "other type")
        assert new != old
        assert [version.version for version in provider.get_variable_history(session, "x")] == [0]
        for gone in (old, "only before"):
            with pytest.raises(errors.VariableNotFoundError):
                provider.get_variable_history(session, gone)

    def test_expires_when_nobody_has_touched_it_for_its_ttl(self, provider: StateProvider) -> None:
        session = uuid.uuid4().hex
        provider.initialize_session(session, {"ttl_seconds": "0.3"})
        provider.register_variable(session, "x", "integer", 1)
        let_pass(0.33)
        assert provider.heartbeat(session) is False
        for ask in (provider.get_session, provider.list_variables):
            with pytest.raises(errors.SessionNotFoundError):
                ask(session)
        with pytest.raises(errors.SessionNotFoundError):
            provider.set_variable(session, "x", 2)
        assert provider.cleanup_session(session) == 0
        assert not provider.initialize_session(session).resumed
        assert provider.list_variables(session) == ()

    def test_every_touch_begins_its_ttl_anew(self, provider: StateProvider) -> None:
        session = uuid.uuid4().hex
        ttl_s = 0.5
        provider.initialize_session(session, {"ttl_seconds": str(ttl_s)})
        provider.register_variable(session, "x", "integer", 1)
        touches: list[Callable[[], object]] = [
            lambda: provider.heartbeat(session),
            lambda: provider.get_variable(session, "x"),
            lambda: provider.set_variable(session, "x", 1),
        ]
        begun = touched = time.monotonic()
        while time.monotonic() - begun < 1.5 * ttl_s:
            asked, last = time.monotonic(), touched
            touches[0]()
            touched = time.monotonic()
            touches.append(touches.pop(0))
            if touched - last < ttl_s:
                assert provider.heartbeat(session), f"ended {touched - last:.3f} s after a touch ({asked - begun:.3f})"
            let_pass(0.05)
        assert provider.heartbeat(session)

    def test_a_ttl_of_zero_is_for_ever(self, provider: StateProvider) -> None:
        session = uuid.uuid4().hex
        provider.initialize_session(session, {"ttl_seconds": "0.2"})
        provider.initialize_session(session, {"ttl_seconds": "0"})
        let_pass(0.25)
        assert provider.heartbeat(session)

    @pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf", "", "1e300"])
    def test_a_ttl_that_is_none_is_refused(self, provider: StateProvider, session: str, text: str) -> None:
        with pytest.raises(errors.InvalidArgumentError, match="ttl_seconds"):
            provider.initialize_session(session, {"ttl_seconds": text})
        assert "ttl_seconds" not in provider.get_session(session).metadata

    def test_survives_a_restart_with_everything_that_it_holds(
        self, provider: StateProvider, session: str, reopened: Reopen
    ) -> None:
        provider.initialize_session(session, {"user": "ada"})
        for number in range(10):
            provider.register_variable(session, f"v{number}", "integer", 0, metadata={"number": str(number)})
        for number in range(0, 10, 2):
            provider.set_variable(session, f"v{number}", number, metadata={"written": "yes"})
        provider.delete_variable(session, "v3")
        summary, variables = provider.get_session(session), provider.list_variables(session)
        histories = {name: provider.get_variable_history(session, name) for name in ("v2", "v3")}
        again = reopened()
        assert again.get_session(session) == summary
        assert again.list_variables(session) == variables
        assert {name: again.get_variable_history(session, name) for name in histories} == histories
        assert again.initialize_session(session).resumed
        assert again.set_variable(session, "v2", 5, expected_version=1) == 2

    def test_what_was_ended_stays_ended_after_a_restart(
        self, provider: StateProvider, session: str, reopened: Reopen
    ) -> None:
        provider.initialize_session(expiring := uuid.uuid4().hex, {"ttl_seconds": "0.2"})
        provider.cleanup_session(session)
        let_pass(0.25)
        again = reopened()
        assert again.heartbeat(session) is False
        assert again.heartbeat(expiring) is False
        assert not again.initialize_session(session).resumed


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


class ValueContract(_Contract):
    """Values: exactly what went in comes out, or a clear refusal."""

    @pytest.mark.parametrize(("type_name", "value"), EXACT_VALUES, ids=shown)
    def test_comes_out_exactly_as_it_went_in(
        self, provider: StateProvider, session: str, type_name: str, value: object
    ) -> None:
        """Registered, written, listed, in a batch, in the history, told to a watcher."""
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

    def test_all_of_them_survive_a_restart(self, provider: StateProvider, session: str, reopened: Reopen) -> None:
        for number, (type_name, value) in enumerate(EXACT_VALUES):
            provider.register_variable(session, f"v{number}", type_name, value)
        for number, (type_name, binary) in enumerate(BINARY_VALUES):
            provider.submit(commands.RegisterVariable(session, f"b{number}", type_name, binary)).result()
        again = reopened()
        for number, (_, value) in enumerate(EXACT_VALUES):
            assert exact(again.get_value(session, f"v{number}")) == exact(value)
        for number, (_, binary) in enumerate(BINARY_VALUES):
            assert again.get_variable(session, f"b{number}").value == binary

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
        asked: list[Command[Any]] = [
            commands.RegisterVariable(session, "y", type_name, values.encode(bad, type_name), constraints),
            commands.SetVariable(session, "x", values.encode(bad, type_name)),
        ]
        for command in asked:
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
    def test_constraints_that_are_none_are_refused(
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
        assert all(known in str(error) for known in values.TYPE_NAMES)


def _another(type_name: str, value: object) -> object:
    """Some other value of the type."""
    return next(other for name, other in EXACT_VALUES if name == type_name and exact(other) != exact(value))


class VariableContract(_Contract):
    """Variables: registered, read, written, listed, deleted."""

    def test_registering_gives_an_id_and_version_0(self, provider: StateProvider, session: str) -> None:
        variable_id = provider.register_variable(
            session, "temperature", "float", 0.5, constraints={"min": 0}, metadata={"unit": "none"}
        )
        prefix, _, unique = variable_id.rpartition("_")
        assert prefix == "var_temperature"
        assert unique
        variable = provider.get_variable(session, "temperature")
        assert (variable.id, variable.name, variable.type) == (variable_id, "temperature", "float")
        assert (variable.version, variable.metadata) == (0, {"unit": "none"})
        assert json.loads(variable.constraints) == {"min": 0}
        assert variable.updated_at.tzinfo is UTC
        assert provider.get_variable(session, variable_id) == variable

    def test_again_the_same_resumes_it_with_its_current_value(self, provider: StateProvider, session: str) -> None:
        first = provider.register_variable(session, "x", "integer", 1, constraints='{"min": 0, "max": 9}')
        provider.set_variable(session, "x", 5)
        assert provider.register_variable(session, "x", "integer", 1, constraints='{"max":9,"min":0}') == first
        assert provider.get_value(session, "x") == 5
        assert provider.get_variable(session, "x").version == 1

    @pytest.mark.parametrize(
        ("type_name", "constraints", "difference"),
        [
            ("float", '{"min":0}', "its type is integer, not float"),
            ("integer", '{"min":1}', 'its constraints are {"min":0}, not {"min":1}'),
            ("integer", "", 'its constraints are {"min":0}, not none'),
        ],
    )
    def test_again_as_something_else_says_what_differs(
        self, provider: StateProvider, session: str, type_name: str, constraints: str, difference: str
    ) -> None:
        provider.register_variable(session, "x", "integer", 1, constraints='{"min":0}')
        with pytest.raises(errors.VariableExistsError) as error:
            provider.register_variable(session, "x", type_name, 1, constraints=constraints)
        assert "already exists" in str(error.value)
        assert difference in str(error.value)

    def test_a_missing_variable_is_not_found_whatever_is_asked(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 1)
        asked: list[Command[Any]] = [
            commands.GetVariable(session, "none"),
            commands.SetVariable(session, "none", Value("1")),
            commands.DeleteVariable(session, "none"),
            commands.GetVariableHistory(session, "none"),
            commands.RollbackVariable(session, "none", 0),
            commands.AddDependency(session, "x", "none"),
            commands.AddDependency(session, "none", "x"),
            commands.StartOptimization(session, "none", "optimizer"),
            commands.StopOptimization(session, "none"),
        ]
        for command in asked:
            error = refused(provider.submit(command))
            assert isinstance(error, errors.VariableNotFoundError), command
            assert "not found" in str(error)
            assert error.identifier == "none"

    def test_sessions_do_not_see_each_other_s_variables(self, provider: StateProvider, session: str) -> None:
        provider.initialize_session(other := uuid.uuid4().hex)
        variable_id = provider.register_variable(session, "x", "integer", 1)
        for identifier in ("x", variable_id):
            with pytest.raises(errors.VariableNotFoundError):
                provider.get_variable(other, identifier)
        provider.register_variable(other, "x", "string", "mine")
        assert provider.get_value(session, "x") == 1

    def test_writing_counts_the_version_on(self, provider: StateProvider, session: str) -> None:
        variable_id = provider.register_variable(session, "x", "integer", 1)
        assert provider.set_variable(session, "x", 2) == 1
        assert provider.set_variable(session, variable_id, 2) == 2
        variable = provider.get_variable(session, "x")
        assert (variable.version, variable.value) == (2, Value("2"))

    def test_the_current_version_may_be_expected(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 1)
        assert provider.set_variable(session, "x", 2) == 1
        assert provider.set_variable(session, "x", 3, expected_version=1) == 2
        with pytest.raises(errors.VersionConflictError) as error:
            provider.set_variable(session, "x", 4, expected_version=1)
        assert (error.value.expected, error.value.actual) == (1, 2)
        assert "expected version 1" in str(error.value)
        assert "current version is 2" in str(error.value)
        assert provider.get_value(session, "x") == 3
        with pytest.raises(errors.VersionConflictError):
            provider.set_variable(session, "x", 4, expected_version=0)
        assert provider.set_variable(session, "x", 4, expected_version=None) == 3

    def test_version_0_may_be_expected(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 1)
        mine = theirs = provider.get_variable(session, "x")
        assert provider.set_variable(session, "x", 2, expected_version=mine.version) == 1
        with pytest.raises(errors.VersionConflictError) as error:
            provider.set_variable(session, "x", 3, expected_version=theirs.version)
        assert (error.value.expected, error.value.actual) == (0, 1)
        assert provider.get_value(session, "x") == 2

    def test_metadata_merges(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 1, metadata={"a": "1", "b": "1"})
        provider.set_variable(session, "x", 2, metadata={"b": "2", "c": "2"})
        provider.set_variable(session, "x", 3)
        assert provider.get_variable(session, "x").metadata == {"a": "1", "b": "2", "c": "2"}

    @pytest.mark.parametrize("key", ["commit_sequence", "dspex.actor", "dspex.anything"])
    def test_the_server_s_own_metadata_keys_are_refused(self, provider: StateProvider, session: str, key: str) -> None:
        with pytest.raises(errors.InvalidArgumentError, match=key):
            provider.register_variable(session, "x", "integer", 1, metadata={key: "1"})
        provider.register_variable(session, "x", "integer", 1)
        with pytest.raises(errors.InvalidArgumentError, match=key):
            provider.set_variable(session, "x", 2, metadata={key: "1"})

    @pytest.mark.parametrize("asked_by", list(Source))
    def test_metadata_says_the_source_else_whoever_asks_does(
        self, provider: StateProvider, session: str, asked_by: Source
    ) -> None:
        provider.register_variable(session, "x", "integer", 0)
        origin = Origin("ada", "SetVariable", asked_by)
        said = {"python": Source.PYTHON, "elixir": Source.ELIXIR, "Elixir": Source.ELIXIR, "cobol": asked_by}
        asked = [({"source": text}, source) for text, source in said.items()]
        for metadata, source in [*asked, ({}, asked_by)]:
            provider.submit(commands.SetVariable(session, "x", Value("1"), metadata), origin).result()
            assert provider.get_variable(session, "x").source is source
            assert provider.get_variable_history(session, "x", 1)[0].source is source

    def test_several_are_read_as_they_were_asked_for(self, provider: StateProvider, session: str) -> None:
        for name in ("a", "b", "c"):
            provider.register_variable(session, name, "string", name)
        b_id = provider.get_variable(session, "b").id
        found = provider.get_variables(session, ("no", "c", b_id, "a", "nor"))
        assert found.missing == ("no", "nor")
        assert list(found.variables) == ["c", b_id, "a"]
        assert {asked: variable.name for asked, variable in found.variables.items()} == {"a": "a", b_id: "b", "c": "c"}
        assert provider.get_variables(session, ()).variables == {}

    def test_a_read_may_go_past_every_cache(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 1)
        provider.set_variable(session, "x", 2)
        current = provider.get_variable(session, "x")
        assert provider.submit(commands.GetVariable(session, "x", bypass_cache=True)).result() == current
        found = provider.submit(commands.GetVariables(session, ("x", "y"), bypass_cache=True)).result()
        assert (found.variables, found.missing) == ({"x": current}, ("y",))

    def test_listed_by_glob_oldest_first(self, provider: StateProvider, session: str) -> None:
        names = ["model.b", "model.a", "temperature", "top_p", "Model.c", "x[1]"]
        for name in names:
            provider.register_variable(session, name, "integer", 0)
        provider.set_variable(session, "model.b", 1)
        listed = {
            pattern: names_of(provider.list_variables(session, pattern))
            for pattern in ("", "*", "model.*", "*.?", "t*p*", "tempe", "x[1]", "x[*]", "?", "*.*", "[a-z]*")
        }
        assert listed == {
            "": names,
            "*": names,
            "model.*": ["model.b", "model.a"],
            "*.?": ["model.b", "model.a", "Model.c"],
            "t*p*": ["temperature", "top_p"],
            "tempe": [],
            "x[1]": ["x[1]"],
            "x[*]": ["x[1]"],
            "?": [],
            "*.*": ["model.b", "model.a", "Model.c"],
            "[a-z]*": [],
        }

    def test_deleting_takes_it_away_and_frees_its_name(self, provider: StateProvider, session: str) -> None:
        first = provider.register_variable(session, "x", "integer", 1)
        provider.register_variable(session, "y", "integer", 1)
        provider.delete_variable(session, first)
        for identifier in ("x", first):
            with pytest.raises(errors.VariableNotFoundError):
                provider.get_variable(session, identifier)
            with pytest.raises(errors.VariableNotFoundError):
                provider.delete_variable(session, identifier)
        assert provider.get_session(session).variable_count == 1
        second = provider.register_variable(session, "x", "string", "new")
        assert second != first
        assert provider.get_variable(session, "x").version == 0
        assert names_of(provider.list_variables(session)) == ["y", "x"]


class BatchContract(_Contract):
    """Writing several variables at once."""

    @pytest.fixture
    def bounded(self, provider: StateProvider) -> str:
        session_id = f"contract-{uuid.uuid4().hex}"
        provider.initialize_session(session_id)
        for name in ("x", "y", "z"):
            provider.register_variable(session_id, name, "integer", 0, constraints={"max": 9})
        return session_id

    @pytest.mark.parametrize("atomic", [True, False])
    def test_is_one_commit(self, provider: StateProvider, bounded: str, atomic: bool) -> None:
        z_id = provider.get_variable(bounded, "z").id
        outcome = provider.set_variables(bounded, {"x": 1, "y": 2, z_id: 3}, metadata={"by": "batch"}, atomic=atomic)
        assert (outcome.success, outcome.versions, outcome.errors) == (True, {"x": 1, "y": 1, z_id: 1}, {})
        newest = [provider.get_variable_history(bounded, name)[0] for name in ("x", "y", "z")]
        assert len({version.sequence for version in newest}) == 1
        assert [version.metadata for version in newest] == [{"by": "batch"}] * 3
        assert provider.get_value(bounded, "z") == 3

    def test_atomic_is_all_or_nothing(self, provider: StateProvider, bounded: str) -> None:
        before = provider.list_variables(bounded)
        outcome = provider.set_variables(bounded, {"x": 1, "y": 10, "nobody": 1}, atomic=True)
        assert (outcome.success, outcome.versions) == (False, {})
        assert set(outcome.errors) == {"y", "nobody"}
        assert "above maximum 9" in outcome.errors["y"]
        assert "not found" in outcome.errors["nobody"]
        assert provider.list_variables(bounded) == before
        assert len(provider.get_variable_history(bounded, "x")) == 1

    def test_otherwise_what_is_valid_is_applied(self, provider: StateProvider, bounded: str) -> None:
        outcome = provider.set_variables(bounded, {"x": 1, "y": 10, "nobody": 1, "z": "text"})
        assert (outcome.success, outcome.versions) == (True, {"x": 1})
        assert set(outcome.errors) == {"y", "z", "nobody"}
        assert [variable.version for variable in provider.list_variables(bounded)] == [1, 0, 0]

    def test_where_nothing_could_be_applied_it_failed(self, provider: StateProvider, bounded: str) -> None:
        outcome = provider.set_variables(bounded, {"y": 10, "nobody": 1})
        assert (outcome.success, outcome.versions) == (False, {})
        assert set(outcome.errors) == {"y", "nobody"}

    @pytest.mark.parametrize("atomic", [True, False])
    def test_an_empty_one_succeeds(self, provider: StateProvider, bounded: str, atomic: bool) -> None:
        assert provider.set_variables(bounded, {}, atomic=atomic).success

    def test_a_locked_variable_fails_alone_and_names_the_holder(self, provider: StateProvider, bounded: str) -> None:
        provider.start_optimization(bounded, "x", "optimizer")
        outcome = provider.set_variables(bounded, {"x": 1, "y": 1})
        assert outcome.versions == {"y": 1}
        assert "'optimizer'" in outcome.errors["x"]
        held = provider.set_variables(bounded, {"x": 1, "z": 1}, metadata={"optimizer_id": "optimizer"}, atomic=True)
        assert held.success


class HistoryContract(_Contract):
    """History and rollback."""

    def test_newest_first_with_all_that_is_known(self, provider: StateProvider, session: str) -> None:
        variable_id = provider.register_variable(session, "x", "integer", 1, metadata={"a": "1"})
        ada = Origin("ada", "SetVariable", Source.ELIXIR)
        provider.submit(commands.SetVariable(session, "x", Value("2"), {"b": "2"}), ada).result()
        provider.set_variable(session, "x", 3)
        history = provider.get_variable_history(session, "x")
        assert [version.version for version in history] == [2, 1, 0]
        assert [version.value for version in history] == [Value("3"), Value("2"), Value("1")]
        assert [version.kind for version in history] == [ChangeKind.SET, ChangeKind.SET, ChangeKind.REGISTERED]
        assert [version.metadata for version in history] == [{}, {"b": "2"}, {"a": "1"}]
        assert [version.cause for version in history] == ["SetVariable", "SetVariable", "RegisterVariable"]
        assert (history[1].actor, history[1].source) == ("ada", Source.ELIXIR)
        assert {(version.variable_id, version.type) for version in history} == {(variable_id, "integer")}
        for newer, older in pairwise(history):
            assert newer.sequence > older.sequence
            assert newer.created_at >= older.created_at
        assert provider.get_variable_history(session, variable_id) == history

    def test_large_versions_all_come(self, provider: StateProvider, session: str) -> None:
        """However many answers that takes."""
        size = self.limits.value_size_bytes // 3
        texts = [f"{number}{'x' * size}" for number in range(12)]
        provider.register_variable(session, "x", "string", texts[0])
        for text in texts[1:]:
            provider.set_variable(session, "x", text)
        assert size * len(texts) > 2 * self.limits.history_size_bytes
        assert [entry.value for entry in provider.get_variable_history(session, "x")] == [
            Value(json.dumps(text)) for text in reversed(texts)
        ]
        assert [entry.version for entry in provider.get_variable_history(session, "x", 7)] == list(range(11, 4, -1))
        before = commands.GetVariableHistory(session, "x", 9, 10)
        assert [entry.version for entry in provider.submit(before).result()] == list(range(9, 0, -1))

    def test_a_limit_of_0_means_100(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        pending = [provider.submit(commands.SetVariable(session, "x", Value(str(n)))) for n in range(1, 121)]
        for future in pending:
            future.result(DEADLINE_S)
        numbers = [version.version for version in provider.get_variable_history(session, "x")]
        assert numbers == list(range(120, 20, -1))
        for limit in (1, 7, 121, 150):
            numbers = [version.version for version in provider.get_variable_history(session, "x", limit)]
            assert numbers == list(range(120, max(120 - limit, -1), -1))

    def test_may_be_paged(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        for number in range(1, 6):
            provider.set_variable(session, "x", number)
        future = provider.submit(commands.GetVariableHistory(session, "x", 2, before=4))
        if isinstance(refused(future), errors.UnsupportedError):
            return
        assert [version.version for version in future.result()] == [3, 2]

    def test_a_limit_below_0_is_refused(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        with pytest.raises(errors.InvalidArgumentError, match="limit"):
            provider.get_variable_history(session, "x", -1)

    def test_of_a_deleted_variable_ends_with_the_deletion(self, provider: StateProvider, session: str) -> None:
        first = provider.register_variable(session, "x", "integer", 1)
        provider.set_variable(session, "x", 2)
        provider.delete_variable(session, "x")
        history = provider.get_variable_history(session, "x")
        assert [version.kind for version in history] == [ChangeKind.DELETED, ChangeKind.SET, ChangeKind.REGISTERED]
        assert [version.version for version in history] == [2, 1, 0]
        assert [version.value for version in history] == [None, Value("2"), Value("1")]
        provider.register_variable(session, "x", "string", "new")
        assert provider.get_variable_history(session, first) == history
        assert len(provider.get_variable_history(session, "x")) == 1
        provider.delete_variable(session, "x")
        kinds = [version.kind for version in provider.get_variable_history(session, "x")]
        assert kinds == [ChangeKind.DELETED, ChangeKind.REGISTERED], "of two, the name means the newer one"

    def test_rolling_back_writes_a_new_version(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 1, metadata={"a": "1"})
        provider.set_variable(session, "x", 2, metadata={"a": "2"})
        provider.set_variable(session, "x", 3)
        before = provider.get_variable_history(session, "x")
        rolled = provider.rollback_variable(session, "x", 0)
        assert (rolled.version, rolled.value, rolled.metadata) == (3, Value("1"), {"a": "2"})
        assert provider.get_variable(session, "x") == rolled
        newest, *others = provider.get_variable_history(session, "x")
        assert (newest.kind, newest.version, newest.value) == (ChangeKind.ROLLED_BACK, 3, Value("1"))
        assert newest.metadata == {"rolled_back_to": "0"}
        assert others == before
        assert provider.set_variable(session, "x", 4, expected_version=3) == 4
        assert provider.rollback_variable(session, "x", 4).value == Value("4"), "the current one will do as well"

    @pytest.mark.parametrize("target", [-1, 2, 1000])
    def test_rolling_back_to_a_version_that_never_was(self, provider: StateProvider, session: str, target: int) -> None:
        provider.register_variable(session, "x", "integer", 1)
        provider.set_variable(session, "x", 2)
        with pytest.raises(errors.VersionNotFoundError, match="versions 0 to 1"):
            provider.rollback_variable(session, "x", target)
        assert provider.get_variable(session, "x").version == 1

    def test_a_deleted_variable_cannot_be_rolled_back(self, provider: StateProvider, session: str) -> None:
        variable_id = provider.register_variable(session, "x", "integer", 1)
        provider.delete_variable(session, "x")
        for identifier in ("x", variable_id):
            with pytest.raises(errors.VariableNotFoundError):
                provider.rollback_variable(session, identifier, 0)


class DependencyContract(_Contract):
    """Dependencies: no circles."""

    @pytest.fixture
    def lettered(self, provider: StateProvider) -> str:
        session_id = f"contract-{uuid.uuid4().hex}"
        provider.initialize_session(session_id)
        for name in "abcd":
            provider.register_variable(session_id, name, "integer", 0)
        return session_id

    def depend(self, provider: StateProvider, lettered: str, *pairs: str) -> None:
        """Each pair is two letters: the first depends on the second."""
        for pair in pairs:
            provider.add_dependency(lettered, pair[0], pair[1])

    @pytest.mark.parametrize(("pairs", "closing"), [("", "aa"), ("ab", "ba"), ("ab bc cd", "da"), ("ab bc ad", "ca")])
    def test_a_cycle_is_refused_and_spelled_out(
        self, provider: StateProvider, lettered: str, pairs: str, closing: str
    ) -> None:
        self.depend(provider, lettered, *pairs.split())
        with pytest.raises(errors.DependencyCycleError) as error:
            self.depend(provider, lettered, closing)
        cycle = error.value.cycle.split(" -> ")
        assert error.value.cycle in str(error.value)
        assert cycle[0] == cycle[-1]
        steps = {first + second for first, second in pairwise(cycle)}
        assert closing in steps
        assert steps <= {*pairs.split(), closing}

    def test_a_diamond_is_no_cycle(self, provider: StateProvider, lettered: str) -> None:
        self.depend(provider, lettered, "ab", "ac", "bd", "cd", "ad")

    def test_saying_it_again_changes_nothing_and_ids_are_as_good_as_names(
        self, provider: StateProvider, lettered: str
    ) -> None:
        self.depend(provider, lettered, "ab", "ab")
        ids = [provider.get_variable(lettered, name).id for name in "ab"]
        provider.add_dependency(lettered, ids[0], ids[1])
        with pytest.raises(errors.DependencyCycleError):
            provider.add_dependency(lettered, ids[1], ids[0])

    def test_deleting_a_variable_opens_the_circle(self, provider: StateProvider, lettered: str) -> None:
        self.depend(provider, lettered, "ab", "bc")
        provider.delete_variable(lettered, "b")
        self.depend(provider, lettered, "ca")

    def test_survive_a_restart(self, provider: StateProvider, lettered: str, reopened: Reopen) -> None:
        self.depend(provider, lettered, "ab", "bc")
        again = reopened()
        with pytest.raises(errors.DependencyCycleError, match="->"):
            self.depend(again, lettered, "ca")
        with again.watch(lettered) as watch:
            again.set_variable(lettered, "c", 1)
            updates = take(watch, 3)
        assert names_of(updates) == ["c", "b", "a"]


STRANGER = Origin("stranger", "contract", Source.ELIXIR)


class OptimizationContract(_Contract):
    """Optimization: one optimizer at a time holds a variable."""

    @pytest.fixture
    def tunable(self, provider: StateProvider) -> str:
        session_id = f"contract-{uuid.uuid4().hex}"
        provider.initialize_session(session_id)
        provider.register_variable(session_id, "x", "integer", 0)
        return session_id

    def test_only_its_holder_writes(self, provider: StateProvider, tunable: str) -> None:
        assert provider.start_optimization(tunable, "x", "holder", {"trials": "5"})
        lock = provider.get_variable(tunable, "x").optimization
        assert lock is not None
        assert lock.optimizer_id == "holder"
        asked: list[Command[Any]] = [
            commands.SetVariable(tunable, "x", Value("1")),
            commands.SetVariable(tunable, "x", Value("1"), {"optimizer_id": "other"}),
            commands.RollbackVariable(tunable, "x", 0),
            commands.DeleteVariable(tunable, "x"),
            commands.StartOptimization(tunable, "x", "other"),
        ]
        for command in asked:
            error = refused(provider.submit(command))
            assert isinstance(error, errors.VariableLockedError), command
            assert error.holder == "holder"
            assert "'holder'" in str(error)
        assert provider.set_variable(tunable, "x", 1, metadata={"optimizer_id": "holder"}) == 1
        as_holder = Origin("machine", "RollbackVariable", optimizer_id="holder")
        assert provider.submit(commands.RollbackVariable(tunable, "x", 0), as_holder).result().version == 2

    def test_its_holder_may_start_it_again(self, provider: StateProvider, tunable: str) -> None:
        first = provider.start_optimization(tunable, "x", "holder")
        assert provider.start_optimization(tunable, "x", "holder") == first

    def test_stopping_gives_the_final_value_and_frees_the_variable(self, provider: StateProvider, tunable: str) -> None:
        first = provider.start_optimization(tunable, "x", "holder")
        provider.set_variable(tunable, "x", 7, metadata={"optimizer_id": "holder"})
        assert provider.stop_optimization(tunable, "x") == Value("7")
        variable = provider.get_variable(tunable, "x")
        assert (variable.optimization, variable.version) == (None, 1)
        assert provider.set_variable(tunable, "x", 8) == 2
        assert provider.start_optimization(tunable, "x", "other") != first

    def test_what_is_not_optimized_cannot_be_stopped(self, provider: StateProvider, tunable: str) -> None:
        for force in (False, True):
            with pytest.raises(errors.NotOptimizingError, match="'x'"):
                provider.stop_optimization(tunable, "x", force)

    def test_others_need_force_and_the_history_says_so(self, provider: StateProvider, tunable: str) -> None:
        provider.start_optimization(tunable, "x", "holder")
        provider.set_variable(tunable, "x", 7, metadata={"optimizer_id": "holder"})
        error = refused(provider.submit(commands.StopOptimization(tunable, "x"), STRANGER))
        assert isinstance(error, errors.VariableLockedError)
        assert error.holder == "holder"
        assert provider.submit(commands.StopOptimization(tunable, "x", force=True), STRANGER).result() == Value("7")
        broken = provider.get_variable_history(tunable, "x")[0]
        assert (broken.kind, broken.version, broken.value) == (ChangeKind.LOCK_BROKEN, 2, Value("7"))
        assert broken.metadata["broken_optimizer_id"] == "holder"
        assert broken.actor == "stranger"
        with pytest.raises(errors.VersionConflictError):
            provider.set_variable(tunable, "x", 8, metadata={"optimizer_id": "holder"}, expected_version=1)

    def test_whoever_names_the_optimizer_may_stop_it(self, provider: StateProvider, tunable: str) -> None:
        provider.start_optimization(tunable, "x", "holder")
        wrong = replace(STRANGER, optimizer_id="other")
        assert isinstance(
            refused(provider.submit(commands.StopOptimization(tunable, "x"), wrong)), errors.VariableLockedError
        )
        right = replace(STRANGER, optimizer_id="holder")
        provider.submit(commands.StopOptimization(tunable, "x"), right).result()
        assert provider.get_variable(tunable, "x").version == 0

    def test_a_stopped_variable_can_be_deleted(self, provider: StateProvider, tunable: str) -> None:
        provider.start_optimization(tunable, "x", "holder")
        with pytest.raises(errors.VariableLockedError):
            provider.delete_variable(tunable, "x")
        provider.stop_optimization(tunable, "x")
        provider.delete_variable(tunable, "x")

    def test_survives_a_restart(self, provider: StateProvider, tunable: str, reopened: Reopen) -> None:
        optimization = provider.start_optimization(tunable, "x", "holder", {"trials": "5"})
        provider.set_variable(tunable, "x", 7, metadata={"optimizer_id": "holder"})
        before = provider.get_variable(tunable, "x")
        again = reopened()
        after = again.get_variable(tunable, "x")
        assert after.optimization is not None
        assert before.optimization is not None
        assert after.optimization.started_at == before.optimization.started_at
        with pytest.raises(errors.VariableLockedError, match="'holder'"):
            again.set_variable(tunable, "x", 8)
        assert again.start_optimization(tunable, "x", "holder") == optimization
        assert again.stop_optimization(tunable, "x") == Value("7")


class LeaseContract(_Contract):
    """Leases, on a provider whose optimizations end `lease_s` after their holder's last write."""

    lease_s: ClassVar[float] = 0.5

    @pytest.fixture
    def leased(self, provider: StateProvider) -> str:
        session_id = f"contract-{uuid.uuid4().hex}"
        provider.initialize_session(session_id)
        provider.register_variable(session_id, "x", "integer", 0)
        return session_id

    def test_an_optimizer_that_is_gone_does_not_hold_it_for_ever(self, provider: StateProvider, leased: str) -> None:
        first = provider.start_optimization(leased, "x", "gone")
        let_pass(self.lease_s * 1.02)
        assert provider.get_variable(leased, "x").optimization is None
        assert provider.list_variables(leased)[0].optimization is None
        with pytest.raises(errors.NotOptimizingError):
            provider.stop_optimization(leased, "x")
        assert provider.set_variable(leased, "x", 1) == 1
        assert provider.start_optimization(leased, "x", "next") != first

    def test_an_ended_lease_gives_way_to_another_optimizer(self, provider: StateProvider, leased: str) -> None:
        provider.start_optimization(leased, "x", "gone")
        let_pass(self.lease_s * 1.02)
        provider.start_optimization(leased, "x", "next")
        with pytest.raises(errors.VariableLockedError, match="'next'"):
            provider.set_variable(leased, "x", 1, metadata={"optimizer_id": "gone"})

    def test_the_holder_s_writes_renew_it(self, provider: StateProvider, leased: str) -> None:
        provider.start_optimization(leased, "x", "holder")
        begun = renewed = time.monotonic()
        renewals = 0
        while renewals < 4 or time.monotonic() - begun < self.lease_s * 1.5:
            assert time.monotonic() - begun < DEADLINE_S, "this machine is too slow to write within a lease"
            error = refused(provider.submit(commands.SetVariable(leased, "x", Value("1")), STRANGER))
            if time.monotonic() - renewed < self.lease_s:
                assert isinstance(error, errors.VariableLockedError)
                renewals += 1
            else:
                # The machine was too slow: the lease may have ended meanwhile. Once more.
                provider.start_optimization(leased, "x", "holder")
            renewed = time.monotonic()
            provider.set_variable(leased, "x", 2, metadata={"optimizer_id": "holder"})
            let_pass(self.lease_s / 4)

    def test_an_ended_lease_stays_ended_after_a_restart(
        self, provider: StateProvider, leased: str, reopened: Reopen
    ) -> None:
        provider.start_optimization(leased, "x", "gone")
        let_pass(self.lease_s * 1.02)
        again = reopened()
        assert again.get_variable(leased, "x").optimization is None
        assert again.set_variable(leased, "x", 1) == 1


def _keyed_writes(session: str) -> Mapping[str, Command[Any]]:
    """One of each command that writes, for a session as `IdempotencyContract` makes it."""
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


KEYED = sorted(_keyed_writes(""))


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
"""JSON of values: what a type takes for the same, and what it tells apart."""


class IdempotencyContract(_Contract):
    """Idempotency keys: the same answer, one effect."""

    @pytest.fixture
    def keyable(self, provider: StateProvider) -> str:
        return self.begin(provider)

    def begin(self, provider: StateProvider) -> str:
        """A session in which each of `_keyed_writes` can be carried out."""
        session_id = f"contract-{uuid.uuid4().hex}"
        provider.initialize_session(session_id)
        for name in ("x", "y", "held"):
            provider.register_variable(session_id, name, "integer", 1)
        provider.register_variable(session_id, "t", "tensor", TENSOR)
        provider.set_variable(session_id, "x", 2, metadata={"m": "1"})
        provider.start_optimization(session_id, "held", "optimizer")
        return session_id

    def keyed(self, provider: StateProvider, command: Command[Any], key: str) -> Future[Any]:
        return provider.submit(command, provider.default_origin(command.cause, key))

    @pytest.mark.parametrize("which", KEYED)
    def test_a_repeated_request_gets_the_recorded_answer_and_does_nothing(
        self, provider: StateProvider, keyable: str, which: str
    ) -> None:
        command, key = _keyed_writes(keyable)[which], uuid.uuid4().hex
        answer = self.keyed(provider, command, key).result()
        if which == "cleanup":
            provider.initialize_session(keyable)
        before = provider.list_variables(keyable), self.histories(provider, keyable)
        for _ in range(2):
            assert self.keyed(provider, command, key).result() == answer
        assert (provider.list_variables(keyable), self.histories(provider, keyable)) == before

    def histories(self, provider: StateProvider, keyable: str) -> list[list[VariableVersion]]:
        return [provider.get_variable_history(keyable, variable.id) for variable in provider.list_variables(keyable)]

    def test_also_after_a_restart(self, provider: StateProvider, reopened: Reopen) -> None:
        key = uuid.uuid4().hex
        asked = [_keyed_writes(self.begin(provider))[which] for which in KEYED]
        answers = [self.keyed(provider, command, key).result() for command in asked]
        again = reopened()
        assert [self.keyed(again, command, key).result() for command in asked] == answers

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
            error = refused(self.keyed(provider, command, key))
            assert isinstance(error, errors.IdempotencyConflictError), command
            assert key in str(error)
        assert provider.get_variable(keyable, "x").version == 2
        assert provider.set_variable(keyable, "x", 5, idempotency_key=key) == 2

    @pytest.mark.parametrize(("type_name", "spellings"), SAME, ids=shown)
    def test_requests_that_mean_the_same_are_the_same(
        self, provider: StateProvider, keyable: str, type_name: str, spellings: Sequence[str]
    ) -> None:
        """Told apart by what they mean, not by white space, the order of keys, or how a number is written."""
        initial = Value(spellings[0])
        provider.run(commands.RegisterVariable(keyable, "v", type_name, initial))
        key = uuid.uuid4().hex
        for number, text in enumerate(spellings):
            register = commands.RegisterVariable(keyable, "new", type_name, Value(text), "{ }" if number else "")
            assert (
                self.keyed(provider, register, f"{key}-register").result() == provider.get_variable(keyable, "new").id
            )
            metadata = {"a": "1", "b": "2"} if number else {"b": "2", "a": "1"}
            write = commands.SetVariable(keyable, "v", Value(text), metadata)
            assert self.keyed(provider, write, key).result() == 1
            batch = commands.SetVariables(keyable, {"v": Value(text)})
            assert self.keyed(provider, batch, f"{key}-batch").result().versions == {"v": 2}
        provider.delete_variable(keyable, "v")
        for text in spellings:
            assert self.keyed(provider, commands.SetVariable(keyable, "v", Value(text), metadata), key).result() == 1

    def test_so_are_those_with_the_same_constraints(self, provider: StateProvider, keyable: str) -> None:
        """Registered anew, too: they are shown as they came first."""
        for text in ('{"min": 0, "max": 2, "step": 1}', ' {"step":1,"max":2.0,"min":-0.0, "other": null}'):
            for keyed in (True, False):
                command = commands.RegisterVariable(keyable, "bound", "float", Value("1"), text)
                answer = self.keyed(provider, command, "k").result() if keyed else provider.run(command)
                assert answer == provider.get_variable(keyable, "bound").id
        assert provider.get_variable(keyable, "bound").constraints == '{"max":2,"min":0,"step":1}'
        for other in ('{"min": 0, "max": 2, "step": 1.0}', '{"min": 0, "max": 2.5, "step": 1}', "{}"):
            command = commands.RegisterVariable(keyable, "bound", "float", Value("1"), other)
            assert isinstance(refused(self.keyed(provider, command, "k")), errors.IdempotencyConflictError)
            assert isinstance(refused(provider.submit(command)), errors.VariableExistsError)

    @pytest.mark.parametrize(("type_name", "one", "other"), DIFFERENT, ids=shown)
    def test_what_the_type_tells_apart_is_another_request(
        self, provider: StateProvider, keyable: str, type_name: str, one: str, other: str
    ) -> None:
        provider.run(commands.RegisterVariable(keyable, "v", type_name, Value(one)))
        key = uuid.uuid4().hex
        assert self.keyed(provider, commands.SetVariable(keyable, "v", Value(one)), key).result() == 1
        error = refused(self.keyed(provider, commands.SetVariable(keyable, "v", Value(other)), key))
        assert isinstance(error, errors.IdempotencyConflictError)
        for expected in (0, 1):
            error = refused(self.keyed(provider, commands.SetVariable(keyable, "v", Value(one), {}, expected), key))
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
            answers = list(threads.map(lambda _: self.keyed(provider, command, key).result(), range(24)))
        assert answers == [2] * 24
        assert provider.get_variable(keyable, "x").version == 2

    def test_without_a_key_every_request_counts(self, provider: StateProvider, keyable: str) -> None:
        assert [provider.set_variable(keyable, "x", 5) for _ in range(3)] == [2, 3, 4]


class WatchContract(_Contract):
    """Watching: whole commits, in order, none twice, none missing, only durable ones."""

    @pytest.fixture
    def watched(self, provider: StateProvider) -> str:
        session_id = f"contract-{uuid.uuid4().hex}"
        provider.initialize_session(session_id)
        for name in ("x", "y"):
            provider.register_variable(session_id, name, "integer", 0)
        return session_id

    def end_marker(self, provider: StateProvider, watched: str) -> str:
        """Register a variable, so that a watcher of everything sees where what came before it ends."""
        name = f"end-{uuid.uuid4().hex}"
        provider.register_variable(watched, name, "integer", 0)
        return name

    def test_begins_with_the_values_as_they_are(self, provider: StateProvider, watched: str) -> None:
        provider.set_variable(watched, "y", 1)
        with provider.watch(watched) as watch:
            assert watch.initial == provider.list_variables(watched)
            assert watch.position == provider.get_variable_history(watched, "y", 1)[0].sequence
            assert watch.next(0.01) == []

    def test_tells_every_change_with_its_variable_and_version(self, provider: StateProvider, watched: str) -> None:
        with provider.watch(watched) as watch:
            provider.set_variable(watched, "x", 1, metadata={"a": "1"})
            first = provider.get_variable(watched, "x")
            provider.rollback_variable(watched, "x", 0)
            provider.register_variable(watched, "z", "string", "new")
            updates = take(watch, 3)
            assert watch.position == updates[-1].sequence
        assert [update.kind for update in updates] == [UpdateKind.VALUE_CHANGE] * 3
        assert names_of(updates) == ["x", "x", "z"]
        assert updates[0].variable == first
        history = provider.get_variable_history(watched, "x")
        assert [updates[1].version, updates[0].version] == history[:2]
        assert [update.sequence for update in updates[1::-1]] == [version.sequence for version in history[:2]]
        assert updates[0].created_at == history[1].created_at
        assert updates[2].version is not None
        assert updates[2].version.kind is ChangeKind.REGISTERED
        check_whole_commits(updates)

    def test_tells_a_batch_as_one_commit(self, provider: StateProvider, watched: str) -> None:
        with provider.watch(watched) as watch:
            provider.set_variables(watched, {"y": 1, "x": 2})
            provider.set_variables(watched, {"x": 3, "y": 4}, atomic=True)
            updates = take(watch, 4)
        check_whole_commits(updates)
        assert [update.part for update in updates] == [(1, 2), (2, 2), (1, 2), (2, 2)]
        assert names_of(updates) == ["x", "y", "x", "y"], "in the order of the log"

    def test_tells_a_deletion_with_the_last_value(self, provider: StateProvider, watched: str) -> None:
        provider.set_variable(watched, "x", 7)
        with provider.watch(watched, ["x"]) as watch:
            provider.delete_variable(watched, "x")
            (update,) = take(watch, 1)
        assert (update.kind, update.variable.name, update.variable.value) == (UpdateKind.DELETED, "x", Value("7"))
        assert update.version is not None
        assert (update.version.kind, update.version.version, update.version.value) == (ChangeKind.DELETED, 2, None)

    def test_tells_nothing_of_what_failed_or_changed_nothing_or_is_elsewhere(
        self, provider: StateProvider, watched: str
    ) -> None:
        provider.initialize_session(other := uuid.uuid4().hex)
        provider.register_variable(other, "x", "integer", 0)
        with provider.watch(watched) as watch:
            provider.set_variable(other, "x", 1)
            refused(provider.submit(commands.SetVariable(watched, "x", Value('"text"'))))
            refused(provider.submit(commands.SetVariable(watched, "x", Value("1"), expected_version=9)))
            provider.set_variables(watched, {"x": 1, "none": 1}, atomic=True)
            provider.register_variable(watched, "x", "integer", 5)
            provider.initialize_session(watched, {"new": "metadata"})
            provider.start_optimization(watched, "x", "optimizer")
            provider.stop_optimization(watched, "x")
            assert take_until(watch, self.end_marker(provider, watched)) == []

    def test_filters_by_name_and_by_id(self, provider: StateProvider, watched: str) -> None:
        y_id = provider.get_variable(watched, "y").id
        for identifier in ("y", y_id):
            with provider.watch(watched, [identifier]) as watch:
                assert names_of(watch.initial) == ["y"]
                version = provider.set_variables(watched, {"x": 1, "y": 2}).versions["y"]
                provider.set_variable(watched, "x", 3)
                provider.set_variable(watched, "y", 4)
                updates = take(watch, 2)
            assert names_of(updates) == ["y", "y"]
            assert [update.part for update in updates] == [(1, 1), (1, 1)]
            assert [update.variable.version for update in updates] == [version, version + 1]

    def test_a_name_outlives_its_variable_an_id_does_not(self, provider: StateProvider, watched: str) -> None:
        x_id = provider.get_variable(watched, "x").id
        with provider.watch(watched, ["x"]) as by_name, provider.watch(watched, [x_id, "y"]) as by_id:
            provider.delete_variable(watched, "x")
            provider.register_variable(watched, "x", "string", "again")
            provider.set_variable(watched, "y", 1)
            told = take(by_name, 2)
            assert [update.kind for update in told] == [UpdateKind.DELETED, UpdateKind.VALUE_CHANGE]
            assert names_of(take(by_id, 2)) == ["x", "y"]

    def test_an_unknown_identifier_is_not_found(self, provider: StateProvider, watched: str) -> None:
        for identifiers in (["nobody"], ["x", "nobody"]):
            with pytest.raises(errors.VariableNotFoundError, match="'nobody'"):
                provider.watch(watched, identifiers)

    def test_a_deleted_variable_may_still_be_watched(self, provider: StateProvider, watched: str) -> None:
        begun = provider.get_variable_history(watched, "x")[0].sequence
        provider.delete_variable(watched, "x")
        with provider.watch(watched, ["x"], after_sequence=begun) as watch:
            (update,) = take(watch, 1)
        assert update.kind is UpdateKind.DELETED

    def test_tells_dependants_after_what_they_depend_on(self, provider: StateProvider, watched: str) -> None:
        for name in ("model", "prompt", "score"):
            provider.register_variable(watched, name, "integer", 0)
        # score -> prompt -> x, score -> model -> x, score -> x: what score uses has to be told before it.
        for user, used in (("score", "x"), ("score", "prompt"), ("score", "model"), ("prompt", "x"), ("model", "x")):
            provider.add_dependency(watched, user, used)
        with provider.watch(watched) as watch, provider.watch(watched, ["score"]) as score:
            provider.set_variable(watched, "x", 1)
            updates = take(watch, 4)
            (told,) = take(score, 1)
            provider.set_variable(watched, "model", 1)
            assert names_of(take(watch, 2)) == ["model", "score"]
        changed, *affected = updates
        assert (changed.variable.name, changed.kind) == ("x", UpdateKind.VALUE_CHANGE)
        assert {update.kind for update in affected} == {UpdateKind.DEPENDENCY_CHANGED}
        assert names_of(affected)[2] == "score"
        assert sorted(names_of(affected)[:2]) == ["model", "prompt"]
        check_whole_commits(updates)
        assert told.kind is UpdateKind.DEPENDENCY_CHANGED
        assert told.variable == provider.get_variable(watched, "score")
        assert told.dependency == "x"
        assert told.version is None
        assert told.part == (1, 1)

    def test_a_deletion_is_told_to_those_who_depended_on_it(self, provider: StateProvider, watched: str) -> None:
        provider.add_dependency(watched, "y", "x")
        with provider.watch(watched, ["y"]) as watch:
            provider.delete_variable(watched, "x")
            (update,) = take(watch, 1)
            assert (update.kind, update.dependency) == (UpdateKind.DEPENDENCY_CHANGED, "x")
            provider.register_variable(watched, "x", "integer", 0)
            provider.set_variable(watched, "x", 1)
            provider.set_variable(watched, "y", 1)
            (update,) = take(watch, 1)
            assert update.kind is UpdateKind.VALUE_CHANGE, "the new x is another variable"

    def test_misses_and_doubles_nothing_while_others_write(self, provider: StateProvider, watched: str) -> None:
        """Watches begin in the middle of many writers' work; initial values and updates add up to the end."""
        writers, rounds = 4, 40
        names = [f"w{number}" for number in range(writers)]
        for name in names:
            provider.register_variable(watched, name, "integer", 0)
        started = threading.Barrier(writers + 1)

        def work(name: str) -> None:
            started.wait(DEADLINE_S)
            for number in range(1, rounds + 1):
                provider.set_variables(watched, {name: number, "x": number})

        watches: list[Watch] = []
        with ThreadPoolExecutor(writers) as threads:
            working = [threads.submit(work, name) for name in names]
            started.wait(DEADLINE_S)
            while not all(future.done() for future in working):
                if len(watches) < 8:
                    watches.append(provider.watch(watched))
            for future in working:
                future.result(DEADLINE_S)
        watches.append(provider.watch(watched))
        end = self.end_marker(provider, watched)
        for watch in watches:
            with watch:
                updates = take_until(watch, end)
            check_whole_commits(updates)
            for variable in watch.initial:
                told = [update.variable.version for update in updates if update.variable.id == variable.id]
                last = provider.get_variable(watched, variable.id).version
                assert told == list(range(variable.version + 1, last + 1)), variable.name

    def test_resumes_after_a_sequence(self, provider: StateProvider, watched: str) -> None:
        with provider.watch(watched) as watch:
            for number in range(1, 11):
                provider.set_variables(watched, {"x": number, "y": number})
            updates = take(watch, 20)
        for position in range(0, 20, 2):
            after = updates[position].sequence
            with provider.watch(watched, after_sequence=after) as watch:
                assert watch.initial == ()
                assert watch.position == after
                assert take(watch, 18 - position) == updates[position + 2 :] if position < 18 else True
        with provider.watch(watched, ["y"], after_sequence=updates[0].sequence) as watch:
            assert names_of(take(watch, 9)) == ["y"] * 9

    def test_resumes_what_others_changed_meanwhile(self, provider: StateProvider, watched: str) -> None:
        """What is told from memory and what is told from the history is the same, dependants and locks included."""
        provider.add_dependency(watched, "y", "x")
        with provider.watch(watched) as live:
            begun = live.position
            provider.set_variable(watched, "x", 1, metadata={"a": "1"})
            provider.start_optimization(watched, "x", "holder")
            provider.set_variable(watched, "x", 2, metadata={"optimizer_id": "holder", "b": "2"})
            provider.stop_optimization(watched, "x")
            provider.set_variable(watched, "x", 3, metadata={"a": "3"})
            provider.register_variable(watched, "z", "integer", 0, metadata={"m": "1"})
            provider.delete_variable(watched, "z")
            updates = take(live, 8)
        with provider.watch(watched, after_sequence=begun) as resumed:
            assert take(resumed, 8) == updates

    def test_resumes_beyond_what_memory_holds(self, provider: StateProvider, watched: str) -> None:
        position = provider.get_variable_history(watched, "y")[0].sequence
        with provider.watch(watched) as slow:
            pending = [provider.submit(commands.SetVariable(watched, "x", Value(str(n)))) for n in range(1, 601)]
            for future in pending:
                future.result(DEADLINE_S)
            with provider.watch(watched, after_sequence=position) as resumed:
                for watch in (slow, resumed):
                    updates = take(watch, 600)
                    assert [update.variable.version for update in updates] == list(range(1, 601))
                    check_whole_commits(updates)
                provider.set_variable(watched, "x", 0)
                assert [take(watch, 1)[0].variable.version for watch in (slow, resumed)] == [601, 601]

    def test_resumes_after_a_restart(self, provider: StateProvider, watched: str, reopened: Reopen) -> None:
        with provider.watch(watched) as watch:
            for number in range(1, 6):
                provider.set_variables(watched, {"x": number, "y": number})
            updates = take(watch, 10)
        again = reopened()
        with again.watch(watched, after_sequence=updates[3].sequence) as watch:
            assert take(watch, 6) == updates[4:]
            again.set_variable(watched, "x", 6)
            assert take(watch, 1)[0].sequence > updates[-1].sequence

    def test_a_sequence_ahead_of_the_store_is_refused(self, provider: StateProvider, watched: str) -> None:
        for sequence in (10**9, 2**62):
            with pytest.raises(errors.InvalidArgumentError, match="invalid after_sequence"):
                provider.watch(watched, after_sequence=sequence)

    def test_a_sequence_before_the_session_tells_all_of_it(self, provider: StateProvider, watched: str) -> None:
        with provider.watch(watched, after_sequence=0) as watch:
            updates = take(watch, 2)
        assert names_of(updates) == ["x", "y"]

    def test_ends_when_the_session_ends(self, provider: StateProvider, watched: str) -> None:
        with provider.watch(watched) as watch:
            provider.set_variable(watched, "x", 1)
            provider.cleanup_session(watched)
            provider.initialize_session(watched)
            provider.register_variable(watched, "x", "integer", 5)
            assert names_of(watch) == ["x"], "what came before the end is told, the next watched is not"
            with pytest.raises(errors.SessionNotFoundError):
                watch.pull()

    def test_ends_for_one_who_waits(self, provider: StateProvider, watched: str) -> None:
        with provider.watch(watched) as watch, ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(list, watch)
            provider.cleanup_session(watched)
            assert waiting.result(DEADLINE_S) == []

    def test_ends_with_an_error_when_its_provider_closes(
        self, provider: StateProvider, watched: str, reopened: Reopen
    ) -> None:
        watch = provider.watch(watched)
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(list, watch)
            reopened()
            provider.close()
            assert isinstance(waiting.exception(DEADLINE_S), StateError)
        watch.close()

    def test_many_watch_the_same(self, provider: StateProvider, watched: str) -> None:
        watches = [provider.watch(watched) for _ in range(20)]
        for number in range(1, 11):
            provider.set_variable(watched, "x", number)
        told = [take(watch, 10) for watch in watches]
        for watch in watches:
            watch.close()
        assert all(updates == told[0] for updates in told)
        assert [update.variable.version for update in told[0]] == list(range(1, 11))

    def test_one_that_does_not_read_holds_nobody_up(self, provider: StateProvider, watched: str) -> None:
        provider.register_variable(watched, "text", "string", "")
        with provider.watch(watched) as idle:
            for number in range(40):
                provider.set_variable(watched, "text", f"{number}{LONG_TEXT}")
            assert len(take(idle, 40)) == 40

    def test_a_closed_one_lets_go(self, provider: StateProvider, watched: str) -> None:
        watch = provider.watch(watched)
        watch.close()
        watch.close()
        assert provider.set_variable(watched, "x", 1) == 1


class LimitContract(_Contract):
    """Limits: each error names the limit and the setting."""

    def check(self, provider: StateProvider, command: Command[Any], setting: str, actual: int) -> None:
        error = refused(provider.submit(command))
        assert isinstance(error, errors.LimitExceededError), (error, setting)
        assert (error.setting, error.limit, error.actual) == (setting, getattr(self.limits, setting), actual)
        assert setting in str(error)
        assert str(error.limit) in str(error)

    def test_value_size(self, provider: StateProvider, session: str) -> None:
        limit = self.limits.value_size_bytes
        fits = Value(json.dumps("x" * (limit - 2)))
        provider.submit(commands.RegisterVariable(session, "x", "string", fits)).result()
        above = Value(json.dumps("x" * (limit - 1)))
        self.check(provider, commands.SetVariable(session, "x", above), "value_size_bytes", limit + 1)

    def test_binary_size(self, provider: StateProvider, session: str) -> None:
        limit = self.limits.binary_size_bytes
        provider.submit(commands.RegisterVariable(session, "t", "tensor", Value("{}", b"x" * limit))).result()
        above = Value("{}", b"x" * (limit + 1))
        self.check(provider, commands.SetVariable(session, "t", above), "binary_size_bytes", limit + 1)

    def test_session_size(self, provider: StateProvider, session: str) -> None:
        """Whatever it holds, a session can be resumed and listed in one message."""
        limit, text = self.limits.session_size_bytes, "é" * 200_000
        names = [f"v{number}" for number in range(limit // 400_000 + 1)]
        registering = [
            refused(provider.submit(commands.RegisterVariable(session, name, "string", Value(f'"{text}"'))))
            for name in names
        ]
        kept = [name for name, error in zip(names, registering, strict=True) if error is None]
        assert len(kept) > 1
        for error in registering[len(kept) :]:
            assert isinstance(error, errors.LimitExceededError)
            assert (error.setting, error.limit) == ("session_size_bytes", limit)
            assert error.actual > limit
        # What is not taken is not kept.
        assert [variable.name for variable in provider.initialize_session(session).variables] == kept
        batch = provider.set_variables(session, {kept[0]: text * 2, kept[1]: text})
        assert "session_size_bytes" in batch.errors[kept[0]]
        assert batch.versions == {kept[1]: 1}
        # Room that is given back can be used again.
        provider.delete_variable(session, kept[0])
        provider.register_variable(session, kept[0], "string", text)

    def test_session_size_counts_constraints_and_metadata(self, provider: StateProvider, session: str) -> None:
        text = json.dumps("x" * (self.limits.session_size_bytes // 4 - 20_000))
        for number in range(4):
            provider.submit(commands.RegisterVariable(session, f"v{number}", "string", Value(text))).result()
        constraints = json.dumps({"note": "x" * 4_000})
        metadata = {"note": "x" * 1_900}
        many = [
            refused(
                provider.submit(
                    commands.RegisterVariable(session, f"c{number}", "string", Value('""'), constraints, metadata)
                )
            )
            for number in range(20)
        ]
        assert many[0] is None
        assert isinstance(many[-1], errors.LimitExceededError)
        assert many[-1].setting == "session_size_bytes"

    def test_json_depth(self, provider: StateProvider, session: str) -> None:
        limit = self.limits.json_depth
        nested = [Value("[" * depth + "]" * depth) for depth in (limit, limit + 1, 100_000)]
        provider.submit(commands.RegisterVariable(session, "x", "list", nested[0])).result()
        self.check(provider, commands.SetVariable(session, "x", nested[1]), "json_depth", limit + 1)
        self.check(provider, commands.SetVariable(session, "x", nested[2]), "json_depth", 100_000)

    def test_variables_per_session(self, provider: StateProvider, session: str) -> None:
        limit = self.limits.variables_per_session
        registering = [
            provider.submit(commands.RegisterVariable(session, f"v{number}", "integer", Value("0")))
            for number in range(limit)
        ]
        for future in registering:
            future.result(DEADLINE_S)
        one_more = commands.RegisterVariable(session, "more", "integer", Value("0"))
        self.check(provider, one_more, "variables_per_session", limit + 1)
        provider.register_variable(session, "v0", "integer", 0)
        provider.delete_variable(session, "v0")
        provider.submit(one_more).result()

    def test_name_length(self, provider: StateProvider, session: str) -> None:
        limit = self.limits.name_length
        longest = "\U0001f600" * limit
        provider.register_variable(session, longest, "integer", 0)
        assert provider.get_variable(session, longest).name == longest
        above = "x" * (limit + 1)
        asked: list[Command[Any]] = [
            commands.RegisterVariable(session, above, "integer", Value("0")),
            commands.ListVariables(session, above),
            commands.StartOptimization(session, longest, above),
            commands.AddDependency(session, longest, longest, above),
        ]
        for command in asked:
            self.check(provider, command, "name_length", limit + 1)
        with pytest.raises(errors.LimitExceededError, match="name_length"):
            provider.set_variable(session, longest, 1, idempotency_key=above)

    def test_session_id_length(self, provider: StateProvider) -> None:
        limit = self.limits.session_id_length
        unique = uuid.uuid4().hex
        longest = unique + "\U0001f600" * (limit - len(unique))
        provider.initialize_session(longest)
        assert provider.get_session(longest).id == longest
        self.check(provider, commands.InitializeSession(longest + "x"), "session_id_length", limit + 1)

    def test_metadata_entries(self, provider: StateProvider, session: str) -> None:
        limit = self.limits.metadata_entries
        most = {str(number): "" for number in range(limit)}
        above = {**most, "one more": ""}
        provider.register_variable(session, "x", "integer", 0, metadata=most)
        asked: list[Command[Any]] = [
            commands.InitializeSession(session, above),
            commands.RegisterVariable(session, "y", "integer", Value("0"), "", above),
            commands.SetVariable(session, "x", Value("0"), above),
            commands.SetVariables(session, {"x": Value("0")}, above),
            commands.StartOptimization(session, "x", "optimizer", above),
            # Each is small, what they add up to is not.
            commands.SetVariable(session, "x", Value("0"), {"one more": ""}),
        ]
        for command in asked:
            self.check(provider, command, "metadata_entries", limit + 1)
        assert provider.get_variable(session, "x").version == 0

    def test_metadata_size(self, provider: StateProvider, session: str) -> None:
        limit = self.limits.metadata_size_bytes
        most, above = {"key": "x" * (limit - 3)}, {"key": "\u00e9" * (limit // 2)}
        provider.initialize_session(session, most)
        self.check(
            provider,
            commands.InitializeSession(session, above),
            "metadata_size_bytes",
            3 + 2 * (limit // 2),
        )
        assert provider.get_session(session).metadata == most

    def test_constraints_size(self, provider: StateProvider, session: str) -> None:
        limit = self.limits.constraints_size_bytes
        fits = json.dumps({"choices": ["a", ""]})
        fits = json.dumps({"choices": ["a", "x" * (limit - len(fits))]})
        provider.register_variable(session, "x", "choice", "a", constraints=fits)
        above = fits.replace("x", "xx", 1)
        command = commands.RegisterVariable(session, "y", "choice", Value('"a"'), above)
        self.check(provider, command, "constraints_size_bytes", limit + 1)

    def test_batch_entries(self, provider: StateProvider, session: str) -> None:
        limit = self.limits.batch_entries
        names = [f"v{number}" for number in range(limit + 1)]
        batch = {name: Value("0") for name in names}
        self.check(provider, commands.SetVariables(session, batch), "batch_entries", limit + 1)
        self.check(provider, commands.GetVariables(session, tuple(names)), "batch_entries", limit + 1)
        assert len(provider.get_variables(session, names[:-1]).missing) == limit

    def test_history_entries(self, provider: StateProvider, session: str) -> None:
        limit = self.limits.history_entries
        provider.register_variable(session, "x", "integer", 0)
        self.check(provider, commands.GetVariableHistory(session, "x", limit + 1), "history_entries", limit + 1)
        assert len(provider.get_variable_history(session, "x", limit)) == 1

    def test_watchers(self, provider: StateProvider, session: str) -> None:
        watches, error = _open_watches(provider, session, self.limits.watchers + 1)
        for watch in watches:
            watch.close()
        assert error is not None
        assert error.limit == self.limits.watchers
        assert "setting watchers" in str(error)
        # A backend may learn a little later that a watch has gone.
        deadline = time.monotonic() + DEADLINE_S
        while not (watches := _open_watches(provider, session, 1)[0]):
            assert time.monotonic() < deadline, "closed watches still count"
        watches[0].close()


def _open_watches(
    provider: StateProvider, session: str, most: int
) -> tuple[list[Watch], errors.TooManyWatchersError | None]:
    """Up to `most` watches, and what ended it before that many were open, if anything did."""
    watches: list[Watch] = []
    for _ in range(most):
        try:
            watches.append(provider.watch(session))
        except errors.TooManyWatchersError as error:
            return watches, error
    return watches, None


HOSTILE_TEXTS = [
    "'; DROP TABLE sessions; --",
    '" OR 1=1 --',
    "../../../etc/passwd",
    "/dev/null",
    ".",
    "a\0b",
    "line\nfeed\r\ttab",
    "\x7f",
    "\x1b[31mred",
    "x" * 10_000,
    "\U0001f4a9\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u202eright to left\u200b",
    "e\u0301 is not \u00e9",
    "\ud800",
    "trailing\udfff",
    "%s%n{0}{session}",
    "$(reboot) `reboot` ${HOME}",
    "<script>alert(1)</script>",
    "*",
    "?",
    "[a-z]*",
    "%",
    "_",
    "\\",
    " ",
    "null",
    "NaN",
    "0",
    "-1",
    ":memory:",
    "__class__",
    "main.sqlite_master",
    "\u65e5\u672c\u8a9e",
]


class HostileInputContract(_Contract):
    """Hostile ids, names and texts are just strings or are refused, never interpreted, and harm nobody else."""

    @pytest.fixture
    def bystander(self, provider: StateProvider) -> Iterator[None]:
        """Another session, which has to be as it was afterwards."""
        provider.initialize_session(bystander := uuid.uuid4().hex, {"by": "stander"})
        provider.register_variable(bystander, "x", "integer", 1)
        before = provider.get_session(bystander), provider.list_variables(bystander)
        yield
        assert (provider.get_session(bystander), provider.list_variables(bystander)) == before
        assert provider.set_variable(bystander, "x", 2) == 1

    @pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=shown)
    def test_as_the_id_of_a_session(self, provider: StateProvider, text: str) -> None:
        for command in _everything_about(text, "x"):
            error = refused(provider.submit(command))
            assert error is None or isinstance(error, NOT_THERE), (command, error)
        with pytest.raises(NOT_THERE):
            provider.watch(text)
        error = refused(provider.submit(commands.InitializeSession(text)))
        if error is not None:
            assert isinstance(error, REFUSALS)
            return
        assert provider.get_session(text).id == text
        provider.register_variable(text, "x", "integer", 1)
        assert provider.set_variable(text, "x", 2) == 1
        assert len(provider.get_variable_history(text, "x")) == 2
        assert provider.cleanup_session(text) == 1
        assert provider.heartbeat(text) is False

    @pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=shown)
    def test_as_the_name_of_a_variable(self, provider: StateProvider, session: str, text: str) -> None:
        provider.register_variable(session, "other", "integer", 1)
        for command in _everything_about(session, text):
            error = refused(provider.submit(command))
            assert error is None or isinstance(error, NOT_THERE), (command, error)
        with pytest.raises(NOT_THERE):
            provider.watch(session, [text])
        error = refused(provider.submit(commands.RegisterVariable(session, text, "integer", Value("1"))))
        if error is not None:
            assert isinstance(error, REFUSALS)
            assert names_of(provider.list_variables(session)) == ["other"]
            return
        variable_id = provider.get_variable(session, text).id
        assert provider.get_variable(session, variable_id).name == text
        with provider.watch(session, [text]) as watch:
            assert provider.set_variables(session, {text: 2, "other": 2}).versions[text] == 1
            provider.add_dependency(session, text, "other")
            assert names_of(take(watch, 1)) == [text]
        assert text in names_of(provider.list_variables(session, text))
        assert provider.rollback_variable(session, text, 0).version == 2
        assert [version.version for version in provider.get_variable_history(session, text)] == [2, 1, 0]
        provider.delete_variable(session, text)
        assert names_of(provider.list_variables(session)) == ["other"]

    @pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=shown)
    def test_as_metadata_and_in_every_other_field(self, provider: StateProvider, session: str, text: str) -> None:
        provider.register_variable(session, "x", "integer", 1)
        provider.register_variable(session, "y", "integer", 1)
        actor = Origin(text, "SetVariable")
        keyed = Origin("ada", "SetVariable", idempotency_key=text)
        asked: list[tuple[Command[Any], Origin | None]] = [
            (commands.InitializeSession(session, {text: text}), None),
            (commands.SetVariable(session, "x", Value("2"), {text: text}), None),
            (commands.SetVariable(session, "x", Value("3")), actor),
            (commands.SetVariable(session, "x", Value("4")), keyed),
            (commands.AddDependency(session, "x", "y", text), None),
            (commands.StartOptimization(session, "x", text, {text: text}), None),
            (commands.RegisterVariable(session, "z", "integer", Value("1"), text), None),
            (commands.RegisterVariable(session, "z", text, Value("1")), None),
            (commands.SetVariable(session, "y", Value(text)), None),
            (commands.ListVariables(session, text), None),
        ]
        possible = (
            *REFUSALS,
            errors.InvalidValueError,
            errors.InvalidConstraintsError,
            errors.UnknownTypeError,
        )
        for command, origin in asked:
            error = refused(provider.submit(command, origin))
            assert error is None or isinstance(error, possible), (command, error)
        metadata = provider.get_session(session).metadata
        assert metadata in ({}, {text: text})
        for version in provider.get_variable_history(session, "x"):
            assert version.metadata in ({}, {text: text})

    @pytest.mark.parametrize("number", [2**31, 2**63, 2**70, -(2**31), -(2**70)])
    def test_numbers_out_of_all_bounds(self, provider: StateProvider, session: str, number: int) -> None:
        provider.register_variable(session, "x", "integer", 1)
        asked: list[Command[Any]] = [
            commands.SetVariable(session, "x", Value("1"), expected_version=number),
            commands.GetVariableHistory(session, "x", limit=number),
            commands.RollbackVariable(session, "x", number),
        ]
        for command in asked:
            error = refused(provider.submit(command))
            assert isinstance(error, (*REFUSALS, errors.VersionConflictError, errors.VersionNotFoundError)), error
        with pytest.raises(errors.InvalidArgumentError):
            provider.watch(session, after_sequence=number)
        paged = provider.submit(commands.GetVariableHistory(session, "x", before=number))
        error = refused(paged)
        assert error is None or isinstance(error, (*REFUSALS, errors.UnsupportedError)), error


def _everything_about(session: str, variable: str) -> list[Command[Any]]:
    """Every command that a session or a variable that is not there refuses, or that finds nothing."""
    return [
        commands.GetSession(session),
        commands.Heartbeat(session),
        commands.GetVariable(session, variable),
        commands.GetVariable(session, variable, bypass_cache=True),
        commands.GetVariables(session, (variable,)),
        commands.SetVariable(session, variable, Value("1")),
        commands.SetVariables(session, {variable: Value("1")}),
        commands.DeleteVariable(session, variable),
        commands.GetVariableHistory(session, variable),
        commands.RollbackVariable(session, variable, 0),
        commands.AddDependency(session, variable, variable),
        commands.StartOptimization(session, variable, "optimizer"),
        commands.StopOptimization(session, variable),
        commands.ListVariables(session, variable),
    ]


class Color(StrEnum):
    """Texts that are more than texts."""

    RED = "red"


class Whole(int):
    """A number that is more than a number."""


class Secretive(str):
    """A text that says nothing of itself."""

    __slots__ = ()

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Cells:
    """What NumPy's arrays do where a number or a list is wanted: they have the methods, which refuse."""

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
    ("\ud800", r"'\ud800' contains a lone surrogate (U+D800), which is no character"),
]
WRONG_METADATA: list[tuple[object, str]] = [
    ({"sensitive": True}, "the entry 'sensitive' must be a str, not bool: write \"true\""),
    ({"n": 1}, "the entry 'n' must be a str, not int: write \"1\""),
    ({"n": None}, "the entry 'n' must be a str, not None: leave the entry out"),
    ({"n": [1]}, "the entry 'n' must be a str, not list: write a str, such as JSON"),
    ({1: "n"}, "its keys must be str, not int: use str(...)"),
    ({"q\0": "w"}, r"'q\x00' contains NUL (U+0000): leave it out"),
    ({"q": "w\0"}, r"'w\x00' contains NUL (U+0000): leave it out"),
    ({"\udfff": "w"}, r"'\udfff' contains a lone surrogate (U+DFFF), which is no character"),
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


class ArgumentContract(_Contract):
    """Arguments of a wrong type are refused before anything is done, in the same words by every backend."""

    @pytest.fixture
    def asked(self, provider: StateProvider, session: str) -> Iterator[str]:
        """A session with `x` (1), which has to be as it was afterwards."""
        provider.register_variable(session, "x", "integer", 1)
        yield session
        assert provider.get_value(session, "x") == 1
        assert provider.get_session(session).metadata == {}
        assert [variable.name for variable in provider.list_variables(session)] == ["x"]
        assert len(provider.get_variable_history(session, "x")) == 1

    def refused(self, ask: Callable[[], object], field: str, reason: str) -> None:
        """It is refused with exactly these words."""
        with pytest.raises(errors.InvalidArgumentError) as error:
            ask()
        assert str(error.value) == f"invalid {field}: {reason}"

    @pytest.mark.parametrize(("wrong", "reason"), WRONG_TEXTS, ids=shown)
    def test_ids_names_patterns_and_keys(self, provider: StateProvider, asked: str, wrong: Any, reason: str) -> None:
        asks: list[tuple[str, Callable[[], object]]] = [
            ("session_id", lambda: provider.initialize_session(wrong)),
            ("session_id", lambda: provider.get_session(wrong)),
            ("session_id", lambda: provider.heartbeat(wrong)),
            ("session_id", lambda: provider.cleanup_session(wrong)),
            ("session_id", lambda: provider.set_variable(wrong, "x", 2)),
            ("session_id", lambda: provider.watch(wrong)),
            ("session_id", lambda: provider.execute_tool(wrong, "tool")),
            ("name", lambda: provider.register_variable(asked, wrong, "integer", 1)),
            ("type_name", lambda: provider.register_variable(asked, "y", wrong, 1)),
            ("identifier", lambda: provider.get_variable(asked, wrong)),
            ("identifier", lambda: provider.set_variable(asked, wrong, 2)),
            ("identifier", lambda: provider.delete_variable(asked, wrong)),
            ("identifier", lambda: provider.rollback_variable(asked, wrong, 0)),
            ("identifier", lambda: provider.get_variable_history(asked, wrong)),
            ("identifiers", lambda: provider.get_variables(asked, [wrong])),
            ("identifiers", lambda: provider.watch(asked, [wrong])),
            ("pattern", lambda: provider.list_variables(asked, wrong)),
            ("from_variable", lambda: provider.add_dependency(asked, wrong, "x")),
            ("to_variable", lambda: provider.add_dependency(asked, "x", wrong)),
            ("dependency_type", lambda: provider.add_dependency(asked, "x", "x", wrong)),
            ("optimizer_id", lambda: provider.start_optimization(asked, "x", wrong)),
            ("tool", lambda: provider.execute_tool(asked, wrong)),
            ("actor", lambda: _submit(provider, asked, Origin(wrong, "test"))),
        ]
        if wrong is not None:
            asks.append(("idempotency_key", lambda: provider.set_variable(asked, "x", 2, idempotency_key=wrong)))
            asks.append(("optimizer_id", lambda: _submit(provider, asked, Origin("ada", "test", optimizer_id=wrong))))
        for field, ask in asks:
            self.refused(ask, field, reason)
        if not isinstance(wrong, list):
            of_key = reason.replace("it must be a str", "its keys must be str")
            self.refused(lambda: provider.set_variables(asked, {wrong: 2}), "updates", of_key)

    @pytest.mark.parametrize(("wrong", "reason"), WRONG_METADATA, ids=shown)
    def test_metadata(self, provider: StateProvider, asked: str, wrong: Any, reason: str) -> None:
        asks: list[Callable[[], object]] = [
            lambda: provider.initialize_session(asked, wrong),
            lambda: provider.register_variable(asked, "y", "integer", 1, metadata=wrong),
            lambda: provider.set_variable(asked, "x", 2, metadata=wrong),
            lambda: provider.set_variables(asked, {"x": 2}, metadata=wrong),
            lambda: provider.execute_tool(asked, "tool", metadata=wrong),
        ]
        for ask in asks:
            self.refused(ask, "metadata", reason)
        self.refused(lambda: provider.start_optimization(asked, "x", "me", wrong), "config", reason)

    def test_metadata_of_a_number_that_python_does_not_write(self, provider: StateProvider, asked: str) -> None:
        wrong: Any = {"n": 10**5000}
        reason = "the entry 'n' must be a str, not int: write a str, such as JSON"
        self.refused(lambda: provider.set_variable(asked, "x", 2, metadata=wrong), "metadata", reason)

    @pytest.mark.parametrize(("wrong", "reason"), WRONG_NUMBERS, ids=shown)
    def test_numbers(self, provider: StateProvider, asked: str, wrong: Any, reason: str) -> None:
        asks: list[tuple[str, Callable[[], object]]] = [
            ("expected_version", lambda: provider.set_variable(asked, "x", 2, expected_version=wrong)),
            ("limit", lambda: provider.get_variable_history(asked, "x", wrong)),
            ("target_version", lambda: provider.rollback_variable(asked, "x", wrong)),
            ("before", lambda: provider.run(commands.GetVariableHistory(asked, "x", before=wrong))),
        ]
        for field, ask in asks:
            self.refused(ask, field, reason)
        if not isinstance(wrong, int) or isinstance(wrong, bool):
            self.refused(lambda: provider.watch(asked, after_sequence=wrong), "after_sequence", reason)

    @pytest.mark.parametrize("wrong", [-1, 2**63, 10**5000], ids=["below 0", "64 bits", "5,001 digits"])
    def test_a_commit_that_cannot_be(self, provider: StateProvider, asked: str, wrong: int) -> None:
        reason = f"it must be from 0 to {2**63 - 1}: the number of a commit, or 0"
        self.refused(lambda: provider.watch(asked, after_sequence=wrong), "after_sequence", reason)

    def test_a_version_below_0_is_none(self, provider: StateProvider, asked: str) -> None:
        reason = "-1 is below 0: versions count from 0"
        self.refused(lambda: provider.set_variable(asked, "x", 2, expected_version=-1), "expected_version", reason)
        history = commands.GetVariableHistory(asked, "x", before=-1)
        self.refused(lambda: provider.run(history), "before", reason)

    @pytest.mark.parametrize("wrong", ["yes", 1, None], ids=shown)
    def test_flags(self, provider: StateProvider, asked: str, wrong: Any) -> None:
        reason = f"it must be True or False, not {'None' if wrong is None else type(wrong).__name__}"
        self.refused(lambda: provider.set_variables(asked, {"x": 2}, atomic=wrong), "atomic", reason)
        self.refused(lambda: provider.stop_optimization(asked, "x", wrong), "force", reason)

    @pytest.mark.parametrize("wrong", ["5", True, None, [5]], ids=shown)
    def test_timeouts(self, provider: StateProvider, asked: str, wrong: Any) -> None:
        advice = ": use float(...)" if isinstance(wrong, str) else ""
        kind = "None" if wrong is None else type(wrong).__name__
        reason = f"it must be a number of seconds, not {kind}{advice}"
        self.refused(lambda: provider.execute_tool(asked, "tool", timeout_s=wrong), "timeout_s", reason)

    def test_a_timeout_that_no_float_can_hold(self, provider: StateProvider, asked: str) -> None:
        reason = "it is too large for a number of seconds"
        self.refused(lambda: provider.execute_tool(asked, "tool", timeout_s=10**400), "timeout_s", reason)

    @pytest.mark.parametrize("wrong", ["x", b"x", 5, None, Cells()], ids=shown)
    def test_several_names_are_a_list(self, provider: StateProvider, asked: str, wrong: Any) -> None:
        advice = ": write [...] around it" if isinstance(wrong, str) else ""
        kind = "None" if wrong is None else type(wrong).__name__
        reason = f"it must be a list of str, not {kind}{advice}"
        self.refused(lambda: provider.get_variables(asked, wrong), "identifiers", reason)
        self.refused(lambda: provider.watch(asked, wrong), "identifiers", reason)

    @pytest.mark.parametrize("wrong", [[("x", 2)], "x", 5, None], ids=shown)
    def test_several_values_are_a_mapping(self, provider: StateProvider, asked: str, wrong: Any) -> None:
        kind = "None" if wrong is None else type(wrong).__name__
        reason = f"it must be a mapping, such as a dict, not {kind}"
        self.refused(lambda: provider.set_variables(asked, wrong), "updates", reason)

    def test_what_is_no_command_no_origin_and_no_value(self, provider: StateProvider, asked: str) -> None:
        asks: list[tuple[str, Any, Any]] = [
            ("command", "SetVariable", None),
            ("origin", commands.Heartbeat(asked), "ada"),
            ("value", commands.SetVariable(asked, "x", 5), None),  # type: ignore[arg-type]
            ("value", commands.SetVariable(asked, "x", Value(5)), None),  # type: ignore[arg-type]
            ("value", commands.SetVariable(asked, "x", Value("\ud800")), None),
            ("updates", commands.SetVariables(asked, {"x": 5}), None),  # type: ignore[dict-item]
        ]
        for field, command, origin in asks:
            error = refused(provider.submit(command, origin))
            assert isinstance(error, errors.InvalidArgumentError)
            assert error.field == field

    @pytest.mark.parametrize("wrong", [object(), {1}, 1 + 2j, b"bytes", None, {1: 2}, [{"a": object()}]], ids=range(7))
    def test_values_that_have_no_form(self, provider: StateProvider, asked: str, wrong: object) -> None:
        asks: list[Callable[[], object]] = [
            lambda: provider.set_variable(asked, "x", wrong),
            lambda: provider.set_variables(asked, {"x": wrong}),
            lambda: provider.register_variable(asked, "y", "integer", wrong),
        ]
        for ask in asks:
            with pytest.raises(errors.InvalidValueError):
                ask()

    @pytest.mark.parametrize("wrong", [5, [("min", 0)], {"min": object()}, {1: 2}, {"min"}], ids=range(5))
    def test_constraints(self, provider: StateProvider, asked: str, wrong: Any) -> None:
        with pytest.raises(errors.InvalidConstraintsError, match="'y'"):
            provider.register_variable(asked, "y", "integer", 1, constraints=wrong)

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


class SharingContract(_Contract):
    """Nothing that can change is shared: neither what callers hand in, nor what they are handed."""

    def test_what_was_handed_in_may_be_changed_afterwards(self, provider: StateProvider, session: str) -> None:
        note = {"step": "0"}
        provider.register_variable(session, "x", "list", ["0"], metadata=note)
        asked: list[Future[int]] = []
        held: list[Command[int]] = []
        for step in range(1, 4):
            note["step"] = str(step)
            held.append(commands.SetVariable(session, "x", values.encode([str(step)]), note))
        note["step"] = "changed"
        asked.extend(map(provider.submit, held))
        assert [future.result(DEADLINE_S) for future in asked] == [1, 2, 3]
        history = provider.get_variable_history(session, "x")
        assert [version.metadata for version in history] == [{"step": str(step)} for step in (3, 2, 1, 0)]
        assert provider.get_variable(session, "x").metadata == {"step": "3"}

    def test_also_batches_lists_of_names_and_bytes(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 1)
        content = bytearray(struct.pack("<2f", 1, 2))
        description = '{"shape":[2],"dtype":"float32","binary_format":"raw","type":"tensor"}'
        tensor = Value(description, content)  # type: ignore[arg-type]
        updates = {"x": Value("2")}
        names = ["x"]
        batch, read = commands.SetVariables(session, updates), commands.GetVariables(session, names)
        registered = commands.RegisterVariable(session, "t", "tensor", tensor)
        updates["x"] = Value("3")
        names.append("nobody")
        content[:] = b"\0" * 8
        assert provider.run(batch).versions == {"x": 1}
        assert provider.run(read).missing == ()
        assert provider.get_value(session, "x") == 2
        provider.run(registered)
        assert provider.get_variable(session, "t").value.binary == struct.pack("<2f", 1, 2)

    def test_what_is_handed_out_cannot_be_changed(self, provider: StateProvider) -> None:
        provider.initialize_session(session := uuid.uuid4().hex, {"a": "1"})
        provider.register_variable(session, "x", "integer", 1, metadata={"a": "1"})
        provider.set_variable(session, "x", 2, metadata={"a": "1"})
        provider.start_optimization(session, "x", "me", {"a": "1"})
        with provider.watch(session) as watch:
            provider.set_variable(session, "x", 3, metadata={"a": "1", "optimizer_id": "me"})
            (update,) = take(watch, 1)
            told = [update.variable, *watch.initial]
        variables = [
            provider.get_variable(session, "x"),
            *provider.get_variables(session, ["x"]).variables.values(),
            *provider.list_variables(session),
            *provider.initialize_session(session).variables,
            *told,
        ]
        assert update.version is not None
        mappings = [
            provider.get_session(session).metadata,
            update.version.metadata,
            *(variable.metadata for variable in variables),
            *(variable.optimization.config for variable in variables if variable.optimization is not None),
            *(version.metadata for version in provider.get_variable_history(session, "x")),
        ]
        for mapping in mappings:
            for change in _CHANGES:
                with pytest.raises(TypeError, match="read-only"):
                    change(mapping)
        assert provider.get_variable(session, "x").metadata == {"a": "1", "optimizer_id": "me"}
        assert provider.get_session(session).metadata == {"a": "1"}

    def test_a_value_that_was_read_is_a_copy(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "map", {"a": [1]})
        read: Any = provider.get_value(session, "x")
        read["a"].append(2)
        read["b"] = 1
        assert provider.get_value(session, "x") == {"a": [1]}


_CHANGES: list[Callable[[Any], object]] = [
    lambda mapping: mapping.__setitem__("a", "2"),
    lambda mapping: mapping.__delitem__("a"),
    lambda mapping: mapping.update(a="2"),
    lambda mapping: mapping.pop("a"),
    lambda mapping: mapping.popitem(),
    lambda mapping: mapping.clear(),
    lambda mapping: mapping.setdefault("b", "2"),
    lambda mapping: mapping.__ior__({"b": "2"}),
]


class ConcurrencyContract(_Contract):
    """Many at once, and the life of the provider itself."""

    def test_commands_take_effect_in_the_order_in_which_they_were_submitted(
        self, provider: StateProvider, session: str
    ) -> None:
        if Capability.REMOTE in provider.capabilities:
            return  # Calls to another process can overtake each other; only one that was answered comes first.
        provider.register_variable(session, "x", "integer", 0)
        pending = [provider.submit(commands.SetVariable(session, "x", Value(str(n)))) for n in range(1, 201)]
        assert [future.result(DEADLINE_S) for future in pending] == list(range(1, 201))
        history = provider.get_variable_history(session, "x", 200)
        assert [version.value for version in history] == [Value(str(number)) for number in range(200, 0, -1)]

    def test_a_read_sees_every_write_that_was_acknowledged_before_it(
        self, provider: StateProvider, session: str
    ) -> None:
        provider.register_variable(session, "x", "integer", 0)
        reads: list[Command[Any]] = [
            commands.GetVariable(session, "x"),
            commands.GetVariable(session, "x", bypass_cache=True),
            commands.GetVariableHistory(session, "x", 1),
        ]
        for number in range(1, 31):
            version = provider.set_variable(session, "x", number)
            found = provider.submit(reads[number % 3]).result()
            newest = found[0] if isinstance(found, list) else found
            assert (newest.version, newest.value) == (version, Value(str(number)))

    def test_increments_with_an_expected_version_add_up(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "counter", "integer", 0)
        provider.set_variable(session, "counter", 0)
        increments, workers = 15, 6

        def increment() -> None:
            for _ in range(increments):
                while True:
                    variable = provider.get_variable(session, "counter")
                    following = int(variable.value.json) + 1
                    command = commands.SetVariable(session, "counter", Value(str(following)), {}, variable.version)
                    error = refused(provider.submit(command))
                    if error is None:
                        break
                    assert isinstance(error, errors.VersionConflictError)
                    assert error.actual > error.expected

        with ThreadPoolExecutor(workers) as threads:
            for future in [threads.submit(increment) for _ in range(workers)]:
                future.result(DEADLINE_S)
        assert provider.get_value(session, "counter") == increments * workers
        assert provider.get_variable(session, "counter").version == increments * workers + 1

    def test_a_reader_never_sees_half_a_batch(self, provider: StateProvider, session: str) -> None:
        names = ("a", "b", "c")
        for name in names:
            provider.register_variable(session, name, "integer", 0)
        done = threading.Event()

        def write() -> None:
            for number in range(1, 61):
                provider.set_variables(session, dict.fromkeys(names, number), atomic=True)
            done.set()

        with ThreadPoolExecutor(1) as thread:
            writing = thread.submit(write)
            for bypass_cache in _alternately(done):
                command = commands.GetVariables(session, names, bypass_cache)
                found = provider.submit(command).result().variables
                assert len({found[name].value for name in names}) == 1
            writing.result(DEADLINE_S)

    def test_a_future_that_was_cancelled_harms_nobody(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        pending = [provider.submit(commands.SetVariable(session, "x", Value(str(n)))) for n in range(50)]
        given_up = [future for future in pending if future.cancel()]
        versions = [future.result(DEADLINE_S) for future in pending if future not in given_up]
        assert len(set(versions)) == len(versions)
        version = provider.set_variable(session, "x", 1)
        assert len(versions) + 1 <= version <= len(pending) + 1

    def test_many_sessions_at_once(self, provider: StateProvider) -> None:
        run = uuid.uuid4().hex

        def live(number: int) -> tuple[str, int]:
            session = f"{run}-{number}"
            provider.initialize_session(session)
            provider.register_variable(session, "x", "integer", number)
            provider.set_variable(session, "x", -number)
            return session, number

        with ThreadPoolExecutor(8) as threads:
            lives = list(threads.map(live, range(40)))
        for session, number in lives:
            assert provider.get_value(session, "x") == -number
            assert provider.get_session(session).variable_count == 1

    def test_cannot_be_sent_to_another_process(self, provider: StateProvider) -> None:
        for send in (ForkingPickler.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=r"a state cannot be copied, pickled, or sent .*connect\(\) there"):
                send(provider)

    def test_after_closing_everything_is_refused(self, provider: StateProvider, session: str, reopened: Reopen) -> None:
        again = reopened()
        provider.close()
        provider.close()
        asked: list[Command[Any]] = [
            commands.GetSession(session),
            commands.GetVariableHistory(session, "x"),
            commands.InitializeSession(session),
        ]
        for command in asked:
            assert isinstance(refused(provider.submit(command)), errors.EngineClosedError)
        with pytest.raises(errors.EngineClosedError):
            provider.watch(session)
        assert again.heartbeat(session)


def _alternately(done: threading.Event) -> Iterator[bool]:
    """False and True in turns, until `done`, and then once each."""
    while not done.is_set():
        yield False
        yield True
    yield False
    yield True


class ProviderContract(
    SessionContract,
    ValueContract,
    VariableContract,
    BatchContract,
    HistoryContract,
    DependencyContract,
    OptimizationContract,
    IdempotencyContract,
    WatchContract,
    LimitContract,
    HostileInputContract,
    ArgumentContract,
    SharingContract,
    ConcurrencyContract,
):
    """The whole contract."""
