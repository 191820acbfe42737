"""Audits: questions about a history, and what is answered. No SQL, no wire: those are edges of an `AuditSource`.

A *point* is a place in the history, as text: a commit's number, an execution's id (right after it ended; while it runs:
as it began), an ISO time, an age ("2h" ago), or "now". With `^` behind it: right before it.
"""

import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from math import inf, isinf
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeAlias, TypeVar

from dspex_persist.spelling import closest, did_you_mean, quote
from dspex_persist.state.errors import (
    InvalidArgumentError,
    NotInHistoryError,
    VersionNotFoundError,
    VersionPrunedError,
)
from dspex_persist.state.model import ChangeKind, Conflict, ExecutionStatus, Failure, LogEntry, Source, Value

T = TypeVar("T")

SENSITIVE: Final = "sensitive"
"""The key under which a variable's metadata says "true" if its values are to be masked."""
PAGE: Final = 500
_DEEPEST: Final = 100
_MOST_NODES: Final = 10_000
_NAMED: Final = 5

Cursor: TypeAlias = tuple[int, ...]
"""Where a page ended: the key of its last row."""


# Answers


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """A version of a variable. `value` is None for a deletion, and where `masked` says that it is kept back.

    `execution_id` and `tool`: the tool execution that wrote it, None where a client did; `caller_id` and `caller_tool`:
    the one that called that, None where a client did. `actor`: who had it done.
    """

    session_id: str
    name: str
    variable_id: str
    type: str
    version: int
    kind: ChangeKind
    value: Value | None
    source: Source
    metadata: Mapping[str, str]
    sequence: int
    created_at: datetime
    actor: str
    cause: str
    execution_id: str | None = None
    tool: str | None = None
    masked: bool = False
    caller_id: str | None = None
    caller_tool: str | None = None


@dataclass(frozen=True, slots=True)
class ExecutionSummary:
    """A tool execution. `error` is "" unless it went wrong; what has to do with its end is None while it runs."""

    session_id: str
    execution_id: str
    tool: str
    status: ExecutionStatus
    attempt: int
    actor: str
    began_sequence: int
    began_at: datetime
    ended_sequence: int | None = None
    ended_at: datetime | None = None
    duration_us: int | None = None
    parent_id: str | None = None
    idempotency_key: str | None = None
    worker_id: str = ""
    reads: int = 0
    writes: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class ReadEntry:
    """Something that an execution asked for, and the version that it found; None: there was no such variable."""

    asked: str
    name: str | None
    variable_id: str | None
    version: int | None


@dataclass(frozen=True, slots=True)
class ExecutionDetail:
    """One execution in full. `reason`: why it ended where no code failed. `attempts`: all for the same request, this
    one included, oldest first. `history`: what it and its children changed, published values included."""

    summary: ExecutionSummary
    isolation: str
    parameters: Mapping[str, Value]
    metadata: Mapping[str, str]
    seed: str
    result: Value | None = None
    failure: Failure | None = None
    reason: str = ""
    conflicts: tuple[Conflict, ...] = ()
    reads: tuple[ReadEntry, ...] = ()
    patterns: tuple[str, ...] = ()
    writes: tuple[tuple[str, int], ...] = ()
    published: tuple[tuple[str, int], ...] = ()
    log: tuple[LogEntry, ...] = ()
    recorded: Mapping[str, Any] = field(default_factory=dict)
    attempts: tuple[str, ...] = ()
    children: tuple["ExecutionDetail", ...] = ()
    history: tuple[HistoryEntry, ...] = ()

    def all_reads(self) -> Iterator[ReadEntry]:
        """What it and those that it called have read."""
        yield from self.reads
        for child in self.children:
            yield from child.all_reads()


@dataclass(frozen=True, slots=True)
class CommitEntry:
    """A commit: who, through what, when, and what it changed. `hash` is hexadecimal. `pruned`: rows of it are gone."""

    sequence: int
    session_id: str
    actor: str
    cause: str
    created_at: datetime
    hash: str
    versions: tuple[tuple[str, int], ...] = ()
    events: tuple[str, ...] = ()
    pruned: bool = False


