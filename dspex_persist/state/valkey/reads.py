"""Reading sessions, their histories and their outcomes."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

import redis

from dspex_persist.clock import from_micros, to_micros
from dspex_persist.state.budgets import NOTHING, Spent
from dspex_persist.state.decoding import decoding, in_database
from dspex_persist.state.errors import DamagedSessionError
from dspex_persist.state.events import ExecutionEnded
from dspex_persist.state.fold import LaterCommit, after_commits
from dspex_persist.state.graph import Dependencies
from dspex_persist.state.log_store import affected
from dspex_persist.state.model import (
    Change,
    CommitChanges,
    ExecutionStatus,
    Failure,
    JournalEntry,
    Session,
    Value,
    VariableVersion,
)
from dspex_persist.state.rules import Rules
from dspex_persist.state.session_state import Lease, SessionState, size_of_tool
from dspex_persist.state.unit_of_work import RecordedOutcome, VersionQuery, up_to
from dspex_persist.state.valkey import codec
from dspex_persist.state.valkey.connection import Connection, reported
from dspex_persist.state.valkey.keys import Keys

_AT_ONCE: Final = 500
"""So many commands are sent at once at most."""
_PAGE_BYTES: Final = 4 * 1024 * 1024
_MOST_ADVANCED: Final = 50
"""After more commits of others, a session is loaded anew."""


class Reads:
    """Reads the store, from any thread. It knows no commit but what is stored when it asks.

    Its methods raise the errors of the driver unless they say otherwise.

    Args:
        connection: The connection.
        keys: The names of the keys.
    """

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self.client = connection.client
        self._keys = keys

    def pipelined(self, commands: Iterable[Sequence[Any]]) -> Iterator[Any]:
        """Yield the answers to these commands, many of which are sent at once."""
        left = list(commands)
        for place in range(0, len(left), _AT_ONCE):
            pipeline = self.client.pipeline(transaction=False)
            for name, *words in left[place : place + _AT_ONCE]:
                getattr(pipeline, name)(*words)
            yield from pipeline.execute()

    # Sessions

    def load(self, session_id: str) -> SessionState | None:
        """Return the live session's state, or None. Takes time in proportion to the session, not to its history."""
        keys = (self._keys.live, self._keys.expiry)
        with reading(session_id):
            found = self._connection.read("load", keys, self._keys.root, codec.utf8(session_id))
            return None if found is None else self._state_in(*found)

    def _state_in(self, first: bytes, fields: Any, edges: Any, expiry: bytes | None, registered: int) -> SessionState:
        kept = dict(zip(fields[::2], fields[1::2], strict=True))
        session = codec.session_in(kept.pop(b"session")).session
        lease = None
        if session.ttl_s is not None:
            lease = Lease(session.ttl_s, from_micros(int(float(expiry or 0))))
            # Renewals are saved only now and then, so the last one may be missing.
            lease.expires_at += lease.slack
        sequence = int(kept.pop(b"at"))
        by_kind: dict[bytes, list[bytes]] = {b"v": [], b"t": [], b"r": [], b"x": []}
        for name, content in kept.items():
            by_kind[name[:1]].append(content)
        tools = sorted(map(codec.tool_in, by_kind[b"t"]), key=lambda tool: tool.spec.name)
        running = sorted(map(codec.began_in, by_kind[b"x"]), key=lambda began: began.sequence)
        state = SessionState(
            session,
            dependencies=Dependencies(
                sorted(map(codec.dependency_in, edges[::2], edges[1::2]), key=lambda edge: edge.since)
            ),
            lease=lease,
            sequence=sequence,
            key=registered,
            tools={tool.spec.name: tool for tool in tools},
            executions={began.id: began.running() for began in running},
            rules=Rules(map(codec.rule_in, by_kind[b"r"])) if by_kind[b"r"] else None,
        )
        if state.rules is not None:
            state.weight_bytes += state.rules.weight_bytes
        state.weight_bytes += sum(map(size_of_tool, tools))
        for live in self._complete(int(first), map(codec.live_variable_in, by_kind[b"v"])):
            state.put(live.variable)
            state.names[live.variable.id] = live.variable.name
            state.keys[live.variable.id] = live.key
        return state

    def _complete(self, first: int, stored: Iterable[codec.LiveVariable]) -> list[codec.LiveVariable]:
        """Return the variables in their order, with the large values from their histories."""
        variables = sorted(stored, key=lambda live: live.key)
        missing = [(place, live.variable) for place, live in enumerate(variables) if not live.is_complete]
        wanted = ((variable.id, variable.version) for _, variable in missing)
        for (place, variable), version in zip(missing, self.versions(first, wanted), strict=True):
            if version is None or version.version.value is None:
                raise LookupError("the value of a variable is not in its history")
            complete = variable._replace(value=version.version.value)
            variables[place] = variables[place]._replace(variable=complete, is_complete=True)
        return variables

    def owner_of(self, first: int) -> str:
        """Return whom a live session counts for; "" if it has ended."""
        content = self.client.hget(self._keys.session(first), "session")
        return "" if content is None else codec.session_in(content).owner

    # Versions

    def versions(self, first: int, wanted: Iterable[tuple[str, int]]) -> Iterator[codec.StoredVersion | None]:
        """Yield these versions of variables, given by their ids; None for one that is not there."""
        ids = ((self._keys.versions(first, each), codec.version_id(number)) for each, number in wanted)
        for rows in self.pipelined(("xrange", name, id_, id_) for name, id_ in ids):
            yield codec.version_in(rows[0][1]) if rows else None

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        """Return one version of a variable."""
        if version < 0:
            return None
        with reading(state.session.id):
            (found,) = self.versions(state.session.sequence, [(variable_id, version)])
        return None if found is None else found.version

    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        """Return the versions that the query selects, newest first; None if the session never had the variable."""
        with reading(state.session.id):
            live = state.find(query.identifier) if query.as_of is None else None
            variable_id = live.id if live is not None else self._find_id(state, query)
            if variable_id is None:
                return None
            if query.limit <= 0 or (query.before is not None and query.before <= 0):
                return []
            return self._history(self._keys.versions(state.session.sequence, variable_id), query)

    def _history(self, name: str, query: VersionQuery) -> list[VariableVersion]:
        # In pages, because a large version may be enough.
        found: list[VariableVersion] = []
        highest, size_bytes = "+" if query.before is None else f"({codec.version_id(query.before)}", 0
        page = 8 if query.most_bytes is not None else _AT_ONCE
        while len(found) < query.limit:
            count = min(page, query.limit - len(found))
            rows = self.client.xrevrange(name, highest, "-", count=count)
            found += (codec.version_in(row).version for _, row in rows)
            size_bytes = sum(version.size_bytes for version in found)
            if len(rows) < count or (query.most_bytes is not None and size_bytes >= query.most_bytes):
                break
            highest, page = f"({rows[-1][0].decode()}", min(2 * page, _AT_ONCE)
        return up_to(found, query.most_bytes)

    def _find_id(self, state: SessionState, query: VersionQuery) -> str | None:
        """Return the id of the newest variable with this name, or with this id: names come first."""
        wanted, named = query.identifier, []
        for variable_id, content in self.client.hgetall(self._keys.names(state.session.sequence)).items():
            key, name, since = json.loads(content)
            id_ = codec.text_in(variable_id)
            if wanted in (name, id_) and (query.as_of is None or since <= query.as_of):
                named.append((name == wanted, since, key, id_))
        return max(named)[-1] if named else None

    @reported
    def changes_after(self, state: SessionState, after: int, most_commits: int = 64) -> list[CommitChanges]:
        """Return the session's next commits, oldest first, or raise `UnavailableError`; see `LogStore`."""
        first = state.session.sequence
        with reading(state.session.id):
            rows = self.client.xrange(self._keys.commits(first), f"({after}-0" if after else "-", "+", most_commits)
            commits = [codec.commit_in(row) for _, row in rows]
            pages, size_bytes = [], 0
            for commit in commits:
                if size_bytes > _PAGE_BYTES:
                    break
                changes = tuple(self._changes_in(commit))
                size_bytes += sum(change.variable.value.size_bytes for change in changes)
                pages.append(CommitChanges(commit.sequence, changes, affected(state, commit.sequence, changes)))
        return pages

    @reported
    def advance(self, states: Sequence[SessionState], until: int) -> list[SessionState | None]:
        """Return sessions as of a later commit; None for those that have to be loaded, as for new variables."""
        keys, most = self._keys, _MOST_ADVANCED + 1
        names = ((keys.commits(state.session.sequence), state.sequence) for state in states)
        wanted = (("xrange", name, f"({after}-0", f"{until}-0", most) for name, after in names)
        later = [[row for _, row in rows] for rows in self.pipelined(wanted)]
        commits = [_few(state.session.id, rows) for state, rows in zip(states, later, strict=True)]
        pairs = (
            (keys.versions(state.session.sequence, variable_id), codec.version_id(number))
            for state, few in zip(states, commits, strict=True)
            for commit in few
            for variable_id, number in commit.versions
        )
        versions = self.pipelined(("xrange", name, id_, id_) for name, id_ in pairs)
        return [_advanced(state, few, versions) for state, few in zip(states, commits, strict=True)]

    def _changes_in(self, commit: codec.StoredCommit) -> Iterator[Change]:
        keys = self._keys
        commands = (
            (
                "xrange",
                keys.versions(commit.first, each),
                codec.version_id(max(number - 1, 0)),
                codec.version_id(number),
            )
            for each, number in commit.versions
        )
        for rows in self.pipelined(commands):
            *before, stored = (codec.version_in(row) for _, row in rows)
            previous: Value | None = before[0].version.value if before else None
            yield Change(stored.version, stored.variable(previous), previous=previous)

    # Outcomes and executions

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        """Return the outcome recorded under an idempotency key."""
        with reading(session_id):
            content = self.client.hget(self._keys.outcomes(session_id), codec.utf8(key))
            return None if content is None else codec.outcome_in(session_id, key, content)[0]

    def find_execution(self, state: SessionState, key: str) -> JournalEntry | None:
        """Return the last execution with an idempotency key, if it has ended."""
        if any(each.idempotency_key == key for each in state.executions.values()):
            return None
        with reading(state.session.id):
            content = self.client.hget(self._keys.keyed(state.session.sequence), codec.utf8(key))
            entry = None if content is None else codec.ended_in(content)
            if entry is None or entry.status is ExecutionStatus.COMMITTED:
                return entry
            return replace(entry, failure=self._failure_of(state.session.sequence, entry))

    def _failure_of(self, first: int, entry: JournalEntry) -> Failure | None:
        commit = None if entry.sequence is None else self.commit(first, entry.sequence)
        events = () if commit is None else commit.events
        ends = (each for each in events if isinstance(each, ExecutionEnded) and each.execution_id == entry.id)
        return next((end.failure for end in ends), None)

    def began(self, first: int, execution_id: str) -> codec.Began | None:
        """Return how a running execution began."""
        content = self.client.hget(self._keys.session(first), f"x:{execution_id}")
        return None if content is None else codec.began_in(content)

    def spent_by(self, first: int, tool: str) -> Spent:
        """Return what the LM calls of a tool have used in a session."""
        content = self.client.hget(self._keys.spent(first), tool)
        return NOTHING if content is None else codec.spent_in(content)

    def spent(self, state: SessionState) -> tuple[int, Mapping[str, Spent]]:
        """See `Backing`."""
        # In this order, so that nothing that is counted is of a later commit.
        sequence = int(self.client.hget(self._keys.head, "sequence") or 0)
        return sequence, self.all_spent(state.session.sequence)

    def all_spent(self, first: int) -> Mapping[str, Spent]:
        """Return what the LM calls in a session have used, by tool."""
        found = self.client.hgetall(self._keys.spent(first))
        return {codec.text_in(tool): codec.spent_in(content) for tool, content in found.items()}

    # All sessions

    def commit(self, first: int, sequence: int) -> codec.StoredCommit | None:
        """Return one commit of a session, or None."""
        rows = self.client.xrange(self._keys.commits(first), f"{sequence}-0", f"{sequence}-0")
        return codec.commit_in(rows[0][1]) if rows else None

    def live_sessions(self) -> Iterator[Session]:
        """Yield the live sessions, without what is in them."""
        firsts = self.client.hvals(self._keys.live)
        for content in self.pipelined(("hget", self._keys.session(int(first)), "session") for first in firsts):
            if content is not None:
                yield codec.session_in(content).session

    def stored_by(self, identity: str) -> Mapping[int, int]:
        """Return the live sessions that an identity began, by their first commits, with their stored bytes."""
        found = self.client.hgetall(self._keys.owned(identity))
        return {int(first): int(size_bytes) for first, size_bytes in found.items()}

    def expired(self, now: datetime, limit: int) -> list[str]:
        """Return the ids of at most `limit` live sessions whose saved expiry is past and in which no tool runs."""
        running = {json.loads(content)[0] for content in self.client.hvals(self._keys.running)}
        found: list[str] = []
        skipped = 0
        while len(found) < limit:
            firsts = self.client.zrangebyscore(self._keys.expiry, "-inf", to_micros(now), start=skipped, num=limit)
            contents = self.pipelined(("hget", self._keys.session(int(first)), "session") for first in firsts)
            ids = (codec.session_in(content).session.id for content in contents if content is not None)
            found += (each for each in ids if each not in running)
            skipped += len(firsts)
            if len(firsts) < limit:
                break
        return found[:limit]

    def old_outcomes(self, before: datetime, most: int) -> list[bytes]:
        """Return the members of `ages` for at most so many outcomes recorded before a time."""
        until = f"({to_micros(before)}"
        return list(self.client.zrangebyscore(self._keys.ages, "-inf", until, start=0, num=most))


