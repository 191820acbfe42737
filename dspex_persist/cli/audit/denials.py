"""The refused calls, for people."""

from dspex_persist.audit import Denial
from dspex_persist.cli.audit.rendering import WHOLE, Column, Renderer
from dspex_persist.cli.output import plain


def denial_columns(look: Renderer) -> list[Column[Denial]]:
    """Refused calls."""
    return [
        Column("last at", lambda row: look.time(row.last_at), least=look.time_width),
        Column("identity", lambda row: plain(row.identity or "-"), least=8, is_id=True),
        Column("from", lambda row: plain(row.peer), least=8, is_id=True),
        Column("rpc", lambda row: plain(row.rpc.rpartition(".")[2]), least=8, is_id=True),
        Column("session", lambda row: plain(row.session_id), least=8, is_id=True, is_rare=True),
        Column("missing", lambda row: plain(row.missing), least=12, most=80, is_id=True),
        Column("times", lambda row: f"{row.count:,}", least=WHOLE, right=True),
    ]
