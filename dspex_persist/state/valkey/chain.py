"""The hash chain over the log: each commit's SHA-256 covers its predecessor's hash and all of its own entries."""

from collections.abc import Iterable
from hashlib import sha256
from typing import Final

GENESIS: Final = bytes(32)
"""The hash before the first commit."""


def link(previous: bytes, parts: Iterable[bytes]) -> bytes:
    """Return the hash of a commit.

    Args:
        previous: The hash of the commit before it.
        parts: The contents of its entry, then those of its versions in their order.
    """
    hashed = sha256(previous)
    for part in parts:
        # With its length, so that nothing can move from one part to the next.
        hashed.update(len(part).to_bytes(8, "big"))
        hashed.update(part)
    return hashed.digest()
