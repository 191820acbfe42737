"""All parts of the check of a file, and its schema."""

from collections.abc import Iterator

from sqlalchemy import Connection, Engine

from dspex_persist.state.store import migrate
from dspex_persist.state.store.anchor import Head
from dspex_persist.state.store.verify.parts import LOG, Looker, parts_of
from dspex_persist.state.store.verify.walk import Problem, Progress


def _ignore(_done: int, _in_all: int) -> None:
    pass


def iter_problems(readers: Engine, anchor: Head | None = None, progress: Progress = _ignore) -> Iterator[Problem]:
    """What is wrong with the file, as far as its log can tell.

    `anchor`: the head that the file must have reached, read before this is called. Where there is none, commits that
    are gone from the end are not noticed. What cannot be read is a problem, too, and ends its walk, not the others.
    The answers kept under idempotency keys are forgotten after a while, and so not in the log: each has to be one that
    its command can give, to a session that there was.
    """
    done = 0

    def add(more: int, in_all: int) -> None:
        nonlocal done
        done += more
        progress(done, in_all)

    looker = Looker(readers, anchor, add)
    log_is_readable = True
    for part in parts_of(readers):
        if part.name == LOG and not log_is_readable:
            continue
        whole = yield from looker.look(part)
        log_is_readable = log_is_readable and whole


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
