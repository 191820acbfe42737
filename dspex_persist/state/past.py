"""Recordings and forks of a session whose commits are in memory."""

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from dspex_persist import clock
from dspex_persist.state.audit import SENSITIVE, parse_point
from dspex_persist.state.commands import ForkSession, RestoreSession
from dspex_persist.state.errors import InvalidArgumentError, NotInHistoryError, quote
from dspex_persist.state.events import (
    DependencyAdded,
    DependencyRemoved,
    Event,
    ExecutionBegan,
    ExecutionEnded,
    RuleAdded,
    RuleRemoved,
    SessionRestored,
    VariableRegistered,
    portable,
    without_secrets,
)
from dspex_persist.state.graph import Dependencies
from dspex_persist.state.masking import Secrets
from dspex_persist.state.model import Change, ChangeKind, Dependency, Rule, Variable
from dspex_persist.state.recording import (
    Header,
    RecordedAnswer,
    RecordedCommit,
    RecordedEvent,
    RecordedVersion,
    renumbered,
)
from dspex_persist.state.rules import Rules
from dspex_persist.state.values.json_text import storable, stored


class PastCommit(NamedTuple):
    """A commit of a session in memory."""

    sequence: int
    at: datetime
    actor: str
    cause: str
    changes: tuple[Change, ...]
    events: tuple[Event, ...]


def record(
    session_id: str,
    commits: Sequence[PastCommit],
    answers: Mapping[int, RecordedAnswer],
    *,
    started: int | None,
    reveal: bool,
) -> tuple[Header, Iterator[RecordedCommit]]:
    """Return the commits of a session as a recording; see `Recordable.record`.

    `answers` are those under idempotency keys, by the numbers of their commits.
    """
    began = commits[0].sequence
    if started is not None and started != began:
        raise InvalidArgumentError("started", f"session {quote(session_id)} began with commit {began}, not {started}")
    newest = {change.variable.id: change.variable for commit in commits for change in commit.changes}
    hidden = frozenset() if reveal else frozenset(each.id for each in newest.values() if _is_sensitive(each))
    ages = {variable_id: age for age, variable_id in enumerate(newest)}
    # An answer may quote a value that has to be left out.
    answers = {} if hidden else answers
    secrets = Secrets(
        change.version.value
        for commit in commits
        for change in commit.changes
        if change.variable.id in hidden and change.version.value is not None
    )
    return Header(session_id, len(commits), masked=bool(hidden)), _recorded(commits, answers, hidden, ages, secrets)


def _is_sensitive(variable: Variable) -> bool:
    return variable.metadata.get(SENSITIVE, "").lower() == "true"


def _recorded(
    commits: Sequence[PastCommit],
    answers: Mapping[int, RecordedAnswer],
    hidden: Collection[str],
    ages: Mapping[str, int],
    secrets: Secrets,
) -> Iterator[RecordedCommit]:
    began: dict[int, int] = {}
    for number, commit in enumerate(commits, 1):
        if any(isinstance(event, ExecutionBegan) for event in commit.events):
            began[commit.sequence] = number
        changes = sorted(commit.changes, key=lambda change: (ages[change.variable.id], change.version.version))
        versions = tuple(_version(change, hidden) for change in changes)
        events = tuple(_event(event, commits, secrets) for event in commit.events)
        facts = (number, commit.at, commit.actor, commit.cause, versions, events, commit.sequence)
        yield renumbered(RecordedCommit(*facts, answers.get(commit.sequence)), began.get)


def _event(event: Event, commits: Sequence[PastCommit], secrets: Secrets) -> RecordedEvent:
    if type(event) is VariableRegistered:
        return RecordedEvent.of(event)
    if isinstance(event, SessionRestored):
        event = SessionRestored(bisect_right(commits, event.sequence, key=lambda commit: commit.sequence))
    # Encoded as in a file, so that both backends produce the same recording.
    body = portable(stored(storable(event.to_body())))
    return RecordedEvent(event.kind, without_secrets(event.kind, body, secrets))


def _version(change: Change, hidden: Collection[str]) -> RecordedVersion:
    version, variable = change.version, change.variable
    masked = version.value is not None and variable.id in hidden
    value = None if masked else version.value
    facts = (variable.id, variable.name, version.version, version.kind, version.source, value, dict(version.metadata))
    return RecordedVersion(*facts, masked)


def fork(session_id: str, commits: Sequence[PastCommit], new_session_id: str, at: str, head: int) -> ForkSession:
    """Return the command that begins a session with the state of `session_id` at a point.

    `head` is the number of the last commit of any session.
    """
    sequence, began = _resolve(at, commits, head), commits[0]
    if sequence < began.sequence:
        when = f"{began.at:%Y-%m-%d %H:%M:%S} UTC"
        reason = f"session {quote(session_id)} had not begun by then; it began at commit {began.sequence}, {when}"
        raise InvalidArgumentError("at", reason)
    variables: dict[str, Variable] = {}
    edges = Dependencies()
    rules = Rules()
    for commit in commits:
        if commit.sequence > sequence:
            break
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
    return ForkSession(new_session_id, session_id, sequence, tuple(variables.values()), lasting, tuple(rules.values()))


def restore(session_id: str, commits: Sequence[PastCommit], at: str, head: int) -> RestoreSession:
    """Return the command that brings a session back to what it was at a point; see `fork`."""
    past = fork(session_id, commits, session_id, at, head)
    last = commits[bisect_right(commits, past.forked_at, key=lambda commit: commit.sequence) - 1]
    return RestoreSession.of(past, last.sequence, at)


def _edges_after(edges: Dependencies, event: Event, sequence: int) -> Dependencies:
    if not isinstance(event, DependencyAdded | DependencyRemoved):
        return edges
    edge = Dependency(event.from_id, event.to_id, event.type, sequence)
    return edges.added(edge) if isinstance(event, DependencyAdded) else edges.removed(edge)


def _resolve(at: str, commits: Sequence[PastCommit], head: int) -> int:
    """Return the number of the last commit up to a point."""
    point, sequence = parse_point(at, clock.now()), head
    if point.execution_id:
        sequence = _end_of(point.execution_id, commits)
    elif point.at is not None:
        sequence = max((commit.sequence for commit in commits if commit.at <= point.at), default=0)
    elif point.sequence is not None:
        sequence = point.sequence
        if sequence > head:
            raise InvalidArgumentError("at", f"there is no commit {sequence} yet; the newest is {head}")
    return max(sequence - 1, 0) if point.before else sequence


def _end_of(execution_id: str, commits: Sequence[PastCommit]) -> int:
    """Return the commit that ended an execution, or that began it while it runs."""
    for commit in reversed(commits):
        for event in commit.events:
            if isinstance(event, ExecutionBegan | ExecutionEnded) and event.execution_id == execution_id:
                return commit.sequence
    raise NotInHistoryError("execution", execution_id, "")
