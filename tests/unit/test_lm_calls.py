"""LM calls through DSPy: how they are recorded and played back. No server, no file, no network."""

import asyncio
import contextvars
import json
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from typing import Any

import pytest
from pydantic import BaseModel

from dspex_persist.cognitive.lm_guard import refusing
from dspex_persist.state.errors import InvalidArgumentError
from tests.lms import Engine, Ledger, Stuck, ask, dspy, dummy, lm15, lm_calls, lm_on, outputs, recorded, run_async

SECRETS = ("sk-secret-1", "hunter22", "Bearer xyz", "acme-org")


def without_account(call: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded call without what a repetition of it cannot repeat."""
    return {name: each for name, each in call.items() if name not in ("at", "latency_us", "cost", "cached")}


def ask_with(lm: Any) -> None:
    lm("hello")


def ask_in_context(lm: Any) -> None:
    with dspy.context(lm=lm):
        ask("hello")


def ask_by_module(lm: Any) -> None:
    module = dspy.Predict("question -> answer")
    module.set_lm(lm)
    module(question="hello")


def ask_by_keyword(lm: Any) -> None:
    dspy.Predict("question -> answer")(question="hello", lm=lm)


def ask_in_threads(lm: Any) -> None:
    with dspy.context(lm=lm):
        dspy.Parallel(num_threads=2, disable_progress_bar=True)(
            [(dspy.Predict("question -> answer"), {"question": "a"})]
        )


def ask_async(lm: Any) -> None:
    asyncio.run(lm.acall("hello"))


def ask_async_by_module(lm: Any) -> None:
    with dspy.context(lm=lm):
        asyncio.run(dspy.Predict("question -> answer").acall(question="hello"))


def ask_through_asyncify(lm: Any) -> None:
    with dspy.context(lm=lm):
        asyncio.run(dspy.asyncify(dspy.Predict("question -> answer"))(question="hello"))


def ask_in_raw_thread(lm: Any) -> None:
    thread = threading.Thread(target=lm, args=("hello",))
    thread.start()
    thread.join()


class Asking(threading.Thread):
    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def run(self) -> None:
        # One that starts another one.
        ask_in_raw_thread(self.lm)


def ask_in_thread_of_a_thread(lm: Any) -> None:
    asking = Asking(lm)
    asking.start()
    asking.join()


def ask_in_pool(lm: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lm, "hello").result()


SHARED = ThreadPoolExecutor(1)


def ask_in_shared_pool(lm: Any) -> None:
    list(SHARED.map(lm, ["hello"]))


def ask_in_thread_pool(lm: Any) -> None:
    with ThreadPool(1) as pool:
        pool.apply(lm, ("hello",))


def ask_in_executor(lm: Any) -> None:
    async def run() -> None:
        await asyncio.get_running_loop().run_in_executor(None, lm, "hello")

    asyncio.run(run())


def ask_in_thread_of_dspy_in_raw_thread(lm: Any) -> None:
    thread = threading.Thread(target=ask_in_threads, args=(lm,))
    thread.start()
    thread.join()


def ask_on_loop_of_another_thread(lm: Any) -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(lm.acall("hello"), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


WAYS = (
    ask_in_raw_thread,
    ask_in_thread_of_a_thread,
    ask_in_pool,
    ask_in_shared_pool,
    ask_in_thread_pool,
    ask_in_executor,
    ask_in_thread_of_dspy_in_raw_thread,
    ask_on_loop_of_another_thread,
    ask_with,
    ask_in_context,
    ask_by_module,
    ask_by_keyword,
    ask_in_threads,
    ask_async,
    ask_async_by_module,
    ask_through_asyncify,
)


# --- Recording ---


@pytest.mark.parametrize("way", WAYS)
def test_a_call_is_seen_once_and_played_whichever_way_the_lm_is_reached(way: Callable[[Any], None]) -> None:
    _, calls = recorded(lambda: way(dummy("blue")))
    assert [call["ordinal"] for call in calls] == [0]
    assert "blue" in outputs(calls[0])[0]
    assert calls[0]["model"] == "dummy"
    silent = lm_on(Engine(error=AssertionError("it was called")))
    silent.model, silent.kwargs = "dummy", calls[0]["lm"]["defaults"]
    with lm_calls.playing(calls) as playback:
        way(silent)
    assert playback.divergences == []


@pytest.mark.parametrize(
    ("calls", "what"), [(3, "int"), ("exec_1", "str"), ({"lm": []}, "dict"), ([3], "int"), ([{"ordinal": 0}], "dict")]
)
def test_only_recorded_calls_are_played(calls: Any, what: str) -> None:
    message = rf"calls: it must be recorded LM calls, as recorded_calls\(...\) returns them, not {what}$"
    with pytest.raises(InvalidArgumentError, match=message), lm_calls.playing(calls):
        raise AssertionError("never entered")


def test_a_pool_that_programs_share_keeps_their_calls_apart() -> None:
    """The first of them creates the thread, which serves all of them."""
    with ThreadPoolExecutor(1) as pool:
        _, first = recorded(lambda: pool.submit(dummy("a"), "one").result())
        pool.submit(dummy("b"), "unrecorded").result()
        _, second = recorded(lambda: pool.submit(dummy("c"), "two").result())
    prompts = [[call["request"]["messages"][0]["content"] for call in calls] for calls in (first, second)]
    assert prompts == [["one"], ["two"]]


def test_nothing_is_seen_outside() -> None:
    recorded(lambda: ask_with(dummy("a")))
    _, calls = recorded(lambda: None)
    ask_with(dummy("b"))
    assert calls == []


def test_a_late_class_and_an_lm_that_calls_another_are_one_call() -> None:
    recorded(lambda: None)

    class Router(dspy.BaseLM):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return dummy("inner")(*args, **kwargs)

    _, calls = recorded(lambda: Router("router")("hello"))
    assert [call["model"] for call in calls] == ["router"]
    assert "inner" in outputs(calls[0])[0]


def test_keys_headers_and_addresses_are_kept_out() -> None:
    class Answer(BaseModel):
        word: str

    secret = {
        "api_key": SECRETS[0],
        "api_base": f"https://me:{SECRETS[1]}@host/v1",
        "extra_headers": {"Authorization": SECRETS[2]},
        "organization": SECRETS[3],
    }
    tools = [{"type": "mcp", "name": "t", "server_url": f"https://{SECRETS[1]}", "headers": {"X": SECRETS[2]}}]
    lm = dummy("a").copy(temperature=0.3, **secret)
    _, calls = recorded(lambda: lm("hello", response_format=Answer, tools=tools, seed=7))
    text = json.dumps(calls)
    assert not [each for each in SECRETS if each in text]
    options = calls[0]["request"]["options"]
    assert {name: options[name] for name in ("temperature", "max_tokens", "seed", "tools")} == {
        "temperature": 0.3,
        "max_tokens": 1000,
        "seed": 7,
        "tools": [{"type": "mcp", "name": "t"}],
    }
    assert options["response_format"]["schema"]["properties"]["word"]["type"] == "string"


def test_secrets_are_removed_from_errors() -> None:
    lm = lm_on(Engine(error=ValueError(f"Incorrect API key provided: {SECRETS[0]}")))
    lm.kwargs["api_key"] = SECRETS[0]

    def program() -> None:
        with pytest.raises(dspy.LMError, match=SECRETS[0]):
            lm("hello")

    _, calls = recorded(program)
    assert calls[0]["error"]["message"].endswith("provided: ***")
    assert SECRETS[0] not in json.dumps(calls)


def test_the_hash_tells_requests_apart_and_a_prompt_is_a_message() -> None:
    def program() -> None:
        lm = dummy(*"abcdef")
        lm("hello")
        lm(messages=[{"role": "user", "content": "hello"}])
        lm("hello", temperature=0.9)
        lm("hello", rollout_id=1)
        lm("hello", n=2)
        lm("bye")

    with warnings.catch_warnings():
        # DSPy wants its own message objects instead.
        warnings.simplefilter("ignore", DeprecationWarning)
        _, calls = recorded(program)
    hashes = [call["hash"] for call in calls]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 5
    assert len(outputs(calls[4])) == 2
    assert recorded(lambda: dummy("z")("hello"))[1][0]["hash"] == hashes[0]


def test_files_in_messages_are_represented_by_their_hash() -> None:
    image = dspy.Image("data:image/png;base64," + "QUJD" * 200)
    with dspy.context(lm=dummy("cat")):
        _, calls = recorded(lambda: dspy.Predict("image: dspy.Image -> answer")(image=image))
    text = json.dumps(calls)
    assert "QUJDQUJD" not in text
    assert "data:image/png;sha256:" in text


def test_which_calls_come_from_other_threads_and_tasks() -> None:
    def program() -> None:
        lm = dummy(*"abc")
        lm("one")
        ask_in_threads(lm)

    assert [call["concurrent"] for call in recorded(program)[1]] == [False, True]

    async def in_tasks() -> None:
        lm = dummy(*"abc")
        await asyncio.gather(lm.acall("one"), lm.acall("two"))

    assert [call["concurrent"] for call in recorded(run_async(in_tasks))[1]] == [True, True]


def test_answers_from_the_cache_are_recorded_and_count_nothing() -> None:
    engine = Engine()
    lm = lm_on(engine, cache=True)
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    _, calls = recorded(lambda: [lm("hello"), lm("hello")])
    assert engine.calls == 1
    assert [outputs(call) for call in calls] == [["HELLO"], ["HELLO"]]
    assert calls[0]["response"]["usage"]["test/m"]["total_tokens"] == 5
    assert calls[1]["response"]["usage"] == {}


def test_an_ended_execution_records_nothing() -> None:
    ledger = Ledger()

    def program() -> None:
        lm_calls.record_calls(ledger)  # type: ignore[arg-type]
        ledger.cancelled = True
        assert dummy("a")("hello")

    contextvars.copy_context().run(program)
    assert ledger.calls == []


# --- Playing ---


def conversation() -> list[str]:
    return [ask("one"), ask("two"), ask("one")]


@pytest.fixture
def calls() -> Iterator[list[dict[str, Any]]]:
    """The calls of a conversation with three answers."""
    with dspy.context(lm=dummy("red", "green", "blue")):
        yield recorded(conversation)[1]


def test_the_same_program_gets_the_same_answers_where_no_lm_is_configured(calls: list[dict[str, Any]]) -> None:
    with dspy.context(lm=None), lm_calls.playing(calls) as playback:
        assert conversation() == ["red", "green", "blue"]
    assert playback.divergences == []


def test_a_stand_in_lm_makes_the_same_requests() -> None:
    with dspy.context(lm=lm_on(Engine(lm15.TextPart("[[ ## answer ## ]]\nyes")), temperature=0.4)):
        _, calls = recorded(lambda: [ask("one"), ask("one", max_tokens=9)])
    with dspy.context(lm=None), lm_calls.playing(calls) as playback:
        assert isinstance(dspy.settings.lm, dspy.LM)
        assert [ask("one"), ask("one", max_tokens=9)] == ["yes", "yes"]
    assert playback.divergences == []


def test_usage_and_history_are_as_they_were() -> None:
    lm = lm_on(Engine())
    _, calls = recorded(lambda: lm("hello"))
    silent = lm_on(Engine(error=AssertionError("it was called")))
    with lm_calls.playing(calls), dspy.track_usage() as tracker:
        assert silent("hello", temperature=None) == ["HELLO"]
    assert tracker.get_total_tokens()["test/m"]["total_tokens"] == 5
    entry = silent.history[-1]
    assert (entry["prompt"], entry["outputs"], entry["usage"]["total_tokens"]) == ("hello", ["HELLO"], 5)


def test_a_playback_can_be_recorded(calls: list[dict[str, Any]]) -> None:
    def program() -> None:
        with dspy.context(lm=None), lm_calls.playing(calls):
            conversation()

    _, again = recorded(program)
    assert [without_account(call) for call in again] == [without_account(call) for call in calls]
    # No model was asked.
    assert [(call["cost"], call["cached"]) for call in again] == [(0.0, True)] * 3


def test_tool_calls_are_played_as_objects() -> None:
    lm = lm_on(Engine(lm15.TextPart("see"), lm15.ToolCallPart(id="c1", name="find", input={"q": "x"})))
    answer, calls = recorded(lambda: lm("hello"))
    with lm_calls.playing(calls):
        played = lm("hello")
    assert played == answer
    call = played[0]["tool_calls"][0]
    assert call.function.name == call["function"]["name"] == "find"


def test_typed_requests_are_played_as_typed_responses() -> None:
    engine = Engine()
    lm = lm_on(engine)
    request = lm15.Request(model="test/m", messages=(lm15.Message.user("hello"),))
    answer, calls = recorded(lambda: lm(request))
    with lm_calls.playing(calls):
        assert lm(request) == answer
    assert answer.text == "HELLO"
    assert engine.calls == 1


def test_recorded_errors_are_raised_with_their_type() -> None:
    def program(lm: Any) -> Any:
        try:
            return lm("hello")
        except dspy.LMError as error:
            return type(error).__name__, str(error)

    lm = lm_on(Engine(error=ValueError("no")))
    failed, calls = recorded(lambda: program(lm))
    with lm_calls.playing(calls) as playback:
        assert program(lm_on(Engine())) == failed
        assert playback.divergences == []
    with lm_calls.playing([{**calls[0], "error": {"type": "gone.module.Odd", "message": "m"}}]):
        with pytest.raises(lm_calls.RecordedLmError, match="m") as caught:
            lm_on(Engine())("hello")
        assert type(caught.value).__name__ == "Odd"


def test_an_abandoned_call_is_abandoned_again() -> None:
    lm = dspy.LM("test/m", engine=Engine(), async_engine=Stuck(), cache=False)

    async def program() -> str:
        try:
            await asyncio.wait_for(lm.acall("hello"), 0.05)
        except TimeoutError:
            return "gave up"
        return "answered"

    result, calls = recorded(run_async(program))
    assert (result, len(calls)) == ("gave up", 1)

    async def play() -> tuple[str, Any]:
        with lm_calls.playing(calls) as playback:
            return await program(), playback.divergences

    assert asyncio.run(play()) == ("gave up", [])


def test_an_unexpected_request_is_refused_with_the_nearest_recorded_one(calls: list[dict[str, Any]]) -> None:
    with dspy.context(lm=None), lm_calls.playing(calls) as playback:
        ask("one")
        with pytest.raises(lm_calls.UnexpectedLmCallError, match="was not recorded; nearest is"):
            ask("too")
        assert ask("one") == "blue"
    (divergence,) = playback.divergences
    assert (divergence.kind, divergence.ordinal) == ("unexpected", 1)
    assert divergence.recorded == calls[1]
    changed = [line for line in divergence.diff() if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert changed == ["-two", "+too"]


def from_unknown_thread(function: Callable[..., Any], *args: Any) -> Any:
    """As if it were unknown which execution started a thread."""
    return contextvars.Context().run(function, *args)


def test_a_call_of_unknown_origin_reaches_no_model() -> None:
    engine = Engine(lm15.TextPart("today"))
    lm = lm_on(Engine(lm15.TextPart("then")))
    _, calls = recorded(lambda: lm("hello"))
    silent = lm_on(engine)
    with lm_calls.playing(calls) as outer, lm_calls.playing([]) as inner:
        assert from_unknown_thread(silent, "hello") == ["then"]
        with pytest.raises(lm_calls.UnexpectedLmCallError):
            from_unknown_thread(silent, "hello")
        with pytest.raises(lm_calls.UnexpectedLmCallError):
            from_unknown_thread(asyncio.run, silent.acall("bye"))
    assert (len(outer.divergences), len(inner.divergences)) == (0, 2)
    with refusing(lm_calls.install) as refusal, pytest.raises(lm_calls.UnexpectedLmCallError):
        from_unknown_thread(silent, "hello")
    assert len(refusal.divergences) == 1
    assert engine.calls == 0
    with lm_calls.playing(calls, live=True) as live:
        assert from_unknown_thread(silent, "hello") == ["today"]
    assert [each.kind for each in live.divergences] == ["answer"]
    assert from_unknown_thread(silent, "hello") == ["today"]


def test_calling_forward_is_refused_where_no_model_may_be_called(calls: list[dict[str, Any]]) -> None:
    engine = Engine()
    lm = lm_on(engine)
    with lm_calls.playing(calls):
        with pytest.raises(lm_calls.UnseenLmCallError, match=r"calls of forward are not recorded: use lm\(\.\.\.\)"):
            lm.forward("hello")
        with pytest.raises(lm_calls.UnseenLmCallError, match="aforward"):
            asyncio.run(lm.aforward("hello"))
        with pytest.raises(lm_calls.UnseenLmCallError):
            from_unknown_thread(lm.forward, "hello")
    assert engine.calls == 0
    with lm_calls.playing(calls, live=True):
        lm.forward("hello")
    recorded(lambda: lm.forward("hello"))
    assert engine.calls == 2


def test_the_stand_in_lm_works_in_threads_too(calls: list[dict[str, Any]]) -> None:
    with dspy.context(lm=None), lm_calls.playing(calls), ThreadPoolExecutor(1) as pool:
        assert pool.submit(ask, "one").result() == "red"


def test_another_model_and_another_option_are_unexpected(calls: list[dict[str, Any]]) -> None:
    with dspy.context(lm=lm_on(Engine(), temperature=0.0, max_tokens=1000)), lm_calls.playing(calls):
        with pytest.raises(lm_calls.UnexpectedLmCallError) as caught:
            ask("one")
        assert caught.value.divergence.diff() == ["model:", "-dummy", "+test/m"]
    with dspy.context(lm=dummy()), lm_calls.playing(calls) as playback:
        with pytest.raises(lm_calls.UnexpectedLmCallError) as caught:
            ask("one", temperature=0.4)
        assert "+temperature = 0.4" in caught.value.divergence.diff()
    assert [each.kind for each in playback.divergences] == ["unexpected", "unused", "unused"]


def test_a_request_that_is_repeated_too_often(calls: list[dict[str, Any]]) -> None:
    with dspy.context(lm=None), lm_calls.playing(calls) as playback:
        conversation()
        with pytest.raises(
            lm_calls.UnexpectedLmCallError, match="LM call 3 repeats recorded call 2 more often than recorded"
        ):
            ask("one")
    assert len(playback.divergences) == 1
    with lm_calls.playing([]), pytest.raises(lm_calls.UnexpectedLmCallError, match="nothing is left"):
        dummy("a")("hello")


def instructed(instructions: str, *questions: str) -> list[str]:
    """Ask questions; the words of an error instead of its answer."""
    program = dspy.Predict(dspy.Signature("question -> answer", instructions))
    answers = []
    for question in questions:
        try:
            answers.append(str(program(question=question).answer))
        except lm_calls.UnexpectedLmCallError as error:
            answers.append(str(error))
    return answers


def test_a_changed_prompt_is_told_once_message_by_message() -> None:
    with dspy.context(lm=dummy("a", "b", "c")):
        _, calls = recorded(lambda: instructed("Be brief.\nBe kind.", "one", "two", "three"))
    with dspy.context(lm=None), lm_calls.playing(calls) as playback:
        told = instructed("Be brief.\nBe polite.", "one", "two", "other")
    first, other = playback.divergences
    assert (first.ordinal, first.repeated_by) == (0, [1])
    title, _, *lines = first.diff()
    assert (title, lines) == ("message 0 (system):", ["         Be brief.", "-        Be kind.", "+        Be polite."])
    assert str(first).splitlines()[0] == (
        "LM call 0 was not recorded; nearest is recorded call 0; 1 more differ only because of this: LM calls 1"
    )
    assert told[0].splitlines()[1:] == first.diff()
    assert told[1] == "LM call 1 was not recorded: it differs from recorded call 1 only by what LM call 0 tells"
    # What is new in a later call is told.
    assert [line for line in other.diff() if line[0] in "+-" and "Be" not in line] == ["-three", "+other"]


def test_an_answer_that_changed_is_not_told_again_where_it_is_quoted() -> None:
    def program() -> None:
        colour = ask("Which colour?")
        ask(f"Why is it {colour}, of all colours?")

    with dspy.context(lm=dummy("red", "so")):
        _, calls = recorded(program)
    with dspy.context(lm=dummy("green", "so")), lm_calls.playing(calls, live=True) as playback:
        program()
    (changed,) = playback.divergences
    assert (changed.kind, changed.diff(), changed.repeated_by) == (
        "answer",
        [" [[ ## answer ## ]]", "-red", "+green"],
        [1],
    )


def test_what_is_no_text_is_told_as_a_document() -> None:
    def program(detail: str) -> None:
        image = {"type": "image_url", "image_url": {"url": "https://host/cat.png", "detail": detail}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            dspy.settings.lm(messages=[{"role": "user", "content": [{"type": "text", "text": "What?"}, image]}])

    with dspy.context(lm=dummy("cat")):
        _, calls = recorded(lambda: program("low"))
        with lm_calls.playing(calls), pytest.raises(lm_calls.UnexpectedLmCallError) as caught:
            program("high")
    changed = [line for line in caught.value.divergence.diff() if line[0] in "+-"]
    assert len(changed) == 2
    assert ["low" in changed[0], "high" in changed[1]] == [True, True]


def test_missing_calls(calls: list[dict[str, Any]]) -> None:
    with dspy.context(lm=None), lm_calls.playing(calls) as playback:
        ask("one")
    assert [(each.kind, each.recorded["ordinal"]) for each in playback.divergences if each.recorded] == [
        ("unused", 1),
        ("unused", 2),
    ]
    assert str(playback.divergences[0]) == "recorded LM call 1 was not made"


def test_the_order_counts_in_the_tools_own_thread_only(calls: list[dict[str, Any]]) -> None:
    with dspy.context(lm=None), lm_calls.playing(calls) as playback:
        assert [ask("two"), ask("one"), ask("one")] == ["green", "red", "blue"]
    assert [str(each) for each in playback.divergences] == [
        "LM call 1 is recorded call 0, which was recorded before the call that now precedes it"
    ]
    with dspy.context(lm=None), lm_calls.playing(calls) as playback, ThreadPoolExecutor(1) as pool:
        for question in ("two", "one", "one"):
            pool.submit(contextvars.copy_context().run, ask, question).result()
    assert playback.divergences == []


def test_live_calls_go_to_the_lm_and_report_changes(calls: list[dict[str, Any]]) -> None:
    with dspy.context(lm=dummy("red", "white", "blue", "new")), lm_calls.playing(calls, live=True) as playback:
        assert conversation() == ["red", "white", "blue"]
        assert ask("three") == "new"
    changed, unexpected = playback.divergences
    assert (changed.kind, changed.ordinal, unexpected.kind) == ("answer", 1, "unexpected")
    assert [line[:6] for line in changed.diff() if line[:2] in ("-g", "+w")] == ["-green", "+white"]


def test_live_calls_go_past_the_cache() -> None:
    engine = Engine()
    lm = lm_on(engine, cache=True)
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    _, calls = recorded(lambda: lm("live hello"))
    with lm_calls.playing(calls, live=True) as playback:
        lm("live hello")
    assert (engine.calls, playback.divergences) == (2, [])


def test_the_innermost_playback_applies() -> None:
    _, outer = recorded(lambda: dummy("outer")("hello"))
    _, inner = recorded(lambda: dummy("inner")("hello"))
    with lm_calls.playing(outer):
        with lm_calls.playing(inner) as playback:
            assert "inner" in dummy()("hello")[0]
        assert playback.divergences == []
        assert "outer" in dummy()("hello")[0]
