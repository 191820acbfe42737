"""Publishing: a write of an execution before its commit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dspex_persist.state import values
from dspex_persist.state.commands.base import Command, check_metadata
from dspex_persist.state.commands.derivations import derive
from dspex_persist.state.commands.variables import read_updates, source_of, write_value
from dspex_persist.state.errors import ExecutionNotFoundError
from dspex_persist.state.model import ChangeKind, Value, Variable
from dspex_persist.state.unit_of_work import UnitOfWork


@dataclass(frozen=True, slots=True)
class PublishVariable(Command[tuple[Variable, ...]]):
    """Write a value before the commit of the execution that sets it, such as its progress, so that others see it.

    Return the variable, then those that were computed from it in the same commit.
    """

    execution_id: str
    identifier: str
    value: Value
    metadata: Mapping[str, str] = field(default_factory=dict)

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = tuple[Variable, ...]
    # It checks them itself, because its result has what is computed from the variable.
    keeps_rules: ClassVar[bool] = False

    def apply(self, uow: UnitOfWork) -> tuple[Variable, ...]:
        if self.execution_id not in uow.session(self.session_id).executions:
            raise ExecutionNotFoundError(self.execution_id)
        variable = uow.variable(self.session_id, self.identifier)
        metadata = check_metadata(self.metadata, uow.limits)
        source = source_of(metadata, uow.origin.source)
        published = write_value(uow, self, variable, self.value, metadata, source, ChangeKind.PUBLISHED)
        if uow.derivations:
            derive(uow, self.session_id)
        uow.check_rules()
        return published, *(change.variable for change in uow.versions if change.variable.id != published.id)

    @property
    def json_length(self) -> int:
        """See `Command`."""
        return len(self.value.json)

    def _read_values(self, ahead: values.ReadAhead, find: values.Find) -> None:
        read_updates(ahead, find, {self.identifier: self.value})
