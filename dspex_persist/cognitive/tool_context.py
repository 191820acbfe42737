"""ToolContext: what a tool's function reaches of its execution."""

from collections.abc import Mapping
from datetime import datetime
from random import Random
from typing import Any
from uuid import UUID

from dspex_persist.cognitive.variables import Mapped, VariableMapping
from dspex_persist.state.errors import VariableNotFoundError
from dspex_persist.state.tools.ports import ToolCode, name_of
from dspex_persist.state.tools.session import ToolSession


class ToolContext(Mapped):
    """The transaction that a tool runs in: `ctx["temperature"]` reads from its snapshot, with its own writes over it.

    What is written shows outside when the tool has ended well, all at once, and never otherwise. Usable from any
    thread until then; afterwards everything raises `ExecutionEndedError`.
    """

    def __init__(self, session: ToolSession) -> None:
        self._session = session
        self.variables = VariableMapping(session, session.session_id)

    @property
    def session_id(self) -> str:
        """The session that the tool works on."""
        return self._session.session_id

    @property
    def execution_id(self) -> str:
        """The execution, as the journal has it. Each attempt after a conflict has one of its own."""
        return self._session.execution_id

    @property
    def attempt(self) -> int:
        """1, and one more each time that the tool runs again after a conflict."""
        return self._session.attempt

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the caller sent beside the parameters."""
        return self._session.metadata

    @property
    def cancelled(self) -> bool:
        """Whether nothing that the tool still does can be kept: a long loop asks now and then, and returns."""
        return self._session.cancelled

    @property
    def random(self) -> Random:
        """Random numbers from a recorded seed, so that a replay draws the same."""
        return self._session.random

    def now(self) -> datetime:
        """The time (UTC), recorded, so that a replay sees the same."""
        return self._session.now()

    def uuid(self) -> UUID:
        """A new random UUID, recorded, so that a replay gets the same."""
        return self._session.uuid()

    def log(self, message: str, **fields: object) -> None:
        """Keep a line in the journal, however the tool ends."""
        self._session.log(message, **fields)

    def publish(self, name: str, value: object, metadata: Mapping[str, str] | None = None) -> int:
        """Write a value that must be seen at once, such as progress; the new version.

        It is a commit of its own, marked so in the history, and stays whatever becomes of the tool.
        """
        try:
            return self._session.publish(name, value, metadata)
        except VariableNotFoundError:
            raise KeyError(name) from None

    def call(self, tool: ToolCode | str, /, **arguments: object) -> Any:
        """Run another tool, given itself or by name, in the same transaction; an asynchronous tool awaits the result.

        If it fails and the error is caught, only what it wrote itself is undone.
        """
        return self._session.call(name_of(tool), arguments)
