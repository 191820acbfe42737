"""`integer`: an integer of any size."""

from typing import Final

from dspex_persist.state.values.json_text import RefusedError, shown
from dspex_persist.state.values.keywords import RANGE
from dspex_persist.state.values.registry import ValueType


def _to_integer(document: object) -> int:
    """Accept integers, and floats without a fraction."""
    if type(document) is int:
        return document
    if type(document) is float and document.is_integer():
        return int(document)
    raise RefusedError(f"an integer is a whole number, not {shown(document)}")


INTEGER: Final = ValueType(
    "integer",
    coerce=_to_integer,
    constrain=RANGE,
    decode=_to_integer,
    infer={int: None},
    schema={"type": "integer"},
    is_number=True,
)
