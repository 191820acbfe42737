"""Checks of the arguments that callers pass. They run before any other code sees the arguments.

All backends take the same commands, so a wrong argument gives the same error in each. Mappings and lists are copied,
so that nothing changes when the caller changes them later.
"""

import contextlib
import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from numbers import Real
from operator import index
from typing import Annotated, Any, TypeAlias, get_type_hints

from dspex_persist.state.errors import InvalidArgumentError, quote
from dspex_persist.state.frozen import FrozenDict
from dspex_persist.state.model import Origin, Source, Value

Check: TypeAlias = Callable[[str, Any], Any]
"""Takes the name of an argument and the object passed for it; returns the object to store."""

_LARGEST = 2**31 - 1
_LAST_COMMIT = 2**63 - 1
_LONGEST_TIMEOUT_S = 1e9
_SURROGATES = re.compile("[\ud800-\udfff]")
_SHORT_BITS = 128
"""The longest numbers that a message quotes: Python does not format numbers with more than 4300 digits."""
Number: TypeAlias = Annotated[int, "32 bits"]
"""A number that has 32 bits in the protocol."""
Version: TypeAlias = Annotated[int, "32 bits, from 0 up"]
"""A version of a variable."""


def text(field: str, given: object) -> str:
    """Return a str that every backend can store: without NUL, where SQLite ends texts, and lone surrogates."""
    if type(given) is str and given.isascii() and "\0" not in given:
        return given
    if not isinstance(given, str):
        raise InvalidArgumentError(field, f"it must be a str, not {_kind(given)}{_advice(given)}")
    # A subclass, such as an enumeration, may override any method.
    plain = str.__str__(given)
    # No loop over the characters: there may be a hundred million, and other calls wait.
    if "\0" in plain:
        raise InvalidArgumentError(field, f"{quote(plain)} contains NUL (U+0000): leave it out")
    surrogate = _SURROGATES.search(plain)
    if surrogate is not None:
        reason = f"{quote(plain)} contains a lone surrogate (U+{ord(surrogate[0]):04X}), which is not a character"
        raise InvalidArgumentError(field, reason)
    return plain


def number(field: str, given: Any) -> int:
    """Return an int. Accepts integers of other libraries, such as NumPy, but no bool."""
    if not isinstance(given, bool) and hasattr(type(given), "__index__"):
        # Arrays have `__index__`, too, and raise unless they hold a single integer.
        with contextlib.suppress(TypeError):
            return index(given)
    advice = ": use int(...)" if isinstance(given, str | float) else ""
    raise InvalidArgumentError(field, f"it must be an int, not {_kind(given)}{advice}")


def short_number(field: str, given: object) -> int:
    """Return a number of 32 bits."""
    integer = given if type(given) is int else number(field, given)
    if not -_LARGEST <= integer <= _LARGEST:
        raise InvalidArgumentError(field, f"it must be at most {_LARGEST}, not a number of {integer.bit_length()} bits")
    return integer


def version(field: str, given: object) -> int:
    """Return a number of 32 bits that is at least 0."""
    integer = short_number(field, given)
    if integer < 0:
        raise InvalidArgumentError(field, f"{integer} is below 0: versions count from 0")
    return integer


def sequence(field: str, given: object) -> int:
    """Return the number of a commit, or 0 for the time before the first."""
    integer = number(field, given)
    if not 0 <= integer <= _LAST_COMMIT:
        raise InvalidArgumentError(field, f"it must be from 0 to {_LAST_COMMIT}: the number of a commit, or 0")
    return integer


def flag(field: str, given: object) -> bool:
    """Return a bool."""
    if not isinstance(given, bool):
        raise InvalidArgumentError(field, f"it must be True or False, not {_kind(given)}")
    return given


def seconds(field: str, given: object) -> float:
    """Return a number of seconds."""
    if not isinstance(given, Real) or isinstance(given, bool):
        advice = ": use float(...)" if isinstance(given, str) else ""
        raise InvalidArgumentError(field, f"it must be a number of seconds, not {_kind(given)}{advice}")
    try:
        return float(given)
    except OverflowError:
        raise InvalidArgumentError(field, "it is too large for a number of seconds") from None


def timeout(field: str, given: object) -> float:
    """Return a timeout: a number of seconds above 0."""
    timeout_s = seconds(field, given)
    # In this form it refuses NaN, too: every comparison with NaN is false.
    if not 0 < timeout_s <= _LONGEST_TIMEOUT_S:
        reason = f"it must be above 0 and at most {_LONGEST_TIMEOUT_S:.0f} seconds, not {timeout_s:g}"
        raise InvalidArgumentError(field, reason)
    return timeout_s


def texts(field: str, given: object) -> tuple[str, ...]:
    """Return several names or ids."""
    if not isinstance(given, str | bytes) and isinstance(given, Iterable):
        # An array without dimensions raises only when it is iterated over.
        with contextlib.suppress(TypeError):
            return tuple(text(field, each) for each in given)
    advice = ": write [...] around it" if isinstance(given, str) else ""
    raise InvalidArgumentError(field, f"it must be a list of str, not {_kind(given)}{advice}")


