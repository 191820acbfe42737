"""Retries and the circuit breaker of the client, without a server and without waiting: the clock is a number."""

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from dspex_persist.state.bridge.client.attempt import Attempt
from dspex_persist.state.bridge.client.line import Breaker, Line
from dspex_persist.state.bridge.rpcs import BY_COMMAND
from dspex_persist.state.bridge.status import status_of
from dspex_persist.state.commands import Command, ExecuteTool, GetVariable, SetVariable
from dspex_persist.state.errors import (
    CircuitOpenError,
    InvalidArgumentError,
    OutcomeUnknownError,
    ShuttingDownError,
    UnavailableError,
    VariableNotFoundError,
)
from dspex_persist.state.model import Value

READ = GetVariable("s", "x")
WRITE = SetVariable("s", "x", Value("1"))
TOOL = ExecuteTool("s", "t")
REFUSED = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused"
BROKEN = "Socket closed"
BREAKER = Breaker(failures=3, pause_s=1.0, longest_pause_s=4.0)


class Answer(grpc.RpcError):
    """The end of a call: a response, or an error."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: tuple[Any, ...] = ()) -> None:
        self._facts = (code, details, trailers)

    def code(self) -> grpc.StatusCode:
        return self._facts[0]

    def details(self) -> str:
        return self._facts[1]

    def trailing_metadata(self) -> tuple[Any, ...]:
        return self._facts[2]


def unavailable(details: str) -> Answer:
    return Answer(grpc.StatusCode.UNAVAILABLE, details)


def too_late() -> Answer:
    return Answer(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")


def sent(error: Exception) -> Answer:
    """An error that the server itself sent."""
    status = status_of(error)
    assert status is not None
    return Answer(status.code, status.details, status.trailing_metadata)


class Call:
    """A call that ends at once with an answer."""

    def __init__(self, answer: Answer | None) -> None:
        self._answer = answer

    def add_done_callback(self, done: Callable[[Any], None]) -> None:
        done(self)

    def result(self) -> Any:
        if self._answer is not None:
            raise self._answer
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._answer, name)


class World:
    """A server that gives the next of `answers` (the last one again and again), and a clock that only timers move."""

    waits = False
    """Whether callers send their calls on their own threads, and wait."""

    def __init__(self, *answers: Answer | None, breaker: Breaker | None = BREAKER) -> None:
        self.now = 100.0
        self.sent_at: list[float] = []
        self.timeouts_s: list[float] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.line = Line("there:1", breaker, now=lambda: self.now, later=self.later, jitter=lambda: 1.0)
        self.set(*answers)

    def set(self, *answers: Answer | None) -> None:
        self._answers: Iterator[Answer | None] = iter(answers)
        self._last: Answer | None = None

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        self.timers.append((self.now + delay_s, call))

    def future(self, _request: Any, timeout: float, metadata: Any) -> Call:
        self.sent_at.append(self.now)
        self.timeouts_s.append(timeout)
        self._last = next(self._answers, self._last)
        self.now += timeout if self._last is not None and self._last.code() is too_late().code() else 0.001
        return Call(self._last)

    def with_call(self, request: Any, timeout: float, metadata: Any) -> tuple[Any, Call]:
        call = self.future(request, timeout, metadata)
        return call.result(), call

    def call(self, command: Command[Any], *, key: bool = False, timeout_s: float = 30.0) -> Any:
        """Make a call; return its error, or None."""
        self.sent_at, self.timeouts_s = [], []
        rpc = BY_COMMAND[type(command)]
        rpc = type(rpc)(**{**{name: getattr(rpc, name) for name in rpc.__slots__}, "result_of": lambda *_: None})
        attempt = Attempt(self, rpc, command, lambda _: (), timeout_s, timeout_s, self.line, has_key=key)
        # Not `run`, because only this loop moves the clock.
        future = attempt._begin(attempt._send_and_wait) if self.waits else attempt.start()
        while not future.done():
            at, call = self.timers.pop(0)
            self.now = max(self.now, at)
            call()
        assert not self.timers
        return future.exception()

    def pauses(self) -> list[float]:
        """How long after the first time the call was sent again."""
        return [round(at - self.sent_at[0], 1) for at in self.sent_at]


@pytest.fixture(params=[False, True], ids=["submitted", "waited for"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of sending a call are repeated alike."""
    monkeypatch.setattr(World, "waits", request.param)


def reached(world: World) -> World:
    """The same, after one answer."""
    last = world._answers
    world.set(None)
    assert world.call(READ) is None
    world._answers = last
    return world


# What is repeated


def test_a_read_is_repeated_until_the_server_is_back() -> None:
    world = reached(World(unavailable(BROKEN), unavailable(REFUSED), None))
    assert world.call(READ) is None
    assert world.pauses() == [0.0, 0.1, 0.3]


def test_a_read_of_a_server_that_never_answered_fails_at_once() -> None:
    """It is most likely not there, and the error says so."""
    world = World(unavailable(REFUSED))
    error = world.call(READ)
    assert isinstance(error, UnavailableError)
    assert "cannot connect to there:1 (Connection refused)" in str(error)
    assert len(world.sent_at) == 1


@pytest.mark.parametrize("details", [BROKEN, REFUSED])
def test_a_write_without_a_key_is_never_repeated(details: str) -> None:
    world = reached(World(unavailable(details)))
    assert isinstance(world.call(WRITE), OutcomeUnknownError if details == BROKEN else UnavailableError)
    assert len(world.sent_at) == 1


