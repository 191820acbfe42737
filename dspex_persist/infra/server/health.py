"""The health service, which every server has; `infra/health.py` asks it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Final

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2

from dspex_persist.infra.server.guard import Context
from dspex_persist.infra.server.handlers import Service

HEALTH: Final = "grpc.health.v1.Health"
# How often a watch of the health looks whether the process can do its work.
_LOOK_S: Final = 1.0
# So long may somebody take to ask for the health, who need not say who it is. A request may be large.
_STRANGERS_S: Final = 2.0
# Strangers may open them, and one connection carries thousands.
WATCHES_OF_HEALTH: Final = 1_000


def health_service(names: Sequence[str], draining: asyncio.Event, is_fit: Callable[[], bool]) -> Service:
    """Return the service. It knows the services with these names; `is_fit` is that of `serve`."""
    descriptor = descriptor_pool.Default().FindServiceByName(HEALTH)
    return Service(descriptor, _Health(names, draining, is_fit), read_within_s=_STRANGERS_S)


class _Health:
    """grpc.health.v1: SERVING while the process can do its work, until the drain.

    The drain ends every Watch, because an open one would delay it.
    """

    def __init__(self, names: Sequence[str], draining: asyncio.Event, is_fit: Callable[[], bool]) -> None:
        self._names = frozenset(("", *names))
        self._draining = draining
        self._is_fit = is_fit
        self._watches = Counter[str]()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "this server has no such service")
        return self._now()

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        host = context.peer().rpartition(":")[0]
        if self._watches[host] >= WATCHES_OF_HEALTH:
            details = f"this host watches the health {WATCHES_OF_HEALTH:,} times already: end some, or ask with Check"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, details)
        known, draining = request.service in self._names, self._draining.is_set()
        self._watches[host] += 1
        try:
            said = self._now() if known else _health(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            yield said
            # Read before the first answer, because the drain may begin while that is being sent.
            while not draining:
                with suppress(TimeoutError):
                    draining = await asyncio.wait_for(self._draining.wait(), _LOOK_S)
                if known and said != (now := self._now()):
                    said = now
                    yield said
        finally:
            self._watches -= Counter((host,))

    def _now(self) -> health_pb2.HealthCheckResponse:
        answer = health_pb2.HealthCheckResponse
        is_serving = self._is_fit() and not self._draining.is_set()
        return _health(answer.SERVING if is_serving else answer.NOT_SERVING)


def _health(status: int) -> health_pb2.HealthCheckResponse:
    return health_pb2.HealthCheckResponse(status=status)
