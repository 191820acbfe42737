"""The tables that `migrations/` creates; a test compares the two."""

from sqlalchemy import BLOB, REAL, BigInteger, Column, Double, Integer, LargeBinary, MetaData, Table, Text

REVISION = "0009"
"""The revision that this release reads and writes: the head of `migrations/`."""

APPEND_ONLY = ("commits", "versions", "events", "blobs", "pruned")
"""The tables in which triggers refuse changes."""

metadata = MetaData()

# PostgreSQL's have 32 bits.
NUMBER = Integer().with_variant(BigInteger, "postgresql")
BYTES = BLOB().with_variant(LargeBinary, "postgresql")
DOUBLE: REAL[float] = REAL().with_variant(Double, "postgresql")


def is_unicode(text: str) -> bool:
    """Whether `text` can be a parameter of a query: lone surrogates are not characters, and no row contains one."""
    return text.isascii() or text.encode(errors="ignore").decode() == text


sessions = Table(
    "sessions",
    metadata,
    Column("session_key", NUMBER, primary_key=True),
    Column("session_id", Text, nullable=False),
    Column("created_at", NUMBER, nullable=False),
    Column("started_sequence", NUMBER, nullable=False),
    Column("ended_sequence", NUMBER),
    Column("ttl_s", DOUBLE),
    Column("expires_at", NUMBER),
    Column("metadata", Text, nullable=False),
)

variables = Table(
    "variables",
    metadata,
    Column("variable_key", NUMBER, primary_key=True),
    Column("session_key", NUMBER, nullable=False),
    Column("variable_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("constraints", Text, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("optimization", Text),
    Column("deleted_sequence", NUMBER),
)

commits = Table(
    "commits",
    metadata,
    Column("sequence", NUMBER, primary_key=True),
    Column("session_key", NUMBER, nullable=False),
    Column("actor", Text, nullable=False),
    Column("cause", Text, nullable=False),
    Column("created_at", NUMBER, nullable=False),
    Column("hash", BYTES, nullable=False),
)

blobs = Table(
    "blobs",
    metadata,
    Column("blob_key", NUMBER, primary_key=True),
    Column("digest", BYTES, nullable=False),
    Column("content", BYTES, nullable=False),
)

# Without the generated column `number`, which this code does not use.
versions = Table(
    "versions",
    metadata,
    Column("variable_key", NUMBER, primary_key=True),
    Column("version", NUMBER, primary_key=True),
    Column("sequence", NUMBER, nullable=False),
    Column("kind", NUMBER, nullable=False),
    Column("source", NUMBER, nullable=False),
    Column("value", Text),
    Column("value_blob", NUMBER),
    Column("binary", BYTES, quote=True),
    Column("binary_blob", NUMBER),
    Column("metadata", Text),
)

events = Table(
    "events",
    metadata,
    Column("sequence", NUMBER, primary_key=True),
    Column("ordinal", NUMBER, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("body", Text, nullable=False),
)

dependencies = Table(
    "dependencies",
    metadata,
    Column("dependency_key", NUMBER, primary_key=True),
    Column("session_key", NUMBER, nullable=False),
    Column("from_id", Text, nullable=False),
    Column("to_id", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("since_sequence", NUMBER, nullable=False),
    Column("until_sequence", NUMBER),
)

outcomes = Table(
    "outcomes",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("idempotency_key", Text, primary_key=True),
    Column("cause", Text, nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("result", Text, nullable=False),
    Column("created_at", NUMBER, nullable=False),
)

executions = Table(
    "executions",
    metadata,
    Column("began_sequence", NUMBER, primary_key=True),
    Column("session_key", NUMBER, nullable=False),
    Column("execution_id", Text, nullable=False),
    Column("tool", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("parent_id", Text),
    Column("attempt", NUMBER, nullable=False),
    Column("idempotency_key", Text),
    Column("fingerprint", Text, nullable=False),
    Column("ended_sequence", NUMBER),
)

tools = Table(
    "tools",
    metadata,
    Column("session_key", NUMBER, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("worker_id", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("spec", Text, nullable=False),
    Column("registered_sequence", NUMBER, nullable=False),
)

rules = Table(
    "rules",
    metadata,
    Column("session_key", NUMBER, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("expression", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("added_sequence", NUMBER, nullable=False),
)

variable_constraints = Table(
    "variable_constraints",
    metadata,
    Column("variable_key", NUMBER, primary_key=True),
    Column("since_sequence", NUMBER, primary_key=True),
    Column("constraints", Text, nullable=False),
)

pruned = Table(
    "pruned",
    metadata,
    Column("sequence", NUMBER, primary_key=True),
    Column("marker_sequence", NUMBER, primary_key=True),
    Column("residue", BYTES, nullable=False),
)

imports = Table(
    "imports",
    metadata,
    Column("first_sequence", NUMBER, primary_key=True),
    Column("last_sequence", NUMBER, nullable=False),
)

# Filled by triggers.
metadata_entries = Table(
    "metadata_entries",
    metadata,
    Column("key", Text, primary_key=True),
    Column("value", Text, primary_key=True),
    Column("sequence", NUMBER, primary_key=True),
    Column("variable_key", NUMBER, primary_key=True),
    Column("version", NUMBER, primary_key=True),
)

# Filled by triggers in a SQLite file, elsewhere by `LogWriter`.
lm_calls = Table(
    "lm_calls",
    metadata,
    Column("sequence", NUMBER, primary_key=True),
    Column("event_ordinal", NUMBER, primary_key=True),
    Column("number", NUMBER, primary_key=True),
    Column("began_sequence", NUMBER, nullable=False),
    Column("ordinal", NUMBER, nullable=False),
    Column("model", Text, nullable=False),
    Column("at", NUMBER, nullable=False),
    Column("latency_us", NUMBER),
    Column("input_tokens", NUMBER, nullable=False),
    Column("output_tokens", NUMBER, nullable=False),
    Column("total_tokens", NUMBER, nullable=False),
    Column("cost", DOUBLE),
    Column("cached", NUMBER),
    Column("failed", NUMBER, nullable=False),
)

# Not a part of the log.
denials = Table(
    "denials",
    metadata,
    Column("denial_key", NUMBER, primary_key=True),
    Column("at", NUMBER, nullable=False),
    Column("last_at", NUMBER, nullable=False),
    Column("identity", Text, nullable=False),
    Column("peer", Text, nullable=False),
    Column("rpc", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("missing", Text, nullable=False),
    Column("count", NUMBER, nullable=False),
)
