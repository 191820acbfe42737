"""Sessions of contexts that move to a database, and what has to stay where one process has the session."""

import io
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dspex_persist import Context, connect
from dspex_persist.audit import SessionQuery
from dspex_persist.state.distributed import PostgresState
from dspex_persist.state.errors import (
    SessionMovedError,
    SessionNotFoundError,
    SessionPrunedError,
    StateError,
    UnsupportedError,
)
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.recording import write_recording
from dspex_persist.state.store.databases import check
from dspex_persist.wiring.connecting import open_audit
from dspex_persist.wiring.recordings import import_session, open_recording
from tests.assets.make_database import fill
from tests.deadline import within
from tests.engines import Databases


def test_a_context_moves_its_session_to_a_database(url: str) -> None:
    with Context("s", "local") as ctx:
        ctx["a"] = 1
        ctx.move_to(url)
        ctx["a"] += 1
        assert "distributed" in ctx.backend.capabilities
        with connect(url) as other:
            assert other.get_value("s", "a") == 2
            other.set_variable("s", "a", 3)
        assert ctx["a"] == 3


def test_functions_of_one_process_do_not_come_along(url: str) -> None:
    with Context("s", "local") as ctx:
        ctx["a"] = 1
        ctx.derive("double", ["a"], lambda a: 2 * a)
        with pytest.raises(UnsupportedError, match=r"a database that servers share, with derived variables \(double\)"):
            ctx.move_to(url)
        ctx["a"] = 4
        assert ctx["double"] == 8


def test_a_database_derives_nothing(url: str) -> None:
    with Context("s", url) as ctx:
        ctx["a"] = 1
        with pytest.raises(UnsupportedError, match="derived variables"):
            ctx.derive("double", ["a"], lambda a: 2 * a)


def recorded(address: Path | str, session_id: str, started: int | None = None) -> str:
    text = io.StringIO()
    with open_recording(address, session_id, started=started, reveal=True) as (header, commits):
        write_recording(header, commits, text)
    return text.getvalue()


def test_a_database_exports_what_it_has_imported_as_a_file_does(url: str, tmp_path: Path) -> None:
    """Each session of a file, live or ended: the same bytes as another file, and a sound log."""
    file, other, exported = tmp_path / "file.db", tmp_path / "other.db", 0
    fill(file)
    with open_audit(file) as past:
        sessions = list(past.iterate(SessionQuery()))
    for number, session in enumerate(sessions):
        try:
            lines = recorded(file, session.session_id, session.started_sequence)
        except SessionPrunedError:
            continue
        # Several sessions may have had one id.
        name = f"{session.session_id}.{number}"
        for place in (url, other):
            import_session(place, lines.splitlines(keepends=True), session_id=name)
        assert recorded(url, name) == recorded(other, name)
        exported += 1
    assert exported > 2
    assert check(url).problems == ()


def test_a_session_leaves_a_database_while_others_write_it(url: str, tmp_path: Path) -> None:
    acknowledged: list[list[int]] = [[] for _ in range(3)]
    refused: list[StateError] = []

    def client(state: StateProvider, name: str, mine: list[int]) -> None:
        number = 0
        while True:
            number += 1
            try:
                state.set_variable("s", name, number)
            except (SessionMovedError, SessionNotFoundError) as error:
                refused.append(error)
                return
            mine.append(number)

    with Context("s", url) as ctx, connect(url) as other, connect(url) as third:
        for name in ("x0", "x1", "x2"):
            ctx[name] = 0
        threads = [
            threading.Thread(target=client, args=(state, f"x{number}", acknowledged[number]))
            for number, state in enumerate((other, other, third))
        ]
        for thread in threads:
            thread.start()
        while min(len(each) for each in acknowledged) < 20:
            time.sleep(0.01)
        ctx.move_to(tmp_path / "moved.db")
        for thread in threads:
            thread.join(within(30))
        assert len(refused) == 3
        # Each acknowledged write is here, and none was acknowledged there after the move.
        for number, mine in enumerate(acknowledged):
            values = [
                version.value.json for version in ctx.backend.provider.get_variable_history("s", f"x{number}", 5000)
            ]
            assert [int(each) for each in reversed(values)][1:] == mine
        ctx["x0"] = -1
        assert ctx["x0"] == -1
        with pytest.raises(SessionNotFoundError):
            other.get_session("s")


def test_a_session_moves_from_a_database_to_another(url: str, postgres: Databases) -> None:
    there = postgres.create()
    try:
        with Context("s", url) as ctx:
            ctx["a"] = 1
            ctx.move_to(there)
            ctx["a"] = 2
            with connect(there) as other, connect(url) as before:
                assert other.get_value("s", "a") == 2
                assert not before.heartbeat("s")
    finally:
        postgres.drop(there)


def test_groups_look_for_holds_only_while_there_are_some(url: str, connection: Any) -> None:
    def has_holds() -> bool:
        return bool(connection.execute("SELECT has_holds FROM head").fetchone()[0])

    with PostgresState(url, sweep_interval_s=0.05), PostgresState(url, lease_s=30) as dying:
        dying.initialize_session("s")
        dying.hold_session("s").close()
        assert not has_holds()
        held = dying.hold_session("s")
        assert has_holds()
        connection.execute("UPDATE servers SET renewed_at = 'epoch' WHERE lease_s = 30")
        deadline = time.monotonic() + within(10)
        while has_holds():
            assert time.monotonic() < deadline, "the hold of a server that is dead is still there"
            time.sleep(0.01)
        held.close()
