"""At open: is this the database that was closed, or killed, last time, and does its log still hold?"""

from pathlib import Path

from sqlalchemy import Connection

from dspex_persist.state.errors import LostCommitsError
from dspex_persist.state.store import audit, prune
from dspex_persist.state.store.anchor import Head

_TAIL_COMMITS = 100


def recover(connection: Connection, remembered: Head | None, path: Path) -> Head:
    """The head of the database, once it was held against what its anchor remembers, and the end of its log checked."""
    found = audit.head(connection)
    if remembered is not None:
        _compare(connection, found, remembered, path)
    _check_tail(connection, found, path)
    return found


def _compare(connection: Connection, found: Head, remembered: Head, path: Path) -> None:
    if found.sequence < remembered.sequence:
        gone = f"{found.sequence + 1} to {remembered.sequence}"
        raise LostCommitsError(str(path), f"it ends at commit {found.sequence}; commits {gone} are gone")
    if audit.find_hash(connection, remembered.sequence) != remembered.hash:
        raise LostCommitsError(str(path), f"commit {remembered.sequence} is not the one that was acknowledged")


def _check_tail(connection: Connection, found: Head, path: Path) -> None:
    """Check the last commits only: `db check` does the whole log, which takes time with its length."""
    after = max(0, found.sequence - _TAIL_COMMITS)
    previous = audit.find_hash(connection, after)
    for commit in audit.iter_commits(connection, after):
        if previous is None or not (commit.link(previous) == commit.hash or prune.fits(connection, commit, previous)):
            reason = f"the content of commit {commit.sequence} does not fit its hash"
            raise LostCommitsError(str(path), reason)
        previous = commit.hash
