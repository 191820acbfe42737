"""Audits: queries about the history, and their answers. Independent of SQL and of the wire, which sources deal with.

A *point* is a place in the history, as text: a commit's number, an execution's id (the commit that ended it, or that
began it while it runs), an ISO time, an age ("2h"), or "now". A `^` after it means right before it.
"""

import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from math import inf, isinf
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeAlias, TypeVar

from dspex_persist.spelling import closest, did_you_mean, quote
from dspex_persist.state.denials import Denial
from dspex_persist.state.errors import (
    InvalidArgumentError,
    NotInHistoryError,
    VersionNotFoundError,
    VersionPrunedError,
)
from dspex_persist.state.model import SENSITIVE as SENSITIVE
from dspex_persist.state.model import ChangeKind, Conflict, ExecutionStatus, Failure, LogEntry, Source, Value

T = TypeVar("T")

PAGE: Final = 500
_DEEPEST: Final = 100
_MOST_NODES: Final = 10_000
_NAMED: Final = 5

Cursor: TypeAlias = tuple[int, ...]
"""The end of a page: the key of its last row."""


# Answers


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """A version of a variable.

    Attributes:
        value: The value; None for a deletion, and if it is `masked`.
        actor: Who made the request.
        execution_id: The tool execution that wrote the version; None if a client did.
        tool: The tool of that execution.
        masked: Whether the value is hidden because the variable is sensitive.
        caller_id: The tool execution that called the one that wrote the version; None if a client called it.
        caller_tool: The tool of that caller.
        reason: Why it was written; None if its writer gave no reason.
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
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ExecutionSummary:
    """A tool execution. `error` is "" unless it failed. The fields about its end are None while it runs."""

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
    """A variable that an execution looked up as `asked`, and the version that it read; None if it did not exist."""

    asked: str
    name: str | None
    variable_id: str | None
    version: int | None


@dataclass(frozen=True, slots=True)
class ExecutionDetail:
    """One execution in full.

    Attributes:
        reason: Why it ended, if not because of an error of its code.
        attempts: The ids of all executions for the same request, including this one, oldest first.
        children: The executions that it called.
        history: The versions that it and its children wrote, including published ones, and what was computed from
            them in the same commits.
    """

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

    @property
    def computed(self) -> tuple[tuple[str, int], ...]:
        """Names and versions of derived variables that were computed from what it and its children wrote."""
        if self.summary.duration_us is None:
            # It runs, or what it wrote was pruned from the journal.
            return ()
        made = {pair for each in self.tree() for pair in (*each.writes, *each.published)}
        return tuple(pair for each in self.history if (pair := (each.name, each.version)) not in made)

    def tree(self) -> Iterator["ExecutionDetail"]:
        """Iterate over this execution and all that it called."""
        yield self
        for child in self.children:
            yield from child.tree()

    def all_reads(self) -> Iterator[ReadEntry]:
        """Iterate over the reads of this execution and of all that it called."""
        for each in self.tree():
            yield from each.reads


@dataclass(frozen=True, slots=True)
class CommitEntry:
    """A commit: who made it, by what request, when, and what it changed.

    Attributes:
        hash: Its hash in the chain, hexadecimal; "" in memory, which has no chain.
        pruned: Whether rows of it were deleted.
        reason: Why it was made: the reason of its versions, or that of the execution that it began; None if there is
            none. Several reasons, which a tool can give, are separated by "; ".
    """

    sequence: int
    session_id: str
    actor: str
    cause: str
    created_at: datetime
    hash: str
    versions: tuple[tuple[str, int], ...] = ()
    events: tuple[str, ...] = ()
    pruned: bool = False
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class SessionEntry:
    """A session, live or ended, with counts of its contents."""

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
    """A variable as of a point, and the change that set it. See `HistoryEntry` for the fields about that change."""

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
    reason: str | None = None

    @classmethod
    def of(cls, entry: HistoryEntry, constraints: str, metadata: Mapping[str, str]) -> Self:
        """Return the state of a variable after a version, with its constraints and its whole metadata then."""
        return cls(
            entry.session_id,
            entry.name,
            entry.variable_id,
            entry.type,
            entry.value,
            entry.version,
            entry.kind,
            entry.source,
            constraints,
            metadata,
            entry.sequence,
            entry.created_at,
            entry.actor,
            entry.cause,
            entry.execution_id,
            entry.tool,
            entry.masked,
            entry.caller_id,
            entry.caller_tool,
            entry.reason,
        )


class DifferenceKind(StrEnum):
    """How a variable differs between two points."""

    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"
    REPLACED = "replaced"
    """Deleted, and another variable was registered under its name."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A variable that differs between two points."""

    name: str
    kind: DifferenceKind
    before: VariableState | None
    after: VariableState | None


