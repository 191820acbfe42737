"""Translates between the messages of the protocol and the records of the state layer. Pure functions."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Final

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.timestamp_pb2 import Timestamp

from dspex_persist.clock import from_micros, to_micros
from dspex_persist.infra.listen import ListenError, parse_callee
from dspex_persist.state.bridge import wrapped
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.errors import InvalidArgumentError, InvalidValueError, LimitExceededError, quote
from dspex_persist.state.frozen import FrozenDict
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import (
    REASON,
    RESTORED_METADATA,
    ChangeKind,
    Concurrency,
    Isolation,
    Optimization,
    RegisteredTool,
    Source,
    ToolParameter,
    ToolSpec,
    Update,
    UpdateKind,
    Value,
    Variable,
    VariableVersion,
)
from dspex_persist.state.values import BinaryValue, check_content, infer_type, is_number, parse_json
from dspex_persist.state.values.json_text import RefusedError, check_binary_size, check_size, read

BRIDGE_SERVICE = pb.DESCRIPTOR.services_by_name["BridgeService"]

STRING_VALUE_STYLE, JSON_STYLE = "string_value", "json"
"""How a client encodes the parameters of tools: as JSON with the type_url of a StringValue, or in any other way."""

_PREFIX = "type.googleapis.com/snakepit."
_BINARY = ".binary"
_STRING_VALUE_URL = f"type.googleapis.com/{wrapped.STRING_VALUE}"
# The type_url of null, which has no value type. Clients that check types do not accept null as a string.
_NULL_TYPE = "map"
_MARKS = ("snakepit.", "dspex.variables/")

_LIMITS = Limits()

COMMIT_SEQUENCE = "commit_sequence"
_ACTOR, _CAUSE, _CHANGE = "dspex.actor", "dspex.cause", "dspex.change"
_DEPENDENCY, _PART, _SOURCE = "dspex.dependency", "dspex.part", "dspex.source"
_PREVIOUS, _TYPE, _VARIABLE_ID = "dspex.previous", "dspex.type", "dspex.variable_id"
_EXPOSED, _ISOLATION, _CONCURRENCY = "dspex.exposed", "dspex.isolation", "dspex.concurrency"
_RETRIES, _TIMEOUT_S = "dspex.retries", "dspex.timeout_s"
_ADDRESS = "address"


_PREVIOUS_BYTES: Final = 64 * 1024

# Values


def value_of(name: str, wire: AnyMessage, binary: bytes = b"", limits: Limits = _LIMITS) -> Value:
    """Return the value in a message, not yet checked against a type.

    Args:
        name: The name of the variable or parameter, for errors.
        wire: The message with the JSON.
        binary: The binary content, from the companion field.
        limits: The limits of values.

    Raises:
        InvalidValueError: It is not a value.
        LimitExceededError: It is too large.
    """
    type_url, content = wire.type_url, wire.value
    check_size(name, len(content), limits)
    check_binary_size(name, len(binary), limits)
    wrapper = wrapped.name_of(type_url)
    if type_url and not wrapper and not any(mark in type_url for mark in _MARKS):
        reason = f"its type_url is {quote(type_url)}; use {_PREFIX}<type> with the value as JSON"
        raise InvalidValueError(name, reason)
    if binary or type_url.endswith(_BINARY):
        value = Value(_text(name, content) or ("{}" if binary else "null"), binary)
        check_content(name, value, limits)
        return value
    if wrapper:
        message = wrapped.find_packed(wrapper, content)
        if message is not None:
            return _unwrapped(name, message)
    if not content:
        raise InvalidValueError(name, "there is no value: send JSON in the value field")
    return Value(_text(name, content))


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InvalidValueError(name, "it is not UTF-8; send JSON, and binary content in the companion field") from None


def _unwrapped(name: str, message: object) -> Value:
    try:
        return Value(wrapped.json_of(message))
    except RefusedError as error:
        raise InvalidValueError(name, error.reason) from error


def type_url_of(type_name: str, value: Value) -> str:
    """Return the type_url with which a value is sent."""
    return f"{_PREFIX}{type_name}{'' if value.binary is None else _BINARY}"


def any_of(type_name: str, value: Value) -> AnyMessage:
    """Return the message for a value, without its binary content, which goes into the companion field."""
    message = AnyMessage()
    _put_value(message, type_name, value)
    return message


def style_of(parameters: Iterable[AnyMessage]) -> str:
    """Return the style of a tool's parameters, in which its result is sent, too."""
    return STRING_VALUE_STYLE if any(map(_is_json_string_value, parameters)) else JSON_STYLE


