"""The contract of `Derives`: variables that are computed from others in the same commit."""

from collections.abc import Mapping

import pytest

from dspex_persist.state import errors, values
from dspex_persist.state.abilities import Derives
from dspex_persist.state.commands.derivations import ComputeDerived, Derivation
from dspex_persist.state.model import Value, Variable
from dspex_persist.state.provider import StateProvider


def _sum(inputs: Mapping[str, Variable]) -> Value:
    return values.encode(sum(int(each.value.json) for each in inputs.values()), "integer")


def _refuse(_: Mapping[str, Variable]) -> Value:
    raise ZeroDivisionError("never")


class DeriveContract:
    """Whoever changes an input, the same commit has the computed variable."""

    @pytest.fixture
    def added(self, provider: StateProvider, session: str) -> str:
        """A session in which `c` is the sum of `a` and `b`."""
        for name, value in (("a", 1), ("b", 2), ("c", 0)):
            provider.register_variable(session, name, "integer", value)
        Derives.of(provider).add_derivation(session, Derivation("c", ("a", "b"), _sum))
        provider.run(ComputeDerived(session, "c"))
        return session

    def test_it_is_computed_at_once_and_in_each_commit(self, provider: StateProvider, added: str) -> None:
        assert provider.get_value(added, "c") == 3
        provider.set_variable(added, "a", 10)
        newest = provider.get_variable_history(added, "c")[0]
        assert newest.value == Value("12")
        assert newest.sequence == provider.get_variable_history(added, "a")[0].sequence
        provider.set_variables(added, {"a": 0, "b": 0}, atomic=True)
        provider.rollback_variable(added, "a", 1)
        assert [entry.value for entry in provider.get_variable_history(added, "c")[:3]] == [
            Value("10"),
            Value("0"),
            Value("12"),
        ]

    def test_watchers_see_both_in_one_commit(self, provider: StateProvider, added: str) -> None:
        with provider.watch(added) as watch:
            provider.set_variable(added, "b", 5)
            updates = watch.next(timeout_s=30)
        assert {update.variable.name for update in updates} == {"b", "c"}
        assert len({update.sequence for update in updates}) == 1

    def test_it_cannot_be_written_itself(self, provider: StateProvider, added: str) -> None:
        with pytest.raises(errors.DerivationError, match="'c'"):
            provider.set_variable(added, "c", 7)
        assert provider.get_value(added, "c") == 3

    def test_a_chain_is_computed_in_order(self, provider: StateProvider, added: str) -> None:
        provider.register_variable(added, "d", "integer", 0)
        Derives.of(provider).add_derivation(added, Derivation("d", ("c", "a"), _sum))
        provider.set_variable(added, "b", 4)
        assert (provider.get_value(added, "c"), provider.get_value(added, "d")) == (5, 6)
        with pytest.raises(errors.DerivationError, match="itself"):
            Derives.of(provider).add_derivation(added, Derivation("a", ("d",), _sum))

    def test_a_function_that_fails_fails_the_change(self, provider: StateProvider, added: str) -> None:
        Derives.of(provider).add_derivation(added, Derivation("b", ("a",), _refuse))
        with pytest.raises(errors.DerivationError, match="never"):
            provider.set_variable(added, "a", 2)
        assert provider.get_variables(added, ["a", "b", "c"]).variables["a"].version == 0
        assert provider.get_value(added, "c") == 3

    def test_it_ends_when_it_is_removed(self, provider: StateProvider, added: str) -> None:
        remove = Derives.of(provider).add_derivation(added, Derivation("c", ("a",), _sum))
        remove()
        provider.set_variable(added, "a", 9)
        assert provider.get_value(added, "c") == 3
        provider.set_variable(added, "c", 0)
