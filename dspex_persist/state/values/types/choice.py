"""`choice`: one of the strings that its constraint lists."""

from typing import Final

from dspex_persist.state.values.json_text import RefusedError, shown
from dspex_persist.state.values.keywords import one_of
from dspex_persist.state.values.registry import ValueType


def _to_choice(document: object) -> str:
    if isinstance(document, str):
        return document
    raise RefusedError(f"a choice is a JSON string, not {shown(document)}")


CHOICE: Final = ValueType(
    "choice",
    coerce=_to_choice,
    constrain=one_of("choices"),
    schema={"type": "string", "enum": ...},
)
