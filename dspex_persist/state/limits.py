"""The limits of a store."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on input. Each is a setting with the same name; exceeding one raises a `LimitExceededError` with its name.

    Sizes are in bytes, of text as UTF-8; lengths are in code points; counts are numbers of entries.
    """

    value_size_bytes: int = 2 * 1024 * 1024
    binary_size_bytes: int = 16 * 1024 * 1024
    stream_size_bytes: int = 16 * 1024 * 1024
    json_depth: int = 100
    session_size_bytes: int = 64 * 1024 * 1024
    variables_per_session: int = 10_000
    tools_per_session: int = 1_000
    name_length: int = 255
    session_id_length: int = 255
    metadata_entries: int = 64
    metadata_size_bytes: int = 16 * 1024
    constraints_size_bytes: int = 64 * 1024
    batch_entries: int = 10_000
    history_entries: int = 10_000
    history_size_bytes: int = 16 * 1024 * 1024
    queue_length: int = 10_000
    watchers: int = 10_000
    executions: int = 10_000
    queued_executions: int = 1_000
    execution_writes: int = 10_000
    execution_size_bytes: int = 64 * 1024 * 1024
    journal_size_bytes: int = 1024 * 1024
