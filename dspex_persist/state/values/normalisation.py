"""The one way in: from what a caller sends to what is kept."""

from dspex_persist.state.errors import InvalidValueError, StateError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Value
from dspex_persist.state.values.binary import normalise_binary
from dspex_persist.state.values.constraints import Constraints
from dspex_persist.state.values.json_text import (
    RefusedError,
    canonical,
    check_size,
    container_in,
    parse_json,
    utf8_size_bytes,
)
from dspex_persist.state.values.registry import find_type, get_type
from dspex_persist.state.values.tensors import NON_FINITE


def spell(type_name: str | None, value: Value, limits: Limits) -> Value:
    """`value` in one spelling of the many that mean the same: 1 is 1.0 to a float, and the order of keys is nothing.

    For comparing requests. Without a type numbers stay as they are; what is no value of the type stays as a whole.
    """
    try:
        if type_name is not None and find_type(type_name) is not None:
            return normalise("value", type_name, Constraints(type_name), value, limits)
        return Value(canonical(parse_json(value.json, name="value", limits=limits)), value.binary)
    except (StateError, RefusedError):
        return value


def normalise(name: str, type_name: str, constraints: Constraints, value: Value, limits: Limits) -> Value:
    """`value` as a value of its type: coerced, checked, and written as canonical JSON. Idempotent.

    Binary values stay exactly as they came. `constraints` are those compiled for this very type. Raises
    `InvalidValueError`, `LimitExceededError` or `UnknownTypeError`.
    """
    value_type = get_type(name, type_name)
    if value.binary is not None:
        return normalise_binary(name, value_type, constraints, value, limits)
    document = parse_json(value.json, name=name, limits=limits)
    if value_type.is_container and isinstance(document, str):
        document = container_in(document, name=name, limits=limits)
    try:
        coerced = value_type.coerce(document)
        constraints.check(name, coerced)
        # A double that JSON has no number for arrived as a string, and leaves as one.
        text = canonical(document if isinstance(document, str) and document in NON_FINITE else coerced)
    except RefusedError as error:
        raise InvalidValueError(name, error.reason) from error
    if text == value.json:
        return value
    # 1e15 becomes 1000000000000000.0: what is kept must fit as well, or it could not be written again.
    if len(text) > len(value.json):
        check_size(name, utf8_size_bytes(text), limits)
    return Value(text)
