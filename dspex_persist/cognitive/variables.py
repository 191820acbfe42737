"""Variables: a session's variables as a mapping of Python values."""

from collections.abc import ItemsView, Iterator, Mapping, MutableMapping, ValuesView
from typing import Any, Protocol, TypeVar

from dspex_persist.state import arguments, commands, values
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import InvalidArgumentError, VariableNotFoundError
from dspex_persist.state.model import BatchOutcome, Value, Variable, VariableVersion
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.watch import Watch

R = TypeVar("R")

# In the class below, `list` is a method.
_Versions = list[VariableVersion]


class Runs(Protocol):
    """Runs commands: a provider at once, a tool's execution inside its transaction."""

    def run(self, command: Command[R]) -> R:
        """Return the result of the command, or raise a `StateError`."""


def decode(record: Variable | VariableVersion) -> Any:
    """Return the value of a variable or of an entry of its history as a Python object; None for a deletion."""
    return None if record.value is None else values.decode(record.type, record.value)


class VariableMapping(MutableMapping[str, Any]):
    """A session's variables as a mapping: `variables["temperature"] = 0.9` writes, `del` deletes.

    Only defined variables can be written, and every value must match the variable's type and constraints. An unknown
    name raises KeyError, as in any mapping; everything else that is refused raises a `StateError`. Reads return copies:
    changing one has no effect until you write it back. Types are known at run time only, hence Any.
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
        """Register a variable. If it exists with the same type and constraints, leave it as it is.

        Args:
            name: The name of the variable.
            value: Its initial value.
            type_name: Its type; by default it is inferred from `value`.
            constraints: The constraints that every value must satisfy, by keyword.
            metadata: Its metadata.

        Returns:
            The id of the variable.

        Raises:
            StateError: The value or the constraints are invalid, or the variable exists with others.
        """
        if type_name is None:
            type_name = values.infer_type(value, name=name)
        type_name = arguments.text("type_name", type_name)
        encoded = values.encode(value, type_name, name=name)
        text = values.constraints_json(name, constraints)
        command = commands.RegisterVariable(self._session_id, name, type_name, encoded, text, metadata or {})
        return self._runs.run(command)

    def describe(self, name: str) -> Variable:
        """Return the variable itself: type, version, constraints, metadata, lock."""
        return self._runs.run(commands.GetVariable(self._session_id, name))

    def set(
        self,
        name: str,
        value: object,
        *,
        metadata: Mapping[str, str] | None = None,
        expected_version: int | None = None,
    ) -> int:
        """Write a value.

        Args:
            name: The name of the variable.
            value: The new value.
            metadata: The metadata of the new version.
            expected_version: Write only if this is the current version.

        Returns:
            The new version.

        Raises:
            KeyError: There is no such variable.
            VersionConflictError: The current version is not `expected_version`.
            StateError: The value is invalid, or the variable is locked.
        """
        try:
            encoded = values.encode_for(value, lambda: self.describe(name).type, name=name)
            command = commands.SetVariable(self._session_id, name, encoded, metadata or {}, expected_version)
            return self._runs.run(command)
        except VariableNotFoundError as error:
            raise KeyError(_missing(error, f"define it first: define({name!r}, ...)")) from None

    def delete(self, name: str) -> None:
        """Delete the variable. Its history is kept."""
        try:
            self._runs.run(commands.DeleteVariable(self._session_id, name))
        except VariableNotFoundError as error:
            raise KeyError(_missing(error)) from None

    def get_all(self, *names: str) -> dict[str, Any]:
        """Return the values of these variables, or of all, in one consistent read; KeyError if one is missing."""
        if not names:
            return {variable.name: decode(variable) for variable in self.list()}
        batch = self._runs.run(commands.GetVariables(self._session_id, names))
        if batch.missing:
            raise KeyError(", ".join(batch.missing))
        return {name: decode(variable) for name, variable in batch.variables.items()}

    def set_all(self, changes: Mapping[str, object]) -> Mapping[str, int]:
        """Write several values atomically, and return the new versions by name.

        Raises:
            InvalidArgumentError: A value was refused, and nothing was written.
        """
        outcome = self.update_all(changes)
        if not outcome.success:
            raise InvalidArgumentError("updates", "; ".join(outcome.errors.values()))
        return outcome.versions

    def update_all(self, changes: Mapping[str, object]) -> BatchOutcome:
        """Write several values in one commit, or none of them. The outcome has the errors by name."""
        updates = arguments.mapping("updates", changes)
        encoded = {name: self._encode(name, value) for name, value in updates.items()}
        return self._runs.run(commands.SetVariables(self._session_id, encoded, atomic=True))

    def _encode(self, name: str, value: object) -> Value:
        def find_type() -> str | None:
            variable = self._find(name)
            return None if variable is None else variable.type

        return values.encode_for(value, find_type, name=name)

    def history(self, name: str, limit: int = 0) -> _Versions:
        """Return the newest `limit` versions (0: 100), newest first. `dspex_persist.decode` returns their values."""
        return self._runs.run(commands.GetVariableHistory(self._session_id, name, limit))

    def rollback(self, name: str, version: int) -> Any:
        """Write the value of an earlier version as a new version, and return it."""
        return decode(self._runs.run(commands.RollbackVariable(self._session_id, name, version)))

    def list(self, pattern: str = "") -> tuple[Variable, ...]:
        """Return the variables whose name matches a glob with `*` and `?` ("": all), oldest first."""
        return self._runs.run(commands.ListVariables(self._session_id, pattern))

    def _find(self, name: object) -> Variable | None:
        if not isinstance(name, str):
            return None
        return self._runs.run(commands.GetVariables(self._session_id, (name,))).variables.get(name)

    # The methods of a mapping. Those about several variables use one consistent read.

    def __getitem__(self, name: str) -> Any:
        try:
            return decode(self.describe(name))
        except VariableNotFoundError as error:
            raise KeyError(_missing(error)) from None

    def __setitem__(self, name: str, value: object) -> None:
        self.set(name, value)

    def __delitem__(self, name: str) -> None:
        self.delete(name)

    def __contains__(self, name: object) -> bool:
        return self._find(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter([variable.name for variable in self.list()])

    def __len__(self) -> int:
        return len(self.list())

    def get(self, name: str, default: Any = None) -> Any:
        """Return the variable's value, or `default` if there is no such variable."""
        variable = self._find(name)
        return default if variable is None else decode(variable)

    def items(self) -> ItemsView[str, Any]:
        """Names and values."""
        return self.get_all().items()

    def values(self) -> ValuesView[Any]:
        """The values."""
        return self.get_all().values()

    def update(self, changes: Any = (), /, **more: Any) -> None:
        """Write several values in one commit, or raise an error and write none; see `set_all`."""
        try:
            merged = dict(changes, **more)
        except (TypeError, ValueError):
            kind = type(changes).__name__
            raise InvalidArgumentError("updates", f"it must be a mapping, such as a dict, not {kind}") from None
        self.set_all(merged)


