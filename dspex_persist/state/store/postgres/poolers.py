"""Finds poolers that give a connection to another client between two transactions: nothing set for it would hold."""

import uuid
from collections.abc import Callable
from contextlib import closing
from typing import Any, Final

import psycopg

from dspex_persist.state.errors import NotADatabaseError

_SET: Final = "SELECT set_config('dspex_persist.held_by', %s, false)"
_GET: Final = "SELECT current_setting('dspex_persist.held_by', true)"
_LOOKS: Final = 3


def refuse_shared(
    connection: "psycopg.Connection[Any]", connect: "Callable[[], psycopg.Connection[Any]]", name: str
) -> None:
    """Raise `NotADatabaseError` if others may get what is set for this connection.

    Args:
        connection: A connection outside of a transaction.
        connect: Opens another one.
        name: How errors name the database.
    """
    if _ask(connection, "SELECT pg_backend_pid()") == connection.info.backend_pid:
        # It is PostgreSQL itself that answers.
        return
    mark = uuid.uuid4().hex
    connection.execute(_SET, (mark,))
    with closing(connect()) as other:
        for _ in range(_LOOKS):
            if _ask(other, _GET) == mark or _ask(connection, _GET) != mark:
                reason = "a pooler gives its connections to others between transactions"
                raise NotADatabaseError(name, f"{reason}: connect without it, or set it to pool_mode = session")


def _ask(connection: "psycopg.Connection[Any]", statement: str) -> object:
    row = connection.execute(statement).fetchone()
    assert row is not None, "it has one row"
    return row[0]
