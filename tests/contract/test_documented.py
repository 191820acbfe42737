"""The backend of docs/write-a-backend.md under the contract, run by the page's tests."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dspex_persist.state import abilities
from tests.deadline import within
from tests.end_to_end.old_style import ROOT, environment
from tests.end_to_end.programs import programs_of

STORE, TESTS = programs_of("docs/write-a-backend.md")


def _module_of(name: str, text: str) -> ModuleType:
    """A program of the page, as a module that a reader saved."""
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    exec(compile(text, f"docs/write-a-backend.md:{name}", "exec"), vars(module))
    return module


engine = _module_of("json_lines", STORE.text).JsonLinesState
_tests = _module_of("test_json_lines", TESTS.text)
owner, with_tools = _tests.owner, _tests.with_tools
TestJsonLines = _tests.TestJsonLines
# Its tools run as those of LocalState do, over the same engine.
TestJsonLinesTools = pytest.mark.thorough(_tests.TestJsonLinesTools)


def test_the_page_names_every_ability() -> None:
    page = (ROOT / "docs/write-a-backend.md").read_text(encoding="utf-8")
    kinds = [
        each for each in vars(abilities).values() if isinstance(each, type) and issubclass(each, abilities.Ability)
    ]
    assert [kind.__name__ for kind in kinds if f"`{kind.__name__}`" not in page and kind is not abilities.Ability] == []


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "json_lines.py"
    path.write_text(STORE.text)
    return path


def _counted(program: Path) -> str:
    done = subprocess.run(
        [sys.executable, program.name],
        cwd=program.parent,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=within(60),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_continues_where_it_stopped(program: Path) -> None:
    assert _counted(program) == "1"
    assert _counted(program) == "2"


def test_half_a_line_was_never_acknowledged(program: Path) -> None:
    assert _counted(program) == "1"
    lines = program.with_name("sessions.jsonl")
    whole = lines.read_bytes()
    lines.write_bytes(whole + whole[:-1].splitlines()[-1][:-3])
    assert _counted(program) == "2"
