"""The types of a signature's fields: as text that compares across processes, and the classes among them.

Values of demos are stored with the names of their classes. A name is only looked up among the classes that the fields
of the module's own signature mention, and DSPy's own: nothing is imported.
"""

import dataclasses
import enum
import inspect
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Final, ForwardRef, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import dspy
import pydantic
from pydantic import BaseModel
from typing_extensions import is_typeddict

_LOCAL: Final = "<locals>."
_OWN: Final = ("dspy", "pydantic", "typing", "builtins", "enum")
_DSPY_TYPES: Final = ("Audio", "Citations", "Code", "Document", "File", "History", "Image", "Reasoning", "ToolCalls")
_MOST_CLASSES: Final = 1_000
# For type checkers it is something else.
_IMPORT_STRING: Final[type] = getattr(pydantic, "ImportString")  # noqa: B009


def type_text(annotation: Any) -> str:
    """Return a type as text: the same for the same type in every process, wherever the class was imported from."""
    if annotation is None or annotation is type(None):
        return "None"
    if isinstance(annotation, str):
        return annotation
    if isinstance(annotation, ForwardRef):
        return annotation.__forward_arg__
    if isinstance(annotation, TypeVar):
        return annotation.__name__
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(args[0])
    if origin is Literal:
        return f"Literal[{', '.join(_literal(each) for each in args)}]"
    if origin is Union or origin is types.UnionType:
        return " | ".join(type_text(each) for each in args)
    if origin is not None and args:
        return f"{class_name(origin)}[{', '.join('...' if each is ... else type_text(each) for each in args)}]"
    return class_name(annotation)


def class_name(kind: Any) -> str:
    """Return the name of a class without its module: a script's `__main__` is imported under another name elsewhere."""
    name = getattr(kind, "__qualname__", None) or getattr(kind, "_name", None)
    return str(name).rpartition(_LOCAL)[2] if name else str(kind).removeprefix("typing.")


def _literal(value: Any) -> str:
    return f"{class_name(type(value))}.{value.name}" if isinstance(value, enum.Enum) else repr(value)


def described_types(annotations: Iterable[Any]) -> dict[str, dict[str, str]]:
    """Return what the classes among types consist of: by name, their fields with types, or an enumeration's values."""
    described = {}
    for kind in classes_in(annotations):
        if not _is_own(kind):
            described[class_name(kind)] = {name: type_text(each) for name, each in _fields_of(kind).items()}
            if issubclass(kind, enum.Enum):
                described[class_name(kind)] = {name: repr(each.value) for name, each in kind.__members__.items()}
    return described


def classes_in(annotations: Iterable[Any]) -> list[type]:
    """Return the classes with fields, and the enumerations, that types mention, also as fields of each other."""
    return [kind for kind in _all_in(annotations) if _has_parts(kind)]


def _all_in(annotations: Iterable[Any]) -> list[type]:
    found: dict[type, None] = {}
    left = list(annotations)
    while left and len(found) < _MOST_CLASSES:
        annotation = left.pop(0)
        if type(annotation) is _IMPORT_STRING:
            # As metadata, it is an instance.
            annotation = _IMPORT_STRING
        left.extend(get_args(annotation))
        kind = annotation if inspect.isclass(annotation) and get_origin(annotation) is None else get_origin(annotation)
        if not inspect.isclass(kind) or kind in found:
            continue
        found[kind] = None
        if not _has_parts(kind):
            continue
        left.extend(_fields_of(kind).values())
        if issubclass(kind, BaseModel):
            left.extend(each for field in kind.model_fields.values() for each in field.metadata)
        if not _is_own(kind) and not is_typeddict(kind):
            left.extend(kind.__subclasses__())
    return list(found)


def _is_own(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _OWN


def _has_parts(kind: type) -> bool:
    if kind in (BaseModel, enum.Enum):
        return False
    return (
        issubclass(kind, BaseModel | enum.Enum)
        or dataclasses.is_dataclass(kind)
        or is_typeddict(kind)
        or is_named_tuple(kind)
    )


def is_named_tuple(kind: type) -> bool:
    """Whether it is a class made by `NamedTuple`, or derived from one."""
    return issubclass(kind, tuple) and isinstance(getattr(kind, "_fields", None), tuple)


def _fields_of(kind: type) -> Mapping[str, Any]:
    if issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if issubclass(kind, enum.Enum):
        return {}
    try:
        hints = get_type_hints(kind)
    except Exception:  # noqa: BLE001 -- annotations may be anything
        hints = dict(getattr(kind, "__annotations__", {}))
    if dataclasses.is_dataclass(kind):
        return {field.name: hints.get(field.name, field.type) for field in dataclasses.fields(kind)}
    return hints


class Classes:
    """The classes whose values can be read back.

    Args:
        annotations: The types of the fields of a signature.

    Attributes:
        imports: Whether a value may be an `ImportString`: pydantic imports what it names.
    """

    def __init__(self, annotations: Iterable[Any]) -> None:
        annotations = list(annotations)
        self.imports = _IMPORT_STRING in _all_in(annotations)
        self._by_label: dict[str, type] = {}
        self._by_name: dict[str, list[type]] = {}
        own = (getattr(dspy, name, None) for name in _DSPY_TYPES)
        for kind in classes_in((*annotations, *filter(inspect.isclass, own))):
            self._by_label.setdefault(label_of(kind), kind)
            self._by_name.setdefault(class_name(kind), []).append(kind)

    def find(self, label: str) -> type | None:
        """Return the class that was stored as `label`; None without one."""
        exact = self._by_label.get(label)
        if exact is not None:
            return exact
        # It was defined in a script, or has moved to another module.
        named = dict.fromkeys(self._by_name.get(_name_in(label), ()))
        return next(iter(named)) if len(named) == 1 else None

    def __contains__(self, kind: type) -> bool:
        return self.find(label_of(kind)) is kind

    def names(self) -> Iterator[str]:
        """Yield the names of those that are the program's own."""
        return (class_name(kind) for kind in self._by_label.values() if not _is_own(kind))


def label_of(kind: type) -> str:
    """Return the name under which a class is stored."""
    return f"{kind.__module__}:{class_name(kind)}"


def _name_in(label: str) -> str:
    return label.rpartition(":")[2]
