"""The engines that tests run on: they are real, several processes share one, and nothing of them is left."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
import redis

from tests import engines
from tests.engines import Databases, Postgres, Valkey

ROOT = Path(__file__).parents[2]


def test_databases_are_apart(postgres: Databases) -> None:
    def fill(url: str) -> None:
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE rows AS SELECT 1 AS one")

    copies = [postgres.copy("apart", fill) for _ in range(2)]
    with psycopg.connect(copies[0]) as connection:
        connection.execute("DELETE FROM rows")
    with psycopg.connect(copies[1]) as connection:
        assert connection.execute("SELECT one FROM rows").fetchall() == [(1,)]
        postgres.drop(copies[0])
        names = {name for (name,) in connection.execute("SELECT datname FROM pg_database")}
    postgres.drop(copies[1])
    assert copies[0].split("/")[3].split("?")[0] not in names


def test_it_writes_to_the_disk_before_it_answers(postgresql_url: str, valkey: str) -> None:
    with psycopg.connect(postgresql_url) as connection:
        for setting in ("fsync", "full_page_writes", "synchronous_commit"):
            assert connection.execute(f"SHOW {setting}").fetchone() == ("on",)
    with redis.Redis.from_url(valkey) as client:
        assert client.config_get("append*")["appendfsync"] == "always"


@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGKILL])
def test_postgres_is_started_again(own_postgres: Postgres, number: int) -> None:
    with psycopg.connect(own_postgres.url(), autocommit=True) as connection:
        connection.execute("CREATE TABLE rows AS SELECT 1 AS one")
        own_postgres.restart(number)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    with psycopg.connect(own_postgres.url()) as connection:
        assert connection.execute("SELECT one FROM rows").fetchone() == (1,)


def test_valkey_is_started_again(own_valkey: Valkey) -> None:
    with redis.Redis.from_url(own_valkey.url()) as client:
        client.set("key", "value")
        own_valkey.take_away()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        own_valkey.bring_back()
        assert client.get("key") == b"value"


# A run of its own, whose test says which server it has, and waits.
RUN = """
import sys
from tests import engines
engines.begin_run()
for kind in (engines.Postgres, engines.Valkey):
    server = kind.shared()
    assert kind.shared().pid() == server.pid()
    print(server.pid(), server.directory, flush=True)
sys.stdin.read()
engines.end_run()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_nothing_is_left(killed: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", RUN],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        lines = [run.stdout.readline().split() for _ in range(2)]
        servers = [(int(pid), Path(directory)) for pid, directory in lines]
        supervisors = [int((directory / "supervisor").read_text(encoding="ascii")) for _, directory in servers]
        if killed:
            run.kill()
        run.communicate()
    assert run.returncode == (-signal.SIGKILL if killed else 0)
    pids = [*(pid for pid, _ in servers), *supervisors]
    if killed:
        engines.wait_until(lambda: not any(engines.runs(pid) for pid in pids))
    assert not any(engines.runs(pid) for pid in pids)
    assert not any(directory.exists() for _, directory in servers)
