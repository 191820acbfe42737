"""Constraints: compiled once for each type and text, then checked against every value.

| type | constraints |
|---|---|
| float, integer | `min`, `max`: inclusive bounds |
| string | `min_length`, `max_length` (code points), `pattern`, `enum` |
| choice | `choices` |
| module | `choices` or `allowed_modules`, `pattern`, `namespace` |
| embedding | `dimensions` |
| tensor | `shape` (null or -1 stands for any length), `dtype` |

A `pattern` is searched for anywhere in the value, as in JSON Schema; anchor it with `^` and `$` to match the
whole. Its syntax is RE2's: linear in time, so without backreferences and look-around.

Null, an empty list of strings and an empty text state no constraint. Keys that a type does not know are kept and shown,
and nothing is checked by them: clients keep things of their own there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import re2

from dspex_persist.state.errors import InvalidConstraintsError, InvalidValueError, UnknownTypeError
from dspex_persist.state.values.coercion import TYPE_NAMES
from dspex_persist.state.values.json_text import (
    RefusedError,
    canonical,
    depth_if_above,
    read,
    shorten,
    shown,
    utf8_size_bytes,
)
from dspex_persist.state.values.tensors import Dtype, check_dtype, elements, get_dtype, shown_shape

_JSON_DEPTH = 20
# Longer texts are compiled each time, so that no client can fill memory with cached constraints.
_CACHED_LENGTH = 8 * 1024
_LISTED_LENGTH = 120
_PATTERN_MEMORY_BYTES = 2 * 1024 * 1024
# Instructions of the compiled pattern times bytes of the string; RE2 needs up to 10 ns for each of them.
_PATTERN_WORK = 100_000_000
_MOST_MATCHING = 1_000_000_000

Check = Callable[[Any], str | None]  # what is wrong with a value of the type, or None
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Constraints:
    """What values must fulfil beyond their type. `json` is canonical, and empty where there is nothing. `meaning` is
    the same, too, for bounds that are the same number: languages write 2 and 2.0."""

    type_name: str
    json: str = ""
    meaning: str = ""
    checks: tuple[Check, ...] = field(default=(), compare=False)
    shape_checks: tuple[Check, ...] = field(default=(), compare=False)
    dtype: Dtype | None = None
    program_size: int = 0
    """Instructions of the pattern: what it takes to look for it, for each byte."""

    def check(self, name: str, data: object) -> None:
        """`InvalidValueError` if `data`, a value of the type as coercion left it, breaks a constraint."""
        for check in self.checks:
            reason = check(data)
            if reason:
                raise InvalidValueError(name, reason)

    def check_description(self, name: str, shape: Shape | None, dtype: Dtype | None) -> None:
        """The same for a binary value, as far as its description tells (None: it does not)."""
        for check in self.shape_checks if shape is not None else ():
            reason = check(shape)
            if reason:
                raise InvalidValueError(name, reason)
        if self.dtype and dtype and dtype != self.dtype:
            raise InvalidValueError(name, f"dtype {dtype.name} is not {self.dtype.name}")


def compile_constraints(name: str, type_name: str, constraints_json: str) -> Constraints:
    """The constraints that `constraints_json` states for values of a type; "", "{}" and "null" state none.

    `UnknownTypeError` for the type; `InvalidConstraintsError`, naming the key, for the text.
    """
    if type_name not in _BUILDERS:
        raise UnknownTypeError(name, type_name, ", ".join(TYPE_NAMES))
    try:
        if len(constraints_json) <= _CACHED_LENGTH:
            return _compile_cached(type_name, constraints_json)
        return _compile(type_name, constraints_json)
    except RefusedError as error:
        raise InvalidConstraintsError(name, error.reason) from error


def count_matching(spent: int, name: str, work: int) -> int:
    """What one call has spent on matching with patterns, `work` (instructions of the pattern times bytes) included;
    `InvalidValueError` if that is too much."""
    if spent + work > _MOST_MATCHING:
        reason = "together with those before it is too much to match in one call with patterns of this complexity"
        raise InvalidValueError(name, reason)
    return spent + work


def constraints_json(name: str, constraints: object) -> str:
    """The text of constraints that are given as a mapping, as their text, or not at all."""
    if constraints is None or isinstance(constraints, str):
        return constraints or ""
    if not isinstance(constraints, Mapping) or not all(isinstance(key, str) for key in constraints):
        kind = type(constraints).__name__
        raise InvalidConstraintsError(name, f'they must be a mapping by str, such as {{"min": 0}}, not this {kind}')
    try:
        return canonical(dict(constraints))
    except RefusedError as error:
        raise InvalidConstraintsError(name, error.reason) from error


def _compile(type_name: str, text: str) -> Constraints:
    builders = _BUILDERS[type_name]
    stated = {key: entry for key, entry in _read_object(text).items() if not _is_none(key, entry)}
    if not stated:
        return Constraints(type_name)
    checked = {key: stated[key] for key in sorted(stated.keys() & builders.keys())}
    checks = tuple(builders[key](entry) for key, entry in checked.items())
    _check_order(checked, "min", "max")
    _check_order(checked, "min_length", "max_length")
    meant = {key: _whole(entry) if key in checked else entry for key, entry in stated.items()}
    return Constraints(
        type_name,
        canonical(stated),
        canonical(meant),
        checks,
        tuple(_SHAPE_BUILDERS[key](checked[key]) for key in _SHAPE_BUILDERS if key in checked),
        get_dtype(checked["dtype"]) if "dtype" in checked else None,
        _compile_pattern(checked["pattern"]).programsize if "pattern" in checked else 0,
    )


def _whole(entry: Any) -> Any:
    return int(entry) if isinstance(entry, float) and entry.is_integer() else entry


def _is_none(key: str, entry: object) -> bool:
    return entry is None or (key in _EMPTY and entry == _EMPTY[key])


_compile_cached = lru_cache(maxsize=1024)(_compile)


def _read_object(text: str) -> dict[str, Any]:
    if not text:
        return {}
    utf8_size_bytes(text)
    if depth_if_above(text, _JSON_DEPTH):
        raise RefusedError(f"nested deeper than {_JSON_DEPTH}")
    document = read(text)
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise RefusedError(f"must be a JSON object, not {shown(document)}")
    return document


def _check_order(stated: Mapping[str, Any], low: str, high: str) -> None:
    if low in stated and high in stated and stated[low] > stated[high]:
        raise RefusedError(f"{low} {shown(stated[low])} is above {high} {shown(stated[high])}")


# Readers of a constraint's own value. Each refuses what is of the wrong kind, naming the key.


def _number(key: str, stated: object) -> int | float:
    if type(stated) is int or type(stated) is float:
        return stated
    raise RefusedError(f"{key} must be a number, not {shown(stated)}")


def _integer(key: str, stated: object, at_least: int) -> int:
    if type(stated) is int and stated >= at_least:
        return stated
    kind = "a positive" if at_least else "a non-negative"
    raise RefusedError(f"{key} must be {kind} integer, not {shown(stated)}")


def _text(key: str, stated: object) -> str:
    if isinstance(stated, str):
        return stated
    raise RefusedError(f"{key} must be a string, not {shown(stated)}")


def _texts(key: str, stated: object) -> list[str]:
    if not isinstance(stated, list):
        raise RefusedError(f"{key} must be a list of strings, not {shown(stated)}")
    for entry in stated:
        if not isinstance(entry, str):
            raise RefusedError(f"{key} must be a list of strings, it holds {shown(entry)}")
    return stated


# Builders: from what a constraint states to its check.


def _minimum(stated: object) -> Check:
    minimum = _number("min", stated)

    def check(number: float) -> str | None:
        if number >= minimum:
            return None
        if number != number:  # NaN, the only number that differs from itself
            return f"NaN cannot be compared with minimum {shown(minimum)}"
        return f"value {shown(number)} is below minimum {shown(minimum)}"

    return check


def _maximum(stated: object) -> Check:
    maximum = _number("max", stated)

    def check(number: float) -> str | None:
        if number <= maximum:
            return None
        if number != number:
            return f"NaN cannot be compared with maximum {shown(maximum)}"
        return f"value {shown(number)} is above maximum {shown(maximum)}"

    return check


def _min_length(stated: object) -> Check:
    minimum = _integer("min_length", stated, at_least=0)

    def check(text: str) -> str | None:
        return f"length {len(text)} is below minimum {shown(minimum)}" if len(text) < minimum else None

    return check


def _max_length(stated: object) -> Check:
    maximum = _integer("max_length", stated, at_least=0)

    def check(text: str) -> str | None:
        return f"length {len(text)} is above maximum {shown(maximum)}" if len(text) > maximum else None

    return check


def _one_of(key: str) -> Callable[[object], Check]:
    def build(stated: object) -> Check:
        possible = _texts(key, stated)
        known, listed = frozenset(possible), _listed(possible)

        def check(text: str) -> str | None:
            return None if text in known else f"value {shown(text)} must be one of: {listed}"

        return check

    return build


def _listed(possible: Sequence[str]) -> str:
    """`a, b, c`, shortened."""
    listed = shorten(possible[0])
    for index, entry in enumerate(possible[1:], start=1):
        longer = f"{listed}, {shorten(entry)}"
        if len(longer) > _LISTED_LENGTH:
            return f"{listed}, ... ({len(possible) - index} more)"
        listed = longer
    return listed


def _namespace(stated: object) -> Check:
    namespace = _text("namespace", stated)

    def check(module: str) -> str | None:
        if module == namespace or module.startswith(f"{namespace}."):
            return None
        return f"value {shown(module)} is not in namespace {shown(namespace)}"

    return check


def _pattern(stated: object) -> Check:
    pattern = _text("pattern", stated)
    _compile_pattern(pattern)

    def check(text: str) -> str | None:
        # Looked up, not kept: the cache bounds what all patterns together hold in memory.
        compiled = _compile_pattern(pattern)
        encoded = text.encode()
        longest = _PATTERN_WORK // compiled.programsize
        if len(encoded) > longest:
            return (
                f"a string of {len(encoded)} bytes is too long to match pattern {shown(pattern)}: "
                f"at most {longest} bytes for a pattern of this complexity"
            )
        if compiled.search(encoded):
            return None
        return f"value {shown(text)} does not match pattern {shown(pattern)}"

    return check


@lru_cache(maxsize=128)
def _compile_pattern(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    options.max_mem = _PATTERN_MEMORY_BYTES
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0].decode(errors="replace")
        raise RefusedError(f"pattern {shown(pattern)} is no RE2 pattern: {shorten(reason)}") from None


def _dimensions_of_shape(stated: object) -> Check:
    dimensions = _integer("dimensions", stated, at_least=1)

    def check(shape: Shape) -> str | None:
        (length,) = shape
        return None if length == dimensions else f"{shown(length)} dimensions instead of {shown(dimensions)}"

    return check


def _dimensions(stated: object) -> Check:
    check_shape = _dimensions_of_shape(stated)
    return lambda embedding: check_shape((len(embedding),))


def _shape_of_shape(stated: object) -> Check:
    expected = _expected_shape(stated)

    def check(shape: Shape) -> str | None:
        if len(shape) == len(expected) and all(
            want is None or want == length for want, length in zip(expected, shape, strict=True)
        ):
            return None
        return f"shape {shown_shape(shape)} does not match shape {shown_shape(expected)} (null: any length)"

    return check


def _expected_shape(stated: object) -> tuple[int | None, ...]:
    if not isinstance(stated, list):
        raise RefusedError(f"shape must be a list of non-negative integers or null, not {shown(stated)}")
    for entry in stated:
        if entry is not None and (type(entry) is not int or entry < -1):
            raise RefusedError(f"shape must hold non-negative integers, or null or -1 for any; not {shown(entry)}")
    return tuple(None if entry == -1 else entry for entry in stated)


def _shape(stated: object) -> Check:
    check_shape = _shape_of_shape(stated)
    return lambda tensor: check_shape(tuple(tensor["shape"]))


def _dtype(stated: object) -> Check:
    dtype = get_dtype(stated)

    def check(tensor: dict[str, Any]) -> str | None:
        declared = get_dtype(tensor["dtype"]) if "dtype" in tensor else dtype
        if declared != dtype:
            return f"dtype {declared.name} is not {dtype.name}"
        try:
            check_dtype(elements(tensor["data"], tuple(tensor["shape"])), dtype)
        except RefusedError as error:
            return error.reason
        return None

    return check


Builders = Mapping[str, Callable[[object], Check]]
_RANGE: Builders = {"min": _minimum, "max": _maximum}
_BUILDERS: Mapping[str, Builders] = {
    "float": _RANGE,
    "integer": _RANGE,
    "string": {
        "min_length": _min_length,
        "max_length": _max_length,
        "pattern": _pattern,
        "enum": _one_of("enum"),
    },
    "boolean": {},
    "choice": {"choices": _one_of("choices")},
    "module": {
        "choices": _one_of("choices"),
        "allowed_modules": _one_of("allowed_modules"),
        "pattern": _pattern,
        "namespace": _namespace,
    },
    "embedding": {"dimensions": _dimensions},
    "tensor": {"shape": _shape, "dtype": _dtype},
    "map": {},
    "list": {},
}
_EMPTY: Mapping[str, object] = {
    **{key: [] for key in ("choices", "allowed_modules", "enum")},
    **dict.fromkeys(("pattern", "namespace", "dtype"), ""),
}
"""What states no constraint although it is not null. The empty shape is that of a scalar."""
_SHAPE_BUILDERS: Builders = {"dimensions": _dimensions_of_shape, "shape": _shape_of_shape}
