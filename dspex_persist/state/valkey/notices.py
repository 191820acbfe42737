"""Notices of other servers' commits: hints, some of which may be lost."""

import threading
from collections.abc import Callable
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from dspex_persist.infra.logs import get_logger
from dspex_persist.state.valkey.connection import reason_of

_POLL_S: Final = 1.0
_logger: Final = get_logger(__name__)


class Notices:
    """Listens on a connection and a thread of its own, until it is closed.

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
        self._channel, self._own, self._on_news = channel, own.encode(), on_news
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="dspex-persist-notices")
        self._thread.start()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._listen()
            except (redis.RedisError, OSError, ValueError) as error:
                # The last one comes from a connection that is closed meanwhile.
                _logger.debug("not listening", reason=reason_of(error))
                self._closed.wait(_POLL_S)

    def _listen(self) -> None:
        with self._client.pubsub() as subscription:
            subscription.subscribe(self._channel)
            self._on_news()
            while not self._closed.is_set():
                notice = subscription.get_message(ignore_subscribe_messages=True, timeout=_POLL_S)
                if notice is not None and notice["data"] != self._own:
                    self._on_news()

    def end(self) -> None:
        """Have the thread end with the next notice, whoever sends it."""
        self._closed.set()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join(2 * _POLL_S)
        self._client.close()
