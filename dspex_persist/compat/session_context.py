"""SessionContext: a session as adapters of existing workers know it."""

import contextvars
import copy
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from enum import StrEnum
from types import TracebackType
from typing import Any, Final, Generic, ParamSpec, Self, TypeVar

from dspex_persist.cognitive.callbacks import Subscription
from dspex_persist.cognitive.changes import Change
from dspex_persist.cognitive.context import Context
from dspex_persist.cognitive.tool_context import ToolContext
from dspex_persist.cognitive.variables import Variables
from dspex_persist.errors import DspexError
from dspex_persist.infra.threads import is_on_loop, on_new_thread
from dspex_persist.state.abilities import ExecutesTools
from dspex_persist.state.bridge.stubs import StubState, in_old_terms, is_stub
from dspex_persist.state.errors import (
    InvalidArgumentError,
    InvalidValueError,
    RuleViolatedError,
    StateError,
    UnsupportedError,
    VariableLockedError,
)
from dspex_persist.state.model import ToolSpec
from dspex_persist.state.provider import StateProvider

P = ParamSpec("P")
T = TypeVar("T")

_log: Final = logging.getLogger(__name__)

Callback = Callable[[str, Any, Any, Mapping[str, str]], object]
"""What is called with a change: the name, the old value, the new one, and the metadata of the new version."""


class VariableType(StrEnum):
    """The types of variables."""

    FLOAT = "float"
    INTEGER = "integer"
    STRING = "string"
    BOOLEAN = "boolean"
    CHOICE = "choice"
    MODULE = "module"
    EMBEDDING = "embedding"
    TENSOR = "tensor"
    MAP = "map"
    LIST = "list"

    def to_proto(self) -> str:
        """Return its name in messages."""
        return self.value

    @classmethod
    def from_proto(cls, proto_type: str) -> "VariableType":
        """Return the type of a name in messages; STRING for an unknown one."""
        names = [each.value for each in cls]
        return cls(proto_type.lower()) if proto_type.lower() in names else cls.STRING


class VariableProxy(Generic[T]):
    """One variable of a session. Assign to `value`, or read it, as often as you like.

    Attributes:
        name: The name of the variable, or its id.
    """

    def __init__(self, context: "SessionContext", name: str) -> None:
        self._context = context
        self.name = name

    @property
    def value(self) -> T:
        """The value. Assigning writes it."""
        value: T = self._context.get_variable(self.name)
        return value

    @value.setter
    def value(self, value: T) -> None:
        self._context.update_variable(self.name, value)

    def __repr__(self) -> str:
        return f"<Variable {self.name}>"


class VariableNamespace:
    """A session's variables as attributes: `ctx.v.temperature`."""

    __slots__ = ("_context",)
    _context: "SessionContext"

    def __init__(self, context: "SessionContext") -> None:
        object.__setattr__(self, "_context", context)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            # Python looks for many of these, which are no variables.
            raise AttributeError(name)
        return self._context.get_variable(name)

    def __setattr__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise AttributeError(f"{name!r} begins with an underscore: write it with ctx[{name!r}] = ...")
        self._context[name] = value


class BatchUpdater:
    """Values that are written together.

    Attributes:
        updates: What is not written yet: the values by the names of their variables.
    """

    def __init__(self, context: "SessionContext") -> None:
        self._context = context
        self.updates: dict[str, Any] = {}

    def __setitem__(self, name: str, value: object) -> None:
        self.updates[name] = value

    def commit(self, atomic: bool = True) -> dict[str, bool | str]:
        """Write them, and forget them. At the end of the block this is done by itself.

        Args:
            atomic: Write all or none, and raise if one is refused.

        Returns:
            For each variable True or, unless `atomic`, why its value was refused.
        """
        updates, self.updates = self.updates, {}
        return self._context._write(updates, atomic=atomic, metadata=None)


class ElixirTool(dict[str, Any]):
    """A tool that is exposed to workers: its `name`, `description` and `parameters`. It can be called."""

    def __init__(self, context: "SessionContext", spec: ToolSpec) -> None:
        parameters = {each.name: each.type for each in spec.parameters}
        super().__init__(name=spec.name, description=spec.description, parameters=parameters)
        self.__name__ = spec.name
        self.__doc__ = spec.description
        self._context = context

    def __call__(self, **arguments: Any) -> Any:
        return self._context.call_elixir_tool(self["name"], **arguments)


