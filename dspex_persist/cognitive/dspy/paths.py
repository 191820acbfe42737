"""The paths of predictors and other modules in a program, spelled as `named_predictors()` spells them."""

from collections.abc import Iterator
from typing import Any, Final

from dspy import Module, Predict

SELF: Final = "self"
"""The path of a program that is a predictor itself."""
# Lists of a module without sub-modules, some of them long.
_SKIPPED: Final = frozenset(
    ("history", "callbacks", "demos", "traces", "train", "config", "fields", "signature", "stage")
)
# What is longer is data, such as a corpus to search, which would take long to look through at each call.
_MOST_ENTRIES: Final = 1_000


def modules_in(program: Any) -> list[tuple[str, Any]]:
    """Return the modules of a program with their paths: itself (`self`), then those in it, frozen ones included.

    `named_predictors()` leaves out what is in a frozen module (`_compiled`), although it calls the LM like any other.
    """
    found = [(SELF, program)]
    seen = {id(program)}
    for name, attribute in vars(program).items():
        if name not in _SKIPPED:
            _collect(name, attribute, found, seen)
    return found


def _collect(path: str, attribute: Any, found: list[tuple[str, Any]], seen: set[int]) -> None:
    if isinstance(attribute, Module):
        if id(attribute) not in seen:
            seen.add(id(attribute))
            found.append((path, attribute))
            for name, item in vars(attribute).items():
                if name not in _SKIPPED:
                    _collect(f"{path}.{name}", item, found, seen)
    elif isinstance(attribute, list | tuple | dict) and len(attribute) <= _MOST_ENTRIES:
        named = attribute.items() if isinstance(attribute, dict) else enumerate(attribute)
        for key, item in named:
            if isinstance(item, Module | list | tuple | dict):
                _collect(f"{path}['{key}']" if isinstance(attribute, dict) else f"{path}[{key}]", item, found, seen)


def predictors_in(program: Any) -> Iterator[tuple[str, Any]]:
    """Yield the predictors of a program with their paths."""
    return ((path, module) for path, module in modules_in(program) if isinstance(module, Predict))


def is_within(path: str, other: str) -> bool:
    """Return whether a path is another one, or leads into the module at it."""
    return path == other or (path.startswith(other) and path[len(other)] in ".[")
