"""The limits of sessions that settings ask for."""

import dataclasses

from dspex_persist.settings import Settings
from dspex_persist.state.limits import Limits


def limits_of(settings: Settings) -> Limits:
    """Return the limits in `settings`, lowered where a session or an answer would not fit into one gRPC message."""
    limits = Limits(**{field.name: int(getattr(settings, field.name)) for field in dataclasses.fields(Limits)})
    # A session is sent in one message together with its names, which the limit counts only in part.
    message = settings.max_message_bytes
    session, history = min(limits.session_size_bytes, message * 2 // 3), min(limits.history_size_bytes, message // 3)
    return dataclasses.replace(limits, session_size_bytes=session, history_size_bytes=history)
