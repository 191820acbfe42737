"""Conditions on values. The store has SQLite call them, which would compare numbers as doubles; values are exact."""

import json
import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

from dspex_persist.state.audit import Operator, Predicate, number_in
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


def holds(predicate: Predicate, text: str | None, type_name: str) -> bool:
    """Whether a value fulfils a condition; see `value_holds`."""
    if predicate.operator is Operator.CONTAINS:
        return text is not None and any(each in text for each in spellings(predicate.operand))
    return value_holds(text, type_name, predicate.operator, predicate.operand)


def spellings(operand: str) -> tuple[str, str]:
    """Return what the JSON of a value contains if it contains the operand: itself, or as in a JSON string."""
    return operand, json.dumps(operand, ensure_ascii=False)[1:-1]


def value_holds(text: str | None, type_name: str, compared: str, operand: str) -> bool:
    """Whether a value fulfils a condition.

    Args:
        text: The value as JSON; None, for a deletion, fulfils no condition.
        type_name: Its type.
        compared: The operator.
        operand: The operand as the user wrote it.
    """
    if text is None:
        return False
    if compared == Operator.NOT_EQUAL:
        return not _holds(text, type_name, Operator.EQUAL, operand)
    return _holds(text, type_name, compared, operand)


def _holds(text: str, type_name: str, compared: str, operand: str) -> bool:
    wanted, sought, document = _parsed(operand)
    if wanted is not None:
        number = _number(text, type_name)
        return number is not None and _COMPARES[compared](number, wanted)
    if text == sought:
        return True
    # In an embedding, [1] equals [1.0]. Strings and words have only one spelling, compared above.
    return isinstance(document, list | dict) and text[:1] == sought[:1] and _same(stored(text), document)


def _number(text: str, type_name: str) -> int | float | None:
    if text[:1] in "-0123456789":
        return number_in(text)
    return number_in(_NON_FINITE[text]) if text in _NON_FINITE and is_number(type_name) else None


@lru_cache(maxsize=64)
def _parsed(operand: str) -> tuple[int | float | None, str, object]:
    """Return the operand as a number, if it is one; as JSON in the spelling of values; and as a document."""
    try:
        document = read(operand)
        text = canonical(document)
    except RefusedError:
        # Not JSON, so it means the text itself.
        document, text = operand, canonical(operand)
    return number_in(operand), text, document


def _same(one: object, other: object) -> bool:
    """Whether two documents are equal, however their numbers are written. True does not equal 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(entry, other[key]) for key, entry in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other
