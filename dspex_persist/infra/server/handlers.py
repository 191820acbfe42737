"""From the descriptors of services to the handlers that gRPC calls."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeAlias, cast

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from dspex_persist.infra.metrics import CallMeter, RpcMeter
from dspex_persist.infra.server.guard import Calls, Context, Metadatum, NoRequestError, UnreadableRequestError
from dspex_persist.infra.traced_calls import CallSpans, TracedRpc
from dspex_persist.infra.tracing import tracer

# How a call ended, for a meter.
_OK, _GIVEN_UP, _TOO_LATE = "OK", "CANCELLED", "DEADLINE_EXCEEDED"

# Quoted: generic in its stubs only.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


@dataclass(frozen=True, slots=True)
class Service:
    """A service of the default descriptor pool, and the object with a method for each of its rpcs.

    A method has the name of its rpc, and takes the request message (with client streaming: an async iterator of
    messages) and the gRPC context. For a single answer it is a coroutine function. For a stream it is an async
    generator function, or a coroutine function that calls `context.write(message)`, which can limit its wait for a
    slow client with `asyncio.timeout`. An rpc without a method is answered with UNIMPLEMENTED.

    `read_within_s` limits how long a client may take to send a request, for services that admit strangers.
    """

    descriptor: ServiceDescriptor
    servicer: object
    read_within_s: float | None = None


ReadsFirst: TypeAlias = Callable[[str, Sequence[Metadatum]], bool]
"""Whether the request of a call may be read before the call is admitted, by the name of its rpc and its headers."""


def reads_all(_rpc: str, _headers: Sequence[Metadatum]) -> bool:
    """Read all requests first, which takes less time."""
    return True


class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc, unused-ignore]
    """The handlers of a service."""

    def __init__(
        self,
        service: Service,
        calls: Calls,
        reads_first: ReadsFirst,
        meter: CallMeter | None,
        listen: str = "",
        spans: CallSpans | None = None,
    ) -> None:
        made = tracer()
        self._reads_first = reads_first
        # By path: the name of the rpc, and two handlers. The second one reads no request before the call is admitted.
        self._rpcs: dict[str, tuple[str, Handler, Handler]] = {}
        for method in service.descriptor.methods:
            traced = None if made is None or spans is None else TracedRpc(method.full_name, listen, spans, made)
            rpc = _rpc_of(method, service.servicer, calls, meter, traced)
            unread = _stream_stream(rpc if method.client_streaming else _reading(rpc, service.read_within_s))
            usual = unread if service.read_within_s is not None else _handler(method, rpc)
            path = f"/{service.descriptor.full_name}/{method.name}"
            self._rpcs[path] = method.full_name, usual, unread

    def service(self, details: Any) -> "Handler | None":
        """Return the handler for a call; None if it is of another service."""
        found = self._rpcs.get(details.method)
        if found is None:
            return None
        name, handler, unread = found
        return handler if self._reads_first(name, details.invocation_metadata) else unread


def _rpc_of(
    method: MethodDescriptor, servicer: object, calls: Calls, meter: CallMeter | None, traced: TracedRpc | None
) -> "_Rpc":
    run = getattr(servicer, method.name, None) or _unimplemented(method)
    _check_kind(method, run)
    parse = _parser(GetMessageClass(method.input_type))
    return _Rpc(
        name=method.full_name,
        run=run,
        parse=parse if traced is None else traced.parser(parse),
        serialize=GetMessageClass(method.output_type).SerializeToString,
        calls=calls,
        meter=None if meter is None else _meter_of(method, meter),
        around=(lambda handle: handle) if traced is None else traced.handler,
    )


def _handler(method: MethodDescriptor, rpc: "_Rpc") -> Handler:
    if method.client_streaming:
        return _stream_stream(rpc)
    return _unary_stream(rpc) if method.server_streaming else _unary_unary(rpc)


def _reading(rpc: "_Rpc", within_s: float | None) -> "_Rpc":
    """Return an rpc that takes a stream of requests, reads the only one, and answers it as another one does."""

    async def run(requests: AsyncIterator[Any], context: Context) -> None:
        try:
            async with asyncio.timeout(within_s):
                request = await anext(requests)
        except (StopAsyncIteration, TimeoutError) as error:
            raise NoRequestError() from error
        answer = rpc.run(request, context)
        if inspect.isasyncgen(answer):
            async with aclosing(answer):
                async for response in answer:
                    await context.write(response)
        elif (response := await answer) is not None:
            await context.write(response)

    return replace(rpc, run=run)


def _meter_of(method: MethodDescriptor, meter: CallMeter) -> RpcMeter:
    streams = {"streams_requests": method.client_streaming, "streams_answers": method.server_streaming}
    return meter.rpc(method.containing_service.full_name, method.name, **streams)


def _check_kind(method: MethodDescriptor, run: Callable[..., Any]) -> None:
    if method.client_streaming and not method.server_streaming:
        raise TypeError(f"{method.full_name}: a stream of requests with a single answer is not supported")
    streams = method.server_streaming and inspect.isasyncgenfunction(run)
    if not streams and not inspect.iscoroutinefunction(run):
        raise TypeError(f"{method.full_name}: its method must be asynchronous, a generator only to stream")


def _unimplemented(method: MethodDescriptor) -> Callable[[object, Context], Awaitable[NoReturn]]:
    async def run(_request: object, context: Context) -> NoReturn:
        # gRPC's own text is "Method not found!", which clients that search for "not found" misread.
        details = f"{method.full_name} is not implemented by this server"
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, details)

    return run


def _parser(message_class: type[Message]) -> Callable[[bytes], Message]:
    from_string = message_class.FromString
    message_type = message_class.DESCRIPTOR.full_name

    def parse(serialized: bytes) -> Message:
        try:
            return from_string(serialized)
        except DecodeError as error:
            raise UnreadableRequestError(message_type) from error

    return parse


@dataclass(frozen=True, slots=True)
class _Rpc:
    """What a handler needs to answer an rpc. `run` is the servicer's method; `around` wraps the whole handler."""

    name: str
    run: Callable[..., Any]
    parse: Callable[[bytes], Message]
    serialize: Callable[[Any], bytes]
    calls: Calls
    meter: RpcMeter | None
    around: Callable[[Callable[..., Awaitable[Any]]], Callable[..., Awaitable[Any]]]


