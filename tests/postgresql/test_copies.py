"""What pg_dump has written can be restored: the functions, triggers and indexes work in the copy, too."""

import subprocess

from dspex_persist.state.distributed import PostgresState
from dspex_persist.state.model import Value
from dspex_persist.state.store import databases
from tests.engines import Databases, Postgres


def test_a_restored_copy_can_be_written_on(postgres: Databases, filled: str) -> None:
    programs = Postgres.programs()
    dump = subprocess.run([programs / "pg_dump", "--dbname", filled], check=True, capture_output=True).stdout
    copy = postgres.create()
    try:
        psql = [programs / "psql", "--dbname", copy, "--quiet", "--set", "ON_ERROR_STOP=1"]
        subprocess.run(psql, input=dump, check=True, capture_output=True)
        with PostgresState(copy) as state:
            assert state.get_variable("s", "x").value == Value("1")
            state.set_variable("s", "x", 2, metadata={"unit": "mm"})
        report = databases.check(copy)
        assert (report.commits, report.problems) == (4, ())
    finally:
        postgres.drop(copy)
