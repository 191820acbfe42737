"""What a study makes of the types and constraints of variables."""

from collections.abc import Iterator
from typing import Any

import pytest

from dspex_persist import Context
from dspex_persist.errors import InvalidArgumentError, VariableNotFoundError
from tests.late import Late

ours, distributions = Late("dspex_persist.optuna"), Late("optuna.distributions")


@pytest.fixture
def ctx() -> Iterator[Context]:
    with Context() as ctx:
        ctx.define("share", 0.5, constraints={"min": 0, "max": 1})
        ctx.define("rate", 0.01, constraints={"min": 1e-5, "max": 1.0}, metadata={"scale": "log"})
        ctx.define("steps", 3, constraints={"min": 1, "max": 9})
        ctx.define("is_strict", False)
        ctx.define("mood", "calm", type_name="choice", constraints={"choices": ["calm", "wild"]})
        ctx.define("tone", "dry", constraints={"enum": ["dry", "warm", "overlong"], "max_length": 4})
        ctx.define("kind", "Predict", type_name="module", constraints={"choices": ["Predict", "ReAct"]})
        ctx.define("free", 1.0)
        ctx.define("at_least", 1.0, constraints={"min": 0})
        ctx.define("text", "anything")
        ctx.define("secret", 1, constraints={"min": 0, "max": 9}, metadata={"sensitive": "true"})
        yield ctx


def test_types_and_constraints_say_what_is_possible(ctx: Context) -> None:
    space = ours.ConfigurationSpace.of(ctx, ["share", "rate", "steps", "is_strict", "mood", "tone", "kind"])
    assert dict(space) == {
        "share": distributions.FloatDistribution(0, 1),
        "rate": distributions.FloatDistribution(1e-5, 1.0, log=True),
        "steps": distributions.IntDistribution(1, 9),
        "is_strict": distributions.CategoricalDistribution([False, True]),
        "mood": distributions.CategoricalDistribution(["calm", "wild"]),
        "tone": distributions.CategoricalDistribution(["dry", "warm"]),
        "kind": distributions.CategoricalDistribution(["Predict", "ReAct"]),
    }
    again = ours.ConfigurationSpace.from_json(space.to_json())
    assert dict(again) == dict(space)
    assert again.digest == space.digest


def test_less_than_all_that_is_possible_can_be_stated(ctx: Context) -> None:
    stated: dict[str, Any] = {
        "share": {"high": 0.5, "step": 0.25},
        "steps": distributions.IntDistribution(2, 8, step=2),
        "free": {"low": 1e-3, "high": 10, "log": True},
        "text": ["a", "b"],
        "mood": None,
        "at_least": [0, 0.5, 8.0],
    }
    space = ours.ConfigurationSpace.of(ctx, stated)
    assert space["share"] == distributions.FloatDistribution(0, 0.5, step=0.25)
    assert space["steps"] == stated["steps"]
    assert space["free"] == distributions.FloatDistribution(1e-3, 10, log=True)
    assert space["text"] == distributions.CategoricalDistribution(["a", "b"])
    assert space["mood"] == distributions.CategoricalDistribution(["calm", "wild"])


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"free": None}, "has no min and max in its constraints"),
        ({"at_least": None}, "has no max"),
        ({"text": None}, "can have any value"),
        ({"secret": None}, "is sensitive"),
        ({"share": {"high": 2}}, "cannot be 2.0: value 2.0 is above maximum 1"),
        ({"share": {"top": 2}}, "can be given high, log, low, step, not 'top'"),
        ({"share": {"low": 0.5, "high": 0.1}}, "cannot have this range"),
        ({"mood": ["calm", "bored"]}, "cannot be 'bored'"),
        ({"mood": []}, "has nothing to choose from"),
        ({"mood": "calm"}, "a list of values"),
        ({"mood": {"low": 1}}, "is no number, and has no low"),
        ({"mood": [["calm"]]}, "numbers, texts and booleans"),
        ("share", "it must be a list of names, such as ['share']"),
        ([], "it names no variable"),
    ],
    ids=str,
)
def test_what_a_variable_cannot_be_is_refused(ctx: Context, variables: Any, reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ours.ConfigurationSpace.of(ctx, variables)
    assert caught.value.field == "variables"
    assert reason in str(caught.value)


def test_whole_numbers_get_whole_numbers(ctx: Context) -> None:
    with pytest.raises(InvalidArgumentError, match="IntDistribution"):
        ours.ConfigurationSpace.of(ctx, {"steps": distributions.FloatDistribution(1, 9)})


def test_unknown_variables_are_refused(ctx: Context) -> None:
    with pytest.raises(VariableNotFoundError, match="did you mean 'share'"):
        ours.ConfigurationSpace.of(ctx, ["shore"])
