"""The API that programs use: a session as a context, its variables as a mapping, tools. Knows no SQL and no wire."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspex_persist.cognitive.context import Context as Context
    from dspex_persist.cognitive.tool_context import ToolContext as ToolContext
    from dspex_persist.cognitive.toolbox import Toolbox as Toolbox
    from dspex_persist.cognitive.tools import Tool as Tool
    from dspex_persist.cognitive.tools import tool as tool
    from dspex_persist.cognitive.variables import Variables as Variables

# Imported on first access: signatures are read with pydantic, whose import takes time, and a process that only runs
# tools has no contexts.
_HOMES = {
    "Context": "dspex_persist.cognitive.context",
    "Tool": "dspex_persist.cognitive.tools",
    "ToolContext": "dspex_persist.cognitive.tool_context",
    "Toolbox": "dspex_persist.cognitive.toolbox",
    "Variables": "dspex_persist.cognitive.variables",
    "tool": "dspex_persist.cognitive.tools",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
