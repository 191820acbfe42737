"""The parts of a check. They are independent, so that several processes can check them in any order."""

import threading
from collections.abc import Callable, Generator, Mapping
from typing import Final, NamedTuple, TypeAlias

from sqlalchemy import Engine

from dspex_persist.state.anchor import Head
from dspex_persist.state.store.engine import snapshot
from dspex_persist.state.store.verify.contents import BlobWalk
from dspex_persist.state.store.verify.denials import DenialWalk
from dspex_persist.state.store.verify.documents import DocumentWalk
from dspex_persist.state.store.verify.heads import HeadWalk
from dspex_persist.state.store.verify.live import LiveWalk
from dspex_persist.state.store.verify.lm_calls import LmCallsWalk
from dspex_persist.state.store.verify.log import LogWalk, Seen, ranges_in
from dspex_persist.state.store.verify.metadata import IndexedWalk, StrayWalk
from dspex_persist.state.store.verify.outcomes import OutcomeWalk
from dspex_persist.state.store.verify.pruned import PrunedWalk
from dspex_persist.state.store.verify.sessions import SessionWalk
from dspex_persist.state.store.verify.walk import UNREADABLE, Problem, Progress, Walk, walk_through

LOG: Final = "log"
HEAD: Final = "head"
MOST_PROBLEMS: Final = 1000
"""A check stops after this many problems."""
PartResult: TypeAlias = tuple[list[Problem], bool]
"""The problems of a part, and whether all of it could be read."""


class Part(NamedTuple):
    """The walks of this name. For the log, they cover the commits after `after` up to and including `until`."""

    name: str
    after: int = 0
    until: int | None = None


AFTER_THE_LOG: Final = tuple(
    map(Part, ("pruned", "contents", "metadata", "lm_calls", "sessions", "documents", "outcomes", "denials", "live"))
)
"""The parts other than the log, whose problems are reported after those of the log, in this order."""


def parts_of(readers: Engine) -> tuple[Part, ...]:
    """Return all parts of a file, in the order in which their problems are reported."""
    try:
        with snapshot(readers) as connection:
            ranges = list(ranges_in(connection))
    except UNREADABLE:
        # A walk over the whole log reports where it cannot be read.
        ranges = [(0, None)]
    only_here = () if readers.dialect.name == "sqlite" else (Part(HEAD),)
    return (*(Part(LOG, after, until) for after, until in ranges), *AFTER_THE_LOG, *only_here)


class Meter:
    """Counts the commits that were checked, on any thread, and reports the progress."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._counted = self._reported = (0, 0)

    def add(self, more: int, in_all: int) -> None:
        """Count `more` commits, of `in_all` in the file."""
        with self._lock:
            done = self._counted[0] + more
            self._counted = (done, max(done, in_all, self._counted[1]))

    def report(self) -> None:
        """Report the progress since the last report, if any, on this thread."""
        if self._counted != self._reported:
            self._reported = self._counted
            self._progress(*self._reported)

    def advance(self, more: int, in_all: int) -> None:
        """Count `more` commits and report the progress."""
        self.add(more, in_all)
        self.report()


class PartChecker:
    """Checks parts of a file, one at a time."""

    def __init__(self, readers: Engine, anchor: Head | None, progress: Progress) -> None:
        """Prepare to check a file.

        Args:
            readers: Read-only connections to the file.
            anchor: The head that the file must have reached, if it has an anchor.
            progress: Called with the number of commits checked since the last call, and the number of all commits.
        """
        self._readers = readers
        self._anchor = anchor
        self._progress = progress
        self._seen = Seen()

    def check(self, part: Part) -> Generator[Problem, None, bool]:
        """Yield the problems of a part; return whether all of it could be read. If not, that is a problem, too."""
        whole = True
        for walk in self._walks(part):
            try:
                yield from walk_through(self._readers, walk)
            except UNREADABLE as error:
                whole = False
                yield Problem(str(walk), f"it cannot be read any further: {getattr(error, 'reason', error)}")
        return whole

    def collect(self, part: Part) -> PartResult:
        """Return the result of `check`, with at most `MOST_PROBLEMS` problems."""
        problems: list[Problem] = []
        checking = self.check(part)
        try:
            while len(problems) < MOST_PROBLEMS:
                problems.append(next(checking))
        except StopIteration as end:
            return problems, end.value
        checking.close()
        return problems, True

    def _walks(self, part: Part) -> tuple[Walk, ...]:
        if part.name == LOG:
            return (LogWalk(self._anchor, self._progress, self._seen, part.after, part.until),)
        if part.name == "metadata":
            strays = StrayWalk()
            return strays, IndexedWalk(strays)
        return (_WALKS[part.name](),)


_WALKS: Final[Mapping[str, Callable[[], Walk]]] = {
    "pruned": PrunedWalk,
    "contents": BlobWalk,
    "lm_calls": LmCallsWalk,
    "sessions": SessionWalk,
    "documents": DocumentWalk,
    "outcomes": OutcomeWalk,
    "denials": DenialWalk,
    "live": LiveWalk,
    HEAD: HeadWalk,
}
