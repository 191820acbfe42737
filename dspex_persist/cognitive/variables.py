"""Variables: a session's variables as a mapping of Python values."""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Protocol, TypeVar

from dspex_persist.state import commands, values
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import InvalidArgumentError, VariableNotFoundError
from dspex_persist.state.model import BatchOutcome, Variable, VariableVersion
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.watch import Watch

R = TypeVar("R")

# In the class below, `list` is a method.
_Versions = list[VariableVersion]


class Runs(Protocol):
    """Whatever carries commands out: a provider at once, a tool's execution inside its transaction."""

    def run(self, command: Command[R]) -> R:
        """The command's result, or a `StateError`."""


class VariableMapping(MutableMapping[str, object]):
    """`variables["temperature"]` reads, `variables["temperature"] = 0.9` writes, `del` deletes.

    Only variables that were defined can be written: their type and constraints hold for every value. A name that the
    session does not have is a KeyError, as in any mapping; everything else that is refused is a `StateError`.
    """

    def __init__(self, runs: Runs, session_id: str) -> None:
        self._runs = runs
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
        type_name = type_name or values.infer_type(value, name=name)
        encoded = values.encode(value, type_name, name=name)
        text = values.encode(dict(constraints or {}), "map").json
        command = commands.RegisterVariable(self._session_id, name, type_name, encoded, text, metadata or {})
        return self._runs.run(command)

    def describe(self, name: str) -> Variable:
        """The variable itself: type, version, constraints, metadata, who holds it."""
        return self._runs.run(commands.GetVariable(self._session_id, name))

    def set(
        self, name: str, value: object, *, metadata: Mapping[str, str] | None = None, expected_version: int = 0
    ) -> int:
        """Write a value; the new version. `expected_version` 0 writes whatever the version is."""
        encoded = values.encode(value, name=name)
        command = commands.SetVariable(self._session_id, name, encoded, metadata or {}, expected_version)
        try:
            return self._runs.run(command)
        except VariableNotFoundError as error:
            raise KeyError(f"{name}; define it first: define({name!r}, {value!r})") from error

    def delete(self, name: str) -> None:
        """Delete the variable; its history stays."""
        try:
            self._runs.run(commands.DeleteVariable(self._session_id, name))
        except VariableNotFoundError as error:
            raise KeyError(name) from error

    def get_all(self, *names: str) -> dict[str, object]:
        """The values of several variables as of one moment (none named: of all)."""
        if not names:
            return {variable.name: _value_of(variable) for variable in self.list()}
        found = self._runs.run(commands.GetVariables(self._session_id, names))
        if found.missing:
            raise KeyError(", ".join(found.missing))
        return {name: _value_of(variable) for name, variable in found.variables.items()}

    def set_all(self, changes: Mapping[str, object]) -> Mapping[str, int]:
        """Write several values, all of them or, with an `InvalidArgumentError` that says why, none; the versions."""
        outcome = self.update_all(changes)
        if not outcome.success:
            raise InvalidArgumentError("updates", "; ".join(outcome.errors.values()))
        return outcome.versions

    def update_all(self, changes: Mapping[str, object]) -> BatchOutcome:
        """Write several values in one commit, all or none of them. The outcome says what was wrong."""
        encoded = {name: values.encode(value, name=name) for name, value in changes.items()}
        return self._runs.run(commands.SetVariables(self._session_id, encoded, atomic=True))

    def history(self, name: str, limit: int = 0) -> _Versions:
        """The newest versions, newest first; 0 means 100."""
        return self._runs.run(commands.GetVariableHistory(self._session_id, name, limit))

    def rollback(self, name: str, version: int) -> object:
        """Write the value of an earlier version as a new version; that value."""
        return _value_of(self._runs.run(commands.RollbackVariable(self._session_id, name, version)))

    def list(self, pattern: str = "") -> tuple[Variable, ...]:
        """The variables whose name fits a glob of `*` and `?`; "" means all. Oldest first."""
        return self._runs.run(commands.ListVariables(self._session_id, pattern))

    def __getitem__(self, name: str) -> object:
        try:
            return _value_of(self.describe(name))
        except VariableNotFoundError as error:
            raise KeyError(name) from error

    def __setitem__(self, name: str, value: object) -> None:
        self.set(name, value)

    def __delitem__(self, name: str) -> None:
        self.delete(name)

    def __iter__(self) -> Iterator[str]:
        return iter([variable.name for variable in self.list()])

    def __len__(self) -> int:
        return len(self.list())


class Variables(VariableMapping):
    """The variables of a session, seen through its provider: each write is durable when it returns."""

    def __init__(self, provider: StateProvider, session_id: str) -> None:
        super().__init__(provider, session_id)
        self._provider = provider

    def watch(self, *names: str) -> Watch:
        """Watch the variables of these names (none: all)."""
        return self._provider.watch(self._session_id, names)


def _value_of(variable: Variable) -> object:
    return values.decode(variable.type, variable.value)
