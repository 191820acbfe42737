"""Values as the texts that people type and read at a command line."""

import json
import sys
from contextlib import suppress
from typing import Any, Final

from dspex_persist.audit import value_of
from dspex_persist.state.errors import InvalidArgumentError, InvalidValueError
from dspex_persist.state.model import Value
from dspex_persist.state.values import find_type, get_type, infer_type
from dspex_persist.state.values.json_text import RefusedError, canonical, read

_STREAM: Final = "-"


def value_for(text: str, type_name: str, name: str) -> Value:
    """Return the value that `text` means for a type: the text itself, as for a string, or else the JSON in it.

    Args:
        text: The text.
        type_name: The name of the type. For one that is unknown, such as "any", the text is JSON if it can be.
        name: The name of the variable or parameter, for errors.

    Raises:
        InvalidValueError: The type requires JSON. Other values are checked when they are written.
    """
    kind = find_type(type_name)
    if kind is None:
        return Value(canonical(_read_or_keep(text)))
    with suppress(RefusedError):
        document = kind.coerce(text)
        if isinstance(document, str):
            return Value(canonical(document))
    try:
        return Value(canonical(read(text)))
    except RefusedError as error:
        if kind.is_container:
            raise InvalidValueError(name, f"a {type_name} is written as JSON, and this is {error.reason}") from error
        # The rule of the type says what it takes.
        return Value(canonical(text))


def guessed_value(text: str, type_name: str | None, name: str) -> tuple[str, Value]:
    """Return the type and the value of a new variable: by default those of the JSON in `text`, or else a string."""
    if type_name is None:
        document = _read_or_keep(text)
        return infer_type(document, name=name), Value(canonical(document))
    get_type(name, type_name)  # Raises for an unknown one.
    return type_name, value_for(text, type_name, name)


def _read_or_keep(text: str) -> object:
    with suppress(RefusedError):
        document = read(text)
        if document is not None:
            return document
    return text


def given_text(text: str) -> str:
    """Return the text of an argument; "-" is standard input, without the line break at its end."""
    if text != _STREAM:
        return text
    try:
        content = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidArgumentError("value", f"standard input is not UTF-8 ({error.reason})") from error
    return content.removesuffix("\n").removesuffix("\r")


def text_of_value(value: Value | None) -> str:
    """Return a value as text: a string without quotes, everything else as JSON."""
    if value is None:
        return ""
    document = value_of(value)
    return document if isinstance(document, str) else json.dumps(document, ensure_ascii=False)


def document_of_value(value: Value | None) -> Any:
    """Return a value for JSON output."""
    return None if value is None else value_of(value)
