"""Context: one session, seen through whatever provider keeps it."""

from collections.abc import Mapping
from typing import Any

from dspex_persist.cognitive.variables import Mapped, Variables
from dspex_persist.state import values
from dspex_persist.state.abilities import ExecutesTools
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.tools.ports import ToolCode, name_of


class Context(Mapped):
    """A session that is begun, or resumed, when its context is made; used as a mapping, that of its variables.

    The context does not own the provider: several contexts share one, and whoever opened it closes it.
    """

    def __init__(self, provider: StateProvider, session_id: str, metadata: Mapping[str, str] | None = None) -> None:
        self.session_id = session_id
        self.variables: Variables = Variables(provider, session_id)
        self._provider = provider
        self.resumed = provider.initialize_session(session_id, metadata).resumed

    def __repr__(self) -> str:
        return f"<Context of session {self.session_id!r}>"

    def call(self, tool: ToolCode | str, /, **arguments: object) -> Any:
        """Execute a tool, given itself or by name, as one transaction; its result.

        What went wrong is raised, and then nothing was written; `UnsupportedError` says that the provider executes no
        tools.
        """
        outcome = ExecutesTools.of(self._provider).execute_tool(self.session_id, name_of(tool), arguments)
        if outcome.error is not None:
            raise outcome.error
        return values.decode_loosely(outcome.result, outcome.result_type) if outcome.result is not None else None

    def end(self) -> None:
        """End the session; its history stays."""
        self._provider.cleanup_session(self.session_id)
