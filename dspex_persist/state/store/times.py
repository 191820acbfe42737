"""From times to commits: found by halving, as no index over times is kept."""

from sqlalchemy import Connection

_HEAD = "SELECT ifnull(max(sequence), 0) FROM commits"
_CREATED_AT = "SELECT created_at FROM commits WHERE sequence = ?"
_IMPORTS = "SELECT first_sequence, last_sequence FROM imports ORDER BY first_sequence DESC"
_OF_SESSION = """
    SELECT sequence, created_at FROM commits INDEXED BY commits_by_session
    WHERE session_key = ? AND sequence <= ? ORDER BY sequence DESC LIMIT 1
"""


def last_until(connection: Connection, micros: int) -> int:
    """The last commit that is not younger than a time; 0 if there is none.

    Commits are in the order of their times, but for those of imports: each of these counts as what it came after.
    """
    cursor = connection.connection.cursor()
    imports = cursor.execute(_IMPORTS).fetchall()
    low, high = 0, cursor.execute(_HEAD).fetchone()[0]
    while low < high:
        middle = before = (low + high + 1) // 2
        last = middle
        for first_imported, last_imported in imports:
            # One may have come right after another.
            if first_imported <= before <= last_imported:
                before = first_imported - 1
                last = max(last, last_imported)
        if before == 0 or cursor.execute(_CREATED_AT, (before,)).fetchone()[0] <= micros:
            low = min(last, high)
        else:
            high = before - 1
    return low


def last_own(connection: Connection) -> int:
    """The time of the last commit that was made here, not imported; 0 if there is none."""
    cursor = connection.connection.cursor()
    sequence = cursor.execute(_HEAD).fetchone()[0]
    for first_imported, last_imported in cursor.execute(_IMPORTS).fetchall():
        if first_imported <= sequence <= last_imported:
            sequence = first_imported - 1
    found = cursor.execute(_CREATED_AT, (sequence,)).fetchone()
    return int(found[0]) if found is not None else 0


def last_of_session_until(connection: Connection, session_key: int, micros: int) -> int:
    """The session's last commit that is not younger than a time, by the times that its commits have; 0: none."""
    cursor = connection.connection.cursor()
    found, low, high = 0, 1, cursor.execute(_HEAD).fetchone()[0]
    while low <= high:
        middle = (low + high) // 2
        row = cursor.execute(_OF_SESSION, (session_key, middle)).fetchone()
        if row is None:
            low = middle + 1
        elif row[1] <= micros:
            found, low = int(row[0]), middle + 1
        else:
            high = row[0] - 1
    return found
