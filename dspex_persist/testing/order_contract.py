"""The contract of every provider that is `KeepsOrder`, as tests. A backend subclasses `OrderContract`."""

from dspex_persist.state import commands
from dspex_persist.state.abilities import KeepsOrder
from dspex_persist.state.model import Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import DEADLINE_S
from dspex_persist.testing.provider_contract.base import Contract


class OrderContract(Contract):
    """Commands take effect in the order in which they were submitted."""

    def test_it_claims_to_keep_the_order(self, provider: StateProvider) -> None:
        assert isinstance(provider, KeepsOrder)

    def test_commands_take_effect_in_the_order_in_which_they_were_submitted(
        self, provider: StateProvider, session: str
    ) -> None:
        provider.register_variable(session, "x", "integer", 0)
        pending = [provider.submit(commands.SetVariable(session, "x", Value(str(n)))) for n in range(1, 201)]
        assert [future.result(DEADLINE_S) for future in pending] == list(range(1, 201))
        history = provider.get_variable_history(session, "x", 200)
        assert [version.value for version in history] == [Value(str(number)) for number in range(200, 0, -1)]
