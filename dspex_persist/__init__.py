"""Durable, versioned session state for AI tools in one SQLite file."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dspex_persist import opening as _opening

if TYPE_CHECKING:
    import os

    from dspex_persist.cognitive.callbacks import Subscription as Subscription
    from dspex_persist.cognitive.changes import Change as Change
    from dspex_persist.cognitive.context import Context as Context
    from dspex_persist.cognitive.describing import Description as Description
    from dspex_persist.cognitive.describing import History as History
    from dspex_persist.cognitive.errors import ContextClosedError as ContextClosedError
    from dspex_persist.cognitive.handles import Variable as Variable
    from dspex_persist.cognitive.optimizing import Optimization as Optimization
    from dspex_persist.cognitive.records import HistoryEntry as HistoryEntry
    from dspex_persist.cognitive.records import VariableInfo as VariableInfo
    from dspex_persist.cognitive.tool_context import ToolContext as ToolContext
    from dspex_persist.cognitive.toolbox import Toolbox as Toolbox
    from dspex_persist.cognitive.tools import Tool as Tool
    from dspex_persist.cognitive.tools import tool as tool
    from dspex_persist.cognitive.typed import migration as migration
    from dspex_persist.cognitive.typed import model as model
    from dspex_persist.cognitive.variables import Definition as Definition
    from dspex_persist.cognitive.variables import Variables as Variables
    from dspex_persist.cognitive.variables import decode as decode
    from dspex_persist.cognitive.watching import Changes as Changes
    from dspex_persist.errors import DspexError as DspexError
    from dspex_persist.settings import Settings as Settings
    from dspex_persist.settings import load_settings as load_settings
    from dspex_persist.state.access import AccessRule as AccessRule
    from dspex_persist.state.access import access_control as access_control
    from dspex_persist.state.bridged import Breaker as Breaker
    from dspex_persist.state.bridged import BridgedState as BridgedState
    from dspex_persist.state.embedded import EmbeddedState as EmbeddedState
    from dspex_persist.state.errors import BudgetExceededError as BudgetExceededError
    from dspex_persist.state.errors import ExecutionConflictError as ExecutionConflictError
    from dspex_persist.state.errors import IdempotencyConflictError as IdempotencyConflictError
    from dspex_persist.state.errors import InvalidArgumentError as InvalidArgumentError
    from dspex_persist.state.errors import InvalidValueError as InvalidValueError
    from dspex_persist.state.errors import LimitExceededError as LimitExceededError
    from dspex_persist.state.errors import OutcomeUnknownError as OutcomeUnknownError
    from dspex_persist.state.errors import SessionNotFoundError as SessionNotFoundError
    from dspex_persist.state.errors import StateError as StateError
    from dspex_persist.state.errors import ToolArgumentError as ToolArgumentError
    from dspex_persist.state.errors import ToolFailedError as ToolFailedError
    from dspex_persist.state.errors import ToolNotFoundError as ToolNotFoundError
    from dspex_persist.state.errors import ToolTimedOutError as ToolTimedOutError
    from dspex_persist.state.errors import UnavailableError as UnavailableError
    from dspex_persist.state.errors import UnsupportedError as UnsupportedError
    from dspex_persist.state.errors import VariableLockedError as VariableLockedError
    from dspex_persist.state.errors import VariableNotFoundError as VariableNotFoundError
    from dspex_persist.state.errors import VersionConflictError as VersionConflictError
    from dspex_persist.state.limits import Limits as Limits
    from dspex_persist.state.local import LocalState as LocalState
    from dspex_persist.state.provider import StateProvider as StateProvider
    from dspex_persist.wiring.connecting import aconnect as aconnect
    from dspex_persist.wiring.connecting import connect as connect
    from dspex_persist.wiring.connecting import open_audit as open_audit
    from dspex_persist.wiring.serving import serve as serve

__version__ = "0.1.0"

# Imported on first access, so that importing the package loads neither SQL nor gRPC. The other errors are in `errors`.
_HOMES = {
    "AccessRule": "dspex_persist.state.access",
    "Breaker": "dspex_persist.state.bridged",
    "BridgedState": "dspex_persist.state.bridged",
    "Change": "dspex_persist.cognitive.changes",
    "Changes": "dspex_persist.cognitive.watching",
    "Context": "dspex_persist.cognitive.context",
    "ContextClosedError": "dspex_persist.cognitive.errors",
    "Definition": "dspex_persist.cognitive.variables",
    "Description": "dspex_persist.cognitive.describing",
    "DspexError": "dspex_persist.errors",
    "EmbeddedState": "dspex_persist.state.embedded",
    "ExecutionConflictError": "dspex_persist.state.errors",
    "History": "dspex_persist.cognitive.describing",
    "HistoryEntry": "dspex_persist.cognitive.records",
    "IdempotencyConflictError": "dspex_persist.state.errors",
    "InvalidArgumentError": "dspex_persist.state.errors",
    "InvalidValueError": "dspex_persist.state.errors",
    "BudgetExceededError": "dspex_persist.state.errors",
    "LimitExceededError": "dspex_persist.state.errors",
    "Limits": "dspex_persist.state.limits",
    "LocalState": "dspex_persist.state.local",
    "Optimization": "dspex_persist.cognitive.optimizing",
    "OutcomeUnknownError": "dspex_persist.state.errors",
    "SessionNotFoundError": "dspex_persist.state.errors",
    "Settings": "dspex_persist.settings",
    "StateError": "dspex_persist.state.errors",
    "StateProvider": "dspex_persist.state.provider",
    "Subscription": "dspex_persist.cognitive.callbacks",
    "Tool": "dspex_persist.cognitive.tools",
    "ToolArgumentError": "dspex_persist.state.errors",
    "ToolContext": "dspex_persist.cognitive.tool_context",
    "ToolFailedError": "dspex_persist.state.errors",
    "ToolNotFoundError": "dspex_persist.state.errors",
    "ToolTimedOutError": "dspex_persist.state.errors",
    "Toolbox": "dspex_persist.cognitive.toolbox",
    "UnavailableError": "dspex_persist.state.errors",
    "UnsupportedError": "dspex_persist.state.errors",
    "Variable": "dspex_persist.cognitive.handles",
    "VariableInfo": "dspex_persist.cognitive.records",
    "VariableLockedError": "dspex_persist.state.errors",
    "VariableNotFoundError": "dspex_persist.state.errors",
    "Variables": "dspex_persist.cognitive.variables",
    "VersionConflictError": "dspex_persist.state.errors",
    "access_control": "dspex_persist.state.access",
    "aconnect": "dspex_persist.wiring.connecting",
    "connect": "dspex_persist.wiring.connecting",
    "decode": "dspex_persist.cognitive.variables",
    "load_settings": "dspex_persist.settings",
    "migration": "dspex_persist.cognitive.typed",
    "model": "dspex_persist.cognitive.typed",
    "open_audit": "dspex_persist.wiring.connecting",
    "serve": "dspex_persist.wiring.serving",
    "tool": "dspex_persist.cognitive.tools",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("dspex_persist.errors")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _open_state(url: "str | os.PathLike[str]", /, **options: Any) -> Any:
    return import_module("dspex_persist.wiring.connecting").connect(url, **options)


def _is_there(url: "str | os.PathLike[str]", /) -> bool:
    found: bool = import_module("dspex_persist.wiring.connecting").is_there(url)
    return found


def _open_history(url: "str | os.PathLike[str]", /, *, reveal: bool) -> Any:
    return import_module("dspex_persist.wiring.connecting").open_audit(url, reveal=reveal)


# Here, because every import of a part of the package runs this file.
_opening.register(_open_state, _is_there, _open_history)
