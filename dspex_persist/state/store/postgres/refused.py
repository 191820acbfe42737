"""What PostgreSQL cannot store although a file can: names that are too long for an index."""

from collections.abc import Iterable
from typing import Final

from dspex_persist.spelling import quote
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.limits import Limits
from dspex_persist.state.log_store import UnwritableError
from dspex_persist.state.unit_of_work import UnitOfWork

MOST_CHARACTERS: Final = 650
"""An entry of an index has at most 2,704 bytes, and a character up to 4. One index has a session's id and a key."""
MOST_KEY_BYTES: Final = 2_600
"""A key of metadata shares an entry with 60 bytes more, and the length of the parts."""


def check_limits(limits: Limits) -> None:
    """Raise `InvalidArgumentError` if ids and names could be longer than an index of PostgreSQL takes."""
    together = limits.name_length + limits.session_id_length
    if together > MOST_CHARACTERS:
        reason = (
            f"on PostgreSQL, name_length and session_id_length are together at most {MOST_CHARACTERS}, because its "
            f"indexes take no longer entries; they are {limits.name_length} and {limits.session_id_length}"
        )
        raise InvalidArgumentError("name_length", reason)


def check_metadata_keys(units: Iterable[UnitOfWork]) -> None:
    """Raise `UnwritableError` if a key of a version's metadata is longer than an index of PostgreSQL takes."""
    for unit in units:
        for change in unit.versions:
            for key in change.version.metadata:
                # A character has up to 4 bytes, and most keys are short.
                if len(key) > MOST_KEY_BYTES // 4 and (size_bytes := len(key.encode("utf-8", "surrogatepass"))) > (
                    MOST_KEY_BYTES
                ):
                    reason = (
                        f"the key {quote(key)} has {size_bytes} bytes; on PostgreSQL, a key of a version's metadata "
                        f"has at most {MOST_KEY_BYTES}, because its indexes take no longer entries"
                    )
                    raise UnwritableError(InvalidArgumentError("metadata", reason))
