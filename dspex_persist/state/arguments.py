"""Checks of the arguments that callers pass. They run before any other code sees the arguments.

All backends take the same commands, so a wrong argument gives the same error in each. Mappings and lists are copied,
so that nothing changes when the caller changes them later.
"""

import contextlib
import copy
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from enum import StrEnum
from numbers import Real
from operator import index
from typing import Annotated, Any, TypeAlias, TypeVar, get_type_hints

from dspex_persist.state.errors import InvalidArgumentError, LimitExceededError, quote
from dspex_persist.state.frozen import FrozenDict
from dspex_persist.state.model import Origin, Source, Value

C = TypeVar("C", bound=Callable[..., Any])
E = TypeVar("E", bound=StrEnum)

Check: TypeAlias = Callable[[str, Any], Any]
"""Takes the name of an argument and the object passed for it; returns the object to store."""

REASON_LENGTH = 500
"""The longest reason, in characters: it travels in a header, and those have a few kilobytes for all of them."""
_LARGEST = 2**31 - 1
_LAST_COMMIT = 2**63 - 1
_LONGEST_TIMEOUT_S = 1e9
_SURROGATES = re.compile("[\ud800-\udfff]")
_ONLY_STR = frozenset({str})
_NOTHING: FrozenDict[str, str] = FrozenDict()
_SHORT_BITS = 128
"""The longest numbers that a message quotes: Python does not format numbers with more than 4300 digits."""
Number: TypeAlias = Annotated[int, "32 bits"]
"""A number that has 32 bits in the protocol."""
Version: TypeAlias = Annotated[int, "32 bits, from 0 up"]
"""A version of a variable."""


def text(field: str, argument: object) -> str:
    """Return a str that every backend can store: without NUL, where SQLite ends texts, and lone surrogates."""
    if type(argument) is str and argument.isascii() and "\0" not in argument:
        return argument
    if not isinstance(argument, str):
        raise InvalidArgumentError(field, f"it must be a str, not {_kind(argument)}{_advice(argument)}")
    # A subclass, such as an enumeration, may override any method.
    plain = str.__str__(argument)
    # No loop over the characters: there may be a hundred million, and other calls wait.
    if "\0" in plain:
        raise InvalidArgumentError(field, f"{quote(plain)} contains NUL (U+0000): leave it out")
    surrogate = _SURROGATES.search(plain)
    if surrogate is not None:
        reason = f"{quote(plain)} contains a lone surrogate (U+{ord(surrogate[0]):04X}), which is not a character"
        raise InvalidArgumentError(field, reason)
    return plain


def number(field: str, argument: Any) -> int:
    """Return an int. Accepts integers of other libraries, such as NumPy, but no bool."""
    if not isinstance(argument, bool) and hasattr(type(argument), "__index__"):
        # Arrays have `__index__`, too, and raise unless they hold a single integer.
        with contextlib.suppress(TypeError):
            return index(argument)
    advice = ": use int(...)" if isinstance(argument, str | float) else ""
    raise InvalidArgumentError(field, f"it must be an int, not {_kind(argument)}{advice}")


def short_number(field: str, argument: object) -> int:
    """Return a number of 32 bits."""
    integer = argument if type(argument) is int else number(field, argument)
    if not -_LARGEST <= integer <= _LARGEST:
        raise InvalidArgumentError(field, f"it must be at most {_LARGEST}, not a number of {integer.bit_length()} bits")
    return integer


def repetitions(field: str, argument: object) -> int:
    """Return how often to repeat something at most: a number of 32 bits that is at least 0."""
    integer = short_number(field, argument)
    if integer < 0:
        raise InvalidArgumentError(field, f"{integer} is below 0: 0 means one attempt")
    return integer


def version(field: str, argument: object) -> int:
    """Return a number of 32 bits that is at least 0."""
    integer = short_number(field, argument)
    if integer < 0:
        raise InvalidArgumentError(field, f"{integer} is below 0: versions count from 0")
    return integer


def sequence(field: str, argument: object) -> int:
    """Return the number of a commit, or 0 for the time before the first."""
    integer = number(field, argument)
    if not 0 <= integer <= _LAST_COMMIT:
        raise InvalidArgumentError(field, f"it must be from 0 to {_LAST_COMMIT}: the number of a commit, or 0")
    return integer


def started(argument: object) -> int | None:
    """Check `started`: the commit that a session began with; None for the newest one with its id."""
    return None if argument is None else sequence("started", argument)


def flag(field: str, argument: object) -> bool:
    """Return a bool."""
    if not isinstance(argument, bool):
        raise InvalidArgumentError(field, f"it must be True or False, not {_kind(argument)}")
    return argument


def seconds(field: str, argument: object) -> float:
    """Return a number of seconds."""
    if not isinstance(argument, Real) or isinstance(argument, bool):
        advice = ": use float(...)" if isinstance(argument, str) else ""
        raise InvalidArgumentError(field, f"it must be a number of seconds, not {_kind(argument)}{advice}")
    try:
        return float(argument)
    except OverflowError:
        raise InvalidArgumentError(field, "it is too large for a number of seconds") from None


def timeout(field: str, argument: object) -> float:
    """Return a timeout: a number of seconds above 0."""
    timeout_s = seconds(field, argument)
    # In this form it refuses NaN, too: every comparison with NaN is false.
    if not 0 < timeout_s <= _LONGEST_TIMEOUT_S:
        reason = f"it must be above 0 and at most {_LONGEST_TIMEOUT_S:.0f} seconds, not {timeout_s:g}"
        raise InvalidArgumentError(field, reason)
    return timeout_s


