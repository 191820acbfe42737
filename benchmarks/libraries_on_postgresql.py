"""Adapters for `make peers` of what keeps state, or executes durably, on PostgreSQL: all on the same server.

The server is one that the run has started. Each measurement has a new database.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.libraries import Adapter, AnyAdapter, Dbos, DspexPersist, LanggraphCheckpoint, State

OURS_ON_POSTGRESQL = "ours-postgresql"
URL = "DSPEX_BENCH_POSTGRESQL"
"""The environment variable with the URL of the server's own database."""


class OnPostgresql(Adapter):
    """What the adapters have in common."""

    store = "PostgreSQL"
    durability: ClassVar[str] = "fsync={fsync} and synchronous_commit={synchronous_commit}, the server's own default"

    @classmethod
    def describe_durability(cls, path: Path) -> str:
        """See `Adapter.describe_durability`, as a new connection has it."""
        with import_module("psycopg").connect(database_url(path)) as connection:
            settings = ("fsync", "synchronous_commit")
            return cls.durability.format(
                **{name: connection.execute(f"SHOW {name}").fetchone()[0] for name in settings}
            )


def database_url(path: Path) -> str:
    """Return the URL of the database that stands for a file. It is created if it is not there."""
    psycopg: Any = import_module("psycopg")
    own = os.environ[URL]
    name = f"{path.parent.name}_{path.stem}".lower().replace("-", "_")
    with psycopg.connect(own, autocommit=True) as connection:
        if connection.execute("SELECT FROM pg_database WHERE datname = %s", (name,)).fetchone() is None:
            connection.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)))
    return own.replace("/postgres?", f"/{name}?")


class DspexPersistOnPostgresql(OnPostgresql, DspexPersist):
    title = "dspex-persist (PostgreSQL)"
    lacks = "ten value types; does check types, constraints, versions, a hash chain, what other servers have written"

    def open(self, path: Path, sessions: Sequence[str]) -> None:
        self._open(database_url(path), sessions)


class LanggraphOnPostgresql(OnPostgresql, LanggraphCheckpoint):
    """A saver lets one thread in at a time: each session has one of its own, all on one pool of connections."""

    title = "langgraph-checkpoint-postgres"
    distribution = "langgraph-checkpoint-postgres"
    connections: ClassVar[int] = 16

    def open(self, path: Path, sessions: Sequence[str]) -> None:
        self._empty_checkpoint = import_module("langgraph.checkpoint.base").empty_checkpoint
        saver: Any = import_module("langgraph.checkpoint.postgres").PostgresSaver
        options = {"autocommit": True, "prepare_threshold": 0, "row_factory": import_module("psycopg.rows").dict_row}
        self._stack = ExitStack()
        pool = import_module("psycopg_pool").ConnectionPool(
            database_url(path), min_size=self.connections, max_size=self.connections, kwargs=options, open=False
        )
        self._stack.enter_context(pool)
        saver(pool).setup()
        self._savers: dict[str, Any] = {session: saver(pool) for session in sessions}
        self._configs: dict[str, Any] = {}
        self._states: dict[str, State] = {}
        for session in sessions:
            self._open_session(session)

    def _saver_of(self, session: str) -> Any:
        return self._savers[session]

    def close(self) -> None:
        self._stack.close()


class DbosOnPostgresql(OnPostgresql, Dbos):
    title = "DBOS (PostgreSQL)"

    def open(self, path: Path, sessions: Sequence[str]) -> None:
        self._launch({"system_database_url": database_url(path)})


ON_POSTGRESQL: dict[str, type[AnyAdapter]] = {
    OURS_ON_POSTGRESQL: DspexPersistOnPostgresql,
    "langgraph-postgresql": LanggraphOnPostgresql,
    "dbos-postgresql": DbosOnPostgresql,
}
