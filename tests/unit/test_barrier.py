"""The barrier that reads of a shared log pass: whom one round trip serves, and that nobody waits for ever."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from dspex_persist.infra.metrics import Family
from dspex_persist.state.errors import EngineClosedError, StateError, UnavailableError
from dspex_persist.state.shared import Barrier, ServerMeter
from tests.deadline import within


class Log:
    """A head that the test moves, and round trips that it holds up."""

    def __init__(self) -> None:
        self.sequence = 1
        self.trips = 0
        self.error: Exception | None = None
        self.open = threading.Event()
        self.open.set()
        self.under_way = threading.Semaphore(0)
        self.nudged = threading.Semaphore(0)

    def head(self) -> int:
        self.trips += 1
        sequence = self.sequence
        self.under_way.release()
        assert self.open.wait(within(10))
        if self.error is not None:
            raise self.error
        return sequence


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def meter() -> ServerMeter:
    return ServerMeter()


@pytest.fixture
def barrier(log: Log, meter: ServerMeter) -> Iterator[Barrier]:
    barrier = Barrier(log.head, log.nudged.release, 1, meter)
    yield barrier
    log.open.set()
    barrier.close(EngineClosedError())


def counted(meter: ServerMeter, name: str) -> float:
    families: dict[str, Family] = {family.name: family for family in meter.families()}
    return families[f"dspex_persist_{name}"].samples[0].value


def test_what_memory_knows_can_be_read_after_one_round_trip(log: Log, meter: ServerMeter, barrier: Barrier) -> None:
    barrier.pass_through()
    barrier.ask().result(within(10))
    assert log.trips == 2
    assert counted(meter, "head_reads_total") == 2


@pytest.mark.parametrize("blocks", [True, False])
def test_a_read_waits_until_memory_knows_what_was_committed_before(log: Log, barrier: Barrier, blocks: bool) -> None:
    log.sequence = 3
    passed = on_thread(barrier.pass_through) if blocks else barrier.ask()
    assert log.nudged.acquire(timeout=within(10))
    barrier.learnt(2)
    assert not passed.done()
    barrier.learnt(3)
    passed.result(within(10))
    assert log.trips == 1


def test_one_round_trip_serves_all_that_came_before_it_began(log: Log, meter: ServerMeter, barrier: Barrier) -> None:
    log.open.clear()
    first = barrier.ask()
    assert log.under_way.acquire(timeout=within(10))
    # The head that is under way may be from before these.
    log.sequence = 2
    others = [barrier.ask() for _ in range(20)]
    blocked = [on_thread(barrier.pass_through) for _ in range(3)]
    log.open.set()
    first.result(within(10))
    assert log.nudged.acquire(timeout=within(10))
    assert not any(each.done() for each in (*others, *blocked))
    barrier.learnt(2)
    for each in (*others, *blocked):
        each.result(within(10))
    # Those of the threads may have come after the second round trip.
    assert log.trips <= 5
    assert counted(meter, "head_reads_total") == 24


def test_who_waits_for_a_log_that_is_away_hears_of_it(log: Log, barrier: Barrier) -> None:
    log.sequence = 2
    waiting = [barrier.ask(), on_thread(barrier.pass_through)]
    for _ in waiting:
        assert log.nudged.acquire(timeout=within(10))
    error = UnavailableError("the cable")
    barrier.away(error)
    assert [each.exception(within(10)) for each in waiting] == [error, error]
    barrier.learnt(2)
    barrier.ask().result(within(10))


@pytest.mark.parametrize("error", [UnavailableError("the cable"), OSError("the cable")])
def test_a_head_that_cannot_be_read_fails_those_that_asked(
    log: Log, meter: ServerMeter, barrier: Barrier, error: Exception
) -> None:
    log.error = error
    with pytest.raises(UnavailableError, match="the cable"):
        barrier.pass_through()
    with pytest.raises(UnavailableError, match="the cable"):
        barrier.ask().result(within(10))
    assert counted(meter, "head_failures_total") == 2
    log.error = None
    barrier.pass_through()
    barrier.ask().result(within(10))


def test_closing_leaves_nobody_waiting(log: Log, barrier: Barrier) -> None:
    log.sequence = 2
    waiting = [barrier.ask(), on_thread(barrier.pass_through)]
    for _ in waiting:
        assert log.nudged.acquire(timeout=within(10))
    log.open.clear()
    asking = barrier.ask()
    assert log.under_way.acquire(timeout=within(10))
    closing = on_thread(lambda: barrier.close(EngineClosedError()))
    log.open.set()
    closing.result(within(10))
    late = [barrier.ask(), on_thread(barrier.pass_through)]
    for each in (*waiting, asking, *late):
        assert isinstance(each.exception(within(10)), EngineClosedError)


def test_a_reader_may_close_it(log: Log, barrier: Barrier) -> None:
    """Its callback runs on the thread of the barrier, which must not wait for itself."""
    closed: Future[None] = Future()

    def close(_: object) -> None:
        barrier.close(EngineClosedError())
        closed.set_result(None)

    log.open.clear()
    asked = barrier.ask()
    asked.add_done_callback(close)
    log.open.set()
    closed.result(within(10))


def test_who_has_given_up_is_not_served(log: Log, barrier: Barrier) -> None:
    log.sequence = 2
    given_up, other = barrier.ask(), barrier.ask()
    assert log.nudged.acquire(timeout=within(10))
    given_up.cancel()
    barrier.learnt(2)
    other.result(within(10))


def on_thread(action: Any) -> "Future[None]":
    """Run something on a thread of its own."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            action()
        except StateError as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, daemon=True).start()
    return done
