"""Models, adapters, instructions, demos, tools and the like as variables: what an LM really receives."""

import asyncio
import contextvars
import copy
import secrets
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cloudpickle
import pytest

from dspex_persist import Context
from dspex_persist.errors import BindingError, BoundValueError
from tests.late import Late
from tests.receiver import Receiver, lm_on

dspy, lm15, ours = Late("dspy"), Late("dspy.lm15"), Late("dspex_persist.dspy")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    with dspy.context(lm=lm_on(receiver)):
        yield receiver


@pytest.fixture
def ctx() -> Iterator[Context]:
    with Context() as ctx:
        yield ctx


def predict(**config: Any) -> Any:
    return dspy.Predict("question -> answer", **config)


def near(city: str) -> str:
    """What is near a city."""
    return "the sea"


def far(city: str) -> str:
    """What is far from a city."""
    return "the moon"


def agent(**options: Any) -> Any:
    return dspy.ReAct("question -> answer", tools=[near, far], **options)


# Models


def test_a_variable_chooses_among_lms(receiver: Receiver, ctx: Context) -> None:
    others = {name: Receiver() for name in ("fast", "good")}
    lms = {name: lm_on(each, f"test/{name}", temperature=0.5) for name, each in others.items()}
    ctx.define_many({"model": "fast", "temperature": 0.3})
    program = ours.bind(predict(), ctx, model="model", temperature="temperature", lms=lms)
    program(question="x")
    ctx["model"] = "good"
    program(question="x")
    program.set_lm(dspy.settings.lm)
    program(question="x")
    program(question="x", lm=dspy.settings.lm)
    asyncio.run(program.acall(question="x"))
    assert (others["fast"].temperatures, others["good"].temperatures) == ([0.3], [0.3] * 4)
    assert receiver.requests == []
    ours.bind(program, ctx, model="model", lms=lms, precedence="default")(question="x")
    assert len(receiver.requests) == 1
    with dspy.context(lm=None):
        ours.bind(predict(), ctx, model="model", lms=lms, precedence="default")(question="x")
    assert others["good"].temperatures[4:] == [0.5]


def test_calls_of_the_programs_own_code_go_to_the_chosen_lm(receiver: Receiver, ctx: Context) -> None:
    class Direct(dspy.Module):
        def forward(self) -> None:
            dspy.settings.lm("hello")

    ctx["model"], other = "other", Receiver()
    ours.bind(Direct(), ctx, model="model", lms={"other": lm_on(other)})()
    assert (len(receiver.requests), len(other.requests)) == (0, 1)


def test_rollouts_of_the_chosen_lm_stay_apart(ctx: Context) -> None:
    ctx["model"], other = "other", Receiver()
    lm = lm_on(other, cache=True)
    program = dspy.BestOfN(predict(), N=3, reward_fn=lambda *_: 0.0, threshold=1.0)
    ours.bind(program, ctx, model="model", lms={"other": lm})(question=secrets.token_hex())
    # Otherwise DSPy's cache would answer.
    assert len(other.requests) == 3


def test_unknown_models_are_named_with_the_known_ones(receiver: Receiver, ctx: Context) -> None:
    lms = {"fast": lm_on(receiver), "good": lm_on(receiver)}
    ctx["model"] = "gud"
    message = "variable 'model' is 'gud', which cannot be model: there is no 'gud'; known are 'fast', 'good'"
    with pytest.raises(BoundValueError, match=message):
        ours.bind(predict(), ctx, model="model", lms=lms)
    ctx["model"] = "good"
    program = ours.bind(predict(), ctx, model="model", lms=lms)
    ctx["model"] = "gud"
    with pytest.raises(BoundValueError, match=message):
        program(question="x")
    # It is no error that an agent takes for the model's.
    with pytest.raises(BoundValueError, match=message):
        ours.bind(agent(), ctx.fork(), model="model", lms=lms)
    assert receiver.requests == []


# Adapters


def test_a_variable_chooses_the_adapter(receiver: Receiver, ctx: Context) -> None:
    receiver.fields = {"answer": "42"}
    ctx["adapter"] = "chat"
    program = ours.bind(predict(), ctx, adapter="adapter")
    program(question="x")
    ctx["adapter"] = "xml"
    with pytest.raises(dspy.utils.exceptions.AdapterParseError):
        program(question="x")
    assert "[[ ## question ## ]]" in receiver.texts[0]
    assert "<question>" in receiver.texts[1]
    with dspy.context(adapter=dspy.ChatAdapter()):
        ours.bind(program, ctx, adapter="adapter", precedence="default")(question="x")
    assert "[[ ## question ## ]]" in receiver.texts[-1]


