"""dspex-persist watch: prints changes as they come."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

from dspex_persist.cli.hints import text_of
from dspex_persist.cli.live.get import Names, is_sensitive, select
from dspex_persist.cli.live.opening import Place, state_of
from dspex_persist.cli.live.options import Reveal, Session, Target
from dspex_persist.cli.output import plain, say, say_json
from dspex_persist.cli.places import Db
from dspex_persist.errors import DspexError

if TYPE_CHECKING:
    from dspex_persist.state.audit import AuditSource, HistoryEntry, VariableState
    from dspex_persist.state.model import Update, Value, Variable
    from dspex_persist.state.provider import StateProvider
    from dspex_persist.state.watch import Watch

_INITIAL: Final = "initial"
_BRIEF: Final = 40
_PAUSE_S: Final = 0.2
_LOOK_S: Final = 1.0
"""How often to look whether the server is still there, in seconds."""

HELP: Final = (
    "Print the values of a session's variables, then each change as it comes, until Ctrl-C.\n\n"
    "Every change is printed once, in order: none is left out while the server restarts. Without names it watches all "
    "variables, also those that do not exist yet. Watches a running server (--target), or a database that other "
    "processes write, a file, too. It ends by itself when the session ends. With --since it begins with the changes "
    "after a commit, such as the last one that an earlier watch has printed, instead of the current values.\n\n"
)
EPILOG: Final = (
    "[bold]Examples[/bold]\n\n"
    "dspex-persist watch checkout-42 --target 127.0.0.1:50051\n\n"
    "dspex-persist watch checkout-42 temperature 'prompt*' --json\n\n"
    "dspex-persist watch checkout-42 done --no-initial --limit 1    wait for the next change\n\n"
    "dspex-persist watch checkout-42 --since 1234 --json    go on after commit 1234 (sequence in the JSON)\n\n"
    "[bold]Exit codes[/bold]\n\n"
    "0  ended: by Ctrl-C, after --limit changes, or because the session ended\n\n"
    "1  no such session or variable, or the server cannot be reached at first\n\n"
    "2  wrong usage, a commit that is not there yet, or an invalid setting\n\n"
    "5  no such file, not a dspex-persist database, or another schema\n\n"
    "With --json an error is printed as one JSON object on stdout, too; the exit codes are the same.\n\n"
)


@dataclass(frozen=True, slots=True)
class Line:
    """A change, or the value of a variable when the watch began: then `kind` is "initial"."""

    at: datetime
    sequence: int | None
    name: str
    type: str
    kind: str
    value: "Value | None"
    version: int
    actor: str | None
    execution_id: str | None
    reason: str | None
    metadata: Mapping[str, str]
    masked: bool


def watch(
    session: Session,
    names: Names = None,
    initial: Annotated[
        bool, typer.Option("--initial/--no-initial", show_default=False, help="Whether to print the current values.")
    ] = True,
    since: Annotated[
        int | None,
        typer.Option(
            "--since",
            metavar="COMMIT",
            min=0,
            show_default=False,
            help="Go on after this commit: print the changes since, and no current values.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, show_default=False, help="End after N changes.")
    ] = None,
    reveal: Reveal = False,
    db: Db = None,
    target: Target = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON Lines: one object for each value.")] = False,
) -> None:
    """Print changes."""
    place = Place.of(target, db)
    show = _document if as_json else _text
    with suppress(KeyboardInterrupt):
        _print(_lines(place, session, names or [], reveal, since), show, initial, limit)


def _print(
    lines: Iterator[Line], show: "Callable[[Line, Value | None], None]", initial: bool, limit: int | None
) -> None:
    changes, values = 0, dict[str, "Value | None"]()
    for line in lines:
        previous, values[line.name] = values.get(line.name), line.value
        if line.kind == _INITIAL:
            if initial:
                show(line, None)
            continue
        show(line, previous)
        changes += 1
        if changes == limit:
            return


def _lines(place: Place, session: str, names: Sequence[str], reveal: bool, since: int | None) -> Iterator[Line]:
    if place.has_history:
        with place.explaining(session), place.history(reveal=reveal) as source:
            yield from _of_file(source, session, names, since)
        return
    with place.opened() as state, place.explaining(session):
        for variable, update in _of_server(state, session, names, since):
            yield _line_of(variable, update, reveal)
    print(f"session {plain(session)} has ended", file=sys.stderr)


# A server pushes the changes


def _of_server(
    state: "StateProvider", session: str, names: Sequence[str], since: int | None
) -> "Iterator[tuple[Variable, Update | None]]":
    """Yield the variables, or the changes since a commit, then each change, until the session ends.

    It continues after the server was away.
    """
    from dspex_persist.state.audit import is_glob
    from dspex_persist.state.errors import VariableNotFoundError

    # The library logs what this command says.
    logging.getLogger("dspex_persist").setLevel(logging.ERROR)
    watched, matches = (() if any(map(is_glob, names)) else names), _matcher(names)
    try:
        watch = state.watch(session, watched, after_sequence=since)
    except VariableNotFoundError:
        select(session, {each.name: each for each in state.list_variables(session)}, names)
        raise
    yield from ((variable, None) for variable in watch.initial if matches(variable.name))
    while True:
        try:
            with watch:
                for update in _updates(watch):
                    if update.version is not None and matches(update.variable.name):
                        yield update.variable, update
            return
        except DspexError as error:
            if not error.retryable:
                raise
            print(f"waiting: {text_of(error)}", file=sys.stderr, flush=True)
        watch = _again(state, session, watched, watch.position)


def _updates(watch: "Watch") -> "Iterator[Update]":
    """Yield the updates until the session ends. A watch that has lost its server resumes by itself."""
    from dspex_persist.state.errors import SessionNotFoundError

    reported = -1
    while True:
        try:
            updates = watch.next(_LOOK_S)
        except SessionNotFoundError:
            return
        yield from updates
        error = watch.interrupted
        if error is not None and reported != watch.resumptions:
            reported = watch.resumptions
            print(f"waiting: {text_of(error)}", file=sys.stderr, flush=True)


def _again(state: "StateProvider", session: str, watched: Sequence[str], position: int) -> "Watch":
    while True:
        try:
            return state.watch(session, watched, after_sequence=position)
        except DspexError as error:
            if not error.retryable:
                raise
            time.sleep(_PAUSE_S)


def _line_of(variable: "Variable", update: "Update | None", reveal: bool) -> Line:
    from dspex_persist.state.model import without_reason

    version = update.version if update is not None else None
    is_masked = is_sensitive(variable.metadata) and not reveal
    facts = (variable.name, variable.type)
    if update is None or version is None:
        value = None if is_masked else variable.value
        return Line(
            variable.updated_at, None, *facts, _INITIAL, value, variable.version, None, None, None, {}, is_masked
        )
    return Line(
        version.created_at,
        update.sequence,
        *facts,
        version.kind.value,
        None if is_masked else version.value,
        version.version,
        version.actor,
        version.execution_id,
        version.reason,
        without_reason(version.metadata),
        is_masked,
    )


# The history of a file is polled


def _of_file(source: "AuditSource", session: str, names: Sequence[str], since: int | None) -> Iterator[Line]:
    from dspex_persist.cli.audit.follow import news
    from dspex_persist.state.audit import HistoryQuery, SessionQuery

    seen, matches = source.head(), _matcher(names)
    variables = {each.name: each for each in state_of(source, session, str(seen))}
    if names:
        select(session, variables, names)
    if since is None:
        yield from (_line_of_state(each) for each in variables.values() if matches(each.name))
    else:
        seen = _resumed(source, session, since, seen)
    for first, last in news(source, seen):
        query = HistoryQuery(session=session, since=str(first), until=str(last), newest_first=False)
        yield from (_line_of_entry(each) for each in source.iterate(query) if matches(each.name))
        if not any(True for _ in source.iterate(SessionQuery(session=session, live=True, limit=1))):
            print(f"session {plain(session)} has ended", file=sys.stderr)
            return


def _resumed(source: "AuditSource", session: str, since: int, head: int) -> int:
    """Return the commit to resume after, which is not before the session began: an earlier one may have had its id."""
    from dspex_persist.state.audit import SessionQuery
    from dspex_persist.state.errors import InvalidArgumentError

    if since > head:
        raise InvalidArgumentError("since", f"{since} is not between 0 and the store's last commit, {head}")
    began = [each.started_sequence for each in source.iterate(SessionQuery(session=session, live=True, limit=1))]
    return max(since, *(each - 1 for each in began))


def _line_of_state(state: "VariableState") -> Line:
    return Line(
        state.updated_at,
        None,
        state.name,
        state.type,
        _INITIAL,
        state.value,
        state.version,
        None,
        None,
        None,
        {},
        state.masked,
    )


def _line_of_entry(entry: "HistoryEntry") -> Line:
    return Line(
        entry.created_at,
        entry.sequence,
        entry.name,
        entry.type,
        entry.kind.value,
        entry.value,
        entry.version,
        entry.actor,
        entry.execution_id,
        entry.reason,
        entry.metadata,
        entry.masked,
    )


def _matcher(names: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that tells whether a name is one of these, or matches one of these globs."""
    from dspex_persist.state.audit import is_glob
    from dspex_persist.state.globs import compile_glob

    if not names:
        return lambda _name: True
    exact, globs = set(names), [compile_glob(name) for name in names if is_glob(name)]
    return lambda name: name in exact or any(matches(name) for matches in globs)


