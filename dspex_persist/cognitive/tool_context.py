"""ToolContext: the access of a tool's function to its execution."""

from collections.abc import Mapping
from datetime import datetime
from random import Random
from typing import Any
from uuid import UUID

from dspex_persist.cognitive.joining import InExecution
from dspex_persist.cognitive.program_access import WithPrograms
from dspex_persist.state.tools.ports import ToolCode, name_of


class ToolContext(WithPrograms, InExecution):
    """The transaction of a tool's execution: the variables of its session, and what else a tool needs.

    Reads come from a snapshot, with the tool's own writes on top. The writes become visible together when the tool
    returns, and never if it fails. Usable from any thread until the execution ends; afterwards everything raises
    `ExecutionEndedError`.
    """

    @property
    def execution_id(self) -> str:
        """The id of the execution in the journal. Each attempt after a conflict has another one."""
        return self._session.execution_id

    @property
    def attempt(self) -> int:
        """1, or more if the tool runs again after a conflict."""
        return self._session.attempt

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata that the caller sent with the parameters."""
        return self._session.metadata

    @property
    def cancelled(self) -> bool:
        """Whether the execution can no longer commit. Check it in long loops, and return."""
        return self._session.cancelled

    @property
    def random(self) -> Random:
        """A random number generator with a recorded seed, so that a replay draws the same numbers."""
        return self._session.random

    def now(self) -> datetime:
        """Return the time (UTC). It is recorded, so that a replay gets the same."""
        return self._session.now()

    def uuid(self) -> UUID:
        """Return a new random UUID. It is recorded, so that a replay gets the same."""
        return self._session.uuid()

    def log(self, message: str, **fields: object) -> None:
        """Add a line to the journal, which keeps it however the tool ends."""
        self._session.log(message, **fields)

    def publish(self, name: str, value: object, metadata: Mapping[str, str] | None = None) -> int:
        """Write a value that others should see at once, such as progress.

        It is committed immediately, marked as published in the history, and stays even if the tool fails.

        Returns:
            The new version.

        Raises:
            VariableNotFoundError: There is no such variable.
        """
        return self._session.publish(name, value, metadata)

    def call(self, tool: ToolCode | str, /, **arguments: object) -> Any:
        """Run another tool in the same transaction.

        If it fails and the caller catches the error, only the other tool's own writes are undone.

        Args:
            tool: The tool, or its name.
            arguments: The tool's arguments by name.

        Returns:
            The result of the tool; in an asynchronous tool, an awaitable of it.
        """
        return self._session.call(name_of(tool), arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        # It raises; its session says why.
        return self._session.__reduce__()

    def __repr__(self) -> str:
        # Without variables: looking at them would make the execution depend on them.
        return f"<ToolContext of execution {self.execution_id} in session {self.session_id!r}>"
