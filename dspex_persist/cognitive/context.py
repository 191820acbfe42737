"""Context: a session of any provider."""

from collections.abc import Mapping
from typing import Any

from dspex_persist.cognitive.variables import Mapped, Variables
from dspex_persist.state import values
from dspex_persist.state.abilities import ExecutesTools
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.tools.ports import ToolCode, name_of


class Context(Mapped):
    """A session, as a mapping from the names of its variables to their values.

    Creating the context begins the session, or resumes it if it exists. The context does not own the provider: several
    contexts may share one, and closing it is up to the caller that opened it.

    Attributes:
        session_id: The id of the session.
        variables: Its variables.
        resumed: Whether the session existed already.
    """

    def __init__(self, provider: StateProvider, session_id: str, metadata: Mapping[str, str] | None = None) -> None:
        self.session_id = session_id
        self.variables: Variables = Variables(provider, session_id)
        self._provider = provider
        self.resumed = provider.initialize_session(session_id, metadata).resumed

    def __repr__(self) -> str:
        return f"<Context of session {self.session_id!r}>"

    def call(self, tool: ToolCode | str, /, **arguments: object) -> Any:
        """Execute a tool as one transaction.

        Args:
            tool: The tool, or its name.
            arguments: The tool's arguments by name.

        Returns:
            The result of the tool, or None if it has none.

        Raises:
            StateError: The tool failed or conflicted, and wrote nothing.
            UnsupportedError: The provider executes no tools.
        """
        outcome = ExecutesTools.of(self._provider).execute_tool(self.session_id, name_of(tool), arguments)
        if outcome.error is not None:
            raise outcome.error
        return values.decode_loosely(outcome.result, outcome.result_type) if outcome.result is not None else None

    def end(self) -> None:
        """End the session. Its history is kept."""
        self._provider.cleanup_session(self.session_id)
