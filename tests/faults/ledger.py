"""The ledger: every write that the clients requested, and the answers that they got."""

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

    `targets` are the ids of the variables that it writes, `versions` the new versions from the answer. An `unknown`
    write got no answer; `key` is the idempotency key with which it can be repeated.
    """

    token: str
    session_id: str
    targets: tuple[str, ...]
    value: str
    """JSON; "" if the value is the number of its version, as with counters."""
    key: str | None = None
    expected: int = 0
    status: Status = "unknown"
    versions: dict[str, int] = field(default_factory=dict)
    invoked_at: float = 0.0
    returned_at: float = math.inf
    tool: str = ""
    """The tool that writes, if a tool does: its writes are one commit, like those of a batch."""
    execution_id: str = ""
    """The execution named in the answer, however it ended."""
    sequence: int = 0
    """The commit named in the answer."""
    journal: str = ""
    """The status that the journal must have, according to the answer."""
    result: Any = None
    """The tool's result, if it committed."""
    repeated: bool = False
    """An attempt has had no answer, so that its client sends it again."""
    settled: bool = False
    """No client will repeat it and its server is gone: it is in the file, or never will be."""


@dataclass(slots=True)
class Rollback:
    """An acknowledged rollback: the new version, the version whose value it has, and the time of the answer."""

    variable_id: str
    version: int
    target: int
    returned_at: float


@dataclass(slots=True)
class Ledger:
    """All requests and answers, in the memory of the checking process."""

    writes: dict[str, Write] = field(default_factory=dict)
    reads: dict[str, list[Operation]] = field(default_factory=dict)
    """By variable id."""
    rollbacks: list[Rollback] = field(default_factory=list)
    deleted: dict[str, float] = field(default_factory=dict)
    """The time at which the deletion of a variable was acknowledged, by its id."""
    ended: dict[str, float] = field(default_factory=dict)
    """The time at which the end of a session was acknowledged, by its id."""
    complaints: list[str] = field(default_factory=list)
    """Wrong answers that a client has seen: none in time, or another one to a repetition."""
    endings: Counter[str] = field(default_factory=Counter)
    """The status codes of calls without an answer from the server."""
    initial: dict[str, str] = field(default_factory=dict)
    """The first value of the variables whose histories are checked, by id."""

    def as_of(self, instant: float) -> "Ledger":
        """Return the ledger at that time; writes without an answer by then are unknown."""
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
        """Return the reads and writes of one variable, as its clients saw them, without its registration."""
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
    # A write refused in the end is never in the file, regardless of when its client learned of the refusal.
    status: Status = "refused" if write.status == "refused" else "unknown"
    return replace(write, status=status, versions={}, execution_id="", sequence=0, journal="", result=None)