# Output


def _document(line: Line, previous: "Value | None") -> None:
    from dspex_persist.cli.live.texts import document_of_value

    say_json(
        {
            "at": line.at.isoformat(),
            "sequence": line.sequence,
            "name": line.name,
            "type": line.type,
            "kind": line.kind,
            "value": document_of_value(line.value),
            "previous": document_of_value(previous),
            "version": line.version,
            "actor": line.actor,
            "execution_id": line.execution_id,
            "reason": line.reason,
            "metadata": dict(line.metadata),
            "masked": line.masked,
        }
    )
    sys.stdout.flush()


def _text(line: Line, previous: "Value | None") -> None:
    from dspex_persist.cli.audit.rendering import short_id, value_text
    from dspex_persist.state.model import ChangeKind

    what = plain(line.name)
    what += " deleted" if line.kind == ChangeKind.DELETED else f" = {value_text(line.value, line.masked)}"
    words = [f"{line.at.astimezone():%H:%M:%S}", what, f"v{line.version}"]
    if previous is not None:
        words.append(f"was {_briefly(value_text(previous))}")
    if line.kind not in (_INITIAL, ChangeKind.SET, ChangeKind.DELETED):
        words.append(line.kind.replace("_", " "))
    if line.actor is not None:
        tool = f"{short_id(line.execution_id)}, for " if line.execution_id else ""
        words.append(f"by {tool}{plain(line.actor)}")
    if line.reason:
        words.append(f'"{plain(line.reason)}"')
    say("  ".join(words))
    sys.stdout.flush()


def _briefly(text: str) -> str:
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}…"
