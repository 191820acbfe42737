"""Resuming a live session and heartbeats: neither waits for the writer, and neither makes a commit."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from freezegun import freeze_time

from dspex_persist.state.commands import Command, Heartbeat, InitializeSession, ResumeSession
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.unit_of_work import UnitOfWork
from tests.deadline import within

DEADLINE_S = within(10)
METADATA = {"owner": "ada", "ttl_seconds": "60"}


@dataclass(frozen=True, slots=True)
class Block(Command[None]):
    """Occupies the writer until `go`."""

    began: threading.Event
    go: threading.Event
    writes: ClassVar[bool] = True

    def apply(self, uow: UnitOfWork) -> None:
        self.began.set()
        assert self.go.wait(DEADLINE_S)


@contextmanager
def busy(state: EmbeddedState) -> Iterator[None]:
    """Keep the writer busy in the block."""
    began, go = threading.Event(), threading.Event()
    blocked = state.submit(Block("elsewhere", began, go))
    assert began.wait(DEADLINE_S)
    try:
        yield
    finally:
        go.set()
        blocked.result(DEADLINE_S)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[EmbeddedState]:
    with EmbeddedState(tmp_path / "x.db") as state:
        state.initialize_session("s", METADATA)
        state.register_variable("s", "x", "integer", 1)
        yield state


def test_neither_waits_for_the_writer(state: EmbeddedState) -> None:
    with busy(state):
        assert state.submit(Heartbeat("s")).result(0) is True
        view = state.submit(ResumeSession("s", {"owner": "ada"})).result(0)
        assert view is not None
        assert view == state.submit(ResumeSession("s", METADATA)).result(0)
        writing = state.submit(InitializeSession("s", METADATA))
        assert not writing.done()
    assert writing.result(DEADLINE_S) == view
    assert [variable.name for variable in view.variables] == ["x"]


@pytest.mark.parametrize("metadata", [{"owner": "bob"}, {"more": ""}, {"ttl_seconds": "61"}])
def test_what_has_to_be_written(state: EmbeddedState, metadata: dict[str, str]) -> None:
    assert state.run(ResumeSession("s", metadata)) is None
    assert state.run(ResumeSession("unknown", metadata)) is None
    assert state.initialize_session("s", metadata).resumed
    assert state.run(ResumeSession("s", metadata)) is not None


def test_an_expired_session_is_not_resumed(tmp_path: Path) -> None:
    with freeze_time("2030-01-01") as moment, EmbeddedState(tmp_path / "x.db") as state:
        state.initialize_session("s", METADATA)
        moment.tick(59)
        assert state.run(ResumeSession("s", METADATA)) is not None
        moment.tick(59)
        assert state.run(ResumeSession("s", METADATA)) is not None
        moment.tick(61)
        assert state.run(ResumeSession("s", METADATA)) is None


def test_one_that_is_not_in_memory_is_not_loaded(state: EmbeddedState, tmp_path: Path) -> None:
    state.close()
    with EmbeddedState(tmp_path / "x.db") as again:
        assert again.run(ResumeSession("s", METADATA)) is None
        assert again.initialize_session("s", METADATA).resumed
        assert again.run(ResumeSession("s", METADATA)) is not None
