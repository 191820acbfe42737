"""What the tests themselves keep to, so that a loaded machine fails none of them, and one that is lost does not end the
run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deadline import PATIENCE, cpu_s_below, within

ROOT = Path(__file__).resolve().parents[2]
HANGING = """
import os
import threading

import pytest
from hypothesis import given, strategies


@pytest.fixture
def stuck():
    import signal
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    threading.Event().wait()


def test_hangs():
    threading.Event().wait()


@given(strategies.integers())
def test_hangs_in_hypothesis(number):
    threading.Event().wait()


def test_hangs_before_it_begins(stuck):
    pass


def test_dies():
    os._exit(1)


@pytest.mark.parametrize("number", range(20))
def test_is_well(number):
    pass
"""
REPORTING = """
import time
import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if item.name == "test_slow_report" and call.when == "call":
        time.sleep({beyond})
    return report
"""


def pytest_on(folder: Path, *options: str) -> str:
    """Run pytest on the tests in a folder, with this project's configuration; return its output."""
    argv = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={folder}", str(folder)]
    quiet = ["-q", "-p", "no:cacheprovider", "-o", "pythonpath=", *options]
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    ended = subprocess.run(
        [*argv, *quiet], cwd=folder, env=environment, capture_output=True, text=True, timeout=within(100), check=False
    )
    return ended.stdout + ended.stderr


def test_a_test_that_hangs_or_dies_ends_alone(tmp_path: Path) -> None:
    (tmp_path / "test_hanging.py").write_text(HANGING)
    limits = ("-o", "timeout=2", "-o", "faulthandler_timeout=5")
    output = pytest_on(tmp_path, "-n", "2", "--dist", "worksteal", *limits)
    assert "INTERNALERROR" not in output, output
    assert "4 failed, 20 passed" in output, output
    assert "Failed: Timeout (>2.0s) from pytest-timeout" in output
    # Hypothesis takes a timeout for a failure, and tries to reproduce it.
    for name in ("test_dies", "test_hangs_before_it_begins", "test_hangs_in_hypothesis"):
        assert f"crashed while running 'test_hanging.py::{name}'" in output, output


def test_a_timeout_does_not_cover_the_work_of_plugins_after_a_test(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(REPORTING.format(beyond=1.5))
    (tmp_path / "test_report.py").write_text("def test_slow_report():\n    pass\n")
    output = pytest_on(tmp_path, "-o", "timeout=1")
    assert "1 passed" in output, output


def test_deadlines_grow_with_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PATIENCE, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for load, seconds in ((0, 40), (4, 40), (16, 160), (1_000, 400)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0, 0))
        assert within(10) == seconds
    monkeypatch.setenv(PATIENCE, "1.5")
    assert within(10) == 15


def test_cpu_time_is_what_is_bounded() -> None:
    with cpu_s_below(60):
        pass
    with pytest.raises(AssertionError, match="CPU time"), cpu_s_below(0):
        sum(range(10_000))
