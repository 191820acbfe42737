"""Run all parts of the check of a file, and check its schema."""

from collections.abc import Iterator

from sqlalchemy import Connection, Engine

from dspex_persist.state.store import migrate
from dspex_persist.state.store.anchor import Head
from dspex_persist.state.store.verify.parts import LOG, Looker, parts_of
from dspex_persist.state.store.verify.walk import Problem, Progress


def _ignore(_done: int, _in_all: int) -> None:
    pass


def iter_problems(readers: Engine, anchor: Head | None = None, progress: Progress = _ignore) -> Iterator[Problem]:
    """Yield the problems of the file.

    Data that cannot be read is a problem, too; it ends its walk, but not the others. Stored outcomes are not in the
    log, so each is only checked to be a possible result of its command, for a session that existed.

    Args:
        readers: Read-only connections to the file.
        anchor: The head that the file must have reached, read before the file. Without it, commits that are missing
            from the end go unnoticed.
        progress: Called with the number of commits checked so far, and of all commits.
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
    """Yield the triggers, views and indexes that are missing or changed, and triggers of other programs.

    Users may add views and indexes, which change no result.
    """
    parts = migrate.parts_of(connection)
    for part, sql in migrate.made_parts().items():
        if parts.get(part) != sql:
            state = "changed" if part in parts else "missing"
            yield Problem(_holder(part), f"the {part.kind} {part.name} is {state}")
    for part in parts.keys() - migrate.made_parts().keys():
        if part.kind == "trigger":
            yield Problem(_holder(part), f"the {part.kind} {part.name} is not of this schema")


def _holder(part: migrate.Part) -> str:
    return f"{'view' if part.kind == 'view' else 'table'} {part.table}"
