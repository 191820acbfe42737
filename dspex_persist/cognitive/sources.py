"""Sources: watches of the state layer that go on when the context moves to another backend."""

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

from dspex_persist.cognitive.backends import Backend
from dspex_persist.infra.mailbox import LoopMailbox
from dspex_persist.state.errors import EngineClosedError, SessionNotFoundError, StateError
from dspex_persist.state.model import Update

Numbering: TypeAlias = Callable[[int], int]
"""Takes the number of a commit on one backend; returns the number on the next of the session's last commit up to it."""

_MOVING_S: Final = 0.05


class News:
    """Wakes the one who waits for updates: a thread, or a coroutine.

    It knows neither the watch nor its consumer, so a consumer that nobody uses any more can be freed.
    """

    def __init__(self) -> None:
        self.is_there = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_loop = asyncio.Event()
        self._wake_loop: Callable[[], None] | None = None

    def __call__(self) -> None:
        """Say that there may be updates, from any thread."""
        self.is_there.set()
        if self._wake_loop is not None:
            self._wake_loop()

    def forget(self) -> None:
        """Note that all updates so far are about to be read."""
        self.is_there.clear()
        self._on_loop.clear()

    def listen(self) -> None:
        """Also wake a coroutine of the running loop. Called before `forget`."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._on_loop = loop, asyncio.Event()
            self._wake_loop = LoopMailbox(loop).waker(self._on_loop.set)

    async def wait(self, timeout_s: float | None) -> None:
        """Wait for news on the loop that listens, or for this many seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._on_loop.wait()
        except TimeoutError:
            pass


class Source:
    """A watch on whichever backend the session is on. Its user pulls under a lock of its own.

    A session that moves ends where it was. Then the source goes on where it is, after what has been pulled so far.

    Args:
        backend: Where the session is. Open the source while passing its gate.
        session_id: The session.
        identifiers: The names of the variables; none for all.
        after: The commit to resume after; None to begin now.
        wake: Called when there may be updates.

    Raises:
        StateError: The backend refuses the watch.
    """

    def __init__(
        self,
        backend: Backend,
        session_id: str,
        identifiers: tuple[str, ...],
        after: int | None,
        wake: Callable[[], None],
    ) -> None:
        self._backend = backend
        self._session_id = session_id
        self._identifiers = identifiers
        self._wake = wake
        self._provider = backend.provider
        self._watch = self._provider.watch(session_id, identifiers, after_sequence=after)
        self.initial = self._watch.initial
        self._resumptions = 0
        self._renumbered: list[Numbering] = []
        self._closed = False
        self._watch.notify(wake)

    @property
    def position(self) -> int:
        """The last commit that was pulled, by its number on the backend that it was pulled from."""
        return self._watch.position

    def here(self, number: int) -> int:
        """Return the number that a commit has on the backend that the session is on now."""
        return self._backend.position_here(self._provider, number)

    @property
    def resumptions(self) -> int:
        """How often it has gone on after losing its server."""
        return self._resumptions + self._watch.resumptions

    @property
    def interrupted(self) -> StateError | None:
        """What separates it from its server; None while they are connected."""
        return self._watch.interrupted

    def pull(self) -> list[Update]:
        """See `Watch.pull`."""
        while True:
            try:
                return self._watch.pull()
            except (SessionNotFoundError, EngineClosedError):
                if self._may_be_moving():
                    return []
                if self._closed or not self.follow():
                    raise

    def pull_ready(self) -> list[Update] | None:
        """See `Watch.pull_ready`."""
        try:
            return self._watch.pull_ready()
        except (SessionNotFoundError, EngineClosedError):
            if self._may_be_moving():
                return []
            if self._closed or self._backend.provider is self._provider:
                raise
            return None

    def _may_be_moving(self) -> bool:
        """Whether the session may have ended here because it is being moved. Then this is woken soon."""
        if not self._backend.gate.held:
            # A move that had ended the session here has ended, and the backend is another one now.
            return False
        timer = threading.Timer(_MOVING_S, self._wake)
        timer.daemon = True
        timer.start()
        return True

    def follow(self) -> bool:
        """Go on with the backend that the session has moved to; returns whether it has."""
        provider, before = self._backend.provider, self._watch
        if provider is self._provider:
            return False
        number_of = partial(self._backend.position_here, self._provider)
        watch = provider.watch(self._session_id, self._identifiers, after_sequence=number_of(before.position))
        self._resumptions += before.resumptions
        self._renumbered.append(number_of)
        self._provider, self._watch = provider, watch
        watch.notify(self._wake)
        before.close()
        if self._closed:
            watch.close()
        self._wake()
        return True

    def take_numberings(self) -> list[Numbering]:
        """Return how commits were renumbered by moves since the last call, oldest first."""
        renumbered, self._renumbered = self._renumbered, []
        return renumbered

    def close(self) -> None:
        """Stop watching."""
        self._closed = True
        self._watch.close()
