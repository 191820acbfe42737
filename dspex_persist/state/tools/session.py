"""ToolSession: what a tool's code reaches of its execution."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextvars import ContextVar
from datetime import datetime
from random import Random
from typing import Any, Final, NoReturn, Protocol, TypeVar
from uuid import UUID

from dspex_persist import clock
from dspex_persist.infra.futures import mapped
from dspex_persist.state import commands, values
from dspex_persist.state.commands import Command
from dspex_persist.state.commands.executions import Verdict
from dspex_persist.state.errors import InvalidArgumentError, LimitExceededError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import ExecutionStatus, Failure, LogEntry, Origin, Source, ToolOutcome, Value
from dspex_persist.state.provider import Submit
from dspex_persist.state.tools.execution import Execution
from dspex_persist.state.tools.requests import ToolRequest

R = TypeVar("R")

# What a line of the journal's log takes beside its text.
_LINE_BYTES: Final = 64
asking: ContextVar["ToolSession | None"] = ContextVar("dspex_persist_asking", default=None)
"""The execution whose code runs in this context; whoever it asks for something sees that."""


def asking_execution() -> str | None:
    """The execution of a tool that this code is part of, or was started by."""
    asker = asking.get()
    return asker.execution_id if asker is not None else None


class Host(Protocol):
    """What a session is run by."""

    @property
    def limits(self) -> Limits: ...

    @property
    def submit_command(self) -> Submit:
        """Has the store carry a command out, outside the transaction."""

    def call(self, caller: "ToolSession", request: ToolRequest) -> "Future[Value]":
        """Execute a tool as part of its caller's execution."""

    def result_type_of(self, tool: str) -> str:
        """The `result_type` of a tool, where it is known."""


