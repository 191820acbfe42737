"""Imports that are written into a file while their commits come: the transaction is open for as long as that takes."""

import gc
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dspex_persist import Context, EmbeddedState, ToolContext, connect, tool
from dspex_persist.cognitive import moves
from dspex_persist.infra import forks
from dspex_persist.state import imports
from dspex_persist.state.abilities import Recordable, SessionImport
from dspex_persist.state.commands import ImportCommit
from dspex_persist.state.errors import EngineClosedError, ForkedProcessError, RecordingError, UnavailableError
from dspex_persist.state.imports import CheckedImport
from dspex_persist.state.model import ImportedSession
from dspex_persist.state.recording import Header, RecordedCommit
from dspex_persist.state.store import maintenance
from dspex_persist.state.unit_of_work import UnitOfWork
from tests.deadline import within
from tests.infra.test_forks import in_child


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


@pytest.fixture
def state(path: Path) -> Iterator[EmbeddedState]:
    with connect(path) as state:
        yield state


def recording(versions: int = 250) -> tuple[Header, Sequence[RecordedCommit]]:
    with Context("s") as ctx:
        ctx.define("x", 0)
        for number in range(1, versions + 1):
            ctx["x"] = number
        header, commits = Recordable.of(ctx.backend.provider).record("s")
        return header, tuple(commits)


@pytest.fixture
def begun(state: EmbeddedState) -> Iterator[tuple[SessionImport, Sequence[RecordedCommit]]]:
    """An import of which half is written, and the other half."""
    header, commits = recording()
    with state.begin_import(header) as begun:
        begun.write_ahead()
        for commit in commits[:130]:
            begun.add(commit)
        begun.check()
        yield begun, commits[130:]


def test_nobody_sees_it_before_it_is_finished(
    state: EmbeddedState, begun: tuple[SessionImport, Sequence[RecordedCommit]], path: Path
) -> None:
    assert state.head_sequence == 0
    ahead, rest = begun
    with pytest.raises(RecordingError, match="ends after 130 commits of 252"):
        ahead.finish()
    for commit in rest:
        ahead.add(commit)
    imported = ahead.finish()
    assert imported.content_hash == state.content_hash("s")
    assert state.get_value("s", "x") == 250
    state.close()
    assert maintenance.check(path).problems == ()


