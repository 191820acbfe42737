"""The base of all errors of the state layer: fields, a sentence built from them, and advice as an id."""

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Final, Self, TypeAlias

from dspex_persist.errors import DspexError
from dspex_persist.spelling import printable, quote
from dspex_persist.state.errors.hints import IN_PYTHON, Hint

_KEPT: Final = 1000

_Part: TypeAlias = Callable[[object], str]


@cache
def _parts_of(template: str) -> tuple[_Part, ...]:
    parts: list[_Part] = []
    for literal, name, spec, conversion in string.Formatter().parse(template):
        parts.append(lambda _, literal=literal: literal)  # type: ignore[misc]
        if name is not None:
            parts.append(_part_of(name, spec or "", conversion))
    return tuple(parts)


def _part_of(name: str, spec: str, conversion: str | None) -> _Part:
    if conversion == "q":
        return lambda error: quote(getattr(error, name))
    if conversion == "o":
        return lambda error: spec.replace("%", field) if (field := getattr(error, name)) else ""
    return lambda error: format(getattr(error, name), spec)


def filled(template: str, error: object) -> str:
    """Fill a template with an error's fields.

    `{name!q}` puts the field in quotes; `{hint!o:; %}` becomes "; " and the field, or nothing if the field is empty.
    """
    return "".join([part(error) for part in _parts_of(template)])


def names_in(template: str) -> set[str]:
    """Return the names of the fields in a template."""
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


class StateError(DspexError):
    """The root of the state layer's errors. The leaves are dataclasses with a `template` for their sentence."""

    template: ClassVar[str] = ""
    advice: Hint | None = None
    """What to do next, if there is any advice; an instance may have other advice than its class."""

    def __post_init__(self) -> None:
        """Shorten names: a caller may send megabytes as a name, and errors may be kept for a long time."""
        for name, field in vars(self).items():
            if name != "reason" and isinstance(field, str) and len(field) > _KEPT:
                setattr(self, name, f"{field[:_KEPT]}...")
        # Exceptions also keep their arguments, which would be the long ones.
        self.args = tuple(vars(self).values())

    def advising(self, hint: Hint | None) -> Self:
        """Set the advice and return the error."""
        self.advice = hint
        return self

    @property
    def sentence(self) -> str:
        """What is wrong, without the advice."""
        return filled(self.template, self)

    def in_words(self, words: Mapping[str, str]) -> str:
        """Return what is wrong and what to do, with the texts of one edge for the hints."""
        if self.advice is None:
            return self.sentence
        return f"{self.sentence}; {filled(words[self.advice], self)}"

    def __str__(self) -> str:
        return self.in_words(IN_PYTHON)


@dataclass(eq=False)
class InvalidArgumentError(StateError):
    """An argument that is invalid in every state of the store."""

    template = "invalid {field}: {reason}"
    field: str
    reason: str


@dataclass(eq=False)
class LimitExceededError(StateError):
    """Something exceeds a limit; `setting` names the setting, if there is one."""

    template = "{what} is {actual}, above the limit of {limit}{setting!o: (setting %)}"
    what: str
    actual: int
    limit: int
    setting: str


@dataclass(eq=False)
class UnsupportedError(StateError):
    """This backend does not support the operation. `hint`: what to do instead."""

    template = "not supported here: {what}{hint!o:; %}"
    what: str
    hint: str = ""


class OpenError(StateError):
    """The database cannot be opened."""

    def __post_init__(self) -> None:
        """Make paths printable: the names of files may contain characters that terminals and logs cannot show."""
        for name, field in vars(self).items():
            if isinstance(field, str):
                setattr(self, name, printable(field))
        super().__post_init__()
