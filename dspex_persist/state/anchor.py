"""The anchor: a file of 48 bytes next to the database, or on the machine of one of its servers, that stores its head.

It is written after each group commit, without a sync, so it is never ahead of durable data. A database that is behind
its anchor has lost acknowledged commits, for example through a damaged or missing WAL, which SQLite does not detect.
"""

import os
import struct
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from dspex_persist.infra import forks

_FORMAT = struct.Struct(">Q32s8s")
SIZE: Final = _FORMAT.size
"""That of the file of a database, in bytes."""
_READS: Final = 10


@dataclass(frozen=True, slots=True)
class Head:
    """The last commit: its number (0 if there is none) and its hash."""

    sequence: int
    hash: bytes


class Anchor:
    """The anchor file, which stays open as long as its database."""

    def __init__(self, file: int) -> None:
        """Take over `file`, the descriptor of the open file."""
        self._file = file

    def read(self) -> Head | None:
        """Return the stored head; None from a new file, or a torn one, as a power cut may leave it."""
        return parse(os.pread(self._file, _FORMAT.size, 0))

    def write(self, head: Head) -> None:
        """Store `head`."""
        os.pwrite(self._file, _FORMAT.pack(head.sequence, head.hash, _checksum(head)), 0)

    def close(self) -> None:
        """Close the file."""
        forks.close(self._file)


def remembered(database: Path) -> Head | None:
    """Return the head in the anchor of a database, even while a server writes to it; None if there is no anchor.

    Raises:
        OSError: The anchor cannot be read, except for lack of permission.
    """
    path = database.with_name(f"{database.name}.anchor")
    for _ in range(_READS):
        try:
            head = parse(path.read_bytes())
        except (FileNotFoundError, PermissionError):
            # Only its owner may read it; readers of another user's database do without it.
            return None
        if head is not None:
            return head
    return None


def parse(content: bytes) -> Head | None:
    """Return the head in `content`, or None if the checksum does not match."""
    if len(content) != _FORMAT.size:
        return None
    sequence, head_hash, checksum = _FORMAT.unpack(content)
    head = Head(sequence, head_hash)
    return head if checksum == _checksum(head) else None


def _checksum(head: Head) -> bytes:
    return sha256(head.sequence.to_bytes(8, "big") + head.hash).digest()[:8]


def ends_before(last: int, known: int) -> str:
    """Return the reason of `LostCommitsError` for a log that ends before a commit that is known."""
    missing = f"commits {last + 1} to {known} are gone" if known > last + 1 else f"commit {known} is gone"
    return f"it ends at commit {last}; {missing}"
