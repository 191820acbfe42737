"""The clients of the crash test. Each one records its requests and their answers exactly."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import grpc
import grpc.aio

from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from tests.concurrency.linearizability import Operation
from tests.faults.bridge import Bridge, ToolAnswer, is_refusal, wire
from tests.faults.ledger import Commit, Ledger, Rollback, Write

SESSION = "shared"
_TEXTS, _COUNTERS = 4, 2
_PADDINGS = (*(0,) * 8, 900, 3_000, 12_000)
"""Values that fit on one page, on several, and outside the table."""
_JOURNAL = {
    "CONFLICT": "conflict",
    "TOOL_FAILED": "failed",
    "CANCELLED": "cancelled",
    "INTERRUPTED": "interrupted",
    # Only with pools of workers:
    "TIMED_OUT": "timed_out",
    "WORKER_TIMEOUT": "timed_out",
    "WORKER_EXIT": "failed",
    "QUEUE_TIMEOUT": "failed",
    "POOL_SATURATED": "failed",
    "UNAVAILABLE": "failed",
}
"""The status in the journal for each error code that clients get."""


@dataclass(slots=True)
class Names:
    """The ids of the variables that all clients share, and of those that only one client writes."""

    texts: list[str] = field(default_factory=list)
    counters: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)
    rolled: list[str] = field(default_factory=list)


async def set_up(bridge: Bridge, ledger: Ledger, clients: int) -> Names:
    """Begin the session and register the variables."""
    names = Names()
    await bridge.begin(SESSION)

    async def register(name: str, type_name: str, value: object) -> str:
        token = f"register {name}"
        variable_id = await bridge.register(SESSION, name, type_name, value, {"token": token})
        text = json.dumps(value)
        _acknowledged(ledger, Write(token, SESSION, (variable_id,), text, versions={variable_id: 0}))
        return variable_id

    for index in range(_TEXTS):
        variable_id = await register(f"text-{index}", "string", "nothing yet")
        ledger.initial[variable_id] = '"nothing yet"'
        names.texts.append(variable_id)
    for index in range(_COUNTERS):
        counter = await register(f"counter-{index}", "integer", 0)
        # A client cannot expect version 0 (0 means any version), so each counter begins at 1.
        token = f"first {index}"
        version = await bridge.set(SESSION, counter, wire("integer", 1), {"token": token})
        _acknowledged(ledger, Write(token, SESSION, (counter,), "1", versions={counter: version}))
        names.counters.append(counter)
    await register("progress", "integer", 0)
    for index in range(clients):
        names.own.append(await register(f"own-{index}", "string", ""))
        names.rolled.append(await register(f"rolled-{index}", "string", ""))
    return names


def _acknowledged(ledger: Ledger, write: Write) -> None:
    write.status, write.returned_at = "ok", time.monotonic()
    ledger.writes[write.token] = write


class Client:
    """One client. It stops with its server and continues with the next one, starting with its unknown writes."""

    def __init__(self, number: int, seed: int, ledger: Ledger, names: Names) -> None:
        self._number = number
        self._random = Random(f"{seed}/{number}")
        self._ledger = ledger
        self._names = names
        self._count = 0
        self._unsettled: list[Write] = []
        self._acknowledged: list[Write] = []
        self._rolled_version = 0
        self._pauses: dict[str, float] = {}
        self._actions: Mapping[Callable[[], Awaitable[None]], int] = {
            self._set: 6,
            self._batch: 5,
            self._read: 5,
            self._increment: 4,
            self._set_own: 4,
            self._register_and_delete: 2,
            self._roll_back: 2,
            self._spoilt_batch: 1,
            self._repeat: 3,
            self._end_session: 1,
            self._spread: 6,
            self._increment_by_tool: 2,
            self._break_off: 1,
        }
        self._bridge: Bridge

    async def run(self, bridge: Bridge) -> None:
        """Work until the server has gone."""
        self._bridge = bridge
        actions, weights = list(self._actions), list(self._actions.values())
        try:
            while self._unsettled:
                await self._send(self._unsettled[0])
                self._unsettled.pop(0)
            while True:
                [action] = self._random.choices(actions, weights)
                await action()
        except grpc.aio.AioRpcError as error:
            self._ledger.endings[error.code().name] += 1
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._ledger.complaints.append(f"client {self._number}: no answer: {error.details()}")

    async def settle(self, bridge: Bridge) -> None:
        """Repeat all writes with a key and an unknown outcome."""
        self._bridge = bridge
        while self._unsettled:
            await self._send(self._unsettled[0])
            self._unsettled.pop(0)

    # Writing, with the outcome recorded

    def _new_write(self, targets: tuple[str, ...], *, keyed: bool, expected: int = 0, value: str = "") -> Write:
        self._count += 1
        token = f"{self._number}-{self._count}"
        key = f"key {token}" if keyed else None
        value = value or json.dumps(token + "." * self._random.choice(_PADDINGS))
        write = Write(token, SESSION, targets, value, key, expected, invoked_at=time.monotonic())
        self._ledger.writes[token] = write
        return write

    async def _send(self, write: Write) -> None:
        """Send the write and record the answer; raises `AioRpcError` if there is none."""
        try:
            versions = await (self._execute(write) if write.tool else self._ask(write))
        except grpc.aio.AioRpcError as error:
            # A server that drains does nothing about this attempt; one before it may have written.
            if not is_refusal(error) or (write.repeated and error.code() is grpc.StatusCode.UNAVAILABLE):
                raise
            self._conclude(write, "refused", {})
        else:
            self._conclude(write, "ok" if versions else "refused", versions)

    async def _try(self, write: Write) -> None:
        try:
            await self._send(write)
        except grpc.aio.AioRpcError:
            self._leave_open(write)
            raise

    def _leave_open(self, write: Write) -> None:
        """Repeat a write without an answer later, if it has a key."""
        if write.key is not None:
            write.repeated = True
            self._unsettled.append(write)
        else:
            write.settled = True

    def _conclude(self, write: Write, status: Any, versions: dict[str, int]) -> None:
        write.status, write.versions = status, versions
        write.returned_at = time.monotonic()
        write.settled = True
        if status == "ok" and write.key is not None:
            self._acknowledged.append(write)

    async def _ask(self, write: Write) -> dict[str, int]:
        metadata = {"token": write.token}
        value = json.loads(write.value)
        content = wire("integer" if isinstance(value, int) else "string", value)
        if len(write.targets) == 1:
            [target] = write.targets
            version = await self._bridge.set(
                write.session_id, target, content, metadata, expected=write.expected, key=write.key
            )
            return {target: version}
        request = pb.BatchSetVariablesRequest(session_id=write.session_id, metadata=metadata, atomic=True)
        for target in write.targets:
            request.updates[target].CopyFrom(content)
        response = await self._bridge.call("SetVariables", request, write.key)
        return dict(response.new_versions)

    async def _execute(self, write: Write) -> dict[str, int]:
        """Execute the write's tool and record its outcome; returns the versions, {} if it wrote nothing."""
        answer = await self._ask_tool(write)
        write.execution_id = answer.metadata.get("execution_id", "")
        if answer.code:
            # One that was refused did not begin.
            write.journal = _JOURNAL[answer.code] if write.execution_id else ""
            return {}
        write.journal, write.result = "committed", answer.result
        write.execution_id, write.sequence = answer.commit
        return _versions_in(answer.result)

    async def _ask_tool(self, write: Write) -> ToolAnswer:
        arguments: dict[str, object] = {"token": write.token, "pause_s": self._pauses[write.token]}
        if write.value:
            arguments |= {"targets": list(write.targets), "value": json.loads(write.value)}
        else:
            arguments["target"] = write.targets[0]
        ask = self._bridge.stream if write.tool.startswith("stream") else self._bridge.execute
        return await ask(SESSION, write.tool, arguments, key=write.key)

    # The actions of a client

    async def _set(self) -> None:
        target = self._random.choice(self._names.texts)
        await self._try(self._new_write((target,), keyed=self._random.random() < 0.5))

    async def _batch(self) -> None:
        targets = self._random.sample(self._names.texts, self._random.randint(2, _TEXTS))
        await self._try(self._new_write(tuple(targets), keyed=self._random.random() < 0.5))

    async def _spoilt_batch(self) -> None:
        """One entry is invalid, so nothing of the batch may be written."""
        await self._try(self._new_write((self._names.texts[0], "nobody"), keyed=self._random.random() < 0.5))

    async def _set_own(self) -> None:
        """Write a variable that no other client writes: its version counts this client's writes."""
        await self._try(self._new_write((self._names.own[self._number],), keyed=True))

    async def _read(self) -> None:
        target = self._random.choice(self._names.texts)
        invoked_at = time.monotonic()
        version, value = await self._bridge.get(SESSION, target)
        operation = Operation(self._number, "get", invoked_at, time.monotonic(), "ok", value, version)
        self._ledger.reads.setdefault(target, []).append(operation)

    async def _increment(self) -> None:
        """Increment a counter if it has not changed since the read; its value always equals its version."""
        target = self._random.choice(self._names.counters)
        version, _ = await self._bridge.get(SESSION, target)
        keyed = self._random.random() < 0.5
        await self._try(self._new_write((target,), keyed=keyed, expected=version, value=str(version + 1)))

    async def _repeat(self) -> None:
        """Repeat an answered request with its key: the answer must be the same, and nothing may be written."""
        if not self._acknowledged:
            return
        write = self._random.choice(self._acknowledged)
        if write.tool:
            await self._repeat_tool(write)
            return
        try:
            answer: object = await self._ask(write)
        except grpc.aio.AioRpcError as error:
            # A server that drains refuses everything.
            if not is_refusal(error) or error.code() is grpc.StatusCode.UNAVAILABLE:
                raise
            answer = error.details()
        if answer != write.versions:
            self._ledger.complaints.append(f"written twice: {write} was repeated and answered {answer}")

    async def _repeat_tool(self, write: Write) -> None:
        answer = await self._ask_tool(write)
        repeated = (answer.code, answer.result, answer.metadata.get("execution_id"))
        if repeated != ("", write.result, write.execution_id) or answer.commit[1] != write.sequence:
            self._ledger.complaints.append(f"written twice: {write} was repeated and answered {answer}")

    def _new_execution(self, tool: str, targets: Sequence[str], value: str | None = None) -> Write:
        write = self._new_write(tuple(targets), keyed=self._random.random() < 0.5)
        write.tool = tool
        if value is not None:
            write.value = value
        # A repetition has to be the same request.
        self._pauses[write.token] = round(self._random.choice([0.0, 0.002, 0.02, 0.1]), 3)
        return write

    async def _spread(self) -> None:
        """Write several variables in one execution, which may conflict with other writes."""
        tool = self._random.choice(["spread", "spread", "spread_async", "stream", "stream_async"])
        shared = self._random.sample(self._names.texts, self._random.randint(1, 2))
        own = [self._names.own[self._number], self._names.rolled[self._number]]
        await self._try(self._new_execution(tool, [own[0], *shared, own[1]]))

    async def _increment_by_tool(self) -> None:
        await self._try(self._new_execution("increment", [self._random.choice(self._names.counters)], value=""))

    async def _break_off(self) -> None:
        """Execute a tool that writes and then fails, so nothing may be written."""
        await self._try(self._new_execution("break_off", self._names.texts))

    async def _register_and_delete(self) -> None:
        self._count += 1
        token = f"{self._number}-{self._count}"
        write = Write(token, SESSION, (), '"short"', invoked_at=time.monotonic(), settled=True)
        self._ledger.writes[token] = write
        variable_id = await self._bridge.register(SESSION, f"short-{token}", "string", "short", {"token": token})
        write.targets, write.versions = (variable_id,), {variable_id: 0}
        _acknowledged(self._ledger, write)
        await self._try(self._new_write((variable_id,), keyed=False))
        request = pb.DeleteVariableRequest(session_id=SESSION, variable_identifier=variable_id)
        await self._bridge.call("DeleteVariable", request)
        self._ledger.deleted[variable_id] = time.monotonic()

    async def _roll_back(self) -> None:
        target = self._names.rolled[self._number]
        write = self._new_write((target,), keyed=False)
        await self._try(write)
        if write.status != "ok":
            return
        back_to = self._random.randint(0, write.versions[target])
        request = pb.RollbackVariableRequest(session_id=SESSION, variable_identifier=target, target_version=back_to)
        variable = (await self._bridge.call("RollbackVariable", request)).variable
        self._ledger.rollbacks.append(Rollback(target, variable.version, back_to, time.monotonic()))

    async def _end_session(self) -> None:
        self._count += 1
        session_id = f"short {self._number}-{self._count}"
        await self._bridge.begin(session_id)
        await self._bridge.call("CleanupSession", pb.CleanupSessionRequest(session_id=session_id))
        self._ledger.ended[session_id] = time.monotonic()


