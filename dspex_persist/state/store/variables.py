"""Reading variables and their versions."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from math import inf
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, Select, bindparam, func, select, text

from dspex_persist.clock import nearest_time, to_micros
from dspex_persist.state.audit import SENSITIVE
from dspex_persist.state.fold import described
from dspex_persist.state.frozen import FrozenDict, freeze
from dspex_persist.state.model import ChangeKind, Optimization, Source, Value, Variable, VariableVersion
from dspex_persist.state.store.engine import driver_of
from dspex_persist.state.store.schema import blobs, commits, is_unicode, variables, versions
from dspex_persist.state.unit_of_work import VersionQuery
from dspex_persist.state.values.json_text import stored_texts

KINDS = tuple(ChangeKind)
SOURCES = tuple(Source)
KIND_OF: Mapping[int, ChangeKind] = dict(enumerate(KINDS))
SOURCE_OF: Mapping[int, Source] = dict(enumerate(SOURCES))
KIND_CODES = {kind: code for code, kind in enumerate(KINDS)}
SOURCE_CODES = {source: code for code, source in enumerate(SOURCES)}
_DESCRIBING_KINDS = ", ".join(
    str(KIND_CODES[kind]) for kind in KINDS if kind.merges_metadata or kind is ChangeKind.ROLLED_BACK
)

# Each text once, by its last use. Merged in Python, because SQLite's JSON functions end keys at their first NUL.
_METADATA_AS_OF = text(f"""
    SELECT kind, metadata FROM versions
    WHERE variable_key = :key AND version <= :version AND kind IN ({_DESCRIBING_KINDS}) AND metadata IS NOT NULL
    GROUP BY kind, metadata ORDER BY max(version)
""")

_value_blob = blobs.alias("value_content")
_binary_blob = blobs.alias("binary_content")
_newest = versions.alias("newest")

_VERSION_COLUMNS = (
    variables.c.variable_key,
    variables.c.variable_id,
    variables.c.name,
    variables.c.type,
    versions.c.version,
    versions.c.sequence,
    versions.c.kind,
    versions.c.source,
    versions.c.value,
    versions.c.binary,
    versions.c.metadata.label("change_metadata"),
    _value_blob.c.content.label("value_content"),
    _binary_blob.c.content.label("binary_content"),
    commits.c.actor,
    commits.c.cause,
    commits.c.created_at,
)

_VARIABLE_COLUMNS = (
    variables.c.constraints,
    variables.c.metadata,
    variables.c.optimization,
)


def select_versions(*more: Any) -> Select[Any]:
    """Build the query for versions with the columns of their commit, variable and large contents."""
    return (
        select(*_VERSION_COLUMNS, *more)
        .select_from(versions)
        .join(variables, variables.c.variable_key == versions.c.variable_key)
        .join(commits, commits.c.sequence == versions.c.sequence)
        .outerjoin(_value_blob, _value_blob.c.blob_key == versions.c.value_blob)
        .outerjoin(_binary_blob, _binary_blob.c.blob_key == versions.c.binary_blob)
    )


# Built once: SQLAlchemy needs longer to build a statement than SQLite to run it.
_SELECT_VERSIONS = select_versions()
_ONE_VERSION = _SELECT_VERSIONS.where(
    versions.c.variable_key == bindparam("variable_key"), versions.c.version == bindparam("version")
)
# Run on the driver: SQLAlchemy's rows take three times as long, and this query returns a hundred rows at a time.
_HISTORY = """
    SELECT versions.version, versions.sequence, versions.kind, versions.source, versions.value, versions.binary,
        versions.metadata, of_value.content, of_binary.content, commits.actor, commits.cause, commits.created_at
    FROM versions JOIN commits ON commits.sequence = versions.sequence
    LEFT JOIN blobs AS of_value ON of_value.blob_key = versions.value_blob
    LEFT JOIN blobs AS of_binary ON of_binary.blob_key = versions.binary_blob
    WHERE versions.variable_key = ? AND versions.version < ? ORDER BY versions.version DESC LIMIT ?