def function(field: str, argument: C, *, also_async: bool = False) -> C:
    """Return a function that the library calls.

    Args:
        field: The name of the argument.
        argument: The function, or any other object that can be called.
        also_async: Whether it may be a coroutine function, whose result is awaited.
    """
    if not callable(argument):
        raise InvalidArgumentError(field, f"it must be a function, not {_kind(argument)}")
    if not also_async and inspect.iscoroutinefunction(argument):
        reason = "it must be a function, not a coroutine function (async def): nothing awaits it"
        raise InvalidArgumentError(field, reason)
    return argument


def member(field: str, argument: object, kind: type[E]) -> E:
    """Return a member of an enumeration of texts, given as itself or as its text."""
    if isinstance(argument, str):
        with contextlib.suppress(ValueError):
            return kind(argument)
    known = " or ".join(f'"{each.value}"' for each in kind)
    raise InvalidArgumentError(field, f"it must be {known}, not {quote(argument)}")


def texts(field: str, argument: object) -> tuple[str, ...]:
    """Return several names or ids."""
    if type(argument) is list or type(argument) is tuple:
        names = tuple(argument)
        # All at once: a call for each name takes most of the time of reading many variables.
        if _ONLY_STR.issuperset(map(type, names)) and (joined := "".join(names)).isascii() and "\0" not in joined:
            return names
    if not isinstance(argument, str | bytes) and isinstance(argument, Iterable):
        # An array without dimensions raises only when it is iterated over.
        with contextlib.suppress(TypeError):
            return tuple([text(field, each) for each in argument])
    advice = ": write [...] around it" if isinstance(argument, str) else ""
    raise InvalidArgumentError(field, f"it must be a list of str, not {_kind(argument)}{advice}")


def metadata(field: str, argument: object) -> FrozenDict[str, str]:
    """Return metadata: a mapping of str to str."""
    if type(argument) is FrozenDict:
        return argument
    if type(argument) is dict and not argument:
        return _NOTHING
    return FrozenDict({_key(field, key): _entry(field, key, entry) for key, entry in mapping(field, argument).items()})


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


def value(field: str, argument: object) -> Value:
    """Return an encoded value. It is checked against a type only later."""
    if not isinstance(argument, Value):
        raise InvalidArgumentError(field, f"it must be a Value, not {_kind(argument)}: make it with values.encode(...)")
    if argument.binary is not None and type(argument.binary) is not bytes:
        if not isinstance(argument.binary, bytes | bytearray | memoryview):
            raise InvalidArgumentError(field, f"its binary must be bytes, not {_kind(argument.binary)}")
        argument = Value(argument.json, bytes(argument.binary))
    json = argument.json
    return argument if type(json) is str and json.isascii() else Value(_json(field, json), argument.binary)


def _json(field: str, argument: object) -> str:
    if not isinstance(argument, str):
        raise InvalidArgumentError(field, f"its json must be a str, not {_kind(argument)}")
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        reason = f"its json contains a lone surrogate (U+{ord(argument[error.start]):04X}), which is not a character"
        raise InvalidArgumentError(field, reason) from None
    return argument


def values_by_text(field: str, argument: object) -> FrozenDict[str, Value]:
    """Return a mapping of names or ids to encoded values."""
    entries = mapping(field, argument)
    return FrozenDict({_key(field, key): value(field, entry) for key, entry in entries.items()})


def _objects(field: str, argument: object) -> Any:
    """Return a copy of a mapping to be encoded as JSON; encoding it checks that it can be."""
    try:
        return copy.deepcopy(mapping(field, argument))
    except (TypeError, RecursionError):
        raise InvalidArgumentError(field, "it must contain only values that JSON can represent") from None


def mapping(field: str, argument: object) -> dict[Any, Any]:
    """Return a copy of a mapping as a dict."""
    if not isinstance(argument, Mapping):
        raise InvalidArgumentError(field, f"it must be a mapping, such as a dict, not {_kind(argument)}")
    return dict(argument)


def reason(field: str, argument: object) -> str:
    """Return the reason for a request: a text of at most `REASON_LENGTH` characters."""
    plain = text(field, argument)
    if len(plain) > REASON_LENGTH:
        raise LimitExceededError("the length of the reason in characters", len(plain), REASON_LENGTH, "")
    return plain


def origin(argument: object) -> Origin:
    """Return an origin with valid texts."""
    if not isinstance(argument, Origin):
        raise InvalidArgumentError("origin", f"it must be an Origin, not {_kind(argument)}")
    text("actor", argument.actor)
    text("cause", argument.cause)
    if argument.idempotency_key is not None:
        text("idempotency_key", argument.idempotency_key)
    if argument.optimizer_id is not None:
        text("optimizer_id", argument.optimizer_id)
    if argument.reason is not None:
        reason("reason", argument.reason)
    if not isinstance(argument.source, Source):
        raise InvalidArgumentError("source", f"it must be a Source, not {_kind(argument.source)}")
    return argument


def _optional(check: Check) -> Check:
    return lambda field, argument: None if argument is None else check(field, argument)


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


def _kind(argument: object) -> str:
    return "None" if argument is None else type(argument).__name__


def _advice(argument: object) -> str:
    if argument is None:
        return ""
    return ": decode it" if isinstance(argument, bytes | bytearray) else ": use str(...)"
