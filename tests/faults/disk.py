"""Computes the possible states of the disk after a power cut, from the operations that `io_recorder.c` has recorded.

Writes that are not synced yet may survive or not, in any order, whole or in pieces. A sync makes everything durable
that was written when it began. Names behave as in a journalling file system: they are created, removed and moved in
order, and become durable with the next sync of any file.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

_HEADER: Final = struct.Struct("<c3xII4xQQQ")
_SECTOR, _BLOCK = 512, 4096
MODES: Final = ("dropped", "kept", "prefix", "subset", "torn 512", "torn 4096", "holes", "sizes", "mixed")
"""What happens to the operations that are not durable."""


class Operation(NamedTuple):
    """One record. `file` is the process, and its number for the open file."""

    kind: str
    file: tuple[int, int]
    at_s: float
    offset: int
    content: bytes

    @property
    def names(self) -> list[str]:
        """The names in the record."""
        return self.content.decode().split("\0")


def read_log(path: Path) -> list[Operation]:
    """Return the recorded operations, in order."""
    log, at, operations = path.read_bytes(), 0, []
    while at < len(log):
        kind, number, process, at_ns, offset, length = _HEADER.unpack_from(log, at)
        at += _HEADER.size
        operations.append(Operation(kind.decode(), (process, number), at_ns / 1e9, offset, log[at : at + length]))
        at += length
    return operations


class Change(NamedTuple):
    """A change of a file: bytes written at an offset or, with None, a truncation to it."""

    offset: int
    content: bytes | None


@dataclass(slots=True, eq=False)
class Inode:
    """A file's durable content, and the changes since."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[Change] = field(default_factory=list)
    begun: dict[tuple[int, int], int] = field(default_factory=dict)
    """The number of pending changes when a running sync began, by the file that syncs."""

    def end_sync(self, file: tuple[int, int]) -> None:
        count = self.begun.pop(file, 0)
        for change in self.pending[:count]:
            _apply(self.durable, change)
        del self.pending[:count]
        self.begun = {other: max(0, mark - count) for other, mark in self.begun.items()}


class Disk:
    """The files of one folder, during the playback of recorded operations."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """Start with `files`, which are durable."""
        self._names = {name: Inode(bytearray(content)) for name, content in files.items()}
        self._open: dict[tuple[int, int], Inode] = {}
        self._renamed: list[tuple[str, Inode | None]] = []
        """Names that have changed since the last sync, with their files before."""
        self._renamed_before: dict[tuple[int, int], int] = {}

    def play(self, operation: Operation) -> None:
        """Apply an operation."""
        kind, file = operation.kind, operation.file
        if kind in "OC":
            self._open_file(operation)
        elif kind == "U":
            self._name(operation.names[0], None)
        elif kind in "RL":
            old, new = operation.names
            self._name(new, self._names.get(old))
            if kind == "R":
                self._name(old, None)
        elif kind == "B":
            self._renamed_before[file] = len(self._renamed)
            if inode := self._open.get(file):
                inode.begun[file] = len(inode.pending)
        elif kind == "S":
            self._end_sync(file)
        elif inode := self._open.get(file):
            inode.pending.append(Change(operation.offset, operation.content if kind == "W" else None))

    def _open_file(self, operation: Operation) -> None:
        [name] = operation.names
        if name == "":
            return
        if name not in self._names:
            self._name(name, Inode())
        self._open[operation.file] = self._names[name]
        if operation.kind == "C":
            self._names[name].pending.append(Change(0, None))

    def _name(self, name: str, inode: Inode | None) -> None:
        self._renamed.append((name, self._names.get(name)))
        _put(self._names, name, inode)

    def _end_sync(self, file: tuple[int, int]) -> None:
        count = self._renamed_before.pop(file, 0)
        del self._renamed[:count]
        self._renamed_before = {other: max(0, mark - count) for other, mark in self._renamed_before.items()}
        if inode := self._open.get(file):
            inode.end_sync(file)

    def cut(self, mode: str, random: Random) -> dict[str, bytes]:
        """Return the files that a power cut may leave now, by name."""
        names = dict(self._names)
        kept = {"dropped": 0, "kept": len(self._renamed)}.get(mode, random.randint(0, len(self._renamed)))
        for name, inode in reversed(self._renamed[kept:]):
            _put(names, name, inode)
        # Locks and shared memory have no meaning after a power cut.
        kept_names = sorted(name for name in names if not name.endswith((".lock", "-shm")))
        return {name: bytes(_content(names[name], mode, random)) for name in kept_names}


def _put(names: dict[str, Inode], name: str, inode: Inode | None) -> None:
    if inode is None:
        names.pop(name, None)
    else:
        names[name] = inode


def _content(inode: Inode, mode: str, random: Random) -> bytearray:
    if mode == "mixed":
        mode = random.choice(MODES[:-1])
    content = bytearray(inode.durable)
    for change in _surviving(inode.pending, mode, random):
        if change.content is None:
            _apply(content, change)
        elif mode == "sizes":
            _extend(content, change.offset + len(change.content))
        elif mode in ("torn 512", "torn 4096", "holes"):
            for piece in _pieces(change.offset, change.content, _BLOCK if mode == "torn 4096" else _SECTOR):
                if random.random() < 0.5:
                    _apply(content, piece)
                elif mode == "holes":
                    _extend(content, piece.offset + len(piece.content or b""))
        else:
            _apply(content, change)
    return content


def _surviving(pending: list[Change], mode: str, random: Random) -> list[Change]:
    if mode == "dropped":
        return []
    if mode == "prefix":
        return pending[: random.randint(0, len(pending))]
    if mode == "subset":
        share = random.choice((0.1, 0.5, 0.9))
        return [change for change in pending if random.random() < share]
    return pending


def _pieces(offset: int, content: bytes, size: int) -> Iterator[Change]:
    """Split a write at the disk's boundaries."""
    at, end = offset, offset + len(content)
    while at < end:
        until = min(end, (at // size + 1) * size)
        yield Change(at, content[at - offset : until - offset])
        at = until


def _apply(content: bytearray, change: Change) -> None:
    _extend(content, change.offset)
    if change.content is None:
        del content[change.offset :]
    else:
        content[change.offset : change.offset + len(change.content)] = change.content


def _extend(content: bytearray, size: int) -> None:
    if size > len(content):
        content.extend(bytes(size - len(content)))
