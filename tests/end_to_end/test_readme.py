"""The README's programs, run as a newcomer would."""

import subprocess
import sys
from pathlib import Path

import pytest

from dspex_persist.infra.process import ServerProcess
from tests.end_to_end.old_style import ROOT
from tests.end_to_end.programs import programs_of, run

PROGRAMS = [program.text for program in programs_of("README.md")]


@pytest.fixture
def client() -> str:
    (program,) = [text for text in PROGRAMS if "grpc://" in text]
    assert len(program.strip().splitlines()) <= 10
    return str(program)


def test_a_client_finds_its_variable_again_after_a_kill(client: str, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "dspex_persist", "serve", "--listen", "127.0.0.1:0"]
    said = []
    for _ in range(2):
        with ServerProcess.start(argv, cwd=tmp_path) as server:
            said.append(run(client.replace("50051", str(server.port)), tmp_path))
            server.kill()
    assert said == ["begun\ntemperature is 0.35 at version 1\n", "resumed\ntemperature is 0.175 at version 2\n"]


def test_the_library_program(tmp_path: Path) -> None:
    (program,) = [text for text in PROGRAMS if "library.db" in text]
    said = run(program, tmp_path).splitlines()
    assert said[0] == "invalid value for 'temperature': value 9.0 is above maximum 2"
    assert said[-1] == "0.7"
    assert [line.split()[:2] for line in said[1:3]] == [["1", "0.9"], ["0", "0.7"]]


def test_the_program_with_a_tool(tmp_path: Path) -> None:
    (program,) = [text for text in PROGRAMS if "shop.db" in text]
    assert run(program, tmp_path).splitlines() == ["1", "ValueError: only 1 left", "1 2"]


def test_an_editor_finds_nothing_to_complain_of(tmp_path: Path) -> None:
    for number, program in enumerate(PROGRAMS):
        (tmp_path / f"program_{number}.py").write_text(program)
    # As mypy is out of the box: what a variable holds is known at run time only, which --strict has one spell out.
    argv = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file=",
        "--check-untyped-defs",
        *map(str, sorted(tmp_path.iterdir())),
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