def _is_json_string_value(wire: AnyMessage) -> bool:
    name = wrapped.name_of(wire.type_url)
    return name == wrapped.STRING_VALUE and wrapped.find_packed(name, wire.value) is None


def loose_any_of(value: Value, style: str = JSON_STYLE, type_name: str = "") -> AnyMessage:
    """Return the message for a parameter or result of a tool, whose type is inferred from the value.

    Args:
        value: The value. A binary one has the type_url of its type in both styles.
        style: How to encode it.
        type_name: "float" if strings may stand for NaN and the infinities, which JSON lacks.
    """
    if style == STRING_VALUE_STYLE and value.binary is None:
        return AnyMessage(type_url=_STRING_VALUE_URL, value=value.json.encode())
    is_named = value.json[:1] == '"' and is_number(type_name)
    return any_of(type_name if is_named else _inferred_type(value), value)


def _inferred_type(value: Value) -> str:
    try:
        document = read(value.json)
    except RefusedError:
        # Sent as a string; the receiver reports what is wrong with it.
        document = ""
    if value.binary is not None:
        return infer_type(BinaryValue(document if isinstance(document, dict) else {}, value.binary))
    return _NULL_TYPE if document is None else infer_type(document)


# Messages are filled in place: creating a part and copying it into the whole takes twice as long.


def _put_value(message: AnyMessage, type_name: str, value: Value) -> None:
    message.type_url = type_url_of(type_name, value)
    message.value = value.json.encode()


def _put_time(message: Timestamp, moment: datetime) -> None:
    message.seconds, micros = divmod(to_micros(moment), 1_000_000)
    message.nanos = micros * 1000


# Times


def timestamp_of(moment: datetime) -> Timestamp:
    """Return the message for a time."""
    message = Timestamp()
    _put_time(message, moment)
    return message


