"""Answer queries for commits and sessions."""

import json
from typing import Any, Final

from sqlalchemy import Connection

from dspex_persist.clock import nearest_time
from dspex_persist.state.audit import CommitEntry, CommitQuery, Cursor, Page, SessionEntry, SessionQuery, joined_reasons
from dspex_persist.state.model import REASON
from dspex_persist.state.store.history.points import LAST_VERSION, of_session
from dspex_persist.state.store.history.rows import Bounds, Conditions, page_of, rows_of_page, sound_document
from dspex_persist.state.values.json_text import stored, stored_texts

# Each reason once, in the order of the versions; as JSON, because `->>` would cut it at its first NUL.
_REASONS: Final = f"""
    SELECT json_group_array(reason) FROM (
        SELECT reason FROM (SELECT reason, row_number() OVER (ORDER BY variable_key, version) AS place FROM (
            SELECT {sound_document("versions.metadata")} -> '$."{REASON}"' AS reason, variable_key, version
            FROM versions WHERE versions.sequence = commits.sequence
            UNION ALL
            SELECT {sound_document("events.body")} -> '$.metadata."{REASON}"', {LAST_VERSION}, 0
            FROM events WHERE events.sequence = commits.sequence AND events.kind = 'execution_began'
        ) AS found WHERE reason IS NOT NULL) AS placed GROUP BY reason ORDER BY min(place)
    ) AS listed
"""
_COMMITS: Final = f"""
    SELECT commits.sequence, sessions.session_id, commits.actor, commits.cause, commits.created_at,
        lower(hex(commits.hash)) AS hash,
        (SELECT json_group_array(made) FROM (
            SELECT versions.version || ' ' || variables.name AS made
            FROM versions JOIN variables ON variables.variable_key = versions.variable_key
            WHERE versions.sequence = commits.sequence ORDER BY versions.variable_key, versions.version
        ) AS listed) AS versions,
        (SELECT json_group_array(kind) FROM (
            SELECT kind FROM events WHERE events.sequence = commits.sequence ORDER BY ordinal
        ) AS listed) AS events,
        EXISTS (SELECT 1 FROM pruned WHERE pruned.sequence = commits.sequence) AS pruned,
        ({_REASONS}) AS reasons
    FROM commits JOIN sessions ON sessions.session_key = commits.session_key
"""
_SESSIONS: Final = """
    SELECT sessions.session_id, sessions.created_at, sessions.started_sequence, sessions.ended_sequence,
        ended.created_at AS ended_at,
        (SELECT created_at FROM commits WHERE commits.session_key = sessions.session_key
            ORDER BY commits.sequence DESC LIMIT 1) AS last_at,
        sessions.ttl_s, sessions.metadata, sessions.session_key,
        (SELECT count(*) FROM variables WHERE variables.session_key = sessions.session_key
            AND (sessions.ended_sequence IS NOT NULL OR deleted_sequence IS NULL)) AS variables,
        (SELECT count(*) FROM commits WHERE commits.session_key = sessions.session_key) AS commits,
        (SELECT count(*) FROM executions WHERE executions.session_key = sessions.session_key) AS executions
    FROM sessions LEFT JOIN commits AS ended ON ended.sequence = sessions.ended_sequence
"""


def commit_page(
    connection: Connection, query: CommitQuery, bounds: Bounds, after: Cursor | None, most: int
) -> Page[CommitEntry]:
    conditions = Conditions()
    of_session(connection, conditions, query.session, "commits.session_key")
    conditions.add_equal("commits.actor", query.actor)
    conditions.add_equal("commits.cause", query.cause)
    rows = rows_of_page(connection, _COMMITS, "commits.sequence", conditions, query, bounds, after, most)
    return page_of(rows, most, _commit_of, lambda row: (row.sequence,))


def _commit_of(row: Any) -> CommitEntry:
    return CommitEntry(
        row.sequence,
        row.session_id,
        row.actor,
        row.cause,
        nearest_time(row.created_at),
        row.hash,
        tuple(map(_pair_in, json.loads(row.versions))),
        tuple(json.loads(row.events)),
        bool(row.pruned),
        joined_reasons(map(_text_of, json.loads(row.reasons))),
    )


def _pair_in(made: str) -> tuple[str, int]:
    version, _, name = made.partition(" ")
    return name, int(version)


def _text_of(reason: str) -> str:
    text = stored(reason)
    return text if isinstance(text, str) else reason


def session_page(
    connection: Connection, query: SessionQuery, bounds: Bounds, after: Cursor | None, most: int
) -> Page[SessionEntry]:
    conditions = Conditions()
    of_session(connection, conditions, query.session, "sessions.session_key")
    if query.live is not None:
        conditions.add(f"sessions.ended_sequence IS {'' if query.live else 'NOT '}NULL")
    conditions.add_metadata(sound_document("sessions.metadata"), query.metadata.items())
    rows = rows_of_page(connection, _SESSIONS, "sessions.started_sequence", conditions, query, bounds, after, most)
    return page_of(rows, most, _session_of, lambda row: (row.started_sequence,))


def _session_of(row: Any) -> SessionEntry:
    return SessionEntry(
        row.session_id,
        nearest_time(row.created_at),
        row.started_sequence,
        row.ended_sequence,
        None if row.ended_at is None else nearest_time(row.ended_at),
        nearest_time(row.last_at),
        row.ttl_s,
        row.variables,
        row.commits,
        row.executions,
        stored_texts(row.metadata),
    )
