"""Reading what a store has, without being one of its servers. It creates and changes nothing, but for its functions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar, Unpack

from dspex_persist.state.commands import Command
from dspex_persist.state.errors import NotADatabaseError, UnsupportedError
from dspex_persist.state.errors.hints import Hint
from dspex_persist.state.groups import GroupMoment, unit_of
from dspex_persist.state.model import Origin
from dspex_persist.state.options import SessionOptions
from dspex_persist.state.provider import Who
from dspex_persist.state.recording import Header, RecordedCommit
from dspex_persist.state.unit_of_work import Drafts
from dspex_persist.state.valkey.address import Address
from dspex_persist.state.valkey.connection import Connection, converted
from dspex_persist.state.valkey.heads import FIELDS, Head, refuse_headless
from dspex_persist.state.valkey.keys import Keys
from dspex_persist.state.valkey.reads import Reads
from dspex_persist.state.valkey.recordings import Recordings
from dspex_persist.state.valkey.types import refuse_others
from dspex_persist.state.valkey.verify import Problem, Verification

R = TypeVar("R")


@contextmanager
def open_reads(url: str) -> Iterator[tuple[Reads, Keys]]:
    """Have a connection for reading. A replica will do, too.

    Raises:
        InvalidArgumentError: The address is invalid.
        UnavailableError: The store cannot be reached.
        NotADatabaseError: It has no log with this prefix, or something else.
    """
    address = Address.of(url)
    keys, connection = Keys(address.prefix), Connection(address.client(), retries=1)
    try:
        with converted():
            refuse_others(connection.client, keys, address.name)
            refuse_headless(connection.client, keys, address.name)
            if not connection.client.exists(keys.head):
                reason = f"it has no sessions under the prefix {address.prefix}"
                raise NotADatabaseError(address.name, reason).advising(Hint.BEGIN_DATABASE)
        yield Reads(connection, keys), keys
    finally:
        connection.close()


class SessionReader:
    """Answers commands that only read: each sees the live session as it is stored at that moment.

    It needs no rights but those to read, and the other servers do not hear of it.

    Args:
        reads: What reads the store.
        keys: The names of the keys.
        options: The limits of commands.
    """

    def __init__(self, reads: Reads, keys: Keys, options: SessionOptions) -> None:
        self._reads, self._keys, self._options = reads, keys, options

    def run(self, command: Command[R], idempotency_key: str | None = None, **who: Unpack[Who]) -> R:
        """Return the result of a command; see `StateProvider.run`. Who asks makes no difference."""
        command.check()
        if command.writes:
            raise UnsupportedError(f"{command.cause} by a reader of the store")
        with converted():
            head = Head.of(self._reads.client.hmget(self._keys.head, FIELDS))
            origin, at = Origin("", command.cause), GroupMoment.after(head.last_at)
            return command.apply(unit_of(self._options, Drafts(self._reads), origin, at, head.sequence))


@contextmanager
def open_sessions(url: str, options: SessionOptions) -> Iterator[SessionReader]:
    """Open the live sessions for reading; see `open_reads` for the errors."""
    with open_reads(url) as (reads, keys):
        yield SessionReader(reads, keys, options)


@contextmanager
def open_recording(
    url: str, session_id: str, *, started: int | None = None, reveal: bool = False
) -> Iterator[tuple[Header, Iterator[RecordedCommit]]]:
    """Open the log of a session; see `Recordable.record` for the arguments, and `open_reads` for the errors."""
    with open_reads(url) as (reads, keys):
        yield Recordings(reads, keys).record(session_id, started=started, reveal=reveal, after=0)


def verify(
    url: str, progress: Callable[[int, int], object] = lambda _, __: None, most: int | None = None
) -> tuple[int, tuple[Problem, ...]]:
    """Check all that a store has of a log, while servers go on.

    Args:
        url: The address, as for `ValkeyState`.
        progress: Called now and then with how many commits were checked, and how many there are.
        most: Stop after so many problems.

    Returns:
        How many commits were checked, and what is wrong.

    Raises:
        OpenError: See `open_reads`, also for the others.
    """
    with open_reads(url) as (reads, keys), converted():
        verification = Verification(reads, keys, progress)
        problems = tuple(islice(verification.problems(), most))
    return verification.commits, problems
