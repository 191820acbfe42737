"""Only `state/events.py`, and what it is made with, knows the keys in the bodies of events."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dspex_persist"
KNOW_THEM = frozenset({PACKAGE / "state" / "events.py", PACKAGE / "state" / "bodies.py"})
# What has events to read. Elsewhere a body is one of another kind.
FOLDERS = ("state", "replay", "audit", "testing")


def accesses(source: str) -> Iterator[int]:
    """The lines that look into something called a body."""
    for node in ast.walk(ast.parse(source)):
        inside: ast.expr | None = None
        if (isinstance(node, ast.Subscript) and not isinstance(node.slice, ast.Slice)) or (
            isinstance(node, ast.Attribute) and node.attr in ("get", "pop", "setdefault", "items")
        ):
            inside = node.value
        name = getattr(inside, "attr", getattr(inside, "id", ""))
        if name == "body" or name.endswith("_body"):
            yield node.lineno


def test_no_other_code_reads_a_body() -> None:
    files = (file for folder in FOLDERS for file in sorted((PACKAGE / folder).rglob("*.py")))
    found = {
        f"{file.relative_to(PACKAGE)}:{line}"
        for file in files
        if file not in KNOW_THEM and "generated" not in file.parts
        for line in accesses(file.read_text(encoding="utf-8"))
    }
    assert found == set()


@pytest.mark.parametrize("line", ["event.body['name']", "body.get('name')", "event.body.pop('name')", "body[key] = 1"])
def test_it_would_be_noticed(line: str) -> None:
    assert list(accesses(line)) == [1]
