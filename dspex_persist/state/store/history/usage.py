"""Sum recorded LM calls. Their counts are in a table of their own, so that no journal entry is read for it."""

from typing import Final

from sqlalchemy import Connection

from dspex_persist.state.audit import is_glob
from dspex_persist.state.lm_calls import LmUsage, LmUsageQuery, UsageBy
from dspex_persist.state.store.history.points import of_session
from dspex_persist.state.store.history.rows import Bounds, Conditions, all_rows, glob_pattern, of_tool

_FIELDS: Final = {
    UsageBy.SESSION: ("session_id", "sessions.session_id"),
    UsageBy.TOOL: ("tool", "executions.tool"),
    UsageBy.MODEL: ("model", "lm_calls.model"),
    UsageBy.DAY: ("day", "strftime('%Y-%m-%d', lm_calls.at / 1000000, 'unixepoch')"),
}
# As doubles where an import may have brought counts whose sum exceeds 64 bits.
_SUMS: Final = {
    "executions": "count(DISTINCT lm_calls.began_sequence)",
    "calls": "count(*)",
    "failed": "sum(lm_calls.failed)",
    "cached": "CAST(total(lm_calls.cached) AS INTEGER)",
    "input_tokens": "CAST(total(lm_calls.input_tokens) AS INTEGER)",
    "output_tokens": "CAST(total(lm_calls.output_tokens) AS INTEGER)",
    "total_tokens": "CAST(total(lm_calls.total_tokens) AS INTEGER)",
    "cost": "sum(lm_calls.cost)",
    "priced": "count(lm_calls.cost)",
    "latency_us": "CAST(total(lm_calls.latency_us) AS INTEGER)",
}
_TABLES: Final = """
    FROM lm_calls JOIN executions ON executions.began_sequence = lm_calls.began_sequence
    JOIN sessions ON sessions.session_key = executions.session_key
"""


def usage_of(connection: Connection, query: LmUsageQuery, bounds: Bounds) -> list[LmUsage]:
    """Return all sums that a query asks for, in its order."""
    conditions = Conditions()
    of_session(connection, conditions, query.session, "executions.session_key")
    of_tool(conditions, query.tool)
    if is_glob(query.model):
        conditions.add("lm_calls.model GLOB ?", glob_pattern(query.model))
    else:
        conditions.add_equal("lm_calls.model", query.model)
    # With a session, not by the index of these: the session has few calls, and they may exclude none.
    sequence = "+lm_calls.sequence" if query.session else "lm_calls.sequence"
    conditions.add(f"{sequence} > ? AND {sequence} <= ?", *bounds)
    groups = [_FIELDS[UsageBy(each)] for each in query.by]
    columns = [f"{expression} AS {name}" for name, expression in (*groups, *_SUMS.items())]
    statement = f"SELECT {', '.join(columns)} {_TABLES}{conditions}"
    statement += f" GROUP BY {', '.join(name for name, _ in groups)}" if groups else ""
    rows = all_rows(connection, f"{statement} ORDER BY {_order(query)}", *conditions.parameters)
    # Without groups, the sum of nothing is a row, too.
    return [LmUsage(**row._mapping) for row in rows if row.calls]


def _order(query: LmUsageQuery) -> str:
    names = [_FIELDS[UsageBy(each)][0] for each in query.by]
    days = [f"day {'DESC NULLS LAST' if query.newest_first else 'NULLS FIRST'}"] if UsageBy.DAY in query.by else []
    return ", ".join((*days, "cost DESC NULLS LAST", "total_tokens DESC", "calls DESC", *names))
