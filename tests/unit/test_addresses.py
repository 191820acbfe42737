"""What an address is, and that no password of it is shown."""

import re
from pathlib import Path

import pytest

from dspex_persist import extras
from dspex_persist.addresses import DatabaseUrl, canonical, database_url, shown
from dspex_persist.audit import verify
from dspex_persist.extras import how_to_install
from dspex_persist.settings import SettingsError, load_settings
from dspex_persist.state.errors import InvalidArgumentError, UnsupportedError
from dspex_persist.wiring.connecting import connect, is_there, list_workers, open_audit
from dspex_persist.wiring.places import place_of

URL = "postgresql://me:secret@host:5432/db?schema=shop"


@pytest.mark.parametrize("url", [URL, "postgres://host/db", "PostgreSQL://host/db"])
def test_a_url_of_a_database(url: str) -> None:
    place = place_of(url)
    assert place == DatabaseUrl("postgresql", url.replace("PostgreSQL", "postgresql"))
    assert place_of(place) is place
    assert load_settings({"db": url}).db == place
    assert is_there(url)


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        (URL, "postgresql://me:***@host:5432/db?schema=shop"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("postgresql://me:se/cr@et@host/db", "postgresql://me:***@host/db"),
        ("postgresql://:secret@/db", "postgresql://:***@/db"),
        ("postgresql://host/db?password=secret&schema=x", "postgresql://host/db?password=***&schema=x"),
        ("postgresql://host/db?sslpassword=secret", "postgresql://host/db?sslpassword=***"),
        ("mysql://me:secret@host/db", "mysql://me:***@host/db"),
        ("redis://:secret/0", "redis://:***"),
        ("postgresql://me:sec/ret?schema=x", "postgresql://me:***"),
        ("postgresql://one:5432,two:5433/db?schema=x", "postgresql://one:5432,two:5433/db?schema=x"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("redis+unix:///a:b?db=1", "redis+unix:///a:b?db=1"),
        ("/a/path", "/a/path"),
        ("postgresql:/me:secret@host/db", "postgresql:/me:***@host/db"),
        ("redis:me:secret@host", "redis:me:***@host"),
        ("postgresql://host/db?pass%77ord=secret", "postgresql://host/db?pass%77ord=***"),
        ("postgresql://host/db?pasword=secret&sslmode=require", "postgresql://host/db?pasword=***&sslmode=require"),
        ("postgresql://host/db?options=-c%20a.b=secret&secret", "postgresql://host/db?options=***&***"),
        ("postgresql://me@corp:secret@host/db", "postgresql://me@corp:***@host/db"),
        ("postgresql://m/e:secret@host/db", "postgresql://m/e:***@host/db"),
        ("postgresql://me%3Asecret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:12?secret=4@host/db", "postgresql://me:***@host/db"),
        ("postgresql://host:5432/db?application_name=a@b", "postgresql://host:5432/db?application_name=a@b"),
        ("redis://secret@h", "redis://***@h"),
        ("valkeys://:secret@h/1?prefix=a&password=secret", "valkeys://:***@h/1?prefix=a&password=***"),
    ],
)
def test_passwords_are_not_shown(url: str, safe: str) -> None:
    assert shown(url) == safe
    place = database_url(url)
    if place is not None:
        assert str(place) == safe
        assert "secret" not in repr(place)


@pytest.mark.parametrize("db", ["mysql://me:secret@host/db", "grpc://127.0.0.1:50051"])
def test_other_schemes_are_refused_as_a_setting(db: str) -> None:
    with pytest.raises(SettingsError, match=r"the path of a file, or postgresql://USER@HOST/DATABASE") as refused:
        load_settings({"db": db})
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("db", ["postgresql:/me:secret@host/db", "redis:127.0.0.1:6379", "redis+unix:/run/redis.sock"])
def test_a_url_without_its_slashes_is_no_path(db: str) -> None:
    with pytest.raises(
        SettingsError, match=r"two slashes come after the scheme of a URL: (postgresql|redis)://"
    ) as raised:
        load_settings({"db": db})
    assert "secret" not in str(raised.value)
    assert load_settings({"db": f"./{db}"}).db == Path(db)


