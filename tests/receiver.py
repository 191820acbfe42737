"""An LM that keeps the options of each request which it really receives."""

import threading
from collections.abc import Callable
from typing import Any

from tests.late import Late
from tests.lms import AsyncEngine

dspy, lm15 = Late("dspy"), Late("dspy.lm15")

FIELDS = {
    "answer": "42",
    "next_thought": "done",
    "next_tool_name": "finish",
    "next_tool_args": "{}",
    "reasoning": "so",
    "generated_code": "x = 1",
}


class Receiver:
    """The backend of an LM: it keeps the requests, and answers with all fields that are asked for."""

    def __init__(self, **fields: str) -> None:
        self.fields = {**FIELDS, **fields}
        self.requests: list[Any] = []
        self.threads: list[int] = []
        self.before: Callable[[], object] = lambda: None

    def complete(self, request: Any) -> Any:
        self.before()
        self.requests.append(request)
        self.threads.append(threading.get_ident())
        asked = str(request.system) + str(request.messages)
        text = "\n\n".join(
            f"[[ ## {name} ## ]]\n{value}" for name, value in self.fields.items() if f"## {name} ##" in asked
        )
        usage = lm15.Usage(input_tokens=3, output_tokens=2, total_tokens=5)
        message = lm15.Message.assistant([lm15.TextPart(text or "as you like")])
        return lm15.Response(id=None, model="m", message=message, finish_reason="stop", usage=usage)

    def stream(self, request: Any) -> Any:
        return lm15.response_to_events(self.complete(request))

    @property
    def texts(self) -> list[str]:
        """All that each request says to the model."""
        return [f"{request.system}\n{request.messages}" for request in self.requests]

    @property
    def configs(self) -> list[Any]:
        return [request.config for request in self.requests]

    @property
    def temperatures(self) -> list[float | None]:
        return [config.temperature for config in self.configs]


def lm_on(receiver: Receiver, model: str = "test/m", **options: Any) -> Any:
    return dspy.LM(
        model, engine=receiver, async_engine=AsyncEngine(receiver), **{"cache": False, "num_retries": 0} | options
    )
