"""Putting a file in the place of a database, so that whatever happens one of the two can be opened there.

Nothing is deleted: the database that was there, and the files beside it, get another name.
"""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from dspex_persist.clock import now
from dspex_persist.state.store.anchor import Anchor, Head
from dspex_persist.state.store.engine import SIDE_FILES, open_side_file

_ANCHOR: Final = ".anchor"
BESIDE: Final = (*SIDE_FILES, _ANCHOR, ".lock")
"""What follows the name of a database in the names of the files beside it."""


def take_place(fresh: Path, path: Path, head: Head, *, can_open: bool) -> Path:
    """Give `fresh`, whose last commit is `head`, the name `path`, which its owner calls; the old one's new name.

    `can_open`: what has the name now can be opened without what is in its -wal. What has failed is undone.
    """
    aside = path.with_name(f"{path.name}.replaced-{now():%Y%m%dT%H%M%S.%f}")
    # Whatever is beside the name belongs to the old file: SQLite would read its WAL or journal into the fresh one. What
    # can be opened without its WAL can be without its anchor; from the fresh one, the anchor would keep everybody. What
    # cannot be opened without its WAL must not seem whole meanwhile: of it, the anchor goes last.
    first, last = ((*SIDE_FILES, _ANCHOR), ()) if can_open else (SIDE_FILES, (_ANCHOR,))
    with ExitStack() as undo:
        for suffix in first:
            _move(path, aside, suffix, undo)
        os.link(path, aside)
        undo.callback(_go_back, path, aside)
        _make_alike(fresh, path)
        sync(fresh)
        sync(path.parent)
        # Here, and nowhere else, the one becomes the other.
        fresh.replace(path)
        for suffix in last:
            _move(path, aside, suffix, undo)
        undo.callback(_beside(path, _ANCHOR).unlink, missing_ok=True)
        _write_anchor(path, head)
        sync(path.parent)
        undo.pop_all()
    return aside


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _move(path: Path, aside: Path, suffix: str, undo: ExitStack) -> None:
    source, target = _beside(path, suffix), _beside(aside, suffix)
    if os.path.lexists(source):
        source.rename(target)
        undo.callback(target.rename, source)


def _go_back(path: Path, aside: Path) -> None:
    # Where both are names of the same file, renaming does nothing.
    aside.replace(path)
    aside.unlink(missing_ok=True)


def _make_alike(fresh: Path, path: Path) -> None:
    """Who could open the old file can open the fresh one, even where another user restores it."""
    found = path.stat()
    if os.geteuid() == 0:
        os.chown(fresh, found.st_uid, found.st_gid)
    fresh.chmod(found.st_mode & 0o777)


def _write_anchor(path: Path, head: Head) -> None:
    anchor = Anchor(open_side_file(path, _ANCHOR))
    try:
        anchor.write(head)
    finally:
        anchor.close()
    _make_alike(_beside(path, _ANCHOR), path)
    sync(_beside(path, _ANCHOR))


def sync(path: Path) -> None:
    """Make a file that nobody has open, or the names in a folder, durable."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