def test_other_schemes_are_refused_as_an_address() -> None:
    with pytest.raises(InvalidArgumentError, match=r"sqlite:///PATH, postgresql://USER@HOST/DATABASE, ") as refused:
        connect("mysql://me:secret@host/db")
    assert "secret" not in str(refused.value)
    with pytest.raises(InvalidArgumentError, match="did you mean 'postgresql://host/db'"):
        connect("postgressql://host/db")
    with pytest.raises(InvalidArgumentError, match=r"did you mean 'postgresql://me:\*\*\*@host/db'") as refused:
        connect("postgresql+psycopg://me:secret@host/db")
    assert "secret" not in str(refused.value)


def test_a_file_may_be_named_by_a_url() -> None:
    assert load_settings({"db": "sqlite:///folder/file.db"}).db == Path("folder/file.db")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda _: None)
    for open_it in (connect, open_audit, verify):
        with pytest.raises(InvalidArgumentError, match=f"needs psycopg.*{re.escape(how_to_install('postgresql'))}"):
            open_it(URL)


def test_what_cannot_be_verified_says_what_can_be_done() -> None:
    with pytest.raises(UnsupportedError, match="db check"):
        verify("redis://host")


def test_a_database_has_no_workers() -> None:
    with pytest.raises(InvalidArgumentError, match=r"me:\*\*\*@host.*is a database, and only servers have workers"):
        list_workers(URL)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:se/cret@host/db",
        "postgresql://me:sec@ret@host/db",
        "postgresql://me:secret@host:port/db",
        "postgresql://me:secret@host/db?schema=",
        "postgresql://me:secret@host/db?schema=a&schema=b",
        "postgresql://me:secret@host/db?schema=%00",
        f"postgresql://me:secret@host/db?schema={'%C3%A9' * 32}",
        "postgresql://me:sec%ZZret@host/db",
        "postgresql://me:secret@host/db?unknown=1",
    ],
)
def test_a_malformed_url_is_refused_without_its_password(url: str) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(InvalidArgumentError, match=r"me:\*\*\*@host") as refused:
        connect(url)
    assert "cret" not in str(refused.value)


@pytest.mark.parametrize(
    "urls",
    [
        ["redis://h", "redis://H:6379/0", "valkey://me:secret@h/?prefix=dspex", "redis://h/00"],
        ["redis+unix:///run/s", "valkey+unix:///run/s?db=0"],
        ["postgresql://host/db", "postgres://me:secret@HOST:5432/db?schema=public&sslmode=require"],
        ["postgresql://me@host", "postgresql://host/me", "postgresql://host?user=me", "postgresql://host?dbname=me"],
        ["postgresql:///db?host=/run", "postgresql://%2Frun:5432/db", "postgresql:///db?host=/run&port=5432"],
        ["postgresql://one,two:5433/db", "postgresql://two:5433,one:5432/db"],
    ],
)
def test_addresses_of_one_place(urls: list[str]) -> None:
    (place,) = set(map(canonical, urls))
    assert "secret" not in place


def test_addresses_of_several_places(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGHOST", "PGPORT", "PGDATABASE"):
        monkeypatch.delenv(name, raising=False)
    urls = [
        *("redis://h", "redis://h/1", "redis://h:6380", "redis://h?prefix=a", "redis://i", "redis+unix:///h"),
        *("redis://h/x", "postgresql://h/a", "postgresql://h/A", "postgresql://h:1/a", "postgresql://h/a?schema=b"),
        *("postgresql:///a", "postgresql:///a?service=b", "postgresql://h,i/a"),
    ]
    assert len(set(map(canonical, urls))) == len(urls)
    monkeypatch.setenv("PGHOST", "h")
    monkeypatch.setenv("PGDATABASE", "a")
    assert canonical("postgresql://") == canonical("postgresql://h/a")
