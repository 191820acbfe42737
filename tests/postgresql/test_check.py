"""The check of a database: a sound one passes, and what others have changed by hand is found."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import make_url

from dspex_persist.state.errors import InvalidArgumentError, NewerSchemaError, NotADatabaseError, UnavailableError
from dspex_persist.state.store import schema
from dspex_persist.state.store.databases import check
from tests.assets.make_database import fill
from tests.engines import Databases, runs
from tests.postgresql.hand_made import changing, copy_file, read_rows, write_rows
from tests.store.test_verify import LOG_COLUMNS, STATE_COLUMNS, alterations

CHANGED = [*LOG_COLUMNS, *STATE_COLUMNS]
TABLES = list(dict.fromkeys(table for table, _ in CHANGED))


@pytest.fixture(scope="module")
def sound(postgres: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A database with every kind of event and version. Who changes it puts it back."""
    path = tmp_path_factory.mktemp("sound") / "sound.db"
    fill(path)
    url = postgres.create()
    copy_file(path, url)
    yield url
    postgres.drop(url)


def problems_in(url: str) -> list[str]:
    return [str(problem) for problem in check(url).problems]


def test_what_a_file_has_is_as_sound_in_a_database(sound: str) -> None:
    report = check(sound)
    assert report.problems == ()
    assert (report.complete, report.anchored, report.revision) == (True, False, schema.REVISION)
    assert report.commits > 50
    assert report.pruned_commits > 0
    assert report.path == sound


@pytest.mark.usefixtures("short_ranges")
def test_several_processes_find_the_same(sound: str, helpers: list[int]) -> None:
    assert check(sound, jobs=1).problems == ()
    assert check(sound, jobs=2).problems == ()
    with changing(sound) as connection:
        (actor,) = connection.execute("SELECT actor FROM commits WHERE sequence = 9").fetchone() or ()
        connection.execute("UPDATE commits SET actor = 'x' WHERE sequence = 9")
        try:
            alone, together = check(sound, jobs=1).problems, check(sound, jobs=3).problems
        finally:
            connection.execute("UPDATE commits SET actor = %s WHERE sequence = 9", (actor,))
    assert alone == together != ()
    assert len(helpers) == 3
    assert not any(map(runs, helpers))
    with pytest.raises(InvalidArgumentError, match="from 1 to"):
        check(sound, jobs=0)


class Changes:
    """Changes a database, and puts it back."""

    def __init__(self, url: str, connection: Any) -> None:
        self.url = url
        self._connection = connection
        self.rows = {table: read_rows(connection, table) for table in TABLES}

    def of(self, table: str, row: dict[str, Any], new: dict[str, Any] | None) -> list[str]:
        """The problems with another row in the place of this one, or with none."""
        others = [each for each in self.rows[table] if each is not row]
        try:
            self._write(table, [*others, *([new] if new is not None else [])])
            return problems_in(self.url)
        finally:
            self._write(table, self.rows[table])

    def _write(self, table: str, rows: list[dict[str, Any]]) -> None:
        with self._connection.transaction():
            self._connection.execute(f"DELETE FROM {table}")
            write_rows(self._connection, table, [tuple(row.values()) for row in rows])


@pytest.fixture
def changes(sound: str) -> Iterator[Changes]:
    with changing(sound) as connection:
        yield Changes(sound, connection)
    assert problems_in(sound) == [], "put back"


@pytest.mark.parametrize("table", ["commits", "versions", "events", "variables", "executions", "pruned"])
def test_a_changed_cell_and_a_missing_row_are_found(changes: Changes, table: str) -> None:
    row = changes.rows[table][1]
    column = next(name for name, value in row.items() if isinstance(value, str | bytes) and value)
    for new in ({**row, column: alterations(table, column, row[column])[0]}, None):
        assert changes.of(table, row, new)


@pytest.mark.thorough
@pytest.mark.parametrize(("table", "column"), CHANGED)
def test_any_changed_cell_is_found(changes: Changes, table: str, column: str) -> None:
    for row in changes.rows[table][:4]:
        for value in alterations(table, column, row[column]):
            if (table, column, value) == ("sessions", "ended_sequence", None):
                # A later session may have its id: two of them cannot live.
                continue
            assert changes.of(table, row, {**row, column: value}), f"{table}.{column} of {row} changed to {value!r}"


@pytest.mark.thorough
@pytest.mark.parametrize("table", TABLES)
def test_any_missing_row_is_found(changes: Changes, table: str) -> None:
    for row in changes.rows[table]:
        assert changes.of(table, row, None), f"{table} without {row}"


