"""The checker itself: it finds planted violations, and agrees with a search through all orders on small histories."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.concurrency.linearizability import RULES, Operation, Status, check

FIRST = "first"


def wrote(
    began: float, ended: float, value: str, version: int | None, *, expected: int = 0, status: Status = "ok"
) -> Operation:
    return Operation(0, "set", began, ended, status, value, version, expected)


def read(began: float, ended: float, value: str, version: int) -> Operation:
    return Operation(1, "get", began, ended, "ok", value, version)


def rules_broken(history: Sequence[Operation]) -> set[str]:
    return {violation.rule for violation in check(history, FIRST)}


GOOD = [
    wrote(0, 1, "a", 1),
    read(0.5, 2, FIRST, 0),
    wrote(3, 6, "b", 2, expected=1),
    wrote(4, 5, "c", 2, expected=1, status="refused"),
    read(4, 7, "a", 1),
    wrote(8, math.inf, "d", None, status="unknown"),
    read(9, 10, "b", 2),
    read(11, 12, "d", 3),
    wrote(13, 14, "e", 4),
]

PLANTED: dict[str, tuple[list[Operation], str]] = {
    "two writes got one version": ([wrote(0, 1, "a", 1), wrote(0, 1, "b", 1)], "duplicate version"),
    "an update was lost": (
        [wrote(0, 1, "a", 1), wrote(2, 4, "b", 2, expected=1), wrote(2, 4, "c", 3, expected=1)],
        "wrong version",
    ),
    "a read is stale": ([wrote(0, 1, "a", 1), read(2, 3, FIRST, 0)], "real-time order"),
    "a read goes back": (
        [wrote(0, 9, "a", 1), read(1, 2, "a", 1), read(3, 4, FIRST, 0)],
        "real-time order",
    ),
    "a write is ordered before one that had ended": ([wrote(0, 1, "a", 2), wrote(2, 3, "b", 1)], "real-time order"),
    "a read saw the future": ([read(0, 1, "a", 1), wrote(2, 3, "a", 1)], "real-time order"),
    "a conflict names a version that is over": (
        [wrote(0, 1, "a", 1), wrote(2, 3, "b", 2), wrote(4, 5, "c", 1, expected=2, status="refused")],
        "real-time order",
    ),
    "a refused write was read": (
        [wrote(0, 1, "a", None, status="refused"), read(0, 1, "a", 1)],
        "dirty read",
    ),
    "an unknown write has the version of another": (
        [wrote(0, math.inf, "a", None, status="unknown"), read(1, 2, "a", 1), wrote(3, 4, "b", 1)],
        "value changed",
    ),
    "no client wrote the value of a read": ([read(0, 1, "z", 1)], "value from nowhere"),
    "a version has two values": (
        [wrote(0, 9, "a", 1), wrote(0, 9, "b", 2), read(1, 2, "a", 2)],
        "value changed",
    ),
    "a version has no writer": ([wrote(0, 1, "a", 1), wrote(2, 3, "b", 3)], "lost version"),
    "the only writer began too late": (
        [wrote(0, 1, "a", 1), wrote(2, 3, "b", 3), wrote(4, math.inf, "c", None, status="unknown")],
        "lost version",
    ),
    "an unknown conditional write became another version": (
        [
            wrote(0, 1, "a", 1),
            wrote(0, 1, "b", 2),
            wrote(2, math.inf, "c", None, expected=1, status="unknown"),
            read(3, 4, "c", 3),
        ],
        "wrong version",
    ),
}


def test_good_history() -> None:
    assert rules_broken(GOOD) == set()


@pytest.mark.parametrize("name", PLANTED)
def test_finds(name: str) -> None:
    history, rule = PLANTED[name]
    assert rule in rules_broken(history)


def test_every_rule_is_planted() -> None:
    assert {rule for _, rule in PLANTED.values()} == set(RULES)


# Comparison with a plain search through all orders


def is_linearizable(history: Sequence[Operation], version: int = 0, value: str | None = FIRST) -> bool:
    """Return whether some order explains the history, by trying all of them."""
    if all(op.status == "unknown" for op in history):
        return True
    for index, op in enumerate(history):
        rest = [*history[:index], *history[index + 1 :]]
        if any(other.returned_at < op.invoked_at for other in rest):
            continue
        for next_version, next_value in _effects(op, version, value):
            if is_linearizable(rest, next_version, next_value):
                return True
    return False


def _effects(op: Operation, version: int, value: str | None) -> list[tuple[int, str | None]]:
    """The possible states of the variable after `op`; [] if its answer is impossible here."""
    if op.kind == "get":
        return [(version, value)] if (op.version, op.value) == (version, value) else []
    fits = op.expected in (0, version)
    if op.status == "ok":
        return [(version + 1, op.value)] if fits and op.version == version + 1 else []
    if op.status == "refused":
        return [(version, value)] if op.version is None or (op.version == version and not fits) else []
    return [(version, value), (version + 1, op.value)] if fits else [(version, value)]


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    """The answers of a correct variable to a few overlapping calls, of which one may be changed afterwards."""
    version, value = 0, FIRST
    history: list[Operation] = []
    now = 0.0
    for index in range(draw(st.integers(1, 5))):
        # The call takes effect at some moment between its begin and its end, as may others.
        now += 1
        began = now - draw(st.sampled_from([0.25, 1.25, 2.25]))
        ended = now + draw(st.sampled_from([0.25, 1.25, 2.25]))
        if draw(st.booleans()):
            history.append(Operation(0, "get", began, ended, "ok", value, version))
            continue
        expected = draw(st.sampled_from([0, 0, version, version + 1]))
        wanted = f"v{index}"
        if draw(st.integers(0, 3)) == 0:
            history.append(wrote(began, math.inf, wanted, None, expected=expected, status="unknown"))
            if expected in (0, version) and draw(st.booleans()):
                version, value = version + 1, wanted
        elif expected in (0, version):
            version, value = version + 1, wanted
            history.append(wrote(began, ended, wanted, version, expected=expected))
        else:
            history.append(wrote(began, ended, wanted, version, expected=expected, status="refused"))
    if draw(st.booleans()):
        changed = draw(st.integers(0, len(history) - 1))
        history[changed] = draw(_changes(history[changed]))
    return history


def _changes(op: Operation) -> st.SearchStrategy[Operation]:
    if op.status == "unknown":
        return st.just(replace(op, invoked_at=op.invoked_at + 2))
    return st.one_of(
        st.integers(0, 4).map(lambda version: replace(op, version=version)),
        st.just(replace(op, invoked_at=op.invoked_at + 2, returned_at=op.returned_at + 2)),
        st.just(replace(op, expected=2) if op.kind == "set" else replace(op, value="v0")),
    )


@settings(max_examples=400)
@given(histories())
def test_agrees_with_a_search_through_all_orders(history: list[Operation]) -> None:
    assert (check(history, FIRST) == []) == is_linearizable(history)
