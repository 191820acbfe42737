"""BridgedAudit: audit queries to a server over gRPC."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final, NoReturn, TypeVar, cast

import grpc

from dspex_persist.state.abilities import SessionHold, SessionImport
from dspex_persist.state.audit import (
    PAGE,
    AuditSource,
    Cursor,
    DenialQuery,
    ExecutionDetail,
    HistoryEntry,
    Page,
    PointLike,
    Query,
    T,
    VariableState,
    point_text,
)
from dspex_persist.state.bridge.client.line import FIRST_PAUSE_S, LEAST_S, LONGEST_PAUSE_S, Line
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as pb
from dspex_persist.state.bridge.generated.dspex_persist_audit_pb2_grpc import AuditServiceStub
from dspex_persist.state.bridge.headers import Headers
from dspex_persist.state.bridge.inherited import OneProcess
from dspex_persist.state.bridge.rpcs import audit as rpcs
from dspex_persist.state.bridge.rpcs import recordings
from dspex_persist.state.bridge.rpcs.audit import Single
from dspex_persist.state.bridge.status import error_of_call, error_of_write, is_from_server, is_lost
from dspex_persist.state.denials import Denial
from dspex_persist.state.errors import (
    CircuitOpenError,
    EngineClosedError,
    InvalidArgumentError,
    OutcomeUnknownError,
    RateLimitedError,
    SessionNotFoundError,
    ShuttingDownError,
    StateError,
    UnavailableError,
    UnsupportedError,
)
from dspex_persist.state.model import ImportedSession, PrunePolicy, PruneReport, RestoredSession, SessionView
from dspex_persist.state.provider import Progress
from dspex_persist.state.recording import ContentHash, Header, RecordedCommit, commit_line, header_line

A = TypeVar("A")

_BATCH_BYTES: Final = 256 * 1024
"""The target size of a message with lines; a single line may be larger."""
_MOST_WAITING: Final = 4
"""Messages that wait to be sent."""
_CLOSE_S: Final = 5.0
"""How long the end of a hold waits for the server."""


class BridgedAudit(AuditSource):
    """The history that a server keeps.

    Args:
        channel: The connection to the server.
        line: Whether that connection works.
        timeout_s: How long to wait for an answer, in seconds; then the call raises `UnavailableError`.
        reveal: Request the values of sensitive variables. A server without `audit_reveal` masks them all the same.
        on_close: Called by `close`.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        line: Line,
        *,
        timeout_s: float,
        reveal: bool = False,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.reveal = reveal
        self._calls = _Calls(channel, line)
        self._timeout_s = timeout_s
        self._on_close = on_close

    def close(self) -> None:
        """Close the connection, if it was opened for this object."""
        self._on_close()

    def head(self) -> int:
        """See `AuditSource.head`."""
        return self._ask(rpcs.GET_HEAD)

    def resolve(self, point: PointLike, option: str = "at", session: str = "") -> int:
        """See `AuditSource.resolve`."""
        return self._ask(rpcs.RESOLVE_POINT, point=point_text(point, option), option=option, session=session)

    def page(self, query: Query[T], after: Cursor | None = None, most: int = PAGE) -> Page[T]:
        """See `AuditSource.page`."""
        rpc = rpcs.LISTS.get(type(query))
        if rpc is None:
            raise UnsupportedError(f"queries of type {type(query).__name__}")
        request = _built(lambda: rpc.request(query, after, most, reveal=self.reveal))
        pages = self._calls.repeated(
            self._timeout_s,
            lambda left_s: [rpc.page_of(each) for each in self._calls.stream(rpc.name, request, left_s)],
        )
        rows = [row for page in pages for row in page.rows]
        return cast(Page[T], Page(rows, pages[-1].after))

    def execution(self, execution_id: str) -> ExecutionDetail:
        """See `AuditSource.execution`."""
        return self._ask(rpcs.GET_EXECUTION, execution_id=execution_id, reveal=self.reveal)

    def state(self, session: str, at: PointLike = "") -> tuple[VariableState, ...]:
        """See `AuditSource.state`."""
        return self._ask(rpcs.GET_STATE, session=session, at=point_text(at), reveal=self.reveal)

    def version(self, session: str, variable_id: str, version: int) -> HistoryEntry:
        """See `AuditSource.version`."""
        key = {"session": session, "variable_id": variable_id, "version": version}
        return self._ask(rpcs.GET_VERSION, **key, reveal=self.reveal)

    def denials(self, query: DenialQuery | None = None) -> tuple[Denial, ...]:
        """See `AuditSource.denials`."""
        return self._ask(rpcs.LIST_DENIALS, query=query or DenialQuery())

    def _ask(self, rpc: Single[A], **fields: Any) -> A:
        request = _built(lambda: rpc.request(**fields))
        ask = partial(self._calls.unary, rpc.name, request)
        return rpc.answer_of(self._calls.repeated(self._timeout_s, ask))


