"""The options for sessions that all backends have, and checks of options: seconds, and counts."""

from dataclasses import dataclass, field, fields
from typing import Final

from dspex_persist.state.errors import InvalidArgumentError, quote
from dspex_persist.state.limits import Limits

_LONGEST_S: Final = 1e10
"""317 years: sums with the current time stay within the range of dates."""


def check_seconds(name: str, value: object) -> None:
    """Raise `InvalidArgumentError` unless `value` is a positive number of seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidArgumentError(name, f"{quote(value)} is not a number of seconds")
    # In this form it refuses NaN, too: every comparison with NaN is false.
    if not 0 < value <= _LONGEST_S:
        raise InvalidArgumentError(name, f"it must be above 0 and at most {_LONGEST_S:,.0f} seconds, not {value}")


def check_count(name: str, value: object) -> None:
    """Raise `InvalidArgumentError` unless `value` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgumentError(name, f"{quote(value)} is not a whole number")
    if value < 1:
        raise InvalidArgumentError(name, f"it must be at least 1, not {value}")


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """Options for sessions; times are seconds.

    Attributes:
        limits: Bounds on input.
        session_ttl_s: The TTL of sessions that do not set one; None if those never expire.
        optimization_lease_s: How long an optimizer's lock lasts without a write by its holder.
        outcome_retention_s: How long outcomes are kept under their idempotency keys.

    Raises:
        InvalidArgumentError: An option is invalid.
    """

    limits: Limits = field(default_factory=Limits)
    session_ttl_s: float | None = None
    optimization_lease_s: float = 300.0
    outcome_retention_s: float = 7 * 86_400.0

    def __post_init__(self) -> None:
        if not isinstance(self.limits, Limits):
            raise InvalidArgumentError("limits", f"{quote(self.limits)} is not a dspex_persist.state.limits.Limits")
        for limit in fields(Limits):
            check_count(f"limits.{limit.name}", getattr(self.limits, limit.name))
        check_seconds("outcome_retention_s", self.outcome_retention_s)
        check_seconds("optimization_lease_s", self.optimization_lease_s)
        if self.session_ttl_s is not None:
            check_seconds("session_ttl_s", self.session_ttl_s)
