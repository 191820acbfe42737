"""AuditServicer: audit queries over gRPC, alongside the bridge protocol. Translates messages; contains no rules.

Reading the history is slow, so it happens on two threads, never on the event loop: one thread reads lists, a page at a
time, and one reads single answers. A third one checks what clients import. So any number of queries hardly slows the
rest of the server down, and no query waits for the whole list of another.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

from google.protobuf.message import Message

from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.mailbox import LoopMailbox
from dspex_persist.infra.workers.statistics import PoolStatistics
from dspex_persist.state.abilities import (
    Auditable,
    Forkable,
    Importable,
    Prunable,
    Recordable,
    Restorable,
    SessionImport,
)
from dspex_persist.state.audit import AuditSource
from dspex_persist.state.bridge.access.permitted import PERMIT
from dspex_persist.state.bridge.calls import Calls, methods
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as pb
from dspex_persist.state.bridge.hold_service import HoldRpcs
from dspex_persist.state.bridge.incoming import Context, RequestHeaders, fitting, origin_of
from dspex_persist.state.bridge.rpcs import audit as rpcs
from dspex_persist.state.bridge.rpcs import beside, recordings, workers
from dspex_persist.state.bridge.rpcs.audit import ListRpc, Question, Single
from dspex_persist.state.bridge.rpcs.base import Rpc
from dspex_persist.state.bridge.rpcs.recordings import RESTORED, batch_of, fork_message, lines_of
from dspex_persist.state.bridge.transaction_service import TransactionRpcs
from dspex_persist.state.commands import ForkSession, RestoreSession
from dspex_persist.state.errors import EngineClosedError, UnavailableError, UnsupportedError
from dspex_persist.state.model import ImportedSession, Origin, PrunePolicy, PruneReport, SessionView
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.recording import RecordingReader
from dspex_persist.state.tools.with_tools import WithTools

R = TypeVar("R")
M = TypeVar("M", bound=Message)

_FIRST_ROWS, _MOST_ROWS = 20, 100
_BATCH_BYTES: Final = 256 * 1024
"""The target size of a message in a stream; a single row may be larger."""

_logger: Final = get_logger(__name__)


@methods(beside.RPCS, "_run")
@methods(rpcs.SINGLES, "_answer")
@methods(rpcs.LISTS.values(), "_list")
class AuditServicer(TransactionRpcs, HoldRpcs):
    """The rpcs of the audit service. Made and used on one event loop; close it before the provider.

    Args:
        provider: Has the history.
        reveal: Whether a request may ask for the values of sensitive variables.
        prune: Whether clients may prune.
        stall_timeout_s: How long a stream waits for a client that does not read, before it ends.
        max_message_bytes: The largest message.
        pools: Returns what the pools of the server do now.
    """

    def __init__(
        self,
        provider: StateProvider,
        *,
        reveal: bool = False,
        prune: bool = False,
        stall_timeout_s: float = 30.0,
        max_message_bytes: int = 100 * 1024 * 1024,
        pools: Callable[[], Sequence[PoolStatistics]] = tuple,
    ) -> None:
        TransactionRpcs.__init__(self, provider)
        HoldRpcs.__init__(self, provider, stall_timeout_s)
        self._provider = provider
        self._reveal = reveal
        self._may_prune = prune
        self._stall_timeout_s = stall_timeout_s
        self._max_message_bytes = max_message_bytes
        self._calls = Calls(provider, max_message_bytes) if isinstance(provider, WithTools) else None
        self._batch_bytes = min(_BATCH_BYTES, max_message_bytes // 2)
        self._draining = False
        self._pools = pools
        self._mailbox = LoopMailbox(asyncio.get_running_loop())
        # One thread each: two that read at the same time would double the delay of every other call.
        self._lists = ThreadPoolExecutor(1, thread_name_prefix="dspex-persist-lists")
        self._answers = ThreadPoolExecutor(1, thread_name_prefix="dspex-persist-answers")
        self._pruner = ThreadPoolExecutor(1, thread_name_prefix="dspex-persist-pruner")
        self._imports = ThreadPoolExecutor(1, thread_name_prefix="dspex-persist-imports")

    def drain(self) -> None:
        """End all streams, with a status that says how to continue. Unary rpcs are still answered."""
        self._draining = True
        self.end_recordings()
        self.end_holds()

    def close(self) -> None:
        """Wait for the work in progress, and end the threads."""
        self._draining = True
        for threads in (self._lists, self._answers, self._pruner, self._imports):
            threads.shutdown(cancel_futures=True)
        self.close_holders()

    async def ListWorkers(self, _request: pb.ListWorkersRequest, _context: Context) -> pb.ListWorkersResponse:
        return workers.response_of(self._pools())

    # Pruning

    async def Prune(self, request: pb.PruneRequest, context: Context) -> None:
        if request.confirm and not self._may_prune:
            raise UnsupportedError(
                "pruning by clients",
                "start the server with --audit-prune, or let it prune by itself (--retention-keep-versions, ...), or "
                "stop it and prune the file with --db",
            )
        pruning = _Pruning(self._provider, rpcs.policy_of(request), request.confirm, self._mailbox)
        _logger.info("pruning requested", confirm=request.confirm, peer=context.peer())
        work = asyncio.get_running_loop().run_in_executor(self._pruner, pruning.run)
        try:
            while not work.done():
                message = await pruning.next_progress(work)
                if message is not None:
                    await self._send(message, context)
                if self._draining:
                    raise UnavailableError("the server is shutting down; a part has been pruned, prune again later")
            await self._send(rpcs.report_message(await work), context)
        finally:
            pruning.end()
            work.cancel()

    # Recordings and forks

    async def RecordSession(self, request: pb.RecordSessionRequest, context: Context) -> None:
        """Send the commits of a session, in batches: the next one is read when the client has taken the last."""
        lines = await self._on(self._lists, lambda: self._begin_recording(request))
        while True:
            batch = await self._on(self._lists, lambda: batch_of(lines, self._batch_bytes))
            if not batch.lines:
                return
            await self._send(self._fitting(batch), context)
            if self._draining:
                raise UnavailableError("the server is shutting down; record the session again")

    def _begin_recording(self, request: pb.RecordSessionRequest) -> Iterator[Any]:
        started = request.started if request.HasField("started") else None
        reveal = self._reveal and request.reveal
        provider = Recordable.of(self._provider)
        recording = provider.record(request.session, started=started, reveal=reveal, after=request.after)
        return lines_of(*recording)

    async def GetContentHash(self, request: pb.GetContentHashRequest, _context: Context) -> pb.GetContentHashResponse:
        started = request.started if request.HasField("started") else None
        provider = Recordable.of(self._provider)
        content_hash = await self._on(self._answers, lambda: provider.content_hash(request.session, started=started))
        return pb.GetContentHashResponse(content_hash=content_hash)

    async def ImportSession(self, requests: AsyncIterator[pb.ImportSessionRequest], context: Context) -> None:
        """Check the lines of a recording as they come, and import the session after the last one."""
        receiving = _Receiving(Importable.of(self._provider))
        try:
            while not receiving.complete:
                message = await self._received(requests, context)
                await self._on(self._imports, partial(receiving.take, message))
                if self._draining:
                    raise UnavailableError(
                        "the server is shutting down, and imported nothing; import the session again"
                    )
            imported = await self._on(self._imports, receiving.finish)
            _logger.info("session imported", session_id=imported.session_id, commits=imported.commits)
            await self._send(recordings.IMPORTED.message_of(imported), context)
        finally:
            # On its thread, which may still be checking the last message.
            with suppress(RuntimeError):
                self._imports.submit(receiving.close)

    async def _received(self, messages: AsyncIterator[M], context: Context) -> M:
        """Return the next message of a client, which has not sent the last one yet."""
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                return await anext(messages)
        except StopAsyncIteration:
            raise UnavailableError(
                "the client ended the import before its last message; nothing was imported"
            ) from None
        except TimeoutError:
            _logger.info("client stalled", peer=context.peer(), message="ImportSessionRequest")
            reason = f"the client sent nothing for {self._stall_timeout_s:g} s; nothing was imported"
            raise UnavailableError(reason) from None

    async def ForkSession(self, request: pb.ForkSessionRequest, context: Context) -> Message:
        caller = origin_of(ForkSession.__name__, context, RequestHeaders(context))
        origin = replace(caller, idempotency_key=None, optimizer_id=None)
        view = await self._on(self._answers, lambda: self._fork(request, origin))
        response: Message = self._fitting(fork_message(view))
        return response

    async def RestoreSession(self, request: pb.RestoreSessionRequest, context: Context) -> Message:
        origin = origin_of(RestoreSession.__name__, context, RequestHeaders(context))
        restored = await self._on(
            self._answers,
            lambda: Restorable.of(self._provider).restore_session(request.session, request.at, origin=origin),
        )
        response: Message = self._fitting(RESTORED.message_of(restored))
        return response

    def _fork(self, request: pb.ForkSessionRequest, origin: Origin) -> SessionView:
        source, at = request.session, request.at
        if not self._reveal:
            # Check and copy the state as of one commit, whatever others write meanwhile.
            audit = Auditable.of(self._provider).audit()
            at = str(audit.resolve(at, session=source))
            if any(each.masked for each in audit.state(source, at)):
                raise UnsupportedError(
                    "forks of sensitive variables by clients",
                    "start the server with --audit-reveal, or stop it and fork the session in its file with --db",
                )
        return Forkable.of(self._provider).fork_session(source, request.new_session, at, origin=origin)

    # Commands

    async def _run(self, rpc: Rpc[Any, Any], request: Any, context: Context) -> Message:
        if self._calls is None:
            raise UnsupportedError(f"{rpc.name} by a provider without tools")
        answer: Message = await self._calls.answer(rpc, request, context)
        return answer

    # Answers

    async def _answer(self, rpc: Single[Any], request: Any, _context: Context) -> Message:
        source = self._source(request)
        return self._fitting(await self._on(self._answers, lambda: rpc.response_of(rpc.ask(source, request))))

    async def _list(self, rpc: ListRpc[Any], request: Any, context: Context) -> None:
        """Send the rows of a list, in pages: the next one is read when the client has taken the last."""
        source = self._source(request)
        pages = _Pages(rpc.question(request), source, self._batch_bytes)
        while True:
            await self._send(self._fitting(await self._on(self._lists, pages.read)), context)
            if pages.ended:
                return
            if self._draining:
                raise UnavailableError("the server is shutting down; continue after the cursor of the last message")

    def _source(self, request: Any) -> AuditSource:
        source = Auditable.of(self._provider).audit(reveal=self._reveal and getattr(request, "reveal", False))
        permit = PERMIT.get()
        return source if permit is None else permit.source(source)

    async def _on(self, threads: ThreadPoolExecutor, question: Callable[[], R]) -> R:
        try:
            future = threads.submit(question)
        except RuntimeError:
            # The threads have been shut down.
            raise EngineClosedError() from None
        return await self._mailbox.result(future)

    def _fitting(self, message: M) -> M:
        return fitting(message, self._max_message_bytes)

    async def _send(self, message: Any, context: Context) -> None:
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await context.write(message)
        except TimeoutError:
            _logger.info("client stalled", peer=context.peer(), message=type(message).__name__)
            raise UnavailableError(f"the client read nothing for {self._stall_timeout_s:g} s") from None


class _Receiving:
    """An import that a client sends in messages. Used by one thread at a time."""

    def __init__(self, provider: Importable) -> None:
        self.complete = False
        self._provider = provider
        self._reader = RecordingReader()
        self._begun: SessionImport | None = None

    def take(self, message: pb.ImportSessionRequest) -> None:
        """Check the lines of the next message."""
        lines = iter(message.lines)
        if self._begun is None:
            header = self._reader.read_header(next(lines, ""))
            session_id = message.session_id if message.HasField("session_id") else None
            self._begun = self._provider.begin_import(header, session_id)
        for line in lines:
            self._begun.add(self._reader.read_commit(f"{line}\n"))
        self.complete = message.complete

    def finish(self) -> ImportedSession:
        """Import the session."""
        assert self._begun is not None, "a message came"
        self._reader.end()
        return self._begun.finish()

    def close(self) -> None:
        """Drop what came, unless it was imported."""
        if self._begun is not None:
            self._begun.close()


class _Pages:
    """Reads the answers to one query in pages of about the size of a message. Used by one thread at a time."""

    def __init__(self, question: Question[Any], source: AuditSource, batch_bytes: int = _BATCH_BYTES) -> None:
        self.ended = False
        self._question = question
        self._source = source
        self._batch_bytes = batch_bytes
        self._after = question.key
        self._left = question.query.limit or None
        self._rows = _FIRST_ROWS
        self._bounds: tuple[int, int] | None = None

    def read(self) -> Any:
        """Read the next page, as a message."""
        if self._bounds is None:
            self._bounds = self._question.bounds(self._source)
        while True:
            most = self._rows if self._left is None else min(self._rows, self._left)
            page = self._source.page(self._question.within(self._bounds), self._after, most)
            response = self._question.response(page, self._bounds)
            self._adapt(len(page.rows), response.ByteSize())
            if len(page.rows) <= self._rows or response.ByteSize() <= 2 * self._batch_bytes:
                break
        self._after = page.after
        self._left = None if self._left is None else self._left - len(page.rows)
        self.ended = page.after is None or self._left == 0
        return response

    def _adapt(self, rows: int, size_bytes: int) -> None:
        fitting = max(1, self._batch_bytes * rows // size_bytes) if rows else self._rows
        self._rows = min(fitting, 2 * self._rows, _MOST_ROWS)


class _ClientLeftError(Exception):
    """The client of a pruning has gone."""


class _Pruning:
    """One pruning on its thread, which passes its progress to the event loop."""

    def __init__(self, provider: StateProvider, policy: PrunePolicy, confirm: bool, mailbox: LoopMailbox) -> None:
        self._provider = provider
        self._policy = policy
        self._confirm = confirm
        self._mailbox = mailbox
        self._reported = asyncio.Event()
        self._last: tuple[str, int, int] | None = None
        self._ended = False

    def run(self) -> PruneReport:
        """Prune, on the calling thread."""
        return Prunable.of(self._provider).prune(self._policy, confirm=self._confirm, progress=self._progress)

    def _progress(self, what: str, done: int, in_all: int) -> None:
        if self._ended:
            raise _ClientLeftError
        self._last = (what, done, in_all)
        self._mailbox.post(self._reported.set)

    async def next_progress(self, work: "asyncio.Future[PruneReport]") -> pb.PruneResponse | None:
        """Wait for progress or for the end of the work; returns the latest progress, or None at the end."""
        waiting = asyncio.ensure_future(self._reported.wait())
        try:
            await asyncio.wait((waiting, work), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        self._reported.clear()
        last, self._last = self._last, None
        return rpcs.progress_message(*last) if last is not None else None

    def end(self) -> None:
        """End the pruning after its next step."""
        self._ended = True
