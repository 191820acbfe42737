"""What a group of commits changes in the store: the commands that carry it out, built before any is sent."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from dspex_persist.clock import to_micros
from dspex_persist.state.budgets import NOTHING, Spent
from dspex_persist.state.events import (
    DependencyAdded,
    DependencyRemoved,
    ExecutionBegan,
    ExecutionEnded,
    OptimizationStarted,
    OptimizationStopped,
    RuleAdded,
    RuleRemoved,
    SessionEnded,
    SessionStarted,
    SessionUpdated,
    ToolsRegistered,
)
from dspex_persist.state.lm_calls import spent_on
from dspex_persist.state.model import ChangeKind
from dspex_persist.state.quotas import identity_in, stored_bytes
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.unit_of_work import RecordedOutcome, UnitOfWork
from dspex_persist.state.valkey import codec
from dspex_persist.state.valkey.chain import link
from dspex_persist.state.valkey.keys import Keys

_MOST_FIELDS: Final = 500
"""So many fields are written by one command: a function can unpack some thousand words."""
_WORD_BYTES: Final = 16
"""About what a word takes besides its own bytes."""


class Known(Protocol):
    """What a batch asks the store about, as of the last commit before it."""

    def owner_of(self, first: int) -> str:
        """Return whom a live session counts for."""

    def began(self, first: int, execution_id: str) -> codec.Began | None:
        """Return how a running execution began."""

    def spent_by(self, first: int, tool: str) -> Spent:
        """Return what the LM calls of a tool have used in a session."""


class Commands:
    """Commands as the functions get them: of each how many words it has, then these."""

    def __init__(self) -> None:
        self.words: list[Any] = []
        self.size_bytes = 0

    def add(self, *words: Any) -> None:
        """Add a command."""
        self.words.append(len(words))
        self.words += words
        self.size_bytes += sum(len(word) if isinstance(word, str | bytes) else 0 for word in words)
        self.size_bytes += _WORD_BYTES * (len(words) + 1)

    def extend(self, others: "Commands") -> None:
        """Add other commands."""
        self.words += others.words
        self.size_bytes += others.size_bytes

    def set(self, name: str, fields: Mapping[str, Any]) -> None:
        """Set fields of a hash."""
        pairs = list(fields.items())
        for place in range(0, len(pairs), _MOST_FIELDS):
            self.add("HSET", name, *(word for pair in pairs[place : place + _MOST_FIELDS] for word in pair))

    def remove(self, name: str, fields: Iterable[str]) -> None:
        """Remove fields of a hash."""
        names = list(map(codec.utf8, fields))
        for place in range(0, len(names), _MOST_FIELDS):
            self.add("HDEL", name, *names[place : place + _MOST_FIELDS])

    def parts(self, most_bytes: int) -> Iterator[list[Any]]:
        """Yield them in parts of about this size at most: at least one command each."""
        part, size_bytes, place = list[Any](), 0, 0
        while place < len(self.words):
            following = place + 1 + self.words[place]
            words = self.words[place:following]
            own_bytes = sum(len(word) if isinstance(word, str | bytes) else _WORD_BYTES for word in words)
            if part and size_bytes + own_bytes > most_bytes:
                yield part
                part, size_bytes = [], 0
            part += words
            size_bytes, place = size_bytes + own_bytes, following
        if part:
            yield part


class _Touched:
    """What a batch changes of the current state of one session."""

    def __init__(self, state: SessionState) -> None:
        self.state = state
        self.has_ended = False
        self.is_described = False
        self.variables: dict[str, None] = {}
        self.tools: set[str] = set()
        self.rules: set[str] = set()
        self.dependencies = False
        self.began: dict[str, codec.Began] = {}
        self.ended: set[str] = set()
        self.stored_bytes = 0
        self.owner: str | None = None
        self.spent: dict[str, Spent] = {}


class Batch:
    """The commands of one group, or of one page of an import. For a single use.

    Args:
        keys: The names of the keys.
        known: Answers questions about what is stored.
        hash_: The hash of the last commit.
        lease: The server and its epoch, whose executions begin.
        imported: The first commit of the session that is imported; None outside of imports.

    Attributes:
        own: The commands on keys of the imported session alone, which nobody reads before it is complete.
        shared: All others.
        hash: The hash of the last commit so far.
        began: The executions that began, by their ids: how, or None if they have ended as well.
    """

    def __init__(
        self, keys: Keys, known: Known, hash_: bytes, lease: tuple[str, str], imported: int | None = None
    ) -> None:
        self._keys, self._known, self.hash, self._lease, self._imported = keys, known, hash_, lease, imported
        self.shared = Commands()
        self.own = self.shared if imported is None else Commands()
        self.began: dict[str, codec.Began | None] = {}
        self._touched: dict[int, _Touched] = {}
        self._first: int | None = None

    def _of(self, first: int) -> Commands:
        return self.own if first == self._imported else self.shared

    def add(self, unit: UnitOfWork) -> None:
        """Add the next commit."""
        state = unit.state
        assert state is not None, "a unit with changes has a session"
        number_variables(unit)
        first = state.session.sequence
        if self._first is None:
            self._first = unit.sequence
        touched = self._touched.setdefault(first, _Touched(state))
        # A unit that ends the session has the last state of it.
        touched.state = state
        self._add_entries(unit, first, touched)
        for event in unit.events:
            self._note(event, unit, touched)
        if first != self._imported:
            mark = ("e", 1) if touched.has_ended else ()
            facts = ("s", first, "i", codec.utf8(state.session.id), "h", self.hash)
            self.shared.add("XADD", self._keys.log, f"{unit.sequence}-0", *facts, *mark)
        if touched.has_ended:
            self._end(touched, first)
        if unit.outcome is not None:
            # Also that of the request that has ended the session.
            self._keep(unit.outcome, unit, first)

    def _add_entries(self, unit: UnitOfWork, first: int, touched: _Touched) -> None:
        keys, commands = self._keys, self._of(first)
        parts: list[bytes] = []
        for change in unit.versions:
            variable_id = change.variable.id
            fields = codec.version_fields(change)
            commands.add("XADD", keys.versions(first, variable_id), codec.version_id(change.version.version), *fields)
            parts += (each if isinstance(each, bytes) else each.encode() for each in fields[1::2])
            touched.variables[variable_id] = None
            touched.stored_bytes += stored_bytes(change.version)
            if change.version.kind is ChangeKind.REGISTERED:
                facts = codec.text_of([touched.state.keys[variable_id], change.variable.name, unit.sequence])
                commands.add("HSET", keys.names(first), variable_id, facts)
            elif change.version.kind is ChangeKind.DELETED:
                touched.dependencies = True
        facts, events = codec.commit_fields(unit, first)
        self.hash = link(self.hash, (facts.encode(), events.encode(), *parts))
        commands.add("XADD", keys.commits(first), f"{unit.sequence}-0", "c", facts, "e", events, "h", self.hash)

    def _note(self, event: Any, unit: UnitOfWork, touched: _Touched) -> None:
        if isinstance(event, SessionStarted | SessionUpdated):
            touched.is_described = True
            if isinstance(event, SessionStarted):
                touched.owner = identity_in(unit.origin.actor)
        elif isinstance(event, SessionEnded):
            touched.has_ended = True
        elif isinstance(event, OptimizationStarted | OptimizationStopped):
            touched.variables[event.variable_id] = None
        elif isinstance(event, DependencyAdded | DependencyRemoved):
            touched.dependencies = True
        elif isinstance(event, RuleAdded | RuleRemoved):
            touched.rules.add(event.name)
        elif isinstance(event, ToolsRegistered):
            touched.tools.update(tool.spec.name for tool in event.tools)
        elif isinstance(event, ExecutionBegan):
            touched.began[event.execution_id] = codec.Began.of(event, unit.sequence)
        elif isinstance(event, ExecutionEnded):
            self._end_execution(event, unit, touched)

    def _end_execution(self, event: ExecutionEnded, unit: UnitOfWork, touched: _Touched) -> None:
        first = touched.state.session.sequence
        began = touched.began.pop(event.execution_id, None)
        if began is None:
            began = self._known.began(first, event.execution_id)
            touched.ended.add(event.execution_id)
        self.began[event.execution_id] = None
        if began is None:
            return
        if began.idempotency_key is not None:
            ended = began.ended(event, unit.sequence)
            self._of(first).add("HSET", self._keys.keyed(first), codec.utf8(began.idempotency_key), ended)
        for call in event.lm_calls:
            if began.tool not in touched.spent:
                touched.spent[began.tool] = self._known.spent_by(first, began.tool)
            touched.spent[began.tool] = touched.spent.get(began.tool, NOTHING).plus(spent_on(call))

    def _keep(self, outcome: RecordedOutcome, unit: UnitOfWork, first: int) -> None:
        key = codec.utf8(outcome.key)
        field = codec.outcome_field(outcome, unit.sequence)
        self._of(first).add("HSET", self._keys.outcomes(outcome.session_id), key, field)
        member = codec.text_of([outcome.session_id, outcome.key])
        self.shared.add("ZADD", self._keys.ages, to_micros(unit.now), member)

    def _end(self, touched: _Touched, first: int) -> None:
        keys, session_id = self._keys, touched.state.session.id
        commands = self._of(first)
        of_session = (keys.session, keys.dependencies, keys.names, keys.keyed, keys.spent)
        commands.add("UNLINK", *(each(first) for each in of_session), keys.outcomes(session_id))
        self.shared.add("HDEL", keys.live, codec.utf8(session_id))
        self.shared.add("ZREM", keys.expiry, first)
        owner = touched.owner if touched.owner is not None else self._known.owner_of(first)
        self.shared.add("HDEL", keys.owned(owner), first)
        self.shared.remove(keys.running, touched.ended)

    def finish(self, saved: Sequence[SessionState] = ()) -> None:
        """Add what the sessions are like after all of it.

        Args:
            saved: Sessions whose expiry has to be saved.
        """
        for first, touched in self._touched.items():
            if touched.owner is not None:
                self.shared.add("RPUSH", self._keys.lives(touched.state.session.id), first)
            if not touched.has_ended:
                self._write_state(first, touched)
        for state in saved:
            if state.lease is not None:
                first = state.session.sequence
                self.shared.add("ZADD", self._keys.expiry, "GT", to_micros(state.lease.expires_at), first)

    def _write_state(self, first: int, touched: _Touched) -> None:
        keys, state, own = self._keys, touched.state, self._of(first)
        name, session_id = keys.session(first), codec.utf8(state.session.id)
        own.set(name, {**dict(self._fields_of(touched)), "at": state.sequence})
        own.remove(name, _gone_from(touched))
        if touched.dependencies:
            since = self._first or 0
            edges = (each for each in state.dependencies if max(each.since, each.until or 0) >= since)
            own.set(keys.dependencies(first), dict(map(codec.dependency_pair, edges)))
        own.set(keys.spent(first), {tool: codec.spent_field(spent) for tool, spent in touched.spent.items()})
        if touched.owner is not None:
            self.shared.add("HSET", keys.live, session_id, first)
        if touched.is_described:
            if state.lease is not None:
                self.shared.add("ZADD", keys.expiry, to_micros(state.lease.expires_at), first)
            elif touched.owner is None:
                self.shared.add("ZREM", keys.expiry, first)
        if touched.stored_bytes or touched.owner is not None:
            owner = touched.owner if touched.owner is not None else self._known.owner_of(first)
            self.shared.add("HINCRBY", keys.owned(owner), first, touched.stored_bytes)
        if first != self._imported:
            # What is imported does not run here.
            running = {each: codec.text_of([state.session.id, *self._lease]) for each in touched.began}
            self.shared.set(keys.running, running)
            self.shared.remove(keys.running, touched.ended)
        self.began |= touched.began

    def _fields_of(self, touched: _Touched) -> Iterator[tuple[str, Any]]:
        state = touched.state
        if touched.is_described:
            owner = touched.owner
            if owner is None:
                owner = self._known.owner_of(state.session.sequence)
            yield "session", codec.session_field(state.session, owner)
        for variable_id in touched.variables:
            live = state.variables.get(state.names.get(variable_id, ""))
            if live is not None:
                yield f"v:{variable_id}", codec.live_variable(live, state.keys[variable_id])
        for each in touched.tools:
            if each in state.tools:
                yield f"t:{each}", codec.tool_field(state.tools[each])
        for rule in touched.rules:
            if state.rules is not None and rule in state.rules:
                yield f"r:{rule}", codec.rule_field(state.rules[rule])
        for began in touched.began.values():
            yield f"x:{began.id}", began.field()


def _gone_from(touched: _Touched) -> Iterator[str]:
    state = touched.state
    yield from (f"v:{each}" for each in touched.variables if each not in state.names)
    yield from (f"r:{each}" for each in touched.rules if each not in (state.rules or ()))
    yield from (f"x:{each}" for each in touched.ended)


def number_variables(unit: UnitOfWork) -> None:
    """Number the variables that a unit registers, after all that its session has or had, and sort its versions."""
    state = unit.state
    assert state is not None, "a unit with changes has a session"
    keys = state.keys
    for change in unit.versions:
        if change.variable.id not in keys:
            # The last one has the highest number, and may have been deleted before the session was loaded.
            keys[change.variable.id] = max(state.key, next(reversed(keys.values()), -1) + 1)
    if len(unit.versions) > 1:
        unit.versions.sort(key=lambda change: (keys[change.variable.id], change.version.version))
