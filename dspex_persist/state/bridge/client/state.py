"""BridgedState: session state in another process, reached over the bridge protocol."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar, Unpack
from weakref import WeakSet

import grpc

from dspex_persist.infra import tracing
from dspex_persist.infra.futures import failed, settled
from dspex_persist.infra.threads import on_new_thread
from dspex_persist.infra.user import user_name
from dspex_persist.state import arguments, commands, values
from dspex_persist.state.abilities import (
    Auditable,
    Durable,
    Forkable,
    Holdable,
    Importable,
    Prunable,
    Recordable,
    Restorable,
    StreamsTools,
    Transaction,
    Transacts,
    unkeyed,
)
from dspex_persist.state.bridge.client import audits as audit_client
from dspex_persist.state.bridge.client.attempt import Attempt
from dspex_persist.state.bridge.client.audits import BridgedAudit, BridgedHold, BridgedImport
from dspex_persist.state.bridge.client.cache import MAX_AGE_S, MAX_BYTES, ValueCache
from dspex_persist.state.bridge.client.line import Breaker, Line
from dspex_persist.state.bridge.client.transactions import BridgedTransaction
from dspex_persist.state.bridge.client.watch import BridgedWatch, Resumption
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as audit_pb
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.bridge.generated.dspex_persist_audit_pb2_grpc import AuditServiceStub
from dspex_persist.state.bridge.generated.snakepit_bridge_pb2_grpc import BridgeServiceStub
from dspex_persist.state.bridge.headers import (
    ACTOR,
    AFTER_SEQUENCE,
    ARGUMENTS,
    ASKED_BY,
    BINARY,
    CONTINUES,
    EXECUTION_ID,
    IDEMPOTENCY_KEY,
    OPTIMIZER_ID,
    REASON,
    SOURCE,
    Headers,
)
from dspex_persist.state.bridge.inherited import OneProcess, refuse_lost
from dspex_persist.state.bridge.rpcs import BY_COMMAND
from dspex_persist.state.bridge.rpcs.base import Rpc
from dspex_persist.state.bridge.rpcs.tools import EXECUTE_TOOL, GetExposedElixirTools
from dspex_persist.state.bridge.secure import PathLike, Peer
from dspex_persist.state.bridge.status import error_of_call
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import (
    EngineClosedError,
    InvalidArgumentError,
    LimitExceededError,
    StateError,
    UnavailableError,
    UnsupportedError,
)
from dspex_persist.state.model import (
    RECORDING,
    Isolation,
    Origin,
    PrunePolicy,
    PruneReport,
    RestoredSession,
    SessionView,
    Source,
    ToolSpec,
    Value,
)
from dspex_persist.state.options import check_count
from dspex_persist.state.provider import TOOL_TIMEOUT_S, Progress, Who, check_watch, fault_of, or_empty, silent
from dspex_persist.state.recording import Header, RecordedCommit
from dspex_persist.state.tools.session import current_execution_id

if TYPE_CHECKING:
    from dspex_persist.infra.workers.statistics import PoolStatistics

R = TypeVar("R")

_HEADER_LENGTH: Final = 255
_VERDICT_S: Final = 1.0
_BREAKER: Final = Breaker()
# A channel that has lost its server retries often at first, to notice a restart at once. Despite its name, the second
# option also sets how long an attempt may take: on a loaded machine a tenth of a second is too short.
_RECONNECTING: Final = [
    # Otherwise the clients of one process share connections, and a new one waits out the pause of an old one's retries.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2000),
]


def _nothing() -> None:
    pass


class BridgedState(
    StreamsTools, Durable, Auditable, Recordable, Importable, Holdable, Forkable, Restorable, Prunable, Transacts
):
    """Session state on a server.

    The connection is opened by the first call, and again by itself whenever it breaks. Calls that a broken connection
    carried are repeated within their timeout where that is safe: reads, and writes with an idempotency key, which still
    happen only once. A write without a key raises `OutcomeUnknownError`. After several failures in a row, calls fail at
    once for a while (`CircuitOpenError`), see `breaker`.

    Args:
        target: A gRPC target such as "127.0.0.1:50051" or "unix:/run/dspex.sock", or a URL of `connect`.
        timeout_s: How long to wait for an answer, in seconds, repetitions included.
        actor: Who makes the changes; by default the user of this process.
        watch_patience_s: How long an interrupted watch tries to resume before it ends with an error, in seconds; with 0
            it ends at once.
        execution_id: A running execution. All calls on variables and tools become part of its transaction: a process
            that runs a registered tool passes the id that it received in `x-dspex-execution-id`.
        breaker: When calls fail at once because the server does not answer; None for never.
        cache: Whether to keep values that were read, to answer reads of a single variable without the server: True, or
            the most bytes to keep. See `ValueCache` for what such a read may show.
        cache_age_s: How old a cached value may be, in seconds.
        ca: For grpcs://HOST:PORT: a file with the certificates (PEM) of the authorities that may have issued the
            server's. By default the one that DSPEX_PERSIST_CA names, or else the public authorities that gRPC knows.
        cert: For a server that demands certificates: a file with this client's (PEM); by default DSPEX_PERSIST_CERT.
        key: A file with the private key of `cert` (PEM); by default DSPEX_PERSIST_KEY.
        token: For a server that demands tokens; by default DSPEX_PERSIST_TOKEN. The history then names its owner as the
            actor, and `actor` as the one for whom it acts.

    Attributes:
        cache: The cache, with its hits and misses; None without one.

    Raises:
        InvalidArgumentError: An argument is wrong.
        ForkedProcessError: This process was forked from one that used gRPC.
    """

    cache: ValueCache | None

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = 30.0,
        watch_patience_s: float = 60.0,
        actor: str | None = None,
        execution_id: str | None = None,
        breaker: Breaker | None = _BREAKER,
        cache: bool | int = False,
        cache_age_s: float = MAX_AGE_S,
        ca: PathLike | None = None,
        cert: PathLike | None = None,
        key: PathLike | None = None,
        token: str | None = None,
    ) -> None:
        peer = Peer.of(arguments.text("target", target), ca=ca, cert=cert, key=key, token=token)
        self._set_up(peer, timeout_s, watch_patience_s, actor, execution_id, breaker)
        channel = peer.channel(_RECONNECTING)
        self._use(channel, BridgeServiceStub(channel), AuditServiceStub(channel))
        self.cache = self._cache_of(cache, arguments.timeout("cache_age_s", cache_age_s))

    def _set_up(
        self,
        peer: Peer,
        timeout_s: float,
        watch_patience_s: float,
        actor: str | None,
        execution_id: str | None,
        breaker: Breaker | None,
    ) -> None:
        self._peer = peer
        target = self._target = peer.shown
        self._timeout_s = arguments.timeout("timeout_s", timeout_s)
        patience_s = arguments.seconds("watch_patience_s", watch_patience_s)
        self._watch_patience_s = arguments.timeout("watch_patience_s", patience_s) if patience_s != 0 else 0.0
        self._watches: WeakSet[BridgedWatch] = WeakSet()
        self._execution_id = execution_id
        # The owner of a token is known to the server.
        usual = "" if peer.token is not None else f"user:{user_name()}"
        self._actor = arguments.text("actor", actor) if actor else usual
        refuse_lost(target)
        self._line = Line(target, breaker)
        self.cache = None
        self._closed = False

    def _use(self, channel: Any, stub: Any, beside: Any) -> None:
        """Send what follows over a channel; with the stubs of both services."""
        self._channel, self._stub, self._beside = channel, stub, beside
        self._here = OneProcess(self._target, channel)

    gives: ClassVar[tuple[str, ...]] = ("remote",)

    @property
    def url(self) -> str:
        """See `StateProvider.url`."""
        return self._peer.url

    def submit(self, command: Command[R], origin: Origin | None = None, *, timeout_s: float | None = None) -> Future[R]:
        """See `StateProvider.submit`. Sends the command; the future resolves with the answer.

        Args:
            command: The command.
            origin: Who makes the request; by default the client's actor.
            timeout_s: How long to wait for the answer; by default as long as the client does.
        """
        if timeout_s is not None:
            timeout_s = arguments.timeout("timeout_s", timeout_s)
        return self._submit_within(command, origin, self._execution_id, timeout_s)

    def _submit_within(
        self, command: Command[R], origin: Origin | None, execution_id: str | None, timeout_s: float | None = None
    ) -> Future[R]:
        fault = self._here.refusal or (EngineClosedError() if self._closed else fault_of(command, origin))
        if fault is not None:
            return failed(fault)
        # Reads of an execution see its own writes, which nobody else does before it has committed.
        cache = self.cache if execution_id is None else None
        if cache is not None and (found := cache.find(command)) is not None:
            return settled(found)
        try:
            return self._attempt(command, origin, execution_id, timeout_s).start()
        except UnsupportedError as error:
            return failed(error)

    def run(self, command: Command[R], idempotency_key: str | None = None, **who: Unpack[Who]) -> R:
        """See `StateProvider.run`."""
        self.check_open()
        cache = self.cache if self._execution_id is None else None
        found: R | None = cache.find(command) if cache is not None else None
        if found is not None:
            return found
        origin = self.origin(command.cause, idempotency_key, **who)
        fault = fault_of(command, origin)
        if fault is not None:
            raise fault
        result: R = self._attempt(command, origin, self._execution_id).run()
        return result

    def _attempt(
        self, command: Command[Any], origin: Origin | None, execution_id: str | None, timeout_s: float | None = None
    ) -> Attempt:
        """Return the attempt to carry out a command, or raise `UnsupportedError`."""
        rpc = self._rpc_of(command)
        if rpc is None:
            raise UnsupportedError(f"{command.cause} over the bridge")
        origin = origin or self.default_origin(command.cause)
        cache = self.cache if execution_id is None else None
        return Attempt(
            getattr(self._beside if rpc.beside else self._stub, rpc.name),
            rpc,
            command,
            partial(self._headers_of, rpc, origin, execution_id),
            self._patience_s(command) if timeout_s is None else timeout_s,
            self._timeout_s,
            self._line,
            has_key=origin.idempotency_key is not None,
            before=cache.sending(command) if cache is not None else None,
        )

    def _rpc_of(self, command: Command[Any]) -> Rpc[Any, Any] | None:
        return BY_COMMAND.get(type(command))

    def _cache_of(self, cache: bool | int, max_age_s: float) -> ValueCache | None:
        if cache is False:
            return None
        max_bytes = MAX_BYTES if cache is True else cache
        check_count("cache", max_bytes)
        return ValueCache(self._follow, max_bytes=max_bytes, max_age_s=max_age_s)

    def _follow(self, session_id: str) -> Any:
        """Watch a session without its initial values, for the cache."""
        if self._line.state != "closed":
            raise UnavailableError(f"{self._target} does not answer")
        return self._stub.WatchVariables(pb.WatchVariablesRequest(session_id=session_id))

    def _forget(self, session_id: str) -> None:
        if self.cache is not None:
            self.cache.forget_session(session_id)

    def watch(
        self, session_id: str, identifiers: Sequence[str] = (), *, after_sequence: int | None = None
    ) -> "BridgedWatch":
        """See `StateProvider.watch`."""
        self.check_open()
        identifiers = check_watch(session_id, identifiers, after_sequence)
        try:
            request = pb.WatchVariablesRequest(
                session_id=session_id, variable_identifiers=identifiers, include_initial_values=after_sequence is None
            )
        except ValueError as error:
            raise InvalidArgumentError("request", str(error)) from error
        first = () if after_sequence is None else ((AFTER_SEQUENCE, str(after_sequence)),)
        again = pb.WatchVariablesRequest(session_id=session_id, variable_identifiers=identifiers)

        def open_stream(resumption: Resumption | None) -> Any:
            if resumption is None:
                return self._stub.WatchVariables(request, metadata=(*first, *tracing.headers()))
            headers = zip((AFTER_SEQUENCE, CONTINUES), map(str, resumption), strict=True)
            return self._stub.WatchVariables(again, metadata=tuple(headers))

        self._line.admit()
        watch = BridgedWatch(
            open_stream,
            self._error_of,
            self._line,
            session_id=session_id,
            timeout_s=self._timeout_s,
            patience_s=self._watch_patience_s,
            **({"on_update": partial(self.cache.told, session_id)} if self.cache is not None else {}),
        )
        self._watches.add(watch)
        if self._closed:
            watch.end()
        return watch

    def list_tools(self, session_id: str = "") -> tuple[ToolSpec, ...]:
        """List the tools of the server and, for a session, those that its workers have registered."""
        return self.run(GetExposedElixirTools(session_id))

    def stream_tool(
        self,
        session_id: str,
        tool: str,
        parameters: Mapping[str, object] | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
        **who: Unpack[Who],
    ) -> Iterator[object]:
        """See `StreamsTools`."""
        self.check_open()
        encoded = values.encode_arguments(or_empty(parameters))
        command = commands.ExecuteTool(session_id, tool, encoded, or_empty(metadata))
        command.check()
        origin = self.origin("ExecuteStreamingTool", **who)
        headers = self._headers_of(EXECUTE_TOOL, origin, self._execution_id, command)
        self._line.admit()
        call = self._stub.ExecuteStreamingTool(EXECUTE_TOOL.request_of(command), metadata=headers)
        here = OneProcess(self._target, call)
        try:
            while (chunk := here.next_of(call)) is not None:
                if not (chunk.is_final and chunk.data == b"null"):
                    yield values.decode_loosely(Value(chunk.data.decode()), chunk.metadata["result_type"])
        except grpc.RpcError:
            raise self._error_of(call) from None
        finally:
            if here.refusal is None:
                call.cancel()
                here.close()
                self._forget(session_id)

    def list_workers(self) -> "tuple[PoolStatistics, ...]":
        """Return the pools of the server with their workers, as they are now."""
        # A program that does not ask for them need not know of pools.
        from dspex_persist.state.bridge.rpcs.workers import pools_in

        self.check_open()
        self._line.admit()
        try:
            return pools_in(self._beside.ListWorkers(audit_pb.ListWorkersRequest(), timeout=self._timeout_s))
        except grpc.RpcError as error:
            raise error_of_call(error, self._target) from None

    def audit(self, *, reveal: bool = False, on_close: Callable[[], None] = _nothing) -> BridgedAudit:
        """Return an object for audit queries to the server.

        Args:
            reveal: Request the values of sensitive variables, which the server shows only if it was started with
                `audit_reveal`.
            on_close: Called when the object is closed.
        """
        self.check_open()
        reveal = arguments.flag("reveal", reveal)
        return BridgedAudit(self._channel, self._line, timeout_s=self._timeout_s, reveal=reveal, on_close=on_close)

    def prune(self, policy: PrunePolicy, *, confirm: bool, progress: Progress = silent) -> PruneReport:
        """Have the server prune; see `Prunable.prune`. There is no time limit."""
        self.check_open()
        return audit_client.prune(self._channel, self._line, policy, confirm=confirm, progress=progress)

    def record(
        self, session_id: str, *, started: int | None = None, reveal: bool = False, after: int = 0
    ) -> tuple[Header, Iterator[RecordedCommit]]:
        """Have the server record; see `Recordable.record`. Each message has to come within `timeout_s`."""
        self.check_open()
        session_id, reveal = arguments.text("session_id", session_id), arguments.flag("reveal", reveal)
        started = arguments.started(started)
        return audit_client.record(
            self._channel,
            self._line,
            session_id,
            started=started,
            reveal=reveal,
            after=arguments.sequence("after", after),
            timeout_s=self._timeout_s,
        )

    def content_hash(self, session_id: str, *, started: int | None = None) -> str:
        """Have the server compute it; see `Recordable.content_hash`. Sensitive variables count as they are."""
        self.check_open()
        session_id = arguments.text("session_id", session_id)
        started = arguments.started(started)
        facts = (self._channel, self._line, session_id)
        return audit_client.content_hash(*facts, started=started, timeout_s=self._timeout_s)

    def begin_import(self, header: Header, session_id: str | None = None) -> BridgedImport:
        """See `Importable.begin_import`. The server has to take each message within `timeout_s`."""
        self.check_open()
        if session_id is not None:
            session_id = arguments.text("session_id", session_id)
        headers = self._headers_of_origin(self.default_origin(commands.ImportSession.__name__))
        facts = (self._channel, self._line, header, session_id)
        return BridgedImport(*facts, headers=headers, timeout_s=self._timeout_s)

    def hold_session(self, session_id: str, *, timeout_s: float = 30.0, origin: Origin | None = None) -> BridgedHold:
        """Have the server hold it; see `Holdable.hold_session`. Calls of others wait no longer than their timeouts."""
        self.check_open()
        session_id, timeout_s = arguments.text("session_id", session_id), arguments.timeout("timeout_s", timeout_s)
        return BridgedHold(
            self._channel,
            self._line,
            session_id,
            timeout_s,
            headers=self._headers_of_origin(origin or self.default_origin(commands.EndMovedSession.__name__)),
            answer_s=self._timeout_s,
        )

    def fork_session(
        self, session_id: str, new_session_id: str, at: str = "", *, origin: Origin | None = None
    ) -> SessionView:
        """Have the server fork; see `Forkable.fork_session`. Raises `OutcomeUnknownError` if the connection breaks."""
        self.check_open()
        sessions = (arguments.text("session_id", session_id), arguments.text("new_session_id", new_session_id))
        headers = self._headers_of_origin(origin or self.default_origin(commands.ForkSession.__name__))
        return audit_client.fork(
            self._channel,
            self._line,
            *sessions,
            arguments.text("at", at),
            headers=headers,
            timeout_s=self._timeout_s,
        )

    def restore_session(self, session_id: str, at: str, *, origin: Origin | None = None) -> RestoredSession:
        """Have the server restore; see `Restorable.restore_session`. `OutcomeUnknownError` if the connection breaks."""
        self.check_open()
        session_id, at = arguments.text("session_id", session_id), arguments.text("at", at)
        headers = self._headers_of_origin(unkeyed(origin) or self.default_origin(commands.RestoreSession.__name__))
        try:
            return audit_client.restore(
                self._channel, self._line, session_id, at, headers=headers, timeout_s=self._timeout_s
            )
        finally:
            self._forget(session_id)

    def submit_transaction(
        self,
        session_id: str,
        *,
        isolation: Isolation | str = Isolation.SERIALIZABLE,
        timeout_s: float = TOOL_TIMEOUT_S,
        metadata: Mapping[str, str] | None = None,
        origin: Origin | None = None,
    ) -> Future[Transaction]:
        """See `Transacts.submit_transaction`. The transaction lasts no longer than the connection."""
        begin = partial(self._begin, session_id, isolation, timeout_s, metadata, origin, current_execution_id())
        return on_new_thread(begin, "dspex-persist-transaction")

    def submit_recording(
        self,
        session_id: str,
        name: str = RECORDING,
        *,
        metadata: Mapping[str, str] | None = None,
        origin: Origin | None = None,
    ) -> Future[Transaction]:
        """See `Transacts.submit_recording`. The server keeps what it has if the connection breaks."""
        begin = partial(self._begin, session_id, Isolation.SNAPSHOT, None, metadata, origin, None, recording=name)
        return on_new_thread(begin, "dspex-persist-recording")

    def _begin(
        self,
        session_id: str,
        isolation: Isolation | str,
        timeout_s: float | None,
        metadata: Mapping[str, str] | None,
        origin: Origin | None,
        asker_id: str | None,
        *,
        recording: str | None = None,
    ) -> Transaction:
        self.check_open()
        if timeout_s is not None:
            timeout_s = arguments.timeout("timeout_s", timeout_s)
        if origin is not None:
            arguments.origin(origin)
        origin = origin or self.default_origin("BeginTransaction")
        stream, execution_id = audit_client.begin(
            self._channel,
            self._line,
            arguments.text("session_id", session_id),
            arguments.member("isolation", isolation, Isolation).value,
            timeout_s,
            arguments.metadata("metadata", or_empty(metadata)),
            None if recording is None else arguments.text("name", recording),
            headers=(*self._headers_of_origin(origin), *_headers({ASKED_BY: asker_id})),
            # It may have to wait for its turn.
            patience_s=self._timeout_s if timeout_s is None else timeout_s + _VERDICT_S,
        )
        stub = AuditServiceStub(self._channel)
        own = replace(origin, cause=execution_id)
        return BridgedTransaction(
            session_id,
            execution_id,
            stream,
            stub,
            self._submit_within,
            own,
            self._target,
            self._timeout_s,
            partial(self._forget, session_id),
        )

    def _patience_s(self, command: Command[Any]) -> float:
        tool_s = command.timeout_s if isinstance(command, commands.ExecuteTool) else None
        # The server ends the tool when its time is up; the rest is for the outcome to arrive.
        return self._timeout_s if tool_s is None else tool_s + _VERDICT_S

    def _headers_of(
        self, rpc: Rpc[Any, Any], origin: Origin, execution_id: str | None, command: Command[Any]
    ) -> Headers:
        own = {EXECUTION_ID: execution_id, **rpc.headers_of(command)}
        return (*self._headers_of_origin(origin), *_headers(own))

    def _headers_of_origin(self, origin: Origin) -> Headers:
        stated = _headers(
            {
                ACTOR: origin.actor or None,
                SOURCE: origin.source.value if origin.source is Source.PYTHON else None,
                IDEMPOTENCY_KEY: origin.idempotency_key,
                OPTIMIZER_ID: origin.optimizer_id,
                REASON: origin.reason,
            }
        )
        # Of the trace that the program is in, if it has one.
        place = tracing.headers()
        return (*stated, *place) if place else stated

    def default_origin(self, cause: str, idempotency_key: str | None = None) -> Origin:
        """Return the origin of a call without one: this client's actor."""
        if idempotency_key is not None:
            idempotency_key = arguments.text("idempotency_key", idempotency_key)
        return Origin(self._actor, cause, Source.PYTHON, idempotency_key)

    def close(self) -> None:
        """Close the channel; the server continues. In a forked child this does nothing."""
        self._closed = True
        if self._here.refusal is None:
            for watch in tuple(self._watches):
                watch.end()
            if self.cache is not None:
                self.cache.close()
            self._close_channel()
            self._here.close()

    def _close_channel(self) -> None:
        self._channel.close()

    def _error_of(self, call: Any) -> StateError:
        """The error that ended a stream: `EngineClosedError` if this object was closed meanwhile."""
        return EngineClosedError() if self._closed else error_of_call(call, self._target)

    def check_open(self) -> None:
        """See `StateProvider.check_open`. It does not check whether the server answers."""
        self._here.check()
        if self._closed:
            raise EngineClosedError()


def _headers(texts: Mapping[str, str | None]) -> Headers:
    return tuple(_header(name, text) for name, text in texts.items() if text is not None)


def _header(name: str, text: str) -> tuple[str, str | bytes]:
    """`text` as gRPC metadata: as UTF-8 under a binary key unless it is printable ASCII."""
    if len(text) > _HEADER_LENGTH and name != REASON:
        raise LimitExceededError(f"the length of {ARGUMENTS.get(name, name)}", len(text), _HEADER_LENGTH, "name_length")
    if text and text.isascii() and text.isprintable() and text == text.strip():
        return name, text
    return name + BINARY, text.encode()