def _versions_in(result: Any) -> dict[str, int]:
    """The versions that a tool reports, in its result or in its chunks."""
    parts = result if isinstance(result, list) else [result or {}]
    return {target: version for part in parts for target, version in part.items()}


class Watcher:
    """Watches the shared session across kills; resumes after the last commit that it received completely."""

    def __init__(self, ledger: Ledger, position: int) -> None:
        self._ledger = ledger
        self.first = position
        self.commits: list[Commit] = []
        self.received_at: list[float] = []
        self._changed = asyncio.Event()

    @property
    def position(self) -> int:
        """The last commit that was received completely."""
        return self.commits[-1][0] if self.commits else self.first

    async def run(self, bridge: Bridge) -> None:
        """Watch until the server has gone."""
        parts: list[tuple[str, int]] = []
        try:
            async for update in bridge.watch(SESSION, self.position):
                if update.update_type not in ("value_change", "deleted"):
                    continue
                metadata = update.update_metadata
                parts.append((update.variable_id, update.variable.version))
                index, _, total = metadata["dspex.part"].partition("/")
                if int(index) != len(parts):
                    self._ledger.complaints.append(f"a watcher got part {index}/{total} as number {len(parts)}")
                if index == total:
                    self.commits.append((int(metadata["commit_sequence"]), tuple(sorted(parts))))
                    self.received_at.append(time.monotonic())
                    parts = []
                    self._changed.set()
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN):
                self._ledger.complaints.append(f"a watcher got {error.code()}: {error.details()}")

    async def reach(self, sequence: int) -> None:
        """Wait until a commit has been received."""
        while self.position < sequence:
            self._changed.clear()
            await self._changed.wait()
