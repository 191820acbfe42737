"""Recorded LM calls as people see them, what a model was asked and what it answered; and sums of what they cost.

An entry of an execution's `recorded["lm"]` has more (docs/dspy.md), and parts of it may be missing: older releases
recorded less, and an import accepts any. So everything here has a default.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from math import inf
from typing import Any, Final, NamedTuple

from dspex_persist.spelling import quote
from dspex_persist.state.audit import ExecutionDetail, Query, check_texts, is_glob, suggestion
from dspex_persist.state.budgets import NOTHING, Spent
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.globs import compile_glob
from dspex_persist.state.meter import LmCounts

_MOST: Final = 2**53
"""The largest count: a double, as which they are summed, has it exactly."""
_TOO_LARGE: Final = 2**63
_INPUT: Final = ("prompt_tokens", "input_tokens")
_OUTPUT: Final = ("completion_tokens", "output_tokens")


@dataclass(frozen=True, slots=True)
class LmMessage:
    """A message to a model. `text` also tells what is no text in it, such as a tool call or an image."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class LmCall:
    """A recorded LM call.

    Attributes:
        execution_id: The execution that made it.
        tool: The tool of that execution.
        ordinal: Its number in the execution, from 0.
        predictor: The path of the predictor that made it, such as "generate.predict"; "" if unknown.
        at: When it began; None if unknown.
        latency_us: How long it took, in microseconds; None if unknown.
        cached: Whether a cache answered it; None if unknown.
        cost: In USD, as the LM says; 0 from a cache. None if nobody says it.
        input_tokens: Tokens of the request.
        output_tokens: Tokens of the answer.
        total_tokens: Both, and what the model counts besides. All are 0 where nothing was counted, as from a cache.
        options: The options that affect the answer, such as the temperature.
        variables: The variables that the call used, with their versions.
        messages: What the model was asked.
        answers: Its answers; more than one with the option `n`.
        failed: Whether the LM raised an error.
        error_type: The type of that error.
        error: The message of that error.
        concurrent: Whether it came from another thread or task than the tool's own.
        hash: SHA-256 of model and request, by which replays find it.
    """

    execution_id: str
    tool: str
    ordinal: int
    model: str
    model_type: str
    predictor: str
    at: datetime | None
    latency_us: int | None
    cached: bool | None
    cost: float | None
    input_tokens: int
    output_tokens: int
    total_tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, int] = field(default_factory=dict)
    messages: tuple[LmMessage, ...] = ()
    answers: tuple[str, ...] = ()
    failed: bool = False
    error_type: str = ""
    error: str = ""
    concurrent: bool = False
    hash: str = ""


class UsageBy(StrEnum):
    """What LM calls are summed by."""

    SESSION = "session"
    TOOL = "tool"
    MODEL = "model"
    DAY = "day"
    """In UTC."""


@dataclass(frozen=True, slots=True)
class LmUsage:
    """The sums of LM calls, also of failed ones. A field that they are not summed by is None.

    Attributes:
        day: The day on which the calls began, in UTC: 2026-03-01. For a recording without times, when it ended.
        executions: How many executions made the calls.
        calls: How many calls there were.
        failed: How many of them failed.
        cached: How many of them a cache answered.
        input_tokens: Tokens of the requests.
        output_tokens: Tokens of the answers.
        total_tokens: Both, and what models count besides.
        cost: In USD; None if no cost is known of any call.
        priced: Of how many calls the cost is known.
        latency_us: How long the calls took together, in microseconds.
    """

    session_id: str | None = None
    tool: str | None = None
    model: str | None = None
    day: str | None = None
    executions: int = 0
    calls: int = 0
    failed: int = 0
    cached: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    cost: float | None = None
    priced: int = 0
    latency_us: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LmUsageQuery(Query[LmUsage]):
    """Queries sums of LM calls, the largest cost first; with days, the newest (or oldest) day first.

    `since` and `until` are about the commits with which the executions of the calls ended.

    Attributes:
        by: What to sum by, of session, tool, model and day: such as ("model", "day"). () for one sum of everything.
        tool: A tool's name, or a glob.
        model: A model's name, or a glob.
    """

    by: Sequence[str] = (UsageBy.MODEL,)
    tool: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        Query.__post_init__(self)
        check_texts(self, "tool", "model")
        by = (self.by,) if isinstance(self.by, str) else self.by
        object.__setattr__(self, "by", tuple(dict.fromkeys(map(_usage_by, by))))


