"""Notices of other servers' commits."""

from collections.abc import Callable, Generator
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from dspex_persist.state.shared.listener import POLL_S, Listener
from dspex_persist.state.valkey.connection import reason_of


class Notices(Listener):
    """Listens on a connection of its own; see `Listener`.

    Args:
        client: A client that nobody else uses.
        channel: The channel.
        own: What notices of this server say.
        on_news: Called when others may have committed: also after each connect, as some may have been missed.
    """

    def __init__(self, client: redis.Redis, channel: str, own: str, on_news: Callable[[], None]) -> None:
        # By default, a client connects and subscribes again by itself: that notices were missed would not be noticed.
        client.set_retry(Retry(NoBackoff(), 0))
        self._client: Any = client
        self._channel, self._own = channel, own.encode()
        # The last one comes from a connection that is closed meanwhile.
        super().__init__(self._notices, on_news, (redis.RedisError, OSError, ValueError), reason_of)

    def _notices(self) -> Generator[bool]:
        with self._client.pubsub() as subscription:
            subscription.subscribe(self._channel)
            yield True
            while True:
                notice = subscription.get_message(ignore_subscribe_messages=True, timeout=POLL_S)
                yield notice is not None and notice["data"] != self._own

    def close(self) -> None:
        """End the thread, and the connection."""
        super().close()
        self._client.close()
