"""Optimization: locks that let one optimizer at a time write a variable."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from dspex_persist.state.commands.base import Command, check_metadata, check_text
from dspex_persist.state.errors import NotOptimizingError, VariableLockedError
from dspex_persist.state.events import OptimizationStarted
from dspex_persist.state.model import ChangeKind, Optimization, Origin, Value
from dspex_persist.state.unit_of_work import UnitOfWork


@dataclass(frozen=True, slots=True)
class StartOptimization(Command[str]):
    """Lock a variable for an optimizer, or renew the lease of its lock, and return the optimization's id."""

    identifier: str
    optimizer_id: str
    config: Mapping[str, str] = field(default_factory=dict)

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = str

    def apply(self, uow: UnitOfWork) -> str:
        check_text("optimizer_id", self.optimizer_id, uow.limits.name_length, "name_length")
        check_metadata(self.config, uow.limits)
        variable = uow.variable(self.session_id, self.identifier)
        held = variable.optimization
        if held is not None and held.optimizer_id != self.optimizer_id:
            raise VariableLockedError(variable.name, held.optimizer_id)
        variable = uow.drop_ended_lock(self.session_id, variable)
        if held is not None:
            renewed = replace(held, config=self.config or held.config)
            uow.record(self.session_id, OptimizationStarted.of(variable.id, renewed))
            return held.id
        lock = Optimization(
            id=f"opt_{variable.name}_{uow.new_token()}",
            optimizer_id=self.optimizer_id,
            started_at=uow.now,
            started_by=uow.origin.actor,
            config=self.config,
            lease_s=uow.optimization_lease_s,
        )
        uow.record(self.session_id, OptimizationStarted.of(variable.id, lock))
        return lock.id


@dataclass(frozen=True, slots=True)
class StopOptimization(Command[Value]):
    """Remove the lock, and return the variable's value.

    Removing another optimizer's lock requires `force`, and adds a version to the history.
    """

    identifier: str
    force: bool = False

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = Value

    def apply(self, uow: UnitOfWork) -> Value:
        variable = uow.variable(self.session_id, self.identifier)
        lock = variable.optimization
        if lock is None:
            raise NotOptimizingError(variable.name)
        own = _is_own(lock, uow.origin)
        if not own and not self.force:
            raise VariableLockedError(variable.name, lock.optimizer_id)
        freed = uow.stop_optimization(self.session_id, variable, lock, "stopped" if own else "broken by force")
        if not own:
            # The new version also fails the other optimizer's writes with expected_version.
            metadata = {"broken_optimizer_id": lock.optimizer_id, "broken_optimization_id": lock.id}
            uow.write(self.session_id, freed, freed.value, metadata, uow.origin.source, ChangeKind.LOCK_BROKEN)
        return freed.value


def _is_own(lock: Optimization, origin: Origin) -> bool:
    """Whether the requester holds the lock: by the optimizer's id in the header, or else by the actor."""
    if origin.optimizer_id is not None:
        return origin.optimizer_id == lock.optimizer_id
    return origin.actor == lock.started_by
