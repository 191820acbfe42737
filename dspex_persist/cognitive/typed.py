"""Typed state: variables whose values are pydantic models, and migrations from older versions of a model.

A model becomes the constraints of its variable: its JSON Schema, and a version. So whoever writes the variable, in
whichever language, writes what the model can read. A program that knows the model reads instances of it:

    @model("profile")
    class Profile(BaseModel):
        name: str

    ctx.define("profile", Profile(name="Ada"))
    ctx["profile"].name

When the model changes, a migration leads from the old version to the new one. It runs when a program reads an older
value, and is written as one commit whose cause is the migration.
"""

import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, TypeVar
from weakref import WeakSet

from dspex_persist.cognitive.errors import MigrationError, TypedValueError
from dspex_persist.cognitive.records import DESCRIPTION, decode
from dspex_persist.cognitive.steps import Steps, Terms, ask, work
from dspex_persist.state import arguments, commands, values
from dspex_persist.state.errors import (
    InvalidArgumentError,
    InvalidValueError,
    StateError,
    VariableExistsError,
    VariableLockedError,
    VariableReplacedError,
    VersionConflictError,
    quote,
)
from dspex_persist.state.model import Value, Variable

if TYPE_CHECKING:
    from pydantic import BaseModel

Model: TypeAlias = "type[BaseModel]"
M = TypeVar("M", bound="type[BaseModel]")
F = TypeVar("F", bound=Callable[[Any], Any])

UNSTATED: Final = object()
"""Stands for a value that was not given: the default of the model."""
_ATTEMPTS: Final = 100
_MODELS_KEPT: Final = 1000
_TYPES: Final = {"object": "map", "array": "list"}
_ANNOTATIONS: Final = frozenset({"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"})
_TEXTS: Final = frozenset({"properties", "$defs", "patternProperties", "dependentSchemas"})
"""Keywords whose keys are names, which may be those of annotations."""


@dataclass(frozen=True, slots=True)
class Typed:
    """A model of a variable.

    Attributes:
        model: The model.
        version: The version of its schema.
        type_name: The value type of the variable.
        schema: The JSON Schema of its values.
    """

    model: Any
    version: int
    type_name: str
    schema: Mapping[str, Any]

    def constraints(self, more: Mapping[str, Any] | str | None = None) -> str:
        """Return the constraints of the variable, as JSON. `more` are further ones, by keyword or as JSON."""
        others = json.loads(more) if isinstance(more, str) and more else more
        return json.dumps({**(others or {}), "schema": self.schema, "schema_version": self.version}, sort_keys=True)

    def instance(self, name: str, value: object) -> Any:
        """Return a value of a program as an instance, or raise `InvalidValueError`."""
        from pydantic import ValidationError

        try:
            return value if isinstance(value, self.model) else self.model.model_validate(value)
        except ValidationError as error:
            raise InvalidValueError(name, _reason(error)) from error

    def default(self, name: str) -> Any:
        """Return the instance without arguments, or raise `InvalidValueError`."""
        from pydantic import ValidationError

        try:
            return self.model()
        except ValidationError as error:
            reason = f"there is no value, and {self.model.__name__} has none by default: {_reason(error)}"
            raise InvalidValueError(name, reason) from error

    def read(self, name: str, value: Value) -> Any:
        """Return the instance for a value, or raise `TypedValueError`."""
        from pydantic import ValidationError

        try:
            return self.model.model_validate_json(value.json)
        except ValidationError as error:
            reason = f"it is not a {self.model.__name__} (version {self.version}): {_reason(error)}"
            raise TypedValueError(name, reason, values.decode(self.type_name, value)) from error


class _Step(NamedTuple):
    """One migration."""

    to: int
    function: Callable[[Any], Any]


