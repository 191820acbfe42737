"""Peers: what an engine tells those above it about the other servers of its sessions."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection


class Peers(ABC):
    """An engine whose sessions other servers use, too, and run tools in."""

    @abstractmethod
    def on_fenced(self, callback: Callable[[], None]) -> None:
        """Have a function called each time after others have taken this server for dead.

        The executions that run in this process are interrupted in the journal then, or will be: their code can write
        nothing any more. The function is called on the thread that writes, and must not block.
        """

    @abstractmethod
    def on_ended(self, callback: Callable[[Collection[str]], None]) -> None:
        """Have a function called with the ids of sessions that other servers have ended.

        It is called on the thread that writes, and must not block. Other sessions may have begun with the ids.
        """

    @abstractmethod
    def server_of(self, execution_id: str) -> str | None:
        """Return the address of the other server that runs an execution, or None if none does. It may block.

        "" is the address of a server that has told none.

        Raises:
            StateError: The log cannot be reached.
        """
