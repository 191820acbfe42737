"""Translates between records and messages with the same fields, by functions compiled for each kind of record.

The conversion of a field follows from its annotation and from the message's descriptor. Like `dataclasses`, this module
generates source and compiles it: evaluating the annotations for each record would take five times as long.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from types import NoneType, UnionType
from typing import Any, ClassVar, Final, Generic, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from dspex_persist.state.bridge.codec import moment_of, timestamp_of
from dspex_persist.state.errors import UnsupportedError

R = TypeVar("R")
_Part: TypeAlias = tuple[str, str]
"""Two pieces of source: from a record's field to the message's, and back."""

NAMES: Final = {"constraints": "constraints_json", "fields": "fields_json", "recorded": "recorded_json"}
"""Fields that have another name in messages."""
OPPOSITES: Final = {"children": "only_roots"}
"""Flags that are negated in messages."""
_PLAIN: Final = (str, bytes, int, float, bool)


class Codec(Generic[R]):
    """Translates one kind of record, on first use compiled for it.

    Args:
        record: A dataclass, or a tuple type whose items are the message's fields in order.
        message: The type of message.
        handed: The fields that the message lacks; `record_of` takes them as keyword arguments.
    """

    _known: ClassVar[dict[tuple[Any, type[Message]], "Codec[Any]"]] = {}

    def __init__(self, record: Callable[..., R], message: type[Message], handed: Collection[str] = ()) -> None:
        self.record = record
        self.message = message
        self.handed = handed

    @classmethod
    def between(cls, record: Any, message: type[Message]) -> "Codec[Any]":
        """Return the codec for these types, always the same one."""
        return cls._known.setdefault((record, message), Codec(record, message))

    @cached_property
    def message_of(self) -> Callable[[R], Any]:
        """A function from a record to its message."""
        return self._functions[0]

    @cached_property
    def record_of(self) -> Callable[..., R]:
        """A function from a message to its record; `UnsupportedError` for an enum member unknown to this release."""
        return self._functions[1]

    @cached_property
    def _functions(self) -> tuple[Callable[[R], Any], Callable[..., R]]:
        return _Source(self).compiled()


class _Members(dict[int, StrEnum]):
    """The members of an enumeration by their numbers."""

    def __init__(self, wire: EnumDescriptor, members: Mapping[int, StrEnum]) -> None:
        super().__init__(members)
        self._name = wire.name

    def __missing__(self, number: int) -> StrEnum:
        raise UnsupportedError(f"{self._name} {number}: the sender is newer than this release")


class _Source:
    """Generates the source of a codec's two functions, with the objects that its names refer to."""

    def __init__(self, codec: Codec[Any]) -> None:
        self._codec = codec
        self._names: dict[str, Any] = {
            "Record": codec.record,
            "Message": codec.message,
            "timestamp_of": timestamp_of,
            "moment_of": moment_of,
            "dumps": json.dumps,
            "loads": json.loads,
        }

    def compiled(self) -> tuple[Any, Any]:
        """Return the functions from record to message, and back."""
        is_tuple = get_origin(self._codec.record) is tuple
        encoded, decoded = zip(*(self._items() if is_tuple else self._fields()), strict=True)
        handed = ("**handed",) if self._codec.handed else ()
        source = (
            f"def message_of(record):\n    return Message({', '.join(encoded)})\n"
            f"def record_of({', '.join(('message', *handed))}):\n"
            f"    return {'' if is_tuple else 'Record'}({', '.join((*decoded, *handed))})\n"
        )
        exec(source, self._names)
        return self._names["message_of"], self._names["record_of"]

    def _fields(self) -> Iterator[_Part]:
        hints = get_type_hints(self._codec.record)
        wires: Any = self._codec.message.DESCRIPTOR.fields_by_name
        for field in fields(self._codec.record):  # type: ignore[arg-type]
            name = field.name
            if name in self._codec.handed:
                continue
            opposite = OPPOSITES.get(name) if hints[name] is bool else None
            wire = wires[opposite or NAMES.get(name, name)]
            encode, decode = self._field(hints[name], wire, f"record.{name}")
            negated = "not " if opposite else ""
            keyword = f"{name}=" if field.kw_only else ""
            yield f"{wire.name}={negated}{encode}", f"{keyword}{negated}{decode}"

    def _items(self) -> Iterator[_Part]:
        wires: Any = self._codec.message.DESCRIPTOR.fields
        for index, (hint, wire) in enumerate(zip(get_args(self._codec.record), wires, strict=True)):
            encode, decode = self._field(hint, wire, f"record[{index}]")
            yield f"{wire.name}={encode}", decode

    def _field(self, hint: Any, wire: FieldDescriptor, record_field: str) -> _Part:
        message_field = f"message.{wire.name}"
        hint, optional = _kind_of(hint)
        if wire.enum_type is not None:
            numbers, members = self._enumeration(hint, wire.enum_type)
            return f"{numbers}[{record_field}]", f"{members}[{message_field}]" + (
                f" if {message_field} else None" if optional else ""
            )
        if _is_several(hint):
            return self._several(hint, wire, record_field, message_field)
        if get_origin(hint) is Mapping and wire.message_type is not None:
            return self._mapping(hint, wire, record_field, message_field)
        encode, decode = self._single(hint, wire)
        if not optional:
            return _call(encode, record_field), _call(decode, message_field)
        absent = f"None if {record_field} is None else " if encode else ""
        return (
            f"{absent}{_call(encode, record_field)}",
            f'{_call(decode, message_field)} if message.HasField("{wire.name}") else None',
        )

    def _several(self, hint: Any, wire: FieldDescriptor, record_field: str, message_field: str) -> _Part:
        encode, decode = self._single(_kind_of(get_args(hint)[0])[0], wire)
        if not encode:
            return record_field, f"(*{message_field},)"
        return f"[*map({encode}, {record_field})]", f"(*map({decode}, {message_field}),)"

    def _mapping(self, hint: Any, wire: Any, record_field: str, message_field: str) -> _Part:
        encode, decode = self._single(get_args(hint)[1], wire.message_type.fields_by_name["value"])
        if not encode:
            return record_field, f"dict({message_field})"
        entries = "{{key: {}(each) for key, each in {}.items()}}".format
        return entries(encode, record_field), entries(decode, message_field)

    def _single(self, hint: Any, wire: FieldDescriptor) -> _Part:
        """The names of the functions that convert one value; "" if it needs no conversion."""
        if hint in _PLAIN:
            return "", ""
        if hint is datetime:
            return "timestamp_of", "moment_of"
        if wire.message_type is None:
            return "dumps", "loads"
        message = GetMessageClass(wire.message_type)
        if (hint, message) == (self._codec.record, self._codec.message):
            return "message_of", "record_of"
        codec = Codec.between(hint, message)
        return self._name(wire, codec.message_of), self._name(wire, codec.record_of)

    def _enumeration(self, members: type[StrEnum], wire: EnumDescriptor) -> _Part:
        prefix = wire.values_by_number[0].name.removesuffix("UNSPECIFIED")
        numbers = {each: wire.values_by_name[prefix + each.name].number for each in members}
        by_number = _Members(wire, {number: each for each, number in numbers.items()})
        return self._name(wire, {None: 0, **numbers}), self._name(wire, by_number)

    def _name(self, wire: FieldDescriptor | EnumDescriptor, meaning: Any) -> str:
        name = f"{wire.name}_{len(self._names)}"
        self._names[name] = meaning
        return name


def _call(function: str, argument: str) -> str:
    return f"{function}({argument})" if function else argument


def _is_several(hint: Any) -> bool:
    """Whether the annotation is a list of any length, as opposed to a tuple that is a single value."""
    return get_args(hint)[1:] in ((), (...,)) and get_origin(hint) is not None


def _kind_of(hint: Any) -> tuple[Any, bool]:
    """The type in an annotation, ignoring None and an alternative str; and whether it allows None."""
    if get_origin(hint) not in (Union, UnionType):
        return hint, False
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return next((kind for kind in kinds if kind is not str), str), NoneType in get_args(hint)
