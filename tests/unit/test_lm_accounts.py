"""What is recorded of LM calls besides question and answer: when, how long, at what cost, from the cache or not."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from dspex_persist import clock
from tests.lms import Engine, Stuck, dspy, dummy, lm15, lm_calls, lm_on, recorded

PRICE = 1000 * 0.15e-6 + 100 * 0.6e-6
"""Of an answer of `Provider`, by the prices of gpt-4o-mini that DSPy carries along."""


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise DSPy asks the network for prices first.
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "true")
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)


class Provider(BaseHTTPRequestHandler):
    """A provider of an LM, which says how many tokens it counts."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        message = {"role": "assistant", "content": "hi"}
        usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        body = json.dumps({"id": "x", "model": "gpt-4o-mini", "choices": choices, "usage": usage}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Provider) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


@pytest.fixture
def paid(address: str) -> Any:
    """An LM of a provider whose prices DSPy knows."""
    return dspy.LM("openai/gpt-4o-mini", api_key="k", api_base=address, num_retries=0)


def only(program: Callable[[], Any]) -> dict[str, Any]:
    _, (call,) = recorded(program)
    return call


def totals(call: dict[str, Any]) -> dict[str, int]:
    return {model: usage["total_tokens"] for model, usage in call["response"]["usage"].items()}


