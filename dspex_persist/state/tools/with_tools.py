"""WithTools: a provider that executes tools, made of one that does not."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Final, TypeVar

from dspex_persist.infra import forks
from dspex_persist.infra.futures import failed, mapped
from dspex_persist.state import arguments, commands, values
from dspex_persist.state.abilities import StreamsTools
from dspex_persist.state.around import Around
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import EngineClosedError, ToolFailedError, UnsupportedError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Origin, ToolSpec
from dspex_persist.state.options import check_count
from dspex_persist.state.provider import StateProvider, fault_of, or_empty
from dspex_persist.state.tools.chunks import ChunkQueue
from dspex_persist.state.tools.home import Home
from dspex_persist.state.tools.invoke import Invoker
from dspex_persist.state.tools.local import local_tools
from dspex_persist.state.tools.ports import RemotePort, ToolCode, check_tools
from dspex_persist.state.tools.remote import RemoteTool
from dspex_persist.state.tools.requests import request_of
from dspex_persist.state.tools.runner import ToolRunner

R = TypeVar("R")

TOOL_THREADS: Final = 64
"""How many plain tools run at a time where nobody says otherwise."""


class WithTools(Around, StreamsTools):
    """`provider`, and the execution of `tools` over it, on up to `threads` threads; it closes the provider, too.

    `remote` reaches the tools that sessions' workers have registered; without it these cannot be executed. `home`: the
    event loop that keeps the executions' time, by default one of their own. With neither tools nor `remote` nothing can
    be executed, and the provider says so.

    Raises `InvalidArgumentError` for what are no tools, and for no number of threads.
    """

    def __init__(
        self,
        provider: StateProvider,
        tools: Mapping[str, ToolCode] | None = None,
        *,
        threads: int = TOOL_THREADS,
        limits: Limits | None = None,
        remote: RemotePort | None = None,
        home: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        check_count("tool_threads", threads)
        check_tools(tools)
        super().__init__(provider)
        limits = limits or Limits()
        self._home = Home(home)
        self._invoker = Invoker(self._home, threads, limits)
        self.runner = ToolRunner(
            provider.submit,
            self._home,
            local_tools(tools or {}, self._invoker),
            registered=lambda tool: RemoteTool(tool, remote, limits),
            limits=limits,
        )
        self._can_execute = bool(tools) or remote is not None
        # What this does instead of the provider, or on top of it.
        self._own: dict[type[Command[Any]], Callable[[Any, Origin], Future[Any]]] = {}
        if self._can_execute:
            self._own = {
                commands.ExecuteTool: self._execute,
                commands.RegisterTools: self._register,
                commands.GetSession: self._get_session,
            }
        self._closing = threading.Lock()
        self._closed = self._is_forked = False
        forks.tell(self)

    def submit(self, command: Command[R], origin: Origin | None = None) -> Future[R]:
        """Execute a tool; have the provider carry out every other command."""
        own = self._own.get(type(command))
        if own is None:
            return self.provider.submit(command, origin)
        fault = fault_of(command, origin)
        if fault is not None:
            return failed(fault)
        return own(command, origin or self.default_origin(command.cause))

    def _execute(self, command: commands.ExecuteTool, origin: Origin) -> Future[Any]:
        if self._closed:
            return failed(EngineClosedError())
        return self.runner.submit(request_of(command, origin))

    def _register(self, command: commands.RegisterTools, origin: Origin) -> Future[Any]:
        """Nobody else's tool gets a name of its own ones."""
        return self.provider.submit(replace(command, reserved=frozenset(self.runner.tools)), origin)

    def _get_session(self, command: commands.GetSession, origin: Origin) -> Future[Any]:
        count = len(self.runner.tools)
        found = self.provider.submit(command, origin)
        return mapped(found, lambda summary: replace(summary, tool_count=summary.tool_count + count))

    def list_tools(self, session_id: str = "") -> tuple[ToolSpec, ...]:
        """Its own tools, and those that the session's workers have registered."""
        self.provider.check_open()
        arguments.text("session_id", session_id)
        own = self.runner.tools
        registered = self.provider.run(commands.ListTools(session_id)) if session_id else {}
        theirs = (tool.spec for name, tool in registered.items() if name not in own)
        return (*(tool.spec for tool in own.values()), *theirs)

    def stream_tool(
        self,
        session_id: str,
        tool: str,
        parameters: Mapping[str, object] | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> Iterator[object]:
        """See `StreamsTools`."""
        encoded = values.encode_arguments(or_empty(parameters))
        command = commands.ExecuteTool(session_id, tool, encoded, or_empty(metadata))
        command.check()
        self._check_runs(command)
        chunks = ChunkQueue()
        request = request_of(command, self.default_origin("ExecuteStreamingTool"))
        done = self.runner.submit(request, chunks.emit)
        own = self.runner.tools.get(tool)
        result_type = own.result_type if own is not None else ""
        try:
            for chunk in chunks.take_until(done):
                yield values.decode_loosely(chunk, result_type)
        finally:
            if not self._is_forked:
                done.cancel()
        # In a child nothing comes any more.
        self.provider.check_open()
        outcome = done.result()
        if not outcome.success:
            raise outcome.error or ToolFailedError(outcome.execution_id, outcome.error_code)
        if not outcome.streamed and outcome.result is not None and outcome.result.json != "null":
            yield values.decode_loosely(outcome.result, outcome.result_type)

    def _check_runs(self, command: commands.ExecuteTool) -> None:
        """Raise why nothing can be executed here, if nothing can."""
        if not self._can_execute:
            # Which says why not.
            self.provider.run(command)
            raise UnsupportedError(self.lacking, self.instead)
        self.provider.check_open()
        if self._closed:
            raise EngineClosedError()

    def close(self) -> None:
        """Interrupt what runs, then close the provider."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            if not self._is_forked:
                self.interrupt()
            self.provider.close()

    def interrupt(self) -> None:
        """End what runs, and begin no more; the provider goes on. Nobody waits for code that goes on all the same: it
        can keep nothing any more."""
        self._closed = True
        self.runner.drain()
        self._home.close()
        self._invoker.close()

    def forked(self, *, quiet: bool) -> None:
        """In a child the provider refuses everything, tools included. See `forks.Heir`."""
        self._is_forked = True
        self._own = {}
        self._closing = threading.Lock()
