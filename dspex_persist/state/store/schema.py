"""The tables that `migrations/` creates; a test compares the two."""

from sqlalchemy import BLOB, REAL, Column, Integer, MetaData, Table, Text

REVISION = "0008"
"""The revision that this release reads and writes: the head of `migrations/`."""

APPEND_ONLY = ("commits", "versions", "events", "blobs", "pruned")
"""The tables in which triggers refuse changes."""

metadata = MetaData()


def is_unicode(text: str) -> bool:
    """Whether `text` can be a parameter of a query: lone surrogates are not characters, and no row contains one."""
    return text.isascii() or text.encode(errors="ignore").decode() == text


sessions = Table(
    "sessions",
    metadata,
    Column("session_key", Integer, primary_key=True),
    Column("session_id", Text, nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("started_sequence", Integer, nullable=False),
    Column("ended_sequence", Integer),
    Column("ttl_s", REAL),
    Column("expires_at", Integer),
    Column("metadata", Text, nullable=False),
)

variables = Table(
    "variables",
    metadata,
    Column("variable_key", Integer, primary_key=True),
    Column("session_key", Integer, nullable=False),
    Column("variable_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("constraints", Text, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("optimization", Text),
    Column("deleted_sequence", Integer),
)

commits = Table(
    "commits",
    metadata,
    Column("sequence", Integer, primary_key=True),
    Column("session_key", Integer, nullable=False),
    Column("actor", Text, nullable=False),
    Column("cause", Text, nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("hash", BLOB, nullable=False),
)

blobs = Table(
    "blobs",
    metadata,
    Column("blob_key", Integer, primary_key=True),
    Column("digest", BLOB, nullable=False),
    Column("content", BLOB, nullable=False),
)

# Without the generated column `number`, which this code does not use.
versions = Table(
    "versions",
    metadata,
    Column("variable_key", Integer, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("sequence", Integer, nullable=False),
    Column("kind", Integer, nullable=False),
    Column("source", Integer, nullable=False),
    Column("value", Text),
    Column("value_blob", Integer),
    Column("binary", BLOB),
    Column("binary_blob", Integer),
    Column("metadata", Text),
)

events = Table(
    "events",
    metadata,
    Column("sequence", Integer, primary_key=True),
    Column("ordinal", Integer, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("body", Text, nullable=False),
)

dependencies = Table(
    "dependencies",
    metadata,
    Column("dependency_key", Integer, primary_key=True),
    Column("session_key", Integer, nullable=False),
    Column("from_id", Text, nullable=False),
    Column("to_id", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("since_sequence", Integer, nullable=False),
    Column("until_sequence", Integer),
)

outcomes = Table(
    "outcomes",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("idempotency_key", Text, primary_key=True),
    Column("cause", Text, nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("result", Text, nullable=False),
    Column("created_at", Integer, nullable=False),
)

executions = Table(
    "executions",
    metadata,
    Column("began_sequence", Integer, primary_key=True),
    Column("session_key", Integer, nullable=False),
    Column("execution_id", Text, nullable=False),
    Column("tool", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("parent_id", Text),
    Column("attempt", Integer, nullable=False),
    Column("idempotency_key", Text),
    Column("fingerprint", Text, nullable=False),
    Column("ended_sequence", Integer),
)

tools = Table(
    "tools",
    metadata,
    Column("session_key", Integer, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("worker_id", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("spec", Text, nullable=False),
    Column("registered_sequence", Integer, nullable=False),
)

rules = Table(
    "rules",
    metadata,
    Column("session_key", Integer, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("expression", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("added_sequence", Integer, nullable=False),
)

variable_constraints = Table(
    "variable_constraints",
    metadata,
    Column("variable_key", Integer, primary_key=True),
    Column("since_sequence", Integer, primary_key=True),
    Column("constraints", Text, nullable=False),
)

pruned = Table(
    "pruned",
    metadata,
    Column("sequence", Integer, primary_key=True),
    Column("marker_sequence", Integer, primary_key=True),
    Column("residue", BLOB, nullable=False),
)

imports = Table(
    "imports",
    metadata,
    Column("first_sequence", Integer, primary_key=True),
    Column("last_sequence", Integer, nullable=False),
)

# Filled by triggers.
metadata_entries = Table(
    "metadata_entries",
    metadata,
    Column("key", Text, primary_key=True),
    Column("value", Text, primary_key=True),
    Column("sequence", Integer, primary_key=True),
    Column("variable_key", Integer, primary_key=True),
    Column("version", Integer, primary_key=True),
)

# Filled by triggers.
lm_calls = Table(
    "lm_calls",
    metadata,
    Column("sequence", Integer, primary_key=True),
    Column("event_ordinal", Integer, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("began_sequence", Integer, nullable=False),
    Column("ordinal", Integer, nullable=False),
    Column("model", Text, nullable=False),
    Column("at", Integer, nullable=False),
    Column("latency_us", Integer),
    Column("input_tokens", Integer, nullable=False),
    Column("output_tokens", Integer, nullable=False),
    Column("total_tokens", Integer, nullable=False),
    Column("cost", REAL),
    Column("cached", Integer),
    Column("failed", Integer, nullable=False),
)

# Not a part of the log.
denials = Table(
    "denials",
    metadata,
    Column("denial_key", Integer, primary_key=True),
    Column("at", Integer, nullable=False),
    Column("last_at", Integer, nullable=False),
    Column("identity", Text, nullable=False),
    Column("peer", Text, nullable=False),
    Column("rpc", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("missing", Text, nullable=False),
    Column("count", Integer, nullable=False),
)
