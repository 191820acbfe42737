"""Checks whether the transactions that clients saw are serializable, in real-time order.

Each transaction reads lists and appends elements to lists; each element is appended once in the whole history. A read
of a list shows which appends came before it, and in which order. From that follows which transaction has to come before
which other: it wrote what the other read or overwrote, or read what the other replaced, or ended before the other
began. A cycle in these dependencies is a violation.
"""

import bisect
import itertools
import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

Status: TypeAlias = Literal["ok", "failed", "unknown"]
RULES = (
    "dirty read",
    "intermediate read",
    "not its own writes",
    "appended twice",
    "incompatible orders",
    "lost update",
    "dependency cycle",
    "read skew",
    "write skew",
    "real-time order",
)


class Operation(NamedTuple):
    """A read of `name`, or an append of `element` to it; `found` is the list before it, None without an answer."""

    name: str
    element: str = ""
    found: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Transaction:
    """One transaction as its client saw it. A failed one must have no effect; an unknown one may have one."""

    operations: tuple[Operation, ...]
    invoked_at: float
    returned_at: float
    status: Status

    def appended(self, name: str) -> tuple[str, ...]:
        """The elements that it appended to a list, in order."""
        return tuple(each.element for each in self.operations if each.name == name and each.element)


class Violation(NamedTuple):
    """Something that no serializable store does; `rule` is one of `RULES`."""

    rule: str
    why: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.why}"


class _Edge(NamedTuple):
    """A dependency: `after` comes later than the node with this edge. `kind`: ww, wr, rw, or rt (real time)."""

    after: int
    kind: str
    name: str = ""


def check(history: Sequence[Transaction]) -> list[Violation]:
    """Return everything that no order of the transactions explains. The last one should read everything, alone."""
    return [*_Checker(history).violations()]


class _Checker:
    def __init__(self, history: Sequence[Transaction]) -> None:
        self._history = history
        self._writers: dict[tuple[str, str], int] = {}
        self._orders: dict[str, tuple[str, ...]] = {}
        self._edges: defaultdict[int, list[_Edge]] = defaultdict(list)
        self._seen: set[int] = set()
        """Transactions whose writes were read: they have committed, even if their clients do not know."""

    def violations(self) -> Iterator[Violation]:
        for index, transaction in enumerate(self._history):
            for each in transaction.operations:
                if each.element:
                    self._writers[each.name, each.element] = index
        first = [*self._check_lists(), *self._order()]
        yield from first
        if not first:
            # The edges only make sense if each list has one order.
            self._connect()
            yield from self._cycles()

    # Single reads

    def _reads(self) -> Iterator[tuple[int, Operation, tuple[str, ...]]]:
        """Yield each read without the reader's own appends, which have to be at the end."""
        for index, transaction in enumerate(self._history):
            if transaction.status == "ok":
                for each, found, own in _foreign_reads(transaction):
                    if own is not None and found is not None:
                        yield index, each, found

    def _check_lists(self) -> Iterator[Violation]:
        for transaction in self._history:
            if transaction.status == "ok":
                for each, _, own in _foreign_reads(transaction):
                    if own is None:
                        yield Violation("not its own writes", f"{each} in {transaction}")
        for index, each, found in self._reads():
            if len(set(found)) < len(found):
                yield Violation("appended twice", f"{each} of {self._history[index]}")
            for element in found:
                writer = self._writers.get((each.name, element))
                if writer is None or self._history[writer].status == "failed":
                    yield Violation("dirty read", f"{element!r} in {each} is not from a committed transaction")
                else:
                    self._seen.add(writer)
            yield from self._check_whole(index, each, found)

    def _check_whole(self, index: int, each: Operation, found: tuple[str, ...]) -> Iterator[Violation]:
        """The last element of a read has to be the last one that its writer appended."""
        writer = self._writers.get((each.name, found[-1])) if found else None
        if writer is not None and writer != index:
            appended = self._history[writer].appended(each.name)
            if appended[-1] != found[-1]:
                yield Violation("intermediate read", f"{each} saw a part of {appended}")

    # The order of each list

    def _order(self) -> Iterator[Violation]:
        for _, each, found in self._reads():
            if len(found) >= len(self._orders.get(each.name, ())):
                self._orders[each.name] = found
        for _, each, found in self._reads():
            order = self._orders[each.name]
            if order[: len(found)] != found:
                yield Violation("incompatible orders", f"{each}, and the list became {order}")
        for index, transaction in enumerate(self._history):
            if transaction.status == "ok" or index in self._seen:
                for name in {each.name for each in transaction.operations if each.element}:
                    missing = set(transaction.appended(name)) - set(self._orders.get(name, ()))
                    if missing:
                        yield Violation("lost update", f"{missing} of {transaction} is not in {name!r}")

    # Dependencies

    def _connect(self) -> None:
        places = {name: self._writers_of(name) for name in self._orders}
        for name, writers in places.items():
            for before, after in itertools.pairwise(writers):
                self._add(before, after, "ww", name)
        for index, each, found in self._reads():
            order, writers = self._orders[each.name], places[each.name]
            if found:
                self._add(self._writers[each.name, found[-1]], index, "wr", each.name)
            if len(found) < len(order):
                self._add(index, self._writers[each.name, order[len(found)]], "rw", each.name)
        self._connect_in_time()

    def _writers_of(self, name: str) -> list[int]:
        writers: list[int] = []
        for element in self._orders[name]:
            writer = self._writers[name, element]
            if not writers or writers[-1] != writer:
                writers.append(writer)
        return writers

    def _add(self, before: int, after: int, kind: str, name: str = "") -> None:
        if before != after:
            self._edges[before].append(_Edge(after, kind, name))

    def _connect_in_time(self) -> None:
        """Transactions that ended come before those that began later, connected by a line of moments.

        There is a moment for each end; moments are negative nodes. Direct edges would be needed for nearly every pair.
        """
        ends = sorted(
            (transaction.returned_at, index)
            for index, transaction in enumerate(self._history)
            if transaction.status == "ok" and transaction.returned_at < math.inf
        )
        for place, (_, index) in enumerate(ends):
            self._add(index, -place - 1, "rt")
            self._add(-place - 1, -place - 2, "rt")
        times = [at for at, _ in ends]
        for index, transaction in enumerate(self._history):
            place = bisect.bisect_left(times, transaction.invoked_at)
            if place > 0 and (transaction.status == "ok" or index in self._seen):
                self._add(-place, index, "rt")

    # Cycles

    def _cycles(self) -> Iterator[Violation]:
        """One cycle for each component: without real time if possible, and with as few overtaken reads as possible."""
        for kinds in (("ww", "wr"), ("ww", "wr", "rw"), ("ww", "wr", "rw", "rt")):
            cycles = [self._shortest(component, kinds) for component in _components(self._edges, kinds)]
            if cycles:
                yield from map(self._judge, cycles)
                return

    def _shortest(self, component: set[int], kinds: Iterable[str]) -> list[tuple[int, _Edge]]:
        cycles = (cycle for start in sorted(component)[:50] if (cycle := self._cycle(start, component, kinds)))
        return min(cycles, key=lambda cycle: (sum(edge.kind == "rw" for _, edge in cycle), len(cycle)))

    def _cycle(self, start: int, component: set[int], kinds: Iterable[str]) -> list[tuple[int, _Edge]]:
        """The shortest path from a node back to itself."""
        came: dict[int, tuple[int, _Edge]] = {}
        queue = deque([start])
        while queue:
            node = queue.popleft()
            for edge in self._edges.get(node, ()):
                if edge.kind not in kinds or edge.after not in component or edge.after in came:
                    continue
                came[edge.after] = (node, edge)
                if edge.after == start:
                    return _way_back(came, start)
                queue.append(edge.after)
        return []

    def _judge(self, cycle: list[tuple[int, _Edge]]) -> Violation:
        kinds = [edge.kind for _, edge in cycle]
        why = " -> ".join(f"{self._describe(node)} ({edge.kind} {edge.name})" for node, edge in cycle if node >= 0)
        if "rt" in kinds:
            return Violation("real-time order", why)
        overtaken = kinds.count("rw")
        # With true snapshots, at least two overtaken reads are adjacent; a single one means that there was no snapshot.
        rule = "dependency cycle" if overtaken == 0 else "write skew" if _in_a_row(kinds) else "read skew"
        return Violation(rule, why)

    def _describe(self, node: int) -> str:
        return " ".join(f"{each.name}+{each.element}" if each.element else each.name for each in self._ops(node))

    def _ops(self, node: int) -> tuple[Operation, ...]:
        return self._history[node].operations


