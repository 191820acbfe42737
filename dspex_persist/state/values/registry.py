"""What a value type is, and which there are.

Each type is a `ValueType`, made in a file of its own in `values.types` and registered there. Whatever depends on a
variable's type asks its `ValueType`; nobody else compares names of types.
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
"""Shape, element type and numbers, in row-major order, as the Python object that they are."""


def _as_it_is(document: Any) -> Any:
    return document


@dataclass(frozen=True, slots=True)
class Companion:
    """How a type has values that are bytes beside a JSON description of them.

    `as_shape`: the described shape as the constraints see it; raises `RefusedError` for one that no value has.
    """

    unpack: Unpack
    as_shape: Callable[[Shape], Shape] = _as_it_is


# Compared by identity: what is compiled for a type is cached for it, not for its name.
@dataclass(frozen=True, slots=True, eq=False)
class ValueType:
    """What the values of one type are. *Document*: what the JSON of a value holds, as Python's `json` reads it."""

    name: str
    coerce: Callable[[object], object]
    """A document that came in, as it is kept; raises `RefusedError` for what is no value of the type."""
    constrain: Mapping[str, Keyword] = field(default_factory=dict)
    """Constraints that its values can have, by their keys."""
    decode: Callable[[Any], object] = _as_it_is
    """A kept document as a Python object; raises `RefusedError`."""
    encode: Callable[[Any], object] = plain
    """A Python object as a document, which `coerce` will check; raises `RefusedError` for what JSON cannot say."""
    infer: Mapping[type, Condition | None] = field(default_factory=dict)
    """Classes whose objects are of the type where nobody says which one: all of them (None), or those that fulfil a
    condition."""
    schema: Mapping[str, object] = field(default_factory=dict)
    """What the JSON Schema of an annotation says if the type is meant; `...` stands for anything. Empty: no annotation
    means it."""
    companion: Companion | None = None
    """Set if values can come as bytes."""
    is_container: bool = False
    """Values are JSON objects or arrays: a string that is the JSON of one is taken for it."""
    is_number: bool = False
    """Values are single numbers, which can be compared and drawn."""


_TYPES: Final[dict[str, ValueType]] = {}
_INFERRED: Final[dict[type, list[tuple[Condition | None, ValueType]]]] = {}


def register(value_type: ValueType) -> None:
    """Add a type, before any values are read. Raises `ValueError` if its name is taken."""
    if value_type.name in _TYPES:
        raise ValueError(f"the value type {value_type.name} is registered already")
    _TYPES[value_type.name] = value_type
    _set_inferred()


def unregister(value_type: ValueType) -> None:
    """Take a type back. Raises `ValueError` if it is not registered."""
    if _TYPES.get(value_type.name) is not value_type:
        raise ValueError(f"the value type {value_type.name} is not registered")
    del _TYPES[value_type.name]
    _set_inferred()


def _set_inferred() -> None:
    """By class: types with a condition before those that take every object, newer ones before older ones."""
    _INFERRED.clear()
    for value_type in reversed(_TYPES.values()):
        for kind, condition in value_type.infer.items():
            _INFERRED.setdefault(kind, []).append((condition, value_type))
    for entries in _INFERRED.values():
        entries.sort(key=lambda entry: entry[0] is None)


def type_names() -> tuple[str, ...]:
    """The names of all types, in the order in which they were registered."""
    return tuple(_TYPES)


def find_type(type_name: str) -> ValueType | None:
    """The type of that name, or None."""
    return _TYPES.get(type_name)


def get_type(name: str, type_name: str) -> ValueType:
    """The type of that name, for the variable `name`; `UnknownTypeError` lists the possible ones."""
    value_type = _TYPES.get(type_name)
    if value_type is None:
        raise UnknownTypeError(name, type_name, ", ".join(_TYPES))
    return value_type


def is_number(type_name: str) -> bool:
    """Whether values of a type are single numbers."""
    value_type = _TYPES.get(type_name)
    return value_type is not None and value_type.is_number


def type_of_object(obj: object) -> ValueType | None:
    """The type of a Python object, by its class or the nearest one that the class is derived from; None if there is
    none."""
    for kind in type(obj).__mro__:
        for condition, value_type in _INFERRED.get(kind, ()):
            if condition is None or condition(obj):
                return value_type
    return None


def type_of_schema(schema: Mapping[str, object]) -> ValueType | None:
    """The type that is meant by a JSON Schema: of those that fit it the one that says most, or else the newest."""
    fitting = [value_type for value_type in reversed(_TYPES.values()) if _fits(value_type.schema, schema)]
    return max(fitting, key=lambda value_type: len(value_type.schema), default=None)


def _fits(said: Mapping[str, object], schema: Mapping[str, object]) -> bool:
    return bool(said) and all(key in schema and entry in (..., schema[key]) for key, entry in said.items())


def schema_keywords() -> dict[str, str]:
    """Of the constraints that JSON Schema has, too: its keyword, and the key of ours."""
    return {
        keyword.schema: key
        for value_type in _TYPES.values()
        for key, keyword in value_type.constrain.items()
        if keyword.schema
    }


def states_nothing(key: str, entry: object) -> bool:
    """Whether an entry of constraints states none: null always, for some keys an empty list or text."""
    return entry is None or any(
        key in value_type.constrain and value_type.constrain[key].empty == entry for value_type in _TYPES.values()
    )
