"""Type checkers know the signature and the result of every verb, called or awaited, and of handles."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deadline import within

ROOT = Path(__file__).parents[2]
EXAMPLES = [ROOT / "tests" / "typing" / name for name in ("verbs.py", "wrong.py")]


def marked(file: Path) -> set[tuple[str, int]]:
    """The lines that say that they are an error."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return {(file.name, number) for number, line in enumerate(lines, 1) if line.endswith("# error")}


def by_mypy() -> set[tuple[str, int]]:
    command = [sys.executable, "-m", "mypy", "--strict", *map(str, EXAMPLES)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=within(300), check=False)
    assert result.returncode < 2, result.stdout + result.stderr
    found = re.findall(r"^(\S+?):(\d+): error", result.stdout, re.MULTILINE)
    return {(Path(name).name, int(line)) for name, line in found}


def by_pyright() -> set[tuple[str, int]]:
    pytest.importorskip("basedpyright")
    command = [sys.executable, "-m", "basedpyright", "--outputjson", *map(str, EXAMPLES)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=within(300), check=False)
    found = json.loads(result.stdout)["generalDiagnostics"]
    errors = [each for each in found if each["severity"] == "error"]
    return {(Path(each["file"]).name, each["range"]["start"]["line"] + 1) for each in errors}


@pytest.mark.parametrize("check", [by_mypy, by_pyright])
def test_exactly_the_marked_lines_are_wrong(check: Callable[[], set[tuple[str, int]]]) -> None:
    expected = set().union(*map(marked, EXAMPLES))
    assert len(expected) >= 10
    assert check() == expected
