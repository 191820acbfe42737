"""The ticket of a caller who waits at once."""

import gc
import weakref

import pytest

from dspex_persist.infra.futures import Blocked


class Refused(Exception):
    pass


def wait_for(blocked: Blocked[int]) -> int:
    """As callers do, in whose frame the ticket stays."""
    return blocked.wait()


def test_an_outcome_may_be_there_before_somebody_waits() -> None:
    blocked: Blocked[int] = Blocked()
    assert blocked.begin()
    blocked.settle(3, None)
    assert wait_for(blocked) == 3


def test_an_error_is_kept_by_nobody() -> None:
    blocked: Blocked[int] = Blocked()
    blocked.settle(None, Refused())
    gc.disable()
    try:
        with pytest.raises(Refused) as raised:
            wait_for(blocked)
        kept = weakref.ref(raised.value)
        del raised
        assert kept() is None, "without the collector, which may come late"
    finally:
        gc.enable()


def test_each_wakes_the_one_that_follows() -> None:
    first, second = Blocked[int](), Blocked[int]()
    first.following = second
    second.keep(2, None)
    first.settle(1, None)
    # Once more, as whoever answers does after a while.
    first.wake()
    assert [wait_for(first), wait_for(second)] == [1, 2]
    second.wake()
