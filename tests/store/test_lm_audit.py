"""LM calls in the history: what audits and recordings show of them, and what they mask."""

import io
import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import dspex_persist
from dspex_persist.audit import AuditSource, ExecutionQuery, LmCall, LmUsage, LmUsageQuery, UsageBy, lm_calls_of
from dspex_persist.state.abilities import Recordable
from dspex_persist.state.errors import InvalidArgumentError, NotInHistoryError
from dspex_persist.state.masking import MASK
from dspex_persist.state.recording import write_recording
from dspex_persist.state.store import maintenance
from tests import asked
from tests.deadline import within

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("asked") / "sessions.db"
    asked.tell(path).close()
    return path


@pytest.fixture
def audit(path: Path) -> Iterator[AuditSource]:
    with dspex_persist.open_audit(path) as source:
        yield source


def newest(audit: AuditSource, tool: str = "ask") -> Any:
    (summary,) = audit.iterate(ExecutionQuery(tool=tool, children=False, limit=1))
    return audit.execution(summary.execution_id)


def test_calls_of_an_execution_and_of_what_it_called(audit: AuditSource) -> None:
    twice = newest(audit, "ask_twice")
    (own,), (called,) = lm_calls_of(twice), lm_calls_of(twice.children[0])
    assert (own.model, own.messages[-1].text, own.tool) == ("anthropic/claude", "Which size?", "ask_twice")
    assert (called.messages[-1].text, called.tool) == ("Which size? Again!", "ask")


def test_sensitive_values_are_masked_in_audits(audit: AuditSource, path: Path) -> None:
    quoting, failed, cached = lm_calls_of(newest(audit))
    assert quoting.messages[-1].text == f"The key:\n    {MASK}; the pin is {MASK}."
    assert quoting.answers == (f"It is {MASK}.",)
    assert (failed.error, cached.answers) == ("no route", ("red",))
    with dspex_persist.open_audit(path, reveal=True) as revealing:
        assert str(asked.PIN) in lm_calls_of(newest(revealing))[0].answers[0]


@pytest.mark.parametrize("place", ["file", "memory:"])
def test_sensitive_values_are_masked_in_recordings(place: str, tmp_path: Path) -> None:
    state = asked.tell(tmp_path / "a.db" if place == "file" else place)
    try:
        texts = []
        for reveal in (False, True):
            stream = io.StringIO()
            write_recording(*Recordable.of(state).record(asked.SESSION, reveal=reveal), stream)
            events = [event for line in stream.getvalue().splitlines() for event in json.loads(line).get("events", ())]
            texts.append(
                json.dumps([event["body"]["recorded"]["lm"] for event in events if "recorded" in event["body"]])
            )
    finally:
        state.close()
    assert "planted" not in texts[0]
    assert str(asked.PIN) not in texts[0]
    assert "planted" in texts[1]
    assert str(asked.PIN) in texts[1]


_REPLAY = """
import json, sys
from dspex_persist.replay import load, replay
from dspex_persist.wiring.recordings import open_recording
from tests import asked

assert "dspy" not in sys.modules
for reveal in (False, True):
    with open_recording(sys.argv[1], asked.SESSION, reveal=reveal) as recording:
        report = replay(load(recording), asked.toolbox())
    reasons = [each.reason for each in report.executions if each.reason]
    print(json.dumps([reasons, sorted({each.what for each in report.divergences})]))
"""


