"""A DSPy program whose temperature another process turns while it runs.

    dspex-persist serve                                                       # in one terminal
    python examples/turned_program.py                                         # in a second one
    dspex-persist set tuned temperature 0.9 --target 127.0.0.1:50051          # in a third one, as often as you like
    dspex-persist set tuned done true --target 127.0.0.1:50051

It needs the extra [dspy], and calls no model: an engine stands for it, which answers with the temperature it was given.
"""

import sys
import time
from typing import Any

import dspy
from dspy.lm15 import Message, Request, Response, TextPart, Usage

from dspex_persist import Context
from dspex_persist.dspy import bind

PAUSE_S = 0.05


class Thermometer:
    """The engine of an LM that tells at which temperature it was asked."""

    def complete(self, request: Request) -> Response:
        """Answer, as a model would."""
        text = f"[[ ## answer ## ]]\nasked at {request.config.temperature}\n\n[[ ## completed ## ]]"
        message = Message.assistant([TextPart(text)])
        usage = Usage(input_tokens=1, output_tokens=1, total_tokens=2)
        return Response(id=None, model="thermometer", message=message, finish_reason="stop", usage=usage)


class Draft(dspy.Module):  # type: ignore[misc]
    """Asks twice: both questions of one call are asked at the same temperature, whoever turns it meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        # The variable beats the predictor's own temperature.
        self.first = dspy.Predict("question -> answer", temperature=0.7)
        self.second = dspy.Predict("question, draft -> answer")

    def forward(self, question: str) -> Any:
        draft = self.first(question=question).answer
        time.sleep(PAUSE_S)
        return dspy.Prediction(answers=[draft, self.second(question=question, draft=draft).answer])


def main(target: str) -> None:
    """Call the program again and again, until somebody sets `done`; print what the model says when that changes."""
    dspy.configure(lm=dspy.LM("example/thermometer", engine=Thermometer(), cache=False))
    with Context("tuned", f"grpc://{target}") as ctx:
        ctx.define("temperature", 0.2, constraints={"min": 0, "max": 2})
        ctx.define("done", False)
        program = bind(Draft(), ctx, temperature="temperature")
        answers: list[str] = []
        while not ctx["done"]:
            before, answers = answers, program(question="How warm is it?").answers
            if answers != before:
                print(*answers, sep=", ", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051")
