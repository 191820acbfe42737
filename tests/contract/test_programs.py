"""Programs are saved, loaded, compared, tagged and rolled back alike on every backend."""

import asyncio
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dspex_persist import Context, EmbeddedState, LocalState
from dspex_persist.cognitive.programs.errors import DamagedProgramError, ProgramMismatchError, ProgramNotFoundError
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.errors import InvalidArgumentError, ToolFailedError, VariableLockedError
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.server import ServedDatabase
from tests.late import Late

dspy, made, binding = Late("dspy"), Late("tests.programs"), Late("dspex_persist.dspy")


@pytest.fixture(scope="module", params=["memory", "file", "server"])
def provider(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StateProvider]:
    path = tmp_path_factory.mktemp("programs") / "sessions.db"
    if request.param == "memory":
        with LocalState() as state:
            yield state
    elif request.param == "file":
        with EmbeddedState(path) as state:
            yield state
    else:
        with ServedDatabase(path) as served, BridgedState(served.target) as state:
            yield state


@pytest.fixture
def ctx(provider: StateProvider) -> Iterator[Context]:
    with Context(f"programs-{uuid.uuid4().hex}", provider) as ctx:
        yield ctx


def predictor(instructions: str = "", **config: Any) -> Any:
    program = dspy.Predict("question -> answer", **config)
    program.signature = program.signature.with_instructions(instructions or "Answer.")
    return program