def _in_a_row(kinds: list[str]) -> bool:
    return any(pair == ("rw", "rw") for pair in zip(kinds, [*kinds[1:], kinds[0]], strict=True)) and len(kinds) > 1


def _foreign_reads(
    transaction: Transaction,
) -> Iterator[tuple[Operation, tuple[str, ...] | None, tuple[str, ...] | None]]:
    """Yield each operation with the elements of others and its own ones in its read; None if its own are wrong."""
    appended: defaultdict[str, tuple[str, ...]] = defaultdict(tuple)
    others: dict[str, tuple[str, ...]] = {}
    for each in transaction.operations:
        if each.found is not None:
            own = appended[each.name]
            at = len(each.found) - len(own)
            foreign = each.found[:at] if at >= 0 else ()
            fits = at >= 0 and each.found[at:] == own and others.setdefault(each.name, foreign) == foreign
            yield each, foreign, own if fits else None
        if each.element:
            appended[each.name] += (each.element,)


def _way_back(came: dict[int, tuple[int, _Edge]], start: int) -> list[tuple[int, _Edge]]:
    cycle = [came[start]]
    while cycle[-1][0] != start:
        cycle.append(came[cycle[-1][0]])
    return cycle[::-1]


def _components(edges: dict[int, list[_Edge]], kinds: Iterable[str]) -> list[set[int]]:
    """The strongly connected components with more than one node (Tarjan, without recursion)."""
    following = {node: [edge.after for edge in each if edge.kind in kinds] for node, each in edges.items()}
    number: dict[int, int] = {}
    lowest: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    components: list[set[int]] = []
    for root in following:
        if root in number:
            continue
        work = [(root, iter(following[root]))]
        number[root] = lowest[root] = len(number)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for after in rest:
                if after not in number:
                    number[after] = lowest[after] = len(number)
                    stack.append(after)
                    on_stack.add(after)
                    work.append((after, iter(following.get(after, ()))))
                    break
                if after in on_stack:
                    lowest[node] = min(lowest[node], number[after])
            else:
                work.pop()
                if work:
                    lowest[work[-1][0]] = min(lowest[work[-1][0]], lowest[node])
                if lowest[node] == number[node]:
                    component = set(stack[stack.index(node) :])
                    del stack[stack.index(node) :]
                    on_stack -= component
                    if len(component) > 1:
                        components.append(component)
    return components
