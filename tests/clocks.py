"""Time that passes when a test says so; the fixture `frozen` is its clock."""

from datetime import timedelta

from freezegun.api import FrozenDateTimeFactory


def pass_s(frozen: FrozenDateTimeFactory, seconds: float) -> None:
    """Let time pass."""
    frozen.tick(timedelta(seconds=seconds))
