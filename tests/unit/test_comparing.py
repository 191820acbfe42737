"""LM calls and prompts side by side."""

import pytest

from dspex_persist.audit import compare_calls
from dspex_persist.audit.comparing import Row, compare_lines, folded
from dspex_persist.state.lm_calls import LmCall, lm_call_of
from tests.asked import FAILED, entry


def call(predictor: str = "", **fields: object) -> LmCall:
    return lm_call_of(entry(predictor=predictor, **fields))


def pairs(before: str, after: str) -> list[tuple[str | None, str | None]]:
    compared = compare_calls([call(each) for each in before.split()], [call(each) for each in after.split()])
    return [tuple(side and side.predictor for side in (pair.before, pair.after)) for pair in compared]  # type: ignore[misc]


def test_calls_are_paired_by_predictor_in_their_order() -> None:
    assert pairs("a b", "a b") == [("a", "a"), ("b", "b")]
    assert pairs("a b c", "a c") == [("a", "a"), ("b", None), ("c", "c")]
    assert pairs("react react", "react react react") == [("react", "react"), ("react", "react"), (None, "react")]
    assert pairs("a", "b") == [("a", "b")], "a predictor that was renamed"


def test_the_parts_that_differ() -> None:
    (pair,) = compare_calls(
        [call(question="one\ntwo")], [call(question="one\nthree", variables={"prompt": 1}, **FAILED)]
    )
    assert [part.name for part in pair.parts] == ["model", "options", "variables", "system", "user", "answer", "error"]
    assert {part.name: part.diff() for part in pair.differences} == {
        "variables": ["- prompt v0", "+ prompt v1"],
        "user": ["  one", "- two", "+ three"],
        "answer": ["- blue"],
        "error": ["+ dspy.utils.exceptions.LMTransportError: no route"],
    }


def test_messages_that_were_added_between_others_have_no_counterpart() -> None:
    messages = [{"role": role, "content": role} for role in ("system", "user")]
    demos = [messages[0], {"role": "user", "content": "a demo"}, {"role": "assistant", "content": "so"}, messages[1]]
    one, other = (lm_call_of(entry(request={"messages": each})) for each in (messages, demos))
    (pair,) = compare_calls([one], [other])
    parts = [(part.name, part.diff()) for part in pair.parts if part.name in ("system", "user", "assistant")]
    assert [name for name, _ in parts] == ["system", "user", "assistant", "user"]
    assert [diff for _, diff in parts[1:3]] == [["+ a demo"], ["+ so"]]


@pytest.mark.parametrize("most", [2_000, 3])
def test_lines_side_by_side(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr("dspex_persist.audit.comparing._MOST_LINES", most)
    rows = compare_lines("a\nb\nc\nd", "a\nx\ny\nc\nd")
    assert rows == (Row("a", "a"), Row("b", "x"), Row(None, "y"), Row("c", "c"), Row("d", "d"))
    assert compare_lines("a\nb", "a\nb") == (Row("a", "a"), Row("b", "b"))
    assert compare_lines(None, "a") == (Row(None, "a"),)


def test_equal_lines_far_from_a_difference_are_folded() -> None:
    rows = compare_lines("\n".join("abcdefgh"), "\n".join("abcdefgX"))
    assert list(folded(rows, 2)) == [5, *rows[5:]]
    assert list(folded(rows, 6)) == list(rows), "a note is no shorter than one line"
    assert list(folded(rows[:4], 2)) == [4]
    assert list(folded(rows[:4], 4)) == list(rows[:4])
