"""Values of demos and options as JSON, with what JSON does not say: types, and the order of keys.

JSON's own types are written as they are. Everything else is `{"$": KIND, "value": ...}`, with `"class"` if it is an
instance of a class of the program. Read back, a value has the same type, so that the same requests reach the LM.
"""

import base64
import binascii
import dataclasses
import enum
import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal, InvalidOperation
from math import isfinite
from typing import Any, Final, cast
from uuid import UUID

import dspy
from pydantic import BaseModel, TypeAdapter

from dspex_persist.cognitive.dspy.program_types import Classes, class_name, is_named_tuple, label_of
from dspex_persist.spelling import quote, shorten

_KIND: Final = "$"
_VALUE: Final = "value"
_CLASS: Final = "class"
_DEEPEST: Final = 60
_IMPORTS: Final = "a value beside a pydantic.ImportString, which would import what is stored"
# A request has the same JSON for each.
_DICTS: Final = (dict, OrderedDict, defaultdict)


class UnstorableError(Exception):
    """A value has no JSON form that can be read back; the text says why."""


class UnreadableError(Exception):
    """A stored value cannot be read back; the text says why."""


def encode(value: Any, classes: Classes, annotation: Any = None) -> Any:
    """Return a value as JSON.

    Args:
        value: The value.
        classes: The classes that will be known when it is read back.
        annotation: The type of the field that has the value: pydantic can write some that nothing else can.

    Raises:
        UnstorableError: It cannot be stored.
    """
    try:
        encoded = _encode(value, classes, 0)
    except UnstorableError as refusal:
        if annotation is None:
            raise
        return _by_annotation(value, annotation, refusal, classes)
    if _encode(decode(encoded, classes, annotation), classes, 0) != encoded:
        raise UnstorableError(f"a {class_name(type(value))} that its own class reads back as another value")
    return encoded


def _by_annotation(value: Any, annotation: Any, refusal: UnstorableError, classes: Classes) -> Any:
    """Return a value of a type that only pydantic knows, such as a URL; raise `refusal` if that does not know it."""
    if classes.imports:
        raise UnstorableError(_IMPORTS)
    try:
        adapter = TypeAdapter(annotation)
        document = adapter.dump_python(value, mode="json")
        json.dumps(document, allow_nan=False)
        again = adapter.validate_python(document)
        is_same = type(again) is type(value) and bool(again == value)
    except Exception:  # noqa: BLE001 -- whatever it is, pydantic cannot store it
        raise refusal from None
    if not is_same:
        # As with secrets, whose JSON is asterisks.
        raise UnstorableError(f"a {class_name(type(value))}, which its JSON does not bring back")
    return {_KIND: "annotated", _VALUE: document}


def _encode(value: Any, classes: Classes, depth: int) -> Any:
    if depth > _DEEPEST:
        raise UnstorableError(f"a value that is nested deeper than {_DEEPEST} levels, or contains itself")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return _of_class(value, "enum", value.name, classes)
    if isinstance(value, str | int | float):
        return _scalar(value)
    if isinstance(value, bytes | bytearray):
        return {_KIND: "bytes", _VALUE: base64.b64encode(value).decode()}
    if isinstance(value, date | time):
        # While a replay has stopped the clock, dates are of subclasses.
        kind = "datetime" if isinstance(value, datetime) else "date" if isinstance(value, date) else "time"
        return {_KIND: kind, _VALUE: value.isoformat()}
    if isinstance(value, Decimal | UUID):
        return {_KIND: "decimal" if isinstance(value, Decimal) else "uuid", _VALUE: str(value)}
    if isinstance(value, timedelta):
        return {_KIND: "timedelta", _VALUE: [value.days, value.seconds, value.microseconds]}
    return _container(value, classes, depth + 1)


def _scalar(value: str | int | float) -> Any:
    base = next(kind for kind in (str, int, float) if isinstance(value, kind))
    plain = base(value)
    if type(value) is not base and str(plain) != str(value):
        raise UnstorableError(f"a {class_name(type(value))}, which is no plain {base.__name__}")
    if isinstance(plain, float) and not isfinite(plain):
        return {_KIND: "not_finite", _VALUE: repr(plain)}
    if isinstance(plain, str) and not plain.isascii():
        try:
            plain.encode()
        except UnicodeEncodeError:
            raise UnstorableError("a text with a lone surrogate, which is not Unicode") from None
    return plain