WAYS = {
    "sync": lambda lm: lm("hello"),
    "async": lambda lm: asyncio.run(lm.acall("hello")),
    "typed": lambda lm: lm(lm15.Request(model=lm.model, messages=(lm15.Message.user("hello"),))),
    "typed async": lambda lm: asyncio.run(
        lm.acall(lm15.Request(model=lm.model, messages=(lm15.Message.user("hello"),)))
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_cost_is_what_dspy_says_and_an_answer_of_the_cache_costs_nothing(way: str, paid: Any) -> None:
    before = clock.to_micros(clock.now())
    asked = only(lambda: WAYS[way](paid))
    repeated = only(lambda: WAYS[way](paid))
    after = clock.to_micros(clock.now())
    assert (asked["cost"], asked["cached"], totals(asked)) == (
        pytest.approx(PRICE),
        False,
        {"openai/gpt-4o-mini": 1100},
    )
    assert (repeated["cost"], repeated["cached"], totals(repeated)) == (0.0, True, {})
    assert before <= asked["at"] <= asked["at"] + asked["latency_us"] <= repeated["at"] <= after
    # DSPy's own history repeats what the cached answer once cost.
    assert paid.history[-1]["cost"] == pytest.approx(PRICE)


def test_several_answers_of_one_call_are_paid_together(paid: Any) -> None:
    call = only(lambda: paid("hello", n=2))
    assert (call["cost"], totals(call)) == (pytest.approx(2 * PRICE), {"openai/gpt-4o-mini": 2200})


def test_the_cost_is_known_without_dspys_history(paid: Any) -> None:
    with dspy.context(disable_history=True):
        assert only(lambda: paid("hello"))["cost"] == pytest.approx(PRICE)


def test_an_engine_of_ones_own_has_no_cost() -> None:
    lm = lm_on(Engine(), cache=True)
    calls = [only(lambda: lm("hello")) for _ in range(2)]
    assert ["cost" in call for call in calls] == [False, True]
    assert [call["cached"] for call in calls] == [False, True]
    assert "cost" not in only(lambda: dummy("a")("hello"))


def response(cost: object, *, cache_hit: bool = False) -> Any:
    """An answer of the kind that LiteLLM gives."""
    message = SimpleNamespace(content="hi", tool_calls=None, reasoning_content=None, provider_specific_fields=None)
    return SimpleNamespace(
        model="m",
        choices=[SimpleNamespace(message=message, finish_reason="stop")],
        usage={"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
        cache_hit=cache_hit,
        _hidden_params={"response_cost": cost},
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("said", "kept"), [(0.25, 0.25), (None, None), (-1.0, None), (float("nan"), None), (True, None)]
)
def test_an_lm_of_ones_own_says_the_cost_as_litellm_does(said: object, kept: float | None) -> None:
    class Own(dspy.BaseLM):  # type: ignore[misc]
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            return response(said)

    call = only(lambda: Own("own")("hello"))
    assert (call.get("cost"), call["cached"], totals(call)) == (kept, False, {"own": 7})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_lm_that_keeps_a_cache_of_its_own_may_say_so() -> None:
    class Own(dspy.BaseLM):  # type: ignore[misc]
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            return response(0.25, cache_hit=True)

    call = only(lambda: Own("own")("hello"))
    assert (call["cost"], call["cached"]) == (0.0, True)


def test_an_lm_that_answers_by_itself_may_say_both_in_its_history() -> None:
    class Alone(dspy.BaseLM):  # type: ignore[misc]
        def __call__(self, prompt: Any = None, **kwargs: Any) -> Any:
            self.update_history({"cost": 0.5, "usage": {"total_tokens": 9}, "response": None})
            return ["hi"]

    class Silent(dspy.BaseLM):  # type: ignore[misc]
        def __call__(self, prompt: Any = None, **kwargs: Any) -> Any:
            return ["hi"]

    call = only(lambda: Alone("alone")("hello"))
    assert (call["cost"], call["usage"]) == (0.5, {"alone": {"total_tokens": 9}})
    # A playback gives the program the usage that it had seen: none.
    assert call["response"]["usage"] == {}
    assert not {"cost", "cached", "usage"} & only(lambda: Silent("silent")("hello")).keys()


def test_an_lm_that_passes_its_calls_on_costs_what_they_cost(paid: Any) -> None:
    class Router(dspy.BaseLM):  # type: ignore[misc]
        def __call__(self, prompt: Any = None, **kwargs: Any) -> Any:
            return [*paid(prompt), *paid(f"{prompt} again")]

    first = only(lambda: Router("router")("hello"))
    assert (first["cost"], first["cached"]) == (pytest.approx(2 * PRICE), False)
    again = only(lambda: Router("router")("hello"))
    assert (again["cost"], again["cached"]) == (0.0, True)


def test_failed_and_cancelled_calls_have_their_times() -> None:
    failing = lm_on(Engine(error=ValueError("no")))

    def fail() -> None:
        with pytest.raises(dspy.LMError):
            failing("hello")

    async def give_up() -> None:
        stuck = Stuck()
        lm = dspy.LM("test/m", engine=Engine(), async_engine=stuck, cache=False)
        call = asyncio.create_task(lm.acall("hello"))
        # Only then is it sure that the call has begun, and lasts as long as it is waited for.
        await stuck.asked.wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(call, 0.01)

    def interrupt() -> None:
        class Interrupted(dspy.BaseLM):  # type: ignore[misc]
            def __call__(self, prompt: Any = None, **kwargs: Any) -> Any:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Interrupted("interrupted")("hello")

    calls = [only(fail), only(lambda: asyncio.run(give_up())), only(interrupt)]
    kinds = [
        "dspy.utils.exceptions.LMUnexpectedError",
        "asyncio.exceptions.CancelledError",
        "builtins.KeyboardInterrupt",
    ]
    assert [call["error"]["type"] for call in calls] == kinds
    for call in calls:
        assert call["at"] > 0
        assert call["latency_us"] >= 0
        assert not {"cost", "cached", "response"} & call.keys()
    assert calls[1]["latency_us"] >= 9_000


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tokens_of_a_failed_call_that_the_provider_has_counted_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lm_on(Engine())
    monkeypatch.setattr("dspy.clients.execution._store", lambda *_: 1 / 0)

    def program() -> None:
        with pytest.raises(ZeroDivisionError):
            lm("hello")

    call = only(program)
    assert call["error"]["type"] == "builtins.ZeroDivisionError"
    assert call["usage"]["test/m"]["total_tokens"] == 5


def test_recordings_without_these_fields_are_played_as_before(paid: Any) -> None:
    new = only(lambda: paid("hello"))
    old = {name: each for name, each in new.items() if name not in ("at", "latency_us", "cost", "cached")}
    for calls in (
        [new],
        [old],
        [{**new, "at": 1, "latency_us": 0, "cost": 99.0, "cached": True, "variables": {"t": 3}}],
    ):
        with lm_calls.playing(calls) as playback:
            assert lm_on(Engine()).copy(model="openai/gpt-4o-mini", **new["lm"]["defaults"])("hello") == ["hi"]
        assert playback.divergences == []
