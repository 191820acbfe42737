"""The descriptions of the views on the site, and its ready-made queries."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dspex_persist.state.store.history import views

DATABASE: Final = "history"
"""The name of the database in the site's URLs, whatever the file is called."""


@dataclass(frozen=True, slots=True)
class View:
    """A stable view, with the meaning of each column."""

    title: str
    description: str
    columns: Mapping[str, str]
    facets: tuple[str, ...] = ()
    newest_by: str = ""


_VERSION: Final = {
    "session_id": "the session's id, which its client chose",
    "name": "the variable's name",
    "variable_id": "the variable's id; registering a deleted name again creates a new one",
    "type": "the variable's type, such as float or string",
    "version": "0 at registration, one more for each change",
    "kind": "registered, set, rolled_back, deleted, lock_broken or published",
    "source": "the side that wrote it, as the writer declared: python or elixir",
    "value": "the value as JSON; NULL for a deletion and for a sensitive variable",
    "number": "the value as a number, if it is one",
    "binary_size_bytes": "the size of the value's binary content in bytes, or NULL",
    "sensitive": "1 if the variable's metadata says sensitive = true, else 0",
}
_COMMIT: Final = {
    "sequence": "the number of the commit",
    "created_at": "the time of the commit, UTC, ISO 8601 with microseconds",
    "actor": "who wrote it",
    "cause": "the rpc, or the id of the tool execution, whose commit it is",
    "execution_id": "the tool execution that wrote it, NULL if a client did",
    "tool": "that execution's tool",
    "caller_id": "the execution that called it, NULL if a client did",
    "caller_tool": "that execution's tool",
    "reason": "why it was written, NULL if its writer gave no reason",
}
_EXECUTION: Final = {
    "session_id": "the session's id",
    "execution_id": "the execution's id",
    "tool": "the tool's name",
}

_METADATA: Final = (
    "the metadata of this version, a JSON object or NULL; after a restore, `metadata ->> '$.\"dspex.metadata\"'` is "
    "the variable's whole metadata from then on"
)

VIEWS: Final[Mapping[str, View]] = {
    "v_variable_history": View(
        "Versions of variables",
        "Every version of every variable, and who wrote it.",
        _VERSION | {"metadata": _METADATA} | _COMMIT,
        ("session_id", "name", "tool", "kind", "actor"),
        "sequence",
    ),
    "v_current_variables": View(
        "Current variables",
        "The current values of the variables of live sessions.",
        _VERSION
        | {
            "constraints": "its constraints, a JSON object; empty if it has none",
            "metadata": "the variable's metadata, a JSON object",
        }
        | _COMMIT,
        ("session_id", "type", "tool"),
        "sequence",
    ),
    "v_executions": View(
        "Executions of tools",
        "The journal: which tools ran, with which arguments, and how they ended.",
        _EXECUTION
        | {
            "status": "running, committed, failed, conflict, timed_out, cancelled, interrupted or aborted",
            "attempt": "1, or more for a retry after a conflict",
            "parent_id": "the execution that called it, NULL if a client did",
            "idempotency_key": "the client's idempotency key, or NULL",
            "isolation": "serializable or snapshot",
            "worker_id": "the worker that ran it, empty for the server itself",
            "actor": "who had it executed",
            "began_sequence": "the commit with which it began",
            "began_at": "when it began, UTC",
            "ended_sequence": "the commit with which it ended, NULL while it runs",
            "ended_at": "when it ended, UTC",
            "duration_us": "how long its code took, in microseconds",
            "parameters": "its arguments, a JSON object of values, each with its json and, for bytes, binary (base64)",
            "metadata": "the request's metadata, a JSON object",
            "result": "its result, as JSON",
            "error_type": "the type of the error that its code raised",
            "error": "that error's message, or the reason for its end if there was no error",
            "retried_by": "after a conflict: the execution that retried it, or NULL",
            "ended_as": "the status of the last attempt of the same request: after a conflict that was retried "
            "with success, committed",
        },
        ("session_id", "tool", "status", "actor"),
        "began_sequence",
    ),
    "v_execution_reads": View(
        "What executions read",
        "The versions that each execution read.",
        _EXECUTION
        | {
            "asked": "the name or id that it looked up",
            "name": "the variable's name, NULL if there was none",
            "variable_id": "the variable's id",
            "version": "the version that it read",
        },
        ("session_id", "tool", "name"),
    ),
    "v_execution_writes": View(
        "What executions wrote",
        "The versions that each execution wrote.",
        _EXECUTION
        | {
            "name": "the variable's name",
            "version": "the version that it wrote",
            "published": "1 if it was written ahead of the execution's end, else 0",
        },
        ("session_id", "tool", "name"),
    ),
    "v_commits": View(
        "Commits",
        "Every acknowledged commit, in order, with its hash in the chain.",
        {
            "sequence": "the commit's number, without gaps",
            "session_id": "the session's id",
            "actor": "who made it",
            "cause": "the rpc, or the id of the tool execution, that made it",
            "created_at": "when, UTC",
            "hash": "SHA-256 over the commit before and this one's rows, hexadecimal",
            "versions": "how many versions it has",
            "events": "the kinds of its events, a JSON array",
            "pruned": "1 if rows of it were pruned, else 0",
        },
        ("session_id", "actor"),
        "sequence",
    ),
    "v_lm_calls": View(
        "LM calls",
        "The recorded calls of language models: what they were asked, what they answered, what that cost.",
        _EXECUTION
        | {
            "ordinal": "its number in the execution, from 0",
            "model": "the model's name",
            "predictor": "the path of the predictor that made it, or NULL",
            "began_at": "when it began, UTC; for a recording without times, when the execution ended",
            "latency_us": "how long it took, in microseconds, or NULL",
            "input_tokens": "tokens of the request",
            "output_tokens": "tokens of the answer",
            "total_tokens": "both, and what the model counts besides; 0 where nothing was counted",
            "cost": "in USD, 0 from a cache; NULL if nobody says it",
            "cached": "1 if a cache answered it, else 0; NULL if unknown",
            "concurrent": "1 if it came from another thread or task than the tool's own, else 0",
            "error_type": "the type of the error that the LM raised, NULL if it answered",
            "error": "the message of that error",
            "variables": "the variables that it used, a JSON object of their versions, or NULL",
            "options": "the options that affect the answer, a JSON object",
            "messages": "what the model was asked, a JSON array",
            "answer": "what it answered, a JSON array of the outputs; an object for a typed answer",
            "hash": "SHA-256 of model and request, hexadecimal",
            "masked": "1 if the session has sensitive variables, so that the texts are NULL, else 0",
            "sequence": "the commit with which the execution ended",
        },
        ("session_id", "tool", "model", "predictor", "error_type"),
        "sequence",
    ),
    "v_lm_usage": View(
        "LM usage",
        "The sums of LM calls by session, tool, model and day, also of failed calls.",
        {
            "session_id": "the session's id",
            "tool": "the tool whose executions made the calls",
            "model": "the model's name",
            "day": "the day on which the calls began, UTC: 2026-03-01",
            "calls": "how many calls there were",
            "failed": "how many of them failed",
            "cached": "how many of them a cache answered",
            "input_tokens": "tokens of the requests",
            "output_tokens": "tokens of the answers",
            "total_tokens": "both, and what models count besides",
            "cost": "in USD; NULL if no cost is known of any call",
            "priced": "of how many calls the cost is known",
            "latency_us": "how long the calls took together, in microseconds",
        },
        ("session_id", "tool", "model", "day"),
        "day",
    ),
    "v_denials": View(
        "Refused calls",
        "Calls that the server refused because of who made them: those of a minute that differ in nothing else.",
        {
            "at": "the time of the first of them, UTC, ISO 8601 with microseconds",
            "last_at": "the time of the last of them",
            "identity": "who made them; empty if the server does not know",
            "peer": "the host that they came from, without the port: `ipv4:10.0.0.7`, `unix`",
            "rpc": "the full name of the rpc",
            "session_id": "the session that they were about; empty if that was not looked at",
            "missing": "what the caller lacked",
            "count": "how many there were",
        },
        ("identity", "peer", "rpc", "missing"),
        "at",
    ),
    "v_rules": View(
        "Rules",
        "The rules of live sessions: what holds between their variables after every commit.",
        {
            "session_id": "the session's id",
            "name": "the rule's name",
            "expression": "its expression, which holds after every commit",
            "description": "what it is for",
            "added_sequence": "the commit that added it, or replaced another one of its name",
        },
        ("session_id",),
        "added_sequence",
    ),
}

