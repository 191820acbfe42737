"""Recorded LM calls as answers, and whatever differs from them."""

import difflib
import json
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final
from uuid import uuid4

from dspy import LM, BaseLM, settings

from dspex_persist import clock
from dspex_persist.cognitive.dspy.requests import LmRequest
from dspex_persist.errors import DspexError

RecordedCall = Mapping[str, Any]

_SAYS: Final = {
    "unexpected": "LM call {0} asks for what was not recorded",
    "repeated": "LM call {0} repeats recorded call {1} once more than was recorded",
    "unused": "recorded LM call {1} was not made",
    "order": "LM call {0} is recorded call {1}, which came before the one that was made before it",
    "answer": "LM call {0} is answered otherwise than recorded call {1}",
}
# How many characters are compared, in a time that grows with their square.
_COMPARED: Final = 500


@dataclass(frozen=True, slots=True)
class LmDivergence:
    """A difference from the recording.

    `kind`: "unexpected", "unused", "order" or "answer". `ordinal`: the number of the call in this run (None: it was
    not made). `asked`: its model and request. `recorded`: the recorded call that it is, or that is nearest to it.
    `outcome`: what the LM answers today (`response` or `error`).
    """

    kind: str
    ordinal: int | None = None
    asked: Mapping[str, Any] | None = None
    recorded: RecordedCall | None = None
    outcome: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        recorded = self.recorded["ordinal"] if self.recorded is not None else None
        repeated = self.kind == "unexpected" and recorded is not None and not self.diff()
        said = _SAYS["repeated" if repeated else self.kind].format(self.ordinal, recorded)
        if self.kind == "unexpected" and not repeated:
            said += (
                "; nothing is left of the recording" if recorded is None else f"; nearest is recorded call {recorded}"
            )
        return "\n".join([said, *self.diff()])

    def diff(self) -> list[str]:
        """The lines in which recorded (-) and new (+) differ, with some around them."""
        if self.kind == "unexpected" and self.recorded is not None:
            return _diff(_question_of(self.recorded), self.asked)
        if self.kind == "answer" and self.recorded is not None:
            return _diff(_result_of(self.recorded), _result_of(self.outcome or {}))
        return []


@dataclass(eq=False)
class UnexpectedLmCallError(DspexError):
    """An LM was asked for what the recording does not have."""

    divergence: LmDivergence

    def __str__(self) -> str:
        return str(self.divergence)


@dataclass(eq=False)
class UnseenLmCallError(DspexError):
    """An LM was to be asked in a way that is not recorded, while recordings answer for it."""

    method: str

    def __str__(self) -> str:
        call = "lm(...)" if self.method == "forward" else "await lm.acall(...)"
        return f"no LM is asked in a replay, and calls of {self.method} are not recorded: use {call}"


class RecordedLmError(DspexError):
    """An error that an LM raised when the recording was made. It is an error of that class, too, if there is one."""


class Playback:
    """Recorded calls, each of which is used once, and the divergences found so far. Usable from any thread."""

    def __init__(
        self, calls: Iterable[RecordedCall], *, live: bool = False, divergences: list[Any] | None = None
    ) -> None:
        self.calls: Sequence[RecordedCall] = sorted(calls, key=lambda call: int(call["ordinal"]))
        self.live = live
        self.divergences: list[LmDivergence] = [] if divergences is None else divergences
        self.line: object = None
        self._lock = threading.Lock()
        self._left: dict[str, deque[RecordedCall]] = defaultdict(deque)
        for call in self.calls:
            self._left[call["hash"]].append(call)
        self._count = 0
        self._near: set[int] = set()
        self._in_line: list[tuple[int, LmRequest, RecordedCall]] = []

    def take(self, lm: object, asked: LmRequest, *, concurrent: bool) -> tuple[int, LmRequest, RecordedCall | None]:
        """The number of a new call, what it asks, and its recorded call. `UnexpectedLmCallError` if there is none;
        None instead with `live`."""
        with self._lock:
            ordinal, self._count = self._count, self._count + 1
            for variant in self._variants(lm, asked):
                if left := self._left[variant.hash]:
                    recorded = left.popleft()
                    if not concurrent and not recorded["concurrent"]:
                        self._in_line.append((ordinal, variant, recorded))
                    return ordinal, variant, recorded
            divergence = self._unexpected(ordinal, asked)
            self.divergences.append(divergence)
        if not self.live:
            raise UnexpectedLmCallError(divergence)
        return ordinal, asked, None

    def has(self, lm: object, asked: LmRequest) -> bool:
        """Whether there is a recorded call for it that was not yet used."""
        with self._lock:
            return any(self._left.get(variant.hash) for variant in self._variants(lm, asked))

    def _variants(self, lm: object, asked: LmRequest) -> Iterator[LmRequest]:
        """What is asked; of an LM that stands in, as each of the recorded ones would have been asked."""
        if not isinstance(lm, StandIn):
            yield asked
            return
        for call in self.calls:
            facts = call["lm"]
            model_type = call["request"]["model_type"]
            yield replace(
                asked, model=call["model"], model_type=model_type, defaults=facts["defaults"], lm_class=facts["class"]
            )

    def _unexpected(self, ordinal: int, asked: LmRequest) -> LmDivergence:
        question = _question(asked.model, asked.request)
        same = next((call for call in reversed(self.calls) if call["hash"] == asked.hash), None)
        left = [call for calls in self._left.values() for call in calls if call["ordinal"] not in self._near]
        nearest = same or max(left, key=lambda call: _likeness(question, _question_of(call)), default=None)
        if nearest is not None:
            self._near.add(nearest["ordinal"])
        return LmDivergence("unexpected", ordinal, question, nearest)

    def compare(
        self, ordinal: int, asked: LmRequest, recorded: RecordedCall | None, outcome: Mapping[str, Any]
    ) -> None:
        """See whether an LM answers as it did. How much it counted is not compared."""
        if recorded is not None and _result_of(recorded) != _result_of(outcome):
            question = _question(asked.model, asked.request)
            with self._lock:
                self.divergences.append(LmDivergence("answer", ordinal, question, recorded, outcome))

    def finish(self) -> None:
        """Find what can only be seen at the end: calls in another order, and calls that were not made."""
        with self._lock:
            for (_, _, before), (ordinal, asked, recorded) in zip(self._in_line, self._in_line[1:], strict=False):
                if recorded["ordinal"] < before["ordinal"]:
                    question = _question(asked.model, asked.request)
                    self.divergences.append(LmDivergence("order", ordinal, question, recorded))
            left = {call["ordinal"] for calls in self._left.values() for call in calls} - self._near
            unused = [LmDivergence("unused", recorded=call) for call in self.calls if call["ordinal"] in left]
            self.divergences.extend(unused)


