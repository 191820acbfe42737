"""What is demanded of a database, of names in it, and of this machine's clock; how connections are set."""

import io
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from dspex_persist import clock
from dspex_persist.state.distributed import PostgresState
from dspex_persist.state.errors import InvalidArgumentError, NotADatabaseError, StateError
from dspex_persist.state.limits import Limits
from dspex_persist.state.local import LocalState
from dspex_persist.state.model import Value
from dspex_persist.state.recording import write_recording
from dspex_persist.state.store.databases import check
from dspex_persist.state.store.postgres import clocks
from dspex_persist.state.store.postgres.connections import Database
from dspex_persist.state.store.session_store import StoreOptions
from dspex_persist.wiring.connecting import open_audit
from dspex_persist.wiring.recordings import import_session
from tests.engines import Postgres
from tests.postgresql.pooler import Pooler


@pytest.fixture(scope="class")
def state(postgresql_url: str) -> Iterator[PostgresState]:
    with PostgresState(postgresql_url) as state:
        yield state


# The database


def test_commits_that_a_crash_would_lose(url: str, connection: Any) -> None:
    (name,) = connection.execute("SELECT current_database()").fetchone()
    connection.execute(f"ALTER DATABASE {name} SET synchronous_commit = off".encode())
    with pytest.raises(NotADatabaseError, match=r"synchronous_commit is off.*or choose the durability normal"):
        PostgresState(url)
    with PostgresState(url, StoreOptions(durability="normal")) as state:
        state.initialize_session("s")
        assert setting(state, "synchronous_commit") == "off"
    # Readers do not mind.
    open_audit(url).close()


UNUSUAL = {
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "statement_timeout": "50ms",
    "lock_timeout": "1ms",
    "idle_in_transaction_session_timeout": "10ms",
    "idle_session_timeout": "10s",
    "timezone": "Asia/Kathmandu",
    "datestyle": "German",
    "intervalstyle": "sql_standard",
    "bytea_output": "escape",
    "array_nulls": "off",
    "quote_all_identifiers": "on",
    "standard_conforming_strings": "off",
    "search_path": "nowhere",
    "client_min_messages": "debug1",
    "row_security": "off",
}


def test_settings_that_do_not_matter(url: str, connection: Any) -> None:
    (name,) = connection.execute("SELECT current_database()").fetchone()
    for setting_, unusual in UNUSUAL.items():
        connection.execute(f"ALTER DATABASE {name} SET {setting_} = '{unusual}'".encode())
    with PostgresState(url) as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "string", "a\\b'c", metadata={"at": "1"})
        assert state.set_variable("s", "x", "d") == 1
        assert [each.version for each in state.get_variable_history("s", "x")] == [1, 0]
        with state.audit() as audit:
            assert audit.version("s", "x", 0).metadata == {"at": "1"}
    report = check(url)
    assert (report.commits, report.problems) == (3, ())


@pytest.mark.parametrize("name", ["fsync", "full_page_writes"])
def test_files_that_a_power_cut_would_destroy(own_postgres: Postgres, name: str) -> None:
    with psycopg.connect(own_postgres.url(), autocommit=True) as connection:
        connection.execute(f"ALTER SYSTEM SET {name} = off".encode())
        connection.execute("SELECT pg_reload_conf()")
        while connection.execute(f"SHOW {name}".encode()).fetchone() != ("off",):
            pass
    with pytest.raises(NotADatabaseError, match=f"{name} is off, so that a power cut may destroy the database"):
        PostgresState(own_postgres.url())


def test_another_encoding(url: str, connection: Any) -> None:
    name = f"t{uuid4().hex}"
    connection.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0".encode())
    try:
        (current,) = connection.execute("SELECT current_database()").fetchone()
        with pytest.raises(NotADatabaseError, match="its encoding is LATIN1, not UTF8"):
            PostgresState(url.replace(current, name))
    finally:
        connection.execute(f"DROP DATABASE {name}".encode())


FACTS = {
    "number": 180_000,
    "version": "18.0",
    "encoding": "UTF8",
    "is_standby": False,
    "fsync": "on",
    "full_pages": "on",
    "commit": "on",
}


@pytest.mark.parametrize(
    ("fact", "reason"),
    [
        ({"number": 130_015, "version": "13.15"}, "it is PostgreSQL 13.15; 14 or newer is needed"),
        ({"is_standby": True}, "it is a standby, which takes no writes: name the primary"),
    ],
)
def test_other_servers(fact: dict[str, Any], reason: str) -> None:
    Database("postgresql://host/db")._check(**FACTS)
    with pytest.raises(NotADatabaseError, match=reason):
        Database("postgresql://host/db")._check(**FACTS | fact)


