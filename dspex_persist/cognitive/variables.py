"""The verbs of a session's variables, which a context, a tool's context and a transaction share."""

from abc import abstractmethod
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from dspex_persist.cognitive import typed
from dspex_persist.cognitive.describing import History
from dspex_persist.cognitive.handles import Variable
from dspex_persist.cognitive.mapping import Attributes, VariableMapping
from dspex_persist.cognitive.optimizing import Optimization, Status
from dspex_persist.cognitive.records import DESCRIPTION, HistoryEntry, VariableInfo, decode
from dspex_persist.cognitive.steps import Runs, Step, Steps, Terms, as_argument, ask, run, verb, work
from dspex_persist.cognitive.watching import Watchers
from dspex_persist.state import arguments, commands, values
from dspex_persist.state.errors import (
    InvalidArgumentError,
    UnsupportedError,
    VariableNotFoundError,
    VariableReplacedError,
    VersionConflictError,
)
from dspex_persist.state.model import BatchOutcome, Value
from dspex_persist.state.model import Variable as Record
from dspex_persist.state.provider import StateProvider

__all__ = ["Definition", "Variables", "decode"]

RETRIES = 100
"""How often `update` repeats by default when others write the variable meanwhile."""

T = TypeVar("T")

# In the class below, `list` is a method.
_Entries = History
_Infos = tuple[VariableInfo, ...]


@dataclass(frozen=True)
class Definition:
    """What `define_many` takes for a variable; see `Variables.define`.

    Attributes:
        value: The initial value.
        type_name: Its type; by default it is inferred from `value`.
        constraints: The constraints that every value must satisfy, by keyword.
        description: What it is for.
        metadata: Its metadata.
    """

    value: object
    type_name: str | None = None
    constraints: Mapping[str, Any] | None = None
    description: str | None = None
    metadata: Mapping[str, str] | None = None

    def command(self, session_id: str, name: str, holder: object = None) -> commands.RegisterVariable:
        """Return the command that defines the variable; `holder` is the context that asks for it."""
        type_name = self.type_name if self.type_name is not None else values.infer_type(self.value, name=name)
        type_name = arguments.text("type_name", type_name)
        encoded = values.encode(self.value, type_name, name=name)
        text = values.constraints_json(name, self.constraints)
        values.check_keywords(name, type_name, self.constraints)
        if typed.is_model(type(self.value)):
            text = typed.use(session_id, name, type(self.value), holder).constraints(self.constraints)
        facts = {} if self.metadata is None else self.metadata
        if self.description is not None:
            described = arguments.text("description", self.description)
            facts = {**arguments.mapping("metadata", facts), DESCRIPTION: described}
        return commands.RegisterVariable(session_id, name, type_name, encoded, text, facts)


class _TypeNeededError(Exception):
    """How a value is encoded depends on the variable's type."""


def _need_type() -> NoReturn:
    raise _TypeNeededError


