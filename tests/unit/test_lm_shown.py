"""Recorded LM calls as people see them, and sensitive values in them."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from dspex_persist.audit import cost_text
from dspex_persist.state.lm_calls import LmMessage, lm_call_of
from dspex_persist.state.masking import MASK, Secrets, hash_of
from dspex_persist.state.model import Value
from tests.asked import FAILED, HOSTILE, entry


def test_a_call_has_all_facts() -> None:
    call = lm_call_of(entry(3), 0, "exec_1", "ask")
    assert (call.execution_id, call.tool, call.ordinal, call.model) == ("exec_1", "ask", 3, "openai/gpt-4o-mini")
    assert call.at == datetime(2026, 3, 1, 12, 0, 3, tzinfo=UTC)
    assert (call.latency_us, call.cost, call.cached, call.predictor) == (250_000, 0.0005, False, "generate.predict")
    assert (call.input_tokens, call.output_tokens, call.total_tokens) == (100, 10, 110)
    assert (call.options, call.variables) == ({"temperature": 0.3}, {"prompt": 0})
    assert call.messages[1] == LmMessage("user", "Which colour?")
    assert (call.answers, call.error) == (("blue",), "")


def test_a_failed_call_has_its_error_and_the_tokens_that_were_counted() -> None:
    call = lm_call_of(entry(**FAILED, usage={"m": {"input_tokens": 7, "output_tokens": 1}}))
    assert (call.answers, call.error_type, call.error) == ((), "dspy.utils.exceptions.LMTransportError", "no route")
    assert (call.input_tokens, call.output_tokens, call.total_tokens) == (7, 1, 8)


def test_recordings_of_older_releases_lack_some_facts() -> None:
    newer = ("at", "latency_us", "cost", "cached", "variables", "predictor")
    call = lm_call_of(entry(**dict.fromkeys(newer)))
    assert (call.at, call.latency_us, call.cost, call.cached, call.variables, call.predictor) == (
        *(None,) * 4,
        {},
        "",
    )


@pytest.mark.parametrize("hostile", [*HOSTILE, float("nan")])
@pytest.mark.parametrize("field", sorted(entry()))
def test_whatever_an_import_brought_is_a_call(field: str, hostile: Any) -> None:
    call = lm_call_of({**entry(), field: hostile})
    assert isinstance(call.total_tokens, int)
    for part in ("request", "response"):
        for name in entry()[part]:
            lm_call_of(entry(**{part: {**entry()[part], name: hostile}}))
    lm_call_of(entry(response={"outputs": [], "usage": {"m": {"prompt_tokens": hostile, "total_tokens": hostile}}}))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("plain", "plain"),
        ([{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:x"}}],
         'see\n{"type": "image_url", "image_url": {"url": "data:x"}}'),
        (None, 'calls look({"at": 1})'),
    ],
)  # fmt: skip
def test_messages_are_text(content: Any, text: str) -> None:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if content is None:
        message["tool_calls"] = [{"type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}]
    call = lm_call_of(entry(request={"messages": [message]}))
    assert call.messages == (LmMessage("assistant", text),)


def test_answers_of_all_kinds_are_text() -> None:
    thinking = {"text": "blue", "reasoning_content": "hm"}
    typed = {"message": {"role": "assistant", "parts": [
        {"type": "text", "text": "yes"}, {"type": "tool_call", "id": "1", "name": "look", "input": {"at": 1}}
    ]}}  # fmt: skip
    assert lm_call_of(entry(response={"outputs": ["a", thinking]})).answers == ("a", "hm\nblue")
    assert lm_call_of(entry(response={"typed": typed})).answers == ('yes\ncalls look({"at": 1})',)


@pytest.mark.parametrize(
    ("cost", "text"),
    [(None, ""), (0.0, "$0.00"), (0.0000318, "$0.0000318"), (0.12345, "$0.123"), (1234.5, "$1,234.50")],
)
def test_costs(cost: float | None, text: str) -> None:
    assert cost_text(cost) == text


# Sensitive values


def secrets(*values: object) -> Secrets:
    return Secrets(Value(json.dumps(value)) for value in values)


@pytest.mark.parametrize(
    ("value", "text", "masked"),
    [
        ("sk-1234", "key=sk-1234.", f"key={MASK}."),
        ("one\ntwo  three", "   one\n        two three!", f"   {MASK}!"),
        ('say "hi"', r'{"x": "say \"hi\""}', f'{{"x": "{MASK}"}}'),
        ("größe\tzwei", r"gr\u00f6\u00dfe\tzwei", MASK),
        ("it's\nso", repr(["it's\nso"]), f'["{MASK}"]'),
        ("no", "no, nobody knows", f"{MASK}, nobody knows"),
        ({"name": "Bob", "tags": ["alpha", True]}, "Bob likes alpha, true", f"{MASK} likes {MASK}, true"),
        (85000, "85000, 85,000 or 85000.0; not 185000 or 85000.5", f"{MASK}, {MASK} or {MASK}; not 185000 or 85000.5"),
        (0.75, "0.75 and 10.75", f"{MASK} and 10.75"),
        ("  ", "a  b", "a  b"),
        (True, "true", "true"),
    ],
)
def test_a_sensitive_value_is_masked_wherever_it_is_quoted(value: object, text: str, masked: str) -> None:
    assert secrets(value).masked({"messages": [{"content": text}]}) == {"messages": [{"content": masked}]}


def test_longer_values_are_masked_first() -> None:
    assert secrets("sk-12", "sk-12-34").masked("sk-12-34 sk-12") == f"{MASK} {MASK}"


def test_a_masked_call_keeps_its_facts_and_its_hash_is_that_of_what_is_shown() -> None:
    call = entry(question="the key is sk-1234", answer="sk-1234?", cost=0.3)
    masked = secrets("sk-1234", 0.3, 100).masked_call(call)
    assert "sk-1234" not in json.dumps(masked)
    assert masked["request"]["options"] == {"temperature": MASK}
    assert (masked["response"]["usage"], masked["cost"]) == (call["response"]["usage"], 0.3)
    assert masked["hash"] == hash_of(masked["model"], masked["request"]) != call["hash"]


def test_a_call_that_quotes_nothing_stays_as_it_is() -> None:
    call = entry()
    assert secrets("sk-1234", 99).masked_call(call) == call
    recorded = {"now": [1], "lm": [call]}
    assert Secrets(()).masked_recorded(recorded) is recorded
