"""Sources: watches of the state layer that go on when the context moves to another backend."""

import asyncio
import threading
from collections.abc import Callable
from typing import TypeAlias

from dspex_persist.infra.mailbox import LoopMailbox
from dspex_persist.state.errors import StateError
from dspex_persist.state.model import Update, Variable
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.watch import Watch

Numbering: TypeAlias = Callable[[int], int]
"""Takes the number of a commit in one backend; returns the number in another of the session's last commit up to it."""


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
    """A watch on whichever backend the session is on. Its user pulls, and moves it, under a lock of its own.

    Args:
        session_id: The session.
        identifiers: The names of the variables; none for all.
        watch: The watch on the backend that the session is on now.
        wake: Called when there may be updates.
    """

    def __init__(self, session_id: str, identifiers: tuple[str, ...], watch: Watch, wake: Callable[[], None]) -> None:
        self._session_id = session_id
        self._identifiers = identifiers
        self._watch = watch
        self._wake = wake
        # Up to this commit, everything has been pulled from the backend before.
        self._pulled = 0
        self._resumptions = 0
        watch.notify(wake)

    @property
    def initial(self) -> tuple[Variable, ...]:
        """The variables as of the beginning."""
        return self._watch.initial

    @property
    def position(self) -> int:
        """The last commit that was pulled."""
        return max(self._watch.position, self._pulled)

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
        while updates := self._watch.pull():
            if kept := self._new(updates):
                return kept
        return []

    def pull_ready(self) -> list[Update] | None:
        """See `Watch.pull_ready`."""
        while updates := self._watch.pull_ready():
            if kept := self._new(updates):
                return kept
        return updates

    def _new(self, updates: list[Update]) -> list[Update]:
        return [update for update in updates if update.sequence > self._pulled] if self._pulled else updates

    def open_on(self, provider: StateProvider, number_of: Numbering) -> Watch:
        """Open the watch with which this goes on, on the backend that the session moves to."""
        return provider.watch(self._session_id, self._identifiers, after_sequence=number_of(self.position))

    def switch(self, watch: Watch, number_of: Numbering) -> Watch:
        """Go on with `watch`, which `open_on` returned, after what has been pulled so far.

        Returns:
            The watch before. Close it, and call `listen`, without any lock: both may wait for a thread that wakes.
        """
        before, self._pulled = self._watch, number_of(self.position)
        self._resumptions += before.resumptions
        self._watch = watch
        return before

    def listen(self) -> None:
        """Have the watch wake its user, also for what has come already."""
        self._watch.notify(self._wake)
        self._wake()

    def close(self) -> None:
        """Stop watching."""
        self._watch.close()
