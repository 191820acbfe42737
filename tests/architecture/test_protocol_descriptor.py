"""The compiled protocol is what existing clients were built against: nothing missing, nothing extra."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import snakepit_bridge_pb2 as client_pb2
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor

from dspex_persist.state.bridge.generated import snakepit_bridge_pb2

ROOT = Path(__file__).parents[2]
CONTRACT_FILE = ROOT / "tests" / "assets" / "bridge_protocol.json"
PUBLISHED_CONTRACT_FILE = ROOT.parent / "shared" / "bridge_protocol.json"

Json = dict[str, Any]


def type_name(field: descriptor_pb2.FieldDescriptorProto) -> str:
    """A field's type as the contract spells it: `string`, `snakepit.bridge.Variable`."""
    if field.type_name:
        return field.type_name.removeprefix(".")
    return descriptor_pb2.FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def map_entries(message: descriptor_pb2.DescriptorProto, full_name: str) -> dict[str, str]:
    """The compiler's hidden entry messages of a message's map fields: full name -> `map<key,value>`."""
    return {
        f"{full_name}.{entry.name}": f"map<{type_name(entry.field[0])},{type_name(entry.field[1])}>"
        for entry in message.nested_type
        if entry.options.map_entry
    }


def describe_field(field: descriptor_pb2.FieldDescriptorProto, maps: dict[str, str]) -> Json:
    """One field; a map is a repeated message on the wire, but the contract calls it a map, not repeated."""
    spelled = type_name(field)
    is_map = spelled in maps
    described: Json = {
        "number": field.number,
        "name": field.name,
        "type": maps.get(spelled, spelled),
        "repeated": field.label == field.LABEL_REPEATED and not is_map,
    }
    # The contract has none of these; a field that has one shows up as a difference.
    for extra in ("oneof_index", "proto3_optional", "default_value", "extendee", "options"):
        if field.HasField(extra):
            described[extra] = str(getattr(field, extra))
    return described


def describe_enum(enum: descriptor_pb2.EnumDescriptorProto) -> dict[str, int]:
    """An enum's values by name."""
    return {value.name: value.number for value in enum.value}


def describe_messages(messages: Any, scope: str) -> Json:
    """Messages by full name in the file's order, nested ones (but for map entries) after their parent."""
    described: Json = {}
    for message in messages:
        full_name = f"{scope}.{message.name}"
        maps = map_entries(message, full_name)
        described[full_name] = {"fields": [describe_field(field, maps) for field in message.field]}
        if message.enum_type:
            described[full_name]["enums"] = {enum.name: describe_enum(enum) for enum in message.enum_type}
        nested = [inner for inner in message.nested_type if not inner.options.map_entry]
        described.update(describe_messages(nested, full_name))
    return described


def describe_rpc(rpc: descriptor_pb2.MethodDescriptorProto) -> Json:
    """One rpc: types and directions of streaming."""
    return {
        "name": rpc.name,
        "input": rpc.input_type.removeprefix("."),
        "output": rpc.output_type.removeprefix("."),
        "server_streaming": rpc.server_streaming,
        "client_streaming": rpc.client_streaming,
    }


def describe(descriptor: FileDescriptor) -> Json:
    """A compiled file in the contract's own structure."""
    file = descriptor_pb2.FileDescriptorProto()
    descriptor.CopyToProto(file)
    described: Json = {
        "syntax": file.syntax,
        "package": file.package,
        "imports": list(file.dependency),
        "services": {
            f"{file.package}.{service.name}": [describe_rpc(rpc) for rpc in service.method] for service in file.service
        },
        "messages": describe_messages(file.message_type, file.package),
    }
    if file.enum_type:
        described["enums"] = {f"{file.package}.{enum.name}": describe_enum(enum) for enum in file.enum_type}
    return described


@pytest.fixture(scope="module")
def contract() -> Json:
    loaded: Json = json.loads(CONTRACT_FILE.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def compiled() -> Json:
    return describe(snakepit_bridge_pb2.DESCRIPTOR)


def test_services_and_rpcs_are_the_contracts(contract: Json, compiled: Json) -> None:
    assert compiled["services"] == contract["services"]
    assert len(compiled["services"]["snakepit.bridge.BridgeService"]) == 23


def test_messages_fields_and_enums_are_the_contracts(contract: Json, compiled: Json) -> None:
    assert compiled["messages"] == contract["messages"]


def test_whole_file_is_the_contract(contract: Json, compiled: Json) -> None:
    assert compiled == contract


def test_messages_keep_the_contracts_order(contract: Json, compiled: Json) -> None:
    """Two modules of one file name load in one process only if their descriptors are equal, order too."""
    assert list(compiled["messages"]) == list(contract["messages"])


def test_descriptor_has_the_clients_file_name_and_no_file_options() -> None:
    file = descriptor_pb2.FileDescriptorProto()
    snakepit_bridge_pb2.DESCRIPTOR.CopyToProto(file)
    assert file.name == "snakepit_bridge.proto"
    assert not file.HasField("options")


def test_clients_generated_module_loads_in_the_same_process() -> None:
    ours = snakepit_bridge_pb2.DESCRIPTOR.serialized_pb
    assert client_pb2.__name__ == "snakepit_bridge_pb2"
    assert client_pb2.DESCRIPTOR.serialized_pb == ours
    sent = client_pb2.PingRequest(message="hello").SerializeToString()
    assert snakepit_bridge_pb2.PingRequest.FromString(sent).message == "hello"


def test_description_shows_what_the_contract_does_not_have() -> None:
    """The comparison itself: a oneof, a top-level enum and an optional field are no blind spots."""
    file = descriptor_pb2.FileDescriptorProto(name="probe.proto", package="probe", syntax="proto3")
    file.enum_type.add(name="Colour").value.add(name="RED", number=0)
    message = file.message_type.add(name="Probe")
    message.oneof_decl.add(name="_size")
    message.field.add(
        name="size", number=1, type="TYPE_INT32", label="LABEL_OPTIONAL", oneof_index=0, proto3_optional=True
    )
    assert describe_messages(file.message_type, "probe")["probe.Probe"]["fields"] == [
        {
            "number": 1,
            "name": "size",
            "type": "int32",
            "repeated": False,
            "oneof_index": "0",
            "proto3_optional": "True",
        }
    ]
    assert describe_enum(file.enum_type[0]) == {"RED": 0}


if PUBLISHED_CONTRACT_FILE.exists():  # beside some checkouts only; elsewhere there is nothing to compare with

    def test_our_copy_is_the_published_contract() -> None:
        assert CONTRACT_FILE.read_bytes() == PUBLISHED_CONTRACT_FILE.read_bytes()
