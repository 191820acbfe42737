"""What a server remembers of a database on its own disk: its last commit, so that a lost one is found at a start."""

import os
import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Final

from dspex_persist.infra.logs import get_logger
from dspex_persist.state.anchor import SIZE, Anchor, Head, parse
from dspex_persist.state.errors import NotADatabaseError
from dspex_persist.state.shared import lost
from dspex_persist.state.side_files import open_side_file, reported

_SUFFIX: Final = ".anchor"
_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ADDRESS_SIZE: Final = sha256().digest_size
_logger: Final = get_logger(__name__)


class ServerAnchor:
    """A file in a directory, named after the id of the database. It is written after each commit that is learnt.

    Servers of one machine may share the directory. Each writes what it knows, which is in the database in any case.
    Behind the commit, the file has the hashes of the addresses under which the database was used, so that another
    database in its place is found, too.

    Args:
        directory: Where the file is, or will be; it is created if missing, for its owner alone.
        database_id: The id of the database.
        name: The address of the database, as errors name it.
        address: The same for all addresses of its place; see `addresses.canonical`.
        last: The number of its last commit.
        has_commit: Whether it has a commit with this number and hash.

    Raises:
        NotADatabaseError: The file cannot be opened or created, or the id cannot be the name of one.
        LostCommitsError: The database does not have the commit that was known last, or another one was at its address.
    """

    def __init__(
        self,
        directory: Path,
        database_id: str,
        name: str,
        *,
        address: str,
        last: int,
        has_commit: Callable[[Head], bool],
    ) -> None:
        if not _ID.fullmatch(database_id):
            raise NotADatabaseError(name, "its id is not one that dspex-persist gives")
        self.path = directory / f"{database_id}{_SUFFIX}"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise NotADatabaseError(name, f"its anchor cannot be kept in {directory}: {reason}") from error
        digest = sha256(address.encode("utf-8", "surrogatepass")).digest()
        with reported(directory):
            _refuse_other(directory, self.path, digest, name)
        self._file = open_side_file(directory / database_id, _SUFFIX)
        self._anchor = Anchor(self._file)
        self._is_behind = False
        try:
            known = self._anchor.read()
            if known is not None and known.sequence:
                if last < known.sequence:
                    raise lost.gone(name, last, known.sequence)
                if not has_commit(known):
                    raise lost.other_commit(name, known.sequence)
            with reported(directory / database_id, _SUFFIX):
                self._add(digest)
        except BaseException:
            self.close()
            raise

    def _add(self, address: bytes) -> None:
        size = os.fstat(self._file).st_size
        known = os.pread(self._file, max(size - SIZE, 0), SIZE)
        if address not in _addresses(known):
            os.pwrite(self._file, address, SIZE + len(known) // _ADDRESS_SIZE * _ADDRESS_SIZE)

    def write(self, head: Head) -> None:
        """Remember a commit that is in the database.

        That it is there is true whatever becomes of this file, which then is behind: it only finds fewer losses.
        """
        try:
            self._anchor.write(head)
        except OSError as error:
            if not self._is_behind:
                _logger.error(
                    "the anchor is not written: the next start may not find a lost commit",
                    path=str(self.path),
                    reason=error.strerror or str(error),
                )
            self._is_behind = True
        else:
            if self._is_behind:
                _logger.warning("the anchor is written again", path=str(self.path))
            self._is_behind = False

    def close(self) -> None:
        """Close the file."""
        self._anchor.close()


def _refuse_other(directory: Path, path: Path, address: bytes, name: str) -> None:
    """Refuse a database if the directory has an anchor of another one with this address."""
    for other in sorted(directory.glob(f"*{_SUFFIX}")):
        try:
            content = other.read_bytes() if other != path and other.is_file() else b""
        except (FileNotFoundError, PermissionError):
            # Of another user, whose servers compare it.
            continue
        known = parse(content[:SIZE])
        # Without a commit, nothing can be lost.
        if known is not None and known.sequence and address in _addresses(content[SIZE:]):
            raise lost.other_database(name)


def _addresses(content: bytes) -> list[bytes]:
    return [content[at : at + _ADDRESS_SIZE] for at in range(0, len(content), _ADDRESS_SIZE)]
