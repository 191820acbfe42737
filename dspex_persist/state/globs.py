"""Globs over names: `*` matches any run of characters, `?` any one character."""

import re
from collections.abc import Callable
from typing import Final

_TOKENS: Final = re.compile(r"\*+|[^*]", re.DOTALL)
_STARS: Final = re.compile(r"\*+")


def compile_glob(pattern: str) -> Callable[[str], bool]:
    """Return a function that tells whether a whole name matches `pattern`.

    Without `?`, it looks for the parts between the `*` one after the other. Otherwise, it simulates the pattern as an
    automaton: bit n of a number means that the first n characters of the pattern match the name so far. That takes one
    step for each character of a name, whatever the pattern. Regular expressions are faster for most patterns, but for
    some with `?`, which clients can send, even RE2 takes hundreds of times as long.
    """
    if "?" not in pattern:
        return _in_parts(pattern)
    any_one, stays, length = 0, 0, 0
    places: dict[str, int] = {}
    for token in _TOKENS.findall(pattern):
        if token[0] == "*":
            stays |= 1 << length
            continue
        if token == "?":
            any_one |= 1 << length
        else:
            places[token] = places.get(token, 0) | 1 << length
        length += 1
    fitting = {character: places_of | any_one for character, places_of in places.items()}
    whole = 1 << length

    def fits(name: str) -> bool:
        reached = 1
        for character in name:
            reached = (reached & fitting.get(character, any_one)) << 1 | reached & stays
            if not reached:
                return False
        return bool(reached & whole)

    return fits


def _in_parts(pattern: str) -> Callable[[str], bool]:
    first, *others = _STARS.split(pattern)
    if not others:
        return pattern.__eq__
    *parts, last = others
    shortest = len(first) + len(last)

    def fits(name: str) -> bool:
        if len(name) < shortest or not name.startswith(first) or not name.endswith(last):
            return False
        at, end = len(first), len(name) - len(last)
        for part in parts:
            found = name.find(part, at, end)
            if found < 0:
                return False
            at = found + len(part)
        return True

    return fits
