"""Parameters of tools: describes an annotation in the protocol's types, and reads arguments by it.

Pydantic validates the arguments with its lax rules, except for numbers and booleans. These are read like variables of
their types, so `True` is not an integer and "3" not a number. Pydantic models and dataclasses apply their own rules to
their fields.
"""

import collections.abc
import copy
import inspect
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from math import inf
from typing import Annotated, Any, Literal, NotRequired, Optional, Required, Union, get_args, get_origin, get_type_hints

import typing_extensions
from pydantic import BeforeValidator, TypeAdapter, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError

from dspex_persist.cognitive.errors import ToolDefinitionError
from dspex_persist.state import values
from dspex_persist.state.errors import InvalidValueError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import ToolParameter, Value
from dspex_persist.state.values.json_text import RefusedError, container_in, shorten, shown
from dspex_persist.state.values.json_text import read as read_json

_ANY = "any"
"""The protocol's name for a parameter that no value type describes."""


def _read_as_variables() -> Mapping[type, values.ValueType]:
    """Return the value types that read Python's numbers and booleans, as pydantic would accept True for 1."""
    return {kind: values.get_type(kind.__name__, values.infer_type(kind())) for kind in (bool, float, int)}


_NUMBERS = _read_as_variables()
_COERCIONS = {value_type.name: value_type.coerce for value_type in _NUMBERS.values()}
_BEYOND_64_BITS = 2.0**63
_MISTAKES_READ = 20
_SENTENCE_LENGTH = 500
_LIMITS = Limits()
_COLLECTIONS = ("builtins", "collections", "collections.abc")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter: its description, and the adapter that reads its arguments.

    Attributes:
        described: Its description for clients.
        adapter: Validates arguments.
        has_choices: Whether it has a fixed list of values.
        is_plain: Whether its type consists of Python's own types only, so that reading an argument runs no user code.
        default: Its default if the function could modify it, else None.
    """

    described: ToolParameter
    adapter: TypeAdapter[Any]
    has_choices: bool = False
    is_plain: bool = False
    default: object = None

    def read(self, value: Value, limits: Limits | None = None) -> object:
        """Return the argument in `value`; raise `RefusedError` if it is invalid, `LimitExceededError` if too large."""
        try:
            document = self._decode(value, limits)
        except InvalidValueError as error:
            raise RefusedError(error.reason) from error
        try:
            return self._validated(document)
        except ValidationError as error:
            raise RefusedError(_sentence(error, document)) from error
        except RefusedError:
            raise
        except BaseException as error:  # validators of the tool's own types may raise anything
            raise RefusedError(f"{type(error).__name__}: {shorten(_text_of(error))}") from error

    def _decode(self, value: Value, limits: Limits | None) -> object:
        """Decode JSON as it is, and bytes according to their description, unless the function takes numbers."""
        if limits is None:
            document = read_json(value.json)
        else:
            document = values.parse_json(value.json, name=self.described.name, limits=limits)
        return document if value.binary is None else values.decode_argument(self.described.type, value)

    def _validated(self, document: object) -> object:
        """Validate a document. A string that contains the JSON of an expected map or list counts as that."""
        try:
            return self.adapter.validate_python(self._coerce(document))
        except ValidationError:
            if not isinstance(document, str) or not self._takes_containers():
                raise
            contained = container_in(document, name=self.described.name, limits=_LIMITS)
            if contained is document:
                raise
            return self.adapter.validate_python(contained)

    def _takes_containers(self) -> bool:
        expected = values.find_type(self.described.type)
        # A type without a JSON schema is that of a BinaryValue, which is never JSON.
        return expected is not None and expected.is_container and bool(expected.schema)

    def _coerce(self, document: object) -> object:
        """Coerce a value for choices, which pydantic compares with `==`, so that `True` would be the choice 1."""
        coerce = _COERCIONS.get(self.described.type) if self.has_choices else None
        return document if coerce is None or document is None else coerce(document)


class _Schema(GenerateJsonSchema):
    """Pydantic's JSON schema without warnings, because only its outermost layer is used."""

    def emit_warning(self, kind: str, detail: str) -> None:
        """Ignore the warning."""


def read_parameter(named: str, parameter: inspect.Parameter, annotation: Any, description: str) -> Parameter:
    """Read a parameter of the function `named`.

    Raises:
        ToolDefinitionError: Its arguments or its default have no JSON form.
    """
    name, default = parameter.name, parameter.default
    if default is None:
        annotation = Optional[annotation]  # noqa: UP045 - computed
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(_prepared(annotation, _RULES))
        schema = TypeAdapter(_prepared(annotation, {})).json_schema(schema_generator=_Schema)
    except Exception as error:  # the tool's own types may raise anything
        reason = f"its parameter {name} cannot come as JSON: {_first_line(error)}"
        raise ToolDefinitionError(named, reason) from error
    type_name, validation = _describe(schema, annotation)
    described = ToolParameter(
        name=name,
        type=type_name,
        description=description or one_line(schema.get("description", "")),
        required=default is parameter.empty,
        validation=values.encode(validation, "map").json if validation else "",
    )
    read = Parameter(described, adapter, "choices" in validation, _is_plain(annotation))
    if default is parameter.empty or default is None:
        return read
    try:
        value = _encode_default(default, adapter, type_name)
        read.read(value)
    except Exception as error:  # a default can be anything
        reason = f"the default of its parameter {name} is not one of its values: {_first_line(error)}"
        raise ToolDefinitionError(named, reason) from error
    try:
        changes = copy.deepcopy(default) is not default
    except Exception as error:
        reason = (
            f"the default of its parameter {name} cannot be copied, and each call gets a copy: use None, and create it "
            f"in the function ({_first_line(error)})"
        )
        raise ToolDefinitionError(named, reason) from error
    return replace(read, described=replace(described, default=value), default=default if changes else None)


