"""Reads and writes of one variable through `Context` on each backend, and those of a plain dict.

The caller is the main thread, as in most programs, and has company by nobody.
"""

import sys
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from benchmarks.load import ratios_of
from benchmarks.plan import Plan
from benchmarks.rpc import start_server
from benchmarks.table import Row, Target
from dspex_persist import BridgedState, Context, StateProvider

_NAME: Final = "temperature"
_REFERENCE: Final = "local"
_PATIENCE_S: Final = 30
_Variables = MutableMapping[str, Any]


@dataclass(slots=True)
class _Subject:
    """Something with variables: a dict, or a context.

    Attributes:
        key: Its part of the keys of rows.
        what: What it is, for people.
        variables: What is read and written.
        chunk: How many calls are made between two looks at the clock.
        targets: By operation.
        reference: The key of the subject that its rates are compared with.
    """

    key: str
    what: str
    variables: _Variables
    chunk: int
    targets: dict[str, Target] = field(default_factory=dict)
    reference: str = _REFERENCE
    written: int = 0
    rates: dict[str, list[float]] = field(default_factory=lambda: {"get": [], "set": []})

    def run(self, operation: str, seconds: float) -> None:
        """Get or set, one call after the other, for this long, and note the rate."""
        run: Callable[[int], None] = getattr(self, operation)
        clock, calls = time.perf_counter, 0
        began = now = clock()
        while now < began + seconds:
            run(self.chunk)
            calls += self.chunk
            now = clock()
        self.rates[operation].append(calls / (now - began))

    def get(self, count: int) -> None:
        variables = self.variables
        for _ in range(count):
            variables.get(_NAME)

    def set(self, count: int) -> None:
        variables, first = self.variables, self.written
        for number in range(first, first + count):
            variables[_NAME] = number / 4
        self.written += count

    def check(self) -> None:
        """Raise RuntimeError if it has not kept each value as a version."""
        if isinstance(self.variables, Context):
            kept = self.variables.info(_NAME)
            if (kept.version, kept.value) != (self.written, (self.written - 1) / 4):
                raise RuntimeError(f"{self.what}: {self.written} values were written, and there is {kept}")


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Measure all subjects in turn, round by round, then check that each write made a version."""
    with ExitStack() as stack:
        subjects = [stack.enter_context(each) for each in _subjects(folder)]
        for count in range(plan.rounds):
            print(f"cognitive: round {count + 1} of {plan.rounds}", file=sys.stderr, flush=True)
            for operation in ("get", "set"):
                for subject in subjects:
                    subject.run(operation, plan.slice_s)
        for subject in subjects:
            subject.check()
    return [_row(operation, subject, subjects) for operation in ("get", "set") for subject in subjects]


def _subjects(folder: Path) -> Iterator[AbstractContextManager[_Subject]]:
    per_s = {"get": Target("value", "at least", 150_000), "set": Target("value", "at least", 30_000)}
    yield _plain()
    yield _on(_REFERENCE, "in memory", "local", chunk=50, targets=per_s)
    yield _on("embedded", "a file", folder / "context.db", chunk=10)
    yield _on_server(folder / "served.db")
    yield _cached(folder / "cached.db")


@contextmanager
def _plain() -> Iterator[_Subject]:
    yield _Subject("dict", "a plain dict", {_NAME: 0.0}, chunk=1_000)


@contextmanager
def _on(key: str, what: str, backend: str | Path | StateProvider, **others: Any) -> Iterator[_Subject]:
    with Context(f"bench-{key}", backend) as ctx:
        ctx.define(_NAME, 0.0, constraints={"min": 0, "max": 1e12})
        yield _Subject(key, f"Context, {what}", cast(_Variables, ctx), **others)


@contextmanager
def _on_server(path: Path) -> Iterator[_Subject]:
    with start_server(path) as process:
        with _on("bridged", "a server", f"grpc://127.0.0.1:{process.port}", chunk=1) as subject:
            yield subject
        process.terminate(_PATIENCE_S)


@contextmanager
def _cached(path: Path) -> Iterator[_Subject]:
    """A client that keeps what it has read. Each round has its writes after its reads, as those of the others."""
    target = Target("ratio", "at least", 50)
    with start_server(path) as process:
        with (
            BridgedState(f"127.0.0.1:{process.port}", cache=True) as state,
            _on("cached", "a server, cached", state, chunk=50, targets={"get": target}, reference="bridged") as subject,
        ):
            yield subject
        process.terminate(_PATIENCE_S)


def _row(operation: str, subject: _Subject, subjects: list[_Subject]) -> Row:
    reference = next(each for each in subjects if each.key == subject.reference)
    rates = subject.rates[operation]
    return Row.of_rounds(
        f"cognitive.{operation}.{subject.key}",
        f"{operation}, {subject.what}",
        f"{operation}s/s",
        rates,
        ratios_of(rates, reference.rates[operation]) if subject is not reference else (),
        ratio_to=f"cognitive.{operation}.{reference.key}" if subject is not reference else "",
        target=subject.targets.get(operation),
    )
