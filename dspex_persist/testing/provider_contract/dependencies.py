"""Dependencies have no cycles, can be removed, and are listed in order."""

import uuid
from itertools import pairwise

import pytest

from dspex_persist.state import errors
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.provider_contract.base import Contract


class DependencyContract(Contract):
    """Dependencies have no cycles, can be removed, and are listed in order."""

    @pytest.fixture
    def lettered(self, provider: StateProvider) -> str:
        session_id = f"contract-{uuid.uuid4().hex}"
        provider.initialize_session(session_id)
        for name in "abcd":
            provider.register_variable(session_id, name, "integer", 0)
        return session_id

    def depend(self, provider: StateProvider, lettered: str, *pairs: str) -> None:
        """Add dependencies. Each pair is two letters, of which the first depends on the second."""
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

    def test_they_are_listed_in_order(self, provider: StateProvider, lettered: str) -> None:
        self.depend(provider, lettered, "dc", "db", "ba", "ca")
        assert provider.get_dependencies(lettered, "a") == ()
        assert sorted(provider.get_dependencies(lettered, "d")) == ["b", "c"]
        everything = provider.get_dependencies(lettered, "d", transitive=True)
        assert (everything[0], sorted(everything)) == ("a", ["a", "b", "c"])
        assert sorted(provider.get_dependencies(lettered, "a", dependents=True)) == ["b", "c"]
        users = provider.get_dependencies(lettered, "a", dependents=True, transitive=True)
        assert (users[-1], sorted(users)) == ("d", ["b", "c", "d"])
        with pytest.raises(errors.VariableNotFoundError):
            provider.get_dependencies(lettered, "e")

    def test_one_can_be_removed(self, provider: StateProvider, lettered: str) -> None:
        self.depend(provider, lettered, "ab", "bc")
        provider.add_dependency(lettered, "a", "b", "uses")
        assert not provider.remove_dependency(lettered, "b", "a")
        assert provider.remove_dependency(lettered, "a", "b")
        assert not provider.remove_dependency(lettered, "a", "b")
        assert provider.get_dependencies(lettered, "a") == ("b",)
        assert provider.remove_dependency(lettered, "a", "b", "uses")
        assert provider.get_dependencies(lettered, "a") == ()
        assert provider.get_dependencies(lettered, "b", dependents=True) == ()
        self.depend(provider, lettered, "ba")
        with pytest.raises(errors.VariableNotFoundError):
            provider.remove_dependency(lettered, "a", "e")
