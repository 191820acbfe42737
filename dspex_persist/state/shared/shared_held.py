"""Holds of sessions, as one of several servers on a log has them in memory."""

import uuid

from dspex_persist.state.holds import Held
from dspex_persist.state.shared_log import SharedHold


class HeldHere(Held):
    """A session that this server holds.

    Attributes:
        hold_id: The hold in the log.
        is_begun: Whether it is in the log. From then on it is over when the log has it no longer.
    """

    def __init__(self, session_id: str) -> None:
        super().__init__(session_id)
        self.hold_id = uuid.uuid4().hex
        self.is_begun = False


class HeldElsewhere(Held):
    """A session that another server holds. The calls of this server wait until it has seen the end of that in the log.

    Args:
        session_id: The session.
        hold: The hold in the log.
    """

    def __init__(self, session_id: str, hold: SharedHold) -> None:
        super().__init__(session_id)
        self.hold = hold
        if hold.is_full:
            self.fill()
