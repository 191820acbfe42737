"""Replace a database with another file, so that after a crash at any moment one of the two can be opened.

Nothing is deleted: the old database and its side files are renamed.
"""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from dspex_persist.clock import now
from dspex_persist.state.anchor import Anchor, Head
from dspex_persist.state.side_files import open_side_file
from dspex_persist.state.store.engine import SIDE_FILES

_ANCHOR: Final = ".anchor"
SIDE_SUFFIXES: Final = (*SIDE_FILES, _ANCHOR, ".lock")
"""The suffixes of a database's side files, which are named after it."""


def take_place(fresh: Path, path: Path, head: Head, *, can_open: bool) -> Path:
    """Rename `fresh` to `path`, whose ownership lock the caller holds. A failure undoes everything.

    Args:
        fresh: The new database.
        path: The database to replace.
        head: The last commit of `fresh`, for its anchor.
        can_open: Whether the old database can be opened without its -wal.

    Returns:
        The new name of the old database.
    """
    aside = path.with_name(f"{path.name}.replaced-{now():%Y%m%dT%H%M%S.%f}")
    # All side files belong to the old file, and must be moved away: SQLite would apply its WAL or journal to the fresh
    # one, and its anchor would have the fresh one refused. An old file that needs its WAL must not seem whole while it
    # is without: its anchor, by which it is refused then, is moved last.
    first, last = ((*SIDE_FILES, _ANCHOR), ()) if can_open else (SIDE_FILES, (_ANCHOR,))
    with ExitStack() as undo:
        for suffix in first:
            _move(path, aside, suffix, undo)
        os.link(path, aside)
        undo.callback(_go_back, path, aside)
        _make_alike(fresh, path)
        sync(fresh)
        sync(path.parent)
        # The switch: before this line a crash leaves the old database, after it the fresh one.
        fresh.replace(path)
        for suffix in last:
            _move(path, aside, suffix, undo)
        undo.callback(_side_file(path, _ANCHOR).unlink, missing_ok=True)
        _write_anchor(path, head)
        sync(path.parent)
        undo.pop_all()
    return aside


def _side_file(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _move(path: Path, aside: Path, suffix: str, undo: ExitStack) -> None:
    source, target = _side_file(path, suffix), _side_file(aside, suffix)
    if os.path.lexists(source):
        source.rename(target)
        undo.callback(target.rename, source)


def _go_back(path: Path, aside: Path) -> None:
    # If both are names of the same file, `replace` does nothing and leaves both.
    aside.replace(path)
    aside.unlink(missing_ok=True)


def _make_alike(fresh: Path, path: Path) -> None:
    """Give `fresh` the owner and the permissions of `path`, in case another user restores it."""
    old = path.stat()
    if os.geteuid() == 0:
        os.chown(fresh, old.st_uid, old.st_gid)
    fresh.chmod(old.st_mode & 0o777)


def _write_anchor(path: Path, head: Head) -> None:
    anchor = Anchor(open_side_file(path, _ANCHOR))
    try:
        anchor.write(head)
    finally:
        anchor.close()
    _make_alike(_side_file(path, _ANCHOR), path)
    sync(_side_file(path, _ANCHOR))


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
