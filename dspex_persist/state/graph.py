"""The graph of a session's dependencies: which variables a change affects, and which dependency would close a cycle."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from operator import attrgetter
from typing import Any, Final, NamedTuple, TypeAlias, overload

from dspex_persist.state.frozen import SharedMap
from dspex_persist.state.model import Dependency

_Links: TypeAlias = Mapping[str, Dependency]
"""The dependencies of one variable on another by type, oldest first. Those that have ended did so in one commit."""


class _Node(NamedTuple):
    """The dependencies of a variable.

    Attributes:
        uses: Its dependencies on other variables, by their ids.
        users: The dependencies of other variables on it, by their ids.
        past: The ended dependencies of others on it, in the order of their ends.
    """

    uses: Mapping[str, _Links] = {}
    users: Mapping[str, _Links] = {}
    past: tuple[_Links, ...] = ()


_NOTHING: Final = _Node()


class Dependencies(Sequence[Dependency]):
    """Every dependency that a session ever had, oldest first. Immutable: a change returns a new object.

    A lookup or a change takes time in proportion to the number of directly connected variables.

    Attributes:
        changed_at: The commit of the last change.
    """

    __slots__ = ("_count", "_nodes", "changed_at")

    def __init__(self, edges: Iterable[Dependency] = ()) -> None:
        uses: dict[str, dict[str, dict[str, Dependency]]] = {}
        users: dict[str, dict[str, _Links]] = {}
        past: dict[tuple[str, str, int], dict[str, Dependency]] = {}
        self._count = self.changed_at = 0
        for edge in edges:
            self._count += 1
            self.changed_at = max(self.changed_at, edge.since, edge.until or 0)
            if edge.until is None:
                links = uses.setdefault(edge.from_id, {}).setdefault(edge.to_id, {})
                users.setdefault(edge.to_id, {})[edge.from_id] = links
            else:
                links = past.setdefault((edge.from_id, edge.to_id, edge.until), {})
            links[edge.type] = edge
        ended: dict[str, list[_Links]] = {}
        for links in sorted(past.values(), key=_end_of):
            ended.setdefault(_first(links).to_id, []).append(links)
        self._nodes = SharedMap(
            {
                each: _Node(uses.get(each, {}), users.get(each, {}), tuple(ended.get(each, ())))
                for each in (uses.keys() | users.keys() | ended.keys())
            }
        )

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Dependency]:
        return iter(self._all())

    @overload
    def __getitem__(self, index: int) -> Dependency: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Dependency]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._all()[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return self is other or (len(self) == len(other) and self._all() == list(other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Dependencies({self._all()})"

    def _all(self) -> list[Dependency]:
        edges = [
            edge
            for node in self._nodes.values()
            for links in (*node.uses.values(), *node.past)
            for edge in links.values()
        ]
        return sorted(edges, key=attrgetter("since", "from_id", "to_id", "type"))

    def _node(self, variable_id: str) -> _Node:
        return self._nodes.get(variable_id) or _NOTHING

    def has(self, edge: Dependency) -> bool:
        """Whether there is a live dependency between these variables of this type."""
        return edge.type in self._node(edge.from_id).uses.get(edge.to_id, {})

    def used_by(self, variable_id: str) -> Iterable[str]:
        """Return the variables on which one currently depends."""
        return self._node(variable_id).uses

    def users_now(self, variable_id: str) -> Iterable[str]:
        """Return the variables that currently depend on one."""
        return self._node(variable_id).users

    def users_of(self, variable_id: str, sequence: int) -> Iterator[str]:
        """Iterate over the variables that depend on one at commit `sequence`, also if that commit ended it."""
        node = self._node(variable_id)
        for user, links in node.users.items():
            if _first(links).since < sequence:
                yield user
        for links in reversed(node.past):
            if _end_of(links) < sequence:
                return
            if _first(links).since < sequence:
                yield _first(links).from_id

    def added(self, edge: Dependency) -> "Dependencies":
        """Return the dependencies with a new one, which the last commit added."""
        user = self._node(edge.from_id)
        links = {**user.uses.get(edge.to_id, {}), edge.type: edge}
        changed = {edge.from_id: user._replace(uses={**user.uses, edge.to_id: links})}
        used = changed.get(edge.to_id) or self._node(edge.to_id)
        changed[edge.to_id] = used._replace(users={**used.users, edge.from_id: links})
        return self._with(changed, self._count + 1, edge.since)

    def removed(self, edge: Dependency) -> "Dependencies":
        """Return the dependencies with one of them ended by commit `edge.since`; a younger one never was."""
        user, used = self._node(edge.from_id), self._node(edge.to_id)
        known = user.uses.get(edge.to_id, {})
        ending = known.get(edge.type)
        if ending is None:
            return self
        left = {name: each for name, each in known.items() if name != edge.type}
        uses, users, past = _left(user.uses, edge.to_id), _left(used.users, edge.from_id), used.past
        if left:
            uses, users = {**uses, edge.to_id: left}, {**users, edge.from_id: left}
        lasted = ending.since < edge.since
        if lasted:
            past = (*past, _ended({edge.type: ending}, edge.since))
        changed = {edge.from_id: user._replace(uses=uses), edge.to_id: used._replace(users=users, past=past)}
        return self._with(changed, self._count if lasted else self._count - 1, edge.since)

    def without(self, variable_id: str, sequence: int) -> "Dependencies":
        """Return the dependencies with those of a variable ended, which commit `sequence` deleted."""
        gone = self._node(variable_id)
        if not gone.uses and not gone.users:
            return self
        changed: dict[str, _Node] = {}
        for used_id, links in gone.uses.items():
            used = self._node(used_id)
            changed[used_id] = used._replace(
                users=_left(used.users, variable_id), past=(*used.past, _ended(links, sequence))
            )
        for user_id in gone.users:
            user = self._node(user_id)
            changed[user_id] = user._replace(uses=_left(user.uses, variable_id))
        past = (*gone.past, *(_ended(links, sequence) for links in gone.users.values()))
        changed[variable_id] = _Node(past=past)
        return self._with(changed, self._count, sequence)

    def _with(self, nodes: Mapping[str, _Node], count: int, sequence: int) -> "Dependencies":
        made = Dependencies()
        made._nodes, made._count, made.changed_at = self._nodes.updated(nodes), count, sequence
        return made


def _first(links: _Links) -> Dependency:
    return next(iter(links.values()))


def _end_of(links: _Links) -> int:
    return _first(links).until or 0


def _ended(links: _Links, sequence: int) -> _Links:
    return {name: replace(edge, until=sequence) for name, edge in links.items()}


def _left(links: Mapping[str, _Links], variable_id: str) -> Mapping[str, _Links]:
    return {other: kept for other, kept in links.items() if other != variable_id}


def dependants(edges: Dependencies, changed: Iterable[str], sequence: int) -> list[str]:
    """Return the ids of the variables that depend on any of `changed` at commit `sequence`, directly or indirectly.

    A variable comes after those that it depends on. Dependencies that this commit ended still count, so that the
    dependants of a deleted variable are notified.
    """
    users: dict[str, list[str]] = {}
    frontier = list(changed)
    reached: set[str] = set()
    while frontier:
        used = frontier.pop()
        if used in users:
            continue
        users[used] = list(edges.users_of(used, sequence))
        new = [user for user in users[used] if user not in reached]
        reached.update(new)
        frontier += new
    in_order = sorted(reached)
    sorter: TopologicalSorter[str] = TopologicalSorter(dict.fromkeys(in_order, ()))
    for used in in_order:
        for user in sorted(users[used]):
            sorter.add(user, used)
    try:
        return list(sorter.static_order())
    except CycleError:
        # No command can add a cycle, so the file was edited. Watchers are notified anyway.
        return in_order


def related(edges: Dependencies, variable_id: str, *, users: bool, transitive: bool) -> list[str]:
    """Return the ids of the variables on which one depends, or of those that depend on it.

    A variable comes after those that it depends on.

    Args:
        edges: The session's dependencies.
        variable_id: The variable.
        users: Return those that depend on it.
        transitive: Include indirect dependencies.
    """
    neighbours = edges.users_now if users else edges.used_by
    reached = sorted(neighbours(variable_id))
    if transitive:
        seen, frontier = set(reached), list(reached)
        while frontier:
            new = [each for each in neighbours(frontier.pop()) if each not in seen]
            seen.update(new)
            frontier += new
        reached = sorted(seen)
    among = set(reached)
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for each in reached:
        sorter.add(each, *sorted(used for used in edges.used_by(each) if used in among))
    try:
        return list(sorter.static_order())
    except CycleError:
        # As in `dependants`.
        return reached


def find_cycle(edges: Dependencies, added: Dependency) -> list[str] | None:
    """Return the cycle that `added` would close, as ids in the direction of dependence, first = last; or None."""
    # There is no cycle yet, so a new one contains `added`.
    came_from = {added.to_id: added.from_id}
    frontier = [added.to_id]
    while frontier and added.from_id not in came_from:
        user = frontier.pop()
        for used in edges.used_by(user):
            if used not in came_from:
                came_from[used] = user
                frontier.append(used)
    if added.from_id not in came_from:
        return None
    cycle = [added.from_id, came_from[added.from_id]]
    while cycle[-1] != added.from_id:
        cycle.append(came_from[cycle[-1]])
    return cycle[::-1]
