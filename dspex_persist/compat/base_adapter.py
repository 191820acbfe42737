"""BaseAdapter and `@tool`: how adapters of existing workers are written, and how their tools run here."""

import asyncio
import inspect
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from dspex_persist.cognitive.errors import ToolLoadError
from dspex_persist.cognitive.tool_context import ToolContext
from dspex_persist.cognitive.toolbox import Toolbox
from dspex_persist.compat.session_context import SessionContext
from dspex_persist.state import values
from dspex_persist.state.bridge.stubs import registration, registration_request
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import ToolParameter, ToolSpec, Value
from dspex_persist.state.tools.ports import ToolKind
from dspex_persist.state.tools.session import ToolSession

F = TypeVar("F", bound=Callable[..., Any])

_log: Final = logging.getLogger(__name__)

_METADATA: Final = "_tool_metadata"
_TYPES: Final[Mapping[object, str]] = {
    bool: "boolean",
    int: "integer",
    float: "float",
    str: "string",
    list: "list",
    dict: "map",
}


@dataclass
class ToolMetadata:
    """What `@tool` says of a method."""

    description: str = ""
    supports_streaming: bool = False
    parameters: list[dict[str, Any]] = field(default_factory=list)
    required_variables: list[str] = field(default_factory=list)


def tool(
    description: str = "", supports_streaming: bool = False, required_variables: Iterable[str] | None = None
) -> Callable[[F], F]:
    """Make a method of an adapter a tool: `@tool(description="...")`.

    Args:
        description: What it does; by default its docstring.
        supports_streaming: Whether it returns a generator.
        required_variables: The variables that the session must have before it starts.
    """

    def decorate(function: F) -> F:
        said = description or inspect.getdoc(function) or ""
        setattr(function, _METADATA, ToolMetadata(said, supports_streaming, [], list(required_variables or ())))
        return function

    return decorate


class BaseAdapter:
    """The base of adapters: its methods with `@tool` are its tools.

    Attributes:
        session_context: The session in which a tool runs; None outside.
    """

    session_context: SessionContext | None = None

    def set_session_context(self, session_context: SessionContext) -> None:
        """Say in which session the next tool runs."""
        self.session_context = session_context

    def get_tools(self) -> list[Any]:
        """Return the descriptions of its tools: messages of the bridge protocol, for RegisterTools."""
        return [registration(spec) for spec in _specs_of(type(self))]

    def call_tool(self, tool_name: str, /, **arguments: Any) -> Any:
        """Call one of its tools, here and now.

        Raises:
            AttributeError: It has no such tool.
        """
        if not _is_tool(type(self), tool_name):
            raise AttributeError(f"tool {tool_name!r} not found in {type(self).__name__}")
        return getattr(self, tool_name)(**arguments)

    def register_with_session(self, session_id: str, stub: Any) -> list[str]:
        """Register its tools for a session.

        Args:
            session_id: The session.
            stub: A stub of the server.

        Returns:
            The names of the tools; none of them if that fails, which is logged.
        """
        request = registration_request(session_id, f"python-{id(self)}", self.get_tools())
        try:
            return self._registered(request, stub.RegisterTools(request))
        except Exception as error:  # noqa: BLE001 -- whatever the stub raises
            return self._not_registered(error)

    async def register_with_session_async(self, session_id: str, stub: Any) -> list[str]:
        """Do the same with an asynchronous stub."""
        request = registration_request(session_id, f"python-{id(self)}", self.get_tools())
        try:
            answer = stub.RegisterTools(request)
            return self._registered(request, await answer if inspect.isawaitable(answer) else answer)
        except Exception as error:  # noqa: BLE001 -- whatever the stub raises
            return self._not_registered(error)

    def _registered(self, request: Any, answer: Any) -> list[str]:
        if not answer.success:
            return self._not_registered(answer.error_message)
        return [each.name for each in request.tools]

    def _not_registered(self, reason: object) -> list[str]:
        _log.error("the tools of %s were not registered: %s", type(self).__name__, reason)
        return []


class ThreadSafeAdapter(BaseAdapter):
    """The base of adapters whose tools may run on several threads at once."""

    __thread_safe__ = True

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()
        self._local = threading.local()

    @contextmanager
    def acquire_lock(self) -> Iterator[None]:
        """Let one thread at a time into a block."""
        with self._lock:
            yield

    def get_thread_local(self, key: str, default: Any = None) -> Any:
        """Return what this thread has set; the default if it has not."""
        return vars(self._local).get(key, default)

    def set_thread_local(self, key: str, value: Any) -> None:
        """Keep something for this thread."""
        vars(self._local)[key] = value

    def clear_thread_local(self, key: str | None = None) -> None:
        """Forget what this thread has set under a key, or all of it."""
        if key is None:
            vars(self._local).clear()
        else:
            vars(self._local).pop(key, None)


def thread_safe_method(function: F) -> F:
    """Mark a method as one that may run on several threads at once. It changes nothing."""
    return function


# Their tools here


def toolbox(adapter: type[Any], commands: Iterable[str] = ()) -> Toolbox:
    """Return the tools of an adapter, for `connect`, `Context` and `serve --tools`, whose executions are transactions.

    Each execution has an instance of its own: it is told the session (`set_session_context`), initialized if it can be
    (`initialize`), and runs the tool by its `execute_tool(tool_name, arguments, context)` or, without that, by the
    method. What the tool reads and writes in the session is one transaction.

    Args:
        adapter: The class of the adapter.
        commands: What `execute_tool` can execute in addition to the methods with `@tool`.

    Raises:
        ToolLoadError: The adapter has no tools.
    """
    if not isinstance(adapter, type):
        raise ToolLoadError(repr(adapter), "give the class of the adapter: each execution has an instance of its own")
    specs = [*_specs_of(adapter), *(ToolSpec(name, f"A command of {adapter.__name__}.") for name in commands)]
    if not specs:
        raise ToolLoadError(f"{adapter.__module__}.{adapter.__qualname__}", "no method has @tool: name its commands")
    return _Tools(adapter, specs)


