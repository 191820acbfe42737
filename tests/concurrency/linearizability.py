"""Checks whether the history of one variable, as its clients saw it, is linearizable.

The server numbers every write, so the order that it claims is known: a write of version v comes right after all
operations that saw v - 1. It only remains to check that no client saw anything else, which takes n log n steps instead
of a search. Every written value has to be unique within the history.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["set", "get"]
Status: TypeAlias = Literal["ok", "refused", "unknown"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One call as its client saw it; times are monotonic seconds of one clock.

    `value` was written or read. `version` is the one in the answer: the new one, the one read or, after a refusal
    because of `expected`, the current one. An unknown call never returns: `returned_at` is infinite.
    """

    client: int
    kind: Kind
    invoked_at: float
    returned_at: float
    status: Status
    value: str | None = None
    version: int | None = None
    expected: int = 0


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that no correct server does; `rule` is one of `RULES`."""

    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.text}"


RULES = (
    "duplicate version",
    "wrong version",
    "value from nowhere",
    "dirty read",
    "value changed",
    "real-time order",
    "lost version",
)


def check(history: Iterable[Operation], initial_value: str) -> list[Violation]:
    """Return everything in the history that is not linearizable. Version 0 has `initial_value`."""
    operations = list(history)
    violations = [
        Violation("wrong version", f"{op} was refused although its expected version was the current one")
        for op in operations
        if op.status == "refused" and op.version is not None and op.expected in (0, op.version)
    ]
    values = _values_by_version(operations, initial_value, violations)
    unsettled = _attribute_unknown(operations, values, violations)
    positions = _positions(operations, values, unsettled)
    _check_order(positions, violations)
    _check_missing(positions, values, unsettled, violations)
    return violations


def _values_by_version(
    operations: Sequence[Operation], initial_value: str, violations: list[Violation]
) -> dict[int, str | None]:
    """The value of each version, according to the acknowledged writes."""
    values: dict[int, str | None] = {0: initial_value}
    for op in operations:
        if op.kind != "set" or op.status != "ok" or op.version is None:
            continue
        if op.version in values:
            violations.append(Violation("duplicate version", f"{op} and another write have version {op.version}"))
        if op.version < 1 or (op.expected and op.version != op.expected + 1):
            violations.append(Violation("wrong version", f"{op} expected {op.expected} and made {op.version}"))
        values[op.version] = op.value
    return values


def _attribute_unknown(
    operations: Sequence[Operation], values: dict[int, str | None], violations: list[Violation]
) -> dict[str, Operation]:
    """Find the versions of unknown writes from the reads; return the writes that no client read, by value."""
    unknown = {op.value: op for op in operations if op.kind == "set" and op.status == "unknown" and op.value}
    refused = {op.value for op in operations if op.kind == "set" and op.status == "refused"}
    for op in operations:
        if op.kind != "get" or op.status != "ok" or op.version is None or op.value is None:
            continue
        if op.value in refused:
            violations.append(Violation("dirty read", f"{op} read a value that was refused"))
        elif op.version in values:
            if values[op.version] != op.value:
                text = f"{op} read another value than {values[op.version]!r}, which version {op.version} had"
                violations.append(Violation("value changed", text))
        elif op.value not in unknown:
            violations.append(Violation("value from nowhere", f"{op} read a value that no client wrote"))
        else:
            write = unknown.pop(op.value)
            if write.expected and op.version != write.expected + 1:
                violations.append(Violation("wrong version", f"{write} became version {op.version}"))
            values[op.version] = op.value
    return unknown


@dataclass(frozen=True, slots=True)
class _Placed:
    """An operation at its place in the order that the server claims."""

    position: int
    is_write: bool
    op: Operation


def _positions(
    operations: Sequence[Operation], values: Mapping[int, str | None], unsettled: Mapping[str, Operation]
) -> list[_Placed]:
    version_of = {value: version for version, value in values.items()}
    placed: list[_Placed] = []
    for op in operations:
        if op.kind == "set" and op.status == "unknown":
            if op.value is not None and op.value not in unsettled:
                placed.append(_Placed(version_of[op.value], True, op))
        elif op.version is not None:
            # A refusal that names the current version counts as a read of it.
            placed.append(_Placed(op.version, op.kind == "set" and op.status == "ok", op))
    return placed


def _check_order(placed: Sequence[_Placed], violations: list[Violation]) -> None:
    """Operations that returned before another one began must come before it."""
    ended = sorted(placed, key=lambda item: item.op.returned_at)
    latest: _Placed | None = None
    next_ended = 0
    for item in sorted(placed, key=lambda item: item.op.invoked_at):
        while next_ended < len(ended) and ended[next_ended].op.returned_at < item.op.invoked_at:
            if latest is None or ended[next_ended].position > latest.position:
                latest = ended[next_ended]
            next_ended += 1
        if latest is None:
            continue
        if item.position < latest.position or (item.is_write and item.position == latest.position):
            text = f"{item.op} comes after {latest.op} in time, but not in its version"
            violations.append(Violation("real-time order", text))


def _check_missing(
    placed: Sequence[_Placed],
    values: Mapping[int, str | None],
    unsettled: Mapping[str, Operation],
    violations: list[Violation],
) -> None:
    """Versions without a known writer must come from unknown writes that began in time."""
    highest = max((item.position for item in placed), default=0)
    missing = [version for version in range(1, highest + 1) if version not in values]
    if not missing:
        return
    deadlines = _deadlines(placed)
    candidates = {
        version: [
            write
            for write in unsettled.values()
            if write.invoked_at <= deadlines(version) and write.expected in (0, version - 1)
        ]
        for version in missing
    }
    for version in _unmatched(candidates):
        violations.append(Violation("lost version", f"no write can have made version {version}"))


class _deadlines:
    """The time by which a version existed: a client had seen it, or a later one."""

    def __init__(self, placed: Sequence[_Placed]) -> None:
        ordered = sorted(placed, key=lambda item: item.position)
        self._positions = [item.position for item in ordered]
        self._earliest = [item.op.returned_at for item in ordered]
        for index in range(len(ordered) - 2, -1, -1):
            self._earliest[index] = min(self._earliest[index], self._earliest[index + 1])

    def __call__(self, version: int) -> float:
        index = bisect_left(self._positions, version)
        return self._earliest[index] if index < len(self._earliest) else math.inf


def _unmatched(candidates: Mapping[int, Sequence[Operation]]) -> list[int]:
    """The versions without a writer after a maximum matching (augmenting paths)."""
    assigned: dict[str | None, int] = {}

    def place(version: int, seen: set[str | None]) -> bool:
        for write in candidates[version]:
            if write.value in seen:
                continue
            seen.add(write.value)
            if write.value not in assigned or place(assigned[write.value], seen):
                assigned[write.value] = version
                return True
        return False

    return [version for version in candidates if not place(version, set())]