def _container(value: Any, classes: Classes, depth: int) -> Any:
    if type(value) is list:
        return [_encode(each, classes, depth) for each in value]
    if type(value) in _DICTS:
        return _map(value, classes, depth)
    if type(value) is tuple:
        return {_KIND: "tuple", _VALUE: [_encode(each, classes, depth) for each in value]}
    if type(value) in (set, frozenset):
        entries = [_encode(each, classes, depth) for each in value]
        return {_KIND: type(value).__name__, _VALUE: sorted(entries, key=lambda each: json.dumps(each, sort_keys=True))}
    if isinstance(value, dspy.Example):
        kind = "prediction" if isinstance(value, dspy.Prediction) else "example"
        return {_KIND: kind, _VALUE: _pairs(dict(value.items(include_dspy=True)), classes, depth)}
    if isinstance(value, BaseModel):
        return _model(value, classes, depth)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _of_class(value, "dataclass", _pairs(fields, classes, depth), classes)
    if is_named_tuple(type(value)):
        return _of_class(value, "namedtuple", _pairs(value._asdict(), classes, depth), classes)
    kind = class_name(value) if isinstance(value, type) else class_name(type(value))
    raise UnstorableError(f"the class {kind}" if isinstance(value, type) else f"a {kind}, which is no data")


def _map(value: Mapping[Any, Any], classes: Classes, depth: int) -> Any:
    keys = list(value)
    # JSON is stored with sorted keys, and a request has them as they are.
    if all(type(key) is str and not key.startswith(_KIND) for key in keys) and keys == sorted(keys):
        return {key: _encode(each, classes, depth) for key, each in value.items()}
    return {_KIND: "mapping", _VALUE: _pairs(value, classes, depth)}


def _pairs(value: Mapping[Any, Any], classes: Classes, depth: int) -> list[Any]:
    return [[_encode(key, classes, depth), _encode(each, classes, depth)] for key, each in value.items()]


def _model(value: BaseModel, classes: Classes, depth: int) -> Any:
    if classes.imports:
        raise UnstorableError(_IMPORTS)
    fields: list[Any] = []
    for name, field in type(value).model_fields.items():
        given = getattr(value, name)
        try:
            fields.append([name, _encode(given, classes, depth)])
        except UnstorableError as refusal:
            fields.append([name, _by_annotation(given, field.annotation, refusal, classes)])
    fields.extend(_pairs(value.model_extra or {}, classes, depth))
    return _of_class(value, "model", fields, classes)


def _of_class(value: object, kind: str, document: Any, classes: Classes) -> Any:
    if type(value) not in classes:
        reason = f"a {class_name(type(value))}, a class that no field of the signature mentions in its type"
        raise UnstorableError(reason)
    return {_KIND: kind, _CLASS: label_of(type(value)), _VALUE: document}


# Reading


def decode(document: Any, classes: Classes, annotation: Any = None) -> Any:
    """Return the value that JSON stands for.

    Args:
        document: The JSON, which any client may have written.
        classes: The classes that may occur in it.
        annotation: The type of the field that has the value.

    Raises:
        UnreadableError: It is no value that `encode` writes, or does not fit its class.
    """
    try:
        return _decode(document, classes, annotation)
    except UnreadableError:
        raise
    except RecursionError:
        raise UnreadableError("it is nested too deep") from None
    except Exception as error:
        # Classes of the program check their values as they like.
        raise UnreadableError(_brief(error)) from error


def _decode(document: Any, classes: Classes, annotation: Any = None) -> Any:
    if isinstance(document, list):
        return [_decode(each, classes) for each in document]
    if not isinstance(document, dict):
        return document
    if _KIND not in document:
        return {key: _decode(each, classes) for key, each in document.items()}
    kind, value = document[_KIND], document.get(_VALUE)
    if not isinstance(kind, str) or not document.keys() <= {_KIND, _VALUE, _CLASS}:
        raise UnreadableError(f"{_brief(document)} is no value that ctx.programs.save writes")
    if classes.imports and kind in ("annotated", "model"):
        raise UnreadableError(_IMPORTS)
    if kind == "annotated":
        if annotation is None:
            raise UnreadableError("a value whose type no field says")
        return TypeAdapter(annotation).validate_python(value)
    if _CLASS in document:
        return _instance(kind, document[_CLASS], value, classes)
    read = _READERS.get(kind)
    if read is None:
        raise UnreadableError(f"there are no values of the kind {_brief(kind)}")
    return read(value, classes)


