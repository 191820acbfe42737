"""`string`: any text."""

from typing import Final

from dspex_persist.state.values.json_text import RefusedError, shown
from dspex_persist.state.values.keywords import LENGTH, PATTERN, one_of
from dspex_persist.state.values.registry import ValueType


def _to_string(document: object) -> str:
    if isinstance(document, str):
        return document
    raise RefusedError(f"a string is a JSON string, not {shown(document)}")


STRING: Final = ValueType(
    "string",
    coerce=_to_string,
    constrain={**LENGTH, **PATTERN, **one_of("enum")},
    infer={str: None},
    schema={"type": "string"},
)
