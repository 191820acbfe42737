"""`float`: a double."""

from typing import Final

from dspex_persist.state.values.documents import spelled
from dspex_persist.state.values.json_text import RefusedError, shown
from dspex_persist.state.values.keywords import RANGE
from dspex_persist.state.values.registry import ValueType
from dspex_persist.state.values.tensors import NON_FINITE

_EXACT_INTEGERS: Final = 2**53


def to_float(document: object) -> float:
    """Convert to a double. Accepts integers that a double represents exactly, and the names of NaN and infinities."""
    if type(document) is float:
        return document
    if type(document) is int:
        return _exactly(document)
    if isinstance(document, str) and document in NON_FINITE:
        return NON_FINITE[document]
    raise RefusedError(f'a float is a number, "NaN", "Infinity" or "-Infinity", not {shown(document)}')


def _exactly(number: int) -> float:
    if -_EXACT_INTEGERS <= number <= _EXACT_INTEGERS:
        return float(number)
    try:
        nearest = float(number)
    except OverflowError:
        raise RefusedError(f"{shown(number)} is beyond the range of a double") from None
    if int(nearest) != number:
        raise RefusedError(f"a double cannot hold {shown(number)} exactly; use an integer, or round it yourself")
    return nearest


FLOAT: Final = ValueType(
    "float",
    coerce=to_float,
    constrain=RANGE,
    decode=to_float,
    encode=spelled,
    infer={float: None},
    schema={"type": "number"},
    is_number=True,
)
