"""How the result of a command becomes JSON, to be kept under an idempotency key, and a result again."""

from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter


@lru_cache
def _codec(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def encode(kind: Any, result: object) -> str:
    """A result of type `kind` as JSON."""
    return _codec(kind).dump_json(result).decode()


def decode(kind: Any, text: str) -> Any:
    """The result again."""
    return _codec(kind).validate_json(text)
