"""Share the parts of a check between this process and helper processes.

A helper opens the file or the database itself, read-only, as any other program may.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias

from sqlalchemy import Engine

from dspex_persist.infra.helpers import Helper, HelperEndedError
from dspex_persist.infra.logs import get_logger
from dspex_persist.state.anchor import Head
from dspex_persist.state.store.engine import identity_of
from dspex_persist.state.store.verify.parts import Meter, Part, PartChecker, PartResult
from dspex_persist.state.store.verify.walk import Problem

_MOST_JOBS: Final = 4
_SMALL_BYTES: Final = 16 * 1024 * 1024
_LONG: Final = ("contents", "metadata", "lm_calls", "live", "sessions")
"""The parts after the log that can take long, the longest last."""
_HELPING: Final = "dspex_persist.state.store.verify.helping"

Opening: TypeAlias = Mapping[str, object]
"""What a helper opens, as JSON: a file, or a database by its `url`."""

_logger: Final = get_logger(__name__)


def size_of(path: Path) -> int:
    """Return the size of a file and its WAL, in bytes."""
    size_bytes = 0
    for file in (path, Path(f"{path}-wal")):
        with suppress(OSError):
            size_bytes += file.stat().st_size
    return size_bytes


def jobs_for(size_bytes: int) -> int:
    """Return how many processes to check so much with. Starting a helper takes longer than checking a small file."""
    if size_bytes < _SMALL_BYTES:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_JOBS)


def opening_of_file(readers: Engine, anchor: Head | None) -> Opening:
    """Return what a helper opens: the file that these connections read."""
    path = Path(readers.url.database or "")
    head = (anchor.sequence, anchor.hash.hex()) if anchor is not None else None
    return {"path": str(path), "identity": identity_of(path.stat()), "anchor": head}


class Team:
    """This process and its helpers, which each take the next part when they have finished one.

    Helpers start with the longest parts, this process with the short parts of the log, so that all of them finish at
    about the same time. If a helper ends early, its part is taken again.
    """

    def __init__(
        self, opening: Callable[[], Opening], checker: PartChecker, meter: Meter, parts: Iterable[Part]
    ) -> None:
        self._opening = opening
        self._checker = checker
        self._meter = meter
        self._changed = threading.Condition()
        # This process takes parts from the left, helpers from the right.
        self._left = deque(sorted(parts, key=lambda part: _LONG.index(part.name) if part.name in _LONG else -1))
        self._results: dict[Part, PartResult] = {}
        self._helpers: list[tuple[Helper, threading.Thread]] = []
        self._closed = False

    def start(self, helpers: int) -> None:
        """Start helpers, or as many of them as can be started."""
        for number in range(1, helpers + 1):
            try:
                opening = self._opening()
                helper = Helper(_HELPING)
            except (OSError, HelperEndedError) as error:
                _logger.warning("the check continues with fewer processes", reason=str(error))
                return
            name = f"dspex-persist-check-{number}"
            thread = threading.Thread(target=self._lead, args=(helper, opening), name=name, daemon=True)
            self._helpers.append((helper, thread))
            thread.start()

    def check(self, part: Part) -> Generator[Problem, None, bool]:
        """See `PartChecker.check`. Until the part has been checked, this process checks others."""
        while True:
            with self._changed:
                result = self._results.pop(part, None)
                mine = self._left.popleft() if result is None and self._left else None
                if result is None and mine is None:
                    self._changed.wait()
            self._meter.report()
            if result is not None:
                yield from result[0]
                return result[1]
            if mine is not None:
                self._results[mine] = self._checker.collect(mine)

    def close(self) -> None:
        """End the helpers, even if they are busy."""
        with self._changed:
            self._closed = True
            self._left.clear()
        for helper, _ in self._helpers:
            helper.kill()
        for helper, thread in self._helpers:
            thread.join()
            helper.close()

    # On the thread of each helper

    def _lead(self, helper: Helper, opening: object) -> None:
        try:
            # A helper takes no part until it is ready, which it never is if Python is embedded in another program.
            next(helper.ask(opening))
            while (part := self._take()) is not None:
                result = None
                try:
                    result = self._ask(helper, part)
                finally:
                    self._settle(part, result)
        except HelperEndedError:
            if not self._closed:
                _logger.warning("the check continues with fewer processes", reason="a helper ended")

    def _take(self) -> Part | None:
        with self._changed:
            return self._left.pop() if self._left else None

    def _settle(self, part: Part, result: PartResult | None) -> None:
        """Keep the result, or, without one, let the part be taken again."""
        with self._changed:
            if result is not None:
                self._results[part] = result
            elif not self._closed:
                self._left.append(part)
            self._changed.notify_all()

    def _ask(self, helper: Helper, part: Part) -> PartResult:
        for reply in helper.ask(part):
            match reply:
                case [more, in_all]:
                    self._meter.add(more, in_all)
                    with self._changed:
                        self._changed.notify_all()
                case {"found": problems, "whole": whole}:
                    return [Problem(*each) for each in problems], whole
        raise HelperEndedError
