"""ToolSession: the interface of a running execution to the tool's code."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import replace
from datetime import datetime
from random import Random
from typing import Any, Final, NamedTuple, NoReturn, Protocol, TypeVar
from uuid import UUID

from dspex_persist import clock
from dspex_persist.infra.futures import mapped
from dspex_persist.infra.threads import is_on_loop
from dspex_persist.infra.tracing import Place
from dspex_persist.state import arguments, commands, values
from dspex_persist.state.abilities import Durable
from dspex_persist.state.budgets import NO_BUDGET, Budget
from dspex_persist.state.commands import Command
from dspex_persist.state.commands.executions import Verdict
from dspex_persist.state.errors import InvalidArgumentError, LimitExceededError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import ExecutionStatus, Failure, LogEntry, Origin, Source, ToolOutcome, ToolSpec, Value
from dspex_persist.state.provider import Submits
from dspex_persist.state.tools.execution import Execution
from dspex_persist.state.tools.requests import ToolRequest
from dspex_persist.state.tools.spending import Spending

R = TypeVar("R")

LM_CALLS: Final = "lm"
"""The key of LM calls in an execution's `recorded`."""
# The size of a line in the journal's log, without its text.
_LINE_BYTES: Final = 64
current_session: ContextVar["ToolSession | None"] = ContextVar("dspex_persist_current_session", default=None)
"""The session of the execution whose code runs in this context. A tool that this code asks for reads it here."""


class _Block(NamedTuple):
    """A block of a client's code with a transaction, and where it runs: other threads and tasks only inherit it."""

    execution_id: str
    thread: int
    task: "asyncio.Task[Any] | None"


_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("dspex_persist_blocks", default=())


def enter_block(execution_id: str) -> None:
    """Note that this thread, or task, runs the code of a client's transaction until `leave_block`."""
    _blocks.set((*_blocks.get(), _Block(execution_id, *_place())))


def leave_block(execution_id: str) -> None:
    """Note the end of such a block."""
    _blocks.set(tuple(block for block in _blocks.get() if block.execution_id != execution_id))


def _place() -> tuple[int, "asyncio.Task[Any] | None"]:
    return threading.get_ident(), asyncio.current_task() if is_on_loop() else None


def current_transaction_id() -> str | None:
    """Return the id of the client's transaction in whose block this code runs, or None."""
    blocks = _blocks.get()
    if not blocks:
        return None
    place = _place()
    return next((block.execution_id for block in reversed(blocks) if block[1:] == place), None)


def current_execution_id() -> str | None:
    """Return the id of the execution whose code runs in this context: that of a tool, or of a client's transaction."""
    session = current_session.get()
    return session.execution_id if session is not None else current_transaction_id()


class Host(Protocol):
    """What a session needs from the runner."""

    @property
    def limits(self) -> Limits: ...

    @property
    def store(self) -> Submits:
        """Runs commands outside the transaction."""

    @property
    def spending(self) -> Spending:
        """What LM calls have used."""

    @property
    def budget(self) -> Budget:
        """The budget of every session."""

    def call(self, caller: "ToolSession", request: ToolRequest) -> "Future[Value]":
        """Execute a tool as part of its caller's execution."""

    def result_type_of(self, tool: str) -> str:
        """Return the `result_type` of a tool; "" if it is unknown."""

    def exposed_tools(self) -> tuple[ToolSpec, ...]:
        """Return the tools that workers may call."""


