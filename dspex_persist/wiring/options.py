"""The options of `connect`: which of them are fields of a dataclass, and which are arguments of a provider."""

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from dspex_persist.spelling import closest, did_you_mean
from dspex_persist.state.options import SessionOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_Options = TypeVar("_Options", bound=SessionOptions)


def sorted_options(
    given: "Mapping[str, Any]", kind: type[_Options], provider: type, what: str
) -> tuple[_Options, dict[str, Any]]:
    """Return the options that are fields of `kind` as a `kind`, and the provider's own, with tools in a toolbox."""
    names = [field.name for field in dataclasses.fields(kind)]
    check_options(given, [*names, *options_of(provider)], what)
    others = {name: option for name, option in given.items() if name not in names}
    if others.get("tools") is not None:
        from dspex_persist.cognitive.toolbox import Toolbox

        others["tools"] = Toolbox.of(others["tools"])
    return kind(**{name: option for name, option in given.items() if name in names}), others


def options_of(kind: type) -> list[str]:
    """Return the names of the keyword arguments of a provider."""
    names: list[str] = []
    for each in inspect.signature(kind).parameters.values():
        if each.kind is inspect.Parameter.KEYWORD_ONLY:
            names.append(each.name)
        elif each.kind is inspect.Parameter.VAR_KEYWORD:
            # Unpack[...] of a TypedDict
            (options,) = get_args(each.annotation)
            names += options.__annotations__
    return names


def check_options(given: "Iterable[str]", known: list[str], what: str) -> None:
    """Raise `TypeError` for an option that is not known."""
    for name in given:
        if name not in known:
            hint = (
                did_you_mean(closest(name, known, most=len(known)), spell=str)
                or f"the options are {', '.join(sorted(known))}"
            )
            # As Python does for an unexpected keyword argument.
            raise TypeError(f"{what} has no option {name}; {hint}")
