"""The value types of google.protobuf in an Any: some clients send packed messages, others JSON.

Bytes that are exactly one packed message of the type in the type_url are that message; all others have to be JSON. So
there is no guessing: a StringValue "123" is a string, although its bytes could also be read as the number 123.
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
    """Return the name of the value type in a type_url, or "" for any other type."""
    name = type_url.rpartition("/")[2]
    return name if name in _KINDS else ""


def find_packed(name: str, content: bytes) -> Message | None:
    """Return the message if `content` is exactly one packed message of type `name`, else None."""
    try:
        message = _KINDS[name].FromString(content)
    except DecodeError:
        return None
    # Bytes with unknown or repeated fields are something else, such as JSON.
    message.DiscardUnknownFields()
    return message if message.ByteSize() == len(content) else None


def json_of(message: Any) -> str:
    """Return the content of a message as JSON; `RefusedError` if it is empty, or has bytes that are not UTF-8."""
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
        raise RefusedError("a google.protobuf.Value without a value is not valid; set one of its fields")
    content = getattr(message, kind)
    return None if kind == "null_value" else _document(content) if isinstance(content, Message) else _plain(content)


def _plain(content: Any) -> Any:
    if isinstance(content, bytes):
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise RefusedError("its bytes are not UTF-8; send binary content in the companion field") from None
    if isinstance(content, float):
        # JSON lacks NaN and the infinities, which are encoded as their names.
        return next((name for name, each in NON_FINITE.items() if _same(each, content)), content)
    return content


def _same(one: float, other: float) -> bool:
    return one == other or (isnan(one) and isnan(other))
