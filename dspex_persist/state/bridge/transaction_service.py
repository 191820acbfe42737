"""TransactionRpcs: transactions of clients over gRPC, as part of the audit service. Contains no rules."""

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from dspex_persist.state import values
from dspex_persist.state.abilities import Transacts, checked_kind
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as pb
from dspex_persist.state.bridge.headers import ASKED_BY, EXECUTION_STATUS
from dspex_persist.state.bridge.incoming import Context, RequestHeaders, check_count, origin_of
from dspex_persist.state.bridge.records import Codec
from dspex_persist.state.errors import ExecutionNotFoundError, InvalidArgumentError, StateError, UnsupportedError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import ExecutionStatus, Failure, Isolation
from dspex_persist.state.provider import TOOL_TIMEOUT_S, StateProvider
from dspex_persist.state.tools import traced
from dspex_persist.state.tools.session import LM_CALLS
from dspex_persist.state.tools.transactions import OpenTransaction
from dspex_persist.state.tools.with_tools import WithTools

FAILURE: Final[Codec[Failure]] = Codec.between(Failure, pb.Failure)
_MOST_BYTES: Final = sys.maxsize


class TransactionRpcs:
    """Begins, commits and aborts transactions. Made and used on one event loop.

    A transaction belongs to the stream of `BeginTransaction`: it ends with the stream, so that nothing is left of a
    client that has disappeared.

    Args:
        provider: Has the sessions.
    """

    def __init__(self, provider: StateProvider) -> None:
        self._transacting = provider
        self._open: dict[str, OpenTransaction] = {}
        self._recordings: dict[str, OpenTransaction] = {}
        self._ending: set[asyncio.Task[int]] = set()

    def end_recordings(self) -> None:
        """Commit all recordings, because the server is shutting down: they last as long as their clients want."""
        for opened in tuple(self._recordings.values()):
            task = asyncio.get_running_loop().create_task(opened.commit())
            self._ending.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[int]") -> None:
        self._ending.discard(task)
        # It may have ended by itself in this moment.
        if not task.cancelled():
            task.exception()

    async def BeginTransaction(self, request: pb.BeginTransactionRequest, context: Context) -> None:
        provider = self._transacting
        if not isinstance(provider, WithTools):
            raise UnsupportedError(Transacts.lacking, Transacts.instead)
        limits = provider.runner.limits
        check_count("metadata entries", request.metadata, limits.metadata_entries, "metadata_entries")
        recording = request.recording if request.HasField("recording") else None
        default_s = TOOL_TIMEOUT_S if recording is None else None
        timeout_s = request.timeout_s if request.HasField("timeout_s") else default_s
        headers = RequestHeaders(context)
        origin = origin_of("BeginTransaction", context, headers)
        isolation = request.isolation or Isolation.SERIALIZABLE
        opened = await OpenTransaction.begin(
            provider.runner,
            *provider.transaction_request(
                request.session, isolation, timeout_s, dict(request.metadata), origin, recording=recording
            ),
            headers.find(ASKED_BY),
            takes_turns=recording is None,
        )
        execution_id = opened.session.execution_id
        self._open[execution_id] = opened
        if recording is not None:
            self._recordings[execution_id] = opened
        status: str = ExecutionStatus.FAILED
        try:
            await context.write(pb.BeginTransactionResponse(execution_id=execution_id))
            outcome = await opened.outcome()
            status = outcome.status or status
        except StateError:
            status = opened.session.execution.ended
            raise
        finally:
            del self._open[execution_id]
            self._recordings.pop(execution_id, None)
            opened.cancel()
            context.set_trailing_metadata(((EXECUTION_STATUS, str(status)),))

    async def CommitTransaction(self, request: pb.CommitTransactionRequest, context: Context) -> Any:
        return pb.CommitTransactionResponse(sequence=await (await self._opened(request.execution_id)).commit())

    async def AbortTransaction(self, request: pb.AbortTransactionRequest, context: Context) -> Any:
        failure = FAILURE.record_of(request.failure) if request.HasField("failure") else None
        await (await self._opened(request.execution_id)).abort(failure)
        return pb.AbortTransactionResponse()

    async def RecordInputs(self, request: pb.RecordInputsRequest, context: Context) -> Any:
        session = (await self._opened(request.execution_id)).session
        kind = checked_kind(request.kind)
        read = partial(_objects, list(request.entries_json), session.execution.overlay.unit.limits)
        is_long = sum(map(len, request.entries_json)) > values.LONG_JSON
        entries = await asyncio.to_thread(read) if is_long else read()
        for entry in entries:
            session.execution.check_running()
            session.record(kind, entry)
            if kind == LM_CALLS:
                traced.recorded(session, entry)
        return pb.RecordInputsResponse()

    async def CheckBudget(self, request: pb.CheckBudgetRequest, context: Context) -> Any:
        session = (await self._opened(request.execution_id)).session
        # It may have to read the journal.
        await asyncio.to_thread(session.check_budgets)
        return pb.CheckBudgetResponse()

    async def _opened(self, execution_id: str) -> OpenTransaction:
        opened = self._open.get(execution_id)
        if opened is None:
            if isinstance(self._transacting, WithTools):
                await self._transacting.runner.running.check_elsewhere(execution_id)
            raise ExecutionNotFoundError(execution_id)
        return opened


def _objects(texts: Sequence[str], limits: Limits) -> list[Mapping[str, Any]]:
    return [_object(text, limits) for text in texts]


def _object(text: str, limits: Limits) -> Mapping[str, Any]:
    # The journal's limit counts them.
    entry = values.parse_json(text, name="entries_json", limits=replace(limits, value_size_bytes=_MOST_BYTES))
    if not isinstance(entry, dict):
        raise InvalidArgumentError("entries_json", "each entry must be a JSON object")
    return entry
