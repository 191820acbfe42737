"""Hold a session: its writers wait, while it is moved to another backend. Nothing of a hold outlives its process."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from dspex_persist.infra.futures import failed
from dspex_persist.state.commands import BeginExecution, Command
from dspex_persist.state.errors import SessionMovedError, StateError

R = TypeVar("R")


def concerns(command: Command[Any], *, is_full: bool) -> bool:
    """Return whether a hold of its session concerns a command. `is_full`: it is of all writes."""
    if not command.writes:
        return False
    if is_full:
        return not command.passes_holds
    return isinstance(command, BeginExecution) and command.parent_id is None


class Held:
    """A session that is held, as its backend knows it.

    First only new executions of tools wait, so that those in progress can end; once it is `full`, all writes do.
    """

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        self._full = self._ending = False
        self._over = threading.Event()
        self._moved_to: str | None = None
        self._adding = threading.Lock()
        # What comes when the hold is over: first what the writer has refused, which came before the others.
        self._refused: list[Callable[[], None]] = []
        self._parked: list[Callable[[], None]] = []

    def fill(self) -> None:
        """Have all writes wait from now on."""
        self._full = True

    def refuses(self, command: Command[Any]) -> bool:
        """Return whether the writer must not carry out a command."""
        return not self._ending and self._concerns(command)

    def parks(self, command: Command[Any]) -> bool:
        """Return whether the caller of a command has to wait."""
        return not self._over.is_set() and self._concerns(command)

    def _concerns(self, command: Command[Any]) -> bool:
        return command.session_id == self.session_id and concerns(command, is_full=self._full)

    def wait(self) -> None:
        """Wait until the hold is over; raise `SessionMovedError` if the session has moved."""
        self._over.wait()
        if self._moved_to is not None:
            raise SessionMovedError(self.session_id, self._moved_to)

    def park(self, submit: Callable[[], "Future[R]"]) -> "Future[R]":
        """Return a future for a command that is submitted when the hold is over, in the order of parking."""
        future: Future[R] = Future()

        def go_on() -> None:
            if self._moved_to is not None:
                _pass_on(failed(SessionMovedError(self.session_id, self._moved_to)), future)
            elif future.set_running_or_notify_cancel():
                _pass_on(submit(), future)

        self._add(self._parked, go_on)
        return future

    def park_refused(self, again: Callable[[], None], refuse: Callable[[StateError], None]) -> None:
        """Keep a command that came to the writer too early to be parked, and that the writer has refused.

        When the hold is over, `again` is called, or `refuse` if the session has moved.
        """

        def go_on() -> None:
            if self._moved_to is not None:
                refuse(SessionMovedError(self.session_id, self._moved_to))
            else:
                again()

        self._add(self._refused, go_on)

    def _add(self, waiting: list[Callable[[], None]], go_on: Callable[[], None]) -> None:
        with self._adding:
            if self._over.is_set():
                go_on()
            else:
                waiting.append(go_on)

    def release(self, moved_to: str | None = None) -> None:
        """End the hold. `moved_to`: where the session has moved, which its writers have to know."""
        with self._adding:
            if self._ending:
                return
            self._moved_to = moved_to
            self._ending = True
            # Before anybody else may go on, because commands take effect in the order in which they came.
            for go_on in (*self._refused, *self._parked):
                go_on()
            self._refused, self._parked = [], []
            self._over.set()


def _pass_on(source: "Future[R]", target: "Future[R]") -> None:
    def settle(done: "Future[R]") -> None:
        error = done.exception()
        if error is not None:
            target.set_exception(error)
        else:
            target.set_result(done.result())

    source.add_done_callback(settle)
