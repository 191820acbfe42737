"""The user that runs this process, with any environment and any list of users."""

import os
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspex_persist.infra.user import user_name

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")
PROGRAM = """
import sys, dspex_persist
from dspex_persist.state.bridged import BridgedState
with dspex_persist.connect(sys.argv[1]) as state:
    state.initialize_session("s")
    print(ascii(state.default_origin("x").actor))
print(ascii(BridgedState("127.0.0.1:1").default_origin("x").actor))
"""


@pytest.fixture(autouse=True)
def _nameless(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_the_name_comes_from_the_system() -> None:
    assert user_name() == pwd.getpwuid(os.getuid()).pw_name


def test_a_user_without_an_entry_has_its_uid_as_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert user_name() == str(os.getuid())


@pytest.mark.parametrize(
    ("name", "text"),
    [(b"ada", "ada"), ("zoë".encode(), "zoë"), (b"a\xffb", r"a\xffb"), (b"a\nb\x1b[2J", r"a\nb\x1b[2J")],
)
def test_a_name_is_printable_text(monkeypatch: pytest.MonkeyPatch, name: bytes, text: str) -> None:
    monkeypatch.setenv("LOGNAME", os.fsdecode(name))
    assert user_name() == text


def test_a_long_name_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "a" * 10_000)
    assert user_name() == "a" * 100


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may write to. Pytest's temporary folders are below one that only its owner may enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.mark.parametrize("environment", [{}, {b"LOGNAME": b"\xff"}, {b"LOGNAME": b"\xc3\xa9"}])
def test_both_backends_have_the_same_actor_without_a_home(folder: Path, environment: dict[bytes, bytes]) -> None:
    argv = [sys.executable, "-c", PROGRAM, str(folder / "s.db")]
    python_path = os.environb.get(b"PYTHONPATH", b"")
    more = {} if os.getuid() else {"user": 54321, "group": 54321}
    if more and not _can_import(more):
        more = {}
    done = subprocess.run(
        argv, env={b"PYTHONPATH": python_path, **environment}, capture_output=True, text=True, timeout=60, **more
    )  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    embedded, bridged = done.stdout.splitlines()
    assert embedded == bridged


def _can_import(more: dict[str, int]) -> bool:
    """Whether another user may read the interpreter that runs these tests."""
    argv = [sys.executable, "-c", "import dspex_persist.state.bridged"]
    try:
        return not subprocess.run(argv, capture_output=True, timeout=60, **more).returncode  # type: ignore[call-overload]
    except OSError:
        return False
