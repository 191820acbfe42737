"""The checker itself: it finds planted violations, and agrees with a search through all orders on small histories."""

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from tests.concurrency.serializability import RULES, Operation, Status, Transaction, check


def ran(began: float, ended: float, *operations: tuple[str, str, str], status: Status = "ok") -> Transaction:
    """A transaction of (list, element or "", found); `found` is a string with one letter for each element."""
    done = tuple(Operation(name, element, tuple(found)) for name, element, found in operations)
    return Transaction(done, began, ended, status)


def at_end(**lists: str) -> Transaction:
    return ran(98, 99, *((name, "", found) for name, found in lists.items()))


def unknown(began: float, *operations: tuple[str, str]) -> Transaction:
    return Transaction(tuple(Operation(name, element) for name, element in operations), began, math.inf, "unknown")


GOOD = [
    ran(0, 5, ("x", "a", ""), ("y", "b", "")),
    ran(1, 6, ("x", "", "a"), ("x", "c", "a"), ("x", "d", "ac")),
    ran(1, 7, ("x", "", ""), ("y", "", "")),
    ran(2, 8, ("x", "z", "a"), status="failed"),
    unknown(3, ("x", "e"), ("y", "f")),
    unknown(3, ("y", "g")),
    at_end(x="acde", y="bf"),
]

PLANTED: dict[str, tuple[list[Transaction], str]] = {
    "two wrote over the same list": (
        [ran(0, 9, ("x", "a", "")), ran(0, 9, ("x", "b", "")), at_end(x="b")],
        "lost update",
    ),
    "half of an unknown one is there": ([unknown(0, ("x", "a"), ("y", "b")), at_end(x="a", y="")], "lost update"),
    "two read what the other then wrote": (
        [ran(0, 9, ("x", "", ""), ("y", "b", "")), ran(0, 9, ("y", "", ""), ("x", "a", "")), at_end(x="a", y="b")],
        "write skew",
    ),
    "a reader saw one of two writes": (
        [ran(0, 9, ("x", "a", ""), ("y", "b", "")), ran(0, 9, ("x", "", "a"), ("y", "", "")), at_end(x="a", y="b")],
        "read skew",
    ),
    "two saw each other's writes": (
        [
            ran(0, 9, ("x", "a", ""), ("y", "", "b")),
            ran(0, 9, ("y", "b", ""), ("x", "", "a")),
            at_end(x="a", y="b"),
        ],
        "dependency cycle",
    ),
    "a reader is late": ([ran(0, 1, ("x", "a", "")), ran(2, 3, ("x", "", "")), at_end(x="a")], "real-time order"),
    "a write of a failed transaction was read": (
        [ran(0, 1, ("x", "a", ""), status="failed"), ran(2, 3, ("x", "", "a")), at_end(x="")],
        "dirty read",
    ),
    "no transaction wrote what was read": ([ran(0, 1, ("x", "", "?")), at_end(x="")], "dirty read"),
    "the first of two appends was read": (
        [ran(0, 9, ("x", "a", ""), ("x", "b", "a")), ran(0, 9, ("x", "", "a")), at_end(x="ab")],
        "intermediate read",
    ),
    "its own append is missing": ([ran(0, 9, ("x", "a", ""), ("x", "", "")), at_end(x="a")], "not its own writes"),
    "a second read saw more": (
        [ran(0, 9, ("x", "a", "")), ran(0, 9, ("x", "", ""), ("x", "", "a")), at_end(x="a")],
        "not its own writes",
    ),
    "an element occurs twice": ([ran(0, 9, ("x", "a", "")), at_end(x="aa")], "appended twice"),
    "a list changed its order": (
        [ran(0, 9, ("x", "a", "")), ran(0, 9, ("x", "b", "a")), ran(0, 9, ("x", "", "ba")), at_end(x="ab")],
        "incompatible orders",
    ),
}


def test_good_history() -> None:
    assert check(GOOD) == []


@pytest.mark.parametrize("name", PLANTED)
def test_finds(name: str) -> None:
    history, rule = PLANTED[name]
    assert rule in {violation.rule for violation in check(history)}


def test_every_rule_is_planted() -> None:
    assert {rule for _, rule in PLANTED.values()} == set(RULES)


# Comparison with a plain search through all orders


def is_serializable(history: Sequence[Transaction], lists: dict[str, tuple[str, ...]] | None = None) -> bool:
    """Return whether some order of the transactions explains their reads, by trying all of them."""
    lists = lists or {}
    left = [each for each in history if each.status != "failed"]
    if all(each.status == "unknown" for each in left):
        return True
    for index, transaction in enumerate(left):
        rest = [*left[:index], *left[index + 1 :]]
        if any(other.returned_at < transaction.invoked_at for other in rest):
            continue
        after = _run(transaction, lists)
        if after is not None and is_serializable(rest, after):
            return True
    return False


def _run(transaction: Transaction, lists: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]] | None:
    after = dict(lists)
    for each in transaction.operations:
        before = after.get(each.name, ())
        if each.found is not None and each.found != before:
            return None
        if each.element:
            after[each.name] = (*before, each.element)
    return after


def draw(random: Random) -> list[Transaction]:
    """The answers of a store of random quality to a few overlapping transactions."""
    current: dict[str, tuple[str, ...]] = {"x": (), "y": ()}
    older = dict(current)
    history = []
    for number in range(random.randint(2, 5)):
        # Each one happens at some moment. Its snapshot may be older, so that it overwrites what happened since.
        snapshot = dict(older) if random.random() < 0.4 else dict(current)
        older = dict(current)
        written: dict[str, tuple[str, ...]] = {}
        operations = []
        for place in range(random.randint(1, 3)):
            name, element = random.choice("xy"), random.choice(["", f"{number}{place}"])
            found = written.get(name, snapshot[name])
            operations.append(Operation(name, element, found))
            if element:
                written[name] = (*found, element)
        transaction = Transaction(
            tuple(operations), number - random.choice([0.2, 1.2]), number + random.choice([0.2, 1.2]), "ok"
        )
        status = random.choice(["ok", "ok", "ok", "failed", "unknown"])
        if status != "ok":
            blind = tuple(each._replace(found=None) for each in operations)
            transaction = replace(transaction, operations=blind, returned_at=math.inf, status=status)
        if status == "ok" or random.random() < (0.5 if status == "unknown" else 0.05):
            for name, elements in written.items():
                added = elements[len(snapshot[name]) :]
                current[name] = elements if random.random() < 0.1 else (*current[name], *added)
        history.append(transaction)
    reads = tuple(Operation(name, "", found) for name, found in current.items())
    return [*history, Transaction(reads, 90, 91, "ok")]


def test_agrees_with_a_search_through_all_orders() -> None:
    random = Random(1)
    good = 0
    for number in range(3000):
        history = draw(random)
        serializable = is_serializable(history)
        assert (check(history) == []) == serializable, (number, history, check(history))
        good += serializable
    assert 500 < good < 2700
