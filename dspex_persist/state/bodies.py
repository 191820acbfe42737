"""JSON bodies of frozen dataclasses. The type of a field determines how it is written and read.

The keys of a body are the names of the fields. A missing key stands for the field's default. A body that cannot be read
raises a `MalformedEventError`, which names the key.
"""

from ast import literal_eval
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from datetime import datetime
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

from dspex_persist.clock import from_micros, nearest_time, to_micros
from dspex_persist.state.errors import quote
from dspex_persist.state.model import LogEntry, PrunePolicy, Seen, ToolParameter, Value


class MalformedEventError(ValueError):
    """The body of an event cannot be read. The message names the missing or wrong key."""

    def __str__(self) -> str:
        return f"malformed event: {super().__str__()}"


_SPARSE_MARK: Final = "sparse"
_UNLOGGED_MARK: Final = "unlogged"


def sparse() -> Any:
    """Declare a field that is left out of the body while it is None."""
    return field(default=None, metadata={_SPARSE_MARK: True})


def unlogged(default: object) -> Any:
    """Declare a field that is never part of the body."""
    return field(default=default, metadata={_UNLOGGED_MARK: True})


@dataclass(frozen=True, slots=True)
class Codec:
    """Converts values of one type to JSON and back."""

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


class _UnreadableError(Exception):
    """The entry at `path` of the body cannot be read, for `reason`."""

    def __init__(self, reason: str, path: tuple[str, ...] = ()) -> None:
        self.reason = reason
        self.path = path

    def within(self, key: object) -> "_UnreadableError":
        return _UnreadableError(self.reason, (str(key), *self.path))


def written(record: object) -> Any:
    """Return the body of a record."""
    kind: Any = type(record)
    return codec_of(kind).write(record)


def read(kind: Any, body: object) -> Any:
    """Return the object of type `kind` with this body, or raise `MalformedEventError`."""
    try:
        return codec_of(kind).read(body)
    except _UnreadableError as error:
        what = f" {quote('.'.join(error.path))}" if error.path else ""
        missing = error.reason == _MISSING
        raise MalformedEventError(f"{_MISSING}{what}" if missing else f"{what[1:] or 'it'} {error.reason}") from None


_MISSING: Final = "missing key"


