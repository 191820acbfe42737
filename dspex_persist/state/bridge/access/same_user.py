"""Refuses calls from processes of other users of this machine."""

import asyncio
from collections.abc import Iterable
from typing import Any, Final

from dspex_persist.infra.access.admission import Admission
from dspex_persist.infra.access.peers import PeerUsers
from dspex_persist.infra.server import Admit, admit_all
from dspex_persist.state.bridge.access.denials import Denials
from dspex_persist.state.errors import Hint, UnauthenticatedError, UnavailableError

_MISSING: Final = "a process of the user of the server"


class SameUser:
    """Admits the calls that come from processes of the user of this one, or of root.

    Args:
        host: Where the server listens, on this machine.
        denials: Notes the calls that are refused.
        then: Admits the others next.
        others: Users whose processes are admitted, too.
    """

    def __init__(self, host: str, denials: Denials, then: Admit = admit_all, *, others: Iterable[int] = ()) -> None:
        self._host = host
        self._denials = denials
        self._then = then
        self._others = others
        self._users: PeerUsers | None = None

    def serves(self, port: int) -> None:
        """Take note of the port to which the calls come. Until then, all are refused."""
        self._users = PeerUsers(self._host, port, others=self._others)

    def admit(self, rpc: str, context: Any, task: "asyncio.Task[Any] | None" = None) -> Admission | None:
        """Admit a call of an rpc, or raise `UnauthenticatedError`; see `Admit`.

        Raises:
            UnavailableError: The system does not say whose the call is, because it has no descriptor left to ask with.
        """
        if self._users is not None and self._is_ours(self._users, context.peer()):
            return self._then(rpc, context, task)
        self._denials.note(rpc, context, _MISSING)
        raise UnauthenticatedError("the call comes from a process of another user").advising(Hint.SAME_USER)

    @staticmethod
    def _is_ours(users: PeerUsers, peer: str) -> bool:
        try:
            return users.are_we(peer)
        except OSError as error:
            raise UnavailableError(f"the system does not say whose the call is: {error.strerror}") from error
