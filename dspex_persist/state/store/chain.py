"""The hash chain over the log: each commit's SHA-256 covers its predecessor's and everything in its own rows.

What is hashed is JSON, as `json.dumps(separators=(",", ":"))` writes it, put together by hand: both the writer and
the check of a whole log spend their time here, and the general encoder takes twice as long.
"""

from collections.abc import Iterable
from hashlib import sha256
from json.encoder import encode_basestring_ascii as _quoted

GENESIS = bytes(32)
"""What the first commit follows."""
_NOTHING = ",[],[]]"
"""How the content of a commit without versions and events ends, and no other."""
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
    """A version as its commit's hash covers it; digests are hexadecimal."""
    # Each spelled out: a function call for each text would cost a third more.
    return (
        f"[{variable_key},{version},{kind},{source},"
        f"{'null' if value is None else _quoted(value)},"
        f"{'null' if value_digest is None else _quoted(value_digest)},"
        f"{'null' if binary_digest is None else _quoted(binary_digest)},"
        f"{'null' if metadata is None else _quoted(metadata)}]"
    )


def event_text(ordinal: int, kind: str, body: str) -> str:
    """An event as its commit's hash covers it."""
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
    """A commit as its hash covers it. `versions` are ordered by key and number, `events` by ordinal."""
    return (
        f"[{sequence},{session_key},{_quoted(actor)},{_quoted(cause)},{created_at},"
        f"[{','.join(versions)}],[{','.join(events)}]]"
    )


def link(previous: bytes, content: str) -> bytes:
    """The hash of the commit with this content that follows `previous`."""
    return sha256(previous + content.encode()).digest()


def residue(previous: bytes, stored: bytes, content: str) -> bytes:
    """What a marker keeps of a commit that lost rows: it covers what is left of the commit's content.

    And it ties the commit's hash, which nobody can work out any more, to its predecessor's: without that, whoever
    rewrites history could begin anew at each such commit.
    """
    return sha256(previous + stored + content.encode()).digest()


def kept_residue(full: bytes, content: str) -> bytes:
    """What `pruned` keeps of a residue: where nothing is left, the row in `commits` says the rest again."""
    return full[:_SHORT_RESIDUE] if content.endswith(_NOTHING) else full


def residue_entry(sequence: int, kept: bytes) -> bytes:
    """A residue as the digest of its marker covers it; the entries of a marker are in the order of their commits."""
    return sequence.to_bytes(8, "big", signed=True) + kept
