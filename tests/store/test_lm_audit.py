"""LM calls in the history: what audits and recordings show of them, and what they mask."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dspex_persist
from dspex_persist.audit import AuditSource, ExecutionQuery, lm_calls_of
from dspex_persist.state.abilities import Recordable
from dspex_persist.state.masking import MASK
from dspex_persist.state.recording import write_recording
from tests import asked


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