class ToolSession:
    """What a tool's code can do in its execution. Usable from any thread, until the execution ends.

    Args:
        host: The runner.
        execution: The execution, with the session's snapshot and the staged writes.
        request: The request to execute the tool.
        attempt: The number of the attempt, from 1.
        seed: The recorded seed of random numbers and ids.
        asker: The session whose code asked for this execution, if a tool's code did.

    Attributes:
        is_far: Whether the journal is in another process, so that `record` and `check_budgets` may wait for that.
    """

    is_far = False

    def __init__(
        self,
        host: Host,
        execution: Execution,
        request: ToolRequest,
        attempt: int,
        seed: str,
        asker: "ToolSession | None" = None,
    ) -> None:
        self.session_id = execution.session_id
        self.execution_id = execution.id
        # A copy: the code may change it, which must affect neither the next attempt nor the caller.
        self.metadata = dict(request.metadata)
        self.attempt = attempt
        self.execution = execution
        self.request = request
        self.origin = Origin(request.origin.actor, execution.id, Source.PYTHON, reason=request.origin.reason)
        # The session whose code waits for this one, and how many sessions wait in that chain.
        self.asker = asker
        self.depth: int = 0 if asker is None else asker.depth + 1
        # `started`: whether the code has begun to run. `aside`: whether an asker may block the tools' loop until then.
        self.started = self.is_async = False
        self.aside: bool = asker is not None and (asker.aside or (execution.parent is None and asker.is_async))
        # The clock behind `now`; a replay sets it.
        self.read_clock: Callable[[], datetime] = clock.now
        # Only used on the home loop: the call in progress, its task, and the lock that admits one call at a time.
        self.calling: ToolSession | None = None
        self.task: asyncio.Task[Any] | None = None
        self.turn = asyncio.Lock()
        self.outlet = request.outlet
        # Set by the runner: how long the code may take, and the outcome for those that wait for it.
        self.timeout_s: float | None = None
        # ... and what ends it before, and why it did; "" if it was only the time.
        self.limit: asyncio.Timeout | None = None
        self.over_because = ""
        # ... and its place in a trace, if there is one.
        self.place: Place | None = None
        self.done: asyncio.Future[ToolOutcome | None] | None = None
        self._host = host
        # Generators are made on first use, because seeding one takes longer than a short tool.
        self.seed = seed
        self._random: Random | None = None
        self._uuids: Random | None = None
        self._began = time.monotonic()
        self._log: list[LogEntry] = []
        self._times: list[datetime] = []
        self._recorded: dict[str, list[Any]] = {}
        self.journal_bytes = 0

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled, as happens when code passes it to a process pool."""
        raise TypeError(
            "a tool's context works only in its process: pass values to other processes, and write their results here"
        )

    @property
    def store(self) -> Submits:
        """What has the session, below the execution of tools."""
        return self._host.store

    @property
    def limits(self) -> Limits:
        """The limits of values and journals."""
        return self._host.limits

    @property
    def is_durable(self) -> bool:
        """Whether the session outlives the process that has it."""
        return isinstance(self._host.store, Durable)

    @property
    def cancelled(self) -> bool:
        """Whether the execution has ended, so that nothing the code still does is kept."""
        return bool(self.execution.ended)

    @property
    def random(self) -> Random:
        """A generator of random numbers with the execution's recorded seed."""
        with self.execution.overlay.lock:
            if self._random is None:
                self._random = Random(f"{self.seed}:random")
            return self._random

    def run(self, command: Command[R], *, reason: str | None = None) -> R:
        """Run a command inside the transaction. `reason`: why; by default that of the call of the tool."""
        return self.execution.run(command, self._origin_for(reason))

    def _origin_for(self, reason: str | None) -> Origin:
        return self.origin if reason is None else replace(self.origin, reason=arguments.reason("reason", reason))

    def publish(
        self, identifier: str, value: object, metadata: Mapping[str, str] | None = None, *, reason: str | None = None
    ) -> int:
        """Write a value at once, in a separate commit; returns the new version. `reason`: as for `run`.

        Raises:
            InvalidArgumentError: The execution has staged a write of the variable.
        """
        self.execution.check_can_publish(identifier)
        encoded = values.encode_for(value, lambda: self._type_of(identifier), name=identifier)
        return self._publish(identifier, encoded, metadata, reason)

    def publish_encoded(
        self, identifier: str, encoded: Value, metadata: Mapping[str, str] | None = None, *, reason: str | None = None
    ) -> int:
        """Do the same as `publish`, with a value that is encoded already."""
        self.execution.check_can_publish(identifier)
        return self._publish(identifier, encoded, metadata, reason)

    def _publish(self, identifier: str, encoded: Value, metadata: Mapping[str, str] | None, reason: str | None) -> int:
        command = commands.PublishVariable(self.session_id, self.execution_id, identifier, encoded, metadata or {})
        published = self._host.store.submit(command, self._origin_for(reason)).result()
        self.execution.take_published(published)
        return published[0].version

    def _type_of(self, identifier: str) -> str:
        query = commands.GetVariable(self.session_id, identifier)
        return self._host.store.submit(query, self.origin).result().type

    def now(self) -> datetime:
        """Return the time, and record it for replays."""
        moment = self.read_clock()
        self._count(8)
        self._times.append(moment)
        return moment

    def uuid(self) -> UUID:
        """Return a new UUID, drawn with the execution's recorded seed."""
        with self.execution.overlay.lock:
            if self._uuids is None:
                self._uuids = Random(f"{self.seed}:uuid")
            return UUID(int=self._uuids.getrandbits(128), version=4)

    def log(self, message: str, **fields: object) -> None:
        """Add a line to the log in the journal.

        Raises:
            InvalidArgumentError: The message is not a str.
            LimitExceededError: The journal becomes too large, or `fields` nest too deeply.
        """
        self.execution.check_running()
        size_bytes = _LINE_BYTES + _size_of_message(message)
        text = values.encode(fields, "map", name="log").json
        depth = values.depth_if_above(text, self._host.limits.json_depth)
        if depth:
            raise LimitExceededError(
                "JSON nesting of what is logged", depth, self._host.limits.json_depth, "json_depth"
            )
        self._count(size_bytes + len(text.encode()))
        # A copy of the fields: the code may change them later, and the writer checks nothing.
        self._log.append(LogEntry(clock.now(), str(message), json.loads(text)))

    def record(self, kind: str, entry: Mapping[str, Any]) -> None:
        """Record an input from outside, such as a model's response, for replays.

        Args:
            kind: The list in the journal's `recorded` to append to.
            entry: The input, as JSON objects.
        """
        text = values.encode(entry, "map", name=kind).json
        with self.execution.overlay.lock:
            self._count(_LINE_BYTES + len(text))
            self._recorded.setdefault(kind, []).append(json.loads(text))
        if kind == LM_CALLS:
            self._spend(entry)

    def _spend(self, call: Mapping[str, Any]) -> None:
        """Count what a recorded call of a language model has used."""
        execution = self.execution
        self._host.spending.add(execution.session_key, execution.root_id, execution.tool, call)

    def check_budgets(self, own: Budget = NO_BUDGET) -> None:
        """Check before a call of a language model whether it is within the budgets; it may read the journal.

        Args:
            own: The budget of the tool.

        Raises:
            BudgetExceededError: A budget of the session, or of the tool in this session, is used up.
        """
        host, execution = self._host, self.execution
        host.spending.check(host.store, self.session_id, self.origin, execution.tool, own, host.budget)

    def _count(self, size_bytes: int) -> None:
        limit = self._host.limits.journal_size_bytes
        self.journal_bytes += size_bytes
        if self.journal_bytes > limit:
            what = "size of what the execution logged and recorded, in bytes,"
            raise LimitExceededError(what, self.journal_bytes, limit, "journal_size_bytes")

    def take(self, log: Iterable[LogEntry], times: Iterable[datetime], recorded: Mapping[str, list[Any]]) -> None:
        """Take into the journal what the code has logged, asked for and recorded in another process.

        Raises:
            LimitExceededError: The journal becomes too large.
        """
        lines, moments = list(log), list(times)
        with self.execution.overlay.lock:
            self._log += lines
            self._times += moments
            for kind, entries in recorded.items():
                self._recorded.setdefault(kind, []).extend(entries)
        for call in recorded.get(LM_CALLS, ()):
            self._spend(call)
        texts = [line.message + json.dumps(line.fields) for line in lines]
        texts += [json.dumps(entry) for entries in recorded.values() for entry in entries]
        self._count(8 * len(moments) + sum(_LINE_BYTES + len(text) for text in texts))

    def returned(self) -> None:
        """Called when the code has returned, even if nobody waits for it any more."""

    def call(self, tool: str, arguments: Mapping[str, object]) -> Any:
        """Run another tool in the same transaction; returns its result or, on an event loop, an awaitable of it."""
        self.execution.check_running()
        parameters = values.encode_arguments(arguments)
        request = ToolRequest(self.session_id, tool, parameters, self.request.origin, style=self.request.style)
        future = self._host.call(self, request)
        result_type = self._host.result_type_of(tool)
        if is_on_loop():
            return asyncio.wrap_future(mapped(future, lambda result: values.decode_loosely(result, result_type)))
        try:
            return values.decode_loosely(future.result(), result_type)
        finally:
            # An error in the future has a traceback that refers to this frame: this breaks the cycle.
            del future

    def exposed_tools(self) -> tuple[ToolSpec, ...]:
        """Return the tools that workers may call."""
        return self._host.exposed_tools()

    def verdict(self, status: ExecutionStatus, result: Value | None = None, failure: Failure | None = None) -> Verdict:
        """Return the verdict, with everything that the journal keeps of the execution."""
        execution = self.execution
        # With the lock, because the code may still be running.
        with execution.overlay.lock:
            return Verdict(
                execution.id,
                status,
                result,
                failure,
                dict(execution.reads),
                tuple(execution.patterns),
                tuple(self._log),
                self._all_recorded(),
                tuple(execution.published),
                self.attempt,
                round((time.monotonic() - self._began) * 1e6),
            )

    def _all_recorded(self) -> dict[str, list[Any]]:
        recorded = {kind: list(entries) for kind, entries in self._recorded.items()}
        return {"now": [clock.to_micros(moment) for moment in self._times], **recorded}

    def below(self) -> "list[ToolSession]":
        """Return the sessions of the calls in progress, the innermost last."""
        return [] if self.calling is None else [self.calling, *self.calling.below()]


def _size_of_message(message: object) -> int:
    """The size of a log message in bytes; `InvalidArgumentError` unless it is text."""
    if not isinstance(message, str):
        reason = f"it must be a str, not {type(message).__name__}: pass other objects as fields, log('...', key=...)"
        raise InvalidArgumentError("message", reason)
    try:
        return len(message.encode())
    except UnicodeEncodeError as error:
        raise InvalidArgumentError("message", f"U+{ord(message[error.start]):04X} alone is not a character") from None
