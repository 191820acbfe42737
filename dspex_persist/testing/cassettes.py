"""Recordings for tests: make missing ones, replay existing ones, and re-record them on request."""

import asyncio
import inspect
import os
import shlex
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from dspex_persist.cognitive.context import Context
from dspex_persist.cognitive.toolbox import Toolbox
from dspex_persist.replay import Aspect, Recording, ReplayReport, load, replay
from dspex_persist.replay.rebuild import Rebuilt
from dspex_persist.state import values
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.model import EventKind
from dspex_persist.state.recording import RecordedCommit, write_recording
from dspex_persist.testing.driving import drive_again

Drive = Callable[[Context], object]

_ADDED: Final = frozenset({Aspect.LM, Aspect.CALLS})
"""The aspects that differ if a tool makes additional calls."""
_BEGINNINGS: Final = frozenset({EventKind.SESSION_STARTED, EventKind.SESSION_UPDATED})
_MOST_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Cassette:
    """A recording that replayed without differences. `state`: the values of the variables at its end, by name."""

    path: Path
    recording: Recording
    report: ReplayReport
    state: dict[str, Any]


def open_engine(path: Path, references: Sequence[str]) -> EmbeddedState:
    """Open the engine on a file, with the tools of these modules; it records their language model calls."""
    return EmbeddedState(path, tools=Toolbox.of(list(references)))


def check(
    path: Path, references: Sequence[str], drive: Drive | None, mode: str, folder: Path, test: str, *, show_all: bool
) -> Cassette:
    """Replay a recording, and fail the test on any difference.

    Args:
        path: The recording.
        references: The modules of its tools.
        drive: Plays the client to make the recording; None if it was exported from a session.
        mode: When to make the recording, as in `--dspex-record`.
        folder: A folder for temporary files.
        test: The id of the test, for advice.
        show_all: Whether to show all differences.
    """
    again = f"pytest {shlex.quote(test)} --dspex-record=all"
    _check_arguments(path, references, drive)
    if mode == "all" or (mode != "none" and not path.exists()):
        _record(path, references, drive, folder)
    if not path.exists():
        pytest.fail(f"there is no recording {path}; make it with: {again}", pytrace=False)
    report = replay(path, list(references))
    if not report.ok and mode == "new_episodes" and {each.what for each in report.divergences} <= _ADDED:
        _record(path, references, drive, folder)
        report = replay(path, list(references))
    if not report.ok:
        pytest.fail(_stale(path, report, again, show_all), pytrace=False)
    if report.executions and not report.checked:
        pytest.fail(f"{path.name}: nothing was checked: {'; '.join(report.reasons)}", pytrace=False)
    recording = load(path)
    if drive is not None and _is_empty(recording.commits):
        advice = f"make drive use the session that is passed to it, then: {again}"
        pytest.fail(f"{path.name} contains only the session's beginning; {advice}", pytrace=False)
    return Cassette(path, recording, report, final_state(recording))


def _check_arguments(path: Path, references: Sequence[str], drive: Drive | None) -> None:
    if path.is_dir():
        pytest.fail(f"{path} is a folder: the tape is a file, such as 'tapes/checkout.jsonl'", pytrace=False)
    if not references:
        pytest.fail(f"{path.name}: say which tools it is replayed with: tools='package.module'", pytrace=False)
    if drive is not None and not callable(drive):
        pytest.fail(f"{path.name}: drive is a function that takes the session, not {drive!r}", pytrace=False)
    if drive is None and not path.exists():
        pytest.fail(
            f"there is no recording {path}, and no drive to make it: give the marker drive=function(context), or "
            f"make the recording with: dspex-persist session export SESSION -o {path}",
            pytrace=False,
        )


def _stale(path: Path, report: ReplayReport, again: str, show_all: bool) -> str:
    shown = len(report.divergences) if show_all else _MOST_SHOWN
    hint = " (pytest -vv shows them)" if len(report.divergences) > shown else ""
    summary = f"{path.name} is stale: {report.describe(shown)}{hint}"
    return f"{summary}\n\nIf the change is intended, record it again with: {again}"


def _is_empty(commits: Sequence[RecordedCommit]) -> bool:
    """Whether the session was only begun."""
    return not any(commit.versions or any(e.kind not in _BEGINNINGS for e in commit.events) for commit in commits)


def final_state(recording: Recording) -> dict[str, Any]:
    """Return the values at the end of a recording, by name; empty if the session had ended."""
    rebuilt = Rebuilt()
    for commit in recording.commits:
        rebuilt.apply(commit)
    variables = rebuilt.state.variables.values() if rebuilt.state is not None else ()
    return {each.name: values.decode(each.type, each.value) for each in variables if each.id not in rebuilt.masked}


def _record(path: Path, references: Sequence[str], drive: Drive | None, folder: Path) -> None:
    """Play the session in a new engine, and write its log to `path`, atomically: another worker may write it, too."""
    old = load(path) if path.exists() else None
    session_id = old.header.session_id if old is not None else path.stem
    # A new file each time, so that other recordings of the same test leave no traces in it.
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix="recording-") as own,
        open_engine(Path(own) / "recording.db", references) as provider,
    ):
        if drive is not None:
            _play(drive, Context(session_id, provider), path)
        elif old is not None:
            drive_again(provider, old)
        header, recorded = provider.record(session_id)
        commits = tuple(recorded)
        if drive is not None and _is_empty(commits):
            reason = "drive did nothing with the session that was passed to it, so there is nothing to record"
            pytest.fail(f"{path.name}: {reason}", pytrace=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        with fresh.open("w", encoding="utf-8") as file:
            write_recording(header, commits, file)
    fresh.replace(path)


def _play(drive: Drive, session: Context, path: Path) -> None:
    """Run `drive` to its end."""
    try:
        result = drive(session)
        if inspect.isgenerator(result) or inspect.isasyncgen(result):
            reason = "drive has a yield, so calling it does not run its code; make it a plain function (or async def)"
            pytest.fail(f"{path.name}: {reason}", pytrace=False)
        if inspect.isawaitable(result):
            _await(result)
    except SystemExit as error:
        # pytest would end, and every test after this one would be an error.
        pytest.fail(f"{path.name}: drive tried to end the process: SystemExit({error})", pytrace=False)


def _await(result: Awaitable[object]) -> None:
    """Await it on an event loop in another thread: the test's thread may have a running loop."""

    async def finish() -> None:
        await result

    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, finish()).result()