class _Registry:
    """The models and migrations that this process knows."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.names: set[str] = set()
        """The variables that have a model, in whichever session."""
        self.models: dict[tuple[str | None, str], Any] = {}
        self.holders: dict[tuple[str | None, str], WeakSet[Any]] = {}
        """The contexts that declared the model of a session. Without any of them it is forgotten at some time."""
        self.most_models = _MODELS_KEPT
        self.migrations: dict[str, dict[int, _Step]] = {}
        self.typed: dict[tuple[Any, int], Typed] = {}


_KNOWN: Final = _Registry()
names: Final = _KNOWN.names
"""The names of variables that have a model in some session; reads of other variables take no time for models."""


def model(name: str) -> Callable[[M], M]:
    """Make a pydantic model the type of a variable, in every session that this process reads.

    The version of its schema is its class attribute `schema_version`, if it has one, and otherwise the highest version
    to which a migration leads, or 1.

    Args:
        name: The name of the variable.
    """

    def declare(kind: M) -> M:
        use(None, name, kind)
        return kind

    return declare


def migration(name: str, *, from_: int, to: int) -> Callable[[F], F]:
    """Make a function the migration of a variable's values from one version of its schema to a later one.

    The function takes the old value as plain objects (a dict or a list), and returns the new one, plain or as the
    model. It must not depend on anything else: it may run again.

    Args:
        name: The name of the variable.
        from_: The version of the values that it takes; 0 for those written without a schema.
        to: The version of the values that it returns. Several migrations form a chain, such as 1 to 2 and 2 to 3.

    Raises:
        InvalidArgumentError: `to` is not later, or another migration begins at `from_`.
    """
    arguments.text("name", name)
    if not 0 <= from_ < to:
        raise InvalidArgumentError("to", f"{to} is not later than {from_}: a migration leads to a later version")

    def declare(function: F) -> F:
        with _KNOWN.lock:
            steps = _KNOWN.migrations.setdefault(name, {})
            known = steps.get(from_)
            # The cell of a notebook, or a module, may be run again.
            if known is not None and _place(known.function) != _place(function):
                reason = f"{_place(known.function)} is the migration of {quote(name)} from version {from_} already"
                raise InvalidArgumentError("from_", reason)
            steps[from_] = _Step(to, function)
        return function

    return declare


def _place(function: Any) -> str:
    named = getattr(function, "__qualname__", repr(function))
    return f"{getattr(function, '__module__', '?')}.{named}"


def use(session_id: str | None, name: str, kind: Any, holder: object = None) -> Typed:
    """Read a variable as a model from now on: in one session while `holder` exists, or with None in all.

    Raises:
        InvalidArgumentError: `kind` is not a model of a JSON object or array.
    """
    arguments.text("name", name)
    if not is_model(kind):
        raise InvalidArgumentError("model", f"it must be a pydantic model, not {kind!r:.100}")
    _typed(kind, 1)
    with _KNOWN.lock:
        _KNOWN.models[session_id, name] = kind
        if session_id is not None:
            _KNOWN.holders.setdefault((session_id, name), WeakSet()).add(holder)
            _forget_unheld()
        else:
            # It is newer than those of single sessions.
            for key in [key for key in _KNOWN.holders if key[1] == name]:
                del _KNOWN.holders[key], _KNOWN.models[key]
        _KNOWN.names.add(name)
    return _typed(kind, _version_of(name, kind))


@contextmanager
def undone_on_error(session_id: str, names: Iterable[str]) -> Iterator[None]:
    """Forget what `use` declares for variables of a session in this block, if the block raises."""
    before = {(session_id, name): _KNOWN.models.get((session_id, name)) for name in names}
    try:
        yield
    except Exception:
        with _KNOWN.lock:
            for key, kind in before.items():
                if kind is not None:
                    _KNOWN.models[key] = kind
                else:
                    _KNOWN.models.pop(key, None)
                    _KNOWN.holders.pop(key, None)
        raise


def _forget_unheld() -> None:
    """Forget the models of sessions whose contexts are gone, now and then: a process may serve millions of sessions."""
    if len(_KNOWN.models) > _KNOWN.most_models:
        for key in [key for key, holders in _KNOWN.holders.items() if not holders]:
            del _KNOWN.holders[key], _KNOWN.models[key]
        _KNOWN.most_models = max(_MODELS_KEPT, 2 * len(_KNOWN.models))


def is_model(kind: object) -> bool:
    """Whether an object is a pydantic model class."""
    return isinstance(kind, type) and "pydantic" in sys.modules and issubclass(kind, _base())


def _base() -> Any:
    from pydantic import BaseModel

    return BaseModel


def find(session_id: str | None, name: str) -> Typed | None:
    """Return what this process knows of the type of a variable in a session."""
    kind = _KNOWN.models.get((session_id, name)) or _KNOWN.models.get((None, name))
    return None if kind is None else _typed(kind, _version_of(name, kind))


def declared() -> Iterator[tuple[str, Typed]]:
    """Yield the variables that have a model in all sessions, by `model`."""
    for session_id, name in list(_KNOWN.models):
        if session_id is None and (typed := find(None, name)) is not None:
            yield name, typed


def _version_of(name: str, kind: Any) -> int:
    stated = getattr(kind, "schema_version", None)
    if stated is None:
        return max((step.to for step in _KNOWN.migrations.get(name, {}).values()), default=1)
    if type(stated) is not int or stated < 1:
        raise InvalidArgumentError("schema_version", f"that of {kind.__name__} must be a positive int, not {stated!r}")
    return stated


def _typed(kind: Any, version: int) -> Typed:
    known = _KNOWN.typed.get((kind, version))
    if known is None:
        schema = _checkable(kind.model_json_schema(mode="validation", by_alias=True))
        type_name = _type_of(kind, schema)
        known = _KNOWN.typed[kind, version] = Typed(kind, version, type_name, schema)
    return known


def _type_of(kind: Any, schema: Mapping[str, Any]) -> str:
    resolved = schema
    reference = schema.get("$ref", "")
    if reference.startswith("#/$defs/"):
        resolved = schema["$defs"][reference.removeprefix("#/$defs/")]
    type_name = _TYPES.get(resolved.get("type", ""))
    if type_name is None:
        raise InvalidArgumentError("model", f"{kind.__name__} is not a JSON object or array, and so not a map or list")
    return type_name


def _checkable(schema: Any) -> Any:
    """Return a schema without the patterns that cannot be matched in linear time; the model checks them in Python."""
    if isinstance(schema, list):
        return [_checkable(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: _checkable(entry) for key, entry in schema.items()}
    pattern = kept.get("pattern")
    if isinstance(pattern, str) and not values.is_linear(pattern):
        del kept["pattern"]
    return kept


def _meaning(schema: Any, *, named: bool = False) -> Any:
    """Return a schema without what only describes it, to compare schemas."""
    if isinstance(schema, list):
        return [_meaning(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _meaning(entry, named=key in _TEXTS) for key, entry in schema.items() if named or key not in _ANNOTATIONS
    }


# Steps of verbs


def define(
    owner: Any,
    name: str,
    value: object,
    kind: Any,
    constraints: Mapping[str, Any] | None,
    description: str | None,
    metadata: Mapping[str, str] | None,
    terms: Terms | None,
) -> Steps[str]:
    """Define a variable with a model; see `Variables.define`.

    `value` is an instance, or what the model makes one of, or `UNSTATED` for its default.
    """
    arguments.text("name", name)
    with undone_on_error(owner.session_id, (name,)):
        typed = use(owner.session_id, name, kind, owner)
        value = typed.default(name) if value is UNSTATED else typed.instance(name, value)
        facts = {
            **arguments.mapping("metadata", metadata or {}),
            **({} if description is None else {DESCRIPTION: arguments.text("description", description)}),
        }
        values.constraints_json(name, constraints)
        values.check_keywords(name, typed.type_name, constraints)
        text, encoded = typed.constraints(constraints), values.encode(value, typed.type_name, name=name)
        command = commands.RegisterVariable(owner.session_id, name, typed.type_name, encoded, text, facts)
        try:
            return (yield from ask(command, terms))
        except VariableExistsError:
            record = yield from ask(commands.GetVariable(owner.session_id, name))
            _check_same(typed, record)
    yield from read(owner, record, adopt=True)
    return record.id


def prepared(owner: Any, name: str, value: object) -> Steps[Any]:
    """Return a value that is to be written, as an instance of the variable's model; migrate the variable first."""
    typed = find(owner.session_id, name)
    if typed is None:
        return value
    instance = typed.instance(name, value)
    found = yield from ask(commands.GetVariables(owner.session_id, (name,)))
    record = found.variables.get(name)
    if record is not None and values.schema_version(record.constraints) != typed.version:
        yield from read(owner, record)
    return instance