def _unary_unary(rpc: _Rpc) -> Handler:
    name, run, parse, serialize, calls = rpc.name, rpc.run, rpc.parse, rpc.serialize, rpc.calls

    # The hot path. Parsing and serializing happen here, because errors in gRPC's own hooks would bypass the guard.
    async def handle(request: bytes, context: Context) -> bytes:
        admission = None
        try:
            admission = calls.enter(name, context)
            return serialize(await run(parse(request), context))
        except BaseException as error:  # noqa: BLE001 -- the guard: `fail` answers, or raises it again
            # The exception that gRPC gets keeps this frame alive after the call.
            request = b""
            await calls.fail(name, context, error)
        finally:
            calls.leave(admission)

    counted = handle if rpc.meter is None else _metered(handle, rpc.meter)
    return grpc.unary_unary_rpc_method_handler(rpc.around(counted))


def _unary_stream(rpc: _Rpc) -> Handler:
    answer = _answer_with_stream if rpc.meter is None else _metered_stream

    async def handle(request: bytes, context: Context) -> None:
        received = [request]
        request = b""
        await answer(rpc, _stream_context(context, rpc.meter), received, lambda _: rpc.parse(received.pop()))

    return grpc.unary_stream_rpc_method_handler(rpc.around(handle), response_serializer=_serializer(rpc))


def _serializer(rpc: _Rpc) -> Callable[[Any], bytes]:
    def serialize(message: Any) -> bytes:
        # A message for many streams is already serialized, once for all of them.
        return message if isinstance(message, bytes) else rpc.serialize(message)

    return serialize


def _stream_stream(rpc: _Rpc) -> Handler:
    answer = _answer_with_stream if rpc.meter is None else _metered_stream

    async def handle(_requests: AsyncIterator[bytes], context: Context) -> None:
        await answer(rpc, _stream_context(context, rpc.meter), [], lambda context: _messages_of(rpc, context))

    return grpc.stream_stream_rpc_method_handler(rpc.around(handle), response_serializer=_serializer(rpc))


