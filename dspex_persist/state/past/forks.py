"""Forks of sessions in memory, and commands that bring them back to what they were."""

from dspex_persist.state.access import part_of
from dspex_persist.state.commands import ForkSession, RestoreSession
from dspex_persist.state.events import DependencyAdded, DependencyRemoved, Event, RuleAdded, RuleRemoved
from dspex_persist.state.graph import Dependencies
from dspex_persist.state.model import ChangeKind, Dependency, Rule, Variable
from dspex_persist.state.past.sessions import PastSession
from dspex_persist.state.points import not_begun
from dspex_persist.state.rules import Rules


def fork(past: PastSession, new_session_id: str, sequence: int) -> ForkSession:
    """Return the command that begins a session with the state of a session as of a commit."""
    if sequence < past.life.began:
        raise not_begun(past.session.id, past.life)
    variables: dict[str, Variable] = {}
    edges = Dependencies()
    rules = Rules()
    for commit in past.between(0, sequence):
        for event in commit.events:
            edges = _edges_after(edges, event, commit.sequence)
            if isinstance(event, RuleAdded):
                rules = rules.added(Rule(event.name, event.expression, event.description))
            elif isinstance(event, RuleRemoved):
                rules = rules.without(event.name)
        for change in commit.changes:
            if change.version.kind is ChangeKind.DELETED:
                del variables[change.variable.id]
            else:
                variables[change.variable.id] = change.variable
    lasting = tuple(
        edge for edge in edges if edge.until is None and edge.from_id in variables and edge.to_id in variables
    )
    return ForkSession(
        new_session_id,
        past.session.id,
        sequence,
        tuple(variables.values()),
        lasting,
        tuple(rules.values()),
        part_of(past.session.metadata),
    )


def restore(past: PastSession, at: str, sequence: int) -> RestoreSession:
    """Return the command that brings a session back to what it was at a point, and as of that commit."""
    then = fork(past, past.session.id, sequence)
    last = next(past.between(0, sequence, newest_first=True))
    return RestoreSession.of(then, last.sequence, at)


def _edges_after(edges: Dependencies, event: Event, sequence: int) -> Dependencies:
    if not isinstance(event, DependencyAdded | DependencyRemoved):
        return edges
    edge = Dependency(event.from_id, event.to_id, event.type, sequence)
    return edges.added(edge) if isinstance(event, DependencyAdded) else edges.removed(edge)
