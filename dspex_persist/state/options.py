"""Checking the options that an engine is opened with: numbers of seconds, and of things."""

from typing import Final

from dspex_persist.state.errors import InvalidArgumentError, quote

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
