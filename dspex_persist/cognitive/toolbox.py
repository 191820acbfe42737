"""Toolbox: tools by name, from objects or from modules that it imports."""

import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dspex_persist.cognitive.errors import ToolLoadError
from dspex_persist.cognitive.tools import Tool, tool
from dspex_persist.spelling import closest, did_you_mean
from dspex_persist.state.model import ToolSpec

AnyTool = Tool[..., Any]


class Toolbox(Mapping[str, AnyTool]):
    """A mapping of tools by name, in the order in which they were added.

    Adding the same tool twice is allowed; two different tools with one name are not.

    Args:
        record_lm: Record the LM calls of all tools.

    Raises:
        DspyMissingError: `record_lm` is set, but DSPy is not installed.
    """

    def __init__(self, *, record_lm: bool = False) -> None:
        if record_lm:
            import dspex_persist.cognitive.dspy  # noqa: F401 -- slow to import, so not while a tool runs
        self._record_lm = record_lm
        self._tools: dict[str, AnyTool] = {}

    @classmethod
    def of(cls, given: object, *, record_lm: bool = False) -> "Toolbox":
        """Return a toolbox of anything that has tools.

        Args:
            given: What `add` or `load` accept, a module, a mapping of tools by name, or a list of these. A toolbox is
                returned unchanged, unless `record_lm` is set.
            record_lm: Record the LM calls of all tools.

        Raises:
            ToolLoadError: A part of `given` has no tools.
        """
        if isinstance(given, Toolbox) and not record_lm:
            return given
        toolbox = cls(record_lm=record_lm)
        toolbox._take(given)
        return toolbox

    def _take(self, given: object) -> None:
        if isinstance(given, str):
            self.load(given)
        elif isinstance(given, ModuleType):
            self._add_module(given.__name__, given)
        elif isinstance(given, Mapping) and not isinstance(given, Toolbox):
            for name, item in given.items():
                self._add(_named(item), [_tool_of_name(name, item)])
        elif isinstance(given, list | tuple | set | frozenset | Iterator):
            for each in given:
                self._take(each)
        else:
            self.add(given)

    def add(self, item: object) -> tuple[AnyTool, ...]:
        """Add a tool, a function (which becomes a tool), a toolbox, or an instance whose methods are tools.

        Returns:
            The added tools.

        Raises:
            ToolLoadError: There are no tools, or another tool has one of their names. Then none is added.
        """
        if inspect.isfunction(item):
            item = tool(item)
        return self._add(_named(item), _tools_in(item, _named(item)))

    def load(self, reference: str) -> tuple[AnyTool, ...]:
        """Add the tools of a module.

        Args:
            reference: `package.module` for all of its tools, or `package.module:name` for a tool, a toolbox, an
                instance whose methods are tools, or its class, which is called without arguments. The working directory
                comes first on the import path, as with `python -m`.

        Returns:
            The added tools.

        Raises:
            ToolLoadError: The module cannot be imported, has no tools, or another tool has one of their names.
        """
        module_name, colon, name = reference.partition(":")
        module = imported(reference, module_name)
        if colon:
            return self._add(reference, _tools_in(_find(reference, module, name), reference))
        return self._add_module(reference, module)

    def _add_module(self, reference: str, module: Any) -> tuple[AnyTool, ...]:
        tools = [item for item in vars(module).values() if isinstance(item, Tool) and not item.needs_instance]
        if not tools:
            raise ToolLoadError(reference, f"there are no tools in the module itself{_hint(module)}")
        return self._add(reference, tools)

    def specs(self) -> tuple[ToolSpec, ...]:
        """Return the descriptions of the tools."""
        return tuple(item.spec for item in self._tools.values())

    def _add(self, reference: str, tools: Iterable[AnyTool]) -> tuple[AnyTool, ...]:
        """Add all of the tools, or none."""
        added: dict[str, AnyTool] = {}
        for item in tools:
            name = item.spec.name
            other = added.get(name) or self._tools.get(name)
            if other is not None and other != item:
                places = other.origin if other.origin == item.origin else f"{other.origin} and {item.origin}"
                reason = f"two tools are called {name!r} ({places}); give one of them another name: @tool(name=...)"
                raise ToolLoadError(reference, reason)
            added[name] = item.recording_lm() if self._record_lm else item
        self._tools |= added
        return tuple(added.values())

    def __getitem__(self, name: str) -> AnyTool:
        return self._tools[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tools)

    def __len__(self) -> int:
        return len(self._tools)

    def __repr__(self) -> str:
        return f"<Toolbox: {', '.join(self._tools) or 'empty'}>"


