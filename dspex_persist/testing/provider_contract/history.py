"""History and rollback."""

import json
from itertools import pairwise

import pytest

from dspex_persist.state import commands, errors
from dspex_persist.state.model import ChangeKind, Origin, Source, Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import DEADLINE_S, refused
from dspex_persist.testing.provider_contract.base import Contract


class HistoryContract(Contract):
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
        """They all arrive, even if a wire needs several answers for them."""
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