class Variables(Runs):
    """A session's variables: verbs to define, read, write and query them, and `[]`.

    Each verb can be called, or awaited by its `aio`: `ctx.set("x", 1)`, `await ctx.set.aio("x", 1)`. `[]`, `in`, `del`,
    iteration and `variables` are synchronous only.

    Reads return copies: changing one has no effect until you write it back. An unknown name raises
    `VariableNotFoundError`, which is a `KeyError`.

    Attributes:
        session_id: The id of the session.
        strict: Whether assigning to a name that is not defined is an error; otherwise it defines a variable.
    """

    session_id: str
    strict: bool

    @abstractmethod
    def _run_step(self, step: Step) -> Any:
        """See `Runs`."""

    @abstractmethod
    async def _run_step_aio(self, step: Step) -> Any:
        """See `Runs`."""

    @property
    def _provider(self) -> StateProvider | None:
        """The provider that a context reads from; None for what is part of an execution."""
        return None

    # Verbs

    @verb
    def define(
        self,
        name: str,
        value: object = typed.UNSTATED,
        *,
        model: type[Any] | None = None,
        type_name: str | None = None,
        constraints: Mapping[str, Any] | None = None,
        description: str | None = None,
        metadata: Mapping[str, str] | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> Steps[str]:
        """Define a variable. If it exists with the same type and constraints, leave it as it is.

        Args:
            name: The name of the variable.
            value: Its initial value; with a model, the default of the model if omitted.
            model: A pydantic model, which every value must then fit, and which reads return; by default the class of
                `value` if that is a model. A value that an older version of the model wrote is migrated. See
                `typed.migration`.
            type_name: Its type; by default it is inferred from `value`.
            constraints: The constraints that every value must satisfy, by keyword: those that the type has.
            description: What it is for. It is kept in the metadata.
            metadata: Its metadata.
            reason: Why it is defined.
            actor: Who defines it; by default the actor of the context.

        Returns:
            The id of the variable.

        Raises:
            StateError: The value or the constraints are invalid, or the variable exists with others.
        """
        if model is None and typed.is_model(type(value)):
            model = type(value)
        if model is not None:
            terms = terms_of(actor, reason)
            return (yield from typed.define(self, name, value, model, constraints, description, metadata, terms))
        if value is typed.UNSTATED:
            raise InvalidArgumentError("value", "it is missing: give a value, or a model that has a default")
        definition = Definition(value, type_name, constraints, description, metadata)
        command = definition.command(self.session_id, name)
        return (yield from ask(command, terms_of(actor, reason)))

    @verb
    def define_many(
        self,
        definitions: Mapping[str, object],
        *,
        reason: str | None = None,
        actor: str | None = None,
    ) -> Steps[Mapping[str, str]]:
        """Define several variables in one commit, all or none of them.

        Args:
            definitions: By name, the initial value or a `Definition`, which has more than a value.
            reason: Why they are defined.
            actor: Who defines them; by default the actor of the context.

        Returns:
            The ids of the variables by name.

        Raises:
            StateError: One of them cannot be defined; see `define`.
        """
        given = arguments.mapping("definitions", definitions)
        if not given:
            return {}
        known = {name: each if isinstance(each, Definition) else Definition(each) for name, each in given.items()}
        for name in known:
            arguments.text("name", name)
        with typed.undone_on_error(self.session_id, known):
            command = commands.RegisterVariables(
                self.session_id, tuple(each.command(self.session_id, name, self) for name, each in known.items())
            )
            ids = yield from ask(command, terms_of(actor, reason))
        return dict(zip(known, ids, strict=True))

    @verb
    def get(self, name: str, default: Any = None) -> Steps[Any]:
        """Return the variable's value, or `default` if there is no variable of this name."""
        if not isinstance(name, str):
            return default
        try:
            found = yield from ask(commands.GetVariables(self.session_id, (name,)))
        except InvalidArgumentError as error:
            error.field = "name"
            raise
        record = found.variables.get(name)
        if record is not None and record.name in typed.names:
            return (yield from typed.read(self, record))
        return default if record is None else decode(record)

    @verb
    def get_many(self, *names: str) -> Steps[dict[str, Any]]:
        """Return the values of these variables by name, as of one moment. Unknown names are left out.

        Without names it returns all variables.
        """
        if not names:
            everything = yield from ask(commands.ListVariables(self.session_id))
            return (yield from self._decode_all({record.name: record for record in everything}))
        found = yield from ask(commands.GetVariables(self.session_id, names))
        return (yield from self._decode_all(found.variables))

    def _decode_all(self, records: Mapping[str, Record]) -> Steps[dict[str, Any]]:
        if not typed.names:
            return {name: decode(record) for name, record in records.items()}
        decoded = {}
        for name, record in records.items():
            decoded[name] = (yield from typed.read(self, record)) if record.name in typed.names else decode(record)
        return decoded

    @verb
    def info(self, name: str) -> Steps[VariableInfo]:
        """Return the variable itself: its type, version, constraints, metadata, lock.

        Raises:
            VariableNotFoundError: There is no such variable.
        """
        return VariableInfo((yield from ask(commands.GetVariable(self.session_id, name))))

    @verb
    def list(self, pattern: str = "") -> Steps[_Infos]:
        """Return the variables whose name matches a glob with `*` and `?` ("": all), oldest first."""
        found = yield from ask(commands.ListVariables(self.session_id, pattern))
        return tuple(VariableInfo(record) for record in found)

    @verb
    def set(
        self,
        name: str,
        value: object,
        *,
        create: bool = False,
        metadata: Mapping[str, str] | None = None,
        expected_version: int | None = None,
        reason: str | None = None,
        actor: str | None = None,
        idempotency_key: str | None = None,
    ) -> Steps[int]:
        """Write a value.

        Args:
            name: The name of the variable.
            value: The new value.
            create: Define the variable if there is none of this name, with the type inferred from `value`.
            metadata: The metadata of the new version.
            expected_version: Write only if this is the current version.
            reason: Why it is written. The history keeps it.
            actor: Who writes; by default the actor of the context.
            idempotency_key: With the same key, the value is written only once.

        Returns:
            The new version.

        Raises:
            VariableNotFoundError: There is no such variable.
            VersionConflictError: The current version is not `expected_version`.
            StateError: The value is invalid, or the variable is locked.
        """
        terms = terms_of(actor, reason, idempotency_key)
        arguments.flag("create", create)
        try:
            encoded = yield from self._encode(name, value)
            command = commands.SetVariable(
                self.session_id, name, encoded, {} if metadata is None else metadata, expected_version
            )
            return (yield from ask(command, terms))
        except VariableNotFoundError as error:
            if not create:
                error.hint = _advice(error, name)
                raise
        return (yield from self._create(name, value, metadata, terms_of(actor, reason)))

    def _create(self, name: str, value: object, metadata: Mapping[str, str] | None, terms: Terms | None) -> Steps[int]:
        if name in typed.names and (known := typed.find(self.session_id, name)) is not None:
            yield from typed.define(self, name, value, known.model, None, None, metadata, terms)
            return 0
        encoded, facts = values.encode(value, name=name), {} if metadata is None else metadata
        type_name = values.infer_type(value, name=name)
        yield from ask(commands.RegisterVariable(self.session_id, name, type_name, encoded, "", facts), terms)
        record = yield from ask(commands.GetVariable(self.session_id, name))
        if record.version == 0 and decode(record) == decode(record._replace(value=encoded)):
            return 0
        # Others have defined it in the meantime; registering it then writes nothing.
        encoded = yield from self._encode(name, value)
        return (yield from ask(commands.SetVariable(self.session_id, name, encoded, facts), terms))

    def _encode(self, name: str, value: object, *, must_exist: bool = True) -> Steps[Value]:
        """Encode a value for a variable; one that need not exist has no type then, and the write says that."""
        if name in typed.names:
            value = yield from typed.prepared(self, name, value)
        try:
            return values.encode_for(value, _need_type, name=name)
        except _TypeNeededError:
            pass
        if must_exist:
            record: Record | None = yield from ask(commands.GetVariable(self.session_id, name))
        else:
            record = (yield from ask(commands.GetVariables(self.session_id, (name,)))).variables.get(name)
        return values.encode(value, None if record is None else record.type, name=name)

    @verb
    def update(
        self,
        name: str,
        function: Callable[[Any], Any],
        *,
        retries: int = RETRIES,
        reason: str | None = None,
        actor: str | None = None,
    ) -> Steps[Any]:
        """Write what a function makes of the current value, atomically.

        If others write the variable in the meantime, the function is called again with their value.

        Args:
            name: The name of the variable.
            function: Takes the value and returns the new one. From asyncio it runs in a thread; a coroutine function
                is awaited.
            retries: How often to call it again at most.
            reason: Why it is written.
            actor: Who writes; by default the actor of the context.

        Returns:
            The new value.

        Raises:
            VariableNotFoundError: There is no such variable.
            VersionConflictError: Others wrote the variable during each of the attempts.
        """
        arguments.function("function", function, also_async=True)
        terms, left = terms_of(actor, reason), arguments.repetitions("retries", retries)
        while True:
            record = yield from ask(commands.GetVariable(self.session_id, name))
            value, version = decode(record), record.version
            known = typed.find(self.session_id, record.name) if record.name in typed.names else None
            if known is not None:
                value, version = yield from typed.read_current(self, record)
            result = yield from work(function, value)
            if known is not None:
                result = known.instance(name, result)
            encoded = values.encode_for(result, lambda type_name=record.type: type_name, name=name)  # type: ignore[misc]
            command = commands.SetVariable(self.session_id, name, encoded, {}, version)
            try:
                yield from ask(command, terms)
            except (VersionConflictError, VariableReplacedError):
                if left <= 0:
                    raise
                left -= 1
            else:
                return values.decode(record.type, encoded) if known is None else result

    @verb
    def update_many(
        self,
        changes: Mapping[str, object],
        *,
        atomic: bool = True,
        metadata: Mapping[str, str] | None = None,
        reason: str | None = None,
        actor: str | None = None,
        idempotency_key: str | None = None,
    ) -> Steps[BatchOutcome]:
        """Write several values in one commit.

        Args:
            changes: The values by name.
            atomic: Write all of them or none, and raise the error of one that is refused, as `set` does. Otherwise
                those that are valid are written.
            metadata: The metadata of the new versions.
            reason: Why they are written.
            actor: Who writes; by default the actor of the context.
            idempotency_key: With the same key, they are written only once.

        Returns:
            The outcome: `versions` by name and, unless `atomic`, `errors` by name.

        Raises:
            VariableNotFoundError: `atomic`, and there is no such variable; nothing was written.
            RuleViolatedError: `atomic`, and a rule of the session would not hold; nothing was written.
            StateError: `atomic`, and a value is invalid, or a variable locked; nothing was written.
        """
        encoded = {}
        for name, value in arguments.mapping("changes", changes).items():
            encoded[name] = yield from self._encode(name, value, must_exist=False)
        facts = {} if metadata is None else metadata
        command = commands.SetVariables(
            self.session_id, encoded, facts, arguments.flag("atomic", atomic), raises=atomic
        )
        try:
            outcome = yield from ask(command, terms_of(actor, reason, idempotency_key))
        except VariableNotFoundError as error:
            error.hint = _advice(error, error.identifier)
            raise
        if atomic and not outcome.success:
            # The outcome that was recorded under the key, or the answer of a server that raises nothing.
            raise InvalidArgumentError("changes", "; ".join(dict.fromkeys(outcome.errors.values())))
        return outcome

    @verb
    def _write_many(self, changes: Mapping[str, object]) -> Steps[None]:
        """Write several values as `ctx.variables.update` does: what is not defined is defined, unless strict.

        New variables are defined in a commit of their own, after the others were written.
        """
        given = arguments.mapping("changes", changes)
        new: set[str] = set()
        if not self.strict and given:
            found = yield from ask(commands.GetVariables(self.session_id, tuple(given)))
            new = set(found.missing)
        known = {name: value for name, value in given.items() if name not in new}
        if known:
            yield from self.update_many._steps(known)
        yield from self.define_many._steps({name: value for name, value in given.items() if name in new})

    @verb
    def delete(self, name: str, *, reason: str | None = None, actor: str | None = None) -> Steps[None]:
        """Delete the variable. Its history is kept.

        Raises:
            VariableNotFoundError: There is no such variable.
        """
        yield from ask(commands.DeleteVariable(self.session_id, name), terms_of(actor, reason))

    @verb
    def history(self, name: str, limit: int = 0, *, before: int | None = None) -> Steps[_Entries]:
        """Return versions of a variable, newest first.

        Args:
            name: The name of the variable, which may have been deleted.
            limit: How many versions at most; 0 means 100.
            before: Only versions with lower numbers.
        """
        entries = yield from ask(commands.GetVariableHistory(self.session_id, name, limit, before))
        return History(HistoryEntry(entry) for entry in entries)

    @verb
    def rollback(self, name: str, version: int, *, reason: str | None = None, actor: str | None = None) -> Steps[Any]:
        """Write the value of an earlier version as a new version, and return it.

        Raises:
            VariableNotFoundError: There is no such variable.
            VersionNotFoundError: It never had this version.
        """
        command = commands.RollbackVariable(self.session_id, name, version)
        record = yield from ask(command, terms_of(actor, reason))
        return (yield from typed.read(self, record)) if record.name in typed.names else decode(record)

    # Dependencies

    @verb
    def depends_on(
        self, name: str, *others: str, kind: str = "", reason: str | None = None, actor: str | None = None
    ) -> Steps[None]:
        """Declare that a variable depends on others. Whoever watches it is told when one of them changes.

        Args:
            name: The name of the variable.
            others: The names of those on which it depends.
            kind: In which way, in your words.
            reason: Why.
            actor: Who says so; by default the actor of the context.

        Raises:
            VariableNotFoundError: There is no such variable.
            DependencyCycleError: It would depend on itself.
        """
        for other in arguments.texts("others", others):
            yield from ask(commands.AddDependency(self.session_id, name, other, kind), terms_of(actor, reason))

    @verb
    def remove_dependency(
        self, name: str, other: str, *, kind: str = "", reason: str | None = None, actor: str | None = None
    ) -> Steps[bool]:
        """Declare that a variable does not depend on another one any more, and return whether it did.

        Raises:
            VariableNotFoundError: There is no such variable.
        """
        command = commands.RemoveDependency(self.session_id, name, other, kind)
        return (yield from ask(command, terms_of(actor, reason)))

    @verb
    def dependencies(self, name: str, *, transitive: bool = False) -> Steps[tuple[str, ...]]:
        """Return the names of the variables on which one depends, each after those that it depends on itself.

        Args:
            name: The name of the variable.
            transitive: Include indirect dependencies.
        """
        return (yield from ask(commands.GetDependencies(self.session_id, name, False, transitive)))

    @verb
    def dependents(self, name: str, *, transitive: bool = False) -> Steps[tuple[str, ...]]:
        """Return the names of the variables that depend on one, each after those that it depends on itself.

        Args:
            name: The name of the variable.
            transitive: Include indirect dependencies.
        """
        return (yield from ask(commands.GetDependencies(self.session_id, name, True, transitive)))

    # Optimization

    def optimize(
        self,
        name: str,
        config: Mapping[str, object] | None = None,
        *,
        optimizer_id: str | None = None,
        wait_s: float = 0.0,
        force: bool = False,
    ) -> Optimization:
        """Lock a variable while an optimizer tries values for it. Others can read it meanwhile, but not write it.

        Use it in a `with` or `async with` block:

            with ctx.optimize("temperature", {"target": "accuracy"}) as run:
                for iteration, value in enumerate(candidates):
                    run.report(iteration, value, {"accuracy": score(value)})

        Args:
            name: The name of the variable.
            config: What the optimizer was started with. It is kept with the lock.
            optimizer_id: The name of the optimizer; by default one is made up. A lock with the same name is renewed.
            wait_s: How long to wait for the end of another's lock, in seconds.
            force: Break another's lock if it still holds after `wait_s`; the history says so.

        Returns:
            The optimization, which begins with the block.
        """
        return Optimization(self, self.session_id, name, config, optimizer_id, wait_s, force)

    @verb
    def optimization(self, name: str) -> Steps[Status | None]:
        """Return the status of the optimization that has locked a variable; None if there is none.

        Raises:
            VariableNotFoundError: There is no such variable.
        """
        record = yield from ask(commands.GetVariable(self.session_id, name))
        return None if record.optimization is None else Status(record.optimization)

    # As a mapping

    @property
    def v(self) -> Attributes:
        """The variables as attributes: `ctx.v.temperature`."""
        return Attributes(self)

    def handle(self, name: str, kind: type[T]) -> Variable[T]:
        """Return a handle of a variable, with the type of its values.

        Args:
            name: The name of the variable, which need not be defined yet.
            kind: The type: bool, int, float, str, list, dict, or anything that pydantic can validate, such as
                `list[float]` or a model.
        """
        return Variable(self, arguments.text("name", name), kind)

    @property
    def _watchers(self) -> Watchers:
        """The watches, of a context only: a transaction sees no changes of others."""
        raise UnsupportedError("watching inside a transaction", "watch with the context, outside")

    @property
    def variables(self) -> VariableMapping:
        """The variables as a mapping that behaves like a dict."""
        return VariableMapping(self)

    @variables.setter
    def variables(self, mapping: VariableMapping) -> None:
        # `ctx.variables |= {...}` assigns what it has updated.
        given: object = mapping
        if not isinstance(given, VariableMapping) or not given._is_of(self):
            raise AttributeError("the variables cannot be replaced: update them, or use |=")

    def __getitem__(self, name: str) -> Any:
        try:
            record = self._run_step(commands.GetVariable(self.session_id, name))
        except InvalidArgumentError as error:
            raise as_argument(error) from None
        return run(self, typed.read(self, record)) if record.name in typed.names else decode(record)

    def __setitem__(self, name: str, value: object) -> None:
        self.set(name, value, create=not self.strict)

    def __delitem__(self, name: str) -> None:
        self.delete(name)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        try:
            return bool(self._run_step(commands.GetVariables(self.session_id, (name,))).variables)
        except InvalidArgumentError as error:
            error.field = "name"
            raise

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self._run_step(commands.ListVariables(self.session_id)))

    def names(self) -> Sequence[str]:
        """Return the names of all variables, oldest first."""
        return [record.name for record in self._run_step(commands.ListVariables(self.session_id))]

    def keys(self) -> KeysView[str]:
        """Return the names of all variables, as of one moment."""
        return dict.fromkeys(self.names()).keys()

    def items(self) -> ItemsView[str, Any]:
        """Return names and values, as of one moment."""
        return self.get_many().items()

    def values(self) -> ValuesView[Any]:
        """Return the values, as of one moment."""
        return self.get_many().values()

    # It stands for a session: true even without variables, and equal only to itself.

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def terms_of(actor: str | None, reason: str | None, idempotency_key: str | None = None) -> Terms | None:
    """Return the terms of a command; None for the default."""
    if actor is None and reason is None and idempotency_key is None:
        return None
    return Terms(actor, reason, idempotency_key)


def _advice(error: VariableNotFoundError, name: str) -> str:
    return " Or ".join(filter(None, (error.hint, f"define it first: define({name!r}, ...)")))
