"""Sessions, versions and events as the fields of hashes and streams have them."""

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from dspex_persist.clock import from_micros, to_micros
from dspex_persist.state.budgets import Spent
from dspex_persist.state.events import Event, ExecutionBegan, ExecutionEnded, event_in, spec_body, spec_in
from dspex_persist.state.frozen import freeze
from dspex_persist.state.model import (
    Change,
    ChangeKind,
    Dependency,
    ExecutionStatus,
    JournalEntry,
    Optimization,
    RegisteredTool,
    Rule,
    Session,
    Source,
    Value,
    Variable,
    VariableVersion,
)
from dspex_persist.state.unit_of_work import RecordedOutcome, UnitOfWork

INLINE_BYTES: Final = 4096
"""Larger values are only in the history of their variable, not also in the current state of the session."""
Fields = list[Any]


def text_of(document: Any) -> str:
    """Return a document as JSON: ASCII, so that it can have any characters."""
    return json.dumps(document, separators=(",", ":"))


def utf8(text: str) -> bytes:
    """Return a text as the store has it. An import may have brought half of a surrogate pair."""
    return text.encode(errors="surrogatepass")


def text_in(content: bytes) -> str:
    """Return the text that `utf8` encoded."""
    return content.decode(errors="surrogatepass")


# Values


def _value(value: Value | None) -> Any:
    if value is None:
        return None
    return [value.json, None if value.binary is None else b64encode(value.binary).decode()]


def _value_in(document: Any) -> Value | None:
    return None if document is None else Value(document[0], None if document[1] is None else b64decode(document[1]))


def _lock(lock: Optimization | None) -> Any:
    if lock is None:
        return None
    renewed_at = None if lock.renewed_at is None else to_micros(lock.renewed_at)
    facts = [lock.id, lock.optimizer_id, to_micros(lock.started_at), lock.started_by, dict(lock.config), lock.lease_s]
    return [*facts, renewed_at]


def _lock_in(document: Any) -> Optimization | None:
    if document is None:
        return None
    id_, optimizer_id, started_at, started_by, config, lease_s, renewed_at = document
    renewed = None if renewed_at is None else from_micros(renewed_at)
    return Optimization(id_, optimizer_id, from_micros(started_at), started_by, freeze(config), lease_s, renewed)


# Variables as they are now


class LiveVariable(NamedTuple):
    """A variable with its number among those of its session. Its value is missing if it is a large one."""

    key: int
    variable: Variable
    is_complete: bool


def live_variable(variable: Variable, key: int) -> str:
    """Return the field of a live variable."""
    value = _value(variable.value) if variable.value.size_bytes <= INLINE_BYTES else None
    facts = [key, variable.id, variable.name, variable.type, value, variable.version, variable.constraints]
    more = [dict(variable.metadata), variable.source.value, to_micros(variable.updated_at)]
    return text_of([*facts, *more, _lock(variable.optimization)])


def live_variable_in(content: bytes) -> LiveVariable:
    """Return the variable in such a field."""
    key, id_, name, type_, value, version, constraints, metadata, source, updated_at, lock = json.loads(content)
    kept = _value_in(value)
    times = (freeze(metadata), Source(source), from_micros(updated_at), _lock_in(lock))
    return LiveVariable(
        key, Variable(id_, name, type_, kept or Value(""), version, constraints, *times), kept is not None
    )


# Versions


class StoredVersion(NamedTuple):
    """A version, and what else its variable was after it."""

    version: VariableVersion
    name: str
    constraints: str
    metadata: Mapping[str, str]
    lock: Optimization | None

    def variable(self, previous: Value | None) -> Variable:
        """Return the variable after this version; a deletion leaves the value before."""
        version = self.version
        value = version.value if version.value is not None else previous
        facts = (version.variable_id, self.name, version.type, value or Value("null"), version.version)
        return Variable(*facts, self.constraints, self.metadata, version.source, version.created_at, self.lock)


def version_id(version: int) -> str:
    """Return the id of a version in the stream of its variable, where no id may be 0."""
    return f"{version + 1}-0"


def version_fields(change: Change) -> Fields:
    """Return the fields of a version's entry."""
    version, variable = change.version, change.variable
    facts = [version.variable_id, version.type, version.version, version.kind.value, dict(version.metadata)]
    commit = [version.source.value, to_micros(version.created_at), version.actor, version.cause, version.sequence]
    metadata = None if variable.metadata == version.metadata else dict(variable.metadata)
    after = [variable.name, variable.constraints, metadata, _lock(variable.optimization)]
    fields: Fields = ["f", text_of([*facts, *commit, *after])]
    value = version.value
    if value is not None:
        fields += ("j", utf8(value.json))
        if value.binary is not None:
            fields += ("b", value.binary)
    return fields


def version_in(row: Mapping[bytes, bytes]) -> StoredVersion:
    """Return the version in such an entry."""
    (
        variable_id,
        type_,
        number,
        kind,
        metadata,
        source,
        created_at,
        actor,
        cause,
        sequence,
        name,
        constraints,
        merged,
        lock,
    ) = json.loads(row[b"f"])
    value = Value(text_in(row[b"j"]), row.get(b"b")) if b"j" in row else None
    own = freeze(metadata)
    facts = (variable_id, type_, number, ChangeKind(kind), value, own, Source(source), from_micros(created_at))
    version = VariableVersion(*facts, actor, cause, sequence)
    return StoredVersion(version, name, constraints, own if merged is None else freeze(merged), _lock_in(lock))


