"""The identity and the size of a file, without its times.

Where the system has `statx`, it is called for these only. Since version 6.13, Linux gives a file a new, precise
modification time at the first write after somebody has asked for its times, and the write then takes up to twice as
long. `os.stat` asks for everything.
"""

import ctypes
import os
from collections.abc import Callable
from typing import Final, NamedTuple


class Identity(NamedTuple):
    """Identifies a file, whatever its name is."""

    device: int
    inode: int


class FileStatus(NamedTuple):
    """What identifies a file, and its size in bytes."""

    identity: Identity
    size: int


class _Statx(ctypes.Structure):
    """`struct statx` of Linux, as far as it is read."""

    _fields_ = (
        ("before_inode", ctypes.c_ubyte * 32),
        ("inode", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("before_device", ctypes.c_ubyte * 88),
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("rest", ctypes.c_ubyte * 112),
    )


_AT_FDCWD: Final = -100
_TYPE_INODE_SIZE: Final = 0x1 | 0x100 | 0x200


def _with_stat(path: str) -> FileStatus:
    status = os.stat(path)  # noqa: PTH116 - a `Path` is several times slower
    return FileStatus(Identity(status.st_dev, status.st_ino), status.st_size)


def _with_statx(statx: Callable[..., int]) -> Callable[[str], FileStatus]:
    def status_of(path: str) -> FileStatus:
        result = _Statx()
        if statx(_AT_FDCWD, os.fsencode(path), 0, _TYPE_INODE_SIZE, ctypes.byref(result)) != 0:
            # Raises the error, or finds what a sandbox hides from `statx`.
            return _with_stat(path)
        return FileStatus(Identity(os.makedev(result.major, result.minor), result.inode), result.size)

    return status_of


def _best() -> Callable[[str], FileStatus]:
    try:
        statx = ctypes.CDLL(None).statx
    except (OSError, AttributeError):
        return _with_stat
    statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
    return _with_statx(statx)


status_of: Final[Callable[[str], FileStatus]] = _best()
"""Return the status of the file with a name. Raises `OSError`, as `os.stat` does."""
