"""Where words may be written: the question whether another name was meant, once."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "dspex_persist"


def holding(text: str) -> list[str]:
    """The files of the package that have a text."""
    files = sorted(PACKAGE.rglob("*.py"))
    return [str(file.relative_to(PACKAGE)) for file in files if text in file.read_text(encoding="utf-8")]


def test_who_may_have_been_meant_is_asked_in_one_place() -> None:
    assert holding("did you mean") == ["spelling.py"]
    assert holding("get_close_matches") == ["spelling.py"]