@dataclass(frozen=True, slots=True)
class SessionEntry:
    """A session, live or ended, with how much there is of it."""

    session_id: str
    created_at: datetime
    started_sequence: int
    ended_sequence: int | None
    ended_at: datetime | None
    last_at: datetime
    ttl_s: float | None
    variables: int
    commits: int
    executions: int
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class VariableState:
    """A variable as it stood at a point, and what made it so."""

    session_id: str
    name: str
    variable_id: str
    type: str
    value: Value | None
    version: int
    kind: ChangeKind
    source: Source
    constraints: str
    metadata: Mapping[str, str]
    sequence: int
    updated_at: datetime
    actor: str
    cause: str
    execution_id: str | None = None
    tool: str | None = None
    masked: bool = False
    caller_id: str | None = None
    caller_tool: str | None = None


class DifferenceKind(StrEnum):
    """What became of a variable between two points."""

    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"
    REPLACED = "replaced"
    """Deleted, and another one registered under its name."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A variable that is not at one point what it is at another."""

    name: str
    kind: DifferenceKind
    before: VariableState | None
    after: VariableState | None


@dataclass(frozen=True, slots=True)
class LineageNode:
    """A version, what set it, and on which versions that stood: the reads of its transaction.

    `depth` 0 is what was asked about; a node of depth n is read by one of depth n - 1. Each version comes once;
    what was pruned is only named by what stands on it.
    """

    depth: int
    entry: HistoryEntry
    stands_on: tuple[ReadEntry, ...] = ()


# Questions


class Operator(StrEnum):
    """How a value is compared."""

    LESS = "<"
    LESS_EQUAL = "<="
    GREATER = ">"
    GREATER_EQUAL = ">="
    EQUAL = "="
    NOT_EQUAL = "!="
    CONTAINS = "contains"


@dataclass(frozen=True, slots=True)
class Predicate:
    """A condition on a value: a comparison with a number, or of its JSON with a text."""

    operator: Operator
    operand: str

    @property
    def number(self) -> int | float | None:
        """The operand as a number, exactly, if it is one."""
        return number_in(self.operand)


_INTEGER = re.compile(r"[+-]?[0-9]{1,4300}")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,9})?")
_INFINITIES: Final = {"Infinity": inf, "+Infinity": inf, "-Infinity": -inf}
_MOST_DIGITS: Final = 4300


def number_in(text: str) -> int | float | None:
    """The number that a text is, as values have it: integers exactly, everything else as a double."""
    text = text.strip()
    if _INTEGER.fullmatch(text):
        return int(text)
    if text in _INFINITIES:
        return _INFINITIES[text]
    if _DECIMAL.fullmatch(text) is None:
        return None
    number = float(text)
    if not isinf(number):
        return number
    # Past all doubles, and yet not past all integers; or past those, too, and yet not infinite.
    exact = Decimal(text)
    return int(exact) if exact.adjusted() < _MOST_DIGITS else (1 if number > 0 else -1) * 10**_MOST_DIGITS


MOST_CONDITIONS: Final = 100
"""In one question."""
_LONGEST_TEXT: Final = 10_000
_LONGEST_SOUGHT, _LONGEST_OPERAND = 1_000, 65_536
_PREDICATE = re.compile(r"(<=|>=|!=|<|>|==?|contains\b)\s*(.*)", re.DOTALL)


def parse_predicate(text: str) -> Predicate:
    """A predicate as people write it: `< 0.5`, `= "on"`, `contains error`."""
    match = _PREDICATE.fullmatch(text.strip())
    if match is None or not match[2]:
        raise InvalidArgumentError("where", f"{quote(text)} is no condition; write '< 0.5', '= 3' or 'contains text'")
    operator = Operator("=" if match[1] == "==" else match[1])
    return checked(Predicate(operator, match[2]))


def checked(predicate: Predicate) -> Predicate:
    """The same, unless it asks for the order of what has none, or for too much."""
    # To look for a text takes SQLite as long as that is, at each place where it might be.
    most = _LONGEST_SOUGHT if predicate.operator is Operator.CONTAINS else _LONGEST_OPERAND
    check_length("where", predicate.operand, most)
    if predicate.operator.value[0] in "<>" and predicate.number is None:
        reason = f"{predicate.operator} compares with {quote(predicate.operand)}, which is no number"
        raise InvalidArgumentError("where", reason)
    return predicate


# Points


@dataclass(frozen=True, slots=True)
class Point:
    """A parsed point: exactly one of the three is set, none of them is the newest commit. `before`: with `^`."""

    sequence: int | None = None
    execution_id: str = ""
    at: datetime | None = None
    before: bool = False


