"""Execution: the session as one tool execution sees it, with its staged writes. In memory only, until it commits.

At the end, one command (`FinishExecution`) sends the staged commands to the store, which runs them again if nothing
that the execution depended on has changed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dspex_persist.state import values
from dspex_persist.state.commands import Command
from dspex_persist.state.commands.executions import Begun, FinishExecution, Verdict
from dspex_persist.state.errors import (
    ExecutionEndedError,
    ForkedProcessError,
    InvalidArgumentError,
    LimitExceededError,
)
from dspex_persist.state.model import (
    ExecutionStatus,
    Isolation,
    Origin,
    Seen,
    Value,
    Variable,
)
from dspex_persist.state.tools.overlay import Overlay
from dspex_persist.state.tools.touched import Touched, touched_by
from dspex_persist.state.unit_of_work import Savepoint

R = TypeVar("R")

# The size of a name's entry in the journal, without the name.
_ENTRY_BYTES = 64


@dataclass(eq=False)
class Execution:
    """A running execution. Usable from any thread, until it is closed."""

    id: str
    session_id: str
    tool: str
    isolation: Isolation
    overlay: Overlay
    parent: "Execution | None" = None
    reads: dict[str, Seen | None] = field(default_factory=dict)
    patterns: list[str] = field(default_factory=list)
    published: list[tuple[str, int]] = field(default_factory=list)
    children: list[Verdict] = field(default_factory=list)
    status: str = ""
    """How the execution ended; "" while it runs."""
    _start: tuple[Savepoint, int] = ((0, 0, 0), 0)

    @classmethod
    def begin(
        cls,
        session_id: str,
        tool: str,
        isolation: Isolation,
        begun: Begun,
        origin: Origin,
        read: Callable[[Command[Any]], Any],
    ) -> "Execution":
        """Return the execution that a store has begun.

        Args:
            session_id: The session.
            tool: The name of the tool.
            isolation: Which reads have to be unchanged for the execution to commit.
            begun: The store's answer to `BeginExecution`.
            origin: Who asked for the execution.
            read: Runs a reading command on the store, for history; it may block.
        """
        return cls(begun.execution_id, session_id, tool, isolation, Overlay(session_id, begun, origin, read))

    def begin_child(self, begun: Begun, tool: str) -> "Execution":
        """Return an execution that this one called; it is part of the same transaction."""
        overlay = self.overlay
        start = (overlay.unit.savepoint(), len(overlay.steps))
        return Execution(begun.execution_id, self.session_id, tool, self.isolation, overlay, self, _start=start)

    @property
    def session_key(self) -> int:
        """The number of the session's first commit, which no other session has."""
        return self.overlay.snapshot.session.sequence

    @property
    def root_id(self) -> str:
        """The id of the outermost execution, with which it ends."""
        return self.id if self.parent is None else self.parent.root_id

    @property
    def depth(self) -> int:
        """How many executions enclose this one."""
        return 0 if self.parent is None else self.parent.depth + 1

    @property
    def ended(self) -> str:
        """How it ended, alone or together with an enclosing execution; "" while it runs."""
        return self.status or (self.parent.ended if self.parent is not None else "")

    def run(self, command: Command[R], origin: Origin) -> R:
        """Run a command on the session as the execution sees it.

        The store runs a writing command again when the execution commits, with the values as parsed here.
        """
        command.check()
        if command.ahead is None:
            self.read_ahead(command)
        with self.overlay.lock:
            self.check_running()
            self.check_is_of(command.session_id)
            touched = touched_by(command)
            self._note(touched)
            result = self.overlay.apply(command, self.id, origin)
            self.overlay.written.update(touched.writes)
            return result

    def read_ahead(self, command: Command[Any], *, strict: bool = False) -> None:
        """Parse and check the values of a command before it takes the execution's lock.

        Args:
            command: The command.
            strict: Let `run` fail with `VariableReplacedError`, as in `StateProvider.read_ahead`.
        """
        if command.fault is None and command.json_length > values.SHORT_JSON:
            command.read_ahead(values.ReadAhead(self.overlay.unit.limits, strict=strict), self.overlay.find)

    def _note(self, touched: Touched) -> None:
        """Note what the execution depends on from now on."""
        overlay, pattern = self.overlay, touched.pattern
        reads = [name for name in touched.reads if name not in self.reads]
        # A name that it only writes is not a read, but is checked at the end as well.
        writes = [name for name in touched.writes if name not in overlay.checked]
        patterns = [] if pattern is None or pattern in self.patterns else [pattern]
        if reads or writes or patterns:
            self._count_names([*reads, *writes, *patterns])
        for name in reads:
            self.reads[name] = overlay.observe(name)
        for name in writes:
            overlay.observe(name)
        if pattern is not None:
            overlay.observe_matches(pattern)
            self.patterns += patterns
        if touched.dependencies:
            overlay.observe_dependencies()

    def _count_names(self, new: Sequence[str]) -> None:
        """Limit the size of the names: the journal keeps each one that the code used, existing or not."""
        overlay, limits = self.overlay, self.overlay.unit.limits
        size_bytes = overlay.names_bytes + sum(map(len, new)) + _ENTRY_BYTES * len(new)
        if size_bytes > limits.value_size_bytes:
            what = "size of the names that the execution asked for, in bytes,"
            raise LimitExceededError(what, size_bytes, limits.value_size_bytes, "value_size_bytes")
        overlay.names_bytes = size_bytes

    def check_running(self) -> None:
        """Raise unless the execution can still do something.

        Raises:
            ExecutionEndedError: It has ended.
            ForkedProcessError: This is a forked child of the process that runs it.
        """
        if self.overlay.is_forked:
            raise ForkedProcessError(f"execution {self.id}")
        if self.ended:
            raise ExecutionEndedError(self.id, self.ended)

    def check_is_of(self, session_id: str) -> None:
        """Raise `InvalidArgumentError` unless it is an execution of this session."""
        if session_id != self.session_id:
            raise InvalidArgumentError("session_id", f"execution {self.id} belongs to another session")

    def check_can_publish(self, identifier: str) -> None:
        """Raise `InvalidArgumentError` if the execution has staged a write of the variable."""
        with self.overlay.lock:
            self.check_running()
            if self.overlay.has_staged(identifier):
                reason = (
                    f"{identifier!r} has been written in this execution, which shows at its end; do one or the other"
                )
                raise InvalidArgumentError("publish", reason)

    def take_published(self, published: Sequence[Variable]) -> None:
        """Show the execution a version that it has published, and those that were computed from it."""
        with self.overlay.lock:
            for variable in published:
                self.overlay.rebase(variable)
            self.published.append((published[0].name, published[0].version))

    def quotable(self) -> tuple[Value, ...]:
        """Return the values that an error may quote: those that it, or an execution around it, has seen or written.

        Those of sensitive variables are always among them.
        """
        return self.overlay.quotable()

    def undo(self) -> None:
        """Discard everything that it, and the executions it called, have staged."""
        with self.overlay.lock:
            self.overlay.rollback_to(*self._start)

    def close(self, status: str) -> None:
        """End the execution: from now on, everything its code does is refused."""
        with self.overlay.lock:
            self.status = self.status or status

    def correct(self, status: str) -> None:
        """Note how it has really ended, which only the store decides."""
        with self.overlay.lock:
            self.status = status

    def finish(self, verdict: Verdict) -> FinishExecution:
        """Return the command that ends it: the staged writes, and what must be unchanged for them to commit."""
        overlay = self.overlay
        with overlay.lock:
            if verdict.status is not ExecutionStatus.COMMITTED:
                return FinishExecution(self.session_id, verdict, tuple(self.children))
            everything = self.isolation is Isolation.SERIALIZABLE
            return FinishExecution(
                self.session_id,
                verdict,
                tuple(self.children),
                tuple(overlay.steps),
                {name: seen for name, seen in overlay.checked.items() if everything or name in overlay.written},
                dict(overlay.matched) if everything else {},
                overlay.dependencies,
                dict(overlay.gone) if everything else {},
            )