@pytest.mark.parametrize("by_session", [False, True])
def test_poolers(filled: str, by_session: bool) -> None:
    with tempfile.TemporaryDirectory() as folder, Pooler(filled, Path(folder), by_session=by_session) as pooler:
        if by_session:
            with PostgresState(pooler.url) as state:
                assert state.set_variable("s", "x", 2) == 1
            return
        for use in (PostgresState, open_audit, check):
            with pytest.raises(
                NotADatabaseError, match="a pooler gives its connections to others between transactions"
            ):
                use(pooler.url)
        # Others that use it have nothing of ours.
        with psycopg.connect(pooler.url, autocommit=True) as other:
            for name, default in (("search_path", '"$user", public'), ("enable_seqscan", "on"), ("lock_timeout", "0")):
                assert other.execute("SELECT current_setting(%s)", (name,)).fetchone() == (default,)


# Connections


def setting(state: PostgresState, name: str) -> str:
    row = state._store._writing.driver.execute("SELECT current_setting(%s)", (name,)).fetchone()
    assert row is not None
    return str(row[0])


class TestSettings:
    @pytest.mark.parametrize(
        ("name", "wanted"),
        [
            ("lock_timeout", "10s"),
            ("idle_in_transaction_session_timeout", "5s"),
            ("synchronous_commit", "on"),
            ("search_path", '"public"'),
            ("TimeZone", "UTC"),
        ],
    )
    def test_of_the_session(self, state: PostgresState, name: str, wanted: str) -> None:
        assert setting(state, name) == wanted

    def test_the_name_of_the_server(self, state: PostgresState) -> None:
        assert setting(state, "application_name") == f"dspex-persist:{state._store._lease.server_id[:12]}"

    def test_what_the_url_says_wins(self, postgresql_url: str) -> None:
        with PostgresState(f"{postgresql_url}&application_name=mine&connect_timeout=7") as state:
            assert setting(state, "application_name") == "mine"
            assert state._store._writing.driver.info.get_parameters()["connect_timeout"] == "7"


# Clocks


@pytest.mark.parametrize("ahead_s", [-60.0, 60.0])
def test_a_clock_that_is_wrong(url: str, monkeypatch: pytest.MonkeyPatch, ahead_s: float) -> None:
    ahead = timedelta(seconds=ahead_s)
    monkeypatch.setattr(clocks, "clock", SimpleNamespace(now=lambda: clock.now() + ahead))
    with pytest.raises(NotADatabaseError, match=r"its clock and that of this machine differ by (59|60)\.\d s"):
        PostgresState(url)


def test_a_clock_that_is_not_quite_right(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(clocks, "clock", SimpleNamespace(now=lambda: clock.now() + timedelta(seconds=3)))
    with PostgresState(url) as state:
        state.initialize_session("s")
    assert "the clocks of this machine and of the database differ" in caplog.text


# Names


def test_names_that_no_index_takes(url: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"together at most 650.*they are 600 and 255"):
        PostgresState(url, StoreOptions(limits=Limits(name_length=600)))
    with PostgresState(url, StoreOptions(limits=Limits(name_length=400, session_id_length=250))) as state:
        session, name = "\N{GRINNING FACE}" * 250, "".join(chr(0x1F600 + place % 60) for place in range(400))
        state.initialize_session(session)
        state.register_variable(session, name, "integer", 1, idempotency_key=name)
        assert state.set_variable(session, name, 2, idempotency_key=name[::-1]) == 1


def test_keys_of_metadata_that_no_index_takes(url: str, connection: Any) -> None:
    fits, does_not = "".join(chr(0x4E00 + place) for place in range(866)), "\N{GREEK SMALL LETTER BETA}" * 1_301
    with PostgresState(url) as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 1)
        assert state.set_variable("s", "x", 2, metadata={fits: "y"}) == 1
        with pytest.raises(InvalidArgumentError, match=r"the key 'β+\.\.\.' has 2602 bytes; .* at most 2600"):
            state.set_variable("s", "x", 3, metadata={"unit": "m", does_not: "y"})
        assert state.get_variable("s", "x").version == 1
        assert state.set_variable("s", "x", 3) == 2
    assert connection.execute("SELECT count(*) FROM commits").fetchone() == (4,)


def test_a_recording_with_nul(url: str) -> None:
    with LocalState() as source:
        source.initialize_session("recorded", actor="a-b")
        recording = io.StringIO()
        write_recording(*source.record("recorded"), recording)
    lines = recording.getvalue().replace("a-b", "a\\u0000b").splitlines(keepends=True)
    with pytest.raises(StateError) as refused:
        import_session(url, lines)
    assert "NUL" in str(refused.value)


def test_values_may_have_nul(state: PostgresState) -> None:
    state.initialize_session("nul")
    state.register_variable("nul", "x", "string", "a\0b")
    found = state.get_variable("nul", "x")
    assert found.value == Value('"a\\u0000b"')
    with state.audit() as audit:
        assert audit.version("nul", found.id, 0).value is not None