_PLAIN_MODULES = ("builtins", "collections", "collections.abc", "datetime", "decimal", "typing", "types", "uuid")


def _is_plain(annotation: Any) -> bool:
    """Return whether the annotation contains no user code."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal or annotation is Any or annotation is Ellipsis:
        return True
    if origin is Annotated:
        return _is_plain(arguments[0]) and all(isinstance(each, FieldInfo) for each in arguments[1:])
    if arguments:
        return all(map(_is_plain, arguments))
    return annotation is None or (isinstance(annotation, type) and annotation.__module__ in _PLAIN_MODULES)


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as fault:  # noqa: BLE001 -- user code, too
        return f"it has no text: its __str__ raised {type(fault).__name__}"


def _encode_default(default: object, adapter: TypeAdapter[Any], type_name: str) -> Value:
    document = adapter.dump_python(default, mode="json", warnings="error")
    if isinstance(default, set | frozenset):
        # Their order differs between processes, but a description should not.
        document = sorted(document, key=repr)
    return values.encode(document, type_name if values.find_type(type_name) else None)


def _first_line(error: Exception) -> str:
    text = error.reason if isinstance(error, RefusedError | InvalidValueError) else _text_of(error)
    return text.partition("\n")[0]


def _rule(coerce: Callable[[object], object]) -> BeforeValidator:
    def check(document: object) -> object:
        try:
            coerced = coerce(document)
        except RefusedError as error:
            raise PydanticCustomError("refused", "{reason}", {"reason": error.reason}) from error
        # Pydantic coerces itself, since in a union it prefers a type that needs no coercion. But it cannot convert
        # large floats to integers.
        return coerced if isinstance(document, float) and abs(document) >= _BEYOND_64_BITS else document

    return BeforeValidator(check)


_RULES: Mapping[Any, Any] = {kind: Annotated[kind, _rule(value_type.coerce)] for kind, value_type in _NUMBERS.items()}


def _key_rule(coerce: Callable[[object], object]) -> BeforeValidator:
    """Return a rule for the keys of a map. JSON keys are strings, so a number is written as JSON would write it."""

    def check(key: object) -> object:
        written = key
        with suppress(RefusedError):
            written = read_json(key) if isinstance(key, str) else key
        try:
            return coerce(written)
        except RefusedError as error:
            raise PydanticCustomError("refused", "as a key, {reason}", {"reason": error.reason}) from error

    return BeforeValidator(check)


_KEY_RULES: Mapping[Any, Any] = {
    kind: Annotated[kind, _key_rule(value_type.coerce)] for kind, value_type in _NUMBERS.items()
}


def _keep_all(document: object, read: ValidatorFunctionWrapHandler) -> object:
    """Return a map as read, unless two of its keys have become the same and one of them would be lost."""
    result = read(document)
    if isinstance(document, dict) and len(result) != len(document):
        raise PydanticCustomError("refused", "two of its keys mean the same: write each in one way only")
    return result


def _prepared(annotation: Any, rules: Mapping[Any, Any], within: tuple[Any, ...] = ()) -> Any:
    """Return the annotation for pydantic, with `rules` applied inside; raise `RefusedError` if it has no JSON form."""
    while hasattr(annotation, "__supertype__"):
        annotation = annotation.__supertype__
    if typing_extensions.is_typeddict(annotation):
        return _prepared_typed_dict(annotation, rules, within)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if type in (annotation, origin):
        raise RefusedError("classes have no JSON form")
    if not arguments or origin is Literal:
        return _prepared_bare(annotation, rules)
    is_map = bool(rules) and isinstance(origin, type) and issubclass(origin, Mapping) and len(arguments) == 2
    # In a union, a key stays a string.
    key_rules = _KEY_RULES if is_map and get_origin(arguments[0]) not in (Union, types.UnionType) else rules
    inner = tuple(
        argument if argument is Ellipsis else _prepared(argument, rules if at else key_rules, within)
        for at, argument in enumerate(arguments[:1] if origin is Annotated else arguments)
        if not isinstance(argument, list)
    )
    if origin is Annotated:
        return Annotated[(*inner, *annotation.__metadata__)]
    if origin in (Union, types.UnionType):
        return Union[inner]  # noqa: UP007 - computed
    # Pydantic would read an Iterable lazily, while the tool runs, and does not know Collection.
    container: Any = list if origin in (Iterable, Collection) else origin
    is_collection = container.__module__ in _COLLECTIONS and container is not collections.abc.Callable
    if is_collection and is_map:
        return Annotated[container[inner], WrapValidator(_keep_all)]
    return container[inner] if is_collection else annotation


def _prepared_bare(annotation: Any, rules: Mapping[Any, Any]) -> Any:
    if (get_origin(annotation) or annotation) in (Iterable, Collection):
        return list
    try:
        return rules.get(annotation, annotation)
    except TypeError:  # an annotation without a hash
        return annotation


def _prepared_typed_dict(annotation: Any, rules: Mapping[Any, Any], within: tuple[Any, ...]) -> Any:
    """Return the TypedDict as one of typing_extensions: below Python 3.12, pydantic accepts no other."""
    if annotation in within:
        raise RefusedError(f"{annotation.__name__} contains itself: use a pydantic model")
    within = (*within, annotation)
    fields: dict[str, Any] = {}
    for key, hint in get_type_hints(annotation, include_extras=True).items():
        while get_origin(hint) in (Required, NotRequired):
            (hint,) = get_args(hint)
        prepared = _prepared(hint, rules, within)
        fields[key] = Required[prepared] if key in annotation.__required_keys__ else NotRequired[prepared]
    return typing_extensions.TypedDict(annotation.__name__, fields)  # type: ignore[operator]


def _describe(schema: Mapping[str, Any], annotation: Any) -> tuple[str, dict[str, Any]]:
    """Return the protocol's type for a JSON schema, and its additional constraints."""
    if annotation is values.BinaryValue:
        return values.infer_type(values.BinaryValue({}, b"")), {}
    kinds = [_kind_of(branch) for branch in _branches(schema, schema.get("$defs", {}))]
    names = {name for name, _ in kinds}
    if not kinds or len(names) > 1:
        are_numbers = bool(names) and all(map(values.is_number, names))
        return (_named({"type": "number"}) if are_numbers else _ANY), {}
    (name,) = names
    rules = [rules for _, rules in kinds]
    if len(kinds) == 1:
        return name, rules[0]
    if all("choices" in each for each in rules):
        return name, {"choices": [choice for each in rules for choice in each["choices"]]}
    return name, {}


