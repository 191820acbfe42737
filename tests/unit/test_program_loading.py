"""What is saved of a program, how it is held against a module, and each thing that DSPy's own save loses."""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dspex_persist import Context
from dspex_persist.cognitive.programs.diff import Changed
from dspex_persist.cognitive.programs.errors import ProgramMismatchError, ProgramNotSavedError
from dspex_persist.state.errors import InvalidArgumentError
from tests.late import Late
from tests.lms import Engine, lm_on
from tests.logs import capture_logs

dspy, made, ours = Late("dspy"), Late("tests.programs"), Late("dspex_persist.dspy")
SECRET = "sk-planted-0123456789"


@pytest.fixture
def ctx() -> Iterator[Context]:
    with Context("programs") as ctx:
        yield ctx


def predict(signature: Any = "question -> answer", **config: Any) -> Any:
    return dspy.Predict(signature, **config)


def differences(ctx: Context, name: str, into: Any, **options: Any) -> list[str]:
    """What is said of a module that a program does not fit, which stays as it was."""
    before = state_of(into)
    with pytest.raises(ProgramMismatchError) as raised:
        ctx.programs.load(name, into, **options)
    assert list(ctx.programs.check(name, into, **options).differences) == list(raised.value.differences)
    assert state_of(into) == before
    return list(raised.value.differences)


def state_of(module: Any) -> Any:
    return [(path, repr(vars(part))) for path, part in module.named_sub_modules()]


# What DSPy's own save loses


def test_the_configuration_is_kept(ctx: Context) -> None:
    program = predict(temperature=0.7, n=2, stop=["\n"], rollout_id=3, cache=False)
    assert "0.7" not in json.dumps(program.dump_state(), default=str)
    ctx.programs.save("p", program)
    # What the module was made with gives way.
    assert ctx.programs.load("p", predict(temperature=0.1, top_p=0.5)).config == program.config


def test_frozen_modules_are_kept(ctx: Context) -> None:
    program = made.tuned(made.Answering())
    program.generate._compiled = True
    assert "generate.predict" not in program.dump_state()
    ctx.programs.save("p", program)
    loaded = ctx.programs.load("p", made.Answering)
    assert loaded.generate._compiled is True
    assert loaded.generate.predict.demos == program.generate.predict.demos
    assert loaded.generate.predict.config == program.generate.predict.config
    assert [path for path, _ in loaded.named_predictors()] == [path for path, _ in program.named_predictors()]
    # From a frozen module into one that is not, and back.
    program.generate._compiled = False
    ctx.programs.save("p", program)
    assert ctx.programs.load("p", loaded).generate._compiled is False


def test_fields_are_found_by_name_and_never_by_position(ctx: Context) -> None:
    program = predict("question, context -> answer")
    program.signature = program.signature.with_updated_fields("question", desc="what is asked", prefix="Q:")
    ctx.programs.save("p", program)
    other = predict("context, question -> answer")
    assert differences(ctx, "p", other) == [
        "the fields of 'self' were in the order question, context, answer, and are in the order context, question, "
        "answer"
    ]
    with capture_logs() as logs:
        ctx.programs.load("p", other, strict=False)
    assert "were in the order" in logs[0]["event"]
    extra = {name: field.json_schema_extra for name, field in other.signature.fields.items()}
    assert (extra["question"]["desc"], extra["question"]["prefix"]) == ("what is asked", "Q:")
    assert (extra["context"]["desc"], extra["context"]["prefix"]) == ("${context}", "Context:")


def test_a_retriever_is_kept(ctx: Context) -> None:
    class Searching(dspy.Module):  # type: ignore[misc, name-defined]
        def __init__(self, k: int = 3) -> None:
            super().__init__()
            self.retrieve = dspy.Retrieve(k=k)
            self.answer = dspy.Predict("passages, question -> answer")

    with pytest.raises(TypeError):
        Searching().dump_state()
    ctx.programs.save("p", Searching(7))
    assert ctx.programs.load("p", Searching).retrieve.k == 7
    assert differences(ctx, "p", dspy.Predict("passages, question -> answer"))


def test_another_signature_is_refused_by_name(ctx: Context) -> None:
    ctx.programs.save("p", made.tuned(predict("question, context -> answer: str, score: float")))
    found = differences(ctx, "p", predict("question, contxt: list[str] -> score: int, answer: str, reason: str"))
    assert found == [
        "'self' has lost the input field 'context' (str); did you mean 'contxt'?",
        "field 'score' of 'self' was a float, and is a int",
        "'self' has a new input field 'contxt' (list[str])",
        "'self' has a new output field 'reason' (str)",
    ]


