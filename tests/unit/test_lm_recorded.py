"""Recorded LM calls of tools, transactions and blocks, found wherever they are, and played."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dspex_persist import Context, ToolContext, tool
from dspex_persist.dspy import playing, recorded_calls
from dspex_persist.state import errors
from dspex_persist.state.abilities import Auditable, Recordable
from dspex_persist.state.recording import write_recording
from tests.lms import ask, dspy, dummy


@tool(record_lm=True)
def asks(ctx: ToolContext) -> str:
    """Ask."""
    return ask("by a tool")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A session with calls of a recording in two executions, a transaction and a tool; and where it is."""
    folder = tmp_path_factory.mktemp("lm")
    with Context("s", folder / "s.db", tools=[asks]) as ctx:
        ctx.define("key", "blue", metadata={"sensitive": "true"})
        with dspy.context(lm=dummy("blue", "green", "red", "white")):
            with ctx.recording() as recording:
                ask("one")
                recording._parts.park()
                ask("two")
            with ctx.recording(), ctx.transaction() as tx:
                ask("in a transaction")
            ctx.call(asks)
        with Auditable.of(ctx.backend.provider).audit() as audit:
            (called,) = [each for each in audit.iterate(executions()) if each.tool == "asks"]
        header, commits = Recordable.of(ctx.backend.provider).record("s", reveal=True)
        with (folder / "s.jsonl").open("w", encoding="utf-8") as file:
            write_recording(header, commits, file)
        yield {
            "recording": recording,
            "transaction": tx.execution_id,
            "tool": called.execution_id,
            "context": ctx,
            "provider": ctx.backend.provider,
            "file": folder / "s.db",
            "path": str(folder / "s.db"),
            "tape": folder / "s.jsonl",
        }


def executions() -> Any:
    from dspex_persist.audit import ExecutionQuery

    return ExecutionQuery()


@pytest.mark.parametrize("place", ["context", "provider", "file", "path", "tape"])
def test_a_recording_is_played_from_wherever_it_is(kept: dict[str, Any], place: str) -> None:
    calls = recorded_calls(kept["recording"].id, kept[place])
    assert [call["ordinal"] for call in calls] == [0, 1]
    with dspy.context(lm=None), playing(calls) as playback:
        assert [ask("one"), ask("two")] == ["blue", "green"]
    assert playback.divergences == []


@pytest.mark.parametrize("place", ["context", "file"])
def test_single_executions_are_found_by_their_ids(kept: dict[str, Any], place: str) -> None:
    first, second = kept["recording"].execution_ids
    found = [recorded_calls(each, kept[place]) for each in (first, second, kept["transaction"], kept["tool"])]
    questions = [[call["request"]["messages"][-1]["content"].split("\n")[1] for call in calls] for calls in found]
    assert questions == [["one"], ["two"], ["in a transaction"], ["by a tool"]]
    with Auditable.of(kept["provider"]).audit(reveal=True) as audit:
        assert recorded_calls(first, audit) == found[0]


def test_calls_that_are_masked_cannot_be_played(kept: dict[str, Any]) -> None:
    with (
        Auditable.of(kept["provider"]).audit() as masking,
        pytest.raises(errors.UnsupportedError, match="quote sensitive variables"),
    ):
        recorded_calls(kept["recording"].id, masking)


def test_what_is_not_there(kept: dict[str, Any], tmp_path: Path) -> None:
    for place in ("context", "file", "tape"):
        for name in ("exec_1_000000000000000000000000", "rec_0123456789abcdef"):
            with pytest.raises(errors.NotInHistoryError):
                recorded_calls(name, kept[place])
    with pytest.raises(errors.StateError):
        recorded_calls("rec_0123456789abcdef", tmp_path / "nothing.db")
    with pytest.raises(errors.InvalidArgumentError, match="the id of an execution"):
        recorded_calls(5, kept["file"])  # type: ignore[arg-type]
    (tmp_path / "wrong.jsonl").write_text("{}\n")
    with pytest.raises(errors.RecordingError):
        recorded_calls("rec_0123456789abcdef", tmp_path / "wrong.jsonl")
