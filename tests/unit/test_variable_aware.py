"""The modules and functions that have the names of DSPex: what an LM receives, and what stays as it is in DSPy."""

import asyncio
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from dspex_persist import Context
from dspex_persist.errors import BindingError, BoundValueError, VariableNotFoundError
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
        ctx.define_many({"temperature": 0.3, "max_tokens": 111, "reasoning_temperature": 0.5, "creativity": 0.8})
        ctx.define_many({"react_temperature": 0.6, "max_react_iterations": 2, "available_tools": ["search"]})
        ctx.define_many({"pot_temperature": 0.4, "pot_max_tokens": 222})
        yield ctx


class Interpreter:
    def __init__(self) -> None:
        self.tools: dict[str, Any] = {}

    def execute(self, code: str) -> str:
        return "1"

    def start(self) -> None: ...

    def shutdown(self) -> None: ...


def search(query: str) -> str:
    """Look something up."""
    return query


def delete(query: str) -> str:
    """Remove something."""
    return query


def made(name: str, ctx: Context | None, **more: Any) -> Any:
    options: dict[str, Any] = {
        "ReAct": {"tools": [search, delete]},
        "ProgramOfThought": {"interpreter_factory": Interpreter},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        kind = getattr(ours, f"VariableAware{name}")
        return kind(SIGNATURE, session_context=ctx, **{**options.get(name, {}), **more})


NAMES = ("Predict", "ChainOfThought", "ReAct", "ProgramOfThought")
COMMON: dict[str, dict[str, str]] = {
    "Predict": {"temperature": "temperature", "max_tokens": "max_tokens"},
    "ChainOfThought": {"temperature": "reasoning_temperature"},
    "ReAct": {
        "temperature": "react_temperature",
        "max_iters": "max_react_iterations",
        "tools": "available_tools",
    },
    "ProgramOfThought": {"temperature": "pot_temperature", "max_tokens": "pot_max_tokens"},
}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_common_is_bound_as_far_as_it_is_there(name: str, ctx: Context, receiver: Receiver) -> None:
    module = made(name, ctx)
    assert module.get_bindings() == COMMON[name]
    assert module.session_context is ctx
    assert module.sync_variables() == {option: ctx[variable] for option, variable in COMMON[name].items()}
    module(question="x")
    assert set(receiver.temperatures) == {ctx[COMMON[name]["temperature"]]}
    ctx[COMMON[name]["temperature"]] = 0.9
    receiver.requests.clear()
    asyncio.run(module.acall(question="x") if name != "ProgramOfThought" else asyncio.to_thread(module, question="x"))
    assert set(receiver.temperatures) == {0.9}


@pytest.mark.parametrize("name", NAMES)
def test_it_is_one_of_dspys_modules(name: str, ctx: Context) -> None:
    module, plain = made(name, ctx), made(name, None)
    assert isinstance(module, getattr(dspy, name))
    assert [path for path, _ in module.named_predictors()] == [path for path, _ in plain.named_predictors()]
    state = plain.dump_state()
    assert module.dump_state().keys() == state.keys()
    copied = module.deepcopy()
    assert type(copied) is type(module)
    assert copied.get_bindings() == module.get_bindings()
    assert copied.session_context is ctx
    copied.bind_variable("temperature", "creativity")
    assert module.get_bindings() == COMMON[name]
    assert made(name, ctx, auto_bind_common=False).get_bindings() == {}


def test_all_variables_of_the_old_maps(ctx: Context) -> None:
    common = ("temperature", "max_tokens", "top_p", "frequency_penalty", "presence_penalty")
    maps = [getattr(ours, f"VariableAware{name}").COMMON for name in NAMES]
    assert maps == [
        {option: option for option in common},
        {option: f"reasoning_{option}" for option in common},
        {**COMMON["ReAct"], "max_tokens": "react_max_tokens"},
        COMMON["ProgramOfThought"],
    ]


def test_available_tools_and_iterations_reach_the_agent(ctx: Context, receiver: Receiver) -> None:
    receiver.fields.update(next_tool_name="search", next_tool_args='{"query": "x"}')
    made("ReAct", ctx)(question="x")
    assert len(receiver.requests) == 3
    assert "(1) search" in receiver.texts[0]
    assert "delete" not in receiver.texts[0]


# Binding one by one


def test_binding_and_unbinding_variables(ctx: Context, receiver: Receiver) -> None:
    module = made("Predict", ctx, auto_bind_common=False)
    module.bind_variable("temperature", "creativity")
    module.bind_variable("max_tokens", "max_tokens")
    module(question="x")
    module.unbind_variable("temperature")
    module(question="x")
    module.unbind_variable("max_tokens")
    module(question="x")
    assert receiver.temperatures == [0.8, None, None]
    assert [each.max_tokens for each in receiver.configs] == [111, 111, None]
    assert module.get_bindings() == module.sync_variables() == {}
    # The context is known nevertheless.
    module.bind_variable("temperature", "temperature")
    assert module.get_bindings() == {"temperature": "temperature"}


def test_a_path_before_the_option(ctx: Context, receiver: Receiver) -> None:
    module = made("ReAct", ctx)
    module.bind_variable("extract.predict.temperature", "creativity")
    assert module.get_bindings() == {**COMMON["ReAct"], "extract.predict.temperature": "creativity"}
    assert module.sync_variables()["extract.predict.temperature"] == 0.8
    module(question="x")
    assert receiver.temperatures == [0.6, 0.8]
    module.unbind_variable("temperature")
    module(question="x")
    assert receiver.temperatures[2:] == [None, 0.8]


def test_what_a_binding_says_besides_stays(ctx: Context, receiver: Receiver) -> None:
    ctx["model"] = "good"
    module = made("Predict", ctx, auto_bind_common=False, temperature=0.1)
    good = lm_on(receiver, "test/good", temperature=0.2)
    module.bind_variable("model", "model", lms={"good": good}, precedence="default", live=True)
    module.bind_variable("temperature", "temperature")
    binding = vars(module)["_dspex_persist_binding"]
    assert (binding.is_default, binding.live, binding.lms) == (True, True, {"good": good})
    module(question="x")
    assert receiver.temperatures == [0.1]
    module.bind_variable("max_tokens", "max_tokens", precedence="variable")
    module(question="x")
    assert receiver.temperatures == [0.1, 0.3]


def test_bind_and_the_methods_are_the_same(ctx: Context) -> None:
    with Context() as other:
        other["temperature"] = 0.1
        module = ours.bind(made("Predict", ctx), other, temperature="temperature")
        assert module.get_bindings() == {"temperature": "temperature"}
        assert module.session_context is other
        assert module.sync_variables() == {"temperature": 0.1}
        ours.unbind(module)
        assert module.session_context is ctx


def test_without_a_context(receiver: Receiver) -> None:
    module = made("Predict", None)
    assert (module.get_bindings(), module.sync_variables(), module.session_context) == ({}, {}, None)
    module(question="x")
    with pytest.raises(BindingError, match=r"the module has no context: make it with session_context="):
        module.bind_variable("temperature", "temperature")


def test_reading_in_a_transaction_is_part_of_it(ctx: Context) -> None:
    module = made("Predict", ctx)
    with ctx.transaction() as tx:
        tx["temperature"] = 0.7
        assert module.sync_variables()["temperature"] == 0.7


# What is refused


def test_what_is_refused(ctx: Context) -> None:
    module = made("Predict", ctx)
    for attr, error in (
        ("temprature", "there is no option 'temprature': did you mean 'temperature'"),
        ("max_iterations", "there is no option 'max_iterations': did you mean 'max_iters'"),
        ("live", "there is no option 'live'"),
        ("per", "there is no option 'per'"),
        ("extract.temperature", "the program has no predictor 'extract'"),
    ):
        with pytest.raises(BindingError, match=error):
            module.bind_variable(attr, "temperature")
    with pytest.raises(VariableNotFoundError, match="creativity"):
        module.bind_variable("temperature", "creativty")
    with pytest.raises(BindingError, match=r"no variable sets 'max_token': did you mean 'max_tokens'"):
        module.unbind_variable("max_token")
    with pytest.raises(BindingError, match="session_context must be a context, not str"):
        made("Predict", "session")  # type: ignore[arg-type]
    assert module.get_bindings() == COMMON["Predict"]
    ctx["creativity"] = 3.0
    module.bind_variable("top_k", "max_tokens")
    ctx["top_p"] = "high"
    with pytest.raises(BoundValueError, match="'top_p' is 'high'"):
        made("Predict", ctx)


def test_values_are_checked_when_they_are_synchronized(ctx: Context) -> None:
    module = made("ReAct", ctx)
    ctx["available_tools"] = ["serch"]
    with pytest.raises(BoundValueError, match="did you mean 'search'"):
        module.sync_variables()


# State


def test_saving_and_loading_as_in_dspy(ctx: Context, tmp_path: Path, receiver: Receiver) -> None:
    module = made("ChainOfThought", ctx)
    module.predict.demos = [{"question": "q", "answer": "a", "reasoning": "r"}]
    module.save(tmp_path / "state.json")
    assert "reasoning_temperature" not in (tmp_path / "state.json").read_text()
    loaded = made("ChainOfThought", ctx)
    loaded.load(tmp_path / "state.json")
    assert loaded.predict.demos == module.predict.demos
    plain = dspy.ChainOfThought(SIGNATURE)
    plain.load(tmp_path / "state.json")
    again = cloudpickle.loads(cloudpickle.dumps(module))
    assert (again.get_bindings(), again.session_context) == ({}, None)
    again(question="x")
    assert receiver.temperatures == [None]


def test_compiling(ctx: Context) -> None:
    examples = [dspy.Example(question=str(number), answer="42").with_inputs("question") for number in range(2)]
    module = made("ChainOfThought", ctx)
    with dspy.context(lm=lm_on(Receiver())):
        optimizer = dspy.BootstrapFewShot(metric=lambda *_: True, max_bootstrapped_demos=1, max_labeled_demos=0)
        compiled = optimizer.compile(module, trainset=examples)
    assert len(compiled.predict.demos) == 1
    assert compiled.get_bindings() == COMMON["ChainOfThought"]
    compiled.bind_variable("temperature", "creativity")
    assert compiled.sync_variables() == {"temperature": 0.8}


def test_keeping_it_in_a_session(ctx: Context, receiver: Receiver) -> None:
    module = made("ReAct", ctx)
    module.bind_variable("extract.predict.temperature", "creativity")
    ctx.programs.save("agent", module)
    other = made("ReAct", None)
    assert not ctx.programs.check("agent", other).notes
    ctx.programs.load("agent", other)
    assert other.get_bindings() == module.get_bindings()
    other(question="x")
    assert receiver.temperatures == [0.6, 0.8]


# Functions


@pytest.mark.parametrize("name", ["ChainOfThought", "VariableAwareChainOfThought", "dspy.ChainOfThought"])
def test_creating_a_program(name: str, ctx: Context) -> None:
    program = ours.create_variable_aware_program(name, SIGNATURE, ctx, {"temperature": "creativity"})
    assert type(program) is ours.VariableAwareChainOfThought
    assert program.get_bindings() == {"temperature": "creativity"}
    agent = ours.create_variable_aware_program("ReAct", SIGNATURE, ctx, auto_bind_common=False, tools=[search])
    assert "search" in agent.tools
    assert agent.get_bindings() == {}


def test_what_is_refused_when_creating_a_program(ctx: Context) -> None:
    with pytest.raises(BindingError, match=r"no variable-aware 'ReACT', only Predict, .*: did you mean 'ReAct'"):
        ours.create_variable_aware_program("ReACT", SIGNATURE, ctx)
    with pytest.raises(BindingError, match="no context that has the variables"):
        ours.create_variable_aware_program("Predict", SIGNATURE, None, {"temperature": "temperature"})


def test_binding_by_the_names_of_variables(ctx: Context, receiver: Receiver) -> None:
    class Program(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.draft = dspy.ChainOfThought(SIGNATURE)
            self.judge = dspy.Predict("draft -> answer")

        def forward(self, question: str) -> Any:
            return self.judge(draft=self.draft(question=question).answer)

    program = Program()
    ctx.define_many({"qa_temperature": 0.1, "qa_judge.temperature": 0.2, "qa_draft.predict.instructions": "Be brief."})
    ctx.define_many({"qa_instructions": "of none", "qa_model": "m", "qa_max_iters": 3})
    found = ours.sync_dspy_parameters(program, "qa_", ctx)
    assert found == {
        "temperature": "qa_temperature",
        "judge.temperature": "qa_judge.temperature",
        "draft.predict.instructions": "qa_draft.predict.instructions",
    }
    program(question="x")
    assert receiver.temperatures == [0.1, 0.2]
    assert "Be brief." in receiver.texts[0]
    # It knows its context now, and what is bound stays.
    ctx["qa_judge.top_p"] = 0.9
    assert ours.sync_dspy_parameters(program, "qa_judge") == {}
    assert "judge.top_p" in ours.sync_dspy_parameters(program, "qa_")
    ours.sync_dspy_parameters(program)
    program(question="x")
    assert receiver.temperatures[2:] == [0.3, 0.2]
    agent = made("ReAct", ctx, auto_bind_common=False)
    assert ours.sync_dspy_parameters(agent, "qa_") == {
        "temperature": "qa_temperature",
        "instructions": "qa_instructions",
        "max_iters": "qa_max_iters",
    }
    with pytest.raises(BindingError, match="no context is known"):
        ours.sync_dspy_parameters(dspy.Predict(SIGNATURE))
