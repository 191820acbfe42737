"""What a service manager hears of a server: how far it is, from its start to its end."""

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final, Self

from dspex_persist.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dspex_persist.infra.notify import Notifier
    from dspex_persist.state.bridge.workers.pools import PoolPlan
    from dspex_persist.state.served import ServedEngine

# For how long a service manager is asked to wait at most, until the server is ready, and after it was told to end.
_STARTING_S: Final = 3_600.0
_ENDING_S: Final = 600.0


class Life:
    """Tells the service manager how far the server is, from its start, where the `with` block begins, to its end."""

    def __init__(self, notifier: "Notifier", settings: Settings) -> None:
        self._notifier = notifier
        self._settings = settings
        # What asks for more time. Neither ends where it begins.
        self._starting, self._ending = contextlib.ExitStack(), contextlib.ExitStack()
        self._is_ending = False
        self._watching: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._starting.enter_context(self._notifier.taking_long(_STARTING_S))
        return self

    def __exit__(self, *_: object) -> None:
        self._starting.close()
        self._ending.close()

    def importing_tools(self) -> None:
        """Say which tools are imported."""
        if self._settings.tools:
            self._notifier.status(f"importing the tools of {', '.join(self._settings.tools)}")

    def opening(self) -> None:
        """Say that the file is opened."""
        what = f"opening {self._settings.db}"
        self._notifier.status(f"{what}: recovery, and an upgrade if an older release wrote it")

    def starting_workers(self, plans: "Sequence[PoolPlan]") -> None:
        """Say which workers the server waits for."""
        if plans:
            self._notifier.status(f"starting the workers of {', '.join(plan.name for plan in plans)}")

    def serving(self, address: str, engine: "ServedEngine") -> None:
        """Say that the server is ready, and from now on that it is alive."""
        from dspex_persist.infra.traffic import traffic_of

        traffic = traffic_of(asyncio.get_running_loop())

        def status() -> str:
            if self._is_ending:
                return self._draining(traffic.calls)
            what = f"serving {self._settings.db} at {address}"
            return f"{what}: commit {engine.head_sequence}, {_calls(traffic.calls)}"

        self._starting.close()
        self._notifier.ready(status())
        self._watching = asyncio.create_task(self._notifier.watch(lambda: engine.silent_s, status))

    def draining(self) -> None:
        """Say that calls in progress may finish."""
        from dspex_persist.infra.traffic import traffic_of

        self._is_ending = True
        self._notifier.stopping(self._draining(traffic_of(asyncio.get_running_loop()).calls))
        self._ending.enter_context(self._notifier.taking_long(_ENDING_S))

    def closing(self) -> None:
        """Say that only the file is left to be closed."""
        if self._watching is not None:
            self._watching.cancel()
        if not self._is_ending:
            # It ends before it was ready.
            self.draining()
        self._notifier.status(f"closing {self._settings.db}")

    def _draining(self, calls: int) -> str:
        return f"shutting down: {_calls(calls)}, which may take {self._settings.grace_s:g} s"


def _calls(count: int) -> str:
    return "1 call in progress" if count == 1 else f"{count:,} calls in progress"
