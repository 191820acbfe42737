"""Encode results of commands as JSON, to store them under idempotency keys."""

from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter


@lru_cache
def _codec(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def encode(kind: Any, result: object) -> str:
    """Return a result of type `kind` as JSON."""
    return _codec(kind).dump_json(result).decode()


def decode(kind: Any, text: str) -> Any:
    """Return the result that `encode` encoded."""
    return _codec(kind).validate_json(text)