def _tool_of_name(name: object, item: object) -> AnyTool:
    """Return the tool that a mapping has under a name: a tool of that name, or a function, which becomes one."""
    if not isinstance(name, str):
        raise ToolLoadError(_named(item), f"the name {name!r} is not a string")
    if inspect.isfunction(item):
        return tool(name=name)(item)
    if not isinstance(item, Tool):
        reason = f"{name!r} is neither a tool nor a function, but {type(item).__name__}"
        raise ToolLoadError(_named(item), reason)
    if item.spec.name != name:
        reason = f"{name!r} is the tool {item.spec.name!r}: use that name, or @tool(name={name!r})"
        raise ToolLoadError(_named(item), reason)
    return item


def imported(reference: str, module_name: str) -> Any:
    """Import a module, with the working directory first on the import path, or raise `ToolLoadError`."""
    if not module_name or "/" in module_name or module_name.endswith(".py"):
        raise ToolLoadError(reference, "write package.module or package.module:name, as in an import")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        # It stays there, because the module may import more later.
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ToolLoadError(reference, f"the import failed with {type(error).__name__}: {error}") from error


def _find(reference: str, module: Any, name: str) -> object:
    item = module
    for part in name.split("."):
        if not hasattr(item, part):
            near = closest(part, (entry for entry in dir(item) if not entry.startswith("__")), most=1_000)
            reason = "; ".join(filter(None, (f"there is nothing named {part!r}", did_you_mean(near))))
            raise ToolLoadError(reference, reason)
        item = getattr(item, part)
    return item


def _tools_in(item: object, reference: str) -> list[AnyTool]:
    """Return the tools of an object; raise `ToolLoadError` if there are none."""
    if isinstance(item, Tool):
        if item.needs_instance:
            reason = f"{item.origin} is a method: add an instance of its class, or load the class"
            raise ToolLoadError(reference, reason)
        return [item]
    if isinstance(item, Toolbox):
        return list(item.values())
    names = _method_names(item)
    if not names:
        reason = "it is not a tool and has no tools: decorate functions or methods with @tool"
        raise ToolLoadError(reference, reason)
    instance = _instance_of(item, reference) if isinstance(item, type) else item
    return [getattr(instance, name) for name in names]


def _method_names(item: object) -> list[str]:
    """Return the names of the methods that are tools, in the order of their definition."""
    kind = item if isinstance(item, type) else type(item)
    names = {name: None for base in reversed(kind.__mro__) for name in vars(base)}
    return [name for name in names if isinstance(inspect.getattr_static(kind, name), Tool)]


def _instance_of(kind: type, reference: str) -> object:
    try:
        return kind()
    except Exception as error:
        reason = f"{kind.__qualname__}() failed with {type(error).__name__}: {error}; name an instance instead"
        raise ToolLoadError(reference, reason) from error


def _hint(module: Any) -> str:
    """Suggest what to name instead."""
    names = (
        f"{module.__name__}:{name}"
        for name, item in vars(module).items()
        if isinstance(item, Toolbox) or (not name.startswith("_") and _method_names(item))
    )
    hint = did_you_mean(*names, spell=str)
    return f"; {hint}" if hint else ""


def _named(item: object) -> str:
    if isinstance(item, Tool):
        return item.origin
    kind = item if isinstance(item, type) else type(item)
    return f"{kind.__module__}.{kind.__qualname__}"