@dataclass(frozen=True, slots=True)
class LineageNode:
    """A version, the change that set it, and the versions that it was derived from: the reads of its transaction.

    Each version occurs once. A pruned version has no node and only appears in the `stands_on` of others.

    Attributes:
        depth: 0 for the queried versions; a version of depth n was read for one of depth n - 1.
        entry: The version.
        stands_on: The versions that its transaction had read.
    """

    depth: int
    entry: HistoryEntry
    stands_on: tuple[ReadEntry, ...] = ()


# Queries


class Operator(StrEnum):
    """A comparison."""

    LESS = "<"
    LESS_EQUAL = "<="
    GREATER = ">"
    GREATER_EQUAL = ">="
    EQUAL = "="
    NOT_EQUAL = "!="
    CONTAINS = "contains"


@dataclass(frozen=True, slots=True)
class Predicate:
    """A condition on a value: compares it with a number, or its JSON with a text."""

    operator: Operator
    operand: str

    @property
    def number(self) -> int | float | None:
        """The operand as an exact number; None if it is not a number."""
        return number_in(self.operand)


_INTEGER = re.compile(r"[+-]?[0-9]{1,4300}")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,9})?")
_INFINITIES: Final = {"Infinity": inf, "+Infinity": inf, "-Infinity": -inf}
_MOST_DIGITS: Final = 4300


def number_in(text: str) -> int | float | None:
    """Return the number in a text as values represent it: integers exactly, all others as a double; or None."""
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
    # Larger than any double, but finite: an integer, bounded by the digits that Python converts.
    exact = Decimal(text)
    return int(exact) if exact.adjusted() < _MOST_DIGITS else (1 if number > 0 else -1) * 10**_MOST_DIGITS


MOST_CONDITIONS: Final = 100
"""How many conditions one query may have."""
_LONGEST_TEXT: Final = 10_000
_LONGEST_SOUGHT, _LONGEST_OPERAND = 1_000, 65_536
_PREDICATE = re.compile(r"(<=|>=|!=|<|>|==?|contains\b)\s*(.*)", re.DOTALL)


def parse_predicate(text: str) -> Predicate:
    """Parse a condition such as `< 0.5`, `= "on"` or `contains error`.

    Raises:
        InvalidArgumentError: The text is not a condition.
    """
    match = _PREDICATE.fullmatch(text.strip())
    if match is None or not match[2]:
        reason = f"{quote(text)} is not a condition; write '< 0.5', '= 3' or 'contains text'"
        raise InvalidArgumentError("where", reason)
    operator = Operator("=" if match[1] == "==" else match[1])
    return checked(Predicate(operator, match[2]))


def checked(predicate: Predicate) -> Predicate:
    """Return the predicate if its operand is short enough, and a number if the operator needs one."""
    # SQLite's search for a text takes time in proportion to the product of both lengths.
    most = _LONGEST_SOUGHT if predicate.operator is Operator.CONTAINS else _LONGEST_OPERAND
    check_length("where", predicate.operand, most)
    if predicate.operator.value[0] in "<>" and predicate.number is None:
        reason = f"{predicate.operator} compares with {quote(predicate.operand)}, which is not a number"
        raise InvalidArgumentError("where", reason)
    return predicate


# Points


@dataclass(frozen=True, slots=True)
class Point:
    """A parsed point. At most one of the first three fields is set; if none is, it means the newest commit.

    `before`: it was followed by `^`.
    """

    sequence: int | None = None
    execution_id: str = ""
    at: datetime | None = None
    before: bool = False


PointLike: TypeAlias = str | int | datetime | timedelta
"""What callers can pass as a point: a text, a commit's number, a time, an age."""
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d|w)(?:\s+ago)?")
_UNITS: Final = {"s": 1, "m": 60, "min": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}


