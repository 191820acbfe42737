"""`boolean`: true or false."""

from typing import Final

from dspex_persist.state.values.json_text import RefusedError, shown
from dspex_persist.state.values.registry import ValueType

_WORDS: Final = {"true": True, "false": False}


def _to_boolean(document: object) -> bool:
    """Accept true and false, also as strings, and 1 and 0."""
    if type(document) is bool:
        return document
    if type(document) is int and document in (0, 1):
        return document == 1
    if isinstance(document, str) and document in _WORDS:
        return _WORDS[document]
    raise RefusedError(f'a boolean is true, false, "true", "false", 1 or 0, not {shown(document)}')


BOOLEAN: Final = ValueType(
    "boolean",
    coerce=_to_boolean,
    decode=_to_boolean,
    infer={bool: None},
    schema={"type": "boolean"},
)