def prune(
    channel: grpc.Channel,
    line: Line,
    policy: PrunePolicy,
    *,
    confirm: bool,
    progress: Progress,
) -> PruneReport:
    """Have a server prune; see `Prunable.prune`. Without a time limit; an exception of `progress` ends the pruning."""
    request = _built(lambda: rpcs.prune_request(policy, confirm=confirm))
    for answer in _Calls(channel, line).stream(rpcs.PRUNE, request, None):
        if answer.HasField("report"):
            return rpcs.REPORT.record_of(answer.report)
        progress(answer.progress.what, answer.progress.done, answer.progress.in_all)
    raise UnavailableError(f"{line.target} ended the pruning without a report")


def record(
    channel: grpc.Channel,
    line: Line,
    session_id: str,
    *,
    started: int | None,
    reveal: bool,
    after: int,
    timeout_s: float,
) -> tuple[Header, Iterator[RecordedCommit]]:
    """Have a server record a session; see `Recordable.record`.

    Each message has to come within `timeout_s` seconds; the whole recording has no limit.
    """
    request = _built(lambda: pb.RecordSessionRequest(session=session_id, started=started, reveal=reveal, after=after))
    messages = _Calls(channel, line).stream(recordings.RECORD, request, None, patience_s=timeout_s)
    return recordings.recording_of(messages, f"the recording from {line.target}", after)


def content_hash(channel: grpc.Channel, line: Line, session_id: str, *, started: int | None, timeout_s: float) -> str:
    """Have a server compute the hash of a session's history; see `Recordable.content_hash`."""
    request = _built(lambda: pb.GetContentHashRequest(session=session_id, started=started))
    return str(_Calls(channel, line).unary(recordings.CONTENT_HASH, request, timeout_s).content_hash)


class BridgedImport(SessionImport):
    """An import that is sent to a server. The lines go out in messages, while the server checks the last ones.

    Args:
        channel: The connection to the server.
        line: Whether that connection works.
        header: The header of the recording.
        session_id: The id of the new session; None to keep the recorded one.
        headers: The headers of the call.
        timeout_s: How long the server may take to accept a message. It has no limit to import what was checked.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        line: Line,
        header: Header,
        session_id: str | None,
        *,
        headers: Headers,
        timeout_s: float,
    ) -> None:
        self._target = line.target
        self._timeout_s = timeout_s
        self._requests = _Requests()
        self._message = _built(lambda: pb.ImportSessionRequest(session_id=session_id, lines=[header_line(header)]))
        self._size = 0
        self._complete = False
        self._content = ContentHash()
        self._calls = _Calls(channel, line)
        self._call, self._here = self._calls.begin(recordings.IMPORT, self._requests, headers)
        self._call.add_done_callback(lambda _: self._requests.stop())

    @property
    def content_hash(self) -> str:
        """See `SessionImport`."""
        return self._content.hexdigest()

    def add(self, commit: RecordedCommit) -> None:
        """Send the next commit; raises the server's error if it has refused an earlier one."""
        self._content.add(commit)
        line = commit_line(commit)
        _built(lambda: self._message.lines.append(line))
        self._size += len(line)
        if self._size >= _BATCH_BYTES:
            self._send()

    def _send(self) -> None:
        self._here.check()
        message, self._message, self._size = self._message, pb.ImportSessionRequest(), 0
        if not self._requests.put(message, self._timeout_s):
            self._fail()

    def _fail(self) -> NoReturn:
        """Raise why the server takes no more messages."""
        if self._call.is_active():
            self.close()
            raise UnavailableError(f"{self._target} took nothing for {self._timeout_s:g} s")
        self._answer()
        raise UnavailableError(f"{self._target} ended the import too early")

    def finish(self) -> ImportedSession:
        """Have the server import the session. `OutcomeUnknownError` if the connection breaks."""
        self._message.complete = self._complete = True
        self._send()
        self._requests.end()
        answer = self._answer()
        if answer is None:
            raise OutcomeUnknownError(f"{self._target} ended the import without an answer")
        return recordings.IMPORTED.record_of(answer)

    def _answer(self) -> Any:
        try:
            return self._here.next_of(self._call)
        except grpc.RpcError:
            # Before the last message, the server imports nothing.
            lost = self._complete and is_lost(self._call)
            raise (error_of_write(self._call, self._target) if lost else self._calls.error(self._call)) from None

    def close(self) -> None:
        """End the call; the server drops what it has not been asked to import."""
        if self._here.refusal is None:
            self._call.cancel()
            self._requests.stop()
            self._here.close()


