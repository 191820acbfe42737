"""Query a history: who changed this variable, when, in which tool call, and from which inputs.

    import dspex_persist
    from dspex_persist.audit import HistoryQuery

    with dspex_persist.open_audit("sessions.db") as audit:
        for entry in audit.iterate(HistoryQuery(session="s1", variable="temperature", limit=10)):
            print(entry.version, entry.value, entry.tool or entry.actor)

`open_audit` takes the addresses that `connect` takes, except `memory:`. It only reads a file, so it works alongside a
running server, and on a backup. An open provider has `provider.audit()`, if it is `Auditable`
(`dspex_persist.state.abilities`), as files, servers and sessions in memory are; a context has `ctx.audit()`. `verify`
checks that a history has not been altered.
"""

from dspex_persist.audit.comparing import (
    CallComparison,
    PartComparison,
    Row,
    VersionComparison,
    compare_calls,
    compare_versions,
)
from dspex_persist.audit.documents import cost_text, document, value_of
from dspex_persist.audit.heads import KeptHead, Verification, verify
from dspex_persist.state.audit import (
    AuditSource,
    CommitEntry,
    CommitQuery,
    DenialQuery,
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
from dspex_persist.state.denials import Denial
from dspex_persist.state.lm_calls import LmCall, LmMessage, LmUsage, LmUsageQuery, UsageBy, lm_calls_of
from dspex_persist.state.model import ChangeKind, ExecutionStatus, Source

__all__ = [
    "AuditSource",
    "CallComparison",
    "ChangeKind",
    "CommitEntry",
    "CommitQuery",
    "Denial",
    "DenialQuery",
    "Difference",
    "DifferenceKind",
    "ExecutionDetail",
    "ExecutionQuery",
    "ExecutionStatus",
    "ExecutionSummary",
    "HistoryEntry",
    "HistoryQuery",
    "KeptHead",
    "LineageNode",
    "LmCall",
    "LmMessage",
    "LmUsage",
    "LmUsageQuery",
    "Operator",
    "Page",
    "PartComparison",
    "Predicate",
    "Query",
    "ReadEntry",
    "Row",
    "SessionEntry",
    "SessionQuery",
    "Source",
    "UsageBy",
    "VariableState",
    "Verification",
    "VersionComparison",
    "compare_calls",
    "compare_versions",
    "cost_text",
    "document",
    "lm_calls_of",
    "parse_predicate",
    "value_of",
    "verify",
]
