"""The contract on two servers that share a log in memory, whose calls alternate."""

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, ClassVar, TypeVar

import pytest

from dspex_persist.state.abilities import Holdable, SessionHold
from dspex_persist.state.commands import Command
from dspex_persist.state.model import Origin
from dspex_persist.state.options import SessionOptions
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.shared import HoldingState, SharedGroups, SharedState
from dspex_persist.state.tools.with_tools import WithTools
from dspex_persist.state.watch import Watch
from dspex_persist.testing.contract_tools import CONTRACT_TOOLS
from dspex_persist.testing.hold_contract import HoldContract
from dspex_persist.testing.order_contract import OrderContract
from dspex_persist.testing.provider_contract import SMALL_LIMITS, LeaseContract, ProviderContract
from dspex_persist.testing.shared_memory_log import SharedMemory, SharedMemoryLog
from dspex_persist.testing.tool_contract import ToolContract
from dspex_persist.testing.transaction_contract import TransactionContract
from tests.advancing import check_always
from tests.deadline import within

R = TypeVar("R")


class Alternating(StateProvider, Holdable):
    """Several servers behind a balancer: each call goes to the next one, once the calls before it are answered."""

    def __init__(self, servers: Sequence[SharedState]) -> None:
        self._servers = servers
        self._next = itertools.cycle(servers)
        self._holders = itertools.cycle(servers)
        self._server = servers[0]
        self._pending: list[Future[Any]] = []
        self._lock = threading.Lock()
        for each in servers:
            check_always(each._shared.log)

    def submit(self, command: Command[R], origin: Origin | None = None) -> Future[R]:
        with self._lock:
            self._pending = [future for future in self._pending if not future.done()]
            if not self._pending:
                self._server = next(self._next)
            future = self._server.submit(command, origin)
            self._pending.append(future)
            return future

    def watch(self, session_id: str, identifiers: Sequence[str] = (), *, after_sequence: int | None = None) -> Watch:
        # All on one server: each has its own limit of watches. Half of what they see others have written.
        return self._servers[-1].watch(session_id, identifiers, after_sequence=after_sequence)

    def close(self) -> None:
        for each in self._servers:
            each.close()

    def hold_session(self, session_id: str, *, timeout_s: float = 30.0, origin: Origin | None = None) -> SessionHold:
        """Have the next server hold it, and wait until each has heard of that: whoever calls then is to wait there."""
        with self._lock:
            holder = next(self._holders)
        held = Holdable.of(holder).hold_session(session_id, timeout_s=timeout_s, origin=origin)
        deadline = time.monotonic() + within(10)
        while not all(each._groups.held.get(session_id) for each in self._servers):
            assert time.monotonic() < deadline, "a server has not heard of it"
            time.sleep(0.001)
        return held

    def check_open(self) -> None:
        self._servers[0].check_open()

    def default_origin(self, cause: str, idempotency_key: str | None = None) -> Origin:
        return self._servers[0].default_origin(cause, idempotency_key)


def servers(count: int, options: SessionOptions, *, optimistic: bool) -> list[SharedState]:
    memory = SharedMemory()
    logs = [SharedMemoryLog(memory, optimistic=optimistic) for _ in range(count)]
    return [HoldingState(SharedGroups(log, options)) for log in logs]


@pytest.fixture(scope="class")
def alternating(request: pytest.FixtureRequest) -> Iterator[Alternating]:
    with Alternating(servers(2, request.cls.options, optimistic=request.cls.optimistic)) as provider:
        yield provider


class Shared:
    options: ClassVar[SessionOptions] = SessionOptions(limits=SMALL_LIMITS)
    optimistic: ClassVar[bool] = False

    @pytest.fixture
    def provider(self, alternating: Alternating) -> StateProvider:
        return alternating


@pytest.mark.thorough
class TestShared(Shared, ProviderContract, HoldContract):
    """Servers that take turns."""


class TestSharedOptimistic(Shared, ProviderContract, HoldContract):
    """Servers that overtake each other."""

    optimistic = True


class TestSharedLeases(Shared, LeaseContract):
    options = SessionOptions(optimization_lease_s=LeaseContract.lease_s)


@pytest.fixture(scope="class")
def single(request: pytest.FixtureRequest) -> Iterator[SharedState]:
    (provider, other) = servers(2, SessionOptions(limits=SMALL_LIMITS), optimistic=False)
    with provider, other:
        yield provider


class TestOneServer(OrderContract):
    @pytest.fixture
    def provider(self, single: SharedState) -> StateProvider:
        return single


@pytest.fixture(scope="class")
def with_tools() -> Iterator[WithTools]:
    engine, other = servers(2, SessionOptions(), optimistic=False)
    with WithTools(engine, CONTRACT_TOOLS) as provider, other:
        yield provider


class TestSharedTools(ToolContract, TransactionContract):
    # This engine keeps no recordings.
    test_what_is_recorded_is_in_the_journal_however_it_ends = None

    @pytest.fixture
    def provider(self, with_tools: WithTools) -> StateProvider:
        return with_tools