def test_adapters_of_ones_own(receiver: Receiver, ctx: Context) -> None:
    class Terse(dspy.ChatAdapter):
        def format_task_description(self, signature: Any) -> str:
            return "Be terse."

    ctx["adapter"] = "terse"
    ours.bind(predict(), ctx, adapter="adapter", adapters={"terse": Terse()})(question="x")
    assert "Be terse." in receiver.texts[0]


# Instructions and demos


def test_instructions(receiver: Receiver, ctx: Context) -> None:
    ctx["instructions"] = "Answer like a pirate."
    program = dspy.ChainOfThought(dspy.Signature("question -> answer", "Answer briefly."))
    before = program.dump_state()
    ours.bind(program, ctx, instructions="instructions")(question="x")
    asyncio.run(program.acall(question="x"))
    assert ["pirate" in text for text in receiver.texts] == [True, True]
    assert program.dump_state() == before
    ours.bind(program, ctx, instructions="instructions", precedence="default")(question="x")
    assert "Answer briefly." in receiver.texts[-1]
    ours.bind(dspy.ChainOfThought("question -> answer"), ctx, instructions="instructions", precedence="default")(
        question="x"
    )
    assert "pirate" in receiver.texts[-1]


def test_concurrent_calls_have_instructions_of_their_own(receiver: Receiver, ctx: Context) -> None:
    ctx["instructions"] = "Say A."
    program = ours.bind(predict(), ctx, instructions="instructions")
    lm = dspy.settings.lm

    def call_again() -> None:
        receiver.before = lambda: None
        ctx["instructions"] = "Say B."
        with ThreadPoolExecutor(1) as pool:
            pool.submit(contextvars.Context().run, program, question="x", lm=lm).result()

    receiver.before = call_again
    program(question="x")
    assert [text[text.index("Say ") + 4] for text in receiver.texts] == ["B", "A"]

    async def run() -> None:
        receiver.before = lambda: None
        first = asyncio.create_task(program.acall(question="x"), context=contextvars.copy_context())
        receiver.before = lambda: ctx.set("instructions", "Say C.")
        await first
        await program.acall(question="x")

    asyncio.run(run())
    assert [text[text.index("Say ") + 4] for text in receiver.texts[2:]] == ["B", "C"]


def test_instructions_of_an_agent_leave_its_tools(receiver: Receiver, ctx: Context) -> None:
    ctx["instructions"] = "Answer like a pirate."
    program = ours.bind(agent(), ctx, instructions="instructions")
    program(question="x")
    step, extract = receiver.texts
    assert "pirate" in step
    assert "What is near a city" in step
    assert "pirate" in extract
    ours.bind(program, ctx, per={"react": {"instructions": "instructions"}})(question="x")
    assert "What is near a city" not in receiver.texts[2]


def test_demos(receiver: Receiver, ctx: Context) -> None:
    ctx["demos"] = [{"question": "How deep is the sea?", "answer": "Very."}]
    program = predict()
    program.demos = [dspy.Example(question="Old?", answer="Yes.")]
    ours.bind(program, ctx, demos="demos")(question="x")
    assert "How deep is the sea?" in receiver.texts[0]
    assert "Old?" not in receiver.texts[0]
    ours.bind(program, ctx, demos="demos", precedence="default")(question="x")
    assert "Old?" in receiver.texts[1]
    ctx["demos"] = []
    ours.bind(program, ctx, demos="demos")(question="x")
    assert "Old?" not in receiver.texts[2]
    assert program.demos[0].question == "Old?"


