"""HoldingState: a SharedState that holds sessions, on a log that has their holds."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

from dspex_persist.infra.threads import is_on_loop
from dspex_persist.spelling import quote
from dspex_persist.state import arguments
from dspex_persist.state.abilities import SessionHold
from dspex_persist.state.commands import ReadState
from dspex_persist.state.errors import UnavailableError
from dspex_persist.state.holds import Held
from dspex_persist.state.log_state import HoldsSessions
from dspex_persist.state.log_store import FencedError
from dspex_persist.state.model import Origin
from dspex_persist.state.shared.shared_held import HeldHere
from dspex_persist.state.shared.shared_state import SharedState

_PATIENCE_S: Final = 10.0
"""How long a hold waits for the log, in seconds."""


class HoldingState(SharedState, HoldsSessions):
    """A `SharedState` that holds sessions: the writers on every server wait, because each group looks at the holds.

    A hold is in the log, but no commit. It belongs to the lease of its server, so it ends if that dies. It takes two
    steps, each behind the lock of the log: first nobody begins an execution any more, and when none is running, nobody
    writes.
    """

    _poll_s = 0.02

    def hold_session(self, session_id: str, *, timeout_s: float = 30.0, origin: Origin | None = None) -> SessionHold:
        """See `Holdable.hold_session`."""
        self.check_open()
        # It may still seem to be held by another server.
        self._by_writer(self._shared.follow)
        self.run(ReadState(arguments.text("session_id", session_id)))
        return super().hold_session(session_id, timeout_s=timeout_s, origin=origin)

    def _new_hold(self, session_id: str) -> Held:
        return HeldHere(session_id)

    def _begin_hold(self, held: Held) -> None:
        assert isinstance(held, HeldHere), "this engine has made it"
        log = self._shared.log

        def begin() -> None:
            log.hold(held.session_id, held.hold_id)
            held.is_begun = True
            log.tell()

        self._by_writer(begin)

    def _note_full(self, held: Held) -> None:
        assert isinstance(held, HeldHere), "this engine has made it"
        log = self._shared.log

        def fill() -> None:
            if not log.fill_hold(held.hold_id):
                raise FencedError
            log.tell()

        try:
            self._by_writer(fill)
        except FencedError:
            reason = f"session {quote(held.session_id)} is not held: other servers took this one for dead"
            raise UnavailableError(reason) from None

    def _release(self, held: Held, moved_to: str | None) -> None:
        super()._release(held, moved_to)
        assert isinstance(held, HeldHere), "this engine has made it"
        self._shared.released.append(held.hold_id)
        self._writer.check_soon()

    def _await_release(self) -> None:
        if not (self._closed or self._failed or is_on_loop()):
            self._on_writer(self._shared.follow)

    def _by_writer(self, action: Callable[[], None]) -> None:
        """Have the writer do something between two groups, and wait for that.

        Raises:
            UnavailableError: It takes too long, or is never done.
            Exception: What `action` raises.
        """
        future: Future[None] = Future()

        def carry_out() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    action()
                except Exception as error:  # noqa: BLE001 - the caller gets it
                    future.set_exception(error)
                else:
                    future.set_result(None)

        self._do_beside(carry_out)
        try:
            future.result(_PATIENCE_S)
        except TimeoutError:
            future.cancel()
            self.check_open()
            raise UnavailableError(f"{self._name} has not answered for {_PATIENCE_S:g} s") from None
