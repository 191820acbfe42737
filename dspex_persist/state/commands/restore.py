"""RestoreSession: bring a whole session back to the state that it had at one of its commits."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from dspex_persist.state.commands.base import Command
from dspex_persist.state.commands.recordings import ForkSession
from dspex_persist.state.commands.variables import RegisterVariable, check_lock
from dspex_persist.state.errors import InvalidArgumentError, VariableLockedError, quote
from dspex_persist.state.events import DependencyAdded, DependencyRemoved, RuleAdded, RuleRemoved, SessionRestored
from dspex_persist.state.model import (
    RESTORED_METADATA,
    SENSITIVE,
    ChangeKind,
    Dependency,
    RestoredSession,
    Rule,
    Variable,
)
from dspex_persist.state.unit_of_work import UnitOfWork
from dspex_persist.state.values.json_text import storable


@dataclass(frozen=True, slots=True)
class RestoreSession(Command[RestoredSession]):
    """Bring the variables, dependencies and rules of a session back to what they were at a commit, in one commit.

    A variable that still exists gets a new version with its old value, constraints and metadata. One that was deleted
    since comes back as a new variable of its name, and one that was registered since is deleted. Locks and tools stay
    as they are; a lock on a variable that would change is an error.

    Attributes:
        restored_to: The commit.
        at: The point in the caller's words, for errors.
        variables: The variables as of that commit, oldest first.
        dependencies: The dependencies as of then.
        rules: The rules as of then.
    """

    restored_to: int
    at: str
    variables: tuple[Variable, ...] = ()
    dependencies: tuple[Dependency, ...] = ()
    rules: tuple[Rule, ...] = ()

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = RestoredSession

    @classmethod
    def of(cls, past: ForkSession, restored_to: int, at: str) -> Self:
        """Return the command to restore the session to what a fork at the same point would copy.

        Args:
            past: The fork.
            restored_to: The last commit of the session up to the point.
            at: The point.
        """
        return cls(past.forked_from, restored_to, at, past.variables, past.dependencies, past.rules)

    def apply(self, uow: UnitOfWork) -> RestoredSession:
        state = uow.session(self.session_id)
        if self.restored_to < state.session.sequence:
            began = f"it began at commit {state.session.sequence}, {state.session.created_at:%Y-%m-%d %H:%M:%S} UTC"
            reason = f"session {quote(self.session_id)} had not begun by then; {began}"
            raise InvalidArgumentError("at", reason)
        past = {variable.id: variable for variable in self.variables}
        live = {variable.id: uow.current(variable) for variable in state.variables.values()}
        changed = [each for each in live.values() if each.id in past and _differs(each, past[each.id])]
        born = [each for each in live.values() if each.id not in past]
        self._check_locks(uow, changed, born)
        # The dependencies and rules that go come first: whoever repeats the events applies deletions after them.
        edges = {_facts(edge) for edge in self.dependencies}
        self._remove_dependencies(uow, [edge for edge in state.dependencies if edge.until is None], edges)
        self._remove_rules(uow, state.rules or {})
        for variable in born:
            uow.delete_variable(self.session_id, uow.drop_ended_lock(self.session_id, variable))
        for variable in changed:
            self._roll_back(uow, variable, past[variable.id])
        gone = [each for each in self.variables if each.id not in live]
        ids = {each.id: each.id for each in self.variables} | {each.id: self._register(uow, each) for each in gone}
        self._add_dependencies(uow, ids)
        self._add_rules(uow)
        uow.record(self.session_id, SessionRestored(self.restored_to))
        return RestoredSession(
            uow.sequence, self.restored_to, *(tuple(each.name for each in names) for names in (changed, born, gone))
        )

    def _check_locks(self, uow: UnitOfWork, changed: Iterable[Variable], born: Iterable[Variable]) -> None:
        optimizer_id = uow.origin.optimizer_id
        for variable in changed:
            check_lock(variable, {} if optimizer_id is None else {"optimizer_id": optimizer_id})
        for variable in born:
            if variable.optimization is not None:
                raise VariableLockedError(variable.name, variable.optimization.optimizer_id)

    def _roll_back(self, uow: UnitOfWork, variable: Variable, past: Variable) -> None:
        metadata = {"rolled_back_to": str(past.version)}
        if uow.origin.optimizer_id is not None:
            metadata["optimizer_id"] = uow.origin.optimizer_id
        if _metadata_of(variable, past) != variable.metadata:
            metadata[RESTORED_METADATA] = storable(_metadata_of(variable, past))
        if variable.constraints != past.constraints:
            variable = uow.constrain(self.session_id, variable, past.constraints)
        uow.write(self.session_id, variable, past.value, metadata, uow.origin.source, ChangeKind.ROLLED_BACK)

    def _register(self, uow: UnitOfWork, variable: Variable) -> str:
        origin = uow.origin
        # The new variable keeps the source of the value.
        uow.origin = replace(origin, source=variable.source)
        _, name, kind, value, _, constraints, metadata, *_ = variable
        registered = RegisterVariable(self.session_id, name, kind, value, constraints, metadata).apply(uow)
        uow.origin = origin
        return registered

    def _remove_dependencies(
        self, uow: UnitOfWork, live: Iterable[Dependency], past: set[tuple[str, str, str]]
    ) -> None:
        for edge in live:
            if _facts(edge) not in past:
                uow.record(self.session_id, DependencyRemoved(*_facts(edge)))

    def _add_dependencies(self, uow: UnitOfWork, ids: Mapping[str, str]) -> None:
        for edge in self.dependencies:
            added = Dependency(ids[edge.from_id], ids[edge.to_id], edge.type, uow.sequence)
            if not uow.session(self.session_id).dependencies.has(added):
                uow.record(self.session_id, DependencyAdded(*_facts(added)))

    def _remove_rules(self, uow: UnitOfWork, live: Mapping[str, Rule]) -> None:
        past = {rule.name: rule for rule in self.rules}
        for rule in tuple(live.values()):
            if past.get(rule.name) != rule:
                uow.record(self.session_id, RuleRemoved(rule.name))

    def _add_rules(self, uow: UnitOfWork) -> None:
        for rule in self.rules:
            if rule.name not in (uow.session(self.session_id).rules or {}):
                uow.record(self.session_id, RuleAdded(rule.name, rule.expression, rule.description))


def _differs(variable: Variable, past: Variable) -> bool:
    return (
        variable.value != past.value
        or variable.constraints != past.constraints
        or variable.metadata != _metadata_of(variable, past)
    )


def _metadata_of(variable: Variable, past: Variable) -> dict[str, str]:
    """Return the metadata that a variable gets back. What is sensitive now stays so: its history would be shown."""
    sensitive = variable.metadata.get(SENSITIVE)
    return {**past.metadata, SENSITIVE: sensitive} if sensitive is not None else dict(past.metadata)


def _facts(edge: Dependency) -> tuple[str, str, str]:
    return edge.from_id, edge.to_id, edge.type
