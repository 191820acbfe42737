"""Only the store, the migrations and what people write in their own shells speak SQL."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import dspex_persist

PACKAGE = Path(dspex_persist.__file__).parent
STORE = PACKAGE / "state" / "store"
STATEMENT = re.compile(
    r"\b(select\b.+\bfrom|insert\s+(or\s+\w+\s+)?into|update\s+\w+\s+set|delete\s+from|pragma\s+\w+|"
    r"create\s+(temp\s+)?(table|view|index|trigger))\b",
    re.IGNORECASE | re.DOTALL,
)


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each string in a module, other than docstrings, with its line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def statements() -> list[str]:
    return [
        f"{path.relative_to(PACKAGE)}:{line}: {text.strip()[:60]}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if STORE not in path.parents
        for line, text in texts(path)
        if STATEMENT.search(text)
    ]


def test_only_the_store_speaks_sql() -> None:
    assert statements() == []


def test_the_check_finds_sql() -> None:
    found = [text for path in STORE.rglob("*.py") for _, text in texts(path) if STATEMENT.search(text)]
    assert len(found) > 50


# In PostgreSQL, what is extracted from JSON is text, which cannot be compared with a number.
ORDERED = re.compile(r"(json_extract\([^()]*\)|->>\s*('[^']*'|\d+))\s*(<=?|>=?)(?![<>=])")


def test_what_is_extracted_from_json_is_cast_before_it_is_ordered() -> None:
    assert ORDERED.search("json_extract(body, '$.a[1]') > :after")
    assert not ORDERED.search("CAST(json_extract(body, '$.a[1]') AS INTEGER) > :after")
    assert not ORDERED.search("json_extract(body, '$.a') <> ''")
    found = [(path.name, text) for path in STORE.rglob("*.py") for _, text in texts(path) if ORDERED.search(text)]
    assert found == []
