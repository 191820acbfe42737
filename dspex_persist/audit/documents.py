"""The answers of an audit as JSON: the same names as the dataclasses', for `--json`, reports and other programs."""

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from enum import Enum
from typing import Any

from dspex_persist.state.model import Value
from dspex_persist.state.values.json_text import stored


def document(answer: Any) -> Any:
    """An answer as what `json.dumps` takes. Times are ISO 8601, UTC; values are what their JSON says."""
    if isinstance(answer, Value):
        return value_of(answer)
    if isinstance(answer, Enum):
        return answer.value
    if isinstance(answer, datetime):
        return answer.isoformat()
    if is_dataclass(answer):
        return {each.name: document(getattr(answer, each.name)) for each in fields(answer)}
    if isinstance(answer, Mapping):
        return {key: document(each) for key, each in answer.items()}
    if isinstance(answer, tuple | list):
        return [document(each) for each in answer]
    return answer


def value_of(value: Value) -> Any:
    """What a value's JSON says, its text where that is damaged; with its bytes, in base64, where it has some."""
    try:
        stated = stored(value.json)
    except (ValueError, RecursionError):
        stated = value.json
    return stated if value.binary is None else {"json": stated, "binary": b64encode(value.binary).decode()}
