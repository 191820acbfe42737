"""What a backend can do beyond the common contract. Each ability is a class; a backend that has it inherits from it.

Whether a provider has one, `isinstance(state, Recordable)` says. `Recordable.of(state)` is the provider as one that has
it, and raises `UnsupportedError`, which says what to do, where it has not. A wrapper such as `WithTools` has the
abilities of what it wraps. `dspex_persist.testing` has a suite for each; a backend that claims one passes it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar, Self

from dspex_persist.state import arguments, commands, values
from dspex_persist.state.audit import AuditSource
from dspex_persist.state.errors import UnsupportedError
from dspex_persist.state.model import Origin, PrunePolicy, PruneReport, SessionView, ToolOutcome, ToolSpec
from dspex_persist.state.provider import TOOL_TIMEOUT_S, Progress, StateProvider, or_empty, silent
from dspex_persist.state.recording import Header, RecordedCommit


class Ability(ABC):
    """The root of all abilities. `lacking` and `instead`: what a provider without it cannot do, and what helps."""

    lacking: ClassVar[str]
    instead: ClassVar[str]

    @classmethod
    def of(cls, state: object) -> Self:
        """`state` as one that has this ability; raises `UnsupportedError` if it has not."""
        if not isinstance(state, cls):
            raise UnsupportedError(cls.lacking, cls.instead)
        return state


class Durable(Ability):
    """What was acknowledged survives the end of the process that keeps it."""

    lacking = "state that outlives its process"
    instead = "open a database file: connect(path)"


class KeepsOrder(Ability):
    """Commands take effect in the order in which they were submitted, even before the earlier ones are answered.

    Calls to another process can overtake each other: there, only a command that was answered comes first.
    """

    lacking = "the order of commands that are not answered yet"
    instead = "wait for each command's result before the next one is submitted"


class Auditable(Ability):
    """Its whole history can be queried."""

    lacking = "audits"
    instead = "keep the sessions in a database file: connect(path), or a server on one"

    @abstractmethod
    def audit(self, *, reveal: bool = False) -> AuditSource:
        """The history, to be queried. `reveal`: show values of sensitive variables, which are masked otherwise.

        A server shows them only if it was started with `audit_reveal`.
        """


class Recordable(Ability):
    """A session's whole log can be read, to be exported or replayed."""

    lacking = "recordings"
    instead = "keep the sessions in a database file: connect(path), or a server on one"

    @abstractmethod
    def record(
        self, session_id: str, *, started: int | None = None, reveal: bool = False
    ) -> tuple[Header, Iterator[RecordedCommit]]:
        """A session's whole log up to now, oldest commit first, read as it is taken; the session may have ended, where
        those are kept (in memory they are not).

        Of several sessions that had this id it is the newest, or the one that began with commit `started`. `reveal`:
        include the values of sensitive variables, which are left out otherwise; a server does so only if it was started
        with `audit_reveal`.

        Raises `NotInHistoryError` for a session that is not in the history, `SessionPrunedError` for one of which
        history was pruned, `InvalidArgumentError` for a `started` with which none of that id began.
        """


class Forkable(Ability):
    """A session can begin as another one was at some point."""

    lacking = "forks of sessions"
    instead = "keep the sessions in a database file: connect(path), or a server on one"

    @abstractmethod
    def fork_session(
        self, session_id: str, new_session_id: str, at: str = "", *, origin: Origin | None = None
    ) -> SessionView:
        """Begin a session with the variables that `session_id` had at a point, each at version 0; "" is now.

        A point is what audits take: a commit, an execution's id, a time, an age; `^` behind it: right before it.
        `origin` says who asks, by default the provider's own. A server copies sensitive variables only if it was
        started with `audit_reveal`.

        Raises `SessionExistsError` where a live session has the new id, `NotInHistoryError` for what is not in the
        history, `InvalidArgumentError` for what is no point.
        """


class Prunable(Ability):
    """Old history can be deleted."""

    lacking = "pruning"
    instead = "keep the sessions in a database file: connect(path), or a server on one"

    @abstractmethod
    def prune(self, policy: PrunePolicy, *, confirm: bool, progress: Progress = silent) -> PruneReport:
        """Delete the history that `policy` lets go, for good; without `confirm`, only report how much that is.

        Others go on reading and writing meanwhile. `progress` is told what has come of it, of how many variables, and
        how many there are; what it raises ends the pruning, and what has gone by then is gone. A server prunes for
        clients only if it was started with `audit_prune`.
        """


class ExecutesTools(StateProvider, Ability):
    """It executes tools, each execution as one transaction, and once for an idempotency key."""

    lacking = "tools"
    instead = "wrap it: WithTools(provider, tools); or open one that executes them: connect(path, tools=...)"

    @abstractmethod
    def list_tools(self, session_id: str = "") -> tuple[ToolSpec, ...]:
        """The tools that the session can execute; without one, those that every session can.

        What a backend says of them itself, such as where they run, is in their metadata under `dspex.`.
        """

    def execute_tool(
        self,
        session_id: str,
        tool: str,
        parameters: Mapping[str, object] | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        timeout_s: float = TOOL_TIMEOUT_S,
    ) -> ToolOutcome:
        """Execute a tool as one transaction, within `timeout_s`; how it ended. Under an idempotency key: once."""
        timeout_s = arguments.timeout("timeout_s", timeout_s)
        encoded = values.encode_arguments(arguments.mapping("parameters", or_empty(parameters)))
        command = commands.ExecuteTool(session_id, tool, encoded, or_empty(metadata), timeout_s)
        return self.run(command, idempotency_key)


class StreamsTools(ExecutesTools):
    """It hands out what a tool yields while the tool runs."""

    lacking = "streams of tools"
    instead = "execute the tool, whose result is the list of what it yielded: execute_tool"

    @abstractmethod
    def stream_tool(
        self,
        session_id: str,
        tool: str,
        parameters: Mapping[str, object] | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> Iterator[object]:
        """Execute a tool that streams, and yield what it yields, as it comes; it has committed when this ends.

        A tool that does not stream yields its result, unless that is None. Whoever stops taking chunks holds the tool
        back, and closing the iterator ends the tool: nothing is written then. The execution begins when the first chunk
        is requested.

        Raises what `execute_tool` has as the `error` of its outcome.
        """