# What is done to rows, and what is found. All of it at once.
TO_ROWS = {
    "UPDATE versions SET value = '\"\\ud800\"' WHERE value = (SELECT min(value) FROM versions)": "is not valid JSON",
    "UPDATE tools SET spec = '{'": "tools.spec is not valid JSON",
    "UPDATE lm_calls SET cost = 1000 WHERE number = 0": "lm_calls has another cost",
    "DELETE FROM metadata_entries WHERE sequence = (SELECT min(sequence) FROM metadata_entries)": (
        "has metadata that is missing in metadata_entries"
    ),
    "UPDATE metadata_entries SET value = value || '.'": "metadata_entries has",
    "UPDATE blobs SET content = content || 'x'": "the content does not match its digest",
    "INSERT INTO blobs VALUES (1000, sha256('y'), 'y')": "large content 1000: no version refers to it",
    "UPDATE outcomes SET cause = 'Nothing'": "which is not a command that writes",
    "INSERT INTO denials VALUES (1000, 2, 1, '', '', 'r', '', 'm', 1)": "row 1000 of denials: its times",
    "INSERT INTO imports VALUES (1, 1000000)": "listed in imports, but they do not exist",
    "UPDATE variables SET session_key = 999 WHERE variable_key = 1": "table variables, session_key 999: it refers to",
    "UPDATE versions SET variable_key = 888 WHERE variable_key = 2": "table versions, variable_key 888: it refers to",
}
TO_OBJECTS = {
    "DROP TRIGGER versions_append_only ON versions": "table versions: the trigger versions_append_only is missing",
    "ALTER TABLE events DISABLE TRIGGER events_append_only": "table events: the trigger events_append_only is disabled",
    "ALTER TABLE variables DISABLE TRIGGER ALL": "table variables: its references are not enforced",
    "CREATE TRIGGER mine AFTER INSERT ON events EXECUTE FUNCTION dspex_refuse()": "trigger mine is not of this schema",
    "CREATE OR REPLACE FUNCTION dspex_refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'": (
        "schema: the function dspex_refuse is changed"
    ),
    "DROP INDEX commits_by_session": "table commits: the index commits_by_session is missing",
    "DROP VIEW v_rules": "view v_rules: the view v_rules is missing",
    "DELETE FROM commits WHERE sequence = (SELECT max(sequence) FROM commits)": "head: it names commit",
}
TO_THE_HEAD = {
    "sequence = sequence + 1": "but the log ends at commit",
    "hash = sha256('')": "head: its hash is not that of commit",
    "next_variable_key = 1": "head: head.next_variable_key is 1",
}


@pytest.mark.parametrize("statements", [TO_ROWS, TO_OBJECTS], ids=["rows", "objects"])
def test_what_was_done_by_hand_is_found(sound: str, postgres: Databases, statements: dict[str, str]) -> None:
    url = postgres.create(make_url(sound).database)
    with changing(url) as connection:
        for statement in statements:
            assert connection.execute(statement).rowcount
    found = "\n".join(problems_in(url))
    assert [problem for problem in statements.values() if problem not in found] == [], found
    postgres.drop(url)


def test_another_head_is_found(sound: str) -> None:
    with changing(sound) as connection:
        for change, problem in TO_THE_HEAD.items():
            connection.execute(f"CREATE TABLE kept AS TABLE head; UPDATE head SET {change}")
            found = problems_in(sound)
            connection.execute("DELETE FROM head")
            missing = problems_in(sound)
            connection.execute("INSERT INTO head TABLE kept; DROP TABLE kept")
            assert [problem in each for each in found] == [True]
            assert missing == ["head: its row is missing"]


def test_what_is_no_database_of_ours(url: str) -> None:
    with pytest.raises(NotADatabaseError, match="there are no sessions"):
        check(url)
    with changing(url) as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)
    with pytest.raises(UnavailableError):
        check("postgresql:///nothing?host=/nowhere")


def test_other_revisions_are_refused(sound: str) -> None:
    with changing(sound) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0007'")
        with pytest.raises(NotADatabaseError, match="an older release made it"):
            check(sound)
        connection.execute("UPDATE alembic_version SET version_num = '0999'")
        with pytest.raises(NewerSchemaError):
            check(sound)
        connection.execute("UPDATE alembic_version SET version_num = %s", (schema.REVISION,))