class BridgedHold(SessionHold):
    """A session that a server holds, for as long as a stream to it lasts.

    Args:
        channel: The connection to the server.
        line: Whether that connection works.
        session_id: The session.
        timeout_s: How long to wait for running tools, in seconds.
        headers: The headers of the call.
        answer_s: How long to wait for an answer that takes the server no time, in seconds.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        line: Line,
        session_id: str,
        timeout_s: float,
        *,
        headers: Headers,
        answer_s: float,
    ) -> None:
        self._line = line
        self._calls = _Calls(channel, line)
        self._answer_s = answer_s
        self._again = partial(BridgedHold, channel, line, session_id, timeout_s, headers=headers, answer_s=answer_s)
        self._requests = requests = _Requests()
        request = _built(lambda: pb.HoldSessionRequest(session=session_id, timeout_s=timeout_s))
        self._requests.put(request, answer_s)
        self._call, self._here = self._calls.begin("HoldSession", requests, headers)
        self._call.add_done_callback(lambda _: requests.stop())
        self._end = weakref.finalize(self, _cancel, self._call, self._requests, self._here)
        try:
            self._answer(timeout_s + answer_s)
        except BaseException:
            self._end()
            raise

    def _answer(self, patience_s: float) -> Any:
        """Wait for the next message."""
        answers = _Patient(self._call, patience_s)
        try:
            answer = self._here.next_of(answers)
        except grpc.RpcError:
            if answers.given_up:
                raise UnavailableError(f"{self._line.target} did not answer within {patience_s:g} s") from None
            raise self._calls.error(self._call) from None
        if answer is None:
            raise UnavailableError(f"{self._line.target} ended the hold")
        self._line.answered()
        return answer

    def move(self, moved_to: str) -> None:
        """See `SessionHold.move`."""
        request = _built(lambda: pb.HoldSessionRequest(moved_to=moved_to))
        if not self._requests.put(request, self._answer_s):
            # The stream has ended, which says why.
            self._answer(self._answer_s)
        try:
            self._answer(self._answer_s)
        except BaseException as error:
            if isinstance(error, StateError) and is_from_server(self._call):
                raise
            # The server may have the request, or get it yet.
            self._end()
            if not self._has_ended():
                raise
            if not isinstance(error, StateError):
                raise

    def _has_ended(self) -> bool:
        """Whether the session has ended on the server. While it can be held again, nobody else is about to end it."""
        pause_s, deadline = FIRST_PAUSE_S, self._line.now() + self._answer_s
        while True:
            try:
                self._again().close()
            except SessionNotFoundError:
                return True
            except StateError as error:
                if self._line.now() + pause_s >= deadline:
                    reason = f"{self._line.target} does not say whether the session has ended there"
                    raise OutcomeUnknownError(reason) from error
                self._line.rest(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                return False

    def close(self) -> None:
        """See `SessionHold.close`. When this returns, the server has ended it, unless the connection is broken."""
        if self._end.alive and self._here.refusal is None:
            self._requests.end()
            with suppress(grpc.RpcError):
                for _ in _Patient(self._call, _CLOSE_S):
                    pass
        self._end()


def _cancel(call: Any, requests: "_Requests", here: OneProcess) -> None:
    if here.refusal is None:
        call.cancel()
        requests.stop()
        here.close()


class _Requests:
    """The messages of a client stream: gRPC takes them on a thread of its own, a few at a time."""

    def __init__(self) -> None:
        self._waiting: deque[Any] = deque()
        self._changed = threading.Condition()
        self._ended = self._stopped = False

    def put(self, message: Any, timeout_s: float) -> bool:
        """Add a message once there is room; returns False if none came in time, or the stream was stopped."""
        with self._changed:
            has_room = self._changed.wait_for(lambda: self._stopped or len(self._waiting) < _MOST_WAITING, timeout_s)
            if not has_room or self._stopped:
                return False
            self._waiting.append(message)
            self._changed.notify_all()
            return True

    def end(self) -> None:
        """End the stream after the messages that wait."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Send nothing more."""
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended or self._stopped)
            if not self._waiting:
                raise StopIteration
            message = self._waiting.popleft()
            self._changed.notify_all()
            return message


