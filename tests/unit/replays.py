"""Sessions recorded in memory: clients and tools over the commands themselves, without a file."""

import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar

from dspex_persist import clock
from dspex_persist.cognitive.toolbox import Toolbox
from dspex_persist.replay import Recording, load
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import StateError, UnsupportedError
from dspex_persist.state.model import Change, Origin, Source, Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.recording import (
    Header,
    RecordedCommit,
    RecordedEvent,
    RecordedVersion,
    read_recording,
    write_recording,
)
from dspex_persist.state.tools.with_tools import WithTools
from dspex_persist.state.watch import Watch
from tests.memory import MemoryCommit, MemoryGroups

R = TypeVar("R")


class Memory(StateProvider):
    """Session state in memory that remembers when each commit was made."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moment = clock.now()
        self._times: list[datetime] = []
        self.backing = MemoryGroups(now=self._read_clock)

    def _read_clock(self) -> datetime:
        self._moment = clock.now()
        return self._moment

    def submit(self, command: Command[R], origin: Origin | None = None) -> "Future[R]":
        asked_by = origin or self.default_origin(command.cause)
        future: Future[R] = Future()
        with self._lock:
            try:
                future.set_result(self.backing.run(command, asked_by))
            except StateError as error:
                future.set_exception(error)
            if len(self.backing.commits) > len(self._times):
                self._times.append(self._moment)
        return future

    def watch(self, session_id: str, identifiers: Sequence[str] = (), *, after_sequence: int | None = None) -> Watch:
        raise UnsupportedError("watching")

    def default_origin(self, cause: str, idempotency_key: str | None = None) -> Origin:
        return Origin("tester", cause, Source.PYTHON, idempotency_key)

    def check_open(self) -> None:
        """Nothing, as it never fails."""

    def close(self) -> None:
        """Nothing to close."""

    def recording(self) -> Recording:
        """The whole history as a recording, written and read again. Its only session began with the first commit."""
        made = zip(self.backing.commits, self._times, strict=True)
        commits = [_recorded(commit, at) for commit, at in made]
        text = io.StringIO()
        write_recording(Header("s", len(commits)), commits, text)
        return load(read_recording(text.getvalue().splitlines(keepends=True)))


class MemoryState(WithTools):
    """Session state in memory that can execute tools."""

    def __init__(self, *tools: object) -> None:
        self._memory = Memory()
        super().__init__(self._memory, toolbox(*tools))

    def recording(self) -> Recording:
        """The whole history as a recording. Its only session began with the first commit."""
        return self._memory.recording()


def _recorded(commit: MemoryCommit, at: datetime) -> RecordedCommit:
    order = list(dict.fromkeys(change.variable.id for change in commit.changes))
    changes = sorted(commit.changes, key=lambda change: (order.index(change.variable.id), change.version.version))
    versions = tuple(_version(change) for change in changes)
    events = tuple(RecordedEvent(event.kind, event.to_body()) for event in commit.events)
    return RecordedCommit(commit.sequence, at, commit.origin.actor, commit.origin.cause, versions, events)


def _version(change: Change) -> RecordedVersion:
    version = change.version
    return RecordedVersion(
        version.variable_id,
        change.variable.name,
        version.version,
        version.kind,
        version.source,
        version.value,
        version.metadata,
    )


def toolbox(*tools: object) -> Toolbox:
    made = Toolbox()
    for each in tools:
        made.add(each)
    return made


@contextmanager
def session(*tools: object, **variables: object) -> Iterator[MemoryState]:
    """A session `s` with some variables, and these tools."""
    with MemoryState(*tools) as state:
        state.initialize_session("s")
        for name, value in variables.items():
            kind = {int: "integer", float: "float", str: "string", dict: "map"}[type(value)]
            state.register_variable("s", name, kind, value)
        yield state


def recorded(
    tool: object, arguments: Mapping[str, Any] | None = None, *others: object, **variables: object
) -> Recording:
    """A session in which one tool ran once; `others` are the tools that it may call."""
    with session(tool, *others, **variables) as state:
        (name,) = toolbox(tool)
        state.execute_tool("s", name, arguments or {})
        return state.recording()


def with_start_value(recording: Recording, name: str, json: str) -> Recording:
    """The recording with another initial value of a variable."""

    def changed(version: RecordedVersion) -> RecordedVersion:
        return replace(version, value=Value(json)) if (version.name, version.version) == (name, 0) else version

    return _with_versions(recording, changed)


def masked(recording: Recording, name: str) -> Recording:
    """The recording without the values of a variable."""

    def changed(version: RecordedVersion) -> RecordedVersion:
        return replace(version, value=None, masked=True) if version.name == name else version

    return _with_versions(recording, changed)


def _with_versions(recording: Recording, changed: Callable[[RecordedVersion], RecordedVersion]) -> Recording:
    commits = (replace(commit, versions=tuple(map(changed, commit.versions))) for commit in recording.commits)
    return replace(recording, commits=tuple(commits))