def _branches(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the alternatives of a schema, without null."""
    if "$ref" in schema:
        yield from _branches(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    elif "anyOf" in schema or "oneOf" in schema:
        for branch in schema.get("anyOf") or schema["oneOf"]:
            yield from _branches(branch, definitions)
    elif schema.get("type") != "null":
        yield schema


def _kind_of(schema: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    rules = {
        ours: schema[theirs]
        for theirs, ours in values.schema_keywords().items()
        if schema.get(theirs) not in (None, inf, -inf)
    }
    kind = {key: entry for key, entry in schema.items() if key not in ("enum", "const")}
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if choices is not None:
        choices = [choice for choice in choices if choice is not None]
        rules["choices"] = choices
        if choices and all(isinstance(choice, str) for choice in choices):
            kind |= {"type": "string", "enum": choices}
    return _named(kind), rules


def _named(schema: Mapping[str, Any]) -> str:
    """Return the protocol's name for the type that a JSON schema describes."""
    value_type = values.type_of_schema(schema)
    return _ANY if value_type is None else value_type.name


# Mistakes in arguments, in one sentence


def _sentence(error: ValidationError, document: object) -> str:
    """Return the place of the first mistake and its message; for a union, the messages of all alternatives."""
    mistakes: dict[str, dict[str, None]] = {}
    # A long list may have a mistake in each entry.
    for details in islice(error.errors(include_url=False, include_context=False), _MISTAKES_READ):
        mistakes.setdefault(_path(details, document), {})[_message(details)] = None
    path, messages = next(iter(mistakes.items()))
    others = error.error_count() - len(messages)
    text = "; or: ".join(messages)
    if len(text) > _SENTENCE_LENGTH:
        text = f"{text[:_SENTENCE_LENGTH]}..."
    return f"{f'at {path}: ' if path else ''}{text}{f' (and {others} more)' if others else ''}"


def _message(details: ErrorDetails) -> str:
    message = details["msg"]
    if message.startswith("Input should"):
        message = f"{message}, not {shown(details['input'])}"
    return message[:1].lower() + message[1:]


def _path(details: ErrorDetails, document: object) -> str:
    """Return the path of keys and indices to the mistake, without pydantic's names for alternatives of unions."""
    steps: list[str] = []
    location: Sequence[int | str] = details["loc"]
    for step in location:
        if _has(document, step):
            document = document[step]  # type: ignore[index]
            steps.append(shorten(str(step)))
    if details["type"] == "missing":
        steps.append(shorten(str(location[-1])))
    return ".".join(steps)


def _has(document: object, step: int | str) -> bool:
    if isinstance(document, list):
        return isinstance(step, int) and step < len(document)
    return isinstance(document, dict) and step in document


def one_line(text: str) -> str:
    """Return `text` without its line breaks."""
    return " ".join(text.split())
