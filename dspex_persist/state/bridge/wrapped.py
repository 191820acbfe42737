"""The value types of google.protobuf in an Any: packed messages of some clients, JSON bytes of others.

Bytes that are exactly one packed message of the type that they go by are that message; all others have to be JSON. So
nothing is guessed: a StringValue "123" is a string, although its bytes would pass for the number 123 as well.
"""

from collections.abc import Mapping
from math import isnan
from typing import Any

from google.protobuf.message import DecodeError, Message
from google.protobuf.struct_pb2 import ListValue, Struct, Value
from google.protobuf.wrappers_pb2 import (
    BoolValue,
    BytesValue,
    DoubleValue,
    FloatValue,
    Int32Value,
    Int64Value,
    StringValue,
    UInt32Value,
    UInt64Value,
)

from dspex_persist.state.values.json_text import RefusedError, canonical
from dspex_persist.state.values.tensors import NON_FINITE

STRING_VALUE: str = StringValue.DESCRIPTOR.full_name
_KINDS: Mapping[str, type[Message]] = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (
        *(BoolValue, BytesValue, DoubleValue, FloatValue, Int32Value, Int64Value, StringValue, UInt32Value),
        *(UInt64Value, ListValue, Struct, Value),
    )
}


def name_of(type_url: str) -> str:
    """The name of the value type that a type_url means; "" if it means none."""
    name = type_url.rpartition("/")[2]
    return name if name in _KINDS else ""


def find_packed(name: str, content: bytes) -> Message | None:
    """The message of type `name` that `content` is, whole and with nothing beside it; None if it is something else."""
    try:
        message = _KINDS[name].FromString(content)
    except DecodeError:
        return None
    # What the type does not know, or says twice, makes bytes that are something else, such as JSON.
    message.DiscardUnknownFields()
    return message if message.ByteSize() == len(content) else None


def json_of(message: Any) -> str:
    """What a message holds, as JSON; `RefusedError` if there is nothing in it, or bytes that are no text."""
    return canonical(_document(message))


def _document(message: Any) -> Any:
    if isinstance(message, Struct):
        return {key: _document(entry) for key, entry in message.fields.items()}
    if isinstance(message, ListValue):
        return [_document(entry) for entry in message.values]
    if isinstance(message, Value):
        return _kind_of(message)
    return _plain(message.value)


def _kind_of(message: Any) -> Any:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise RefusedError("a google.protobuf.Value without a value says nothing; set one of its fields")
    content = getattr(message, kind)
    return None if kind == "null_value" else _document(content) if isinstance(content, Message) else _plain(content)


def _plain(content: Any) -> Any:
    if isinstance(content, bytes):
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise RefusedError("its bytes are no UTF-8; send binary content in the companion field") from None
    if isinstance(content, float):
        # JSON has no number for them: they go by their names.
        return next((name for name, each in NON_FINITE.items() if _same(each, content)), content)
    return content


def _same(one: float, other: float) -> bool:
    return one == other or (isnan(one) and isnan(other))