class ToolSession:
    """What a tool's code reaches of its execution. Usable from any thread, until the execution ends."""

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
        # Its own: what the code does to it is not for the next attempt, nor for whoever asked.
        self.metadata = dict(request.metadata)
        self.attempt = attempt
        self.execution = execution
        self.request = request
        self.origin = Origin(request.origin.actor, execution.id, Source.PYTHON)
        # Whose code waits for this one, and how many more wait for that one.
        self.asker = asker
        self.depth: int = 0 if asker is None else asker.depth + 1
        # Whether its code has begun to run, and whether somebody may be holding up the tools' loop until it has ended.
        self.started = self.is_async = False
        self.aside: bool = asker is not None and (asker.aside or (execution.parent is None and asker.is_async))
        # What `now` asks: a replay sets it.
        self.read_clock: Callable[[], datetime] = clock.now
        # The home loop's alone: the tool that it calls at the moment, and whose turn it is to call one.
        self.calling: ToolSession | None = None
        self.task: asyncio.Task[Any] | None = None
        self.turn = asyncio.Lock()
        self.outlet = request.outlet
        # Set by the runner: how long the code may take, and how it has ended, if anybody learnt.
        self.timeout_s: float | None = None
        self.done: asyncio.Future[ToolOutcome | None] | None = None
        self._host = host
        # To seed a generator takes longer than a short tool: only for those that draw.
        self._seed = seed
        self._random: Random | None = None
        self._uuids: Random | None = None
        self._began = time.monotonic()
        self._log: list[LogEntry] = []
        self._times: list[datetime] = []
        self._recorded: dict[str, list[Any]] = {}
        self.journal_bytes = 0

    def __reduce__(self) -> NoReturn:
        """Other processes, such as those of a pool, are sent pickles."""
        raise TypeError("a tool's context works in its own process: send others values, and write what they answer")

    @property
    def cancelled(self) -> bool:
        """Whether nothing that the code still does can be kept."""
        return bool(self.execution.ended)

    @property
    def random(self) -> Random:
        """Random numbers from the execution's recorded seed."""
        with self.execution.overlay.lock:
            if self._random is None:
                self._random = Random(f"{self._seed}:random")
            return self._random

    def run(self, command: Command[R]) -> R:
        """Carry a command out inside the transaction."""
        return self.execution.run(command, self.origin)

    def publish(self, identifier: str, value: object, metadata: Mapping[str, str] | None = None) -> int:
        """Write a value at once, in a commit of its own; the new version."""
        self.execution.check_can_publish(identifier)
        encoded = values.encode_for(value, lambda: self._type_of(identifier), name=identifier)
        command = commands.PublishVariable(self.session_id, self.execution_id, identifier, encoded, metadata or {})
        variable = self._host.submit_command(command, self.origin).result()
        self.execution.take_published(variable)
        return variable.version

    def _type_of(self, identifier: str) -> str:
        query = commands.GetVariable(self.session_id, identifier)
        return self._host.submit_command(query, self.origin).result().type

    def now(self) -> datetime:
        """The time, recorded."""
        moment = self.read_clock()
        self._count(8)
        self._times.append(moment)
        return moment

    def uuid(self) -> UUID:
        """A new UUID, from the execution's recorded seed."""
        with self.execution.overlay.lock:
            if self._uuids is None:
                self._uuids = Random(f"{self._seed}:uuid")
            return UUID(int=self._uuids.getrandbits(128), version=4)

    def log(self, message: str, **fields: object) -> None:
        """Keep a line in the journal."""
        self.execution.check_running()
        size_bytes = _LINE_BYTES + _size_of_message(message)
        text = values.encode(fields, "map", name="log").json
        depth = values.depth_if_above(text, self._host.limits.json_depth)
        if depth:
            raise LimitExceededError(
                "JSON nesting of what is logged", depth, self._host.limits.json_depth, "json_depth"
            )
        self._count(size_bytes + len(text.encode()))
        # As they are now: the code may go on to change them, and the writer cannot refuse what they would be then.
        self._log.append(LogEntry(clock.now(), str(message), json.loads(text)))

    def record(self, kind: str, entry: Mapping[str, Any]) -> None:
        """Keep what the code got from outside, as JSON, in the journal's `recorded`, in a list for each kind."""
        text = values.encode(entry, "map", name=kind).json
        with self.execution.overlay.lock:
            self._count(_LINE_BYTES + len(text))
            self._recorded.setdefault(kind, []).append(json.loads(text))

    def _count(self, size_bytes: int) -> None:
        limit = self._host.limits.journal_size_bytes
        self.journal_bytes += size_bytes
        if self.journal_bytes > limit:
            what = "size of what the execution logged and recorded, in bytes,"
            raise LimitExceededError(what, self.journal_bytes, limit, "journal_size_bytes")

    def call(self, tool: str, arguments: Mapping[str, object]) -> Any:
        """Run another tool in the same transaction: its result, in an asynchronous tool an awaitable of it."""
        self.execution.check_running()
        parameters = values.encode_arguments(arguments)
        request = ToolRequest(self.session_id, tool, parameters, self.request.origin, style=self.request.style)
        future = self._host.call(self, request)
        result_type = self._host.result_type_of(tool)
        if _is_on_loop():
            return asyncio.wrap_future(mapped(future, lambda result: values.decode_loosely(result, result_type)))
        try:
            return values.decode_loosely(future.result(), result_type)
        finally:
            # The traceback of an error knows this frame, and the future the error.
            del future

    def verdict(self, status: ExecutionStatus, result: Value | None = None, failure: Failure | None = None) -> Verdict:
        """The rest of the journal entry."""
        execution = self.execution
        # The code may still run.
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
        """The tools that run on its behalf at the moment, the innermost last."""
        return [] if self.calling is None else [self.calling, *self.calling.below()]


def _size_of_message(message: object) -> int:
    """The bytes of a message for the log, if it is one."""
    if not isinstance(message, str):
        reason = (
            f"it must be a str, not {type(message).__name__}: put what is no text into fields, log('...', what=...)"
        )
        raise InvalidArgumentError("message", reason)
    try:
        return len(message.encode())
    except UnicodeEncodeError as error:
        raise InvalidArgumentError("message", f"U+{ord(message[error.start]):04X} alone is no character") from None


def _is_on_loop() -> bool:
    """Whether this thread runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