PointLike: TypeAlias = str | int | datetime | timedelta
"""What can be given as a point: a text, a commit's number, a time, an age."""
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d|w)(?:\s+ago)?")
_UNITS: Final = {"s": 1, "m": 60, "min": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}


def point_text(point: PointLike, option: str = "at") -> str:
    """A point as text: what `parse_point` reads."""
    if isinstance(point, str):
        return point
    if isinstance(point, int) and not isinstance(point, bool) and point >= 0:
        return str(point)
    if isinstance(point, datetime):
        return point.isoformat()
    if isinstance(point, timedelta) and point >= timedelta(0):
        return f"{point.total_seconds():.6f}s"
    raise InvalidArgumentError(
        option,
        f"{quote(point)} is no point in the history; possible are a text, a commit's number (int), a time "
        "(datetime) and an age (timedelta)",
    )


def parse_point(point: PointLike, now: datetime, option: str = "at") -> Point:
    """A point as people write it; a time without a zone is local. `InvalidArgumentError` says what is possible."""
    text = point_text(point, option)
    stated = text.strip()
    before = stated.endswith("^")
    stated = stated.removesuffix("^").rstrip()
    if stated in ("", "now"):
        return Point(before=before)
    if stated.isascii() and stated.isdecimal() and len(stated) < 19:
        return Point(sequence=int(stated), before=before)
    if stated.startswith("exec_"):
        return Point(execution_id=stated, before=before)
    try:
        if age := _AGE.fullmatch(stated):
            return Point(at=now - timedelta(seconds=float(age[1]) * _UNITS[age[2]]), before=before)
        return Point(at=datetime.fromisoformat(stated).astimezone(UTC), before=before)
    except (ValueError, OverflowError):
        raise InvalidArgumentError(
            option,
            f"{quote(text)} is no point in the history; possible are a commit's number (1234), an execution's id "
            "(exec_1234_...), a time (2026-03-01T12:00, 2026-03-01T12:00:00Z), an age (30s, 15m, 2h, 7d) and now; "
            "^ behind any of them means right before it",
        ) from None


# Lists


@dataclass(frozen=True, slots=True, kw_only=True)
class Query(Generic[T]):
    """What every question has. "" asks for all; `session` is an id or a glob of `*` and `?`. `since` and `until` are
    points: after the first, up to and with the second. `limit` 0 is no limit."""

    session: str = ""
    since: PointLike = ""
    until: PointLike = ""
    newest_first: bool = True
    limit: int = 0

    def __post_init__(self) -> None:
        _check_texts(self, "session")
        for name in ("since", "until"):
            object.__setattr__(self, name, point_text(getattr(self, name), name))
        limit: object = self.limit
        if not isinstance(limit, int) or limit < 0:
            raise InvalidArgumentError("limit", f"{quote(limit)} is no number of answers; 0 is no limit")


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryQuery(Query[HistoryEntry]):
    """Versions. `variable` is a name, an id or a glob."""

    variable: str = ""
    type: str = ""
    kind: ChangeKind | str | None = None
    actor: str = ""
    source: Source | str | None = None
    tool: str = ""
    execution_id: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    where: Sequence[Predicate | str] = ()

    def __post_init__(self) -> None:
        Query.__post_init__(self)
        _check_texts(self, "variable", "type", "actor", "tool", "execution_id")
        _check_metadata(self.metadata)
        _set_member(self, "kind", ChangeKind)
        _set_member(self, "source", Source)
        object.__setattr__(self, "where", predicates_of(self.where))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionQuery(Query[ExecutionSummary]):
    """Tool executions, by when they began. `metadata`: of the request. `children`: those that others called, too."""

    tool: str = ""
    status: ExecutionStatus | str | None = None
    actor: str = ""
    idempotency_key: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    children: bool = True

    def __post_init__(self) -> None:
        Query.__post_init__(self)
        _check_texts(self, "tool", "actor", "idempotency_key")
        _check_metadata(self.metadata)
        _set_member(self, "status", ExecutionStatus)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitQuery(Query[CommitEntry]):
    """Commits."""

    actor: str = ""
    cause: str = ""

    def __post_init__(self) -> None:
        Query.__post_init__(self)
        _check_texts(self, "actor", "cause")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionQuery(Query[SessionEntry]):
    """Sessions, by when they began. `live`: only those that have not ended, or only those that have."""

    live: bool | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Query.__post_init__(self)
        _check_metadata(self.metadata)


