"""Parameters: an annotation described in the protocol's types, and arguments read by it.

Arguments are validated by pydantic, whose lax rules hold but for numbers and booleans: these are read as variables of
their types are, so that `True` is no integer and "3" no number. What is inside a pydantic model or a dataclass
follows that model's own rules.
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
"""The protocol's word for a parameter that no value type describes."""


def _read_as_variables() -> Mapping[type, values.ValueType]:
    """Python's numbers and booleans, which are read as variables of their types are: pydantic takes True for 1."""
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
    """One parameter: how it is described, and what reads its arguments.

    `is_plain`: its type is made of Python's own alone, so that nothing of users' runs when one is read. `default`: one
    that the function could change, or None.
    """

    described: ToolParameter
    adapter: TypeAdapter[Any]
    has_choices: bool = False
    is_plain: bool = False
    default: object = None

    def read(self, value: Value, limits: Limits | None = None) -> object:
        """The argument that `value` stands for; `RefusedError` if it is none, `LimitExceededError` beyond `limits`."""
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
        except BaseException as error:  # validators of the tool's own types raise what they like
            raise RefusedError(f"{type(error).__name__}: {shorten(_text_of(error))}") from error

    def _decode(self, value: Value, limits: Limits | None) -> object:
        """JSON as it is; bytes as what they say they are, unless the function wants a list of numbers."""
        if limits is None:
            document = read_json(value.json)
        else:
            document = values.parse_json(value.json, name=self.described.name, limits=limits)
        return document if value.binary is None else values.decode_argument(self.described.type, value)

    def _validated(self, document: object) -> object:
        """What pydantic makes of it; of a string that is the JSON of a map or list, where one is wanted, of that."""
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
        wanted = values.find_type(self.described.type)
        # A type that no annotation's schema means is that of a BinaryValue, which JSON never is.
        return wanted is not None and wanted.is_container and bool(wanted.schema)

    def _coerce(self, document: object) -> object:
        """For choices, which pydantic compares with `==`: to it, `True` is the choice 1."""
        coerce = _COERCIONS.get(self.described.type) if self.has_choices else None
        return document if coerce is None or document is None else coerce(document)


class _Schema(GenerateJsonSchema):
    """pydantic's JSON schema, without the warnings: only its outermost layer is used."""

    def emit_warning(self, kind: str, detail: str) -> None:
        """Say nothing."""


def read_parameter(named: str, parameter: inspect.Parameter, annotation: Any, description: str) -> Parameter:
    """One parameter of the function `named`; `ToolDefinitionError` if its arguments or its default cannot be JSON."""
    name, default = parameter.name, parameter.default
    if default is None:
        annotation = Optional[annotation]  # noqa: UP045 - computed
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(_prepared(annotation, _RULES))
        schema = TypeAdapter(_prepared(annotation, {})).json_schema(schema_generator=_Schema)
    except Exception as error:  # types of the tool's own raise what they like
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
            f"the default of its parameter {name} cannot be copied, and each call gets one of its own: use None, and "
            f"make it in the function ({_first_line(error)})"
        )
        raise ToolDefinitionError(named, reason) from error
    return replace(read, described=replace(described, default=value), default=default if changes else None)


_PLAIN_MODULES = ("builtins", "collections", "collections.abc", "datetime", "decimal", "typing", "types", "uuid")


def _is_plain(annotation: Any) -> bool:
    """Whether nothing in the annotation is users' code."""
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
    except BaseException as fault:  # noqa: BLE001 -- users' code, too
        return f"it has no text: its __str__ raised {type(fault).__name__}"


def _encode_default(default: object, adapter: TypeAdapter[Any], type_name: str) -> Value:
    document = adapter.dump_python(default, mode="json", warnings="error")
    if isinstance(default, set | frozenset):
        # Their order differs from process to process; a description should not.
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
        # Coercing is left to pydantic, as in a union it prefers what needs none; but its integers of floats are short.
        return coerced if isinstance(document, float) and abs(document) >= _BEYOND_64_BITS else document

    return BeforeValidator(check)


_RULES: Mapping[Any, Any] = {kind: Annotated[kind, _rule(value_type.coerce)] for kind, value_type in _NUMBERS.items()}


def _key_rule(coerce: Callable[[object], object]) -> BeforeValidator:
    """For a key of a map: JSON has strings only, and a number among them is written as JSON writes it."""

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
    """A map as it was read, if no two of its keys are the same now: one of them would be lost."""
    result = read(document)
    if isinstance(document, dict) and len(result) != len(document):
        raise PydanticCustomError("refused", "two of its keys mean the same: write each in one way only")
    return result


def _prepared(annotation: Any, rules: Mapping[Any, Any], within: tuple[Any, ...] = ()) -> Any:
    """The annotation as pydantic should take it: with `rules` for what is inside it, and without what has no JSON."""
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
    # In a union it is a string that its text stands for.
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
    # pydantic would read an Iterable lazily, while the tool runs, and knows no Collection.
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
    """The same as typing_extensions has it: below Python 3.12 pydantic takes no other."""
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
    """The protocol's type, and the rules on top of it, of a JSON schema."""
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
    """The alternatives that a schema has, without null."""
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
    said = {key: entry for key, entry in schema.items() if key not in ("enum", "const")}
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if choices is not None:
        choices = [choice for choice in choices if choice is not None]
        rules["choices"] = choices
        if choices and all(isinstance(choice, str) for choice in choices):
            said |= {"type": "string", "enum": choices}
    return _named(said), rules


def _named(schema: Mapping[str, Any]) -> str:
    """The protocol's word for what a JSON Schema describes."""
    meant = values.type_of_schema(schema)
    return _ANY if meant is None else meant.name


# What was wrong, in a sentence.


def _sentence(error: ValidationError, document: object) -> str:
    """Where the first mistake is and what it is; of a union, what each alternative says."""
    found: dict[str, dict[str, None]] = {}
    # A long list may be wrong in each of its entries.
    for details in islice(error.errors(include_url=False, include_context=False), _MISTAKES_READ):
        found.setdefault(_path(details, document), {})[_message(details)] = None
    path, messages = next(iter(found.items()))
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
    """The keys and indices that lead to the mistake, without pydantic's names for the alternatives of unions."""
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
    """`text` without its line breaks."""
    return " ".join(text.split())