# Commits


class StoredCommit(NamedTuple):
    """A commit: its versions are given by variable and number."""

    sequence: int
    first: int
    actor: str
    cause: str
    at: datetime
    versions: Sequence[tuple[str, int]]
    events: tuple[Event, ...]
    hash: bytes


def commit_fields(unit: UnitOfWork, first: int) -> tuple[str, str]:
    """Return the facts of a commit, and its events."""
    versions = [[change.variable.id, change.version.version] for change in unit.versions]
    facts = [unit.sequence, first, unit.origin.actor, unit.origin.cause, to_micros(unit.now), versions]
    return text_of(facts), text_of([[event.kind.value, event.to_body()] for event in unit.events])


def commit_in(row: Mapping[bytes, bytes]) -> StoredCommit:
    """Return the commit in an entry."""
    sequence, first, actor, cause, at, versions = json.loads(row[b"c"])
    events = tuple(event_in(kind, body) for kind, body in json.loads(row[b"e"]))
    pairs = [(variable_id, version) for variable_id, version in versions]
    return StoredCommit(sequence, first, actor, cause, from_micros(at), pairs, events, row[b"h"])


# Sessions


class StoredSession(NamedTuple):
    """A session without its variables, and who it counts for."""

    session: Session
    owner: str


def session_field(session: Session, owner: str) -> str:
    """Return the field of a session."""
    facts = [session.id, to_micros(session.created_at), dict(session.metadata), session.ttl_s, session.sequence]
    return text_of([*facts, owner])


def session_in(content: bytes) -> StoredSession:
    """Return the session in such a field."""
    id_, created_at, metadata, ttl_s, sequence, owner = json.loads(content)
    return StoredSession(Session(id_, from_micros(created_at), freeze(metadata), ttl_s, sequence), owner)


def tool_field(tool: RegisteredTool) -> str:
    """Return the field of a tool."""
    return text_of([spec_body(tool.spec), tool.worker_id, tool.address])


def tool_in(content: bytes) -> RegisteredTool:
    """Return the tool in such a field."""
    spec, worker_id, address = json.loads(content)
    return RegisteredTool(spec_in(spec), worker_id, address)


def rule_field(rule: Rule) -> str:
    """Return the field of a rule."""
    return text_of([rule.name, rule.expression, rule.description])


def rule_in(content: bytes) -> Rule:
    """Return the rule in such a field."""
    return Rule(*json.loads(content))


def dependency_pair(edge: Dependency) -> tuple[str, int]:
    """Return the field of a dependency, and its value: the commit that ended it, or 0."""
    return text_of([edge.from_id, edge.to_id, edge.type, edge.since]), edge.until or 0


def dependency_in(field: bytes, until: bytes) -> Dependency:
    """Return the dependency in such a field."""
    from_id, to_id, type_, since = json.loads(field)
    return Dependency(from_id, to_id, type_, since, int(until) or None)


# Executions


class Began(NamedTuple):
    """How an execution began."""

    id: str
    tool: str
    sequence: int
    parent_id: str | None
    idempotency_key: str | None
    fingerprint: str
    attempt: int

    @classmethod
    def of(cls, event: ExecutionBegan, sequence: int) -> "Began":
        """Return how this event began one."""
        facts = (event.execution_id, event.tool, sequence, event.parent_id, event.idempotency_key)
        return cls(*facts, event.fingerprint, event.attempt)

    def field(self) -> str:
        """Return the field of the running execution."""
        return text_of(self)

    def running(self) -> JournalEntry:
        """Return the entry of the journal while it runs."""
        return JournalEntry(*self[:6])

    def ended(self, event: ExecutionEnded, sequence: int) -> str:
        """Return the field of the ended execution."""
        return text_of([self, event.status.value, sequence, _value(event.result)])


def began_in(content: bytes) -> Began:
    """Return the beginning in the field of a running execution."""
    return Began(*json.loads(content))


def ended_in(content: bytes) -> JournalEntry:
    """Return the execution in the field of an ended one."""
    began, status, sequence, result = json.loads(content)
    running = Began(*began)
    facts = (ExecutionStatus(status), sequence, running.attempt, _value_in(result))
    return JournalEntry(*running[:6], *facts)


def spent_field(spent: Spent) -> str:
    """Return the field of what LM calls have used."""
    return text_of([spent.tokens, spent.cost])


def spent_in(content: bytes) -> Spent:
    """Return what the calls in such a field have used."""
    return Spent(*json.loads(content))


# Outcomes


def outcome_field(outcome: RecordedOutcome, sequence: int) -> str:
    """Return the field of an outcome of a commit."""
    return text_of([outcome.cause, outcome.fingerprint, outcome.result, sequence])


def outcome_in(session_id: str, key: str, content: bytes) -> tuple[RecordedOutcome, int]:
    """Return the outcome in such a field, and the number of its commit."""
    cause, fingerprint, result, sequence = json.loads(content)
    return RecordedOutcome(session_id, key, cause, fingerprint, result), sequence
