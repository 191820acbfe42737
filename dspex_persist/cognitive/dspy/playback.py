"""Plays recorded LM calls back as answers, and collects the divergences."""

import difflib
import json
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final
from uuid import uuid4

from dspy import LM, BaseLM, settings

from dspex_persist import clock
from dspex_persist.cognitive.dspy.differences import Difference, Told, of_answers, of_questions
from dspex_persist.cognitive.dspy.requests import LmRequest
from dspex_persist.errors import DspexError

RecordedCall = Mapping[str, Any]

_SENTENCES: Final = {
    "unexpected": "LM call {0} was not recorded",
    "explained": "LM call {0} was not recorded: it differs from recorded call {1} only by what LM call {2} tells",
    "repeated": "LM call {0} repeats recorded call {1} more often than recorded",
    "unused": "recorded LM call {1} was not made",
    "order": "LM call {0} is recorded call {1}, which was recorded before the call that now precedes it",
    "answer": "LM call {0} gets another answer than recorded call {1}",
}
# How many characters are compared; the time for it grows with their square.
_COMPARED: Final = 500


@dataclass(frozen=True, slots=True)
class LmDivergence:
    """A difference from the recording.

    Attributes:
        kind: "unexpected", "unused", "order" or "answer".
        ordinal: The number of the call in this run, or None if it was not made.
        asked: Its model and request.
        recorded: The corresponding recorded call, or the nearest one.
        outcome: The new answer of the LM (`response` or `error`).
        told_by: The divergence that has told the difference: this one adds nothing new, and is not in the list.
        repeated_by: The numbers of the later calls that differ only because of what this one tells.
    """

    kind: str
    ordinal: int | None = None
    asked: Mapping[str, Any] | None = None
    recorded: RecordedCall | None = None
    outcome: Mapping[str, Any] | None = None
    told_by: "LmDivergence | None" = None
    repeated_by: list[int] = field(default_factory=list, compare=False)

    def __str__(self) -> str:
        recorded = self.recorded["ordinal"] if self.recorded is not None else None
        if self.told_by is not None:
            return _SENTENCES["explained"].format(self.ordinal, recorded, self.told_by.ordinal)
        diff = self.diff()
        repeated = self.kind == "unexpected" and recorded is not None and not diff
        sentence = _SENTENCES["repeated" if repeated else self.kind].format(self.ordinal, recorded)
        if self.kind == "unexpected" and not repeated:
            sentence += (
                "; nothing is left of the recording" if recorded is None else f"; nearest is recorded call {recorded}"
            )
        if self.repeated_by:
            numbers = ", ".join(map(str, self.repeated_by))
            sentence += f"; {len(self.repeated_by)} more differ only because of this: LM calls {numbers}"
        return "\n".join([sentence, *diff])

    def diff(self) -> list[str]:
        """Return the lines that differ between recorded (-) and new (+), message by message, with some context."""
        return list(self._difference().lines) if self.told_by is None else []

    def _difference(self) -> Difference:
        if self.kind == "unexpected" and self.recorded is not None and self.asked is not None:
            request = {name: each for name, each in self.asked.items() if name != "model"}
            return of_questions(self.recorded["model"], self.recorded["request"], self.asked["model"], request)
        if self.kind == "answer" and self.recorded is not None:
            return of_answers(self.recorded, self.outcome or {})
        return Difference()


@dataclass(eq=False)
class UnexpectedLmCallError(DspexError):
    """An LM got a request that was not recorded."""

    divergence: LmDivergence

    def __str__(self) -> str:
        return str(self.divergence)


@dataclass(eq=False)
class UnseenLmCallError(DspexError):
    """During a playback, an LM was called in a way that is never recorded."""

    method: str

    def __str__(self) -> str:
        call = "lm(...)" if self.method == "forward" else "await lm.acall(...)"
        return f"a replay calls no LM, and calls of {self.method} are not recorded: use {call}"


class RecordedLmError(DspexError):
    """An error that an LM raised during the recording. It is also an instance of that error's class, if it exists."""


