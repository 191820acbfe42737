"""StateProvider: the seam. Whatever keeps session state is reached through it, and nothing above knows more.

Obligations of every backend, held by the contract suites in `dspex_persist.testing`:

- `submit` returns at once. Its future resolves with the command's result only after what was written is durable, or
  with a `StateError`, and then nothing was written; only `OutcomeUnknownError` leaves that open.
- Commands take effect whole or not at all, and one that is submitted after another resolved comes after it: a read
  then sees that write.
- A watch tells whole commits, in order, none twice and none missing.

This is what every backend can do. What only some can do, such as audits or tools, is in `abilities`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self, TypeAlias, TypeVar

from dspex_persist.state import arguments, commands, values
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import InvalidArgumentError, StateError, VariableNotFoundError
from dspex_persist.state.model import (
    BatchOutcome,
    Origin,
    SessionSummary,
    SessionView,
    Value,
    Variable,
    VariablesFound,
    VariableVersion,
)
from dspex_persist.state.watch import Watch

R = TypeVar("R")
V = TypeVar("V")


TOOL_TIMEOUT_S = 300.0
"""How long a tool may take whose caller does not say."""


Progress: TypeAlias = Callable[[str, int, int], None]
"""Told what is being done, or has come of it, how much of it is done, and how much there is (0: not known)."""


def silent(_what: str, _done: int, _in_all: int) -> None:
    """The progress of whoever does not ask for it."""


def fault_of(command: object, origin: object) -> StateError | None:
    """What is wrong with what a caller submits, before anything is done about it; alike for every backend."""
    if not isinstance(command, Command):
        return InvalidArgumentError("command", f"it must be a Command, not {type(command).__name__}")
    if command.fault is None and origin is not None:
        try:
            arguments.origin(origin)
        except InvalidArgumentError as error:
            return error
    return command.fault


def check_watch(session_id: object, identifiers: object, after_sequence: object) -> tuple[str, ...]:
    """Raise for what is wrong with the arguments of `watch`; its identifiers."""
    arguments.text("session_id", session_id)
    if after_sequence is not None:
        arguments.sequence("after_sequence", after_sequence)
    return arguments.texts("identifiers", identifiers)


class Submit(Protocol):
    """Has a command carried out, as `StateProvider.submit` does, for those who need no more of a provider."""

    def __call__(self, command: Command[R], origin: Origin) -> "Future[R]": ...


class StateProvider(ABC):
    """Session state, wherever it is kept. Usable from any thread."""

    @abstractmethod
    def submit(self, command: Command[R], origin: Origin | None = None) -> Future[R]:
        """Have the command carried out. `origin` says who asks; the default is the provider's own."""

    def read_ahead(self, command: Command[Any], origin: Origin | None = None) -> bool:
        """Read the values that a command brings, on this thread, so that nobody else waits for that when it is
        submitted; whether there was anything to read.

        `submit` may then fail with `VariableReplacedError`: by its turn a value was for another variable than the one
        that it was read for. Read it again, and submit it again. Whoever does not call this never gets that error.
        """
        return False

    @abstractmethod
    def watch(self, session_id: str, identifiers: Sequence[str] = (), *, after_sequence: int | None = None) -> Watch:
        """Watch variables by name or id (none named: all of the session's).

        With `after_sequence` the watch resumes: it tells every commit after that one, and has no initial values.
        Raises `SessionNotFoundError`, `VariableNotFoundError` for an identifier that the session never had,
        `InvalidArgumentError` for a sequence that is ahead of the store.
        """

    @abstractmethod
    def close(self) -> None:
        """Let everything go; what was acknowledged stays. Closing twice does nothing."""

    @abstractmethod
    def check_open(self) -> None:
        """Raise the `StateError` with which calls fail once the provider was closed, or has ended by itself."""

    @abstractmethod
    def default_origin(self, cause: str, idempotency_key: str | None = None) -> Origin:
        """Who asks where the caller does not say."""

    def run(self, command: Command[R], idempotency_key: str | None = None) -> R:
        """Have the command carried out, and wait for its result."""
        return self.submit(command, self.default_origin(command.cause, idempotency_key)).result()

    def __reduce__(self) -> NoReturn:
        """Other processes, such as those of a pool, are sent pickles; there is no state in one."""
        raise TypeError(
            "a state cannot be copied, pickled, or sent to another process: connect() there; "
            "processes share a file through a server: connect('grpc://HOST:PORT')"
        )

    # The commands by name, for callers that wait

    def initialize_session(
        self,
        session_id: str,
        metadata: Mapping[str, str] | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> SessionView:
        """Begin a session, or resume the one of this id."""
        return self.run(commands.InitializeSession(session_id, or_empty(metadata)), idempotency_key)

    def get_session(self, session_id: str) -> SessionSummary:
        """The session's own facts."""
        return self.run(commands.GetSession(session_id))

    def heartbeat(self, session_id: str) -> bool:
        """Whether the session lives; begins its TTL anew."""
        return self.run(commands.Heartbeat(session_id))

    def cleanup_session(self, session_id: str, *, idempotency_key: str | None = None) -> int:
        """End the session; how many variables went with it."""
        return self.run(commands.CleanupSession(session_id), idempotency_key)

    def register_variable(
        self,
        session_id: str,
        name: str,
        type_name: str,
        initial_value: object,
        *,
        constraints: str | Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> str:
        """Register a variable; its id. `constraints`: a mapping, or its JSON."""
        type_name = arguments.text("type_name", type_name)
        text = values.constraints_json(name, constraints)
        value = values.encode(initial_value, type_name, name=name)
        command = commands.RegisterVariable(session_id, name, type_name, value, text, or_empty(metadata))
        return self.run(command, idempotency_key)

    def get_variable(self, session_id: str, identifier: str) -> Variable:
        """A variable by name or id."""
        return self.run(commands.GetVariable(session_id, identifier))

    def get_value(self, session_id: str, identifier: str) -> Any:
        """A variable's value as a Python object; its type is known at run time only, hence Any."""
        variable = self.get_variable(session_id, identifier)
        return values.decode(variable.type, variable.value)

    def get_variables(self, session_id: str, identifiers: Sequence[str]) -> VariablesFound:
        """Several variables as of one moment."""
        return self.run(commands.GetVariables(session_id, identifiers))

    def list_variables(self, session_id: str, pattern: str = "") -> tuple[Variable, ...]:
        """The variables whose name fits a glob of `*` and `?`; "" means all. Oldest first."""
        return self.run(commands.ListVariables(session_id, pattern))

    def set_variable(
        self,
        session_id: str,
        identifier: str,
        value: object,
        *,
        metadata: Mapping[str, str] | None = None,
        expected_version: int | None = None,
        idempotency_key: str | None = None,
    ) -> int:
        """Write a value; the new version. With `expected_version` only if that is the version now."""
        encoded = self._encode(session_id, identifier, value)
        command = commands.SetVariable(session_id, identifier, encoded, or_empty(metadata), expected_version)
        return self.run(command, idempotency_key)

    def set_variables(
        self,
        session_id: str,
        updates: Mapping[str, object],
        *,
        metadata: Mapping[str, str] | None = None,
        atomic: bool = False,
        idempotency_key: str | None = None,
    ) -> BatchOutcome:
        """Write several values in one commit: all or none if `atomic`, else those that are valid."""
        given = arguments.mapping("updates", updates)
        encoded = {identifier: self._encode(session_id, identifier, value) for identifier, value in given.items()}
        return self.run(commands.SetVariables(session_id, encoded, or_empty(metadata), atomic), idempotency_key)

    def _encode(self, session_id: str, identifier: str, value: object) -> Value:
        """The value as the variable's type has it, which is asked for only where it makes a difference."""

        def find_type() -> str | None:
            try:
                return self.get_variable(session_id, identifier).type
            except VariableNotFoundError:
                return None  # Writing it says so.

        return values.encode_for(value, find_type, name=identifier)

    def delete_variable(self, session_id: str, identifier: str, *, idempotency_key: str | None = None) -> None:
        """Delete a variable; its history stays."""
        self.run(commands.DeleteVariable(session_id, identifier), idempotency_key)

    def get_variable_history(self, session_id: str, identifier: str, limit: int = 0) -> list[VariableVersion]:
        """The newest versions, newest first; 0 means 100."""
        return self.run(commands.GetVariableHistory(session_id, identifier, limit))

    def rollback_variable(
        self, session_id: str, identifier: str, target_version: int, *, idempotency_key: str | None = None
    ) -> Variable:
        """Write the value of an earlier version as a new version."""
        return self.run(commands.RollbackVariable(session_id, identifier, target_version), idempotency_key)

    def add_dependency(
        self,
        session_id: str,
        from_variable: str,
        to_variable: str,
        dependency_type: str = "",
        *,
        idempotency_key: str | None = None,
    ) -> None:
        """Say that `from_variable` depends on `to_variable`."""
        command = commands.AddDependency(session_id, from_variable, to_variable, dependency_type)
        self.run(command, idempotency_key)

    def start_optimization(
        self,
        session_id: str,
        identifier: str,
        optimizer_id: str,
        config: Mapping[str, str] | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> str:
        """Lock a variable for an optimizer; the optimization's id."""
        command = commands.StartOptimization(session_id, identifier, optimizer_id, or_empty(config))
        return self.run(command, idempotency_key)

    def stop_optimization(
        self, session_id: str, identifier: str, force: bool = False, *, idempotency_key: str | None = None
    ) -> Value:
        """Take the lock off; the variable's value."""
        return self.run(commands.StopOptimization(session_id, identifier, force), idempotency_key)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def or_empty(mapping: Mapping[str, V] | None) -> Mapping[str, V]:
    """The mapping that a caller gives, or an empty one."""
    return {} if mapping is None else mapping