def test_a_write_with_a_key_is_repeated_within_its_timeout_even_while_the_breaker_is_open() -> None:
    world = World(unavailable(BROKEN), unavailable(REFUSED))
    error = world.call(WRITE, key=True, timeout_s=12.0)
    assert isinstance(error, OutcomeUnknownError), "the first one may have arrived"
    assert world.pauses() == [0.0, 0.1, 0.3, 1.3, 3.3, 7.3, 11.3]
    assert world.timeouts_s == pytest.approx([12.0 - pause for pause in world.pauses()], abs=0.1)
    world.set(None)
    world.now += 10
    assert world.call(WRITE, key=True) is None
    assert world.line.state == "closed"


def test_repetitions_end_before_the_deadline() -> None:
    world = reached(World(unavailable(BROKEN), breaker=None))
    assert isinstance(world.call(READ, timeout_s=1.0), UnavailableError)
    assert world.pauses() == [0.0, 0.1, 0.3, 0.7]
    assert world.now < 101.5


def test_a_read_gives_up_when_the_breaker_opens() -> None:
    world = reached(World(unavailable(BROKEN)))
    error = world.call(READ)
    assert type(error) is UnavailableError
    assert str(error) == "unavailable: there:1: Socket closed; repeat later"
    assert world.pauses() == [0.0, 0.1, 0.3]
    assert world.line.state == "open"


def test_a_server_that_shuts_down_is_waited_for() -> None:
    world = World(sent(ShuttingDownError()), sent(ShuttingDownError()), None)
    assert world.call(READ) is None
    world.set(sent(ShuttingDownError()), None)
    assert world.call(WRITE, key=True) is None
    world.set(sent(ShuttingDownError()), None)
    assert isinstance(world.call(WRITE), ShuttingDownError)


def test_an_answer_is_final() -> None:
    world = World(sent(VariableNotFoundError("s", "x", "")))
    for command, key in ((READ, False), (WRITE, True), (WRITE, False)):
        assert isinstance(world.call(command, key=key), VariableNotFoundError)
        assert len(world.sent_at) == 1


def test_no_answer_in_time() -> None:
    world = World(too_late())
    read, write = world.call(READ, timeout_s=5.0), world.call(WRITE, timeout_s=2.0)
    assert str(read) == "unavailable: there:1 did not answer within 5 s; repeat later"
    assert isinstance(write, OutcomeUnknownError)
    assert "there:1 did not answer within 2 s" in str(write)
    assert world.timeouts_s == [2.0]


# The breaker


def test_it_opens_after_failures_in_a_row_and_says_since_when_and_until_when() -> None:
    world = World(unavailable(REFUSED))
    for _ in range(3):
        assert world.line.state == "closed"
        assert type(world.call(READ)) is UnavailableError
    assert world.line.state == "open"
    world.now += 0.4
    error = world.call(READ)
    assert isinstance(error, CircuitOpenError)
    assert world.sent_at == []
    assert error.retryable
    assert error.retry_in_s == pytest.approx(0.6)
    assert str(error).startswith("nothing was sent: there:1 has not answered since 20")
    assert str(error).endswith("(the last failure: Connection refused), and is tried again in 0.6 s; repeat later")


def test_one_call_tries_it_again_and_the_pauses_get_longer() -> None:
    world = World(unavailable(REFUSED))
    for _ in range(3):
        world.call(READ)
    for pause_s in (1.0, 2.0, 4.0, 4.0):
        assert isinstance(world.call(READ), CircuitOpenError)
        world.now += pause_s
        assert world.line.state == "half_open"
        assert type(world.call(READ)) is UnavailableError
        assert len(world.sent_at) == 1
    world.now += 4.0
    world.set(None)
    assert world.call(READ) is None
    assert world.line.state == "closed"
    world.set(unavailable(REFUSED))
    assert [type(world.call(WRITE)) for _ in range(4)] == [*[UnavailableError] * 3, CircuitOpenError]


def test_any_answer_closes_it_also_an_error() -> None:
    world = World(unavailable(REFUSED))
    for _ in range(3):
        world.call(READ)
    world.now += 1.0
    world.set(sent(VariableNotFoundError("s", "x", "")))
    assert isinstance(world.call(READ), VariableNotFoundError)
    assert world.line.state == "closed"


def test_a_trial_that_takes_long_does_not_keep_others_out_for_ever() -> None:
    world = World(unavailable(REFUSED))
    for _ in range(3):
        world.call(READ)
    world.now += 1.0
    world.line.admit()
    for _ in range(2):
        with pytest.raises(CircuitOpenError, match=r"is tried again in 0\.0 s"):
            world.line.admit()
        world.now += 1.9
    world.now += 1.0
    world.line.admit()


def test_calls_that_one_broken_connection_carried_are_one_failure() -> None:
    world = World()
    sent_at = world.now
    for _ in range(100):
        world.now += 0.01
        world.line.ended(Call(unavailable(BROKEN)), sent_at)
    assert world.line.state == "closed"


def test_a_tool_that_takes_longer_than_its_caller_waits_is_no_failure() -> None:
    world = World(too_late())
    for _ in range(5):
        world.call(TOOL)
    assert world.line.state == "closed"
    for _ in range(3):
        world.call(READ)
    assert world.line.state == "open"


def test_it_can_be_off() -> None:
    world = World(unavailable(REFUSED), breaker=None)
    for _ in range(20):
        assert type(world.call(READ)) is UnavailableError
        assert len(world.sent_at) == 1
    assert world.line.state == "closed"


@pytest.mark.parametrize("wrong", [{"failures": 0}, {"failures": 1.5}, {"pause_s": 0}, {"longest_pause_s": "5"}])
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
        Breaker(**wrong)