def _few(session_id: str, rows: Sequence[Mapping[bytes, bytes]]) -> list[codec.StoredCommit]:
    """Return the commits in these entries; nothing if there are too many, or they cannot be read."""
    if len(rows) > _MOST_ADVANCED:
        return []
    try:
        with reading(session_id):
            return list(map(codec.commit_in, rows))
    except DamagedSessionError:
        return []


def _advanced(
    state: SessionState, commits: Sequence[codec.StoredCommit], versions: Iterator[Any]
) -> SessionState | None:
    """Return a session after its next commits. Takes the entries of all their versions from `versions`."""
    rows = [[next(versions) for _ in commit.versions] for commit in commits]
    if not commits or not all(map(all, rows)):
        return None
    try:
        with reading(state.session.id):
            return after_commits(state, map(_later, commits, rows))
    except DamagedSessionError:
        # Whoever loads the session says so.
        return None


def _later(commit: codec.StoredCommit, rows: Sequence[Any]) -> LaterCommit:
    versions = [codec.version_in(found[0][1]).version for found in rows]
    return LaterCommit(commit.sequence, commit.at, commit.events, versions)


@contextlib.contextmanager
def reading(session_id: str) -> Iterator[None]:
    """Convert exceptions while decoding what is stored of this session to `DamagedSessionError`."""
    with in_database(), decoding(session_id, _is_clear):
        yield


def _is_clear(error: Exception) -> bool:
    return isinstance(error, redis.RedisError) and not str(error).startswith("WRONGTYPE")
