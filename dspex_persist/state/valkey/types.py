"""The types of the keys of a log: whatever else has one of their names is not ours, and nothing is done to it."""

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import redis

from dspex_persist.state.errors import NotADatabaseError
from dspex_persist.state.valkey.keys import Keys

_NONE: Final = "none"
"""What the store calls the type of a key that does not exist."""


def refuse_others(client: Any, keys: Keys, name: str) -> None:
    """Raise `NotADatabaseError` if a key of the log is of another type than ours.

    Args:
        client: A client of the store.
        keys: The names of the keys.
        name: How errors name the store.
    """
    types = {
        keys.head: "hash",
        keys.log: "stream",
        keys.live: "hash",
        keys.expiry: "zset",
        keys.running: "hash",
        keys.ages: "zset",
        keys.servers: "hash",
        keys.leases: "zset",
        keys.addresses: "hash",
        keys.holds: "hash",
        keys.turn: "string",
        keys.staged: "set",
    }
    pipeline = client.pipeline(transaction=False)
    for key in types:
        pipeline.type(key)
    for (key, ours), found in zip(types.items(), pipeline.execute(), strict=True):
        if found.decode() not in (ours, _NONE):
            reason = f"its key {key} is of the type {found.decode()}, not {ours}: another program has written it"
            raise NotADatabaseError(name, f"{reason}; choose another prefix, such as ?prefix=dspex-persist")


@contextlib.contextmanager
def naming(client: Any, keys: Keys, name: str) -> Iterator[None]:
    """Say which key it is if one is of another type in a block that uses those of the log."""
    try:
        yield
    except redis.ResponseError as error:
        if str(error).startswith("WRONGTYPE"):
            refuse_others(client, keys, name)
        raise
