"""SharedState: the engine of one of several servers on one log."""

from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import ClassVar, Final, TypeVar, Unpack

from dspex_persist.infra.futures import failed
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.mailbox import LoopMailbox, Reply
from dspex_persist.infra.metrics import Family
from dspex_persist.infra.traces import trace_of
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import EngineClosedError, InternalError, OutcomeUnknownError, StateError
from dspex_persist.state.log_state import OnLoop
from dspex_persist.state.model import Origin
from dspex_persist.state.peers import Peers
from dspex_persist.state.provider import Who, fault_of
from dspex_persist.state.served import DENIALS_KEPT, ServedEngine
from dspex_persist.state.shared.barrier import Barrier
from dspex_persist.state.shared.server_lease import ServerLease
from dspex_persist.state.shared.shared_groups import SharedGroups

R = TypeVar("R")

_logger: Final = get_logger(__name__)
SWEEP_S: Final = 5.0
"""How often a server looks for expired sessions, and for servers that have died."""


class SharedState(ServedEngine, Peers):
    """One of several servers on one log: reads values from memory, once it has made sure that they are current.

    A write is a group of the shared log. A read passes the `Barrier` first, and looks its session up afterwards. No
    event loop ever waits for the log, nor leads: a log behind a network takes as long as that does.

    Args:
        groups: The sessions and their log. This object owns them and closes them.
        name: How error messages name this object.
        sweep_interval_s: How often expired sessions are ended, old outcomes deleted, and servers looked for that have
            died, in seconds.
        on_fatal: Called if the log has lost commits, or because of a bug. See `LogEngine`.
        actor: Who makes the changes, unless a call says otherwise; by default the user of this process.
        denials_kept: See `ServedEngine`.

    Raises:
        InvalidArgumentError: `sweep_interval_s` is not a positive number of seconds, or `actor` not a text.
        StateError: The log cannot be reached.
    """

    gives: ClassVar[tuple[str, ...]] = ("distributed",)
    loops_lead = imports_lead = False

    def __init__(
        self,
        groups: SharedGroups,
        *,
        name: str = "the shared session state",
        sweep_interval_s: float = SWEEP_S,
        on_fatal: Callable[[BaseException], None] | None = None,
        actor: str | None = None,
        denials_kept: int = DENIALS_KEPT,
    ) -> None:
        super().__init__(
            groups,
            name=name,
            sweep_interval_s=sweep_interval_s,
            on_fatal=on_fatal,
            actor=actor,
            denials_kept=denials_kept,
        )
        self._shared = groups
        self._fenced: tuple[Callable[[], None], ...] = ()
        self._ended: tuple[Callable[[Collection[str]], None], ...] = ()
        meter = groups.server_meter
        self._barrier = Barrier(groups.log.head, self._writer.check_soon, groups.known, meter)
        groups.on_fenced, groups.on_ended = self._on_fenced, self._on_ended
        groups.on_known, groups.on_away = self._barrier.learnt, self._barrier.away
        # The writer may have followed the others since.
        self._barrier.learnt(groups.known)
        self._lease = ServerLease(groups.log, self._on_lease_lost, meter)
        try:
            groups.log.listen(self._writer.check_soon)
        except BaseException:
            self.close()
            raise

    def trouble(self) -> str:
        """See `ServedEngine.trouble`: it has not heard from the database."""
        return self._lease.trouble()

    def families(self) -> list[Family]:
        """See `ServedEngine.families`: what was counted about the other servers."""
        meter = self._shared.server_meter
        return [] if meter is None else meter.families()

    # Reads

    def submit(self, command: Command[R], origin: Origin | None = None) -> Future[R]:
        """See `StateProvider.submit`. The callbacks of a read run on the thread of the barrier."""
        if fault_of(command, origin) is not None or command.writes or self._failed is not None or self._closed:
            return super().submit(command, origin)
        result: Future[R] = Future()
        self._barrier.ask().add_done_callback(lambda passed: self._read_behind(passed, command, origin, result))
        return result

    def _read_behind(self, passed: Future[None], command: Command[R], origin: Origin | None, result: Future[R]) -> None:
        if not result.set_running_or_notify_cancel():
            return
        refusal = passed.exception()
        if refusal is not None:
            result.set_exception(refusal)
            return
        try:
            source = super().submit(command, origin)
        except Exception as error:  # noqa: BLE001 - a callback's boundary: the caller must not wait for ever
            # The pool of readers refuses it if the engine closes at this moment.
            if not self._closed:
                _logger.error("a read was not begun", traceback=trace_of(error))
            source = failed(self._failed or (EngineClosedError() if self._closed else InternalError(repr(error))))
        source.add_done_callback(lambda done: _pass_on(done, result))

    def run(self, command: Command[R], idempotency_key: str | None = None, **who: Unpack[Who]) -> R:
        """See `StateProvider.run`."""
        command.check()
        if not command.writes:
            self.check_open()
            self._barrier.pass_through()
        return super().run(command, idempotency_key, **who)

    def on_loop(self, mailbox: LoopMailbox) -> "SharedOnLoop":
        """See `StateProvider.on_loop`."""
        return SharedOnLoop(self, mailbox)

    # The other servers

    def announce(self, address: str) -> None:
        """Tell the other servers at which address clients reach this one."""
        self._shared.log.announce(address)

    def server_of(self, execution_id: str) -> str | None:
        """See `Peers.server_of`."""
        self.check_open()
        return self._shared.log.server_of(execution_id)

    def on_fenced(self, callback: Callable[[], None]) -> None:
        """See `Peers.on_fenced`."""
        self._fenced = (*self._fenced, callback)

    def on_ended(self, callback: Callable[[Collection[str]], None]) -> None:
        """See `Peers.on_ended`."""
        self._ended = (*self._ended, callback)

    def _on_ended(self, session_ids: Collection[str]) -> None:
        for callback in self._ended:
            callback(session_ids)

    def _on_fenced(self) -> None:
        for callback in self._fenced:
            callback()

    def _on_lease_lost(self) -> None:
        self._shared.lose_lease()
        self._writer.check_soon()

    # The end

    def _on_close(self) -> None:
        self._end(EngineClosedError())
        super()._on_close()

    def _on_fatal(self, error: BaseException) -> None:
        self._end(error if isinstance(error, StateError) else OutcomeUnknownError(repr(error)))
        super()._on_fatal(error)

    def _end(self, reason: StateError) -> None:
        self._barrier.close(reason)
        self._lease.close()


class SharedOnLoop(OnLoop):
    """Submits commands from one event loop, which never waits for the log."""

    def __call__(self, command: Command[R], origin: Origin | None = None) -> Reply[R]:
        if command.writes and fault_of(command, origin) is None:
            return super().__call__(command, origin)
        return self._mailbox.reply(self._state.submit(command, origin))


def _pass_on(source: "Future[R]", target: "Future[R]") -> None:
    error = source.exception()
    if error is not None:
        target.set_exception(error)
    else:
        target.set_result(source.result())
