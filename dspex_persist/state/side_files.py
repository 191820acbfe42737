"""The files next to a database, such as its anchor and its lock."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dspex_persist.infra import forks
from dspex_persist.state.errors import Hint, NotADatabaseError


@contextmanager
def reported(path: Path, suffix: str = "") -> Iterator[None]:
    """Convert the errors of the operating system within a block that opens a database, or the file beside it."""
    try:
        yield
    except OSError as error:
        advice = Hint.READ_ONLY if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else None
        name = f"{path.name}{suffix}: " if suffix else ""
        raise NotADatabaseError(str(path), f"{name}{error.strerror or error}").advising(advice) from error


def open_side_file(database: Path, suffix: str) -> int:
    """Open, and if necessary create, a private file next to the database.

    In a folder that others can write to, they may have put a file or a link there to have it, or its target,
    overwritten. So links are not followed, and files of other users are not touched.

    Args:
        database: The database.
        suffix: What its name gets appended, such as ".lock".

    Returns:
        The file's descriptor, which forked children close.

    Raises:
        NotADatabaseError: The file cannot be created or opened, or is not ours.
    """
    path = database.with_name(database.name + suffix)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    with reported(database, suffix):
        if path.is_symlink():
            raise NotADatabaseError(str(database), f"{path.name} is a link that dspex-persist did not make: remove it")
        file = os.open(path, flags, 0o600)
        try:
            _refuse_strange(database, path, os.fstat(file))
        except BaseException:
            os.close(file)
            raise
    # A child that outlives this process must not keep its locks.
    return forks.own(file)


def _refuse_strange(database: Path, path: Path, status: os.stat_result) -> None:
    folder = path.parent.stat()
    trusted = {0, os.geteuid(), folder.st_uid}
    with suppress(OSError):
        trusted.add(database.stat().st_uid)
    is_shared = status.st_nlink > 1 and folder.st_mode & 0o022
    if not stat.S_ISREG(status.st_mode) or is_shared:
        raise NotADatabaseError(str(database), f"{path.name} is not a regular file with one name: remove it")
    if status.st_uid not in trusted:
        raise NotADatabaseError(str(database), f"{path.name} belongs to another user ({status.st_uid}): remove it")