def metadata(field: str, given: object) -> FrozenDict[str, str]:
    """Return metadata: a mapping of str to str."""
    if type(given) is FrozenDict:
        return given
    return FrozenDict({_key(field, key): _entry(field, key, entry) for key, entry in mapping(field, given).items()})


def _key(field: str, key: object) -> str:
    if not isinstance(key, str):
        raise InvalidArgumentError(field, f"its keys must be str, not {_kind(key)}{_advice(key)}")
    return text(field, key)


def _entry(field: str, key: object, entry: object) -> str:
    if isinstance(entry, str):
        return text(field, entry)
    if isinstance(entry, float) or (isinstance(entry, int) and entry.bit_length() <= _SHORT_BITS):
        advice = f'write "{str(entry).lower()}"'
    else:
        advice = "leave the entry out" if entry is None else "write a str, such as JSON"
    raise InvalidArgumentError(field, f"the entry {quote(key)} must be a str, not {_kind(entry)}: {advice}")


def value(field: str, given: object) -> Value:
    """Return an encoded value. It is checked against a type only later."""
    if not isinstance(given, Value):
        raise InvalidArgumentError(field, f"it must be a Value, not {_kind(given)}: make it with values.encode(...)")
    if given.binary is not None and type(given.binary) is not bytes:
        if not isinstance(given.binary, bytes | bytearray | memoryview):
            raise InvalidArgumentError(field, f"its binary must be bytes, not {_kind(given.binary)}")
        given = Value(given.json, bytes(given.binary))
    json = given.json
    return given if type(json) is str and json.isascii() else Value(_json(field, json), given.binary)


def _json(field: str, given: object) -> str:
    if not isinstance(given, str):
        raise InvalidArgumentError(field, f"its json must be a str, not {_kind(given)}")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        reason = f"its json contains a lone surrogate (U+{ord(given[error.start]):04X}), which is not a character"
        raise InvalidArgumentError(field, reason) from None
    return given


def values_by_text(field: str, given: object) -> FrozenDict[str, Value]:
    """Return a mapping of names or ids to encoded values."""
    entries = mapping(field, given)
    return FrozenDict({_key(field, key): value(field, entry) for key, entry in entries.items()})


def _objects(field: str, given: object) -> Any:
    """Return a copy of a mapping to be encoded as JSON; encoding it checks that it can be."""
    try:
        return copy.deepcopy(mapping(field, given))
    except (TypeError, RecursionError):
        raise InvalidArgumentError(field, "it must contain only values that JSON can represent") from None


def mapping(field: str, given: object) -> dict[Any, Any]:
    """Return a copy of a mapping as a dict."""
    if not isinstance(given, Mapping):
        raise InvalidArgumentError(field, f"it must be a mapping, such as a dict, not {_kind(given)}")
    return dict(given)


def origin(given: object) -> Origin:
    """Return an origin with valid texts."""
    if not isinstance(given, Origin):
        raise InvalidArgumentError("origin", f"it must be an Origin, not {_kind(given)}")
    text("actor", given.actor)
    text("cause", given.cause)
    if given.idempotency_key is not None:
        text("idempotency_key", given.idempotency_key)
    if given.optimizer_id is not None:
        text("optimizer_id", given.optimizer_id)
    if not isinstance(given.source, Source):
        raise InvalidArgumentError("source", f"it must be a Source, not {_kind(given.source)}")
    return given


def _optional(check: Check) -> Check:
    return lambda field, given: None if given is None else check(field, given)


# The check for each annotation of a command's field. Fields with other annotations are never set by callers.
_CHECKS: Mapping[Any, Check] = {
    str: text,
    str | None: _optional(text),
    Number: short_number,
    Number | None: _optional(short_number),
    Version | None: _optional(version),
    bool: flag,
    float | None: _optional(seconds),
    Value: value,
    Sequence[str]: texts,
    Mapping[str, str]: metadata,
    Mapping[str, Value]: values_by_text,
    Mapping[str, Any]: _objects,
}


_compiled: dict[Any, tuple[tuple[str, Check], ...]] = {}


def checks_of(kind: type[Any]) -> tuple[tuple[str, Check], ...]:
    """Return the checks of a dataclass's fields as (name, check), according to their annotations."""
    checks = _compiled.get(kind)
    if checks is None:
        hints = get_type_hints(kind, include_extras=True)
        names = [field.name for field in fields(kind) if hints[field.name] in _CHECKS]
        checks = _compiled[kind] = tuple((name, _CHECKS[hints[name]]) for name in names)
    return checks


def _kind(given: object) -> str:
    return "None" if given is None else type(given).__name__


def _advice(given: object) -> str:
    if given is None:
        return ""
    return ": decode it" if isinstance(given, bytes | bytearray) else ": use str(...)"
