"""Reads of sessions that are not in memory, while others have the lock of the log."""

from typing import Any

from dspex_persist.state.commands import GetVariable, SetVariable
from dspex_persist.state.distributed import PostgresState
from dspex_persist.state.model import Value
from dspex_persist.state.store.postgres.schema import LOCKS
from tests.deadline import within

THE_LOCK = f"({LOCKS}, 'head'::regclass::oid::int)"


def test_a_session_is_read_while_another_server_writes(filled: str) -> None:
    import psycopg

    with PostgresState(filled) as state, psycopg.connect(filled, autocommit=True) as other:
        other.execute(f"SELECT pg_advisory_lock{THE_LOCK}")
        future: Any = state.submit(GetVariable("s", "x"))
        assert future.result(within(5)).value.json == "1"
        writing = state.submit(SetVariable("s", "x", Value("2")))
        assert state.get_value("s", "x") == 1
        assert not writing.done()
        other.execute(f"SELECT pg_advisory_unlock{THE_LOCK}")
        assert writing.result(within(5)) == 1
        assert state.get_value("s", "x") == 2
