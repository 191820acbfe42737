"""LMs and small programs for tests of what is recorded of their calls."""

import asyncio
import contextvars
import json
from collections.abc import Callable, Mapping
from typing import Any

from tests.late import Late

dspy, lm15 = Late("dspy"), Late("dspy.lm15")
lm_calls = Late("dspex_persist.cognitive.dspy")


class Ledger:
    """The part of a tool's session that the recorder uses: it stores entries as JSON."""

    is_far = False

    def __init__(self) -> None:
        self.cancelled = False
        self.calls: list[dict[str, Any]] = []

    def check_budgets(self, own: object) -> None:
        pass

    def record(self, kind: str, entry: Mapping[str, Any]) -> None:
        assert kind == "lm"
        self.calls.append(json.loads(json.dumps(entry, allow_nan=False)))


class Engine:
    """The backend of an LM in Python: it repeats the last message in capitals, or fails."""

    def __init__(self, *parts: Any, error: Exception | None = None) -> None:
        self.parts, self.error, self.calls = parts, error, 0

    def complete(self, request: Any) -> Any:
        self.calls += 1
        if self.error is not None:
            raise self.error
        parts = self.parts or (lm15.TextPart((request.messages[-1].text or "").upper()),)
        usage = lm15.Usage(input_tokens=3, output_tokens=2, total_tokens=5)
        return lm15.Response(
            id=None, model="m", message=lm15.Message.assistant(list(parts)), finish_reason="stop", usage=usage
        )


class AsyncEngine:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def complete(self, request: Any) -> Any:
        return self.engine.complete(request)


class Stuck:
    """An engine that never answers. `asked` is set when it is asked."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def complete(self, request: Any) -> Any:
        self.asked.set()
        await asyncio.get_running_loop().create_future()
        raise AssertionError("never called")


def lm_on(engine: Engine, **options: Any) -> Any:
    return dspy.LM(
        "test/m", engine=engine, async_engine=AsyncEngine(engine), **{"cache": False, "num_retries": 0} | options
    )


def dummy(*answers: str) -> Any:
    return dspy.utils.DummyLM([{"answer": answer} for answer in answers])


def recorded(program: Callable[[], Any]) -> tuple[Any, list[dict[str, Any]]]:
    """The result of a program, and its LM calls by ordinal."""
    ledger = Ledger()

    def run() -> Any:
        lm_calls.record_calls(ledger)  # type: ignore[arg-type]
        return program()

    result = contextvars.copy_context().run(run)
    return result, sorted(ledger.calls, key=lambda call: call["ordinal"])


def run_async(program: Callable[[], Any]) -> Callable[[], Any]:
    async def run() -> Any:
        return await program()

    return lambda: asyncio.run(run())


def ask(question: str, **options: Any) -> str:
    return str(dspy.Predict("question -> answer", **options)(question=question).answer)


def outputs(call: Mapping[str, Any]) -> Any:
    return call["response"]["outputs"]
