"""The names of the keys of a log. docs/valkey.md says what each of them holds."""

import re
from typing import Final

from dspex_persist.spelling import quote
from dspex_persist.state.errors import InvalidArgumentError

PREFIX: Final = "dspex"
"""What the keys begin with, unless the address names another prefix."""
_VALID: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


class Keys:
    """The names of the keys with one prefix. It is their hash tag: all of them are in one slot.

    Args:
        prefix: 1 to 64 letters, digits, and any of `_.:-`.

    Raises:
        InvalidArgumentError: The prefix has other characters.
    """

    def __init__(self, prefix: str = PREFIX) -> None:
        if not _VALID.fullmatch(prefix):
            reason = f"{quote(prefix)} is not 1 to 64 letters, digits, and any of _.:-"
            raise InvalidArgumentError("prefix", reason)
        self.root = root = f"{{{prefix}}}:"
        self.head = root + "head"
        self.log = root + "log"
        self.live = root + "live"
        self.expiry = root + "expiry"
        self.running = root + "running"
        self.ages = root + "ages"
        self.servers = root + "servers"
        self.leases = root + "leases"
        self.addresses = root + "addresses"
        self.holds = root + "holds"
        self.turn = root + "turn"
        self.staged = root + "staged"
        self.news = root + "news"
        # What the functions that end leases, or holds, begin with.
        self.of_leases = (self.head, self.servers, self.holds, self.news)

    # Of one session, which is named by the number of its first commit

    def session(self, first: int) -> str:
        """The current state: a hash."""
        return f"{self.root}s:{first}"

    def dependencies(self, first: int) -> str:
        """Every dependency that it ever had: a hash."""
        return f"{self.root}d:{first}"

    def names(self, first: int) -> str:
        """The variables that it ever had, by their ids: a hash."""
        return f"{self.root}n:{first}"

    def keyed(self, first: int) -> str:
        """The last ended execution under each idempotency key: a hash."""
        return f"{self.root}k:{first}"

    def spent(self, first: int) -> str:
        """What the LM calls of each tool have used: a hash."""
        return f"{self.root}u:{first}"

    def commits(self, first: int) -> str:
        """Its commits: a stream."""
        return f"{self.root}h:{first}"

    def versions(self, first: int, variable_id: str) -> str:
        """The versions of a variable: a stream."""
        return f"{self.root}w:{first}:{variable_id}"

    # By names of users

    def outcomes(self, session_id: str) -> str:
        """The outcomes of a session's keyed requests: a hash."""
        return f"{self.root}o:{session_id}"

    def lives(self, session_id: str) -> str:
        """The first commits of all sessions that have had this id: a list."""
        return f"{self.root}i:{session_id}"

    def owned(self, identity: str) -> str:
        """The live sessions that an identity began, with their stored bytes: a hash."""
        return f"{self.root}q:{identity}"
