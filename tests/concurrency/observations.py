"""Checks what executions saw against the commits in the file.

The commits are the serial order. A serializable execution behaves as if it ran right before its commit, so everything
that it saw has to match the state as of the commit before. One with snapshot isolation saw the state as of the commit
that began it. Both see their own writes on top, and their commit in the file consists of exactly these.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

HISTORY_LIMIT = 4
_DELETED = 3
Entry = tuple[int, str | None]
"""A version and its value as JSON; None for a deletion."""


class Action(NamedTuple):
    """What an execution did with a name, and what it saw (`found`)."""

    word: str
    name: str
    text: str
    found: Any


@dataclass(frozen=True, slots=True)
class Observation:
    """A committed execution, as its client knows it."""

    execution_id: str
    sequence: int
    actions: tuple[Action, ...]
    serializable: bool
    after: int
    """The newest commit that any client knew when it requested the execution."""


@dataclass(slots=True)
class View:
    """A session at one moment: by name, the entries of its variables, and of the last deleted one."""

    live: dict[str, tuple[Entry, ...]] = field(default_factory=dict)
    gone: dict[str, tuple[Entry, ...]] = field(default_factory=dict)

    def copy(self) -> "View":
        return View(dict(self.live), dict(self.gone))

    def add(self, name: str, entry: Entry) -> None:
        """Add a version of the variable with this name, or of a new one."""
        entries = (*self.live.pop(name, ()), entry)
        if entry[1] is None:
            self.gone[name] = entries
        else:
            self.live[name] = entries

    def expect(self, action: Action) -> Any:
        """Return what the action has to see, and apply what it writes."""
        entries = self.live.get(action.name)
        match action.word:
            case "get":
                return list(entries[-1]) if entries else None
            case "list":
                return sorted([name, *entries[-1]] for name, entries in self.live.items())
            case "history":
                known = entries or self.gone.get(action.name)
                return [list(entry) for entry in reversed(known[-HISTORY_LIMIT:])] if known else None
            case "define":
                if not entries:
                    self.add(action.name, (0, f'"{action.text}"'))
                return list(self.live[action.name][-1])
        if not entries:
            return None
        value = None if action.word == "delete" else f'"{action.text}"'
        self.add(action.name, (entries[-1][0] + 1, value))
        return True if action.word == "delete" else entries[-1][0] + 1


def check(database: Path, session_id: str, observations: Iterable[Observation]) -> Iterator[str]:
    """Yield every observation that the commits do not explain."""
    observed = list(observations)
    began = _beginnings(database)
    points = {each.sequence - 1 if each.serializable else began[each.execution_id] for each in observed}
    views = _views(database, session_id, points | {each.sequence for each in observed})
    for each in observed:
        if began[each.execution_id] <= each.after:
            yield f"real-time order: {each.execution_id} began before commit {each.after}, which its client knew"
        point = each.sequence - 1 if each.serializable else began[each.execution_id]
        yield from _check_one(each, point, views)


def _check_one(observation: Observation, point: int, views: Mapping[int, View]) -> Iterator[str]:
    view = views[point].copy()
    for action in observation.actions:
        if (expected := view.expect(action)) != action.found:
            what = f"{action.word} {action.name}".strip()
            yield f"stale read: {observation} saw {action.found} for {what}; as of commit {point} it was {expected}"
            return
    before, committed = views[point], views[observation.sequence]
    for name in {action.name for action in observation.actions}:
        expected = view.live.get(name), view.gone.get(name)
        if expected != (before.live.get(name), before.gone.get(name)) and expected[0] != committed.live.get(name):
            yield f"lost: {observation} left {expected[0]} in {name}, its commit has {committed.live.get(name)}"


def _beginnings(database: Path) -> dict[str, int]:
    with closing(sqlite3.connect(database)) as connection:
        return dict(connection.execute("SELECT execution_id, began_sequence FROM executions"))


def _views(database: Path, session_id: str, points: set[int]) -> dict[int, View]:
    """The session as of each of the given commits."""
    view, views = View(), dict[int, View]()
    waiting = sorted(points, reverse=True)
    with closing(sqlite3.connect(database)) as connection:
        for sequence, name, version, kind, value in connection.execute(_VERSIONS, (session_id,)):
            while waiting and waiting[-1] < sequence:
                views[waiting.pop()] = view.copy()
            view.add(name, (version, None if kind == _DELETED else value))
    return views | dict.fromkeys(waiting, view)


_VERSIONS = """
    SELECT versions.sequence, variables.name, versions.version, versions.kind, versions.value
    FROM versions JOIN variables USING (variable_key) JOIN sessions USING (session_key)
    WHERE session_id = ? ORDER BY versions.sequence, versions.variable_key, versions.version
"""
