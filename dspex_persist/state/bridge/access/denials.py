"""Notes the calls that a server refuses because of who made them."""

from typing import Any, Final
from urllib.parse import unquote

from dspex_persist.infra.access.tokens import CALLER, Identity
from dspex_persist.state.denials import NoteDenial, Refused

_UNIX: Final = "unix"


class Denials:
    """Notes refusals, for the log and for audits.

    Args:
        note: Takes each of them; see `DenialLog.note`.
    """

    def __init__(self, note: NoteDenial = lambda _: None) -> None:
        self._note = note

    def note(
        self, rpc: str, context: Any, missing: str, session_id: str = "", *, caller: Identity | None = None
    ) -> None:
        """Note that a call is refused. The caller of this method raises the error.

        Args:
            rpc: The full name of the rpc.
            context: gRPC's context of the call.
            missing: What the caller lacks, in a few words: `scope write`, `rule for read of x`. Never a token or a
                value, and nothing that the caller can make up, as each text has an entry of its own.
            session_id: The session that the call is about, if the call may know of it or has named it.
            caller: Who makes the call, if this is not called while it is handled.
        """
        caller = caller or CALLER.get()
        self._note(Refused("" if caller is None else caller.name, host_of(context), rpc, session_id, missing))


def host_of(context: Any) -> str:
    """Return where a call comes from, such as `ipv4:10.0.0.7` or `ipv6:[::1]`; a Unix socket has no host.

    Without the port, which identifies nothing.
    """
    # gRPC writes the brackets of an IPv6 address as %5B and %5D.
    peer = unquote(context.peer())
    kind, _, rest = peer.partition(":")
    return _UNIX if kind.startswith(_UNIX) else f"{kind}:{rest.rpartition(':')[0]}"
