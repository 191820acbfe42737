"""Leases of optimizers that end by themselves."""

import time
import uuid
from typing import ClassVar

import pytest

from dspex_persist.state import commands, errors
from dspex_persist.state.model import Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import DEADLINE_S, let_pass, refused
from dspex_persist.testing.provider_contract.base import Contract
from dspex_persist.testing.provider_contract.optimization import STRANGER


class LeaseContract(Contract):
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
        begun = renewed = time.monotonic()
        provider.start_optimization(leased, "x", "holder")
        renewals = 0
        while renewals < 4 or time.monotonic() - begun < self.lease_s * 1.5:
            assert time.monotonic() - begun < DEADLINE_S, "this machine is too slow to write within a lease"
            error = refused(provider.submit(commands.SetVariable(leased, "x", Value("1")), STRANGER))
            if time.monotonic() - renewed < self.lease_s:
                assert isinstance(error, errors.VariableLockedError)
                renewals += 1
            else:
                # The machine was too slow, so the lease may have ended: start again.
                provider.start_optimization(leased, "x", "holder")
            # Before the write, whose time is that of its beginning.
            renewed = time.monotonic()
            provider.set_variable(leased, "x", 2, metadata={"optimizer_id": "holder"})
            let_pass(self.lease_s / 4)
