"""`map`: a JSON object."""

from typing import Final

from dspex_persist.state.values.json_schema import SCHEMA
from dspex_persist.state.values.json_text import RefusedError, shown
from dspex_persist.state.values.registry import ValueType


def _to_map(document: object) -> dict[str, object]:
    if isinstance(document, dict):
        return document
    raise RefusedError(f"a map is a JSON object, not {shown(document)}")


MAP: Final = ValueType(
    "map",
    coerce=_to_map,
    constrain=SCHEMA,
    infer={dict: None},
    schema={"type": "object"},
    is_container=True,
)
