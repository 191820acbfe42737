"""Sessions of contexts that move to a database, and what has to stay where one process has the session."""

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dspex_persist.audit import SessionQuery
from dspex_persist.state.distributed import PostgresState
from dspex_persist.state.errors import (
    SessionPrunedError,
)
from dspex_persist.state.recording import write_recording
from dspex_persist.state.store.databases import check
from dspex_persist.wiring.connecting import open_audit
from dspex_persist.wiring.recordings import import_session, open_recording
from tests.assets.make_database import fill
from tests.deadline import within
from tests.engines import Databases
from tests.moving import Moving


@pytest.fixture
def elsewhere(postgres: Databases) -> Iterator[str]:
    """Another database."""
    url = postgres.create()
    yield url
    postgres.drop(url)


class TestMoving(Moving):
    pass


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
