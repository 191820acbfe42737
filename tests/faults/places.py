"""The places where several servers keep one log: a PostgreSQL database, or a Valkey server."""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dspex_persist.state.shared import SharedGroups, SharedState
from dspex_persist.state.shared_log import SharedLog
from tests.engines import Databases, Postgres, Server, Valkey, remove_keys


class Place(ABC):
    """One log, and how to open it. It ends with its server.

    Attributes:
        server: The database server.
    """

    server: Server

    @property
    @abstractmethod
    def socket(self) -> Path:
        """Where its server listens."""

    @abstractmethod
    def url(self, socket: Path | None = None) -> str:
        """Return the address; over another socket, if one is given."""

    @abstractmethod
    def log(self, socket: Path | None = None, *, lease_s: float = 15.0, settle_s: float = 10.0) -> SharedLog:
        """Open the log as another server does."""

    @abstractmethod
    def remove(self) -> None:
        """Remove the log, once nobody has it open."""

    def open(
        self, socket: Path | None = None, *, on_fatal: Callable[[BaseException], None] | None = None, **given: Any
    ) -> SharedState:
        """Open an engine as another server does."""
        return SharedState(SharedGroups(self.log(socket, **given)), on_fatal=on_fatal)


class PostgresPlace(Place):
    def __init__(self, server: Postgres) -> None:
        self.server = server
        self._databases = Databases(server.url())
        self._url = self._databases.create()

    def remove(self) -> None:
        self._databases.drop(self._url)

    @property
    def socket(self) -> Path:
        return self.server.directory / ".s.PGSQL.5432"

    def url(self, socket: Path | None = None) -> str:
        return self._url.partition("?")[0] + f"?host={(socket or self.socket).parent}"

    def log(self, socket: Path | None = None, *, lease_s: float = 15.0, settle_s: float = 10.0) -> SharedLog:
        from dspex_persist.state.store.postgres.postgres_log import PostgresLog

        return PostgresLog(self.url(socket), lease_s=lease_s, settle_s=settle_s)


class ValkeyPlace(Place):
    def __init__(self, server: Valkey) -> None:
        self.server = server
        self._prefix = f"t{uuid.uuid4().hex}"

    def remove(self) -> None:
        remove_keys(self.server.url(), self._prefix)

    @property
    def socket(self) -> Path:
        return self.server.directory / "s"

    def url(self, socket: Path | None = None) -> str:
        return f"redis+unix://{socket or self.socket}?prefix={self._prefix}"

    def log(self, socket: Path | None = None, *, lease_s: float = 15.0, settle_s: float = 10.0) -> SharedLog:
        import redis

        from dspex_persist.state.valkey.valkey_log import ValkeyLog

        path = str(socket or self.socket)
        return ValkeyLog(lambda: redis.Redis(unix_socket_path=path), prefix=self._prefix, lease_s=lease_s)
