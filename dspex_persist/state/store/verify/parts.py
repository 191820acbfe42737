"""The parts of a check. They are independent, so that several processes can check them in any order."""

from collections.abc import Generator
from typing import Final, NamedTuple

from sqlalchemy import Engine

from dspex_persist.state.store.anchor import Head
from dspex_persist.state.store.engine import snapshot
from dspex_persist.state.store.verify.contents import BlobWalk
from dspex_persist.state.store.verify.documents import DocumentWalk
from dspex_persist.state.store.verify.live import LiveWalk
from dspex_persist.state.store.verify.log import LogWalk, Seen, ranges_in
from dspex_persist.state.store.verify.metadata import IndexedWalk, StrayWalk
from dspex_persist.state.store.verify.outcomes import OutcomeWalk
from dspex_persist.state.store.verify.pruned import PrunedWalk
from dspex_persist.state.store.verify.sessions import SessionWalk
from dspex_persist.state.store.verify.walk import UNREADABLE, Problem, Progress, Walk, walk_through

LOG: Final = "log"


class Part(NamedTuple):
    """The walks of this name. For the log, they cover the commits after `after` up to and including `until`."""

    name: str
    after: int = 0
    until: int | None = None


AFTER_THE_LOG: Final = tuple(map(Part, ("pruned", "contents", "metadata", "sessions", "documents", "outcomes", "live")))
"""The parts other than the log, whose problems are reported after those of the log, in this order."""


def parts_of(readers: Engine) -> tuple[Part, ...]:
    """Return all parts of a file, in the order in which their problems are reported."""
    try:
        with snapshot(readers) as connection:
            ranges = list(ranges_in(connection))
    except UNREADABLE:
        # A walk over the whole log reports where it cannot be read.
        ranges = [(0, None)]
    return (*(Part(LOG, after, until) for after, until in ranges), *AFTER_THE_LOG)


class Looker:
    """Looks at parts of a file, one at a time."""

    def __init__(self, readers: Engine, anchor: Head | None, progress: Progress) -> None:
        """`progress` is told how many commits have been checked since it was told last, and how many there are."""
        self._readers = readers
        self._anchor = anchor
        self._progress = progress
        self._seen = Seen()

    def look(self, part: Part) -> Generator[Problem, None, bool]:
        """What is wrong in a part; whether it could be read to its end. What cannot be is a problem, too."""
        whole = True
        for walk in self._walks(part):
            try:
                yield from walk_through(self._readers, walk)
            except UNREADABLE as error:
                whole = False
                yield Problem(str(walk), f"it cannot be read any further: {getattr(error, 'reason', error)}")
        return whole

    def _walks(self, part: Part) -> tuple[Walk, ...]:
        match part.name:
            case "log":
                return (LogWalk(self._anchor, self._progress, self._seen, part.after, part.until),)
            case "pruned":
                return (PrunedWalk(),)
            case "contents":
                return (BlobWalk(),)
            case "metadata":
                strays = StrayWalk()
                return strays, IndexedWalk(strays)
            case "sessions":
                return (SessionWalk(),)
            case "documents":
                return (DocumentWalk(),)
            case "outcomes":
                return (OutcomeWalk(),)
            case "live":
                return (LiveWalk(),)
        raise ValueError(f"no part of a check is called {part.name!r}")
