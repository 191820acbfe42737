"""Runs the commands of rpcs, on the provider or inside the tool execution that the call names."""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Final, TypeVar

from google.protobuf.message import Message

from dspex_persist.infra.logs import DEBUG, EventLogger, get_logger
from dspex_persist.infra.mailbox import LoopMailbox
from dspex_persist.state import values
from dspex_persist.state.bridge.capabilities import bare
from dspex_persist.state.bridge.headers import EXECUTION_ID, EXPECTED_VERSION, RPC_ID
from dspex_persist.state.bridge.incoming import Call, Context, RequestHeaders, fitting
from dspex_persist.state.bridge.rpcs.base import Rpc
from dspex_persist.state.commands import Command, SetVariable
from dspex_persist.state.errors import (
    ExecutionNotFoundError,
    InvalidArgumentError,
    StateError,
    VariableReplacedError,
)
from dspex_persist.state.model import Origin
from dspex_persist.state.tools.execution import Execution
from dspex_persist.state.tools.touched import is_transactional, may_block
from dspex_persist.state.tools.with_tools import WithTools

R = TypeVar("R")
S = TypeVar("S")
C = TypeVar("C", bound=Command[Any])

_MUCH_BYTES: Final = 100_000
_MOST_READINGS: Final = 3
_READER = Origin(actor="", cause="read")
_logger: Final = get_logger(__name__)


def methods(rpcs: Iterable[Any], name: str) -> Callable[[type[S]], type[S]]:
    """Return a class decorator that adds a method for each rpc.

    The method calls the class's method `name` with the rpc, the request and the context. An rpc for which the class
    already has a method keeps that one.
    """

    def give(servicer: type[S]) -> type[S]:
        for rpc in rpcs:
            if not hasattr(servicer, rpc.name):
                setattr(servicer, rpc.name, _method(rpc, getattr(servicer, name)))
        return servicer

    return give


def _method(rpc: Any, run: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def method(servicer: object, request: Message, context: Context) -> Any:
        return await run(servicer, rpc, request, context)

    return method


class Calls:
    """Runs the commands of rpcs, on the provider or inside the tool execution that the call names.

    Made and used on one event loop.

    Args:
        provider: Runs the commands.
        max_message_bytes: The largest answer.
    """

    def __init__(self, provider: WithTools, max_message_bytes: int) -> None:
        self._provider = provider
        self._runner = provider.runner
        self._limits = provider.runner.limits
        self._max_message_bytes = max_message_bytes
        self._mailbox = LoopMailbox(asyncio.get_running_loop())
        self._submit = provider.on_loop(self._mailbox)

    def belongs(self, context: Context) -> bool:
        """Return whether the call is part of a running execution, and so is accepted while the server drains."""
        shown = RequestHeaders(context).find(EXECUTION_ID)
        return shown is not None and self._runner.running.is_running(bare(shown))

    def _call(self, context: Context) -> Call:
        return Call(context, self._limits, self._max_message_bytes)

    async def answer(self, rpc: Rpc[Any, Any], request: Any, context: Context) -> Any:
        """Run the command of an rpc, and return the response with its result."""
        call = self._call(context)
        command = await self._command(rpc, request, call)
        try:
            if rpc.first is not None:
                call.first = await self._read(rpc.first(command), call)
            result = None if rpc.instead is None else await self._read_instead(rpc.instead(command), command, call)
            if result is None:
                result = await (self._write(command, call) if command.writes else self._read(command, call))
        except ExecutionNotFoundError as error:
            await self._runner.running.check_elsewhere(error.execution_id)
            raise
        if rpc.log is not None:
            rpc.log(self._log(rpc.name, command.session_id, call), command, result)
        response = rpc.response_of(result, call)
        if call.trailers:
            context.set_trailing_metadata(tuple(call.trailers))
        return fitting(response, self._max_message_bytes) if rpc.is_list else response

    async def _command(self, rpc: Rpc[C, Any], request: Any, call: Call) -> C:
        """The command in a request. A large request is parsed on a thread, so that it does not hold up the loop."""
        if rpc.size_of is not None and rpc.size_of(request, self._limits) > _MUCH_BYTES:
            return await asyncio.to_thread(rpc.command_of, request, call)
        return rpc.command_of(request, call)

    async def _read(self, command: Command[R], call: Call) -> R:
        execution = self._execution_of(command, call)
        if execution is not None:
            return await _run_within(execution, command, _READER)
        reply = self._submit(command, _READER)
        call.from_memory = reply.done()
        try:
            return await reply
        finally:
            # It refers to its error, whose traceback refers to this frame: this breaks the cycle.
            del reply

    async def _read_instead(self, reading: Command[R], command: Command[R], call: Call) -> R | None:
        if call.header(EXPECTED_VERSION) is not None or call.origin(command.cause).idempotency_key is not None:
            return None
        return await self._read(reading, call)

    async def _write(self, command: Command[R], call: Call) -> R:
        try:
            if call.header(EXPECTED_VERSION) is not None and not isinstance(command, SetVariable):
                # Without an error, the client would rely on a check that does not happen.
                raise InvalidArgumentError(EXPECTED_VERSION, f"{command.cause} has none: only SetVariable does")
            execution = self._execution_of(command, call)
            origin = call.origin(command.cause)
            if execution is not None:
                return await _after_reading(
                    command,
                    partial(execution.read_ahead, command, strict=True),
                    partial(_run_within, execution, command, origin),
                )
            return await _after_reading(
                command,
                partial(self._provider.read_ahead, command, origin),
                lambda: self._submit(command, origin),
            )
        except StateError as error:
            if self._logs_details:
                # Only the type of the error, because its text may quote a value.
                self._log(command.cause, command.session_id, call).debug("refused", error=type(error).__name__)
            raise

    def _execution_of(self, command: Command[Any], call: Call) -> Execution | None:
        execution_id = call.header(EXECUTION_ID)
        if execution_id is None or not is_transactional(command):
            return None
        return self._runner.running.find(execution_id)

    @property
    def _logs_details(self) -> bool:
        """Whether `debug` events of `_log` are logged. Building one for nothing costs as much as reading a variable."""
        return _logger.is_on(DEBUG)

    def _log(self, rpc: str, session_id: str, call: Call) -> EventLogger:
        """A logger with the rpc, the session and the call's id, which the client sends or this method makes up."""
        return _logger.bind(rpc=rpc, session_id=session_id, rpc_id=call.header(RPC_ID) or secrets.token_hex(4))


async def _after_reading(command: Command[R], read: Callable[[], object], run: Callable[[], Awaitable[R]]) -> R:
    """Run a command after parsing its large values on a thread, so that they hold up neither the loop nor the writer.

    If the variables are replaced meanwhile, the values are parsed again.
    """
    if command.json_length <= values.LONG_JSON:
        return await run()
    for _ in range(_MOST_READINGS - 1):
        await asyncio.to_thread(read)
        with contextlib.suppress(VariableReplacedError):
            return await run()
    await asyncio.to_thread(read)
    return await run()


async def _run_within(execution: Execution, command: Command[R], origin: Origin) -> R:
    if may_block(command):
        return await asyncio.to_thread(execution.run, command, origin)
    return execution.run(command, origin)
