"""The reflection service, which lets grpcurl and its like find the others."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2

from dspex_persist.infra.server.guard import Context
from dspex_persist.infra.server.handlers import Service


def reflection_service(names: Sequence[str], draining: asyncio.Event) -> Service:
    """Return the service. It lists the services with these names."""
    descriptor = descriptor_pool.Default().FindServiceByName("grpc.reflection.v1alpha.ServerReflection")
    return Service(descriptor, _Reflection(names, draining))


class _Reflection:
    """grpc.reflection.v1alpha over the default pool. The drain ends its streams, which clients leave open."""

    def __init__(self, names: Sequence[str], draining: asyncio.Event) -> None:
        # Any, because its published types declare a coroutine where it has an async generator.
        self._inner: Any = reflection.aio.ReflectionServicer(names)
        self._draining = draining

    async def ServerReflectionInfo(
        self, requests: AsyncIterator[reflection_pb2.ServerReflectionRequest], context: Context
    ) -> None:
        async def answer() -> None:
            async for response in self._inner.ServerReflectionInfo(requests, context):
                await context.write(response)

        answering = asyncio.create_task(answer())
        drained = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait((answering, drained), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            drained.cancel()
            answering.cancel()
            # An answer that is being sent must not come after the status.
            await asyncio.wait((answering,))