def _check_texts(query: object, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(query, name), str):
            raise InvalidArgumentError(name, f"{quote(getattr(query, name))} is no text")
        check_length(name, getattr(query, name), _LONGEST_TEXT)


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, Mapping) or not all(
        isinstance(each, str) for pair in metadata.items() for each in pair
    ):
        raise InvalidArgumentError("metadata", "it has to be a mapping of texts to texts, such as {'user': 'ann'}")
    check_conditions("metadata", metadata)


def check_conditions(field: str, conditions: Sized) -> None:
    """Refuse more of them than anybody means: each is looked at for each row."""
    if len(conditions) > MOST_CONDITIONS:
        reason = f"{len(conditions):,} conditions are too many: ask for at most {MOST_CONDITIONS}"
        raise InvalidArgumentError(field, reason)


def check_length(field: str, text: str, most: int) -> None:
    """Refuse a text that is longer than anything that it could be compared with."""
    if len(text) > most:
        reason = f"{quote(text)} is too long: it has {len(text):,} characters, and may have {most:,}"
        raise InvalidArgumentError(field, reason)


def _set_member(query: object, name: str, kind: type[StrEnum]) -> None:
    """Have the field be a member of `kind`, which may have been given by its value."""
    given = getattr(query, name)
    if given is None or isinstance(given, kind):
        return
    values = [member.value for member in kind]
    if given not in values:
        raise InvalidArgumentError(name, f"there is no {name} {quote(given)}; {what_there_is(str(given), values, 10)}")
    object.__setattr__(query, name, kind(given))


def predicates_of(conditions: Predicate | str | Sequence[Predicate | str]) -> tuple[Predicate, ...]:
    """Conditions, of which each may be as people write it; one alone may stand for a sequence of one."""
    if isinstance(conditions, str | Predicate):
        conditions = (conditions,)
    if not isinstance(conditions, Sequence):
        raise InvalidArgumentError("where", f"{quote(conditions)} is no condition; write '< 0.5'")
    check_conditions("where", conditions)
    return tuple(_predicate(each) for each in conditions)


