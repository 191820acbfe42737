"""Backends: which provider a context is on, and the gate that all its calls pass."""

import asyncio
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, Protocol, TypeAlias, TypeVar, cast
from weakref import WeakSet

from dspex_persist.addresses import shown
from dspex_persist.cognitive.carried import CarriedTools
from dspex_persist.cognitive.steps import DEFAULT, Terms
from dspex_persist.infra import forks
from dspex_persist.infra.mailbox import LoopMailbox
from dspex_persist.opening import is_there, open_state
from dspex_persist.spelling import did_you_mean, place_meant, quote
from dspex_persist.state.commands import Command, ExecuteTool
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.model import Origin
from dspex_persist.state.provider import StateProvider, SubmitHere
from dspex_persist.state.tools.ports import ToolCode
from dspex_persist.state.tools.session import current_session
from dspex_persist.state.tools.with_tools import WithTools

R = TypeVar("R")

Place: TypeAlias = str | os.PathLike[str] | StateProvider
"""Where a session is: "local", a path, a URL of `connect`, or a provider."""

LOCAL: Final = "local"
EMBEDDED: Final = "embedded"
BRIDGED: Final = "bridged"
_IN_MEMORY: Final = "memory:"
_MEANT: Final = {
    "": "",
    "memory": f'"{LOCAL}"',
    "file": 'a path, such as "sessions.db"',
    "server": '"grpc://HOST:PORT"',
}
_SERVERS: Final = ("grpc:", "grpcs:", "grpc+unix:")

_LONG: Final = frozenset[type]({ExecuteTool})
"""Commands that may take as long as a tool does."""


_passed: ContextVar[frozenset["Gate"]] = ContextVar("dspex_persist_passed_gates", default=frozenset())
"""The gates that the code of this context has passed with a transaction."""


class Gate:
    """Lets calls pass, any number at a time, unless somebody holds it: then new calls wait, and none is lost.

    Passing it must cost almost nothing, so calls take no lock. They count themselves in a list, whose `append` and
    `pop` are atomic, before they look at `held`; a holder sets `held` before it looks at the list. So at least one of
    the two sees the other.

    Executions of tools take long. They are counted apart: a holder first waits for them, while other calls still pass.
    """

    __slots__ = ("__weakref__", "_changed", "_tools_held", "calls", "held", "tools")

    def __init__(self) -> None:
        self.calls: list[None] = []
        self.tools: list[None] = []
        self.held = self._tools_held = False
        self._changed = threading.Condition()
        forks.register(self)

    def pass_through(self, call: Callable[[], R]) -> R:
        """Run a short call, after waiting for whoever holds the gate."""
        calls = self.calls
        while True:
            # An exception from a signal handler comes before or after `append`, and in both cases the count is right,
            # because nothing between `try` and `append` can raise.
            try:
                calls.append(None)
                if not self.held:
                    return call()
            finally:
                calls.pop()
                if self.held:
                    self.signal()
            self.wait()

    def enter_tool(self, *, wait: bool = True) -> bool:
        """Pass the gate for the execution of a tool, which may take long; `leave_tool` has to follow.

        A tool's own calls of tools pass at once, and so do those in a transaction: whoever holds the gate waits for the
        outer one.

        Args:
            wait: Wait for whoever holds the gate.

        Returns:
            Whether it passed; only False if it must not wait.
        """
        inside = current_session.get() is not None or self in _passed.get()
        with self._changed:
            while self._tools_held and not inside:
                if not wait:
                    return False
                self._changed.wait()
            self.tools.append(None)
        return True

    def leave_tool(self) -> None:
        """End the passage that `enter_tool` began."""
        with self._changed:
            # In a forked child there is nothing to leave.
            if self.tools:
                self.tools.pop()
            self._changed.notify_all()

    @property
    def is_inside(self) -> bool:
        """Whether this code is in a block that passes as a tool does: whoever holds the gate waits for its end."""
        return bool(self.tools) and self in _passed.get()

    def let_in(self) -> None:
        """Let the calls of this context that follow pass as part of a passage by `enter_tool`, until `let_out`."""
        _passed.set(_passed.get() | {self})

    def let_out(self) -> None:
        """End what `let_in` began."""
        _passed.set(_passed.get() - {self})

    @contextmanager
    def hold(self, timeout_s: float | None = None) -> Iterator[None]:
        """Hold the gate: wait for the calls in progress, and make new ones wait. One thread at a time.

        Args:
            timeout_s: How long to wait for the tools in progress, in seconds; None for as long as it takes.

        Raises:
            TimeoutError: A tool was still running.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._tools_held)
            self._tools_held = True
            try:
                if not self._changed.wait_for(lambda: not self.tools, timeout_s):
                    raise TimeoutError(f"{len(self.tools)} tools or transactions are still running")
                self.held = True
                self._changed.wait_for(lambda: not self.calls)
            except BaseException:
                self._release()
                raise
        try:
            yield
        finally:
            with self._changed:
                self._release()

    def _release(self) -> None:
        self.held = self._tools_held = False
        self._changed.notify_all()

    def signal(self) -> None:
        """Tell a holder that waits for calls to look again."""
        with self._changed:
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until nobody holds the gate."""
        with self._changed:
            self._changed.wait_for(lambda: not self.held)

    def forked(self, *, quiet: bool) -> None:
        """Open the gate in a forked child, which has none of the threads that hold it or wait for it."""
        self.calls, self.tools = [], []
        self.held = self._tools_held = False
        self._changed = threading.Condition()


