"""What PostgreSQL cannot store although a file can: names that are too long for an index."""

from typing import Final

from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.limits import Limits

MOST_CHARACTERS: Final = 650
"""An entry of an index has at most 2,704 bytes, and a character up to 4. One index has a session's id and a key."""


def check_limits(limits: Limits) -> None:
    """Raise `InvalidArgumentError` if ids and names could be longer than an index of PostgreSQL takes."""
    together = limits.name_length + limits.session_id_length
    if together > MOST_CHARACTERS:
        reason = (
            f"on PostgreSQL, name_length and session_id_length are together at most {MOST_CHARACTERS}, because its "
            f"indexes take no longer entries; they are {limits.name_length} and {limits.session_id_length}"
        )
        raise InvalidArgumentError("name_length", reason)
