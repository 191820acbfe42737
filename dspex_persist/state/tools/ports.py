"""The ports of the runner: tools that it can run, the code of tools in this process, and calls to other processes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import RegisteredTool, ToolSpec, Value
from dspex_persist.state.tools.chunks import Emit
from dspex_persist.state.tools.session import ToolSession


class ToolKind(StrEnum):
    """What a call of a tool's code returns."""

    FUNCTION = "function"
    COROUTINE = "coroutine"
    GENERATOR = "generator"
    ASYNC_GENERATOR = "async_generator"

    @property
    def is_async(self) -> bool:
        """Whether the code needs an event loop."""
        return self in (ToolKind.COROUTINE, ToolKind.ASYNC_GENERATOR)


class RunnableTool(ABC):
    """A tool as the runner sees it, wherever its code runs. Used on the runner's home loop.

    Args:
        spec: The name, the parameters and the options of the tool.
        result_type: See `ToolCode.result_type`.
        worker_id: The worker that registered it; "" for a tool of this process.

    Attributes:
        takes_turns: Whether it follows the `Concurrency` of its session.
    """

    takes_turns = True

    def __init__(self, spec: ToolSpec, *, result_type: str = "", worker_id: str = "") -> None:
        self.spec = spec
        self.result_type = result_type
        self.worker_id = worker_id

    @property
    @abstractmethod
    def where(self) -> Mapping[str, str]:
        """Where it runs, as the metadata that a server lists with the tool."""

    def binds_at_once(self, size_bytes: int) -> bool:
        """Whether `bind` waits for nothing if the parameters have this size, so that it needs no time limit."""
        return False

    @abstractmethod
    async def bind(self, parameters: Mapping[str, Value]) -> Mapping[str, object]:
        """Convert the parameters to new arguments for one `run`.

        Raises:
            ToolArgumentError: A parameter is wrong or missing.
            LimitExceededError: A value exceeds a limit.
        """

    @abstractmethod
    async def run(self, session: ToolSession, arguments: Mapping[str, object]) -> Value:
        """Run the code in the transaction of `session`.

        It need not watch the session's `timeout_s`: the runner cancels it in time.

        Returns:
            The result, or the list of the chunks. Chunks also go to the session's `outlet`, if it has one.

        Raises:
            RaisedError: The tool's code raised.
            StateError: The engine, or the way to the tool, failed.
        """


class ToolCode(Protocol):
    """The code of a tool in this process, as the layer above provides it."""

    @property
    def spec(self) -> ToolSpec: ...

    @property
    def kind(self) -> ToolKind: ...

    @property
    def reads_plainly(self) -> bool:
        """Whether `bind` runs no code of the tool: no validator, no class from its module."""

    @property
    def result_type(self) -> str:
        """ "float" if the code returns or yields floats, whose NaN and infinities need decoding from JSON; else ""."""

    def bind(self, parameters: Mapping[str, Value], limits: Limits) -> Mapping[str, object]:
        """Convert the parameters to new arguments for `start`; raises as `RunnableTool.bind` does."""

    def start(self, session: ToolSession, arguments: Mapping[str, object]) -> Any:
        """Call the code; returns a result, a coroutine, a generator or an async generator, depending on `kind`."""


def name_of(tool: ToolCode | str) -> str:
    """Return the name of a tool; `InvalidArgumentError` for anything but a name or a function with `@tool`."""
    name = tool if isinstance(tool, str) else getattr(getattr(tool, "spec", None), "name", None)
    if not isinstance(name, str):
        kind = type(tool).__name__
        raise InvalidArgumentError("tool", f"it must be the name of a tool, or a function with @tool, not {kind}")
    return name


def check_tools(tools: object) -> None:
    """Raise `InvalidArgumentError` unless `tools` is None or a mapping."""
    if tools is not None and not isinstance(tools, Mapping):
        reason = (
            f"it must be a Toolbox, or another mapping of tools by name, not {type(tools).__name__}: Toolbox.of(...)"
        )
        raise InvalidArgumentError("tools", reason)


@dataclass(frozen=True, slots=True)
class RemoteCall:
    """One call of a tool in another process.

    Attributes:
        style: The encoding in which the client sent the parameters, "string_value" or "json"; the worker gets the same.
        asked_by: The execution whose code waits for this one; "" if none does.
    """

    tool: RegisteredTool
    session_id: str
    execution_id: str
    parameters: Mapping[str, Value]
    metadata: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float | None = None
    style: str = "json"
    asked_by: str = ""


class RemotePort(Protocol):
    """Calls tools in other processes."""

    async def execute(self, call: RemoteCall) -> Value | None:
        """Run the tool and return its result.

        Raises:
            RemoteToolError: The worker cannot be reached, or its answer makes no sense.
            ToolFailedError: The tool failed.
        """

    async def stream(self, call: RemoteCall, emit: Emit) -> Value | None:
        """Run a streaming tool, passing each chunk to `emit`; otherwise like `execute`."""

    def state_of(self, address: str) -> str:
        """Return the state of the circuit breaker of an address: closed, open or half_open."""

    def allows(self, address: str) -> bool:
        """Return whether an address may be called at all."""
