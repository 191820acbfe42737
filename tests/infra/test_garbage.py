"""Blocks in which the garbage collector does not run."""

import gc
import threading
from collections.abc import Iterator

import pytest

from dspex_persist.infra.garbage import uncollected
from tests.infra.test_forks import in_child


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    assert gc.isenabled()
    yield
    gc.enable()


def test_the_last_block_to_end_enables_it() -> None:
    with uncollected:
        other = threading.Thread(target=lambda: uncollected.__enter__())
        other.start()
        other.join()
        assert not gc.isenabled()
    assert not gc.isenabled()
    uncollected.__exit__()
    assert gc.isenabled()


def test_one_that_was_disabled_stays_so() -> None:
    gc.disable()
    with uncollected:
        pass
    assert not gc.isenabled()


def test_an_error_ends_a_block() -> None:
    with pytest.raises(ZeroDivisionError), uncollected:
        raise ZeroDivisionError
    assert gc.isenabled()


def test_it_runs_in_a_child_that_was_forked_in_a_block() -> None:
    with uncollected:
        assert in_child(gc.isenabled) == "True"
        assert not gc.isenabled()
