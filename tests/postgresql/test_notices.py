"""Notices between servers: a server tells the others, as long as there are any."""

from typing import Any

import psycopg

from dspex_persist.state.distributed import PostgresState
from dspex_persist.state.store.postgres.postgres_log import PostgresLog
from tests.deadline import within
from tests.engines import wait_until


def test_a_server_that_is_alone_tells_nobody(filled: str) -> None:
    def notices(state: PostgresState) -> Any:
        assert isinstance(state._store, PostgresLog)
        return state._store._notices

    with PostgresState(filled, lease_s=1.0) as one:
        wait_until(lambda: not notices(one).has_others)
        one.set_variable("s", "x", 3)
        assert not notices(one)._to_tell.is_set()
        with PostgresState(filled) as two, two.watch("s", ["x"]) as watch:
            wait_until(lambda: notices(one).has_others)
            assert notices(two).has_others
            one.set_variable("s", "x", 4)
            assert [each.variable.version for each in watch.next(within(10))] == [2]
        # It has left: a renewal of the lease tells.
        wait_until(lambda: not notices(one).has_others)


def test_a_server_that_is_fenced_counts_no_more(filled: str) -> None:
    with PostgresState(filled, lease_s=1.0) as one, psycopg.connect(filled, autocommit=True) as connection:
        assert isinstance(one._store, PostgresLog)
        notices = one._store._notices
        connection.execute("INSERT INTO servers (server_id, epoch, renewed_at, lease_s) VALUES ('gone', 1, now(), 1)")
        wait_until(lambda: notices.has_others)
        connection.execute("UPDATE servers SET epoch = 2, renewed_at = 'infinity' WHERE server_id = 'gone'")
        wait_until(lambda: not notices.has_others)
