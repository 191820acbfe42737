"""Options of DSPy programs that variables set: what an LM really receives. No server, no file, no network."""

import asyncio
import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import cloudpickle
import pytest

from dspex_persist import Context
from dspex_persist.errors import BindingError, BoundValueError, VariableNotFoundError
from tests.late import Late
from tests.receiver import Receiver, lm_on

dspy, lm15 = Late("dspy"), Late("dspy.lm15")
ours = Late("dspex_persist.dspy")

SECRET = "a-value-to-hide"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    with dspy.context(lm=lm_on(receiver)):
        yield receiver


@pytest.fixture
def ctx() -> Iterator[Context]:
    with Context() as ctx:
        ctx.define_many({"temperature": 0.3, "tokens": 111})
        yield ctx


def predict(**config: Any) -> Any:
    return dspy.Predict("question -> answer", **config)


class Interpreter:
    def execute(self, code: str) -> str:
        return "1"

    def start(self) -> None: ...

    def shutdown(self) -> None: ...

    @property
    def tools(self) -> dict[str, Any]:
        return {}


def program_of_thought() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return dspy.ProgramOfThought("question -> answer", interpreter_factory=Interpreter)


def nested() -> Any:
    class Inner(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generate = dspy.ChainOfThought("question -> answer")

        def forward(self, question: str) -> Any:
            return self.generate(question=question)

        async def aforward(self, question: str) -> Any:
            return await self.generate.acall(question=question)

    class Outer(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()
            self.steps = [predict(), {"last": predict()}]

        def forward(self, **inputs: Any) -> Any:
            self.inner(**inputs)
            self.steps[0](**inputs)
            return self.steps[1]["last"](**inputs)

        async def aforward(self, **inputs: Any) -> Any:
            await self.inner.acall(**inputs)
            await self.steps[0].acall(**inputs)
            return await self.steps[1]["last"].acall(**inputs)

    return Outer()


def frozen() -> Any:
    program = nested()
    program.inner._compiled = True
    return program


def direct() -> Any:
    class Direct(dspy.Module):
        def forward(self, question: str) -> Any:
            return dspy.settings.lm(question)

        async def aforward(self, question: str) -> Any:
            return await dspy.settings.lm.acall(question)

    return Direct()


MODULES: dict[str, tuple[Callable[[], Any], int]] = {
    "Predict": (predict, 1),
    "ChainOfThought": (lambda: dspy.ChainOfThought("question -> answer"), 1),
    "ReAct": (lambda: dspy.ReAct("question -> answer", tools=[len]), 2),
    "ProgramOfThought": (program_of_thought, 2),
    "nested": (nested, 3),
    "frozen": (frozen, 3),
    "direct": (direct, 1),
}


@pytest.fixture(params=MODULES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# What reaches the LM


def test_a_variable_reaches_the_lm_from_every_kind_of_module(kind: str, receiver: Receiver, ctx: Context) -> None:
    make, calls = MODULES[kind]
    program = make()
    assert ours.bind(program, ctx, temperature="temperature") is program
    program(question="x")
    ctx["temperature"] = 0.6
    program(question="x")
    assert receiver.temperatures == [0.3] * calls + [0.6] * calls
    ours.unbind(program)
    program(question="x")
    assert set(receiver.temperatures[2 * calls :]) == {None}


def test_a_variable_reaches_the_lm_from_asyncio(kind: str, receiver: Receiver, ctx: Context) -> None:
    make, calls = MODULES[kind]
    program = ours.bind(make(), ctx, temperature="temperature")
    if kind == "ProgramOfThought":
        asyncio.run(dspy.asyncify(program)(question="x"))  # it is synchronous only
    else:
        asyncio.run(program.acall(question="x"))
    assert receiver.temperatures == [0.3] * calls


SAYS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # By what else says a temperature: the options of the LM, of the predictor, of the call.
    "nothing": ({}, {}, {}),
    "the LM": ({"temperature": 0.9}, {}, {}),
    "the predictor": ({}, {"temperature": 0.9}, {}),
    "the call": ({}, {}, {"temperature": 0.9}),
    "all": ({"temperature": 0.7}, {"temperature": 0.8}, {"temperature": 0.9}),
    "the LM, with 0.0": ({"temperature": 0.0}, {}, {}),
    "nothing, of two answers": ({}, {}, {"n": 2}),
    "the call, of two answers": ({}, {}, {"n": 2, "temperature": 0.9}),
}


@pytest.mark.parametrize("value", [0.3, 0.0])
@pytest.mark.parametrize("precedence", ["variable", "default"])
@pytest.mark.parametrize("said", SAYS)
def test_precedence(said: str, precedence: str, value: float, receiver: Receiver, ctx: Context) -> None:
    of_lm, of_predictor, of_call = SAYS[said]
    ctx["temperature"] = value
    program = ours.bind(predict(**of_predictor), ctx, temperature="temperature", precedence=precedence)
    with dspy.context(lm=lm_on(receiver, **of_lm)):
        program(question="x", config=of_call)
        asyncio.run(program.acall(question="x", config=of_call))
    is_said = any("temperature" in each for each in SAYS[said])
    expected = {**of_lm, **of_predictor, **of_call}["temperature"] if is_said and precedence == "default" else value
    assert receiver.temperatures == [expected] * 2 * of_call.get("n", 1)


def test_an_lm_of_the_predictor_or_the_call_is_called_with_the_variable(ctx: Context) -> None:
    receiver = Receiver()
    program = ours.bind(predict(), ctx, temperature="temperature")
    program(question="x", lm=lm_on(receiver, temperature=0.9))
    program.set_lm(lm_on(receiver, temperature=0.9))
    program(question="x")
    assert receiver.temperatures == [0.3, 0.3]


def test_a_dummy_receives_the_variable(ctx: Context) -> None:
    lm = dspy.utils.DummyLM([{"answer": "a"}])
    with dspy.context(lm=lm):
        ours.bind(predict(), ctx, temperature="temperature", max_tokens="tokens")(question="x")
    assert lm.history[-1]["kwargs"] == {"temperature": 0.3, "max_tokens": 111}


@pytest.mark.parametrize("precedence", ["variable", "default"])
def test_reasoning_models_get_max_completion_tokens(precedence: str, ctx: Context) -> None:
    receiver = Receiver()
    lm = lm_on(receiver, "openai/gpt-5-mini")
    ctx["tokens"] = 20_000
    ours.bind(predict(), ctx, max_tokens="tokens", precedence=precedence)(question="x", lm=lm)
    assert lm.history[-1]["kwargs"] == {"max_completion_tokens": 20_000}
    assert receiver.configs[-1].max_tokens == 20_000


def test_several_options(receiver: Receiver, ctx: Context) -> None:
    ctx.define_many({"p": 0.5, "k": 4, "seed": 7, "stop": ["a", "b"], "penalty": 0.25, "n": 2})
    program = ours.bind(
        predict(), ctx, top_p="p", top_k="k", seed="seed", stop="stop", n="n", presence_penalty="penalty"
    )
    assert len(program(question="x").completions) == 2
    config = receiver.configs[-1]
    found = config.top_p, config.top_k, config.seed, config.stop, config.presence_penalty
    assert found == (0.5, 4, 7, ("a", "b"), 0.25)


# Where it applies


def test_per_path(receiver: Receiver, ctx: Context) -> None:
    ctx.define_many({"a": 0.1, "b": 0.2, "c": 0.25})
    per = {"steps[0]": {"temperature": "a"}, "inner": {"temperature": "b", "max_tokens": "tokens"}}
    program = ours.bind(nested(), ctx, temperature="temperature", per=per)
    program(question="x")
    assert receiver.temperatures == [0.2, 0.1, 0.3]
    assert [config.max_tokens for config in receiver.configs] == [111, None, None]
    ours.bind(program, ctx, per={**per, "inner.generate.predict": {"temperature": "c"}})
    program(question="x")
    assert receiver.temperatures[3:] == [0.25, 0.1, None]


@pytest.mark.parametrize("make", [nested, frozen])
def test_the_innermost_binding_wins(make: Callable[[], Any], receiver: Receiver, ctx: Context) -> None:
    ctx.define_many({"a": 0.1, "b": 0.2})
    program = make()
    ours.bind(program, ctx, temperature="temperature", per={"inner.generate.predict": {"temperature": "a"}})
    program(question="x")
    ours.bind(program.inner, ctx, temperature="b")
    program(question="x")
    assert receiver.temperatures == [0.1, 0.3, 0.3, 0.2, 0.3, 0.3]


def test_paths_of_frozen_modules_are_known(receiver: Receiver, ctx: Context) -> None:
    program = frozen()
    assert "inner.generate.predict" not in dict(program.named_predictors())
    ours.bind(program, ctx, per={"inner.generate.predict": {"temperature": "temperature"}})
    program(question="x")
    assert receiver.temperatures == [0.3, None, None]


def test_self_is_the_path_of_a_predictor(receiver: Receiver, ctx: Context) -> None:
    ours.bind(predict(), ctx, per={"self": {"temperature": "temperature"}})(question="x")
    assert receiver.temperatures == [0.3]


def test_an_inner_lm_is_called_as_the_outer_one_says(ctx: Context) -> None:
    receiver = Receiver()
    inner = lm_on(receiver)

    class Router:
        def complete(self, request: Any) -> Any:
            inner("judge this", temperature=1.0)
            return receiver.complete(request)

    router = dspy.LM("test/router", engine=Router(), cache=False)
    ours.bind(predict(), ctx, temperature="temperature")(question="x", lm=router)
    assert receiver.temperatures == [1.0, 0.3]


def test_the_extraction_model_of_an_adapter_has_its_own_options(receiver: Receiver, ctx: Context) -> None:
    other = Receiver()
    adapter = dspy.TwoStepAdapter(lm_on(other, temperature=0.9))
    with dspy.context(adapter=adapter):
        ours.bind(predict(), ctx, temperature="temperature")(question="x")
    assert (receiver.temperatures, other.temperatures) == ([0.3], [0.9])


# Which values


def test_one_call_uses_the_values_of_one_moment(receiver: Receiver, ctx: Context) -> None:
    program = ours.bind(nested(), ctx, temperature="temperature")
    receiver.before = lambda: ctx.update("temperature", lambda value: value + 0.1)
    program(question="x")
    assert receiver.temperatures == [0.3] * 3
    program(question="x")
    assert receiver.temperatures[3:] == pytest.approx([0.6] * 3)


def test_live_reads_at_each_call_of_an_lm(kind: str, receiver: Receiver, ctx: Context) -> None:
    make, calls = MODULES[kind]
    program = ours.bind(make(), ctx, temperature="temperature", live=True)
    receiver.before = lambda: ctx.update("temperature", lambda value: value + 0.1)
    program(question="x")
    assert receiver.temperatures == pytest.approx([0.3 + 0.1 * call for call in range(calls)])
    if kind != "ProgramOfThought":
        asyncio.run(program.acall(question="x"))
        assert receiver.temperatures == pytest.approx([0.3 + 0.1 * call for call in range(2 * calls)])


def test_bindings_inside_are_read_at_the_same_moment(receiver: Receiver, ctx: Context) -> None:
    ctx["other"] = 0.5
    program = nested()
    ours.bind(program, ctx, temperature="temperature")
    ours.bind(program.steps[1]["last"], ctx, temperature="other")
    receiver.before = lambda: ctx.set("other", 0.9)
    program(question="x")
    assert receiver.temperatures == [0.3, 0.3, 0.5]


def test_modules_that_join_a_call_use_what_they_read_first(receiver: Receiver, ctx: Context) -> None:
    class Dynamic(dspy.Module):
        def forward(self, question: str) -> Any:
            made = ours.bind(predict(), ctx, temperature="temperature")
            for _ in range(2):
                made(question=question)
                ctx["temperature"] = 0.9

    ours.bind(Dynamic(), ctx, max_tokens="tokens")(question="x")
    assert receiver.temperatures == [0.3, 0.3]


def test_variables_of_two_sessions(receiver: Receiver, ctx: Context) -> None:
    with Context() as other:
        other["temperature"] = 0.8
        program = ours.bind(nested(), ctx, temperature="temperature")
        ours.bind(program.inner, other, temperature="temperature")
        program(question="x")
    assert receiver.temperatures == [0.8, 0.3, 0.3]


def test_contexts_that_come_and_go_are_not_mixed_up(receiver: Receiver, ctx: Context) -> None:
    class Many(dspy.Module):
        def forward(self) -> None:
            for number in range(1, 10):
                with Context() as other:
                    other["temperature"] = number / 10
                    ours.bind(predict(), other, temperature="temperature")(question="x")

    ours.bind(Many(), ctx, max_tokens="tokens")()
    assert receiver.temperatures == [number / 10 for number in range(1, 10)]


def test_data_of_a_program_is_not_looked_through(receiver: Receiver, ctx: Context) -> None:
    class Searches(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.corpus = Corpus({str(number): "text" for number in range(2_000)})
            self.answer = predict()

        def forward(self, question: str) -> Any:
            return self.answer(question=question)

    ours.bind(Searches(), ctx, temperature="temperature")(question="x")
    assert receiver.temperatures == [0.3]


class Corpus(dict[str, str]):
    def items(self) -> Any:
        raise AssertionError("this may take long")


# Threads and streams


def changing(receiver: Receiver, ctx: Context) -> None:
    """Change the temperature as soon as an LM is called for the first time."""
    receiver.before = lambda: ctx.set("temperature", 0.9)


def test_a_batch_uses_one_snapshot(receiver: Receiver, ctx: Context) -> None:
    changing(receiver, ctx)
    program = ours.bind(dspy.ChainOfThought("question -> answer"), ctx, temperature="temperature")
    examples = [dspy.Example(question=str(number)).with_inputs("question") for number in range(5)]
    program.batch(examples, num_threads=2, disable_progress_bar=True)
    assert receiver.temperatures == [0.3] * 5
    assert threading.get_ident() not in receiver.threads


def test_a_live_batch_does_not(receiver: Receiver, ctx: Context) -> None:
    changing(receiver, ctx)
    program = ours.bind(predict(), ctx, temperature="temperature", live=True)
    examples = [dspy.Example(question=str(number)).with_inputs("question") for number in range(3)]
    program.batch(examples, num_threads=1, disable_progress_bar=True)
    assert receiver.temperatures == [0.3, 0.9, 0.9]


def in_parallel(ask: Callable[[], Any]) -> None:
    dspy.Parallel(num_threads=2, disable_progress_bar=True)([(lambda: ask(), {})] * 3)


def in_threads(ask: Callable[[], Any]) -> None:
    for _ in range(3):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()


def asyncified(ask: Callable[[], Any]) -> None:
    async def run() -> None:
        for _ in range(3):
            await dspy.asyncify(ask)()

    asyncio.run(run())


@pytest.mark.parametrize("started", [in_parallel, in_threads, asyncified])
def test_threads_of_a_program_use_its_snapshot(
    started: Callable[[Callable[[], Any]], None], receiver: Receiver, ctx: Context
) -> None:
    changing(receiver, ctx)
    lm = dspy.settings.lm

    class Threads(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.draft, self.last = predict(), predict()

        def forward(self, question: str) -> None:
            started(lambda: self.draft(question=question, lm=lm))
            self.last(question=question)

    program = ours.bind(Threads(), ctx, temperature="temperature", per={"draft": {"max_tokens": "tokens"}})
    program(question="x")
    assert receiver.temperatures == [0.3] * 4
    assert [config.max_tokens for config in receiver.configs] == [111] * 3 + [None]


def test_concurrent_calls_have_snapshots_of_their_own(receiver: Receiver, ctx: Context) -> None:
    program = ours.bind(nested(), ctx, temperature="temperature")
    lm = dspy.settings.lm
    temperatures = [round(0.1 * number, 1) for number in range(1, 6)]

    async def one(value: float) -> None:
        await ctx.set.aio("temperature", value)
        with dspy.context(lm=lm):
            await program.acall(question="x")

    async def run() -> None:
        await asyncio.gather(*map(one, temperatures))

    asyncio.run(run())
    assert len(receiver.temperatures) == 15
    assert all(receiver.temperatures.count(value) % 3 == 0 for value in temperatures)


def test_a_stream_uses_one_snapshot(receiver: Receiver, ctx: Context) -> None:
    changing(receiver, ctx)
    program = ours.bind(nested(), ctx, temperature="temperature")

    async def run() -> list[Any]:
        return [each async for each in dspy.streamify(program)(question="x")]

    assert [each.answer for each in asyncio.run(run()) if isinstance(each, dspy.Prediction)] == ["42"]
    assert receiver.temperatures == [0.3] * 3


def test_what_goes_on_after_a_call_takes_a_new_snapshot_for_the_next(receiver: Receiver, ctx: Context) -> None:
    program = ours.bind(predict(), ctx, temperature="temperature")
    go_on = threading.Event()
    lm = dspy.settings.lm

    class Starts(dspy.Module):
        def forward(self, question: str) -> threading.Thread:
            program(question=question)
            thread = threading.Thread(target=lambda: (go_on.wait(), program(question=question, lm=lm)))
            thread.start()
            return thread

    thread = ours.bind(Starts(), ctx, max_tokens="tokens")(question="x")
    ctx["temperature"] = 0.9
    go_on.set()
    thread.join()
    assert receiver.temperatures == [0.3, 0.9]


# The module stays what it is


def test_copies_have_the_same_binding(receiver: Receiver, ctx: Context) -> None:
    program = ours.bind(nested(), ctx, temperature="temperature")
    for duplicate in (copy.copy(program), copy.deepcopy(program), program.deepcopy(), program.reset_copy()):
        ctx["temperature"] = temperature = round(ctx["temperature"] + 0.1, 1)
        duplicate(question="x")
        assert receiver.temperatures[-3:] == [temperature] * 3
        ours.unbind(duplicate)
    program(question="x")
    assert receiver.temperatures[-1] == 0.7


def test_names_state_and_pickles_stay(receiver: Receiver, ctx: Context, tmp_path: Any) -> None:
    def facts(program: Any) -> Any:
        names = [name for name, _ in program.named_predictors()], [name for name, _ in program.named_parameters()]
        return names, [name for name, _ in program.named_sub_modules()], program.dump_state(), repr(program)

    program = nested()
    before = facts(program)
    ours.bind(program, ctx, temperature="temperature")
    ours.bind(program.steps[0], ctx, temperature="temperature")
    assert facts(program) == before
    program.save(tmp_path / "state.json")
    program.load(tmp_path / "state.json")
    data = cloudpickle.dumps(program)
    assert ctx.session_id.encode() not in data
    loaded = cloudpickle.loads(data)
    assert facts(loaded) == before
    loaded(question="x")
    assert receiver.temperatures == [None] * 3
    program.save(tmp_path / "program", save_program=True)
    dspy.load(tmp_path / "program", allow_pickle=True)(question="x")
    assert receiver.temperatures == [None] * 6


def test_a_pickle_of_the_settings_inside_a_call_is_possible(receiver: Receiver, ctx: Context) -> None:
    pickles = []

    class Saves(dspy.Module):
        def forward(self) -> None:
            from dspex_persist.cognitive.dspy import snapshots

            pickles.append(cloudpickle.dumps(snapshots.current()))

    ours.bind(Saves(), ctx, temperature="temperature")()
    assert cloudpickle.loads(pickles[0]) is None


def test_compiling_keeps_names_and_bindings(receiver: Receiver, ctx: Context) -> None:
    program = ours.bind(nested(), ctx, temperature="temperature", per={"steps[0]": {"max_tokens": "tokens"}})
    trainset = [dspy.Example(question=str(number), answer="42").with_inputs("question") for number in range(2)]
    optimizer = dspy.BootstrapFewShot(metric=lambda *_: True, max_bootstrapped_demos=1, max_labeled_demos=1)
    compiled = optimizer.compile(program, trainset=trainset)
    assert set(receiver.temperatures) == {0.3}
    assert dict(compiled.named_predictors()).keys() == dict(program.named_predictors()).keys()
    assert compiled.steps[0].demos
    ctx["temperature"] = 0.6
    compiled(question="x")
    assert receiver.temperatures[-3:] == [0.6] * 3
    assert [config.max_tokens for config in receiver.configs[-3:]] == [None, 111, None]


def test_a_module_inside_a_bound_one_may_be_frozen_by_compiling(receiver: Receiver, ctx: Context) -> None:
    trainset = [dspy.Example(question="1", answer="42").with_inputs("question")]
    inner = ours.bind(dspy.ChainOfThought("question -> answer"), ctx, temperature="temperature")
    program = nested()
    program.inner = dspy.LabeledFewShot(k=1).compile(inner, trainset=trainset)
    ours.bind(program, ctx, max_tokens="tokens")
    program(question="x")
    assert receiver.temperatures == [0.3, None, None]
    assert [config.max_tokens for config in receiver.configs] == [111] * 3


def test_binding_twice_replaces(receiver: Receiver, ctx: Context) -> None:
    program = ours.bind(predict(), ctx, temperature="temperature")
    ours.bind(program, ctx, max_tokens="tokens")
    program(question="x")
    assert (receiver.configs[-1].temperature, receiver.configs[-1].max_tokens) == (None, 111)


def test_unbinding_some_options(receiver: Receiver, ctx: Context) -> None:
    per = {"steps[0]": {"temperature": "temperature", "top_p": "temperature"}}
    program = ours.bind(nested(), ctx, temperature="temperature", max_tokens="tokens", per=per)
    ours.unbind(program, "temperature")
    program(question="x")
    assert receiver.temperatures == [None] * 3
    assert [config.top_p for config in receiver.configs] == [None, 0.3, None]
    with pytest.raises(BindingError, match="no variable sets 'top_q': did you mean 'top_p'"):
        ours.unbind(program, "top_q")
    ours.unbind(ours.unbind(program))


def test_bindings_lists_what_variables_set(ctx: Context) -> None:
    program = nested()
    assert ours.bindings(program) == ()
    ours.bind(program, ctx, temperature="temperature", per={"inner": {"max_tokens": "tokens"}})
    ours.bind(program.steps[1]["last"], ctx, top_p="temperature", precedence="default", live=True)
    ours.bind(program.inner, ctx, per={"generate.predict": {"top_p": "temperature"}})
    found = [(each.path, each.option, each.variable, each.precedence, each.live) for each in ours.bindings(program)]
    assert found == [
        ("self", "temperature", "temperature", "variable", False),
        ("inner", "max_tokens", "tokens", "variable", False),
        ("inner.generate.predict", "top_p", "temperature", "variable", False),
        ("steps[1]['last']", "top_p", "temperature", "default", True),
    ]
    assert {each.session_id for each in ours.bindings(program)} == {ctx.session_id}
    shown = repr(vars(program)["_dspex_persist_binding"])
    assert shown == (
        f"<Binding to session {ctx.session_id!r}: temperature='temperature', inner={{'max_tokens': 'tokens'}}>"
    )


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": "temperature"}, "there is no option 'temprature': did you mean 'temperature'?"),
        ({"temperature": 0.3}, "temperature takes the name of a variable, not 0.3"),
        ({"temperature": "text"}, "variable 'text' is 'warm', which cannot be temperature: it must be a number"),
        (
            {"max_tokens": "temperature"},
            "is 0.3, which cannot be max_tokens: it must be a whole number",
        ),
        ({}, "it names no variable"),
        ({"per": ["steps[0]"]}, "per must be a dict, not list: per={path: {option: variable}}"),
        ({"per": {"steps[0]": "temperature"}}, "per must have a dict for 'steps[0]', not str: {option: variable}"),
        ({"model": "text", "lms": ["good"]}, "lms must be a dict of names, not list: lms={name: an LM}"),
        ({"temperature": "temperature", "live": "no"}, "live must be True or False, not 'no'"),
        ({"precedence": "lm", "temperature": "temperature"}, "precedence must be one of variable, default, not 'lm'"),
        (
            {"per": {"steps[0].predict": {"temperature": "temperature"}}},
            "no predictor 'steps[0].predict': did you mean 'steps[0]'?; its predictors are 'inner.generate.predict', "
            "'steps[0]', \"steps[1]['last']\"",
        ),
        (
            {"per": {"steps[0]": {"top_": "temperature"}}},
            "there is no option 'top_' of 'steps[0]': did you mean 'top_p'?",
        ),
    ],
)
def test_a_wrong_binding_is_refused(options: dict[str, Any], message: str, ctx: Context) -> None:
    ctx["text"] = "warm"
    program = nested()
    with pytest.raises((BindingError, BoundValueError)) as caught:
        ours.bind(program, ctx, **options)
    assert message in str(caught.value)
    assert "_dspex_persist_binding" not in vars(program)


def test_a_variable_that_is_missing_is_named(ctx: Context, receiver: Receiver) -> None:
    with pytest.raises(VariableNotFoundError, match=r"temprature.*did you mean 'temperature'"):
        ours.bind(predict(), ctx, temperature="temprature")
    program = ours.bind(predict(), ctx, temperature="temperature")
    del ctx["temperature"]
    with pytest.raises(VariableNotFoundError, match="temperature"):
        program(question="x")
    assert receiver.configs == []


def test_what_is_not_a_module_or_a_context_is_refused(ctx: Context) -> None:
    with pytest.raises(BindingError, match="not a DSPy module, but function"):
        ours.bind(predict, ctx, temperature="temperature")
    for module, what in ((3, "int"), (dspy.Predict, "the class Predict"), (dspy.LM("m"), "LM")):
        for look in (ours.bindings, ours.unbind, ours.sync_dspy_parameters):
            with pytest.raises(BindingError, match=f"not a DSPy module, but {what}$"):
                look(module)
    with pytest.raises(BindingError, match="context must be a context, not dict"):
        ours.sync_dspy_parameters(predict(), "", {})
    with pytest.raises(BindingError, match="ctx must be a context, not dict"):
        ours.bind(predict(), {}, temperature="temperature")


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    ("option", "good", "bad"), [("temperature", 0.5, SECRET), ("model", "good", SECRET), ("tools", ["find"], [SECRET])]
)
def test_errors_do_not_show_values_of_sensitive_variables(
    option: str, good: Any, bad: Any, live: bool, receiver: Receiver, ctx: Context
) -> None:
    def find() -> None:
        """Find it."""

    ctx.define("hidden", good, metadata={"sensitive": "True"})
    agent = dspy.ReAct("question -> answer", tools=[find])
    lms = {"lms": {"good": lm_on(receiver)}} if option == "model" else {}
    program = ours.bind(agent, ctx, live=live, **{option: "hidden"}, **lms)
    del ctx["hidden"]
    ctx.define("hidden", bad, metadata={"sensitive": "True"})
    for attempt in (
        lambda: program(question="x"),
        lambda: asyncio.run(program.acall(question="x")),
        lambda: ours.bind(agent.deepcopy(), ctx, **{option: "hidden"}, **lms),
    ):
        with pytest.raises(BoundValueError, match="variable 'hidden' is '•••', which cannot be") as caught:
            attempt()
        assert SECRET not in repr(caught.value) + str(caught.value)


def test_notes_of_errors_do_not_show_values_of_sensitive_variables(receiver: Receiver, ctx: Context) -> None:
    ctx.define("hidden", SECRET, metadata={"sensitive": "true"})
    program = ours.bind(predict(), ctx, stop="hidden", temperature="temperature")
    for error, shown in (
        (lm15.LM15Error("down"), "stop=••• (variable 'hidden'), temperature=0.3"),
        (
            lm15.InvalidRequestError(f"stop must not be {SECRET}"),
            "variable 'hidden' is '•••', which cannot be stop for",
        ),
    ):
        receiver.before = Mock(side_effect=error)
        with pytest.raises(dspy.utils.exceptions.LMError) as caught:
            program(question="x")
        said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
        assert shown in said
        assert SECRET not in said
