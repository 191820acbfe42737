"""The graph of a session's dependencies: who is affected by a change, and which dependency would close a circle."""

from collections.abc import Iterable
from graphlib import TopologicalSorter

from dspex_persist.state.model import Dependency


def dependants(edges: Iterable[Dependency], changed: Iterable[str], sequence: int) -> list[str]:
    """The ids of the variables that depend on any of `changed`, directly or not, at commit `sequence`, used ones first.

    An edge that this very commit took away still counts: the deletion is told to those who depended on it.
    """
    uses: dict[str, set[str]] = {}
    for edge in edges:
        if edge.since < sequence and (edge.until is None or edge.until >= sequence):
            uses.setdefault(edge.to_id, set()).add(edge.from_id)
    reached: set[str] = set()
    frontier = list(changed)
    while frontier:
        for user in uses.get(frontier.pop(), ()):
            if user not in reached:
                reached.add(user)
                frontier.append(user)
    sorter: TopologicalSorter[str] = TopologicalSorter(dict.fromkeys(sorted(reached), ()))
    for used, users in uses.items():
        for user in sorted(users & reached):
            if used in reached:
                sorter.add(user, used)
    return list(sorter.static_order())


def find_cycle(edges: Iterable[Dependency], added: Dependency) -> list[str] | None:
    """The ids around the circle that `added` would close, in the direction of dependence, first = last; or None."""
    uses: dict[str, list[str]] = {}
    for edge in edges:
        if edge.until is None:
            uses.setdefault(edge.from_id, []).append(edge.to_id)
    # The others close no circle among themselves: a new one leads through `added`, and back to where it begins.
    came_from = {added.to_id: added.from_id}
    frontier = [added.to_id]
    while frontier and added.from_id not in came_from:
        user = frontier.pop()
        for used in uses.get(user, ()):
            if used not in came_from:
                came_from[used] = user
                frontier.append(used)
    if added.from_id not in came_from:
        return None
    cycle = [added.from_id, came_from[added.from_id]]
    while cycle[-1] != added.from_id:
        cycle.append(came_from[cycle[-1]])
    return cycle[::-1]
