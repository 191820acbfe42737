"""Each value type is defined in its file alone: no other code compares names of types."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspex_persist.state.values import type_names

PACKAGE = Path(__file__).parents[2] / "dspex_persist"
TYPES = PACKAGE / "state" / "values" / "types"
# Examples and tests that are shipped: they are about certain types.
EXAMPLES = (PACKAGE / "testing", PACKAGE / "cli" / "demo")
_COLLECTIONS = (ast.Tuple, ast.List, ast.Set)


def comparisons(source: str) -> Iterator[int]:
    """The lines that compare something with the name of a type, or have a table or a list of such names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            found = any(_names_one(side) for side in (node.left, *node.comparators))
        elif isinstance(node, ast.match_case):
            found = any(_names_one(part.value) for part in ast.walk(node.pattern) if isinstance(part, ast.MatchValue))
        elif isinstance(node, ast.Dict):
            found = sum(map(_is_name, node.keys)) > 1
        else:
            found = isinstance(node, _COLLECTIONS) and len(node.elts) > 1 and all(map(_is_name, node.elts))
        if found:
            yield node.pattern.lineno if isinstance(node, ast.match_case) else node.lineno  # type: ignore[attr-defined]


def _names_one(node: ast.expr) -> bool:
    return any(map(_is_name, node.elts if isinstance(node, _COLLECTIONS) else [node]))


def _is_name(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in type_names()


def test_no_other_code_compares_names_of_types() -> None:
    found = {
        f"{file.relative_to(PACKAGE)}:{line}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if not any(folder in file.parents for folder in (TYPES, *EXAMPLES)) and "generated" not in file.parts
        for line in comparisons(file.read_text(encoding="utf-8"))
    }
    assert found == set()


@pytest.mark.parametrize(
    "text",
    [
        'type_name == "embedding"',
        'variable.type != "float"',
        '"list" == self.described.type',
        'type_name in ("float", "embedding")',
        'NUMBERS = frozenset({"float", "integer"})',
        'CODERS = {"float": float, "integer": int}',
        'match type_name:\n    case "tensor": pass',
    ],
)
def test_it_would_be_noticed(text: str) -> None:
    assert list(comparisons(text))


@pytest.mark.parametrize("text", ['register("x", "float", 0.5)', '{"type": "string"}', 'where == "server"'])
def test_other_texts_are_free(text: str) -> None:
    assert not list(comparisons(text))


def test_each_type_has_a_file_of_its_own() -> None:
    assert {file.stem for file in TYPES.glob("*.py")} == {"__init__", *type_names()}
