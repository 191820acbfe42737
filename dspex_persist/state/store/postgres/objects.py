"""What else than rows is in the schema of a database: is it what the migrations made?"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain
from typing import Any, Final

from sqlalchemy import Connection, text

from dspex_persist.state.store import migrate

_MADE: Final = re.compile(r"^CREATE (?:UNIQUE )?(INDEX|TRIGGER|VIEW) (\w+)", re.MULTILINE)
_ON: Final = re.compile(r"^CREATE (?:UNIQUE )?(?:INDEX|TRIGGER) (\w+)[^;]*?\sON (\w+)", re.MULTILINE)
_FUNCTION: Final = re.compile(r"^CREATE FUNCTION (\w+)\([^;]*?\$\$(.*?)\$\$", re.MULTILINE | re.DOTALL)
_FOUND: Final = {
    "INDEX": """
        SELECT relname FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
        WHERE relnamespace = current_schema()::regnamespace AND indisvalid
    """,
    "VIEW": "SELECT viewname FROM pg_views WHERE schemaname = current_schema()",
}
_TRIGGERS: Final = """
    SELECT tgname, relname, tgisinternal, tgenabled IN ('O', 'A')
    FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid WHERE relnamespace = current_schema()::regnamespace
"""
_SIZE: Final = text("""
    SELECT coalesce(sum(pg_total_relation_size(oid)), 0) FROM pg_class
    WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r'
""")
_BODIES: Final = "SELECT proname, prosrc FROM pg_proc WHERE pronamespace = current_schema()::regnamespace"
# Each foreign key refers by one column to one.
_REFERENCES: Final = """
    SELECT child.relname, quote_ident(own.attname), parent.relname, quote_ident(other.attname)
    FROM pg_constraint
    JOIN pg_class AS child ON child.oid = conrelid
    JOIN pg_class AS parent ON parent.oid = confrelid
    JOIN pg_attribute AS own ON own.attrelid = conrelid AND own.attnum = conkey[1]
    JOIN pg_attribute AS other ON other.attrelid = confrelid AND other.attnum = confkey[1]
    WHERE contype = 'f' AND connamespace = current_schema()::regnamespace ORDER BY 1, 2
"""
# Without foreign keys: see tables.sql.
_OF_HISTORY: Final = (
    ("commits", "session_key", "sessions", "session_key"),
    ("events", "sequence", "commits", "sequence"),
    ("executions", "began_sequence", "commits", "sequence"),
    ("executions", "session_key", "sessions", "session_key"),
    ("lm_calls", "sequence", "commits", "sequence"),
    ("versions", "binary_blob", "blobs", "blob_key"),
    ("versions", "sequence", "commits", "sequence"),
    ("versions", "value_blob", "blobs", "blob_key"),
    ("versions", "variable_key", "variables", "variable_key"),
)
_MOST_ROWS: Final = 1000


@cache
def _scripts() -> str:
    folder = migrate.migrations_path() / "postgresql"
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.sql")))


def _made(kind: str) -> list[str]:
    return [name for each, name in _MADE.findall(_scripts()) if each == kind]


def schema_problems(connection: Connection) -> Iterator[tuple[str, str]]:
    """Yield what is missing or changed: triggers, their functions, views and indexes. Each with where that is.

    Users may add views and indexes, which change no result. Triggers of theirs might.
    """
    tables: Mapping[str, str] = dict(_ON.findall(_scripts()))
    for kind, statement in _FOUND.items():
        found = set(connection.execute(text(statement)).scalars())
        for name in _made(kind):
            if name not in found:
                yield _holder(kind, tables.get(name, name)), f"the {kind.lower()} {name} is missing"
    yield from _trigger_problems(tables, connection.execute(text(_TRIGGERS)).all())
    bodies: dict[str, set[str]] = {}
    for name, body in connection.execute(text(_BODIES)):
        bodies.setdefault(name, set()).add(body)
    for name, body in _FUNCTION.findall(_scripts()):
        if name not in bodies:
            yield "schema", f"the function {name} is missing"
        elif body not in bodies[name]:
            yield "schema", f"the function {name} is changed"


def _trigger_problems(tables: Mapping[str, str], rows: Any) -> Iterator[tuple[str, str]]:
    found = {(table, name): enabled for name, table, internal, enabled in rows if not internal}
    wanted = {(tables[name], name) for name in _made("TRIGGER")}
    for table, name in sorted(wanted):
        if not found.get((table, name)):
            state = "disabled" if (table, name) in found else "missing"
            yield f"table {table}", f"the trigger {name} is {state}"
    for table, name in sorted(found.keys() - wanted):
        yield f"table {table}", f"the trigger {name} is not of this schema"
    for table in sorted({table for _, table, internal, enabled in rows if internal and not enabled}):
        yield f"table {table}", "its references are not enforced: the triggers for them are disabled"


def _holder(kind: str, name: str) -> str:
    return f"{'view' if kind == 'VIEW' else 'table'} {name}"


def reference_problems(connection: Connection) -> Iterator[tuple[str, str]]:
    """Yield the rows that refer to rows that do not exist, with a foreign key or without."""
    for child, column, parent, key in (*connection.execute(text(_REFERENCES)).all(), *_OF_HISTORY):
        statement = f"""
            SELECT DISTINCT {column} FROM {child} WHERE {column} IS NOT NULL
                AND NOT EXISTS (SELECT 1 FROM {parent} WHERE {parent}.{key} = {child}.{column})
            ORDER BY {column} LIMIT {_MOST_ROWS}
        """
        for (value,) in chain(connection.execute(text(statement))):
            yield f"table {child}, {column} {value}", f"it refers to a row of {parent} that does not exist"


def size_bytes(connection: Connection) -> int:
    """Return the size of the tables and indexes."""
    return int(connection.execute(_SIZE).scalar_one())