@pytest.mark.parametrize(
    ("demo", "message"),
    [
        ({"question": "q", "anser": "a"}, "demo 0 has 'anser', which is no field of question, count -> answer"),
        ({"question": "q", "anser": "a"}, "did you mean 'answer'"),
        ({"question": "q"}, "demo 0 has no output field: 'answer'"),
        ({"answer": "yes"}, "demo 0 has no input field: 'question', 'count'"),
        ({"question": "q", "answer": "perhaps"}, "demo 0 has a wrong 'answer': Input should be 'yes' or 'no'"),
        ({"question": "q", "count": "many", "answer": "no"}, "demo 0 has a wrong 'count'"),
    ],
)
def test_wrong_demos_are_named(demo: dict[str, Any], message: str, receiver: Receiver, ctx: Context) -> None:
    program = dspy.Predict("question, count: int -> answer: Literal['yes', 'no']")
    ctx["demos"] = [demo]
    with pytest.raises(BoundValueError, match=message):
        ours.bind(program, ctx, demos="demos")
    ctx["demos"] = [{"question": "q", "count": 1, "answer": "no", "augmented": True}]
    ours.bind(program, ctx, demos="demos")
    ctx["demos"] = [demo]
    with pytest.raises(BoundValueError, match=message):
        program(question="x", count=1)


def test_what_belongs_to_one_predictor_is_refused_for_several(ctx: Context) -> None:
    ctx.define_many({"instructions": "i", "demos": []})
    with pytest.raises(BindingError, match="demos are those of one predictor, and the program has 2; say which"):
        ours.bind(agent(), ctx, demos="demos")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        program = dspy.ProgramOfThought("question -> answer")
    with pytest.raises(BindingError, match=r"the program has 3; say which, per=.*'code_generate\.predict'"):
        ours.bind(program, ctx, instructions="instructions")
    ours.bind(program, ctx, per={"code_generate": {"instructions": "instructions"}})


# Agents


@pytest.mark.parametrize("is_async", [False, True])
def test_tools_and_iterations_of_an_agent(is_async: bool, ctx: Context) -> None:
    receiver = Receiver(next_tool_name="near", next_tool_args='{"city": "Oslo"}')
    ctx.define_many({"tools": ["near"], "iterations": 2})
    program = agent()
    state, tools = program.dump_state(), program.tools
    ours.bind(program, ctx, tools="tools", max_iters="iterations")

    def call(**options: Any) -> Any:
        if is_async:
            return asyncio.run(program.acall(question="x", **options))
        return program(question="x", **options)

    with dspy.context(lm=lm_on(receiver)):
        result = call()
        assert result.trajectory["observation_1"] == "the sea"
        assert len(receiver.requests) == 3
        assert "What is far" not in receiver.texts[0]
        assert "(2) finish" in receiver.texts[0]
        assert "must exactly match (no extra characters) one of: near; finish" in receiver.texts[0]
        # The variable beats the call.
        assert "observation_2" not in call(max_iters=5).trajectory
        ctx["tools"] = ["far"]
        ctx["iterations"] = 1
        receiver.fields["next_tool_name"] = "far"
        assert call().trajectory["observation_0"] == "the moon"
        ours.bind(program, ctx, max_iters="iterations", precedence="default")
        assert "observation_1" in call(max_iters=2).trajectory
        assert "observation_1" not in call().trajectory
    assert (program.dump_state(), program.tools, program.max_iters) == (state, tools, 20)
    assert copy.deepcopy(program).max_iters == 20


def test_default_iterations_are_those_that_nobody_has_set(receiver: Receiver, ctx: Context) -> None:
    receiver.fields |= {"next_tool_name": "near", "next_tool_args": '{"city": "Oslo"}'}
    ctx["iterations"] = 1
    program = ours.bind(agent(max_iters=3), ctx, max_iters="iterations", precedence="default")
    assert "observation_2" in program(question="x").trajectory


