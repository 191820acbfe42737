"""Opens the server or the database that a command names, and says what to do when there is no such session."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dspex_persist.addresses import DatabaseUrl
from dspex_persist.cli.hints import ExplainedError
from dspex_persist.cli.places import database_of, options_of, refuse_missing, server_of
from dspex_persist.errors import DspexError

if TYPE_CHECKING:
    from dspex_persist.state.abilities import StreamsTools
    from dspex_persist.state.audit import AuditSource, VariableState
    from dspex_persist.wiring.databases import ReadsSessions

_TIMEOUT_S: Final = 10.0
"""How long a server may take to answer, in seconds."""
_MOST_SESSIONS: Final = 1_000


@dataclass(frozen=True, slots=True)
class Place:
    """A server (`url`), or a database.

    Attributes:
        url: The URL of the server; None for a database.
        given: What `--db` names, if it was given.
    """

    url: str | None
    given: str | None

    @classmethod
    def of(cls, target: str | None, db: str | None) -> "Place":
        """Return the place that the options name; refuses both together."""
        return cls(server_of(target, db), db)

    @property
    def path(self) -> Path | DatabaseUrl:
        """The database."""
        return database_of(self.given)

    def is_missing(self) -> bool:
        """Whether it is the path of a file that does not exist."""
        return self.url is None and isinstance(path := self.path, Path) and not path.exists()

    @property
    def has_history(self) -> bool:
        """Whether a command may read the history instead of opening the state, which a file's owner would not allow."""
        if self.url is not None or not isinstance(place := self.path, DatabaseUrl):
            return self.url is None
        from dspex_persist.wiring.databases import database_at

        return database_at(place).has_audits

    def __str__(self) -> str:
        return self.url or str(self.path)

    @contextmanager
    def opened(self, *, tools: Sequence[str] = (), create: bool = False) -> "Iterator[StreamsTools]":
        """Open the state for reading and writing.

        Args:
            tools: For a database: the modules of its tools.
            create: Create the database if it is missing.
        """
        from dspex_persist.settings import load_settings
        from dspex_persist.state.errors import DatabaseInUseError
        from dspex_persist.wiring.connecting import connect
        from dspex_persist.wiring.limits import limits_of

        if self.url is not None:
            with connect(self.url, timeout_s=_TIMEOUT_S) as state:
                yield state
            return
        path, settings = self.path, load_settings()
        if not create:
            refuse_missing(path)
        options: dict[str, Any] = {"limits": limits_of(settings), "session_ttl_s": settings.session_ttl_s}
        try:
            state = connect(path, tools=list(tools) or None, **options, **options_of(path))
        except DatabaseInUseError as error:
            advice = f"reach it with --target {error.address or 'HOST:PORT'}, or stop it"
            raise ExplainedError(error.sentence, advice) from error
        with state:
            yield state

    @contextmanager
    def read(self) -> "Iterator[ReadsSessions]":
        """Open the state for commands that only read, where it has no history."""
        from dspex_persist.settings import load_settings
        from dspex_persist.state.options import SessionOptions
        from dspex_persist.wiring.databases import database_at
        from dspex_persist.wiring.limits import limits_of

        if self.url is None and isinstance(place := self.path, DatabaseUrl):
            with database_at(place).sessions(SessionOptions(limits=limits_of(load_settings()))) as reader:
                yield reader
        else:
            with self.opened() as state:
                yield state

    @contextmanager
    def history(self, *, reveal: bool = False) -> "Iterator[AuditSource]":
        """Open the history, which never changes a file, and works while a server has it open."""
        from dspex_persist.wiring.connecting import open_audit

        with open_audit(self.url or self.path, reveal=reveal) as source:
            yield source

    @contextmanager
    def explaining(self, session: str, advice: str = "") -> Iterator[None]:
        """Add the likely id, or `advice`, to the error for a session that is not live."""
        from dspex_persist.state.errors import SessionNotFoundError

        try:
            yield
        except SessionNotFoundError as error:
            hint = self._likely(session) or advice or "it never began, or has ended: sessions list shows the live ones"
            raise ExplainedError(error.sentence, hint) from error

    def _likely(self, session: str) -> str:
        from dspex_persist.spelling import closest, did_you_mean
        from dspex_persist.state.audit import SessionQuery

        try:
            with self.history() as source:
                live = [each.session_id for each in source.iterate(SessionQuery(live=True, limit=_MOST_SESSIONS))]
        except DspexError:
            return ""
        return did_you_mean(closest(session, live))


def state_of(source: "AuditSource", session: str, at: str = "now") -> "Sequence[VariableState]":
    """Return the variables of a live session; `SessionNotFoundError` without one."""
    from dspex_persist.state.audit import SessionQuery
    from dspex_persist.state.errors import InvalidArgumentError, NotInHistoryError, SessionNotFoundError

    try:
        return source.state(session, at)
    except (InvalidArgumentError, NotInHistoryError) as error:
        if any(True for _ in source.iterate(SessionQuery(session=session, live=True, limit=1))):
            raise
        raise SessionNotFoundError(session) from error
