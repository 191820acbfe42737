"""Recordings of sessions in memory."""

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence

from dspex_persist.state.errors import InvalidArgumentError, quote
from dspex_persist.state.events import (
    Event,
    ExecutionBegan,
    SessionRestored,
    VariableRegistered,
    portable,
    without_secrets,
)
from dspex_persist.state.masking import Secrets
from dspex_persist.state.model import Change
from dspex_persist.state.past.sessions import PastCommit, PastSession
from dspex_persist.state.recording import (
    Header,
    RecordedAnswer,
    RecordedCommit,
    RecordedEvent,
    RecordedVersion,
    renumbered,
)
from dspex_persist.state.values.json_text import storable, stored


def record(
    past: PastSession,
    commits: Sequence[PastCommit],
    answers: Mapping[int, RecordedAnswer],
    *,
    started: int | None,
    reveal: bool,
    after: int,
) -> tuple[Header, Iterator[RecordedCommit]]:
    """Return the first commits of a session as a recording; see `Recordable.record`.

    `answers` are those under idempotency keys, by the numbers of their commits.
    """
    session_id, began = past.session.id, commits[0].sequence
    if started is not None and started != began:
        raise InvalidArgumentError("started", f"session {quote(session_id)} began with commit {began}, not {started}")
    ids = {change.variable.id for commit in commits for change in commit.changes}
    hidden = frozenset() if reveal else frozenset(filter(past.is_sensitive, ids))
    # An answer may quote a value that has to be left out.
    answers = {} if hidden else answers
    secrets = Secrets(()) if reveal else past.secrets()
    return Header(session_id, len(commits), masked=bool(hidden)), _recorded(
        past, commits, answers, hidden, secrets, after
    )


def _recorded(
    past: PastSession,
    commits: Sequence[PastCommit],
    answers: Mapping[int, RecordedAnswer],
    hidden: Collection[str],
    secrets: Secrets,
    after: int,
) -> Iterator[RecordedCommit]:
    began: dict[int, int] = {}
    for number, commit in enumerate(commits, 1):
        if any(isinstance(event, ExecutionBegan) for event in commit.events):
            began[commit.sequence] = number
        if number <= after:
            continue
        changes = sorted(commit.changes, key=lambda change: (past.place_of(change.variable.id), change.version.version))
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
