"""The contract of every provider that is `Durable`, as tests. A backend subclasses `DurableContract` in addition to
`ProviderContract`, with a fixture `reopened`; if its leases are short, also `DurableLeaseContract`.

    class TestMine(ProviderContract, DurableContract):
        @pytest.fixture
        def provider(self) -> Iterator[StateProvider]: ...

        @pytest.fixture
        def reopened(self, provider: StateProvider) -> Reopen: ...
"""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from dspex_persist.state import commands, errors
from dspex_persist.state.abilities import Durable
from dspex_persist.state.errors import StateError
from dspex_persist.state.model import Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import DEADLINE_S, exact, let_pass, names_of, take
from dspex_persist.testing.provider_contract.base import Contract, Reopen
from dspex_persist.testing.provider_contract.idempotency import KEYED, keyable_session, keyed_writes, submit_keyed
from dspex_persist.testing.provider_contract.leases import LeaseContract
from dspex_persist.testing.provider_contract.values import BINARY_VALUES, EXACT_VALUES


class ReopenedContract(Contract):
    """The base of all parts of the contract."""

    @pytest.fixture
    def reopened(self, provider: StateProvider) -> Reopen:
        """See `Reopen`."""
        raise NotImplementedError(f"{type(self).__name__} has no fixture `reopened`")


class DurableContract(ReopenedContract):
    """Acknowledged changes survive a restart."""

    @pytest.fixture
    def kept(self, provider: StateProvider, session: str) -> str:
        """A session with the integers a to d, all 0."""
        for name in "abcd":
            provider.register_variable(session, name, "integer", 0)
        return session

    def test_it_claims_to_be_durable(self, provider: StateProvider) -> None:
        assert isinstance(provider, Durable)

    def test_a_session_survives_a_restart_with_everything_that_it_holds(
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

    def test_values_of_all_types_survive_a_restart(
        self, provider: StateProvider, session: str, reopened: Reopen
    ) -> None:
        for number, (type_name, value) in enumerate(EXACT_VALUES):
            provider.register_variable(session, f"v{number}", type_name, value)
        for number, (type_name, binary) in enumerate(BINARY_VALUES):
            provider.submit(commands.RegisterVariable(session, f"b{number}", type_name, binary)).result()
        again = reopened()
        for number, (_, value) in enumerate(EXACT_VALUES):
            assert exact(again.get_value(session, f"v{number}")) == exact(value)
        for number, (_, binary) in enumerate(BINARY_VALUES):
            assert again.get_variable(session, f"b{number}").value == binary

    def test_dependencies_survive_a_restart(self, provider: StateProvider, kept: str, reopened: Reopen) -> None:
        provider.add_dependency(kept, "a", "b")
        provider.add_dependency(kept, "b", "c")
        again = reopened()
        with pytest.raises(errors.DependencyCycleError, match="->"):
            again.add_dependency(kept, "c", "a")
        with again.watch(kept) as watch:
            again.set_variable(kept, "c", 1)
            updates = take(watch, 3)
        assert names_of(updates) == ["c", "b", "a"]

    def test_an_optimization_survives_a_restart(self, provider: StateProvider, kept: str, reopened: Reopen) -> None:
        optimization = provider.start_optimization(kept, "a", "holder", {"trials": "5"})
        provider.set_variable(kept, "a", 7, metadata={"optimizer_id": "holder"})
        before = provider.get_variable(kept, "a")
        again = reopened()
        after = again.get_variable(kept, "a")
        assert after.optimization is not None
        assert before.optimization is not None
        assert after.optimization.started_at == before.optimization.started_at
        with pytest.raises(errors.VariableLockedError, match="'holder'"):
            again.set_variable(kept, "a", 8)
        assert again.start_optimization(kept, "a", "holder") == optimization
        assert again.stop_optimization(kept, "a") == Value("7")

    def test_requests_under_a_key_get_the_recorded_answer_after_a_restart(
        self, provider: StateProvider, reopened: Reopen
    ) -> None:
        key = uuid.uuid4().hex
        requests = [keyed_writes(keyable_session(provider))[which] for which in KEYED]
        answers = [submit_keyed(provider, command, key).result() for command in requests]
        again = reopened()
        assert [submit_keyed(again, command, key).result() for command in requests] == answers

    def test_a_watch_resumes_after_a_restart(self, provider: StateProvider, kept: str, reopened: Reopen) -> None:
        with provider.watch(kept) as watch:
            for number in range(1, 6):
                provider.set_variables(kept, {"a": number, "b": number})
            updates = take(watch, 10)
        again = reopened()
        with again.watch(kept, after_sequence=updates[3].sequence) as watch:
            assert take(watch, 6) == updates[4:]
            again.set_variable(kept, "a", 6)
            assert take(watch, 1)[0].sequence > updates[-1].sequence

    def test_a_watch_ends_with_an_error_when_its_state_is_reopened(
        self, provider: StateProvider, kept: str, reopened: Reopen
    ) -> None:
        watch = provider.watch(kept)
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(list, watch)
            again = reopened()
            provider.close()
            assert isinstance(waiting.exception(DEADLINE_S), StateError)
        watch.close()
        assert again.heartbeat(kept)


class DurableLeaseContract(ReopenedContract, LeaseContract):
    """Leases end by themselves, also after a restart."""

    def test_an_ended_lease_stays_ended_after_a_restart(
        self, provider: StateProvider, leased: str, reopened: Reopen
    ) -> None:
        provider.start_optimization(leased, "x", "gone")
        let_pass(self.lease_s * 1.02)
        again = reopened()
        assert again.get_variable(leased, "x").optimization is None
        assert again.set_variable(leased, "x", 1) == 1