ADDED: Final[Mapping[str, Mapping[str, str]]] = {
    "v_commits": {"reason": "why it was made, NULL if nobody gave a reason"},
}
"""The columns that only the site's views have."""

QUERIES: Final[Mapping[str, Mapping[str, Any]]] = {
    "who_changed": {
        "title": "Who changed this variable?",
        "description": "Its versions, newest first, each with its writer.",
    },
    "went_wrong": {
        "title": "Which executions failed?",
        "description": "Failed, in conflict, timed out, cancelled or interrupted, and whether a retry succeeded. "
        "Leave the session empty for all.",
    },
    "read_and_wrote": {
        "title": "What did this execution read and write?",
        "description": "The versions that it read, and those that it wrote.",
    },
    "state_as_of": {
        "title": "What was the state as of a time?",
        "description": "The variables as of a time such as 2026-03-01T12:00:00Z.",
    },
    "stood_on": {
        "title": "Which executions read this variable?",
        "description": "Newest first, with how they ended.",
    },
    "slowest_tools": {
        "title": "Which tools are the slowest?",
        "description": "The durations of the executions of each tool, in milliseconds.",
    },
    "lm_costs": {
        "title": "What do models cost?",
        "description": "LM calls, tokens and cost in USD by day, session, tool and model. Leave the session empty for "
        "all.",
    },
    "failed_lm_calls": {
        "title": "Which LM calls failed?",
        "description": "Newest first, with the error. Leave the session empty for all.",
    },
    "most_conflicts": {
        "title": "Where are the most conflicts?",
        "description": "Executions that conflicted with others, by session and tool.",
    },
}


def _described(name: str, view: View) -> dict[str, Any]:
    described = {
        "title": view.title,
        "description": view.description,
        "columns": {**view.columns, **ADDED.get(name, {})},
        "facets": list(view.facets),
    }
    return described | ({"sort_desc": view.newest_by} if view.newest_by else {})


def _with_sql(name: str, query: Mapping[str, Any]) -> dict[str, Any]:
    return {**query, "sql": views.QUESTIONS[name], "hide_sql": True}


METADATA: Final = {
    "title": "dspex-persist: history",
    "databases": {
        DATABASE: {
            "title": "The history as tables",
            "description": "Stable views, independent of the tables behind them.",
            "tables": {name: _described(name, view) for name, view in VIEWS.items()},
            "queries": {name: _with_sql(name, query) for name, query in QUERIES.items()},
        }
    },
}
