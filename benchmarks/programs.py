"""What a call of an LM through DSPy costs more if its program is bound to variables, or if it is recorded.

The model answers at once, from memory, so that the rest of a call is DSPy's own code. Times are CPU times of the
calling thread.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.plan import Plan
from benchmarks.table import Row, Target
from dspex_persist import Context

_CHUNK: Final = 20
_MOST_US: Final = 50.0


@dataclass(slots=True)
class _Subject:
    """A program to call, and in each round how many µs of CPU time a call took."""

    key: str
    what: str
    call: Callable[[], object]
    target: Target | None = None
    rounds: list[float] = field(default_factory=list)


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Measure all subjects in turn, chunk by chunk, and return what each costs more than the first one."""
    with ExitStack() as stack:
        plain, *others = [stack.enter_context(each) for each in _subjects(folder)]
        for count in range(plan.rounds):
            print(f"dspy: round {count + 1} of {plan.rounds}", file=sys.stderr, flush=True)
            _run([plain, *others], plan.slice_s * (1 + len(others)))
    rows = [Row.of_rounds(f"dspy.{plain.key}", plain.what, "µs", plain.rounds)]
    for each in others:
        more = [own - without for own, without in zip(each.rounds, plain.rounds, strict=True)]
        rows.append(Row.of_rounds(f"dspy.{each.key}", each.what, "µs more", more, target=each.target))
    return rows


def _run(subjects: list[_Subject], seconds: float) -> None:
    """Call all subjects in turn for this long; of each, the median of the chunks counts."""
    times: list[list[float]] = [[] for _ in subjects]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not times[-1]:
        for subject, own in zip(subjects, times, strict=True):
            began = time.thread_time()
            for _ in range(_CHUNK):
                subject.call()
            own.append((time.thread_time() - began) / _CHUNK * 1e6)
    for subject, own in zip(subjects, times, strict=True):
        subject.rounds.append(statistics.median(own))


def _subjects(folder: Path) -> Iterator[AbstractContextManager[_Subject]]:
    """Yield the subjects, first the one that the others are compared with."""
    at_most = Target("value", "at most", _MOST_US)
    yield _plain()
    yield _bound("bind.local", "bound, in memory", "local", at_most)
    yield _bound("bind.embedded", "bound, a file", folder / "programs.db", at_most)
    yield _recorded("record.local", "recorded, in memory", "local")
    yield _recorded("record.embedded", "recorded, a file", folder / "recorded.db")
    yield _recorded("record.budget", "recorded, within a budget", "local", max_tokens=10**12)


def _program() -> Any:
    import dspy  # slow to import, so only where it is measured

    lm = dspy.utils.DummyLM({"": {"answer": "42"}})
    program = dspy.Predict("question -> answer")
    program.set_lm(lm)
    return program


def _call_of(program: Any) -> Callable[[], object]:
    import dspy

    def call() -> object:
        with dspy.context(disable_history=True):
            return program(question="What is it?")

    return call


@contextmanager
def _plain() -> Iterator[_Subject]:
    yield _Subject("call", "a call of a predictor", _call_of(_program()))


@contextmanager
def _bound(key: str, what: str, backend: str | Path, target: Target) -> Iterator[_Subject]:
    from dspex_persist.dspy import bind

    with Context(f"bench-{key}", backend) as ctx:
        ctx.define("temperature", 0.3)
        program = bind(_program(), ctx, temperature="temperature")
        program(question="What is it?")
        (call,) = program.lm.history
        if call["kwargs"] != {"temperature": 0.3}:
            raise RuntimeError(f"{what}: the LM was called with {call['kwargs']}")
        yield _Subject(key, f"a call, {what}", _call_of(program), target)


@contextmanager
def _recorded(key: str, what: str, backend: str | Path, *, max_tokens: int | None = None) -> Iterator[_Subject]:
    from dspex_persist.dspy import recorded_calls

    with Context(f"bench-{key}", backend, max_tokens=max_tokens) as ctx:
        # In a context of its own, in which the calls of the other subjects are not recorded.
        inside, recording = copy_context(), ctx.recording()
        inside.run(recording.__enter__)
        call = _call_of(_program())
        try:
            yield _Subject(key, f"a call, {what}", lambda: inside.run(call))
        finally:
            inside.run(recording.__exit__, None, None, None)
        if len(recorded_calls(recording.id, ctx)) < _CHUNK:
            raise RuntimeError(f"{what}: the calls are not in the journal")
