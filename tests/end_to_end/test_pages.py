"""The pages that a newcomer follows, typed as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dspex_persist import Context
from tests.deadline import within
from tests.end_to_end.old_style import ROOT, environment, serve, target_of
from tests.end_to_end.reading import blocks_of, reader

SERVICE = "docs/fastapi.md"


@pytest.mark.parametrize("page", ["docs/quickstart.md"])
def test_a_page_can_be_typed_as_it_stands(page: str, tmp_path: Path) -> None:
    with reader(tmp_path) as reading:
        assert reading.read(page) > 3


def test_the_quickstart_installs_as_the_readme_does() -> None:
    def lines(page: str) -> list[str]:
        (block,) = [each for each in blocks_of(page) if "pip install ../dspex-persist\n" in each.text]
        return block.text.splitlines()[1:]

    assert lines("docs/quickstart.md") == lines("README.md")


# FastAPI


@pytest.fixture
def service(tmp_path: Path) -> Path:
    """A folder with the programs of the page."""
    app, tests = [each.text for each in blocks_of(SERVICE) if each.language == "python"]
    (tmp_path / "service.py").write_text(app)
    (tmp_path / "test_service.py").write_text(tests)
    return tmp_path


def run_tests(folder: Path) -> str:
    argv = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    path = f"{folder}:{ROOT}"
    done = subprocess.run(
        argv,
        cwd=folder,
        env=environment(PYTHONPATH=path),
        capture_output=True,
        text=True,
        timeout=within(120),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_web_service_on_a_file(service: Path) -> None:
    assert "3 passed" in run_tests(service)


def test_the_same_web_service_on_a_server(service: Path) -> None:
    place, tests = 'str(tmp_path / "customers.db")', service / "test_service.py"
    with serve(service / "customers.db", "--tools", "service") as server:
        assert place in tests.read_text()
        tests.write_text(tests.read_text().replace(place, repr(f"grpc://{target_of(server)}")))
        assert "3 passed" in run_tests(service)


# Coming from DSPex


def test_the_names_in_the_table_are_there() -> None:
    page = (ROOT / "docs/from-dspex.md").read_text(encoding="utf-8")
    names = set(re.findall(r"\bctx\.(\w+)\(", page))
    assert {"define", "get_many", "transaction", "history"} <= names
    assert [name for name in sorted(names) if not hasattr(Context, name)] == []