def fork(
    channel: grpc.Channel,
    line: Line,
    session_id: str,
    new_session_id: str,
    at: str,
    *,
    headers: Headers,
    timeout_s: float,
) -> SessionView:
    """Have a server fork a session; see `Forkable.fork_session`. `OutcomeUnknownError` if the connection breaks."""
    request = _built(lambda: pb.ForkSessionRequest(session=session_id, new_session=new_session_id, at=at))
    calls = _Calls(channel, line)
    return recordings.fork_of(calls.unary(recordings.FORK, request, timeout_s, headers=headers, writes=True))


def restore(
    channel: grpc.Channel, line: Line, session_id: str, at: str, *, headers: Headers, timeout_s: float
) -> RestoredSession:
    """Have a server restore a session; see `Restorable`. `OutcomeUnknownError` if the connection breaks."""
    request = _built(lambda: pb.RestoreSessionRequest(session=session_id, at=at))
    answer = _Calls(channel, line).unary("RestoreSession", request, timeout_s, headers=headers, writes=True)
    return recordings.RESTORED.record_of(answer)


def begin(
    channel: grpc.Channel,
    line: Line,
    session_id: str,
    isolation: str,
    timeout_s: float | None,
    metadata: Mapping[str, str],
    recording: str | None,
    *,
    headers: Headers,
    patience_s: float,
) -> tuple[Any, str]:
    """Have a server begin a transaction; returns the call that lasts as long as it, and its id.

    Args:
        channel: The connection to the server.
        line: Whether that connection works.
        session_id: The session.
        isolation: See `Transacts.begin_transaction`.
        timeout_s: How long the transaction may last, in seconds.
        metadata: Texts to record with it.
        recording: The name of the recording, if it is one.
        headers: Who begins it.
        patience_s: How long to wait until it has begun, in seconds.
    """
    request = _built(
        lambda: pb.BeginTransactionRequest(
            session=session_id, isolation=isolation, timeout_s=timeout_s, metadata=metadata, recording=recording
        )
    )
    call, begun = _Calls(channel, line).open("BeginTransaction", request, headers, patience_s)
    return call, begun.execution_id


def _built(request: Callable[[], Any]) -> Any:
    try:
        return request()
    except (ValueError, TypeError) as error:
        # A message cannot carry it: a lone surrogate, or a number too large for its field.
        raise InvalidArgumentError("request", str(error)) from error


