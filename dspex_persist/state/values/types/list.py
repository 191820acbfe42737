"""`list`: a JSON array."""

from typing import Final

from dspex_persist.state.values.json_schema import SCHEMA
from dspex_persist.state.values.json_text import RefusedError, shown
from dspex_persist.state.values.registry import ValueType


def _to_list(document: object) -> list[object]:
    if isinstance(document, list):
        return document
    raise RefusedError(f"a list is a JSON array, not {shown(document)}")


LIST: Final = ValueType(
    "list",
    coerce=_to_list,
    constrain=SCHEMA,
    infer={list: None, tuple: None},
    schema={"type": "array"},
    is_container=True,
)