@dataclass(frozen=True, slots=True)
class Switch:
    """A move of a session from one backend to another.

    Attributes:
        at: When it was done.
        source: The kind and the URL of the backend that the session was on.
        target: The kind and the URL of the one that it is on since.
        took_s: How long calls had to wait, in seconds.
        variables: How many variables were moved.
        versions: How many versions.
    """

    at: datetime
    source: str
    target: str
    took_s: float
    variables: int
    versions: int


@dataclass(frozen=True, slots=True)
class Move:
    """How commits were numbered before a move, and after it.

    Attributes:
        source: The provider that the session was on.
        sequences: The numbers of the session's commits there, in order.
        first_sequence: The number of the first of them on the next provider, where they follow each other.
    """

    source: StateProvider
    sequences: Sequence[int]
    first_sequence: int

    def number_after(self, sequence: int) -> int:
        """Return the number on the next provider of the session's last commit up to this one."""
        return self.first_sequence + bisect_right(self.sequences, sequence) - 1


class Follower(Protocol):
    """What goes along when a session moves."""

    def follow(self) -> None:
        """Go on with the backend as it is now, while its gate is held. It must not raise."""


class Parks(Protocol):
    """What must end before a session can move, and goes on afterwards."""

    def park(self) -> None:
        """End for now, while the gate is held."""


class _Borrowed(WithTools):
    """Adds tools to a provider that belongs to somebody else: closing this leaves it open."""

    def close(self) -> None:
        """Interrupt the executions that this has begun."""
        self.interrupt()


class _BorrowedServer(CarriedTools):
    """The same for a provider on a server."""

    def close(self) -> None:
        """Do nothing: what runs ends as it does without the context."""


def with_tools(provider: StateProvider, tools: Mapping[str, ToolCode]) -> WithTools:
    """Return a provider that executes other tools as well, over one that belongs to somebody else."""
    return _Borrowed(provider, tools)


def opened(address: str | os.PathLike[str], options: Mapping[str, Any]) -> StateProvider:
    """Open the session state at an address. Tools run in this process, wherever the sessions are."""
    tools = options.get("tools")
    if tools is None or not is_server(address):
        return cast(StateProvider, open_state(address, **options))
    provider: StateProvider = open_state(address, **{name: options[name] for name in options if name != "tools"})
    try:
        return CarriedTools(provider, tools)
    except BaseException:
        provider.discard()
        raise


def is_server(address: str | os.PathLike[str]) -> bool:
    """Whether an address is that of a server."""
    return isinstance(address, str) and address.lower().startswith(_SERVERS)