def _usage_by(name: str) -> UsageBy:
    values = [each.value for each in UsageBy]
    if name not in values:
        reason = f"calls are not summed by {quote(name)}; {suggestion(str(name), values)}"
        raise InvalidArgumentError("by", reason)
    return UsageBy(name)


def lm_calls_of(execution: ExecutionDetail, *, children: bool = False) -> tuple[LmCall, ...]:
    """Return the LM calls of an execution, in the order in which they began.

    Args:
        execution: The execution.
        children: Add those of the executions that it called.
    """
    summary = execution.summary
    calls = [
        lm_call_of(entry, number, summary.execution_id, summary.tool)
        for number, entry in enumerate(_items(execution.recorded.get("lm")))
        if isinstance(entry, Mapping)
    ]
    called = (each for child in execution.children for each in lm_calls_of(child, children=True))
    return (*sorted(calls, key=lambda call: call.ordinal), *(called if children else ()))


def lm_call_of(entry: Mapping[str, Any], number: int = 0, execution_id: str = "", tool: str = "") -> LmCall:
    """Return the call in an entry of `recorded["lm"]`, where it has the place `number`."""
    ordinal = _count(entry.get("ordinal"))
    request, response, error = (_object(entry.get(name)) for name in ("request", "response", "error"))
    begin = _count(entry.get("at"))
    return LmCall(
        execution_id,
        tool,
        number if ordinal is None else ordinal,
        entry["model"] if isinstance(entry.get("model"), str) else "",
        _text(request.get("model_type")),
        _text(entry.get("predictor")),
        None if begin is None else _moment(begin),
        _count(entry.get("latency_us")),
        entry["cached"] if isinstance(entry.get("cached"), bool) else None,
        _number(entry.get("cost")),
        # Those of a call that failed, or that only the LM's history tells, are beside its answer.
        *_tokens([*_object(response.get("usage")).values(), *_object(entry.get("usage")).values()]),
        _object(request.get("options")),
        {name: version for name, version in _object(entry.get("variables")).items() if isinstance(version, int)},
        tuple(map(_message, _items(request.get("messages")))),
        tuple(map(_said, _answers(response))),
        isinstance(entry.get("error"), Mapping),
        _text(error.get("type")),
        _text(error.get("message")),
        entry.get("concurrent") is True,
        _text(entry.get("hash")),
    )


# Sums


class Ended(NamedTuple):
    """An execution that has ended, with what it recorded."""

    session_id: str
    execution_id: str
    tool: str
    at: datetime
    recorded: Mapping[str, Any]


def usage_of(query: LmUsageQuery, executions: Iterable[Ended]) -> list[LmUsage]:
    """Sum the LM calls of these executions, with all conditions of the query that are about calls, in its order."""
    is_wanted = compile_glob(query.model) if is_glob(query.model) else (lambda model: query.model in ("", model))
    groups: dict[tuple[str | None, ...], list[LmCall]] = {}
    for execution in executions:
        for number, entry in enumerate(_items(execution.recorded.get("lm"))):
            if not isinstance(entry, Mapping):
                continue
            call = lm_call_of(entry, number, execution.execution_id, execution.tool)
            if is_wanted(call.model):
                group = (execution.session_id, execution.tool, call.model, _day(entry, execution.at))
                key = tuple(each if by in query.by else None for by, each in zip(UsageBy, group, strict=True))
                groups.setdefault(key, []).append(call)
    return _ordered(query, [_sum(key, calls) for key, calls in groups.items()])


def merged(query: LmUsageQuery, sums: Iterable[LmUsage]) -> list[LmUsage]:
    """Sum these, which are by session as well, by what a query asks for, in its order."""
    groups: dict[tuple[str | None, ...], list[LmUsage]] = {}
    for each in sums:
        key = tuple(getattr(each, _FIELDS[by]) if by in query.by else None for by in UsageBy)
        groups.setdefault(key, []).append(each)
    return _ordered(query, [_merged(key, group) for key, group in groups.items()])


