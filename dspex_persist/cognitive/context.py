"""Context: one session, seen through whatever provider keeps it."""

from collections.abc import Mapping

from dspex_persist.cognitive.variables import Variables
from dspex_persist.state import values
from dspex_persist.state.provider import StateProvider


class Context:
    """A session that is begun, or resumed, when its context is made.

    The context does not own the provider: several contexts share one, and whoever opened it closes it.
    """

    def __init__(self, provider: StateProvider, session_id: str, metadata: Mapping[str, str] | None = None) -> None:
        self.session_id = session_id
        self.variables = Variables(provider, session_id)
        self._provider = provider
        self.resumed = provider.initialize_session(session_id, metadata).resumed

    def __getitem__(self, name: str) -> object:
        return self.variables[name]

    def __setitem__(self, name: str, value: object) -> None:
        self.variables[name] = value

    def call(self, tool: str, /, **arguments: object) -> object:
        """Execute a tool as one transaction; its result. What went wrong is raised, and then nothing was written."""
        outcome = self._provider.execute_tool(self.session_id, tool, arguments)
        if outcome.error is not None:
            raise outcome.error
        return values.decode_loosely(outcome.result) if outcome.result is not None else None

    def end(self) -> None:
        """End the session; its history stays."""
        self._provider.cleanup_session(self.session_id)
