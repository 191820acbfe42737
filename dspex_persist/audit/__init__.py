"""Ask a history: who changed this variable, when, in which tool call, standing on what.

    import dspex_persist
    from dspex_persist.audit import HistoryQuery

    with dspex_persist.open_audit("sessions.db") as audit:
        for entry in audit.iterate(HistoryQuery(session="s1", variable="temperature", limit=10)):
            print(entry.version, entry.value, entry.tool or entry.actor)

`open_audit` takes what `connect` takes, and opens a file to read it only: beside a running server, or a backup. A
provider that is open already has `provider.audit()`, if it is `Auditable` (`dspex_persist.state.abilities`).
"""

from dspex_persist.audit.documents import document, value_of
from dspex_persist.state.audit import (
    AuditSource,
    CommitEntry,
    CommitQuery,
    Difference,
    DifferenceKind,
    ExecutionDetail,
    ExecutionQuery,
    ExecutionSummary,
    HistoryEntry,
    HistoryQuery,
    LineageNode,
    Operator,
    Page,
    Predicate,
    Query,
    ReadEntry,
    SessionEntry,
    SessionQuery,
    VariableState,
    parse_predicate,
)
from dspex_persist.state.model import ChangeKind, ExecutionStatus, Source

__all__ = [
    "AuditSource",
    "ChangeKind",
    "CommitEntry",
    "CommitQuery",
    "Difference",
    "DifferenceKind",
    "ExecutionDetail",
    "ExecutionQuery",
    "ExecutionStatus",
    "ExecutionSummary",
    "HistoryEntry",
    "HistoryQuery",
    "LineageNode",
    "Operator",
    "Page",
    "Predicate",
    "Query",
    "ReadEntry",
    "SessionEntry",
    "SessionQuery",
    "Source",
    "VariableState",
    "document",
    "parse_predicate",
    "value_of",
]
