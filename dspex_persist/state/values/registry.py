"""The registry of value types.

Each type is a `ValueType` in a separate file in `values.types`. Code that depends on a variable's type uses its
`ValueType`, and never compares names of types.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from dspex_persist.state.errors import UnknownTypeError
from dspex_persist.state.values.documents import plain
from dspex_persist.state.values.keywords import Keyword
from dspex_persist.state.values.tensors import Dtype, Shape

Condition: TypeAlias = Callable[[Any], bool]
Unpack: TypeAlias = Callable[[Shape, Dtype, list[Any]], object]
"""Takes a shape, an element type and numbers in row-major order, and returns the Python object for them."""


def _as_it_is(document: Any) -> Any:
    return document


@dataclass(frozen=True, slots=True)
class Companion:
    """The binary form of a type: bytes with a JSON description.

    Attributes:
        unpack: Converts the numbers to a Python object.
        as_shape: Converts the described shape for the constraints, or raises `RefusedError` for an invalid one.
    """

    unpack: Unpack
    as_shape: Callable[[Shape], Shape] = _as_it_is


# Compared by identity, so that compiled constraints are cached for the type and not for its name.
@dataclass(frozen=True, slots=True, eq=False)
class ValueType:
    """A type of values. A *document* is the JSON of a value as Python's `json` parses it."""

    name: str
    coerce: Callable[[object], object]
    """Returns a document in the form to be stored, or raises `RefusedError` if it is not a value of the type."""
    constrain: Mapping[str, Keyword] = field(default_factory=dict)
    """The constraints that variables of the type can have, by their keys."""
    decode: Callable[[Any], object] = _as_it_is
    """Returns a stored document as a Python object, or raises `RefusedError`."""
    encode: Callable[[Any], object] = plain
    """Returns a Python object as a document for `coerce`, or raises `RefusedError` if JSON cannot represent it."""
    infer: Mapping[type, Condition | None] = field(default_factory=dict)
    """Classes whose objects have the type by default: all of them (None), or those that fulfil a condition."""
    schema: Mapping[str, object] = field(default_factory=dict)
    """The entries of an annotation's JSON Schema that imply the type; `...` matches anything. Empty: none do."""
    companion: Companion | None = None
    """The binary form, if there is one."""
    is_container: bool = False
    """Whether values are JSON objects or arrays. A string with the JSON of one is then accepted instead."""
    is_number: bool = False
    """Whether values are single numbers, which can be compared and plotted."""


_TYPES: Final[dict[str, ValueType]] = {}
_INFERRED: Final[dict[type, list[tuple[Condition | None, ValueType]]]] = {}


def register(value_type: ValueType) -> None:
    """Add a type, before any values are parsed. Raises `ValueError` if its name is in use."""
    if value_type.name in _TYPES:
        raise ValueError(f"the value type {value_type.name} is registered already")
    _TYPES[value_type.name] = value_type
    _set_inferred()


def unregister(value_type: ValueType) -> None:
    """Remove a type. Raises `ValueError` if it is not registered."""
    if _TYPES.get(value_type.name) is not value_type:
        raise ValueError(f"the value type {value_type.name} is not registered")
    del _TYPES[value_type.name]
    _set_inferred()


def _set_inferred() -> None:
    """Order the types of each class: those with a condition first, and newer ones before older ones."""
    _INFERRED.clear()
    for value_type in reversed(_TYPES.values()):
        for kind, condition in value_type.infer.items():
            _INFERRED.setdefault(kind, []).append((condition, value_type))
    for entries in _INFERRED.values():
        entries.sort(key=lambda entry: entry[0] is None)


def type_names() -> tuple[str, ...]:
    """Return the names of all types in the order of their registration."""
    return tuple(_TYPES)


# The method itself, which takes a third of the time of a function: each value that is read needs its type.
find_type: Final[Callable[[str], ValueType | None]] = _TYPES.get
"""Returns the type with a name, or None."""


def get_type(name: str, type_name: str) -> ValueType:
    """Return the type with this name for the variable `name`, or raise `UnknownTypeError`, which lists all types."""
    value_type = _TYPES.get(type_name)
    if value_type is None:
        raise UnknownTypeError(name, type_name, ", ".join(_TYPES))
    return value_type


def is_number(type_name: str) -> bool:
    """Whether the values of a type are single numbers."""
    value_type = _TYPES.get(type_name)
    return value_type is not None and value_type.is_number


def type_of_object(obj: object) -> ValueType | None:
    """Return the type for a Python object, by its class or the nearest base class; None if no type fits."""
    for kind in type(obj).__mro__:
        for condition, value_type in _INFERRED.get(kind, ()):
            if condition is None or condition(obj):
                return value_type
    return None


def type_of_schema(schema: Mapping[str, object]) -> ValueType | None:
    """Return the type that a JSON Schema implies: the most specific one that matches, and of several the newest."""
    fitting = [value_type for value_type in reversed(_TYPES.values()) if _fits(value_type.schema, schema)]
    return max(fitting, key=lambda value_type: len(value_type.schema), default=None)


def _fits(required: Mapping[str, object], schema: Mapping[str, object]) -> bool:
    return bool(required) and all(key in schema and entry in (..., schema[key]) for key, entry in required.items())


def schema_keywords() -> dict[str, str]:
    """Return the keys of those constraints that JSON Schema has as well, by its keywords."""
    return {
        keyword.schema: key
        for value_type in _TYPES.values()
        for key, keyword in value_type.constrain.items()
        if keyword.schema
    }


def states_nothing(key: str, entry: object) -> bool:
    """Whether an entry means no constraint: null, and for some keys an empty list or string."""
    return entry is None or any(
        key in value_type.constrain and value_type.constrain[key].empty == entry for value_type in _TYPES.values()
    )
