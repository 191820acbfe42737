"""Recordings that tests replay: made where they are missing, checked where they are there, renewed where asked."""

import os
import shlex
from collections.abc import Callable, Sequence
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
from dspex_persist.state.recording import write_recording
from dspex_persist.testing.driving import drive_again

Drive = Callable[[Context], object]

_ADDED: Final = frozenset({Aspect.LM, Aspect.CALLS})
"""What differs where calls have been added."""


@dataclass(frozen=True, slots=True)
class Tape:
    """A recording that came out as it was recorded. `state`: the variables at its end, by name."""

    path: Path
    recording: Recording
    report: ReplayReport
    state: dict[str, Any]


def open_engine(path: Path, references: Sequence[str]) -> EmbeddedState:
    """The engine on a file, with the tools of these modules; what they ask language models is recorded."""
    toolbox = Toolbox()
    for reference in references:
        toolbox.load(reference)
    return EmbeddedState(path, tools=toolbox)


def check(path: Path, references: Sequence[str], drive: Drive | None, mode: str, folder: Path, test: str) -> Tape:
    """Replay a recording, after it was made or renewed if `mode` says so; the test fails where it does not hold."""
    if not references:
        pytest.fail(f"{path.name}: say which tools it is replayed with: tools='package.module'", pytrace=False)
    again = f"pytest {shlex.quote(test)} --dspex-record=all"
    if drive is None and not path.exists():
        pytest.fail(
            f"there is no recording {path}, and nobody to play its client: give the marker drive=function(context), or "
            f"make the recording with: dspex-persist session export SESSION -o {path}",
            pytrace=False,
        )
    if mode == "all" or (mode != "none" and not path.exists()):
        _record(path, references, drive, folder)
    if not path.exists():
        pytest.fail(f"there is no recording {path}; make it with: {again}", pytrace=False)
    report = replay(path, list(references))
    if not report.ok and mode == "new_episodes" and {each.what for each in report.divergences} <= _ADDED:
        _record(path, references, drive, folder)
        report = replay(path, list(references))
    if not report.ok:
        pytest.fail(
            f"{path.name} is stale: {report.describe()}\n\nIf that is how it should be, renew it with: {again}",
            pytrace=False,
        )
    if report.executions and not report.checked:
        pytest.fail(f"{path.name}: nothing of it was checked: {'; '.join(report.reasons)}", pytrace=False)
    recording = load(path)
    return Tape(path, recording, report, final_state(recording))


def final_state(recording: Recording) -> dict[str, Any]:
    """The values at the end of a recording, by name; none if the session had ended."""
    rebuilt = Rebuilt()
    for commit in recording.commits:
        rebuilt.apply(commit)
    variables = rebuilt.state.variables.values() if rebuilt.state is not None else ()
    return {each.name: values.decode(each.type, each.value) for each in variables if each.id not in rebuilt.masked}


def _record(path: Path, references: Sequence[str], drive: Drive | None, folder: Path) -> None:
    """Play the session in an engine of its own, and keep its log. Another worker's file is replaced whole."""
    old = load(path) if path.exists() else None
    session_id = old.header.session_id if old is not None else path.stem
    with open_engine(folder / "recording.db", references) as provider:
        if drive is not None:
            drive(Context(provider, session_id))
        elif old is not None:
            drive_again(provider, old)
        header, commits = provider.record(session_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        with fresh.open("w", encoding="utf-8") as file:
            write_recording(header, commits, file)
    fresh.replace(path)
