"""The lease of this server, the executions of those that have lost theirs, and where servers are reached."""

import json
import uuid
from collections.abc import Mapping, Sequence

from dspex_persist.state.log_store import FencedError
from dspex_persist.state.valkey import codec
from dspex_persist.state.valkey.connection import Connection, reported
from dspex_persist.state.valkey.keys import Keys

_FENCED = b"fenced"


class Leases:
    """The lease of this server, and those of the others.

    A lease has a token: its epoch, which no other lease ever has, and a number. An append is refused under any other
    token. Another epoch means that this server was taken for dead; another number, that this server itself has given up
    the calls before.

    Args:
        connection: For what may be sent again.
        keys: The names of the keys.
        lease_s: How long a server is taken for alive after it has renewed its lease, in seconds.

    Attributes:
        server: The id of this server.
        token: Its token.
    """

    def __init__(self, connection: Connection, keys: Keys, lease_s: float) -> None:
        self._connection, self._client, self._keys = connection, connection.client, keys
        self.lease_s = lease_s
        self.server = uuid.uuid4().hex
        self.token = ""

    @property
    def epoch(self) -> str:
        """The epoch of the lease."""
        return self.token.partition(".")[0]

    def begin(self) -> None:
        """Begin a lease, which ends the one before."""
        keys = (*self._keys.of_leases, self._keys.leases)
        self.token = self._connection.call("register", keys, self.server, self.lease_s).decode()

    def is_current(self, token: bytes | None) -> bool:
        """Whether this is what the store has as the token of this server."""
        return token is not None and token.decode() == self.token

    @reported
    def renew(self) -> None:
        """See `SharedLog.renew`."""
        keys = (self._keys.servers, self._keys.leases)
        if self._connection.call("renew", keys, self.server, self.epoch, self.lease_s) == _FENCED:
            raise FencedError

    def give_up_calls(self, connection: Connection) -> bool:
        """Have the store refuse calls of this server that are still on their way.

        Returns:
            Whether this server still has its lease. If not, they are refused as well.
        """
        token = connection.call("settle", (self._keys.servers,), self.server, self.epoch)
        if token == _FENCED:
            return False
        self.token = token.decode()
        return True

    @reported
    def fence(self) -> Sequence[str]:
        """See `SharedLog.fence`."""
        servers = self._connection.call("fence", (*self._keys.of_leases, self._keys.leases), self.server)
        if not servers:
            return ()
        addresses = self._client.hmget(self._keys.addresses, servers)
        self._client.hdel(self._keys.addresses, *servers)
        return [codec.text_in(address or server) for server, address in zip(servers, addresses, strict=True)]

    def leave(self) -> None:
        """End the lease."""
        keys = (*self._keys.of_leases, self._keys.leases, self._keys.addresses)
        self._connection.call("leave", keys, self.server)

    # Executions

    @reported
    def unfinished(self) -> Mapping[str, Sequence[str]]:
        """See `LogStore.unfinished`: of servers that have no lease any more."""
        # In this order, so that the lease of each execution that is found has begun before.
        running = self._client.hgetall(self._keys.running)
        tokens = self._client.hgetall(self._keys.servers) if running else {}
        epochs = {server: token.partition(b".")[0].decode() for server, token in tokens.items()}
        found: dict[str, list[str]] = {}
        for execution_id, content in running.items():
            session_id, server, epoch = json.loads(content)
            if epochs.get(server.encode()) != epoch:
                found.setdefault(session_id, []).append(codec.text_in(execution_id))
        return found

    @reported
    def announce(self, address: str) -> None:
        """See `SharedLog.announce`."""
        self._client.hset(self._keys.addresses, self.server, codec.utf8(address))

    @reported
    def server_of(self, execution_id: str) -> str | None:
        """See `SharedLog.server_of`."""
        content = self._client.hget(self._keys.running, codec.utf8(execution_id))
        if content is None:
            return None
        _, server, epoch = json.loads(content)
        token = self._client.hget(self._keys.servers, server)
        if server == self.server or token is None or token.partition(b".")[0].decode() != epoch:
            return None
        address = self._client.hget(self._keys.addresses, server)
        return "" if address is None else codec.text_in(address)
