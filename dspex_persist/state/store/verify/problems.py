"""All walks over a file, and its schema."""

from collections.abc import Iterator

from sqlalchemy import Connection, Engine

from dspex_persist.state.store import migrate
from dspex_persist.state.store.anchor import Head
from dspex_persist.state.store.verify.contents import BlobWalk
from dspex_persist.state.store.verify.documents import DocumentWalk
from dspex_persist.state.store.verify.live import LiveWalk
from dspex_persist.state.store.verify.log import LogWalk
from dspex_persist.state.store.verify.metadata import IndexedWalk, StrayWalk
from dspex_persist.state.store.verify.outcomes import OutcomeWalk
from dspex_persist.state.store.verify.pruned import PrunedWalk
from dspex_persist.state.store.verify.sessions import SessionWalk
from dspex_persist.state.store.verify.walk import UNREADABLE, Problem, Progress, walk_through


def _ignore(_done: int, _in_all: int) -> None:
    pass


def iter_problems(readers: Engine, anchor: Head | None = None, progress: Progress = _ignore) -> Iterator[Problem]:
    """What is wrong with the file, as far as its log can tell.

    `anchor`: the head that the file must have reached, read before this is called. Where there is none, commits that
    are gone from the end are not noticed. What cannot be read is a problem, too, and ends its walk, not the others.
    The answers kept under idempotency keys are forgotten after a while, and so not in the log: each has to be one that
    its command can give, to a session that there was.
    """
    strays = StrayWalk()
    walks = (
        LogWalk(anchor, progress),
        PrunedWalk(),
        BlobWalk(),
        strays,
        IndexedWalk(strays),
        SessionWalk(),
        DocumentWalk(),
        OutcomeWalk(),
        LiveWalk(),
    )
    for walk in walks:
        try:
            yield from walk_through(readers, walk)
        except UNREADABLE as error:
            yield Problem(str(walk), f"it cannot be read any further: {getattr(error, 'reason', error)}")


def schema_problems(connection: Connection) -> Iterator[Problem]:
    """The triggers, views and indexes that are gone or changed, and triggers that are not ours.

    Somebody's own views and indexes change no answer, and may be there.
    """
    found = migrate.parts_of(connection)
    for part, sql in migrate.made_parts().items():
        if found.get(part) != sql:
            state = "changed" if part in found else "missing"
            yield Problem(_holder(part), f"the {part.kind} {part.name} is {state}")
    for part in found.keys() - migrate.made_parts().keys():
        if part.kind == "trigger":
            yield Problem(_holder(part), f"the {part.kind} {part.name} is not of this schema")


def _holder(part: migrate.Part) -> str:
    return f"{'view' if part.kind == 'view' else 'table'} {part.table}"
