"""`dspex-persist worker`: a process that runs its own tools for sessions of a running server."""

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dspex_persist.infra import server, streams
from dspex_persist.infra.access.peers import listeners_at
from dspex_persist.infra.access.tls import Certificates
from dspex_persist.infra.channels import is_here
from dspex_persist.infra.interrupts import interrupts
from dspex_persist.infra.listen import TLS_SCHEME, TcpAddress, UnixAddress, is_loopback, parse_listen, target_of
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.stopping import End, loop_factory
from dspex_persist.settings import SettingsError
from dspex_persist.state.bridge.access.denials import Denials
from dspex_persist.state.bridge.access.same_user import SameUser
from dspex_persist.state.bridge.codec import BRIDGE_SERVICE
from dspex_persist.state.bridge.status import status_of
from dspex_persist.state.bridge.traced import OF_THE_SERVER
from dspex_persist.state.bridge.workers.registered import RegisteredServicer
from dspex_persist.state.bridge.workers.registering import Registrations
from dspex_persist.state.bridge.workers.session import Callback
from dspex_persist.state.denials import DenialLog
from dspex_persist.state.limits import Limits

if TYPE_CHECKING:
    from dspex_persist.state.tools.ports import ToolCode

# How long running code may go on after SIGTERM.
_GRACE_S: Final = 10.0
_ANSWER_S: Final = 30.0
_ROOT: Final = 0

