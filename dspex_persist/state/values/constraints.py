"""Constraints: compiled once for each type and text, then checked for every value.

The `ValueType` says which constraints a type has. Null, an empty list of strings and an empty string mean no
constraint. Keys that a type does not have are stored but not checked, because clients store other data there; the
Python API of contexts refuses them (`check_keywords`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from dspex_persist.spelling import closest, did_you_mean, quote
from dspex_persist.state.errors import InvalidConstraintsError, InvalidValueError
from dspex_persist.state.values.json_schema import SCHEMA_DEPTH
from dspex_persist.state.values.json_text import (
    RefusedError,
    canonical,
    depth_if_above,
    read,
    shown,
    utf8_size_bytes,
)
from dspex_persist.state.values.keywords import Check
from dspex_persist.state.values.registry import ValueType, find_type, get_type, states_nothing
from dspex_persist.state.values.tensors import Dtype, Shape

_JSON_DEPTH = 20
# Longer texts are compiled each time, so that clients cannot fill the memory with cached constraints.
_CACHED_LENGTH = 8 * 1024
# But a few of those, because schemas of models are long, and compiling one takes longer than checking a value.
_LONG_ONES = 16
_MOST_MATCHING = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Constraints:
    """Compiled constraints on the values of a type.

    Attributes:
        json: Their canonical JSON; "" if there are none.
        meaning: The same with integral floats as integers, to compare constraints: some languages write 2 as 2.0.
    """

    type_name: str
    json: str = ""
    meaning: str = ""
    checks: tuple[Check, ...] = field(default=(), compare=False)
    shape_checks: tuple[Callable[[Shape], str | None], ...] = field(default=(), compare=False)
    dtype: Dtype | None = None
    program_size: int = 0
    """Instructions of the compiled pattern: the work for each byte of a value."""

    def check(self, name: str, data: object) -> None:
        """Raise `InvalidValueError` if `data`, a coerced value of the type, violates a constraint."""
        for check in self.checks:
            reason = check(data)
            if reason:
                raise InvalidValueError(name, reason)

    def check_description(self, name: str, shape: Shape | None, dtype: Dtype | None) -> None:
        """Do the same for a binary value with this shape and element type; None if its description has none."""
        for check in self.shape_checks:
            reason = check(shape) if shape is not None else None
            if reason:
                raise InvalidValueError(name, reason)
        if self.dtype and dtype and dtype != self.dtype:
            raise InvalidValueError(name, f"dtype {dtype.name} is not {self.dtype.name}")


def compile_constraints(name: str, type_name: str, constraints_json: str) -> Constraints:
    """Compile constraints for the values of a type.

    Args:
        name: The variable's name, for errors.
        type_name: The name of the type.
        constraints_json: A JSON object; "", "{}" and "null" mean no constraints.

    Raises:
        UnknownTypeError: There is no such type.
        InvalidConstraintsError: The constraints are invalid; the message names the key.
    """
    value_type = get_type(name, type_name)
    try:
        if len(constraints_json) <= _CACHED_LENGTH:
            return _compile_cached(value_type, constraints_json)
        return _compile_long(value_type, constraints_json)
    except RefusedError as error:
        raise InvalidConstraintsError(name, error.reason) from error


def count_matching(spent: int, name: str, work: int) -> int:
    """Add `work` (instructions of the pattern times bytes) to the work `spent` on patterns in one call.

    Raises `InvalidValueError` if the sum is too large.
    """
    if spent + work > _MOST_MATCHING:
        reason = "together with those before it is too much to match in one call with patterns of this complexity"
        raise InvalidValueError(name, reason)
    return spent + work


def constraints_json(name: str, constraints: object) -> str:
    """Return constraints as JSON; accepts a mapping, JSON, or None."""
    if constraints is None or isinstance(constraints, str):
        return constraints or ""
    if not isinstance(constraints, Mapping) or not all(isinstance(key, str) for key in constraints):
        kind = type(constraints).__name__
        reason = f'they must be a mapping with str keys, such as {{"min": 0}}, not this {kind}'
        raise InvalidConstraintsError(name, reason)
    try:
        return canonical(dict(constraints))
    except RefusedError as error:
        raise InvalidConstraintsError(name, error.reason) from error


def check_keywords(name: str, type_name: str, constraints: Mapping[str, Any] | str | None) -> None:
    """Refuse keys that are no constraints of a type. Variables may have such keys, which are kept and not checked.

    Args:
        name: The variable's name, for errors.
        type_name: The name of the type. One that does not exist is refused elsewhere.
        constraints: As for `constraints_json`, which has accepted them.

    Raises:
        InvalidConstraintsError: It names the key, the one that was probably meant, and those of the type.
    """
    value_type = find_type(type_name)
    if not constraints or value_type is None:
        return
    try:
        stated = _read_object(constraints, SCHEMA_DEPTH) if isinstance(constraints, str) else constraints
    except RefusedError as error:
        raise InvalidConstraintsError(name, error.reason) from error
    for key in stated:
        if key not in value_type.constrain:
            known = sorted(value_type.constrain)
            meant = did_you_mean(closest(key.lower(), known), spell=str)
            has = f"can have {', '.join(known)}" if known else "has no constraints"
            has = f"{meant} It {has}" if meant else f"it {has}"
            raise InvalidConstraintsError(name, f"type {type_name} has no constraint {quote(key)}; {has}")


def schema_version(constraints_json: str) -> int | None:
    """Return the version of the schema in a variable's constraints; None if there is none."""
    if '"schema_version"' not in constraints_json:
        return None
    try:
        version = _read_object(constraints_json, SCHEMA_DEPTH).get("schema_version")
    except RefusedError:
        return None
    return version if type(version) is int else None


def _compile(value_type: ValueType, text: str) -> Constraints:
    known = value_type.constrain
    depth = SCHEMA_DEPTH if "schema" in known else _JSON_DEPTH
    stated = {key: entry for key, entry in _read_object(text, depth).items() if not states_nothing(key, entry)}
    if not stated:
        return Constraints(value_type.name)
    checked = sorted(stated.keys() & known.keys())
    rules = [known[key].build(stated[key]) for key in checked]
    for key in checked:
        if known[key].at_most:
            _check_order(stated, key, known[key].at_most)
    comparable = {key: _whole(entry) if key in known else entry for key, entry in stated.items()}
    return Constraints(
        value_type.name,
        canonical(stated),
        canonical(comparable),
        tuple(rule.check for rule in rules),
        tuple(rule.check_shape for rule in rules if rule.check_shape is not None),
        next((rule.dtype for rule in rules if rule.dtype is not None), None),
        max((rule.program_size for rule in rules), default=0),
    )


def _whole(entry: Any) -> Any:
    return int(entry) if isinstance(entry, float) and entry.is_integer() else entry


_compile_cached = lru_cache(maxsize=1024)(_compile)
_compile_long = lru_cache(maxsize=_LONG_ONES)(_compile)


def _read_object(text: str, most_depth: int) -> dict[str, Any]:
    if not text:
        return {}
    utf8_size_bytes(text)
    if depth_if_above(text, most_depth):
        raise RefusedError(f"nested deeper than {most_depth}")
    document = read(text)
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise RefusedError(f"must be a JSON object, not {shown(document)}")
    return document


def _check_order(stated: Mapping[str, Any], low: str, high: str) -> None:
    if low in stated and high in stated and stated[low] > stated[high]:
        raise RefusedError(f"{low} {shown(stated[low])} is above {high} {shown(stated[high])}")
