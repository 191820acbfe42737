"""Reads the values of a session's sensitive variables, to mask them where recorded LM calls quote them."""

from typing import Final

from sqlalchemy import Connection

from dspex_persist.state.masking import Secrets
from dspex_persist.state.model import Value
from dspex_persist.state.store.engine import raw_rows
from dspex_persist.state.store.variables import is_sensitive

# Of all versions, and of deleted variables, too: a call may quote a value that was stored after it.
_VALUES: Final = f"""
    SELECT DISTINCT coalesce(versions.value, CAST(contents.content AS TEXT)),
        versions.binary IS NOT NULL OR versions.binary_blob IS NOT NULL
    FROM variables JOIN versions ON versions.variable_key = variables.variable_key
    LEFT JOIN blobs AS contents ON contents.blob_key = versions.value_blob
    WHERE variables.session_key = ? AND {is_sensitive("variables.metadata")}
        AND (versions.value IS NOT NULL OR versions.value_blob IS NOT NULL)
"""


def secrets_of(connection: Connection, session_key: int) -> Secrets:
    """Return the values that the session's variables have had that are sensitive now."""
    rows = raw_rows(connection, _VALUES, session_key)
    return Secrets(Value(text, b"" if has_binary else None) for text, has_binary in rows)
