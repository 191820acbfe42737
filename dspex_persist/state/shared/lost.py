"""The errors of a server whose database, which others share, has lost commits: while it runs, and when it starts."""

from typing import Final

from dspex_persist.state.anchor import ends_before
from dspex_persist.state.errors import Hint, LostCommitsError

NO_HEAD: Final = "its table head is empty, so nothing says where the log ends"


def gone(name: str, last: int, known: int) -> LostCommitsError:
    """Return the error of a database that ends before a commit that is known."""
    return _lost(name, ends_before(last, known))


def other_commit(name: str, sequence: int) -> LostCommitsError:
    """Return the error of a database in which a commit that is known has another hash."""
    return _lost(name, f"commit {sequence} is not the one that this server has seen")


def other_database(name: str) -> LostCommitsError:
    """Return the error of a database that has another one's address."""
    return _lost(name, "it is another database than before")


def without_head(name: str) -> LostCommitsError:
    """Return the error of a database that does not say where its log ends any more."""
    return _lost(name, NO_HEAD)


def _lost(name: str, reason: str) -> LostCommitsError:
    error = LostCommitsError(name, reason)
    error.advice = Hint.PUT_BACK_DATABASE
    return error
