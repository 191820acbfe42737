"""The parts of a program: its modules and parameters by path, the frozen ones included."""

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import dspy
from dspy.predict.parameter import Parameter

from dspex_persist.cognitive.dspy.program_types import class_name

ROOT: Final = "self"
FORWARD: Final = "forward"
"""What optimizers such as KNNFewShot replace in a module: code."""
_SKIPPED: Final = frozenset(
    ("callbacks", "config", "demos", "fields", "history", "lm", "signature", "stage", "tools", "traces", "train")
)
_COUNTS: Final = ("max_iters",)
# What of DSPy's own modules is set when they are made, and changes what they ask.
_SETTINGS: Final[dict[str, tuple[str, ...]]] = {
    "ReAct": _COUNTS,
    "ReActV2": _COUNTS,
    "CodeAct": _COUNTS,
    "ProgramOfThought": _COUNTS,
    "RLM": ("max_iters", "max_llm_calls", "max_output_chars"),
    "BestOfN": ("N", "threshold", "fail_count"),
    "Refine": ("N", "threshold", "fail_count"),
}
_WITH_TOOLS: Final = ("ReAct", "ReActV2", "CodeAct", "RLM")


class Parts:
    """The parts of a program.

    Paths are those of `named_parameters()`. It leaves out what is inside of frozen modules (`_compiled`); that has the
    paths that it would have otherwise.

    Args:
        program: The program.
        instead: By the `id` of a module, attributes that it is to be taken to have.

    Attributes:
        parameters: Predictors and other parameters, by path, in DSPy's order; those in frozen modules come last.
        frozen: The paths of those in frozen modules.
        also: By path, the other paths that lead to the same parameter.
        modules: All modules by path; the program itself is "self".
    """

    def __init__(self, program: dspy.Module, instead: Mapping[int, Mapping[str, Any]] | None = None) -> None:
        paths: dict[int, list[str]] = {}
        objects: dict[int, Any] = {}
        self.modules: dict[str, dspy.Module] = {}
        for path, part in _walk("", program, (), instead or {}):
            if isinstance(part, Parameter):
                objects[id(part)] = part
                paths.setdefault(id(part), []).append(path or ROOT)
            if isinstance(part, dspy.Module):
                self.modules[path or ROOT] = part
        by_dspy = {id(part): path for path, part in program.named_parameters()}
        ordered = {**{each: objects[each] for each in by_dspy if each in objects}, **objects}
        self.parameters: dict[str, Any] = {}
        self.also: dict[str, list[str]] = {}
        self.frozen: set[str] = set()
        for each, part in ordered.items():
            path = by_dspy.get(each, paths[each][0])
            self.parameters[path] = part
            self.also[path] = [other for other in paths[each] if other != path]
            if each not in by_dspy:
                self.frozen.add(path)

    @property
    def predictors(self) -> dict[str, dspy.Predict]:
        """The predictors by path."""
        return {path: part for path, part in self.parameters.items() if isinstance(part, dspy.Predict)}


def _walk(
    path: str, part: Any, inside: tuple[int, ...], instead: Mapping[int, Mapping[str, Any]]
) -> Iterator[tuple[str, Any]]:
    """Yield the parts that DSPy finds, which looks into lists and dicts but not into those in them, and frozen ones."""
    if id(part) in inside:
        return
    inside = (*inside, id(part))
    yield path, part
    for name, each in {**vars(part), **instead.get(id(part), {})}.items():
        if not (isinstance(part, Parameter) and name in _SKIPPED):
            for where, item in _items(f"{path}.{name}" if path else name, each):
                yield from _walk(where, item, inside, instead)


def _items(path: str, attribute: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts in an attribute."""
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(attribute, _PARTS):
        items = ((path, attribute),)
    elif isinstance(attribute, list | tuple):
        items = ((f"{path}[{number}]", item) for number, item in enumerate(attribute))
    elif isinstance(attribute, dict):
        items = ((f"{path}['{key}']", item) for key, item in attribute.items())
    return ((where, item) for where, item in items if isinstance(item, _PARTS))


_PARTS: Final = (Parameter, dspy.Module)


def kind_of(part: object) -> str:
    """Return the class of a part: with its module, unless it is DSPy's own."""
    kind = type(part)
    return f"dspy.{class_name(kind)}" if is_dspys(kind) else f"{kind.__module__}.{class_name(kind)}"


def is_dspys(kind: type) -> bool:
    """Whether a class is DSPy's own."""
    return kind.__module__.partition(".")[0] == "dspy"


def source_of(part: object) -> str | None:
    """Return the SHA-256 of the source of a part's class; None for classes of DSPy and ours, and without a source."""
    if is_dspys(type(part)) or type(part).__module__.startswith("dspex_persist."):
        return None
    try:
        source = inspect.getsource(type(part))
    except (OSError, TypeError, IndentationError, SyntaxError):
        return None
    return hashlib.sha256(inspect.cleandoc(source).encode(errors="replace")).hexdigest()


def settings_of(module: dspy.Module) -> dict[str, int | float | None]:
    """Return the settings of one of DSPy's own modules that change what it asks."""
    return {
        name: getattr(module, name)
        for name in _names(module)
        if isinstance(getattr(module, name, _NONE), int | float | None) and hasattr(module, name)
    }


_NONE: Final = object()


def _names(module: dspy.Module) -> tuple[str, ...]:
    return next((names for name, names in _SETTINGS.items() if isinstance(module, _dspy_class(name))), ())


def _dspy_class(name: str) -> type | tuple[()]:
    # A release may lack one that is experimental.
    kind = getattr(dspy, name, None)
    return kind if isinstance(kind, type) else ()


def tools_of(module: dspy.Module) -> dict[str, str] | None:
    """Return the tools of an agent: by name, a hash of what the LM is told about the tool; None if it is no agent."""
    if not any(isinstance(module, _dspy_class(name)) for name in _WITH_TOOLS):
        return None
    tools = getattr(module, "tools", None)
    listed = tools.values() if isinstance(tools, dict) else tools if isinstance(tools, list | tuple) else ()
    return {
        each.name: hashlib.sha256(str(each).encode()).hexdigest()[:16] for each in listed if isinstance(each, dspy.Tool)
    }