def _merged(key: Sequence[str | None], group: Sequence[LmUsage]) -> LmUsage:
    costs = [each.cost for each in group if each.cost is not None]
    session_id, tool, model, day = key
    counts = {name: sum(getattr(each, name) for each in group) for name in _COUNTS}
    return LmUsage(session_id, tool, model, day, cost=sum(costs) if costs else None, **counts)


def _ordered(query: LmUsageQuery, sums: list[LmUsage]) -> list[LmUsage]:
    sums.sort(key=lambda usage: tuple(getattr(usage, _FIELDS[UsageBy(by)]) or "" for by in query.by))
    sums.sort(
        key=lambda usage: (-inf if usage.cost is None else usage.cost, usage.total_tokens, usage.calls), reverse=True
    )
    if UsageBy.DAY in query.by:
        sums.sort(key=lambda usage: usage.day or "", reverse=query.newest_first)
    return sums


_COUNTS: Final = (
    *("executions", "calls", "failed", "cached", "input_tokens", "output_tokens", "total_tokens"),
    *("priced", "latency_us"),
)
_FIELDS: Final = {UsageBy.SESSION: "session_id", UsageBy.TOOL: "tool", UsageBy.MODEL: "model", UsageBy.DAY: "day"}


def _day(entry: Mapping[str, Any], ended_at: datetime) -> str | None:
    begin = _count(entry.get("at"))
    moment = ended_at.astimezone(UTC) if begin is None else _moment(begin)
    return None if moment is None else f"{moment:%Y-%m-%d}"


def _sum(group: Sequence[str | None], calls: Sequence[LmCall]) -> LmUsage:
    costs = [call.cost for call in calls if call.cost is not None]
    session_id, tool, model, day = group
    return LmUsage(
        session_id,
        tool,
        model,
        day,
        executions=len({call.execution_id for call in calls}),
        calls=len(calls),
        failed=sum(call.failed for call in calls),
        cached=sum(call.cached is True for call in calls),
        input_tokens=sum(call.input_tokens for call in calls),
        output_tokens=sum(call.output_tokens for call in calls),
        total_tokens=sum(call.total_tokens for call in calls),
        cost=sum(costs) if costs else None,
        priced=len(costs),
        latency_us=sum(call.latency_us or 0 for call in calls),
    )


def spent_on(entry: Mapping[str, Any]) -> Spent:
    """Return what the call in an entry of `recorded["lm"]` has used; nothing if a cache answered it."""
    if entry.get("cached") is True:
        return NOTHING
    response = _object(entry.get("response"))
    _, _, tokens = _tokens([*_object(response.get("usage")).values(), *_object(entry.get("usage")).values()])
    return Spent(tokens, _number(entry.get("cost")) or 0.0)


class CountedCall(NamedTuple):
    """What the sums need of a recorded LM call. `at_us`: when it began, in microseconds since the epoch."""

    ordinal: int
    model: str
    at_us: int | None
    latency_us: int | None
    input_tokens: int
    output_tokens: int
    total_tokens: int
    cost: float | None
    cached: bool | None
    failed: bool


def counted_calls(recorded: Mapping[str, Any]) -> Iterator[tuple[int, CountedCall]]:
    """Yield the LM calls in what an execution recorded, each with its place, without reading their messages."""
    for number, entry in enumerate(_items(recorded.get("lm"))):
        if not isinstance(entry, Mapping):
            continue
        ordinal = _count(entry.get("ordinal"))
        usage = _object(_object(entry.get("response")).get("usage")), _object(entry.get("usage"))
        yield (
            number,
            CountedCall(
                number if ordinal is None else ordinal,
                entry["model"] if isinstance(entry.get("model"), str) else "",
                _count(entry.get("at")),
                _count(entry.get("latency_us")),
                *_tokens([each for by_model in usage for each in by_model.values()]),
                _number(entry.get("cost")),
                entry["cached"] if isinstance(entry.get("cached"), bool) else None,
                isinstance(entry.get("error"), Mapping),
            ),
        )


