"""How many calls an identity may make, and how a stream is ended that was admitted."""

import asyncio

import pytest

from dspex_persist.infra.access.admission import Admission, CallCounts, TooManyCallsError
from dspex_persist.infra.access.tokens import Allowance, Identity


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def identity(**allowance: float) -> Identity:
    return Identity("a", frozenset(), Allowance(**allowance))  # type: ignore[arg-type]


def test_a_rate_lets_a_second_of_calls_through_at_once_and_then_as_many_as_time_allows() -> None:
    clock = Clock()
    counts, ours = CallCounts(clock), identity(rate=4.0)
    for _ in range(4):
        assert counts.begin(ours)
    with pytest.raises(TooManyCallsError, match="4 calls per second") as refused:
        counts.begin(ours)
    assert refused.value.retry_in_s == pytest.approx(0.25)
    clock.now += refused.value.retry_in_s
    assert counts.begin(ours)
    clock.now += 3_600
    assert [counts.begin(ours) for _ in range(4)] == [True] * 4
    with pytest.raises(TooManyCallsError):
        counts.begin(ours)


@pytest.mark.parametrize(
    ("rate", "text", "wait_s"),
    [(0.1, "6 calls per minute", 10.0), (1 / 3_600, "1 calls per hour", 3_600.0), (0.5, "30 calls per minute", 2.0)],
)
def test_a_slow_rate_lets_one_call_through(rate: float, text: str, wait_s: float) -> None:
    counts, ours = CallCounts(Clock()), identity(rate=rate)
    assert counts.begin(ours)
    with pytest.raises(TooManyCallsError, match=text) as refused:
        counts.begin(ours)
    assert refused.value.retry_in_s == pytest.approx(wait_s)


def test_calls_in_progress_are_those_of_a_name_with_all_its_tokens() -> None:
    counts, first, second = CallCounts(Clock()), identity(inflight=2), identity(inflight=2)
    assert counts.begin(first)
    assert counts.begin(second)
    with pytest.raises(TooManyCallsError, match="2 calls in progress"):
        counts.begin(first)
    counts.end(second)
    assert counts.begin(first)
    assert not counts.begin(identity())


def test_a_stream_that_is_revoked_ends_with_the_error_and_counts_as_ended_once() -> None:
    asyncio.run(revoke_a_stream())


async def revoke_a_stream() -> None:
    ended: list[Admission] = []
    errors: list[BaseException | None] = []
    begun = asyncio.Event()

    async def stream() -> str:
        admission.append(Admission(ended.append, asyncio.current_task()))
        begun.set()
        try:
            await asyncio.Event().wait()
        except BaseException as error:  # noqa: BLE001 -- what the server does
            errors.append(admission[0].end(error))
        admission[0].end()
        # It has not been cancelled any more.
        await asyncio.sleep(0)
        return "answered"

    admission: list[Admission] = []
    task = asyncio.create_task(stream())
    await begun.wait()
    revoked = ValueError("revoked")
    admission[0].revoke(revoked)
    admission[0].revoke(ValueError("again"))
    assert await task == "answered"
    assert errors == [revoked]
    assert ended == admission
    admission[0].revoke(ValueError("too late"))
    assert not task.cancelled()


def test_a_call_with_one_answer_is_not_revoked() -> None:
    admission = Admission(lambda _: None)
    admission.revoke(ValueError())
    error = asyncio.CancelledError()
    assert admission.end(error) is error
