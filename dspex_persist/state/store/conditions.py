"""Conditions on values, as a function that SQL can call: SQLite's own numbers are doubles, and ours are exact."""

import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

from dspex_persist.state.audit import Operator, number_in
from dspex_persist.state.values import is_number
from dspex_persist.state.values.json_text import RefusedError, canonical, read, stored

_COMPARES: Final[dict[str, Callable[[Any, Any], bool]]] = {
    Operator.LESS: operator.lt,
    Operator.LESS_EQUAL: operator.le,
    Operator.GREATER: operator.gt,
    Operator.GREATER_EQUAL: operator.ge,
    Operator.EQUAL: operator.eq,
}
_NON_FINITE: Final = {'"Infinity"': "Infinity", '"-Infinity"': "-Infinity"}


def value_holds(text: str | None, type_name: str, compared: str, operand: str) -> bool:
    """Whether a value, as JSON, fulfils a comparison with what somebody typed. `!=` is all that `=` is not."""
    if text is None:
        return False
    if compared == Operator.NOT_EQUAL:
        return not _holds(text, type_name, Operator.EQUAL, operand)
    return _holds(text, type_name, compared, operand)


def _holds(text: str, type_name: str, compared: str, operand: str) -> bool:
    wanted, sought, document = _meant(operand)
    if wanted is not None:
        number = _number(text, type_name)
        return number is not None and _COMPARES[compared](number, wanted)
    if text == sought:
        return True
    # [1] is [1.0], in an embedding; a text or a word is equal as it is written or not at all.
    return isinstance(document, list | dict) and text[:1] == sought[:1] and _same(stored(text), document)


def _number(text: str, type_name: str) -> int | float | None:
    if text[:1] in "-0123456789":
        return number_in(text)
    return number_in(_NON_FINITE[text]) if text in _NON_FINITE and is_number(type_name) else None


@lru_cache(maxsize=64)
def _meant(operand: str) -> tuple[int | float | None, str, object]:
    """The number that is meant, or else the JSON, as values are written and as a document."""
    try:
        document = read(operand)
        text = canonical(document)
    except RefusedError:
        # No JSON: the text itself.
        document, text = operand, canonical(operand)
    return number_in(operand), text, document


def _same(one: object, other: object) -> bool:
    """Whether two documents are the same, whichever way their numbers are written. True is no 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(entry, other[key]) for key, entry in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other