# Comparing


def _question(model: str, request: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": model, **request}


def _question_of(call: RecordedCall) -> dict[str, Any]:
    return _question(call["model"], call["request"])


def _result_of(outcome: Mapping[str, Any]) -> Any:
    """What an LM answered, or its error, without what it counted. Each answer has an id and a time of its own."""
    if "error" in outcome:
        return outcome["error"]
    response = outcome["response"]
    return response["outputs"] if "outputs" in response else response["typed"]["message"]


def _lines(document: Any) -> list[str]:
    """A document by lines, those of its texts as well."""
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)
    return text.replace("\\n", "\n").splitlines()


def _diff(recorded: Any, new: Any) -> list[str]:
    return list(difflib.unified_diff(_lines(recorded), _lines(new), "recorded", "new", lineterm="", n=2))


def _likeness(one: Any, other: Any) -> tuple[float, float]:
    """By lines; where as many differ, by the characters of those that do."""
    lines, others = _lines(one), _lines(other)
    matcher = difflib.SequenceMatcher(None, lines, others, autojunk=False)
    differing = [each for each in matcher.get_opcodes() if each[0] != "equal"]
    text = "".join("".join(lines[start:end]) for _, start, end, _, _ in differing)[:_COMPARED]
    other_text = "".join("".join(others[start:end]) for _, _, _, start, end in differing)[:_COMPARED]
    return matcher.ratio(), difflib.SequenceMatcher(None, text, other_text, autojunk=False).ratio()


# Answering


def error_of(recorded: Mapping[str, Any]) -> Exception:
    """A recorded error, to be raised: of its own class too, where that is one that this process knows."""
    module, _, name = str(recorded["type"]).rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    bases: tuple[type, ...] = (RecordedLmError,)
    if isinstance(kind, type) and issubclass(kind, Exception):
        bases = (RecordedLmError, kind)
    message = str(recorded["message"])
    # Its own __init__ may want what was not recorded, and its __str__ may show it.
    methods = {"__init__": _take_message, "__str__": lambda error: str(error.message), "__module__": module}
    try:
        made = type(name, bases, methods)
    except TypeError:  # two classes of which no third can be made
        made = type(name, (RecordedLmError,), methods)
    error: Exception = made(message)
    return error


def _take_message(error: Any, message: str) -> None:
    error.message = message
    error.args = (message,)


class StandIn:
    """What marks an LM that is there only to be asked, as none is configured."""


class _PlainStandIn(StandIn, BaseLM):  # type: ignore[misc]
    """For calls of an LM that promised nothing."""


class _CapableStandIn(StandIn, LM):  # type: ignore[misc]
    """For calls of a `dspy.LM`: DSPy knows from its name what the model can do, and adapters ask for it."""


def stand_in(calls: Sequence[RecordedCall]) -> Any:
    """An LM to which recorded calls can be made."""
    ambient = calls[0]
    capable = ambient["lm"]["class"] == "dspy.clients.lm.LM"
    made = (_CapableStandIn if capable else _PlainStandIn)(ambient["model"], ambient["request"]["model_type"])
    made.kwargs = dict(ambient["lm"]["defaults"])
    return made


def keep_account(lm: Any, call: Mapping[str, Any], response: Mapping[str, Any], answer: Any) -> None:
    """Count what a played answer had used, and enter it in the histories, as DSPy does for any answer.

    `call` has `prompt`, `messages` and `kwargs`.
    """
    if settings.usage_tracker is not None:
        for model, usage in response["usage"].items():
            settings.usage_tracker.add_usage(model, usage)
    if settings.disable_history:
        return
    lm.update_history(
        {
            **call,
            "response": None,
            "outputs": answer if isinstance(answer, list) else [answer],
            "usage": response["usage"].get(lm.model, {}),
            "cost": None,
            "timestamp": clock.now().isoformat(),
            "uuid": str(uuid4()),
            "model": lm.model,
            "response_model": lm.model,
            "model_type": lm.model_type,
        }
    )
