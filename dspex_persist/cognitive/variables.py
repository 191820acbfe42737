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
    """Whatever carries commands out: a provider at once, a tool's execution inside its transaction."""

    def run(self, command: Command[R]) -> R:
        """The command's result, or a `StateError`."""


def decode(record: Variable | VariableVersion) -> Any:
    """The value of a variable, or of an entry of its history, as a Python object; None for a deletion."""
    return None if record.value is None else values.decode(record.type, record.value)


class VariableMapping(MutableMapping[str, Any]):
    """`variables["temperature"]` reads, `variables["temperature"] = 0.9` writes, `del` deletes.

    Only variables that were defined can be written: their type and constraints hold for every value. A name that the
    session does not have is a KeyError, as in any mapping; everything else that is refused is a `StateError`. What is
    read is a copy: changing it changes nothing until it is written. Types are known at run time only, hence Any.
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
        if type_name is None:
            type_name = values.infer_type(value, name=name)
        type_name = arguments.text("type_name", type_name)
        encoded = values.encode(value, type_name, name=name)
        text = values.constraints_json(name, constraints)
        command = commands.RegisterVariable(self._session_id, name, type_name, encoded, text, metadata or {})
        return self._runs.run(command)

    def describe(self, name: str) -> Variable:
        """The variable itself: type, version, constraints, metadata, who holds it."""
        return self._runs.run(commands.GetVariable(self._session_id, name))

    def set(
        self,
        name: str,
        value: object,
        *,
        metadata: Mapping[str, str] | None = None,
        expected_version: int | None = None,
    ) -> int:
        """Write a value; the new version. With `expected_version` only if that is the version now."""
        try:
            encoded = values.encode_for(value, lambda: self.describe(name).type, name=name)
            command = commands.SetVariable(self._session_id, name, encoded, metadata or {}, expected_version)
            return self._runs.run(command)
        except VariableNotFoundError as error:
            raise KeyError(_missing(error, f"define it first: define({name!r}, ...)")) from None

    def delete(self, name: str) -> None:
        """Delete the variable; its history stays."""
        try:
            self._runs.run(commands.DeleteVariable(self._session_id, name))
        except VariableNotFoundError as error:
            raise KeyError(_missing(error)) from None

    def get_all(self, *names: str) -> dict[str, Any]:
        """The values of several variables as of one moment (none named: of all)."""
        if not names:
            return {variable.name: decode(variable) for variable in self.list()}
        found = self._runs.run(commands.GetVariables(self._session_id, names))
        if found.missing:
            raise KeyError(", ".join(found.missing))
        return {name: decode(variable) for name, variable in found.variables.items()}

    def set_all(self, changes: Mapping[str, object]) -> Mapping[str, int]:
        """Write several values, all of them or, with an `InvalidArgumentError` that says why, none; the versions."""
        outcome = self.update_all(changes)
        if not outcome.success:
            raise InvalidArgumentError("updates", "; ".join(outcome.errors.values()))
        return outcome.versions

    def update_all(self, changes: Mapping[str, object]) -> BatchOutcome:
        """Write several values in one commit, all or none of them. The outcome says what was wrong."""
        given = arguments.mapping("updates", changes)
        encoded = {name: self._encode(name, value) for name, value in given.items()}
        return self._runs.run(commands.SetVariables(self._session_id, encoded, atomic=True))

    def _encode(self, name: str, value: object) -> Value:
        def find_type() -> str | None:
            variable = self._find(name)
            return None if variable is None else variable.type

        return values.encode_for(value, find_type, name=name)

    def history(self, name: str, limit: int = 0) -> _Versions:
        """The newest versions, newest first; 0 means 100. `dspex_persist.decode` gives the value of each."""
        return self._runs.run(commands.GetVariableHistory(self._session_id, name, limit))

    def rollback(self, name: str, version: int) -> Any:
        """Write the value of an earlier version as a new version; that value."""
        return decode(self._runs.run(commands.RollbackVariable(self._session_id, name, version)))

    def list(self, pattern: str = "") -> tuple[Variable, ...]:
        """The variables whose name fits a glob of `*` and `?`; "" means all. Oldest first."""
        return self._runs.run(commands.ListVariables(self._session_id, pattern))

    def _find(self, name: object) -> Variable | None:
        if not isinstance(name, str):
            return None
        return self._runs.run(commands.GetVariables(self._session_id, (name,))).variables.get(name)

    # What a mapping has. What says something of several variables does so as of one moment.

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
        """The variable's value, or `default` where there is none."""
        variable = self._find(name)
        return default if variable is None else decode(variable)

    def items(self) -> ItemsView[str, Any]:
        """Names and values."""
        return self.get_all().items()

    def values(self) -> ValuesView[Any]:
        """The values."""
        return self.get_all().values()

    def update(self, changes: Any = (), /, **more: Any) -> None:
        """Write several values in one commit, all of them or, with an error that says why, none: `set_all`."""
        try:
            merged = dict(changes, **more)
        except (TypeError, ValueError):
            kind = type(changes).__name__
            raise InvalidArgumentError("updates", f"it must be a mapping, such as a dict, not {kind}") from None
        self.set_all(merged)


class Mapped(MutableMapping[str, Any]):
    """What has variables, and can be used as the mapping of them."""

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
        """The variable's value, or `default` where there is none."""
        return self.variables.get(name, default)

    def items(self) -> ItemsView[str, Any]:
        """Names and values, as of one moment."""
        return self.variables.items()

    def values(self) -> ValuesView[Any]:
        """The values, as of one moment."""
        return self.variables.values()

    def update(self, changes: Any = (), /, **more: Any) -> None:
        """Write several values in one commit, all of them or, with an error that says why, none."""
        self.variables.update(changes, **more)

    # It stands for a session, which is there also without variables, and is no other one with the same.

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


class Variables(VariableMapping):
    """The variables of a session, seen through its provider: each write is durable when it returns."""

    def __init__(self, provider: StateProvider, session_id: str) -> None:
        super().__init__(provider, session_id)
        self._provider = provider

    def watch(self, *names: str, after_sequence: int | None = None) -> Watch:
        """Watch the variables of these names (none: all); see `StateProvider.watch`."""
        return self._provider.watch(self._session_id, names, after_sequence=after_sequence)


def _missing(error: VariableNotFoundError, advice: str = "") -> str:
    todo = " Or ".join(filter(None, (error.hint, advice)))
    return f"{error.identifier}; {todo}" if todo else error.identifier
