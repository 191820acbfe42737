"""The keys of constraints, and those that several types share.

A `pattern` may match anywhere in the value, as in JSON Schema; anchor it with `^` and `$` to match the whole value. It
has RE2's syntax, without backreferences and look-around, so matching takes linear time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeAlias

import re2

from dspex_persist.state.values.json_text import RefusedError, shorten, shown
from dspex_persist.state.values.tensors import Dtype, Shape

_LISTED_LENGTH = 120
_PATTERN_MEMORY_BYTES = 2 * 1024 * 1024
PATTERN_WORK = 100_000_000
"""The most instructions of compiled patterns times bytes of a value; RE2 takes up to 10 ns for each."""

Check: TypeAlias = Callable[[Any], str | None]
"""Returns why a coerced value of the type is invalid; None if it is valid."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One compiled constraint."""

    check: Check
    check_shape: Callable[[Shape], str | None] | None = None
    """The check for the shape of a binary value."""
    dtype: Dtype | None = None
    """The element type that a binary value must have."""
    program_size: int = 0
    """Instructions of the compiled pattern: the work for each byte of a value."""


@dataclass(frozen=True, slots=True)
class Keyword:
    """A key of constraints. `build` compiles its entry, or raises `RefusedError` with the key."""

    build: Callable[[object], Rule]
    at_most: str = ""
    """The key of the upper bound for this one."""
    empty: object = None
    """The entry that means no constraint, besides null."""
    schema: str = ""
    """The corresponding keyword of JSON Schema."""


# Checks of entries. Each raises `RefusedError` with the key for an entry of the wrong kind.


def _number(key: str, stated: object) -> int | float:
    if type(stated) is int or type(stated) is float:
        return stated
    raise RefusedError(f"{key} must be a number, not {shown(stated)}")


def read_integer(key: str, stated: object, at_least: int) -> int:
    """Return `stated` if it is an integer of at least `at_least` (0 or 1)."""
    if type(stated) is int and stated >= at_least:
        return stated
    kind = "a positive" if at_least else "a non-negative"
    raise RefusedError(f"{key} must be {kind} integer, not {shown(stated)}")


def read_text(key: str, stated: object) -> str:
    """Return `stated` if it is a string."""
    if isinstance(stated, str):
        return stated
    raise RefusedError(f"{key} must be a string, not {shown(stated)}")


def _texts(key: str, stated: object) -> list[str]:
    if not isinstance(stated, list):
        raise RefusedError(f"{key} must be a list of strings, not {shown(stated)}")
    for entry in stated:
        if not isinstance(entry, str):
            raise RefusedError(f"{key} must be a list of strings; it contains {shown(entry)}")
    return stated


# Constraints that several types have.


def _minimum(stated: object) -> Rule:
    minimum = _number("min", stated)

    def check(number: float) -> str | None:
        if number >= minimum:
            return None
        if number != number:  # NaN is the only number that differs from itself
            return f"NaN cannot be compared with minimum {shown(minimum)}"
        return f"value {shown(number)} is below minimum {shown(minimum)}"

    return Rule(check)


def _maximum(stated: object) -> Rule:
    maximum = _number("max", stated)

    def check(number: float) -> str | None:
        if number <= maximum:
            return None
        if number != number:
            return f"NaN cannot be compared with maximum {shown(maximum)}"
        return f"value {shown(number)} is above maximum {shown(maximum)}"

    return Rule(check)


def _min_length(stated: object) -> Rule:
    minimum = read_integer("min_length", stated, at_least=0)

    def check(text: str) -> str | None:
        return f"length {len(text)} is below minimum {shown(minimum)}" if len(text) < minimum else None

    return Rule(check)


def _max_length(stated: object) -> Rule:
    maximum = read_integer("max_length", stated, at_least=0)

    def check(text: str) -> str | None:
        return f"length {len(text)} is above maximum {shown(maximum)}" if len(text) > maximum else None

    return Rule(check)


def one_of(key: str) -> Mapping[str, Keyword]:
    """Return the constraint `key`, a list of the possible strings."""

    def build(stated: object) -> Rule:
        possible = _texts(key, stated)
        known, listed = frozenset(possible), _listed(possible)

        def check(text: str) -> str | None:
            return None if text in known else f"value {shown(text)} must be one of: {listed}"

        return Rule(check)

    return {key: Keyword(build, empty=[])}


def _listed(possible: Sequence[str]) -> str:
    """Return `a, b, c`, shortened."""
    listed = shorten(possible[0])
    for index, entry in enumerate(possible[1:], start=1):
        longer = f"{listed}, {shorten(entry)}"
        if len(longer) > _LISTED_LENGTH:
            return f"{listed}, ... ({len(possible) - index} more)"
        listed = longer
    return listed


def _pattern(stated: object) -> Rule:
    pattern = read_text("pattern", stated)

    def check(text: str) -> str | None:
        # Looked up each time, because the cache bounds the memory of all compiled patterns.
        compiled = compile_pattern(pattern)
        encoded = text.encode()
        longest = PATTERN_WORK // compiled.programsize
        if len(encoded) > longest:
            return (
                f"a string of {len(encoded)} bytes is too long to match pattern {shown(pattern)}: "
                f"at most {longest} bytes for a pattern of this complexity"
            )
        if compiled.search(encoded):
            return None
        return f"value {shown(text)} does not match pattern {shown(pattern)}"

    return Rule(check, program_size=compile_pattern(pattern).programsize)


@lru_cache(maxsize=128)
def compile_pattern(pattern: str) -> Any:
    """Return a compiled pattern, or raise `RefusedError`."""
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    options.max_mem = _PATTERN_MEMORY_BYTES
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0].decode(errors="replace")
        raise RefusedError(f"pattern {shown(pattern)} is not an RE2 pattern: {shorten(reason)}") from None


RANGE: Final[Mapping[str, Keyword]] = {
    "min": Keyword(_minimum, at_most="max", schema="minimum"),
    "max": Keyword(_maximum, schema="maximum"),
}
"""Inclusive bounds of numbers."""
LENGTH: Final[Mapping[str, Keyword]] = {
    "min_length": Keyword(_min_length, at_most="max_length", schema="minLength"),
    "max_length": Keyword(_max_length, schema="maxLength"),
}
"""Bounds on the number of code points of strings."""
PATTERN: Final[Mapping[str, Keyword]] = {"pattern": Keyword(_pattern, empty="", schema="pattern")}
