"""Limits are enforced, and each error names the limit and its setting."""

import json
import time
import uuid
from typing import Any

import pytest

from dspex_persist.state import commands, errors
from dspex_persist.state.commands import Command
from dspex_persist.state.model import Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.watch import Watch
from dspex_persist.testing.checks import DEADLINE_S, refused
from dspex_persist.testing.provider_contract.base import Contract


class LimitContract(Contract):
    """Limits are enforced, and each error names the limit and its setting."""

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
        """A session can always be resumed and listed in one message, whatever it holds."""
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
        # A refused value is not kept.
        assert [variable.name for variable in provider.initialize_session(session).variables] == kept
        batch = provider.set_variables(session, {kept[0]: text * 2, kept[1]: text})
        assert "session_size_bytes" in batch.errors[kept[0]]
        assert batch.versions == {kept[1]: 1}
        # Space that is freed can be used again.
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
        requests: list[Command[Any]] = [
            commands.RegisterVariable(session, above, "integer", Value("0")),
            commands.ListVariables(session, above),
            commands.StartOptimization(session, longest, above),
            commands.AddDependency(session, longest, longest, above),
        ]
        for command in requests:
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
        requests: list[Command[Any]] = [
            commands.InitializeSession(session, above),
            commands.RegisterVariable(session, "y", "integer", Value("0"), "", above),
            commands.SetVariable(session, "x", Value("0"), above),
            commands.SetVariables(session, {"x": Value("0")}, above),
            commands.StartOptimization(session, "x", "optimizer", above),
            # Each is within the limit, but together they exceed it.
            commands.SetVariable(session, "x", Value("0"), {"one more": ""}),
        ]
        for command in requests:
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
        # A backend may learn a little later that a watch was closed.
        deadline = time.monotonic() + DEADLINE_S
        while not (watches := _open_watches(provider, session, 1)[0]):
            assert time.monotonic() < deadline, "closed watches still count"
        watches[0].close()


def _open_watches(
    provider: StateProvider, session: str, most: int
) -> tuple[list[Watch], errors.TooManyWatchersError | None]:
    """Open up to `most` watches; return them, and the error that prevented more, if any."""
    watches: list[Watch] = []
    for _ in range(most):
        try:
            watches.append(provider.watch(session))
        except errors.TooManyWatchersError as error:
            return watches, error
    return watches, None
