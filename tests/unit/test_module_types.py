"""Programs whose module type is a variable: which type a call uses, and what becomes of the state of predictors."""

import asyncio
import copy
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from dspex_persist import Context
from dspex_persist.errors import (
    BindingError,
    BoundValueError,
    InvalidArgumentError,
    VariableNotFoundError,
)
from dspex_persist.state.abilities import Recordable
from tests.deadline import within
from tests.late import Late
from tests.receiver import Receiver, lm_on

dspy, ours = Late("dspy"), Late("dspex_persist.dspy")
SIGNATURE = "question -> answer"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    with dspy.context(lm=lm_on(receiver)):
        yield receiver


@pytest.fixture
def ctx() -> Iterator[Context]:
    with Context() as ctx:
        ctx.define("strategy", "Predict", type_name="module")
        ctx.define_many({"temperature": 0.3, "creativity": 0.8})
        yield ctx


def search(query: str) -> str:
    """Look something up."""
    return query


@pytest.fixture
def resolver(ctx: Context) -> Any:
    resolver = ours.ModuleVariableResolver(ctx)
    resolver.register_module("ReAct", dspy.ReAct, tools=[search], max_iters=2)
    return resolver


@pytest.fixture
def program(resolver: Any) -> Any:
    return resolver.create_module("strategy", SIGNATURE)


def types(receiver: Receiver) -> list[str]:
    """By request, the type of the module that made it."""
    found = []
    for text in receiver.texts:
        marks = {"next_tool_name ## ]]": "ReAct", "trajectory ## ]]": "extract", "reasoning ## ]]": "ChainOfThought"}
        found.append(next((name for mark, name in marks.items() if mark in text), "Predict"))
    return found


def paths(program: Any) -> list[str]:
    return [path for path, _ in program.named_predictors()]


def run_async(program: Any) -> None:
    asyncio.run(program.acall(question="x"))


def run_batch(program: Any) -> None:
    program.batch([dspy.Example(question="x").with_inputs("question")], num_threads=2, disable_progress_bar=True)


def run_parallel(program: Any) -> None:
    dspy.Parallel(num_threads=2, disable_progress_bar=True)([(program, {"question": "x"})])


def run_asyncified(program: Any) -> None:
    asyncio.run(dspy.asyncify(program)(question="x"))


def run_streamed(program: Any) -> None:
    async def run() -> None:
        async for _ in dspy.streamify(program)(question="x"):
            pass

    asyncio.run(run())


# Which type a call uses


@pytest.mark.parametrize(
    "call", [lambda each: each(question="x"), run_async, run_batch, run_parallel, run_asyncified, run_streamed]
)
def test_calls_use_the_type_that_the_variable_has(
    call: Callable[[Any], None], program: Any, ctx: Context, receiver: Receiver
) -> None:
    expected = []
    for name, used in (
        ("Predict", ["Predict"]),
        ("dspy.ChainOfThought", ["ChainOfThought"]),
        ("ReAct", ["ReAct", "extract"]),
        ("Predict", ["Predict"]),
    ):
        ctx["strategy"] = name
        call(program)
        expected += used
        assert program.module_type == name.removeprefix("dspy.")
    assert types(receiver) == expected
    assert paths(program) == ["module"]