class _Calls:
    """Calls the rpcs of the service on a channel, and raises the server's errors.

    None is sent while the breaker of the line is open, and each tells the line whether the server answers.
    """

    def __init__(self, channel: grpc.Channel, line: Line) -> None:
        self._line = line
        self._target = line.target
        self._here = OneProcess(line.target, channel)
        self._stub = AuditServiceStub(channel)

    def repeated(self, timeout_s: float, read: Callable[[float], A]) -> A:
        """Return the answer of a read, which gets the seconds that are left. It is repeated as other reads are."""
        line, pause_s = self._line, FIRST_PAUSE_S
        deadline = line.now() + timeout_s
        while True:
            try:
                return read(max(LEAST_S, deadline - line.now()))
            except (UnavailableError, ShuttingDownError) as error:
                wait_s, pause_s = pause_s * line.jitter(), min(2 * pause_s, LONGEST_PAUSE_S)
                is_passing = not isinstance(error, CircuitOpenError) and line.has_answered and line.state == "closed"
                if not is_passing or line.now() + wait_s >= deadline:
                    raise
                line.rest(wait_s)
            except RateLimitedError as error:
                wait_s, pause_s = max(error.retry_in_s, pause_s), min(2 * pause_s, LONGEST_PAUSE_S)
                wait_s *= 2 - line.jitter()
                if line.now() + wait_s >= deadline:
                    raise
                line.rest(wait_s)

    def unary(self, rpc: str, request: Any, timeout_s: float, *, headers: Headers = (), writes: bool = False) -> Any:
        """Return the answer of a unary rpc. With `writes`, a broken connection raises `OutcomeUnknownError`."""
        self._here.check()
        self._line.admit()
        sent_at = self._line.now()
        try:
            answer = getattr(self._stub, rpc)(request, timeout=timeout_s, metadata=headers)
            self._line.answered()
            return answer
        except grpc.RpcError as error:
            self._line.ended(error, sent_at)
            raise (
                error_of_write(error, self._target) if writes and is_lost(error) else self.error(error, rpc)
            ) from None
        except ValueError as error:
            # The channel is closed.
            raise EngineClosedError() from error

    def _start(self, rpc: str, request: Any, **options: Any) -> Any:
        """Send the request, or begin to send the stream of requests, of a call whose answer is a stream."""
        self._here.check()
        self._line.admit()
        try:
            return getattr(self._stub, rpc)(request, **options)
        except ValueError as error:
            # The channel is closed.
            raise EngineClosedError() from error

    def open(self, rpc: str, request: Any, headers: Headers, patience_s: float) -> tuple[Any, Any]:
        """Begin a stream; returns its call and its first message, which has to come within `patience_s` seconds."""
        sent_at = self._line.now()
        call = self._start(rpc, request, metadata=headers)
        answers = _Patient(call, patience_s)
        try:
            first = next(answers)
            self._line.answered()
            return call, first
        except (grpc.RpcError, StopIteration):
            self._line.ended(call, sent_at, told=False)
            if answers.given_up:
                raise UnavailableError(f"{self._target} did not answer within {patience_s:g} s") from None
            raise self.error(call, rpc) from None

    def begin(self, rpc: str, requests: Iterator[Any], headers: Headers) -> tuple[Any, OneProcess]:
        """Begin a call with a stream of requests, and return it together with what guards it."""
        call = self._start(rpc, requests, metadata=headers)
        return call, OneProcess(self._target, call)

    def stream(
        self, rpc: str, request: Any, timeout_s: float | None, *, patience_s: float | None = None
    ) -> Iterator[Any]:
        """Yield the messages of a stream as they come. Closing the iterator ends the call.

        Args:
            rpc: The name of the rpc.
            request: The request.
            timeout_s: The time limit of the whole stream; None for none.
            patience_s: The time limit of each message; None for none.
        """
        sent_at = self._line.now()
        call = self._start(rpc, request, timeout=timeout_s)
        here, answers = OneProcess(self._target, call), _Patient(call, patience_s)
        try:
            while (answer := here.next_of(answers)) is not None:
                self._line.answered()
                yield answer
        except grpc.RpcError:
            self._line.ended(call, sent_at, told=timeout_s is not None)
            if answers.given_up:
                raise UnavailableError(f"{self._target} did not answer within {patience_s:g} s") from None
            raise self.error(call, rpc) from None
        finally:
            if here.refusal is None:
                call.cancel()
                here.close()

    def error(self, call: Any, rpc: str = "this") -> StateError:
        """Return the error of a failed call of an rpc."""
        code = call.code()
        if is_from_server(call):
            return error_of_call(call)
        if code is grpc.StatusCode.UNIMPLEMENTED:
            service = rpcs.AUDIT_SERVICE.full_name
            return UnsupportedError(
                rpc, f"the server at {self._target} is older than this release, or than {service}: upgrade it"
            )
        if code is grpc.StatusCode.CANCELLED:
            return EngineClosedError()
        return error_of_call(call, self._target)


class _Patient:
    """Iterates over the messages of a call, and cancels it if one takes longer than `patience_s` (None: no limit)."""

    def __init__(self, call: Any, patience_s: float | None) -> None:
        self._call = call
        self._patience_s = patience_s
        self.given_up = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._patience_s is None:
            return next(self._call)
        timer = threading.Timer(self._patience_s, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            return next(self._call)
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        self.given_up = True
        self._call.cancel()