class Backend:
    """What a context is on, and the way to it: every call of the context passes through here.

    Attributes:
        provider: The session state.
        is_owned: Whether the context opened it, and closes it.
        url: Its address; "" if it has none that is known.
        switches: The moves of the session from one backend to another, oldest first.
    """

    def __init__(
        self, provider: StateProvider, *, is_owned: bool, url: str = "", options: Mapping[str, Any] | None = None
    ) -> None:
        self.provider = provider
        self.is_owned = is_owned
        self.url = url or provider.url
        # What it was opened with.
        self.options = {} if options is None else options
        # Held by whoever moves the session.
        self.moving = threading.Lock()
        self._moves: tuple[Move, ...] = ()
        # What goes along when the session moves: watches.
        self.followers: WeakSet[Follower] = WeakSet()
        # What a move would wait for otherwise: recordings.
        self.parked: WeakSet[Parks] = WeakSet()
        self.switches: tuple[Switch, ...] = ()
        self.gate = Gate()
        # The way from the event loop that was used last.
        self._on_loop: tuple[asyncio.AbstractEventLoop, StateProvider, LoopMailbox, SubmitHere] | None = None

    @classmethod
    def open(cls, place: Place, options: Mapping[str, Any]) -> "Backend":
        """Return the backend at a place; see `Context`."""
        if isinstance(place, StateProvider):
            tools = options.get("tools")
            if tools is None:
                return cls(place, is_owned=False)
            borrowed = _BorrowedServer if "remote" in place.capabilities else _Borrowed
            return cls(borrowed(place, tools), is_owned=True, options=options)
        try:
            provider = opened(_IN_MEMORY if place == LOCAL else place, options)
        except InvalidArgumentError as error:
            raise _about_backend(error) from None
        return cls(provider, is_owned=True, options=options)

    @property
    def kind(self) -> str:
        """What it is: "local" (memory), "embedded" (a file, or a database that servers share), "bridged" (a server)."""
        capabilities = self.capabilities
        if "remote" in capabilities:
            return BRIDGED
        return EMBEDDED if "durable" in capabilities else LOCAL

    @property
    def capabilities(self) -> frozenset[str]:
        """What it can do; see `StateProvider.capabilities`."""
        return self.provider.capabilities

    def use(self, provider: StateProvider, *, url: str, move: "Move") -> None:
        """Be on another provider from now on, which the context closes; the caller holds the gate."""
        self.provider, self.is_owned, self._on_loop = provider, True, None
        self.url = shown(url) or provider.url
        self._moves = (*self._moves, move)
        for follower in tuple(self.followers):
            follower.follow()

    @property
    def place(self) -> str:
        """Its kind, and its address if that is known."""
        return f"{self.kind} {self.url}" if self.url else self.kind

    def position_here(self, provider: StateProvider, sequence: int) -> int:
        """Return the number that a commit of the session, up to which something was read on `provider`, has here.

        Args:
            provider: The provider of this context then.
            sequence: The number of a commit there.
        """
        seen = False
        for move in self._moves:
            seen = seen or move.source is provider
            if seen:
                sequence = move.number_after(sequence)
        return sequence

    def is_awaited_on(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether calls from this event loop may be in progress."""
        way = self._on_loop
        return way is not None and way[0] is loop and bool(self.gate.calls or self.gate.tools)

    def close(self) -> None:
        """Close the provider if the context opened it."""
        if self.is_owned:
            self.provider.close()

    # Calls

    def run(self, command: Command[R], terms: Terms = DEFAULT) -> R:
        """Run a command here and now."""
        if type(command) in _LONG:
            self.gate.enter_tool()
            try:
                return self._run(command, terms)
            finally:
                self.gate.leave_tool()
        gate, calls = self.gate, self.gate.calls
        while True:
            # As in `Gate.pass_through`, without its call: this is the way of every read and write.
            try:
                calls.append(None)
                if not gate.held:
                    if terms is DEFAULT:
                        return self.provider.run(command)
                    return self._run(command, terms)
            finally:
                calls.pop()
                if gate.held:
                    gate.signal()
            gate.wait()

    def _run(self, command: Command[R], terms: Terms) -> R:
        if terms.optimizer_id is not None:
            return self.provider.submit(command, origin_of(self.provider, command, terms)).result()
        return self.provider.run(command, terms.idempotency_key, actor=terms.actor, reason=terms.reason)

    async def run_aio(self, command: Command[R], terms: Terms = DEFAULT) -> R:
        """Run a command for a coroutine, without blocking its event loop."""
        if type(command) in _LONG:
            return await self._execute_aio(command, terms)
        gate, calls = self.gate, self.gate.calls
        while True:
            try:
                calls.append(None)
                if not gate.held:
                    return await self._submit_here(command, terms)
            finally:
                calls.pop()
                if gate.held:
                    gate.signal()
            await asyncio.to_thread(gate.wait)

    async def _execute_aio(self, command: Command[R], terms: Terms) -> R:
        gate = self.gate
        if not gate.enter_tool(wait=False):
            await asyncio.to_thread(gate.enter_tool)
        try:
            return await self._submit_here(command, terms)
        finally:
            gate.leave_tool()

    async def _submit_here(self, command: Command[R], terms: Terms) -> R:
        loop, provider = asyncio.get_running_loop(), self.provider
        way = self._on_loop
        if way is None or way[0] is not loop or way[1] is not provider:
            mailbox = LoopMailbox(loop)
            way = self._on_loop = (loop, provider, mailbox, provider.on_loop(mailbox))
        _, _, mailbox, submit = way
        # The loop itself writes while it has nothing else to do.
        mailbox.traffic.calls += 1
        try:
            return await submit(command, origin_of(provider, command, terms))
        finally:
            mailbox.traffic.calls -= 1


class BackendView:
    """Where the session of a context is: `ctx.backend`."""

    __slots__ = ("_backend",)

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def kind(self) -> str:
        """What it is: "local" (memory), "embedded" (a file, or a database that servers share), "bridged" (a server)."""
        return self._backend.kind

    @property
    def url(self) -> str:
        """Its address; "" if it has none that is known."""
        return self._backend.url

    @property
    def capabilities(self) -> frozenset[str]:
        """What it can do; see `StateProvider.capabilities`."""
        return self._backend.capabilities

    @property
    def provider(self) -> StateProvider:
        """The session state, for what a context has no verb for. It is another one after a move."""
        return self._backend.provider

    @property
    def switches(self) -> tuple[Switch, ...]:
        """The moves of the session from one backend to another, oldest first."""
        return self._backend.switches

    def __repr__(self) -> str:
        return f"<Backend {self._backend.place}>"


def check_place(place: object) -> None:
    """Refuse what can be no place, and a word that was hardly meant to be the name of a file."""
    if isinstance(place, StateProvider) or place == LOCAL:
        return
    if isinstance(place, bytes) or not isinstance(place, str | os.PathLike):
        kind = "None" if place is None else type(place).__name__
        reason = f'it must be "{LOCAL}", a path, the URL of a server, or a provider, not {kind}'
        if isinstance(place, BackendView):
            reason = f"{reason}: to share that of another context, pass its ctx.backend.provider"
        raise InvalidArgumentError("backend", reason)
    meant = _MEANT[place_meant(place)] if isinstance(place, str) else ""
    if meant:
        hint = f"{did_you_mean(meant, spell=str)} For the file, write {quote(f'./{place}')}"
        raise InvalidArgumentError("backend", f"{quote(place)} would be the name of a file; {hint}")


def is_place_there(place: Place) -> bool:
    """Return whether there may be a session at a place; see `is_there`."""
    if place == LOCAL or isinstance(place, StateProvider):
        return True
    try:
        return is_there(place)
    except InvalidArgumentError as error:
        raise _about_backend(error) from None


def _about_backend(error: InvalidArgumentError) -> InvalidArgumentError:
    """The error about an address, as one about the argument of a context."""
    if error.field != "url":
        return error
    return InvalidArgumentError("backend", error.reason.replace(f"{_IN_MEMORY},", f'"{LOCAL}",'))


def origin_of(provider: StateProvider, command: Command[Any], terms: Terms) -> Origin:
    """Return the origin of a command on these terms."""
    origin = provider.origin(command.cause, terms.idempotency_key, actor=terms.actor, reason=terms.reason)
    return origin if terms.optimizer_id is None else replace(origin, optimizer_id=terms.optimizer_id)
