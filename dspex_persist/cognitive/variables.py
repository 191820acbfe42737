"""Variables: a session's variables as a mapping of Python values."""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from dspex_persist.state import values
from dspex_persist.state.errors import VariableNotFoundError
from dspex_persist.state.model import BatchOutcome, Variable, VariableVersion
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.watch import Watch


class Variables(MutableMapping[str, object]):
    """`variables["temperature"]` reads, `variables["temperature"] = 0.9` writes (durably), `del` deletes.

    Only variables that were defined can be written: their type and constraints hold for every value. A name that the
    session does not have is a KeyError, as in any mapping; everything else that is refused is a `StateError`.
    """

    def __init__(self, provider: StateProvider, session_id: str) -> None:
        self._provider = provider
        self._session_id = session_id

    def define(
        self,
        name: str,
        value: object,
        *,
        type_name: str | None = None,
        constraints: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> str:
        """Register a variable, or find it as it is if it is there with the same type and constraints; its id.

        Without `type_name` the type is inferred from `value`.
        """
        return self._provider.register_variable(
            self._session_id,
            name,
            type_name or values.infer_type(value),
            value,
            constraints=constraints or {},
            metadata=metadata,
        )

    def describe(self, name: str) -> Variable:
        """The variable itself: type, version, constraints, metadata, who holds it."""
        return self._provider.get_variable(self._session_id, name)

    def update_all(self, changes: Mapping[str, object]) -> BatchOutcome:
        """Write several values in one commit, all or none of them. The outcome says what was wrong."""
        return self._provider.set_variables(self._session_id, changes, atomic=True)

    def history(self, name: str, limit: int = 0) -> list[VariableVersion]:
        """The newest versions, newest first; 0 means 100."""
        return self._provider.get_variable_history(self._session_id, name, limit)

    def rollback(self, name: str, version: int) -> object:
        """Write the value of an earlier version as a new version; that value."""
        variable = self._provider.rollback_variable(self._session_id, name, version)
        return values.decode(variable.type, variable.value)

    def watch(self, *names: str) -> Watch:
        """Watch the variables of these names (none: all)."""
        return self._provider.watch(self._session_id, names)

    def __getitem__(self, name: str) -> object:
        try:
            return self._provider.get_value(self._session_id, name)
        except VariableNotFoundError as error:
            raise KeyError(name) from error

    def __setitem__(self, name: str, value: object) -> None:
        try:
            self._provider.set_variable(self._session_id, name, value)
        except VariableNotFoundError as error:
            raise KeyError(f"{name}; define it first: define({name!r}, {value!r})") from error

    def __delitem__(self, name: str) -> None:
        try:
            self._provider.delete_variable(self._session_id, name)
        except VariableNotFoundError as error:
            raise KeyError(name) from error

    def __iter__(self) -> Iterator[str]:
        return iter([variable.name for variable in self._provider.list_variables(self._session_id)])

    def __len__(self) -> int:
        return len(self._provider.list_variables(self._session_id))
