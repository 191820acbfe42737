"""The anchor: a file of 48 bytes beside the database that remembers its head.

It is written after each group commit, without a sync, and so is never ahead of durable data. A database that is
behind it has lost commits that were acknowledged, which SQLite itself would not notice (a damaged or lost WAL).
"""

import os
import struct
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from dspex_persist.infra import forks

_FORMAT = struct.Struct(">Q32s8s")
_READS: Final = 10


@dataclass(frozen=True, slots=True)
class Head:
    """The last commit: its sequence number (0: none) and its hash."""

    sequence: int
    hash: bytes


class Anchor:
    """The anchor file, kept open for as long as its database is."""

    def __init__(self, file: int) -> None:
        """`file`: the descriptor of the open file, which is the anchor's from now on."""
        self._file = file

    def read(self) -> Head | None:
        """What was remembered; None from a new or torn file (a power cut may tear it: it is not synced)."""
        return parse(os.pread(self._file, _FORMAT.size, 0))

    def write(self, head: Head) -> None:
        """Remember `head`."""
        os.pwrite(self._file, _FORMAT.pack(head.sequence, head.hash, _checksum(head)), 0)

    def close(self) -> None:
        """Close the file."""
        forks.close(self._file)


def remembered(database: Path) -> Head | None:
    """What the anchor beside a database remembers, which a server may be writing just now; None where there is none.

    Raises `OSError` where it cannot be read, unless it is another user's.
    """
    path = database.with_name(f"{database.name}.anchor")
    for _ in range(_READS):
        try:
            head = parse(path.read_bytes())
        except (FileNotFoundError, PermissionError):
            # Its owner's alone: who reads a file of others does without.
            return None
        if head is not None:
            return head
    return None


def parse(content: bytes) -> Head | None:
    """The head in `content`, or None where the checksum does not fit."""
    if len(content) != _FORMAT.size:
        return None
    sequence, head_hash, checksum = _FORMAT.unpack(content)
    head = Head(sequence, head_hash)
    return head if checksum == _checksum(head) else None


def _checksum(head: Head) -> bytes:
    return sha256(head.sequence.to_bytes(8, "big") + head.hash).digest()[:8]
