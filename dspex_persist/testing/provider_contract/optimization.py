"""Optimization: one optimizer at a time holds a variable."""

import uuid
from dataclasses import replace
from typing import Any

import pytest

from dspex_persist.state import commands, errors
from dspex_persist.state.commands import Command
from dspex_persist.state.model import ChangeKind, Origin, Source, Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import refused
from dspex_persist.testing.provider_contract.base import Contract

STRANGER = Origin("stranger", "contract", Source.ELIXIR)


class OptimizationContract(Contract):
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
        requests: list[Command[Any]] = [
            commands.SetVariable(tunable, "x", Value("1")),
            commands.SetVariable(tunable, "x", Value("1"), {"optimizer_id": "other"}),
            commands.RollbackVariable(tunable, "x", 0),
            commands.DeleteVariable(tunable, "x"),
            commands.StartOptimization(tunable, "x", "other"),
        ]
        for command in requests:
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

    def test_a_caller_that_names_the_optimizer_may_stop_it(self, provider: StateProvider, tunable: str) -> None:
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
