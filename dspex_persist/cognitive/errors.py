"""Errors of contexts, in the definition of tools, and in loading them."""

from dataclasses import dataclass

from dspex_persist.errors import DspexError
from dspex_persist.extras import how_to_install
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
class ModelLoadError(ToolLoadError):
    """Models cannot be had from where they should be."""

    def __str__(self) -> str:
        return f"cannot load models from {self.reference!r}: {self.reason}"


@dataclass(eq=False)
class DspyMissingError(DspexError):
    """LM calls are to be recorded or played, or programs saved or loaded, without DSPy."""

    def __str__(self) -> str:
        return f"this needs DSPy, which is not installed: {how_to_install('dspy')}"


@dataclass(eq=False)
class BindingError(DspexError):
    """A DSPy program cannot be bound to variables like this.

    Attributes:
        reason: Why.
    """

    reason: str

    def __str__(self) -> str:
        return f"cannot bind: {self.reason}"


@dataclass(eq=False)
class BoundValueError(DspexError):
    """The value of a variable cannot be what it sets in a DSPy program.

    Attributes:
        option: The option that the variable sets.
        variable: The name of the variable.
        value: Its value; "•••" if the variable is sensitive.
        reason: Why not.
        model: The model that was to be called, if it is about that.
    """

    option: str
    variable: str
    value: object
    reason: str
    model: str = ""

    def __str__(self) -> str:
        where = f" for {self.model}" if self.model else ""
        return (
            f"variable {quote(self.variable)} is {_brief(self.value)}, which cannot be {self.option}{where}: "
            f"{self.reason}"
        )


@dataclass(eq=False)
class StudyError(DspexError):
    """A study cannot do what it is asked for.

    Attributes:
        study: The name of the study.
        reason: Why.
    """

    study: str
    reason: str

    def __str__(self) -> str:
        return f"study {quote(self.study)}: {self.reason}"


@dataclass(eq=False)
class TypedValueError(DspexError):
    """The value of a variable is of no version that its model, or a migration, can read.

    Attributes:
        name: The variable.
        reason: Why it cannot be read.
        raw: The value as it is, as plain objects.
    """

    name: str
    reason: str
    raw: object

    def __str__(self) -> str:
        return f"cannot read variable {quote(self.name)}: {self.reason}; its value is {_brief(self.raw)} (see .raw)"


@dataclass(eq=False)
class MigrationError(DspexError):
    """A migration failed; nothing was written.

    Attributes:
        name: The variable.
        from_version: The version of the value.
        to_version: The version to which it was to lead.
        reason: Why it failed.
        raw: The value as it is, as plain objects.
    """

    name: str
    from_version: int
    to_version: int
    reason: str
    raw: object

    def __str__(self) -> str:
        return (
            f"cannot migrate variable {quote(self.name)} from version {self.from_version} to {self.to_version}: "
            f"{self.reason}; its value is {_brief(self.raw)} (see .raw)"
        )


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
