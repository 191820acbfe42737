"""Clients that use one variable concurrently, and record each request, its answer and its times."""

import asyncio
import json
import math
import re
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from random import Random

import grpc
import grpc.aio

from dspex_persist.state.commands import GetVariable, SetVariable
from dspex_persist.state.errors import OutcomeUnknownError, StateError, VersionConflictError
from dspex_persist.state.model import Value
from dspex_persist.state.provider import StateProvider
from tests.concurrency.linearizability import Operation
from tests.faults.bridge import Bridge, is_refusal, wire

SESSION, NAME, INITIAL = "session", "variable", '"nothing yet"'
_CURRENT = re.compile(r"current version is (\d+)")


@dataclass
class RefusedError(Exception):
    """The server did nothing; `version` is the current one if the answer named it."""

    version: int | None


class UnknownError(Exception):
    """The outcome of the request is unknown."""


class Register(ABC):
    """One variable, over any backend. Values are JSON."""

    @abstractmethod
    async def get(self) -> tuple[int, str]:
        """Return version and value."""

    @abstractmethod
    async def set(self, value: str, expected: int) -> int:
        """Write and return the new version; raises `RefusedError` or `UnknownError`."""


class BridgeRegister(Register):
    """A variable on a server."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    @classmethod
    async def open(cls, bridge: Bridge, type_name: str = "string", value: str = INITIAL) -> "BridgeRegister":
        """Register the variable."""
        await bridge.begin(SESSION)
        await bridge.register(SESSION, NAME, type_name, json.loads(value), {})
        return cls(bridge)

    async def get(self) -> tuple[int, str]:
        return await self._bridge.get(SESSION, NAME)

    async def set(self, value: str, expected: int) -> int:
        try:
            return await self._bridge.set(SESSION, NAME, wire("string", json.loads(value)), {}, expected=expected)
        except grpc.aio.AioRpcError as error:
            if not is_refusal(error):
                raise UnknownError from error
            match = _CURRENT.search(error.details() or "")
            raise RefusedError(int(match[1]) if match is not None else None) from error


class EmbeddedRegister(Register):
    """A variable in an engine in this process."""

    def __init__(self, provider: StateProvider, type_name: str = "string", value: str = INITIAL) -> None:
        self._provider = provider
        provider.initialize_session(SESSION)
        provider.register_variable(SESSION, NAME, type_name, json.loads(value))

    async def get(self) -> tuple[int, str]:
        variable = await asyncio.wrap_future(self._provider.submit(GetVariable(SESSION, NAME)))
        return variable.version, variable.value.json

    async def set(self, value: str, expected: int) -> int:
        # As over the bridge, 0 means any version.
        command = SetVariable(SESSION, NAME, Value(value), {}, expected or None)
        try:
            return await asyncio.wrap_future(self._provider.submit(command))
        except OutcomeUnknownError as error:
            raise UnknownError from error
        except VersionConflictError as error:
            raise RefusedError(error.actual) from error
        except StateError as error:
            raise RefusedError(None) from error


async def record(register: Register, *, clients: int, operations: int, seed: int) -> list[Operation]:
    """Return the history of concurrent clients with `operations` calls each: reads, plain and conditional writes."""
    histories = await asyncio.gather(
        *(_record_one(register, number, operations, Random(f"{seed}/{number}")) for number in range(clients))
    )
    return [operation for history in histories for operation in history]


async def _record_one(register: Register, number: int, operations: int, random: Random) -> list[Operation]:
    history: list[Operation] = []
    seen = 0
    for count in range(operations):
        if random.random() < 0.5:
            began = time.monotonic()
            seen, value = await register.get()
            history.append(Operation(number, "get", began, time.monotonic(), "ok", value, seen))
        else:
            expected = random.choice([0, seen])
            history.append(await _set(register, number, json.dumps(f"{number}-{count}"), expected))
            seen = history[-1].version or seen
        # An engine in this process answers reads at once, so without this the other clients would never run.
        await asyncio.sleep(0)
    return history


async def _set(register: Register, number: int, value: str, expected: int) -> Operation:
    began = time.monotonic()
    try:
        version = await register.set(value, expected)
    except RefusedError as error:
        return Operation(number, "set", began, time.monotonic(), "refused", value, error.version, expected)
    except UnknownError:
        return Operation(number, "set", began, math.inf, "unknown", value, None, expected)
    return Operation(number, "set", began, time.monotonic(), "ok", value, version, expected)


async def increment(register: Register, times: int) -> int:
    """Add one, `times` times, in competition with the others; returns the number of attempts."""
    attempts = 0
    for _ in range(times):
        while True:
            attempts += 1
            version, value = await register.get()
            try:
                await register.set(str(int(value) + 1), version)
            except RefusedError:
                continue
            break
    return attempts