def test_agents_inside_a_program(receiver: Receiver, ctx: Context) -> None:
    class Team(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = agent(), agent()
            self.second._compiled = True

        def forward(self, question: str) -> Any:
            return self.first(question=question).trajectory, self.second(question=question).trajectory

    receiver.fields |= {"next_tool_name": "near", "next_tool_args": '{"city": "Oslo"}'}
    ctx.define_many({"iterations": 1, "other": 2, "tools": ["near"]})
    program = ours.bind(Team(), ctx, max_iters="iterations", per={"second": {"max_iters": "other", "tools": "tools"}})
    first, second = program(question="x")
    assert ("observation_1" in first, "observation_1" in second) == (False, True)
    assert ["What is far" in text for text in receiver.texts] == [True, False, False, False, False]


def test_tools_that_an_optimizer_described_otherwise(receiver: Receiver, ctx: Context) -> None:
    ctx["tools"] = ["near"]
    program = ours.bind(agent(), ctx, tools="tools")
    program.react.signature = program.react.signature.with_instructions("Use near or far.")
    program(question="x")
    assert "Use near or far.\n        Use only these tools:\n        (1) near" in receiver.texts[0].replace("\\n", "\n")


def test_unknown_tools_are_named(receiver: Receiver, ctx: Context) -> None:
    ctx["tools"] = ["neer"]
    with pytest.raises(BoundValueError, match="there is no 'neer'; known are 'near', 'far'; did you mean 'near'"):
        ours.bind(agent(), ctx, tools="tools")
    with pytest.raises(BindingError, match="tools is an option of a ReAct, which the program has not"):
        ours.bind(predict(), ctx, tools="tools")
    ctx["iterations"] = 0
    with pytest.raises(BoundValueError, match="is 0, which cannot be max_iters: it must be a whole number from 1 up"):
        ours.bind(agent(), ctx, max_iters="iterations")


def test_iterations_of_any_module_that_has_them(receiver: Receiver, ctx: Context) -> None:
    class Repeats(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.max_iters, self.done = 5, 0

        def forward(self) -> list[int]:
            self.done += self.max_iters
            return list(range(self.max_iters))

    ctx["iterations"] = 2
    program = ours.bind(Repeats(), ctx, max_iters="iterations")
    assert program() == [0, 1]
    assert (program.max_iters, program.done) == (5, 2)
    program.max_iters = 3
    assert vars(program)["max_iters"] == 3
    ours.unbind(program)
    assert program() == [0, 1, 2]


def test_a_class_that_was_pickled_by_its_value_needs_nothing_of_ours(receiver: Receiver, ctx: Context) -> None:
    class Repeats(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.max_iters = 5

        def forward(self) -> int:
            return int(self.max_iters)

    ctx["iterations"] = 2
    program = ours.bind(Repeats(), ctx, max_iters="iterations")
    assert program() == 2
    data = cloudpickle.dumps(program)
    assert b"dspex_persist.cognitive" not in data
    assert cloudpickle.loads(data)() == 5


# Options of LM calls that need care


def test_rollouts_and_the_cache(ctx: Context) -> None:
    receiver = Receiver()
    ctx.define_many({"rollout": 1, "cache": True, "temperature": 1.0})
    options = {"rollout_id": "rollout", "cache": "cache", "temperature": "temperature"}
    program = ours.bind(predict(), ctx, **options)
    with dspy.context(lm=lm_on(receiver, "test/rollouts")):
        # DSPy's cache outlives the process.
        question = secrets.token_hex()
        for _ in range(2):
            program(question=question)
        ctx["rollout"] = 2
        program(question=question)
        ctx["cache"] = False
        program(question=question)
    assert len(receiver.requests) == 3


@pytest.mark.parametrize("precedence", ["variable", "default"])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("temperature", 0.3, "cannot be temperature for openai/gpt-5: OpenAI's reasoning models take only 1.0"),
        ("max_tokens", 500, "cannot be max_tokens for openai/gpt-5: OpenAI's reasoning models need at least 16000"),
    ],
)
def test_what_a_reasoning_model_refuses(
    option: str, value: float, message: str, precedence: str, receiver: Receiver, ctx: Context
) -> None:
    ctx["x"] = value
    with pytest.raises(BoundValueError, match=f"variable 'x' is {value}, which {message}"):
        ours.bind(predict(), ctx, **{option: "x"}, precedence=precedence)(
            question="x", lm=lm_on(receiver, "openai/gpt-5")
        )
    assert receiver.requests == []


class Refuses:
    """A model with an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def complete(self, request: Any) -> Any:
        raise self.error


def test_an_error_of_the_lm_says_which_variables_were_set(ctx: Context) -> None:
    ctx["warmth"] = 1.9
    program = ours.bind(predict(), ctx, temperature="warmth")
    lm = dspy.LM("test/m", engine=Refuses(lm15.LM15Error("the sky falls")), cache=False, num_retries=0)
    with pytest.raises(dspy.utils.exceptions.LMError, match="the sky falls") as caught:
        program(question="x", lm=lm)
    assert not isinstance(caught.value, BoundValueError)
    assert caught.value.__notes__ == ["Variables have set for test/m: temperature=1.9 (variable 'warmth')"]


def test_a_refusal_of_the_lm_names_variable_value_and_model(ctx: Context) -> None:
    ctx.define_many({"warmth": 1.9, "tokens": 10})
    program = ours.bind(agent(), ctx, max_tokens="tokens", temperature="warmth")
    refusal = lm15.InvalidRequestError("temperature: at most 1")
    lm = dspy.LM("test/m", engine=Refuses(refusal), cache=False, num_retries=0)
    message = r"variable 'warmth' is 1.9, which cannot be temperature for test/m: .*temperature: at most 1"
    with dspy.context(lm=lm), pytest.raises(BoundValueError, match=message) as caught:
        program(question="x")
    assert isinstance(caught.value, dspy.utils.exceptions.LMInvalidRequestError)
    assert isinstance(caught.value.__cause__, dspy.utils.exceptions.LMInvalidRequestError)
    assert not isinstance(caught.value.__cause__, BoundValueError)


@pytest.mark.parametrize(("option", "value"), [("temperature", 5), ("n", 0), ("temperature", -1)])
def test_what_dspy_refuses_names_the_variable(option: str, value: float, receiver: Receiver, ctx: Context) -> None:
    ctx["x"] = value
    # An agent takes a ValueError for a mistake of the model.
    with pytest.raises(BoundValueError, match=f"variable 'x' is {value}, which cannot be {option} for test/m"):
        ours.bind(agent(), ctx, **{option: "x"})(question="x")
    assert receiver.requests == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value: float, ctx: Context) -> None:
    ctx["x"] = value
    with pytest.raises(BoundValueError, match="cannot be temperature: it must be a number"):
        ours.bind(predict(), ctx, temperature="x")


def test_a_value_that_no_longer_fits_is_refused_at_the_call(receiver: Receiver, ctx: Context) -> None:
    ctx["temperature"] = 0.3
    program = ours.bind(predict(), ctx, temperature="temperature")
    del ctx["temperature"]
    ctx["temperature"] = "warm"
    with pytest.raises(BoundValueError, match="variable 'temperature' is 'warm', which cannot be temperature"):
        program(question="x")
    assert receiver.requests == []


def test_requests_of_ones_own(receiver: Receiver, ctx: Context) -> None:
    class Direct(dspy.Module):
        def forward(self, request: Any) -> None:
            dspy.settings.lm(request)
            dspy.settings.lm(request=request)
            asyncio.run(dspy.settings.lm.acall(request))

    def request(**config: Any) -> Any:
        messages = [lm15.Message.user([lm15.TextPart("hello")])]
        return lm15.Request(model="test/m", messages=messages, config=lm15.Config(**config))

    ctx.define_many({"temperature": 0.3, "stop": "a", "tokens": 7, "effort": "high"})
    options = {"temperature": "temperature", "stop": "stop", "max_tokens": "tokens"}
    program = ours.bind(Direct(), ctx, **options)
    program(request(temperature=0.0, top_p=0.5))
    found = {(each.temperature, each.stop, each.max_tokens, each.top_p) for each in receiver.configs}
    assert found == {(0.3, ("a",), 7, 0.5)}
    ours.bind(program, ctx, **options, precedence="default")(request(temperature=0.0))
    assert {(each.temperature, each.max_tokens) for each in receiver.configs[3:]} == {(0.0, 7)}
    ours.bind(program, ctx, reasoning_effort="effort")
    with pytest.raises(BoundValueError, match="which cannot be reasoning_effort for test/m: an lm15"):
        program(request())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "text"}, "model chooses among LMs by name: say which, lms={name: lm}"),
        ({"model": "text", "lms": {"a": "openai/gpt-5"}}, "lms must have an LM for each name, not str for 'a'"),
        ({"adapter": "text", "adapters": {"a": 1}}, "adapters must have an adapter for each name, not int for 'a'"),
        ({"temperature": "number", "adapters": {"a": "ours"}}, "adapters= is for the option adapter, which no"),
        ({"adapter": "text"}, "there is no 'warm'; known are 'chat', 'json', 'xml'"),
        ({"demos": "text"}, "which cannot be demos: it must be a list of maps"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str, ctx: Context) -> None:
    ctx.define_many({"text": "warm", "number": 1})
    if options.get("adapters") == {"a": "ours"}:
        options = {**options, "adapters": {"a": dspy.ChatAdapter()}}
    with pytest.raises((BindingError, BoundValueError)) as caught:
        ours.bind(predict(), ctx, **options)
    assert message in str(caught.value)
