"""A DSPy program that an optimizer compiles, and the versions of it that a session keeps.

    python examples/compiled_program.py                  # in memory
    python examples/compiled_program.py compiled.db      # on a file: run it twice

It needs the extra [dspy], and calls no model: a dummy answers.
"""

import sys
from typing import Any

import dspy
from dspy.utils import DummyLM

from dspex_persist import Context

TICKETS = [
    dspy.Example(message="My parcel has not come.", urgent=False).with_inputs("message"),
    dspy.Example(message="You charged me twice!", urgent=True).with_inputs("message"),
    dspy.Example(message="The shop is on fire.", urgent=True).with_inputs("message"),
]


class Triage(dspy.Module):  # type: ignore[misc]
    """Decides whether a message is urgent."""

    def __init__(self) -> None:
        super().__init__()
        self.decide = dspy.ChainOfThought("message -> urgent: bool")

    def forward(self, message: str) -> Any:
        return self.decide(message=message)


def teacher() -> DummyLM:
    """A model that is always right."""
    return DummyLM({each.message: {"reasoning": "I have read it.", "urgent": str(each.urgent)} for each in TICKETS})


def is_right(ticket: dspy.Example, answer: dspy.Prediction, _trace: object = None) -> bool:
    """The metric."""
    return bool(ticket.urgent == answer.urgent)


def compiled(demos: int) -> Any:
    """Return the program with up to so many demos."""
    optimizer = dspy.BootstrapFewShot(metric=is_right, max_bootstrapped_demos=demos, max_labeled_demos=0)
    return optimizer.compile(Triage(), trainset=TICKETS)


def main(path: str) -> None:
    """Compile the program twice, compare the versions, go back to the first, and load it."""
    dspy.configure(lm=teacher())
    with Context("support", path) as ctx:
        programs = ctx.programs
        first = programs.save("triage", compiled(1), tag="production", reason="one demo")
        second = programs.save("triage", compiled(2), tag="candidate", reason="two demos")
        print(f"saved versions {first} and {second}")

        print(programs.diff("triage", "production", "candidate"))

        programs.tag("triage", "production", "candidate", reason="more examples")
        back = programs.rollback("triage", first, reason="the second example misled it")
        programs.tag("triage", "production", back)
        for version in programs.history("triage", 3):
            print(f"{version.version} {list(version.tags)} {version.kind}: {version.reason}")

        triage = programs.load("triage", Triage, "production")
        print(f"{len(triage.decide.predict.demos)} demo, urgent: {triage(message='You charged me twice!').urgent}")

        # As one transaction, with an entry in the journal.
        answer = programs.call("triage", Triage, message="The shop is on fire.")
        print(f"urgent: {answer.urgent}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "local")