def _predicate(condition: Predicate | str) -> Predicate:
    if isinstance(condition, Predicate):
        return checked(condition)
    if isinstance(condition, str):
        return parse_predicate(condition)
    raise InvalidArgumentError("where", f"{quote(condition)} is no condition; write '< 0.5'")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Rows, and where the next page goes on; None: there is no more."""

    rows: Sequence[T]
    after: Cursor | None = None


def is_glob(text: str) -> bool:
    """Whether it is a pattern rather than one name."""
    return "*" in text or "?" in text


def what_there_is(asked: str, names: Sequence[str], most: int = _NAMED) -> str:
    """The name that may have been meant, or some of those that there are."""
    meant = did_you_mean(closest(asked, names))
    if meant:
        return meant
    told = [*map(quote, names[:most]), *(["..."] if len(names) > most else [])]
    return f"there are: {', '.join(told)}" if names else "there are none"


# Sources


class AuditSource(ABC):
    """A history that can be asked. Usable from any thread. `reveal`: whether values of sensitive variables are shown.

    Raises `NotInHistoryError` for a session, a variable or an execution that it never had, `InvalidArgumentError` for
    what is no point of it.
    """

    reveal: bool = False

    @abstractmethod
    def head(self) -> int:
        """The newest commit's number."""

    @abstractmethod
    def resolve(self, point: PointLike, option: str = "at", session: str = "") -> int:
        """The last commit that belongs to the time up to a point; 0 is before the first.

        A time is looked for among the commits of `session`, if one is given. Without, a session that was imported
        counts as of its import.
        """

    @abstractmethod
    def page(self, query: Query[T], after: Cursor | None = None, most: int = PAGE) -> Page[T]:
        """At most `most` answers, from `after` on."""

    @abstractmethod
    def execution(self, execution_id: str) -> ExecutionDetail:
        """One execution in full."""

    @abstractmethod
    def state(self, session: str, at: PointLike = "") -> tuple[VariableState, ...]:
        """The variables of a session as they stood at a point, oldest first."""

    @abstractmethod
    def version(self, session: str, variable_id: str, version: int) -> HistoryEntry:
        """One version of one variable of a session; `VersionNotFoundError` or `VersionPrunedError`."""

    @abstractmethod
    def close(self) -> None:
        """Let it go."""

    def iterate(self, query: Query[T]) -> Iterator[T]:
        """All answers, read page by page as they are taken."""
        left = query.limit or None
        # Resolved once: "2h ago" must not move while pages are read.
        session = "" if is_glob(query.session) else query.session
        since, until = self._fixed(query.since, "since", session), self._fixed(query.until, "until", session)
        query = replace(query, since=since, until=until)
        after: Cursor | None = None
        while True:
            page = self.page(query, after, PAGE if left is None else min(PAGE, left))
            yield from page.rows
            left = None if left is None else left - len(page.rows)
            if page.after is None or left == 0:
                return
            after = page.after

    def _fixed(self, point: PointLike, option: str, session: str) -> str:
        return "" if point == "" else str(self.resolve(point, option, session))

    def diff(self, session: str, start: PointLike, end: PointLike = "") -> tuple[Difference, ...]:
        """What is not at `end` what it was at `start`, in the order of names. Before it began a session had nothing."""
        after = {variable.name: variable for variable in self._state("to", session, end)}
        had_begun = self.resolve(start, "from", session) >= self._began(session)
        before = {variable.name: variable for variable in self._state("from", session, start)} if had_begun else {}
        found = (_difference(name, before.get(name), after.get(name)) for name in sorted(before.keys() | after.keys()))
        return tuple(each for each in found if each is not None)

    def _began(self, session: str) -> int:
        """The commit that began the first session of this id, which may look like a pattern; 0 if there is none."""
        lives = self.iterate(SessionQuery(session=session, newest_first=False))
        return next((each.started_sequence for each in lives if each.session_id == session), 0)

    def _state(self, option: str, session: str, point: PointLike) -> tuple[VariableState, ...]:
        """The state at a point that was given as `option`."""
        try:
            return self.state(session, point)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(option, error.reason) from error

    def blame(self, session: str, variable: str = "", at: PointLike = "", depth: int = 1) -> tuple[LineageNode, ...]:
        """What set the values as they stood at a point, and on what that stood, `depth` steps back."""
        standing = self.state(session, at)
        if variable:
            names = [each.name for each in standing]
            standing = tuple(each for each in standing if variable in (each.name, each.variable_id))
            if not standing:
                hint = f"session {quote(session)} did not have it then; {what_there_is(variable, names)}"
                raise NotInHistoryError("variable", variable, hint)
        return tuple(self._lineage(standing, min(depth, _DEEPEST)))

    def _lineage(self, standing: Sequence[VariableState], depth: int) -> Iterator[LineageNode]:
        queue = deque((0, each.variable_id, each.version) for each in standing)
        session = standing[0].session_id if standing else ""
        met = {(variable_id, version) for _, variable_id, version in queue}
        executions: dict[str, ExecutionDetail] = {}
        while queue and len(met) < _MOST_NODES:
            level, variable_id, version = queue.popleft()
            try:
                entry = self.version(session, variable_id, version)
            except (VersionNotFoundError, VersionPrunedError):
                continue  # Pruned; what stands on it still names it.
            reads = self._reads_behind(entry, executions)
            yield LineageNode(level, entry, reads)
            for read in reads if level < depth else ():
                node = (read.variable_id, read.version)
                if read.variable_id is not None and read.version is not None and node not in met:
                    met.add((read.variable_id, read.version))
                    queue.append((level + 1, read.variable_id, read.version))

    def _reads_behind(self, entry: HistoryEntry, executions: dict[str, ExecutionDetail]) -> tuple[ReadEntry, ...]:
        """What the transaction that wrote a version had found.

        All of it counts: what one of its executions read, it may have handed to the one that wrote.
        """
        if entry.execution_id is None:
            return ()
        execution_id: str | None = entry.execution_id
        while execution_id is not None:
            if execution_id not in executions:
                executions[execution_id] = self.execution(execution_id)
            transaction = executions[execution_id]
            execution_id = transaction.summary.parent_id
        reads = (read for read in transaction.all_reads() if read.version is not None)
        return tuple({(read.variable_id, read.version): read for read in reads}.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _difference(name: str, before: VariableState | None, after: VariableState | None) -> Difference | None:
    if before is None or after is None:
        return Difference(name, DifferenceKind.ADDED if before is None else DifferenceKind.REMOVED, before, after)
    if before.variable_id != after.variable_id:
        return Difference(name, DifferenceKind.REPLACED, before, after)
    return Difference(name, DifferenceKind.CHANGED, before, after) if before.version != after.version else None