class _Tools(Toolbox):
    def __init__(self, adapter: type[Any], specs: Iterable[ToolSpec]) -> None:
        super().__init__()
        found: Any = [AdapterTool(adapter, spec) for spec in specs]
        self._add(f"{adapter.__module__}.{adapter.__qualname__}", found)


class AdapterTool:
    """A tool of an adapter, as the runner sees it; see `ToolCode`."""

    reads_plainly = True
    result_type = ""
    requires = None
    needs_instance = False

    def __init__(self, adapter: type[Any], spec: ToolSpec) -> None:
        self.spec = spec
        self.kind = ToolKind.GENERATOR if spec.streaming else ToolKind.FUNCTION
        self._adapter = adapter

    @property
    def origin(self) -> str:
        """Where it is."""
        return f"{self._adapter.__module__}.{self._adapter.__qualname__}.{self.spec.name}"

    def bind(self, parameters: Mapping[str, Value], _limits: Limits | None = None) -> Mapping[str, object]:
        """Decode the parameters. The adapter's own code checks them."""
        return {name: values.decode_loosely(value) for name, value in parameters.items()}

    def start(self, session: ToolSession, arguments: Mapping[str, object]) -> Any:
        """Run the tool on this thread; asynchronous code has an event loop of its own there."""
        return self._stream(session, arguments) if self.spec.streaming else self._run(session, arguments)

    def recording_lm(self) -> "AdapterTool":
        """Return the same tool: what it asks of language models is not recorded."""
        return self

    def _run(self, session: ToolSession, arguments: Mapping[str, object]) -> Any:
        with asyncio.Runner() as runner:
            result = self._begin(runner, session, arguments)
            chunks = _chunks(runner, result)
            return result if chunks is None else list(chunks)

    def _stream(self, session: ToolSession, arguments: Mapping[str, object]) -> Iterator[Any]:
        with asyncio.Runner() as runner:
            result = self._begin(runner, session, arguments)
            chunks = _chunks(runner, result)
            yield from [result] if chunks is None else chunks

    def _begin(self, runner: asyncio.Runner, session: ToolSession, arguments: Mapping[str, object]) -> Any:
        adapter, context = self._adapter(), SessionContext(ToolContext(session))
        if hasattr(adapter, "set_session_context"):
            adapter.set_session_context(context)
        else:
            adapter.session_context = context
        if hasattr(adapter, "initialize"):
            _result(runner, adapter.initialize())
        name = self.spec.name
        if hasattr(adapter, "execute_tool"):
            return _result(runner, adapter.execute_tool(tool_name=name, arguments=dict(arguments), context=context))
        return _result(runner, getattr(adapter, name)(**arguments))


def _result(runner: asyncio.Runner, returned: Any) -> Any:
    """Return a result, after waiting for it if it is one to be awaited."""
    return runner.run(_awaited(returned)) if inspect.isawaitable(returned) else returned


async def _awaited(returned: Awaitable[Any]) -> Any:
    return await returned


def _chunks(runner: asyncio.Runner, result: Any) -> Iterator[Any] | None:
    """Return the chunks of a stream; None if it is none."""
    if inspect.isasyncgen(result):
        return map(_content, _iterated(runner, result))
    return map(_content, result) if inspect.isgenerator(result) else None


def _iterated(runner: asyncio.Runner, stream: Any) -> Iterator[Any]:
    while True:
        try:
            yield runner.run(_awaited(anext(stream)))
        except StopAsyncIteration:
            return


def _content(chunk: Any) -> Any:
    """Return what is in a chunk: adapters may put it into an object that says whether it is the last one."""
    return chunk.data if hasattr(chunk, "data") and hasattr(chunk, "is_final") else chunk


# What they say of themselves


def _names_of(adapter: type[Any]) -> list[str]:
    """Return the names of the tools, in the order of their definition."""
    names = {name: None for base in reversed(adapter.__mro__) for name in vars(base)}
    return [name for name in names if _is_tool(adapter, name)]


def _is_tool(adapter: type[Any], name: str) -> bool:
    return hasattr(getattr(adapter, name, None), _METADATA)


def _specs_of(adapter: type[Any]) -> list[ToolSpec]:
    return [_spec(name, getattr(adapter, name)) for name in _names_of(adapter)]


def _spec(name: str, function: Any) -> ToolSpec:
    metadata: ToolMetadata = getattr(function, _METADATA)
    # The first is `self`.
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return ToolSpec(
        name,
        metadata.description,
        tuple(_parameter(each) for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)),
        streaming=metadata.supports_streaming,
        required_variables=tuple(metadata.required_variables),
    )


def _parameter(parameter: inspect.Parameter) -> ToolParameter:
    kind = getattr(parameter.annotation, "__origin__", parameter.annotation)
    default = None
    if parameter.default is not parameter.empty:
        try:
            default = Value(json.dumps(parameter.default, allow_nan=False))
        except (TypeError, ValueError):
            # It is described as optional, without what it is then.
            default = None
    return ToolParameter(
        parameter.name, _TYPES.get(kind, "any"), "", required=parameter.default is parameter.empty, default=default
    )
