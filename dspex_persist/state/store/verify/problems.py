"""Run all parts of the check of a file, and check its schema."""

import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import TypeAlias

from sqlalchemy import Connection, Engine

from dspex_persist.state.anchor import Head
from dspex_persist.state.store import migrate
from dspex_persist.state.store.verify.parts import LOG, Meter, Part, PartChecker, parts_of
from dspex_persist.state.store.verify.sharing import Opening, Team, opening_of_file
from dspex_persist.state.store.verify.walk import Problem, Progress

_Check: TypeAlias = Callable[[Part], Generator[Problem, None, bool]]


def _ignore(_done: int, _in_all: int) -> None:
    pass


def iter_problems(readers: Engine, anchor: Head | None = None, progress: Progress = _ignore) -> Iterator[Problem]:
    """Yield the problems of the file.

    Data that cannot be read is a problem, too; it ends its walk, but not the others. Recorded outcomes are not in the
    log, so each is only checked to be a possible result of its command, for a session that existed.

    Args:
        readers: Read-only connections to the file.
        anchor: The head that the file must have reached, read before the file. Without it, commits that are missing
            from the end go unnoticed.
        progress: Called with the number of commits checked so far, and of all commits.
    """
    with checking(readers, anchor, progress) as problems:
        yield from problems


@contextmanager
def checking(
    readers: Engine,
    anchor: Head | None = None,
    progress: Progress = _ignore,
    jobs: int = 1,
    opening: Opening | None = None,
) -> Iterator[Iterator[Problem]]:
    """Give an iterator over what `iter_problems` yields, with helper processes that work until the block ends.

    The problems and their order do not depend on the number of processes, except that with helpers each part yields at
    most `MOST_PROBLEMS`.

    Args:
        readers: See `iter_problems`.
        anchor: See `iter_problems`.
        progress: See `iter_problems`. Called on this thread, while the iterator is being advanced.
        jobs: The number of processes, including this one.
        opening: What helpers open; by default the file that `readers` read.
    """
    meter = Meter(progress)
    checker = PartChecker(readers, anchor, meter.advance)
    parts = parts_of(readers)
    with ExitStack() as ending:
        check = checker.check
        if jobs > 1 and sys.executable:
            team = Team(lambda: opening or opening_of_file(readers, anchor), checker, meter, parts)
            ending.callback(team.close)
            team.start(min(jobs, len(parts)) - 1)
            check = team.check
        yield ending.enter_context(closing(_in_order(parts, check)))


def _in_order(parts: Iterable[Part], check: _Check) -> Generator[Problem, None, None]:
    is_readable = True
    for part in parts:
        # After a place where it cannot be read, the log is not checked.
        if is_readable or part.name != LOG:
            whole = yield from check(part)
            is_readable = is_readable and whole


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