def _stream_context(context: Context, meter: RpcMeter | None) -> Context:
    return cast("Context", _StreamContext(context, meter))


class _StreamContext:
    """The context of a stream, which can end with a status whenever it is cancelled; counts messages, if asked to.

    gRPC sends initial metadata with the first message. If waiting for that is cancelled, as when a client does not read
    it, gRPC would send them again with the status: that fails, and the client would never hear of the end.
    """

    def __init__(self, context: Context, meter: RpcMeter | None) -> None:
        self._context = context
        self._meter = meter
        self._begun = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def send_initial_metadata(self, metadata: Any) -> None:
        self._begun = True
        sending = asyncio.ensure_future(self._context.send_initial_metadata(metadata))
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError:
            # It does not depend on the client.
            await asyncio.wait((sending,))
            raise

    async def write(self, message: Any) -> None:
        if not self._begun:
            await self.send_initial_metadata(())
        if self._meter is not None:
            self._meter.sent += 1
        await self._context.write(message)

    async def read(self) -> Any:
        message = await self._context.read()
        if self._meter is not None and message is not grpc.aio.EOF:
            self._meter.received += 1
        return message


async def _messages_of(rpc: _Rpc, context: Context) -> AsyncIterator[Any]:
    """Yield a client's messages. gRPC's own iterator would keep the last one until the next garbage collection."""
    while (received := [await context.read()]) != [grpc.aio.EOF]:
        yield rpc.parse(received.pop())


async def _answer_with_stream(
    rpc: _Rpc, context: Context, received: list[bytes], request: Callable[[Context], object]
) -> None:
    """Send what the servicer's method yields, or let it write by itself (`context.write` serializes).

    `received` has the bytes of the request until they are parsed. A stream may be open for days, and its frame lives
    even longer; neither must keep the bytes.
    """
    admission = None
    try:
        admission = rpc.calls.enter(rpc.name, context, asyncio.current_task())
        answer = rpc.run(request(context), context)
        if inspect.isasyncgen(answer):
            # Closed here, because otherwise the clean-up after a client has gone would wait for the garbage collector.
            async with aclosing(answer):
                async for response in answer:
                    await context.write(response)
        else:
            await answer
    except BaseException as error:  # noqa: BLE001 -- the guard: `fail` answers, or raises it again
        received.clear()
        # A stream that was revoked has to say so, instead of that it was cancelled.
        reported = error if admission is None else admission.end(error) or error
        await rpc.calls.fail(rpc.name, context, reported)
    finally:
        rpc.calls.leave(admission)


# --- Counting calls ---


def _metered(
    handle: Callable[[bytes, Context], Awaitable[bytes]], meter: RpcMeter
) -> Callable[[bytes, Context], Awaitable[bytes]]:
    async def metered(request: bytes, context: Context) -> bytes:
        began, code = meter.begin(), _OK
        meter.received += 1
        received = [request]
        request = b""
        try:
            answer = await handle(received.pop(), context)
            meter.sent += 1
            return answer
        except BaseException:
            code = _code_of(context)
            raise
        finally:
            meter.end(began, code)

    return metered


async def _metered_stream(
    rpc: _Rpc, context: Context, received: list[bytes], request: Callable[[Context], object]
) -> None:
    meter = rpc.meter
    assert meter is not None, "its handler is made for a meter"
    began, code = meter.begin(), _OK
    meter.received += len(received)
    try:
        await _answer_with_stream(rpc, context, received, request)
    except BaseException:
        code = _code_of(context)
        raise
    finally:
        meter.end(began, code)


def _code_of(context: Context) -> str:
    """Return the name of the status with which a call ends that has raised."""
    code: Any = context.code()
    if isinstance(code, grpc.StatusCode):
        return code.name
    left_s: Any = context.time_remaining()
    return _TOO_LATE if left_s is not None and left_s <= 0 else _GIVEN_UP
