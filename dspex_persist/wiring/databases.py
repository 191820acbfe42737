"""Databases that several servers share: what there is behind each scheme of their URLs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, TypeVar, Unpack

from dspex_persist.addresses import DatabaseUrl
from dspex_persist.extras import lack_of
from dspex_persist.state.errors import InvalidArgumentError, UnavailableError, UnsupportedError
from dspex_persist.wiring.options import sorted_options

if TYPE_CHECKING:
    from dspex_persist.state.abilities import StreamsTools
    from dspex_persist.state.audit import AuditSource
    from dspex_persist.state.commands import Command
    from dspex_persist.state.meter import Meter
    from dspex_persist.state.options import SessionOptions
    from dspex_persist.state.provider import Progress, Who
    from dspex_persist.state.recording import Header, RecordedCommit
    from dspex_persist.state.served import ServedEngine
    from dspex_persist.state.store.maintenance.checks import CheckReport
    from dspex_persist.state.store.session_store import StoreOptions

R = TypeVar("R")
T = TypeVar("T")


class ReadsSessions(Protocol):
    """Whatever runs commands that read a live session: an engine, a server, or a reader of a database."""

    def run(self, command: "Command[R]", idempotency_key: str | None = None, **who: "Unpack[Who]") -> R:
        """Return the result of a command; see `StateProvider.run`."""


@contextmanager
def reaching(url: DatabaseUrl) -> Iterator[None]:
    """Have an error of a database that is not reached, when it is opened, say which it is, and what to look at.

    That is the address, unless the error says something else.
    """
    try:
        yield
    except UnavailableError as error:
        at = UnavailableError.at(str(url), error.reason.rstrip("."))
        raise at.advising(error.advice or at.advice) from error


class Database(ABC):
    """A database at a URL. It is opened with the package of its extra, which may be missing."""

    needs: ClassVar[tuple[str, str]]
    """The module that must be there, and the extra that installs it."""
    has_audits: ClassVar[bool] = True
    """Whether the history can be queried."""

    def __init__(self, url: DatabaseUrl) -> None:
        self.url = url
        module, extra = self.needs
        lack = lack_of(url.scheme, module, extra)
        if lack is not None:
            raise InvalidArgumentError("url", lack)

    @abstractmethod
    def connect(self, **options: Any) -> "StreamsTools":
        """Open the session state, as `connect` does."""

    @abstractmethod
    def engine(
        self,
        options: "StoreOptions",
        *,
        sweep_interval_s: float,
        anchor_dir: Path | None,
        on_fatal: Callable[[BaseException], None],
        meter: "Meter | None",
    ) -> "ServedEngine":
        """Open the engine of a server."""

    @abstractmethod
    def audit(self, *, reveal: bool) -> "AuditSource":
        """Open the history for queries. It creates nothing."""

    def sessions(self, options: "SessionOptions") -> "AbstractContextManager[ReadsSessions]":
        """Open the live sessions for reading, where there are no audits. It creates nothing."""
        raise UnsupportedError(f"reading the live sessions in {self.url} beside its history", "query the history")

    @abstractmethod
    def recording(
        self, session_id: str, *, started: int | None, reveal: bool
    ) -> "AbstractContextManager[tuple[Header, Iterator[RecordedCommit]]]":
        """Open the log of a session. It creates nothing."""

    def check(self, progress: "Progress", jobs: int | None = None) -> "CheckReport":
        """Check everything, as `db check` does, while servers go on. It changes nothing.

        Args:
            progress: Called now and then.
            jobs: How many processes share the work, if they can; None for as many as are worth it.
        """
        raise UnsupportedError(f"a check of {self.url}", "check a file into which its sessions were imported")

    @contextmanager
    def _opened(self, opening: "AbstractContextManager[T]") -> "Iterator[T]":
        with ExitStack() as stack:
            with reaching(self.url):
                opened = stack.enter_context(opening)
            yield opened

    @abstractmethod
    def check_there(self) -> None:
        """Raise `OpenError` if the database has no sessions yet, not even the tables for them."""


class Postgresql(Database):
    """`postgresql://...`."""

    needs = ("psycopg", "postgresql")

    def connect(self, **options: Any) -> "StreamsTools":
        """See `Database`."""
        from dspex_persist.state.distributed import DistributedState
        from dspex_persist.state.store.session_store import StoreOptions

        store_options, options = sorted_options(options, StoreOptions, DistributedState, "a PostgreSQL database")
        with reaching(self.url):
            return DistributedState(self.url.url, store_options, **options)

    def engine(
        self,
        options: "StoreOptions",
        *,
        sweep_interval_s: float,
        anchor_dir: Path | None,
        on_fatal: Callable[[BaseException], None],
        meter: "Meter | None",
    ) -> "ServedEngine":
        """See `Database`. It sweeps often enough to find servers that have died."""
        from dspex_persist.state.distributed import PostgresState
        from dspex_persist.state.shared import SWEEP_S

        often_s = min(sweep_interval_s, SWEEP_S)
        with reaching(self.url):
            return PostgresState(
                self.url.url,
                options,
                sweep_interval_s=often_s,
                anchor_dir=anchor_dir,
                on_fatal=on_fatal,
                meter=meter,
            )

    def audit(self, *, reveal: bool) -> "AuditSource":
        """See `Database`."""
        from dspex_persist.state.store import databases

        with reaching(self.url):
            return databases.open_audit(self.url.url, reveal=reveal)

    def recording(
        self, session_id: str, *, started: int | None, reveal: bool
    ) -> "AbstractContextManager[tuple[Header, Iterator[RecordedCommit]]]":
        """See `Database`."""
        from dspex_persist.state.store import databases

        return self._opened(databases.open_recording(self.url.url, session_id, started=started, reveal=reveal))

    def check(self, progress: "Progress", jobs: int | None = None) -> "CheckReport":
        """See `Database`."""
        from dspex_persist.state.store import databases

        with reaching(self.url):
            return databases.check(self.url.url, progress, jobs)

    def check_there(self) -> None:
        """See `Database`."""
        from dspex_persist.state.store import databases

        with reaching(self.url), databases.open_readers(self.url.url):
            pass


class Redis(Database):
    """`redis://...`, and the same of Valkey."""

    needs = ("redis", "redis")
    has_audits = False

    def connect(self, **options: Any) -> "StreamsTools":
        """See `Database`."""
        from dspex_persist.state.options import SessionOptions
        from dspex_persist.state.valkey.valkey_state import RedisState

        session_options, options = sorted_options(options, SessionOptions, RedisState, "a Redis store")
        with reaching(self.url):
            return RedisState(self.url.url, session_options, **options)

    def engine(
        self,
        options: "StoreOptions",
        *,
        sweep_interval_s: float,
        anchor_dir: Path | None,
        on_fatal: Callable[[BaseException], None],
        meter: "Meter | None",
    ) -> "ServedEngine":
        """See `Database`. It sweeps often enough to find servers that have died."""
        from dspex_persist.state.shared import SWEEP_S
        from dspex_persist.state.valkey.valkey_state import ValkeyState

        for name in ("retention_keep_versions", "retention_age_s", "retention_ended_sessions_s", "warn_size_bytes"):
            if getattr(options, name) is not None:
                raise InvalidArgumentError(name, f"{self.url} keeps the whole history; nothing there prunes it")
        with reaching(self.url):
            return ValkeyState(
                self.url.url,
                options,
                durability=options.durability,
                cache_size_bytes=options.cache_size_bytes,
                sweep_interval_s=min(sweep_interval_s, SWEEP_S),
                anchor_dir=anchor_dir,
                on_fatal=on_fatal,
                meter=meter,
                denials_kept=options.denials_kept,
            )

    def audit(self, *, reveal: bool) -> "AuditSource":
        """See `Database`."""
        what = f"a query of the history, such as a list of sessions, in {self.url}"
        raise UnsupportedError(what, "export the sessions that you want to look at, and import them into a file")

    def recording(
        self, session_id: str, *, started: int | None, reveal: bool
    ) -> "AbstractContextManager[tuple[Header, Iterator[RecordedCommit]]]":
        """See `Database`."""
        from dspex_persist.state.valkey import databases

        return self._opened(databases.open_recording(self.url.url, session_id, started=started, reveal=reveal))

    @contextmanager
    def sessions(self, options: "SessionOptions") -> "Iterator[ReadsSessions]":
        """See `Database`."""
        from dspex_persist.state.valkey import databases

        # What is read later needs rights of its own.
        with reaching(self.url), databases.open_sessions(self.url.url, options) as reader:
            yield reader

    def check(self, progress: "Progress", jobs: int | None = None) -> "CheckReport":
        """See `Database`."""
        from dspex_persist.state.store.maintenance.checks import CheckReport
        from dspex_persist.state.store.verify import MOST_PROBLEMS, Problem
        from dspex_persist.state.valkey import databases
        from dspex_persist.state.valkey.valkey_log import FORMAT

        def report(done: int, in_all: int) -> None:
            progress("checking commits", done, in_all)

        with reaching(self.url):
            commits, found = databases.verify(self.url.url, report, most=MOST_PROBLEMS)
        problems = tuple(Problem(*each) for each in found)
        is_complete = len(problems) < MOST_PROBLEMS
        return CheckReport(str(self.url), str(FORMAT), commits, 0, 0, 0, False, problems, is_complete)

    def check_there(self) -> None:
        """See `Database`."""
        from dspex_persist.state.valkey import databases

        with reaching(self.url), databases.open_reads(self.url.url):
            pass


_KINDS: Final[dict[str, type[Database]]] = {"postgresql": Postgresql, "redis": Redis}


def database_at(url: DatabaseUrl) -> Database:
    """Return the database at a URL.

    Raises:
        InvalidArgumentError: What it needs is not installed.
    """
    return _KINDS[url.scheme](url)
