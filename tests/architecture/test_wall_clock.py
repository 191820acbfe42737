"""No test asserts how long something took: on a loaded machine, that fails where nothing is wrong."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLOCKS = {f"{clock}{unit}" for clock in ("time", "monotonic", "perf_counter") for unit in ("", "_ns")}


def wall_clock_assertions(text: str) -> list[int]:
    """The lines of assertions on durations. A deadline (`now < deadline`) gives up, and is none."""
    tree = ast.parse(text)
    instants, durations = _names(tree)
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert) and any(_is_duration(each, instants, durations) for each in ast.walk(node.test))
    ]


def _names(tree: ast.Module) -> tuple[set[str], set[str]]:
    """What has read a clock, and what keeps the difference of two readings: variables and lists of them."""
    instants: set[str] = set()
    durations: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and _reads_clock(node.value):
            instants |= {ast.unparse(target) for target in node.targets}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and _is_duration(node.value, instants, set()):
            durations |= {ast.unparse(target) for target in node.targets}
        elif isinstance(node, ast.Call) and any(_is_duration(kept, instants, set()) for kept in node.args):
            kept_in, _, method = ast.unparse(node.func).rpartition(".")
            durations |= {kept_in} if method == "append" else set()
    return instants, durations


def _is_duration(node: ast.AST, instants: set[str], durations: set[str]) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
        return any(_reads_clock(side) or ast.unparse(side) in instants for side in (node.left, node.right))
    return isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in durations


def _reads_clock(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    module, _, name = ast.unparse(node.func).rpartition(".")
    return name in CLOCKS and (module in ("", "time") or module.endswith("loop"))


def test_no_test_asserts_how_long_something_took() -> None:
    files = [path for path in (ROOT / "tests").rglob("*.py") if "assets" not in path.parts]
    found = {str(path.relative_to(ROOT)): wall_clock_assertions(path.read_text(encoding="utf-8")) for path in files}
    advice = "use a count, an event, or tests.deadline.cpu_s_below"
    assert {path: lines for path, lines in found.items() if lines} == {}, advice


@pytest.mark.parametrize(
    "text",
    [
        "assert time.monotonic() - began < 5",
        "assert 5 > time.perf_counter() - began",
        "assert perf_counter_ns() - began < 5",
        "assert self._loop.time() - began < 5",
        "began = time.time(); over = time.time()\nassert over - began < 5",
        "took = time.monotonic() - began\nassert took < 5",
        "self.took = time.monotonic() - began\nassert self.took < 5",
        "took.append(time.monotonic() - began)\nassert max(took) < 5",
    ],
)
def test_such_assertions_are_found(text: str) -> None:
    assert wall_clock_assertions(text) == [len(text.splitlines())]


@pytest.mark.parametrize(
    "text",
    [
        "deadline = time.monotonic() + within(30)\nassert time.monotonic() < deadline, 'in vain'",
        "assert time.process_time() - began < 5",
        "assert loads - began == 2",
    ],
)
def test_deadlines_and_cpu_time_are_none(text: str) -> None:
    assert wall_clock_assertions(text) == []
