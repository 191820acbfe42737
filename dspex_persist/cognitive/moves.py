"""Moves: a session goes from one backend to another with its whole history, while others use it.

What is there is copied first, while everybody goes on. For what others write meanwhile, and until the new backend is
in use, the context's own calls wait at its gate, and all other writers of the session at the hold of its backend. The
old backend is only let go after the new one has been verified: it has the same history, which a content hash proves.
If a step fails before, the session goes on where it was, and the new place is as it was before.
"""

import asyncio
import os
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import inf
from typing import Any, Final

from dspex_persist import clock
from dspex_persist.addresses import canonical, database_url
from dspex_persist.cognitive.backends import BRIDGED, EMBEDDED, LOCAL, Backend, Move, Switch, is_server, opened
from dspex_persist.cognitive.deriving import Derived
from dspex_persist.infra.garbage import uncollected
from dspex_persist.infra.listen import target_of
from dspex_persist.infra.logs import get_logger
from dspex_persist.spelling import quote
from dspex_persist.state.abilities import Holdable, Importable, Recordable, SessionHold, SessionImport
from dspex_persist.state.errors import (
    InternalError,
    InvalidArgumentError,
    OutcomeUnknownError,
    StateError,
    UnavailableError,
    UnsupportedError,
)
from dspex_persist.state.model import ChangeKind, ImportedSession
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.recording import Header, RecordedCommit
from dspex_persist.state.tools.session import current_session

TIMEOUT_S: Final = 30.0
"""How long a move waits for the tools that run in the session, in seconds."""

_IN_MEMORY: Final = ("memory:", ":memory:", LOCAL)
_OF_FILES: Final = (
    "limits",
    "optimization_lease_s",
    "outcome_retention_s",
    "session_ttl_s",
    "sweep_interval_s",
    "tool_threads",
    "tools",
)
"""Options that sessions in memory and in files have in common."""

_logger: Final = get_logger(__name__)


def ensure(
    backend: Backend, session_id: str, kind: str, place: str | os.PathLike[str], options: Mapping[str, Any]
) -> None:
    """Move a session to the backend at an address, unless the one that it is on is as good.

    Args:
        backend: The backend of the context.
        session_id: The session.
        kind: Of which kind the backend at the address is: "embedded" or "bridged".
        place: The address, as for `connect`.
        options: The options to open it.

    Raises:
        SessionExistsError: A live session there has its id.
        RecordingError: It exceeds a limit of the new backend.
        SessionHeldError: Another context is moving it.
        UnavailableError: A tool is still running, or the server cannot be reached.
        UnsupportedError: The session cannot leave its backend, such as a server, or a tool is to move it.
        OpenError: The file cannot be opened.
    """
    address = _address_of(kind, place)
    _refuse_own(backend)
    with backend.moving:
        if not _is_there(backend, kind, address):
            _leave(backend, session_id, kind, address, options)


