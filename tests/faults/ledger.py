"""What the clients know: every write that they asked for, and what they were told."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from tests.concurrency.linearizability import Operation

Status: TypeAlias = Literal["ok", "refused", "unknown"]
Commit: TypeAlias = tuple[int, tuple[tuple[str, int], ...]]
"""A commit as a watcher saw it: its sequence, and the (variable id, version) pairs that it made, sorted."""


@dataclass(slots=True)
class Write:
    """One request that writes values. Its `token` is in the metadata of every version that it makes.

    `targets` are the ids of the variables that it writes, `versions` what it was told of them. A write that is
    `unknown` was asked for, and the answer did not come; `key` is the idempotency key with which it can be repeated.
    """

    token: str
    session_id: str
    targets: tuple[str, ...]
    value: str
    """JSON; "" if it is the number of its version, as with counters."""
    key: str | None = None
    expected: int = 0
    status: Status = "unknown"
    versions: dict[str, int] = field(default_factory=dict)
    invoked_at: float = 0.0
    returned_at: float = math.inf
    tool: str = ""
    """The tool that writes, if it is one: its writes are one commit, like those of a batch."""
    execution_id: str = ""
    """The execution of which the answer told, however it ended."""
    sequence: int = 0
    """The commit of which the answer told."""
    journal: str = ""
    """How the execution ended by its answer, as the journal has to have it."""
    result: Any = None
    """What the tool answered, if it has committed."""
    settled: bool = False
    """Nobody will repeat it, and the server that was asked is gone: it is there or will never be."""


@dataclass(slots=True)
class Rollback:
    """An acknowledged rollback: which version it made, of which it has the value, when the answer came."""

    variable_id: str
    version: int
    target: int
    returned_at: float


@dataclass(slots=True)
class Ledger:
    """Everything that was asked for and told, in memory of the process that checks."""

    writes: dict[str, Write] = field(default_factory=dict)
    reads: dict[str, list[Operation]] = field(default_factory=dict)
    """By variable id."""
    rollbacks: list[Rollback] = field(default_factory=list)
    deleted: dict[str, float] = field(default_factory=dict)
    """When the deletion of a variable was acknowledged, by its id."""
    ended: dict[str, float] = field(default_factory=dict)
    """When the end of a session was acknowledged, by its id."""
    complaints: list[str] = field(default_factory=list)
    """What a client has seen that cannot be: no answer in time, another answer to a repetition."""
    endings: Counter[str] = field(default_factory=Counter)
    """The status codes with which calls ended that nobody answered."""
    initial: dict[str, str] = field(default_factory=dict)
    """The first value of the variables whose histories are checked, by id."""

    def as_of(self, instant: float) -> "Ledger":
        """What was known then; the writes of which no answer had come are unknown."""
        return Ledger(
            writes={token: _as_of(write, instant) for token, write in self.writes.items()},
            reads={
                target: [read for read in reads if read.returned_at < instant] for target, reads in self.reads.items()
            },
            rollbacks=[rollback for rollback in self.rollbacks if rollback.returned_at < instant],
            deleted={name: at for name, at in self.deleted.items() if at < instant},
            ended={name: at for name, at in self.ended.items() if at < instant},
        )

    def history(self, variable_id: str) -> list[Operation]:
        """The reads and writes of one variable, as its clients saw them; its registration is what they begin with."""
        history = list(self.reads.get(variable_id, []))
        for write in self.writes.values():
            if variable_id in write.targets and write.versions.get(variable_id) != 0:
                history.append(
                    Operation(
                        client=0,
                        kind="set",
                        invoked_at=write.invoked_at,
                        returned_at=write.returned_at,
                        status=write.status,
                        value=write.value,
                        version=write.versions.get(variable_id),
                        expected=write.expected,
                    )
                )
        return history


def _as_of(write: Write, instant: float) -> Write:
    if write.returned_at < instant:
        return write
    # What was refused in the end is nowhere, whenever its client heard of it.
    status: Status = "refused" if write.status == "refused" else "unknown"
    return replace(write, status=status, versions={}, execution_id="", sequence=0, journal="", result=None)
