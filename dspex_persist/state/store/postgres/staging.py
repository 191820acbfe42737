"""The statements of a group that return nothing: the database gets all of them at once."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import psycopg

from dspex_persist.state.store.postgres.connections import run
from dspex_persist.state.store.postgres.cursors import merged
from dspex_persist.state.store.postgres.inserts import MOST_CHARACTERS, Many, insert_of, update_of

_MOST_CHARACTERS: Final = 8 * 2**20
"""What is longer is sent at once: another round trip takes no time beside it."""


class Staged:
    """Keeps statements until they are sent together: for a network, or a busy machine, each round trip counts.

    Statements of many rows are prepared once for each connection, as the database takes longer to plan them than to
    run them.

    Args:
        connection: The connection.
        prepared: The names of the statements that it has prepared.
        begin: Called before anything is sent: begins the transaction if there is none yet.
    """

    def __init__(
        self, connection: "psycopg.Connection[Any]", prepared: set[str], begin: Callable[[], object] = lambda: None
    ) -> None:
        self._connection = connection
        self._begin = begin
        self._prepared = prepared
        self._texts: list[str] = []
        self._length = 0

    def execute(self, statement: str, parameters: Sequence[object] = ()) -> None:
        """Run a statement, sooner or later."""
        if any(isinstance(each, str | bytes) and len(each) > MOST_CHARACTERS for each in parameters):
            self.send()
            self._connection.execute(statement, parameters)
        else:
            self._add(merged(self._connection, statement, parameters))

    def executemany(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        """Run a statement for each row, sooner or later. No two rows of an UPDATE have the same key."""
        many = insert_of(statement) or update_of(statement)
        if many is not None:
            self.run_all(many, list(rows))
        else:
            for row in rows:
                self.execute(statement, row)

    def run_all(self, many: Many, rows: Sequence[Sequence[object]]) -> None:
        """Run a statement for many rows, sooner or later."""
        arrays = many.parameters(rows) if rows else None
        if arrays is not None:
            if many.name not in self._prepared:
                run(self._connection, many.preparation)
                self._prepared.add(many.name)
            self._add(f"EXECUTE {many.name} ({', '.join(map(_quoted, arrays))})")
        elif len(rows) > 1:
            middle = len(rows) // 2
            self.run_all(many, rows[:middle])
            self.run_all(many, rows[middle:])
        elif rows:
            self.send()
            self._connection.execute(many.text, many.arrays(rows))

    def _add(self, text: str) -> None:
        self._texts.append(text)
        self._length += len(text)
        if self._length > _MOST_CHARACTERS:
            self.send()

    def send(self) -> None:
        """Have the database run what was kept."""
        self._begin()
        if self._texts:
            run(self._connection, self.take())

    def take(self) -> str:
        """Return the statements that were kept, for somebody else to send; they are forgotten."""
        texts, self._texts, self._length = self._texts, [], 0
        return ";\n".join(texts)


def _quoted(text: str) -> str:
    if "\0" in text:
        raise psycopg.DataError("PostgreSQL text fields cannot contain NUL (0x00) bytes")
    # `standard_conforming_strings` is on: nothing else has a meaning in it.
    return "'" + text.replace("'", "''") + "'"
