"""Hostile requests: built from the descriptors of both services, and then corrupted as bytes.

Message number n of a seed is always the same, so that a message that causes a problem can be sent again.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final, NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as audit_pb
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb

METHODS: Final[Sequence[MethodDescriptor]] = (
    *pb.DESCRIPTOR.services_by_name["BridgeService"].methods,
    *audit_pb.DESCRIPTOR.services_by_name["AuditService"].methods,
)
SESSIONS: Final = ("one", "two")
VARIABLES: Final[dict[str, tuple[str, str, str]]] = {
    "flo": ("float", "1.5", '{"min":0,"max":9}'),
    "int": ("integer", "1", ""),
    "str": ("string", '"text"', '{"max_length":100}'),
    "boo": ("boolean", "true", ""),
    "cho": ("choice", '"x"', '{"choices":["x","y"]}'),
    "mod": ("module", '"M"', ""),
    "emb": ("embedding", "[0.5, 1.0]", ""),
    "ten": ("tensor", '{"shape": [2], "data": [1.0, 2.0]}', ""),
    "map": ("map", '{"a": 1}', ""),
    "lis": ("list", "[1]", ""),
}
"""The variables of each session: type, value, constraints."""

_TOOLS = ("spread", "break_off", "stream", "increment", "nobody")
_HOSTILE = (
    "",
    "\0",
    "a\0b",
    "../../etc/passwd",
    "'; DROP TABLE commits;--",
    "%s%n%x",
    "\u202e\u2066",
    "\x1b[31mred",
    "a\nb\r\nfalse: log",
    "é" * 300,
    "x" * 70_000,
    "[" * 5_000,
    "NaN",
    "1e999",
    "9" * 5_000,
    '"\\ud800"',
    '{"a":1,"a":2}',
    "(a+)+$",
    "*a*a*a*a*b",
    "{0.__class__}",
    "exec_1_ab",
    "exec_99999999999999999999_x",
    "now",
    "0001-01-01",
    "9999-12-31T23:59:59.999999+00:00",
    "5^",
    "-1",
    " ",
    "127.0.0.1:1",
    "unix:/nowhere",
)
_CONSTRAINTS = (
    '{"min":0}',
    '{"max":"a"}',
    '{"pattern":"["}',
    '{"choices":[]}',
    "[]",
    "{",
    '{"shape":[null,-1]}',
    '{"dimensions":1e9}',
    '{"min":NaN}',
    '{"min_length":-1}',
    '{"allowed_modules":["a"]}',
)
_CONTENTS = (
    *(text.encode() for _, text, _ in VARIABLES.values()),
    b"null",
    b"[NaN]",
    b"NaN",
    b"1e999",
    b"-0",
    b"9" * 4_301,
    b"[" * 101 + b"]" * 101,
    b'"\\ud800"',
    b'"\xff"',
    b'{"a":1,"a":1}',
    b"",
    b" 1 ",
    b"1 2",
    b"1.0",
    b"0x10",
    b"\xef\xbb\xbf1",
    b"\x0a\x03abc",
    b'{"shape":[2,-1],"data":[1]}',
    b'{"shape":[1000000000,1000000000],"data":[]}',
    b'{"shape":[2],"dtype":"float32","binary_format":"npy","type":"tensor"}',
)
_TYPES = (*(type_name for type_name, _, _ in VARIABLES.values()), "float.binary", "tensor.binary", "embedding.binary")
_TYPE_URLS = ("", "type.googleapis.com/google.protobuf.StringValue", "dspex.variables/float", "snakepit.")
_METADATA_KEYS = ("optimizer_id", "source", "ttl_seconds", "sensitive", "pinned", "address", "idempotency_key", "k")
_METADATA_TEXTS = ("true", "python", "100000", "127.0.0.1:1", "k1", "nonsense", "-1", "")
_INTEGERS = (0, 1, 2, 3, 5, 100, -1, 2**31 - 1, -(2**31))
_LONGS = (*_INTEGERS, 2**63 - 1, -(2**63))
_HEADERS: Final[dict[str, tuple[str, ...]]] = {
    "x-dspex-actor": ("somebody", "", "a" * 300),
    "x-dspex-source": ("python", "nobody"),
    "x-dspex-idempotency-key": ("k1", "k2", "", "a" * 300),
    "x-dspex-optimizer-id": ("o1", ""),
    "x-dspex-before-version": ("1", "-1", "0x1", "99999999999999999999"),
    "x-dspex-after-sequence": ("0", "5", "-1", "1e3", "99999999999999999999"),
    "x-dspex-execution-id": ("exec_1_ab", ""),
    "x-dspex-tools": ("all", "none"),
}
_MALFORMED = (b"\xff" * 9 + b"\x7f", b"\x80" * 10, b"\x0a\xff\xff\xff\xff\x0f", b"\xed\xa0\x80")
"""Numbers that are too long, lengths beyond the end, half of a surrogate pair."""
_ALWAYS = (
    "session",
    "variable_id",
    "value",
    "name",
    "type",
    "initial_value",
    "tool_name",
    "updates",
    "execution",
    "point",
)


class Request(NamedTuple):
    """A call of an rpc: the bytes of the request, and the metadata."""

    method: MethodDescriptor
    content: bytes
    headers: tuple[tuple[str, str], ...]


def request(seed: int, number: int) -> Request:
    """Return request number `number`."""
    random = Random(f"{seed}/{number}")
    method = METHODS[number % len(METHODS)]
    sound = random.random() < 0.5
    content = _Maker(random, sound).message(method.input_type).SerializeToString()
    chance = random.random()
    if chance < 0.35:
        content = _corrupt(content, random)
    elif chance < 0.42:
        content = random.randbytes(random.choice((1, 5, 50, 500)))
    return Request(method, content, () if sound else _headers(random))


def _headers(random: Random) -> tuple[tuple[str, str], ...]:
    names = random.sample(sorted(_HEADERS), random.choice((0, 0, 0, 1, 2)))
    return tuple((name, random.choice(_HEADERS[name])) for name in names)


class _Maker:
    """Fills messages with content that fits the names of their fields, and with hostile content."""

    def __init__(self, random: Random, sound: bool) -> None:
        """Make valid messages about one variable with `sound`: most others are refused before they get far."""
        self._random = random
        self._sound = sound
        self._subject = random.choice(sorted(VARIABLES))

    def message(self, descriptor: Descriptor, depth: int = 0) -> Message:
        made: Any = GetMessageClass(descriptor)()
        if descriptor.full_name == "google.protobuf.Any":
            type_name, value, _ = VARIABLES[self._subject]
            made.type_url = f"type.googleapis.com/snakepit.{type_name}" if self._sound else self._type_url()
            made.value = value.encode() if self._sound else self._random.choice(_CONTENTS)
            return made  # type: ignore[no-any-return]
        for field in descriptor.fields:
            left_out = (0.0 if self._sound else 0.04) if field.name.startswith(_ALWAYS) else 0.3
            if self._random.random() >= left_out and depth < 4:
                self._fill(made, field, depth)
        return made  # type: ignore[no-any-return]

    def _type_url(self) -> str:
        if self._random.random() < 0.1:
            return self._random.choice((*_TYPE_URLS, *_HOSTILE))
        return f"type.googleapis.com/snakepit.{self._random.choice(_TYPES)}"

    def _fill(self, message: Any, field: FieldDescriptor, depth: int) -> None:
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            self._fill_map(getattr(message, field.name), field, depth)
        elif field.is_repeated:
            for _ in range(self._random.choice((0, 1, 1, 2, 20))):
                if entry is not None:
                    getattr(message, field.name).append(self.message(entry, depth + 1))
                else:
                    getattr(message, field.name).append(self._scalar(field))
        elif entry is not None:
            getattr(message, field.name).CopyFrom(self.message(entry, depth + 1))
        else:
            setattr(message, field.name, self._scalar(field))

    def _fill_map(self, entries: Any, field: FieldDescriptor, depth: int) -> None:
        assert field.message_type is not None
        value = field.message_type.fields_by_name["value"]
        for _ in range(self._random.choice((0, 1, 1, 2, 3, 20))):
            key = self._map_key(field.name)
            if value.message_type is not None:
                entries[key].CopyFrom(self.message(value.message_type, depth + 1))
            elif self._sound and "metadata" in field.name:
                entries["k"] = "text"
            elif "metadata" in field.name:
                entries[key] = self._random.choice(_METADATA_TEXTS)
            else:
                entries[key] = self._scalar(value)

    def _map_key(self, name: str) -> str:
        if "metadata" in name and self._random.random() < 0.9:
            return self._random.choice(_METADATA_KEYS)
        if name == "parameters":
            return self._random.choice(("targets", "value", "token", "target", "other"))
        return self._text(name)

    def _scalar(self, field: FieldDescriptor) -> Any:
        random = self._random
        makers: dict[int, Callable[[], Any]] = {
            FieldDescriptor.CPPTYPE_STRING: lambda: (
                random.randbytes(random.choice((0, 8, 16, 100)))
                if field.type == FieldDescriptor.TYPE_BYTES
                else self._text(field.name)
            ),
            FieldDescriptor.CPPTYPE_BOOL: lambda: random.random() < 0.5,
            FieldDescriptor.CPPTYPE_ENUM: lambda: random.choice((0, 1, 2, 99)),
            FieldDescriptor.CPPTYPE_DOUBLE: lambda: random.choice((0.0, 1.5, float("nan"), float("inf"))),
            FieldDescriptor.CPPTYPE_FLOAT: lambda: random.choice((0.0, 1.5, float("nan"), float("inf"))),
            FieldDescriptor.CPPTYPE_INT32: lambda: random.choice((0, 0, 0, 1, 2) if self._sound else _INTEGERS),
            FieldDescriptor.CPPTYPE_INT64: lambda: random.choice((0, 0, 0, 1, 2) if self._sound else _LONGS),
            FieldDescriptor.CPPTYPE_UINT32: lambda: random.choice((0, 1, 2**32 - 1)),
            FieldDescriptor.CPPTYPE_UINT64: lambda: random.choice((0, 1, 2**64 - 1)),
        }
        return makers[field.cpp_type]()

    def _text(self, name: str) -> str:
        random = self._random
        if self._sound:
            return self._sound_text(name)
        if random.random() < (0.1 if "session" in name else 0.2):
            return random.choice(_HOSTILE)
        if "session" in name:
            return random.choice(SESSIONS)
        if name.endswith("type"):
            return random.choice(_TYPES)
        if "json" in name:
            return random.choice(_CONSTRAINTS)
        if "tool" in name or (name == "name" and random.random() < 0.3):
            return random.choice(_TOOLS)
        return random.choice(tuple(VARIABLES))

    def _sound_text(self, name: str) -> str:
        type_name, _, constraints = VARIABLES[self._subject]
        texts = {"type": type_name, "constraints_json": constraints, "optimizer_id": "o1", "execution_id": "exec_1_ab"}
        if "session" in name:
            return self._random.choice(SESSIONS)
        if name in ("at", "point", "since", "until"):
            return self._random.choice(("now", "5", "5^", "1h"))
        if "tool" in name:
            return self._random.choice(_TOOLS)
        return texts.get(name, self._subject)


def _corrupt(content: bytes, random: Random) -> bytes:
    """Flip some bits, and remove, insert or repeat some bytes."""
    bent = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randint(0, len(bent))
        change = random.randrange(5)
        if change == 0 and bent:
            bent[min(at, len(bent) - 1)] ^= 1 << random.randrange(8)
        elif change == 1:
            bent[at:at] = random.randbytes(random.randint(1, 8))
        elif change == 2:
            del bent[at : at + random.randint(1, 6)]
        elif change == 3:
            bent[at:at] = bent[: random.randint(0, len(bent))]
        else:
            bent[at:at] = random.choice(
                (b"\xff" * 9 + b"\x7f", b"\x80" * 10, b"\x0a\xff\xff\xff\xff\x0f", b"\xed\xa0\x80")
            )
    return bytes(bent)
