"""Execution: the session as one tool execution sees it, and what it has staged. In memory only, until it commits.

At the end the commands that changed anything are sent to the store as one command (`FinishExecution`),
which carries them out again if nothing that the execution stood on has changed.
"""

from collections.abc import Callable
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
    Variable,
)
from dspex_persist.state.tools.overlay import Overlay
from dspex_persist.state.tools.touched import Touched, touched_by
from dspex_persist.state.unit_of_work import Savepoint

R = TypeVar("R")

# What the journal says of a name that was asked for, beside the name.
_SEEN_BYTES = 64


@dataclass(eq=False)
class Execution:
    """One execution under way. Usable from any thread, until it is closed."""

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
    """How it has ended; "" while it runs."""
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
        """The execution that a store has begun."""
        return cls(begun.execution_id, session_id, tool, isolation, Overlay(session_id, begun, origin, read))

    def begin_child(self, begun: Begun, tool: str) -> "Execution":
        """An execution that this one called: part of the same transaction."""
        overlay = self.overlay
        start = (overlay.unit.savepoint(), len(overlay.steps))
        return Execution(begun.execution_id, self.session_id, tool, self.isolation, overlay, self, _start=start)

    @property
    def depth(self) -> int:
        """How many executions it is part of."""
        return 0 if self.parent is None else self.parent.depth + 1

    @property
    def ended(self) -> str:
        """How it has ended, by itself or with one that it is part of; "" while it runs."""
        return self.status or (self.parent.ended if self.parent is not None else "")

    def run(self, command: Command[R], origin: Origin) -> R:
        """Carry out a command on the session as the execution sees it.

        What its values were read as is remembered: it is carried out again when the execution commits.
        """
        command.check()
        if command.ahead is None:
            self.read_ahead(command)
        with self.overlay.lock:
            self.check_running()
            self.check_is_of(command.session_id)
            touched = touched_by(command)
            self._count_asked(touched)
            found = self.overlay.look(touched)
            for asked in touched.reads:
                self.reads.setdefault(asked, found[asked])
            if touched.pattern is not None and touched.pattern not in self.patterns:
                self.patterns.append(touched.pattern)
            result = self.overlay.apply(command, self.id, origin)
            self.overlay.written.update(touched.writes)
            return result

    def read_ahead(self, command: Command[Any], *, strict: bool = False) -> None:
        """Read the values that a command brings, while others may use the execution. With `strict`, `run` may fail with
        `VariableReplacedError`, as `StateProvider.read_ahead` has it."""
        if command.fault is None and command.brings > values.LITTLE:
            command.read_ahead(values.ReadAhead(self.overlay.unit.limits, strict=strict), self.overlay.find)

    def _count_asked(self, touched: Touched) -> None:
        """What it asks for is in its journal entry, whether it is there or not."""
        overlay, limits = self.overlay, self.overlay.unit.limits
        new = [asked for asked in touched.reads if asked not in self.reads]
        # What it only writes is no read of its own, but is checked at the end.
        new += [asked for asked in touched.writes if asked not in overlay.checked]
        if touched.pattern is not None and touched.pattern not in self.patterns:
            new.append(touched.pattern)
        if not new:
            return
        size_bytes = overlay.asked_bytes + sum(map(len, new)) + _SEEN_BYTES * len(new)
        if size_bytes > limits.value_size_bytes:
            what = "size of the names that the execution asked for, in bytes,"
            raise LimitExceededError(what, size_bytes, limits.value_size_bytes, "value_size_bytes")
        overlay.asked_bytes = size_bytes

    def check_running(self) -> None:
        """Raise `ExecutionEndedError` once it has ended, `ForkedProcessError` in a child of its process."""
        if self.overlay.is_forked:
            raise ForkedProcessError(f"execution {self.id}")
        if self.ended:
            raise ExecutionEndedError(self.id, self.ended)

    def check_is_of(self, session_id: str) -> None:
        """Raise unless it is an execution of this session."""
        if session_id != self.session_id:
            raise InvalidArgumentError("session_id", f"execution {self.id} belongs to another session")

    def check_can_publish(self, identifier: str) -> None:
        """Raise unless a value of the variable can be shown ahead of the commit."""
        with self.overlay.lock:
            self.check_running()
            if self.overlay.has_staged(identifier):
                reason = (
                    f"{identifier!r} has been written in this execution, which shows at its end; do one or the other"
                )
                raise InvalidArgumentError("publish", reason)

    def take_published(self, variable: Variable) -> None:
        """Take in what has been published for it."""
        with self.overlay.lock:
            self.overlay.rebase(variable)
            self.published.append((variable.name, variable.version))

    def undo(self) -> None:
        """Take back what it, and those that it called, have staged."""
        with self.overlay.lock:
            self.overlay.rollback_to(*self._start)

    def close(self, status: str) -> None:
        """End it: whatever its code still does is refused."""
        with self.overlay.lock:
            self.status = self.status or status

    def finish(self, verdict: Verdict) -> FinishExecution:
        """The command that ends it, with everything that has to hold and to be written if it is to commit."""
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
                {asked: seen for asked, seen in overlay.checked.items() if everything or asked in overlay.written},
                dict(overlay.matched) if everything else {},
                overlay.dependencies,
                dict(overlay.gone) if everything else {},
            )