def test_executions_whose_calls_are_masked_are_not_replayed(path: Path) -> None:
    """In a process in which the replay is the first to import DSPy, while calls of models are refused."""
    argv = [sys.executable, "-c", _REPLAY, str(path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=within(60), check=False)
    assert done.returncode == 0, done.stderr
    masked, revealed = map(json.loads, done.stdout.splitlines())
    assert masked == [["its LM calls quote values of variables that were kept out of the recording"], ["lm"]]
    assert revealed == [[], ["lm"]], "the tools record what they were given, and ask no model"


# The table of calls, the views, and sums


def calls_of(audit: AuditSource) -> Iterator[tuple[str, LmCall]]:
    """Yield all calls, each with its session, oldest execution first."""
    for summary in audit.iterate(ExecutionQuery(newest_first=False)):
        yield from ((summary.session_id, call) for call in lm_calls_of(audit.execution(summary.execution_id)))


def rows(path: Path, statement: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(statement)]


_BY_CALL = "SELECT * FROM v_lm_calls JOIN v_executions USING (execution_id) ORDER BY began_sequence, ordinal"


def test_the_view_says_what_the_calls_say_whatever_an_import_brought(tmp_path: Path) -> None:
    path = tmp_path / "hostile.db"
    with dspex_persist.connect(path, tools=asked.toolbox()) as state:
        state.initialize_session("s")
        whole = asked.entry()
        usages = [{name: {"prompt_tokens": each, "total_tokens": each}} for name in "ab" for each in asked.HOSTILE]
        for hostile in asked.HOSTILE:
            calls = [{**asked.entry(place), name: hostile} for place, name in enumerate(whole, 1)]
            calls += [{**asked.entry(20 + place), part: {name: hostile}} for part in ("request", "response")
                      for place, name in enumerate(whole[part])]  # fmt: skip
            state.execute_tool("s", "ask", {"question": "", "calls": calls})
        calls = [asked.entry(place, response={"usage": usage}, usage=usage) for place, usage in enumerate(usages)]
        state.execute_tool("s", "ask", {"question": "", "calls": calls})
    assert maintenance.check(path).problems == ()
    with dspex_persist.open_audit(path) as audit:
        calls = list(calls_of(audit))
    view = rows(path, _BY_CALL)
    assert len(view) == len(calls) > 150
    for row, (_, call) in zip(view, calls, strict=True):
        shared = ("execution_id", "tool", "ordinal", "model", "latency_us", "input_tokens", "output_tokens")
        for name in (*shared, "total_tokens", "cost", "cached"):
            assert row[name] == getattr(call, name), (name, call)
        assert row["error_type"] is not None or not call.error_type
        if call.at is not None:
            assert row["began_at"] == f"{call.at:%Y-%m-%dT%H:%M:%S.%f}Z"


def test_the_views_have_the_texts_unless_they_may_quote_something(path: Path, tmp_path: Path) -> None:
    hidden = rows(path, "SELECT * FROM v_lm_calls")
    assert {row["masked"] for row in hidden} == {1}
    assert {row[name] for row in hidden for name in ("error", "options", "messages", "answer", "hash")} == {None}
    shown = tmp_path / "shown.db"
    with dspex_persist.connect(shown, tools=asked.toolbox()) as state:
        state.initialize_session("s")
        state.execute_tool("s", "ask", {"question": "", "calls": [asked.entry(), asked.entry(1, **asked.FAILED)]})
    first, failed = rows(shown, _BY_CALL)
    assert [json.loads(first[name]) for name in ("messages", "answer", "options", "variables")] == [
        asked.entry()["request"]["messages"],
        ["blue"],
        {"temperature": 0.3},
        {"prompt": 0},
    ]
    assert (first["predictor"], first["concurrent"], first["hash"]) == ("generate.predict", 0, asked.entry()["hash"])
    assert (failed["error_type"], failed["error"]) == ("dspy.utils.exceptions.LMTransportError", "no route")


@pytest.mark.parametrize("by", [(), ("model",), ("session", "tool"), ("day", "model"), tuple(UsageBy)])
def test_usage_is_the_sum_of_the_calls(audit: AuditSource, by: tuple[str, ...]) -> None:
    sums: dict[tuple[str | None, ...], list[LmCall]] = {}
    for session, call in calls_of(audit):
        facts = {"session": session, "tool": call.tool, "model": call.model, "day": "2026-03-01"}
        sums.setdefault(tuple(facts[name] if name in by else None for name in facts), []).append(call)
    expected = [
        LmUsage(
            *group,
            executions=len({call.execution_id for call in calls}),
            calls=len(calls),
            failed=sum(call.failed for call in calls),
            cached=sum(bool(call.cached) for call in calls),
            input_tokens=sum(call.input_tokens for call in calls),
            output_tokens=sum(call.output_tokens for call in calls),
            total_tokens=sum(call.total_tokens for call in calls),
            cost=pytest.approx(sum(call.cost or 0.0 for call in calls)),
            priced=len(calls),
            latency_us=sum(call.latency_us or 0 for call in calls),
        )
        for group, calls in sums.items()
    ]
    found = list(audit.iterate(LmUsageQuery(by=by)))
    assert len(found) == len(expected)
    assert all(each in expected for each in found)


def test_usage_of_some_calls(audit: AuditSource) -> None:
    def models(**conditions: Any) -> list[str | None]:
        return [usage.model for usage in audit.iterate(LmUsageQuery(**conditions))]

    assert models() == ["openai/gpt-4o-mini", "anthropic/claude"], "the largest cost first"
    assert models(tool="ask_*", session="a*") == models(model="anthropic/claude") == ["anthropic/claude"]
    assert models(model="*gpt*", session=asked.SESSION) == models(limit=1) == ["openai/gpt-4o-mini"]
    twice = newest(audit, "ask_twice").summary
    around = {"since": f"{twice.execution_id}^", "until": twice.execution_id}
    (both,) = audit.iterate(LmUsageQuery(by=(), **around))
    assert (both.executions, both.calls) == (2, 2)
    assert models(since="now") == []
    assert list(audit.iterate(LmUsageQuery(by=(), model="other"))) == []
    with pytest.raises(InvalidArgumentError, match="did you mean 'model'"):
        LmUsageQuery(by="modle")
    with pytest.raises(NotInHistoryError):
        models(session="other")


def test_usage_is_read_in_pages(audit: AuditSource) -> None:
    query = LmUsageQuery(by=("tool", "model"))
    whole = list(audit.iterate(query))
    first = audit.page(query, None, 1)
    assert (list(first.rows), first.after) == (whole[:1], (1,))
    assert list(audit.page(query, first.after, 5).rows) == whole[1:]
