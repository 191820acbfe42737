"""At open: is this the database that was closed, or killed, last time, and does its log still hold?"""

from contextlib import suppress
from pathlib import Path

from sqlalchemy import Connection

from dspex_persist.state.errors import LostCommitsError, NotADatabaseError, ReadFailedError, printable
from dspex_persist.state.store import anchor as anchors
from dspex_persist.state.store import log_reader, migrate, pruned
from dspex_persist.state.store.anchor import Head
from dspex_persist.state.store.chain import GENESIS
from dspex_persist.state.store.schema import REVISION
from dspex_persist.state.store.untouched import is_half_written, read_untouched

_TAIL_COMMITS = 100


def inspect(path: Path, name: Path) -> Head | None:
    """Refuse a file that must not be opened for writing, before it is; its head. To be called by its owner.

    Once it was open for writing, SQLite brings its WAL into it or removes it, and what is left of a file that has lost
    commits is evidence: after a refusal everything is as it was. `name`: what errors call it. None where `recover` has
    to look again: the file is empty or of an older release, or a crash has left what only a writer can roll back.
    Raises `OpenError`, and `ReadFailedError` where nobody can say.
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
    """Raise `NotADatabaseError` where what is half written is another program's, which alone may go on with it."""
    is_foreign = False
    with suppress(NotADatabaseError, ReadFailedError, ValueError):
        is_foreign = read_untouched(path, migrate.is_foreign, as_it_is=True)
    if is_foreign:
        raise NotADatabaseError(str(name), "it is another program's database, which has not finished writing to it")


def recover(connection: Connection, remembered: Head | None, path: Path, inspected: Head | None = None) -> Head:
    """The head of the database, once it was held against what its anchor remembers, and the end of its log checked.

    `inspected`: the head that `inspect` has found; where it still is the head, all of that has been done.
    """
    found = log_reader.head(connection)
    if found == inspected:
        return found
    if remembered is not None:
        _compare(connection, found, remembered, path)
    _check_tail(connection, found, path)
    return found


def _compare(connection: Connection, found: Head, remembered: Head, path: Path) -> None:
    if found.sequence < remembered.sequence:
        gone = f"{found.sequence + 1} to {remembered.sequence}"
        raise LostCommitsError(str(path), f"it ends at commit {found.sequence}; commits {gone} are gone")
    if log_reader.find_hash(connection, remembered.sequence) != remembered.hash:
        raise LostCommitsError(str(path), f"commit {remembered.sequence} is not the one that was acknowledged")


def _check_tail(connection: Connection, found: Head, path: Path) -> None:
    """Check the last commits only: `db check` does the whole log, which takes time with its length."""
    after = max(0, found.sequence - _TAIL_COMMITS)
    previous = log_reader.find_hash(connection, after)
    for commit in log_reader.iter_commits(connection, after):
        if previous is None or not (commit.link(previous) == commit.hash or pruned.fits(connection, commit, previous)):
            reason = f"the content of commit {commit.sequence} does not fit its hash"
            raise LostCommitsError(str(path), reason)
        previous = commit.hash