def counts_of(entry: Mapping[str, Any]) -> LmCounts:
    """Return what is counted of the call in an entry of `recorded["lm"]`, without reading its messages."""
    usage = _object(_object(entry.get("response")).get("usage")), _object(entry.get("usage"))
    tokens_in, tokens_out, _ = _tokens([each for by_model in usage for each in by_model.values()])
    return LmCounts(
        _text(entry.get("model")),
        isinstance(entry.get("error"), Mapping),
        entry.get("cached") is True,
        tokens_in,
        tokens_out,
        _number(entry.get("cost")),
        _count(entry.get("latency_us")),
    )


# Documents


def _object(document: Any) -> Mapping[str, Any]:
    return document if isinstance(document, Mapping) else {}


def _items(document: Any) -> Sequence[Any]:
    return document if isinstance(document, list | tuple) else ()


def _text(document: Any) -> str:
    if document is None:
        return ""
    return document if isinstance(document, str) else json.dumps(document, ensure_ascii=False)


def _number(document: Any) -> float | None:
    if not isinstance(document, int | float) or isinstance(document, bool):
        return None
    # Old releases wrote NaN; and an integer may be larger than any double.
    bounded = max(min(document, _MOST), -_MOST)
    return float(bounded) if bounded == bounded else None


def _count(document: Any) -> int | None:
    is_count = isinstance(document, int) and not isinstance(document, bool) and abs(document) < _TOO_LARGE
    return document if is_count else None


def _moment(micros: int) -> datetime | None:
    try:
        return datetime.fromtimestamp(micros // 1_000_000, UTC).replace(microsecond=micros % 1_000_000)
    except (OverflowError, ValueError, OSError):
        return None


# Tokens


def _tokens(usage: Sequence[Any]) -> tuple[int, int, int]:
    """Return the tokens of the request, of the answer, and all, from the counts of each model that a call used."""
    asked = answered = total = 0
    for counts in usage:
        of_request, of_answer = _sum_of(counts, _INPUT), _sum_of(counts, _OUTPUT)
        asked, answered = asked + of_request, answered + of_answer
        total += _sum_of(counts, ("total_tokens",)) or of_request + of_answer
    return min(asked, _MOST), min(answered, _MOST), min(total, _MOST)


def _sum_of(counts: Any, names: Sequence[str]) -> int:
    """Return the first of these counts that is one."""
    found = (_number(_object(counts).get(name)) for name in names)
    return int(max(next((each for each in found if each is not None), 0), 0))


# Texts


def _message(message: Any) -> LmMessage:
    if not isinstance(message, Mapping):
        return LmMessage("", _text(message))
    return LmMessage(_text(message.get("role")), _said(message))


def _answers(response: Mapping[str, Any]) -> Sequence[Any]:
    if "typed" in response:
        return (_object(response["typed"]).get("message"),)
    outputs = response.get("outputs")
    return outputs if isinstance(outputs, list | tuple) else () if outputs is None else (outputs,)


def _said(said: Any) -> str:
    """Return a message or an answer as text: its parts, then the tools that it calls."""
    return "\n".join(part for part in _parts(said) if part)


def _parts(said: Any) -> Iterator[str]:
    if isinstance(said, list | tuple):
        for each in said:
            yield from _parts(each)
    elif not isinstance(said, Mapping):
        yield _text(said)
    elif "function" in said or said.get("type") in ("tool_call", "function_call"):
        yield _call_text(said)
    else:
        known = [said[name] for name in ("reasoning_content", "text", "content", "parts") if said.get(name)]
        calls = _items(said.get("tool_calls"))
        for each in (*known, *calls):
            yield from _parts(each)
        if not known and not calls and set(said) - {"role", "text", "content", "parts", "tool_calls"}:
            # A part of another kind, such as an image.
            yield _text({name: each for name, each in said.items() if name != "role"})


def _call_text(call: Mapping[str, Any]) -> str:
    function = call.get("function")
    facts = function if isinstance(function, Mapping) else call
    arguments = next((facts[name] for name in ("arguments", "input", "args") if name in facts), "")
    return f"calls {_text(facts.get('name'))}({_text(arguments)})"
