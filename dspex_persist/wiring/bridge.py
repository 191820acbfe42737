"""What a server serves: its services around an open engine, from their assembly to the last call."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Final

from dspex_persist.infra import server, streams
from dspex_persist.infra.interrupts import interrupts
from dspex_persist.infra.listen import TLS_SCHEME, TcpAddress, is_loopback, parse_listen
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.metrics import CallMeter
from dspex_persist.infra.stopping import spare_the_collector
from dspex_persist.infra.threads import on_new_thread
from dspex_persist.settings import Settings
from dspex_persist.state.abilities import Auditable
from dspex_persist.state.bridge.access.denials import Denials
from dspex_persist.state.bridge.access.guard import guarded
from dspex_persist.state.bridge.access.lives import Lives
from dspex_persist.state.bridge.access.same_user import SameUser
from dspex_persist.state.bridge.audit_service import AuditServicer
from dspex_persist.state.bridge.capabilities import Capabilities
from dspex_persist.state.bridge.codec import BRIDGE_SERVICE
from dspex_persist.state.bridge.rpcs.audit import AUDIT_SERVICE
from dspex_persist.state.bridge.servicer import BridgeServicer
from dspex_persist.state.bridge.status import status_of
from dspex_persist.state.bridge.traced import OF_CLIENTS
from dspex_persist.state.bridge.workers.pools import PoolPlan, Pools
from dspex_persist.state.bridge.workers.remote import RemoteTools
from dspex_persist.state.budgets import Budget
from dspex_persist.state.denials import NoteDenial, Refused
from dspex_persist.state.errors import StateError
from dspex_persist.state.meter import Meter
from dspex_persist.state.served import ServedEngine
from dspex_persist.state.tools.ports import ToolCode
from dspex_persist.state.tools.with_tools import WithTools
from dspex_persist.wiring.access import Security, access_of
from dspex_persist.wiring.ending import ServerEnd
from dspex_persist.wiring.life import Life
from dspex_persist.wiring.limits import limits_of

# After so long without progress the writer counts as stuck: longer than it waits for a lock of another program.
_STUCK_S: Final = 30.0
# Streams of one connection besides its watches.
_OTHER_STREAMS: Final = 1_000

_log: Final = get_logger(__name__)


class Bridge:
    """The services of a server, and what they need besides the engine. Made and used on the server's event loop.

    Args:
        settings: Those of the server.
        listen: Its address, which stays valid if tools change the working directory.
        security: Who may connect.
        engine: Has the sessions. Whoever opened it closes it.
        tools: The tools, by name.
        plans: The pools of workers to start.
        end: Says when to end.
        life: Hears how far the server is.
    """

    def __init__(
        self,
        settings: Settings,
        listen: str,
        security: Security,
        engine: ServedEngine,
        tools: Mapping[str, ToolCode],
        plans: Sequence[PoolPlan],
        end: ServerEnd,
        life: Life,
    ) -> None:
        self._settings, self._listen, self._security = settings, listen, security
        self._engine, self._plans, self._end, self._life = engine, plans, end, life
        self._has_tools = bool(tools)
        self._ready = threading.Event()
        self._note_denial = _counting(engine.denials.note, engine.meter)
        self._denials = Denials(self._note_denial)
        access = access_of(security, self._denials)
        self._reads_first = server.reads_all if access is None else access.reads_first
        self._users, self._admit = self._admission(server.admit_all if access is None else access.admit)
        self._capabilities = None if security.tokens is None else Capabilities()
        if security.tokens is not None:
            engine.limit_storage(security.tokens.allowance_of)
        limits = limits_of(settings)
        self._remote = RemoteTools(
            call_timeout_s=settings.remote_timeout_s,
            # A client that may register an address must not make this server call other machines.
            allow=security.allows,
            tls=security.worker_tls,
            limits=limits,
            capabilities=self._capabilities,
        )
        self._pools = Pools(plans, limits, int(settings.max_message_bytes))
        self._provider = WithTools(
            engine,
            tools,
            threads=settings.tool_threads,
            limits=limits,
            budget=Budget(settings.max_tokens, settings.max_cost),
            remote=self._remote,
            pool=self._pools.own,
            passed=self._pools.passed,
            pools=self._pools.ports,
            home=asyncio.get_running_loop(),
            meter=engine.meter,
        )
        self._servicer = BridgeServicer(
            self._provider,
            heartbeat_s=settings.heartbeat_s,
            stall_timeout_s=settings.stall_timeout_s,
            max_message_bytes=int(settings.max_message_bytes),
        )
        self._auditor = AuditServicer(
            self._provider,
            reveal=settings.audit_reveal,
            prune=settings.audit_prune,
            stall_timeout_s=settings.stall_timeout_s,
            max_message_bytes=int(settings.max_message_bytes),
            pools=self._pools.statistics,
        )

    def _admission(self, admit: server.Admit) -> tuple[SameUser | None, server.Admit]:
        """Return what has to know the port, and what admits calls."""
        address = parse_listen(self._listen)
        if self._settings.same_user and isinstance(address, TcpAddress):
            users = SameUser(address.host, self._denials, admit)
            return users, users.admit
        return None, admit

    async def run(self, subject: str) -> None:
        """Serve until the server is told to end; returns when no call is left.

        Args:
            subject: What the workers are for; see `Pools.running`.

        Raises:
            ListenError: An address is in use, or cannot be bound.
            PoolStartError: No worker of a pool starts.
        """
        self._end.on_signals()
        async with contextlib.AsyncExitStack() as stack:
            # Called in the opposite order.
            stack.callback(self._auditor.close)
            stack.callback(self._provider.interrupt)
            stack.push_async_callback(self._remote.close)
            # The process may go on, with handlers of its own.
            stack.callback(interrupts.take_from_loop)
            calls = await stack.enter_async_context(self._counting_calls())
            self._life.starting_workers(self._plans)
            await stack.enter_async_context(
                self._pools.running(subject, self._servicer, self._auditor, self._denials, stop=self._end.stop)
            )
            if not self._end.stop.is_set():
                await stack.enter_async_context(self._looking_for_rules())
                await self._serve(calls)

    @contextlib.asynccontextmanager
    async def _looking_for_rules(self) -> AsyncIterator[None]:
        """Warn if sessions have rules that nobody is asked to keep, as without tokens."""
        if self._security.tokens is not None:
            yield
            return
        # It takes longer the more sessions there are, and a start does not.
        looked = asyncio.wrap_future(on_new_thread(partial(_warn_of_rules, self._engine), "dspex-persist-rules"))
        try:
            yield
        finally:
            # Whoever closes the file does not expect that it is being read.
            await looked

    @contextlib.asynccontextmanager
    async def _counting_calls(self) -> AsyncIterator[CallMeter | None]:
        """Serve metrics, if there are to be any; yields what counts calls for them."""
        meter = self._engine.meter
        if meter is None:
            yield None
            return
        from dspex_persist import __version__
        from dspex_persist.observed import Observed

        calls = CallMeter()
        observed = Observed(
            self._engine,
            meter=meter,
            calls=calls,
            cache_limit_bytes=int(self._settings.cache_size_bytes),
            runner=self._provider.runner,
            servicer=self._servicer,
            pools=self._pools.statistics,
            loop=asyncio.get_running_loop(),
            version=__version__,
        )
        async with observed.served(
            self._settings.metrics_listen or "",
            partial(_unfit, self._end, self._engine, self._ready),
            self._security.certificates,
            self._security.tokens,
            self._note_denial,
        ):
            yield calls

    async def _serve(self, calls: CallMeter | None) -> None:
        settings = self._settings
        services = [server.Service(BRIDGE_SERVICE, self._servicer), server.Service(AUDIT_SERVICE, self._auditor)]
        lives = Lives(self._engine.loaded, lambda: Auditable.of(self._engine).audit())
        await server.serve(
            server.ServerOptions(
                self._listen,
                certificates=self._security.certificates,
                max_message_bytes=int(settings.max_message_bytes),
                grace_s=settings.grace_s,
                reflection=settings.reflection,
                # One connection may carry every watch, and other calls alongside.
                streams_per_connection=int(settings.watchers) + _OTHER_STREAMS,
            ),
            guarded(services, self._provider, lives, self._capabilities, self._denials),
            status_of=status_of,
            on_ready=self._on_ready,
            stop=self._end.stop,
            on_drain=self._drain,
            is_fit=lambda: not _trouble_of(self._engine),
            belongs=self._servicer.belongs,
            admit=self._admit,
            reads_first=self._reads_first,
            meter=calls,
            spans=OF_CLIENTS,
        )

    def _on_ready(self, port: int) -> None:
        if self._users is not None:
            self._users.serves(port)
        spare_the_collector(had_tools=self._has_tools)
        scheme = "" if self._security.certificates is None else TLS_SCHEME
        address = f"{scheme}{self._listen.rpartition(':')[0]}:{port}" if port else self._listen
        advertised = self._settings.advertise
        self._engine.announce(address if advertised is None else f"{scheme}{advertised}")
        self._life.serving(address, self._engine)
        self._ready.set()
        error = streams.print_line(f"GRPC_READY:{port}")
        if error is not None:
            # The parent process may not wait for that line, and clients can be served without it.
            _log.warning("could not print the ready line", reason=str(error))
        self._log_ready(port)

    def _log_ready(self, port: int) -> None:
        settings, security = self._settings, self._security
        has_tls = security.certificates is not None
        if has_tls and security.is_open and not is_loopback(settings.listen):
            _log.warning("anyone who can connect can read and change every session: see client_ca and token_file")
        facts = {"listen": settings.listen, "port": port, "db": str(settings.db)}
        tls = {"tls": "mutual" if security.asks_certificates else "server"} if has_tls else {}
        _log.info("serving", **facts, sequence=self._engine.head_sequence, **tls)

    async def _drain(self) -> None:
        self._life.draining()
        self._auditor.drain()
        await self._servicer.drain()


def _counting(note: NoteDenial, meter: Meter | None) -> NoteDenial:
    """Return what notes a refusal, and counts it if there are metrics."""
    if meter is None:
        return note

    def counting(refused: Refused) -> None:
        note(refused)
        meter.denied(refused.missing)

    return counting


def _warn_of_rules(engine: ServedEngine) -> None:
    """Log how many sessions have rules, if any."""
    try:
        count = engine.count_with_access()
    except StateError as error:
        _log.warning("could not look for sessions with rules", reason=str(error))
        return
    if count:
        what = "sessions have rules that do not hold here: anyone who can connect may do everything in them"
        _log.warning(what, sessions=count, hint="rules hold on a server that demands tokens: see token_file")


def _unfit(end: ServerEnd, engine: ServedEngine, ready: threading.Event) -> str:
    """Return why the server cannot do its work, or ""."""
    if end.stop.is_set():
        return "draining"
    try:
        engine.check_open()
    except StateError as error:
        return str(error)
    return _trouble_of(engine) or ("" if ready.is_set() else "starting")


def _trouble_of(engine: ServedEngine) -> str:
    silent_s = engine.silent_s
    if silent_s > _STUCK_S:
        return f"stuck: the writer has made no progress for {silent_s:.0f} s"
    return engine.trouble()
