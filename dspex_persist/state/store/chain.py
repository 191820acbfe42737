"""The hash chain over the log: each commit's SHA-256 covers its predecessor's hash and all of its own rows.

The hashed text is JSON, as `json.dumps(separators=(",", ":"))` writes it. It is built by hand, because the writer and
the check of a whole log spend most of their time here, and the general encoder takes twice as long.
"""

from collections.abc import Iterable
from hashlib import sha256
from json.encoder import encode_basestring_ascii as _quoted

GENESIS = bytes(32)
"""The hash before the first commit."""
_NOTHING = ",[],[]]"
"""The end of the content of a commit without versions and events, and of no other."""
_SHORT_RESIDUE = 8


def version_text(
    variable_key: int,
    version: int,
    kind: int,
    source: int,
    value: str | None,
    metadata: str | None,
    value_digest: str | None = None,
    binary_digest: str | None = None,
) -> str:
    """Return a version in the form that its commit's hash covers; digests are hexadecimal."""
    # Without a helper function: calling it for each text would take a third longer.
    return (
        f"[{variable_key},{version},{kind},{source},"
        f"{'null' if value is None else _quoted(value)},"
        f"{'null' if value_digest is None else _quoted(value_digest)},"
        f"{'null' if binary_digest is None else _quoted(binary_digest)},"
        f"{'null' if metadata is None else _quoted(metadata)}]"
    )


def event_text(ordinal: int, kind: str, body: str) -> str:
    """Return an event in the form that its commit's hash covers."""
    return f"[{ordinal},{_quoted(kind)},{_quoted(body)}]"


def commit_text(
    sequence: int,
    session_key: int,
    actor: str,
    cause: str,
    created_at: int,
    versions: Iterable[str],
    events: Iterable[str],
) -> str:
    """Return a commit in the form that its hash covers.

    Args:
        sequence: Its number.
        session_key: The key of its session.
        actor: Who made it.
        cause: The request behind it.
        created_at: Its time in microseconds since 1970.
        versions: Its versions as `version_text`, ordered by variable key and number.
        events: Its events as `event_text`, ordered by ordinal.
    """
    return (
        f"[{sequence},{session_key},{_quoted(actor)},{_quoted(cause)},{created_at},"
        f"[{','.join(versions)}],[{','.join(events)}]]"
    )


def link(previous: bytes, content: str) -> bytes:
    """Return the hash of a commit with this content after a commit with the hash `previous`."""
    return sha256(previous + content.encode()).digest()


def residue(previous: bytes, stored: bytes, content: str) -> bytes:
    """Return the hash that a marker stores for a pruned commit: it covers the rows that remain.

    It also covers the predecessor's hash and the commit's own, which can no longer be recomputed. Otherwise an attacker
    could restart the chain at any such commit.
    """
    return sha256(previous + stored + content.encode()).digest()


def kept_residue(full: bytes, content: str) -> bytes:
    """Return the part of a residue that the table `pruned` stores: a short one if no rows remain."""
    return full[:_SHORT_RESIDUE] if content.endswith(_NOTHING) else full


def residue_entry(sequence: int, kept: bytes) -> bytes:
    """Return a residue in the form that its marker's digest covers; entries are in the order of their commits."""
    return sequence.to_bytes(8, "big", signed=True) + kept