def move(backend: Backend, session_id: str, place: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
    """Move a session to the backend at an address, unless it is there.

    Args:
        backend: The backend of the context.
        session_id: The session.
        place: The address, as for `connect`: a file or a server.
        options: The options to open it.

    Raises:
        StateError: As `ensure`.
    """
    kind = BRIDGED if is_server(place) else EMBEDDED
    address = _address_of(kind, place)
    _refuse_own(backend)
    with backend.moving:
        if not _is_at(backend, kind, address):
            _leave(backend, session_id, kind, address, options)


def fulfils(backend: Backend, needed: str) -> bool:
    """Return whether the session is where a tool needs it: "durable" or "remote"."""
    return backend.kind in kinds_for(needed)


def kinds_for(needed: str) -> tuple[str, ...]:
    """Return the kinds of backends that a tool may have its session on, the nearest first."""
    return (EMBEDDED, BRIDGED) if needed == "durable" else (BRIDGED,)


def nowhere(needed: str, name: str) -> UnsupportedError:
    """Return the error for a tool whose session has nowhere to go."""
    places = "durable_at=path or remote_at=url" if needed == "durable" else "remote_at=url"
    verbs = "ctx.ensure_persistent(path)" if needed == "durable" else "ctx.ensure_bridged(url)"
    what = f"tool {quote(name)}, which requires a {needed} session, where this one is"
    return UnsupportedError(what, f"say where it may go, Context({places}), or move it: {verbs}")


def _address_of(kind: str, place: str | os.PathLike[str]) -> str:
    """Return the address as a text, if it is one of a backend of that kind."""
    if not isinstance(place, str | os.PathLike):
        raise InvalidArgumentError(
            "url" if kind == BRIDGED else "path", f"it must be a str or a path, not {type(place).__name__}"
        )
    address = os.fspath(place)
    if kind == BRIDGED and not is_server(address):
        raise InvalidArgumentError(
            "url", f"{quote(address)} is not the URL of a server, such as grpc://127.0.0.1:50051"
        )
    if kind == EMBEDDED and (is_server(address) or address in _IN_MEMORY):
        raise InvalidArgumentError("path", f"{quote(address)} is not a file: use ensure_bridged for a server")
    return address


def _is_there(backend: Backend, kind: str, address: str) -> bool:
    if kind == EMBEDDED:
        return backend.kind != LOCAL
    if backend.kind == BRIDGED and backend.url and not _is_at(backend, kind, address):
        raise UnsupportedError(
            f"ensure_bridged from {backend.url} to another server", f"say that it has to move: ctx.move_to({address!r})"
        )
    return backend.kind == BRIDGED


def _is_at(backend: Backend, kind: str, address: str) -> bool:
    if backend.kind != kind:
        return False
    if kind == BRIDGED:
        return target_of(backend.url) == target_of(address)
    if database_url(address) is not None:
        return canonical(backend.url) == canonical(address)
    return os.path.realpath(backend.url) == os.path.realpath(address)


def _leave(backend: Backend, session_id: str, kind: str, address: str, options: Mapping[str, Any]) -> None:
    if kind == BRIDGED:
        _refuse_derived(backend, session_id, "a server")
    elif database_url(address) is not None:
        _refuse_derived(backend, session_id, "a database that servers share,")
    _move(backend, session_id, address, {**_carried(backend, kind), **options})


def _carried(backend: Backend, kind: str) -> dict[str, Any]:
    """Return the options of the context that hold at the new place, too."""
    if backend.kind == kind:
        return dict(backend.options)
    names = _OF_FILES if kind == EMBEDDED else ("tools",)
    return {name: backend.options[name] for name in names if name in backend.options}


def _move(backend: Backend, session_id: str, url: str, options: Mapping[str, Any]) -> None:
    source = backend.provider
    # Before anybody has to wait.
    Recordable.of(source)
    Holdable.of(source)
    was_owned = backend.is_owned
    target = opened(url, options)
    _Move(backend, session_id, target, url).carry_out()
    if was_owned:
        try:
            source.close()
        except StateError as error:
            # The session is complete where it is now.
            _logger.warning("old backend not closed", session_id=session_id, reason=str(error))


def _refuse_own(backend: Backend) -> None:
    """Refuse a move that would wait for whoever makes it."""
    if current_session.get() is not None:
        raise UnsupportedError("a move by a tool", "move the session before you call the tool")
    if backend.gate.is_inside:
        raise UnsupportedError(
            "a move of a session by the code of its own transaction", "move it before the transaction, or after its end"
        )
    with suppress(RuntimeError):
        if backend.is_awaited_on(asyncio.get_running_loop()):
            raise UnsupportedError(
                "a move that blocks an event loop whose calls it waits for",
                "await it: ctx.ensure_persistent.aio(...) or ctx.ensure_bridged.aio(...)",
            )


def _refuse_derived(backend: Backend, session_id: str, target: str) -> None:
    """Refuse to leave the process whose functions compute variables: elsewhere these would keep old values."""
    targets = [follower.target for follower in backend.followers if isinstance(follower, Derived)]
    found = backend.provider.get_variables(session_id, sorted(targets)).variables if targets else {}
    if found:
        raise UnsupportedError(
            f"a move to {target} with derived variables ({', '.join(found)})",
            "delete them first, and compute them in a watch there: ctx.watch(..., on_change=)",
        )


class _Move:
    """One move, step by step."""

    def __init__(self, backend: Backend, session_id: str, target: StateProvider, url: str) -> None:
        self._backend = backend
        self._session_id = session_id
        self._source = backend.provider
        self._target = target
        self._url = url
        self._moved = _Moved()
        self._header: Header | None = None
        self._import: SessionImport | None = None
        self._imported: ImportedSession | None = None
        self._is_unknown = False

    def carry_out(self) -> None:
        """Move the session, or leave everything as it was."""
        try:
            # Nobody has to wait for what is there already, nor for what comes while that is copied. If that is much,
            # others write faster than this copies, and only the pause ends it.
            self._begin_copy().check()
            self._add_rest(most=len(self._moved.sequences) // 2)
            self._begun.check()
            with self._at_the_gate():
                began = time.perf_counter()
                with Holdable.of(self._source).hold_session(self._session_id, timeout_s=TIMEOUT_S) as held:
                    self._go(held, began)
        except BaseException:
            self._end_copy()
            if self._backend.provider is not self._target:
                self._target.discard()
            raise
        self._end_copy()

    @contextmanager
    def _at_the_gate(self) -> Iterator[None]:
        try:
            with self._backend.gate.hold(TIMEOUT_S):
                for each in tuple(self._backend.parked):
                    each.park()
                yield
        except TimeoutError as error:
            reason = f"session {quote(self._session_id)} cannot move: {error} after {TIMEOUT_S:g} s"
            raise UnavailableError(reason) from error

    def _go(self, held: SessionHold, began: float) -> None:
        """Move, now that everybody waits."""
        with uncollected:
            self._go_on(held, began)

    def _go_on(self, held: SessionHold, began: float) -> None:
        leaving = False
        try:
            imported = self._copy()
            self._verify(imported)
            leaving = True
            held.move(self._url)
        except BaseException as error:
            if not leaving or (not isinstance(error, OutcomeUnknownError) and self._still_lives()):
                self._undo()
                raise
            # It has ended here, whatever came then: it is complete there, and must not be lost.
            self._switch(began)
            raise
        self._switch(began)

    def _begin_copy(self) -> SessionImport:
        header, commits = self._record()
        self._moved, self._header = _Moved(), header
        self._import = begun = Importable.of(self._target).begin_import(header)
        if not is_server(self._url):
            # This move has opened the file, and nobody else uses it yet.
            begun.write_ahead()
        for commit in self._moved.counting(commits):
            begun.add(commit)
        return begun

    def _record(self, started: int | None = None, after: int = 0) -> tuple[Header, Iterator[RecordedCommit]]:
        source = Recordable.of(self._source)
        header, commits = source.record(self._session_id, started=started, reveal=True, after=after)
        if header.masked:
            raise UnsupportedError(
                f"a move of sensitive variables from {self._backend.url}, which does not reveal their values",
                "start the server with --audit-reveal, or stop it and use its file",
            )
        return header, commits

    @property
    def _begun(self) -> SessionImport:
        assert self._import is not None, "it has begun"
        return self._import

    def _end_copy(self) -> None:
        if self._import is not None:
            self._import.close()

    def _copy(self) -> ImportedSession:
        """Copy what others have written since `_begin_copy`, and finish."""
        self._add_rest()
        try:
            self._imported = imported = self._begun.finish()
        except BaseException as error:
            # Interrupted, it goes on.
            self._is_unknown = isinstance(error, OutcomeUnknownError) or not isinstance(error, Exception)
            raise
        self._moved.content_hash = self._begun.content_hash
        return imported

    def _add_rest(self, most: float = inf) -> None:
        """Copy what others have written since, unless that is more than `most` commits."""
        moved, begun = self._moved, self._begun
        try:
            header, commits = self._record(moved.sequences[0], len(moved.sequences))
        except InvalidArgumentError:
            # Another session has this id now.
            header, commits = None, iter(())
        if header == self._header or (header is not None and header.commits - len(moved.sequences) > most):
            return
        if header is not None and begun.extend(header):
            self._header = header
            for commit in moved.counting(commits):
                begun.add(commit)
        else:
            begun.close()
            self._begin_copy()

    def _verify(self, imported: ImportedSession) -> None:
        """Check that the new backend has what the old one has."""
        sent = (self._moved.content_hash, self._moved.answers)
        there = Recordable.of(self._target).content_hash(self._session_id)
        if not (sent == (imported.content_hash, imported.answers) and there == sent[0]):
            raise InternalError(f"session {quote(self._session_id)} did not move: {self._url} has not what was sent")

    def _still_lives(self) -> bool:
        """Whether the session has not ended on the old backend."""
        try:
            return self._source.heartbeat(self._session_id)
        except StateError:
            return False

    def _switch(self, began: float) -> None:
        backend, imported = self._backend, self._imported
        assert imported is not None, "it was copied"
        before, move = backend.place, Move(self._source, self._moved.sequences, imported.first_sequence)
        backend.use(self._target, url=self._url, move=move)
        counts = (len(self._moved.variables), self._moved.versions)
        switch = Switch(clock.now(), before, backend.place, time.perf_counter() - began, *counts)
        backend.switches = (*backend.switches, switch)
        _logger.info("session moved", session_id=self._session_id, source=before, target=backend.place)

    def _undo(self) -> None:
        """End the session on the new backend, if it has begun there."""
        self._end_copy()
        with suppress(StateError):
            if self._imported is not None or (self._is_unknown and self._has_arrived()):
                self._target.cleanup_session(self._session_id)

    def _has_arrived(self) -> bool:
        here, there = Recordable.of(self._source), Recordable.of(self._target)
        return here.content_hash(self._session_id) == there.content_hash(self._session_id)


@dataclass(slots=True)
class _Moved:
    """What is moved."""

    sequences: "array[int]" = field(default_factory=lambda: array("q"))
    variables: set[str] = field(default_factory=set)
    versions: int = 0
    answers: int = 0
    content_hash: str = ""

    def counting(self, commits: Iterable[RecordedCommit]) -> Iterator[RecordedCommit]:
        """Count the commits while they are iterated over."""
        for commit in commits:
            self.sequences.append(commit.sequence)
            self.answers += commit.answer is not None
            for version in commit.versions:
                self.versions += 1
                if version.kind is ChangeKind.REGISTERED:
                    self.variables.add(version.variable_id)
                elif version.kind is ChangeKind.DELETED:
                    self.variables.discard(version.variable_id)
            yield commit