class Playback:
    """Recorded calls, each of which answers one call, and the divergences so far. Usable from any thread."""

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
        self._told: Told[LmDivergence] = Told()
        self._in_line: list[tuple[int, LmRequest, RecordedCall]] = []

    def take(self, lm: object, request: LmRequest, *, concurrent: bool) -> tuple[int, LmRequest, RecordedCall | None]:
        """Take the recorded call for a new one.

        Args:
            lm: The LM that is called.
            request: The request.
            concurrent: Whether the call comes from another thread or task than the tool's.

        Returns:
            The number of the new call, its request, and the recorded call; with `live`, None if there is none.

        Raises:
            UnexpectedLmCallError: Such a call was not recorded, and `live` is not set.
        """
        with self._lock:
            ordinal, self._count = self._count, self._count + 1
            for variant in self._variants(lm, request):
                if left := self._left[variant.hash]:
                    recorded = left.popleft()
                    if not concurrent and not recorded["concurrent"]:
                        self._in_line.append((ordinal, variant, recorded))
                    return ordinal, variant, recorded
            divergence = self._tell(self._unexpected(ordinal, request))
        if not self.live:
            raise UnexpectedLmCallError(divergence)
        return ordinal, request, None

    def has(self, lm: object, request: LmRequest) -> bool:
        """Return whether there is an unused recorded call for the request."""
        with self._lock:
            return any(self._left.get(variant.hash) for variant in self._variants(lm, request))

    def _variants(self, lm: object, request: LmRequest) -> Iterator[LmRequest]:
        """Yield the request; for a stand-in, the request as each of the recorded LMs would get it."""
        if not isinstance(lm, StandIn):
            yield request
            return
        for call in self.calls:
            facts = call["lm"]
            model_type = call["request"]["model_type"]
            yield replace(
                request, model=call["model"], model_type=model_type, defaults=facts["defaults"], lm_class=facts["class"]
            )

    def _unexpected(self, ordinal: int, request: LmRequest) -> LmDivergence:
        question = _question(request.model, request.request)
        same = next((call for call in reversed(self.calls) if call["hash"] == request.hash), None)
        left = [call for calls in self._left.values() for call in calls if call["ordinal"] not in self._near]
        nearest = same or max(left, key=lambda call: _likeness(question, _question_of(call)), default=None)
        if nearest is not None:
            self._near.add(nearest["ordinal"])
        return LmDivergence("unexpected", ordinal, question, nearest)

    def _tell(self, divergence: LmDivergence) -> LmDivergence:
        """Add a divergence, unless earlier ones explain it; returns it as its call tells it."""
        difference = divergence._difference()
        told_by = self._told.teller(difference) if divergence.kind == "unexpected" else None
        if told_by is not None:
            told_by.repeated_by.append(divergence.ordinal or 0)
            return replace(divergence, told_by=told_by)
        self.divergences.append(divergence)
        self._told.add(difference, divergence)
        return divergence

    def compare(
        self, ordinal: int, request: LmRequest, recorded: RecordedCall | None, outcome: Mapping[str, Any]
    ) -> None:
        """Compare the answer of an LM with the recorded one, without the usage."""
        if recorded is not None and _result_of(recorded) != _result_of(outcome):
            question = _question(request.model, request.request)
            with self._lock:
                self._tell(LmDivergence("answer", ordinal, question, recorded, outcome))

    def finish(self) -> None:
        """Add the divergences that only show at the end: calls in another order, and calls that were not made."""
        with self._lock:
            for (_, _, before), (ordinal, request, recorded) in zip(self._in_line, self._in_line[1:], strict=False):
                if recorded["ordinal"] < before["ordinal"]:
                    question = _question(request.model, request.request)
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
    """Return an LM's answer or error without the usage, and without the id and time, which always differ."""
    if "error" in outcome:
        return outcome["error"]
    response = outcome["response"]
    return response["outputs"] if "outputs" in response else response["typed"]["message"]


def _lines(document: Any) -> list[str]:
    """Return a document as lines, with its texts split into lines, too."""
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)
    return text.replace("\\n", "\n").splitlines()


def _likeness(one: Any, other: Any) -> tuple[float, float]:
    """Return the likeness of two documents by lines, then that of the differing lines by characters."""
    lines, others = _lines(one), _lines(other)
    matcher = difflib.SequenceMatcher(None, lines, others, autojunk=False)
    differing = [each for each in matcher.get_opcodes() if each[0] != "equal"]
    text = "".join("".join(lines[start:end]) for _, start, end, _, _ in differing)[:_COMPARED]
    other_text = "".join("".join(others[start:end]) for _, _, _, start, end in differing)[:_COMPARED]
    return matcher.ratio(), difflib.SequenceMatcher(None, text, other_text, autojunk=False).ratio()


# Answering


def error_of(recorded: Mapping[str, Any]) -> Exception:
    """Return a recorded error to raise: also an instance of its original class, if this process has that."""
    module, _, name = str(recorded["type"]).rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    bases: tuple[type, ...] = (RecordedLmError,)
    if isinstance(kind, type) and issubclass(kind, Exception):
        bases = (RecordedLmError, kind)
    message = str(recorded["message"])
    # The original __init__ may need arguments that were not recorded, and __str__ may show them.
    methods = {"__init__": _take_message, "__str__": lambda error: str(error.message), "__module__": module}
    try:
        error_type = type(name, bases, methods)
    except TypeError:  # the two bases are incompatible
        error_type = type(name, (RecordedLmError,), methods)
    error: Exception = error_type(message)
    return error


def _take_message(error: Any, message: str) -> None:
    error.message = message
    error.args = (message,)


class StandIn:
    """Marks an LM that takes calls during a playback because none is configured."""


class _PlainStandIn(StandIn, BaseLM):  # type: ignore[misc]
    """Stands in for an LM without known capabilities."""


class _CapableStandIn(StandIn, LM):  # type: ignore[misc]
    """Stands in for a `dspy.LM`: DSPy derives the model's capabilities, which adapters query, from its name."""


def stand_in(calls: Sequence[RecordedCall]) -> Any:
    """Return an LM for playing back these calls, modelled on the LM of the first one."""
    ambient = calls[0]
    capable = ambient["lm"]["class"] == "dspy.clients.lm.LM"
    lm = (_CapableStandIn if capable else _PlainStandIn)(ambient["model"], ambient["request"]["model_type"])
    lm.kwargs = dict(ambient["lm"]["defaults"])
    return lm


def keep_account(lm: Any, call: Mapping[str, Any], response: Mapping[str, Any], answer: Any) -> None:
    """Add a played answer to DSPy's usage tracker and histories, as DSPy does for any answer.

    Args:
        lm: The LM that was called.
        call: Its `prompt`, `messages` and `kwargs`.
        response: The recorded response.
        answer: The answer that the caller gets.
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
