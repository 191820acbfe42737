"""The status of files without their times."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dspex_persist.infra import file_status
from dspex_persist.infra.file_status import FileStatus, Identity, status_of

BOTH = pytest.mark.parametrize("ask", [status_of, file_status._with_stat])


@BOTH
def test_it_agrees_with_stat(tmp_path: Path, ask: Callable[[str], FileStatus]) -> None:
    for name, size in (("empty", 0), ("small", 48), ("sparse", 5_000_000_000), ("ünïcode \udcff", 1)):
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(size)
        status = path.stat()
        assert ask(str(path)) == FileStatus(Identity(status.st_dev, status.st_ino), size)
    assert ask("/dev/null").identity == Identity(os.stat("/dev/null").st_dev, os.stat("/dev/null").st_ino)  # noqa: PTH116


@BOTH
def test_links_are_followed(tmp_path: Path, ask: Callable[[str], FileStatus]) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10)
    (tmp_path / "link").symlink_to("file")
    assert ask(str(tmp_path / "link")) == ask(str(tmp_path / "file"))


@BOTH
def test_errors_are_those_of_stat(tmp_path: Path, ask: Callable[[str], FileStatus]) -> None:
    with pytest.raises(FileNotFoundError):
        ask(str(tmp_path / "missing"))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        ask(str(tmp_path / "file" / "inside"))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no statx")
def test_linux_is_asked_without_times() -> None:
    assert status_of is not file_status._with_stat


def test_a_system_without_statx_is_asked_by_stat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_status.ctypes, "CDLL", lambda _: object())
    assert file_status._best() is file_status._with_stat


def test_what_statx_refuses_is_asked_by_stat(tmp_path: Path) -> None:
    """A sandbox may not permit it."""
    ask = file_status._with_statx(lambda *_: -1)
    assert ask(str(tmp_path)) == file_status._with_stat(str(tmp_path))
