"""Check that documents are JSON and that times are in range."""

from collections.abc import Iterator
from typing import Final

from sqlalchemy import Connection

from dspex_persist.clock import EARLIEST, LATEST, to_micros
from dspex_persist.state.errors import quote
from dspex_persist.state.store.verify.outcomes import ODD_IMPORTS
from dspex_persist.state.store.verify.walk import Problem, Walk, place_of, range_text, rows_in

_UNSOUND: Final = {
    "its time is out of range": f"""
        SELECT sequence, session_key, NULL FROM commits WHERE sequence > ? AND sequence <= ?
            AND created_at NOT BETWEEN {to_micros(EARLIEST)} AND {to_micros(LATEST)}
    """,
    **{
        f"the {column} of a version is not valid JSON": f"""
            SELECT versions.sequence, variables.session_key, versions.variable_key FROM versions
            LEFT JOIN variables ON variables.variable_key = versions.variable_key
            WHERE versions.sequence > ? AND versions.sequence <= ? AND versions.{column} IS NOT NULL
                AND NOT json_valid(versions.{column})
        """
        for column in ("value", "metadata")
    },
    "the body of an event is not valid JSON": """
        SELECT sequence, (SELECT session_key FROM commits WHERE commits.sequence = events.sequence), NULL FROM events
        WHERE sequence > ? AND sequence <= ? AND NOT json_valid(body)
    """,
}
"""Kinds of problems, each with a statement that finds them in a range of commits: commit, session, variable."""
# A variable without constraints has an empty text there.
_DOCUMENTS: Final = {
    ("sessions", "metadata"): "SELECT session_id FROM sessions WHERE NOT json_valid(metadata)",
    ("tools", "spec"): "SELECT session_id FROM tools JOIN sessions USING (session_key) WHERE NOT json_valid(spec)",
    ("outcomes", "result"): "SELECT session_id FROM outcomes WHERE NOT json_valid(result)",
    **{
        ("variables", column): f"""
            SELECT session_id, name FROM variables JOIN sessions USING (session_key)
            WHERE variables.{column} {none} AND NOT json_valid(variables.{column})
        """
        for column, none in (("constraints", "<> ''"), ("metadata", "IS NOT NULL"), ("optimization", "IS NOT NULL"))
    },
}


def unsound_in(connection: Connection, after: int, last: int) -> Iterator[Problem]:
    """Yield the problems of the commits after `after`, up to and including `last`."""
    for what, statement in _UNSOUND.items():
        for sequence, session_key, variable_key in rows_in(connection, statement, after, last):
            keys = [variable_key] if variable_key is not None else []
            yield Problem(place_of(connection, sequence, session_key, keys), what)


class DocumentWalk(Walk):
    """The documents in the tables of the current state are JSON."""

    def __str__(self) -> str:
        return "the documents in the tables of the current state"

    def page(self, connection: Connection) -> Iterator[Problem]:
        for (table, column), statement in _DOCUMENTS.items():
            for session_id, *names in rows_in(connection, statement):
                where = ", ".join([f"session {quote(session_id)}", *(f"variable {quote(name)}" for name in names)])
                yield Problem(where, f"{table}.{column} is not valid JSON")
        for first, last in rows_in(connection, ODD_IMPORTS):
            yield Problem(range_text(first, last), "listed in imports, but they do not exist")
        self.more = False
