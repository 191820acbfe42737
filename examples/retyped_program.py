"""A DSPy program whose module type another process changes while it runs.

    dspex-persist serve                                                       # in one terminal
    python examples/retyped_program.py                                        # in a second one
    dspex-persist set retyped strategy ChainOfThought --target 127.0.0.1:50051
    dspex-persist set retyped strategy ReAct --target 127.0.0.1:50051         # in a third one, as often as you like
    dspex-persist set retyped done true --target 127.0.0.1:50051

It needs the extra [dspy], and calls no model: an engine stands for it, which says what it was asked for.
"""

import re
import sys
import time

import dspy
from dspy.lm15 import Message, Request, Response, TextPart, Usage

from dspex_persist import Context
from dspex_persist.dspy import ModuleVariableResolver

PAUSE_S = 0.05
VALUES = {"next_tool_name": "finish", "next_tool_args": "{}"}


class Parrot:
    """The engine of an LM that says which fields it was asked for."""

    def complete(self, request: Request) -> Response:
        """Answer, as a model would."""
        last = request.messages[-1].text or ""
        fields = re.findall(r"`\[\[ ## (\w+) ## \]\]`", last)[:-1]
        values = {name: VALUES.get(name, f"asked for {', '.join(fields)}") for name in fields}
        text = "\n\n".join(f"[[ ## {name} ## ]]\n{value}" for name, value in values.items())
        message = Message.assistant([TextPart(f"{text}\n\n[[ ## completed ## ]]")])
        usage = Usage(input_tokens=1, output_tokens=1, total_tokens=2)
        return Response(id=None, model="parrot", message=message, finish_reason="stop", usage=usage)


def search(query: str) -> str:
    """Look something up."""
    return query


def main(target: str) -> None:
    """Call the program again and again, until somebody sets `done`; print what it does when that changes."""
    dspy.configure(lm=dspy.LM("example/parrot", engine=Parrot(), cache=False))
    with Context("retyped", f"grpc://{target}") as ctx:
        ctx.define("strategy", "Predict", type_name="module")
        ctx.define("done", False)

        resolver = ModuleVariableResolver(ctx)
        resolver.register_module("ReAct", dspy.ReAct, tools=[search])
        program = resolver.create_module("strategy", "question -> answer")
        program.module.demos = [dspy.Example(question="Is water wet?", answer="Yes.")]

        said = ""
        while not ctx["done"]:
            answer = program(question="Is fire hot?").answer
            before, said = said, f"{program.module_type}: {answer}"
            if said != before:
                if program.type_change is not None:
                    print(program.type_change)
                print(said, flush=True)
            time.sleep(PAUSE_S)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051")
