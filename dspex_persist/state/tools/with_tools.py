"""WithTools: adds the execution of tools to a provider."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Final, TypeVar, Unpack, cast

from dspex_persist.infra import forks
from dspex_persist.infra.futures import failed
from dspex_persist.infra.mailbox import LoopMailbox, Reply
from dspex_persist.state import arguments, commands, values
from dspex_persist.state.abilities import StreamsTools, Transaction, Transacts, new_recording_id
from dspex_persist.state.around import Around
from dspex_persist.state.budgets import NO_BUDGET, Budget
from dspex_persist.state.commands import Command
from dspex_persist.state.commands.base import check_text
from dspex_persist.state.errors import (
    EngineClosedError,
    InvalidArgumentError,
    StateError,
    ToolFailedError,
    UnsupportedError,
)
from dspex_persist.state.limits import Limits
from dspex_persist.state.meter import Meter
from dspex_persist.state.model import (
    PART,
    RECORDING,
    RECORDING_ID,
    TRANSACTION,
    Isolation,
    Origin,
    RegisteredTool,
    ToolOutcome,
    ToolSpec,
)
from dspex_persist.state.options import check_count
from dspex_persist.state.peers import Peers
from dspex_persist.state.provider import TOOL_TIMEOUT_S, StateProvider, SubmitHere, Who, fault_of, or_empty
from dspex_persist.state.tools.chunks import ChunkQueue
from dspex_persist.state.tools.home import Home
from dspex_persist.state.tools.invoke import Invoker
from dspex_persist.state.tools.local import local_tools
from dspex_persist.state.tools.pooled import POOL, PassedTool, PoolPort, pooled_tools
from dspex_persist.state.tools.ports import RemotePort, RunnableTool, ToolCode, check_tools
from dspex_persist.state.tools.remote import RemoteTool
from dspex_persist.state.tools.requests import ToolRequest, request_of
from dspex_persist.state.tools.runner import ToolRunner
from dspex_persist.state.tools.session import current_session, current_transaction_id
from dspex_persist.state.tools.transactions import LocalTransaction, OpenTransaction

R = TypeVar("R")

TOOL_THREADS: Final = 64
"""The default for how many tools without `async` run at a time."""


class WithTools(Around, StreamsTools, Transacts):
    """A provider that executes tools over another provider. Closing it closes that one, too.

    Args:
        provider: Has the sessions. Every command that is not about executing tools goes to it unchanged.
        tools: The tools of this process, by name. Without tools and without `remote` no tool can be executed.
        threads: How many tools without `async` run at a time.
        limits: The limits of results and journals; use those of the provider.
        budget: What the recorded LM calls of each session may use.
        remote: Calls the tools that workers have registered for their sessions; without it these cannot be executed.
        pool: Where the code of the tools runs; by default in this process.
        passed: Tools that only the workers of pools have.
        pools: The pools, by the name under which their workers register tools.
        home: The event loop that runs the executions and their timeouts; by default a separate loop on a thread.
        meter: Counts executions and LM calls; None not to count.

    Raises:
        InvalidArgumentError: `tools` is not a mapping, or `threads` is not a positive number.
    """

    def __init__(
        self,
        provider: StateProvider,
        tools: Mapping[str, ToolCode] | None = None,
        *,
        threads: int = TOOL_THREADS,
        limits: Limits | None = None,
        budget: Budget = NO_BUDGET,
        remote: RemotePort | None = None,
        pool: PoolPort | None = None,
        passed: Iterable[RunnableTool] = (),
        pools: Mapping[str, PoolPort] | None = None,
        home: asyncio.AbstractEventLoop | None = None,
        meter: Meter | None = None,
    ) -> None:
        check_count("tool_threads", threads)
        check_tools(tools)
        super().__init__(provider)
        limits = limits or Limits()
        self._home = Home(home)
        self._invoker = Invoker(self._home, threads, limits)
        own = tools or {}
        runnable = local_tools(own, self._invoker) if pool is None else pooled_tools(own, self._invoker, pool)

        def registered(tool: RegisteredTool) -> RunnableTool:
            at = (pools or {}).get(tool.address.removeprefix(POOL)) if tool.address.startswith(POOL) else None
            return RemoteTool(tool, remote, limits) if at is None else PassedTool(tool, at, limits)

        self.runner = ToolRunner(
            provider,
            self._home,
            runnable | {tool.spec.name: tool for tool in passed},
            registered=registered,
            limits=limits,
            budget=budget,
            meter=meter,
            pools=(pools or {}).values(),
            peers=provider if isinstance(provider, Peers) else None,
        )
        self._can_execute = bool(self.runner.catalog.own) or remote is not None
        # The commands that do not simply go to the provider.
        self._own: dict[type[Command[Any]], Callable[[Any, Origin], Future[Any]]] = {
            commands.CleanupSession: self._cleanup_session
        }
        if self._can_execute:
            self._own |= {
                commands.ExecuteTool: self._execute,
                commands.RegisterTools: self._register,
                commands.GetSession: self._get_session,
            }
        self._closing = threading.Lock()
        self._closed = self._is_forked = False
        forks.register(self)

    @property
    def capabilities(self) -> frozenset[str]:
        """See `StateProvider.capabilities`."""
        capabilities = super().capabilities
        return capabilities if self._can_execute else capabilities - {"tools"}

    def submit(self, command: Command[R], origin: Origin | None = None) -> Future[R]:
        """See `StateProvider.submit`. Executes tools itself, and passes all other commands to the provider."""
        own = self._own.get(type(command))
        if own is None:
            return self.provider.submit(command, origin)
        fault = fault_of(command, origin)
        if fault is not None:
            return failed(fault)
        return own(command, origin or self.default_origin(command.cause))

    def run(self, command: Command[R], idempotency_key: str | None = None, **who: Unpack[Who]) -> R:
        """See `StateProvider.run`."""
        if type(command) not in self._own:
            return self.provider.run(command, idempotency_key, **who)
        if isinstance(command, commands.ExecuteTool):
            return cast(R, self._run_tool(command, self.origin(command.cause, idempotency_key, **who)))
        return super().run(command, idempotency_key, **who)

    def on_loop(self, mailbox: LoopMailbox) -> SubmitHere:
        """See `StateProvider.on_loop`."""
        own, others = super().on_loop(mailbox), self.provider.on_loop(mailbox)

        def submit(command: Command[R], origin: Origin | None = None) -> Reply[R]:
            return (own if type(command) in self._own else others)(command, origin)

        return submit

    def _execute(self, command: commands.ExecuteTool, origin: Origin) -> Future[Any]:
        if self._closed:
            return failed(EngineClosedError())
        return self.runner.submit(request_of(command, origin), asker_id=_asker_id())

    def _run_tool(self, command: commands.ExecuteTool, origin: Origin) -> ToolOutcome:
        fault = fault_of(command, origin)
        if fault is None and self._closed:
            fault = EngineClosedError()
        if fault is not None:
            raise fault
        return self.runner.run(request_of(command, origin), asker_id=_asker_id())

    def _register(self, command: commands.RegisterTools, origin: Origin) -> Future[Any]:
        """Reserve the names of this process's tools, so that no worker can register a tool under one of them."""
        return self.provider.submit(replace(command, reserved=frozenset(self.runner.catalog.own)), origin)

    def _get_session(self, command: commands.GetSession, origin: Origin) -> Future[Any]:
        names = frozenset((*self.runner.catalog.own, *self.runner.catalog.of_pools.known))
        return self.provider.submit(replace(command, besides=names), origin)

    def _cleanup_session(self, command: commands.CleanupSession, origin: Origin) -> Future[Any]:
        """End a session, and what runs in it: nothing that it does can be kept."""
        session_id = command.session_id

        def end(done: Future[int]) -> None:
            is_done = not done.cancelled() and done.exception() is None
            if is_done and not self._is_forked and self.runner.running.has_executions(session_id):
                with contextlib.suppress(EngineClosedError):
                    self.runner.start(self.runner.running.end_executions(session_id))

        future = self.provider.submit(command, origin)
        future.add_done_callback(end)
        return future

    def list_tools(self, session_id: str = "") -> tuple[ToolSpec, ...]:
        """List the tools of this process and, for a session, those that its workers have registered."""
        self.provider.check_open()
        arguments.text("session_id", session_id)
        own = self.runner.catalog.own
        registered = self.provider.run(commands.ListTools(session_id)) if session_id else {}
        others = {**self.runner.catalog.of_pools.known, **registered}
        theirs = (tool.spec for name, tool in others.items() if name not in own)
        return (*(tool.spec for tool in own.values()), *theirs)

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
        encoded = values.encode_arguments(or_empty(parameters))
        command = commands.ExecuteTool(session_id, tool, encoded, or_empty(metadata))
        command.check()
        self._check_runs(command)
        chunks = ChunkQueue()
        request = request_of(command, self.origin("ExecuteStreamingTool", **who))
        done = self.runner.submit(request, chunks.emit, asker_id=_asker_id())
        own = self.runner.catalog.own.get(tool)
        result_type = own.result_type if own is not None else ""
        try:
            for chunk in chunks.take_until(done):
                yield values.decode_loosely(chunk, result_type)
        finally:
            if not self._is_forked:
                done.cancel()
        # In a forked child the chunks end early; this raises there.
        self.provider.check_open()
        outcome = done.result()
        if not outcome.success:
            raise outcome.error or ToolFailedError(outcome.execution_id, outcome.error_code)
        if not outcome.streamed and outcome.result is not None and outcome.result.json != "null":
            yield values.decode_loosely(outcome.result, outcome.result_type)

    def submit_transaction(
        self,
        session_id: str,
        *,
        isolation: Isolation | str = Isolation.SERIALIZABLE,
        timeout_s: float = TOOL_TIMEOUT_S,
        metadata: Mapping[str, str] | None = None,
        origin: Origin | None = None,
    ) -> Future[Transaction]:
        """See `Transacts.submit_transaction`."""
        try:
            self._check_open()
            request, level = self.transaction_request(session_id, isolation, timeout_s, or_empty(metadata), origin)
            return self.runner.start(self._begin(request, level, _asker_id()))
        except StateError as error:
            return failed(error)

    def submit_recording(
        self,
        session_id: str,
        name: str = RECORDING,
        *,
        metadata: Mapping[str, str] | None = None,
        origin: Origin | None = None,
    ) -> Future[Transaction]:
        """See `Transacts.submit_recording`."""
        try:
            self._check_open()
            request, level = self.transaction_request(
                session_id, Isolation.SNAPSHOT, None, or_empty(metadata), origin, recording=name
            )
            return self.runner.start(self._begin(request, level, None, takes_turns=False))
        except StateError as error:
            return failed(error)

    def transaction_request(
        self,
        session_id: str,
        isolation: Isolation | str,
        timeout_s: float | None,
        metadata: Mapping[str, str],
        origin: Origin | None,
        *,
        recording: str | None = None,
    ) -> tuple[ToolRequest, Isolation]:
        """Return the request for a transaction, and its isolation; raises for arguments that are wrong.

        Args:
            session_id: The session.
            isolation: See `submit_transaction`.
            timeout_s: How long it may last, in seconds; None for as long as its client wants.
            metadata: Texts to record with it.
            origin: Who makes the request.
            recording: The name of the recording, if it is one.
        """
        tool = TRANSACTION if recording is None else recording
        command = commands.ExecuteTool(session_id, tool, {}, metadata, timeout_s)
        fault = fault_of(command, origin)
        if fault is not None:
            raise fault
        if timeout_s is not None:
            arguments.timeout("timeout_s", timeout_s)
        if recording is not None:
            check_text("name", recording, self.runner.limits.name_length, "name_length")
            # The name may be that of a tool.
            known = {RECORDING_ID: new_recording_id(), PART: "1"}
            command = replace(command, metadata={**known, **metadata})
        request = request_of(command, origin or self.default_origin("BeginTransaction"))
        if request.idempotency_key is not None:
            raise InvalidArgumentError("idempotency_key", "a transaction has none, as no call repeats it as a whole")
        return request, arguments.member("isolation", isolation, Isolation)

    async def _begin(
        self, request: ToolRequest, isolation: Isolation, asker_id: str | None, *, takes_turns: bool = True
    ) -> Transaction:
        try:
            opened = await OpenTransaction.begin(self.runner, request, isolation, asker_id, takes_turns=takes_turns)
        except asyncio.CancelledError:
            if not self._closed:
                raise
            raise EngineClosedError() from None
        return LocalTransaction(self.runner, self._home, opened)

    def _check_runs(self, command: commands.ExecuteTool) -> None:
        """Raise if no tool can be executed."""
        if not self._can_execute:
            # The provider's own error says why.
            self.provider.run(command)
            raise UnsupportedError(self.lacking, self.instead)
        self._check_open()

    def _check_open(self) -> None:
        self.provider.check_open()
        if self._closed:
            raise EngineClosedError()

    def close(self) -> None:
        """Interrupt running executions, then close the provider."""
        self._end(self.provider.close)

    def discard(self) -> None:
        """See `StateProvider.discard`."""
        self._end(self.provider.discard)

    def _end(self, close: Callable[[], None]) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
            if not self._is_forked:
                self.interrupt()
            close()

    def interrupt(self) -> None:
        """Interrupt running executions and refuse new ones; the provider stays open.

        It does not wait for code that keeps running, whose writes are refused from now on.
        """
        self._closed = True
        self.runner.drain()
        self._home.close()
        self._invoker.close()

    def forked(self, *, quiet: bool) -> None:
        """Leave every command to the provider, which refuses it in a child process. See `forks.ForkListener`."""
        self._is_forked = True
        self._own = {}
        self._closing = threading.Lock()


def _asker_id() -> str | None:
    """Return the transaction whose block asks for an execution; the context has the session of a tool that does."""
    return current_transaction_id() if current_session.get() is None else None
