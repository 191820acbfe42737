"""DSPy programs of many kinds for tests of saving and loading, and what an LM receives of them."""

import json
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, Literal, Optional
from uuid import UUID

import dspy
from dspy._vendor.lm15.serde import request_to_dict
from pydantic import BaseModel, HttpUrl

from tests.lms import Engine, lm15, lm_on

ANSWER = {
    "reasoning": "because",
    "answer": "yes",
    "score": "1.5",
    "next_thought": "done",
    "next_tool_name": "finish",
    "next_tool_args": "{}",
}
TEXT = "\n\n".join(f"[[ ## {name} ## ]]\n{text}" for name, text in ANSWER.items())


class Asked(Engine):
    """An engine that keeps the requests that it receives."""

    def __init__(self, text: str = TEXT) -> None:
        super().__init__(lm15.TextPart(text))
        self.requests: list[Any] = []

    def complete(self, request: Any) -> Any:
        self.requests.append(json.loads(json.dumps(request_to_dict(request))))
        return super().complete(request)


def requests_of(program: Any, text: str = TEXT, **inputs: Any) -> list[Any]:
    """What the LM receives when the program runs."""
    engine = Asked(text)
    with dspy.context(lm=lm_on(engine)):
        program(**inputs)
    assert engine.requests
    return engine.requests


class Answering(dspy.Module):  # type: ignore[misc]
    """A program with predictors at several depths; its `forward` takes no `**kwargs`."""

    def __init__(self) -> None:
        super().__init__()
        self.generate = dspy.ChainOfThought("question -> answer")
        self.judge = dspy.Predict("question, answer -> score: float", temperature=0.0)
        self.steps = [dspy.Predict("question -> answer"), dspy.ChainOfThought("question -> answer")]
        self.named = {"a b": dspy.Predict("question -> answer")}

    def forward(self, question: str) -> Any:
        for each in (*self.steps, *self.named.values()):
            each(question=question)
        answer = self.generate(question=question).answer
        return self.judge(question=question, answer=answer)


class Noting(dspy.Module):  # type: ignore[misc]
    """A program that writes a variable of the session whose context it gets."""

    def __init__(self, ctx: Any) -> None:
        super().__init__()
        self.ctx = ctx
        self.answer = dspy.Predict("question -> answer")

    def forward(self, question: str) -> Any:
        found = self.answer(question=question)
        self.ctx["last"] = found.answer
        if not question:
            raise ValueError("no question")
        return found


class Color(Enum):
    RED = "r"
    BLUE = "b"


class Place(BaseModel):
    name: str
    at: tuple[float, float] = (0.0, 0.0)


class Event(BaseModel):
    title: str
    day: date
    places: list[Place] = []
    url: HttpUrl | None = None


class Party(Event):
    guests: set[str] = set()


@dataclass(frozen=True)
class Size:
    width: int
    height: Decimal


Point = namedtuple("Point", ("x", "y"))


class Typed(dspy.Signature):  # type: ignore[misc]
    """Answer about events."""

    event: Event = dspy.InputField(desc="what happened")
    image: dspy.Image = dspy.InputField()
    history: dspy.History = dspy.InputField()
    color: Color = dspy.InputField()
    kind: Literal["a", "b"] = dspy.InputField()
    when: datetime = dspy.InputField()
    extra: dict[str, Any] = dspy.InputField()
    size: Optional[Size] = dspy.InputField()  # noqa: UP045
    links: list[HttpUrl] = dspy.InputField()
    answer: str = dspy.OutputField()


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
    "rkJggg=="
)


def typed_values() -> dict[str, Any]:
    return {
        "event": Party(title="Feast", day=date(2026, 2, 28), places=[Place(name="Här", at=(1.5, -2.0))], guests={"a"}),
        "image": dspy.Image(PIXEL),
        "history": dspy.History(messages=[{"question": "who?", "answer": "me"}]),
        "color": Color.BLUE,
        "kind": "b",
        "when": datetime(2026, 2, 28, 12, 30, tzinfo=UTC),
        "extra": {"z": 1, "a": [1.0, None, True], "$": {"k": (1, 2)}, "t": timedelta(hours=30), "u": UUID(int=7)},
        "size": Size(3, Decimal("2.50")),
        "links": [HttpUrl("https://example.org/x")],
        "answer": "fine",
    }


def typed() -> Any:
    predictor = dspy.Predict(Typed)
    predictor.demos = [dspy.Example(**typed_values(), augmented=True).with_inputs("event", "image")]
    return predictor


class Dated(dspy.Signature):  # type: ignore[misc]
    """Say when it was."""

    event: Event = dspy.InputField()
    image: dspy.Image = dspy.InputField()
    day: date = dspy.OutputField()


def dated() -> Any:
    return dspy.Predict(Dated)


def search(query: str) -> str:
    """Look something up."""
    return query


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def agent(*tools: Callable[..., Any]) -> Any:
    return dspy.ReAct("question -> answer", tools=list(tools) or [search, add], max_iters=3)


def tuned(program: Any) -> Any:
    """The program as an optimizer might leave it."""
    for number, (path, predictor) in enumerate(program.named_predictors()):
        predictor.signature = predictor.signature.with_instructions(f"Do {path}.\n  Carefully, {number} times.")
        fields = {name: f"{number} {name}" for name in predictor.signature.fields}
        predictor.demos = [dspy.Example(**fields), {**fields, "extra": number}]
        predictor.config = {**predictor.config, "temperature": 0.25 * number, "max_tokens": 100 + number}
        last = list(predictor.signature.fields)[-1]
        predictor.signature = predictor.signature.with_updated_fields(last, desc=f"the {last}", prefix="It is:")
    return program
