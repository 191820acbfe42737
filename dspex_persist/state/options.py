"""The options that sessions are kept by in every backend, and the checks of options: seconds, and numbers of things."""

from dataclasses import dataclass, field, fields
from typing import Final

from dspex_persist.state.errors import InvalidArgumentError, quote
from dspex_persist.state.limits import Limits

_LONGEST_S: Final = 1e10
"""317 years: sums with a clock stay within what dates can hold."""


def check_seconds(name: str, value: object) -> None:
    """Refuse what is no length of time."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidArgumentError(name, f"{quote(value)} is not a number of seconds")
    # Written so that NaN, which compares with nothing, is refused.
    if not 0 < value <= _LONGEST_S:
        raise InvalidArgumentError(
            name, f"{value} will not do: it must be above 0, and at most {_LONGEST_S:,.0f} seconds"
        )


def check_count(name: str, value: object) -> None:
    """Refuse what is no number of things, or of bytes."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgumentError(name, f"{quote(value)} is not a whole number")
    if value < 1:
        raise InvalidArgumentError(name, f"{value} will not do: it must be at least 1")


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How sessions are kept; times are seconds.

    `session_ttl_s`: the TTL of a session that names none; None: it never ends by itself. `optimization_lease_s`: how
    long an optimizer holds its lock without a sign of life. `outcome_retention_s`: how long answers are kept under
    their idempotency keys. Raises `InvalidArgumentError` for what cannot be.
    """

    limits: Limits = field(default_factory=Limits)
    session_ttl_s: float | None = None
    optimization_lease_s: float = 300.0
    outcome_retention_s: float = 7 * 86_400.0

    def __post_init__(self) -> None:
        if not isinstance(self.limits, Limits):
            raise InvalidArgumentError("limits", f"{quote(self.limits)} is no dspex_persist.state.limits.Limits")
        for limit in fields(Limits):
            check_count(f"limits.{limit.name}", getattr(self.limits, limit.name))
        check_seconds("outcome_retention_s", self.outcome_retention_s)
        check_seconds("optimization_lease_s", self.optimization_lease_s)
        if self.session_ttl_s is not None:
            check_seconds("session_ttl_s", self.session_ttl_s)
