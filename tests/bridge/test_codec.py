"""Values in messages: which bytes are a packed message, which are JSON, and which are refused."""

import json
import time
from typing import Any

import pytest
from google.protobuf import wrappers_pb2 as wrappers
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import ListValue, Struct
from google.protobuf.struct_pb2 import Value as ValueMessage
from hypothesis import given
from hypothesis import strategies as st

from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.errors import InvalidArgumentError, InvalidValueError, LimitExceededError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Value

URL = "type.googleapis.com/"
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


def packed(message: Message) -> AnyMessage:
    wire = AnyMessage()
    wire.Pack(message)
    return wire


def decoded(wire: AnyMessage, binary: bytes = b"") -> Any:
    value = codec.value_of("x", wire, binary)
    assert value.binary is None
    return json.loads(value.json)


def as_value(document: Any) -> ValueMessage:
    message = ValueMessage()
    if document is None:
        message.null_value = 0  # type: ignore[assignment]
    elif isinstance(document, bool):
        message.bool_value = document
    elif isinstance(document, int | float):
        message.number_value = document
    elif isinstance(document, str):
        message.string_value = document
    elif isinstance(document, list):
        message.list_value.values.extend(map(as_value, document))
        message.list_value.SetInParent()
    else:
        message.struct_value.SetInParent()
        for key, entry in document.items():
            message.struct_value.fields[key].CopyFrom(as_value(entry))
    return message


@given(st.text() | st.integers().map(str) | st.floats().map(str) | DOCUMENTS.map(json.dumps))
def test_a_packed_string_value_is_its_text_whatever_the_text_looks_like(text: str) -> None:
    assert decoded(packed(wrappers.StringValue(value=text))) == text


@given(DOCUMENTS)
def test_json_with_the_type_url_of_a_protobuf_type_is_read_as_json(document: object) -> None:
    for name in ("StringValue", "Value"):
        text = json.dumps(document).encode()
        assert decoded(AnyMessage(type_url=f"{URL}google.protobuf.{name}", value=text)) == document


@given(DOCUMENTS)
def test_a_packed_value_is_its_content(document: object) -> None:
    assert decoded(packed(as_value(document))) == document


@pytest.mark.parametrize(
    ("message", "document"),
    [
        (wrappers.BoolValue(value=True), True),
        (wrappers.BoolValue(), False),
        (wrappers.Int32Value(value=-7), -7),
        (wrappers.Int64Value(value=-(2**63)), -(2**63)),
        (wrappers.UInt32Value(value=2**32 - 1), 2**32 - 1),
        (wrappers.UInt64Value(value=2**64 - 1), 2**64 - 1),
        (wrappers.Int64Value(), 0),
        (wrappers.FloatValue(value=0.5), 0.5),
        (wrappers.DoubleValue(value=0.1), 0.1),
        (wrappers.DoubleValue(value=float("nan")), "NaN"),
        (wrappers.DoubleValue(value=float("-inf")), "-Infinity"),
        (wrappers.BytesValue(value="über".encode()), "über"),
        (wrappers.StringValue(), ""),
        (ListValue(), []),
        (Struct(), {}),
        (ListValue(values=[as_value(1), as_value([None, {"a": "b"}])]), [1, [None, {"a": "b"}]]),
        (Struct(fields={"a": as_value({"b": [True]})}), {"a": {"b": [True]}}),
    ],
)
def test_every_value_type_of_protobuf_is_read(message: Message, document: object) -> None:
    assert decoded(packed(message)) == document
    text = json.dumps(document).encode()
    assert decoded(AnyMessage(type_url=URL + message.DESCRIPTOR.full_name, value=text)) == document


def test_bytes_that_are_not_exactly_one_message_are_read_as_json() -> None:
    content = wrappers.StringValue(value="abc").SerializeToString()
    for strange in (content + content, content + b"\x10\x01", content[:-1]):
        wire = AnyMessage(type_url=URL + "google.protobuf.StringValue", value=strange)
        assert codec.value_of("x", wire) == Value(strange.decode())  # not JSON: the value's type refuses it


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (ValueMessage(), "there is no value|without a value"),
        (wrappers.BytesValue(value=b"\xff"), "not UTF-8"),
        (pb.PingRequest(message="x"), "type_url is 'type.googleapis.com/snakepit.bridge"),
    ],
)
def test_a_message_without_a_value_is_refused(message: Message, reason: str) -> None:
    if isinstance(message, pb.PingRequest):
        wire = AnyMessage(type_url=URL + "google.protobuf.Timestamp", value=b"1")
        reason = "type_url is"
    else:
        wire = packed(message)
    with pytest.raises(InvalidValueError, match=reason):
        codec.value_of("x", wire)


# --- Binary content ---


def described(description: str) -> AnyMessage:
    return AnyMessage(type_url=URL + "snakepit.tensor.binary", value=description.encode())


@pytest.mark.parametrize(
    "description",
    ["", '{"shape": [2, 2]}', '{"shape": [1], "binary_format": "erlang_binary"}', '{"dtype": "float32"}', "[]"],
)
def test_a_description_without_its_bytes_is_refused(description: str) -> None:
    with pytest.raises(InvalidValueError, match="its bytes are missing: send them in the companion field"):
        codec.value_of("x", described(description))


def test_an_empty_shape_has_no_bytes() -> None:
    assert codec.value_of("x", described('{"shape": [0, 3]}')) == Value('{"shape": [0, 3]}', b"")
    assert codec.value_of("x", described("{}")) == Value("{}", b"")


# --- Sizes ---


@pytest.mark.parametrize("name", ["snakepit.list", "google.protobuf.StringValue", "google.protobuf.ListValue"])
def test_the_size_is_checked_before_anything_is_parsed(name: str) -> None:
    limits = Limits(value_size_bytes=1000, binary_size_bytes=2000)
    content = b"[" + b"[]," * 20_000_000 + b"[]]"
    began = time.process_time()
    with pytest.raises(LimitExceededError, match="value_size_bytes"):
        codec.value_of("x", AnyMessage(type_url=URL + name, value=content), limits=limits)
    with pytest.raises(LimitExceededError, match="binary_size_bytes"):
        codec.value_of("x", described("{}"), content, limits)
    # Parsing it once would take seconds.
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize("content", [b"[" * 100_000 + b"]" * 100_000, b"{oops", b"\xff", b"NaN"])
def test_an_invalid_default_is_refused_by_name(content: bytes) -> None:
    default = AnyMessage(type_url=URL + "snakepit.list", value=content)
    parameter = pb.ParameterSpec(name="p", type="list", default_value=default)
    with pytest.raises(InvalidArgumentError, match="default_value: of parameter 'p' of tool 't'"):
        codec.registered_tool(pb.ToolRegistration(name="t", parameters=[parameter]), "worker")


def test_an_address_that_is_none_is_named() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        codec.registered_tool(pb.ToolRegistration(name="t", metadata={"address": "http://a:1"}), "worker")
    assert str(caught.value) == (
        "invalid metadata: address of tool 't': 'http://a:1': expected HOST:PORT, [IPv6]:PORT or unix:PATH; it is "
        "HOST:PORT, grpcs://HOST:PORT or unix:PATH"
    )
