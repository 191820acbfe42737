"""No mutable object is shared between a provider and its callers: neither arguments nor results."""

import struct
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from dspex_persist.state import commands, values
from dspex_persist.state.commands import Command
from dspex_persist.state.model import Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import DEADLINE_S, take
from dspex_persist.testing.provider_contract.base import Contract


class SharingContract(Contract):
    """No mutable object is shared between a provider and its callers: neither arguments nor results."""

    def test_what_was_handed_in_may_be_changed_afterwards(self, provider: StateProvider, session: str) -> None:
        note = {"step": "0"}
        provider.register_variable(session, "x", "list", ["0"], metadata=note)
        pending: list[Future[int]] = []
        held: list[Command[int]] = []
        for step in range(1, 4):
            note["step"] = str(step)
            held.append(commands.SetVariable(session, "x", values.encode([str(step)]), note))
        note["step"] = "changed"
        pending.extend(map(provider.submit, held))
        assert [future.result(DEADLINE_S) for future in pending] == [1, 2, 3]
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
        names.append("unknown")
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
            watched = [update.variable, *watch.initial]
        variables = [
            provider.get_variable(session, "x"),
            *provider.get_variables(session, ["x"]).variables.values(),
            *provider.list_variables(session),
            *provider.initialize_session(session).variables,
            *watched,
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

    def test_nor_can_what_a_resumed_watch_hands_out(self, provider: StateProvider) -> None:
        provider.initialize_session(session := uuid.uuid4().hex)
        provider.register_variable(session, "x", "integer", 0)
        begun = provider.get_variable_history(session, "x")[0].sequence
        provider.set_variable(session, "x", 1, metadata={"a": "1"})
        with provider.watch(session, after_sequence=begun) as watch:
            (update,) = take(watch, 1)
        for change in _CHANGES:
            with pytest.raises(TypeError, match="read-only"):
                change(update.variable.metadata)

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
