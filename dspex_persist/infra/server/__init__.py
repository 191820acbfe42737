"""A gRPC server for services that are handed in: `serve`, and what it is given."""

from dspex_persist.infra.listen import ListenError, is_loopback
from dspex_persist.infra.server.life import (
    Admit,
    Context,
    DrainingError,
    ReadsFirst,
    RpcStatus,
    ServerOptions,
    Service,
    StatusOf,
    admit_all,
    reads_all,
    serve,
)

__all__ = [
    "Admit",
    "Context",
    "DrainingError",
    "ListenError",
    "ReadsFirst",
    "RpcStatus",
    "ServerOptions",
    "Service",
    "StatusOf",
    "admit_all",
    "is_loopback",
    "reads_all",
    "serve",
]
