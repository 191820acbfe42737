"""Answers of an audit as JSON, with the field names of the dataclasses: for `--json`, reports and other programs."""

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from decimal import Decimal
from enum import Enum
from typing import Any

from dspex_persist.state.model import Value
from dspex_persist.state.values.json_text import stored


def document(answer: Any) -> Any:
    """Convert an answer for `json.dumps`. Times become ISO 8601 in UTC, values the document in their JSON."""
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


def cost_text(cost: float | None) -> str:
    """Return a cost in USD for people, with three digits of a small one: $0.0000318; "" for none."""
    if cost is None:
        return ""
    if cost == 0 or abs(cost) >= 1:
        return f"${cost:,.2f}"
    return f"${Decimal(f'{cost:.3g}'):f}"


def value_of(value: Value) -> Any:
    """Return the document in a value's JSON, or its text if it is damaged.

    A binary value becomes an object with `json` and, in base64, `binary`.
    """
    try:
        content = stored(value.json)
    except (ValueError, RecursionError):
        content = value.json
    return content if value.binary is None else {"json": content, "binary": b64encode(value.binary).decode()}
