"""What a runner runs, and what that is made of: the code of this process's tools, and whatever reaches others'."""

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
    """What calling a tool's code gives."""

    FUNCTION = "function"
    COROUTINE = "coroutine"
    GENERATOR = "generator"
    ASYNC_GENERATOR = "async_generator"

    @property
    def is_async(self) -> bool:
        """Whether the code needs an event loop."""
        return self in (ToolKind.COROUTINE, ToolKind.ASYNC_GENERATOR)


class RunnableTool(ABC):
    """A tool as a runner has it, whatever it is and wherever its code runs. Used on the runner's home loop."""

    def __init__(self, spec: ToolSpec, *, result_type: str = "", worker_id: str = "") -> None:
        self.spec = spec
        self.result_type = result_type
        self.worker_id = worker_id

    @property
    @abstractmethod
    def where(self) -> Mapping[str, str]:
        """What a server's lists say of where it runs, as metadata."""

    @abstractmethod
    async def bind(self, parameters: Mapping[str, Value]) -> Mapping[str, object]:
        """New arguments for one `run`; `ToolArgumentError` for a wrong one, `LimitExceededError` beyond the limits."""

    @abstractmethod
    async def run(self, session: ToolSession, arguments: Mapping[str, object]) -> Value:
        """Run the code in the transaction of `session`; its result, or the list of what it yields.

        Chunks go to the session's `outlet`, too, if it has one. It need not keep to the session's `timeout_s`: it is
        cancelled then. Whatever the code itself raises comes as a `RaisedError`, or as a `StateError`.
        """


class ToolCode(Protocol):
    """A tool of this process, as whoever programs tools provides it."""

    @property
    def spec(self) -> ToolSpec: ...

    @property
    def kind(self) -> ToolKind: ...

    @property
    def reads_plainly(self) -> bool:
        """Whether `bind` runs nothing of the tool's own: no validator, no class of its module."""

    @property
    def result_type(self) -> str:
        """ "float" where the code gives floats, or yields them, whose NaN and infinities JSON has not; else ""."""

    def bind(self, parameters: Mapping[str, Value], limits: Limits) -> Mapping[str, object]:
        """New arguments for `start`; `ToolArgumentError` for a wrong one, `LimitExceededError` beyond `limits`."""

    def start(self, session: ToolSession, arguments: Mapping[str, object]) -> Any:
        """Call the code: a result, a coroutine, a generator or an async generator, by `kind`."""


def name_of(tool: ToolCode | str) -> str:
    """The name of a tool that is given itself, or by its name."""
    name = tool if isinstance(tool, str) else getattr(getattr(tool, "spec", None), "name", None)
    if not isinstance(name, str):
        kind = type(tool).__name__
        raise InvalidArgumentError("tool", f"a tool is called by its name, or itself if it has @tool, not {kind}")
    return name


def check_tools(tools: object) -> None:
    """Raise unless a runner can be made of these."""
    if tools is not None and not isinstance(tools, Mapping):
        reason = (
            f"it must be a Toolbox, or another mapping of tools by name, not {type(tools).__name__}: Toolbox.of(...)"
        )
        raise InvalidArgumentError("tools", reason)


@dataclass(frozen=True, slots=True)
class RemoteCall:
    """One call of a tool in another process. `style`: how the parameters came, "string_value" or "json"."""

    tool: RegisteredTool
    session_id: str
    execution_id: str
    parameters: Mapping[str, Value]
    metadata: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float | None = None
    style: str = "json"


class RemotePort(Protocol):
    """Whatever reaches tools in other processes."""

    async def execute(self, call: RemoteCall) -> Value | None:
        """The result; `RemoteToolError` or `ToolFailedError`."""

    async def stream(self, call: RemoteCall, emit: Emit) -> Value | None:
        """The same, with chunks on the way."""

    def state_of(self, address: str) -> str:
        """The circuit of an address: closed, open, half_open."""