PROGRAMS: dict[str, tuple[Callable[[], Any], Callable[[], Any], dict[str, Any]]] = {
    "nested": (lambda: made.Answering(), lambda: made.tuned(made.Answering()), {"question": "q"}),
    "agent": (lambda: made.agent(), lambda: made.tuned(made.agent()), {"question": "q"}),
    "typed": (
        lambda: dspy.Predict(made.Typed),
        lambda: made.typed(),
        {"event": {"title": "x", "day": "2026-01-01"}, "kind": "a"},
    ),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_loaded_program_makes_the_requests_of_the_saved_one(ctx: Context, kind: str) -> None:
    fresh, tuned, inputs = PROGRAMS[kind]
    saved = tuned()
    assert ctx.programs.save(kind, saved) == 0
    loaded = ctx.programs.load(kind, fresh)
    assert made.requests_of(loaded, **inputs) == made.requests_of(saved, **inputs)
    assert made.requests_of(loaded, **inputs) != made.requests_of(fresh(), **inputs)
    # Into a module that there is, and from a fork.
    module, fork = fresh(), ctx.fork()
    assert fork.programs.load(kind, module) is module
    assert made.requests_of(module, **inputs) == made.requests_of(saved, **inputs)


def test_versions(ctx: Context) -> None:
    programs = ctx.programs
    assert programs.save("qa", predictor("First."), reason="a start", actor="user:ann") == 0
    assert programs.save("qa", predictor("Second.", temperature=0.5)) == 1
    newest, first = programs.history("qa")
    assert (newest.version, first.version, first.reason, first.actor) == (1, 0, "a start", "user:ann")
    assert programs.load("qa", predictor).signature.instructions == "Second."
    assert programs.load("qa", predictor, 0).signature.instructions == "First."
    diff = programs.diff("qa")
    assert diff.as_dict()["predictors"][0]["instructions"] == ["@@ -1 +1 @@", "-First.", "+Second."]
    assert not programs.diff("qa", 1, 1)
    assert programs.rollback("qa", 0, reason="worse") == 2
    assert programs.load("qa", predictor).signature.instructions == "First."
    assert programs.load("qa", predictor).config == {}
    assert (programs.history("qa", 1)[0].reason, str(programs.history("qa", 1)[0].kind)) == ("worse", "rolled_back")
    assert [each.name for each in programs.list()] == ["qa"]
    assert programs.get("qa", 1).saved.predictors["self"].config == {"temperature": 0.5}


def test_tags(ctx: Context) -> None:
    programs = ctx.programs
    programs.save("qa", predictor("First."), tag="production")
    programs.save("qa", predictor("Second."), tag="candidate")
    assert programs.tags("qa") == {"production": 0, "candidate": 1}
    assert programs.load("qa", predictor, "production").signature.instructions == "First."
    assert programs.tag("qa", "production", "candidate", reason="it won") == 1
    assert programs.load("qa", predictor, version="production").signature.instructions == "Second."
    assert programs.history("qa")[0].tags == ("candidate", "production")
    assert ctx.history("program-tags/qa")[0].reason == "it won"
    programs.untag("qa", "candidate")
    assert programs.list()[0].tags == {"production": 1}
    programs.rollback("qa", 0)
    assert programs.rollback("qa", "production") == 3
    with pytest.raises(ProgramNotFoundError, match=r"there is no tag 'producton'; its tags: production \(1\)"):
        programs.load("qa", predictor, "producton")
    with pytest.raises(ProgramNotFoundError, match="no tag 'candidate'"):
        programs.untag("qa", "candidate")
    for wrong in ("", "1", "latest", "a b", "x" * 65, None):
        with pytest.raises(InvalidArgumentError):
            programs.tag("qa", wrong)


def test_tags_hold_in_a_fork_whose_versions_have_other_numbers(ctx: Context) -> None:
    ctx.programs.save("qa", predictor("First."), tag="old")
    ctx.programs.save("qa", predictor("Second."), tag="production")
    fork = ctx.fork()
    assert fork.programs.load("qa", predictor, "production").signature.instructions == "Second."
    with pytest.raises(ProgramNotFoundError, match="forked"):
        fork.programs.load("qa", predictor, "old")


def test_a_deleted_program_takes_its_tags_along(ctx: Context) -> None:
    ctx.programs.save("qa", predictor("First."), tag="production")
    ctx.programs.delete("qa", reason="obsolete")
    with pytest.raises(ProgramNotFoundError):
        ctx.programs.load("qa", predictor)
    assert ctx.programs.list() == ()
    assert ctx.programs.history("qa")[0].reason == "obsolete"
    assert ctx.programs.save("qa", predictor("Second.")) == 0
    assert ctx.programs.tags("qa") == {}


def test_what_is_not_there(ctx: Context) -> None:
    with pytest.raises(ProgramNotFoundError, match=r"the session has none: ctx\.programs\.save"):
        ctx.programs.load("qa", predictor)
    ctx.programs.save("answering", predictor())
    with pytest.raises(ProgramNotFoundError, match="did you mean 'answering'"):
        ctx.programs.load("answerng", predictor)
    with pytest.raises(ProgramNotFoundError, match="there is no version 7; they are 0 to 0"):
        ctx.programs.load("answering", predictor, 7)
    with pytest.raises(ProgramNotFoundError, match="none to compare it with"):
        ctx.programs.diff("answering")
    for wrong in ("", " ", "x" * 201, "a\nb", None):
        with pytest.raises(InvalidArgumentError):
            ctx.programs.save(wrong, predictor())
    ctx["programs/mine"] = {"format": 1}
    for use in (lambda: ctx.programs.load("mine", predictor), lambda: ctx.programs.save("mine", predictor())):
        with pytest.raises(ProgramNotFoundError, match="is no program"):
            use()


def test_from_asyncio(ctx: Context) -> None:
    async def run() -> None:
        programs = ctx.programs
        assert await programs.save.aio("qa", predictor("First."), tag="production") == 0
        assert await programs.save.aio("qa", predictor("Second.")) == 1
        assert (await programs.load.aio("qa", predictor, "production")).signature.instructions == "First."
        assert len(await programs.history.aio("qa")) == 2
        assert await programs.diff.aio("qa")
        assert await programs.rollback.aio("qa", 0) == 2
        assert await programs.tags.aio("qa") == {"production": 0}
        assert (await programs.list.aio())[0].version == 2
        await programs.delete.aio("qa")

    asyncio.run(run())


def test_savers_and_taggers_at_the_same_time(ctx: Context) -> None:
    def save(number: int) -> int:
        version = ctx.programs.save("qa", predictor(f"Program {number}."))
        ctx.programs.tag("qa", f"tag{number}", version)
        return int(version)

    with ThreadPoolExecutor(4) as pool:
        versions = list(pool.map(save, range(12)))
    assert sorted(versions) == list(range(12))
    tags = ctx.programs.tags("qa")
    assert [tags[f"tag{number}"] for number in range(12)] == versions
    for number in (0, 11):
        loaded = ctx.programs.load("qa", predictor, f"tag{number}")
        assert loaded.signature.instructions == f"Program {number}."


def save_and_fail(ctx: Context) -> None:
    with ctx.transaction() as tx:
        tx.programs.save("qa", predictor("Second."))
        raise RuntimeError


def test_in_a_transaction(ctx: Context) -> None:
    with ctx.transaction() as tx:
        tx.programs.save("qa", predictor("First."))
        assert tx.programs.load("qa", predictor).signature.instructions == "First."
        assert ctx.programs.list() == ()

    with pytest.raises(RuntimeError):
        save_and_fail(ctx)
    assert ctx.programs.load("qa", predictor).signature.instructions == "First."


def test_a_program_is_a_variable_with_all_that_variables_have(ctx: Context) -> None:
    ctx.programs.save("qa", predictor("First."))
    with ctx.watch("programs/qa") as changes:
        ctx.programs.save("qa", predictor("Second."))
        change = changes.next(20)
        assert change is not None
        assert change.value["predictors"]["self"]["signature"]["instructions"] == "Second."
    with ctx.optimize("programs/qa"), pytest.raises(VariableLockedError):
        ctx.programs.save("qa", predictor("Third."))


HOSTILE: dict[str, Any] = {
    "of the future": {"format": 2},
    "without a format": {},
    "of a wrong format": {"format": True},
    "of another shape": {"format": 1, "modules": []},
    "with more": {"format": 1, "dspy": "3", "adapter": "", "modules": {}, "predictors": {}, "import": "os"},
}


@pytest.mark.parametrize("document", HOSTILE.values(), ids=HOSTILE)
def test_what_another_client_wrote_is_refused_if_it_is_no_program(ctx: Context, document: Any) -> None:
    ctx.programs.save("qa", predictor("First."))
    ctx["programs/qa"] = document
    module = predictor("Mine.")
    with pytest.raises(DamagedProgramError, match="version 1 of program 'qa' cannot be read"):
        ctx.programs.load("qa", module)
    with pytest.raises(DamagedProgramError):
        ctx.programs.diff("qa")
    assert module.signature.instructions == "Mine."
    assert "error" in ctx.programs.list()[0].as_dict()
    assert ctx.programs.history("qa")[1].saved.kind == "dspy.Predict"
    ctx.programs.rollback("qa", 0)
    assert ctx.programs.load("qa", module).signature.instructions == "First."
    ctx["program-tags/qa"] = {"production": "0"}
    with pytest.raises(DamagedProgramError, match="its tags are not what"):
        ctx.programs.tags("qa")


# Calls


class Answered:
    """DSPy with an LM that keeps what it is asked."""

    def __enter__(self) -> Any:
        self.engine = made.Asked()
        self.context = dspy.context(lm=made.lm_on(self.engine))
        self.context.__enter__()
        return self.engine.requests

    def __exit__(self, *error: object) -> None:
        self.context.__exit__(*error)


def test_a_call_uses_the_program_and_the_variables_of_its_session(ctx: Context) -> None:
    ctx["temperature"] = 0.25
    program = made.Answering()
    program.generate.predict.signature = program.generate.predict.signature.with_instructions("Be brief.")
    ctx.programs.save("qa", binding.bind(program, ctx, temperature="temperature"), tag="production")
    ctx.programs.save("qa", binding.unbind(made.Answering()))
    with Answered() as requests:
        assert ctx.programs.execute("qa", {"question": "q"}, into=made.Answering, version="production").score == 1.5
        assert [each["config"]["temperature"] for each in requests] == [0.25] * 5
        assert "Be brief." in requests[3]["system"]
        # From asyncio, and with the module that was registered.
        ctx.programs.register("qa", made.Answering)
        assert asyncio.run(ctx.programs.call.aio("qa", question="q")).score == 1.5
        assert [each.get("config", {}).get("temperature") for each in requests[5:]] == [None] * 4 + [0.0]
        module = made.Answering()
        before = repr(vars(module.generate))
        ctx.programs.call("qa", module, question="q")
        assert repr(vars(module.generate)) == before
    ctx.programs.save("other", made.Answering())
    with pytest.raises(InvalidArgumentError, match=r"ctx\.programs\.register\('other'"):
        ctx.programs.call("other", question="q")


def test_what_a_call_writes_takes_effect_as_a_whole(ctx: Context) -> None:
    ctx["last"] = ""
    ctx.programs.save("noting", made.Noting(ctx))
    with Answered():
        assert ctx.programs.call("noting", made.Noting, question="q").answer == "yes"
        entry, *_ = ctx.history("last")
        assert (entry.value, entry.execution_id is not None) == ("yes", True)
        with pytest.raises(ToolFailedError, match="no question"):
            ctx.programs.call("noting", made.Noting, question="")
        assert ctx.history("last")[0] == entry
        # In a transaction, it is part of that.
        with ctx.transaction() as tx:
            tx["last"] = "before"
            tx.programs.call("noting", made.Noting, question="q")
            assert (tx["last"], ctx["last"]) == ("yes", "yes")
            ctx.programs.call("noting", made.Noting, question="q")
        assert ctx.history("last")[0].execution_id == tx.execution_id


def test_a_call_of_a_program_that_does_not_fit(ctx: Context) -> None:
    ctx.programs.save("qa", made.Answering())
    with pytest.raises(ProgramMismatchError, match="the module has a predictor 'self'"):
        ctx.programs.call("qa", predictor, question="q")
    with pytest.raises(InvalidArgumentError, match="one is a object, which is no data"):
        ctx.programs.call("qa", made.Answering, question=object())
    with pytest.raises(ProgramNotFoundError):
        ctx.programs.call("qb", made.Answering, question="q")


def test_typed_inputs_and_outputs(ctx: Context) -> None:
    ctx.programs.save("typed", made.dated())
    inputs = {name: made.typed_values()[name] for name in ("event", "image")}
    engine = made.Asked("[[ ## day ## ]]\n2026-02-28")
    with dspy.context(lm=made.lm_on(engine)):
        found = ctx.programs.call("typed", made.dated, **inputs)
        assert found.day == made.dated()(**inputs).day
    assert engine.requests[0] == engine.requests[1]


# Bindings


def test_bindings_come_back(ctx: Context) -> None:
    ctx["temperature"], ctx["tokens"] = 0.25, 99
    program = made.Answering()
    binding.bind(program, ctx, temperature="temperature", per={"judge": {"max_tokens": "tokens"}})
    ctx.programs.save("qa", program)
    expected = made.requests_of(program, question="q")
    loaded = ctx.programs.load("qa", made.Answering)
    assert made.requests_of(loaded, question="q") == expected
    assert expected[-1]["config"]["max_tokens"] == 99
    ctx["temperature"] = 0.5
    assert made.requests_of(loaded, question="q")[0]["config"]["temperature"] == 0.5
    free = ctx.programs.load("qa", made.Answering, bindings=False)
    assert "temperature" not in made.requests_of(free, question="q")[0].get("config", {})
    # A module that is bound stays so.
    ctx["other"] = 0.75
    mine = binding.bind(made.Answering(), ctx, temperature="other")
    assert ctx.programs.check("qa", mine).notes == ["the program is bound to variables already, and stays so"]
    assert made.requests_of(ctx.programs.load("qa", mine), question="q")[0]["config"]["temperature"] == 0.75
    ctx.delete("tokens")
    module = made.Answering()
    with pytest.raises(ProgramMismatchError, match=r"cannot be bound again: .*tokens.*bindings=False"):
        ctx.programs.load("qa", module)
    assert made.requests_of(module, question="q") == made.requests_of(made.Answering(), question="q")


def test_bindings_that_choose_among_what_the_process_has(ctx: Context) -> None:
    small, large = (made.lm_on(made.Asked(), temperature=number) for number in (0.25, 0.75))
    ctx["model"], ctx["style"], ctx["how"] = "large", "json", "Be kind."
    lms, adapters = {"small": small, "large": large}, {"json": dspy.JSONAdapter(), "chat": dspy.ChatAdapter()}
    program = binding.bind(
        predictor(), ctx, lms=lms, adapters=adapters, model="model", adapter="style", instructions="how"
    )
    ctx.programs.save("qa", program)
    with pytest.raises(ProgramMismatchError, match="cannot be bound again: lms has no small, large"):
        ctx.programs.load("qa", predictor)
    with pytest.raises(ProgramMismatchError, match="cannot be bound again: adapters has no json"):
        ctx.programs.load("qa", predictor, lms=lms)
    loaded = ctx.programs.load("qa", predictor, lms=lms, adapters=adapters)
    asked = made.Asked('{"answer": "yes"}')
    lms["large"] = made.lm_on(asked)
    again = ctx.programs.load("qa", predictor, lms=lms, adapters=adapters)
    assert again(question="q").answer == "yes"
    assert "Be kind." in asked.requests[0]["system"]
    assert "JSON" in asked.requests[0]["system"]
    assert loaded is not again


def test_hostile_bindings(ctx: Context) -> None:
    ctx["x"] = 0.5
    ctx.programs.save("qa", binding.bind(made.Answering(), ctx, temperature="x"))
    saved = ctx["programs/qa"]
    for options in ({"ctx": "x"}, {"module": "x"}, {"__class__": "x"}, {"temperature": "nowhere"}, {"live": "x"}):
        saved["bindings"][0]["options"] = options
        ctx["programs/qa"] = saved
        with pytest.raises(ProgramMismatchError, match="cannot be bound again"):
            ctx.programs.load("qa", made.Answering)
