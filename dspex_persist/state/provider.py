"""StateProvider: the interface of all backends that store session state. The layers above use only this.

Requirements, which the contract suites in `dspex_persist.testing` test for every backend:

- `submit` returns at once. Its future resolves with the command's result after the writes are durable, or with a
  `StateError`, and then nothing was written; only after `OutcomeUnknownError` is that unknown.
- A command takes effect as a whole or not at all. A command submitted after another one resolved takes effect after
  it, so a read sees the writes that were acknowledged before.
- A watch delivers whole commits, in order, each exactly once.

Every backend can do this. Abilities that only some have, such as audits or tools, are in `abilities`.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import Any, ClassVar, Final, NoReturn, Protocol, Self, TypeAlias, TypedDict, TypeVar, Unpack

from dspex_persist.infra.mailbox import LoopMailbox, Reply
from dspex_persist.state import arguments, commands, values
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import InvalidArgumentError, StateError, VariableNotFoundError
from dspex_persist.state.model import (
    BatchOutcome,
    Origin,
    Rule,
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


KEEP: Final = object()
"""Stands for the current value of a variable."""
TOOL_TIMEOUT_S = 300.0
"""How long a caller waits for a tool by default, in seconds."""


Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with a description of the step or of its result so far, the amount done, and the total (0 if unknown)."""


def silent(_what: str, _done: int, _in_all: int) -> None:
    """Ignore progress: the default."""


def fault_of(command: object, origin: object) -> StateError | None:
    """Return the error for invalid arguments of `submit`, or None; the same for every backend."""
    if not isinstance(command, Command):
        return InvalidArgumentError("command", f"it must be a Command, not {type(command).__name__}")
    if command.fault is None and origin is not None:
        try:
            arguments.origin(origin)
        except StateError as error:
            return error
    return command.fault


def check_watch(session_id: object, identifiers: object, after_sequence: object) -> tuple[str, ...]:
    """Check the arguments of `watch`, and return the identifiers."""
    arguments.text("session_id", session_id)
    if after_sequence is not None:
        arguments.sequence("after_sequence", after_sequence)
    return arguments.texts("identifiers", identifiers)


class Who(TypedDict, total=False):
    """Who makes a request, and why: keyword arguments of every method that writes.

    Attributes:
        actor: Who makes the changes, such as `user:alice`; by default the actor of the provider.
        reason: Why, in at most 500 characters. It is kept with each version that the call writes: the history, audits
            and watches show it.
    """

    actor: str | None
    reason: str | None


class SubmitHere(Protocol):
    """Runs a command for a coroutine of one event loop, which awaits the reply."""

    def __call__(self, command: Command[R], origin: Origin | None = None) -> Reply[R]: ...


class Submits(ABC):
    """Runs commands: the part of a provider that tool execution needs."""

    @abstractmethod
    def submit(self, command: Command[R], origin: Origin | None = None) -> Future[R]:
        """Submit a command to be carried out.

        Args:
            command: The command.
            origin: Who makes the request; the provider's default if None.

        Returns:
            A future for the result, which fails with a `StateError` if the command fails.
        """

    def on_loop(self, mailbox: LoopMailbox) -> SubmitHere:
        """Return a `submit` for coroutines of the mailbox's loop, to be called on that loop only.

        Providers override it where they can save thread switches.
        """
        return lambda command, origin=None: mailbox.reply(self.submit(command, origin))


class Capable:
    """The base of classes that say what a backend can do.

    Attributes:
        gives: The names of what the class stands for; see `StateProvider.capabilities`.
    """

    gives: ClassVar[tuple[str, ...]] = ()


