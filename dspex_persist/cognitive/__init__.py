"""The API that programs use: a session as a context, its variables as a mapping, tools. Knows no SQL and no wire."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dspex_persist.cognitive.context import Context
from dspex_persist.cognitive.variables import Variables

if TYPE_CHECKING:
    from dspex_persist.cognitive.tool_context import ToolContext as ToolContext
    from dspex_persist.cognitive.toolbox import Toolbox as Toolbox
    from dspex_persist.cognitive.tools import Tool as Tool
    from dspex_persist.cognitive.tools import tool as tool

# Imported on first access: signatures are read with pydantic, whose import takes time.
_HOMES = {
    "Tool": "dspex_persist.cognitive.tools",
    "ToolContext": "dspex_persist.cognitive.tool_context",
    "Toolbox": "dspex_persist.cognitive.toolbox",
    "tool": "dspex_persist.cognitive.tools",
}

__all__ = ["Context", "Tool", "ToolContext", "Toolbox", "Variables", "tool"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
