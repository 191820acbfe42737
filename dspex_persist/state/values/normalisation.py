"""Convert values from the form in which callers send them to the form in which they are stored."""

from dspex_persist.state.errors import InvalidValueError, StateError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Value
from dspex_persist.state.values.binary import normalise_binary
from dspex_persist.state.values.constraints import Constraints
from dspex_persist.state.values.json_text import (
    RefusedError,
    canonical,
    check_limits,
    check_size,
    container_in,
    parse_json,
    utf8_size_bytes,
)
from dspex_persist.state.values.registry import find_type, get_type
from dspex_persist.state.values.scalars import keep
from dspex_persist.state.values.tensors import NON_FINITE


def spell(type_name: str | None, value: Value, limits: Limits) -> Value:
    """Return `value` in the canonical spelling of its type, to compare requests.

    As a float, 1 becomes 1.0; keys of objects are sorted. Without a type numbers stay as they are. A value that is not
    valid for its type is returned as it is.
    """
    try:
        if type_name is not None and find_type(type_name) is not None:
            return normalise("value", type_name, Constraints(type_name), value, limits)
        return Value(canonical(parse_json(value.json, name="value", limits=limits)), value.binary)
    except (StateError, RefusedError):
        return value


def normalise(name: str, type_name: str, constraints: Constraints, value: Value, limits: Limits) -> Value:
    """Coerce a value to its type, check it, and return it as canonical JSON. Idempotent.

    Binary values are checked but not changed.

    Args:
        name: The variable's name, for errors.
        type_name: The name of its type.
        constraints: Its constraints, compiled for this type.
        value: The value as the caller sent it.
        limits: Bounds on size and depth.

    Raises:
        InvalidValueError: It is not a value of the type, or violates a constraint.
        LimitExceededError: It is too large, or nested too deep.
        UnknownTypeError: There is no such type.
    """
    value_type = get_type(name, type_name)
    if value.binary is not None:
        return normalise_binary(name, value_type, constraints, value, limits)
    is_kept, document = _document_in(name, value, limits)
    if value_type.is_container and isinstance(document, str):
        is_kept, document = False, container_in(document, name=name, limits=limits)
    try:
        coerced = value_type.coerce(document)
        constraints.check(name, coerced)
        if isinstance(document, str) and document in NON_FINITE:
            # NaN and the infinities are strings in JSON, before and after.
            coerced = document
        if is_kept and coerced is document:
            return value
        text = canonical(coerced)
    except RefusedError as error:
        raise InvalidValueError(name, error.reason) from error
    if text == value.json:
        return keep(value, coerced)
    # 1e15 becomes 1000000000000000.0: the stored value must be within the limit, too, or a rollback could fail.
    if len(text) > len(value.json):
        check_size(name, utf8_size_bytes(text), limits)
    return keep(Value(text), coerced)


def _document_in(name: str, value: Value, limits: Limits) -> tuple[bool, object]:
    """Return whether the value's document was kept, so that its JSON is canonical; and the document."""
    try:
        document = value.document
    except AttributeError:
        return False, parse_json(value.json, name=name, limits=limits)
    check_limits(name, value.json, limits)
    return True, document
