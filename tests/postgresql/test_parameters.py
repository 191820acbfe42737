"""Parameters of libpq that are wrong whatever is at the address: invalid settings, not a database that is away."""

from pathlib import Path

import pytest

from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.store.postgres.connections import Database
from tests.addressed import Run
from tests.deadline import within
from tests.end_to_end.old_style import environment
from tests.prepared import commands

# Nothing listens there: whoever tries to connect hears something else.
AWAY = "postgresql://me:geheim@/db?host=/nowhere"
WRONG = {
    "sslmode=nonsense": "sslmode",
    "connect_timeout=abc": "connect_timeout",
    "keepalives_idle=x": "keepalives_idle",
    "tcp_user_timeout=": "tcp_user_timeout",
    "nonsense=1": "nonsense",
    "port=abc": '"port"',
    "port=99999": "invalid port number",
    "port=0": "invalid port number",
    "port=5432,5433": "2 port numbers to 1 hosts",
    "hostaddr=nonsense": "hostaddr",
    "hostaddr=127.0.0.1,::1": "hostaddr",
    "target_session_attrs=x": "target_session_attrs",
    "channel_binding=x": "channel_binding",
    "gssencmode=x": "gssencmode",
    "require_auth=x": "require_auth",
    "ssl_min_protocol_version=x": "ssl_min_protocol_version",
    "ssl_min_protocol_version=TLSv1.3&ssl_max_protocol_version=TLSv1.2": "protocol version range",
    "client_encoding=LATIN1": "client_encoding",
    "replication=database": "replication",
    "service=nonsense": "service",
}
RIGHT = (
    "sslmode=verify-full",
    "connect_timeout=3",
    "keepalives=0",
    "port=",
    "gssencmode=prefer",
    "client_encoding=UTF-8",
    "target_session_attrs=read-write",
    "replication=false",
    "options=-c%20a.b%3Dc",
)
HOSTS = (
    "postgresql://h/db",
    "postgresql://h:5432/db",
    "postgresql://one:1,two:2/db",
    "postgresql://one,two/db?port=1,2",
    "postgresql://one,two/db?port=1",
    "postgresql://[::1]:5432/db",
    "postgresql:///db",
    "postgresql:///db?port=1,2&host=/a,/b",
    "postgresql://h/db?hostaddr=::1",
    "postgresql://h/db?gssencmode=require",
)


@pytest.mark.parametrize(("parameter", "named"), WRONG.items())
def test_a_wrong_one_is_an_invalid_setting(run: Run, parameter: str, named: str) -> None:
    url = f"{AWAY}&{parameter}"
    with pytest.raises(InvalidArgumentError, match=named) as refused:
        Database(url)
    assert "geheim" not in str(refused.value)
    code, printed = run("get", "s", "--db", url)
    assert (code, named in printed) == (2, True), printed


@pytest.mark.parametrize(
    "url", [f"{AWAY}&sslmode=nonsense", f"{AWAY}&connect_timeout=abc", "redis://h:0", "redis://h?a=1"]
)
def test_no_server_is_started_again_with_a_wrong_one(url: str, tmp_path: Path) -> None:
    # In a process of its own: a server sets up the log of its process.
    words = ("serve", "--db", url, "--listen", "127.0.0.1:0")
    ended = commands().run(words, cwd=tmp_path, env=environment(), timeout_s=within(60))
    assert (ended.returncode, "setting db" in ended.stderr) == (2, True), ended.stderr
    assert "geheim" not in ended.stderr


@pytest.mark.parametrize("url", [f"{AWAY}&{parameter}" for parameter in RIGHT] + list(HOSTS))
def test_a_right_one_is_none(url: str) -> None:
    Database(url)


@pytest.mark.parametrize(("variable", "value"), [("PGPORT", "1,2"), ("PGHOST", "a,b"), ("PGGSSENCMODE", "require")])
def test_the_environment_is_the_business_of_libpq(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    for url in HOSTS:
        Database(url)


def test_no_secret_is_in_the_reason() -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        Database("postgresql://me:nonsense@/db?sslmode=nonsense")
    # The password has the same text as what is shown of the parameter.
    assert "no such value" in str(refused.value)


def test_a_database_that_is_away_is_none(run: Run) -> None:
    code, printed = run("get", "s", "--db", AWAY)
    assert (code, "unavailable" in printed) == (1, True), printed
