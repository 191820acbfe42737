"""The statements of the store, as older PostgreSQL takes them: those with which no test runs here."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspex_persist.state import store

FOLDER = Path(store.__path__[0])
# Of files only.
ONLY_SQLITE = {"history/views.py", "maintenance/sizes.py"}


def unnamed(text: str) -> Iterator[str]:
    """The subqueries after FROM or JOIN that have no name: PostgreSQL 14 and 15 demand one."""
    for begin in re.finditer(r"\b(?:FROM|JOIN) \((?=\s*(?:SELECT|WITH|VALUES)\b)", text):
        depth, place = 1, begin.end()
        while depth and place < len(text):
            depth += {"(": 1, ")": -1}.get(text[place], 0)
            place += 1
        if not re.match(r"\s+AS \w", text[place:]):
            yield text[begin.start() : place]


def test_subqueries_have_names() -> None:
    paths = [each for each in FOLDER.rglob("*.py") if str(each.relative_to(FOLDER)) not in ONLY_SQLITE]
    assert len(paths) > 50
    assert [(path.name, found) for path in paths for found in unnamed(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("SELECT 1 FROM (SELECT (2)) AS two", 0),
        ("SELECT 1 FROM (SELECT (2)) WHERE true", 1),
        ("SELECT 1 FROM (\n SELECT 2 FROM (SELECT 3)) AS two", 1),
        ("SELECT extract(epoch FROM (now())) FROM a JOIN (VALUES (1))", 1),
    ],
)
def test_what_finds_them(text: str, count: int) -> None:
    assert len(list(unnamed(text))) == count
