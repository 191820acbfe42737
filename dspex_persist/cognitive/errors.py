"""Errors of contexts, in the definition of tools, and in loading them."""

from dataclasses import dataclass

from dspex_persist.errors import DspexError
from dspex_persist.spelling import quote


@dataclass(eq=False)
class ContextClosedError(DspexError):
    """The context was closed, and is used nevertheless."""

    session_id: str

    def __str__(self) -> str:
        return (
            f"the context of session {quote(self.session_id)} is closed; the session goes on unless its backend was in "
            "memory: open it with Context(session_id, backend)"
        )


@dataclass(eq=False)
class ToolDefinitionError(DspexError):
    """A function that cannot be a tool as it is written, or `@tool` used wrongly on it."""

    function: str
    reason: str

    def __str__(self) -> str:
        return f"{self.function} cannot be a tool: {self.reason}"


@dataclass(eq=False)
class ToolLoadError(DspexError):
    """Tools cannot be had from where they should be."""

    reference: str
    reason: str

    def __str__(self) -> str:
        return f"cannot load tools from {self.reference!r}: {self.reason}"


@dataclass(eq=False)
class DspyMissingError(DspexError):
    """LM calls are to be recorded, or played, without DSPy."""

    def __str__(self) -> str:
        return "LM calls are recorded through DSPy, which is not installed: pip install 'dspex-persist[dspy]'"
