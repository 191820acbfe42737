"""Recordings of sessions, live or ended, read page by page."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import Any, Final

from dspex_persist.state.errors import InvalidArgumentError, NotInHistoryError, quote
from dspex_persist.state.events import (
    Event,
    ExecutionBegan,
    SessionRestored,
    VariableRegistered,
    portable,
    without_secrets,
)
from dspex_persist.state.masking import Secrets
from dspex_persist.state.model import SENSITIVE
from dspex_persist.state.recording import (
    Header,
    RecordedAnswer,
    RecordedCommit,
    RecordedEvent,
    RecordedVersion,
    renumbered,
)
from dspex_persist.state.valkey import codec
from dspex_persist.state.valkey.connection import converted
from dspex_persist.state.valkey.keys import Keys
from dspex_persist.state.valkey.reads import Reads, reading
from dspex_persist.state.values.json_text import storable, stored

_PAGE_COMMITS: Final = 200


class Recordings:
    """Reads whole sessions.

    Args:
        reads: Reads the store.
        keys: The names of the keys.
    """

    def __init__(self, reads: Reads, keys: Keys) -> None:
        self._reads, self._keys, self._client = reads, keys, reads.client

    def record(
        self, session_id: str, *, started: int | None, reveal: bool, after: int
    ) -> tuple[Header, Iterator[RecordedCommit]]:
        """Return a session up to now; see `Recordable.record`."""
        with converted():
            first = self._find(session_id, started)
            facts = self._client.xinfo_stream(self._keys.commits(first))
            count, last = int(facts["length"]), int(facts["last-generated-id"].split(b"-")[0])
            hidden = frozenset() if reveal else self._sensitive(first, last)
            secrets = Secrets(self._values_of(first, hidden))
            # An answer may quote a value that has to be left out.
            answers = {} if hidden else self._answers(session_id, first, last)
        header = Header(session_id, count, masked=bool(hidden))
        return header, _Recording(self, session_id, first, last, hidden, secrets, answers).commits(after)

    def _find(self, session_id: str, started: int | None) -> int:
        firsts = [int(each) for each in self._client.lrange(self._keys.lives(session_id), 0, -1)]
        if not firsts:
            raise NotInHistoryError("session", session_id, "")
        if started is not None and started not in firsts:
            commits = " and ".join(map(str, firsts))
            raise InvalidArgumentError(
                "started", f"session {quote(session_id)} began with commit {commits}, not {started}"
            )
        return firsts[-1] if started is None else started

    def page(self, first: int, after: int, last: int) -> list[codec.StoredCommit]:
        """Return the next commits of a session after one, up to another."""
        name = self._keys.commits(first)
        rows = self._client.xrange(name, f"({after}-0" if after else "-", f"{last}-0", count=_PAGE_COMMITS)
        return [codec.commit_in(row) for _, row in rows]

    def versions(self, commit: codec.StoredCommit) -> Iterator[codec.StoredVersion]:
        """Yield the versions of a commit."""
        for version in self._reads.versions(commit.first, commit.versions):
            if version is None:
                raise LookupError("a version is not in the history of its variable")
            yield version

    def _sensitive(self, first: int, last: int) -> frozenset[str]:
        """Return the variables that are sensitive according to their newest metadata."""
        ids: dict[str, None] = {}
        after = 0
        while commits := self.page(first, after, last):
            ids |= {variable_id: None for commit in commits for variable_id, version in commit.versions if not version}
            after = commits[-1].sequence
        newest = self._reads.pipelined(("xrevrange", self._keys.versions(first, each), "+", "-", 1) for each in ids)
        metadata = (codec.version_in(rows[0][1]).metadata for rows in newest)
        return frozenset(
            each for each, facts in zip(ids, metadata, strict=True) if facts.get(SENSITIVE, "").lower() == "true"
        )

    def _values_of(self, first: int, ids: frozenset[str]) -> Iterator[Any]:
        for each in ids:
            for _, row in self._client.xrange(self._keys.versions(first, each)):
                value = codec.version_in(row).version.value
                if value is not None:
                    yield value

    def _answers(self, session_id: str, first: int, last: int) -> dict[int, RecordedAnswer]:
        found: dict[int, RecordedAnswer] = {}
        for key, content in self._client.hgetall(self._keys.outcomes(session_id)).items():
            outcome, sequence = codec.outcome_in(session_id, codec.text_in(key), content)
            if first <= sequence <= last:
                found[sequence] = RecordedAnswer(outcome.key, outcome.cause, outcome.fingerprint, outcome.result)
        return found


class _Recording:
    """A recording being read, and what its later commits need to know of the earlier ones."""

    def __init__(
        self,
        recordings: Recordings,
        session_id: str,
        first: int,
        last: int,
        hidden: frozenset[str],
        secrets: Secrets,
        answers: Mapping[int, RecordedAnswer],
    ) -> None:
        self._recordings, self._session_id = recordings, session_id
        self._first, self._last = first, last
        self._hidden, self._secrets, self._answers = hidden, secrets, answers
        self._sequences: list[int] = []
        self._began: dict[int, int] = {}

    def commits(self, after: int) -> Iterator[RecordedCommit]:
        """Yield the commits after the first `after` ones."""
        known = 0
        while True:
            with converted(), reading(self._session_id):
                page = self._recordings.page(self._first, known, self._last)
                recorded = [each for commit in page if (each := self._recorded(commit, after)) is not None]
            yield from recorded
            if not page:
                return
            known = page[-1].sequence

    def _recorded(self, commit: codec.StoredCommit, after: int) -> RecordedCommit | None:
        self._sequences.append(commit.sequence)
        number = len(self._sequences)
        if any(isinstance(event, ExecutionBegan) for event in commit.events):
            self._began[commit.sequence] = number
        if number <= after:
            return None
        versions = tuple(map(self._version, self._recordings.versions(commit)))
        events = tuple(map(self._event, commit.events))
        facts = (number, commit.at, commit.actor, commit.cause, versions, events, commit.sequence)
        return renumbered(RecordedCommit(*facts, self._answers.get(commit.sequence)), self._began.get)

    def _event(self, event: Event) -> RecordedEvent:
        if type(event) is VariableRegistered:
            return RecordedEvent.of(event)
        if isinstance(event, SessionRestored):
            event = SessionRestored(bisect_right(self._sequences, event.sequence))
        # Encoded as in a file, so that all backends produce the same recording.
        body = portable(stored(storable(event.to_body())))
        return RecordedEvent(event.kind, without_secrets(event.kind, body, self._secrets))

    def _version(self, stored_version: codec.StoredVersion) -> RecordedVersion:
        version = stored_version.version
        masked = version.value is not None and version.variable_id in self._hidden
        value = None if masked else version.value
        facts = (version.variable_id, stored_version.name, version.version, version.kind, version.source, value)
        return RecordedVersion(*facts, dict(version.metadata), masked)
