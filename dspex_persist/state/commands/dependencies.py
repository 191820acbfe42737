"""Dependencies between variables: add, remove, query."""

from dataclasses import dataclass
from typing import Any, ClassVar

from dspex_persist.state.commands.base import Command, check_text
from dspex_persist.state.errors import DependencyCycleError, LimitExceededError
from dspex_persist.state.events import DependencyAdded, DependencyRemoved
from dspex_persist.state.graph import find_cycle, related
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Dependency
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.unit_of_work import UnitOfWork

_MOST_PER_VARIABLE = 16
_FEW_EDGES = 500


@dataclass(frozen=True, slots=True)
class AddDependency(Command[None]):
    """Declare that `from_variable` depends on `to_variable`. Repeating it changes nothing."""

    from_variable: str
    to_variable: str
    dependency_type: str = ""

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = None

    def apply(self, uow: UnitOfWork) -> None:
        state = uow.session(self.session_id)
        from_id = uow.variable(self.session_id, self.from_variable).id
        to_id = uow.variable(self.session_id, self.to_variable).id
        if self.dependency_type:
            check_text("dependency_type", self.dependency_type, uow.limits.name_length, "name_length")
        edge = Dependency(from_id, to_id, self.dependency_type, uow.sequence)
        if state.dependencies.has(edge):
            return
        check_dependency(state, edge, uow.limits)
        uow.record(self.session_id, DependencyAdded(from_id, to_id, self.dependency_type))


@dataclass(frozen=True, slots=True)
class RemoveDependency(Command[bool]):
    """Declare that `from_variable` does not depend on `to_variable` any more. Returns whether it did."""

    from_variable: str
    to_variable: str
    dependency_type: str = ""

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = bool

    def apply(self, uow: UnitOfWork) -> bool:
        state = uow.session(self.session_id)
        from_id = uow.variable(self.session_id, self.from_variable).id
        to_id = uow.variable(self.session_id, self.to_variable).id
        if not state.dependencies.has(Dependency(from_id, to_id, self.dependency_type, uow.sequence)):
            return False
        uow.record(self.session_id, DependencyRemoved(from_id, to_id, self.dependency_type))
        return True


@dataclass(frozen=True, slots=True)
class GetDependencies(Command[tuple[str, ...]]):
    """Return the names of the variables on which one depends, each after those that it depends on itself.

    Attributes:
        identifier: The variable's name or id.
        dependents: Return those that depend on it instead.
        transitive: Include indirect dependencies.
    """

    identifier: str
    dependents: bool = False
    transitive: bool = False

    def takes_long(self, state: SessionState) -> bool:
        """See `Command.takes_long`."""
        return self.transitive and len(state.dependencies) > _FEW_EDGES

    def apply(self, uow: UnitOfWork) -> tuple[str, ...]:
        state = uow.session(self.session_id)
        variable = uow.variable(self.session_id, self.identifier)
        ids = related(state.dependencies, variable.id, users=self.dependents, transitive=self.transitive)
        return tuple(state.names[each] for each in ids)


def check_dependency(state: SessionState, edge: Dependency, limits: Limits) -> None:
    """Refuse a dependency that exceeds the limit, or that would close a cycle."""
    most = _MOST_PER_VARIABLE * limits.variables_per_session
    if len(state.dependencies) >= most:
        what = f"number of dependencies ({_MOST_PER_VARIABLE} a variable)"
        raise LimitExceededError(what, len(state.dependencies) + 1, most, "variables_per_session")
    cycle = find_cycle(state.dependencies, edge)
    if cycle is not None:
        raise DependencyCycleError(_spell(state, cycle))


def _spell(state: SessionState, cycle: list[str]) -> str:
    return " -> ".join(state.names[variable_id] for variable_id in cycle)