def test_what_fits_is_loaded_if_that_is_asked_for(ctx: Context) -> None:
    program = made.Answering()
    fields = {"question": "q", "answer": "a"}
    program.judge.demos = [dspy.Example(**fields), dspy.Example(**fields, score=1.0)]
    program.generate.predict.demos = [dspy.Example(**fields, reasoning="r")]
    ctx.programs.save("p", made.tuned(program) and program)

    class Other(dspy.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.generate = dspy.ChainOfThought("question -> answer")
            self.judge = dspy.Predict("question, answer -> score: int")

    program.judge.demos = [dspy.Example(**fields), dspy.Example(**fields, score=1.0)]
    ctx.programs.save("p", program)
    with capture_logs() as logs:
        loaded = ctx.programs.load("p", Other, strict=False)
    said = [each["event"] for each in logs]
    assert "loaded, but: field 'score' of 'judge' was a float, and is a int" in said
    assert "loaded, but: the saved program has a predictor 'steps[0]', and the module has not" in said
    assert [dict(demo) for demo in loaded.judge.demos] == [fields]
    assert loaded.judge.signature.instructions == program.judge.signature.instructions
    assert loaded.generate.predict.demos == program.generate.predict.demos


def test_nothing_changes_if_one_of_the_last_steps_fails(ctx: Context) -> None:
    ctx.programs.save("p", made.tuned(made.Answering()))

    class Stubborn(dspy.Predict):  # type: ignore[misc, name-defined]
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "demos" and value:
                raise RuntimeError("no demos")
            super().__setattr__(name, value)

    module = made.Answering()
    module.named["a b"] = Stubborn("question -> answer")
    before = state_of(module)
    with pytest.raises(RuntimeError, match="no demos"):
        ctx.programs.load("p", module)
    assert state_of(module) == before


# Agents


def test_an_agent(ctx: Context) -> None:
    program = made.tuned(made.agent())
    program.max_iters = 9
    ctx.programs.save("p", program)
    assert ctx.programs.load("p", made.agent).max_iters == 9
    assert differences(ctx, "p", made.agent(made.search, made.requests_of)) == [
        "the tools of the program are others, and the saved instructions name them: it lacks add, requests_of came "
        "later; make the module with the same tools, or optimize it again"
    ]
    report = ctx.programs.check("p", made.agent(made.search, dspy.Tool(made.add, desc="Sum two numbers.")))
    assert report
    assert report.notes == ["the saved instructions of the program describe tools as they were: add"]


# Every kind of module


def reward(_inputs: Any, _answer: Any) -> float:
    return 1.0


KINDS: dict[str, Callable[[], Any]] = {
    "Predict": lambda: predict(),
    "ChainOfThought": lambda: dspy.ChainOfThought("question -> answer"),
    "ReAct": lambda: made.agent(),
    "ReActV2": lambda: dspy.ReActV2(dspy.Signature("question -> answer"), tools=[made.search]),
    "CodeAct": lambda: dspy.CodeAct("question -> answer", tools=[made.search]),
    "ProgramOfThought": lambda: dspy.ProgramOfThought("question -> answer"),
    "RLM": lambda: dspy.RLM("question -> answer"),
    "BestOfN": lambda: dspy.BestOfN(predict(), N=2, reward_fn=reward, threshold=1.0),
    "Refine": lambda: dspy.Refine(predict(), N=2, reward_fn=reward, threshold=1.0),
    "MultiChainComparison": lambda: dspy.MultiChainComparison("question -> answer", M=2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_module_of_each_kind(ctx: Context, kind: str) -> None:
    program = made.tuned(KINDS[kind]())
    settings = [name for name in ("max_iters", "N", "max_llm_calls", "fail_count") if hasattr(program, name)]
    for name in settings:
        setattr(program, name, 7)
    ctx.programs.save("p", program)
    loaded = ctx.programs.load("p", KINDS[kind])
    assert [getattr(loaded, name) for name in settings] == [7] * len(settings)
    for (path, was), (same, now) in zip(program.named_predictors(), loaded.named_predictors(), strict=True):
        assert (path, was.demos, was.config) == (same, now.demos, now.config)
        assert was.signature.equals(now.signature)
        assert list(was.signature.fields) == list(now.signature.fields)
    for name in settings[:1]:
        saved = copy.deepcopy(ctx["programs/p"])
        saved["modules"]["self"]["settings"][name] = 1.5
        ctx["programs/p"] = saved
        assert f"{name}=1.5 is saved for the program, which makes no sense" in differences(ctx, "p", KINDS[kind]())


def test_a_loaded_program_can_be_compiled_again(ctx: Context) -> None:
    ticket = dspy.Example(question="q", answer="yes").with_inputs("question")
    optimizer = dspy.LabeledFewShot(k=1)
    compiled = optimizer.compile(predict(), trainset=[ticket])
    compiled._compiled = True
    ctx.programs.save("p", compiled)
    loaded = ctx.programs.load("p", predict)
    assert loaded._compiled is False
    assert loaded.demos == [ticket]
    with dspy.context(lm=made.lm_on(made.Asked())):
        again = dspy.BootstrapFewShot(max_bootstrapped_demos=1).compile(loaded, trainset=[ticket])
    assert again.demos[0].augmented


def test_what_an_optimizer_has_put_there_as_code(ctx: Context) -> None:
    program = predict()
    program.forward = lambda **inputs: inputs
    ctx.programs.save("p", program)
    assert "had a forward that an optimizer had put there" in differences(ctx, "p", predict())[0]
    assert ctx.programs.load("p", program) is program


def test_a_long_list_of_differences_is_shortened(ctx: Context) -> None:
    ctx.programs.save("p", predict(", ".join(f"q{number}" for number in range(30)) + " -> answer"))
    with pytest.raises(ProgramMismatchError, match=r"and 11 more: see \.differences") as raised:
        ctx.programs.load("p", predict)
    assert len(raised.value.differences) == 31
    assert repr(ctx.programs) == "<programs of session 'programs'>"


# Structure


def test_a_predictor_at_two_paths(ctx: Context) -> None:
    class Shared(dspy.Module):  # type: ignore[misc, name-defined]
        def __init__(self, *, apart: bool = False) -> None:
            super().__init__()
            self.first = dspy.Predict("question -> answer")
            self.second = dspy.Predict("question -> answer") if apart else self.first

    ctx.programs.save("shared", made.tuned(Shared()))
    apart = ctx.programs.load("shared", Shared(apart=True))
    assert apart.first.demos == apart.second.demos != []
    ctx.programs.save("apart", made.tuned(Shared(apart=True)))
    assert differences(ctx, "apart", Shared()) == [
        "first, second were several predictors, and are one in the module, 'first'"
    ]


def test_a_class_that_has_changed(ctx: Context) -> None:
    ctx.programs.save("p", made.typed())
    saved = copy.deepcopy(ctx["programs/p"])
    kinds = saved["predictors"]["self"]["signature"]["types"]
    kinds["Place"] = {"name": "str", "city": "str"}
    kinds["Color"] = {"RED": "'r'"}
    ctx["programs/p"] = saved
    assert differences(ctx, "p", dspy.Predict(made.Typed)) == [
        "the class Color, which fields of 'self' have, has changed: BLUE is new",
        "the class Place, which fields of 'self' have, has changed: city is gone, at is new",
    ]


def test_what_is_noted(ctx: Context) -> None:
    ctx.programs.save("p", made.Answering())
    saved = copy.deepcopy(ctx["programs/p"])
    saved["dspy"], saved["adapter"] = "3.3.9", "dspy.JSONAdapter"
    saved["modules"]["self"]["source"] = "0" * 64
    ctx["programs/p"] = saved
    report = ctx.programs.check("p", made.Answering)
    assert report
    assert [note.partition(",")[0] for note in report.notes] == [
        "DSPy 3.3.9 has saved it",
        "the adapter was dspy.JSONAdapter",
        "the source of tests.programs.Answering has changed since it was saved: what it does may differ",
    ]
    saved["dspy"] = "3.99.0"
    ctx["programs/p"] = saved
    assert differences(ctx, "p", made.Answering())[0].startswith("DSPy 3.99.0 has saved it")


# LMs, and what may be secret


def secret_lm(**options: Any) -> Any:
    reach = {"api_key": SECRET, "api_base": f"https://{SECRET}.example", "headers": {"Authorization": SECRET}}
    return dspy.LM("openai/m", **reach, **options)


def test_an_lm_of_its_own_is_given_by_name_or_model(ctx: Context) -> None:
    lm = secret_lm(temperature=0.25)
    program = predict()
    program.lm = lm
    ctx.programs.save("named", program, lms={"cheap": lm})
    ctx.programs.save("p", program)
    assert ctx["programs/named"]["predictors"]["self"]["lm"] == {
        "name": "cheap",
        "model": "openai/m",
        "options": {"temperature": 0.25},
    }
    assert differences(ctx, "named", predict()) == [
        "'self' has an LM of its own, openai/m, and none is given for it: load with lms={'cheap': dspy.LM(...)}"
    ]
    other = dspy.LM("openai/m", temperature=0.5)
    assert ctx.programs.load("named", predict, lms={"cheap": other}).lm is other
    assert ctx.programs.check("named", predict, lms={"cheap": other}).notes == [
        "the LM of 'self' has other options than it had: temperature"
    ]
    assert ctx.programs.load("p", predict, lms={"any": other}).lm is other
    with dspy.context(lm=other):
        assert ctx.programs.load("p", predict).lm is other
    with pytest.raises(InvalidArgumentError, match="lms: it must be a mapping, such as a dict, not list"):
        ctx.programs.load("p", predict, lms=[other])
    with pytest.raises(InvalidArgumentError, match="lms: it must have an LM for each name, not str"):
        ctx.programs.save("p", program, lms={"cheap": "openai/m"})
    with pytest.raises(InvalidArgumentError, match="adapters: it must have an adapter for each name, not str"):
        ctx.programs.load("p", predict, adapters={"chat": "chat"})
    for flag in ("strict", "bindings"):
        with pytest.raises(InvalidArgumentError, match=f"{flag}: it must be True or False, not str"):
            ctx.programs.load("p", predict, **{flag: "no"})
    with pytest.raises(InvalidArgumentError, match="into: it must be a module, its class, or a function that makes"):
        ours.program_tool("p", 3)
    mine = predict()
    mine.lm = other
    ctx.programs.save("none", predict())
    assert ctx.programs.load("none", mine).lm is other


def test_no_key_and_no_address_is_stored(ctx: Context) -> None:
    program = made.Answering()
    program.set_lm(secret_lm())
    program.judge.lm = lm_on(Engine())
    program.judge.lm.model = f"huggingface/https://user:{SECRET}@example.org/m"
    program.judge.config |= {
        "api_key": SECRET,
        "api_base": SECRET,
        "extra_headers": {"Authorization": SECRET},
        "base_url": SECRET,
        "organization": SECRET,
        "tools": [{"type": "mcp", "name": "x", "headers": {"Authorization": SECRET}, "server_url": SECRET}],
        "my_option": 5,
        "response_format": made.Event,
    }
    with capture_logs() as logs:
        ctx.programs.save("p", program)
        ctx.programs.save("q", program, lms={"a": program.judge.lm})
    assert SECRET not in json.dumps([ctx["programs/p"], ctx["programs/q"]])
    assert SECRET not in repr([logs, ctx.programs.history("p"), ctx.programs.diff("p", 0, 0)])
    left = {(each["what"], each["why"]) for each in ctx["programs/p"]["left_out"]}
    assert left >= {("api_key", "secret"), ("extra_headers", "secret"), ("my_option", "unknown")}
    assert ("response_format", "object") in left
    # What the module is made with stays.
    fresh = made.Answering()
    fresh.set_lm(dspy.LM("openai/m"))
    fresh.judge.lm = program.judge.lm
    said = differences(ctx, "p", fresh)
    assert said == ["'judge' had an option 'response_format' that is no data: make the module with it, as before"]
    fresh.judge.config |= {"response_format": made.Event, "api_key": "mine"}
    ctx.programs.load("p", fresh)
    assert fresh.judge.config["api_key"] == "mine"
    assert fresh.judge.config["response_format"] is made.Event
    assert fresh.judge.config["tools"] == [{"type": "mcp", "name": "x"}]


# What is refused


def test_what_cannot_be_saved(ctx: Context) -> None:
    program = predict()
    program.demos = [dspy.Example(question="q", answer=object())]
    with pytest.raises(ProgramNotSavedError, match="field 'answer' of demo 0 of 'self' is a object, which is no data"):
        ctx.programs.save("p", program)
    program.demos = ["q"]
    with pytest.raises(ProgramNotSavedError, match=r"not a dspy\.Example or a dict"):
        ctx.programs.save("p", program)

    class Own(dspy.predict.parameter.Parameter):  # type: ignore[misc, name-defined]
        pass

    module = made.Answering()
    module.weights = Own()
    with pytest.raises(ProgramNotSavedError, match="nothing is known about the parameter 'weights'"):
        ctx.programs.save("p", module)
    with pytest.raises(InvalidArgumentError, match=r"must be a dspy\.Module"):
        ctx.programs.save("p", "module")
    assert ctx.programs.list() == ()


def test_a_program_that_is_too_large_is_refused_with_its_largest_parts(ctx: Context) -> None:
    program = made.Answering()
    program.judge.demos = [dspy.Example(question="q" * 50_000, answer="a") for _ in range(50)]
    program.generate.predict.demos = [dspy.Example(question="q", answer="a")]
    with pytest.raises(ProgramNotSavedError, match=r"value_size_bytes.*50 demos of 'judge' \(2,50\d,\d+ bytes\)"):
        ctx.programs.save("p", program)
    program.judge.demos = program.judge.demos[:5]
    ctx.programs.save("p", program)


def test_hostile_demos_and_paths(ctx: Context) -> None:
    ctx.programs.save("p", made.typed())
    document = ctx["programs/p"]
    demo = document["predictors"]["self"]["demos"][0]
    demo["values"][0][1] = {"$": "model", "class": "subprocess:Popen", "value": [["args", ["touch", "x"]]]}
    ctx["programs/p"] = document
    (said,) = differences(ctx, "p", dspy.Predict(made.Typed))
    assert said.startswith("demo 0 of 'self' cannot be read: its field 'event': it is a 'subprocess:Popen'")
    document["predictors"] = {"__class__.__init__.__globals__": document["predictors"]["self"]}
    document["modules"] |= {"__class__": {"kind": "os.system", "settings": {"max_iters": -1}}}
    ctx["programs/p"] = document
    assert (
        "the saved program has a predictor '__class__.__init__.__globals__'"
        in differences(ctx, "p", dspy.Predict(made.Typed))[-1]
    )


def test_texts_of_the_store_are_shown_on_one_line_and_shortened(ctx: Context) -> None:
    ctx.programs.save("p", made.Answering())
    saved = copy.deepcopy(ctx["programs/p"])
    escape = "\x1b[2J\n" + "x" * 5_000
    judge = saved["predictors"].pop("judge")
    judge["signature"]["fields"][0] |= {"name": escape, "type": escape}
    judge["config"] = {escape: 1}
    saved["predictors"] |= {escape: judge, "judge": judge}
    saved["modules"]["self"]["kind"] = saved["adapter"] = escape
    ctx["programs/p"] = saved
    report = ctx.programs.check("p", made.Answering)
    assert len(report.differences) > 3
    for text in (*report.differences, *report.notes):
        assert text.isprintable()
        assert len(text) < 700
    judge["signature"]["instructions"] = "line\n" * 100_000
    ctx["programs/p"] = saved
    (changed,) = [each for each in ctx.programs.diff("p").predictors if each.path == "judge"]
    assert changed.instructions == ("-66 characters", "+500,000 characters")


# Diffs


def test_a_diff_says_what_has_changed(ctx: Context) -> None:
    program = made.Answering()
    same, gone, new = (dspy.Example(question=each, answer="<b>") for each in ("same", "gone", "new"))
    program.judge.demos = [same, gone]
    program.judge.config = {"temperature": 0.0, "n": 1}
    ctx.programs.save("p", program)
    program.judge.demos = [new, same]
    program.judge.config = {"temperature": 0.5, "max_tokens": 9}
    program.judge.signature = program.judge.signature.with_instructions("Judge.\nFairly.")
    program.generate._compiled = True
    del program.steps[1]
    ctx.programs.save("p", program)
    diff = ctx.programs.diff("p")
    judge = next(each for each in diff.predictors if each.path == "judge")
    assert (judge.demos_added, judge.demos_removed) == (
        ({"question": "new", "answer": "<b>"},),
        ({"question": "gone", "answer": "<b>"},),
    )
    assert set(judge.changes) == {
        Changed("config temperature", 0.0, 0.5),
        Changed("config n", 1, None),
        Changed("config max_tokens", None, 9),
    }
    assert judge.instructions[2:] == ("+Judge.", "+Fairly.")
    assert ("steps[1].predict", "removed") in [(each.path, each.kind) for each in diff.predictors]
    assert Changed("generate frozen", False, True) in diff.changes
    assert json.loads(json.dumps(diff.as_dict()))["same"] is False
    text = str(diff)
    assert "  config temperature: 0.0 -> 0.5" in text.splitlines()
    assert "  config n: 1 (gone)" in text.splitlines()
    html = diff._repr_html_()
    assert "<b>" not in html
    assert "&lt;b&gt;" in html
    program.judge.demos = [same, new]
    ctx.programs.save("p", program)
    assert str(ctx.programs.diff("p")).endswith("judge\n  the same demos, in another order")
    ctx.programs.save("p", program)
    assert not ctx.programs.diff("p")
    assert str(ctx.programs.diff("p")) == "program 'p': version 2 -> 3: no difference"
    assert "&lt;" not in ctx.programs.history("p")._repr_html_()