class Mapped(MutableMapping[str, Any]):
    """An object with variables that is used as the mapping of them."""

    variables: VariableMapping

    def __getitem__(self, name: str) -> Any:
        return self.variables[name]

    def __setitem__(self, name: str, value: object) -> None:
        self.variables[name] = value

    def __delitem__(self, name: str) -> None:
        del self.variables[name]

    def __contains__(self, name: object) -> bool:
        return name in self.variables

    def __iter__(self) -> Iterator[str]:
        return iter(self.variables)

    def __len__(self) -> int:
        return len(self.variables)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the variable's value, or `default` if there is no such variable."""
        return self.variables.get(name, default)

    def items(self) -> ItemsView[str, Any]:
        """Return names and values, in one consistent read."""
        return self.variables.items()

    def values(self) -> ValuesView[Any]:
        """Return the values, in one consistent read."""
        return self.variables.values()

    def update(self, changes: Any = (), /, **more: Any) -> None:
        """Write several values in one commit, or raise an error and write none."""
        self.variables.update(changes, **more)

    # It represents a session: true even without variables, and equal only to itself.

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


class Variables(VariableMapping):
    """The variables of a session of a provider. With a durable provider, a write is durable when it returns."""

    def __init__(self, provider: StateProvider, session_id: str) -> None:
        super().__init__(provider, session_id)
        self._provider = provider

    def watch(self, *names: str, after_sequence: int | None = None) -> Watch:
        """Watch the variables with these names, or all; see `StateProvider.watch`."""
        return self._provider.watch(self._session_id, names, after_sequence=after_sequence)


def _missing(error: VariableNotFoundError, advice: str = "") -> str:
    hints = " Or ".join(filter(None, (error.hint, advice)))
    return f"{error.identifier}; {hints}" if hints else error.identifier