def _check_same(typed: Typed, record: Variable) -> None:
    """Refuse another schema under the same version: values of both would be taken for each other."""
    if record.type != typed.type_name:
        raise VariableExistsError(record.name, f"its type is {record.type}, not {typed.type_name}")
    stated = json.loads(record.constraints or "{}")
    if stated.get("schema_version") == typed.version and _meaning(stated.get("schema")) != _meaning(typed.schema):
        name, version = record.name, typed.version
        difference = (
            f"the schema of {typed.model.__name__} is not that of its version {version}; give it another version, "
            f"with @migration({name!r}, from_={version}, to={version + 1})"
        )
        raise VariableExistsError(name, difference)


def read(owner: Any, record: Variable, *, kind: Any = None, adopt: bool = False) -> Steps[Any]:
    """Return the value of a variable: as its model, migrated if it is older; as it is if it has no model.

    Args:
        owner: The context.
        record: The variable.
        kind: The model that the caller expects, if the process knows none for the variable.
        adopt: Whether a variable without a schema gets that of the model if its value fits.
    """
    value, _ = yield from read_current(owner, record, kind=kind, adopt=adopt)
    return value


def read_current(owner: Any, record: Variable, *, kind: Any = None, adopt: bool = False) -> Steps[tuple[Any, int]]:
    """Return the value of a variable as `read` does, and the version that has it."""
    for _ in range(_ATTEMPTS):
        typed = find(owner.session_id, record.name)
        if typed is None and kind is not None and values.schema_version(record.constraints) is not None:
            typed = _typed(kind, _version_of(record.name, kind))
        if typed is None:
            return decode(record), record.version
        version = values.schema_version(record.constraints) or 0
        is_plain = version == 0 and 0 not in _KNOWN.migrations.get(record.name, {})
        if version == typed.version or (is_plain and not adopt):
            return typed.read(record.name, record.value), record.version
        value = yield from migrated(record, typed, version)
        try:
            number = yield from ask(_change(owner.session_id, record, typed, value))
        except VariableLockedError:
            # Its optimizer is at work; whoever reads it afterwards writes the migration.
            return typed.read(record.name, value), record.version
        except (VersionConflictError, VariableReplacedError):
            # Others have written it, or migrated it.
            record = yield from ask(commands.GetVariable(owner.session_id, record.name))
        except StateError as error:
            reason = f"the new value was refused: {error.sentence}"
            raise MigrationError(record.name, version, typed.version, reason, decode(record)) from error
        else:
            return typed.read(record.name, value), number
    raise VersionConflictError(record.name, record.version, record.version + 1)