_logger: Final = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What such a worker is told.

    Attributes:
        url: The server.
        sessions: The sessions to register the tools for.
        listen: Where to serve; "" for a free port, or a socket in a new folder if the server has one, too.
        address: Where the server reaches it; "" if that is where it listens.
        worker_id: How it is called in the session; "" for the name of this machine.
        certificates: For TLS; None to serve without encryption.
        insecure: Whether other machines may reach it without that.
        tool_threads: How many tools that are not asynchronous run at a time.
        max_message_bytes: The largest message.
        limits: The limits of parameters and results.
    """

    url: str
    sessions: tuple[str, ...]
    listen: str
    address: str
    worker_id: str
    certificates: Certificates | None
    insecure: bool
    tool_threads: int
    max_message_bytes: int
    limits: Limits


def run(options: WorkerOptions, tools: "Mapping[str, ToolCode]") -> None:
    """Run tools for a server, until SIGTERM or SIGINT; then calls in progress may finish.

    Prints `GRPC_READY:<port>` on stdout when the tools are registered (port 0: a Unix socket).

    Raises:
        SettingsError: The server could not reach the address, or others could.
        ListenError: The address is in use, or cannot be bound.
        StateError: The tools cannot be registered; see `Registrations.register`.
    """
    with _listening(options) as listen, asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve(options, tools, listen))


@contextlib.contextmanager
def _listening(options: WorkerOptions) -> Iterator[str]:
    """Yield where to listen."""
    is_near = is_here(target_of(options.url))
    if options.listen:
        _check(options, is_near=is_near)
        yield options.listen
    elif "unix:" in options.url:
        with tempfile.TemporaryDirectory(prefix="dspex-persist-worker-") as folder:
            yield f"unix:{folder}/worker.sock"
    elif is_near:
        yield "127.0.0.1:0"
    else:
        raise SettingsError("listen", f"{options.url} is on another machine: say where that reaches this worker")


def _check(options: WorkerOptions, *, is_near: bool) -> None:
    """Refuse an address that the server could not reach, or that others could. Raises `ListenError` if it is none."""
    address = parse_listen(options.listen)
    if not is_loopback(options.listen):
        if not options.insecure and options.certificates is None:
            reason = (
                f"{options.listen!r} can be reached from other machines, and anyone who can connect could run the "
                "tools: listen on 127.0.0.1 or on unix:PATH, serve TLS with --tls-cert and --tls-key, or accept that "
                "with --insecure"
            )
            raise SettingsError("listen", reason)
        if options.certificates is not None and not options.certificates.asks_clients:
            _logger.warning("anyone who can connect can run the tools: see client_ca")
        if not options.address and isinstance(address, TcpAddress) and address.host in ("0.0.0.0", "::"):
            raise SettingsError("listen", f"{options.listen!r} is every address: say with --address which one to call")
    elif not is_near and not options.address:
        reason = f"{options.url} is on another machine, which does not reach {options.listen}"
        raise SettingsError("listen", reason)


async def _serve(options: WorkerOptions, tools: "Mapping[str, ToolCode]", listen: str) -> None:
    end = End(asyncio.get_running_loop())
    worker_id = options.worker_id or socket.gethostname()
    with Callback(options.url, timeout_s=_ANSWER_S, actor=f"worker:{worker_id}") as state:
        users = _users_of(options, listen)
        servicer = RegisteredServicer(state, tools, threads=options.tool_threads, limits=options.limits)
        end.on_signals()
        ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def on_ready(port: int) -> None:
            if users is not None:
                users.serves(port)
            ready.set_result(port)

        serving = asyncio.create_task(
            server.serve(
                server.ServerOptions(
                    listen,
                    certificates=options.certificates,
                    max_message_bytes=options.max_message_bytes,
                    grace_s=_GRACE_S,
                    reflection=False,
                ),
                [server.Service(BRIDGE_SERVICE, servicer)],
                status_of=status_of,
                on_ready=on_ready,
                stop=end.stop,
                admit=server.admit_all if users is None else users.admit,
                spans=OF_THE_SERVER,
            )
        )
        try:
            await asyncio.wait((ready, serving), return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                serving.result()
            specs = [tool.spec for tool in tools.values()]
            address = options.address or _reached(listen, ready.result())
            if options.certificates is not None and not address.startswith(TLS_SCHEME):
                address = TLS_SCHEME + address
            registrations = Registrations(state, options.sessions, worker_id, specs, address)
            await _until_stopped(serving, registrations, ready.result())
        finally:
            end.stop.set()
            await asyncio.wait((serving,))
            interrupts.take_from_loop()
            servicer.close()
        serving.result()


def _users_of(options: WorkerOptions, listen: str) -> SameUser | None:
    """Return what refuses the users of this machine who are neither ours nor the server's; None to refuse none.

    Whoever can connect can run the tools. Where the server's user is not known, everybody on this machine can.
    """
    address, server_at = parse_listen(listen), target_of(options.url)
    has_login = options.certificates is not None and options.certificates.asks_clients
    if options.insecure or has_login or not is_loopback(listen) or not is_here(server_at):
        return None
    called = parse_listen(server_at)
    if not isinstance(address, TcpAddress) or not isinstance(called, TcpAddress):
        return None
    others = listeners_at(called.host, called.port)
    # Root listens for others, too: systemd, or a proxy, passes connections on to the server of another user.
    return SameUser(address.host, Denials(DenialLog().note), others=others) if others and _ROOT not in others else None


async def _until_stopped(serving: "asyncio.Task[None]", registrations: Registrations, port: int) -> None:
    registering = asyncio.create_task(asyncio.to_thread(registrations.register))
    await asyncio.wait((registering, serving), return_when=asyncio.FIRST_COMPLETED)
    if not registering.done():
        return
    registering.result()
    streams.print_line(f"GRPC_READY:{port}")
    keeping = asyncio.create_task(registrations.keep())
    try:
        await asyncio.wait((serving,))
    finally:
        keeping.cancel()


def _reached(listen: str, port: int) -> str:
    """Return the address under which it is reached."""
    address = parse_listen(listen)
    return str(address) if isinstance(address, UnixAddress) else f"{listen.rpartition(':')[0]}:{port}"


def check_sessions(sessions: Sequence[str]) -> tuple[str, ...]:
    """Return the sessions without repetitions; `SettingsError` if there are none."""
    if not sessions:
        raise SettingsError("session", "name the sessions that get the tools", "flag --session")
    return tuple(dict.fromkeys(sessions))
