"""The rpc that lists the workers of a server's pools."""

from collections.abc import Iterable
from typing import Any, Final

from dspex_persist.infra.workers.statistics import PoolStatistics, WorkerStatistics
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as pb

_POOL: Final = [field.name for field in pb.WorkerPool.DESCRIPTOR.fields if field.name != "workers"]
_WORKER: Final = [field.name for field in pb.WorkerProcess.DESCRIPTOR.fields]


def response_of(pools: Iterable[PoolStatistics]) -> pb.ListWorkersResponse:
    """Return the response with what each pool does now."""
    return pb.ListWorkersResponse(pools=map(_message_of, pools))


def _message_of(pool: PoolStatistics) -> pb.WorkerPool:
    workers = [pb.WorkerProcess(**{name: getattr(worker, name) for name in _WORKER}) for worker in pool.workers]
    return pb.WorkerPool(**{name: getattr(pool, name) for name in _POOL}, workers=workers)


def pools_in(response: Any) -> tuple[PoolStatistics, ...]:
    """Return what a response says."""
    return tuple(map(_pool_of, response.pools))


def _pool_of(message: Any) -> PoolStatistics:
    workers = tuple(WorkerStatistics(**{name: getattr(each, name) for name in _WORKER}) for each in message.workers)
    return PoolStatistics(**{name: getattr(message, name) for name in _POOL}, workers=workers)
