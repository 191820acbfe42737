"""How every rpc goes: who asks, what it says beside its message, where its command is carried out."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sized
from concurrent.futures import Future
from typing import Any, Final, TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message

from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.mailbox import LoopMailbox
from dspex_persist.state.commands import Command, SetVariable
from dspex_persist.state.errors import InvalidArgumentError, LimitExceededError, StateError, quote
from dspex_persist.state.model import Origin, Source
from dspex_persist.state.rpc.headers import (
    ACTOR,
    BINARY,
    EXECUTION_ID,
    EXPECTED_VERSION,
    IDEMPOTENCY_KEY,
    OPTIMIZER_ID,
    RPC_ID,
    SOURCE,
)
from dspex_persist.state.tools.execution import Execution, is_transactional, may_block
from dspex_persist.state.tools.with_tools import WithTools

R = TypeVar("R")
S = TypeVar("S")
M = TypeVar("M", bound=Message)
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_ACTOR_LENGTH = 255
_MUCH_BYTES: Final = 100_000
_READER = Origin(actor="", cause="read")
_logger: Final = get_logger(__name__)


def methods(rpcs: Iterable[Any], name: str) -> Callable[[type[S]], type[S]]:
    """Give a class a method for each of the rpcs, which calls its method `name` with it, the request and the context.

    A method that the class has for an rpc itself stays.
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
    """Carries out commands for rpcs: on the provider, or inside the tool execution that a call names.

    Made and used on one event loop.
    """

    def __init__(self, provider: WithTools) -> None:
        self._provider = provider
        self._runner = provider.runner
        self._limits = provider.runner.limits
        self._mailbox = LoopMailbox(asyncio.get_running_loop())

    def belongs(self, context: Context) -> bool:
        """Whether the call is part of an execution that runs: then it is let in while the server drains."""
        execution_id = header(context, EXECUTION_ID)
        return execution_id is not None and self._runner.is_running(execution_id)

    async def _read(self, command: Command[R], context: Context) -> R:
        execution = self._execution_of(command, context)
        if execution is not None:
            return await _run_within(execution, command, _READER)
        return await self._mailbox.result(self._submit_read(command))

    def _submit_read(self, command: Command[R]) -> Future[R]:
        return self._provider.submit(command, _READER)

    async def _write(self, command: Command[R], context: Context) -> R:
        try:
            if header(context, EXPECTED_VERSION) is not None and not isinstance(command, SetVariable):
                # Whoever sends it counts on it.
                raise InvalidArgumentError(EXPECTED_VERSION, f"{command.cause} has none: only SetVariable does")
            execution = self._execution_of(command, context)
            origin = origin_of(command.cause, context)
            if execution is not None:
                return await _run_within(execution, command, origin)
            return await self._mailbox.result(self._provider.submit(command, origin))
        except StateError as error:
            # The kind of error only: its text may quote a value.
            self._log(command.cause, command.session_id, context).debug("refused", error=type(error).__name__)
            raise

    def _execution_of(self, command: Command[Any], context: Context) -> Execution | None:
        execution_id = header(context, EXECUTION_ID)
        if execution_id is None or not is_transactional(command):
            return None
        return self._runner.find(execution_id)

    async def _reading(self, size_bytes: int, read: Callable[[], R]) -> R:
        """What a request holds, read on a thread where it is much: the loop is everybody's."""
        return await asyncio.to_thread(read) if size_bytes > _MUCH_BYTES else read()

    def _metadata(self, metadata: Mapping[str, str]) -> dict[str, str]:
        check_count("metadata entries", metadata, self._limits.metadata_entries, "metadata_entries")
        return dict(metadata)

    def _log(self, rpc: str, session_id: str, context: Context) -> Any:
        """A log that names the call: its rpc, its session, and the id that the client gave it, or one of ours."""
        return _logger.bind(rpc=rpc, session_id=session_id, rpc_id=header(context, RPC_ID) or secrets.token_hex(4))


def check_count(what: str, entries: Sized, most: int, setting: str) -> None:
    """Refuse a request with too many of something before anything is made of them: a message holds millions."""
    if len(entries) > most:
        raise LimitExceededError(f"number of {what}", len(entries), most, setting)


def fitting(message: M, max_message_bytes: int) -> M:
    """The answer, if it is no larger than a message may be: gRPC would not say what to do."""
    size_bytes = message.ByteSize()
    if size_bytes > max_message_bytes:
        raise LimitExceededError("the size of the answer", size_bytes, max_message_bytes, "max_message_bytes")
    return message


def check_together(what: str, size_bytes: int, most: int, setting: str) -> None:
    """Refuse a request whose values are too much together before any of them is read."""
    if size_bytes > most:
        raise LimitExceededError(f"size of the {what} in bytes", size_bytes, most, setting)


async def _run_within(execution: Execution, command: Command[R], origin: Origin) -> R:
    if may_block(command):
        return await asyncio.to_thread(execution.run, command, origin)
    return execution.run(command, origin)


def headers(context: Context) -> dict[str, str]:
    """What the call says beside its message; ours may be UTF-8 under a binary key."""
    found: dict[str, str] = {}
    for key, content in context.invocation_metadata() or ():
        if isinstance(content, str):
            found[key] = content
        elif key.startswith("x-dspex-"):
            found[key.removesuffix(BINARY)] = _utf8(key, content)
    return found


def header(context: Context, name: str) -> str | None:
    """One of ours, under its plain key or its binary one."""
    binary = name + BINARY
    for key, content in context.invocation_metadata() or ():
        if key == name and isinstance(content, str):
            return content
        if key == binary and isinstance(content, bytes):
            return _utf8(key, content)
    return None


def _utf8(key: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InvalidArgumentError(key, "it is no UTF-8") from None


def whole_number(context: Context, name: str) -> int | None:
    """A header that is a number."""
    text = header(context, name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise InvalidArgumentError(name, f"{quote(text)} is not a whole number")
    return int(text)


def origin_of(cause: str, context: Context) -> Origin:
    """Who asks: as the caller says in `x-dspex-actor`, else the host that it calls from."""
    said = headers(context)
    actor = said.get(ACTOR)
    if actor is None:
        # "ipv4:127.0.0.1:40312": the port says nothing about who it is. A Unix socket has no host.
        actor = f"peer:{context.peer().partition(':')[2].rpartition(':')[0] or 'unix'}"
    elif len(actor) > _ACTOR_LENGTH:
        raise InvalidArgumentError(ACTOR, f"it is longer than {_ACTOR_LENGTH} characters")
    source = Source.PYTHON if said.get(SOURCE) == Source.PYTHON else Source.ELIXIR
    return Origin(actor, cause, source, said.get(IDEMPOTENCY_KEY), said.get(OPTIMIZER_ID))