def _entries(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UnreadableError(f"a list is expected, not {_brief(value)}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise UnreadableError(f"a text is expected, not {_brief(value)}")
    return value


def _fields(value: Any, classes: Classes) -> dict[Any, Any]:
    pairs = _entries(value)
    if not all(isinstance(each, list) and len(each) == 2 for each in pairs):
        raise UnreadableError(f"pairs of keys and values are expected, not {_brief(value)}")
    return {_decode(key, classes): _decode(each, classes) for key, each in pairs}


def _named(value: Any, classes: Classes) -> dict[str, Any]:
    fields = _fields(value, classes)
    if not all(isinstance(key, str) for key in fields):
        raise UnreadableError(f"names of fields are expected, not {_brief(list(fields))}")
    return fields


def _bytes(value: Any, _: Classes) -> bytes:
    try:
        return base64.b64decode(_text(value), validate=True)
    except binascii.Error as error:
        raise UnreadableError(f"{_brief(value)} is not base64") from error


def _decimal(value: Any, _: Classes) -> Decimal:
    try:
        return Decimal(_text(value))
    except InvalidOperation as error:
        raise UnreadableError(f"{_brief(value)} is no decimal number") from error


def _float(value: Any, _: Classes) -> float:
    if value not in ("nan", "inf", "-inf"):
        raise UnreadableError(f"{_brief(value)} is no such float")
    return float(value)


_READERS: Final[Mapping[str, Callable[[Any, Classes], Any]]] = {
    "mapping": _fields,
    "tuple": lambda value, classes: tuple(_decode(each, classes) for each in _entries(value)),
    "set": lambda value, classes: {_decode(each, classes) for each in _entries(value)},
    "frozenset": lambda value, classes: frozenset(_decode(each, classes) for each in _entries(value)),
    "not_finite": _float,
    "bytes": _bytes,
    "datetime": lambda value, _: datetime.fromisoformat(_text(value)),
    "date": lambda value, _: date.fromisoformat(_text(value)),
    "time": lambda value, _: time.fromisoformat(_text(value)),
    "timedelta": lambda value, _: timedelta(*_entries(value)),
    "decimal": _decimal,
    "uuid": lambda value, _: UUID(_text(value)),
    "example": lambda value, classes: dspy.Example(_named(value, classes)),
    "prediction": lambda value, classes: dspy.Prediction(**_named(value, classes)),
}


def _instance(kind: str, label: Any, value: Any, classes: Classes) -> Any:
    found = classes.find(_text(label))
    if found is None:
        known = ", ".join(classes.names()) or "none"
        reason = f"it is a {quote(label)}, and the fields of the module's signature mention no such class"
        raise UnreadableError(f"{reason} (those of the program: {known})")
    if kind == "enum" and issubclass(found, enum.Enum):
        member = found.__members__.get(_text(value))
        if member is None:
            raise UnreadableError(f"{class_name(found)} has no {_brief(value)}")
        return member
    if kind == "model" and issubclass(found, BaseModel):
        return _read_model(found, value, classes)
    fields = _named(value, classes)
    if kind == "namedtuple" and is_named_tuple(found):
        return found(**fields)
    if kind == "dataclass" and dataclasses.is_dataclass(found):
        return _read_dataclass(found, fields)
    raise UnreadableError(f"{class_name(found)} is no {_brief(kind)}")


def _read_model(kind: type[BaseModel], value: Any, classes: Classes) -> BaseModel:
    fields: dict[str, Any] = {}
    for pair in _entries(value):
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise UnreadableError(f"names of fields and their values are expected, not {_brief(pair)}")
        field = kind.model_fields.get(pair[0])
        if field is None and kind.model_config.get("extra") != "allow":
            raise UnreadableError(f"{class_name(kind)} has no field {_brief(pair[0])}")
        fields[pair[0]] = _decode(pair[1], classes, None if field is None else field.annotation)
    missing = [name for name, field in kind.model_fields.items() if name not in fields and field.is_required()]
    if missing:
        raise UnreadableError(f"{class_name(kind)} has a field {missing[0]} that is not in it")
    return kind.model_validate(fields, by_name=True)


def _read_dataclass(kind: Any, fields: dict[str, Any]) -> Any:
    known = {field.name: field for field in dataclasses.fields(kind)}
    for name in fields:
        if name not in known:
            raise UnreadableError(f"{class_name(kind)} has no field {_brief(name)}")
    instance = kind(**{name: each for name, each in fields.items() if known[name].init})
    for name, each in fields.items():
        if not known[name].init:
            object.__setattr__(instance, name, each)
    return cast(object, instance)


def _brief(thing: object) -> str:
    return shorten(" ".join((str(thing) if isinstance(thing, BaseException) else repr(thing)).split()), 120)