class StateProvider(Submits, Capable):
    """Session state in any backend. Usable from any thread; close it when done, for example with a `with` block.

    `submit` carries out any command. The methods named after the commands wait for the result, and raise a
    `StateError` if the command fails. Those with an `idempotency_key` take effect only once for a key: a repeated call
    returns the recorded result, or raises `IdempotencyConflictError` if it is a different request. All that write take
    `actor` and `reason`: who makes the change, and why (see `Who`).
    """

    gives: ClassVar[tuple[str, ...]] = ("atomic_batches", "watch", "history")

    @property
    def capabilities(self) -> frozenset[str]:
        """What the backend can do.

        - `atomic_batches`, `watch`, `history`: every backend.
        - `transactions`, `tools`: `begin_transaction`, `execute_tool`.
        - `audit`, `recordings`, `imports`, `forks`, `restores`, `pruning`: the whole history can be queried, a session
          exported, imported, begun with the state of another one, or brought back to an earlier state, old history
          deleted.
        - `durable`: what was acknowledged survives the end of the process that stores it.
        - `remote`: it is in another process. `distributed`: on several machines.
        """
        kinds = type(self).__mro__
        return frozenset(name for kind in kinds for name in vars(kind).get("gives", ()))

    @property
    def url(self) -> str:
        """Its address, as for `dspex_persist.connect`; "" if no other connection can reach it."""
        return ""

    def read_ahead(self, command: Command[Any], origin: Origin | None = None) -> bool:
        """Parse the command's large values on this thread, so that no other caller waits for it after `submit`.

        After this, `submit` may fail with `VariableReplacedError`: when the command's turn came, a name meant another
        variable than the one for which the value was parsed. Then call this and `submit` again.

        Returns:
            Whether there was anything to parse.
        """
        return False

    @abstractmethod
    def watch(self, session_id: str, identifiers: Sequence[str] = (), *, after_sequence: int | None = None) -> Watch:
        """Watch variables of a session.

        Args:
            session_id: The session.
            identifiers: Names or ids of variables; empty for all variables.
            after_sequence: Resume after this commit: the watch delivers every later one, without initial values.

        Raises:
            SessionNotFoundError: The session does not exist, or has ended.
            VariableNotFoundError: The session never had one of the variables.
            InvalidArgumentError: `after_sequence` is ahead of the store.
        """

    @abstractmethod
    def close(self) -> None:
        """Release all resources; everything acknowledged stays. Closing twice is harmless."""

    def discard(self) -> None:
        """Close it, because what it was opened for has failed: delete the files that opening it created.

        Files that somebody else has written to since then stay, and so does everything that existed before.
        """
        self.close()

    @abstractmethod
    def check_open(self) -> None:
        """Raise the `StateError` with which calls fail if the provider was closed, or has failed."""

    @abstractmethod
    def default_origin(self, cause: str, idempotency_key: str | None = None) -> Origin:
        """Return the origin of requests for which the caller gives none."""

    def origin(
        self,
        cause: str,
        idempotency_key: str | None = None,
        *,
        actor: str | None = None,
        reason: str | None = None,
    ) -> Origin:
        """Return the origin of a request, for `submit`.

        Args:
            cause: The operation: `command.cause`.
            idempotency_key: With the same key, the request takes effect only once.
            actor: Who makes it; None for the provider's default.
            reason: Why; see `Who`.
        """
        origin = self.default_origin(cause, idempotency_key)
        if actor is not None:
            origin = replace(origin, actor=arguments.text("actor", actor))
        return origin if reason is None else replace(origin, reason=arguments.reason("reason", reason))

    def run(self, command: Command[R], idempotency_key: str | None = None, **who: Unpack[Who]) -> R:
        """Carry out a command, and wait for its result."""
        return self.submit(command, self.origin(command.cause, idempotency_key, **who)).result()

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled, for example to be sent to a process of a pool."""
        raise TypeError(
            "a state cannot be copied, pickled, or sent to another process: connect() there; "
            "processes share a file through a server: connect('grpc://HOST:PORT')"
        )

    # One blocking method for each command

    def initialize_session(
        self,
        session_id: str,
        metadata: Mapping[str, str] | None = None,
        *,
        idempotency_key: str | None = None,
        **who: Unpack[Who],
    ) -> SessionView:
        """Begin a session, or resume the live one with this id.

        Args:
            session_id: The session's id.
            metadata: Texts to store with the session.
            idempotency_key: See the class.
            who: `actor` and `reason`, see `Who`.

        Returns:
            The session's variables, and whether it was resumed.
        """
        return self.run(commands.InitializeSession(session_id, or_empty(metadata)), idempotency_key, **who)

    def get_session(self, session_id: str) -> SessionSummary:
        """Return a summary of the session."""
        return self.run(commands.GetSession(session_id))

    def heartbeat(self, session_id: str) -> bool:
        """Renew the session's TTL; return whether the session is live."""
        return self.run(commands.Heartbeat(session_id))

    def cleanup_session(self, session_id: str, *, idempotency_key: str | None = None, **who: Unpack[Who]) -> int:
        """End the session, and return how many variables it had. Its history stays."""
        return self.run(commands.CleanupSession(session_id), idempotency_key, **who)

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
        **who: Unpack[Who],
    ) -> str:
        """Register a variable.

        Args:
            session_id: The session.
            name: The variable's name, which no other live variable of the session has.
            type_name: The name of its value type, such as "float".
            initial_value: Its value at version 0.
            constraints: A mapping, or its JSON; which ones there are depends on the type.
            metadata: Texts to store with the variable.
            idempotency_key: See the class.
            who: `actor` and `reason`, see `Who`.

        Returns:
            The variable's id.
        """
        type_name = arguments.text("type_name", type_name)
        text = values.constraints_json(name, constraints)
        value = values.encode(initial_value, type_name, name=name)
        command = commands.RegisterVariable(session_id, name, type_name, value, text, or_empty(metadata))
        return self.run(command, idempotency_key, **who)

    def register_variables(
        self,
        session_id: str,
        definitions: Sequence[commands.RegisterVariable],
        *,
        idempotency_key: str | None = None,
        **who: Unpack[Who],
    ) -> tuple[str, ...]:
        """Register several variables in one commit, all or none of them.

        Args:
            session_id: The session.
            definitions: One command for each variable.
            idempotency_key: See the class.
            who: `actor` and `reason`, see `Who`.

        Returns:
            The ids of the variables.
        """
        return self.run(commands.RegisterVariables(session_id, tuple(definitions)), idempotency_key, **who)

    def get_variable(self, session_id: str, identifier: str) -> Variable:
        """Return a variable by name or id."""
        return self.run(commands.GetVariable(session_id, identifier))

    def get_value(self, session_id: str, identifier: str) -> Any:
        """Return a variable's value as a Python object."""
        variable = self.get_variable(session_id, identifier)
        return values.decode(variable.type, variable.value)

    def get_variables(self, session_id: str, identifiers: Sequence[str]) -> VariablesFound:
        """Return several variables as of one moment, by name or id."""
        return self.run(commands.GetVariables(session_id, identifiers))

    def list_variables(self, session_id: str, pattern: str = "") -> tuple[Variable, ...]:
        """Return the variables whose name matches a glob with `*` and `?`, oldest first; "" matches all."""
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
        **who: Unpack[Who],
    ) -> int:
        """Write a value.

        Args:
            session_id: The session.
            identifier: The variable's name or id.
            value: The value.
            metadata: Texts to store with the version, which are also merged into the variable's metadata.
            expected_version: Write only if this is the current version; otherwise `VersionConflictError` is raised.
            idempotency_key: See the class.
            who: `actor` and `reason`, see `Who`.

        Returns:
            The number of the new version.
        """
        encoded = self._encode(session_id, identifier, value)
        command = commands.SetVariable(session_id, identifier, encoded, or_empty(metadata), expected_version)
        return self.run(command, idempotency_key, **who)

    def set_variables(
        self,
        session_id: str,
        updates: Mapping[str, object],
        *,
        metadata: Mapping[str, str] | None = None,
        atomic: bool = False,
        idempotency_key: str | None = None,
        **who: Unpack[Who],
    ) -> BatchOutcome:
        """Write several values, by name or id, in one commit.

        Args:
            session_id: The session.
            updates: The values, by names or ids.
            metadata: Texts to store with each version.
            atomic: Whether to write nothing if one value is invalid; otherwise the valid ones are written.
            idempotency_key: See the class.
            who: `actor` and `reason`, see `Who`.
        """
        objects = arguments.mapping("updates", updates)
        encoded = {identifier: self._encode(session_id, identifier, value) for identifier, value in objects.items()}
        return self.run(commands.SetVariables(session_id, encoded, or_empty(metadata), atomic), idempotency_key, **who)

    def _encode(self, session_id: str, identifier: str, value: object) -> Value:
        """Encode a value for the variable's type, which is looked up only if the encoding depends on it."""

        def find_type() -> str | None:
            try:
                return self.get_variable(session_id, identifier).type
            except VariableNotFoundError:
                return None  # The write fails with the same error.

        return values.encode_for(value, find_type, name=identifier)

    def delete_variable(
        self, session_id: str, identifier: str, *, idempotency_key: str | None = None, **who: Unpack[Who]
    ) -> None:
        """Delete a variable; its history stays."""
        self.run(commands.DeleteVariable(session_id, identifier), idempotency_key, **who)

    def get_variable_history(self, session_id: str, identifier: str, limit: int = 0) -> list[VariableVersion]:
        """Return the newest `limit` versions of a variable, newest first; 0 means 100."""
        return self.run(commands.GetVariableHistory(session_id, identifier, limit))

    def rollback_variable(
        self,
        session_id: str,
        identifier: str,
        target_version: int,
        *,
        idempotency_key: str | None = None,
        **who: Unpack[Who],
    ) -> Variable:
        """Write the value of an earlier version as a new version; return the variable."""
        return self.run(commands.RollbackVariable(session_id, identifier, target_version), idempotency_key, **who)

    def constrain_variable(
        self,
        session_id: str,
        identifier: str,
        constraints: str | Mapping[str, Any] | None,
        value: object = KEEP,
        *,
        metadata: Mapping[str, str] | None = None,
        expected_version: int | None = None,
        idempotency_key: str | None = None,
        **who: Unpack[Who],
    ) -> int:
        """Give a variable other constraints and a value that satisfies them, in one commit.

        If the constraints have another `schema_version`, the cause of the commit is that migration, such as
        `migration profile 1->2`.

        Args:
            session_id: The session.
            identifier: The variable's name or id.
            constraints: The new constraints, as for `register_variable`.
            value: The new value; if omitted, the current value has to satisfy the constraints.
            metadata: Texts to store with the version, which are also merged into the variable's metadata.
            expected_version: Change it only if this is the current version.
            idempotency_key: See the class.
            who: `actor` and `reason`, see `Who`.

        Returns:
            The number of the new version; that of the current one if nothing changes.
        """
        text = values.constraints_json(identifier, constraints)
        encoded = None if value is KEEP else self._encode(session_id, identifier, value)
        facts = (session_id, identifier, text, encoded, or_empty(metadata), expected_version)
        return self.run(commands.ConstrainVariable(*facts), idempotency_key, **who)

    def add_rule(
        self,
        session_id: str,
        name: str,
        expression: str,
        description: str = "",
        *,
        replace: bool = False,
        idempotency_key: str | None = None,
        **who: Unpack[Who],
    ) -> None:
        """Add a rule, which holds after every commit from then on. Adding the same one again changes nothing.

        Args:
            session_id: The session.
            name: The rule's name.
            expression: An expression of the Common Expression Language over the session's variables, such as
                `max_tokens <= context_window - 500`.
            description: What it is for; errors contain it.
            replace: Whether it may replace another rule of its name.
            idempotency_key: See the class.
            who: `actor` and `reason`, see `Who`.

        Raises:
            InvalidRuleError: It cannot be checked, or does not hold now.
            RuleExistsError: There is another rule of this name.
        """
        self.run(commands.AddRule(session_id, name, expression, description, replace), idempotency_key, **who)

    def remove_rule(
        self, session_id: str, name: str, *, idempotency_key: str | None = None, **who: Unpack[Who]
    ) -> None:
        """Remove a rule, or raise `RuleNotFoundError`."""
        self.run(commands.RemoveRule(session_id, name), idempotency_key, **who)

    def list_rules(self, session_id: str) -> tuple[Rule, ...]:
        """Return the rules of a session by name."""
        return self.run(commands.ListRules(session_id))

    def add_dependency(
        self,
        session_id: str,
        from_variable: str,
        to_variable: str,
        dependency_type: str = "",
        *,
        idempotency_key: str | None = None,
        **who: Unpack[Who],
    ) -> None:
        """Declare that `from_variable` depends on `to_variable`; both are names or ids."""
        command = commands.AddDependency(session_id, from_variable, to_variable, dependency_type)
        self.run(command, idempotency_key, **who)

    def remove_dependency(
        self,
        session_id: str,
        from_variable: str,
        to_variable: str,
        dependency_type: str = "",
        *,
        idempotency_key: str | None = None,
        **who: Unpack[Who],
    ) -> bool:
        """Declare that `from_variable` no longer depends on `to_variable`; return whether it did."""
        command = commands.RemoveDependency(session_id, from_variable, to_variable, dependency_type)
        return self.run(command, idempotency_key, **who)

    def get_dependencies(
        self, session_id: str, identifier: str, *, dependents: bool = False, transitive: bool = False
    ) -> tuple[str, ...]:
        """Return the names of the variables on which one depends, each after those that it depends on itself.

        Args:
            session_id: The session.
            identifier: The variable's name or id.
            dependents: Return those that depend on it instead.
            transitive: Include indirect dependencies.
        """
        return self.run(commands.GetDependencies(session_id, identifier, dependents, transitive))

    def start_optimization(
        self,
        session_id: str,
        identifier: str,
        optimizer_id: str,
        config: Mapping[str, str] | None = None,
        *,
        idempotency_key: str | None = None,
        **who: Unpack[Who],
    ) -> str:
        """Lock a variable for an optimizer, and return the id of the optimization."""
        command = commands.StartOptimization(session_id, identifier, optimizer_id, or_empty(config))
        return self.run(command, idempotency_key, **who)

    def stop_optimization(
        self,
        session_id: str,
        identifier: str,
        force: bool = False,
        *,
        idempotency_key: str | None = None,
        **who: Unpack[Who],
    ) -> Value:
        """Remove the lock of a variable, and return its value. `force` also removes another optimizer's lock."""
        return self.run(commands.StopOptimization(session_id, identifier, force), idempotency_key, **who)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Closing may wait for a disk or a server.
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def or_empty(mapping: Mapping[str, V] | None) -> Mapping[str, V]:
    """Return the mapping, or an empty one for None."""
    return {} if mapping is None else mapping