def moment_of(timestamp: Timestamp) -> datetime:
    """Return the time in a message, aware and in UTC."""
    return from_micros(timestamp.seconds * 1_000_000 + timestamp.nanos // 1000)


# Variables


def variable_message(variable: Variable) -> pb.Variable:
    """Return the message for a variable."""
    value = variable.value
    message = pb.Variable(
        id=variable.id,
        name=variable.name,
        type=variable.type,
        constraints_json=variable.constraints,
        source=pb.Variable.PYTHON if variable.source is Source.PYTHON else pb.Variable.ELIXIR,
        version=variable.version,
    )
    _put_value(message.value, variable.type, value)
    _put_time(message.last_updated_at, variable.updated_at)
    if variable.metadata:
        message.metadata.update(variable.metadata)
    if value.binary is not None:
        message.binary_value = value.binary
    lock = variable.optimization
    if lock is not None:
        message.optimization_status.optimizing = True
        message.optimization_status.optimizer_id = lock.optimizer_id
        message.optimization_status.started_at.CopyFrom(timestamp_of(lock.started_at))
    return message


def variable_of(message: pb.Variable) -> Variable:
    """Return the variable in a message. Its lock has only the holder and the start time, as the message does."""
    lock = None
    if message.optimization_status.optimizing:
        status = message.optimization_status
        lock = Optimization("", status.optimizer_id, moment_of(status.started_at))
    return Variable(
        id=message.id,
        name=message.name,
        type=message.type,
        value=_stored(message.value, message.binary_value),
        version=message.version,
        constraints=message.constraints_json,
        metadata=FrozenDict(message.metadata),
        source=Source.PYTHON if message.source == pb.Variable.PYTHON else Source.ELIXIR,
        updated_at=moment_of(message.last_updated_at),
        optimization=lock,
    )


def value_in(wire: AnyMessage) -> Value:
    """Return a value from a message without a companion field; of a binary value, only the JSON description."""
    return _stored(wire, b"")


def _stored(wire: AnyMessage, binary: bytes) -> Value:
    return Value(wire.value.decode(), binary if wire.type_url.endswith(_BINARY) else None)


# History


def history_entry(version: VariableVersion) -> pb.VariableHistoryEntry:
    """Return the message for a version. Its metadata combines the client's with the server's (commit, actor, ...)."""
    entry = pb.VariableHistoryEntry(version=version.version, changed_by=version.actor)
    _put_time(entry.timestamp, version.created_at)
    if version.value is not None:
        _put_value(entry.value, version.type, version.value)
    metadata = entry.metadata
    # A plain loop, because `update` is a slower one in Python.
    for key, text in version.metadata.items():
        metadata[key] = text
    metadata[COMMIT_SEQUENCE] = str(version.sequence)
    metadata[_ACTOR] = version.actor
    metadata[_CAUSE] = version.cause
    metadata[_CHANGE] = version.kind.value
    metadata[_SOURCE] = version.source.value
    metadata[_VARIABLE_ID] = version.variable_id
    metadata[_TYPE] = version.type
    return entry


def _server_metadata(version: VariableVersion) -> dict[str, str]:
    return {
        COMMIT_SEQUENCE: str(version.sequence),
        _ACTOR: version.actor,
        _CAUSE: version.cause,
        _CHANGE: version.kind.value,
        _SOURCE: version.source.value,
    }


def version_of(entry: pb.VariableHistoryEntry) -> VariableVersion:
    """Return the version in an entry. A history has no binary content, only the JSON descriptions."""
    value = value_in(entry.value) if entry.HasField("value") else None
    metadata = entry.metadata
    return _version(metadata[_VARIABLE_ID], metadata[_TYPE], entry.version, value, metadata, entry.timestamp)


def _version(
    variable_id: str,
    type_name: str,
    number: int,
    value: Value | None,
    metadata: Mapping[str, str],
    timestamp: Timestamp,
) -> VariableVersion:
    own = FrozenDict(
        {
            key: text
            for key, text in metadata.items()
            if key in (REASON, RESTORED_METADATA) or not (key == COMMIT_SEQUENCE or key.startswith("dspex."))
        }
    )
    return VariableVersion(
        variable_id=variable_id,
        type=type_name,
        version=number,
        kind=ChangeKind(metadata[_CHANGE]),
        value=value,
        metadata=own,
        source=Source(metadata[_SOURCE]),
        created_at=moment_of(timestamp),
        actor=metadata[_ACTOR],
        cause=metadata[_CAUSE],
        sequence=int(metadata[COMMIT_SEQUENCE]),
    )


# Updates


def update_message(update: Update) -> pb.VariableUpdate:
    """Return the message for an update."""
    version = update.version
    metadata = {**version.metadata, **_server_metadata(version)} if version is not None else {}
    metadata[COMMIT_SEQUENCE] = str(update.sequence)
    metadata[_PART] = f"{update.part[0]}/{update.part[1]}"
    if update.dependency:
        metadata |= {_DEPENDENCY: update.dependency, _ACTOR: update.actor, _CAUSE: update.cause}
    if update.previous is not None and not is_left_out(update.previous):
        metadata[_PREVIOUS] = update.previous.json
    source = version.source if version is not None else update.variable.source
    return pb.VariableUpdate(
        variable_id=update.variable.id,
        variable=variable_message(update.variable),
        update_source=source.value,
        update_metadata=metadata,
        timestamp=timestamp_of(update.created_at),
        update_type=update.kind.value,
    )


def is_left_out(previous: Value) -> bool:
    """Return whether an update lacks this previous value, so that it does not become much larger: the client has it."""
    return previous.binary is not None or previous.size_bytes > _PREVIOUS_BYTES


def heartbeat_message(sequence: int, now: datetime) -> pb.VariableUpdate:
    """Return a heartbeat, which tells a watcher that it has received every commit up to `sequence`."""
    return pb.VariableUpdate(
        update_type="heartbeat",
        update_source="server",
        timestamp=timestamp_of(now),
        update_metadata={COMMIT_SEQUENCE: str(sequence)},
    )


def update_of(message: pb.VariableUpdate) -> Update:
    """Return the update in a message, which must not be a heartbeat."""
    kind = UpdateKind(message.update_type)
    variable = variable_of(message.variable)
    metadata = message.update_metadata
    version = None
    index, _, total = metadata[_PART].partition("/")
    if _CHANGE in metadata:
        deleted = metadata[_CHANGE] == ChangeKind.DELETED
        value = None if deleted else variable.value
        version = _version(variable.id, variable.type, variable.version, value, metadata, message.timestamp)
    return Update(
        kind=kind,
        variable=variable,
        sequence=int(metadata[COMMIT_SEQUENCE]),
        created_at=moment_of(message.timestamp),
        version=version,
        dependency=metadata.get(_DEPENDENCY, ""),
        part=(int(index), int(total)),
        previous=Value(metadata[_PREVIOUS]) if _PREVIOUS in metadata else None,
        actor=metadata.get(_ACTOR, ""),
        cause=metadata.get(_CAUSE, ""),
    )


# Tools


def tool_message(spec: ToolSpec, where: Mapping[str, str]) -> pb.ToolSpec:
    """Return the message for a tool. Its metadata includes `where` it runs, and its options."""
    own = {_ISOLATION: spec.isolation.value, _RETRIES: str(spec.retries), **where}
    if spec.exposed:
        own[_EXPOSED] = "true"
    if spec.timeout_s is not None:
        own[_TIMEOUT_S] = repr(spec.timeout_s).removesuffix(".0")
    if spec.concurrency is not None:
        own[_CONCURRENCY] = spec.concurrency.value
    return pb.ToolSpec(
        name=spec.name,
        description=spec.description,
        parameters=[_parameter_message(parameter) for parameter in spec.parameters],
        metadata={**spec.metadata, **own},
        supports_streaming=spec.streaming,
        required_variables=spec.required_variables,
    )


def tool_of(message: pb.ToolSpec) -> ToolSpec:
    """Return the tool in a message. Where it runs stays in its metadata."""
    metadata = message.metadata
    return ToolSpec(
        message.name,
        message.description,
        _parameters_of(message.name, message.parameters),
        message.supports_streaming,
        exposed=_EXPOSED in metadata,
        required_variables=tuple(message.required_variables),
        isolation=Isolation(metadata[_ISOLATION]) if _ISOLATION in metadata else Isolation.SERIALIZABLE,
        retries=int(metadata[_RETRIES] or 0),
        timeout_s=float(metadata[_TIMEOUT_S]) if metadata[_TIMEOUT_S] else None,
        metadata=dict(metadata),
        concurrency=Concurrency(metadata[_CONCURRENCY]) if _CONCURRENCY in metadata else None,
    )


def registration_message(tool: RegisteredTool) -> pb.ToolRegistration:
    """Return the message with which a worker registers a tool."""
    spec = tool.spec
    return pb.ToolRegistration(
        name=spec.name,
        description=spec.description,
        parameters=[_parameter_message(parameter) for parameter in spec.parameters],
        metadata={**spec.metadata, **({_ADDRESS: tool.address} if tool.address else {})},
        supports_streaming=spec.streaming,
    )


def registered_tool(registration: pb.ToolRegistration, worker_id: str, limits: Limits = _LIMITS) -> RegisteredTool:
    """Return the tool in a registration; `InvalidArgumentError` for an invalid address or default."""
    metadata = dict(registration.metadata)
    address = metadata.get(_ADDRESS, "")
    if address:
        try:
            parse_callee(address)
        except ListenError as error:
            forms = "HOST:PORT, grpcs://HOST:PORT or unix:PATH"
            reason = f"{_ADDRESS} of tool {quote(registration.name)}: {quote(address)}: {error.reason}; it is {forms}"
            raise InvalidArgumentError("metadata", reason) from error
    parameters = _parameters_of(registration.name, registration.parameters, limits)
    spec = ToolSpec(
        registration.name, registration.description, parameters, registration.supports_streaming, metadata=metadata
    )
    return RegisteredTool(spec, worker_id, address)


def _parameter_message(parameter: ToolParameter) -> pb.ParameterSpec:
    message = pb.ParameterSpec(
        name=parameter.name,
        type=parameter.type,
        description=parameter.description,
        required=parameter.required,
        validation_json=parameter.validation,
    )
    if parameter.default is not None:
        message.default_value.CopyFrom(loose_any_of(parameter.default))
    return message


def _parameters_of(
    tool: str, messages: Iterable[pb.ParameterSpec], limits: Limits = _LIMITS
) -> tuple[ToolParameter, ...]:
    return tuple(
        ToolParameter(
            message.name,
            message.type,
            message.description,
            message.required,
            _default_of(tool, message, limits),
            message.validation_json,
        )
        for message in messages
    )


def _default_of(tool: str, message: pb.ParameterSpec, limits: Limits) -> Value | None:
    if not message.HasField("default_value"):
        return None
    try:
        value = value_of(message.name, message.default_value, limits=limits)
        parse_json(value.json, name=message.name, limits=limits)
    except (InvalidValueError, LimitExceededError) as error:
        reason = f"of parameter {quote(message.name)} of tool {quote(tool)}: {error}"
        raise InvalidArgumentError("default_value", reason) from error
    return Value(value.json)