def _old_terms(method: Callable[P, T]) -> Callable[P, T]:
    """Have a method raise errors that are what existing programs catch."""

    @functools.wraps(method)
    def wrapped(*args: P.args, **options: P.kwargs) -> T:
        try:
            return method(*args, **options)
        except StateError as error:
            raise in_old_terms(error)  # noqa: B904 -- it is the same error

    return wrapped


class SessionContext:
    """A session, with the methods that adapters of existing workers are written against.

    It may be used from several threads. Errors are those of this package, and in addition what such adapters catch: a
    wrong value, type or argument is a ValueError, an unknown variable a KeyError, anything else a RuntimeError; all are
    a `grpc.RpcError` with `code()` and `details()`.

    Args:
        stub: Where the session is: a stub of the bridge protocol or a `grpc.Channel`, which stay open; an address or a
            provider (see `dspex_persist.Context`); or the `Context` or `ToolContext` of the session. An address or a
            provider begins the session, or resumes it. Over a stub or a channel it has to be there already.
        session_id: The id of the session. A `Context` or `ToolContext` knows it.
        strict_mode: Whether assigning to a name that is not registered is an error; otherwise it registers a variable.
        request_metadata: The metadata of the request that is being handled, for the adapter.

    Attributes:
        stub: What was given.
        session_id: The id of the session.
        strict_mode: See above.
        request_metadata: See above.

    Raises:
        InvalidArgumentError: An argument is wrong. It is a ValueError.
    """

    @_old_terms
    def __init__(
        self,
        stub: Any,
        session_id: str | None = None,
        strict_mode: bool = False,
        *,
        request_metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.stub = stub
        self.strict_mode = strict_mode
        self.request_metadata = dict(request_metadata or {})
        self.session_id = _session_of(stub, session_id)
        self._opening = threading.Lock()
        self._opened: Variables | None = stub if isinstance(stub, Variables) else None
        self._proxies: dict[str, VariableProxy[Any]] = {}
        self._elixir_tools: dict[str, ElixirTool] | None = None
        self._ttl_s = 0.0
        # By identifier: until when it may be used, and the value.
        self._cache: dict[str, tuple[float, Any]] = {}

    @property
    def _variables(self) -> Variables:
        """The session, which is asked for nothing before it is used."""
        if self._opened is None:
            with self._opening:
                if self._opened is None:
                    self._opened = self._open()
        return self._opened

    def _open(self, *, create: bool = True) -> Variables:
        if isinstance(self.stub, str | os.PathLike | StateProvider):
            return Context(self.session_id, self.stub, strict=True, create=create)
        return Context._on(self.session_id, StubState(self.stub))

    # Variables

    @_old_terms
    def register_variable(
        self,
        name: str,
        var_type: str | VariableType,
        initial_value: object,
        constraints: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
        ttl: timedelta | None = None,
    ) -> str:
        """Register a variable. If it is registered with the same type and constraints, it keeps its value.

        Args:
            name: The name of the variable.
            var_type: Its type, or the name of that.
            initial_value: Its value.
            constraints: What every value must satisfy, by keyword.
            metadata: Its metadata.
            ttl: It has no effect: `set_cache_ttl` sets how old values may be.

        Returns:
            The id of the variable.
        """
        type_name = str(var_type).lower()
        with self._writing():
            return self._variables.define(
                name, initial_value, type_name=type_name, constraints=constraints, metadata=metadata
            )

    @_old_terms
    def get_variable(self, identifier: str) -> Any:
        """Return the value of a variable; `VariableNotFoundError` if there is none.

        Args:
            identifier: The name of the variable, or its id.
        """
        return self._read((identifier,))[identifier]

    @_old_terms
    def get_variables(self, identifiers: Iterable[str]) -> dict[str, Any]:
        """Return the values of several variables, as of one moment; `VariableNotFoundError` if one is missing."""
        return self._read(tuple(identifiers))

    def _read(self, identifiers: tuple[str, ...]) -> dict[str, Any]:
        # A write replaces the cache: what is read meanwhile, and may be older, goes with the old one.
        now, cache = time.monotonic(), self._cache
        if self._ttl_s:
            known = {name: cache.get(name, (0.0, None)) for name in identifiers}
            if all(until > now for until, _ in known.values()):
                return {name: copy.deepcopy(value) for name, (_, value) in known.items()}
        if len(identifiers) == 1:
            found = {identifiers[0]: self._variables[identifiers[0]]}
        else:
            # Without names it would return all.
            found = self._variables.get_many(*identifiers) if identifiers else {}
            for missing in identifiers:
                if missing not in found:
                    self._variables[missing]
        if self._ttl_s:
            until = now + self._ttl_s
            cache.update({name: (until, copy.deepcopy(value)) for name, value in found.items()})
        return found

    @_old_terms
    def update_variable(self, identifier: str, new_value: object, metadata: Mapping[str, str] | None = None) -> None:
        """Write a value; `VariableNotFoundError` if there is no such variable.

        Args:
            identifier: The name of the variable, or its id.
            new_value: The value.
            metadata: The metadata of the new version.
        """
        with self._writing():
            self._variables.set(identifier, new_value, metadata=metadata)

    set_variable = update_variable

    @_old_terms
    def update_variables(
        self, updates: Mapping[str, object], atomic: bool = False, metadata: Mapping[str, str] | None = None
    ) -> dict[str, bool | str]:
        """Write several values.

        Args:
            updates: The values by the names of their variables.
            atomic: Write all or none.
            metadata: The metadata of the new versions.

        Returns:
            For each variable True, or why it was not written.
        """
        try:
            return self._write(updates, atomic=atomic, metadata=metadata)
        except (InvalidValueError, RuleViolatedError, VariableLockedError) as error:
            return dict.fromkeys(updates, str(error))

    @_old_terms
    def _write(
        self, updates: Mapping[str, object], *, atomic: bool, metadata: Mapping[str, str] | None
    ) -> dict[str, bool | str]:
        if not updates:
            return {}
        with self._writing():
            outcome = self._variables.update_many(updates, atomic=atomic, metadata=metadata)
        return {name: outcome.errors.get(name, True) for name in updates}

    @_old_terms
    def list_variables(self, pattern: str | None = None) -> list[dict[str, Any]]:
        """Return the variables whose names match a glob with `*` and `?` (None: all), oldest first.

        Returns:
            For each its `id`, `name`, `type`, `value`, `version`, `constraints`, `metadata`, and whether an optimizer
            has locked it (`optimizing`).
        """
        return [
            {
                "id": each.id,
                "name": each.name,
                "type": each.type,
                "value": each.value,
                "version": each.version,
                "constraints": dict(each.constraints),
                "metadata": dict(each.metadata),
                "optimizing": each.lock is not None,
            }
            for each in self._variables.list(pattern or "")
        ]

    @_old_terms
    def delete_variable(self, identifier: str) -> None:
        """Delete a variable; `VariableNotFoundError` if there is none."""
        with self._writing():
            self._variables.delete(identifier)
        self._proxies.pop(identifier, None)

    def variable(self, name: str) -> VariableProxy[Any]:
        """Return a proxy of a variable, which need not be registered yet."""
        return self._proxies.setdefault(name, VariableProxy(self, name))

    @property
    def v(self) -> VariableNamespace:
        """The variables as attributes: `ctx.v.temperature`."""
        return VariableNamespace(self)

    @contextmanager
    def batch_updates(self) -> Iterator[BatchUpdater]:
        """Collect values in a `with` block, and write them at its end: in one commit, all or none.

        If the block raises, nothing is written.
        """
        batch = BatchUpdater(self)
        yield batch
        batch.commit()

    def __getitem__(self, name: str) -> Any:
        return self.get_variable(name)

    @_old_terms
    def __setitem__(self, name: str, value: object) -> None:
        with self._writing():
            self._variables.set(name, value, create=not self.strict_mode)

    @_old_terms
    def __contains__(self, name: object) -> bool:
        return name in self._variables

    # A session is not a sequence, which `[]` alone would make of it.
    __iter__ = None

    # Watching

    @_old_terms
    def watch_variable(self, name: str, callback: Callback) -> Subscription:
        """Have a function called with each change of a variable, on another thread.

        Args:
            name: The name of the variable, or a glob with `*` and `?`.
            callback: Called with the name, the old value, the new one, and the metadata of the new version.

        Returns:
            The subscription; close it to end it.
        """
        return self.watch_variables((name,), callback)

    @_old_terms
    def watch_variables(self, names: Iterable[str], callback: Callback) -> Subscription:
        """Do the same for several variables; all if there are no names."""
        context = self._variables
        if not isinstance(context, Context):
            raise UnsupportedError("watching inside the execution of a tool", "watch from a program of its own")

        def tell(change: Change[Any]) -> None:
            callback(change.name, change.old, change.value, dict(change.variable.metadata))

        return context.watch(*names, on_change=tell)

    # The cache

    def set_cache_ttl(self, ttl: timedelta) -> None:
        """Let reads return values that are as old as this. At first each read returns what is there now.

        What is written with this object, or by tools that it calls, is seen at once in any case.
        """
        self._ttl_s = ttl.total_seconds()
        self.clear_cache()

    def clear_cache(self) -> None:
        """Have the next reads return what is there now."""
        self._cache = {}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.clear_cache()

    # Tools

    @_old_terms
    def call_tool(self, tool_name: str, /, **arguments: Any) -> Any:
        """Execute a tool of the session, wherever it runs, and return its result.

        In the execution of a tool it becomes part of that.
        """
        context: Any = self._variables
        call = functools.partial(context.call, tool_name, **arguments)
        with self._writing():
            # On an event loop, a tool's context would return something to await.
            return _on_thread(call) if isinstance(context, ToolContext) and is_on_loop() else call()

    @_old_terms
    def call_elixir_tool(self, tool_name: str, /, **arguments: Any) -> Any:
        """Execute a tool that the server exposes to workers; a ValueError if there is none, a RuntimeError if it fails.

        The name is that of existing workers, whose server was written in Elixir.
        """
        if tool_name not in self.elixir_tools:
            # It may be new.
            self._elixir_tools = None
        if tool_name not in self.elixir_tools:
            raise ValueError(f"tool {tool_name!r} not found; available: {list(self.elixir_tools)}")
        return self.call_tool(tool_name, **arguments)

    @property
    def elixir_tools(self) -> dict[str, ElixirTool]:
        """The tools that the server exposes to workers, by name. Empty if it cannot be asked."""
        if self._elixir_tools is None:
            try:
                specs = self._exposed()
            except StateError as error:
                _log.warning("the exposed tools cannot be listed: %s", error)
                return {}
            self._elixir_tools = {spec.name: ElixirTool(self, spec) for spec in specs}
        return self._elixir_tools

    def _exposed(self) -> list[ToolSpec]:
        context = self._variables
        if isinstance(context, ToolContext):
            return list(context._session.exposed_tools())
        if isinstance(context, Context):
            return [spec for spec in ExecutesTools.of(context.backend.provider).list_tools() if spec.exposed]
        raise UnsupportedError("the list of tools in a transaction", "ask the context, outside")

    # The end

    def cleanup(self, force: bool = False) -> None:
        """End the session, as far as this is possible, and close this object. It raises nothing.

        A tool does not end the session that it runs in.

        Args:
            force: It has no effect.
        """
        try:
            self._opened = self._opened or self._open(create=False)
            if isinstance(self._opened, Context):
                self._opened.end()
        except DspexError as error:
            _log.debug("the session was not ended: %s", error)
        self.close()

    def close(self) -> None:
        """Close what this object has opened, until it is used again. The session goes on."""
        self.clear_cache()
        self._proxies.clear()
        opened = self._opened
        if isinstance(opened, Context) and opened is not self.stub:
            self._opened = None
            opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cleanup()

    def __repr__(self) -> str:
        return f"SessionContext(session_id={self.session_id!r})"


def _on_thread(call: Callable[[], T]) -> T:
    """Call something on another thread, in the context variables of this one, and wait for it."""
    return on_new_thread(functools.partial(contextvars.copy_context().run, call), "session-context").result()


def _session_of(stub: object, session_id: str | None) -> str:
    """Return the id of the session, or raise `InvalidArgumentError`."""
    if isinstance(stub, Context | ToolContext):
        if session_id not in (None, stub.session_id):
            raise InvalidArgumentError("session_id", f"{session_id!r} is not that of {stub!r}")
        return stub.session_id
    if not (is_stub(stub) or isinstance(stub, str | os.PathLike | StateProvider | Variables)):
        reason = f"it must be a stub, a channel, an address or a provider, not {type(stub).__name__}"
        raise InvalidArgumentError("stub", reason)
    if not isinstance(session_id, str):
        raise InvalidArgumentError("session_id", f"it must be a str, not {type(session_id).__name__}")
    return session_id
