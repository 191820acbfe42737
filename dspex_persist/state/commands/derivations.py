"""Derivations: variables that a function in this process computes from others, in the same commit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from dspex_persist.state import values
from dspex_persist.state.commands.base import Command
from dspex_persist.state.commands.variables import check_lock
from dspex_persist.state.errors import DerivationError, StateError
from dspex_persist.state.model import Source, Value, Variable
from dspex_persist.state.unit_of_work import UnitOfWork

DERIVED: Final = "derived"
"""The kind of the dependencies of a derived variable."""


@dataclass(frozen=True, slots=True)
class Derivation:
    """How a variable is computed from others.

    Attributes:
        target: The name of the variable.
        inputs: The names of the others.
        compute: Takes the others by name and returns the value. It runs while everything else that writes waits, so it
            must be quick, and it must not use the session.
    """

    target: str
    inputs: tuple[str, ...]
    compute: Callable[[Mapping[str, Variable]], Value]


def with_derivation(known: Sequence[Derivation], added: Derivation) -> tuple[Derivation, ...]:
    """Return the derivations of a session with another one, each after those that it reads."""
    waiting = [*(each for each in known if each.target != added.target), added]
    ordered: list[Derivation] = []
    while waiting:
        targets = {each.target for each in waiting}
        ready = [each for each in waiting if not targets.intersection(each.inputs)]
        if not ready:
            raise DerivationError(added.target, ", ".join(added.inputs), "it would depend on itself")
        ordered += ready
        waiting = [each for each in waiting if each not in ready]
    return tuple(ordered)


def derive(uow: UnitOfWork, session_id: str, forced: str | None = None) -> None:
    """Compute what is derived from the variables that a unit of work has changed, and stage it.

    Args:
        uow: The unit of work.
        session_id: The session.
        forced: A variable to compute whatever has changed.

    Raises:
        DerivationError: A function failed, or somebody wrote a derived variable but none that it is computed from.
    """
    changed = {change.variable.name for change in uow.versions}
    if not changed and forced is None:
        return
    for each in uow.derivations:
        moved = not changed.isdisjoint(each.inputs)
        if not moved and each.target not in changed and each.target != forced:
            continue
        variables = uow.session(session_id).variables
        variable, inputs = variables.get(each.target), _found(variables, each.inputs)
        if variable is None or inputs is None:
            # A part of it was deleted.
            continue
        value = _computed(uow, each, variable, inputs)
        if value == variable.value:
            continue
        if not moved and each.target != forced:
            reason = "it is computed from them: write those"
            raise DerivationError(each.target, ", ".join(each.inputs), reason)
        check_lock(variable, {})
        uow.write(session_id, variable, value, {}, Source.PYTHON)
        changed.add(each.target)


def _found(variables: Mapping[str, Variable], names: Sequence[str]) -> dict[str, Variable] | None:
    found = {name: variables[name] for name in names if name in variables}
    return found if len(found) == len(names) else None


def _computed(uow: UnitOfWork, each: Derivation, variable: Variable, inputs: Mapping[str, Variable]) -> Value:
    try:
        value = each.compute(inputs)
        constraints = values.compile_constraints(variable.name, variable.type, variable.constraints)
        return values.normalise(variable.name, variable.type, constraints, value, uow.limits)
    except StateError as error:
        raise DerivationError(each.target, ", ".join(each.inputs), error.sentence) from None
    except Exception as error:  # noqa: BLE001 - a user's function: it refuses the change, and harms nothing else
        reason = f"{type(error).__name__}: {error}"
        raise DerivationError(each.target, ", ".join(each.inputs), reason) from None


@dataclass(frozen=True, slots=True)
class ComputeDerived(Command[None]):
    """Compute a derived variable now. It is used inside a backend, when the derivation is added."""

    target: str

    writes: ClassVar[bool] = True

    def apply(self, uow: UnitOfWork) -> None:
        uow.variable(self.session_id, self.target)
        derive(uow, self.session_id, self.target)
