"""The report of a session: one self-contained HTML page to read, print or mail.

    from dspex_persist.audit.report import gather, render

    with dspex_persist.open_audit("sessions.db") as audit:
        Path("report.html").write_text(render(gather(audit, "checkout-42")), encoding="utf-8")

It contains no scripts and allows none. Its size is bounded, and it says what it leaves out.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice
from typing import Final, TypeVar

from dspex_persist import clock
from dspex_persist.audit.comparing import Piece, compare_words
from dspex_persist.audit.drawing import clip, render_template, value_text
from dspex_persist.audit.pictures import MOST_MARKS, Chart, Graph, Timeline, chart, lineage, number_of, timeline
from dspex_persist.state.audit import (
    AuditSource,
    CommitEntry,
    CommitQuery,
    ExecutionDetail,
    ExecutionQuery,
    ExecutionSummary,
    HistoryEntry,
    HistoryQuery,
    LineageNode,
    Query,
    SessionEntry,
    SessionQuery,
    VariableState,
)
from dspex_persist.state.errors import (
    InvalidArgumentError,
    NotInHistoryError,
    UnsupportedError,
    VersionPrunedError,
    quote,
)
from dspex_persist.state.lm_calls import LmCall, LmUsage, LmUsageQuery, UsageBy, lm_calls_of
from dspex_persist.state.model import Value
from dspex_persist.state.values import is_number

R = TypeVar("R", SessionEntry, CommitEntry, ExecutionSummary, HistoryEntry)

_DEPTH: Final = 2
_LARGE_BYTES: Final = 10_000


@dataclass(frozen=True, slots=True)
class Bounds:
    """The largest number of each item in a report, which shows the newest. `charted`: versions read for charts."""

    executions: int = 300
    versions: int = 5_000
    versions_of_one: int = 30
    variables: int = 150
    charts: int = 24
    in_lineage: int = 14
    charted: int = 200_000
    lm_calls: int = 100


@dataclass(frozen=True, slots=True)
class VariableRow:
    """A variable in a report.

    Attributes:
        state: Its state at the end, or None if it was deleted before that.
        first: Its state at the beginning.
        versions: Its newest versions, newest first.
        hidden: How many older versions are left out.
        pieces: The difference between first and last value, empty if they cannot be compared as text.
        changes: How often it changed.
    """

    name: str
    type: str
    state: VariableState | None
    first: HistoryEntry | VariableState | None
    versions: tuple[HistoryEntry, ...]
    hidden: int
    change: str
    pieces: tuple[Piece, ...]
    changes: int
    has_numbers: bool
    chart: Chart | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """The contents of the page. `usage`: by tool and model; `lm_calls`: by execution."""

    session: SessionEntry
    since: CommitEntry | None
    until: CommitEntry | None
    made_at: datetime
    statuses: tuple[tuple[str, int], ...]
    executions: tuple[ExecutionDetail, ...]
    timeline: Timeline | None
    variables: tuple[VariableRow, ...]
    charts: tuple[VariableRow, ...]
    lineage: Graph | None
    left_out: tuple[str, ...]
    reveal: bool
    usage: tuple[LmUsage, ...] = ()
    lm_calls: Mapping[str, tuple[LmCall, ...]] = field(default_factory=dict)


def gather(source: AuditSource, session: str, since: str = "", until: str = "", bounds: Bounds | None = None) -> Report:
    """Collect the contents of a session's report.

    Args:
        source: The history.
        session: The id of the session. If several had it, the newest that had begun before `until`.
        since: A point: report what was committed after it.
        until: A point: report what was committed up to and including it.
        bounds: The largest number of each item.

    Raises:
        NotInHistoryError: There never was such a session.
        InvalidArgumentError: A point is invalid, or nothing of the session lies between the points.
    """
    return _Gathering(source, bounds or Bounds()).report(session, since, until)


def render(report: Report) -> str:
    """Return the page as HTML."""
    return render_template("report.html", report=report)


class _Gathering:
    def __init__(self, source: AuditSource, bounds: Bounds) -> None:
        self._source = source
        self._bounds = bounds
        self._left_out: list[str] = []
        self._rows: dict[str, VariableRow] = {}

    def report(self, session_id: str, since: str, until: str) -> Report:
        session, first, last = self._period(session_id, since, until)
        executions = self._executions(session_id, first, last)
        lm_calls = self._lm_calls(executions)
        variables = self._variables(session, first, last)
        shown = [execution.summary for execution in executions]
        return Report(
            session,
            self._first_commit(session_id, first),
            self._last_commit(session_id, last),
            clock.now(),
            tuple(Counter(summary.status.value for summary in shown).most_common()),
            executions,
            timeline(shown) if shown else None,
            variables,
            self._charts(session, first, last),
            self._lineage(session, last, variables),
            tuple(self._left_out),
            self._source.reveal,
            self._usage(session_id, first, last),
            lm_calls,
        )

    def _period(self, session_id: str, since: str, until: str) -> tuple[SessionEntry, int, int]:
        """Return the session and the range of its report: after the first commit, up to and including the last."""
        last = self._source.resolve(until, "until", session_id) if until else self._source.head()
        first = self._source.resolve(since, "since", session_id) if since else 0
        lives = list(self._own(SessionQuery(session=session_id), session_id))
        if not lives:
            raise NotInHistoryError("session", session_id, "a report is about one session, named by its whole id")
        session = next((entry for entry in lives if entry.started_sequence <= last), None)
        if session is None:
            raise InvalidArgumentError("until", f"session {quote(session_id)} had not begun by then")
        if session.ended_sequence is not None:
            last = min(last, session.ended_sequence)
        first = max(first, session.started_sequence - 1)
        if first >= last:
            raise InvalidArgumentError("since", f"session {quote(session_id)} has no commits after it")
        return session, first, last

    def _own(self, query: Query[R], session_id: str) -> Iterator[R]:
        """Yield the answers about this session only, as its id may be a pattern that matches others, too."""
        return (row for row in self._source.iterate(query) if row.session_id == session_id)

    def _first_commit(self, session_id: str, after: int) -> CommitEntry | None:
        query = CommitQuery(session=session_id, since=str(after), newest_first=False)
        return next(self._own(query, session_id), None)

    def _last_commit(self, session_id: str, at: int) -> CommitEntry | None:
        return next(self._own(CommitQuery(session=session_id, until=str(at)), session_id), None)

    def _note(self, total: int, most: int, what: str, which: str = "") -> None:
        if total > most:
            self._left_out.append(f"{most:,} of {total:,} {what} {which}".rstrip())

    # Executions

    def _executions(self, session_id: str, first: int, last: int) -> tuple[ExecutionDetail, ...]:
        """Return the executions in the order in which they began, each before those that it called."""
        most = self._bounds.executions
        query = ExecutionQuery(session=session_id, children=False, since=str(first), until=str(last))
        summaries = list(islice(self._own(query, session_id), most + 1))
        if len(summaries) > most:
            self._left_out.append(f"only the newest {most:,} executions are shown")
        families = [self._source.execution(summary.execution_id) for summary in reversed(summaries[:most])]
        executions = [each for family in families for each in _with_children(family)]
        # Tools may call many more executions than clients do.
        self._note(len(executions), 2 * most, "executions", "are shown, including those that others called")
        return tuple(executions[-2 * most :])

    # LM calls

    def _usage(self, session_id: str, first: int, last: int) -> tuple[LmUsage, ...]:
        by = (UsageBy.SESSION, UsageBy.TOOL, UsageBy.MODEL)
        query = LmUsageQuery(session=session_id, by=by, since=str(first), until=str(last))
        try:
            return tuple(usage for usage in self._source.iterate(query) if usage.session_id == session_id)
        except UnsupportedError as error:
            # An older server.
            self._left_out.append(f"the sums of LM calls are missing: {error}")
            return ()

    def _lm_calls(self, executions: Sequence[ExecutionDetail]) -> dict[str, tuple[LmCall, ...]]:
        """Return the newest LM calls by execution."""
        shown: dict[str, tuple[LmCall, ...]] = {}
        total, left = 0, self._bounds.lm_calls
        for execution in reversed(executions):
            calls = lm_calls_of(execution)
            total += len(calls)
            if calls and left:
                shown[execution.summary.execution_id] = calls[-left:]
                left -= len(calls[-left:])
        self._note(total, self._bounds.lm_calls, "LM calls", "are shown in full: the newest")
        return shown

    # Variables

    def _variables(self, session: SessionEntry, first: int, last: int) -> tuple[VariableRow, ...]:
        """Return the variables that existed at the end, then those that were deleted before."""
        most = self._bounds.versions
        query = HistoryQuery(session=session.session_id, since=str(first), until=str(last))
        history = [_light(entry) for entry in islice(self._own(query, session.session_id), most + 1)]
        if len(history) > most:
            # Whole commits only, so that the report begins with a state that existed.
            first = history[most].sequence
            history = [entry for entry in history if entry.sequence > first]
            self._left_out.append(f"only the newest {len(history):,} versions of variables are shown")
        versions: dict[str, list[HistoryEntry]] = {}
        for entry in history:
            versions.setdefault(entry.variable_id, []).append(entry)
        before = {state.variable_id: state for state in self._beginning(session, first)}
        after = {state.variable_id: state for state in self._state(session, last)}
        gone = [variable_id for variable_id in (*before, *versions) if variable_id not in after]
        order = [*sorted(after, key=lambda each: after[each].name), *dict.fromkeys(gone)]
        self._note(len(order), self._bounds.variables, "variables", "are shown")
        self._rows = {each: self._row(versions.get(each, []), before.get(each), after.get(each)) for each in order}
        return tuple(self._rows[each] for each in order[: self._bounds.variables])

    def _charts(self, session: SessionEntry, first: int, last: int) -> tuple[VariableRow, ...]:
        """Return the numeric variables that changed most often, each with all of its versions."""
        changes = {each: row.changes for each, row in self._rows.items() if row.has_numbers}
        most_changed = sorted(changes, key=lambda each: (-changes[each], self._rows[each].name))
        self._note(len(most_changed), self._bounds.charts, "numeric variables", "have a chart: those that changed most")
        charted: list[VariableRow] = []
        left = self._bounds.charted
        for variable_id in most_changed[: self._bounds.charts]:
            row = self._rows[variable_id]
            query = HistoryQuery(
                session=session.session_id,
                variable=variable_id,
                since=str(first),
                until=str(last),
                limit=max(left, MOST_MARKS),
            )
            versions = (entry for entry in self._own(query, session.session_id) if entry.variable_id == variable_id)
            picture = chart(versions, newest_first=True)
            if picture is not None:
                left -= picture.versions
                self._note(row.changes, picture.versions, f"versions of {row.name} are on its chart: the newest")
                charted.append(replace(row, chart=picture))
        return tuple(charted)

    def _beginning(self, session: SessionEntry, at: int) -> tuple[VariableState, ...]:
        try:
            return self._state(session, at)
        except VersionPrunedError as error:
            self._left_out.append(f"the state at the beginning is missing: {error}")
            return ()

    def _state(self, session: SessionEntry, at: int) -> tuple[VariableState, ...]:
        if at < session.started_sequence:
            return ()
        if at == session.ended_sequence:
            at -= 1
        return self._source.state(session.session_id, str(at))

    def _row(
        self, versions: Sequence[HistoryEntry], before: VariableState | None, after: VariableState | None
    ) -> VariableRow:
        known: HistoryEntry | VariableState | None = after or before or (versions[0] if versions else None)
        assert known is not None, "a variable has a state or versions"
        first: HistoryEntry | VariableState | None = before or (versions[-1] if versions else None)
        most = self._bounds.versions_of_one
        numbers = (number_of(entry) for entry in versions)
        newest = known.version if after is not None else max((entry.version for entry in versions), default=0)
        return VariableRow(
            known.name,
            known.type,
            after,
            first,
            tuple(versions[:most]),
            max(len(versions) - most, 0),
            _change(before, first, after),
            tuple(_compared(first, after)),
            newest - (before.version if before is not None else 0),
            any(number is not None for number in numbers) or is_number(known.type),
        )

    # Lineage

    def _lineage(self, session: SessionEntry, last: int, rows: Sequence[VariableRow]) -> Graph | None:
        written = [row.state for row in rows if row.state is not None and row.state.execution_id is not None]
        written.sort(key=lambda state: -state.sequence)
        most = self._bounds.in_lineage
        self._note(len(written), most, "variables", "that tools wrote are in the lineage")
        nodes: dict[tuple[str, int], LineageNode] = {}
        at = str(last - 1 if last == session.ended_sequence else last)
        for state in written[:most]:
            for node in self._source.blame(session.session_id, state.variable_id, at, _DEPTH):
                key = (node.entry.variable_id, node.entry.version)
                if key not in nodes or node.depth < nodes[key].depth:
                    nodes[key] = node
        return lineage(nodes.values()) if nodes else None


def _light(entry: HistoryEntry) -> HistoryEntry:
    """Return the entry with a large value cut, as thousands of entries are in memory at once."""
    if entry.value is None or entry.value.size_bytes <= _LARGE_BYTES:
        return entry
    text = f"{entry.value.json[:_LARGE_BYTES]}… (of {entry.value.size_bytes:,} bytes)"
    return replace(entry, value=Value(json.dumps(text)))


def _with_children(execution: ExecutionDetail) -> Iterator[ExecutionDetail]:
    yield execution
    for child in execution.children:
        yield from _with_children(child)


def _change(
    before: VariableState | None, first: HistoryEntry | VariableState | None, after: VariableState | None
) -> str:
    if after is None:
        return "deleted"
    if before is None:
        return "added" if first is None or first.version == after.version else "added, then changed"
    return "" if before.version == after.version else "changed"


def _compared(before: HistoryEntry | VariableState | None, after: VariableState | None) -> Iterable[Piece]:
    if before is None or after is None or before.masked or after.masked or before.value == after.value:
        return ()
    return compare_words(clip(value_text(before.value), _LARGE_BYTES), clip(value_text(after.value), _LARGE_BYTES))
