"""Tools that a server has: a saved program, on a model that always says the same."""

import dspy
from dspy.utils import DummyLM

from dspex_persist.dspy import program_tool

dspy.configure(lm=DummyLM([{"answer": "by the server"}] * 100))
answer = program_tool("answer", lambda: dspy.Predict("question -> answer"))
