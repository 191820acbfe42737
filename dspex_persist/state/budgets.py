"""Budgets of LM calls: how many tokens, and how much money, the recorded calls of a session or a tool may use."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from dspex_persist.state.errors import InvalidArgumentError, quote

MAX_TOKENS: Final = "dspex.max_tokens"
"""The key of a session's metadata with how many tokens its LM calls may use; "none" for any number."""
MAX_COST: Final = "dspex.max_cost"
"""The key of a session's metadata with how much its LM calls may cost, in USD; "none" for any amount."""
KEYS: Final = frozenset((MAX_TOKENS, MAX_COST))
TOKENS, USD = "tokens", "USD"
_NONE: Final = "none"
_MOST: Final = 2**53


@dataclass(frozen=True, slots=True)
class Budget:
    """What LM calls may use; None for as much as they want.

    Attributes:
        max_tokens: How many tokens.
        max_cost: How much money, in USD.
    """

    max_tokens: int | None = None
    max_cost: float | None = None

    @classmethod
    def of(cls, max_tokens: object, max_cost: object) -> "Budget":
        """Return the budget with these limits; `InvalidArgumentError` if one of them cannot be."""
        return cls(_whole("max_tokens", max_tokens), _amount("max_cost", max_cost))

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str]) -> "Budget":
        """Return the budget that the metadata of a session states; `InvalidArgumentError` if it is none."""
        tokens, cost = (metadata.get(key) for key in (MAX_TOKENS, MAX_COST))
        if tokens is None and cost is None:
            return NO_BUDGET
        return cls(
            None if tokens in (None, _NONE) else _whole(MAX_TOKENS, _read(int, tokens), tokens),
            None if cost in (None, _NONE) else _amount(MAX_COST, _read(float, cost), cost),
        )

    def metadata(self) -> dict[str, str]:
        """Return the entries of a session's metadata that state it."""
        facts = {}
        if self.max_tokens is not None:
            facts[MAX_TOKENS] = str(self.max_tokens)
        if self.max_cost is not None:
            facts[MAX_COST] = f"{self.max_cost:.15g}"
        return facts

    def limits(self) -> Iterator[tuple[str, float]]:
        """Yield each limit, after its unit: "tokens" or "USD"."""
        if self.max_tokens is not None:
            yield TOKENS, self.max_tokens
        if self.max_cost is not None:
            yield USD, self.max_cost


NO_BUDGET: Final = Budget()


class Spent(NamedTuple):
    """What LM calls have used. Calls whose cost nobody knows add tokens only."""

    tokens: int = 0
    cost: float = 0.0

    def plus(self, other: "Spent") -> "Spent":
        """Return the sum."""
        return Spent(self.tokens + other.tokens, self.cost + other.cost)

    def of(self, unit: str) -> float:
        """Return what was used of a unit."""
        return self.tokens if unit == TOKENS else self.cost


NOTHING: Final = Spent()


def _read(kind: type[int] | type[float], text: str | None) -> Any:
    try:
        return kind(text or "")
    except ValueError:
        return text


def _whole(name: str, given: object, shown: object = None) -> int | None:
    if given is None:
        return None
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given <= _MOST:
        return given
    raise _wrong(name, "a whole number of tokens from 0 up", given if shown is None else shown)


def _amount(name: str, given: object, shown: object = None) -> float | None:
    if given is None:
        return None
    if isinstance(given, int | float) and not isinstance(given, bool) and 0 <= given <= _MOST:
        return float(given)
    raise _wrong(name, "an amount in USD from 0 up", given if shown is None else shown)


def _wrong(name: str, what: str, given: object) -> InvalidArgumentError:
    field = "metadata" if name in KEYS else name
    about = f"{name} is {quote(given) if isinstance(given, str) else repr(given)}; " if name in KEYS else ""
    end = f', or "{_NONE}"' if name in KEYS else f", not {given!r}"
    return InvalidArgumentError(field, f"{about}it must be {what}{end}")