def point_text(point: PointLike, option: str = "at") -> str:
    """Return a point as text, in the form that `parse_point` parses."""
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
        f"{quote(point)} is not a point in the history; use a text, a commit's number (int), a time (datetime) or an "
        "age (timedelta)",
    )


def parse_point(point: PointLike, now: datetime, option: str = "at") -> Point:
    """Parse a point.

    Args:
        point: The point. A time without a time zone is local.
        now: The time from which ages count back (aware).
        option: The name of the argument, for errors.

    Raises:
        InvalidArgumentError: It is not a point; the message says what is possible.
    """
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
            f"{quote(text)} is not a point in the history; use a commit's number (1234), an execution's id "
            "(exec_1234_...), a time (2026-03-01T12:00, 2026-03-01T12:00:00Z), an age (30s, 15m, 2h, 7d) or now; "
            "^ after any of them means right before it",
        ) from None


# Lists


@dataclass(frozen=True, slots=True, kw_only=True)
class Query(Generic[T]):
    """The conditions of every query; "" matches everything.

    Attributes:
        session: A session's id, or a glob with `*` and `?`.
        since: A point; only what comes after it.
        until: A point; only what comes up to and including it.
        newest_first: The order of the answers.
        limit: How many answers to return at most; 0 for no limit.
    """

    session: str = ""
    since: PointLike = ""
    until: PointLike = ""
    newest_first: bool = True
    limit: int = 0

    def __post_init__(self) -> None:
        check_texts(self, "session")
        _check_range(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryQuery(Query[HistoryEntry]):
    """Queries versions. `variable` is a name, an id or a glob; all conditions in `where` have to hold."""

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
        check_texts(self, "variable", "type", "actor", "tool", "execution_id")
        _check_metadata(self.metadata)
        _set_member(self, "kind", ChangeKind)
        _set_member(self, "source", Source)
        object.__setattr__(self, "where", predicates_of(self.where))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionQuery(Query[ExecutionSummary]):
    """Queries tool executions, ordered by their begin.

    `metadata` are entries of the request's metadata; `children` includes executions that other executions called.
    """

    tool: str = ""
    status: ExecutionStatus | str | None = None
    actor: str = ""
    idempotency_key: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    children: bool = True

    def __post_init__(self) -> None:
        Query.__post_init__(self)
        check_texts(self, "tool", "actor", "idempotency_key")
        _check_metadata(self.metadata)
        _set_member(self, "status", ExecutionStatus)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitQuery(Query[CommitEntry]):
    """Queries commits."""

    actor: str = ""
    cause: str = ""

    def __post_init__(self) -> None:
        Query.__post_init__(self)
        check_texts(self, "actor", "cause")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionQuery(Query[SessionEntry]):
    """Queries sessions, ordered by their begin. `live`: True for only live, False for only ended ones."""

    live: bool | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Query.__post_init__(self)
        _check_metadata(self.metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenialQuery:
    """Queries denials; "" matches everything. All texts but the points may be globs with `*` and `?`.

    Attributes:
        session: The id of a session.
        identity: A name; `-` matches callers that the server does not know.
        peer: A host.
        rpc: The name of an rpc, with or without that of its service.
        since: A point; only what comes after it. That of a commit or an execution is the time of the commit.
        until: A point; only what comes up to and including it.
        newest_first: The order of the answers.
        limit: How many answers to return at most; 0 for no limit.
    """

    session: str = ""
    identity: str = ""
    peer: str = ""
    rpc: str = ""
    since: PointLike = ""
    until: PointLike = ""
    newest_first: bool = True
    limit: int = 0

    def __post_init__(self) -> None:
        check_texts(self, "session", "identity", "peer", "rpc")
        _check_range(self)


def _check_range(query: Any) -> None:
    for name in ("since", "until"):
        object.__setattr__(query, name, point_text(getattr(query, name), name))
    limit: object = query.limit
    if not isinstance(limit, int) or limit < 0:
        raise InvalidArgumentError("limit", f"{quote(limit)} is not a number of answers; 0 means no limit")


def check_texts(query: object, *names: str) -> None:
    """Refuse fields of a query that are no text, or a longer one than anything that they could match."""
    for name in names:
        if not isinstance(getattr(query, name), str):
            raise InvalidArgumentError(name, f"{quote(getattr(query, name))} is not a str")
        check_length(name, getattr(query, name), _LONGEST_TEXT)


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, Mapping) or not all(
        isinstance(each, str) for pair in metadata.items() for each in pair
    ):
        raise InvalidArgumentError("metadata", "it must be a mapping of str to str, such as {'user': 'ann'}")
    check_conditions("metadata", metadata)


def check_conditions(field: str, conditions: Sized) -> None:
    """Refuse more conditions than make sense, because each is checked for each row."""
    if len(conditions) > MOST_CONDITIONS:
        reason = f"{len(conditions):,} conditions are too many: ask for at most {MOST_CONDITIONS}"
        raise InvalidArgumentError(field, reason)


def check_length(field: str, text: str, most: int) -> None:
    """Refuse a text that is longer than anything it could match."""
    if len(text) > most:
        reason = f"{quote(text)} is too long: it has {len(text):,} characters, and may have {most:,}"
        raise InvalidArgumentError(field, reason)


def _set_member(query: object, name: str, kind: type[StrEnum]) -> None:
    """Convert the field to a member of `kind` if it is a member's value."""
    member = getattr(query, name)
    if member is None or isinstance(member, kind):
        return
    values = [each.value for each in kind]
    if member not in values:
        raise InvalidArgumentError(name, f"there is no {name} {quote(member)}; {suggestion(str(member), values, 10)}")
    object.__setattr__(query, name, kind(member))


def predicates_of(conditions: Predicate | str | Sequence[Predicate | str]) -> tuple[Predicate, ...]:
    """Return conditions as predicates; accepts predicates and texts, and one alone instead of a sequence."""
    if isinstance(conditions, str | Predicate):
        conditions = (conditions,)
    if not isinstance(conditions, Sequence):
        raise InvalidArgumentError("where", f"{quote(conditions)} is not a condition; write '< 0.5'")
    check_conditions("where", conditions)
    return tuple(_predicate(each) for each in conditions)


def _predicate(condition: Predicate | str) -> Predicate:
    if isinstance(condition, Predicate):
        return checked(condition)
    if isinstance(condition, str):
        return parse_predicate(condition)
    raise InvalidArgumentError("where", f"{quote(condition)} is not a condition; write '< 0.5'")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Rows, and the cursor of the next page; None after the last page."""

    rows: Sequence[T]
    after: Cursor | None = None


def is_glob(text: str) -> bool:
    """Whether a text is a pattern, as opposed to a name."""
    return "*" in text or "?" in text


def joined_reasons(reasons: Iterable[str | None]) -> str | None:
    """Return the reason of a commit, given those in it; see `CommitEntry`."""
    return "; ".join(dict.fromkeys(filter(None, reasons))) or None


def suggestion(name: str, names: Sequence[str], most: int = _NAMED) -> str:
    """Return a hint for an unknown name: a similar one, or else the first `most` of the existing ones."""
    similar = did_you_mean(closest(name, names))
    if similar:
        return similar
    listed = [*map(quote, names[:most]), *(["..."] if len(names) > most else [])]
    return f"there are: {', '.join(listed)}" if names else "there are none"


# Sources


class AuditSource(ABC):
    """A history that answers queries, from any thread. Close it when done, for example with a `with` block.

    Its methods raise `NotInHistoryError` for a session, variable or execution that the history does not have, and
    `InvalidArgumentError` for text that is not a point, or a point that is not in the history.

    Attributes:
        reveal: Whether the values of sensitive variables are shown.
    """

    reveal: bool = False

    @abstractmethod
    def head(self) -> int:
        """Return the number of the newest commit."""

    @abstractmethod
    def resolve(self, point: PointLike, option: str = "at", session: str = "") -> int:
        """Return the number of the last commit up to a point; 0 if that is before the first.

        Args:
            point: The point. "" means now.
            option: The name of the argument, for errors.
            session: Resolve times by the commits of this session. Without it, imported commits count as of their
                import.
        """

    @abstractmethod
    def page(self, query: Query[T], after: Cursor | None = None, most: int = PAGE) -> Page[T]:
        """Return at most `most` answers, starting after the cursor `after`."""

    @abstractmethod
    def execution(self, execution_id: str) -> ExecutionDetail:
        """Return one execution in full."""

    @abstractmethod
    def state(self, session: str, at: PointLike = "") -> tuple[VariableState, ...]:
        """Return the variables of a session as of a point, oldest first; "" means now."""

    @abstractmethod
    def version(self, session: str, variable_id: str, version: int) -> HistoryEntry:
        """Return one version of a variable.

        Raises:
            VersionNotFoundError: The variable has no such version.
            VersionPrunedError: The version was pruned.
        """

    def denials(self, query: DenialQuery | None = None) -> tuple[Denial, ...]:
        """Return the calls that a server refused because of who made them; without a query, all that are kept.

        A source that no server writes to has none.
        """
        return ()

    @abstractmethod
    def close(self) -> None:
        """Close the source."""

    def iterate(self, query: Query[T]) -> Iterator[T]:
        """Iterate over all answers, which are read page by page on demand."""
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
        """Return the variables that differ between two points, sorted by name.

        Args:
            session: The session's id.
            start: The first point. If the session had not begun by then, all variables count as added.
            end: The second point; "" means now.
        """
        after = {variable.name: variable for variable in self._state("to", session, end)}
        had_begun = self.resolve(start, "from", session) >= self._began(session)
        before = {variable.name: variable for variable in self._state("from", session, start)} if had_begun else {}
        names = sorted(before.keys() | after.keys())
        differences = (_difference(name, before.get(name), after.get(name)) for name in names)
        return tuple(each for each in differences if each is not None)

    def _began(self, session: str) -> int:
        """Return the commit that began the first session with this id; 0 if there is none."""
        # Compared again, because the id may look like a pattern.
        sessions = self.iterate(SessionQuery(session=session, newest_first=False))
        return next((each.started_sequence for each in sessions if each.session_id == session), 0)

    def _state(self, option: str, session: str, point: PointLike) -> tuple[VariableState, ...]:
        """Return the state at a point; errors name the argument `option`."""
        try:
            return self.state(session, point)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(option, error.reason) from error

    def blame(self, session: str, variable: str = "", at: PointLike = "", depth: int = 1) -> tuple[LineageNode, ...]:
        """Return which changes set the values at a point, and which versions they were derived from.

        Args:
            session: The session's id.
            variable: A variable's name or id; "" for all variables.
            at: The point; "" means now.
            depth: How many steps to follow the reads back, at most 100.
        """
        variables = self.state(session, at)
        if variable:
            names = [each.name for each in variables]
            variables = tuple(each for each in variables if variable in (each.name, each.variable_id))
            if not variables:
                hint = f"session {quote(session)} did not have it then; {suggestion(variable, names)}"
                raise NotInHistoryError("variable", variable, hint)
        return tuple(self._lineage(variables, min(depth, _DEEPEST)))

    def _lineage(self, variables: Sequence[VariableState], depth: int) -> Iterator[LineageNode]:
        queue = deque((0, each.variable_id, each.version) for each in variables)
        session = variables[0].session_id if variables else ""
        seen = {(variable_id, version) for _, variable_id, version in queue}
        executions: dict[str, ExecutionDetail] = {}
        while queue and len(seen) < _MOST_NODES:
            level, variable_id, version = queue.popleft()
            try:
                entry = self.version(session, variable_id, version)
            except (VersionNotFoundError, VersionPrunedError):
                continue  # Pruned; the versions derived from it still name it.
            reads = self._reads_behind(entry, executions)
            yield LineageNode(level, entry, reads)
            for read in reads if level < depth else ():
                node = (read.variable_id, read.version)
                if read.variable_id is not None and read.version is not None and node not in seen:
                    seen.add((read.variable_id, read.version))
                    queue.append((level + 1, read.variable_id, read.version))

    def _reads_behind(self, entry: HistoryEntry, executions: dict[str, ExecutionDetail]) -> tuple[ReadEntry, ...]:
        """Return the versions that the transaction that wrote a version had read.

        This includes the reads of all its executions, because one may pass a value that it read to another.
        """
        if entry.execution_id is None:
            return ()
        execution_id: str | None = entry.execution_id
        while execution_id is not None:
            if execution_id not in executions:
                try:
                    executions[execution_id] = self.execution(execution_id)
                except NotInHistoryError:
                    # The rules of the session may hide it.
                    return ()
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