"""
_FACTS = select(variables.c.variable_id, variables.c.type).where(variables.c.variable_key == bindparam("variable_key"))
_LIVE_VARIABLES = (
    select_versions(*_VARIABLE_COLUMNS)
    .where(variables.c.session_key == bindparam("session_key"), variables.c.deleted_sequence.is_(None))
    .where(
        versions.c.version
        == select(func.max(_newest.c.version))
        .where(_newest.c.variable_key == variables.c.variable_key)
        .scalar_subquery()
    )
    .order_by(variables.c.variable_key)
)
# With bound parameters: SQLAlchemy would cache a statement with literals, which clients choose, for each call.
_CALLED_SO = (
    select(variables.c.variable_key)
    .where(variables.c.session_key == bindparam("session_key"))
    .where((variables.c.name == bindparam("identifier")) | (variables.c.variable_id == bindparam("identifier")))
    .limit(1)
)
_FIND_KEY = _CALLED_SO.order_by(variables.c.deleted_sequence.is_not(None), variables.c.variable_key.desc())
# One live variable has a name at a time, so the newest one by that commit had it then, or had it last.
_FIND_KEY_AS_OF = _CALLED_SO.where(
    select(func.min(versions.c.sequence)).where(versions.c.variable_key == variables.c.variable_key).scalar_subquery()
    <= bindparam("as_of")
).order_by(variables.c.variable_key.desc())
_NO_BOUND = 2**63 - 1


def is_sensitive(metadata: str) -> str:
    """Return an SQL expression for whether the metadata in this column marks a value as sensitive.

    Unreadable metadata counts as sensitive.
    """
    is_marked = f"lower(json_extract({metadata}, '$.{SENSITIVE}')) IS 'true'"
    return f"(CASE WHEN json_valid({metadata}) THEN {is_marked} ELSE 1 END)"


def live_variables(connection: Connection, session_key: int) -> list[tuple[int, Variable]]:
    """Return the session's current variables with their keys, oldest first."""
    # Fetched before decoding, because an exception for a damaged row would leave the statement open.
    rows = connection.execute(_LIVE_VARIABLES, {"session_key": session_key}).all()
    return [(row.variable_key, _variable_of(row)) for row in rows]


def find_version(connection: Connection, variable_key: int, version: int) -> VariableVersion | None:
    """Return one version of one variable, or None."""
    row = connection.execute(_ONE_VERSION, {"variable_key": variable_key, "version": version}).first()
    return version_of(row) if row is not None else None


def find_key(connection: Connection, session_key: int, identifier: str, as_of: int | None = None) -> int | None:
    """Return the key of the variable with this name or id: the live one, or else the last deleted one.

    `as_of`: only consider variables registered by that commit.
    """
    if not is_unicode(identifier):
        return None
    parameters = {"session_key": session_key, "identifier": identifier}
    if as_of is None:
        return connection.execute(_FIND_KEY, parameters).scalar()
    return connection.execute(_FIND_KEY_AS_OF, parameters | {"as_of": as_of}).scalar()


def history(connection: Connection, variable_key: int, query: VersionQuery) -> list[VariableVersion]:
    """Return the versions of the variable that the query selects, newest first; its identifier is not used."""
    below = _NO_BOUND if query.before is None else query.before
    rows = driver_of(connection).execute(_HISTORY, (variable_key, below, query.limit))
    variable_id, type_name = connection.execute(_FACTS, {"variable_key": variable_key}).one()
    selected: list[VariableVersion] = []
    left_bytes = inf if query.most_bytes is None else query.most_bytes
    for number, sequence, kind, source, inline, binary, metadata, large, large_binary, actor, cause, at in rows:
        text = inline if large is None else large.decode()
        value = None if text is None else Value(text, binary if large_binary is None else large_binary)
        selected.append(
            VariableVersion(
                variable_id,
                type_name,
                number,
                KIND_OF[kind],
                value,
                freeze(stored_texts(metadata)),
                SOURCE_OF[source],
                nearest_time(at),
                actor,
                cause,
                sequence,
            )
        )
        left_bytes -= selected[-1].size_bytes
        if left_bytes <= 0:
            break
    rows.close()
    return selected


def iter_versions(connection: Connection, session_key: int, after: int, until: int) -> Iterator[Row[Any]]:
    """Iterate over the session's versions with `after` < sequence <= `until`, by commit, then by key."""
    query = (
        select_versions(*_VARIABLE_COLUMNS)
        .where(commits.c.session_key == session_key, commits.c.sequence > after, commits.c.sequence <= until)
        .order_by(commits.c.sequence, versions.c.variable_key, versions.c.version)
    )
    return iter(connection.execute(query, execution_options={"yield_per": 16}))


