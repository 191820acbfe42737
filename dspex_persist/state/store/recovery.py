"""Checks when a database is opened: that no acknowledged commit is missing, and that the end of the chain verifies."""

from contextlib import suppress
from pathlib import Path

from sqlalchemy import Connection

from dspex_persist.state import anchor as anchors
from dspex_persist.state.anchor import Head
from dspex_persist.state.errors import LostCommitsError, NotADatabaseError, ReadFailedError, printable
from dspex_persist.state.store import log_reader, migrate, pruned
from dspex_persist.state.store.chain import GENESIS
from dspex_persist.state.store.schema import REVISION
from dspex_persist.state.store.untouched import is_half_written, read_untouched

_TAIL_COMMITS = 100


def inspect(path: Path, name: Path) -> Head | None:
    """Refuse a file that must not be opened for writing, without changing anything. Its owner calls this first.

    Opened for writing, SQLite would merge or remove the WAL; but the remains of a file that has lost commits are
    evidence, so a refused file stays as it was.

    Args:
        path: The file.
        name: Its name in errors.

    Returns:
        The head; None if `recover` has to check again, because the file is empty, has an older schema, or has a journal
        after a crash that only a writer can roll back.

    Raises:
        OpenError: The file is refused.
        ReadFailedError: The file could not be read.
    """
    try:
        remembered = anchors.remembered(path)
        return read_untouched(path, lambda connection: _inspect(connection, remembered, name))
    except ReadFailedError as error:
        if not is_half_written(error):
            raise
        refuse_half_written(path, name)
        return None
    except NotADatabaseError as error:
        error.path = printable(str(name))
        raise
    except OSError as error:
        raise NotADatabaseError(str(name), error.strerror or str(error)) from error
    except ValueError as error:
        raise NotADatabaseError(str(name), f"it is damaged: {error}") from error


def _inspect(connection: Connection, remembered: Head | None, path: Path) -> Head | None:
    revision = migrate.current_revision(connection)
    if revision == REVISION:
        return recover(connection, remembered, path)
    if revision is not None:
        migrate.refuse_newer(path, revision)
    if remembered is not None:
        _compare(connection, log_reader.head(connection) if revision else Head(0, GENESIS), remembered, path)
    return None


def refuse_half_written(path: Path, name: Path) -> None:
    """Raise `NotADatabaseError` if a file with a hot journal is another program's, which has to roll it back."""
    is_foreign = False
    with suppress(NotADatabaseError, ReadFailedError, ValueError):
        is_foreign = read_untouched(path, migrate.is_foreign, as_it_is=True)
    if is_foreign:
        raise NotADatabaseError(str(name), "it is another program's database, which has not finished writing to it")


def recover(connection: Connection, remembered: Head | None, path: Path, inspected: Head | None = None) -> Head:
    """Compare the database with its anchor, and check the end of its log.

    Args:
        connection: A connection in a transaction.
        remembered: The head in the anchor, if there is one.
        path: The file, for errors.
        inspected: The result of `inspect`; if it is still the head, the checks have been done.

    Returns:
        The head.

    Raises:
        LostCommitsError: The database is behind its anchor, or the chain does not verify.
    """
    head = log_reader.head(connection)
    if head == inspected:
        return head
    if remembered is not None:
        _compare(connection, head, remembered, path)
    _check_tail(connection, head, path)
    return head


def _compare(connection: Connection, head: Head, remembered: Head, path: Path) -> None:
    if head.sequence < remembered.sequence:
        raise LostCommitsError(str(path), anchors.ends_before(head.sequence, remembered.sequence))
    if log_reader.find_hash(connection, remembered.sequence) != remembered.hash:
        raise LostCommitsError(str(path), f"commit {remembered.sequence} is not the one that was acknowledged")


def _check_tail(connection: Connection, head: Head, path: Path) -> None:
    """Check the last commits only. The whole log would take too long at start; `db check` does that."""
    after = max(0, head.sequence - _TAIL_COMMITS)
    previous = log_reader.find_hash(connection, after)
    for commit in log_reader.iter_commits(connection, after):
        if previous is None or not (commit.link(previous) == commit.hash or pruned.fits(connection, commit, previous)):
            reason = f"the content of commit {commit.sequence} does not fit its hash"
            raise LostCommitsError(str(path), reason)
        previous = commit.hash