def test_most_is_written_before_the_end(
    begun: tuple[SessionImport, Sequence[RecordedCommit]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead, rest = begun
    for commit in rest[:-1]:
        ahead.add(commit)
    ahead.check()
    ahead.add(rest[-1])
    applied: list[int] = []
    apply = ImportCommit.apply

    def note(step: ImportCommit, uow: UnitOfWork) -> None:
        applied.append(step.commit.number)
        apply(step, uow)

    monkeypatch.setattr(ImportCommit, "apply", note)
    assert ahead.finish().commits == 252
    assert applied == [252]


def add_all(ahead: SessionImport, commits: Sequence[RecordedCommit]) -> None:
    for commit in commits:
        ahead.add(commit)
    ahead.check()


def test_an_error_in_the_middle_is_raised_before_the_end(state: EmbeddedState) -> None:
    header, commits = recording()
    with state.begin_import(header) as ahead:
        ahead.write_ahead()
        with pytest.raises(RecordingError, match="commit 5"):
            add_all(ahead, (*commits[:3], *commits[4:]))
    assert state.initialize_session("s").resumed is False


def test_closing_the_state_gives_it_up(state: EmbeddedState, path: Path) -> None:
    header, commits = recording(3)
    ahead = state.begin_import(header)
    ahead.write_ahead()
    ahead.add(commits[0])
    closing = threading.Thread(target=state.close)
    closing.start()
    closing.join(within(30))
    assert not closing.is_alive()
    with pytest.raises(UnavailableError, match="given up"):
        ahead.check()
    ahead.close()
    assert maintenance.check(path).problems == ()


def test_after_closing_none_begins(state: EmbeddedState) -> None:
    header, commits = recording(3)
    ahead = state.begin_import(header)
    state.close()
    ahead.write_ahead()
    with pytest.raises(EngineClosedError):
        add_all(ahead, commits)
    ahead.close()


def test_a_fork_in_between(
    state: EmbeddedState, begun: tuple[SessionImport, Sequence[RecordedCommit]], path: Path
) -> None:
    """It does not wait, and the child leaves the open transaction alone, even when it frees everything."""

    def use_and_free() -> str:
        gc.collect()
        with pytest.raises(ForkedProcessError) as raised:
            state.initialize_session("s")
        return str(raised.value)

    assert not forks.inside()
    assert in_child(use_and_free).startswith(f"{path} belongs to the process that this one was forked from")
    ahead, rest = begun
    for commit in rest:
        ahead.add(commit)
    ahead.finish()
    assert state.get_value("s", "x") == 250
    state.close()
    assert maintenance.check(path).problems == ()


@pytest.mark.parametrize("place", ["memory:", "sessions.db"])
def test_the_rest_of_a_recording_names_executions_as_the_whole_does(tmp_path: Path, place: str) -> None:
    """Their numbers are those of commits, also of commits that are left out."""

    @tool
    def count(ctx: ToolContext) -> int:
        ctx["x"] += 1
        return int(ctx["x"])

    with connect(place if place == "memory:" else tmp_path / place, tools=[count]) as state:
        other, ctx = Context("other", state), Context("s", state)
        for each in (other, ctx):
            each.define("x", 0)
        for number in range(3):
            other.call(count)
            ctx.execute(count, {}, idempotency_key=f"key-{number}")
            ctx.set("x", number, idempotency_key=f"set-{number}")
        with ctx.transaction() as transaction:
            transaction["x"] = 9
            header, whole = Recordable.of(state).record("s", reveal=True)
            commits = tuple(whole)
            for after in range(len(commits) + 1):
                rest = Recordable.of(state).record("s", reveal=True, after=after)
                assert (rest[0], tuple(rest[1])) == (header, commits[after:])


def test_what_is_written_during_the_copy_is_not_copied_in_the_pause(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    with Context("s") as ctx:
        ctx.define("x", 0)
        ctx["x"] = 2
        finish, record = CheckedImport.finish, moves._Move._record

        def write(move: moves._Move, *arguments: Any) -> Any:
            recording = record(move, *arguments)
            if not arguments:
                ctx["x"] = 1
            return recording

        def note(begun: CheckedImport) -> ImportedSession:
            seen.append(begun._content.commits)
            return finish(begun)

        copy = moves._Move._copy

        def pause(move: moves._Move) -> ImportedSession:
            seen.append(len(move._moved.sequences))
            return copy(move)

        monkeypatch.setattr(moves._Move, "_record", write)
        monkeypatch.setattr(moves._Move, "_copy", pause)
        monkeypatch.setattr(CheckedImport, "finish", note)
        ctx.ensure_persistent(path)
        assert seen == [4, 4]
        assert ctx["x"] == 1


def test_a_move_interrupted_while_the_last_is_written_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have arrived all the same, as the writer goes on."""
    result = imports._Ahead.finish

    def interrupt(ahead: imports._Ahead) -> ImportedSession:
        result(ahead)
        raise KeyboardInterrupt

    with Context("other", path) as other:
        other.define("y", 1)
    with Context("s") as ctx:
        ctx.define("x", 1)
        monkeypatch.setattr(imports._Ahead, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ctx.ensure_persistent(path)
        monkeypatch.undo()
        assert (ctx.backend.kind, ctx["x"]) == ("local", 1)
        with connect(path) as there:
            assert not there.heartbeat("s")
        ctx.ensure_persistent(path)
        assert ctx["x"] == 1


def test_the_pause_of_a_move_copies_nothing_that_was_there_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[bool] = []
    apply, go = ImportCommit.apply, moves._Move._go
    waiting = False

    def note(step: ImportCommit, uow: UnitOfWork) -> None:
        applied.append(waiting)
        apply(step, uow)

    def wait(*arguments: Any) -> None:
        nonlocal waiting
        waiting = True
        assert gc.isenabled()
        go(*arguments)
        assert gc.isenabled()

    monkeypatch.setattr(ImportCommit, "apply", note)
    monkeypatch.setattr(moves._Move, "_go", wait)
    verify = moves._Move._verify

    def uncollected(*arguments: Any) -> None:
        assert not gc.isenabled()
        verify(*arguments)

    monkeypatch.setattr(moves._Move, "_verify", uncollected)
    with Context("s") as ctx:
        for number in range(150):
            ctx.define(f"v{number}", number)
        ctx.ensure_persistent(path)
        assert len(ctx.variables) == 150
    assert applied == [False] * 151