class Migrated(NamedTuple):
    """A variable that was migrated, or would be.

    Attributes:
        name: The variable.
        from_version: The version of its value.
        to_version: The version of its model.
        version: The variable's new version; None if nothing was written.
    """

    name: str
    from_version: int
    to_version: int
    version: int | None


def migrate(owner: Any, name: str, *, write: bool = True) -> Steps[Migrated | None]:
    """Migrate a variable to the model that `model` declares for it; return None if there is nothing to do.

    Args:
        owner: The context of the session.
        name: The variable.
        write: Whether to write the new value; otherwise the migrations only run.

    Raises:
        MigrationError: A migration failed.
        TypedValueError: The value is of no known version.
    """
    typed = find(None, name)
    found = yield from ask(commands.GetVariables(owner.session_id, (name,)))
    record = found.variables.get(name)
    if typed is None or record is None:
        return None
    version = values.schema_version(record.constraints) or 0
    if version == typed.version or (version == 0 and 0 not in _KNOWN.migrations.get(name, {})):
        return None
    if not write:
        yield from migrated(record, typed, version)
        return Migrated(name, version, typed.version, None)
    _, number = yield from read_current(owner, record)
    return Migrated(name, version, typed.version, number)


def _change(session_id: str, record: Variable, typed: Typed, value: Value) -> commands.ConstrainVariable:
    stated = json.loads(record.constraints or "{}")
    text = typed.constraints({key: entry for key, entry in stated.items() if not key.startswith("schema")})
    return commands.ConstrainVariable(session_id, record.name, text, value, {}, record.version)


def migrated(record: Variable, typed: Typed, version: int) -> Steps[Value]:
    """Return the value of a variable in the version of its model; nothing is written."""
    name, raw = record.name, decode(record)
    if record.type != typed.type_name:
        reason = f"its type is {record.type}, and {typed.model.__name__} is a {typed.type_name}"
        raise TypedValueError(name, reason, raw)
    if version > typed.version:
        reason = f"it has version {version}, and this program knows versions up to {typed.version}"
        raise TypedValueError(name, reason, raw)
    value: Any = decode(record)
    steps, at = _KNOWN.migrations.get(name, {}), version
    while at < typed.version and (step := steps.get(at)) is not None and step.to <= typed.version:
        try:
            value = yield from work(step.function, value)
            # As plain objects, so that the next one takes what it would take from the store.
            value = values.decode(record.type, values.encode(value, record.type, name=name))
        except Exception as error:
            raise MigrationError(name, at, step.to, _said(error), raw) from error
        at = step.to
    if at < typed.version and at > 0:
        reason = f"it has version {version}, and there is no migration from {at} to {typed.version}"
        raise TypedValueError(name, reason, raw)
    try:
        return values.encode(typed.read(name, values.encode(value, record.type, name=name)), record.type, name=name)
    except TypedValueError as error:
        if at == 0:
            reason = f"it was written without a schema, and {error.reason}; write @migration({name!r}, from_=0, to=...)"
            raise TypedValueError(name, reason, raw) from error
        raise MigrationError(name, version, typed.version, f"of the new value, {error.reason}", raw) from error


def _reason(error: Any) -> str:
    """Return the first fault of a `ValidationError` in one line."""
    first, *others = error.errors(include_url=False, include_context=False, include_input=False)
    where = ".".join(map(str, first["loc"]))
    more = f" (and {len(others)} more)" if others else ""
    return f"{where + ': ' if where else ''}{first['msg']}{more}"[:300]


def _said(error: Exception) -> str:
    return f"it raised {type(error).__name__}: {error}"[:300]
