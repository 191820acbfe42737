"""The connections to the store, and its functions."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from dspex_persist.state.errors import Hint, StorageError, UnavailableError

P = ParamSpec("P")
R = TypeVar("R")

UNCERTAIN: Final = (redis.ConnectionError, redis.TimeoutError)
"""After these errors, nobody knows whether a command was carried out."""
TIMEOUT_S: Final = 10.0
"""How long an answer may take."""
_SOURCE: Final = Path(__file__).with_name("functions.lua").read_text(encoding="utf-8")
_LIBRARY: Final = f"dspex_{sha256(_SOURCE.encode()).hexdigest()[:12]}"
"""Named by its content, so that servers of several releases can share a store."""
_NO_FUNCTION: Final = re.compile("function not found", re.IGNORECASE)


class Connection:
    """A client of the store, with the functions of this release.

    Args:
        client: The client, which this object configures: its answers are bytes.
        retries: How often a command is sent again if its connection broke. It may have been carried out before, so
            only commands that read, or that may be repeated, can be.
    """

    def __init__(self, client: redis.Redis, *, retries: int) -> None:
        # By default, a client sends any command again, up to ten times.
        # A store that has not answered in time is not asked again: that would take as long again.
        client.set_retry(Retry(NoBackoff(), retries, supported_errors=(redis.ConnectionError,)))
        # Without its annotations, which answer every command with a value or something to await.
        self.client: Any = client

    def call(self, function: str, keys: Sequence[str], *words: Any) -> Any:
        """Call a function; it is loaded first if the store does not have it."""
        return self._loaded(lambda: self.client.fcall(f"{_LIBRARY}_{function}", len(keys), *keys, *words))

    def call_durably(self, function: str, keys: Sequence[str], words: Sequence[Any], timeout_s: float) -> Any:
        """Call a function, and wait until what it has written is on disk.

        Returns:
            Its answer; None if that was not on disk in time.
        """

        def both() -> Any:
            pipeline = self.client.pipeline(transaction=False)
            pipeline.fcall(f"{_LIBRARY}_{function}", len(keys), *keys, *words)
            pipeline.execute_command("WAITAOF", 1, 0, int(timeout_s * 1000))
            answer, synced = pipeline.execute(raise_on_error=False)
            for each in (answer, synced):
                if isinstance(each, Exception):
                    raise each
            return answer if synced[0] >= 1 else None

        return self._loaded(both)

    def wait_for_disk(self, timeout_s: float) -> bool:
        """Wait until what this connection has written is on disk; returns whether it was in time."""
        return bool(self.client.execute_command("WAITAOF", 1, 0, int(timeout_s * 1000))[0] >= 1)

    def read(self, function: str, keys: Sequence[str], *words: Any) -> Any:
        """Call a function that writes nothing."""
        return self._loaded(lambda: self.client.fcall_ro(f"{_LIBRARY}_{function}", len(keys), *keys, *words))

    def _loaded(self, call: Callable[[], R]) -> R:
        try:
            return call()
        except redis.ResponseError as error:
            if not _NO_FUNCTION.search(str(error)):
                raise
            self.client.function_load(_SOURCE.replace("LIBRARY", _LIBRARY), replace=True)
            return call()

    def reconnect(self) -> None:
        """Have the next command use a new connection: on the old one an answer may still come."""
        self.client.connection_pool.disconnect()

    def close(self) -> None:
        """Close all connections."""
        with contextlib.suppress(redis.RedisError, OSError):
            self.client.close()


def reported(method: Callable[P, R]) -> Callable[P, R]:
    """Convert the errors of the driver: nothing was written, and the store may be reached again later."""

    @wraps(method)
    def reporting(*arguments: P.args, **named: P.kwargs) -> R:
        with converted():
            return method(*arguments, **named)

    return reporting


@contextlib.contextmanager
def converted() -> Iterator[None]:
    """Convert the errors of the driver within a block that only reads."""
    try:
        yield
    except redis.exceptions.NoPermissionError as error:
        raise UnavailableError(reason_of(error)).advising(Hint.GRANT_COMMANDS) from error
    except redis.exceptions.OutOfMemoryError as error:
        raise StorageError(reason_of(error)) from error
    except redis.RedisError as error:
        raise UnavailableError(reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """Return what the driver says, or at least the kind of its error."""
    return str(error) or type(error).__name__