@cache
def codec_of(kind: Any) -> Codec:
    """Return the codec of a type: a dataclass, an enumeration, a container or a scalar."""
    if kind in _CODECS:
        return _CODECS[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        (present,) = (each for each in arguments if each is not NoneType)
        return _optional(codec_of(present))
    if origin is tuple:
        if arguments[1:] == (...,):
            return _sequence(codec_of(arguments[0]))
        return _fixed([codec_of(each) for each in arguments])
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(codec_of(arguments[1]))
    if issubclass(kind, Enum):
        return _member(kind)
    assert is_dataclass(kind), kind
    return _record(kind)


# Containers


def _optional(codec: Codec) -> Codec:
    write, read = codec.write, codec.read
    return Codec(
        lambda value: None if value is None else write(value), lambda entry: None if entry is None else read(entry)
    )


def _sequence(codec: Codec) -> Codec:
    def read(entry: Any) -> Any:
        if not isinstance(entry, list | tuple):
            raise _UnreadableError("is not a list")
        return tuple(_inside(place, codec, each) for place, each in enumerate(entry))

    return Codec(lambda value: [codec.write(each) for each in value], read)


def _fixed(codecs: list[Codec]) -> Codec:
    def read(entry: Any) -> Any:
        if not isinstance(entry, list | tuple) or len(entry) != len(codecs):
            raise _UnreadableError(f"is not a list of {len(codecs)}")
        return tuple(_inside(place, codec, each) for place, (codec, each) in enumerate(zip(codecs, entry, strict=True)))

    return Codec(lambda value: [codec.write(each) for codec, each in zip(codecs, value, strict=True)], read)


def _mapping(codec: Codec) -> Codec:
    def read(entry: Any) -> Any:
        if not isinstance(entry, Mapping):
            raise _UnreadableError("is not an object")
        return {key: _inside(key, codec, each) for key, each in entry.items()}

    return Codec(lambda value: {key: codec.write(each) for key, each in value.items()}, read)


def _inside(key: object, codec: Codec, entry: Any) -> Any:
    try:
        return codec.read(entry)
    except _UnreadableError as error:
        raise error.within(key) from None


def _record(kind: Any) -> Codec:
    types = get_type_hints(kind)
    logged = [
        each for each in fields(kind) if (kind, each.name) not in _UNLOGGED and _UNLOGGED_MARK not in each.metadata
    ]
    codecs = {each.name: _FIELDS.get((kind, each.name)) or codec_of(types[each.name]) for each in logged}
    required = [each.name for each in logged if each.default is MISSING and each.default_factory is MISSING]
    sparse = [each.name for each in logged if _SPARSE_MARK in each.metadata]

    def read(entry: Any) -> Any:
        if not isinstance(entry, Mapping):
            raise _UnreadableError("is not an object")
        for name in required:
            if name not in entry:
                raise _UnreadableError(_MISSING, (name,))
        return kind(**{name: _inside(name, codec, entry[name]) for name, codec in codecs.items() if name in entry})

    def write(value: Any) -> Any:
        body = {name: codec.write(getattr(value, name)) for name, codec in codecs.items()}
        for name in sparse:
            if body[name] is None:
                del body[name]
        return body

    return Codec(write, read)


# Scalars


def _same(value: Any) -> Any:
    return value


def _scalar(name: str, *kinds: type) -> Codec:
    def read(entry: Any) -> Any:
        # Not `isinstance`, which accepts True as an int.
        if type(entry) not in kinds:
            raise _UnreadableError(f"is not {name}")
        return entry

    return Codec(_same, read)


def _number(entry: Any) -> Any:
    # NaN and the infinities are stored as texts.
    return float(entry) if entry in ("NaN", "Infinity", "-Infinity") else _NUMBER.read(entry)


def _member(kind: type[Enum]) -> Codec:
    def read(entry: Any) -> Any:
        try:
            return kind(entry)
        except ValueError:
            raise _UnreadableError(f"is not one of {', '.join(str(each.value) for each in kind)}") from None

    return Codec(lambda member: member.value, read)


def _time(entry: Any) -> datetime:
    try:
        return from_micros(_INTEGER.read(entry))
    except OverflowError:
        raise _UnreadableError("is outside the years 1 to 9999") from None


# Types with special bodies


def _write_value(value: Value) -> dict[str, Any]:
    return {"json": value.json} | ({} if value.binary is None else {"binary": b64encode(value.binary).decode()})


def _read_value(entry: Any) -> Value:
    body = _VALUE.read(entry)
    try:
        return Value(body.json, None if body.binary is None else b64decode(body.binary))
    except ValueError:
        raise _UnreadableError("is not base64", ("binary",)) from None


def _write_default(value: Value | None) -> dict[str, Any] | None:
    if value is None:
        return None
    return {"json": value.json, "binary": None if value.binary is None else repr(value.binary)}


def _read_default(entry: Any) -> Value | None:
    """Read a parameter's default, whose bytes are logged as a Python literal."""
    if entry is None:
        return None
    body = _VALUE.read(entry)
    try:
        binary = None if body.binary is None else literal_eval(body.binary)
    except (ValueError, SyntaxError):
        binary = body.binary
    if not isinstance(binary, bytes | NoneType):
        raise _UnreadableError("is not a bytes literal", ("binary",))
    return Value(body.json, binary)


def _write_seen(seen: Seen) -> list[Any]:
    return [seen.name, seen.variable_id, seen.version]


def _read_seen(entry: Any) -> Seen:
    name, variable_id, version = codec_of(tuple[str, str, int]).read(entry)
    return Seen(variable_id, name, version)


@dataclass(frozen=True, slots=True)
class _ValueBody:
    json: str
    binary: str | None = None


_INTEGER: Final = _scalar("an integer", int)
_NUMBER: Final = _scalar("a number", int, float)
_CODECS: Final[dict[Any, Codec]] = {
    Any: Codec(_same, _same),
    str: _scalar("a string", str),
    int: _INTEGER,
    float: Codec(_same, _number),
    bool: _scalar("a boolean", bool),
    datetime: Codec(to_micros, _time),
    Value: Codec(_write_value, _read_value),
    Seen: Codec(_write_seen, _read_seen),
}
_FIELDS: Final[dict[tuple[Any, str], Codec]] = {
    (ToolParameter, "default"): Codec(_write_default, _read_default),
    # Earlier releases did not check the type of the message, nor the range of the time.
    (LogEntry, "message"): Codec(_same, _same),
    (LogEntry, "at"): Codec(to_micros, lambda entry: nearest_time(_INTEGER.read(entry))),
}
"""Fields whose bodies differ from those of their types elsewhere."""
_UNLOGGED: Final = frozenset({(PrunePolicy, "session_id")})
"""Fields of records from other modules that are never part of a body."""
_VALUE: Final = codec_of(_ValueBody)
