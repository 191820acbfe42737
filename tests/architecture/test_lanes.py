"""The lanes of the Makefile cover every test, and CONTRIBUTING.md has a lane for every part of the package."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = [str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")]


def lanes_of(makefile: str) -> dict[str, list[str]]:
    """What each lane runs: folders and files."""
    (names,) = re.findall(r"^LANES := (.*)$", makefile, re.MULTILINE)
    listed = {lane: paths.split() for lane, paths in re.findall(r"^TESTS_(\w+) := (.*)$", makefile, re.MULTILINE)}
    assert list(listed) == names.split()
    return listed


def within(path: str, folders: list[str]) -> bool:
    return any(f"{path}/".startswith(f"{each.rstrip('/')}/") for each in folders)


def rows_of(text: str) -> dict[str, list[str]]:
    """The lanes to run after a change, by what was changed: the table of CONTRIBUTING.md."""
    rows = re.findall(r"^\| (`[^|]+) \| `make ((?:test-\w+ ?)+)` \|$", text, re.MULTILINE)
    return {part: targets.split() for parts, targets in rows for part in re.findall(r"`([^`]+)`", parts)}


def parts_of_the_package() -> list[str]:
    """Every folder of the package, and the modules beside them."""
    package = ROOT / "dspex_persist"
    folders = [path.parent for path in package.rglob("__init__.py") if path.parent != package]
    modules = [path for path in package.glob("*.py") if path.stem == "settings"]
    return [str(path.relative_to(ROOT)) for path in (*folders, *modules)]


def missing_tests(makefile: str) -> list[str]:
    paths = [path for listed in lanes_of(makefile).values() for path in listed]
    return [file for file in FILES if not within(file, paths)]


def missing_parts(contributing: str) -> list[str]:
    return [part for part in parts_of_the_package() if not within(part, list(rows_of(contributing)))]


def test_every_test_is_in_a_lane() -> None:
    assert missing_tests(MAKEFILE) == [], "add it to a lane in the Makefile"


def test_lanes_name_what_is_there() -> None:
    for lane, paths in lanes_of(MAKEFILE).items():
        assert re.search(rf"^test-{lane}:.*## ", MAKEFILE, re.MULTILINE), f"make help says nothing of test-{lane}"
        assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_part_of_the_package_has_its_lane() -> None:
    assert missing_parts(CONTRIBUTING) == [], "add it to the table of lanes in CONTRIBUTING.md"


def test_the_table_names_what_is_there() -> None:
    targets = {f"test-{lane}" for lane in lanes_of(MAKEFILE)}
    for part, lanes in rows_of(CONTRIBUTING).items():
        assert (ROOT / part).exists(), part
        assert set(lanes) <= targets, part


def test_the_tests_that_it_shows_are_there() -> None:
    shown = re.findall(r"-m pytest (\S+\.py)(?:::(\w+))?$", CONTRIBUTING, re.MULTILINE)
    assert len(shown) == 2
    for file, name in shown:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8") if name else (ROOT / file).exists()


@pytest.mark.parametrize(
    ("listed", "file"),
    [
        ("tests/store", "tests/store/test_verify.py"),
        ("tests/contract/test_bridged.py", "tests/contract/test_bridged.py"),
    ],
)
def test_a_forgotten_test_is_found(listed: str, file: str) -> None:
    assert file in missing_tests(re.sub(rf"{listed}(?=\s)", "", MAKEFILE))


def test_a_forgotten_part_is_found() -> None:
    assert "dspex_persist/infra" in missing_parts(CONTRIBUTING.replace("`dspex_persist/infra/`", ""))
