"""A gRPC server for services that are handed in: `serve`, and what it is given."""

from dspex_persist.infra.listen import ListenError, is_loopback
from dspex_persist.infra.server.guard import Admit, Context, DrainingError, RpcStatus, StatusOf, admit_all
from dspex_persist.infra.server.handlers import ReadsFirst, Service, reads_all
from dspex_persist.infra.server.life import ServerOptions, serve

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