_CONSTRAINTS_AS_OF = """
    SELECT constraints FROM variable_constraints WHERE variable_key = ? AND since_sequence <= ?
    ORDER BY since_sequence DESC LIMIT 1
"""


def constraints_as_of(connection: Connection, variable_key: int, sequence: int, current: str) -> str:
    """Return the constraints that a variable had as of a commit; `current`: those that it has now."""
    row = driver_of(connection).execute(_CONSTRAINTS_AS_OF, (variable_key, sequence)).fetchone()
    return current if row is None else str(row[0])


def variable_as_of(
    row: Row[Any],
    version: VariableVersion,
    metadata: Mapping[str, str],
    constraints: str,
    previous: Value | None,
) -> Variable:
    """Return the variable right after `version`, without its lock; after a deletion, with its `previous` value."""
    value = version.value
    if value is None:
        value = previous if previous is not None else Value("null")
    return Variable(
        id=row.variable_id,
        name=row.name,
        type=row.type,
        value=value,
        version=version.version,
        constraints=constraints,
        metadata=freeze(metadata),
        source=version.source,
        updated_at=version.created_at,
    )


def metadata_as_of(connection: Connection, variable_key: int, version: int) -> dict[str, str]:
    """Return the merged metadata of all versions up to `version`."""
    merged: Mapping[str, str] = {}
    for kind, each in connection.execute(_METADATA_AS_OF, {"key": variable_key, "version": version}):
        merged = described(merged, KIND_OF[kind], stored_texts(each))
    return dict(merged)


class VersionRow(NamedTuple):
    """A row of `select_versions` that comes from the driver."""

    variable_key: int
    variable_id: str
    name: str
    type: str
    version: int
    sequence: int
    kind: int
    source: int
    value: str | None
    binary: bytes | None
    change_metadata: str | None
    value_content: bytes | None
    binary_content: bytes | None
    actor: str
    cause: str
    created_at: int


def version_of(row: Row[Any] | VersionRow) -> VariableVersion:
    """Return the version in a row of `select_versions`."""
    return VariableVersion(
        variable_id=row.variable_id,
        type=row.type,
        version=row.version,
        kind=KIND_OF[row.kind],
        value=_value_of(row),
        metadata=freeze(stored_texts(row.change_metadata)),
        source=SOURCE_OF[row.source],
        created_at=nearest_time(row.created_at),
        actor=row.actor,
        cause=row.cause,
        sequence=row.sequence,
    )


def _value_of(row: Row[Any] | VersionRow) -> Value | None:
    text = row.value if row.value_content is None else row.value_content.decode()
    if text is None:
        return None
    return Value(text, row.binary if row.binary_content is None else row.binary_content)


def _variable_of(row: Row[Any]) -> Variable:
    value = _value_of(row)
    assert value is not None, "a live variable has a value"
    updated_at = nearest_time(row.created_at)
    lock = lock_of(row.optimization)
    if lock is not None and updated_at > lock.started_at:
        # Only the holder of a lock can write, so the newest version shows when the holder was last active.
        lock = replace(lock, renewed_at=max(updated_at, lock.renewed_at or updated_at))
    return Variable(
        id=row.variable_id,
        name=row.name,
        type=row.type,
        value=value,
        version=row.version,
        constraints=row.constraints,
        metadata=texts_in(row.metadata),
        source=SOURCE_OF[row.source],
        updated_at=updated_at,
        optimization=lock,
    )


def texts_in(text: str) -> FrozenDict[str, str]:
    """Parse the metadata of a session or of a variable from its column."""
    metadata = json.loads(text)
    if not isinstance(metadata, dict) or not all(isinstance(each, str) for each in metadata.values()):
        raise ValueError("metadata must be an object with strings")
    return FrozenDict(metadata)


def lock_of(text: str | None) -> Optimization | None:
    """Parse the lock from its JSON in its variable's row."""
    if text is None:
        return None
    fields = json.loads(text)
    for name in ("started_at", "renewed_at"):
        fields[name] = nearest_time(fields[name]) if fields[name] is not None else None
    return Optimization(**fields)


def lock_text(lock: Optimization) -> str:
    """Return the lock as JSON for its variable's row."""
    fields = asdict(lock)
    for name in ("started_at", "renewed_at"):
        fields[name] = to_micros(fields[name]) if fields[name] is not None else None
    return json.dumps(fields, sort_keys=True)