def test_one_call_uses_one_type_whoever_changes_it_meanwhile(program: Any, ctx: Context, receiver: Receiver) -> None:
    class Twice(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.answer = program

        def forward(self, question: str) -> Any:
            self.answer(question=question)
            ctx["strategy"] = "ReAct"
            return self.answer(question=question)

    twice = ours.bind(Twice(), ctx, module_type="strategy")
    twice(question="x")
    twice(question="x")
    assert types(receiver) == ["Predict", "Predict", "ReAct", "extract", "ReAct", "extract"]


def test_calls_at_the_same_time_do_not_see_each_others_types(program: Any, ctx: Context, receiver: Receiver) -> None:
    """A call that began earlier changes nothing back."""
    started, changed = threading.Event(), threading.Event()

    class Waits(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.answer = program

        def forward(self, question: str) -> Any:
            started.set()
            assert changed.wait(within(20))
            return self.answer(question=question)

    lm = dspy.settings.lm

    def run() -> None:
        with dspy.context(lm=lm):
            ours.bind(Waits(), ctx, module_type="strategy")(question="old")

    ours.unbind(program)
    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(within(20))
    ctx["strategy"] = "ChainOfThought"
    ours.bind(program, ctx, module_type="strategy")
    program(question="new")
    ours.unbind(program)
    changed.set()
    thread.join()
    assert types(receiver) == ["ChainOfThought", "Predict"]
    assert program.module_type == "ChainOfThought"
    assert program.type_change.after == "ChainOfThought"


def test_many_threads(program: Any, ctx: Context) -> None:
    lm, failed = lm_on(Receiver()), []

    def run() -> None:
        try:
            with dspy.context(lm=lm):
                for _ in range(10):
                    program(question="x")
        except Exception as error:  # noqa: BLE001 -- shown below
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(10):
        ctx["strategy"] = ("ChainOfThought", "Predict")[number % 2]
    for thread in threads:
        thread.join()
    assert not failed
    with dspy.context(lm=lm):
        program(question="x")
    assert program.module_type == "Predict"


def test_a_type_that_a_transaction_writes_is_its_own(program: Any, ctx: Context, receiver: Receiver) -> None:
    program.module.config = {"temperature": 0.4}

    def try_out() -> None:
        with ctx.transaction() as tx:
            tx["strategy"] = "ChainOfThought"
            program(question="x")
            program.module.config = {"temperature": 0.6}
            program(question="x")
            assert program.module_type == "Predict"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        try_out()
    program(question="x")
    assert types(receiver) == ["ChainOfThought", "ChainOfThought", "Predict"]
    assert receiver.temperatures == [0.4, 0.6, 0.6]
    with ctx.transaction() as tx:
        tx["strategy"] = "ReAct"
        resolver = ours.ModuleVariableResolver(tx, {"ReAct": lambda signature: dspy.ReAct(signature, tools=[])})
        assert resolver.create_module("strategy", SIGNATURE).module_type == "ReAct"


def test_read_for_each_call_of_an_lm(program: Any, ctx: Context, receiver: Receiver) -> None:
    ours.bind(program, ctx, live=True)
    program(question="x")
    ctx["strategy"] = "ChainOfThought"
    program(question="x")
    assert types(receiver) == ["Predict", "ChainOfThought"]


# Binding


def test_other_options_are_bound_besides(program: Any, ctx: Context, receiver: Receiver) -> None:
    assert ours.bind(program, ctx, temperature="temperature") is program
    program(question="x")
    ctx["strategy"] = "ChainOfThought"
    program(question="x")
    assert types(receiver) == ["Predict", "ChainOfThought"]
    assert receiver.temperatures == [0.3, 0.3]
    assert [each.option for each in ours.bindings(program)] == ["temperature", "module_type"]
    ours.unbind(program, "temperature")
    ctx["strategy"] = "Predict"
    program(question="x")
    ours.unbind(program)
    ctx["strategy"] = "ReAct"
    program(question="x")
    assert types(receiver)[2:] == ["Predict", "Predict"]
    ours.bind(program, ctx, module_type="strategy")(question="x")
    assert program.module_type == "ReAct"


def test_paths_lead_into_the_module_of_the_present_type(
    program: Any, ctx: Context, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    ctx["strategy"] = "ReAct"
    program(question="x")
    ours.bind(program, ctx, temperature="temperature", per={"module.extract": {"temperature": "creativity"}})
    program(question="x")
    ctx["strategy"] = "ChainOfThought"
    program(question="x")
    assert "variables set options of 'module.extract', which is not there now" in caplog.text
    ctx["strategy"] = "ReAct"
    program(question="x")
    assert receiver.temperatures[2:] == [0.3, 0.8, 0.3, 0.3, 0.8]


def test_modules_of_one_program_follow_variables_of_their_own(resolver: Any, ctx: Context, receiver: Receiver) -> None:
    class Two(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = resolver.create_module("strategy", SIGNATURE)
            self.second = resolver.create_module("strategy", SIGNATURE)

        def forward(self, question: str) -> Any:
            return self.second(question=self.first(question=question).answer)

    ctx["other"] = "ChainOfThought"
    two = ours.bind(Two(), ctx, per={"second": {"module_type": "other"}})
    # A binding inside counts more.
    two(question="x")
    ours.unbind(two.second)
    two(question="x")
    ctx["other"] = "dspy.Predict"
    ctx["strategy"] = "ChainOfThought"
    two(question="x")
    assert types(receiver) == ["Predict", "Predict", "Predict", "ChainOfThought", "ChainOfThought", "Predict"]
    ctx["other"] = "Predicting"
    with pytest.raises(BoundValueError, match="did you mean 'Predict'"):
        ours.bind(Two(), ctx, per={"second": {"module_type": "other"}})


def test_a_copy_follows_the_variable_of_another_session(program: Any, ctx: Context, receiver: Receiver) -> None:
    with Context() as other:
        other["strategy"] = "ChainOfThought"
        bound = ours.bind(copy.copy(program), other, module_type="strategy")
        bound(question="x")
        program(question="x")
    assert types(receiver) == ["ChainOfThought", "Predict"]
    assert (program.module_type, bound.module_type) == ("Predict", "ChainOfThought")


def test_what_a_call_used_is_recorded(program: Any, ctx: Context, receiver: Receiver) -> None:
    with ctx.recording():
        ctx["strategy"] = "ChainOfThought"
        program(question="x")
    _, commits = Recordable.of(ctx._backend.provider).record(ctx.session_id)
    (call,) = [
        call for each in commits for event in each.events for call in event.body.get("recorded", {}).get("lm", ())
    ]
    assert (call["predictor"], call["variables"]) == ("module.predict", {"strategy": 1})


# State


def tune(predict: Any) -> None:
    predict.signature = predict.signature.with_instructions("Be brief.").with_updated_fields("answer", desc="one word")
    predict.demos = [dspy.Example(question="q", answer="a")]
    predict.config = {"temperature": 0.4}


def test_state_is_carried_over_where_predictors_match(
    program: Any, ctx: Context, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    tune(program.module)
    other = Receiver()
    program.set_lm(lm_on(other))
    ctx["strategy"] = "ChainOfThought"
    with caplog.at_level(logging.INFO, "dspex_persist"):
        program(question="x")
    predict = program.module.predict
    assert predict.signature.instructions == "Be brief."
    assert predict.signature.fields["answer"].json_schema_extra["desc"] == "one word"
    assert list(predict.signature.fields) == ["question", "reasoning", "answer"]
    assert [demo.answer for demo in predict.demos] == ["a"]
    assert other.temperatures == [0.4]
    assert not receiver.requests
    change = program.type_change
    assert change
    assert str(change).splitlines() == [
        "the module type has changed from 'Predict' to 'ChainOfThought' (strategy)",
        "- instructions, descriptions of fields, 1 demo, configuration, LM of 'self', which is 'predict' now",
        "- note: demos of 'predict' have no 'reasoning'",
    ]
    assert "demos of 'predict' have no 'reasoning'" in caplog.text


def test_what_is_not_carried_over_is_said(
    program: Any, ctx: Context, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    tune(program.module)
    own = lm_on(receiver)
    program.set_lm(own)
    ctx["strategy"] = "ReAct"
    program(question="x")
    assert program.type_change.left == (
        "instructions, descriptions of fields, 1 demo, configuration of 'self': there is no such predictor, only "
        "'react', 'extract.predict'",
    )
    assert not program.type_change
    assert f"this was not carried over: {program.type_change.left[0]}" in caplog.text
    assert program.get_lm() is own
    assert "Be brief." not in receiver.texts[0]


def test_nothing_is_said_if_there_is_nothing_to_say(
    program: Any, ctx: Context, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("ReAct", "ChainOfThought", "Predict", "ReAct"):
        ctx["strategy"] = name
        program(question="x")
        assert program.type_change
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]
    # New ones have the instructions of their type.
    assert "the tool must be one of" in receiver.texts[-2]
    assert "search" in receiver.texts[-2]


def test_each_type_keeps_its_state_and_what_was_changed_last_counts(
    program: Any, ctx: Context, receiver: Receiver
) -> None:
    def switch(name: str) -> Any:
        ctx["strategy"] = name
        program(question="x")
        return dict(dspy.Module.named_predictors(program))

    tune(program.module)
    switch("ReAct")["module.react"].config = {"temperature": 0.9}
    # As it was, though nothing of it went through the ReAct.
    assert switch("Predict")["module"].config == {"temperature": 0.4}
    assert switch("ReAct")["module.react"].config == {"temperature": 0.9}
    assert switch("ChainOfThought")["module.predict"].config == {}
    assert "configuration of 'react'" in program.type_change.left[0]
    # Nothing was changed here: the state of the other type stays.
    assert switch("Predict")["module"].config == {"temperature": 0.4}
    assert switch("ChainOfThought")["module.predict"].config == {}
    program.module.predict.config = {"temperature": 0.5}
    before = program.module
    assert switch("Predict")["module"].config == {"temperature": 0.5}
    assert program.module.demos == []
    assert program.type_change.carried == ("configuration of 'predict', which is 'self' now",)
    assert switch("ChainOfThought")["module.predict"] is before.predict
    program.module.predict.demos = [dspy.Example(question="q", answer="b", reasoning="r")]
    assert [demo.answer for demo in switch("Predict")["module"].demos] == ["b"]


def test_demos_that_cannot_be_compared_are_carried_over(program: Any, ctx: Context, receiver: Receiver) -> None:
    class Array:
        def __eq__(self, other: object) -> bool:
            raise ValueError("ambiguous")

        __hash__ = None  # type: ignore[assignment]

    for name in ("ChainOfThought", "Predict", "ChainOfThought"):
        program.predictors()[0].demos = [dspy.Example(question="q", answer=name, note=Array())]
        ctx["strategy"] = name
        program(question="x")
    assert [demo.answer for demo in program.module.predict.demos] == ["ChainOfThought"]


def test_a_custom_type_with_the_same_names(program: Any, resolver: Any, ctx: Context, receiver: Receiver) -> None:
    class Draft(dspy.Module):
        def __init__(self, signature: Any) -> None:
            super().__init__()
            self.predict = dspy.Predict(signature)
            self.check = dspy.Predict("question, answer -> reasoning")

        def forward(self, question: str) -> Any:
            answer = self.predict(question=question).answer
            return self.check(question=question, answer=answer)

    resolver.register_module("Draft", Draft)
    assert resolver.modules == ("Predict", "ChainOfThought", "ProgramOfThought", "ReAct", "Draft")
    ctx["strategy"] = "ChainOfThought"
    program(question="x")
    tune(program.module.predict)
    ctx["strategy"] = "Draft"
    program(question="x")
    assert program.type_change
    assert program.module.predict.signature.instructions == "Be brief."
    assert program.module.check.demos == []


# DSPy


def test_copies_and_pickles(program: Any, ctx: Context, receiver: Receiver, tmp_path: Path) -> None:
    tune(program.module)
    ctx["strategy"] = "ChainOfThought"
    program(question="x")
    copied = program.deepcopy()
    ctx["strategy"] = "Predict"
    copied(question="x")
    assert copied.module.config == {"temperature": 0.4}
    assert copied.module is not program.module
    assert (copied.module_type, program.module_type) == ("Predict", "ChainOfThought")
    program.save(tmp_path / "state.json")
    again = cloudpickle.loads(cloudpickle.dumps(program))
    again.load(tmp_path / "state.json")
    again(question="x")
    assert again.module_type == "ChainOfThought"
    assert list(program.dump_state()) == ["module.predict"]


def test_compiling(program: Any, ctx: Context, receiver: Receiver) -> None:
    ctx["strategy"] = "ChainOfThought"
    examples = [dspy.Example(question=str(number), answer="42").with_inputs("question") for number in range(2)]
    program(question="x")
    optimizer = dspy.BootstrapFewShot(metric=lambda *_: True, max_bootstrapped_demos=1, max_labeled_demos=0)
    compiled = optimizer.compile(program, trainset=examples)
    assert [demo.reasoning for demo in compiled.module.predict.demos] == ["so"]
    assert not program.module.predict.demos
    ctx["strategy"] = "Predict"
    compiled(question="x")
    assert [demo.answer for demo in compiled.module.demos] == ["42"]


# Programs that are kept


def test_keeping_one_and_loading_it_when_the_variable_has_another_type(
    program: Any, resolver: Any, ctx: Context, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    ctx["strategy"] = "ChainOfThought"
    program(question="x")
    tune(program.module.predict)
    ours.bind(program, ctx, top_p="creativity", per={"module.predict": {"temperature": "temperature"}})
    ctx.programs.save("qa", program)
    ctx["strategy"] = "ReAct"
    into = resolver.create_module("strategy", SIGNATURE)
    assert ctx.programs.check("qa", into)
    assert into.module_type == "ReAct"
    ctx["strategy"] = "Predict"
    receiver.requests.clear()
    loaded = ctx.programs.load("qa", lambda: resolver.create_module("strategy", SIGNATURE))
    assert not caplog.records
    assert loaded.module_type == "ChainOfThought"
    assert set(ours.bindings(loaded)) == set(ours.bindings(program))
    loaded(question="x")
    assert types(receiver) == ["Predict"]
    assert "Be brief." in receiver.texts[0]
    ctx["strategy"] = "ChainOfThought"
    loaded(question="x")
    assert receiver.temperatures == [0.4, 0.3]
    assert (
        ctx.programs.call("qa", lambda: resolver.create_module("strategy", SIGNATURE), question="x").reasoning == "so"
    )


def test_loading_where_the_type_is_not_registered(program: Any, ctx: Context, receiver: Receiver) -> None:
    ctx["strategy"] = "ReAct"
    program(question="x")
    ctx.programs.save("qa", program)
    ctx["strategy"] = "Predict"
    resolver = ours.ModuleVariableResolver(ctx)
    with pytest.raises(
        ours.ProgramMismatchError, match=r"the program was a dspy\.ReAct, and no module type that is regist"
    ):
        ctx.programs.load("qa", lambda: resolver.create_module("strategy", SIGNATURE))


def test_one_inside_a_program_that_is_kept(resolver: Any, ctx: Context, receiver: Receiver) -> None:
    class Whole(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.answer = resolver.create_module("strategy", SIGNATURE)

        def forward(self, question: str) -> Any:
            return self.answer(question=question)

    whole = Whole()
    tune(whole.answer.module)
    ctx.programs.save("whole", whole)
    ctx["strategy"] = "ChainOfThought"
    loaded = ctx.programs.load("whole", Whole)
    loaded(question="x")
    assert loaded.answer.module_type == "ChainOfThought"
    assert loaded.answer.module.predict.config == {"temperature": 0.4}


# The resolver


def test_resolving(resolver: Any, ctx: Context) -> None:
    assert resolver.resolve("strategy") is dspy.Predict
    ctx["strategy"] = "ReAct"
    assert "search" in resolver.resolve("strategy")(SIGNATURE).tools
    ctx["plain"] = "ProgramOfThought"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert isinstance(resolver.create_module("plain", SIGNATURE).module, dspy.ProgramOfThought)


def test_the_types_of_a_signature_are_those_of_the_caller(resolver: Any, ctx: Context, receiver: Receiver) -> None:
    class Verdict(Enum):
        YES = "yes"

    program = resolver.create_module("strategy", "question -> answer: Verdict")
    ctx["strategy"] = "ReAct"
    assert program.signature.output_fields["answer"].annotation is Verdict


def test_what_is_refused(program: Any, resolver: Any, ctx: Context, receiver: Receiver) -> None:
    ctx["strategy"] = "ChainOfThougt"
    for refused in (lambda: program(question="x"), lambda: resolver.create_module("strategy", SIGNATURE)):
        with pytest.raises(BoundValueError, match=r"'ChainOfThougt', .*known are 'Predict', .*mean 'ChainOfThought'"):
            refused()
    ctx["strategy"] = "os.path"
    with pytest.raises(BoundValueError, match=r"there is no 'os.path'; .*; register_module adds others"):
        run_async(program)
    ctx["strategy"] = "Predict"
    program(question="x")
    assert types(receiver) == ["Predict"]
    with pytest.raises(BoundValueError, match="it must be a text"):
        resolver.resolve("temperature")
    with pytest.raises(VariableNotFoundError, match="did you mean 'strategy'"):
        resolver.create_module("strateg", SIGNATURE)
    with pytest.raises(InvalidArgumentError, match="it must be a class, or a function that makes a module, not a str"):
        resolver.register_module("Mine", "mine.Module")
    with pytest.raises(InvalidArgumentError, match="invalid name"):
        resolver.register_module("", dspy.Predict)
    resolver.register_module("Wrong", lambda _: 1)
    ctx["strategy"] = "Wrong"
    with pytest.raises(InvalidArgumentError, match=r"'Wrong' made a int, not a dspy\.Module"):
        program(question="x")
    same = dspy.Predict(SIGNATURE)
    resolver.register_module("Same", lambda _: same)
    ctx["strategy"] = "Same"
    program(question="x")
    with pytest.raises(InvalidArgumentError, match="'Same' has made the same module before"):
        resolver.create_module("strategy", SIGNATURE)
    with pytest.raises(BindingError, match=r"module_type is an option of a module made by .*create_module, which the"):
        ours.bind(dspy.Predict(SIGNATURE), ctx, module_type="strategy")
    with pytest.raises(BindingError, match="context must be a context, not str"):
        ours.ModuleVariableResolver("session")


def test_a_type_that_lacks_arguments_says_how_to_pass_them(resolver: Any, ctx: Context) -> None:
    resolver.register_module("Lacking", dspy.ReAct)
    ctx["strategy"] = "Lacking"
    with pytest.raises(InvalidArgumentError, match=r"'Lacking' made no module .*tools.*register_module\('Lacking', "):
        resolver.create_module("strategy", SIGNATURE)
