"""Check the outcomes recorded under idempotency keys."""

import re
import time
from collections.abc import Iterator
from typing import Any, Final

from sqlalchemy import Connection

from dspex_persist.clock import EARLIEST, LATEST, to_micros
from dspex_persist.state import commands, outcomes
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import quote
from dspex_persist.state.store.verify.walk import Problem, Walk, end_of_page, rows_in

ODD_IMPORTS: Final = """
    SELECT first_sequence, last_sequence FROM imports
    WHERE first_sequence < 1 OR last_sequence < first_sequence OR last_sequence > (SELECT max(sequence) FROM commits)
"""
_OUTCOMES: Final = """
    SELECT session_id, idempotency_key, cause, fingerprint, iif(json_valid(result), result, NULL), created_at,
        EXISTS (SELECT 1 FROM sessions WHERE sessions.session_id = outcomes.session_id)
    FROM outcomes WHERE (session_id, idempotency_key) > (?, ?) ORDER BY session_id, idempotency_key
"""
_FINGERPRINT: Final = re.compile("[0-9a-f]{64}")


class OutcomeWalk(Walk):
    """Each recorded outcome is a possible result of its command, and belongs to a session, live or ended."""

    def __init__(self) -> None:
        self._last = ("", "")

    def __str__(self) -> str:
        return f"the outcomes after those of session {quote(self._last[0])}"

    def page(self, connection: Connection) -> Iterator[Problem]:
        end = end_of_page(connection)
        for session_id, key, cause, fingerprint, result, created_at, is_known in rows_in(
            connection, _OUTCOMES, *self._last
        ):
            where = f"session {quote(session_id)}, outcome under idempotency key {quote(key)}"
            if not key:
                yield Problem(where, "the key is empty")
            if not is_known:
                yield Problem(where, "no session has this id")
            if not _FINGERPRINT.fullmatch(fingerprint):
                yield Problem(where, "outcomes.fingerprint is not a hash")
            if not to_micros(EARLIEST) <= created_at <= to_micros(LATEST):
                yield Problem(where, "its time is out of range")
            yield from self._examine_result(where, cause, result)
            self._last = (session_id, key)
            if time.monotonic() > end:
                return
        self.more = False

    def _examine_result(self, where: str, cause: str, result: str | None) -> Iterator[Problem]:
        command = _COMMANDS.get(cause)
        if command is None:
            yield Problem(where, f"outcomes.cause is {quote(cause)}, which is not a command that writes")
        elif result is not None:
            try:
                outcomes.decode(command.returns, result)
            except ValueError:
                yield Problem(where, f"outcomes.result is not a result of {cause}")


def _writing_commands() -> dict[str, type[Command[Any]]]:
    named = {name: getattr(commands, name) for name in commands.__all__}
    return {
        name: each
        for name, each in named.items()
        if isinstance(each, type) and issubclass(each, Command) and each.writes
    }


_COMMANDS: Final = _writing_commands()
